import copy
import math
import time

import numpy as np
import pytest

from pipeline.config import CurriculumConfig, DistillConfig, HardnessConfig
from pipeline.curriculum import VISIT_PENALTY, competence, plan_window, rank_share, release_alpha, tilt, uniform_order
from pipeline.hardness import HardnessTable
from pipeline.plan import WindowPlan

PLAN = {"seed": 0, "window": 0, "size": 10, "competence": 1.0, "beta": 0.0, "floor": 0.0}


def plan(percentile, visits=None, stratum=None, **changes):
    count = len(percentile)
    visits = np.zeros(count, np.int32) if visits is None else np.asarray(visits, np.int32)
    stratum = np.zeros(count, np.int32) if stratum is None else np.asarray(stratum, np.int32)
    return plan_window(np.asarray(percentile, np.float32), visits, stratum, **(PLAN | changes))


def ranks(count):
    return (np.arange(count) + 0.5) / count


def chi_square(counts, expected):
    return float(((counts - expected) ** 2 / expected).sum())


# -- schedules ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tau", "value"),
    [(0.0, 0.3), (0.125, math.sqrt(0.25 * 0.91 + 0.09)), (0.25, math.sqrt(0.545)), (0.5, 1.0), (0.9, 1.0)],
)
def test_competence_values(tau, value):
    assert competence(tau, 0.3, 0.5) == pytest.approx(value)


def test_tilt_runs_from_easy_to_hard_with_competence():
    assert [tilt(c, 0.3, 1.0) for c in (0.3, 0.65, 1.0)] == pytest.approx([-1.0, 0.0, 1.0])
    assert tilt(0.65, 0.3, 0.0) == 0.0
    assert tilt(1.0, 1.0, 0.5) == 0.5  # all eligible from the start


def alphas(tau, percentile=(0.0,), **changes):
    return release_alpha(tau, np.array(percentile, np.float32), DistillConfig(**changes)).tolist()


@pytest.mark.parametrize(
    ("tau", "value"),
    [(0.0, 0.9), (0.2, 0.9), (0.375, 0.45 * (1 + math.cos(math.pi / 4))), (0.55, 0.45), (0.9, 0.0), (1.0, 0.0)],
)
def test_release_values_of_the_easiest_sample(tau, value):
    assert alphas(tau) == pytest.approx([value], abs=1e-6)


def test_harder_samples_are_released_later_by_eta():
    """The delay of percentile 1 is 0.15 * 0.7 of training: its alpha is the easiest's of that much earlier."""
    delayed = alphas(0.6, (0.0, 0.5, 1.0))
    assert delayed == pytest.approx([alphas(0.6 - 0.105 * u)[0] for u in (0.0, 0.5, 1.0)], abs=1e-6)
    assert delayed[0] < delayed[1] < delayed[2]
    assert alphas(0.6, (0.0, 1.0), hardness_delay=0.0) == alphas(0.6, (0.0, 0.0))


def test_everything_is_released_in_the_last_twentieth():
    assert alphas(0.94, (1.0,), hardness_delay=0.5)[0] > 0.1
    assert alphas(0.95, (0.0, 0.5, 1.0), hardness_delay=0.5) == [0.0, 0.0, 0.0]
    assert alphas(0.95, (1.0,), hardness_delay=0.5, alpha_end=0.25) == [0.25]


def test_linear_and_constant_releases():
    assert alphas(0.375, release="linear") == pytest.approx([0.9 * 0.75], abs=1e-6)
    assert alphas(0.0, (0.3,), release="constant") == alphas(1.0, (0.9,), release="constant") == [np.float32(0.9)]
    at_once = {"release_from": 0.5, "release_to": 0.5}
    assert alphas(0.49, **at_once) == [np.float32(0.9)]
    assert alphas(0.51, **at_once) == [0.0]


# -- which samples a window draws --------------------------------------------------------------------------------


def test_only_samples_up_to_the_competence_are_drawn():
    percentile = np.random.default_rng(0).permutation(ranks(100))
    drawn = plan(percentile, size=25, competence=0.3)
    assert percentile[drawn].max() <= 0.3
    whole = plan(percentile, size=30, competence=0.3)
    assert sorted(whole) == sorted(np.flatnonzero(percentile <= 0.3))


def test_a_stratum_too_small_for_the_competence_gives_its_easiest():
    drawn = plan([*ranks(20), 0.75, 0.25 + 0.1], stratum=[0] * 20 + [1] * 2, size=40, competence=0.3)
    assert 21 in drawn
    assert 20 not in drawn


