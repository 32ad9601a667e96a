"""Compiled loops of the codecs: log-probabilities to small codes, codes and ids to bits, and back.

Shape suffixes: T = tokens, K = entries a token, W = bytes a record, B = rows of a block, K1 = K + 1, the last spare.
d = lp_1 - lp_k >= 0 is an entry's distance below the top one, x = `_bend(d)`. A record is a little-endian bit stream
and then five f16 that the caller converts.

Numba compiles a function at its first call and caches the result beside this file or in the user's cache folder. What
makes the loops fast: rows go through one small step a block at a time, so that neighbours overlap in the processor;
rows are passed as (array, index), since numba counts the users of a slice; single precision; a neighbour's value is
carried along by hand, since reading back what was just written waits for the store.
"""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np

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
# A Python number would make an expression double.
_ZERO, _HALF, _ONE, _BEND, _FLOOR = (np.float32(x) for x in (0, 0.5, 1, 4, LOGPROB_FLOOR))
_SLACK = np.float32(1e-3)
"""How far from a whole number a share of the draws may be."""
_SMALLEST = np.float32(2.0**-14)
"""Smallest normal f16."""
_LOG2_E, _LN2_HIGH = np.float32(math.log2(math.e)), np.float32(0.693359375)  # n * _LN2_HIGH is exact
_LN2_LOW = np.float32(math.log(2.0) - 0.693359375)
_C2, _C3, _C4, _C5, _C6 = (np.float32(1 / math.factorial(i)) for i in range(2, 7))


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


@compiled
def _exp(d: Any) -> Any:
    """exp(-d) for d in [0, 80), relative error below 3e-7. Arithmetic only, so that its loop becomes vectors."""
    n = np.int32(d * _LOG2_E + _HALF)
    r = np.float32(n) * _LN2_HIGH - d + np.float32(n) * _LN2_LOW
    two_to_minus_n = np.int32((np.int32(127) - n) << np.int32(23)).view(np.float32)
    return (_ONE + r * (_ONE + r * (_C2 + r * (_C3 + r * (_C4 + r * (_C5 + r * _C6)))))) * two_to_minus_n


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


