"""The scores must need the image: what no answer without looking may reach, and what a parser must not mistake."""

from collections import Counter
from random import Random
from statistics import fmean

import numpy as np
import pytest

from pipeline.benchmark.scoring import (
    action,
    mention_f1,
    mentions,
    rare_error_counts,
    rare_recall_counts,
    scene_counts,
    scene_score,
    score_answer,
    share,
)
from pipeline.benchmark.text import GROUP_TITLES, describe, suggest
from pipeline.benchmark.world import ACTIONS, KINDS, pick_regions, plan_scene


@pytest.fixture(scope="module", params=[False, True], ids=["regular", "corner"])
def scenes(request):
    return [plan_scene(Random(f"scoring/{i}"), corner=request.param, held_out=True) for i in range(250)]


def scored(answers):
    """The scene score of (task, prediction, gold)s."""
    return float(scene_score(np.sum([scene_counts(*answer) for answer in answers], axis=0)))


def class_f1(pairs):
    return scored([("general", *pair) for pair in pairs])


def best_constant(score, golds):
    """Greedy search for the one list of kinds that scores best on these very answers: an optimist's blind guess."""
    chosen, best = [], 0.0
    while len(chosen) < len(KINDS):
        trials = [(score(", ".join([*chosen, k]), golds), k) for k in KINDS if k not in chosen]
        value, kind = max(trials)
        if value <= best:
            break
        chosen, best = [*chosen, kind], value
    return best


@pytest.mark.slow
def test_the_best_constant_answer_scores_below_030(scenes):
    golds = [describe(s, "by class") for s in scenes]
    general = best_constant(lambda answer, gold: class_f1([(answer, g) for g in gold]), golds)
    alone = best_constant(lambda answer, gold: fmean(mention_f1(answer, g) for g in gold), golds)
    asked = [t.kind for i, s in enumerate(scenes) for t in pick_regions(Random(i), s.things)]
    region = max(Counter(asked).values()) / len(asked)
    suggestion = max(fmean(score_answer("suggestion", a, suggest(s, "action first")) for s in scenes) for a in ACTIONS)
    assert fmean([general, region, suggestion]) < 0.3
    assert max(general, alone, region, suggestion) < 0.35


def test_descriptions_parse_back_to_the_scene(scenes):
    for scene in scenes:
        kinds = [t.kind for t in scene.things]
        assert mentions(describe(scene, "plain")) == kinds
        assert sorted(mentions(describe(scene, "by class"))) == sorted([*kinds, *_titles(scene)])


def _titles(scene):
    """A class title that is also the plural of a kind counts as a mention; it never adds another kind."""
    return [k for k in KINDS for g in {t.group for t in scene.things} if GROUP_TITLES[g] == f"{k}s"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_parsed_alone_and_in_the_plural(kind):
    assert mentions(f"a {kind} near ahead.") == [kind]
    assert mentions(f"two {kind.upper()}s") == [kind]


@pytest.mark.parametrize("phrase", ACTIONS)
def test_every_action_is_parsed_alone(phrase):
    assert action(f"the ego car should {phrase} now") == phrase


def test_the_stop_of_a_stop_sign_is_no_action():
    assert action("there is a stop sign near ahead, so keep speed.") == "keep speed"
    assert action("there is a stop sign near ahead.") is None


def test_nothing_said_scores_nothing_and_the_gold_answer_scores_one():
    gold = {"general": "vehicles: a red car.", "region": "a bus far ahead", "suggestion": "give way, because"}
    for task, text in gold.items():
        assert score_answer(task, "", text) == 0.0
        assert score_answer(task, text, text) == 1.0


def test_more_mentions_do_not_pay():
    gold = "a car and a deer"
    assert mention_f1(", ".join(KINDS), gold) == pytest.approx(2 * 2 / (2 + len(KINDS)))


def test_class_f1_by_hand():
    pairs = [("a car and a bus", "a car"), ("a deer", "a bus and a deer"), ("a car", "a car")]
    car, bus, deer = 2 * 2 / (2 + 2), 0.0, 2 * 1 / (1 + 1)
    assert class_f1(pairs) == pytest.approx((car + bus + deer) / 3)
    assert class_f1([("a van", "a car")]) == 0.0, "a kind that no gold text mentions is no class of its own"


def test_class_f1_equals_precision_and_recall_per_class():
    rng = Random(3)
    kinds = list(KINDS)[:6]
    texts = [(" and ".join(rng.sample(kinds, 2)), " and ".join(rng.sample(kinds, 3))) for _ in range(40)]
    values = []
    for kind in kinds:
        said, true = [kind in mentions(p) for p, _ in texts], [kind in mentions(g) for _, g in texts]
        hits = sum(s and t for s, t in zip(said, true, strict=True))
        precision, recall = hits / max(sum(said), 1), hits / max(sum(true), 1)
        values.append(2 * precision * recall / max(precision + recall, 1e-12))
    assert class_f1(texts) == pytest.approx(fmean(values))


def test_gold_without_known_words_is_in_no_mean():
    golds = [("general", "nothing of note"), ("region", "a grey rock"), ("suggestion", "wait"), ("chat", "a bus")]
    assert [score_answer(task, gold, gold) for task, gold in golds] == [None] * 4
    assert [scene_counts(task, gold, gold) for task, gold in golds] == [None] * 4


def test_the_scene_score_is_the_mean_of_the_tasks_that_are_there():
    region = [("region", "a bus", "a bus"), ("region", "a car", "a bus")]
    general = [("general", "a car", "a car"), ("general", "", "a deer")]
    suggestion = [("suggestion", "stop", "stop"), ("suggestion", "stop", "stop"), ("suggestion", "x", "stop")]
    assert scored(region) == 0.5
    assert scored(general) == 0.5, "a car and no deer"
    assert scored([*region, *suggestion]) == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert scored([*region, *general, *suggestion]) == pytest.approx((1 / 2 + 1 / 2 + 2 / 3) / 3)


def test_scores_of_many_choices_at_once_are_those_of_each():
    """As resampling needs them; a choice without any answer has no score."""
    answers = [
        ("region", "a bus", "a bus"),
        ("general", "a car and a van", "a car"),
        ("suggestion", "stop", "give way"),
    ]
    counts = np.stack([scene_counts(*answer) for answer in answers])
    times = np.array([[1, 0, 0], [2, 1, 1], [0, 3, 0], [0, 0, 0]], float)
    values = scene_score(times @ counts)
    chosen = [[answer for answer, n in zip(answers, row, strict=True) for _ in range(int(n))] for row in times[:3]]
    np.testing.assert_allclose(values[:3], [scored(part) for part in chosen])
    assert np.isnan(values[3])


def test_rare_objects_by_hand():
    answers = [
        ("general", "a deer and a car", "a deer, a stroller"),
        ("region", "some fallen cargo near ahead", "a fallen tree near ahead"),
        ("general", "a stroller", "a car"),
        ("suggestion", "stop, there is a deer", "stop, there is a deer"),
    ]
    recall = [rare_recall_counts(*answer) for answer in answers]
    assert [None if c is None else c.tolist() for c in recall] == [[1, 2], [0, 1], None, None]
    assert share(np.sum([c for c in recall if c is not None], axis=0)) == pytest.approx(1 / 3)
    wrong = [rare_error_counts(*answer) for answer in answers]
    assert [None if c is None else c.tolist() for c in wrong] == [[0, 1], [1, 1], [1, 1], None]
