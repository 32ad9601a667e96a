import copy
import math
import operator
from fractions import Fraction
from functools import lru_cache

import numpy as np
import pytest

from pipeline.method import curriculum
from pipeline.method.curriculum import (
    Weights,
    Window,
    competence,
    longest_wait,
    plan_window,
    rank_share,
    sweep_size,
    tilt,
    uniform_order,
)
from pipeline.method.hardness import FINEST, HardnessTable, strata_of
from pipeline.method.plan import WindowPlan
from pipeline.method.table_loops import CODES
from pipeline.recipe import CurriculumConfig, HardnessConfig

WEIGHTS = {"gamma", "mixture", "cap", "visit_penalty", "retire_below"}


def ranks_of(hardness, stratum):
    """As a table ranks never-scored samples: codes of 65,536 steps of each stratum's range."""
    return _ranks(np.asarray(hardness, np.float32).tobytes(), np.asarray(stratum, np.uint8).tobytes())


@lru_cache(maxsize=8)
def _ranks(hardness, stratum):
    hardness, stratum = np.frombuffer(hardness, np.float32), np.frombuffer(stratum, np.uint8)
    names = [f"{i:07d}" for i in range(len(hardness))]
    table = HardnessTable(names, [f"s{s:03d}" for s in stratum], hardness)
    return table.ranks(step=0, half_life_steps=math.inf)


def window_of(**settings):
    weights = Weights(**{key: settings.pop(key) for key in WEIGHTS & settings.keys()})
    return Window(**({"number": 0, "size": 10, "weights": weights} | settings))


def plan(hardness, visits=None, stratum=None, last_window=None, seed=0, pool=(), **settings):
    count = len(hardness)
    visits = np.zeros(count, np.uint16) if visits is None else np.asarray(visits, np.uint16)
    stratum = np.zeros(count, np.uint8) if stratum is None else np.asarray(stratum, np.uint8)
    # Nothing waits unless a test says so.
    window = window_of(**settings)
    last = np.full(count, window.number, np.int32) if last_window is None else last_window
    pool_S = np.isin(np.arange(int(stratum.max()) + 1), pool)
    return plan_window(ranks_of(hardness, stratum), visits, last, stratum, pool_S, window, seed)


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
    assert [tilt(c, 0.3, (-1.0, 1.0)) for c in (0.3, 0.65, 1.0)] == pytest.approx([-1.0, 0.0, 1.0])
    assert [tilt(c, 0.3, (0.4, -0.2)) for c in (0.3, 0.65, 1.0)] == pytest.approx([0.4, 0.1, -0.2])
    assert tilt(0.65, 0.3, (0.0, 0.0)) == 0.0
    assert tilt(1.0, 1.0, (-0.5, 0.25)) == 0.25  # all eligible from the start


# -- which samples a window draws --------------------------------------------------------------------------------


def test_only_samples_up_to_the_competence_are_drawn():
    percentile = np.random.default_rng(0).permutation(ranks(100))
    drawn = plan(percentile, size=25, competence=0.3)
    assert percentile[drawn].max() <= 0.3
    whole = plan(percentile, size=30, competence=0.3)
    assert sorted(whole) == sorted(np.flatnonzero(percentile <= 0.3))


def test_a_stratum_too_small_for_the_competence_gives_its_easiest():
    drawn = plan([*ranks(20), 0.75, 0.25 + 0.1], stratum=[0] * 20 + [1] * 2, size=40, competence=0.2)
    assert 21 in drawn
    assert 20 not in drawn


def test_nothing_repeats_before_everything_eligible_was_drawn():
    percentile = ranks(40)
    assert len(set(plan(percentile, size=40, gamma=2.0))) == 40
    long = plan(percentile, size=100, gamma=2.0)
    assert len(long) == 100
    for start in (0, 40):
        assert sorted(long[start : start + 40]) == list(range(40))
    assert len(set(long[80:])) == 20
    assert not np.array_equal(long[:40], long[40:80])


