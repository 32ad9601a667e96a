"""One process makes an index, others wait for it.

The lock saves work and nothing depends on it: what two processes write is the same and takes its place as a whole.
"""

import contextlib
import errno
import fcntl
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from pipeline.errors import UserError

LOCK = "lock"
SILENT_S = 600.0
"""Seconds without a sign of life of the process that holds the lock, after which a waiting one gives up."""
_SAY_S, _POLL_S, _ALIVE_S = 60.0, 0.2, 2.0
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


class Holder:
    """The process that may make the index."""

    def __init__(self, path: Path, alone: bool) -> None:
        self._path, self._told = path, 0.0
        self.alone = alone
        """False: the file system has no locks, so another process may do the same at the same time."""

    def alive(self) -> None:
        """A sign of life, for those who wait."""
        if time.monotonic() - self._told > _ALIVE_S:
            self._told = time.monotonic()
            os.utime(self._path)


@contextlib.contextmanager
def held(folder: Path) -> Iterator[Holder]:
    """Hold the folder's lock; wait while another process shows signs of life.

    Raises:
        UserError: it shows none for SILENT_S.
    """
    path = folder / LOCK
    with path.open("a+") as file:
        alone = _wait_for(file, path)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}")
        file.flush()
        yield Holder(path, alone)


def _wait_for(file: IO[str], path: Path) -> bool:
    """True once the lock is ours; False where the file system has none."""
    seen, sign, said = time.monotonic(), -1, -_SAY_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            now = time.monotonic()
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return False
            raise
        last = os.stat(path).st_mtime_ns
        seen, sign = (seen, sign) if last == sign else (now, last)
        if now - seen > SILENT_S:
            raise UserError(
                f"{path.parent}: {_holder(file)} makes this index and has shown no sign of life for {SILENT_S:g} s. "
                "End it, then run the same command again. Nothing was changed."
            )
        if now - said >= _SAY_S:
            said = now
            print(f"{path.parent}: waiting for {_holder(file)}, which makes this index", file=sys.stderr, flush=True)
        time.sleep(_POLL_S)


def _holder(file: IO[str]) -> str:
    file.seek(0)
    return file.read() or "another process"
