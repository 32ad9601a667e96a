import json
import shutil
from random import Random

import pytest

from pipeline.benchmark.art import render
from pipeline.benchmark.scenes import write_scenes
from pipeline.benchmark.scoring import action, mention_f1, mentions, score_answer
from pipeline.benchmark.text import suggest
from pipeline.benchmark.world import ACTIONS, HELD_OUT_COLOURS, HELD_OUT_WEATHER, decide, held_out_pairs, plan_scene
from pipeline.data.readers import read_samples
from pipeline.data.sample import LABELLED, POOL
from pipeline.errors import DataError
from pipeline.recipe import ScenesConfig

SMALL = ScenesConfig(train=12, val=2, test=6, width=128, height=96, workers=1)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, SMALL)
    return folder


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_same_bytes_for_any_number_of_workers(root, tmp_path):
    write_scenes(tmp_path, SMALL.model_copy(update={"workers": 2}))
    assert contents(tmp_path) == contents(root)


def test_a_finished_split_is_left_alone_and_other_settings_are_refused(root):
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*.jpg")}
    write_scenes(root, SMALL)
    assert {p: p.stat().st_mtime_ns for p in root.rglob("*.jpg")} == before
    with pytest.raises(DataError, match="seed: on disk 0, recipe 1"):
        write_scenes(root, SMALL.model_copy(update={"seed": 1}))


