"""Which metrics data are scored by, and their values by slice and task."""

import random
from pathlib import Path

import pytest
from rouge_score.rouge_scorer import RougeScorer

from pipeline.evaluation.metrics import METRICS, in_order, metrics_of, rouge_l, score_all, score_together
from pipeline.recipe import Recipe
from tests.helpers import recipes

SCENES = Recipe.model_validate(recipes.tiny(Path("run")))
NOTHING_OF_SCENES: dict[str, list[str]] = {"scene_score": [], "rare_recall": [], "rare_errors": []}
OWN = Recipe.model_validate(recipes.chat(Path("run"), "test", {}))


def record(part="night", task="qa", gold="a b c d", prediction="a b", nats=2.0, tokens=4):
    return {"slice": part, "task": task, "gold": gold, "prediction": prediction, "nats": nats, "tokens": tokens}


def test_the_scene_score_is_for_drawn_scenes_alone():
    assert [metric.name for metric in metrics_of(SCENES)] == [
        "scene_score", "rare_recall", "rare_errors", "rouge_l", "gold_ce"]  # fmt: skip
    assert OWN.benchmark is not None, "random models for data of one's own: the benchmark is used, its scenes are not"
    assert [metric.name for metric in metrics_of(OWN)] == ["rouge_l", "gold_ce"]


@pytest.mark.parametrize(
    ("task", "prediction", "gold", "expected"),
    [
        ("suggestion", "Stop.", "There is no need to stop, the road is clear.", 2 * 1 * 0.1 / (1 + 0.1)),
        ("general", "a car", "The lane ahead is blocked by cones", 0.0),
        ("region", "a red car", "a red car parked", 2 * 1 * 0.75 / 1.75),
    ],
)
def test_words_of_the_drawn_scenes_mean_nothing_in_other_data(task, prediction, gold, expected):
    rows = [record(task=task, prediction=prediction, gold=gold)]
    [(name, group)] = score_all(metrics_of(OWN), rows)["rouge_l"].items()
    assert (name, group["n"]) == ("night", 1), "a gold answer without a known word counts too"
    assert group["value"] == group["tasks"][task]["value"] == pytest.approx(expected)
    assert group["value"] < 1.0
    assert "scene_score" not in score_all(metrics_of(OWN), rows)


def test_values_are_by_the_slices_and_tasks_that_are_there():
    rows = [
        record("night", "qa", nats=1.0, tokens=1),
        record("night", "caption", prediction="a b c d", nats=9.0, tokens=9),
        record("night", "qa", prediction="x", nats=8.0, tokens=2),
        record("day", "caption", prediction="a b c", nats=3.0, tokens=6),
    ]
    scores = score_all(metrics_of(OWN), rows)
    rouge, ce = scores["rouge_l"], scores["gold_ce"]
    two, three = 2 / 3, 6 / 7  # F of two and of three words out of four
    assert list(rouge) == list(ce) == ["day", "night"]
    assert {part: sorted(group["tasks"]) for part, group in rouge.items()} == {
        "day": ["caption"],
        "night": ["caption", "qa"],
    }
    assert rouge["night"]["value"] == pytest.approx((two + 1 + 0) / 3)
    assert rouge["night"]["tasks"]["qa"] == {"value": pytest.approx(two / 2), "n": 2}
    assert rouge["day"]["value"] == pytest.approx(three)
    assert ce["night"] == {"value": 18 / 12, "n": 3, "tasks": {"caption": {"value": 1.0, "n": 1},
                                                               "qa": {"value": 3.0, "n": 2}}}  # fmt: skip
    together = score_together(metrics_of(OWN), rows)
    assert together["gold_ce"]["value"] == 21 / 18
    assert together["rouge_l"]["value"] == pytest.approx((two + 1 + 0 + three) / 4)
    assert together["rouge_l"]["tasks"]["caption"]["n"] == 2


def test_one_slice_is_not_shown_twice_and_scenes_have_no_value_over_both_slices():
    assert score_together(METRICS, [record("unknown"), record("unknown", "caption")]) == {}
    scenes = [record(part, "region", "a bus", "a bus") for part in ("regular", "corner")]
    assert score_all(METRICS, scenes)["scene_score"]["corner"]["value"] == 1.0
    assert list(score_all(METRICS, scenes)["scene_score"]) == ["regular", "corner"]
    assert sorted(score_together(METRICS, scenes)) == ["gold_ce", "rouge_l"]


def test_samples_without_a_gold_answer_are_in_no_score():
    silent = {"slice": "day", "task": "qa", "gold": " ", "prediction": "a b"}
    scores = score_all(METRICS, [record(), silent])
    assert {name: list(parts) for name, parts in scores.items()} == {
        **NOTHING_OF_SCENES,
        "rouge_l": ["night"],
        "gold_ce": ["night"],
    }
    assert score_all(METRICS, [silent]) == {name: {} for name in (*NOTHING_OF_SCENES, "rouge_l", "gold_ce")}


def test_rouge_is_googles_and_reads_other_alphabets_too():
    rng, theirs = random.Random(0), RougeScorer(["rougeL"])
    for _ in range(50):
        a, b = (" ".join(rng.choices(["stop", "Go", "left-turn", "40", "it's", "x_y"], k=9)) for _ in range(2))
        assert rouge_l(a, b) == pytest.approx(theirs.score(b, a)["rougeL"].fmeasure)
    assert rouge_l("Überholen", "überholen!") == 1.0
    assert rouge_l("前方有行人", "前方有车辆") == pytest.approx(3 / 5)
    assert rouge_l("", "stop") == 0.0


def test_names_stand_in_the_scenes_order_then_by_alphabet_and_nameless_last():
    assert in_order({"unknown", "b", "corner", "a", "regular"}, ("regular", "corner")) == [
        "regular", "corner", "a", "b", "unknown"]  # fmt: skip
