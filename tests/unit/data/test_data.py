import hashlib
import json
import re
import struct
import zlib
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.data.readers import READERS, read_samples
from pipeline.data.readers.coda_lm import PROMPTS
from pipeline.data.sample import MAX_IMAGE_PIXELS, Sample, load_image, question, turned_size
from pipeline.errors import DataError
from pipeline.recipe import DataConfig

RECORD = {
    "general_perception": {
        "vehicles": [{"description": "a truck", "explanation": "it is close"}],
        "vulnerable_road_users": [],
        "traffic signs": [],
        "traffic lights": [],
        "traffic cones": [],
        "barriers": [],
        "other objects": [],
        "description and explanation": "A truck ahead. ",
    },
    "region_perception": {
        "1": {"description and explanation": "A truck.", "box": [10, 12, 20, 16], "category_name": "truck"},
        "2": {"description and explanation": "A cone.", "box": [40.5, 5, 6, 8], "category_name": "cone"},
    },
    "driving_suggestion": "Slow down.",
}
CHAT = {"id": "c1", "image": "val/images/0001.jpg"}
EXCHANGE = [{"from": "human", "value": "<image>\nWhat is ahead?"}, {"from": "gpt", "value": "A truck."}]


def save_image(root, name, value=90, size=(64, 48)):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)
    return path


def save_record(root, record, name="val_0001", split="Train"):
    path = root / "CODA-LM" / split / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(record if isinstance(record, str) else json.dumps(record))
    return path


def save_chat(root, *records):
    (root / "chat.jsonl").write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in records), encoding="utf-8")


def without(record, *keys):
    return {key: value for key, value in record.items() if key not in keys}


def region(**changes):
    return {"region_perception": {"7": RECORD["region_perception"]["1"] | changes}}


def sample_of(path, box=None):
    return Sample("s0", (path,), question("?"), "", "region" if box else "chat", "unknown", box)


