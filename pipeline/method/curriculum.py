"""Competence and the global order of samples: pure functions of (hardness, seed, share of training done).

Shapes: M samples of the data set, S strata, Q codes of quantised hardness, G samples of a global batch. tau in [0, 1]:
share of training done, in samples. Orders come from integers and from +, -, *, / in float64 in a fixed sequence, not
from a machine's own exp and log, so that every machine draws the same.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.method import table_loops
from pipeline.method.hardness import Ranks
from pipeline.method.table_loops import CODES

Floats = NDArray[np.float32]
Indices = NDArray[np.int64]

MOST_VISITS = 600
"""Visits beyond the least visited sample's from which on no more weight is taken. [ours]"""
LEAST_WEIGHT = 1e-6
"""So that every eligible sample can be drawn where nothing else is left."""
RETIRED_WEIGHT = 1e-12
SWEEP_SHARE = 0.25
"""Largest share of a window for samples that would otherwise wait too long. [ours]"""


# -- schedules ---------------------------------------------------------------------------------------------------------


def competence(tau: float, start: float, until: float) -> float:
    """c = min(1, sqrt(tau / tau_g (1 - c0^2) + c0^2)): share of samples eligible, easiest first.

    [published: Platanios 2019, arXiv:1903.09848]
    """
    return min(1.0, math.sqrt(tau / until * (1 - start**2) + start**2))


def tilt(competence: float, start: float, betas: tuple[float, float]) -> float:
    """beta: a straight line from the first of `betas` at competence `start` to the second at competence 1. [ours]

    Above 0 hard samples are preferred, below 0 easy ones.
    """
    first, last = betas
    return last if start >= 1.0 else first + (last - first) * (competence - start) / (1 - start)


# -- orders of samples -------------------------------------------------------------------------------------------------
# An order is global: the ranks of a job take strides of it. It is a function of table, window and seed, never of the
# number of ranks, so a job that goes on with another number of ranks sees the same samples in the same steps.


