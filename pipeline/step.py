"""One optimizer step: forwards, losses as global sums, backwards, and what the step measured.

Shapes: N answer tokens of a micro-batch, B samples, T all positions of the padded batch, L MoE layers, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from pipeline import hardness, losses, moe
from pipeline.batches import MicroBatch
from pipeline.config import JobConfig
from pipeline.fused_head import FusedHead, fused_distillation_loss
from pipeline.losses import DistillationTerms
from pipeline.vision import VisionProbe, cell_loss


@dataclass
class StepStats:
    """Sums over the answer tokens and samples of one optimizer step; `reduce` makes them global."""

    sums: dict[str, float] = field(default_factory=dict)
    index: list[Tensor] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)
    router_load_LE: Tensor | None = None
    """Tokens routed to each expert of each MoE layer, over all ranks and accumulation steps."""

    def add(self, **values: float | Tensor) -> None:
        """Add to the named sums."""
        for key, value in values.items():
            self.sums[key] = self.sums.get(key, 0.0) + float(value)

    def reduce(self, device: torch.device) -> None:
        """Sum over ranks, in one collective. Every rank must have added the same keys."""
        keys = sorted(self.sums)
        total = torch.tensor([self.sums[k] for k in keys], dtype=torch.float64, device=device)
        dist.all_reduce(total)
        self.sums = dict(zip(keys, total.tolist(), strict=True))

    def gather_scores(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """(table index, instance score) of every sample distilled in this step, over all ranks, sorted by index."""
        index = torch.cat(self.index) if self.index else torch.zeros(0, dtype=torch.int64)
        scores = torch.cat(self.scores) if self.scores else torch.zeros(0)
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, (index.cpu().numpy(), scores.float().cpu().numpy()))
        all_index, all_scores = (np.concatenate([g[i] for g in gathered]) for i in (0, 1))
        order = np.argsort(all_index, kind="stable")
        return all_index[order], all_scores[order]


@dataclass(frozen=True, slots=True)
class StepContext:
    """What a step needs besides its batches. `gradient_scale` undoes DeepSpeed's averaging (ranks, accumulation)."""

    engine: Any
    head: FusedHead
    probe: moe.RouterProbe | None
    """None for a dense model."""
    top_k: int
    """Experts per token."""
    vision: VisionProbe | None
    """None without word alignment."""
    job: JobConfig
    temperature: float
    beta: float
    """Token tilt of this step; 0 without H2G."""
    normaliser: float
    """Mean KL weight of past global batches; the current weights are divided by it."""

    @property
    def gradient_scale(self) -> float:
        return float(dist.get_world_size() * self.engine.gradient_accumulation_steps())


def run_step(context: StepContext, micro_batches: Sequence[MicroBatch], *, stop: bool = False) -> StepStats:
    """Forward and backward of every micro-batch; the optimizer has not stepped yet, so a bad loss can still stop it.

    The last `engine.step()` is left to the caller, who checks the returned sums first. `stop` (a signal came) is
    summed with them, so that all ranks stop at the same step.
    """
    stats = StepStats()
    device = context.engine.device
    count = torch.tensor([sum(len(m.labels_N) for m in micro_batches)], dtype=torch.float64, device=device)
    dist.all_reduce(count)
    num_tokens = max(float(count), 1.0)
    for position, micro in enumerate(micro_batches):
        if position:
            context.engine.step()  # accumulation boundary: no optimizer step happens here
        loss = _forward(context, micro.to(device, next(context.engine.module.parameters()).dtype), num_tokens, stats)
        context.engine.backward(loss * context.gradient_scale)
    stats.add(stop=stop)
    stats.reduce(device)
    return stats