def png(width, height, pixels=b""):
    """A PNG file whose header may promise more than `pixels` hold."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


@pytest.fixture
def root(tmp_path):
    """A data root with one image, `val/images/0001.jpg`."""
    root = tmp_path / "root"
    save_image(root, "val/images/0001.jpg")
    return root


@pytest.fixture
def opened(monkeypatch):
    """Every file whose bytes are hashed."""
    names = []
    read_bytes = Path.read_bytes

    def recording(path):
        names.append(path.name)
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", recording)
    return names


# CODA-LM


def test_the_recipe_knows_every_reader_and_no_other():
    assert sorted(get_args(DataConfig.__annotations__["format"])) == sorted(READERS)


def test_a_record_makes_one_sample_per_general_region_and_suggestion(root):
    save_record(root, RECORD)
    samples = {(s.task, s.box): s for s in read_samples("coda_lm", root, "Train")}
    assert {key: (s.prompt, s.answer) for key, s in samples.items()} == {
        ("general", None): (PROMPTS["general"], "A truck ahead."),
        ("region", (10.0, 12.0, 20.0, 16.0)): (PROMPTS["region"], "A truck."),
        ("region", (40.5, 5.0, 6.0, 8.0)): (PROMPTS["region"], "A cone."),
        ("suggestion", None): (PROMPTS["suggestion"], "Slow down."),
    }
    assert {s.images for s in samples.values()} == {((root / "val/images/0001.jpg").resolve(),)}
    assert {s.slice for s in samples.values()} == {"unknown"}


def test_keys_with_underscores_and_spaces_are_the_same(root):
    save_record(root, RECORD)
    published = read_samples("coda_lm", root, "Train")
    text = json.dumps(RECORD).replace("description and explanation", "description_and_explanation")
    for section in ("general_perception", "region_perception", "driving_suggestion"):
        text = text.replace(section, section.replace("_", " "))
    save_record(root, text)
    assert read_samples("coda_lm", root, "Train") == published


def test_questions_of_the_record_replace_the_standard_prompts(root):
    record = json.loads(json.dumps(RECORD)) | {"driving_suggestion_question": "What now?"}
    record["general_perception"]["question"] = "What matters?"
    record["region_perception"]["2"]["question"] = "What is this?"
    save_record(root, record)
    prompts = {(s.task, s.answer): s.prompt for s in read_samples("coda_lm", root, "Train")}
    assert prompts == {
        ("general", "A truck ahead."): "What matters?",
        ("region", "A truck."): PROMPTS["region"],
        ("region", "A cone."): "What is this?",
        ("suggestion", "Slow down."): "What now?",
    }


def test_missing_sections_and_answers_are_tolerated(root):
    """As in the published test split."""
    save_record(root, region() | {"general_perception": {"vehicles": []}, "driving_suggestion": None})
    save_record(root, {"general_perception": {}, "region_perception": []}, name="nothing_0001")
    save_image(root, "nothing/images/0001.jpg", 1)
    answers = {s.task: s.answer for s in read_samples("coda_lm", root, "Train")}
    assert answers == {"general": "", "region": "A truck.", "suggestion": ""}


def test_the_image_key_wins_over_the_file_name(root):
    save_image(root, "test/images/0003.jpg", 10)
    save_record(root, {"driving_suggestion": "Stop.", "image": "val/images/0001.jpg"}, name="test_0003")
    save_record(root, {"driving_suggestion": "Go."}, name="test_0003", split="Test")
    assert read_samples("coda_lm", root, "Train")[0].images[0].parts[-3:] == ("val", "images", "0001.jpg")
    assert read_samples("coda_lm", root, "Test")[0].images[0].parts[-3:] == ("test", "images", "0003.jpg")


def test_a_split_is_found_in_another_case_of_its_name(root):
    save_record(root, RECORD, split="Val")
    assert len(read_samples("coda_lm", root, "val")) == 4


def test_slices_come_from_the_side_file_and_change_nothing_else(root):
    save_image(root, "test/images/0003.jpg", 10)
    save_record(root, RECORD)
    save_record(root, RECORD, name="test_0003")
    plain = read_samples("coda_lm", root, "Train")
    (root / "slices.json").write_text('{"test_0003": "corner"}')
    sliced = read_samples("coda_lm", root, "Train")
    assert {(s.images[0].name, s.slice) for s in sliced} == {("0001.jpg", "unknown"), ("0003.jpg", "corner")}
    assert [(s.sample_id, s.prompt) for s in sliced] == [(s.sample_id, s.prompt) for s in plain]


@pytest.mark.parametrize(
    ("record", "field"),
    [
        ("{bad", "not valid JSON"),
        ("[1]", "list"),
        ({"driving_suggestion": 5}, "'driving suggestion'.* 5"),
        ({"driving_suggestion": "Go.", "driving_suggestion_question": 5}, "driving_suggestion: .*question.* 5"),
        ({"driving_suggestion": "Go.", "image": 5}, "image .* 5"),
        ({"general_perception": "all"}, "general_perception must be an object"),
        (
            {"general_perception": {"description and explanation": ["a"]}},
            "general_perception: .*explanation.* \\['a'\\]",
        ),
        ({"region_perception": {"7": "box"}}, "region_perception.7 must be an object"),
        (region(**{"description and explanation": 3}), "region_perception.7: .* 3"),
        (region(question=["?"]), "region_perception.7: .*question"),
        (region(box=None), "region_perception.7: box .* None"),
        (region(box=[1, 2, 3]), "region_perception.7: box"),
        (region(box=[1, 2, 3, "4"]), "region_perception.7: box"),
        (region(box=[1, 2, 0, 4]), "region_perception.7: box"),
        (region(box=[1, 2, True, 4]), "region_perception.7: box"),
        (region(box=[1, 2, float("nan"), 4]), "region_perception.7: box"),
        (region(box=[1, 2, float("inf"), 4]), "region_perception.7: box"),
        (region(box=[10**400, 2, 3, 4]), "region_perception.7: box"),
    ],
)
def test_a_broken_record_is_refused_with_file_and_field(root, record, field):
    path = save_record(root, record)
    with pytest.raises(DataError, match=f"{re.escape(str(path))}: .*{field}"):
        read_samples("coda_lm", root, "Train")


def test_a_record_that_is_not_utf8_is_refused_by_name(root):
    save_record(root, RECORD).write_bytes(b'{"driving_suggestion": "\xff"}')
    with pytest.raises(DataError, match=r"val_0001\.json: .*UTF-8"):
        read_samples("coda_lm", root, "Train")


@pytest.mark.parametrize("slices", ["{bad", "[1]", '{"val_0001": ""}', '{"val_0001": ["corner"]}'])
def test_a_broken_slice_file_is_refused(root, slices):
    save_record(root, RECORD)
    (root / "slices.json").write_text(slices)
    with pytest.raises(DataError, match=r"slices\.json"):
        read_samples("coda_lm", root, "Train")


def test_a_missing_split_a_missing_image_and_an_unknown_format_are_named(root):
    save_record(root, RECORD, name="val_0002")
    with pytest.raises(DataError, match=r"val_0002\.json: image .*0002\.jpg is missing"):
        read_samples("coda_lm", root, "Train")
    with pytest.raises(DataError, match=r"Mini: no such split folder; found \['Train'\]"):
        read_samples("coda_lm", root, "Mini")
    with pytest.raises(DataError, match=r"'yolo'.*'chat', 'coda_lm'"):
        read_samples("yolo", root, "Train")


# Identity


def test_the_sample_id_is_blake2b_of_image_prompt_answer_task_and_box(root):
    """Written out on its own: stores on disk are keyed by it, so a change of the formula must be noticed."""
    save_record(root, region(question="What?"))
    image = hashlib.blake2b((root / "val/images/0001.jpg").read_bytes(), digest_size=16).hexdigest()
    content = f'["{image}", [["user", [null, "What?"]]], "A truck.", "region", [10.0, 12.0, 20.0, 16.0]]'
    expected = hashlib.blake2b(content.encode(), digest_size=16).hexdigest()
    assert [s.sample_id for s in read_samples("coda_lm", root, "Train")] == [expected]


def test_ids_and_order_do_not_depend_on_place_name_or_writing_order(tmp_path):
    answers = [f"Answer {n}." for n in range(12)]

    def ids(root, order, names):
        for n in order:
            save_image(root, f"val/images/{names[n]}.jpg", 10 * n)
            save_record(root, {"driving_suggestion": answers[n]}, name=f"val_{names[n]}")
        return [(s.sample_id, s.answer) for s in read_samples("coda_lm", root, "Train")]

    forward = ids(tmp_path / "a", range(12), [f"{n:04d}" for n in range(12)])
    backward = ids(tmp_path / "b", reversed(range(12)), [f"{99 - n:04d}" for n in range(12)])
    assert forward == backward
    assert forward == sorted(forward)
    assert [answer for _, answer in forward] != answers, "hash order that equals file order would show nothing"


def test_the_id_changes_with_everything_a_model_sees(root):
    def sample_id(**changes):
        save_record(root, region(**changes))
        return read_samples("coda_lm", root, "Train")[0].sample_id

    ids = [sample_id(), sample_id(question="What?"), sample_id(box=[1, 2, 3, 4])]
    ids.append(sample_id(**{"description and explanation": "A van."}))
    save_image(root, "test/images/0001.jpg", 91)
    save_record(root, region(), name="test_0001", split="Test")
    ids.append(read_samples("coda_lm", root, "Test")[0].sample_id)
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch("[0-9a-f]{32}", i) for i in ids)


def test_of_equal_content_the_first_record_is_kept(root):
    (root / "val/images/0002.jpg").write_bytes((root / "val/images/0001.jpg").read_bytes())
    for name in ("val_0002", "val_0001"):
        save_record(root, {"driving_suggestion": "Stop."}, name=name)
    (sample,) = read_samples("coda_lm", root, "Train")
    assert Path(sample.meta["record"]).name == "val_0001.json"


def test_equal_regions_in_different_boxes_are_two_samples_and_in_one_box_are_one(root):
    same = {"description and explanation": "A cone."}
    save_record(root, {"region_perception": {n: same | {"box": [int(n), 2, 3, 4]} for n in "12"}})
    assert len(read_samples("coda_lm", root, "Train")) == 2
    save_record(root, {"region_perception": {n: same | {"box": [1, 2, 3, 4]} for n in "12"}})
    assert len(read_samples("coda_lm", root, "Train")) == 1


def test_each_image_is_hashed_once(root, opened):
    save_record(root, RECORD)
    assert len(read_samples("coda_lm", root, "Train")) == 4
    assert opened.count("0001.jpg") == 1


def test_all_problems_are_named_at_once(root):
    """With file and field; a record of several samples is not given up at its first problem."""
    broken = region(box=[1, 2, 0, 4]) | {"driving_suggestion": 5, "image": "val/images/9.jpg"}
    save_record(root, broken, name="val_0002")
    save_record(root, "{bad", name="val_0003")
    save_record(root, RECORD)
    with pytest.raises(DataError) as caught:
        read_samples("coda_lm", root, "Train")
    lines = str(caught.value).splitlines()
    assert "4 problem(s) in 2 record(s)" in lines[0]
    wanted = [r"val_0002\.json: image .*9\.jpg is missing", r"val_0002\.json: region_perception\.7: box .*0, 4\]"]
    wanted += [r"val_0002\.json: driving_suggestion: .* 5", r"val_0003\.json: not valid JSON"]
    assert all(re.search(pattern, line) for pattern, line in zip(wanted, lines[1:5], strict=True))
    save_chat(root, CHAT | {"image": "no.jpg", "task": ["poem"]}, CHAT | {"conversations": EXCHANGE, "slice": 0.5})
    with pytest.raises(DataError) as caught:
        read_samples("chat", root, "chat")
    found = re.findall(r"jsonl:(\d): .*(conversations|missing|poem|0\.5)", str(caught.value))
    assert found == [("1", "conversations"), ("1", "poem"), ("2", "0.5")]


def test_half_a_surrogate_pair_is_a_problem_of_its_record(root):
    """JSON lets it through; no file and no tokenizer would take it."""
    turns = [EXCHANGE[0], {"from": "gpt", "value": "\ud83d"}]
    (root / "chat.jsonl").write_text(json.dumps(CHAT | {"conversations": turns}))
    with pytest.raises(DataError, match=r"chat\.jsonl:1: answer is no valid Unicode"):
        read_samples("chat", root, "chat")


# The data root


@pytest.mark.parametrize("how", ["relative", "absolute", "through a link"])
def test_a_record_cannot_lead_outside_the_root(root, tmp_path, opened, how):
    secret = save_image(tmp_path, "outside/secret.jpg")
    (root / "shots").symlink_to(tmp_path / "outside/deeper")
    (tmp_path / "outside/deeper").mkdir()
    names = {"relative": "val/../../outside/secret.jpg", "absolute": str(secret)}
    names["through a link"] = "shots/../secret.jpg"
    save_record(root, {"driving_suggestion": "Go.", "image": names[how]})
    refused = "missing" if how == "through a link" else f"outside the data root {re.escape(str(root.resolve()))}"
    with pytest.raises(DataError, match=refused):
        read_samples("coda_lm", root, "Train")
    assert "secret.jpg" not in opened


def test_links_below_the_root_are_followed_and_other_image_roots_are_named(root, tmp_path):
    """As people link nuScenes into DriveLM's folder, or records name it by `../nuscenes/`."""
    shot = save_image(tmp_path, "nuscenes/samples/a.jpg").resolve()
    (root / "shots").symlink_to(shot.parent)
    (root / "val/images/0002.jpg").symlink_to(shot)
    for name in ("shots/a.jpg", "val/images/0002.jpg"):
        save_record(root, {"driving_suggestion": "Go.", "image": name})
        assert [s.images for s in read_samples("coda_lm", root, "Train")] == [(shot,)]
    for name in ("../nuscenes/samples/a.jpg", str(shot)):
        save_record(root, {"driving_suggestion": "Go.", "image": name})
        with pytest.raises(DataError, match=r"outside the data root .* and data\.image_roots"):
            read_samples("coda_lm", root, "Train", [tmp_path / "nuscenes/sam"])
        assert read_samples("coda_lm", root, "Train", [tmp_path / "nuscenes"])[0].images == (shot,)


