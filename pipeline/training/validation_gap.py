"""The gap between the student's and the teacher's cross-entropy on held-out samples: what drives an adaptive release.

The teacher's side comes from the store, so measuring is a student's forward and nothing more.
Shapes: M held-out samples, N answer tokens of a micro-batch, D decoder width, V vocabulary.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data.index.samples import sample_ids, select
from pipeline.data.processor import Processor
from pipeline.data.sample import Sample
from pipeline.errors import UserError
from pipeline.method.fused_head import FusedHead, fused_distillation_loss
from pipeline.method.losses import DistillationTerms
from pipeline.targets.store import SoftTargetStore
from pipeline.training.batches import MicroBatch, MicroBatches, Request


def hold_out(
    samples: Sequence[Sample], count: int, seed: int, before: Sequence[str] | None = None
) -> tuple[Sequence[Sample], Sequence[Sample]]:
    """(samples to train on, `count` held-out ones), both in the order given; a function of ids and seed alone.

    Args:
        before: ids that the job has held out so far. They stay held out as far as they are still there, and no other
            sample takes the place of those that are not: the job may have trained on it.

    Raises:
        UserError: more than half of the samples would be held out; or none of those from before is left.
    """
    if before is not None:
        return _split(samples, _still_there(samples, before))
    if 2 * count > len(samples):
        raise UserError(
            f"release: adaptive holds out {count} samples, more than half of the {len(samples)} of the training split. "
            "Set distill.adaptive.samples lower. Nothing was started."
        )
    keys = (xxhash.xxh3_64_intdigest(f"{seed}\n{sample_id}") for sample_id in sample_ids(samples))
    return _split(samples, {i for _, i in heapq.nsmallest(count, zip(keys, range(len(samples)), strict=True))})


def _still_there(samples: Sequence[Sample], before: Sequence[str]) -> set[int]:
    wanted = set(before)
    held = {place for place, sample_id in enumerate(sample_ids(samples)) if sample_id in wanted}
    if not held:
        raise UserError(
            f"release: adaptive measures the {len(wanted)} samples that this job has held out from its start, and none "
            "of them is in the training split any more. Restore some, or train under another job name. Nothing was "
            "started."
        )
    return held


def _split(samples: Sequence[Sample], held: set[int]) -> tuple[Sequence[Sample], Sequence[Sample]]:
    return select(samples, (i for i in range(len(samples)) if i not in held)), select(samples, sorted(held))


@dataclass(frozen=True, slots=True)
class _Part:
    """A micro-batch of held-out samples without its targets, and what is left of them."""

    micro: MicroBatch
    teacher_ce_N: NDArray[np.float64]


class GapProbe:
    """Held-out samples of this rank, read once; every rank has equally many, so that all join every collective."""

    def __init__(
        self,
        samples: Sequence[Sample],
        processor: Processor,
        store: SoftTargetStore,
        *,
        micro_batch_size: int,
        temperature: float,
    ) -> None:
        """Raises StoreError when the store has other answer tokens for a sample."""
        self.num_samples, self.temperature = len(samples), temperature
        share = np.arange(dist.get_rank(), len(samples) + dist.get_world_size() - 1, dist.get_world_size())
        share = share[: -(-len(samples) // dist.get_world_size())]
        cuts = [share[i : i + micro_batch_size] for i in range(0, len(share), micro_batch_size)]
        requests = [Request(cut % len(samples), np.ones(len(cut), np.float32)) for cut in cuts]
        # Ranks with a sample less than others repeat one, so that all join every collective; it does not count.
        self._counted = [torch.from_numpy(cut < len(samples)) for cut in cuts]
        batches = MicroBatches(samples, processor, store, requests, None)
        self._parts = [_without_targets(batches[i]) for i in range(len(requests))]

    def measure(self, engine: Any, head: FusedHead) -> float:
        """Mean over all answer tokens of CE_student - CE_teacher in nats, at the targets' temperature. Collective.

        Sums are taken sample by sample and always in one order. So the gap depends on the split into ranks and
        micro-batches only as far as the forward itself rounds differently.
        """
        sums_2M = torch.zeros(2, self.num_samples, dtype=torch.float64)
        engine.eval()
        with torch.no_grad():
            for part, counted_B in zip(self._parts, self._counted, strict=True):
                micro = part.micro
                gap_N = self._student_ce(engine, head, micro) - part.teacher_ce_N
                place_N = micro.sample_N.numpy()
                for position in counted_B.nonzero().flatten().tolist():
                    own_N = gap_N[place_N == position]
                    sums_2M[:, micro.request.index_B[position]] = torch.tensor([own_N.sum(), len(own_N)])
        engine.train()
        sums_2M = sums_2M.to(engine.device)
        dist.all_reduce(sums_2M)  # exact: of each sample one rank has the sum, and the others 0
        gap, tokens = sums_2M.cpu().numpy().sum(axis=1)
        return float(gap / tokens)

    def _student_ce(self, engine: Any, head: FusedHead, micro: MicroBatch) -> NDArray[np.float64]:
        moved = micro.to(engine.device, next(engine.module.parameters()).dtype)

        def loss(hidden_ND: Tensor, weight_VD: Tensor) -> DistillationTerms:
            return fused_distillation_loss(hidden_ND / self.temperature, weight_VD, moved.labels_N, None, moved.alpha_N)

        forward = partial(engine, **moved.inputs, logits_to_keep=moved.keep, use_cache=False)
        ce_N: NDArray[np.float64] = head.loss(forward, moved.rows_BW, loss).ce_N.double().cpu().numpy()
        return ce_N


def _without_targets(micro: MicroBatch) -> _Part:
    assert micro.targets is not None
    teacher_ce_N = -micro.targets.gold_logprob.double().numpy()
    return _Part(replace(micro, targets=None, alpha_N=torch.zeros_like(micro.alpha_N)), teacher_ce_N)
