"""Compiled loops of the codecs: log-probabilities to small codes, codes and ids to bits, and back.

Shape suffixes: T = tokens, K = entries a token, W = bytes a row, B = rows of a block, P = pieces of a row (see the bit
streams below), C = chunks of 56 bits, N = any count. A row is what is stored of one token: a little-endian bit stream,
and then five f16 that the caller converts. d = lp_1 - lp_k >= 0 is an entry's distance below the top one,
x = `_bend(d)`.

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
"""Columns of a row's numbers: x_2, span, log odds of the tail, gold log-prob, entropy. An encoder fills three."""
OK, BAD_ID, BAD_VALUE = 0, 1, 2
"""What an encoder found: all well; an id outside the vocabulary; log-probs that are infinite, NaN or not descending."""
LOGPROB_FLOOR = 32.0
"""Kept entries further than this below the top one are stored at this distance: e^-32 of its probability."""
WIDEST_FIELD = 28
"""Bits of an id and a code together: two such fields and a begun byte fit a word."""
SPARE = 4
"""Bytes behind a stream of draws, read and written without effect: an id touches that many at most."""

_BLOCK = 32
"""Rows that go through one small step together; few enough that all their arrays stay in the processor's cache."""
_CHUNK = 56
"""Bits that a piece may have: with the up to 7 bits of a byte that is begun they fit a word."""
_BEHIND = _CHUNK + 16
_FALSE = ir.Constant(ir.IntType(1), 0)
# All constants are f32 or i32: a Python number in an expression would make numba compute it in double precision.
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
# Coefficients of log(1 + r), third degree and up, from Cephes.
_L3, _L4, _L5, _L6, _L7, _L8, _L9, _L10, _L11 = (
    np.float32(x)
    for x in (
        3.3333331174e-1, -2.4999993993e-1, 2.0000714765e-1, -1.6668057665e-1, 1.4249322787e-1, -1.2420140846e-1,
        1.1676998740e-1, -1.1514610310e-1, 7.0376836292e-2,
    )
)  # fmt: skip


# -- three ways to compile -------------------------------------------------------------------------------------------
# Strict floating point keeps the compiler from turning some loops into vectors. Each loop gets the least freedom that
# makes it fast: the more freedom, the more a last bit may depend on the kind of processor.


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


# -- elementary functions --------------------------------------------------------------------------------------------
# Own exp and log, because a call into the C library keeps a loop from becoming vectors.


@fused
def _exp(d: Any) -> Any:
    """exp(-d) for d in [0, 80), relative error below 3e-7. Arithmetic only, so that its loop becomes vectors."""
    # exp(-d) = 2^-n e^r with |r| <= log(2) / 2. log 2 is subtracted in two parts, so that r keeps its low bits.
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


# -- bit streams -----------------------------------------------------------------------------------------------------
# A row's stream is written and read in pieces of up to 56 bits, at the same places in every row of a codec. So places
# are computed once, and a piece is one shift and one 8-byte store, whatever bit it begins at.


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
    """The 8 bytes from `at` as a little-endian number. The compiler makes one load of them."""
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
    """Where pieces of so many bits begin, one behind the other, u64[3, P]: the byte, the bit in it, and how far the
    piece before must be shifted right so that its end fills the byte's lower bits.

    A table, because a running sum would make every piece wait for the one before.
    """
    place_3P, bit, before = np.empty((3, size_P.shape[0]), np.uint64), np.uint64(0), np.uint64(0)
    for j in range(size_P.shape[0]):
        place_3P[0, j], place_3P[1, j] = bit >> np.uint64(3), bit & np.uint64(7)
        place_3P[2, j] = before - place_3P[1, j]
        before = np.uint64(size_P[j])
        bit += before
    return place_3P


@compiled
def _put(raw: Any, first_byte: Any, size: Any, rows: Any, pair_BP: Any, more_BC: Any, place_3P: Any) -> None:
    """Write a block's pieces, first those of `pair_BP` and then those of `more_BC`, to rows of `size` bytes that begin
    at `first_byte`.

    Each piece is stored as 8 bytes. What it overwrites behind its end is written afterwards: by the next piece, or by
    the caller, who puts the row's floats there.
    """
    pairs = pair_BP.shape[1]
    for b in range(rows):
        begin, before = np.uint64(first_byte + b * size), np.uint64(0)
        for j in range(pairs):
            # The byte is shared with the end of the piece before, which is carried along instead of read back.
            piece = pair_BP[b, j]
            _store(raw, begin + place_3P[0, j], (piece << place_3P[1, j]) | (before >> place_3P[2, j]))
            before = piece
        for c in range(more_BC.shape[1]):
            at, piece = np.uint64(pairs + c), more_BC[b, c]
            _store(raw, begin + place_3P[0, at], (piece << place_3P[1, at]) | (before >> place_3P[2, at]))
            before = piece