def test_links_inside_the_root_and_a_linked_root_are_read(root, tmp_path):
    (root / "val/images/0002.jpg").symlink_to(root / "val/images/0001.jpg")
    save_record(root, {"driving_suggestion": "Go."}, name="val_0002")
    (tmp_path / "link").symlink_to(root)
    assert read_samples("coda_lm", root, "Train") != []
    assert read_samples("coda_lm", tmp_path / "link", "Train") != []


def test_a_path_that_cannot_be_is_refused(root):
    (root / "loop").symlink_to(root / "loop")
    for name in ("loop/a.jpg", "a" * 300, "nul\0.jpg"):
        save_record(root, {"driving_suggestion": "Go.", "image": name})
        with pytest.raises(DataError, match=r"val_0001\.json: image"):
            read_samples("coda_lm", root, "Train")


# Chat


@pytest.mark.parametrize(
    "turns",
    [
        {"conversations": EXCHANGE},
        {"messages": [{"role": "user", "content": "What is ahead?"}, {"role": "assistant", "content": "A truck."}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is ahead?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "A truck."}]},
            ]
        },
        {
            "messages": [
                {"role": "user", "content": ["What is ", "ahead?"]},
                {"role": "assistant", "content": "A truck."},
            ]
        },
        {"conversations": EXCHANGE, "images": ["val/images/0001.jpg"], "image": None},
        {"conversations": EXCHANGE, "images": None},
    ],
)
def test_all_spellings_of_a_conversation_are_the_same_sample(root, turns):
    save_chat(root, CHAT | turns)
    (sample,) = read_samples("chat", root, "chat")
    assert (sample.prompt, sample.answer, sample.task, sample.slice) == (
        "What is ahead?",
        "A truck.",
        "chat",
        "unknown",
    )
    save_chat(root, CHAT | {"conversations": EXCHANGE})
    assert sample.sample_id == read_samples("chat", root, "chat")[0].sample_id


