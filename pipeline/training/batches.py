"""From planned sample indices to the tensors of one micro-batch.

Shapes: B samples, S sequence, N answer tokens of the micro-batch (all samples, in order), K teacher entries.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from pipeline.benchmark.word_alignment import CellWords
from pipeline.data.collate import Encoded
from pipeline.data.index.samples import sizes
from pipeline.data.processor import Processor
from pipeline.data.sample import Sample
from pipeline.data.shipping import loaded
from pipeline.errors import StoreError
from pipeline.method.features import FeatureTargets, find_places, join_sketches
from pipeline.recipe import DataConfig
from pipeline.targets.sketches import CELLS, SketchStore
from pipeline.targets.soft_targets import SoftTargets, concatenate
from pipeline.targets.store import SoftTargetStore

MODEL_INPUTS = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw", "mm_token_type_ids")


# -- requests and micro-batches ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Request:
    """What one rank reads for one micro-batch: table indices [B] and the shares of the KL and feature terms of each."""

    index_B: NDArray[np.int64]
    alpha_B: NDArray[np.float32]
    feature_alpha_B: NDArray[np.float32] | None = None
    """None: a job without features."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One forward's tensors. `targets` has a row per answer token; None when no sample has alpha > 0."""

    request: Request
    sample_ids: tuple[str, ...]
    inputs: dict[str, Tensor]
    keep: Tensor
    """Positions i64[W] that reach the LM head: the span that covers every answer row."""
    rows_BW: Tensor
    """bool: which (sample, kept position) pairs predict an answer token; True N times."""
    labels_N: Tensor
    sample_N: Tensor
    """i64: position in the micro-batch of the sample that each answer token belongs to."""
    alpha_N: Tensor
    targets: SoftTargets | None
    cells_CV: Tensor | None
    """Words that image tokens shall name, see `vision`; None without word alignment."""
    targets_read: int = 0
    """Samples whose soft targets were read from the store."""
    features: FeatureTargets | None = None
    """None: a job without features. Without rows once all samples' features are released."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Samples that could not be encoded, and why: they have no answer token here."""

    def to(self, device: torch.device, dtype: torch.dtype) -> "MicroBatch":
        """Move to a device, without waiting where the memory is pinned; pixel values become the model's dtype."""
        moved = self._each(lambda tensor: tensor.to(device, non_blocking=True))
        moved.inputs["pixel_values"] = moved.inputs["pixel_values"].to(dtype)
        return moved

    def pin_memory(self) -> "MicroBatch":
        """For a DataLoader with `pin_memory`."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "MicroBatch":
        changed = {k: change(getattr(self, k)) for k in ("keep", "rows_BW", "labels_N", "sample_N", "alpha_N")}
        return MicroBatch(
            request=self.request,
            sample_ids=self.sample_ids,
            inputs={k: change(v) for k, v in self.inputs.items()},
            targets=None if self.targets is None else self.targets.each(change),
            cells_CV=None if self.cells_CV is None else change(self.cells_CV),
            targets_read=self.targets_read,
            left_out=self.left_out,
            features=None if self.features is None else self.features.each(change),
            **changed,
        )


def by_length(samples: Sequence[Sample], index_G: NDArray[np.int64]) -> NDArray[np.int64]:
    """Places of a step's samples, short ones first: number of images, then characters; equals keep their order.

    Ranks take strides of it, so the samples of a micro-step have similar lengths on all ranks: less padding, and less
    waiting for each other. A step still has the samples that were planned, and the loss is one sum over them.
    """
    images_G, characters_G = sizes(samples, index_G)
    return np.lexsort((characters_G, images_G))


# -- building them, in workers -----------------------------------------------------------------------------------------


class MicroBatches(Dataset[MicroBatch]):
    """Builds micro-batches for a list of requests; a torch DataLoader runs it in workers."""

    def __init__(
        self,
        samples: Sequence[Sample],
        processor: Processor,
        store: SoftTargetStore | None,
        requests: Sequence[Request],
        cells: CellWords | None,
        sketches: SketchStore | None = None,
    ) -> None:
        self.samples, self.processor, self.store, self.requests = samples, processor, store, requests
        self.cells, self.sketches = cells, sketches

    def __len__(self) -> int:
        return len(self.requests)

    def __getitem__(self, position: int) -> MicroBatch:
        request = self.requests[position]
        encoded = [self.processor.encode_or_leave_out(self.samples[i]) for i in request.index_B]
        request = without_left_out(request, encoded)
        batch = self.processor.collate(encoded)
        cells_CV = None
        if self.cells is not None:
            pairs = zip(request.index_B, encoded, strict=True)
            cells_CV = torch.cat([self.cells.targets(self.samples[i], e.image_grid_thw) for i, e in pairs])
        micro = assemble(request, encoded, dict(batch), self.store, cells_CV)
        if self.sketches is None or request.feature_alpha_B is None:
            return micro
        merge_size = self.processor.image_processor.merge_size
        return with_features(micro, self.sketches, request.feature_alpha_B, merge_size)


def assemble(
    request: Request,
    encoded: Sequence[Encoded],
    batch: dict[str, Any],
    store: SoftTargetStore | None,
    cells_CV: Tensor | None = None,
) -> MicroBatch:
    """Find the answer rows (logit row t predicts token t + 1) and join the soft targets by sample_id."""
    # The head computes one span of positions for all samples; within it only the rows that predict an answer count.
    labels_BS = batch["labels"]
    next_BS = torch.full_like(labels_BS, -100)
    next_BS[:, :-1] = labels_BS[:, 1:]
    used_S = (next_BS != -100).any(0).nonzero().flatten()
    first, last = (int(used_S[0]), int(used_S[-1])) if len(used_S) else (0, 0)  # all were left out
    keep = torch.arange(first, last + 1)
    rows_BW = next_BS[:, keep] != -100
    sample_N = rows_BW.nonzero()[:, 0]
    alpha_B = torch.from_numpy(request.alpha_B)
    counts = [int(c) for c in rows_BW.sum(1)]
    targets, targets_read = _join_targets(request, encoded, counts, store)
    return MicroBatch(
        request=request,
        sample_ids=tuple(e.sample_id for e in encoded),
        inputs={k: batch[k] for k in MODEL_INPUTS},
        keep=keep,
        rows_BW=rows_BW,
        labels_N=next_BS[:, keep][rows_BW],
        sample_N=sample_N,
        alpha_N=alpha_B[sample_N],
        targets=targets,
        cells_CV=cells_CV,
        targets_read=targets_read,
        left_out={e.sample_id: e.problem for e in encoded if e.problem is not None},
    )


def without_left_out(request: Request, encoded: Sequence[Encoded]) -> Request:
    """The request with no share of the teacher for samples that could not be encoded: nothing is read for them."""
    good_B = np.array([e.problem is None for e in encoded])
    if good_B.all():
        return request
    features_B = None if request.feature_alpha_B is None else request.feature_alpha_B * good_B
    return Request(request.index_B, request.alpha_B * good_B, features_B)


def _join_targets(
    request: Request, encoded: Sequence[Encoded], counts: list[int], store: SoftTargetStore | None
) -> tuple[SoftTargets | None, int]:
    """Targets of all rows, and how many samples were read. Released samples are not read, and get inert rows."""
    wanted = request.alpha_B > 0
    if store is None or not wanted.any():
        return None, 0
    distilled = [place for place, is_wanted in enumerate(wanted) if is_wanted]
    stored, rows = store.read_joined([encoded[place].sample_id for place in distilled])
    for place, tokens in zip(distilled, rows, strict=True):
        if tokens != counts[place]:
            raise StoreError(
                f"sample {encoded[place].sample_id}: the store has {tokens} answer tokens, this run has "
                f"{counts[place]}. Make the store again with `clkd teacher`."
            )
    if len(distilled) == len(encoded):
        return stored, len(distilled)
    parts = iter(stored.split(rows))
    joined = [next(parts) if w else _inert(count, stored) for w, count in zip(wanted, counts, strict=True)]
    return concatenate(joined), len(distilled)


def with_features(
    micro: MicroBatch, store: SketchStore, feature_alpha_B: NDArray[np.float32], merge_size: int
) -> MicroBatch:
    """Join the sketches of the samples with alpha > 0; the store is not read for the others.

    Args:
        merge_size: side of the square of patches that makes an image token.

    Raises:
        StoreError: a sample has no sketch, or one of other images or tokens.
    """
    alpha_B = torch.from_numpy(feature_alpha_B)
    wanted = alpha_B.nonzero()[:, 0].tolist()
    sample_N, kept_N = micro.rows_BW.nonzero(as_tuple=True)
    types_BS, grids_thw = micro.inputs["mm_token_type_ids"], micro.inputs["image_grid_thw"]
    places = find_places(types_BS, grids_thw, merge_size, sample_N, micro.keep[kept_N], wanted)
    images = len(grids_thw) if bool(types_BS.any()) else 0  # a batch without any has a stand-in, see `collate`
    count = CELLS**2 * images + len(micro.labels_N)
    return replace(micro, features=join_sketches(store, micro.sample_ids, alpha_B, places, count))


def _inert(count: int, like: SoftTargets) -> SoftTargets:
    """Rows without targets, whose KL is finite and then multiplied by alpha = 0: all mass in the tail, or no draw."""
    return SoftTargets(
        ids=torch.arange(like.top_k).expand(count, like.top_k),
        logprobs=torch.full((count, like.top_k), float("-inf")),
        tail_logprob=torch.full((count,), float("-inf") if like.sampled else 0.0),
        gold_logprob=torch.zeros(count),
        entropy=torch.zeros(count),
        sampled=like.sampled,
    )


def iterate(dataset: MicroBatches, data: DataConfig) -> Iterator[MicroBatch]:
    """Micro-batches in the order of the requests, built by `data.workers` processes ahead of their use."""
    yield from loaded(dataset, data.workers)