def test_nothing_repeats_before_everything_eligible_was_drawn():
    percentile = ranks(40)
    assert len(set(plan(percentile, size=40, beta=1.0))) == 40
    long = plan(percentile, size=100, beta=1.0)
    assert len(long) == 100
    for start in (0, 40):
        assert sorted(long[start : start + 40]) == list(range(40))
    assert len(set(long[80:])) == 20
    assert not np.array_equal(long[:40], long[40:80])


@pytest.mark.parametrize("beta", [-1.0, 0.0, 1.5])
def test_first_draws_follow_the_weights(beta):
    """Gumbel-top-k's first draw has probability a_i / sum a. Chi-square with 9 degrees of freedom, 99.9% point 27.9."""
    percentile = ranks(10)
    draws = [plan(percentile, seed=5, window=w, size=3, beta=beta)[0] for w in range(4000)]
    weights = np.exp(beta * (2 * percentile - 1))
    assert chi_square(np.bincount(draws, minlength=10), 4000 * weights / weights.sum()) < 27.9


def test_second_draws_follow_the_weights_of_what_is_left():
    """Brute force: probability of an ordered pair is a_i / A * a_j / (A - a_i). 11 degrees of freedom, 99.9%: 31.3."""
    percentile, beta = ranks(4), 1.0
    weights = np.exp(beta * (2 * percentile - 1))
    total = weights.sum()
    pairs = [(i, j) for i in range(4) for j in range(4) if i != j]
    expected = np.array([weights[i] / total * weights[j] / (total - weights[i]) for i, j in pairs]) * 6000
    drawn = [tuple(plan(percentile, seed=9, window=w, size=2, beta=beta).tolist()) for w in range(6000)]
    assert chi_square(np.array([drawn.count(p) for p in pairs]), expected) < 31.3


def test_a_visit_costs_its_penalty_in_log_weight():
    """Between two equals, one visited once more: 1 : e. Chi-square with 1 degree of freedom, 99.9% point 10.8."""
    firsts = [plan([0.5, 0.5], visits=[4, 3], window=w, size=1)[0] for w in range(4000)]
    share = 1 / (1 + math.exp(VISIT_PENALTY))
    assert chi_square(np.bincount(firsts, minlength=2), 4000 * np.array([share, 1 - share])) < 10.8


def test_much_visited_samples_wait_for_equals():
    visits = np.array([9, 0] * 20)
    drawn = plan(np.full(40, 0.5), visits=visits, size=20)
    assert np.all(visits[drawn] == 0)


def test_repeated_windows_reach_every_sample():
    """Even with a strong tilt: the penalty of visits keeps easy samples from starving."""
    percentile, visits = ranks(200), np.zeros(200, np.int32)
    for window in range(20):
        np.add.at(visits, plan(percentile, visits=visits, window=window, size=50, beta=1.0), 1)
    assert visits.min() >= 3
    assert visits[100:].mean() > visits[:100].mean()  # and yet the tilt is there


@pytest.mark.parametrize("floor", [0.0, 0.5, 1.0])
def test_every_stratum_keeps_its_floor(floor):
    """Stratum 1 is a fifth of the data and, visited often, would hardly be drawn."""
    stratum = np.array([0, 0, 0, 0, 1] * 40)
    visits = np.where(stratum == 1, 8, 0)
    drawn = plan(np.tile(ranks(20), 10), visits=visits, stratum=stratum, size=50, floor=floor)
    share = np.bincount(stratum[drawn], minlength=2)
    assert len(set(drawn)) == 50
    assert share[1] >= floor * 10
    assert share[1] <= floor * 10 + 1


def test_a_floor_that_is_met_changes_nothing():
    stratum = np.array([0, 1] * 50)
    percentile = np.repeat(ranks(50), 2)
    assert np.array_equal(
        plan(percentile, stratum=stratum, size=40, floor=0.2), plan(percentile, stratum=stratum, size=40)
    )


def test_the_plan_is_a_pure_function_of_table_seed_and_window():
    percentile = ranks(100)
    same = plan(percentile, seed=3, window=7)
    assert np.array_equal(same, plan(percentile, seed=3, window=7))
    assert not np.array_equal(same, plan(percentile, seed=4, window=7))
    assert not np.array_equal(same, plan(percentile, seed=3, window=8))