LATER = [{"from": "human", "value": "And left?"}, {"from": "gpt", "value": "A cone."}]


@pytest.mark.parametrize(
    "record",
    [
        {"conversations": [{"from": "system", "value": "Be brief."}, *EXCHANGE, *LATER]},
        {"system": "Be brief.", "conversations": [*EXCHANGE, *LATER]},
        {
            "system": "Be brief.",
            "history": [["What is ahead?", "A truck."]],
            "query": "And left?",
            "response": "A cone.",
        },
    ],
)
def test_roles_and_earlier_answers_stay(root, record):
    save_chat(root, CHAT | record)
    (sample,) = read_samples("chat", root, "chat")
    said = [("system", ("Be brief.",)), ("user", (None, "What is ahead?")), ("assistant", ("A truck.",))]
    assert [(turn.role, turn.parts) for turn in sample.turns] == [*said, ("user", ("And left?",))]
    assert (sample.answer, sample.answers) == ("A cone.", ("A truck.", "A cone."))
    assert sample.prompt == "Be brief.\nWhat is ahead?\nA truck.\nAnd left?"


VIEWS = ("CAM_FRONT: ", None, " CAM_BACK: ", None, " What is ahead?")


@pytest.mark.parametrize(
    "record",
    [
        {"images": ["f.png", "b.png"], "query": "CAM_FRONT: <image> CAM_BACK: <image> What is ahead?"},
        {
            "images": [{"path": "f.png"}, None, "b.png"],
            "query": "CAM_FRONT: <image> CAM_BACK: <image> What is ahead?\n",
        },
        {"parts": [{"type": "image"}, {"type": "image"}], "images": ["f.png", "b.png"]},
        {"parts": [{"type": "image", "image": "f.png"}, {"type": "image", "image": "file://{root}/b.png"}]},
        {"parts": [{"type": "image_url", "image_url": {"url": "f.png"}}, {"type": "image_url", "image_url": "b.png"}]},
        {"parts": [{"type": "image", "path": "f.png"}, {"type": "image"}], "image": "b.png"},
        {"parts": [{"type": "image", "url": "f.png"}, {"type": "image", "url": "b.png"}], "images": ["f.png", "b.png"]},
    ],
)
def test_images_stay_where_the_record_has_them(root, record):
    for name in ("f.png", "b.png"):
        save_image(root, name)
    record = json.loads(json.dumps(record).replace("{root}", str(root)))
    if images := record.pop("parts", None):
        texts = [{"type": "text", "text": text} for text in VIEWS if text]
        content = [texts[0], images[0], texts[1], images[1], texts[2]]
        record |= {"messages": [{"role": "user", "content": content}]}
    save_chat(root, record | ({"response": "A car."} if "query" in record else {}))
    (sample,) = read_samples("chat", root, "chat")
    assert sample.turns[0].parts == VIEWS
    assert [path.name for path in sample.images] == ["f.png", "b.png"]


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        ("<image>\nWhat?", (None, "What?")),
        ("<image>\n<image>\n What? ", (None, None, "What?")),
        ("What?\n<image>", ("What?", None)),
        ("What?", (None, None, "What?")),
        ("A <image>\n\nB <image>\nWhat?", ("A ", None, "\n\nB ", None, "\nWhat?")),
    ],
)
def test_blanks_between_two_texts_stay_and_those_at_the_ends_go(root, value, parts):
    images = ["val/images/0001.jpg"] * max(1, parts.count(None))
    save_chat(root, {"images": images, "query": value, "response": "!"})
    assert read_samples("chat", root, "chat")[0].turns[0].parts == parts


