"""A training process: its signals, its group of ranks, and the lock that keeps a job from running twice at once."""

import contextlib
import os
import platform
import re
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import TypeVar, cast

import deepspeed
import torch.distributed as dist
import xxhash
from deepspeed.accelerator import get_accelerator
from torch.distributed import distributed_c10d

from pipeline.errors import ConfigError, LostContactError, UserError
from pipeline.files import PACKAGE, locked
from pipeline.training import operators

LOCK_WAIT_S, OTHER_JOB_WAIT_S = 60.0, 5.0
TIMEOUT_VARIABLE = "CLKD_COLLECTIVE_TIMEOUT_S"
TIMEOUT_S = 1800
"""Seconds a rank waits for the others: more than rank 0 takes to write the final model, for which they wait."""
VERSIONS_OF = ("torch", "deepspeed", "transformers")
T = TypeVar("T")
_NO_CONTACT = re.compile(r"timed? ?out|connection (closed|reset|refused)|broken pipe|socket|peer|unreachable", re.I)


class StopFlag:
    """Set by SIGTERM and SIGUSR1; looked at once per step."""

    def __init__(self) -> None:
        self.raised = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._raise)

    def _raise(self, number: int, frame: FrameType | None) -> None:
        self.raised = True


@contextlib.contextmanager
def only_one(job_dir: Path) -> Iterator[None]:
    """Hold the job's lock on rank 0 while the context is open; wait a minute for a run that is just ending. Collective.

    Raises:
        UserError: another run of this job goes on; names its process. On every rank: one that only lost contact with
            the first would end before it, and its status would count.
    """

    def refusal(holder: str) -> str:
        return (
            f"{job_dir}: another run of this job is going on ({holder}). Wait for it or stop it. Nothing was changed."
        )

    with contextlib.ExitStack() as held:
        lock = locked(job_dir / "lock", _patience_s, refusal, _slurm_job())
        from_first_rank(lambda: held.enter_context(lock))
        yield


def _patience_s(holder: str) -> float:
    """Seconds to wait for the lock, by who holds it, as written in the lock file."""
    ours = _slurm_job()
    if not ours or ", Slurm job " not in holder:
        return LOCK_WAIT_S
    if not holder.endswith(ours):  # another Slurm job: somebody submitted two, and waiting does not help
        return OTHER_JOB_WAIT_S
    # This job's own earlier start, on a node that lost the network: it ends when its collectives time out.
    return LOCK_WAIT_S + collective_timeout().total_seconds()


def _slurm_job() -> str:
    return f", Slurm job {os.environ['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in os.environ else ""


def collective_timeout() -> timedelta:
    """How long a rank waits for the others before it gives up."""
    given = os.environ.get(TIMEOUT_VARIABLE, str(TIMEOUT_S))
    if not given.isdigit() or int(given) < 1:
        raise ConfigError(f"{TIMEOUT_VARIABLE}: must be a whole number of seconds, got {given!r}. Nothing was started.")
    return timedelta(seconds=int(given))


def start_distributed() -> None:
    """Join the launcher's group, or form a group of one when started without a launcher.

    Raises:
        LostContactError: the ranks do not find each other.
        ConfigError: they do not run the same code.
    """
    alone = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    if "RANK" not in os.environ:
        os.environ.update(alone)
    operators.prepare()
    timeout = collective_timeout()
    # DeepSpeed forms the expert groups without a timeout: they get torch's default, half an hour with gloo.
    distributed_c10d.default_pg_timeout = timeout
    distributed_c10d.default_pg_nccl_timeout = timeout  # type: ignore[attr-defined]
    try:
        deepspeed.init_distributed(timeout=timeout)
    except dist.DistError as error:
        raise LostContactError(_no_rendezvous(error, timeout)) from None
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    everywhere: list[dict[str, str]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everywhere, versions())
    refuse_other_versions(everywhere)


def _no_rendezvous(error: dist.DistError, timeout: timedelta) -> str:
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    me = f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} on {os.uname().nodename}"
    if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
        return (
            f"{me}: port {os.environ['MASTER_PORT']} is in use here. Start the job again with another MASTER_PORT "
            "(slurm/train.sbatch and `torchrun --standalone` choose a free one). Nothing was started."
        )
    return (
        f"{me}: no rendezvous at {place} within {timeout.total_seconds():g} s ({TIMEOUT_VARIABLE}). Check that this "
        "node reaches that address, and CLKD_INTERFACE on nodes with several networks. Nothing was started. "
        f"({error})"
    )


def versions() -> dict[str, str]:
    """Versions that must be the same on all ranks, and the name of this rank's node, for the message."""
    code = xxhash.xxh3_64()
    for path in sorted(PACKAGE.rglob("*.py")):
        code.update(path.read_bytes())
    packages = {package: metadata.version(package) for package in VERSIONS_OF}
    return {"node": os.uname().nodename, "python": platform.python_version(), **packages, "pipeline": code.hexdigest()}


def refuse_other_versions(everywhere: Sequence[Mapping[str, str]]) -> None:
    """ConfigError with both values of everything in which a rank differs from rank 0."""
    first = everywhere[0]
    differs = {
        f"{name}: {first[name]} on {first['node']}, {other[name]} on {other['node']}"
        for other in everywhere
        for name in first
        if name != "node" and other[name] != first[name]
    }
    if differs:
        raise ConfigError(
            "the ranks do not run the same code:\n  "
            + "\n  ".join(sorted(differs))
            + "\nPut project and environment on storage that all nodes see (CLKD_HOME, CLKD_VENV), or bring them to "
            "one version. Nothing was started."
        )


def from_first_rank(make: Callable[[], T]) -> T:
    """What rank 0 makes, on every rank; what it refuses, every rank refuses. Collective.

    For what must be the same everywhere and is asked of shared storage once.
    """
    outcome: list[T | UserError | None] = [None]
    if dist.get_rank() == 0:
        try:
            outcome = [make()]
        except UserError as error:
            outcome = [error]
    dist.broadcast_object_list(outcome)
    if isinstance(outcome[0], UserError):
        raise outcome[0]
    return cast(T, outcome[0])


@contextlib.contextmanager
def leaving_in_order() -> Iterator[None]:
    """Take the group of ranks apart before a refusal ends this process.

    Left to the end of the process, gloo's threads may still run when C++ destroys them: an abort (134) in the place of
    the refusal's status, and a launcher that takes it for a crash starts the job again. Not after lost contact: a
    thread that still waits for a dead rank would be waited for.
    """
    try:
        yield
    except UserError as error:
        if not isinstance(error, LostContactError) and dist.is_initialized():
            dist.destroy_process_group()
        raise


@contextlib.contextmanager
def contact() -> Iterator[None]:
    """Turn the backend's errors into LostContactError when a rank no longer reaches another one."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not _NO_CONTACT.search(str(error)):
            raise
        raise LostContactError(
            f"rank {os.environ['RANK']} on {os.uname().nodename} lost contact with another rank: "
            f"{str(error).splitlines()[0]}. It failed or cannot be reached (ranks wait "
            f"{collective_timeout().total_seconds():g} s for each other, {TIMEOUT_VARIABLE}); its own log says more. "
            "Start the job again: it goes on from the last checkpoint."
        ) from error
