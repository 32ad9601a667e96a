import numpy as np
import pytest
import torch

from pipeline.data.shipping import loaded, pack, unpack
from pipeline.targets.soft_targets import SoftTargets
from tests.helpers.soft_targets import random_targets


def test_values_come_back_and_may_be_written_to():
    value = {
        "empty": torch.zeros(0, 3),
        "odd": torch.arange(3, dtype=torch.uint8),
        "scalar": torch.tensor(2.5),
        "half": torch.tensor([1.5, -2.0, 0.0]).bfloat16(),
        "transposed": torch.arange(6.0).view(2, 3).T,
        "truth": torch.tensor([[True], [False]]),
        "array": np.arange(5, dtype=np.float32),
        "other": ("text", None, 7),
    }
    got = unpack(*pack(value))
    assert got.keys() == value.keys()
    assert got.pop("other") == value.pop("other")
    np.testing.assert_array_equal(got.pop("array"), value.pop("array"))
    for name, tensor in value.items():
        assert torch.equal(got[name], tensor) and got[name].dtype == tensor.dtype
        assert got[name].data_ptr() % 8 == 0
    got["odd"].fill_(9)
    assert torch.equal(got["transposed"], value["transposed"]) and got["odd"].tolist() == [9, 9, 9]


def test_the_bytes_travel_in_one_block():
    targets = random_targets(400, 700, 8)
    head, block = pack(targets)
    size = 400 * (8 * (8 + 4) + 3 * 4)  # ids and log-probs, three numbers a token
    assert len(head) < 1000
    assert size <= len(block) < size + 5 * 64


class Targets(torch.utils.data.Dataset):
    def __len__(self):
        return 7

    def __getitem__(self, position):
        return random_targets(position + 1, 700, 8, seed=position)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_workers_give_the_same_in_the_same_order(workers):
    got = list(loaded(Targets(), workers))
    assert [len(targets) for targets in got] == [1, 2, 3, 4, 5, 6, 7]
    for position, targets in enumerate(got):
        assert isinstance(targets, SoftTargets)
        assert torch.equal(targets.logprobs, Targets()[position].logprobs)
