"""Operators that DeepSpeed compiles when they are first used: the locks on them that a killed process leaves behind."""

import contextlib
import fcntl
from pathlib import Path
from typing import IO

from torch.utils import cpp_extension

OPERATORS = ("deepspeed_shm_comm", "cpu_adam", "fused_adam")
_held: list[IO[str]] = []
"""Open until the process ends, in whatever way."""


def clear_stale_locks() -> None:
    """Remove what would make torch wait for ever: `lock` files of processes that are no more.

    Whoever loads an operator makes such a file, and nobody else removes it. So each of our processes holds a lock of
    the kernel's beside them while it lives; one that gets that lock alone knows that no other is at work.
    """
    with contextlib.suppress(OSError):  # a folder that is read-only or without file locks: then torch is on its own
        folder = Path(cpp_extension._get_build_directory("clkd", False))
        file = (folder / "processes").open("a")
        _held.append(file)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fcntl.flock(file, fcntl.LOCK_SH)
            return
        for name in OPERATORS:
            (folder.parent / name / "lock").unlink(missing_ok=True)
        fcntl.flock(file, fcntl.LOCK_SH)
