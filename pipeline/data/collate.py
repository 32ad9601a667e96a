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
    """i64[S]: the answers that are learnt from, each with its <|im_end|>; -100 elsewhere."""
    pixel_values: Tensor
    """f32[P, C*T*p*p]"""
    image_grid_thw: Tensor
    """i64[n, 3]: frames, rows and columns of patches per image."""
    cut_tokens: int = 0
    """Answer tokens dropped to fit `data.max_length`, <|im_end|> among them."""
    problem: str | None = None
    """Why nothing is learnt from this sample: it could not be encoded, and stands in its batch as one token."""


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
    left_out: dict[str, str]
    """Samples that could not be encoded, and why."""


def collate(
    encoded: Sequence[Encoded],
    pad_id: int,
    image_token_id: int,
    *,
    merge_size: int = 2,
    side: Literal["left", "right"] = "right",
) -> Batch:
    """Pad to the longest sample: right for training, left for generation.

    A batch without any image gets a black one of one token in a column of padding. The vision tower then runs in every
    forward: ranks that share its weights (ZeRO-3) would wait for each other for ever otherwise. It is masked like all
    padding, so nothing sees it.

    Args:
        merge_size: side of the square of patches that makes an image token.

    Returns:
        input_ids, attention_mask, labels, mm_token_type_ids (1 at the samples' image tokens): i64[B, S];
        pixel_values f32[P, C*T*p*p] and image_grid_thw i64[n, 3] of all samples, in order.
    """
    columns = {
        "input_ids": _pad([e.input_ids for e in encoded], pad_id, side),
        "attention_mask": _pad([torch.ones_like(e.input_ids) for e in encoded], 0, side),
        "labels": _pad([e.labels for e in encoded], IGNORED, side),
    }
    columns["mm_token_type_ids"] = (columns["input_ids"] == image_token_id).long()
    pixel_values = torch.cat([e.pixel_values for e in encoded])
    image_grid_thw = torch.cat([e.image_grid_thw for e in encoded])
    if not len(image_grid_thw):
        fill = {"input_ids": pad_id, "attention_mask": 0, "labels": IGNORED, "mm_token_type_ids": 0}
        more = (1, 0) if side == "left" else (0, 1)
        columns = {k: torch.nn.functional.pad(v, more, value=fill[k]) for k, v in columns.items()}
        columns["input_ids"][0, 0 if side == "left" else -1] = image_token_id
        pixel_values = pixel_values.new_zeros(merge_size**2, pixel_values.shape[1])
        image_grid_thw = torch.tensor([[1, merge_size, merge_size]])
    return Batch(
        input_ids=columns["input_ids"],
        attention_mask=columns["attention_mask"],
        labels=columns["labels"],
        mm_token_type_ids=columns["mm_token_type_ids"],
        pixel_values=pixel_values,
        image_grid_thw=image_grid_thw,
        sample_ids=[e.sample_id for e in encoded],
        cut_tokens=sum(e.cut_tokens for e in encoded),
        left_out={e.sample_id: e.problem for e in encoded if e.problem is not None},
    )


def _pad(rows: Sequence[Tensor], value: int, side: Literal["left", "right"]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value, padding_side=side)
