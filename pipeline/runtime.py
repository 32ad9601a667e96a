"""A training process among others: its signals, its group of ranks, and the lock that keeps a job to one run."""

import contextlib
import fcntl
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import IO

import deepspeed

from pipeline.errors import UserError

LOCK_WAIT_S = 60.0


class StopFlag:
    """Set by SIGTERM and SIGUSR1; looked at once per step."""

    def __init__(self) -> None:
        self.raised = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._raise)

    def _raise(self, number: int, frame: FrameType | None) -> None:
        self.raised = True


@contextlib.contextmanager
def only_one(job_dir: Path, rank: int) -> Iterator[None]:
    """Hold the job's lock on rank 0; a run that is just ending gets a minute to let go."""
    if rank:
        yield
        return
    job_dir.mkdir(parents=True, exist_ok=True)
    with (job_dir / "lock").open("a+") as file:
        _lock(file, job_dir)
        file.truncate(0)
        file.write(f"{os.getpid()} on {os.uname().nodename}")
        file.flush()
        yield


def _lock(file: IO[str], job_dir: Path) -> None:
    deadline = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                file.seek(0)
                raise UserError(
                    f"{job_dir}: another run of this job is going on (process {file.read()}). Wait for it or stop it. "
                    "Nothing was changed."
                ) from None
            time.sleep(1.0)


def start_distributed() -> None:
    """Join the launcher's group, or form a group of one when started without a launcher."""
    alone = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    if "RANK" not in os.environ:
        os.environ.update(alone)
    deepspeed.init_distributed()
