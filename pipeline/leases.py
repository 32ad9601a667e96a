"""Who is working on which shard: lease files, so that any number of workers may come, go and be killed.

A lease only saves work; no number depends on it. After a wrong guess about a dead worker (clocks that differ, a stalled
file system) two workers may write one shard: one of them may then stop with an error, and if their machines round
differently the shard may not match its record. The store's checks find that, and the next run writes the shard again.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

LEASE_S = 120.0
"""Seconds without a sign of life after which a worker counts as dead, unless it is seen to be dead before."""


class ShardLeases:
    """Leases of one worker below `root`, kept alive by a thread while the context is open."""

    def __init__(self, root: Path, lease_s: float = LEASE_S) -> None:
        self._root, self._lease_s = root, lease_s
        self._held: set[Path] = set()
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._keeper = threading.Thread(target=self._keep_alive, name="leases", daemon=True)

    def __enter__(self) -> Self:
        self._root.mkdir(parents=True, exist_ok=True)
        self._keeper.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        self._keeper.join()
        for path in sorted(self._held):
            path.unlink(missing_ok=True)
        self._held.clear()

    def claim(self, shard: int) -> bool:
        """Take a shard; False when a living worker has it."""
        path = lease_path(self._root, shard)
        if not self._create(path):
            if not self._abandoned(path):
                return False
            grave = path.with_suffix(f".{_me()['host']}.{os.getpid()}.stale")
            try:
                os.rename(path, grave)  # one of several claimants succeeds
            except FileNotFoundError:
                return False
            grave.unlink(missing_ok=True)
            if not self._create(path):
                return False
        with self._lock:
            self._held.add(path)
        return True

    def release(self, shard: int) -> None:
        """Give a shard back, done or not."""
        path = lease_path(self._root, shard)
        with self._lock:
            self._held.discard(path)
        path.unlink(missing_ok=True)

    def _create(self, path: Path) -> bool:
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(handle, "w") as file:
            json.dump(_me(), file)
        return True

    def _abandoned(self, path: Path) -> bool:
        try:
            age, holder = time.time() - path.stat().st_mtime, _read(path)
        except FileNotFoundError:
            return False  # just given back: the next pass over the shards finds it
        here = holder.get("host") == _me()["host"] and isinstance(holder.get("pid"), int)
        return age > self._lease_s or (here and not _alive(holder["pid"]))

    def _keep_alive(self) -> None:
        while not self._closing.wait(self._lease_s / 4):
            with self._lock:
                held = list(self._held)
            for path in held:
                try:
                    os.utime(path)
                except FileNotFoundError:  # another worker thought us dead, see above
                    continue


def lease_path(root: Path, shard: int) -> Path:
    """Lease file of a shard."""
    return root / f"shard-{shard:05d}.lease"


def clear_leases(root: Path, committed: Iterable[int]) -> None:
    """Remove what a worker left that was killed between committing a shard and giving it back."""
    for shard in committed:
        lease_path(root, shard).unlink(missing_ok=True)


def _me() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid()}


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except ValueError:  # killed between creating and writing: its age decides
        return {}
    return content if isinstance(content, dict) else {}


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