@pytest.mark.parametrize(("gamma", "mixture", "cap"), [(0, 1, 50), (1, 1, 50), (2.5, 1, 50), (2, 0.7, 50), (2, 1, 1.5)])
def test_first_draws_follow_the_weights(gamma, mixture, cap):
    """Gumbel-top-k's first draw has probability a_i / sum a. Chi-square with 9 degrees of freedom, 99.9% point 27.9."""
    hardness = np.array([0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.3, 1.9, 3.0])
    settings = {"gamma": gamma, "mixture": mixture, "cap": cap}
    draws = [plan(hardness, seed=5, number=w, size=3, **settings)[0] for w in range(600)]
    weights = (1 - mixture) + mixture * np.minimum((hardness / hardness.mean()) ** gamma, cap)
    assert chi_square(np.bincount(draws, minlength=10), 600 * weights / weights.sum()) < 27.9


def test_second_draws_follow_the_weights_of_what_is_left():
    """Brute force: probability of an ordered pair is a_i / A * a_j / (A - a_i). 11 degrees of freedom, 99.9%: 31.3."""
    hardness = np.array([0.5, 0.8, 1.1, 1.6])
    weights = (hardness / hardness.mean()) ** 2
    total = weights.sum()
    pairs = [(i, j) for i in range(4) for j in range(4) if i != j]
    expected = np.array([weights[i] / total * weights[j] / (total - weights[i]) for i, j in pairs]) * 1200
    drawn = [tuple(plan(hardness, seed=9, number=w, size=2, gamma=2.0).tolist()) for w in range(1200)]
    assert chi_square(np.array([drawn.count(p) for p in pairs]), expected) < 31.3


def test_a_stratums_own_mean_is_the_unit():
    """Ten times as hard a task is not drawn more for that."""
    hardness, stratum = np.concatenate([ranks(50), 10 * ranks(50)]), np.repeat([0, 1], 50)
    firsts = [stratum[plan(hardness, stratum=stratum, number=w, size=1, gamma=2.0)[0]] for w in range(600)]
    assert chi_square(np.bincount(firsts, minlength=2), np.array([300.0, 300.0])) < 10.8


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 1.5, 2.0, 3.5])
def test_weights_are_the_powers_of_what_the_codes_say(gamma):
    """In exact fractions, up to the rounding of a few products."""
    hardness = np.random.default_rng(0).gamma(0.3, 1.0, 400).astype(np.float32)
    found = ranks_of(hardness, np.zeros(400, int))
    low, step = Fraction(float(found.low_S[0])), Fraction(float(found.step_S[0]))
    exact = [low + step * int(code) for code in found.code_M]
    mean = sum(exact) / len(exact)
    np.testing.assert_allclose(
        found.relative_sizes()[0, found.code_M], [float(value / mean) for value in exact], rtol=1e-12
    )
    assert max(abs(float(e) - float(h)) for e, h in zip(exact, hardness, strict=True)) <= float(step) * 0.51
    weights, _ = curriculum.size_weights(found, np.array([False]), Weights(gamma=gamma, cap=1e9))
    expected = [max(float(value / mean) ** gamma, curriculum.LEAST_WEIGHT) for value in exact]
    np.testing.assert_allclose(weights[0, found.code_M], expected, rtol=1e-9)


@pytest.mark.parametrize("value", [0.0, 0.7])
def test_samples_that_are_all_alike_are_drawn_alike(value):
    firsts = [plan(np.full(4, value), number=w, size=1, gamma=2.0, retire_below=0.25, pool=[0])[0] for w in range(800)]
    assert chi_square(np.bincount(firsts, minlength=4), np.full(4, 200.0)) < 16.3


@pytest.mark.parametrize("penalty", [0.1, 1.0])
def test_a_visit_costs_its_penalty_in_log_weight(penalty):
    """Between two equals, one visited once more: 1 : e^penalty. One degree of freedom, 99.9% point 10.8."""
    firsts = [plan([0.5, 0.5], visits=[4, 3], number=w, size=1, visit_penalty=penalty)[0] for w in range(600)]
    share = 1 / (1 + math.exp(penalty))
    assert chi_square(np.bincount(firsts, minlength=2), 600 * np.array([share, 1 - share])) < 10.8