def uniform_order(num_samples: int, seed: int, start: int, size: int) -> Indices:
    """Positions [start, start + size) of an endless sequence of seeded permutations of the data set."""
    place = np.arange(start, start + size, dtype=np.int64)
    epochs = range(start // num_samples, (start + size - 1) // num_samples + 1)
    return np.concatenate(
        [_permuted(place[place // num_samples == epoch] % num_samples, num_samples, seed, epoch) for epoch in epochs]
    )


@dataclass(frozen=True, slots=True)
class Weights:
    """How hardness and visits weigh a sample; the defaults draw uniformly. See `plan_window`."""

    gamma: float = 0.0
    """Multiple of 0.5."""
    mixture: float = 1.0
    """m."""
    cap: float = 50.0
    """w_max."""
    visit_penalty: float = 0.0
    """lambda in nats."""
    retire_below: float = 0.0
    """delta: retired are samples of the pool whose hardness is below this share of their stratum's mean."""


@dataclass(frozen=True, slots=True)
class Window:
    """What a window draws. `number`: 0, 1, 2, ... through the job; `size`: its samples."""

    number: int
    size: int
    competence: float = 1.0
    floor: float = 0.0
    """Share of its proportional share that each stratum keeps."""
    weights: Weights = Weights()


def plan_window(
    ranks: Ranks,
    visits_M: NDArray[np.integer],
    last_window_M: NDArray[np.integer],
    stratum_M: NDArray[np.integer],
    pool_S: NDArray[np.bool_],
    window: Window,
    seed: int,
) -> Indices:
    """The global order of one window: `window.size` table indices. A pure function of its arguments.

    Eligible are samples with percentile <= competence, and in any case each stratum's easiest. They are drawn without
    replacement with the weight

        a = [(1 - m) + m min((D / mean D of the stratum)^gamma, w_max)] exp(-lambda (v - min v))    [ours]

    by Gumbel-top-k [published: Kool 2019, arXiv:1903.06059], as a race: the smallest times -log(1 - U) / a come first,
    U hashed from (seed, window, sample). Whole passes come first when the window is longer than the eligible set.

    By size and not by rank: what a visit can gain grows with the distance to the teacher, and as a sample is learnt its
    weight falls by itself. Samples of the pool whose D is below delta times their stratum's mean are **retired**: there
    is nothing better than the teacher to release them to, and nothing left to learn. They are drawn by the sweep alone,
    or where all else is drawn, and come back when a score rises. [ours]

    Each stratum keeps at least `floor` of its proportional share; retired samples are in no share.

    A sweep bounds how long a sample waits. Window w checks K = `sweep_size` table positions, from w K on and around the
    end, and takes the eligible ones that no window drew in the C - 1 windows before, C = ceil(M / K). So any C windows
    check every sample, and while all are eligible **every sample is drawn in any 2 C - 1 consecutive windows**
    (`longest_wait`): one of the last C of them checks it, and it is drawn then unless one of the C - 1 windows before
    drew it, and those are among the 2 C - 1 as well. [combination ours]
    """
    # Every pass has a key of its own; 1009 numbers are set aside for the passes of one window.
    field = _Race(ranks, visits_M, stratum_M, pool_S, window)
    passes, rest = divmod(window.size, int(field.eligible_S.sum()))
    streams = [_key(seed, window.number * 1009 + turn) for turn in range(passes + 1)]
    parts = [field.first(key, int(field.eligible_S.sum()), 0 * field.eligible_S)[0] for key in streams[:-1]]
    if rest:
        forced = _overdue(field, last_window_M, window) if not passes else np.zeros(0, np.int64)
        parts.append(_chosen(field, streams[-1], rest, window.floor, forced))
    return np.concatenate(parts)


def sweep_size(size: int, floor: float) -> int:
    """K: table positions that a window checks for samples that wait. It leaves room for what strata are guaranteed."""
    return max(1, min(int(SWEEP_SHARE * size), size - int(floor * size)))


def longest_wait(num_samples: int, size: int, floor: float) -> int:
    """Windows in a row of which at least one draws any given sample, while all samples are eligible."""
    return 1 if size >= num_samples else 2 * _sweep_windows(num_samples, size, floor) - 1


def rank_share(batch_size: int, rank: int, world: int, micro_batch: int) -> list[Indices]:
    """Positions in a global batch that a rank sees, one array per micro-batch: its stride, cut in order."""
    positions = np.arange(rank, batch_size, world, dtype=np.int64)
    return [positions[i : i + micro_batch] for i in range(0, len(positions), micro_batch)]


def _sweep_windows(num_samples: int, size: int, floor: float) -> int:
    return -(-num_samples // sweep_size(size, floor))


def _overdue(field: "_Race", last_window_M: NDArray[np.integer], window: Window) -> Indices:
    """Eligible samples that this window checks and that no window drew for a whole sweep; ascending."""
    num_samples, checked = len(last_window_M), sweep_size(window.size, window.floor)
    turn = _sweep_windows(num_samples, window.size, window.floor)
    positions = (window.number * checked + np.arange(min(checked, num_samples), dtype=np.int64)) % num_samples
    waits = window.number - last_window_M[positions].astype(np.int64) >= turn
    return np.sort(positions[waits & field.is_eligible(positions)])


def _chosen(field: "_Race", key: np.uint64, size: int, floor: float, forced: Indices) -> Indices:
    """`size` samples of the race, by ascending time: the forced, each stratum's guaranteed, then the first of the rest.

    Args:
        forced: taken whatever their times are; they count toward their strata's guarantee.
    """
    guaranteed_S = np.floor(floor * size * field.active_S / max(field.active_S.sum(), 1)).astype(np.int64)
    # Candidates: the first `size` overall, and enough of each stratum, both before the forced are taken out.
    ranked, times = field.first(key, size, guaranteed_S)
    others = ~np.isin(ranked, forced)
    ranked, times = ranked[others], times[others]
    missing_S = guaranteed_S - np.bincount(field.stratum_M[forced], minlength=len(guaranteed_S))
    stratum = field.stratum_M[ranked]
    # `ranked` is in order of time, so the first of a stratum, and the first that are left, are those that come first.
    kept = np.zeros(len(ranked), bool)
    for code, missing in enumerate(missing_S):
        kept[np.flatnonzero(stratum == code)[: max(missing, 0)]] = True
    kept[np.flatnonzero(~kept)[: size - len(forced) - int(kept.sum())]] = True
    index, times = np.concatenate([forced, ranked[kept]]), np.concatenate([field.times(key, forced), times[kept]])
    order: Indices = index[np.lexsort((index, times))]
    return order


def size_weights(
    ranks: Ranks, pool_S: NDArray[np.bool_], weights: Weights
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """(weight of each code without visits, whether it is retired), both [S, Q]."""
    relative_SQ = ranks.relative_sizes()
    sized_SQ = np.minimum(_power(relative_SQ, weights.gamma), weights.cap)
    weight_SQ = np.maximum((1 - weights.mixture) + weights.mixture * sized_SQ, LEAST_WEIGHT)
    retired_SQ = pool_S[:, None] & (relative_SQ < weights.retire_below)
    return np.where(retired_SQ, RETIRED_WEIGHT * weight_SQ, weight_SQ), retired_SQ


def retired(ranks: Ranks, pool_S: NDArray[np.bool_], weights: Weights) -> int:
    """How many samples are retired."""
    return int((ranks.count_SQ * size_weights(ranks, pool_S, weights)[1]).sum())


def _power(base: NDArray[np.float64], exponent: float) -> NDArray[np.float64]:
    """base^exponent for multiples of 0.5, from products and square roots, which are exact to the last bit anywhere."""
    halves = round(2 * exponent)
    result = np.sqrt(base) if halves % 2 else np.ones_like(base)
    for _ in range(halves // 2):
        result = result * base
    return result


# -- drawing by weight -------------------------------------------------------------------------------------------------
# Taking the k smallest exponential times with the weights as rates is a weighted draw without replacement. Each
# sample's time depends on the seed, the window and the sample alone, so samples can be looked at in any order, and most
# never: those whose time lies beyond a limit are skipped by one comparison.


class _Race:
    """The eligible samples and their weights."""

    def __init__(
        self,
        ranks: Ranks,
        visits_M: NDArray[np.integer],
        stratum_M: NDArray[np.integer],
        pool_S: NDArray[np.bool_],
        window: Window,
    ) -> None:
        # The weight is a product of two small tables, by code and by visits: no array of weights of all samples exists.
        self.code_M, self.visits_M, self.stratum_M = ranks.code_M, visits_M, stratum_M
        self.reach_S, self.eligible_S = _reach(ranks, window.competence)
        self.tilt_SQ, retired_SQ = size_weights(ranks, pool_S, window.weights)
        inside_SQ = np.arange(CODES) <= self.reach_S[:, None]
        self.active_S = (ranks.count_SQ * (inside_SQ & ~retired_SQ)).sum(axis=1)
        self.fade_V = _exp(-window.weights.visit_penalty * np.arange(MOST_VISITS + 1.0))
        columns = self.code_M, self.stratum_M, self.visits_M, self.reach_S
        self.least = table_loops.least_visits(*columns)
        self.sums_S = np.zeros(len(self.reach_S))
        table_loops.weight_sums(*columns, self.tilt_SQ, self.fade_V, self.least, self.sums_S)

    def is_eligible(self, index: Indices) -> NDArray[np.bool_]:
        """Whether each of some samples may be drawn."""
        eligible: NDArray[np.bool_] = self.code_M[index] <= self.reach_S[self.stratum_M[index]]
        return eligible

    def times(self, key: np.uint64, index: Indices) -> NDArray[np.float64]:
        """Time of each sample: exponential with its weight as rate."""
        visits = np.clip(self.visits_M[index].astype(np.int64) - self.least, 0, MOST_VISITS)
        weight = self.tilt_SQ[self.stratum_M[index], self.code_M[index]] * self.fade_V[visits]
        times: NDArray[np.float64] = _exponential(_uniform(index, key)) / weight
        return times

    def first(self, key: np.uint64, size: int, size_S: Indices) -> tuple[Indices, NDArray[np.float64]]:
        """Samples by ascending time, with their times: at least the first `size`, and the first `size_S` of strata.

        The result begins as that of sorting all samples. But only samples up to a limit of time are looked at; the
        limit is estimated from the sum of weights, and doubled until there are enough.
        """
        total, wanted_S = int(self.eligible_S.sum()), np.minimum(size_S, self.eligible_S)
        expected = _ample(np.array([min(size, total)]))[0] / self.sums_S.sum()
        expected_S = np.where(wanted_S > 0, _ample(wanted_S) / np.maximum(self.sums_S, 1e-300), 0)
        room = min(total, 2 * (int(_ample(np.array([size]))[0]) + int(_ample(wanted_S).sum())))
        while True:
            # With room for all samples there is no limit: the loop ends at the latest then.
            everyone = room == total
            limit_S = np.full(len(expected_S), np.inf) if everyone else np.maximum(expected, expected_S)
            found = self._found(key, limit_S, room)
            if found is None:
                room = min(2 * room, total)
                continue
            times = self.times(key, found)
            # `_found` compares rounded products, so it may have left out samples next to the limit. Only those clearly
            # below it are counted.
            surely = times <= limit_S[self.stratum_M[found]] * (1 - 1e-9)
            number_S = np.bincount(self.stratum_M[found][surely], minlength=len(wanted_S))
            enough = int((times <= expected * (1 - 1e-9)).sum()) >= min(size, total)
            if everyone or (enough and bool((number_S >= wanted_S).all())):
                order = np.argsort(times, kind="stable")
                return found[order], times[order]
            expected, expected_S, room = 2 * expected, 2 * expected_S, min(2 * room, total)

    def _found(self, key: np.uint64, limit_S: NDArray[np.float64], room: int) -> Indices | None:
        """Samples with a time up to their stratum's limit, in table order; None when there are more than `room`."""
        found = np.empty(room, np.int64)
        number = table_loops.race(
            self.code_M,
            self.stratum_M,
            self.visits_M,
            self.reach_S,
            self.tilt_SQ,
            self.fade_V,
            self.least,
            limit_S,
            key,
            found,
        )
        return None if number < 0 else found[:number]


def _reach(ranks: Ranks, competence: float) -> tuple[Indices, Indices]:
    """Highest eligible code of each stratum, and how many samples that makes.

    A stratum that has no sample up to the competence gives its easiest code, so that no task is left out.
    """
    reach_S, eligible_S = np.empty(len(ranks.count_SQ), np.int64), np.empty(len(ranks.count_SQ), np.int64)
    for stratum, (count_Q, percentile_Q) in enumerate(zip(ranks.count_SQ, ranks.percentile_SQ, strict=True)):
        easiest = int(np.argmax(count_Q > 0))
        upto = int(np.searchsorted(percentile_Q, np.float32(competence), side="right")) - 1
        reach_S[stratum] = max(upto, easiest)
        eligible_S[stratum] = count_Q[: reach_S[stratum] + 1].sum()
    return reach_S, eligible_S


def _ample(size: NDArray[np.int64]) -> NDArray[np.float64]:
    """Somewhat more than `size`, so that a random number with this mean is hardly ever less than it."""
    ample: NDArray[np.float64] = 1.2 * size + 8 * np.sqrt(size) + 8
    return ample


# -- random numbers that are the same on every machine -----------------------------------------------------------------


def _permuted(index: Indices, num_samples: int, seed: int, epoch: int) -> Indices:
    """A seeded permutation of range(num_samples) at some places, without computing it at the others.

    A Feistel network over the next power of 4, walked until it lands inside [published: cycle walking, Black and
    Rogaway 2002]; rounds are SplitMix64.
    """
    half = np.uint64(max(1, ((num_samples - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = [_key(seed, 8 * epoch + k) for k in range(8)]
    result = index.astype(np.uint64)
    outside = np.arange(len(result))
    # A result beyond the data set is permuted again until it lies inside: that keeps it a permutation.
    while len(outside):
        x = result[outside]
        left, right = x >> half, x & mask
        for key in keys:
            left, right = right, left ^ (_splitmix(right ^ key) & mask)
        result[outside] = x = (left << half) | right
        outside = outside[x >= np.uint64(num_samples)]
    return result.astype(np.int64)


def _key(seed: int, stream: int) -> np.uint64:
    """Key of one of a seed's many independent streams of numbers."""
    with np.errstate(over="ignore"):
        key: np.uint64 = _splitmix(np.uint64(seed % 2**64) ^ _splitmix(np.uint64(stream % 2**64)))
    return key


def _uniform(index: Indices, key: np.uint64) -> NDArray[np.float64]:
    """Uniform in (0, 1), a hash of key and sample. `table_loops.race` computes the same numbers."""
    bits = _splitmix(index.astype(np.uint64) ^ key)
    uniform: NDArray[np.float64] = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return uniform


def _splitmix(x: Any) -> Any:
    """A 64-bit hash of each number [published: SplitMix64]."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def _exponential(uniform: NDArray[np.float64]) -> NDArray[np.float64]:
    """-log(1 - uniform), to about 1e-15 of itself, by a series of the inverse hyperbolic tangent."""
    fraction, exponent = np.frexp(1 - uniform)
    small = fraction < math.sqrt(0.5)
    fraction, exponent = np.where(small, 2 * fraction, fraction), exponent - small
    # Where 1 - uniform is near 1 it is rounded: -uniform / (2 - uniform) is the same and is not.
    s = np.where(exponent == 0, -uniform / (2 - uniform), (fraction - 1) / (fraction + 1))
    series = np.zeros_like(s)
    for k in range(23, 0, -2):
        series = series * (s * s) + 1 / k
    result: NDArray[np.float64] = -(exponent * math.log(2.0) + 2 * s * series)
    return result


def _exp(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """e^x to about 1e-15 of itself: a power of 2 times a Taylor series."""
    power = np.rint(x * (1 / math.log(2.0)))
    rest = (x - power * 0.693147180369123816490) - power * 1.90821492927058770002e-10  # log 2 in two parts
    series = np.ones_like(x)
    for k in range(14, 0, -1):
        series = 1 + series * rest * (1 / k)
    result: NDArray[np.float64] = np.ldexp(series, power.astype(np.int64))
    return result
