"""Codecs of soft targets: bytes of a sample's answer tokens, and back.

Shape suffixes: T = answer tokens, K = entries kept a token, V = vocabulary, W = bytes a token.
Bytes at V = 151,936 (id width 18): `packed` 109 and `compact` 87 a token for K = 32, 209 and 156 for K = 64, with the
gold log-prob, the entropy and the tail; `sampled` about 33 for 64 draws.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.errors import StoreError
from pipeline.recipe import TargetsConfig
from pipeline.targets import packing
from pipeline.targets.container.shards import Bytes
from pipeline.targets.soft_targets import SoftTargets, clipped_top_k, drawn_from_logits, from_logits

Floats = NDArray[np.float32]
_END = np.dtype((np.void, 2 * packing.FLOATS))
"""The last bytes of a row of the top K."""


@dataclass(frozen=True, slots=True)
class Spec:
    """What a codec must know. The fields that it uses are part of a store's identity."""

    vocab_size: int
    top_k: int = 0
    """K, in [1, V)."""
    bits: int = 0
    """Bits of a log-probability's code, 4..8."""
    draws: int = 0
    """Draws a token, 1..255."""


@dataclass(frozen=True, slots=True)
class Codec:
    """A way to keep a teacher's distribution and to store it."""

    uses: tuple[str, ...]
    """Fields of `Spec` besides vocab_size."""
    default_bits: int
    keep: Callable[[Tensor, Tensor, Tensor, float, Spec], SoftTargets]
    """(logits_TV, gold_T, offsets_T, temperature, spec) -> what of the distribution is kept"""
    encode: Callable[[SoftTargets, Spec], Bytes]
    """(targets, spec) -> u8, one-dimensional"""
    decode: Callable[[Bytes, int, Spec], SoftTargets]
    """(bytes, T, spec) -> targets"""
    joinable: bool
    """Bytes of several samples, one behind the other, are the bytes of all their tokens."""
    most_bytes: Callable[[Spec], int]
    """(spec) -> bytes of a token, or the most that it can take."""


def make_spec(settings: TargetsConfig, vocab_size: int) -> Spec:
    """The recipe's settings for a vocabulary; those that its codec does not use stay 0."""
    codec = CODECS[settings.codec]
    wanted = {
        "top_k": clipped_top_k(settings.top_k, vocab_size),
        "bits": settings.bits or codec.default_bits,
        "draws": settings.draws,
    }
    return Spec(vocab_size, **{name: wanted[name] for name in codec.uses})


def identity_of(codec: str, spec: Spec) -> dict[str, Any]:
    """What a store's identity says about its codec."""
    return {"codec": codec, "vocab_size": spec.vocab_size} | {f: getattr(spec, f) for f in CODECS[codec].uses}


def spec_of(identity: Mapping[str, Any]) -> Spec:
    """Inverse of `identity_of`."""
    return Spec(int(identity["vocab_size"]), **{f: int(identity[f]) for f in CODECS[identity["codec"]].uses})


def id_bits(vocab_size: int) -> int:
    """Bits of a token id, ceil(log2 V): 18 for 151,936."""
    return max(1, (vocab_size - 1).bit_length())


# -- packed ------------------------------------------------------------------------------------------------


