import json

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from pipeline.benchmark.word_alignment import OBJECT_WEIGHT, CellWords, cell_loss
from pipeline.data.sample import Sample, question
from pipeline.errors import DataError
from tests.helpers.tiny_data import make_processor

SIZE = (128, 64)  # 4 x 2 cells of 32 pixels
GRID = torch.tensor([[1, 4, 8]])
NEAR_CAR = {"words": ["car"], "box": [0, 32, 64, 32]}
FAR_BUS = {"words": ["bus"], "box": [32, 32, 96, 32]}


def make_sample(folder, box=None, **record):
    path = folder / "train_0001.json"
    content = {"objects": [FAR_BUS, NEAR_CAR], "weather": "fog", "size": SIZE}
    path.write_text(json.dumps(content | record))
    Image.new("RGB", SIZE).save(folder / "0001.jpg")
    return Sample("0", (folder / "0001.jpg",), question("?"), "!", "region", "unknown", box, {"record": str(path)})


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return CellWords(make_processor(tmp_path_factory.mktemp("processor")))


def named(words, row_V):
    return {int(i) for i in row_V.nonzero()}


def ids(words, text):
    return set(words.processor.tokenizer.encode(f" {text}", add_special_tokens=False))


def test_a_cell_names_the_nearest_object_and_else_the_weather(words, tmp_path):
    targets_CV = words.targets(make_sample(tmp_path), GRID)
    expected = ["fog"] * 4 + ["car", "car", "bus", "bus"]  # rows of cells; the car is drawn last, over the bus
    assert [named(words, row) for row in targets_CV] == [ids(words, word) for word in expected]
    torch.testing.assert_close(targets_CV.sum(-1), torch.ones(8))


def test_marked_cells_carry_the_mark_as_well(words, tmp_path):
    targets_CV = words.targets(make_sample(tmp_path, box=(96.0, 0.0, 32.0, 32.0)), GRID)
    assert named(words, targets_CV[3]) == ids(words, "fog rectangle")
    assert named(words, targets_CV[2]) == ids(words, "fog")


def test_a_record_without_objects_is_refused_with_the_setting_to_change(words, tmp_path):
    sample = make_sample(tmp_path)
    record = json.loads((tmp_path / "train_0001.json").read_text())
    del record["objects"]
    other = tmp_path / "val_0001.json"
    other.write_text(json.dumps(record))
    broken = Sample("1", sample.images, question("?"), "!", "general", "unknown", None, {"record": str(other)})
    with pytest.raises(DataError, match=r"no `objects`.*word_alignment"):
        words.targets(broken, GRID)


def test_loss_equals_torchs_cross_entropy_weighted_per_image():
    generator = torch.Generator().manual_seed(0)
    features, embeddings = torch.randn(6, 5, generator=generator), torch.randn(9, 5, generator=generator)
    targets = torch.zeros(6, 7)  # the vocabulary is shorter than the padded embedding
    targets[[0, 2, 3, 4], [1, 2, 3, 3]] = 1.0
    targets[[1, 1, 5, 5], [0, 4, 5, 6]] = 0.5
    expected = torch.zeros(())
    for image in (slice(0, 3), slice(3, 6)):
        full = F.pad(targets[image], (0, 2))
        loss = F.cross_entropy(features[image] @ embeddings.T, full, reduction="none")
        weight = torch.tensor([OBJECT_WEIGHT if row.max() < 1 else 1.0 for row in targets[image]])
        expected = expected + (weight * loss).sum() / weight.sum()
    cells, logits = cell_loss(targets, 2), features @ embeddings.T
    torch.testing.assert_close(cells(slice(0, 6), logits), expected)
    parts = [cells(part, logits[part]) for part in (slice(0, 2), slice(2, 6))]  # not where the images meet
    torch.testing.assert_close(sum(parts), expected)