def test_an_answer_is_not_edited_and_its_placeholder_is_none(root):
    turns = [EXCHANGE[0], {"from": "gpt", "value": "Write <image> for an image."}]
    save_chat(root, CHAT | {"conversations": turns})
    assert read_samples("chat", root, "chat")[0].answer == "Write <image> for an image."


def test_text_alone_numbers_and_questions_without_an_answer_are_samples(root):
    save_chat(
        root,
        {"query": "How many wheels has a car?", "response": 4, "task": 7, "slice": "night, rain"},
        {"messages": [{"role": "user", "content": 5}, {"role": "assistant", "content": 0.5}], "images": [None]},
        {"query": "Open?"},
        {"query": "Open too?", "response": None},
        {"messages": [{"role": "user", "content": "Open as well?"}, {"role": "assistant", "content": None}]},
    )
    samples = {sample.prompt: sample for sample in read_samples("chat", root, "chat")}
    assert {prompt: sample.answer for prompt, sample in samples.items()} == {
        "How many wheels has a car?": "4", "5": "0.5", "Open?": "", "Open too?": "", "Open as well?": "",
    }  # fmt: skip
    wheels = samples["How many wheels has a car?"]
    assert (wheels.images, wheels.task, wheels.slice) == ((), "7", "night, rain")


