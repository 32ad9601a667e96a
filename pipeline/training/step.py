"""One optimizer step: forwards, losses as global sums, backwards, and what the step measured.

Shapes: N answer tokens of a micro-batch, B samples, T all positions of the padded batch, L MoE layers, E experts,
J feature rows (see `features`).
"""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from pipeline.benchmark.word_alignment import VisionProbe, cell_loss
from pipeline.method import losses
from pipeline.method.features import SETTING, HiddenStates, gather, mapped
from pipeline.method.fused_head import CHUNK_ELEMENTS, FusedHead, fused_distillation_loss, linear_loss
from pipeline.method.losses import DistillationTerms, FeatureTerms
from pipeline.method.pooling import instance_scores
from pipeline.models import router
from pipeline.recipe import FeatureConfig, JobConfig
from pipeline.training import engine
from pipeline.training.batches import MicroBatch

# -- what a step sums --------------------------------------------------------------------------------------------------


@dataclass
class StepStats:
    """Sums over the answer tokens and samples of one optimizer step; `reduce` makes them global."""

    sums: dict[str, float] = field(default_factory=dict)
    index: list[Tensor] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)
    not_finite: list[str] = field(default_factory=list)
    """sample_ids of this rank's micro-batches whose loss is NaN or infinite."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Samples of this rank that could not be encoded, and why."""
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

    def gather_scores(self, most: int, device: torch.device) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """(table index, instance score) of every sample distilled in this step, over all ranks, sorted by index.

        One collective of `most` rows a rank: the largest share of the global batch. Ranks may fill any number of them.
        """
        index = torch.cat(self.index) if self.index else torch.zeros(0, dtype=torch.int64)
        scores = torch.cat(self.scores) if self.scores else torch.zeros(0)
        assert len(index) == len(scores) <= most, (len(index), len(scores), most)
        rows = torch.full((most, 2), -1.0, dtype=torch.float64)  # float64 holds every index and score exactly
        rows[: len(index), 0], rows[: len(index), 1] = index.double(), scores.double()
        gathered = [torch.empty_like(rows, device=device) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, rows.to(device))
        filled = torch.cat(gathered).cpu().numpy()
        filled = filled[filled[:, 0] >= 0]
        filled = filled[np.argsort(filled[:, 0], kind="stable")]
        return filled[:, 0].astype(np.int64), filled[:, 1].astype(np.float32)


# -- the step ----------------------------------------------------------------------------------------------------------
# Every loss is a sum divided by a count over the global batch, never a mean of means: with uneven micro-batches that
# would change the gradient's direction. DeepSpeed averages gradients over ranks and accumulation steps, so the loss is
# multiplied by both before its backward.


@dataclass(frozen=True, slots=True)
class StepContext:
    """What a step needs besides its batches."""

    engine: Any
    head: FusedHead
    probe: router.RouterProbe | None
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
    feature_beta: float = 0.0
    """Tilt on feature rows of this step."""
    feature_normaliser: float = 1.0
    """The same of the feature term's weights."""
    word_alignment: float = 0.0
    """Weight of the word alignment of image tokens."""

    @property
    def features(self) -> FeatureConfig | None:
        """Settings of the feature term; None without it."""
        return self.job.distill.active_features if self.job.distill else None

    @property
    def gradient_scale(self) -> float:
        """Undoes DeepSpeed's averaging over ranks and accumulation steps."""
        return float(dist.get_world_size() * self.engine.gradient_accumulation_steps())


