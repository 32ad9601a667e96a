"""Compiled loops of the codecs: log-probabilities to small codes, codes and ids to bits, and back.

Shape suffixes: T = tokens, K = entries a token, W = bytes a record, B = rows of a block, K1 = K + 1, the last spare.
d = lp_1 - lp_k >= 0 is an entry's distance below the top one, x = `_bend(d)`. A record is a little-endian bit stream
and then five f16 that the caller converts.

Numba compiles a function at its first call and caches the result beside this file or in the user's cache folder. One
file on purpose: a cached function is compiled again when its own file changes, not when that of a callee does. What
makes the loops fast: rows go through one small step a block at a time, so that neighbours overlap in the processor;
rows are passed as (array, index), since numba counts the users of a slice; single precision; a neighbour's value is
carried along by hand, since reading back what was just written waits for the store.
"""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

F = TypeVar("F", bound=Callable[..., Any])

FLOATS = 5
"""Columns of a record's numbers: x_2, span, log odds of the tail, gold log-prob, entropy. An encoder fills three."""
OK, BAD_ID, BAD_VALUE = 0, 1, 2
"""What an encoder found: all well; an id outside the vocabulary; log-probs that are infinite, NaN or not descending."""
LOGPROB_FLOOR = 32.0
"""Kept entries further than this below the top one are stored at this distance: e^-32 of its probability."""
WIDEST_FIELD = 28
"""Bits of an id and a code together: two such fields and a begun byte fit a word."""
SPARE = 4
"""Bytes behind a stream of draws, read and written without effect: an id touches that many at most."""

_BLOCK = 32
_CHUNK = 56
"""Bits that a piece may have: with a begun byte they fit a word."""
_BEHIND = _CHUNK + 16
_FALSE = ir.Constant(ir.IntType(1), 0)
# A Python number would make an expression double.
_ZERO, _HALF, _ONE, _BEND, _FLOOR = (np.float32(x) for x in (0, 0.5, 1, 4, LOGPROB_FLOOR))
_SLACK = np.float32(1e-3)
"""How far from a whole number a share of the draws may be."""
_SMALLEST = np.float32(2.0**-14)
"""Smallest normal f16."""
_LOG2_E, _LN2_HIGH = np.float32(math.log2(math.e)), np.float32(0.693359375)  # n * _LN2_HIGH is exact
_LN2_LOW = np.float32(math.log(2.0) - 0.693359375)
_C2, _C3, _C4, _C5, _C6 = (np.float32(1 / math.factorial(i)) for i in range(2, 7))
_ROOT_HALF = np.int32(0x3F3504F3)
"""The bits of sqrt(1/2)."""
_L3, _L4, _L5, _L6, _L7, _L8, _L9, _L10, _L11 = (
    np.float32(x)
    for x in (
        3.3333331174e-1, -2.4999993993e-1, 2.0000714765e-1, -1.6668057665e-1, 1.4249322787e-1, -1.2420140846e-1,
        1.1676998740e-1, -1.1514610310e-1, 7.0376836292e-2,
    )
)  # fmt: skip


def compiled(function: F, **options: Any) -> F:
    """The function in machine code; without a cache where no folder can be written to."""
    options["nogil"] = True  # the teacher's forward goes on while a shard is encoded
    options["error_model"] = "numpy"  # a division that may raise keeps its loop from becoming vectors
    try:
        return numba.njit(cache=True, **options)(function)  # type: ignore[no-any-return]
    except RuntimeError:  # "no locator available": a read-only installation and no home folder
        return numba.njit(**options)(function)  # type: ignore[no-any-return]


def summing(function: F) -> F:
    """As `compiled`; sums may add in any order, so that their loops become vectors."""
    return compiled(function, fastmath={"reassoc", "nsz"})


def fused(function: F) -> F:
    """As `compiled`; a product and a sum may become one instruction."""
    return compiled(function, fastmath={"contract"})


@fused
def _exp(d: Any) -> Any:
    """exp(-d) for d in [0, 80), relative error below 3e-7. Arithmetic only, so that its loop becomes vectors."""
    n = np.int32(d * _LOG2_E + _HALF)
    r = np.float32(n) * _LN2_HIGH - d + np.float32(n) * _LN2_LOW
    two_to_minus_n = np.int32((np.int32(127) - n) << np.int32(23)).view(np.float32)
    return (_ONE + r * (_ONE + r * (_C2 + r * (_C3 + r * (_C4 + r * (_C5 + r * _C6)))))) * two_to_minus_n


