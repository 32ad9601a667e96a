"""Soft targets of a teacher: from logits to a sparse view, and from there to bytes and back.

Shape suffixes: T = answer tokens (`<|im_end|>` included, in order), V = vocabulary, K = entries kept a token.
Everything is in nats, at the softmax temperature the targets were made with.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.errors import StoreError

Bytes = NDArray[np.uint8]

LOGPROB_FLOOR = 32.0
"""Kept entries further than this below the top one are stored at this distance: e^-32 of its probability."""
_LEVELS = 255
_ROWS_AT_ONCE = 4096
"""Rows coded together: the working set stays in the processor's cache."""
_FLOATS = 5
"""f16 values per record: top log-prob, range, log tail, gold log-prob, entropy."""


@dataclass(frozen=True, slots=True)
class SoftTargets:
    """What is kept of the teacher's distribution p, one row per answer token [METHOD section 1].

    Ranks descend: column 0 holds the most probable token. Head and tail together sum to 1.
    """

    ids: Tensor
    """i64[T, K], distinct within a row."""
    logprobs: Tensor
    """f32[T, K], log p of `ids`."""
    tail_logprob: Tensor
    """f32[T], log of the mass outside the top K; -inf if there is none."""
    gold_logprob: Tensor
    """f32[T], log p of the token that the data set has."""
    entropy: Tensor
    """f32[T], H(p) over the whole vocabulary."""

    def __len__(self) -> int:
        return self.ids.shape[0]

    @property
    def top_k(self) -> int:
        """K, entries kept per token."""
        return self.ids.shape[1]

    def rows(self, index: slice | Tensor) -> "SoftTargets":
        """The selected rows, as views where the index allows it."""
        return SoftTargets(*(getattr(self, f.name)[index] for f in fields(self)))

    def to(self, device: torch.device | str) -> "SoftTargets":
        """The same targets on another device."""
        return SoftTargets(*(getattr(self, f.name).to(device) for f in fields(self)))


def clipped_top_k(top_k: int, vocab_size: int) -> int:
    """Entries kept of a vocabulary: at most V - 1, so that the tail is never an empty set."""
    return min(top_k, vocab_size - 1)


def from_logits(logits_TV: Tensor, gold_T: Tensor, top_k: int, temperature: float) -> SoftTargets:
    """Keep the top K of softmax(logits / temperature), the exact tail mass, log p(gold) and H(p).

    Args:
        logits_TV: any float dtype, computed in float32; row t is the one that *predicts* gold_T[t].
        gold_T: i64, the data set's tokens.
        top_k: clipped to V - 1.
        temperature: > 0; a truncated tail cannot be re-tempered afterwards.

    Raises:
        StoreError: a row has no finite maximum (NaN, or infinite logits).
    """
    log_p_TV = torch.log_softmax(logits_TV.float() / temperature, dim=-1)
    logprobs_TK, ids_TK = log_p_TV.topk(clipped_top_k(top_k, log_p_TV.shape[-1]), dim=-1)
    if not torch.isfinite(logprobs_TK[:, :1]).all():
        raise StoreError("the teacher's logits are not finite, so they are no distribution")
    gold_logprob_T = log_p_TV.gather(-1, gold_T[:, None])[:, 0]
    entropy_T = torch.special.entr(log_p_TV.exp()).sum(dim=-1)
    # Exact tail: 1 - sum_k p_k would cancel once the teacher is sharp.
    tail_T = log_p_TV.scatter_(-1, ids_TK, float("-inf")).logsumexp(dim=-1)
    return SoftTargets(ids_TK, logprobs_TK, tail_T, gold_logprob_T, entropy_T)


def concatenate(parts: Sequence[SoftTargets]) -> SoftTargets:
    """Rows of all parts in order; K must agree.

    Raises:
        StoreError: nothing to concatenate, or parts with different K.
    """
    widths = sorted({part.top_k for part in parts})
    if len(widths) != 1:
        raise StoreError(f"soft targets can be joined only at one top_k, got {widths or 'no parts'}")
    return SoftTargets(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(SoftTargets)))


