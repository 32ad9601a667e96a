from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.training.validation_gap import hold_out
from tests.helpers.tiny_data import make_sample


def samples(count):
    return [make_sample((Path("x.png"),), sample_id=f"s{i:03d}") for i in range(count)]


def ids(some):
    return [sample.sample_id for sample in some]


def test_samples_are_split_in_two_and_keep_their_order():
    rest, held = hold_out(samples(50), 12, seed=3)
    assert len(held) == 12 and sorted(ids(rest) + ids(held)) == ids(samples(50))
    assert ids(rest) == sorted(ids(rest)) and ids(held) == sorted(ids(held))


def test_who_is_held_out_depends_on_ids_and_seed_alone():
    held = ids(hold_out(samples(50), 12, seed=3)[1])
    assert sorted(ids(hold_out(samples(50)[::-1], 12, seed=3)[1])) == held
    assert ids(hold_out(samples(50), 12, seed=4)[1]) != held
    assert set(ids(hold_out(samples(50), 8, seed=3)[1])) < set(held)
    assert len(set(ids(hold_out(samples(60), 12, seed=3)[1])) & set(held)) >= 6  # more data moves few


def test_more_than_half_of_the_data_is_refused():
    assert len(hold_out(samples(10), 5, seed=0)[1]) == 5
    with pytest.raises(UserError, match="holds out 6 samples, more than half of the 10"):
        hold_out(samples(10), 6, seed=0)


def test_those_of_before_stay_and_none_takes_the_place_of_one_that_is_gone():
    held = ids(hold_out(samples(50), 12, seed=3)[1])
    gone = held[::3]
    left = [sample for sample in samples(70) if sample.sample_id not in gone]
    assert not set(ids(hold_out(left, 12, seed=3)[1])) <= set(held)  # drawn anew, others would come in
    rest, still = hold_out(left, 12, 3, held)
    assert ids(still) == [i for i in held if i not in gone]
    assert sorted(ids(rest) + ids(still)) == ids(left)


def test_none_of_before_left_is_refused():
    with pytest.raises(UserError, match="measures the 2 samples that this job has held out from its start, and none"):
        hold_out(samples(10), 2, 3, ["x1", "x2"])
