import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from pipeline.data import shipping
from pipeline.data.shipping import loaded, pack, unpack
from pipeline.errors import DataError
from pipeline.targets.soft_targets import SoftTargets
from tests.helpers.paths import ROOT
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


SMALL = "mount -t tmpfs -o size=16m tmpfs /dev/shm && exec"
SCRIPT = """
import torch
from pipeline.data.shipping import loaded

class Large(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, place):
        return torch.full((40, 2**18), float(place))

print([(item.shape, float(item.sum()) / item.numel()) for item in loaded(Large(), 2)])
"""


@pytest.mark.slow
def test_items_larger_than_all_shared_memory():
    """Containers have 64 MB; here 16, and items of 40."""
    if subprocess.run(["unshare", "-m", "bash", "-c", f"{SMALL} true"], capture_output=True).returncode:
        pytest.skip("no mount name space of one's own: needs root and util-linux")
    command = ["unshare", "-m", "bash", "-c", f'{SMALL} "$@"', "x", sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == str([(torch.Size([40, 2**18]), float(place)) for place in range(4)])


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


def test_items_in_an_order_that_is_asked_for_late():
    asked = []

    def order():
        for place in (5, 0, 3):
            asked.append(place)
            yield place

    got = loaded(Targets(), 0, order())
    assert len(next(got)) == 6 and asked == [5]
    assert [len(targets) for targets in got] == [1, 4]
    assert [len(targets) for targets in loaded(Targets(), 1, (5, 0, 3))] == [6, 1, 4]


def test_without_shared_memory_the_same_goes_through_pipes(monkeypatch, tmp_path):
    """No byte of a batch goes to /dev/shm when it is small; the values are those that go there otherwise."""
    targets = random_targets(400, 700, 8)
    assert isinstance(pack(targets)[1], torch.Tensor)
    monkeypatch.setattr(shipping, "SHARED", str(tmp_path / "absent"))
    head, block = pack(targets)
    assert isinstance(block, bytes)
    back = unpack(head, block)
    assert torch.equal(back.ids, targets.ids) and torch.equal(back.logprobs, targets.logprobs)
    back.ids[0] = 0  # may be written to
    got = list(loaded(Targets(), 2))
    assert [len(item) for item in got] == [1, 2, 3, 4, 5, 6, 7]
    assert torch.equal(got[4].logprobs, Targets()[4].logprobs)


def test_workers_outlive_a_signal_to_all_processes_but_not_the_loader():
    got = loaded(Targets(), 2)
    items = [next(got)]
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        for worker in workers:
            os.kill(worker.pid, number)
        items.append(next(got))
    assert [len(targets) for targets in items + list(got)] == [1, 2, 3, 4, 5, 6, 7]
    deadline = time.monotonic() + 20
    while any(worker.is_alive() for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(worker.is_alive() for worker in workers)


class Refuses(Targets):
    def __getitem__(self, position):
        raise DataError(f"line {position}: torn")


def stop_in_the_middle():
    for _ in loaded(Targets(), 2):
        raise SystemExit(3)


def keep_one_open():
    stop_in_the_middle.kept = loaded(Targets(), 2)  # no end of a scope closes it
    next(stop_in_the_middle.kept)


@pytest.mark.parametrize(("ends", "status"), [(stop_in_the_middle, 3), (keep_one_open, 0)])
def test_a_process_that_ends_with_a_loader_open_ends(ends, status):
    """Also one that multiprocessing has started, which runs nothing of `atexit` and waits for its own children."""
    process = multiprocessing.get_context("fork").Process(target=ends)
    process.start()
    process.join(60)
    late = process.is_alive()
    process.kill()
    process.join()
    assert not late and process.exitcode == status


@pytest.mark.parametrize("workers", [0, 1])
def test_what_a_worker_refuses_is_the_error_itself(workers):
    """Not torch's text of it with the worker's whole traceback."""
    with pytest.raises(DataError) as caught:
        list(loaded(Refuses(), workers))
    assert str(caught.value) == "line 0: torn"
