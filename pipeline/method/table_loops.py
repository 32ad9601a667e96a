"""Compiled loops over every sample of a hardness table, in one thread and in the samples' order.

Shapes: M samples, S strata, Q codes of quantised hardness. The loops use +, -, *, / and comparisons only, never in
another order than written, so that their results are the same on every machine.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.targets.packing import compiled

Array = NDArray[Any]

CODES = 65_536
"""Q: hardness is ranked in so many steps of its stratum's range."""
_LAST = CODES - 1
_U30, _U27, _U31, _U11 = (np.uint64(x) for x in (30, 27, 31, 11))
_STEP, _MIX_1, _MIX_2 = (
    np.uint64(x) for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)  # SplitMix64
_UNIT = 2.0**-53


@compiled
def stratum_sums(difficulty_M: Array, prior_M: Array, last_step_M: Array, stratum_M: Array, sums_S5: Array) -> None:
    """Add up per stratum: entries scored, their prior, their difficulty; those never scored, their prior."""
    for i in range(len(stratum_M)):
        s = stratum_M[i]
        if last_step_M[i] >= 0:
            d = np.float64(difficulty_M[i])
            sums_S5[s, 0] += 1.0
            sums_S5[s, 1] += np.float64(prior_M[i])
            sums_S5[s, 2] += d
        else:
            sums_S5[s, 3] += 1.0
            sums_S5[s, 4] += np.float64(prior_M[i])


@compiled
def _relaxed(difficulty: Any, prior: Any, last_step: Any, step: int, keep_A: Array, mean: Any, moved: Any) -> Any:
    if last_step < 0:
        return np.float64(prior) * moved
    keep = keep_A[max(step - last_step, 0)]  # a table scored before this job may say later steps
    return keep * np.float64(difficulty) + (1.0 - keep) * mean


@compiled
def relaxed_range(
    difficulty_M: Array,
    prior_M: Array,
    last_step_M: Array,
    stratum_M: Array,
    step: int,
    keep_A: Array,
    mean_S: Array,
    moved_S: Array,
    low_S: Array,
    high_S: Array,
) -> None:
    """Smallest and largest relaxed hardness of each stratum, into low and high."""
    for i in range(len(stratum_M)):
        s = stratum_M[i]
        x = _relaxed(difficulty_M[i], prior_M[i], last_step_M[i], step, keep_A, mean_S[s], moved_S[s])
        low_S[s] = min(low_S[s], x)
        high_S[s] = max(high_S[s], x)


@compiled
def quantise(
    difficulty_M: Array,
    prior_M: Array,
    last_step_M: Array,
    stratum_M: Array,
    step: int,
    keep_A: Array,
    mean_S: Array,
    moved_S: Array,
    low_S: Array,
    scale_S: Array,
    code_M: Array,
    count_SQ: Array,
) -> None:
    """code = round((relaxed - low) * scale), and how many samples of a stratum have each code."""
    for i in range(len(stratum_M)):
        s = stratum_M[i]
        x = _relaxed(difficulty_M[i], prior_M[i], last_step_M[i], step, keep_A, mean_S[s], moved_S[s])
        code = min(int((x - low_S[s]) * scale_S[s] + 0.5), _LAST)
        code_M[i] = code
        count_SQ[s, code] += 1


@compiled
def least_visits(code_M: Array, stratum_M: Array, visits_M: Array, reach_S: Array) -> int:
    """Visits of the least visited sample whose code is within its stratum's reach."""
    least = 1 << 30
    for i in range(len(code_M)):
        if code_M[i] <= reach_S[stratum_M[i]]:
            least = min(least, int(visits_M[i]))
    return least


@compiled
def weight_sums(
    code_M: Array,
    stratum_M: Array,
    visits_M: Array,
    reach_S: Array,
    tilt_SQ: Array,
    fade_V: Array,
    least: int,
    sums_S: Array,
) -> None:
    """Add the weight of every eligible sample to its stratum's sum."""
    last = len(fade_V) - 1
    for i in range(len(code_M)):
        s = stratum_M[i]
        if code_M[i] <= reach_S[s]:
            sums_S[s] += tilt_SQ[s, code_M[i]] * fade_V[min(int(visits_M[i]) - least, last)]


@compiled
def race(
    code_M: Array,
    stratum_M: Array,
    visits_M: Array,
    reach_S: Array,
    tilt_SQ: Array,
    fade_V: Array,
    least: int,
    limit_S: Array,
    key: Any,
    found_C: Array,
) -> int:
    """Eligible samples whose uniform noise is at most limit * weight, in order, into found; their number, -1 if more.

    A sample's time is -log(1 - noise) / weight >= noise / weight, so none with a time up to the limit is left out.
    """
    last, room, count = len(fade_V) - 1, len(found_C), 0
    for i in range(len(code_M)):
        s = stratum_M[i]
        if code_M[i] > reach_S[s]:
            continue
        x = (np.uint64(i) ^ key) + _STEP
        x = (x ^ (x >> _U30)) * _MIX_1
        x = (x ^ (x >> _U27)) * _MIX_2
        x = x ^ (x >> _U31)
        noise = (np.float64(x >> _U11) + 0.5) * _UNIT
        if noise <= limit_S[s] * tilt_SQ[s, code_M[i]] * fade_V[min(int(visits_M[i]) - least, last)]:
            if count == room:
                return -1
            found_C[count] = i
            count += 1
    return count
