"""Feature sketches: a teacher's hidden states at image cells and answer tokens, small enough to keep.

A sketch is R h with one seeded Gaussian R for all samples: cosines between hidden states survive it up to about
1/sqrt(r) [ours: Johnson-Lindenstrauss; METHOD section 1]. Stored as int8 with one scale per group of 64.
Shape suffixes: C = cells (16 an image), T = answer tokens, N = C + T, D = width of the teacher, R = width of a sketch,
G = groups of a sketch.
"""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.errors import StoreError
from pipeline.recipe import SketchConfig
from pipeline.targets.container.reader import StoreReader
from pipeline.targets.container.shards import Bytes

CELLS = 4
"""Cells along each side of an image."""
GROUP = 64
"""Values that share a scale."""


@dataclass(frozen=True, slots=True)
class Sketch:
    """One sample's features, as far as cosines need them."""

    cells_CR: Tensor
    """f32, images in order, cells row by row."""
    tokens_TR: Tensor
    """f32, the rows that predict the answer tokens."""


class SketchStore(StoreReader):
    """Random access to sketches by sample_id. Safe to fork and pickle."""

    kind = "sketches"

    def read(self, sample_id: str) -> Sketch:
        """A sample's sketch. StoreError when the store has none, or its bytes do not match their checksum."""
        raw, rows = self.read_record(sample_id)
        return decode(raw, rows, int(self.identity["sketch_dim"]))


def identity_of(settings: SketchConfig | None) -> dict[str, Any]:
    """What a store's identity says about its sketches; nothing when it has none."""
    return {} if settings is None else {f"sketch_{k}": v for k, v in settings.model_dump().items()}


def projection(width: int, settings: SketchConfig) -> Tensor:
    """R as f32[D, R], entries N(0, 1/R): the same for every sample, process and machine."""
    return _projection(width, settings.dim, settings.seed)


@functools.cache
def _projection(width: int, dim: int, seed: int) -> Tensor:
    matrix_DR: Tensor = torch.randn(width, dim, generator=torch.Generator().manual_seed(seed)) / dim**0.5
    return matrix_DR


def cell_means(hidden_PD: Tensor, grid: tuple[int, int]) -> Tensor:
    """Mean hidden state of each cell [16, D] of one image.

    Args:
        hidden_PD: hidden states at the image's tokens, row by row.
        grid: rows and columns of image tokens. A side shorter than 4 gives some tokens to several cells.
    """
    map_1DHW = hidden_PD.float().T.reshape(1, -1, *grid)
    return F.adaptive_avg_pool2d(map_1DHW, CELLS)[0].flatten(1).T


def encode(sketch: Sketch) -> Bytes:
    """u8: number of cells as u32, then every row's int8 values, then every row's f16 scales.

    Raises:
        StoreError: a value is not finite.
    """
    values_NR = torch.cat([sketch.cells_CR, sketch.tokens_TR])
    if not torch.isfinite(values_NR).all():
        raise StoreError("the teacher's hidden states are not finite")
    scale_NG1 = (_grouped(values_NR).abs().amax(dim=-1, keepdim=True) / 127).half()
    if not torch.isfinite(scale_NG1).all():
        raise StoreError("the teacher's hidden states are too large for float16 scales")
    steps = scale_NG1.float().clamp_min(torch.finfo(torch.float16).smallest_normal)
    codes_NR = (_grouped(values_NR) / steps).round().clamp(-127, 127).to(torch.int8)
    head = np.array([len(sketch.cells_CR)], "<u4")
    return np.concatenate([part.reshape(-1).view(np.uint8) for part in (head, codes_NR.numpy(), scale_NG1.numpy())])


def decode(raw: Bytes, rows: int, dim: int) -> Sketch:
    """Inverse of `encode`, up to rounding."""
    cells = int(raw[:4].view("<u4")[0])
    codes = torch.from_numpy(raw[4 : 4 + rows * dim].view(np.int8).copy()).view(rows, dim)
    scales = torch.from_numpy(raw[4 + rows * dim :].view("<f2").astype(np.float32)).view(rows, dim // GROUP, 1)
    steps = scales.clamp_min(torch.finfo(torch.float16).smallest_normal)
    values_NR = (_grouped(codes.float()) * steps).view(rows, dim)
    return Sketch(values_NR[:cells], values_NR[cells:])


def _grouped(values_NR: Tensor) -> Tensor:
    """[N, G, 64]"""
    return values_NR.view(len(values_NR), values_NR.shape[-1] // GROUP, GROUP)