@compiled
def _stream(raw_TW: Any) -> Any:
    """Room to write one record's stream, as words and as bytes: every row then begins at bit 0."""
    size = raw_TW.shape[1] - 2 * FLOATS
    words = np.zeros((size + 15) // 8, np.uint64)
    return words, words.view(np.uint8)[:size]


@compiled
def _put(words: Any, bit: Any, field_BK1: Any, b: Any, first: Any, width: Any) -> Any:
    """Write the fields field_BK1[b, first:-1] of `width` bits from a bit on. Returns the bit after them.

    In pairs: filling a word costs more than joining two fields. The spare last field must be 0.
    """
    at, filled, both = np.uint64(bit) >> np.uint64(6), np.uint64(bit) & np.uint64(63), np.uint64(2 * width)
    held = words[at] & ((np.uint64(1) << filled) - np.uint64(1))
    for k in range(first, field_BK1.shape[1] - 1, 2):
        pair = np.uint64(field_BK1[b, k]) | (np.uint64(field_BK1[b, k + 1]) << np.uint64(width))
        held |= pair << filled
        filled += both
        if filled >= np.uint64(64):
            words[at] = held
            at += np.uint64(1)
            filled -= np.uint64(64)
            held = pair >> (both - filled)
    words[at] = held
    return bit + (field_BK1.shape[1] - 1 - first) * width


@compiled
def _word(raw: Any, at: Any) -> Any:
    """The 8 bytes from `at` as a little-endian number. LLVM makes one load of them."""
    word = np.uint64(0)
    for j in range(8):
        word |= np.uint64(raw[at + np.uint64(j)]) << np.uint64(8 * j)
    return word


@compiled
def _take(raw: Any, record: Any, bit: Any, field_BK1: Any, b: Any, first: Any, width: Any) -> None:
    """Inverse of `_put`, from the record that begins at a byte; the spare last field may hold anything afterwards.

    Reads up to 7 bytes beyond the fields: the record's floats are there.
    """
    mask = (np.uint64(1) << np.uint64(width)) - np.uint64(1)
    for k in range(first, field_BK1.shape[1] - 1, 2):
        here = np.uint64(bit + (k - first) * width)
        pair = _word(raw, np.uint64(record) + (here >> np.uint64(3))) >> (here & np.uint64(7))
        field_BK1[b, k] = pair & mask
        field_BK1[b, k + 1] = (pair >> np.uint64(width)) & mask


# -- log-probabilities -------------------------------------------------------------------------------------


@compiled
def _all_known(ids_TK: Any, t: Any, vocab_size: Any) -> Any:
    known: Any = True
    for k in range(ids_TK.shape[1]):
        known &= np.uint64(ids_TK[t, k]) < np.uint64(vocab_size)
    return known


@compiled
def _descends(logprobs_TK: Any, t: Any) -> Any:
    """False of a row with NaN, too."""
    good, before = True, logprobs_TK[t, 0]
    for k in range(logprobs_TK.shape[1]):
        good &= logprobs_TK[t, k] <= before
        before = logprobs_TK[t, k]
    return good


@summing
def _distances(logprobs_TK: Any, t: Any, x_BK: Any, b: Any) -> Any:
    """Fill x = bend(d); returns sum_k e^-d."""
    top, total = logprobs_TK[t, 0], _ZERO
    for k in range(x_BK.shape[1]):
        d = min(top - logprobs_TK[t, k], _FLOOR)
        x_BK[b, k] = _bend(d)
        total += _exp(d)
    return total


@compiled
def _measure(ids_TK: Any, logprobs_TK: Any, tail_T: Any, vocab_size: Any, start: Any, x_BK: Any, floats_T5: Any) -> Any:
    """A block's x, and its first and third float: x_2, rounded in x as well, and the tail's log odds."""
    second = min(1, x_BK.shape[1] - 1)
    stop = min(start + _BLOCK, ids_TK.shape[0])
    for t in range(start, stop):
        if not _all_known(ids_TK, t, vocab_size):
            return BAD_ID
        if not _descends(logprobs_TK, t) or not math.isfinite(logprobs_TK[t, 0]) or not tail_T[t] < np.inf:
            return BAD_VALUE
    for t in range(start, stop):
        floats_T5[t, 2] = _distances(logprobs_TK, t, x_BK, t - start)
    for t in range(start, stop):
        floats_T5[t, 2] = tail_T[t] - logprobs_TK[t, 0] - math.log(floats_T5[t, 2])
        floats_T5[t, 0] = x_BK[t - start, second] = _as_f16(x_BK[t - start, second])
    return OK


@summing
def _unbend_all(x_BK: Any, b: Any) -> Any:
    """x to d in place; returns sum_k e^-d."""
    total = _ZERO
    for k in range(x_BK.shape[1]):
        x_BK[b, k] = _unbend(x_BK[b, k])
        total += _exp(x_BK[b, k])
    return total


@compiled
def _finish(x_BK: Any, floats_T5: Any, start: Any, logprobs_TK: Any, tail_T: Any) -> None:
    """A block's log-probs, whose distances are unbend(x): head and tail sum to 1."""
    stop = min(start + _BLOCK, logprobs_TK.shape[0])
    for t in range(start, stop):
        x_BK[t - start, 0] = _ZERO
        tail_T[t] = _unbend_all(x_BK, t - start)
    for t in range(start, stop):
        odds = floats_T5[t, 2]
        rest = math.log(_ONE + _exp(min(abs(odds), _FLOOR)))  # of e^-|odds|: neither a sharp nor a flat row overflows
        logprobs_TK[t, 0] = min(-odds, _ZERO) - rest - math.log(tail_T[t])
        tail_T[t] = min(odds, _ZERO) - rest
    for t in range(start, stop):
        top = logprobs_TK[t, 0]
        for k in range(x_BK.shape[1]):
            logprobs_TK[t, k] = top - x_BK[t - start, k]


# -- packed: ids in probability order ----------------------------------------------------------------------


@compiled
def encode_packed(
    ids_TK: Any, logprobs_TK: Any, tail_T: Any, vocab_size: Any, id_width: Any, width: Any, raw_TW: Any, floats_T5: Any
) -> Any:
    """Fill records and their first three floats: ids, those of ranks >= 3 with the step from x_{k-1} to x_k."""
    top_k = ids_TK.shape[1]
    plain = min(2, top_k)
    x_BK, field_BK1 = np.empty((_BLOCK, top_k), np.float32), np.zeros((_BLOCK, top_k + 1), np.int32)
    words, row = _stream(raw_TW)
    for start in range(0, ids_TK.shape[0], _BLOCK):
        problem = _measure(ids_TK, logprobs_TK, tail_T, vocab_size, start, x_BK, floats_T5)
        if problem != OK:
            return problem
        stop = min(start + _BLOCK, ids_TK.shape[0])
        for t in range(start, stop):
            floats_T5[t, 1] = _as_f16(max(_widest_step(x_BK, t - start, floats_T5[t, 0]), _SMALLEST))
        for t in range(start, stop):
            _step_fields(x_BK, floats_T5[t, 0], floats_T5[t, 1], ids_TK, t, width, field_BK1, t - start)
        for t in range(start, stop):
            words[0] = ids_TK[t, 0]
            if plain == 2:
                words[0] |= np.uint64(ids_TK[t, 1]) << np.uint64(id_width)
            _put(words, plain * id_width, field_BK1, t - start, plain, id_width + width)
            for j in range(row.shape[0]):
                raw_TW[t, j] = row[j]
    return OK


@compiled
def _widest_step(x_BK: Any, b: Any, second: Any) -> Any:
    """Largest x_k - x_{k-1} from x_2 on; as integers, whose maximum becomes vectors and whose order is the same."""
    widest, before = np.int32(0), _ZERO
    for k in range(x_BK.shape[1]):
        above = max(x_BK[b, k] - second, _ZERO)
        widest = np.int32(max(widest, np.float32(above - before).view(np.int32)))
        before = above
    return np.int32(widest).view(np.float32)


@compiled
def _step_fields(x_BK: Any, second: Any, span: Any, ids_TK: Any, t: Any, width: Any, field_BK1: Any, b: Any) -> None:
    """Fill id << width | step. Places are rounded, not steps: errors do not add up."""
    # The difference of two roundings is at most 1 above the difference, hence a level less than a code has.
    scale, before = np.float32((1 << width) - 2) / span, np.int32(0)
    for k in range(x_BK.shape[1]):
        place = np.int32(max(x_BK[b, k] - second, _ZERO) * scale + _HALF)
        field_BK1[b, k] = (ids_TK[t, k] << width) | (place - before)
        before = place


@compiled
def decode_packed(
    raw_TW: Any, floats_T5: Any, id_width: Any, width: Any, ids_TK: Any, logprobs_TK: Any, tail_T: Any
) -> None:
    """Inverse of `encode_packed`."""
    top_k = ids_TK.shape[1]
    plain, id_mask = min(2, top_k), (np.uint64(1) << np.uint64(id_width)) - np.uint64(1)
    x_BK, field_BK1 = np.empty((_BLOCK, top_k), np.float32), np.zeros((_BLOCK, top_k + 1), np.int32)
    raw, size = raw_TW.reshape(-1), raw_TW.shape[1]
    for start in range(0, ids_TK.shape[0], _BLOCK):
        stop = min(start + _BLOCK, ids_TK.shape[0])
        for t in range(start, stop):
            first_ids = _word(raw, np.uint64(t * size))
            for k in range(plain):
                field_BK1[t - start, k] = ((first_ids >> np.uint64(k * id_width)) & id_mask) << np.uint64(width)
            _take(raw, t * size, plain * id_width, field_BK1, t - start, plain, id_width + width)
        for t in range(start, stop):
            for k in range(top_k):
                ids_TK[t, k] = field_BK1[t - start, k] >> width
            _add_steps(field_BK1, t - start, width, floats_T5[t, 0], floats_T5[t, 1], x_BK)
        _finish(x_BK, floats_T5, start, logprobs_TK, tail_T)


@compiled
def _add_steps(field_BK1: Any, b: Any, width: Any, second: Any, span: Any, x_BK: Any) -> None:
    """x from the fields' steps, which their sums replace."""
    place, mask, step = np.int32(0), np.int32((1 << width) - 1), span / np.float32((1 << width) - 2)
    for k in range(x_BK.shape[1]):
        place = np.int32(place + np.int32(field_BK1[b, k] & mask))
        field_BK1[b, k] = place
    for k in range(x_BK.shape[1]):
        x_BK[b, k] = second + np.float32(field_BK1[b, k]) * step


# -- compact: ids as a set ---------------------------------------------------------------------------------


@compiled
def codes_of_sets(
    ids_TK: Any, logprobs_TK: Any, tail_T: Any, vocab_size: Any, width: Any, keys_TK: Any, floats_T5: Any
) -> Any:
    """Fill keys id << width | code and the first three floats. Code 0 is the top entry, 1 is x_2, the last is x_K."""
    top_k = ids_TK.shape[1]
    last = np.int32((1 << width) - 2)
    x_BK, code_K = np.empty((_BLOCK, top_k), np.float32), np.empty(top_k, np.int32)
    for start in range(0, ids_TK.shape[0], _BLOCK):
        problem = _measure(ids_TK, logprobs_TK, tail_T, vocab_size, start, x_BK, floats_T5)
        if problem != OK:
            return problem
        for t in range(start, min(start + _BLOCK, ids_TK.shape[0])):
            second = floats_T5[t, 0]
            floats_T5[t, 1] = _as_f16(max(x_BK[t - start, top_k - 1] - second, _SMALLEST))
            scale = np.float32(last) / floats_T5[t, 1]
            for k in range(top_k):
                place = np.int32(max(x_BK[t - start, k] - second, _ZERO) * scale + _HALF)
                code_K[k] = np.int32(1) + min(place, last)
            code_K[0] = 0
            for k in range(top_k):
                keys_TK[t, k] = (ids_TK[t, k] << width) | code_K[k]
    return OK


@compiled
def encode_sets(keys_TK: Any, low: Any, width: Any, raw_TW: Any) -> None:
    """Fill records from ascending keys: ids' low bits with their codes, then the high bits in unary
    [published: Elias-Fano]: bit (id >> low) + i is set for the i-th id.
    """
    top_k = keys_TK.shape[1]
    mask = np.int64((1 << (low + width)) - 1)
    field_BK1, high_K = np.zeros((1, top_k + 1), np.int32), np.empty(top_k, np.int64)
    words, row = _stream(raw_TW)
    for t in range(keys_TK.shape[0]):
        for k in range(top_k):
            field_BK1[0, k] = np.int64(keys_TK[t, k]) & mask
            high_K[k] = (np.int64(keys_TK[t, k]) >> (low + width)) + k
        words[:] = 0
        end = _put(words, 0, field_BK1, 0, 0, low + width)
        for k in range(top_k):
            bit = np.uint64(end + high_K[k])
            words[bit >> np.uint64(6)] |= np.uint64(1) << (bit & np.uint64(63))
        for j in range(row.shape[0]):
            raw_TW[t, j] = row[j]


@compiled
def decode_sets(raw_TW: Any, low: Any, width: Any, id_width: Any, highest: Any, keys_TK: Any) -> None:
    """Fill keys code << id_width | id, by ascending id. `highest`: the largest high part of an id."""
    top_k = keys_TK.shape[1]
    high_K1, field_BK1 = np.zeros(top_k + 1, np.int64), np.zeros((1, top_k + 1), np.int32)
    raw, size = raw_TW.reshape(-1), raw_TW.shape[1]
    for t in range(keys_TK.shape[0]):
        found: Any = 0
        for i in range(top_k + highest):  # no branch: it would be guessed wrong every other time
            bit = np.uint64(8 * t * size + top_k * (low + width) + i)
            high_K1[np.uint64(min(found, top_k))] = i - found
            found += np.int64((raw[bit >> np.uint64(3)] >> np.uint8(bit & np.uint64(7))) & np.uint8(1))
        _take(raw, t * size, 0, field_BK1, 0, 0, low + width)
        for k in range(top_k):
            code = field_BK1[0, k] & ((1 << width) - 1)
            keys_TK[t, k] = (code << id_width) | (high_K1[k] << low) | (field_BK1[0, k] >> width)


@compiled
def finish_sets(
    keys_TK: Any, floats_T5: Any, width: Any, id_width: Any, ids_TK: Any, logprobs_TK: Any, tail_T: Any
) -> None:
    """Targets from the keys of `decode_sets` in ascending order, which is the order of rank."""
    top_k = keys_TK.shape[1]
    levels, mask = np.float32((1 << width) - 2), np.int64((1 << id_width) - 1)
    x_BK = np.empty((_BLOCK, top_k), np.float32)
    for start in range(0, keys_TK.shape[0], _BLOCK):
        for t in range(start, min(start + _BLOCK, keys_TK.shape[0])):
            second, step = floats_T5[t, 0], floats_T5[t, 1] / levels
            for k in range(top_k):
                ids_TK[t, k] = np.int64(keys_TK[t, k]) & mask
            for k in range(top_k):
                code = np.int32(np.int64(keys_TK[t, k]) >> id_width)
                x_BK[t - start, k] = second + np.float32(code - np.int32(1)) * step
        _finish(x_BK, floats_T5, start, logprobs_TK, tail_T)


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