@compiled
def _take(raw: Any, first_byte: Any, size: Any, rows: Any, place_3P: Any, piece_BP: Any) -> None:
    """Read a block's pieces. The bits above a piece's own hold whatever comes next: the caller masks them."""
    for b in range(rows):
        begin = np.uint64(first_byte + b * size)
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


# -- log-probabilities -----------------------------------------------------------------------------------------------
# Stored are distances below the top entry and the tail's log odds. The top log-prob itself is not stored: it follows
# from head and tail summing to 1, so a decoded row is a distribution again and its KL cannot be negative.


@compiled
def _rises(value_N: Any, first: Any, step: Any, count: Any) -> Any:
    """How many of the values at first, first + step, ... are followed by a larger one, or by NaN."""
    found = np.int32(0)
    for i in range(count):
        at = np.uint64(first) + np.uint64(i) * np.uint64(step)
        found += np.int32(not value_N[at + np.uint64(1)] <= value_N[at])
    return found


@compiled
def _descend(logprobs_TK: Any, start: Any, rows: Any) -> Any:
    """Whether log-probs descend within every row of the block; False with a NaN, too."""
    # The block is one long loop over neighbours. Where one row ends and the next begins a rise is allowed: the rises at
    # those places alone are counted apart, and must be all there are.
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
    """Whether the block's ids lie in the vocabulary."""
    id_N, largest = ids_TK.reshape(-1), np.uint64(0)  # as an unsigned number a negative id is larger than any other
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
    """Fill a block's x, and its first and third float: x_2 (rounded to f16, in `x_BK` too) and the tail's log odds.

    Returns OK, BAD_ID or BAD_VALUE.
    """
    second, rows, good = min(1, x_BK.shape[1] - 1), min(_BLOCK, ids_TK.shape[0] - start), True
    if not _known(ids_TK, vocab_size, start, rows):
        return BAD_ID
    _distances(logprobs_TK, start, rows, x_BK)
    x_N, mass_N = x_BK.reshape(-1), mass_BK.reshape(-1)
    for i in range(rows * x_BK.shape[1]):
        mass_N[i] = _exp(x_N[i])
        x_N[i] = _bend(x_N[i])
    _sums(mass_BK, rows, row_B)
    # Log odds of the tail against the kept entries as they will be decoded, distances cut at the floor included.
    for b in range(rows):
        t = np.uint64(start + b)
        row_B[b] = tail_T[t] - logprobs_TK[t, 0] - _log(row_B[b])
    for b in range(rows):
        t = np.uint64(start + b)
        good &= (row_B[b] < np.inf) & (logprobs_TK[t, 0] < np.inf)  # both are False of NaN
        floats_T5[t, 2] = row_B[b]
        floats_T5[t, 0] = x_BK[b, second] = _as_f16(x_BK[b, second])
    return OK if good and _descend(logprobs_TK, start, rows) else BAD_VALUE


@compiled
def _finish(x_BK: Any, mass_BK: Any, row_B: Any, floats_T5: Any, start: Any, logprobs_TK: Any, tail_T: Any) -> None:
    """Fill a block's log-probs and tail from x, so that head and tail sum to 1. Overwrites x."""
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
        # log(1 + e^-|odds|), and the sign put back below: no overflow, whether almost all mass is in the tail or none.
        rest = _log(_ONE + _exp(min(abs(odds), _FLOOR)))
        row_B[b] = min(-odds, _ZERO) - rest - _log(row_B[b])
        tail_T[t] = min(odds, _ZERO) - rest
    for b in range(rows):
        t = np.uint64(start + b)
        top = row_B[b]
        for k in range(x_BK.shape[1]):
            logprobs_TK[t, k] = top - x_BK[b, k]


# -- packed: ids in probability order --------------------------------------------------------------------------------
# An entry is a field: its id, and the step from x_{k-1} to x_k. Two fields make a piece. The first two entries need no
# step (x_1 is 0, x_2 a float of its own), so the first piece holds two ids alone.