@fused
def _log(x: Any) -> Any:
    """log(x) of a normal number, relative error below 2e-7; its loop becomes vectors, too [published: Cephes, logf]."""
    bits = np.float32(x).view(np.int32)
    n = (bits - _ROOT_HALF) >> np.int32(23)
    r = np.int32(bits - (n << np.int32(23))).view(np.float32) - _ONE  # x = 2^n (1 + r), 1 + r in [sqrt(1/2), sqrt(2))
    low = _L3 + r * (_L4 + r * (_L5 + r * (_L6 + r * (_L7 + r * (_L8 + r * (_L9 + r * (_L10 + r * _L11)))))))
    return (r * r * r * low + np.float32(n) * _LN2_LOW - _HALF * r * r + r) + np.float32(n) * _LN2_HIGH


@compiled
def _bend(d: Any) -> Any:
    """x = 4 d / (4 + d): even steps of x are fine steps of d near the top, where the probability is [ours]."""
    return _BEND * d / (_BEND + d)


@compiled
def _unbend(x: Any) -> Any:
    return _BEND * x / (_BEND - x)


@compiled
def _as_f16(x: Any) -> Any:
    """x >= 0 as an f16 holds it, below 2^-14 as 0: 11 significant bits [published: Veltkamp's splitting]."""
    scaled = float(x) * (2.0**42 + 1.0)
    return np.float32(scaled - (scaled - float(x)) if x >= _SMALLEST else 0.0)


# -- bit streams -------------------------------------------------------------------------------------------
# A stream is written and read in pieces of up to 56 bits, at the same places in every record.


@intrinsic  # type: ignore[untyped-decorator]
def _trailing_zeros(typing: Any, word: Any) -> Any:
    """Of a u64; 64 of 0."""
    return types.uint64(types.uint64), lambda context, builder, signature, values: builder.cttz(values[0], _FALSE)


@intrinsic  # type: ignore[untyped-decorator]
def _bit_count(typing: Any, word: Any) -> Any:
    """Ones in a u64."""
    return types.uint64(types.uint64), lambda context, builder, signature, values: builder.ctpop(values[0])


@compiled
def _ones(count: Any) -> Any:
    """A u64 of so many ones, at most 63."""
    return (np.uint64(1) << np.uint64(count)) - np.uint64(1)


@compiled
def _word(raw: Any, at: Any) -> Any:
    """The 8 bytes from `at` as a little-endian number. LLVM makes one load of them."""
    word = np.uint64(0)
    for j in range(8):
        word |= np.uint64(raw[at + np.uint64(j)]) << np.uint64(8 * j)
    return word


@compiled
def _store(raw: Any, at: Any, word: Any) -> None:
    """Inverse of `_word`."""
    for j in range(8):
        raw[at + np.uint64(j)] = np.uint8(word >> np.uint64(8 * j))


@compiled
def _places(size_P: Any) -> Any:
    """Of pieces of so many bits, one behind the other: the bytes where they begin, the bits in these, and how far the
    piece before must be shifted for its end to fill such a byte. A table, since sums would wait for each other.
    """
    place_3P, bit, before = np.empty((3, size_P.shape[0]), np.uint64), np.uint64(0), np.uint64(0)
    for j in range(size_P.shape[0]):
        place_3P[0, j], place_3P[1, j] = bit >> np.uint64(3), bit & np.uint64(7)
        place_3P[2, j] = before - place_3P[1, j]
        before = np.uint64(size_P[j])
        bit += before
    return place_3P


@compiled
def _put(raw: Any, record: Any, size: Any, rows: Any, pair_BP: Any, more_BC: Any, place_3P: Any) -> None:
    """Write a block's pieces, the ones of both arrays, to records of `size` bytes from a byte on.

    Up to 7 bytes behind a piece are overwritten: by the next piece, or where the record's floats will be.
    """
    pairs = pair_BP.shape[1]
    for b in range(rows):
        begin, before = np.uint64(record + b * size), np.uint64(0)
        for j in range(pairs):
            piece = pair_BP[b, j]
            _store(raw, begin + place_3P[0, j], (piece << place_3P[1, j]) | (before >> place_3P[2, j]))
            before = piece
        for c in range(more_BC.shape[1]):
            at, piece = np.uint64(pairs + c), more_BC[b, c]
            _store(raw, begin + place_3P[0, at], (piece << place_3P[1, at]) | (before >> place_3P[2, at]))
            before = piece


