"""An index made from others, against the samples themselves."""

import dataclasses
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data.index import tables
from pipeline.data.index.derived import open_derived
from pipeline.data.index.samples import from_pool
from pipeline.data.sample import LABELLED, POOL
from pipeline.data.splits import open_split
from pipeline.recipe import load_recipe
from tests.helpers.index_memory import held_bytes

COUNT, IMAGES = 50, 6


def write(root: Path, split: str, count: int, first: int, images: int = IMAGES) -> None:
    """Every other record has no answer; records have two images."""
    lines = []
    for i in range(first, first + count):
        turns = [{"role": "user", "content": f"What is it? ({i})"}, {"role": "assistant", "content": f"Nr. {i}"}]
        names = [f"{split}{(i + k) % images}.png" for k in range(2)]
        lines.append(json.dumps({"id": f"r{i}", "images": names, "messages": turns[: 1 + i % 2]}))
    (root / f"{split}.jsonl").write_text("\n".join(lines))
    for k in range(images):
        Image.new("RGB", (8, 8), (first % 250, k, 9)).save(root / f"{split}{k}.png")


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """Two splits of one data set, as if they were large."""
    monkeypatch.setattr(tables, "ROWS", 8)
    monkeypatch.setattr(tables, "_BUCKET_ROWS", 2)
    data = {"format": "chat", "root": str(tmp_path), "train_split": "a"}
    for split, first in (("a", 0), ("b", 100)):
        write(tmp_path, split, COUNT, first)
    (tmp_path / "recipe.yaml").write_text(json.dumps({"run": {"dir": str(tmp_path / "run")}, "data": data}))
    recipe = load_recipe(tmp_path / "recipe.yaml")
    return [open_split(recipe, split) for split in ("a", "b")]


def changed(row):
    """Labelled rows as they are; of the others some left out, some answered twice."""
    if not row["pool"]:
        return [row]
    if row["sample_id"][0] % 4 == 0:
        return "by lot"
    answered = row | {"answer": "Yes.", "characters": row["characters"] + 4, "answered": True}
    return [answered, answered | {"sample_id": row["sample_id"][::-1]}]


def test_rows_are_changed_multiplied_and_left_out_and_stay_in_order(opened, tmp_path):
    index = open_derived(tmp_path / "derived", opened, {"by": 1}, changed, "test")
    wanted, lost = {}, 0
    for sample in (s for base in opened for s in base):
        raw = bytes.fromhex(sample.sample_id)
        if sample.source == LABELLED:
            wanted[sample.sample_id] = sample
        elif raw[0] % 4 == 0:
            lost += 1
        else:
            for sample_id in (raw.hex(), raw[::-1].hex()):
                wanted[sample_id] = dataclasses.replace(sample, sample_id=sample_id, answer="Yes.")
    assert list(index) == [wanted[i] for i in sorted(wanted)] and lost > 5
    assert index.about.left_out == {"by lot": lost}
    assert [s.source == POOL for s in index] == from_pool(index).tolist() and from_pool(index).any()
    assert [s.images for s in index] == [wanted[i].images for i in sorted(wanted)]
    assert {path.name[0] for s in index for path in s.images} == {"a", "b"}
    images, characters = index.sizes(np.arange(len(index)))
    assert set(images) == {2} and characters.tolist() == [s.characters for s in index]


def test_it_is_made_once_for_what_it_is_made_of(opened, tmp_path):
    folder, made = tmp_path / "derived", []

    def noting(row):
        made.append(row["sample_id"])
        return changed(row)

    first = open_derived(folder, opened, {"by": 1}, noting, "test")
    assert len(made) == 2 * COUNT
    assert list(open_derived(folder, opened, {"by": 1}, noting, "test")) == list(first)
    assert len(made) == 2 * COUNT, "made a second time"
    open_derived(folder, opened, {"by": 2}, noting, "test")
    open_derived(folder, opened[:1], {"by": 2}, noting, "test")
    assert len(made) == 5 * COUNT
    assert len(list(folder.glob("*.arrow"))) <= 4
    assert list(first), "what is open stays readable"
    next(folder.glob("samples-*")).write_bytes(b"torn")
    for path in folder.glob("images-*"):
        path.unlink()
    again = open_derived(folder, opened[:1], {"by": 2}, changed, "test")
    assert len(again) > COUNT / 2 and all(s.images for s in again)


def test_the_fingerprint_tells_answers_apart_and_records_alone_have_none(opened, tmp_path):
    def say(text):
        return lambda row: [row | {"answer": text, "answered": True} if row["pool"] else row]

    one, same, other = (
        open_derived(tmp_path / name, opened[:1], {"by": name}, say(text), "test").fingerprint
        for name, text in (("one", "Yes."), ("same", "Yes."), ("other", "No."))
    )
    assert one == same != other
    assert one.split("-")[0] == other.split("-")[0] == opened[0].fingerprint


def test_what_a_rank_holds_does_not_grow_with_the_samples(tmp_path):
    """Less than ten bytes a sample, none of them Arrow's."""
    count = 4000
    data = {"format": "chat", "root": str(tmp_path), "train_split": "a"}
    write(tmp_path, "a", count, 0)
    (tmp_path / "recipe.yaml").write_text(json.dumps({"run": {"dir": str(tmp_path / "run")}, "data": data}))
    base = open_split(load_recipe(tmp_path / "recipe.yaml"), "a")
    content = pickle.dumps(open_derived(tmp_path / "derived", [base], {}, lambda row: [row], "test"))
    assert len(content) < 2000
    held = held_bytes(content, lambda index: len(index) == count and from_pool(index).sum() == count / 2)
    assert held < 10 * count
