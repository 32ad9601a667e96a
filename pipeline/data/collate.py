"""Encoded samples, and batches of them padded to one length.

Shapes: B samples, S sequence, P patches of all images, n images; C*T*p*p values per patch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

import torch
from torch import Tensor

IGNORED = -100
"""Label of every position outside the answer."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """One sample as tensors. Labels are not shifted: logits row t predicts label t + 1."""

    sample_id: str
    input_ids: Tensor
    """i64[S]"""
    labels: Tensor
    """i64[S]: the answer and its <|im_end|>, -100 elsewhere."""
    pixel_values: Tensor
    """f32[P, C*T*p*p]"""
    image_grid_thw: Tensor
    """i64[n, 3]: frames, rows and columns of patches per image."""
    cut_tokens: int = 0
    """Answer tokens dropped to fit `data.max_length`, <|im_end|> among them."""


class Batch(TypedDict):
    """Padded samples under the names of Qwen3-VL's forward, plus their ids."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    mm_token_type_ids: Tensor
    pixel_values: Tensor
    image_grid_thw: Tensor
    sample_ids: list[str]
    cut_tokens: int


def collate(
    encoded: Sequence[Encoded], pad_id: int, image_token_id: int, *, side: Literal["left", "right"] = "right"
) -> Batch:
    """Pad to the longest sample: right for training, left for generation.

    Returns:
        input_ids, attention_mask, labels, mm_token_type_ids (1 at image tokens): i64[B, S];
        pixel_values f32[P, C*T*p*p] and image_grid_thw i64[n, 3] of all samples, in order.
    """
    input_ids = _pad([e.input_ids for e in encoded], pad_id, side)
    return Batch(
        input_ids=input_ids,
        attention_mask=_pad([torch.ones_like(e.input_ids) for e in encoded], 0, side),
        labels=_pad([e.labels for e in encoded], IGNORED, side),
        mm_token_type_ids=(input_ids == image_token_id).long(),
        pixel_values=torch.cat([e.pixel_values for e in encoded]),
        image_grid_thw=torch.cat([e.image_grid_thw for e in encoded]),
        sample_ids=[e.sample_id for e in encoded],
        cut_tokens=sum(e.cut_tokens for e in encoded),
    )


def _pad(rows: Sequence[Tensor], value: int, side: Literal["left", "right"]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value, padding_side=side)