@pytest.mark.parametrize("form", ["array", "array on lines", "lines in .json", "parquet", "parts"])
def test_every_kind_of_file_holds_the_same_samples(root, form):
    records = [
        {"id": i, "image": "val/images/0001.jpg", "query": f"Question {i}?", "response": "Yes."} for i in range(5)
    ]
    save_chat(root, *records)
    wanted = read_samples("chat", root, "chat")
    lines = [json.dumps(record) for record in records]
    if form == "array":
        (root / "a.json").write_text("\ufeff" + json.dumps(records, indent=1))
    elif form == "array on lines":
        (root / "a.json").write_text("[\n" + ",\n".join(lines) + "\n]\n")
    elif form == "lines in .json":
        (root / "a.json").write_text("\n".join(lines))
    elif form == "parquet":
        pq.write_table(pa.Table.from_pylist(records), root / "a.parquet")
    else:
        for part in range(2):
            pq.write_table(pa.Table.from_pylist(records[part::2]), root / f"a-0000{part}-of-00002.parquet")
    found = read_samples("chat", root, "a")
    assert [(s.sample_id, s.turns, s.meta["id"]) for s in found] == [
        (s.sample_id, s.turns, s.meta["id"]) for s in wanted
    ]
    assert READERS["chat"].splits(root) == (["chat"] if form == "lines in .json" else ["a", "chat"])


def test_what_is_broken_in_an_array_is_named_by_its_number(root):
    good = json.dumps({"query": "a?", "response": "b"})
    (root / "a.json").write_text(f'[{good}, 5, {good}, {{"query": }}, {good}]')
    with pytest.raises(DataError) as caught:
        read_samples("chat", root, "a")
    assert re.findall(r"a\.json:(\d): (a record is an object|not valid JSON)", str(caught.value)) == [
        ("2", "a record is an object"),
        ("4", "not valid JSON"),
    ]
    (root / "b.json").write_text(f"[{good}\n{good}]")
    with pytest.raises(DataError, match=r"b\.json:1: not valid JSON: neither `,` nor `\]`"):
        read_samples("chat", root, "b")
    (root / "c.parquet").write_bytes(b"no")
    with pytest.raises(DataError, match=r"c\.parquet: cannot be read as Parquet"):
        read_samples("chat", root, "c")
    (root / "c.json").write_text("[]")
    with pytest.raises(DataError, match=r"c\.json, c\.parquet could all be split 'c'"):
        read_samples("chat", root, "c")


def test_several_images_keep_their_order(root):
    save_image(root, "val/images/0002.jpg", 1)
    names = ["val/images/0002.jpg", "val/images/0001.jpg"]
    save_chat(root, {"images": names, "query": "What is ahead?", "response": "A truck."})
    (sample,) = read_samples("chat", root, "chat")
    assert [p.name for p in sample.images] == ["0002.jpg", "0001.jpg"]
    assert [load_image(sample, i).getpixel((0, 0))[0] < 50 for i in (0, 1)] == [True, False]