def test_an_interrupted_split_is_finished_with_the_same_bytes(root, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    for name in (".Train.json", "slices.json", "val/images/0007.jpg", "CODA-LM/Train/val_0009.json"):
        (copy / name).unlink()
    (copy / "val" / "images" / "0008.jpg").write_bytes(b"half")
    write_scenes(copy, SMALL)
    assert contents(copy) == contents(root)


@pytest.mark.parametrize("gold", [False, True])
def test_a_pool_has_questions_and_no_answers(root, tmp_path, gold):
    """Its images follow the labelled ones, which are those of a data set without it."""
    write_scenes(tmp_path, SMALL.model_copy(update={"pool": 10, "pool_gold": gold, "corner_share": 0.3}))
    samples = read_samples("coda_lm", tmp_path, "Train")
    pool = [s for s in samples if int(s.images[0].stem) > 12]
    assert {s.source for s in pool} == {LABELLED if gold else POOL}
    assert {s.source for s in samples if s not in pool} == {LABELLED}
    assert {s.task for s in pool} == {"general", "region", "suggestion"}
    corner = {s.images[0].stem for s in samples if s.slice == "corner"}
    assert sum(int(stem) <= 12 for stem in corner) == round(0.3 * 12) and len(corner) == round(0.3 * 12) + 3
    records = [(tmp_path / f"CODA-LM/Train/val_{n:04}.json").read_text() for n in range(13, 23)]
    told = ('"category_name"', '"weather"', '"description and explanation"', '"objects"')
    assert [[word in text for word in told] for text in records] == [[gold] * len(told)] * 10


def test_questions_and_images_of_a_pool_do_not_depend_on_its_answers(tmp_path):
    both = []
    for gold in (False, True):
        write_scenes(tmp_path / str(gold), SMALL.model_copy(update={"pool": 6, "pool_gold": gold}))
        samples = read_samples("coda_lm", tmp_path / str(gold), "Train")
        both.append({(s.images[0].stem, s.images[0].read_bytes(), s.prompt, s.box) for s in samples})
    assert both[0] == both[1]


def test_held_out_pairs_are_written_to_test_alone(root):
    def pairs(split):
        for path in (root / "CODA-LM" / split).glob("*.json"):
            record = json.loads(path.read_text())
            for thing in record["objects"]:
                kind = thing["category_name"]
                yield (kind, record["weather"])
                yield (kind, thing["words"][0])

    held_out = {*HELD_OUT_COLOURS, *HELD_OUT_WEATHER}
    assert not held_out & {*pairs("Train"), *pairs("val")}
    assert held_out & set(pairs("Test"))


def test_reads_back_as_coda_lm_with_all_three_tasks(root):
    samples = read_samples("coda_lm", root, "Train")
    assert {s.task for s in samples} == {"general", "region", "suggestion"}
    assert sum(s.task == "general" for s in samples) == 12
    assert {s.slice for s in read_samples("coda_lm", root, "Test")} == {"regular", "corner"}


def test_the_model_never_sees_the_slice(root):
    for sample in read_samples("coda_lm", root, "Train"):
        assert "corner" not in (sample.prompt + sample.answer).lower()


def test_test_split_holds_combinations_that_training_lacks():
    train = [plan_scene(Random(i), corner=i % 5 == 0, held_out=False) for i in range(150)]
    test = [plan_scene(Random(i), corner=i % 2 == 0, held_out=True) for i in range(150)]
    assert not any(held_out_pairs(s) for s in train)
    assert sum(bool(held_out_pairs(s)) for s in test) >= 0.2 * len(test)


def test_no_action_can_be_guessed():
    actions = [decide(plan_scene(Random(i), corner=False, held_out=False)).action for i in range(700)]
    shares = {a: actions.count(a) / len(actions) for a in ACTIONS}
    assert max(shares.values()) < 0.3
    assert min(shares.values()) > 0.08


def test_boxes_lie_in_the_frame_and_have_area():
    for i in range(60):
        scene = plan_scene(Random(i), corner=True, held_out=False)
        _, boxes = render(scene, 160, 96)
        assert len(boxes) == len(scene.things)
        for (x, y, w, h), thing in zip(boxes, scene.things, strict=True):
            post = thing.role in ("sign", "light")
            assert not post or (x > 0.5 and x + w < 159.5), f"{thing} is cut by the frame"
            assert x >= 0 and y >= 0 and w > 3 and h > 3
            assert x + w <= 160.5 and y + h <= 96.5


def test_suggestions_parse_back_to_the_rules_action():
    for i in range(100):
        scene = plan_scene(Random(i), corner=i % 2 == 0, held_out=True)
        for wording in ("action first", "reason first"):
            assert action(suggest(scene, wording)) == decide(scene).action


def test_questions_of_a_task_ask_for_answers_of_several_wordings(root):
    samples = read_samples("coda_lm", root, "Train")
    for task, starts in (("region", ("the box shows ", "a")), ("general", ("I see ", ""))):
        answers = [s.answer for s in samples if s.task == task]
        assert 0 < sum(a.startswith(starts[0]) for a in answers) < len(answers)
        assert all(a.startswith(starts) for a in answers)


def test_nothing_is_drawn_where_one_split_was_drawn_with_other_settings(root, tmp_path):
    write_scenes(tmp_path, SMALL)
    before = contents(tmp_path)
    with pytest.raises(DataError, match="images: on disk 6, recipe 7"):
        write_scenes(tmp_path, SMALL.model_copy(update={"test": 7, "workers": 2}))
    assert contents(tmp_path) == before


def test_objects_are_in_drawing_order(root):
    record = json.loads((root / "CODA-LM" / "Train" / "val_0001.json").read_text())
    distances = [o["words"][-2] for o in record["objects"]]
    assert record["size"] == [128, 96]
    assert set(distances) <= {"near", "far"}


def test_mentions_prefer_the_longest_kind():
    assert mentions("an overturned truck and a red truck") == ["overturned truck", "truck"]


def test_mention_f1_by_hand():
    assert mention_f1("a car and a bus", "a car and a deer") == pytest.approx(0.5)
    assert mention_f1("", "a car") == 0.0


def test_first_category_and_first_action_count():
    assert score_answer("region", "a bus far ahead, a car", "a bus near ahead") == 1.0
    assert score_answer("region", "nothing", "a bus") == 0.0
    assert score_answer("suggestion", "stop, because", "slow down, because there is a stop sign") == 0.0
