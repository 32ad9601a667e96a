"""Who is working on which shard: lease files, so that workers may be started, stopped and killed at any time.

A lease only saves work; no number depends on it. A worker may be taken for dead by mistake (clocks that differ, a
stalled file system), and then two workers write one shard. One of them may stop with an error, and if their machines
round differently the shard may not match its commit. The store's checks find that, and the next run writes the shard
again.
"""

import json
import os
import socket
import threading
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Self

from pipeline.targets.container.folders import Folder

LEASE_S = 120.0
"""Seconds without a sign of life after which a worker counts as dead, unless it is seen to be dead before."""


class ShardLeases:
    """Leases of one worker in a store's folder, kept alive by a thread while the context is open."""

    def __init__(self, folder: Folder, lease_s: float = LEASE_S) -> None:
        self._folder, self._lease_s = folder, lease_s
        self._held: set[str] = set()
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._keeper = threading.Thread(target=self._keep_alive, name="leases", daemon=True)

    def __enter__(self) -> Self:
        self._keeper.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        self._keeper.join()
        for name in sorted(self._held):
            self._folder.remove(name)
        self._held.clear()

    def claim(self, shard: int) -> bool:
        """Take a shard; False when a living worker has it."""
        name, mine = lease_name(shard), json.dumps(_me()).encode()
        free = self._folder.create(name, mine)
        # Several workers may claim an abandoned lease at once. Removing and creating it each succeed for one of them.
        if not free and not (self._abandoned(name) and self._folder.remove(name) and self._folder.create(name, mine)):
            return False
        with self._lock:
            self._held.add(name)
        return True

    def release(self, shard: int) -> None:
        """Give a shard back, done or not."""
        with self._lock:
            self._held.discard(lease_name(shard))
        self._folder.remove(lease_name(shard))
        self._folder.tidy({lease_name(shard)})

    def _abandoned(self, name: str) -> bool:
        age = self._folder.age(name)
        if age is None:
            return False  # given back a moment ago: left to the next run of the stage
        holder = _read(self._folder, name)
        here = holder.get("host") == _me()["host"] and isinstance(holder.get("pid"), int)
        return age > self._lease_s or (here and not _alive(holder["pid"]))

    def _keep_alive(self) -> None:
        while not self._closing.wait(self._lease_s / 4):
            with self._lock:
                held = list(self._held)
            for name in held:
                self._folder.touch(name)  # does nothing if another worker took this one for dead and removed it


def lease_name(shard: int) -> str:
    """Lease file of a shard."""
    return f"shard-{shard:05d}.lease"


def clear_leases(folder: Folder, committed: Iterable[int]) -> None:
    """Remove leases on committed shards: their workers were killed before they could give them back."""
    names = {lease_name(shard) for shard in committed}
    for name in names.intersection(folder.names()):
        folder.remove(name)
    folder.tidy(names)


def _me() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid()}


def _read(folder: Folder, name: str) -> dict[str, Any]:
    try:
        content = json.loads(folder.read(name))
    except (OSError, ValueError):  # cannot be read: then only its age tells whether its worker is alive
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
