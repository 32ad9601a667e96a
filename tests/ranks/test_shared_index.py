"""Several ranks get one index: rank 0 opens the data set, the others what it opened."""

import json
from pathlib import Path

import pytest
import torch.distributed as dist
from PIL import Image

from pipeline.data.splits import open_split
from pipeline.errors import UserError
from pipeline.recipe import load_recipe
from pipeline.training.process import from_first_rank
from tests.helpers import ranks

RANKS = 3


def write_data(folder: Path, *, answers: list[object]) -> Path:
    """A chat data set and its recipe."""
    (folder / "data").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "data" / "a.png")
    turns = [[{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}] for answer in answers]
    lines = [json.dumps({"image": "a.png", "messages": messages}) for messages in turns]
    (folder / "data" / "train.jsonl").write_text("\n".join(lines))
    path = folder / "recipe.yaml"
    path.write_text(json.dumps({"run": {"dir": str(folder)}, "data": {"format": "chat", "root": str(folder / "data")}}))
    return path


def one_rank(recipe: Path) -> None:
    """Writes what this rank was given, or the refusal, beside the recipe."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()

    def make():
        assert rank == 0, "asked on another rank"
        return open_split(load_recipe(recipe), "train")

    try:
        found = [(sample.sample_id, sample.answer) for sample in from_first_rank(make)]
    except UserError as error:
        found = (type(error).__name__, str(error))
    recipe.with_name(f"rank-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def on_every_rank(recipe: Path) -> list[list]:
    ranks.run(one_rank, recipe, ranks=RANKS)
    return [json.loads(recipe.with_name(f"rank-{rank}.json").read_text()) for rank in range(RANKS)]


def test_every_rank_has_the_samples_that_rank_0_opened(tmp_path):
    results = on_every_rank(write_data(tmp_path, answers=[f"{n}." for n in range(30)]))
    assert results == [results[0]] * RANKS
    assert len({answer for _, answer in results[0]}) == 30


def test_what_rank_0_refuses_every_rank_refuses(tmp_path):
    results = on_every_rank(write_data(tmp_path, answers=["Go.", {"a": 5}]))
    assert results == [results[0]] * RANKS
    name, said = results[0]
    assert name == "DataError" and "1 problem(s) in 1 record(s)" in said


@pytest.mark.parametrize("lost", ["samples", "images"])
def test_a_rank_that_does_not_see_the_folder_says_so(tmp_path, lost):
    """As on a node that does not mount the storage of the run."""
    recipe = write_data(tmp_path, answers=["Go."])
    origin = open_split(load_recipe(recipe), "train").__reduce__()
    for path in (tmp_path / "index" / "train").glob(f"{lost}-*"):
        path.unlink()
    with pytest.raises(UserError, match=r"index/train: cannot be read on .*All nodes must see this folder"):
        origin[0](*origin[1])
