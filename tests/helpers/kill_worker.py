"""Kills a saving process before each of its operations on files."""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from pipeline.models import checkpoint_folder
from pipeline.training import checkpoint
from tests.helpers import single_rank, tiny

OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")


def save(engine: Any, root: Path, step: int) -> None:
    checkpoint.save(engine, root, step, {}, {"a": np.arange(3)}, 2, {"config.json": b"{}"})


def in_child(work: Callable[[], None]) -> int:
    """Exit status of `work` in a forked process, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def save_until(engine: Any, root: Path, last: int) -> None:
    """Save step 3, killed before operation `last`."""
    count = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event in OPERATIONS and not isinstance(arguments[0], int):
            count += 1
            if count == last:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    save(engine, root, 3)


def main(folder: Path) -> None:
    """For each n a fork with the checkpoints of steps 1 and 2 saves step 3, which prunes step 1, and kills itself with
    SIGKILL before its n-th operation on files, until one gets through.

    Prints the list of what `latest` named after each kill; ends with an error if that folder, or any other named as a
    checkpoint, is not whole.
    """
    # One rank's collectives do nothing; torch's fake group has no threads that a fork would lose.
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    engine = single_rank.engine(tiny.moe_model())
    single_rank.train(engine, 0, 1)
    for step in (1, 2):
        save(engine, folder / "start", step)
    newest: list[str] = []
    status = -signal.SIGKILL
    while status:
        root = folder / f"{len(newest) + 1}"
        shutil.copytree(folder / "start", root)
        status = in_child(partial(save_until, engine, root, len(newest) + 1))
        assert status in (0, -signal.SIGKILL), status
        named = checkpoint_folder.latest(root)
        assert named is not None
        for path in root.glob("step-*"):
            checkpoint_folder.verify(path)
        newest.append(named.name)
    print(json.dumps(newest))