def run_step(context: StepContext, micro_batches: Sequence[MicroBatch], *, stop: bool = False) -> StepStats:
    """Forward and backward of every micro-batch; the optimizer has not stepped yet, so a bad loss can still stop it.

    The last `engine.step()` is left to the caller, who looks at the returned sums first. `stop` (a signal came) is
    summed with them, so that all ranks stop at the same step.
    """
    stats = StepStats()
    device = context.engine.device
    # The counts first: each micro-batch's loss is divided by those of the whole global batch.
    counts = [sum(len(m.labels_N) for m in micro_batches), sum(m.features.count for m in micro_batches if m.features)]
    total = torch.tensor(counts, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    num_tokens, num_features = (max(n, 1.0) for n in total.tolist())
    for position, micro in enumerate(micro_batches):
        if position:
            context.engine.step()  # accumulation boundary: no optimizer step happens here
        moved = micro.to(device, next(context.engine.module.parameters()).dtype)
        loss = _forward(context, moved, num_tokens, num_features, stats)
        context.engine.backward(loss * context.gradient_scale)
    stats.add(stop=stop)
    stats.reduce(device)
    return stats


def _forward(
    context: StepContext, micro: MicroBatch, num_tokens: float, num_features: float, stats: StepStats
) -> Tensor:
    """This micro-batch's share of the global loss: summed over ranks and micro-batches it is METHOD section 7's L."""
    with _hidden_states(context) as states:
        terms = _head_loss(context, micro)
    loss = terms.loss_sum / num_tokens
    stats.add(
        tokens=len(micro.labels_N),
        samples=len(micro.sample_ids),
        positions=micro.inputs["attention_mask"].sum(),
        targets_read=micro.targets_read,
        left_out=len(micro.left_out),
    )
    stats.left_out |= micro.left_out
    share = float(terms.loss_sum.detach())
    stats.add(loss=share, ce=terms.ce_N.sum(), alpha=micro.alpha_N.sum())
    if not math.isfinite(share):
        stats.not_finite += micro.sample_ids
    if states is not None and context.features is not None:
        features = _feature_terms(context, states.hidden_BSD, micro, stats)
        loss = loss + context.features.weight * features.loss_sum / num_features
    _measure_hardness(context, micro, terms, stats)
    if context.vision is not None and micro.cells_CV is not None:
        loss = loss + _vision_loss(context, context.vision.take(), micro, stats)
    if context.probe is not None:
        loss = loss + router_loss(context, context.probe.take(), micro.inputs["attention_mask"], stats)
    return loss


# -- terms of the loss -------------------------------------------------------------------------------------------------


def _head_loss(context: StepContext, micro: MicroBatch) -> DistillationTerms:
    """Cross-entropy and KL. The engine's forward runs in here: its LM head computes them in the place of logits."""
    distill = context.job.distill
    return context.head.loss(
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


def _hidden_states(context: StepContext) -> contextlib.AbstractContextManager[HiddenStates | None]:
    if context.features is None:
        return contextlib.nullcontext()
    return HiddenStates(context.engine.module, context.features.student_layer, SETTING, "student")


def _feature_terms(context: StepContext, hidden_BSD: Tensor, micro: MicroBatch, stats: StepStats) -> FeatureTerms:
    """The feature term. W runs on every rank in every micro-step, also on no rows: ZeRO waits for its gradient."""
    targets = micro.features
    assert targets is not None, "the job has features, the micro-batch has no sketches"
    mapped_JR = mapped(context.engine.module, gather(hidden_BSD, targets.places))
    terms = losses.feature_loss(
        mapped_JR, targets.sketch_JR, targets.alpha_J, beta=context.feature_beta, normaliser=context.feature_normaliser
    )
    stats.add(
        features=targets.count,
        feature_loss=terms.loss_sum.detach(),
        feature_alpha=targets.alpha_J.sum(),
        feature_weighted=terms.weighted_sum,
        feature_plain=terms.plain_sum,
        feature_hardness=terms.distance_J.sum(),
        feature_rows=len(terms.distance_J),
    )
    return terms


def _vision_loss(context: StepContext, features_CD: Tensor, micro: MicroBatch, stats: StepStats) -> Tensor:
    """Word alignment of image tokens: mean over the images of the global batch. Collective under ZeRO-3."""
    weight_VD = context.engine.module.get_input_embeddings().weight
    assert micro.cells_CV is not None
    cells = cell_loss(micro.cells_CV, len(micro.sample_ids))
    # The gradients are computed along with the loss, so backward, where the weight is in parts again, does not read it.
    with engine.whole(weight_VD):
        rows = max(1, CHUNK_ELEMENTS // len(weight_VD))
        loss = linear_loss(features_CD, weight_VD, cells, rows, rows)
    stats.add(vision=loss.detach())
    return context.word_alignment * loss / context.job.batch.global_size


def _measure_hardness(
    context: StepContext,
    micro: MicroBatch,
    terms: DistillationTerms,
    stats: StepStats,
) -> None:
    """Token and instance hardness of the samples that the teacher still teaches: no extra forward."""
    # Zeros first: all ranks must have the same keys when they sum, whether they distil anything in this step or not.
    stats.add(kl=0, distilled=0, token_hardness=0, instance_hardness=0, scored=0, weighted=0, plain=0)
    if terms.kl_N is None or terms.hardness_N is None:
        return
    on_N = micro.alpha_N > 0
    stats.add(kl=terms.kl_N[on_N].sum(), distilled=on_N.sum(), token_hardness=terms.hardness_N[on_N].sum())
    stats.add(weighted=terms.weighted_sum, plain=terms.plain_sum)
    gate_N = terms.gate_N if context.job.hardness.gate else None
    nats_N = losses.chased_nats(terms.kl_N / context.temperature**2, gate_N)
    settings = context.job.hardness
    scores_B = instance_scores(
        nats_N,
        micro.sample_N,
        len(micro.sample_ids),
        tail_weight=settings.tail_weight,
        tail_share=settings.tail_share,
    )
    # Features have a hardness of their own, on another scale: it weighs their rows, and is not in this one. [ours]
    on_B = torch.from_numpy(micro.request.alpha_B > 0)
    stats.index.append(torch.from_numpy(micro.request.index_B)[on_B])
    stats.scores.append(scores_B[on_B])
    stats.add(instance_hardness=scores_B[on_B].sum(), scored=on_B.sum())


def router_loss(context: StepContext, logits: list[Tensor], mask_BS: Tensor, stats: StepStats) -> Tensor:
    """This rank's share of the load-balance and z-loss of every MoE layer, padding excluded. Collective.

    Fractions are counted over all ranks of this micro-step; micro-steps are averaged.
    """
    valid_T = mask_BS.flatten().bool()
    load_LE = torch.stack([router.expert_counts(x_TE, context.top_k, valid_T) for x_TE in logits])
    packed = torch.cat([load_LE.flatten().double(), valid_T.sum().double()[None]])
    dist.all_reduce(packed)
    load_LE, num_valid = packed[:-1].view_as(load_LE), float(packed[-1])
    stats.router_load_LE = load_LE if stats.router_load_LE is None else stats.router_load_LE + load_LE
    share = 1.0 / (num_valid * context.engine.gradient_accumulation_steps())
    dropped_L = context.probe.dropped() if context.probe else None
    if dropped_L is not None:
        stats.add(dropped=dropped_L.sum())
    total = logits[0].new_zeros(())
    for layer, (logits_TE, load_E) in enumerate(zip(logits, load_LE, strict=True)):
        balance = losses.balance_loss(logits_TE, valid_T, (load_E / load_E.sum()).float())
        z = losses.router_z_loss(logits_TE, valid_T)
        total = total + share * (context.job.moe.balance * balance + context.job.moe.z * z)
        stats.add(
            **{
                f"balance/{layer}": balance.detach() * share,
                f"z/{layer}": z.detach() * share,
                f"router_entropy/{layer}": losses.router_entropy(logits_TE.detach(), valid_T) * share,
            }
        )
    return total
