"""Processes for tests: commands of the pipeline and workers, on one or several ranks, forked from a preloaded server.

A new process pays 7 s of CPU for its imports, a fork some milliseconds. What a fork runs is what a launcher starts:
the same function with the same environment, in a process of its own that can be signalled and killed.
tests/ranks/test_launchers.py holds that against torchrun and DeepSpeed's launcher.
"""

import ctypes
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from pipeline import cli
from pipeline.errors import run_main
from tests.helpers.paths import ROOT

PR_SET_PDEATHSIG = 1
TIMEOUT_S = 300.0
GRACE_S = 20.0
"""How long the other ranks may take to notice that one has failed."""
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["tests.helpers.preloaded"])


@dataclass(frozen=True)
class Done:
    """Processes that have ended."""

    statuses: tuple[int, ...]
    """Exit status of each rank; negative for the signal that ended it."""
    stdout: str
    """Of all ranks, one after the other."""
    stderr: str

    @property
    def returncode(self) -> int:
        """0 if every rank succeeded, else the first other status."""
        return next((status for status in self.statuses if status), 0)


class Running:
    """Processes under way; `wait` ends with all of them gone."""

    def __init__(self, processes: Sequence[BaseProcess], folder: Path) -> None:
        self.processes, self.folder = processes, folder

    def signal(self, number: int) -> None:
        """Send a signal to every rank that lives."""
        for process in self.processes:
            if process.is_alive() and process.pid:
                os.kill(process.pid, number)

    def alive(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def output(self) -> str:
        """What they have printed so far."""
        return self._read("out")

    def wait(self, timeout_s: float = TIMEOUT_S) -> Done:
        """Wait for the end of all; as a launcher does, end the others when one fails. Past the time: AssertionError."""
        deadline = time.monotonic() + timeout_s
        try:
            while self.alive() and time.monotonic() < deadline:
                self._until_one_ends(deadline)
                if any(process.exitcode for process in self.processes):
                    self._end(min(deadline, time.monotonic() + GRACE_S))
            late = self.alive()
        finally:
            self.signal(signal.SIGKILL)
            for process in self.processes:
                process.join()
        done = Done(tuple(p.exitcode or 0 for p in self.processes), self._read("out"), self._read("err"))
        shutil.rmtree(self.folder)
        assert not late, f"not at the end after {timeout_s:g} s\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done

    def _end(self, patience: float) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            while self.alive() and time.monotonic() < patience:
                self._until_one_ends(patience)
            self.signal(number)
            patience = time.monotonic() + GRACE_S

    def _until_one_ends(self, deadline: float) -> None:
        alive = [process.sentinel for process in self.processes if process.is_alive()]
        if alive:  # of none, it would wait until the deadline
            connection.wait(alive, max(0.0, deadline - time.monotonic()))

    def _read(self, kind: str) -> str:
        return "".join(path.read_text(errors="replace") for path in sorted(self.folder.glob(f"*.{kind}")))


def start(
    function: Callable[..., Any], *arguments: Any, ranks: int = 0, env: Mapping[str, str] | None = None
) -> Running:
    """Call a module's function in new processes, with the test's environment and `env` on top.

    Args:
        function: found by its name there, so defined in a module; its SystemExit is the exit status.
        arguments: anything that can be pickled.
        ranks: processes with a launcher's variables; 0: one process that no launcher started.
    """
    folder = Path(tempfile.mkdtemp(prefix="ranks-"))
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    common = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    processes = []
    for rank in range(max(1, ranks)):
        launcher = {k: str(v) for k, v in (common | {"RANK": rank, "LOCAL_RANK": rank}).items()} if ranks else {}
        given = (folder / f"{rank:02}", environment | launcher | dict(env or {}), function, arguments)
        process = _server.Process(target=_process, args=given)
        process.start()
        processes.append(process)
    return Running(processes, folder)


def run(
    function: Callable[..., Any],
    *arguments: Any,
    ranks: int = 0,
    env: Mapping[str, str] | None = None,
    check: bool = True,
    timeout_s: float = TIMEOUT_S,
) -> Done:
    """`start` and wait; every rank must end with status 0 unless `check` is False."""
    done = start(function, *arguments, ranks=ranks, env=env).wait(timeout_s)
    assert not check or done.returncode == 0, f"{done.statuses}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done


def clkd(*words: object) -> None:
    """The command `clkd` with these words, as the shell runs it; for `start` and `run`."""
    sys.argv = ["clkd", *map(str, words)]
    run_main(cli.main)


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _process(log: Path, environment: Mapping[str, str], function: Callable[..., Any], arguments: Sequence[Any]) -> None:
    """In the fork: what a shell or a launcher arranges, and then the function."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # nothing outlives the tests, however they end
    for stream, kind in ((sys.stdout, "out"), (sys.stderr, "err")):
        with log.with_suffix(f".{kind}").open("wb") as file:
            os.dup2(file.fileno(), stream.fileno())
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    tempfile.tempdir = None  # TMPDIR may be another one
    # Else the workers of a loader would come from a server of their own, which outlives a kill.
    multiprocessing.set_start_method("fork", force=True)
    function(*arguments)