@compiled
def _take(raw: Any, record: Any, size: Any, rows: Any, place_3P: Any, piece_BP: Any) -> None:
    """Read a block's pieces; the bits above them may hold anything. Up to 7 bytes behind a piece are read."""
    for b in range(rows):
        begin = np.uint64(record + b * size)
        for j in range(piece_BP.shape[1]):
            piece_BP[b, j] = _word(raw, begin + place_3P[0, j]) >> place_3P[1, j]


@compiled
def _join(two_N: Any, first: Any, width: Any, piece_N: Any, count: Any) -> None:
    """Pieces of two fields each, from those in the low bits of each half of a u64."""
    low, shift = _ones(width), np.uint64(32 - width)
    high = low << np.uint64(width)
    for i in range(count):
        two = two_N[np.uint64(first) + np.uint64(i)]
        piece_N[i] = (two & low) | ((two >> shift) & high)


@compiled
def _split(piece_N: Any, width: Any, count: Any) -> None:
    """Inverse of `_join`, in place."""
    mask = _ones(width)
    for i in range(count):
        piece_N[i] = (piece_N[i] & mask) | (((piece_N[i] >> np.uint64(width)) & mask) << np.uint64(32))


# -- log-probabilities -------------------------------------------------------------------------------------


@compiled
def _rises(value_N: Any, first: Any, step: Any, count: Any) -> Any:
    """How many of the values at first, first + step, ... are not followed by one that is as large at most."""
    found = np.int32(0)
    for i in range(count):
        at = np.uint64(first) + np.uint64(i) * np.uint64(step)
        found += np.int32(not value_N[at + np.uint64(1)] <= value_N[at])
    return found


@compiled
def _descend(logprobs_TK: Any, start: Any, rows: Any) -> Any:
    """False of a row with NaN, too. All rows at once; a row may begin above the end of the one before."""
    top_k, logprob_N = logprobs_TK.shape[1], logprobs_TK.reshape(-1)
    first = start * top_k
    return _rises(logprob_N, first, 1, rows * top_k - 1) == _rises(logprob_N, first + top_k - 1, top_k, rows - 1)


@compiled
def _scratch(top_k: Any) -> Any:
    """Room for a block's x, masses e^-d, and a number a row."""
    x_BK, mass_BK = np.empty((_BLOCK, top_k), np.float32), np.empty((_BLOCK, top_k), np.float32)
    return x_BK, mass_BK, np.empty(_BLOCK, np.float32)


@compiled
def _known(ids_TK: Any, vocab_size: Any, start: Any, rows: Any) -> Any:
    id_N, largest = ids_TK.reshape(-1), np.uint64(0)  # a negative one is larger than any other
    for i in range(rows * ids_TK.shape[1]):
        largest = max(largest, np.uint64(id_N[np.uint64(start * ids_TK.shape[1] + i)]))
    return largest < np.uint64(vocab_size)


@compiled
def _distances(logprobs_TK: Any, start: Any, rows: Any, d_BK: Any) -> None:
    for b in range(rows):
        t = np.uint64(start + b)
        top = logprobs_TK[t, 0]
        for k in range(d_BK.shape[1]):
            d_BK[b, k] = min(top - logprobs_TK[t, k], _FLOOR)


@summing
def _sums(value_BK: Any, rows: Any, total_B: Any) -> None:
    """Sums of a block's rows."""
    for b in range(rows):
        total = _ZERO
        for k in range(value_BK.shape[1]):
            total += value_BK[b, k]
        total_B[b] = total