# -- retirement --------------------------------------------------------------------------------------------------


RETIRED = {"gamma": 2.0, "retire_below": 0.25, "visit_penalty": 0.1}


def test_retired_samples_are_drawn_when_nothing_else_is_left():
    hardness = np.concatenate([np.full(30, 0.01), np.full(10, 1.0)])
    assert set(plan(hardness, size=10, pool=[0], **RETIRED)) == set(range(30, 40))
    assert set(range(30, 40)) < set(plan(hardness, size=12, pool=[0], **RETIRED))
    found, pool = ranks_of(hardness, np.zeros(40, int)), np.array([True])
    assert curriculum.retired(found, pool, Weights(retire_below=0.25)) == 30
    assert curriculum.retired(found, pool, Weights(retire_below=0.0)) == 0


def test_labelled_samples_are_never_retired():
    """Gamma 0: hardness decides retirement alone. 30 of 40 have less than a quarter of their stratum's mean."""
    hardness, stratum = np.tile(np.concatenate([np.full(30, 0.01), np.full(10, 1.0)]), 2), np.repeat([0, 1], 40)
    drawn = [
        plan(hardness, stratum=stratum, number=w, size=10, pool=[1], gamma=0, retire_below=0.25) for w in range(60)
    ]
    counts = np.bincount(np.concatenate(drawn), minlength=80)
    assert counts[:30].sum() > 200 and counts[40:70].sum() == 0


def test_floors_are_shares_of_the_samples_that_are_not_retired():
    """Half of the data, of which a tenth is left: it keeps a share of that tenth, not of the half."""
    hardness = np.concatenate([np.full(90, 0.01), np.full(10, 1.0), np.full(100, 1.0)])
    stratum, visits = np.repeat([0, 1], 100), np.repeat([50, 0], 100)  # visited often: only its floor is drawn
    drawn = plan(hardness, visits, stratum, size=44, pool=[0], floor=1.0, **RETIRED)
    assert np.bincount(stratum[drawn], minlength=2).tolist() == [4, 40]


def test_a_retired_sample_whose_hardness_rises_comes_back():
    hardness = np.full(40, 1.0)
    hardness[7] = 0.01
    drawn = [7 in plan(hardness, number=w, size=20, pool=[0], **RETIRED) for w in range(40)]
    assert not any(drawn)
    hardness[7] = 1.5
    assert sum(7 in plan(hardness, number=w, size=20, pool=[0], **RETIRED) for w in range(40)) > 20


def test_the_sweep_reaches_retired_samples_within_the_bound():
    rng = np.random.default_rng(3)
    count, size, floor = 203, 40, 0.5
    hardness = np.where(rng.random(count) < 0.7, 0.001, 1.0) * rng.uniform(0.9, 1.1, count)
    stratum, visits = rng.integers(0, 3, count), np.zeros(count, np.uint16)
    last, bound, seen = np.full(count, -1, np.int32), longest_wait(count, size, floor), []
    for number in range(3 * bound):
        order = plan(hardness, visits, stratum, last, number=number, size=size, floor=floor, pool=[0, 1, 2], **RETIRED)
        np.add.at(visits, order, 1)
        last[order] = number
        seen.append(np.isin(np.arange(count), order))
    waits = [np.diff(np.flatnonzero([True, *(window[i] for window in seen), True])).max() for i in range(count)]
    assert max(waits) <= bound
    assert visits[hardness < 0.1].mean() * 5 < visits[hardness > 0.1].mean()


# -- visits, floors, sweeps --------------------------------------------------------------------------------------


def test_much_visited_samples_wait_for_equals():
    visits = np.array([9, 0] * 20)
    drawn = plan(np.full(40, 0.5), visits=visits, size=20, visit_penalty=3.0)
    assert np.all(visits[drawn] == 0)