def _forward(context: StepContext, micro: MicroBatch, num_tokens: float, stats: StepStats) -> Tensor:
    """This rank's share of the global loss: summed over ranks and micro-batches it is METHOD section 7's L."""
    distill = context.job.distill
    terms = context.head.loss(
        partial(context.engine, **micro.inputs, logits_to_keep=micro.keep, use_cache=False),
        micro.rows_BW,
        partial(
            fused_distillation_loss,
            labels_N=micro.labels_N,
            targets=micro.targets,
            alpha_N=micro.alpha_N,
            temperature=context.temperature,
            gate_scale=distill.gate_scale if distill and distill.gate else None,
            beta=context.beta,
            normaliser=context.normaliser,
        ),
    )
    loss = terms.loss_sum / num_tokens
    stats.add(
        tokens=len(micro.labels_N),
        samples=len(micro.sample_ids),
        positions=micro.inputs["attention_mask"].sum(),
    )
    stats.add(loss=terms.loss_sum.detach(), ce=terms.ce_N.sum(), alpha=micro.alpha_N.sum())
    _measure_hardness(context, micro, terms, stats)
    if context.vision is not None and micro.cells_CV is not None:
        loss = loss + _vision_loss(context, context.vision.take(), micro, stats)
    if context.probe is not None:
        loss = loss + _router_loss(context, context.probe.take(), micro.inputs["attention_mask"], stats)
    return loss


def _vision_loss(context: StepContext, features_CD: Tensor, micro: MicroBatch, stats: StepStats) -> Tensor:
    """Word alignment of image tokens: mean over the images of the global batch."""
    embeddings_VD = context.engine.module.get_input_embeddings().weight
    assert micro.cells_CV is not None
    loss = cell_loss(features_CD, embeddings_VD, micro.cells_CV, len(micro.sample_ids))
    stats.add(vision=loss.detach())
    return context.job.vision_words * loss / context.job.global_batch_size


def _measure_hardness(context: StepContext, micro: MicroBatch, terms: DistillationTerms, stats: StepStats) -> None:
    """Token and instance hardness of the samples whose KL was computed: no extra forward."""
    stats.add(kl=0, distilled=0, token_hardness=0, instance_hardness=0, scored=0, weight=0, weight_count=0)
    if terms.kl_N is None or terms.hardness_N is None:
        return
    on_N = micro.alpha_N > 0
    on_B = torch.from_numpy(micro.request.alpha_B > 0)
    scores_B = hardness.instance_scores(
        terms.hardness_N,
        micro.sample_N,
        len(micro.sample_ids),
        tail_weight=context.job.hardness.tail_weight,
        tail_share=context.job.hardness.tail_share,
    ).cpu()
    stats.index.append(torch.from_numpy(micro.request.index_B)[on_B])
    stats.scores.append(scores_B[on_B])
    stats.add(kl=terms.kl_N[on_N].sum(), distilled=on_N.sum(), token_hardness=terms.hardness_N[on_N].sum())
    stats.add(instance_hardness=scores_B[on_B].sum(), scored=on_B.sum())
    stats.add(weight=terms.weight_sum, weight_count=terms.weight_count)


def _router_loss(context: StepContext, logits: list[Tensor], mask_BS: Tensor, stats: StepStats) -> Tensor:
    """Load-balance and z-loss of every MoE layer. Fractions are counted over all ranks of this micro-step."""
    valid_T = mask_BS.flatten().bool()
    load_LE = torch.stack([moe.expert_counts(x_TE, context.top_k, valid_T) for x_TE in logits])
    packed = torch.cat([load_LE.flatten().double(), valid_T.sum().double()[None]])
    dist.all_reduce(packed)
    load_LE, num_valid = packed[:-1].view_as(load_LE), float(packed[-1])
    stats.router_load_LE = load_LE if stats.router_load_LE is None else stats.router_load_LE + load_LE
    share = 1.0 / (num_valid * context.engine.gradient_accumulation_steps())
    total = logits[0].new_zeros(())
    for layer, (logits_TE, load_E) in enumerate(zip(logits, load_LE, strict=True)):
        balance = losses.balance_loss(logits_TE, valid_T, (load_E / load_E.sum()).float())
        z = losses.router_z_loss(logits_TE, valid_T)
        total = total + share * (context.job.router.balance * balance + context.job.router.z * z)
        stats.add(balance=balance.detach() * share, z=z.detach() * share)
        stats.add(**{f"router_entropy/{layer}": losses.router_entropy(logits_TE.detach(), valid_T) * share})
    return total