@compiled
def _measure(
    ids_TK: Any,
    logprobs_TK: Any,
    tail_T: Any,
    vocab_size: Any,
    start: Any,
    x_BK: Any,
    mass_BK: Any,
    row_B: Any,
    floats_T5: Any,
) -> Any:
    """A block's x, and its first and third float: x_2, rounded in x as well, and the tail's log odds."""
    second, rows, good = min(1, x_BK.shape[1] - 1), min(_BLOCK, ids_TK.shape[0] - start), True
    if not _known(ids_TK, vocab_size, start, rows):
        return BAD_ID
    _distances(logprobs_TK, start, rows, x_BK)
    x_N, mass_N = x_BK.reshape(-1), mass_BK.reshape(-1)
    for i in range(rows * x_BK.shape[1]):
        mass_N[i] = _exp(x_N[i])
        x_N[i] = _bend(x_N[i])
    _sums(mass_BK, rows, row_B)
    for b in range(rows):
        t = np.uint64(start + b)
        row_B[b] = tail_T[t] - logprobs_TK[t, 0] - _log(row_B[b])
    for b in range(rows):
        t = np.uint64(start + b)
        good &= (row_B[b] < np.inf) & (logprobs_TK[t, 0] < np.inf)  # neither of NaN
        floats_T5[t, 2] = row_B[b]
        floats_T5[t, 0] = x_BK[b, second] = _as_f16(x_BK[b, second])
    return OK if good and _descend(logprobs_TK, start, rows) else BAD_VALUE


@compiled
def _finish(x_BK: Any, mass_BK: Any, row_B: Any, floats_T5: Any, start: Any, logprobs_TK: Any, tail_T: Any) -> None:
    """A block's log-probs, whose distances are unbend(x): head and tail sum to 1. Uses x up."""
    rows = min(_BLOCK, logprobs_TK.shape[0] - start)
    for b in range(rows):
        x_BK[b, 0] = _ZERO
    x_N, mass_N = x_BK.reshape(-1), mass_BK.reshape(-1)
    for i in range(rows * x_BK.shape[1]):
        x_N[i] = _unbend(x_N[i])
        mass_N[i] = _exp(x_N[i])
    _sums(mass_BK, rows, row_B)
    for b in range(rows):
        t = np.uint64(start + b)
        odds = floats_T5[t, 2]
        rest = _log(_ONE + _exp(min(abs(odds), _FLOOR)))  # of e^-|odds|: neither a sharp nor a flat row overflows
        row_B[b] = min(-odds, _ZERO) - rest - _log(row_B[b])
        tail_T[t] = min(odds, _ZERO) - rest
    for b in range(rows):
        t = np.uint64(start + b)
        top = row_B[b]
        for k in range(x_BK.shape[1]):
            logprobs_TK[t, k] = top - x_BK[b, k]


# -- packed: ids in probability order ----------------------------------------------------------------------


