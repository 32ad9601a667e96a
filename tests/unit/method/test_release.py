import json
import math
from typing import get_args

import numpy as np
import pytest

from pipeline.method.release import RELEASES, ClosingGap, release_alpha
from pipeline.recipe import DistillConfig

SHAPES = sorted(RELEASES)


WHOLE = {"alpha_end": 0.0, "release_from": 0.2, "release_to": 0.9}
"""Until the teacher is gone."""


def alphas(tau, percentile=(0.0,), gap=None, **changes):
    percentile_G = np.array(percentile, np.float32)
    labelled_G = np.zeros(len(percentile_G), bool)
    return release_alpha(tau, percentile_G, labelled_G, DistillConfig(**WHOLE | changes), gap).tolist()


def closing(*gaps, every=0.1, start=0.0, ema=0.0):
    """Measured from `start` on."""
    gap = ClosingGap(ema)
    for position, value in enumerate(gaps):
        gap.add(start + position * every, value)
    return gap


HALVING = closing(1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.25)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tau", [0.0, 0.4, 0.97, 1.0])
def test_samples_of_the_pool_keep_the_teacher(shape, tau):
    settings, percentile_G = DistillConfig(**WHOLE, release=shape), np.array([0.1, 0.1, 0.9, 0.9], np.float32)
    found = release_alpha(tau, percentile_G, np.array([True, False, True, False]), settings, HALVING)
    assert found[[0, 2]].tolist() == pytest.approx([0.9, 0.9])
    assert found[[1, 3]].tolist() == pytest.approx(alphas(tau, (0.1, 0.9), HALVING, release=shape))


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


def test_a_recipe_may_name_every_release_and_no_other():
    assert set(get_args(DistillConfig.model_fields["release"].annotation)) == RELEASES.keys()


def test_step_falls_in_four_equal_steps():
    quarters = [alphas(0.2 + 0.7 * share, release="step")[0] for share in (0.0, 0.24, 0.26, 0.51, 0.76, 1.0)]
    assert quarters == pytest.approx([0.9, 0.9, 0.675, 0.45, 0.225, 0.0], abs=1e-6)


@pytest.mark.parametrize("release", SHAPES)
def test_every_release_falls_only_and_harder_samples_are_never_ahead(release):
    percentile = np.linspace(0, 1, 5)
    curves = np.array([alphas(tau, percentile, HALVING, release=release) for tau in np.linspace(0, 1, 101)])
    assert (np.diff(curves, axis=0) <= 0).all()
    assert (np.diff(curves, axis=1) >= 0).all()
    assert curves.min() >= 0 and curves.max() == np.float32(0.9)
    assert (curves[95:] == (0 if release != "constant" else np.float32(0.9))).all()


@pytest.mark.parametrize("release", sorted(RELEASES.keys() - {"constant"}))
def test_the_delay_shows_an_earlier_time_whatever_the_shape(release):
    """The delay of percentile 1 is 0.15 * 0.7 of training."""
    for tau in (0.31, 0.5, 0.58, 0.87):
        hard, earlier = (alphas(t, (u,), HALVING, release=release) for t, u in ((tau, 1.0), (tau - 0.105, 0.0)))
        assert hard == pytest.approx(earlier, abs=1e-6)
    assert alphas(0.58, (1.0,), HALVING, release=release) != alphas(0.58, (0.0,), HALVING, release=release)


@pytest.mark.parametrize("release", sorted(RELEASES.keys() - {"constant"}))
def test_a_second_release_that_ends_earlier_is_never_behind(release):
    """Features go first: the same settings with another t1, with and without the delay of hardness."""
    for tau in np.linspace(0, 1, 51):
        first, second = (alphas(tau, (0.0, 1.0), HALVING, release=release, release_to=to) for to in (0.6, 0.9))
        assert all(a <= b + 1e-6 for a, b in zip(first, second, strict=True)), tau
    assert alphas(0.661, (0.0, 1.0), HALVING, release=release, release_to=0.6) == [0.0, 0.0]
    assert alphas(0.661, (0.0, 1.0), HALVING, release=release, release_to=0.9)[1] > 0


# -- the adaptive release ----------------------------------------------------------------------------------------


def test_the_share_left_is_the_share_of_the_first_gap_still_open():
    assert [closing(*[2.0, 1.5, 0.5][:n]).left for n in range(4)] == [1.0, 1.0, 0.75, 0.25]
    assert closing(2.0, 0.01).left == 0.0  # below half a level
    assert closing(2.0, -0.3).left == 0.0
    assert closing(-0.1).left == 0.0  # no worse than the teacher from the start


def test_a_bad_measurement_never_brings_the_teacher_back():
    gap = closing(2.0, 1.0, 3.0, 0.5, every=0.25)
    assert gap.left_at(np.array([-1.0, 0.0, 0.1, 0.25, 0.5, 0.75, 0.9])).tolist() == [1, 1, 1, 0.5, 0.5, 0.25, 0.25]


def test_the_gap_is_smoothed_by_a_running_mean():
    gap, mean = ClosingGap(0.75), 1.0
    for position, value in enumerate((1.0, 0.2, 0.4, 0.1)):
        gap.add(0.1 * position, value)
        mean = 0.75 * mean + 0.25 * value
    assert gap.left == round(64 * mean) / 64
    assert gap.gap == 0.1


def test_alpha_does_not_follow_rounding_noise_of_the_gap():
    """What another world size measures differs by rounding: the same levels, bit for bit."""
    values, noise = np.linspace(3.1, 0.2, 12), 1e-6 * np.random.default_rng(0).standard_normal(12)
    one, two = (closing(*v, every=0.05) for v in (values, values + noise))
    taus = np.linspace(0, 1, 200)
    assert np.array_equal(one.left_at(taus), two.left_at(taus))


def test_before_a_measurement_all_is_left_and_after_t1_nothing():
    late = closing(1.0, 0.5, start=0.4)
    assert alphas(0.39, gap=late, release="adaptive") == [np.float32(0.9)]
    assert alphas(0.55, gap=late, release="adaptive") == [np.float32(0.45)]
    assert alphas(0.89, gap=late, release="adaptive") == [np.float32(0.45)]
    assert alphas(0.91, gap=late, release="adaptive") == [0.0]
    with pytest.raises(ValueError, match="needs the measured gap"):
        alphas(0.5, release="adaptive")


def test_a_restored_gap_goes_on_bit_for_bit():
    values = np.random.default_rng(1).uniform(0.1, 1.0, 20)
    whole, part = ClosingGap(0.6), ClosingGap(0.6)
    for position, value in enumerate(values):
        whole.add(position / 20, float(value))
        resumed = ClosingGap(0.6)
        resumed.load_state_dict(json.loads(json.dumps(part.state_dict())))
        part = resumed
        part.add(position / 20, float(value))
    assert part.state_dict() == whole.state_dict()