@pytest.mark.parametrize("separator", ["\u2028", "\x85", "\u2029"])
def test_unicode_line_separators_inside_a_text_do_not_end_the_line(root, separator):
    turns = [EXCHANGE[0], {"from": "gpt", "value": f"One{separator}two"}]
    save_chat(root, CHAT | {"conversations": turns})
    assert read_samples("chat", root, "chat")[0].answer == f"One{separator}two"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (CHAT, "conversations"),
        (CHAT | {"messages": "hello"}, "list of turns"),
        (CHAT | {"conversations": ["hi"]}, "a turn is an object"),
        (
            CHAT | {"conversations": [*EXCHANGE, {"from": "system", "value": "Stop."}]},
            "last turn must be the assistant's",
        ),
        (CHAT | {"conversations": [*EXCHANGE[:1], {"from": "gpt", "value": " "}, *LATER]}, "turn 2: .*says nothing"),
        (CHAT | {"conversations": EXCHANGE[1:]}, "needs a user's turn"),
        (CHAT | {"conversations": [{"from": "human", "value": "<image>"}, EXCHANGE[1]]}, "needs a user's turn"),
        (CHAT | {"conversations": [{"from": "robot", "value": "hi"}, EXCHANGE[1]]}, "turn 1: its role must be .*robot"),
        (CHAT | {"messages": [{"role": "user", "content": True}, EXCHANGE[1]]}, "turn 1: its content .*True"),
        (
            CHAT | {"messages": [{"role": "user", "content": [{"type": "video"}]}, EXCHANGE[1]]},
            "turn 1: its content .*video",
        ),
        (without(CHAT, "image") | {"conversations": EXCHANGE}, r"1 place\(s\) for images .*, but 0 image"),
        (CHAT | {"image": [3], "conversations": EXCHANGE}, "an image must be a path, got 3"),
        (CHAT | {"task": ["poem"], "conversations": EXCHANGE}, "task .*poem"),
        (CHAT | {"slice": "a\nb", "conversations": EXCHANGE}, "slice .*a.nb"),
        (CHAT | {"images": ["val/images/0001.jpg"] * 2, "conversations": EXCHANGE}, r"1 place\(s\) .* 2 image"),
        (CHAT | {"query": "<image> <image>", "response": "!"}, "needs a user's turn with text"),
        (CHAT | {"query": "<image> or <image>?", "response": "!"}, r"2 place\(s\) .* 1 image"),
        (CHAT | {"system": "See <image>.", "conversations": EXCHANGE}, "image in the system's turn"),
        (CHAT | {"image": "https://x.org/a.jpg", "conversations": EXCHANGE}, "only files are read"),
        (CHAT | {"image": "data:image/png;base64,AA", "conversations": EXCHANGE}, "only files are read"),
        (CHAT | {"video": "a.mp4", "conversations": EXCHANGE}, "`video`: only images are read"),
        (CHAT | {"history": ["a"], "query": "b", "response": "c"}, "`history`"),
        (CHAT | {"image": "../secret.jpg", "conversations": EXCHANGE}, "outside the data root"),
        (CHAT | {"image": "val/images/9.jpg", "conversations": EXCHANGE}, r"9\.jpg is missing"),
    ],
)
def test_a_broken_chat_record_is_refused_with_file_and_line(root, record, message):
    save_chat(root, CHAT | {"conversations": EXCHANGE}, record)
    with pytest.raises(DataError, match=rf"chat\.jsonl:2: .*{message}"):
        read_samples("chat", root, "chat")


def test_broken_and_missing_chat_files_are_named(root):
    (root / "chat.jsonl").write_text('\n\n{"id": ')
    with pytest.raises(DataError, match=r"chat\.jsonl:3: not valid JSON"):
        read_samples("chat", root, "chat")
    with pytest.raises(DataError, match=r"has none of no\.jsonl, no\.json, no\.parquet"):
        read_samples("chat", root, "no")
    (root / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="'empty': no samples"):
        read_samples("chat", root, "empty")


# Images