@compiled
def _packed_places(top_k: Any, id_width: Any, width: Any) -> Any:
    """Places of the first two ids together, then of pairs of fields."""
    size_P = np.full((top_k + 1) // 2, 2 * (id_width + width))
    size_P[0] = min(2, top_k) * id_width
    return _places(size_P)


@compiled
def encode_packed(
    ids_TK: Any, logprobs_TK: Any, tail_T: Any, vocab_size: Any, id_width: Any, width: Any, raw_TW: Any, floats_T5: Any
) -> Any:
    """Fill rows `raw_TW` but for their floats, and the first three columns of these in `floats_T5`.

    Returns OK, BAD_ID or BAD_VALUE; what was filled until then means nothing.
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
        # Compared as integers, since floats >= 0 have the same order as their bits, and the integers' maximum becomes
        # vectors.
        second, widest, before = floats_T5[t, 0], np.int32(0), _ZERO
        for k in range(x_BK.shape[1]):
            above = max(x_BK[b, k] - second, _ZERO)
            widest = np.int32(max(widest, np.float32(above - before).view(np.int32)))
            before = above
        floats_T5[t, 1] = _as_f16(max(np.int32(widest).view(np.float32), _SMALLEST))


@compiled
def _step_fields(x_BK: Any, floats_T5: Any, ids_TK: Any, start: Any, rows: Any, width: Any, field_BK2: Any) -> None:
    """Fill fields id << width | step. Places are rounded and steps are their differences: errors do not add up."""
    for b in range(rows):
        t = np.uint64(start + b)
        # A difference of two rounded places may be 1 above the widest step, so the scale leaves one level free.
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
        # Give the first two ids steps of 0, so that all pieces can be split and summed in the same way.
        for b in range(rows):
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


# -- compact: ids as a set -------------------------------------------------------------------------------------------
# The ids of a row are sorted and stored as a set, which takes fewer bits than a list. Their order is lost, so a
# log-prob is coded by its place between x_2 and x_K and not by a step; sorting by code brings the order back. Between
# the loops here numpy sorts keys: an id and a code in one u32. Keys come in rows of even length, 0 behind an odd K,
# because the loops take two of them as a u64.


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
    """Places of pairs of low parts with their codes, `width` bits each, and then of the unary bits in chunks.

    With an odd K the last pair has room for one more part: the first `width` of the `unary` bits are there.
    """
    pairs, left = (top_k + 1) // 2, unary - (top_k & 1) * width
    size_P = np.full(pairs + max(0, left + _CHUNK - 1) // _CHUNK, 2 * width)
    size_P[pairs:] = _CHUNK
    return _places(size_P)


@compiled
def _unary(keys_TK2: Any, top_k: Any, width: Any, start: Any, rows: Any, first: Any, chunk_BC: Any, c: Any) -> None:
    """Fill chunks c and c + 1 of a block's high parts in unary, which hold its bits first, first + 1, ...

    Every id is looked at for every two chunks, without a branch: one that lies elsewhere adds no bit.
    """
    size = np.uint64(_CHUNK)
    for b in range(rows):
        t, word, next_word = np.uint64(start + b), np.uint64(0), np.uint64(0)
        for k in range(top_k):
            high = np.uint64(keys_TK2[t, k] >> np.uint32(width))
            place = high + np.uint64(k) - np.uint64(first)  # before the first bit it wraps around, and is too large
            word |= np.uint64(1) << place if place < size else np.uint64(0)
            next_word |= np.uint64(1) << (place - size) if place - size < size else np.uint64(0)
        chunk_BC[b, c], chunk_BC[b, c + 1] = word, next_word


@compiled
def encode_sets(keys_TK2: Any, top_k: Any, low: Any, width: Any, highest: Any, raw_TW: Any) -> None:
    """Fill rows, but for their floats, from keys by ascending id: the ids' low bits with their codes, then the high
    bits in unary [published: Elias-Fano]: bit (id >> low) + i is set for the i-th id.

    `highest` is the largest high part that an id of the vocabulary has.
    """
    both, odd, pairs = low + width, top_k & 1, keys_TK2.shape[1] // 2
    place_3P = _set_places(top_k, both, top_k + highest)
    chunks = place_3P.shape[1] - pairs
    pair_BP, chunk_BC = np.empty((_BLOCK, pairs), np.uint64), np.empty((_BLOCK, chunks + 2), np.uint64)
    two_N, raw, size = keys_TK2.view(np.uint64).reshape(-1), raw_TW.reshape(-1), raw_TW.shape[1]
    for start in range(0, keys_TK2.shape[0], _BLOCK):
        rows = min(_BLOCK, keys_TK2.shape[0] - start)
        _join(two_N, start * pairs, both, pair_BP.reshape(-1), rows * pairs)
        if odd:  # the last pair has one low part, and takes the first bits of the unary part in the place of another
            _unary(keys_TK2, top_k, both, start, rows, 0, chunk_BC, 0)
            for b in range(rows):
                pair_BP[b, pairs - 1] |= (chunk_BC[b, 0] & _ones(both)) << np.uint64(both)
        for c in range(0, chunks, 2):
            _unary(keys_TK2, top_k, both, start, rows, odd * both + c * _CHUNK, chunk_BC, c)
        _put(raw, start * size, size, rows, pair_BP, chunk_BC[:, :chunks], place_3P)


@compiled
def _high_parts(raw: Any, bit: Any, step: Any, rows: Any, unary: Any, top_k: Any, high_N: Any, columns: Any) -> None:
    """Read a block's high parts from `unary` bits a row, `step` bits from row to row.

    Ones are taken 16 at a time, also where a chunk has fewer: a loop over their exact number would end in a branch that
    the processor cannot predict. What is written too much behind a row's K, at most `_BEHIND`, the next row overwrites.
    """
    for b in range(rows):
        byte, shift = np.uint64(bit + b * step) >> np.uint64(3), np.uint64(bit + b * step) & np.uint64(7)
        row, found, begin = np.uint64(b * columns), np.uint64(0), np.uint64(0)
        while begin < np.uint64(unary):
            chunk = (_word(raw, byte) >> shift) & _ones(min(np.uint64(unary) - begin, np.uint64(_CHUNK)))
            # The i-th one stands at bit (high part + i), so its high part is its place less the ones before it.
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
        # The unary part follows the low parts, K * (low + width) bits from the beginning of each row.
        _high_parts(raw, 8 * start * size + top_k * both, 8 * size, rows, unary, top_k, high_N, columns)
        piece_N = piece_BP.reshape(-1)
        _split(piece_N, both, rows * columns // 2)
        key_N, first, count = keys_TK2.reshape(-1), start * columns, rows * columns
        _join_keys(piece_N.view(np.uint32), high_N, low, width, id_width, key_N, first, count)


@compiled
def _join_keys(
    field_N: Any, high_N: Any, low: Any, width: Any, id_width: Any, key_N: Any, first: Any, count: Any
) -> None:
    """Keys code << id_width | id from fields (low part, code) and the ids' high parts."""
    mask, up, by = np.uint32((1 << width) - 1), np.uint32(id_width), np.uint32(low)
    for i in range(count):
        id_ = (high_N[i] << by) | (field_N[i] >> np.uint32(width))
        key_N[np.uint64(first) + np.uint64(i)] = ((field_N[i] & mask) << up) | id_


@compiled
def finish_sets(
    keys_TK2: Any, floats_T5: Any, width: Any, id_width: Any, ids_TK: Any, logprobs_TK: Any, tail_T: Any
) -> None:
    """Fill the targets from the keys of `decode_sets`, sorted: ascending codes are descending probabilities."""
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


# -- sampled: draws and their counts ---------------------------------------------------------------------------------
# Rows differ in length here, so one stream runs through all tokens, bit by bit and without blocks.


@summing
def _count(logprobs_TK: Any, t: Any, draws: Any, count_K: Any) -> Any:
    """Fill how often each entry was drawn. Returns the distinct ids, 0 for a row that is not `draws` draws."""
    scale, excess, rise, total, drawn = np.float32(draws), _ZERO, np.int32(0), np.int32(0), np.int32(0)
    for k in range(count_K.shape[0]):
        drawn += np.int32(logprobs_TK[t, k] >= -_FLOOR)
    stop = min((drawn + 15) & -16, count_K.shape[0])  # up to whole vectors; entries that were not drawn are last
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
    """Fill each row's number of distinct ids, and a zeroed stream u8 that is long enough. Returns the bits used, or
    minus BAD_ID or BAD_VALUE.

    Of each row the stream holds the ids, and then, from the last entry to the second, by how much a count exceeds the
    count behind it, in unary; the last count is compared with 1. The first count is what is left of the draws, and not
    stored.
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
    """Inverse of `encode_draws` into arrays of 0 and -inf. Returns the bits used, or -8 if the stream ends early or its
    counts do not sum to the draws.

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
