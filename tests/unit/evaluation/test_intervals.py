"""Intervals of scores: against drawing by hand, and against what statistics say of a mean."""

import random

import numpy as np
import pytest

from pipeline.evaluation.intervals import Resamples, interval
from pipeline.evaluation.metrics import METRICS, SCENE_SCORE, score_all

CE = METRICS[-1]
KINDS = ("car", "bus", "deer", "stroller")


def answers(frames, per_frame, seed=0):
    """(records, frame by sample_id) of answers that are right half of the time."""
    rng, records, frame_of = random.Random(seed), [], {}
    for frame in range(frames):
        for number in range(per_frame):
            gold, said = rng.choice(KINDS), rng.choice(KINDS[:2])
            record = {"sample_id": f"{frame}.{number}", "slice": "corner", "task": rng.choice(["general", "region"])}
            records.append(record | {"gold": f"a {gold}", "prediction": f"a {said}"})
            frame_of[record["sample_id"]] = str(frame)
    return records, frame_of


@pytest.mark.parametrize("metric", METRICS[:4], ids=lambda metric: metric.name)
def test_a_draw_is_the_score_of_its_answers(metric):
    """Each frame's answers as often as the draw has the frame."""
    records, frames = answers(12, 3)
    draws = Resamples(frames)
    values = draws.values(metric, records)
    order = sorted(set(frames.values()))
    for times, value in list(zip(draws._times_BF, values, strict=True))[:40]:
        count = dict(zip(order, times.astype(int).tolist(), strict=True))
        drawn = [record for record in records for _ in range(count[frames[record["sample_id"]]])]
        expected = score_all([metric], drawn)[metric.name]
        assert value == pytest.approx(expected["corner"]["value"]) if expected else np.isnan(value)
    assert draws._times_BF.sum(1).tolist() == [12] * len(values)


def test_the_interval_of_a_mean_is_that_of_the_normal_approximation():
    """Frames whose answers agree: the frames, not the answers, are what is counted."""
    rng = np.random.default_rng(1)
    nats = rng.normal(2.0, 0.5, 300)
    records = [
        {"sample_id": f"{n}.{k}", "gold": "x", "prediction": "", "slice": "a", "task": "b", "nats": x, "tokens": 1}
        for n, x in enumerate(nats) for k in range(4)
    ]  # fmt: skip
    draws = Resamples({record["sample_id"]: record["sample_id"].split(".")[0] for record in records})
    low, high = interval(draws.values(CE, records))
    half = 1.96 * nats.std() / np.sqrt(300)
    assert (low, high) == pytest.approx((nats.mean() - half, nats.mean() + half), abs=0.1 * half)


def test_all_models_share_the_draws():
    """So a model that is always better by the same amount is better without doubt."""
    records, frames = answers(20, 2)
    rows = [[record | {"nats": i + gap, "tokens": 1} for i, record in enumerate(records)] for gap in (0.0, 1.0)]
    worse, better = (Resamples(frames).values(CE, part) for part in reversed(rows))
    assert interval(worse - better) == pytest.approx((1.0, 1.0))
    assert interval(worse)[1] - interval(worse)[0] > 5


def test_nothing_to_score_has_no_interval():
    records, frames = answers(3, 1)
    silent = [record | {"gold": "nothing of note"} for record in records]
    assert interval(Resamples(frames).values(SCENE_SCORE, silent)) is None