def splitmix(x):
    """SplitMix64 in Python's own integers (Steele, Lea and Flood 2014)."""
    mask = 2**64 - 1
    x = (x + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def test_the_order_equals_one_computed_in_plain_python():
    """Another machine or numpy must draw the same: the noise is integer arithmetic of (seed, window, sample)."""
    seed, window, beta, keys = -3, 70, 1.0, {}
    for sample in range(100):
        bits = splitmix(sample ^ splitmix((seed % 2**64) ^ splitmix(window * 1009)))
        uniform = ((bits >> 11) + 0.5) / 2**53
        keys[sample] = beta * (2 * float(np.float32((sample + 0.5) / 100)) - 1) - math.log(-math.log(uniform))
    expected = sorted(keys, key=lambda s: -keys[s])[:60]
    assert plan(ranks(100), seed=seed, window=window, size=60, beta=beta).tolist() == expected


def test_a_million_samples_are_planned_quickly():
    rng = np.random.default_rng(0)
    percentile, visits, stratum = rng.random(10**6), rng.integers(0, 3, 10**6), rng.integers(0, 3, 10**6)
    seconds = []
    for window in range(3):
        started = time.perf_counter()
        plan(percentile, visits, stratum, window=window, size=51_200, beta=1.0, floor=0.5)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 1.0  # measured 0.15 s; the bound leaves room for a busy machine


# -- uniform order -----------------------------------------------------------------------------------------------


def test_uniform_order_is_one_permutation_after_another():
    whole = uniform_order(17, 3, 0, 60)
    for epoch in range(3):
        assert sorted(whole[17 * epoch : 17 * (epoch + 1)]) == list(range(17))
    assert not np.array_equal(whole[:17], whole[17:34])
    for start, size in ((0, 5), (5, 12), (16, 2), (17, 17), (3, 50), (30, 1)):
        assert np.array_equal(uniform_order(17, 3, start, size), whole[start : start + size])


def test_uniform_order_puts_every_sample_anywhere():
    firsts = [uniform_order(10, seed, 0, 1)[0] for seed in range(4000)]
    assert chi_square(np.bincount(firsts, minlength=10), np.full(10, 400.0)) < 27.9


# -- ranks and resuming ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("micro_batch", [1, 3])
def test_the_global_order_is_the_same_for_every_world_size(world, micro_batch):
    """What all ranks see in one micro-step, together, is the next stretch of the one global order."""
    order = plan(ranks(48), size=24, beta=1.0)
    shares = [rank_share(24, rank, world, micro_batch) for rank in range(world)]
    assert len({len(s) for s in shares}) == 1  # every rank joins every collective
    seen = [np.stack([order[s[k]] for s in shares], axis=1).ravel() for k in range(len(shares[0]))]
    assert np.array_equal(np.concatenate(seen), order)


class Run:
    """A training run without a model: plans, visits, and scores that depend on the sample and the step."""

    def __init__(self, settings, num_samples=37, batch_size=8, window_steps=4):
        names = [f"s{i:03d}" for i in range(num_samples)]
        prior = np.random.default_rng(1).random(num_samples).astype(np.float32)
        self.table = HardnessTable(names, [("general", "region")[i % 2] for i in range(num_samples)], prior)
        self.plan = WindowPlan(num_samples, batch_size, window_steps, 5, settings, HardnessConfig())

    def step(self, step, total):
        self.plan.refresh(step, step / total, self.table)
        index, percentile = self.plan.batch(step)
        scores = np.random.default_rng(step).random(37).astype(np.float32)[index]
        self.table.update(index, scores, step, ema=0.7)
        return index.tolist(), percentile.tolist()

    def checkpoint(self):
        return copy.deepcopy((self.plan.state_dict(), self.plan.arrays() | self.table.arrays()))

    def resume(self, saved):
        state, arrays = saved
        self.plan.load(state, arrays)
        self.table.load_arrays(arrays)


@pytest.mark.parametrize("settings", [CurriculumConfig(), None], ids=["curriculum", "uniform"])
def test_resuming_at_any_step_is_bit_exact(settings):
    total, run = 22, Run(settings)
    saved, seen = [], []
    for step in range(total):
        saved.append(run.checkpoint())
        seen.append(run.step(step, total))
    for start in range(1, total):
        resumed = Run(settings)
        resumed.resume(saved[start])
        assert [resumed.step(step, total) for step in range(start, total)] == seen[start:], start
        for name, values in run.table.arrays().items():
            assert np.array_equal(resumed.table.arrays()[name], values), name


def test_the_position_alone_does_not_restore_the_order():
    """The table moves inside a window, so planning it again from the state at a checkpoint gives another order."""
    total, run = 22, Run(CurriculumConfig())
    for step in range(10):
        run.step(step, total)
    state, arrays = run.checkpoint()
    replanned = Run(CurriculumConfig())
    replanned.table.load_arrays(arrays)
    replanned.plan.refresh(state["start"], state["start"] / total, replanned.table)
    assert not np.array_equal(replanned.plan.order, run.plan.order)


def test_a_run_goes_from_easy_to_all():
    total, run = 40, Run(CurriculumConfig(window_steps=4))
    percentiles = [max(run.step(step, total)[1]) for step in range(total)]
    assert max(percentiles[:4]) <= 0.3
    assert max(percentiles[24:]) > 0.95
