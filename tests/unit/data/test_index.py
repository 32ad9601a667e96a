"""The index against the plain reader, which shares with it the readers and nothing behind them."""

import errno
import fcntl
import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.cli import main
from pipeline.data.index import build, lock, tables
from pipeline.data.index.images import ImageHashes
from pipeline.data.index.samples import sample_ids, select, sizes, words
from pipeline.data.readers import read_samples
from pipeline.data.splits import open_split, open_training_split
from pipeline.errors import DataError, UserError
from pipeline.recipe import Recipe, load_recipe
from pipeline.targets.identity import dataset_fingerprint
from tests.helpers.index_memory import held_bytes
from tests.helpers.paths import ROOT

SAMPLES, IMAGES = 60, 24


def save_image(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (value, 7, 9)).save(path)


def chat_record(number: int, **changes: object) -> dict[str, object]:
    """Of one or two images; texts that are no ASCII; answers that come twice."""
    turns = [("user", f"What is it? é {number % 7}\u2028"), ("assistant", f"Nr. {number // 2} 🚗")]
    images = [f"{number % IMAGES}.png", *([f"{(number + 5) % IMAGES}.png"] if number % 3 == 0 else [])]
    messages = [{"role": role, "content": text} for role, text in turns]
    record = {"id": f"c{number}", "images": images, "messages": messages}
    return record | ({"task": "general", "slice": "corner"} if number % 4 == 0 else {}) | changes


