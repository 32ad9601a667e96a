import numpy as np
import pytest

from pipeline.method import curriculum
from pipeline.method.hardness import HardnessTable
from pipeline.method.plan import WindowPlan
from pipeline.recipe import CurriculumConfig, HardnessConfig

COUNT, BATCH, WINDOW = 60, 8, 4


def make_table(seed=0):
    prior = np.random.default_rng(seed).random(COUNT).astype(np.float32)
    return HardnessTable([f"{i:04d}" for i in range(COUNT)], ["a" if i % 3 else "b" for i in range(COUNT)], prior)


MOVING = CurriculumConfig(window_steps=WINDOW, competence_start=0.3, competence_until=0.5, gamma=1.0)


def make_plan(settings=MOVING):
    return WindowPlan(COUNT, BATCH, WINDOW, 7, settings, HardnessConfig())


def walk(plan, table, steps, start=0):
    """Batches of the steps; the table moves after each, as in training."""
    batches = []
    for step in range(start, steps):
        plan.refresh(step, step / steps, table)
        index, _ = plan.batch(step)
        plan.look_ahead(step, plan.end / steps, table)
        batches.append(index.copy())
        table.update(index, np.full(len(index), (step % 5) / 5, np.float32), step, 0.7)
    return batches


def walk_until(plan, table, start, stop):
    """As `walk`, of a job of 12 steps that is stopped."""
    for step in range(start, stop):
        plan.refresh(step, step / 12, table)
        index, _ = plan.batch(step)
        plan.look_ahead(step, plan.end / 12, table)
        table.update(index, np.full(len(index), (step % 5) / 5, np.float32), step, 0.7)


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_ranks_together_see_the_same_global_order(world):
    shares = [np.concatenate(curriculum.rank_share(BATCH, r, world, 1)) for r in range(world)]
    assert np.array_equal(np.stack(shares, 1).ravel(), np.arange(BATCH))


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("batch", [8, 10, 13, 24])
def test_no_sample_is_lost_where_the_batch_does_not_divide(world, batch):
    shares = [np.concatenate(curriculum.rank_share(batch, rank, world, 2)) for rank in range(world)]
    assert sorted(np.concatenate(shares).tolist()) == list(range(batch))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(("world", "micro"), [(1, 8), (1, 2), (2, 4), (2, 2), (4, 2), (2, 1)])
def test_each_share_is_cut_into_micro_batches_of_the_same_samples(world, micro):
    for rank in range(world):
        parts = curriculum.rank_share(BATCH, rank, world, micro)
        assert [len(p) for p in parts] == [micro] * (BATCH // world // micro)
        assert np.concatenate(parts).tolist() == list(range(rank, BATCH, world))


@pytest.mark.parametrize("stop", range(1, 12))
def test_resuming_at_any_step_gives_the_same_order(stop):
    whole = walk(make_plan(), make_table(), 12)
    plan, table = make_plan(), make_table()
    walk_until(plan, table, 0, stop)
    plan.settle(table)
    resumed, again = make_plan(), make_table()
    resumed.load(plan.state_dict(), plan.arrays())
    again.load_arrays(table.arrays())
    rest = walk(resumed, again, 12, start=stop)
    assert all(np.array_equal(a, b) for a, b in zip(whole[stop:], rest, strict=True))


def test_no_sample_twice_within_a_window():
    plan, table = make_plan(), make_table()
    plan.refresh(0, 1.0, table)
    assert len(set(plan.current.index.tolist())) == BATCH * WINDOW


def test_early_windows_hold_the_easy_samples_only():
    plan, table = make_plan(), make_table()
    plan.refresh(0, 0.0, table)
    assert plan.current.percentile.max() <= 0.3 + 1e-6


def test_without_curriculum_every_epoch_visits_every_sample_once():
    plan = WindowPlan(COUNT, 6, 5, 7, None, HardnessConfig())
    seen = []
    for step in range(10):
        plan.refresh(step, step / 10, None)
        seen += plan.batch(step)[0].tolist()
    assert sorted(seen) == list(range(COUNT))


# -- a job that goes on with other samples -----------------------------------------------------------------------------


def other_samples(step):
    """(plan, table) of a job that goes on at a step with other samples."""
    table = make_table(3)
    table.draw(np.arange(0, COUNT, 2), 0)
    plan = make_plan()
    plan.refresh(step, step / 12, table)
    return plan, table


@pytest.mark.parametrize("step", [1, 2, 3, 6])
def test_the_rest_of_a_window_is_planned_from_its_step_on(step):
    plan, table = other_samples(step)
    end = step - step % WINDOW + WINDOW
    assert plan.state_dict() == {"start": step, "end": end}
    order = plan.current.index
    assert len(order) == len(set(order.tolist())) == (end - step) * BATCH
    assert np.array_equal(plan.batch(step)[0], order[:BATCH]) and np.array_equal(plan.batch(end - 1)[0], order[-BATCH:])
    assert int(table.visits.sum()) == COUNT // 2 + len(order)
    assert (table.last_window[order] == step // WINDOW).all()


def test_the_rest_of_a_window_does_not_draw_the_same_samples_first():
    """Nothing is known of any sample: with the window's own random numbers both would begin alike."""
    table, flat = make_table(), CurriculumConfig(window_steps=WINDOW, gamma=0.0, visit_penalty=0.0)
    whole, rest = make_plan(flat), make_plan(flat)
    whole.refresh(4, 1.0, make_table())
    rest.refresh(5, 1.0, table)
    assert len(set(whole.batch(4)[0].tolist()) & set(rest.batch(5)[0].tolist())) < BATCH // 2


@pytest.mark.parametrize("stop", range(3, 12))
def test_it_resumes_at_any_step_with_the_same_order(stop):
    plan, table = other_samples(2)
    whole = walk(plan, table, 12, start=2)
    plan, table = other_samples(2)
    walk_until(plan, table, 2, stop)
    plan.settle(table)
    resumed, again = make_plan(), make_table(3)
    resumed.load(plan.state_dict(), plan.arrays())
    again.load_arrays(table.arrays())
    rest = walk(resumed, again, 12, start=stop)
    assert all(np.array_equal(a, b) for a, b in zip(whole[stop - 2 :], rest, strict=True))


@pytest.mark.parametrize("stop", range(1, 9))
def test_what_is_planned_and_not_trained_is_known(stop):
    plan, table = make_plan(), make_table()
    walk_until(plan, table, 0, stop)
    plan.settle(table)
    trained = plan.current.index[: (stop - plan.start) * BATCH]
    planned = np.concatenate([plan.current.index, *([plan._next.index] if plan._next else [])])
    untrained = plan.untrained(stop, plan.state_dict(), plan.arrays())
    assert np.array_equal(np.concatenate([trained, untrained]), planned)
    other = make_table()
    other.carry(table.arrays(), np.arange(COUNT), untrained)
    before = table.visits.astype(int) - np.bincount(untrained, minlength=COUNT)
    assert np.array_equal(other.visits, before)
    assert int(other.visits.sum()) == stop * BATCH  # every sample that was trained on, and no other