@dataclass(frozen=True, slots=True)
class Codec:
    """A way to turn targets into records of equal size, u8[T, record_bytes(K, V)], and back."""

    encode: Callable[[SoftTargets, int], Bytes]
    """(targets, vocab_size) -> u8[T, bytes]"""
    decode: Callable[[Bytes, int, int], SoftTargets]
    """(records, top_k, vocab_size) -> targets"""
    record_bytes: Callable[[int, int], int]
    """(top_k, vocab_size) -> bytes per token"""


def id_bits(vocab_size: int) -> int:
    """Bits of a packed token id, ceil(log2 V): 18 for 151,936."""
    return max(1, (vocab_size - 1).bit_length())


def packed8_record_bytes(top_k: int, vocab_size: int) -> int:
    """Bytes per token: packed ids, K 8-bit log-probabilities, five f16."""
    return -(-top_k * id_bits(vocab_size) // 8) + top_k + 2 * _FLOATS


def encode_packed8(targets: SoftTargets, vocab_size: int) -> Bytes:
    """Records of ids at ceil(log2 V) bits, log-probs at 8 bits over [lp_K, lp_1], and five f16 [ours].

    Raises:
        StoreError: an id outside [0, V), or K outside [1, V).
    """
    top_k = targets.top_k
    if not 1 <= top_k < vocab_size:
        raise StoreError(f"top_k {top_k} must lie in [1, {vocab_size - 1}] for a vocabulary of {vocab_size}")
    ids_TK = targets.ids.cpu().numpy()
    if ids_TK.size and not 0 <= ids_TK.min() <= ids_TK.max() < vocab_size:
        raise StoreError(f"token ids {ids_TK.min()}..{ids_TK.max()} do not fit a vocabulary of {vocab_size}")
    split = packed8_record_bytes(top_k, vocab_size) - 2 * _FLOATS - top_k
    records = np.empty((len(targets), packed8_record_bytes(top_k, vocab_size)), np.uint8)
    for start in range(0, len(targets), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        codes_TK, floats_T5 = _quantise(targets.rows(rows))
        records[rows, :split] = _pack(ids_TK[rows].astype(np.uint32), id_bits(vocab_size))
        records[rows, split : -2 * _FLOATS] = codes_TK
        records[rows, -2 * _FLOATS :] = floats_T5.view(np.uint8)
    return records


def decode_packed8(records: Bytes, top_k: int, vocab_size: int) -> SoftTargets:
    """Targets of packed8 records. Head and tail are rescaled to sum to 1: a KL of them stays >= 0 [ours].

    Raises:
        StoreError: records of another width than top_k and the vocabulary ask for.
    """
    width = packed8_record_bytes(top_k, vocab_size)
    if records.ndim != 2 or records.shape[1] != width:
        raise StoreError(
            f"records have shape {records.shape}; top_k {top_k} and V {vocab_size} take {width} bytes a token"
        )
    split = width - 2 * _FLOATS - top_k
    parts = [
        _decode_rows(records[start : start + _ROWS_AT_ONCE], split, top_k, vocab_size)
        for start in range(0, max(len(records), 1), _ROWS_AT_ONCE)
    ]
    return parts[0] if len(parts) == 1 else concatenate(parts)


def _decode_rows(records: Bytes, split: int, top_k: int, vocab_size: int) -> SoftTargets:
    ids_TK = _unpack(records[:, :split], top_k, id_bits(vocab_size))
    floats_T5 = np.ascontiguousarray(records[:, -2 * _FLOATS :]).view("<f2").astype(np.float32)
    codes_TK = records[:, split : -2 * _FLOATS].astype(np.float32)
    top_T1, range_T1 = floats_T5[:, 0:1], floats_T5[:, 1:2]
    head = torch.from_numpy((codes_TK - _LEVELS) * (range_T1 / _LEVELS) + top_T1)
    floats = torch.from_numpy(floats_T5)
    total_T = torch.logaddexp(head.logsumexp(dim=-1), floats[:, 2])
    return SoftTargets(
        ids=torch.from_numpy(ids_TK.astype(np.int64)),
        logprobs=head - total_T[:, None],
        tail_logprob=floats[:, 2] - total_T,
        gold_logprob=floats[:, 3].clone(),
        entropy=floats[:, 4].clone(),
    )


def _quantise(targets: SoftTargets) -> tuple[Bytes, NDArray[np.float16]]:
    """Codes u8[T, K] (255 = lp_1) and f16[T, 5]."""
    logprobs_TK = targets.logprobs.float().cpu().numpy()
    top_T1 = logprobs_TK[:, :1]
    below_TK = np.minimum(top_T1 - logprobs_TK, LOGPROB_FLOOR)
    range_T1 = below_TK[:, -1:].astype(np.float16)
    # Steps of the range *as stored*: its rounding to f16 then costs nothing.
    step_T1 = np.maximum(range_T1.astype(np.float32), np.finfo(np.float32).tiny) / _LEVELS
    codes_TK = _LEVELS - np.clip(np.rint(below_TK / step_T1), 0, _LEVELS)
    singles = (targets.tail_logprob, targets.gold_logprob, targets.entropy)
    columns = [top_T1, range_T1, *(single.float().cpu().numpy()[:, None] for single in singles)]
    with np.errstate(over="ignore"):  # below -65,504 nats f16 says -inf, which is what it means
        return codes_TK.astype(np.uint8), np.concatenate(columns, axis=1, dtype="<f2", casting="unsafe")


def _pack(ids_TK: NDArray[np.uint32], bits: int) -> Bytes:
    """Little-endian bit stream of each row, u8[T, ceil(K * bits / 8)]; 8 ids fill `bits` whole bytes."""
    rows, top_k = ids_TK.shape
    groups = -(-top_k // 8)
    padded = np.zeros((rows, groups * 8), np.uint32)
    padded[:, :top_k] = ids_TK
    slots = np.ascontiguousarray(padded.reshape(-1, 8).T)
    planes = np.zeros((bits, rows * groups), np.uint8)
    for slot, (first, shift, touched) in enumerate(_layout(bits)):
        value = slots[slot] << np.uint32(shift)
        for byte in range(touched):
            planes[first + byte] |= (value >> np.uint32(8 * byte)).astype(np.uint8)
    return np.ascontiguousarray(planes.T).reshape(rows, groups * bits)[:, : -(-top_k * bits // 8)]


def _unpack(packed: Bytes, top_k: int, bits: int) -> NDArray[np.uint32]:
    """Inverse of `_pack`: u32[T, K]."""
    rows, groups = packed.shape[0], -(-top_k // 8)
    padded = np.zeros((rows, groups * bits), np.uint8)
    padded[:, : packed.shape[1]] = packed
    planes = np.ascontiguousarray(padded.reshape(-1, bits).T)
    slots = np.empty((8, rows * groups), np.uint32)
    for slot, (first, shift, touched) in enumerate(_layout(bits)):
        value = planes[first].astype(np.uint32)
        for byte in range(1, touched):
            value |= planes[first + byte].astype(np.uint32) << np.uint32(8 * byte)
        slots[slot] = (value >> np.uint32(shift)) & np.uint32((1 << bits) - 1)
    return np.ascontiguousarray(slots.T).reshape(rows, groups * 8)[:, :top_k]


def _layout(bits: int) -> list[tuple[int, int, int]]:
    """For each of 8 ids in a group: its first byte, its shift within that byte, the bytes it touches."""
    assert bits <= 25, "a shifted id must fit 32 bits"
    starts = [divmod(slot * bits, 8) for slot in range(8)]
    return [(first, shift, -(-(shift + bits) // 8)) for first, shift in starts]


CODECS: dict[str, Codec] = {"packed8": Codec(encode_packed8, decode_packed8, packed8_record_bytes)}
"""Codecs by the name that stands in a store's manifest. A name's bytes never change their meaning."""

DEFAULT_CODEC = "packed8"