def packed_bytes(spec: Spec) -> int:
    """W of `packed`: K ids, K - 2 codes, five f16."""
    return -(-(spec.top_k * id_bits(spec.vocab_size) + max(spec.top_k - 2, 0) * spec.bits) // 8) + 2 * packing.FLOATS


def encode_packed(targets: SoftTargets, spec: Spec) -> Bytes:
    """Ids in order of probability at ceil(log2 V) bits, each log-prob as the step from the one above [ours].

    The steps share the row's widest one as their scale, which is far finer than the whole range: the first step, the
    widest by far in most rows, is an f16 of its own. lp_1 follows from head and tail summing to 1.

    Raises:
        StoreError: targets of another kind or K, an id outside [0, V), log-probs that are not finite or do not descend.
    """
    ids_TK, logprobs_TK, tail_T, floats_T5 = _arrays(targets, spec)
    rows_TW = np.empty((len(targets), packed_bytes(spec)), np.uint8)
    width = id_bits(spec.vocab_size)
    found = packing.encode_packed(ids_TK, logprobs_TK, tail_T, spec.vocab_size, width, spec.bits, rows_TW, floats_T5)
    _refuse(found, ids_TK, spec)
    return _with_floats(rows_TW, floats_T5)


def decode_packed(raw: Bytes, tokens: int, spec: Spec) -> SoftTargets:
    """Targets of `encode_packed`, head and tail summing to 1: a KL of them stays >= 0.

    Raises:
        StoreError: another number of bytes than the tokens take.
    """
    rows_TW = _rows(raw, tokens, packed_bytes(spec), spec)
    floats_T5, ids_TK, logprobs_TK, tail_T = _room(rows_TW, spec)
    packing.decode_packed(rows_TW, floats_T5, id_bits(spec.vocab_size), spec.bits, ids_TK, logprobs_TK, tail_T)
    return _targets(ids_TK, logprobs_TK, tail_T, floats_T5)


# -- compact -----------------------------------------------------------------------------------------------


def low_bits(spec: Spec) -> int:
    """Bits of an id that Elias-Fano stores as they are: those that make a row smallest."""
    return min(range(id_bits(spec.vocab_size)), key=lambda low: spec.top_k * low + _highest(spec, low))


def _highest(spec: Spec, low: int) -> int:
    """The largest high part of an id: zeros in the unary part, which has a one for each id too."""
    return (spec.vocab_size - 1) >> low


def compact_bytes(spec: Spec) -> int:
    """W of `compact`: K low parts with a code each, the high parts in unary, five f16."""
    low = low_bits(spec)
    bits = spec.top_k * (low + spec.bits) + spec.top_k + _highest(spec, low)
    return -(-bits // 8) + 2 * packing.FLOATS


def encode_compact(targets: SoftTargets, spec: Spec) -> Bytes:
    """Ids as a set, about 2 bits an id above the least possible [published: Elias-Fano], log-probs in order of id.

    A log-prob's code counts even steps of the bent distance between x_2 and x_K; the top one has a code of its own.

    Raises:
        StoreError: as `encode_packed`.
    """
    ids_TK, logprobs_TK, tail_T, floats_T5 = _arrays(targets, spec)
    keys_TK2 = _keys(len(targets), spec)
    found = packing.codes_of_sets(ids_TK, logprobs_TK, tail_T, spec.vocab_size, spec.bits, keys_TK2, floats_T5)
    _refuse(found, ids_TK, spec)
    keys_TK2[:, : spec.top_k].sort(axis=1)  # numpy's sort of short rows uses vectors
    rows_TW = np.empty((len(targets), compact_bytes(spec)), np.uint8)
    low = low_bits(spec)
    packing.encode_sets(keys_TK2, spec.top_k, low, spec.bits, _highest(spec, low), rows_TW)
    return _with_floats(rows_TW, floats_T5)


def decode_compact(raw: Bytes, tokens: int, spec: Spec) -> SoftTargets:
    """Targets of `encode_compact`, again in order of rank (equal codes: by id).

    Raises:
        StoreError: another number of bytes than the tokens take.
    """
    rows_TW = _rows(raw, tokens, compact_bytes(spec), spec)
    floats_T5, ids_TK, logprobs_TK, tail_T = _room(rows_TW, spec)
    low, width = low_bits(spec), id_bits(spec.vocab_size)
    keys_TK2 = _keys(tokens, spec)
    packing.decode_sets(rows_TW, spec.top_k, low, spec.bits, width, _highest(spec, low), keys_TK2)
    keys_TK2[:, : spec.top_k].sort(axis=1)
    packing.finish_sets(keys_TK2, floats_T5, spec.bits, width, ids_TK, logprobs_TK, tail_T)
    return _targets(ids_TK, logprobs_TK, tail_T, floats_T5)


def _keys(tokens: int, spec: Spec) -> NDArray[np.uint32]:
    """Room for K keys a token, in rows of even length."""
    return np.empty((tokens, spec.top_k + spec.top_k % 2), np.uint32)


# -- what the two have in common ---------------------------------------------------------------------------


def _arrays(targets: SoftTargets, spec: Spec) -> tuple[NDArray[np.int64], Floats, Floats, Floats]:
    """ids i64[T, K], log-probs f32[T, K], tail f32[T], and floats f32[T, 5] with the last two columns filled."""
    if targets.sampled:
        raise StoreError("the targets are draws, the codec stores the top K")
    if targets.top_k != spec.top_k:
        raise StoreError(f"top_k is {targets.top_k}, the store's is {spec.top_k}")
    vocab_size = spec.vocab_size
    if not 1 <= spec.top_k < vocab_size:
        raise StoreError(f"top_k {spec.top_k} must lie in [1, {vocab_size - 1}] for a vocabulary of {vocab_size}")
    if id_bits(vocab_size) + spec.bits > packing.WIDEST_FIELD:
        raise StoreError(f"ids below {vocab_size} and {spec.bits} bits exceed {packing.WIDEST_FIELD} bits together")
    floats_T5 = np.zeros((len(targets), packing.FLOATS), np.float32)
    _fill_singles(targets, floats_T5[:, 3:])
    return *_matrices(targets), np.ascontiguousarray(targets.tail_logprob.float().cpu().numpy()), floats_T5


def _matrices(targets: SoftTargets) -> tuple[NDArray[np.int64], Floats]:
    """ids i64[T, K] and log-probs f32[T, K]."""
    ids_TK = np.ascontiguousarray(targets.ids.cpu().numpy())
    return ids_TK, np.ascontiguousarray(targets.logprobs.float().cpu().numpy())


def _fill_singles(targets: SoftTargets, singles_T2: Floats) -> None:
    """Gold log-prob and entropy."""
    for column, single in enumerate((targets.gold_logprob, targets.entropy)):
        single_T = single.cpu().numpy()
        if np.isnan(single_T.min(initial=0.0)):  # a NaN is the minimum
            raise StoreError("a gold log-probability or an entropy is NaN")
        singles_T2[:, column] = single_T


def _refuse(found: int, ids: NDArray[np.int64], spec: Spec) -> None:
    if found == packing.BAD_ID:
        raise StoreError(f"token ids {ids.min()}..{ids.max()} do not fit a vocabulary of {spec.vocab_size}")
    if found == packing.BAD_VALUE:
        raise StoreError("log-probabilities must be finite at the top, descend, and not be NaN")


def _as_f16(floats: Floats) -> Bytes:
    """f16, as bytes; u8[T, 2 * columns]. Below -65,504 nats it says -inf, which is what it means."""
    return torch.from_numpy(floats).half().numpy().view(np.uint8)  # torch converts ten times as fast as numpy


def _from_f16(raw: Bytes) -> Floats:
    """Inverse of `_as_f16`, of the last axis."""
    floats: Floats = torch.from_numpy(raw.view(np.float16)).float().numpy()
    return floats


def _with_floats(rows_TW: Bytes, floats_T5: Floats) -> Bytes:
    _ends(rows_TW)[:] = _as_f16(floats_T5).view(_END)
    return rows_TW.reshape(-1)


def _ends(rows_TW: Bytes) -> NDArray[np.void]:
    """The rows' floats, each row's as one item: numpy copies these twice as fast as so many bytes."""
    return rows_TW[:, -_END.itemsize :].view(_END)


def _rows(raw: Bytes, tokens: int, width: int, spec: Spec) -> Bytes:
    if raw.shape != (tokens * width,):
        raise StoreError(f"{raw.size} bytes for {tokens} tokens, but {spec} takes {width} a token")
    return raw.reshape(tokens, width)


def _room(rows_TW: Bytes, spec: Spec) -> tuple[Floats, NDArray[np.int64], Floats, Floats]:
    """The rows' floats, and arrays for ids, log-probs and tail."""
    tokens, shape = len(rows_TW), (len(rows_TW), spec.top_k)
    return (
        _from_f16(_ends(rows_TW).copy().view(np.uint8)),
        np.empty(shape, np.int64),
        np.empty(shape, np.float32),
        np.empty(tokens, np.float32),
    )


def _targets(ids_TK: NDArray[np.int64], logprobs_TK: Floats, tail_T: Floats, floats_T5: Floats) -> SoftTargets:
    ids, logprobs, tail = torch.from_numpy(ids_TK), torch.from_numpy(logprobs_TK), torch.from_numpy(tail_T)
    return SoftTargets(ids, logprobs, tail, torch.from_numpy(floats_T5[:, 3]), torch.from_numpy(floats_T5[:, 4]))


# -- sampled -----------------------------------------------------------------------------------------------


def encode_sampled(targets: SoftTargets, spec: Spec) -> Bytes:
    """Ids by falling count at ceil(log2 V) bits; counts in unary, as what each exceeds the next one by [ours].

    Three parts: distinct ids of each token u8[T], gold log-prob and entropy f16[T, 2], one bit stream.

    Raises:
        StoreError: targets that are not `spec.draws` draws, an id outside [0, V), or numbers that are NaN.
    """
    ids_TK, logprobs_TK = _matrices(targets)
    tokens, width, draws = len(targets), id_bits(spec.vocab_size), spec.draws
    most = tokens * (min(draws, targets.top_k) * (width + 1) + draws)  # bits
    distinct_T, stream = np.empty(tokens, np.uint8), np.zeros(most // 8 + 1 + packing.SPARE, np.uint8)
    bits = packing.encode_draws(ids_TK, logprobs_TK, spec.vocab_size, draws, width, distinct_T, stream)
    if bits < 0 and -bits == packing.BAD_ID:
        _refuse(packing.BAD_ID, ids_TK, spec)
    if bits < 0 or not targets.sampled:
        raise StoreError(f"targets are not {draws} draws a token, most frequent first")
    singles_T2 = np.empty((tokens, 2), np.float32)
    _fill_singles(targets, singles_T2)
    return np.concatenate([distinct_T, _as_f16(singles_T2).reshape(-1), stream[: (bits + 7) // 8]])


def decode_sampled(raw: Bytes, tokens: int, spec: Spec) -> SoftTargets:
    """Targets of `encode_sampled`, as wide as the token with the most distinct ids.

    Raises:
        StoreError: another number of bytes than the tokens take.
    """
    problem = StoreError(f"{raw.size} bytes are not {tokens} tokens of {spec}")
    if raw.ndim != 1 or raw.size < 5 * tokens:
        raise problem
    distinct_T, stream = raw[:tokens].copy(), np.concatenate([raw[5 * tokens :], np.zeros(packing.SPARE, np.uint8)])
    shape, width, draws = (tokens, int(distinct_T.max(initial=1))), id_bits(spec.vocab_size), spec.draws
    ids_TK, logprobs_TK = np.zeros(shape, np.int64), np.full(shape, -np.inf, np.float32)
    with np.errstate(divide="ignore"):
        log_share_N1 = np.log(np.arange(draws + 1) / draws).astype(np.float32)
    used = packing.decode_draws(stream, distinct_T, draws, width, log_share_N1, ids_TK, logprobs_TK)
    if (used + 7) // 8 != raw.size - 5 * tokens:
        raise problem
    singles_T2 = _from_f16(raw[tokens : 5 * tokens].copy().reshape(tokens, 4))
    gold_T, entropy_T = torch.from_numpy(singles_T2).unbind(dim=1)
    ids, shares = torch.from_numpy(ids_TK), torch.from_numpy(logprobs_TK)
    return SoftTargets(ids, shares, torch.full((tokens,), float("-inf")), gold_T, entropy_T, sampled=True)


# -- the choice --------------------------------------------------------------------------------------------


def _keep_top_k(logits_TV: Tensor, gold_T: Tensor, offsets_T: Tensor, temperature: float, spec: Spec) -> SoftTargets:
    return from_logits(logits_TV, gold_T, spec.top_k, temperature)


def _keep_draws(logits_TV: Tensor, gold_T: Tensor, offsets_T: Tensor, temperature: float, spec: Spec) -> SoftTargets:
    return drawn_from_logits(logits_TV, gold_T, spec.draws, temperature, offsets_T)


def _most_sampled_bytes(spec: Spec) -> int:
    return 5 + -(-spec.draws * (id_bits(spec.vocab_size) + 2) // 8)  # every draw another token


CODECS: dict[str, Codec] = {
    "packed": Codec(("top_k", "bits"), 7, _keep_top_k, encode_packed, decode_packed, True, packed_bytes),
    "compact": Codec(("top_k", "bits"), 5, _keep_top_k, encode_compact, decode_compact, True, compact_bytes),
    "sampled": Codec(("draws",), 0, _keep_draws, encode_sampled, decode_sampled, False, _most_sampled_bytes),
}
"""Codecs by the name that stands in a recipe and in a store's manifest. The meaning of a name's bytes changes only with
`shards.FORMAT_VERSION`."""
