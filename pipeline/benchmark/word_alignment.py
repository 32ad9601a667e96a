"""Word alignment of image tokens, for models that start from random weights on the embedded scenes.

The embedded benchmark starts from random weights, and a decoder does not learn to use the features of a random vision
tower within minutes. So, while such a model is trained, one more loss asks each image token's logits over the (tied)
word embeddings to name what its cell of the image shows. Real vision towers have been aligned with captions before, so
a model loaded from a checkpoint needs none of this. The labels come from the `objects` that the scenes write into their
records.

Shapes: B images, C cells (image tokens) of all images, c some of them, D decoder width, V vocabulary.
"""

import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from pipeline.data.processor import Processor
from pipeline.data.sample import Sample
from pipeline.errors import DataError

MARKED = "rectangle"
"""The word of cells inside a marked region."""
OBJECT_WEIGHT = 4.0
"""Weight of a cell that shows an object against one that shows road or sky."""
MIN_OVERLAP = 0.2
"""A cell shows an object that covers this share of the cell, or that lies with this share of itself inside the cell."""


class CellWords:
    """Target distributions over words for the image tokens of a sample."""

    def __init__(self, processor: Processor) -> None:
        self.processor = processor

    def targets(self, sample: Sample, grid_13: Tensor) -> Tensor:
        """f32[C, V]: equal shares over the words of what each cell shows; the weather where it shows no object.

        Raises:
            DataError: the sample's record has no `objects`.
        """
        record = _record(Path(sample.meta["record"]))
        if "objects" not in record:
            raise DataError(
                f"{sample.meta['record']}: no `objects`: only the embedded scenes have the labels that "
                "`word_alignment` needs. Leave the job out of benchmark.word_alignment."
            )
        merge = self.processor.image_processor.merge_size
        rows, columns = int(grid_13[0, 1]) // merge, int(grid_13[0, 2]) // merge
        width, height = record["size"][0] / columns, record["size"][1] / rows
        targets_CV = torch.zeros(rows * columns, self.processor.vocab_size)
        for cell in range(rows * columns):
            frame = (cell % columns * width, cell // columns * height, width, height)
            shown = [o for o in record["objects"] if _covers(o["box"], frame)]
            words = " ".join(shown[-1]["words"]) if shown else record["weather"]
            if sample.box is not None and _overlap(sample.box, frame) > 0:
                words += f" {MARKED}"
            targets_CV[cell, list(self._ids(words))] = 1.0
        return targets_CV / targets_CV.sum(-1, keepdim=True)

    @lru_cache(maxsize=4096)  # noqa: B019  (one instance a run)
    def _ids(self, words: str) -> tuple[int, ...]:
        return tuple(self.processor.tokenizer.encode(f" {words}", add_special_tokens=False))  # as inside a sentence


@lru_cache(maxsize=1 << 14)
def _record(path: Path) -> dict[str, Any]:
    return cast(dict[str, Any], json.loads(path.read_text()))


def _overlap(box: Sequence[float], frame: Sequence[float]) -> float:
    sides = [min(box[i] + box[i + 2], frame[i] + frame[i + 2]) - max(box[i], frame[i]) for i in (0, 1)]
    return max(0.0, sides[0]) * max(0.0, sides[1])


def _covers(box: Sequence[float], frame: Sequence[float]) -> bool:
    return _overlap(box, frame) > MIN_OVERLAP * min(frame[2] * frame[3], box[2] * box[3])


def cell_loss(targets_CV: Tensor, num_images: int) -> Callable[[slice, Tensor], Tensor]:
    """A loss of some cells' logits over the words; over all cells it is the sum over images of the (weighted) mean
    cross-entropy between a cell's words and its token's logits. [ours]

    All images of a call have the same number of cells.
    """
    weight_BC = torch.where(targets_CV.max(-1).values < 1, OBJECT_WEIGHT, 1.0).view(num_images, -1)
    share_C = (weight_BC / weight_BC.sum(-1, keepdim=True)).flatten()

    def loss(cells: slice, logits_cV: Tensor) -> Tensor:
        # The model's vocabulary may be padded beyond the tokenizer's.
        log_q_cV = torch.log_softmax(logits_cV.float(), dim=-1)[:, : targets_CV.shape[1]]
        return -(share_C[cells] * (targets_CV[cells] * log_q_cV).sum(-1)).sum()

    return loss


class VisionProbe:
    """Keeps the image tokens f32[C, D] that the vision tower made in the last forward, gradients attached."""

    def __init__(self, model: nn.Module) -> None:
        self._features: Tensor | None = None
        model.get_submodule("model.visual").register_forward_hook(self._keep)

    def take(self) -> Tensor:
        """The last forward's image tokens."""
        features, self._features = self._features, None
        assert features is not None, "no forward since the last take"
        return features

    def _keep(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._features = output.pooler_output