def test_repeated_windows_reach_every_sample():
    """Even with strong weights: the penalty of visits keeps easy samples from starving."""
    hardness, visits = ranks(200), np.zeros(200, np.int32)
    for window in range(20):
        drawn = plan(hardness, visits=visits, number=window, size=50, gamma=1.0, visit_penalty=1.0)
        np.add.at(visits, drawn, 1)
    assert visits.min() >= 1
    assert visits[100:].mean() > 1.2 * visits[:100].mean()  # and yet the weights act


@pytest.mark.parametrize("floor", [0.0, 0.5, 1.0])
def test_every_stratum_keeps_its_floor(floor):
    """Stratum 1 is a fifth of the data and, visited often, would hardly be drawn."""
    stratum = np.array([0, 0, 0, 0, 1] * 40)
    visits = np.where(stratum == 1, 8, 0)
    drawn = plan(np.tile(ranks(20), 10), visits=visits, stratum=stratum, size=50, floor=floor, visit_penalty=2.0)
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
    same = plan(percentile, seed=3, number=7)
    assert np.array_equal(same, plan(percentile, seed=3, number=7))
    assert not np.array_equal(same, plan(percentile, seed=4, number=7))
    assert not np.array_equal(same, plan(percentile, seed=3, number=8))


def splitmix(x):
    """SplitMix64 in Python's own integers (Steele, Lea and Flood 2014)."""
    mask = 2**64 - 1
    x = (x + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def in_plain_python(hardness, visits, last_window, stratum, pool, window, seed):
    """The window by its definition, with Python's own integers, exp, log and power, sorting everybody."""
    everyone, weights, codes, size, percentile = range(len(hardness)), window.weights, {}, {}, {}
    for s in set(stratum):
        members = [i for i in everyone if stratum[i] == s]
        values = [float(np.float32(hardness[i])) for i in members]
        low, width = min(values), max(max(values) - min(values), (CODES - 1) * FINEST)
        for i, value in zip(members, values, strict=True):
            codes[i] = min(math.floor((value - low) * ((CODES - 1) / width) + 0.5), CODES - 1)
        mean = low + width / (CODES - 1) * (sum(codes[i] for i in members) / len(members))
        for i in members:
            below, equal = (sum(f(codes[j], codes[i]) for j in members) for f in (operator.lt, operator.eq))
            percentile[i] = np.float32((below + equal / 2) / len(members))
            size[i] = (low + width / (CODES - 1) * codes[i]) / mean if mean > 0 else 1.0
    easiest = {s: min(percentile[i] for i in everyone if stratum[i] == s) for s in set(stratum)}
    eligible = [i for i in everyone if percentile[i] <= max(np.float32(window.competence), easiest[stratum[i]])]
    active = [i for i in eligible if stratum[i] not in pool or size[i] >= weights.retire_below]
    least = min(visits[i] for i in eligible)

    def times(turn):
        key, result = splitmix((seed % 2**64) ^ splitmix(window.number * 1009 + turn)), {}
        for i in eligible:
            weight = (1 - weights.mixture) + weights.mixture * min(size[i] ** weights.gamma, weights.cap)
            weight = max(weight, curriculum.LEAST_WEIGHT) * (1 if i in active else curriculum.RETIRED_WEIGHT)
            weight *= math.exp(-weights.visit_penalty * (visits[i] - least))
            result[i] = -math.log1p(-((splitmix(i ^ key) >> 11) + 0.5) / 2**53) / weight
        return result

    passes, rest = divmod(window.size, len(eligible))
    order = [i for turn in range(passes) for _, i in sorted((t, i) for i, t in times(turn).items())]
    if not rest:
        return order
    time = times(passes)
    ranked = sorted(eligible, key=lambda i: (time[i], i))
    checked, taken = sweep_size(window.size, window.floor), set()
    if not passes:
        turn = math.ceil(len(percentile) / checked)
        positions = {(window.number * checked + k) % len(percentile) for k in range(checked)}
        taken = {i for i in positions if i in time and window.number - last_window[i] >= turn}
    for s in sorted(set(stratum)):
        members = [i for i in ranked if stratum[i] == s]
        share = len([i for i in members if i in active]) / max(len(active), 1)
        wanted = math.floor(window.floor * rest * share) - sum(i in taken for i in members)
        taken |= set([i for i in members if i not in taken][: max(wanted, 0)])
    taken |= set([i for i in ranked if i not in taken][: rest - len(taken)])
    return order + [i for i in ranked if i in taken]


@pytest.mark.parametrize("case", range(60))
def test_windows_equal_plain_python(case):
    """Sorting everybody by times from another exp and log gives the same order, whatever the table holds."""
    rng = np.random.default_rng(case)
    count, strata = int(rng.integers(1, 300)), int(rng.integers(1, 5))
    stratum = np.minimum(rng.integers(0, strata, count), rng.integers(0, strata, count)).astype(np.uint8)
    stratum = np.unique(stratum, return_inverse=True)[1].astype(np.uint8)
    hardness = (rng.integers(0, rng.integers(1, 400), count) ** 2 / 9000).astype(np.float32)  # with ties and zeros
    visits = rng.integers(0, rng.integers(1, 12), count).astype(np.uint16)
    pool = [s for s in range(strata) if rng.random() < 0.5]
    window = window_of(
        number=int(rng.integers(0, 90)),
        size=int(rng.integers(1, rng.choice([10, count + 1, 3 * count + 1]))),
        competence=float(rng.choice([0.05, 0.4, 1.0])),
        floor=float(rng.choice([0.0, 0.5, 0.9, 1.0])),
        gamma=float(rng.choice([0.0, 0.5, 1.0, 2.0, 3.5])),
        mixture=float(rng.choice([0.7, 1.0])),
        visit_penalty=float(rng.choice([0.0, 0.1, 1.0])),
        retire_below=float(rng.choice([0.0, 0.25, 0.9])),
    )
    last = rng.integers(-1, window.number + 1, count).astype(np.int32)
    planned = plan(hardness, visits, stratum, last, case - 5, pool, **_fields(window))
    assert len(planned) == window.size
    expected = in_plain_python(hardness, visits.tolist(), last.tolist(), stratum.tolist(), pool, window, case - 5)
    assert planned.tolist() == expected


def _fields(window):
    own = {name: getattr(window, name) for name in ("number", "size", "competence", "floor")}
    return own | {name: getattr(window.weights, name) for name in WEIGHTS}


def test_a_limit_that_proves_too_low_is_raised():
    """Half a million samples: only those up to a limit are looked at. Weights so uneven that its first guess fails."""
    count = 500_000
    visits = np.where(np.arange(count) < 50, 0, 30).astype(np.uint16)
    stratum = (np.arange(count) % 7 == 0).astype(np.uint8)
    percentile = np.repeat(ranks(50_000), 10).astype(np.float32)
    settings = {"gamma": 2.0, "visit_penalty": 1.0}
    order = plan(percentile, visits, stratum, size=3000, floor=0.5, **settings)
    race = curriculum._Race(ranks_of(percentile, stratum), visits, stratum, np.zeros(2, bool), window_of(**settings))
    times = race.times(curriculum._key(0, 0), np.arange(count))
    everyone = np.argsort(times, kind="stable")
    assert set(everyone[:50].tolist()) == set(range(50))
    assert order.tolist() == everyone[:3000].tolist()  # both strata are above their floor
    assert np.bincount(stratum[order], minlength=2)[1] >= 0.5 * 3000 / 7


@pytest.mark.parametrize(
    ("gamma", "floor", "size"),
    [(1.0, 0.5, 25), (0.0, 0.0, 40), (2.0, 0.9, 16), pytest.param(3.0, 1.0, 50, marks=pytest.mark.slow)],
)
def test_no_sample_waits_longer_than_the_bound(gamma, floor, size):
    """From any history: visits that put some samples far behind must not keep them out for good."""
    rng = np.random.default_rng(size)
    count = 203
    percentile, stratum = rng.permutation(ranks(count)), rng.integers(0, 3, count).astype(np.uint8)
    visits = rng.integers(0, 60, count).astype(np.uint16)
    last, bound = np.full(count, -1, np.int32), longest_wait(count, size, floor)
    drawn = []
    for number in range(3 * bound):
        order = plan(percentile, visits, stratum, last, number=number, size=size, gamma=gamma, floor=floor)
        assert len(set(order.tolist())) == size
        np.add.at(visits, order, 1)
        last[order] = number
        drawn.append(np.isin(np.arange(count), order))
    seen = np.stack(drawn)
    waits = [np.diff(np.flatnonzero(np.concatenate([[True], seen[:, i], [True]]))).max() for i in range(count)]
    assert max(waits) <= bound
    late = [60] * 50 + [0] * 153
    without = [plan(percentile, late, stratum, number=n, size=size, visit_penalty=1.0) for n in range(bound)]
    assert not np.isin(np.arange(50), np.concatenate(without)).any()  # without the sweep they would wait


def test_the_bound_is_one_window_where_a_window_holds_all():
    assert longest_wait(100, 100, 0.5) == 1
    assert longest_wait(100, 20, 0.5) == 2 * 20 - 1  # a quarter of 20 are checked in each
    assert sweep_size(1, 1.0) == 1


def test_exponentials_equal_pythons():
    """Only + - * / and the exact frexp, ldexp and rint are used; the values are those of math."""
    u = np.concatenate([np.logspace(-17, -0.001, 500), 1 - np.logspace(-12, -1, 100)])
    assert curriculum._exponential(u) == pytest.approx([-math.log1p(-x) for x in u], rel=4e-15)
    x = np.concatenate([np.linspace(-700, 5, 400), [0.0]])
    assert curriculum._exp(x) == pytest.approx([math.exp(v) for v in x], rel=4e-15)


# -- uniform order -----------------------------------------------------------------------------------------------


def test_uniform_order_is_one_permutation_after_another():
    whole = uniform_order(17, 3, 0, 60)
    for epoch in range(3):
        assert sorted(whole[17 * epoch : 17 * (epoch + 1)].tolist()) == list(range(17))
    assert not np.array_equal(whole[:17], whole[17:34])
    for start, size in ((0, 5), (5, 12), (16, 2), (17, 17), (3, 50), (30, 1)):
        assert np.array_equal(uniform_order(17, 3, start, size), whole[start : start + size])


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 1000])
def test_uniform_order_is_a_permutation_of_any_number(count):
    assert sorted(uniform_order(count, 5, 3 * count, count).tolist()) == list(range(count))