@compiled
def _packed_places(top_k: Any, id_width: Any, width: Any) -> Any:
    """The first two ids together, then pairs of an id and a step each."""
    size_P = np.full((top_k + 1) // 2, 2 * (id_width + width))
    size_P[0] = min(2, top_k) * id_width
    return _places(size_P)


@compiled
def encode_packed(
    ids_TK: Any, logprobs_TK: Any, tail_T: Any, vocab_size: Any, id_width: Any, width: Any, raw_TW: Any, floats_T5: Any
) -> Any:
    """Fill records, but for their floats, and the first three of these: ids, those of ranks >= 3 with the step from
    x_{k-1} to x_k.
    """
    top_k = ids_TK.shape[1]
    place_3P = _packed_places(top_k, id_width, width)
    pairs = place_3P.shape[1]
    x_BK, mass_BK, row_B = _scratch(top_k)
    field_BK2, piece_BP = np.zeros((_BLOCK, 2 * pairs), np.uint32), np.empty((_BLOCK, pairs), np.uint64)
    raw, size = raw_TW.reshape(-1), raw_TW.shape[1]
    for start in range(0, ids_TK.shape[0], _BLOCK):
        problem = _measure(ids_TK, logprobs_TK, tail_T, vocab_size, start, x_BK, mass_BK, row_B, floats_T5)
        if problem != OK:
            return problem
        rows = min(_BLOCK, ids_TK.shape[0] - start)
        _widest_steps(x_BK, floats_T5, start, rows)
        _step_fields(x_BK, floats_T5, ids_TK, start, rows, width, field_BK2)
        _join(field_BK2.view(np.uint64).reshape(-1), 0, id_width + width, piece_BP.reshape(-1), rows * pairs)
        for b in range(rows):
            t = np.uint64(start + b)
            second_id = np.uint64(ids_TK[t, 1] if top_k > 1 else 0)
            piece_BP[b, 0] = np.uint64(ids_TK[t, 0]) | (second_id << np.uint64(id_width))
        _put(raw, start * size, size, rows, piece_BP, piece_BP[:, :0], place_3P)
    return OK


@compiled
def _widest_steps(x_BK: Any, floats_T5: Any, start: Any, rows: Any) -> None:
    """Fill the second float: the largest x_k - x_{k-1} from x_2 on."""
    for b in range(rows):
        t = np.uint64(start + b)
        # As integers, whose maximum becomes vectors and whose order is the same.
        second, widest, before = floats_T5[t, 0], np.int32(0), _ZERO
        for k in range(x_BK.shape[1]):
            above = max(x_BK[b, k] - second, _ZERO)
            widest = np.int32(max(widest, np.float32(above - before).view(np.int32)))
            before = above
        floats_T5[t, 1] = _as_f16(max(np.int32(widest).view(np.float32), _SMALLEST))


@compiled
def _step_fields(x_BK: Any, floats_T5: Any, ids_TK: Any, start: Any, rows: Any, width: Any, field_BK2: Any) -> None:
    """Fill id << width | step. Places are rounded, not steps: errors do not add up."""
    for b in range(rows):
        t = np.uint64(start + b)
        # The difference of two roundings is at most 1 above the difference, hence a level less than a code has.
        second, scale = floats_T5[t, 0], np.float32((1 << width) - 2) / floats_T5[t, 1]
        before = np.int32(0)
        for k in range(x_BK.shape[1]):
            place = np.int32(max(x_BK[b, k] - second, _ZERO) * scale + _HALF)
            field_BK2[b, k] = (ids_TK[t, k] << width) | (place - before)
            before = place


@compiled
def decode_packed(
    raw_TW: Any, floats_T5: Any, id_width: Any, width: Any, ids_TK: Any, logprobs_TK: Any, tail_T: Any
) -> None:
    """Inverse of `encode_packed`."""
    top_k = ids_TK.shape[1]
    place_3P = _packed_places(top_k, id_width, width)
    pairs, id_mask = place_3P.shape[1], _ones(id_width)
    x_BK, mass_BK, row_B = _scratch(top_k)
    piece_BP = np.empty((_BLOCK, pairs), np.uint64)
    field_BK2 = piece_BP.view(np.uint32)
    raw, size = raw_TW.reshape(-1), raw_TW.shape[1]
    for start in range(0, ids_TK.shape[0], _BLOCK):
        rows = min(_BLOCK, ids_TK.shape[0] - start)
        _take(raw, start * size, size, rows, place_3P, piece_BP)
        for b in range(rows):  # as if the first two ids had steps, of 0
            second_id = (piece_BP[b, 0] >> np.uint64(id_width)) & id_mask
            both = (piece_BP[b, 0] & id_mask) | (second_id << np.uint64(id_width + width))
            piece_BP[b, 0] = both << np.uint64(width)
        _split(piece_BP.reshape(-1), id_width + width, rows * pairs)
        for b in range(rows):
            t = np.uint64(start + b)
            for k in range(top_k):
                ids_TK[t, k] = field_BK2[b, k] >> np.uint32(width)
            _add_steps(field_BK2, b, width, floats_T5[t, 0], floats_T5[t, 1], x_BK)
        _finish(x_BK, mass_BK, row_B, floats_T5, start, logprobs_TK, tail_T)


@compiled
def _add_steps(field_BK2: Any, b: Any, width: Any, second: Any, span: Any, x_BK: Any) -> None:
    """x from the fields' steps, which their sums replace."""
    place, mask, step = np.uint32(0), np.uint32((1 << width) - 1), span / np.float32((1 << width) - 2)
    for k in range(x_BK.shape[1]):
        place = np.uint32(place + np.uint32(field_BK2[b, k] & mask))
        field_BK2[b, k] = place
    for k in range(x_BK.shape[1]):
        x_BK[b, k] = second + np.float32(np.int32(field_BK2[b, k])) * step


# -- compact: ids as a set ---------------------------------------------------------------------------------
# Keys come in rows of even length, 0 behind an odd K: two of them are a u64.


@compiled
def codes_of_sets(
    ids_TK: Any, logprobs_TK: Any, tail_T: Any, vocab_size: Any, width: Any, keys_TK2: Any, floats_T5: Any
) -> Any:
    """Fill keys id << width | code and the first three floats. Code 0 is the top entry, 1 is x_2, the last is x_K."""
    top_k = ids_TK.shape[1]
    last, up = np.int32((1 << width) - 2), np.uint32(width)
    x_BK, mass_BK, row_B = _scratch(top_k)
    for start in range(0, ids_TK.shape[0], _BLOCK):
        problem = _measure(ids_TK, logprobs_TK, tail_T, vocab_size, start, x_BK, mass_BK, row_B, floats_T5)
        if problem != OK:
            return problem
        rows = min(_BLOCK, ids_TK.shape[0] - start)
        for b in range(rows):
            t = np.uint64(start + b)
            floats_T5[t, 1] = _as_f16(max(x_BK[b, top_k - 1] - floats_T5[t, 0], _SMALLEST))
        for b in range(rows):
            t = np.uint64(start + b)
            second, scale = floats_T5[t, 0], np.float32(last) / floats_T5[t, 1]
            for k in range(top_k):
                code = np.int32(1) + min(np.int32(max(x_BK[b, k] - second, _ZERO) * scale + _HALF), last)
                keys_TK2[t, k] = (np.uint32(ids_TK[t, k]) << up) | np.uint32(code)
        for b in range(rows):
            t = np.uint64(start + b)
            keys_TK2[t, 0] = np.uint32(ids_TK[t, 0]) << up
            if top_k & 1:
                keys_TK2[t, top_k] = 0
    return OK


@compiled
def _set_places(top_k: Any, width: Any, unary: Any) -> Any:
    """Pairs of low parts with a code each, then what is left of so many bits in unary. Of an odd number of low parts
    the last one's pair ends with the first `width` of them.
    """
    pairs, left = (top_k + 1) // 2, unary - (top_k & 1) * width
    size_P = np.full(pairs + max(0, left + _CHUNK - 1) // _CHUNK, 2 * width)
    size_P[pairs:] = _CHUNK
    return _places(size_P)


@compiled
def _unary(keys_TK2: Any, top_k: Any, width: Any, start: Any, rows: Any, first: Any, chunk_BC: Any, c: Any) -> None:
    """Fill two chunks of a block's high parts in unary: bits first, first + 1, ..."""
    size = np.uint64(_CHUNK)
    for b in range(rows):
        t, word, next_word = np.uint64(start + b), np.uint64(0), np.uint64(0)
        for k in range(top_k):
            high = np.uint64(keys_TK2[t, k] >> np.uint32(width))
            place = high + np.uint64(k) - np.uint64(first)  # wraps below the first
            word |= np.uint64(1) << place if place < size else np.uint64(0)
            next_word |= np.uint64(1) << (place - size) if place - size < size else np.uint64(0)
        chunk_BC[b, c], chunk_BC[b, c + 1] = word, next_word


@compiled
def encode_sets(keys_TK2: Any, top_k: Any, low: Any, width: Any, highest: Any, raw_TW: Any) -> None:
    """Fill records, but for their floats, from ascending keys: ids' low bits with their codes, then the high bits in
    unary [published: Elias-Fano]: bit (id >> low) + i is set for the i-th id. `highest`: the largest high part.
    """
    both, odd, pairs = low + width, top_k & 1, keys_TK2.shape[1] // 2
    place_3P = _set_places(top_k, both, top_k + highest)
    chunks = place_3P.shape[1] - pairs
    pair_BP, chunk_BC = np.empty((_BLOCK, pairs), np.uint64), np.empty((_BLOCK, chunks + 2), np.uint64)
    two_N, raw, size = keys_TK2.view(np.uint64).reshape(-1), raw_TW.reshape(-1), raw_TW.shape[1]
    for start in range(0, keys_TK2.shape[0], _BLOCK):
        rows = min(_BLOCK, keys_TK2.shape[0] - start)
        _join(two_N, start * pairs, both, pair_BP.reshape(-1), rows * pairs)
        if odd:
            _unary(keys_TK2, top_k, both, start, rows, 0, chunk_BC, 0)
            for b in range(rows):
                pair_BP[b, pairs - 1] |= (chunk_BC[b, 0] & _ones(both)) << np.uint64(both)
        for c in range(0, chunks, 2):
            _unary(keys_TK2, top_k, both, start, rows, odd * both + c * _CHUNK, chunk_BC, c)
        _put(raw, start * size, size, rows, pair_BP, chunk_BC[:, :chunks], place_3P)


@compiled
def _high_parts(raw: Any, bit: Any, step: Any, rows: Any, unary: Any, top_k: Any, high_N: Any, columns: Any) -> None:
    """Read a block's high parts from so many bits in unary, `step` bits from row to row. What a row writes behind its
    K, up to `_BEHIND`, the next one overwrites.

    Ones are taken 16 at a time, needed or not: how many a chunk has cannot be guessed, a branch on it would be.
    """
    for b in range(rows):
        byte, shift = np.uint64(bit + b * step) >> np.uint64(3), np.uint64(bit + b * step) & np.uint64(7)
        row, found, begin = np.uint64(b * columns), np.uint64(0), np.uint64(0)
        while begin < np.uint64(unary):
            chunk = (_word(raw, byte) >> shift) & _ones(min(np.uint64(unary) - begin, np.uint64(_CHUNK)))
            count = _bit_count(chunk)  # type: ignore[call-arg, var-annotated]
            high, at = begin - found, row + found
            for _ in range(0, count, 16):
                for j in range(16):
                    high_N[at + np.uint64(j)] = np.uint32(high + _trailing_zeros(chunk) - np.uint64(j))
                    chunk &= chunk - np.uint64(1)
                high, at = high - np.uint64(16), at + np.uint64(16)
            found = min(found + count, np.uint64(top_k))
            begin, byte = begin + np.uint64(_CHUNK), byte + np.uint64(_CHUNK // 8)


@compiled
def decode_sets(raw_TW: Any, top_k: Any, low: Any, width: Any, id_width: Any, highest: Any, keys_TK2: Any) -> None:
    """Fill keys code << id_width | id, by ascending id. `highest`: the largest high part of an id."""
    both, columns, unary = low + width, keys_TK2.shape[1], top_k + highest
    place_3P = _set_places(top_k, both, unary)
    piece_BP, high_N = np.empty((_BLOCK, columns // 2), np.uint64), np.zeros(_BLOCK * columns + _BEHIND, np.uint32)
    raw, size = raw_TW.reshape(-1), raw_TW.shape[1]
    for start in range(0, keys_TK2.shape[0], _BLOCK):
        rows = min(_BLOCK, keys_TK2.shape[0] - start)
        _take(raw, start * size, size, rows, place_3P, piece_BP)
        _high_parts(raw, 8 * start * size + top_k * both, 8 * size, rows, unary, top_k, high_N, columns)
        piece_N = piece_BP.reshape(-1)
        _split(piece_N, both, rows * columns // 2)
        key_N, first, count = keys_TK2.reshape(-1), start * columns, rows * columns
        _join_keys(piece_N.view(np.uint32), high_N, low, width, id_width, key_N, first, count)


@compiled
def _join_keys(
    field_N: Any, high_N: Any, low: Any, width: Any, id_width: Any, key_N: Any, first: Any, count: Any
) -> None:
    mask, up, by = np.uint32((1 << width) - 1), np.uint32(id_width), np.uint32(low)
    for i in range(count):
        id_ = (high_N[i] << by) | (field_N[i] >> np.uint32(width))
        key_N[np.uint64(first) + np.uint64(i)] = ((field_N[i] & mask) << up) | id_


@compiled
def finish_sets(
    keys_TK2: Any, floats_T5: Any, width: Any, id_width: Any, ids_TK: Any, logprobs_TK: Any, tail_T: Any
) -> None:
    """Targets from the keys of `decode_sets` in ascending order, which is the order of rank."""
    top_k = ids_TK.shape[1]
    levels, mask = np.float32((1 << width) - 2), np.uint32((1 << id_width) - 1)
    x_BK, mass_BK, row_B = _scratch(top_k)
    for start in range(0, ids_TK.shape[0], _BLOCK):
        for b in range(min(_BLOCK, ids_TK.shape[0] - start)):
            t = np.uint64(start + b)
            second, step = floats_T5[t, 0], floats_T5[t, 1] / levels
            for k in range(top_k):
                ids_TK[t, k] = keys_TK2[t, k] & mask
                code = np.int32(keys_TK2[t, k] >> np.uint32(id_width))
                x_BK[b, k] = second + np.float32(code - np.int32(1)) * step
        _finish(x_BK, mass_BK, row_B, floats_T5, start, logprobs_TK, tail_T)


# -- sampled: draws and their counts -----------------------------------------------------------------------


@summing
def _count(logprobs_TK: Any, t: Any, draws: Any, count_K: Any) -> Any:
    """Fill how often each entry was drawn; returns the number of distinct ids, 0 for a row that is not N draws."""
    scale, excess, rise, total, drawn = np.float32(draws), _ZERO, np.int32(0), np.int32(0), np.int32(0)
    for k in range(count_K.shape[0]):
        drawn += np.int32(logprobs_TK[t, k] >= -_FLOOR)
    stop = min((drawn + 15) & -16, count_K.shape[0])  # whole vectors; what was not drawn stands at the end
    for k in range(stop):
        share = _exp(min(-logprobs_TK[t, k], _FLOOR)) * scale
        count_K[k] = np.int32(share + _HALF)
        excess += max(abs(share - np.float32(count_K[k])) - _SLACK, _ZERO)
    for k in range(stop):
        total += count_K[k]
    for k in range(1, stop):
        rise += max(count_K[k] - count_K[k - 1], np.int32(0))
    # A NaN makes the excess NaN, or a count that no sum of draws allows. Entries that were drawn must come first.
    whole = excess <= 0 and rise == 0 and total == draws and count_K[drawn - 1] > 0
    return drawn if drawn > 0 and whole else 0


@compiled
def encode_draws(
    ids_TK: Any, logprobs_TK: Any, vocab_size: Any, draws: Any, id_width: Any, distinct_T: Any, raw: Any
) -> Any:
    """Fill each row's number of ids, and a zeroed stream u8 that is long enough: each row's ids, then from its last
    entry to its second by how much a count exceeds the one behind it, in unary. Behind the last is 1, the first is what
    is left of the draws. Returns the stream's bits, or minus what is wrong.
    """
    bit, count_K = 0, np.empty(ids_TK.shape[1], np.int32)
    for t in range(ids_TK.shape[0]):
        distinct = _count(logprobs_TK, t, draws, count_K)
        if distinct == 0:
            return -BAD_VALUE
        distinct_T[t] = distinct
        for k in range(distinct):
            if ids_TK[t, k] < 0 or ids_TK[t, k] >= vocab_size:
                return -BAD_ID
            shifted = np.uint64(ids_TK[t, k]) << np.uint64(bit & 7)
            for j in range(SPARE):
                raw[(bit >> 3) + j] |= np.uint8(shifted >> np.uint64(8 * j))
            bit += id_width
        behind = 1
        for k in range(distinct - 1, 0, -1):
            bit += count_K[k] - behind
            raw[bit >> 3] |= np.uint8(1) << np.uint8(bit & 7)
            bit += 1
            behind = count_K[k]
    return bit


@compiled
def decode_draws(
    raw: Any, distinct_T: Any, draws: Any, id_width: Any, log_share_N1: Any, ids_TK: Any, logprobs_TK: Any
) -> Any:
    """Inverse of `encode_draws` into arrays of 0 and -inf; returns the stream's bits, -8 if it ends early.

    log_share_N1: log(count / N) of the counts 0..N.
    """
    bit, size, mask = 0, 8 * (raw.shape[0] - SPARE), (np.uint64(1) << np.uint64(id_width)) - np.uint64(1)
    for t in range(ids_TK.shape[0]):
        distinct = np.int64(distinct_T[t])
        if distinct == 0 or bit + distinct * id_width > size:
            return -8
        for k in range(distinct):
            word = np.uint64(0)
            for j in range(SPARE):
                word |= np.uint64(raw[(bit >> 3) + j]) << np.uint64(8 * j)
            ids_TK[t, k] = (word >> np.uint64(bit & 7)) & mask
            bit += id_width
        count, left = 1, draws
        for k in range(distinct - 1, 0, -1):
            while bit < size and (raw[bit >> 3] >> np.uint8(bit & 7)) & np.uint8(1) == 0:
                count += 1
                bit += 1
            bit += 1
            left -= count
            if left < count:
                return -8
            logprobs_TK[t, k] = log_share_N1[count]
        logprobs_TK[t, 0] = log_share_N1[left]
    return bit if bit <= size else -8