@pytest.mark.parametrize(("size", "width"), [((64, 48), 2), ((640, 400), 2), ((640, 400), 4)])
def test_the_region_is_outlined_in_red_and_nothing_else_changes(tmp_path, size, width):
    path = tmp_path / "a.png"
    pixels = np.random.default_rng(0).integers(0, 200, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    x, y, w, h = 10, 12, 30, 20
    expected = pixels.copy()
    expected[y : y + h + 1, x : x + w + 1] = (255, 0, 0)
    inner = np.s_[y + width : y + h + 1 - width, x + width : x + w + 1 - width]
    expected[inner] = pixels[inner]
    marked = load_image(sample_of(path, (float(x), float(y), float(w), float(h))), box_width=width)
    np.testing.assert_array_equal(np.asarray(marked), expected)
    np.testing.assert_array_equal(np.asarray(load_image(sample_of(path))), pixels)


def test_the_rectangle_leaves_a_small_thing_to_be_seen(tmp_path):
    """A bollard of CODA's in a camera's picture: CODA-LM's own line covers 37% of it."""
    path = tmp_path / "a.png"
    Image.new("RGB", (1600, 900)).save(path)
    marked = np.asarray(load_image(sample_of(path, (800.0, 400.0, 12.0, 41.0))))
    covered = (marked[400:442, 800:813] == (255, 0, 0)).all(-1).mean()
    assert 0.3 < covered < 0.4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_before_anything_else(tmp_path, orientation):
    """As a viewer shows them; a region is one of the turned picture."""
    pixels = np.random.default_rng(0).integers(0, 200, (24, 40, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    turned = {
        1: pixels, 2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 4: pixels[::-1], 5: pixels.transpose(1, 0, 2),
        6: pixels[::-1].transpose(1, 0, 2), 7: pixels[::-1, ::-1].transpose(1, 0, 2),
        8: pixels[:, ::-1].transpose(1, 0, 2),
    }[orientation]  # fmt: skip
    np.testing.assert_array_equal(np.asarray(load_image(sample_of(tmp_path / "a.png"))), turned)
    with Image.open(tmp_path / "a.png") as file:
        assert turned_size(file) == (turned.shape[1], turned.shape[0])
    if orientation == 6:  # upright: the place is inside only once it is turned
        assert load_image(sample_of(tmp_path / "a.png", (2.0, 30.0, 8.0, 8.0))).getpixel((2, 30)) == (255, 0, 0)


@pytest.mark.parametrize("kind", ["a.png", "a.tiff"])
def test_grey_of_16_bits_is_scaled_to_8(tmp_path, kind):
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(ramp).save(tmp_path / kind)
    found = np.asarray(load_image(sample_of(tmp_path / kind)))
    np.testing.assert_array_equal(found, np.rint(ramp[..., None].repeat(3, -1) * (255 / 65535)))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / "a.tiff"
    Image.new(mode, (8, 6)).save(path)
    image = load_image(sample_of(path))
    assert (image.mode, image.size) == ("RGB", (8, 6))


@pytest.mark.parametrize("box", [(64.0, 5.0, 10.0, 10.0), (5.0, 50.0, 10.0, 10.0), (-20.0, 5.0, 10.0, 10.0)])
def test_a_region_outside_the_image_is_refused(root, box):
    with pytest.raises(DataError, match=r"0001\.jpg: box .* outside the image of 64 x 48"):
        load_image(sample_of(root / "val/images/0001.jpg", box))


def test_too_many_pixels_are_refused_before_decoding(tmp_path):
    """The file holds no pixels at all: decoding it would be another error."""
    path = tmp_path / "bomb.png"
    path.write_bytes(png(8001, 8000))
    with pytest.raises(DataError, match=rf"bomb\.png: 8001 x 8000 pixels, at most {MAX_IMAGE_PIXELS}"):
        load_image(sample_of(path))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(10_000, 10_000), (30_000, 30_000)])
def test_sizes_that_pillow_itself_refuses_are_reported_alike(tmp_path, size):
    path = tmp_path / "bomb.png"
    path.write_bytes(png(*size))
    with pytest.raises(DataError, match=rf"bomb\.png: (?=.*{size[0]}|.*{size[0] ** 2}).*{MAX_IMAGE_PIXELS}"):
        load_image(sample_of(path))


@pytest.mark.parametrize("content", [b"", b"no image", png(8, 6), png(8, 6, bytes(150))[:-30]])
def test_an_unreadable_image_is_refused_with_file_and_sample(tmp_path, content):
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"s0: .*a\.jpg: cannot be read as an image"):
        load_image(sample_of(path))


def test_an_image_that_vanished_is_refused_with_its_sample(tmp_path):
    with pytest.raises(DataError, match=r"gone\.jpg: cannot be read.*s0"):
        load_image(sample_of(tmp_path / "gone.jpg"))


def test_damaged_images_never_raise_anything_else(tmp_path):
    """Pillow lets SyntaxError, ValueError and others through on some damage."""
    path, random = tmp_path / "a.png", np.random.default_rng(0)
    whole = png(8, 6, bytes(150))
    outcomes = set()
    for _ in range(400):
        damaged = np.frombuffer(whole, dtype=np.uint8).copy()
        damaged[random.integers(8, len(damaged), 3)] = random.integers(0, 256, 3)
        path.write_bytes(damaged.tobytes())
        try:
            load_image(sample_of(path))
            outcomes.add("read")
        except DataError:
            outcomes.add("refused")
    assert "refused" in outcomes
