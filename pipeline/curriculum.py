"""Schedules and the global order of samples: pure functions of (hardness, seed, share of training done).

Shapes: M samples of the data set, G samples of a global batch. tau in [0, 1]: share of training done, in samples.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config import DistillConfig

Floats = NDArray[np.float32]
Indices = NDArray[np.int64]

FINAL_SHARE = 0.05
"""The last share of training, in which every sample is at alpha_end. [ours]"""
VISIT_PENALTY = 1.0
"""Nats of log-weight that a visit costs against the least visited sample, so that no sample starves. [ours]"""


def competence(tau: float, start: float, until: float) -> float:
    """c = min(1, sqrt(tau / tau_g (1 - c0^2) + c0^2)): share of samples eligible, easiest first.

    [published: Platanios 2019, arXiv:1903.09848]
    """
    return min(1.0, math.sqrt(tau / until * (1 - start**2) + start**2))


def tilt(competence: float, start: float, size: float) -> float:
    """beta: from -size (prefer easy) at competence `start` to +size (prefer hard) at competence 1. [ours]"""
    if start >= 1.0:
        return size
    return size * (2 * (competence - start) / (1 - start) - 1)


def _cosine(progress: Floats) -> Floats:
    left: Floats = (0.5 * (1 + np.cos(np.pi * progress))).astype(np.float32)
    return left


RELEASES: dict[str, Callable[[Floats], Floats]] = {
    "cosine": _cosine,
    "linear": lambda progress: 1 - progress,
    "constant": lambda progress: np.ones_like(progress),
}
"""Share of (alpha_start - alpha_end) still left at a progress in [0, 1] through the release."""


def release_alpha(tau: float, percentile_G: Floats, settings: DistillConfig) -> Floats:
    """alpha_i = alpha(tau - eta u_i (t1 - t0)): harder samples are released later; all are in the last 5%.

    alpha(tau) = a1 + (a0 - a1) * shape(clip((tau - t0) / (t1 - t0), 0, 1))
    [seed: gradually; published: annealing, BAM, arXiv:1907.04829; cosine and the delay by hardness ours]

    Args:
        percentile_G: hardness percentile u_i of each sample, in [0, 1].
    """
    span = max(settings.release_to - settings.release_from, 1e-9)
    delay_G = settings.hardness_delay * percentile_G * span
    progress_G = np.clip((tau - delay_G - settings.release_from) / span, 0, 1).astype(np.float32)
    left_G = RELEASES[settings.release](progress_G)
    if settings.release != "constant" and tau >= 1 - FINAL_SHARE:
        left_G = np.zeros_like(left_G)
    return (settings.alpha_end + (settings.alpha_start - settings.alpha_end) * left_G).astype(np.float32)


def uniform_order(num_samples: int, seed: int, start: int, size: int) -> Indices:
    """Positions [start, start + size) of an endless sequence of seeded permutations of the data set."""
    epochs = range(start // num_samples, (start + size - 1) // num_samples + 1)
    orders = [np.argsort(_uniform_noise(seed, epoch, np.arange(num_samples)), kind="stable") for epoch in epochs]
    offset = start - epochs[0] * num_samples
    return np.concatenate(orders)[offset : offset + size].astype(np.int64)


def plan_window(
    percentile_M: Floats,
    visits_M: NDArray[np.int32],
    stratum_M: NDArray[np.integer],
    *,
    seed: int,
    window: int,
    size: int,
    competence: float,
    beta: float,
    floor: float,
) -> Indices:
    """The global order of one window: `size` table indices.

    Eligible are samples with percentile <= competence, and in any case each stratum's easiest. They are drawn without
    replacement with weight exp(beta (2 u - 1)) by Gumbel-top-k [published: Kool 2019, arXiv:1903.06059], noise hashed
    from (seed, window, sample); whole passes first when the window is longer than the eligible set. Each visit more
    than the least visited eligible sample divides the weight by e, and each stratum keeps at least `floor` of its
    proportional share. [combination ours]
    """
    eligible = _eligible(percentile_M, stratum_M, competence)
    passes, rest = divmod(size, len(eligible))
    parts = [_gumbel_order(eligible, percentile_M, visits_M, beta, seed, window, k) for k in range(passes + 1)]
    ranked = parts.pop()
    if rest:
        chosen = _with_floor(ranked, stratum_M[ranked], rest, floor)
        parts.append(chosen)
    return np.concatenate(parts).astype(np.int64)


def rank_share(batch_size: int, rank: int, world: int, micro_batch: int) -> list[Indices]:
    """Positions in a global batch that a rank sees, one array per micro-batch: its stride, cut in order."""
    positions = np.arange(rank, batch_size, world, dtype=np.int64)
    return [positions[i : i + micro_batch] for i in range(0, len(positions), micro_batch)]


def _eligible(percentile_M: Floats, stratum_M: NDArray[np.integer], competence: float) -> Indices:
    """Samples up to the competence. A stratum too small to have any gives its easiest, so that no task is left out."""
    if competence >= 1.0:
        return np.arange(len(percentile_M))
    easiest = np.full(int(stratum_M.max()) + 1, np.inf, np.float32)
    np.minimum.at(easiest, stratum_M, percentile_M)
    reach = np.maximum(np.float32(competence), easiest)
    return np.flatnonzero(percentile_M <= reach[stratum_M])


def _gumbel_order(
    eligible: Indices,
    percentile_M: Floats,
    visits_M: NDArray[np.int32],
    beta: float,
    seed: int,
    window: int,
    turn: int,
) -> Indices:
    """Eligible samples by descending perturbed log-weight: log w + Gumbel noise -log(-log U)."""
    visits = visits_M[eligible].astype(np.float64)
    log_weight = beta * (2 * percentile_M[eligible].astype(np.float64) - 1) - VISIT_PENALTY * (visits - visits.min())
    uniform = _uniform_noise(seed, window * 1009 + turn, eligible)
    order: Indices = eligible[np.argsort(np.log(-np.log(uniform)) - log_weight, kind="stable")]
    return order


def _with_floor(ranked: Indices, stratum: NDArray[np.integer], size: int, floor: float) -> Indices:
    """The first `size` of `ranked`, but at least floor * proportional share of each stratum; order kept."""
    kinds, inverse, counts = np.unique(stratum, return_inverse=True, return_counts=True)
    guaranteed = np.floor(floor * size * counts / len(ranked)).astype(np.int64)
    rank_in_stratum = np.empty(len(ranked), np.int64)
    for kind in range(len(kinds)):
        members = np.flatnonzero(inverse == kind)
        rank_in_stratum[members] = np.arange(len(members))
    kept = rank_in_stratum < guaranteed[inverse]
    others = np.flatnonzero(~kept)[: size - int(kept.sum())]
    kept[others] = True
    chosen: Indices = ranked[kept]
    return chosen


def _uniform_noise(seed: int, stream: int, index: Indices) -> NDArray[np.float64]:
    """Uniform in (0, 1) from a counter hash of (seed, stream, index): the same on every machine. SplitMix64."""
    with np.errstate(over="ignore"):
        key = _splitmix(np.uint64(seed % 2**64) ^ _splitmix(np.uint64(stream % 2**64)))
        bits = _splitmix(index.astype(np.uint64) ^ key)
    uniform: NDArray[np.float64] = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) / 2**53
    return uniform


def _splitmix(x: Any) -> Any:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
