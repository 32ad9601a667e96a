"""The scores must need the image: what no answer without looking may reach, and what a parser must not mistake."""

from collections import Counter
from random import Random
from statistics import fmean

import pytest

from pipeline.benchmark.scoring import action, class_f1, mention_f1, mentions, score_answer, score_answers
from pipeline.benchmark.text import GROUP_TITLES, describe, suggest
from pipeline.benchmark.world import ACTIONS, KINDS, pick_regions, plan_scene


@pytest.fixture(scope="module", params=[False, True], ids=["regular", "corner"])
def scenes(request):
    return [plan_scene(Random(f"scoring/{i}"), corner=request.param, held_out=True) for i in range(250)]


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


def test_gold_without_known_words_is_in_no_mean_and_not_counted():
    golds = [("general", "nothing of note"), ("region", "a grey rock"), ("suggestion", "wait"), ("chat", "a bus")]
    records = [{"task": task, "gold": gold, "prediction": gold} for task, gold in golds]
    assert [score_answer(r["task"], r["prediction"], r["gold"]) for r in records] == [None] * 4
    assert score_answers(records) == (None, 0)
    known = {"task": "region", "gold": "a bus", "prediction": "a car"}
    assert score_answers([*records, known]) == (0.0, 1)