def write_chat(run: Path, records: list[dict[str, object]], split: str = "train") -> None:
    (run / "data" / f"{split}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def run(tmp_path) -> Path:
    """A run folder with a chat data set."""
    for number in range(IMAGES):
        save_image(tmp_path / "data" / f"{number}.png", number)
    write_chat(tmp_path, [chat_record(number) for number in range(SAMPLES)])
    return tmp_path


def recipe_of(run: Path, *overrides: str) -> Recipe:
    data = {"format": "chat", "root": str(run / "data"), "train_split": "train"}
    path = run / "recipe.yaml"
    path.write_text(json.dumps({"run": {"dir": str(run / "run")}, "data": data}))
    return load_recipe(path, overrides)


def plain(run: Path, split: str = "train") -> list:
    return read_samples("chat", run / "data", split)


@pytest.fixture
def small_steps(monkeypatch):
    """So many batches, buckets and passes as a large data set has."""
    monkeypatch.setattr(tables, "ROWS", 8)
    monkeypatch.setattr(build, "_PASS", 7)
    monkeypatch.setattr(tables, "_BUCKET_ROWS", 2)


@pytest.fixture
def reads(monkeypatch):
    """Images whose bytes are read."""
    names = []
    read_bytes = Path.read_bytes

    def recording(path):
        names.extend([path.name] if path.suffix == ".png" else [])
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", recording)
    return names


# What it holds


def test_it_is_the_sequence_that_the_plain_reader_gives(run, small_steps):
    samples, index = plain(run), open_split(recipe_of(run), "train")
    assert len(samples) == SAMPLES
    assert list(index) == samples
    assert [index[i] for i in range(-SAMPLES, SAMPLES)] == samples + samples
    assert list(index[5:40:3]) == samples[5:40:3] and list(index[::-1]) == samples[::-1]
    for place in (SAMPLES, -SAMPLES - 1):
        with pytest.raises(IndexError):
            index[place]


def test_coda_lm_comes_back_with_boxes_fields_and_slices(tmp_path, small_steps):
    records = tmp_path / "data" / "CODA-LM" / "Train"
    records.mkdir(parents=True)
    for number in range(20):
        save_image(tmp_path / "data/val/images" / f"{number:04d}.jpg", number * 12)
        regions = {str(n): {"description and explanation": f"{n}", "box": [n, 2.25, 3, 1e-3]} for n in range(3)}
        record = {"region_perception": regions, "driving_suggestion": "Go." if number % 2 else None}
        (records / f"val_{number:04d}.json").write_text(json.dumps(record))
    (tmp_path / "data" / "slices.json").write_text(json.dumps({"val_0003": "corner", "val_0004": "regular"}))
    recipe = load_recipe(write_coda_recipe(tmp_path))
    samples = read_samples("coda_lm", tmp_path / "data", "Train")
    index = open_split(recipe, "Train")
    assert list(index) == samples and len(samples) == 80
    assert len(index.unanswered()) == 10


def write_coda_recipe(folder: Path) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(json.dumps({"run": {"dir": str(folder / "run")}, "data": {"root": str(folder / "data")}}))
    return path


def test_columns_are_those_of_the_samples(run, small_steps):
    write_chat(run, [chat_record(n) for n in range(SAMPLES - 2)] + [empty_answer(n) for n in (98, 99)])
    samples, index = plain(run), open_split(recipe_of(run), "train")
    chosen = np.random.default_rng(0).permutation(SAMPLES)[:30]
    for whole, part in ((samples, index), (select(samples, chosen), index.select(chosen))):
        assert list(part) == whole
        assert list(part.sample_ids) == sample_ids(whole) == [part.sample_ids[i] for i in range(len(whole))]
        assert part.fingerprint == dataset_fingerprint(whole) == dataset_fingerprint(part)
        for name in ("task", "slice"):
            assert list(part.words(name)) == words(whole, name)
        places = np.arange(len(whole))[::-1]
        np.testing.assert_array_equal(part.sizes(places), sizes(whole, places))
        assert part.unanswered().tolist() == [i for i, s in enumerate(whole) if not s.answer]
        assert part.places(part.sample_ids[::-1]).tolist() == places.tolist()
    assert {len(s.images) for s in samples} == {1, 2}
    for missing in ("0" * 32, "f" * 32):
        with pytest.raises(KeyError, match=missing):
            index.places([samples[3].sample_id, missing])
    with pytest.raises(KeyError):
        index[:5].places([samples[7].sample_id])
    with pytest.raises(IndexError, match=str(SAMPLES)):
        index.select([SAMPLES])


def empty_answer(number: int) -> dict[str, object]:
    turns = (("user", f"{number}?"), ("assistant", ""))
    return chat_record(number, messages=[{"role": role, "content": text} for role, text in turns])


@pytest.mark.slow
def test_it_goes_to_other_processes_without_its_samples(run):
    """As a loader's workers, spawned or forked, and other ranks get it."""
    index = open_split(recipe_of(run), "train")
    content = pickle.dumps(index[3:50])
    assert len(content) < 2000
    assert pickle.loads(pickle.dumps(index[49])) == index[49]
    code = f"import pickle; print(pickle.loads({content!r})[-1].sample_id)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [index[49].sample_id]


def test_what_a_rank_holds_does_not_grow_with_the_samples(run):
    """Open, go through all ids, look at lengths and read a few: less than ten bytes a sample, none of them Arrow's."""
    count = 4000
    write_chat(run, [chat_record(number) for number in range(count)])
    content = pickle.dumps(open_split(recipe_of(run), "train"))
    held = held_bytes(
        content, lambda index: len(index) == count and bool(index[7].answer) and not len(index.unanswered())
    )
    assert held < 10 * count


# When it is made, and what is read for it


def test_no_image_and_no_record_is_read_again_to_open_it(run, reads, monkeypatch):
    samples, recipe = plain(run), recipe_of(run)
    reads.clear()
    assert list(open_split(recipe, "train")) == samples
    assert sorted(reads) == sorted(f"{n}.png" for n in range(IMAGES)), "each image once"
    reads.clear()
    monkeypatch.setattr(build, "make", None)
    assert list(open_split(recipe, "train")) == samples
    assert list(open_split(recipe, "train", look_at_images=True)) == samples
    assert reads == []


def test_what_has_changed_is_read_and_said(run, reads, capsys, small_steps):
    recipe = recipe_of(run)
    open_split(recipe, "train")
    records = [chat_record(number) for number in range(SAMPLES)]
    records[7] = chat_record(7, messages=chat_record(1007)["messages"])
    kept = records[1:]
    write_chat(run, [*kept, chat_record(500), chat_record(501)])
    save_image(run / "data" / "3.png", 200)
    wanted = plain(run)
    reads.clear()
    capsys.readouterr()
    assert list(open_split(recipe, "train")) == wanted
    assert reads == ["3.png"]
    of_image = sum("3.png" in record["images"] for record in kept)
    assert of_image > 2
    said = capsys.readouterr().out
    assert f"2 added, 1 removed, {1 + of_image} changed" in said, "the lines have moved, the records have not"
    assert "1 of them read" in said


def test_a_changed_image_is_found_when_images_are_looked_at(run, reads):
    """The start of a stage looks at none: a million files are too many to ask for each time."""
    recipe = recipe_of(run)
    before = list(open_split(recipe, "train"))
    save_image(run / "data" / "3.png", 200)
    reads.clear()
    assert list(open_split(recipe, "train")) == before
    assert reads == []
    now = list(open_split(recipe, "train", look_at_images=True))
    assert reads == ["3.png"]
    assert now == plain(run) != before


def test_an_image_that_is_only_newer_is_read_and_nothing_changes(run, reads, capsys):
    recipe = recipe_of(run)
    before = list(open_split(recipe, "train"))
    os.utime(run / "data" / "3.png", ns=(1, 1))
    reads.clear()
    assert list(open_split(recipe, "train", look_at_images=True)) == before
    assert reads == ["3.png"]
    assert "0 added, 0 removed, 0 changed" in capsys.readouterr().out


@pytest.mark.slow
def test_who_has_opened_it_keeps_it_while_it_is_made_again(run):
    recipe, before = recipe_of(run), plain(run)
    index, content = open_split(recipe, "train"), pickle.dumps(open_split(recipe, "train"))
    write_chat(run, [chat_record(number) for number in range(5)])
    assert len(open_split(recipe, "train")) == 5
    assert list(index) == before
    code = f"import pickle; print(len(pickle.loads({content!r})))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(SAMPLES)], "another rank opens it a moment later"
    write_chat(run, [chat_record(number) for number in range(6)])
    open_split(recipe, "train")
    tables = [path for path in (run / "run/index/train").iterdir() if path.name.startswith("samples-")]
    assert len(tables) == 2, "the newest and the one before"
    assert list(index) == before and list(index[:9]) == before[:9]


@pytest.mark.parametrize("how", ["samples cut", "images cut", "gone", "no JSON", "no object", "another version"])
def test_a_damaged_index_is_made_again(run, how, capsys):
    recipe, samples, folder = recipe_of(run), plain(run), run / "run/index/train"
    open_split(recipe, "train")
    about = json.loads((folder / "index.json").read_text())
    if "cut" in how:
        os.truncate(folder / about["rows" if "samples" in how else "image_table"], 1000)
    elif how == "gone":
        (folder / about["rows"]).unlink()
    else:
        about["identity"]["version"] = -1
        text = {"another version": json.dumps(about), "no JSON": "{", "no object": "[1]"}[how]
        (folder / "index.json").write_text(text)
    capsys.readouterr()
    assert list(open_split(recipe, "train")) == samples
    assert "index made" in capsys.readouterr().out


def clkd(*words: object, before: str = "") -> subprocess.CompletedProcess[str]:
    """The command, after some code."""
    code = f"{before}\nfrom pipeline.cli import entry\nentry()"
    command = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


# Interrupted, and two at once

LOGGED = """
import os, sys, time
from pathlib import Path
from pipeline.data.index import build, images
build._PASS = 5
hashed, log = images.hash_image, open({log!r}, "a", buffering=1)
def logged(path):
    print(path.name, file=log)
    {then}
    return hashed(path)
images.hash_image = logged
"""
"""Writes down the images that a process reads."""


@pytest.mark.slow
def test_what_was_read_before_kill_9_is_not_read_again(run, tmp_path):
    recipe, log = recipe_of(run), tmp_path / "reads"
    killed = "if len(open(log.name).readlines()) == 15: os.kill(os.getpid(), 9)"
    done = clkd("index", run / "recipe.yaml", before=LOGGED.format(log=str(log), then=killed))
    assert done.returncode == -signal.SIGKILL
    folder = run / "run/index/train"
    assert list(folder.glob(".making-*")) and not (folder / "index.json").exists()
    assert clkd("index", run / "recipe.yaml", before=LOGGED.format(log=str(log), then="")).returncode == 0
    read = log.read_text().split()
    assert set(read) == {f"{n}.png" for n in range(IMAGES)}
    assert len(read) <= IMAGES + 15 - 7, "at most the pass that was killed is read again"
    assert list(open_split(recipe, "train")) == plain(run)
    left = {path.name.split("-")[0] for path in folder.iterdir()}
    assert left == {"index.json", "samples", "images", "lock"}


def test_a_line_that_was_being_written_is_no_hash(tmp_path):
    save_image(tmp_path / "a.png", 1)
    whole = json.dumps([str(tmp_path / "a.png"), 5, 6, "ab" * 16])
    for content in (whole[:-4], whole.replace("ab" * 16, "\0" * 8), "[]", "3", whole.replace("ab" * 16, "ab")):
        (tmp_path / "journal").write_text(f"{content}\n{whole.replace('a.png', 'b.png')}\n")
        hashes = ImageHashes(tmp_path)
        hashes.know_journal(tmp_path / "journal")
        assert hashes._known(tmp_path / "a.png") is None and hashes._known(tmp_path / "b.png") == (5, 6)


@pytest.mark.slow
def test_of_several_processes_one_makes_it_and_the_others_wait(run, tmp_path):
    recipe_of(run)
    log = tmp_path / "reads"
    code = LOGGED.format(log=str(log), then="time.sleep(0.05)") + "\nfrom pipeline.cli import entry\nentry()"
    command = [sys.executable, "-c", code, "index", str(run / "recipe.yaml"), "--split", "train"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = [subprocess.Popen(command, cwd=ROOT, **pipes) for _ in range(3)]
    ended = [process.communicate() for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], ended
    assert sorted(log.read_text().split()) == sorted(f"{n}.png" for n in range(IMAGES))
    assert sum("index made" in out for out, _ in ended) == 1
    assert sum(f"{SAMPLES} samples: " in out for out, _ in ended) == 3


def test_a_holder_without_a_sign_of_life_is_given_up(run, monkeypatch, capsys):
    recipe, folder = recipe_of(run), run / "run/index/train"
    monkeypatch.setattr(lock, "SILENT_S", 0.5)
    folder.mkdir(parents=True)
    with (folder / "lock").open("w") as file:
        file.write("process 7 on node3")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=r"process 7 on node3 .* no sign of life for 0\.5 s"):
            open_split(recipe, "train")
        assert "waiting for process 7 on node3" in capsys.readouterr().err
    assert len(open_split(recipe, "train")) == SAMPLES


def test_without_locks_it_is_made_all_the_same(run, monkeypatch):
    def refused(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refused)
    leftover = run / "run/index/train/.making-other"
    leftover.mkdir(parents=True)
    assert list(open_split(recipe_of(run), "train")) == plain(run)
    assert leftover.is_dir(), "it may be another process's that works at the same time"


def test_a_folder_that_cannot_be_written_is_named(run, monkeypatch):
    (run / "file").write_text("")
    with pytest.raises(DataError, match=r"file/train: the index cannot be written.*Let data\.index name"):
        open_split(recipe_of(run, f"data.index={run / 'file'}"), "train")

    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(build, "write_json", full)
    with pytest.raises(DataError, match=r"train: the index cannot be written: .*No space left"):
        open_split(recipe_of(run), "train")


# What is wrong with the data


def broken(number: int) -> dict[str, object]:
    changes = [{"image": "no.png", "images": None}, {"messages": 5}, {"task": ["poem"], "slice": 0.5}]
    return chat_record(number, **changes[number % 3])


def test_all_problems_are_named_and_written_down(run):
    write_chat(run, [chat_record(n) if n % 2 else broken(n) for n in range(SAMPLES)])
    recipe, path = recipe_of(run), run / "run/index/train/problems.jsonl"
    with pytest.raises(DataError) as caught:
        open_split(recipe, "train")
    said = str(caught.value).splitlines()
    assert "40 problem(s) in 30 record(s)" in said[0] and "and 20 more" in said[-2]
    assert f"{path} lists them all" in said[-1] and "data.bad_samples=skip" in said[-1]
    listed = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(listed) == 40
    assert {(p["record"].rpartition(":")[2], p["field"]) for p in listed[:4]} == {
        ("1", "image"), ("3", "task"), ("3", "slice"), ("5", "conversations")
    }  # fmt: skip
    assert listed[0]["problem"] in said[1]
    assert not (run / "run/index/train/index.json").exists()
    write_chat(run, [chat_record(n) for n in range(SAMPLES)])
    assert list(open_split(recipe, "train")) == plain(run)
    assert not path.exists()


def test_broken_records_are_left_out_when_asked(run, reads, capsys):
    good = [chat_record(n) for n in range(1, SAMPLES, 2)]
    write_chat(run, good)
    wanted = [(s.sample_id, s.answer) for s in plain(run)]
    write_chat(run, [chat_record(n) if n % 2 else broken(n) for n in range(SAMPLES)])
    skipping = recipe_of(run, "data.bad_samples=skip")
    for _ in range(2):
        capsys.readouterr()
        index = open_split(skipping, "train")
        assert [(s.sample_id, s.answer) for s in index] == wanted
        assert "30 broken record(s) left out" in capsys.readouterr().out
    assert len((run / "run/index/train/problems.jsonl").read_text().splitlines()) == 40
    with pytest.raises(DataError, match=r"40 problem\(s\) in 30 record"):
        open_split(recipe_of(run), "train")
    save_image(run / "data/no.png", 3)
    reads.clear()
    assert len(open_split(skipping, "train", look_at_images=True)) == 40, "the image that was missing is found"
    assert reads == ["no.png"]


def test_nothing_left_is_no_data_set(run):
    write_chat(run, [broken(n) for n in range(4)])
    with pytest.raises(DataError, match=r"no samples\..* 4 broken record\(s\) were left out"):
        open_split(recipe_of(run, "data.bad_samples=skip"), "train")


def test_an_image_that_cannot_be_read_is_a_problem_of_each_of_its_records(run, monkeypatch):
    read_bytes = Path.read_bytes

    def refusing(path):
        if path.name == "3.png":
            raise PermissionError(13, "Permission denied", str(path))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", refusing)
    records = [chat_record(n) for n in range(SAMPLES)]
    having = sum("3.png" in record["images"] for record in records)
    with pytest.raises(DataError, match=rf"{having} problem\(s\) in {having} record\(s\):\n.*3\.png: cannot be read"):
        open_split(recipe_of(run), "train")


def test_equal_records_are_counted_and_the_first_is_kept(run, capsys, small_steps):
    write_chat(run, [chat_record(n // 2, id=f"c{n}") for n in range(SAMPLES)])
    index = open_split(recipe_of(run), "train")
    assert list(index) == plain(run)
    assert {sample.meta["id"] for sample in index} == {f"c{n}" for n in range(0, SAMPLES, 2)}
    assert "30 duplicate(s) left out" in capsys.readouterr().out


def test_training_wants_an_answer_of_every_sample(run, capsys):
    write_chat(run, [chat_record(n) if n % 5 else empty_answer(n) for n in range(SAMPLES)])
    with pytest.raises(DataError, match=r"12 of 60 samples have an empty answer: .*train\.jsonl:\d+, c\d+.* 9 more"):
        open_training_split(recipe_of(run))
    samples = open_training_split(recipe_of(run, "data.bad_samples=skip"))
    assert list(samples) == [sample for sample in plain(run) if sample.answer]
    assert "12 sample(s) with an empty answer left out" in capsys.readouterr().out


# Where it lies, and the command


def test_runs_on_the_same_data_share_an_index_and_others_do_not(run, tmp_path, reads):
    shared = f"data.index={tmp_path / 'shared'}"
    open_split(recipe_of(run, shared), "train")
    reads.clear()
    assert len(open_split(recipe_of(run, shared, f"run.dir={tmp_path / 'second'}"), "train")) == SAMPLES
    assert reads == []
    other = tmp_path / "other"
    save_image(other / "data/0.png", 1)
    write_chat(other, [chat_record(24)])
    with pytest.raises(DataError, match=rf"root: index '{run / 'data'}', recipe '{other / 'data'}'"):
        open_split(recipe_of(other, shared), "train")


def test_the_command_makes_every_split_that_is_there(run, capsys):
    recipe_of(run)
    write_chat(run, [chat_record(n) for n in range(9)], "Test")
    main(["index", str(run / "recipe.yaml")])
    said = capsys.readouterr().out
    assert "split 'val': is not there" in said
    assert "60 samples: chat unknown 45, general corner 15" in said and "9 samples: " in said
    write_chat(run, [broken(1)])
    write_chat(run, [broken(2)], "Test")
    with pytest.raises(DataError, match=r"(?s)split 'train': 1 problem.*split 'Test': 2 problem"):
        main(["index", str(run / "recipe.yaml")])
    with pytest.raises(DataError, match=r"has none of val\.jsonl"):
        main(["index", str(run / "recipe.yaml"), "--split", "val"])