def test_uniform_order_puts_pairs_anywhere():
    """Ordered pairs of places 0 and 1, of 5 samples: 19 degrees of freedom, 99.9% point 43.8."""
    pairs = [tuple(uniform_order(5, seed, 0, 2).tolist()) for seed in range(1200)]
    counts = np.array([pairs.count((i, j)) for i in range(5) for j in range(5) if i != j])
    assert chi_square(counts, np.full(20, 60.0)) < 43.8


def test_uniform_order_puts_every_sample_anywhere():
    firsts = [uniform_order(10, seed, 0, 1)[0] for seed in range(1200)]
    assert chi_square(np.bincount(firsts, minlength=10), np.full(10, 120.0)) < 27.9


# -- ranks and resuming ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("micro_batch", [1, 3])
def test_the_global_order_is_the_same_for_every_world_size(world, micro_batch):
    """What all ranks see in one micro-step, together, is the next stretch of the one global order."""
    order = plan(ranks(48), size=24, gamma=2.0)
    shares = [rank_share(24, rank, world, micro_batch) for rank in range(world)]
    assert len({len(s) for s in shares}) == 1  # every rank joins every collective
    seen = [np.stack([order[s[k]] for s in shares], axis=1).ravel() for k in range(len(shares[0]))]
    assert np.array_equal(np.concatenate(seen), order)


class Run:
    """A training run without a model: plans, visits, and scores that depend on the sample and the step."""

    def __init__(self, settings, num_samples=37, batch_size=8, window_steps=4, background=True):
        names = [f"s{i:03d}" for i in range(num_samples)]
        prior = np.random.default_rng(1).random(num_samples).astype(np.float32)
        strata = strata_of((("general", "region")[i % 2] for i in range(num_samples)), np.arange(num_samples) % 3 > 0)
        self.table = HardnessTable(names, strata, prior)
        self.plan = WindowPlan(num_samples, batch_size, window_steps, 5, settings, HardnessConfig())
        self.background = background

    def step(self, step, total):
        self.plan.refresh(step, step / total, self.table)
        index, percentile = self.plan.batch(step)
        self.plan.look_ahead(step, self.plan.end / total, self.table)
        if not self.background:
            self.plan.settle(self.table)  # the plan is made before the step's scores come
        scores = np.random.default_rng(step).random(len(self.table)).astype(np.float32)[index]
        self.table.update(index, scores, step, ema=0.7)
        return index.tolist(), percentile.tolist()

    def checkpoint(self):
        self.plan.settle(self.table)
        return copy.deepcopy((self.plan.state_dict(), self.plan.arrays() | self.table.arrays()))

    def resume(self, saved):
        state, arrays = saved
        self.plan.load(state, arrays)
        self.table.load_arrays(arrays)


SETTINGS = pytest.mark.parametrize("settings", [CurriculumConfig(), None], ids=["curriculum", "uniform"])


@SETTINGS
@pytest.mark.parametrize("window_steps", [1, 4, 11])
def test_resuming_at_any_step_is_bit_exact(settings, window_steps):
    total, run = 14, Run(settings, window_steps=window_steps)
    saved, seen = [], []
    for step in range(total):
        saved.append(run.checkpoint())
        seen.append(run.step(step, total))
    run.checkpoint()
    for start in range(1, total):
        resumed = Run(settings, window_steps=window_steps)
        resumed.resume(saved[start])
        assert [resumed.step(step, total) for step in range(start, total)] == seen[start:], start
        resumed.checkpoint()
        for name, values in run.table.arrays().items():
            assert np.array_equal(resumed.table.arrays()[name], values), name


@SETTINGS
@pytest.mark.parametrize("window_steps", [1, 4, 11])
def test_planning_in_the_background_changes_nothing(settings, window_steps):
    """Neither does saving: an uninterrupted run never settles before the window's end."""
    total = 24
    runs = [Run(settings, window_steps=window_steps, background=b) for b in (True, False)]
    assert [runs[0].step(s, total) for s in range(total)] == [runs[1].step(s, total) for s in range(total)]
    left, right = (run.checkpoint() for run in runs)
    assert left[0] == right[0]
    for name, values in left[1].items():
        assert np.array_equal(right[1][name], values), name


def test_a_plan_knows_the_table_up_to_the_step_it_begins_at():
    """Scores of earlier steps count, scores of the window's last fifth come too late."""

    def next_window(changed):
        run = Run(CurriculumConfig(), num_samples=50, batch_size=4, window_steps=10)
        for step in range(11):
            run.step(step, 20)
            if step == changed:
                run.table.update(np.arange(50), np.linspace(1, 0, 50, dtype=np.float32), step, ema=0.0)
        return run.plan.current.index.tolist()

    assert next_window(7) != next_window(None)
    assert next_window(8) == next_window(9) == next_window(None)


def test_scores_that_come_while_a_plan_is_made_are_not_lost():
    run = Run(CurriculumConfig())
    for step in range(4):
        run.step(step, 20)
    index = run.plan.batch(3)[0]
    assert (run.table.last_step[index] != 3).any()  # step 3's wait
    run.plan.settle(run.table)
    assert (run.table.last_step[index] == 3).all()


def test_a_run_goes_from_easy_to_all():
    total, run = 40, Run(CurriculumConfig(window_steps=4, competence_start=0.3, competence_until=0.5))
    percentiles = [max(run.step(step, total)[1]) for step in range(total)]
    assert max(percentiles[:4]) <= 0.3
    assert max(percentiles[24:]) > 0.95


def test_every_visit_is_counted_once():
    run = Run(CurriculumConfig(), window_steps=4)
    seen = [index for step in range(20) for index in run.step(step, 20)[0]]
    run.plan.settle(run.table)
    ahead = run.plan._next.index if run.plan._next else []
    assert np.array_equal(run.table.visits, np.bincount([*seen, *ahead], minlength=37))
