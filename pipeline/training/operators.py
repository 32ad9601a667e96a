"""Operators that DeepSpeed compiles when they are first used: where they are kept, and who compiles them.

Torch keeps all operators of a user in one folder. Two environments have different include paths, so there each of them
compiles the operators again after the other. Torch guards a compilation with a file that only its maker removes: if
that process is killed, every later process waits forever. So here each environment has a folder of its own, and a lock
ends with the process that holds it.
"""

import contextlib
import fcntl
import hashlib
import os
import sys
import sysconfig
import time
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import IO

from pipeline.errors import UserError
from pipeline.files import cache

FOLDER_VARIABLE = "TORCH_EXTENSIONS_DIR"
"""Torch's variable for the folder; if the user has set it, it stays."""
FIRST_WORD_S, WORD_EVERY_S = 10.0, 60.0
"""After how many seconds a waiting process prints a line, and how often it repeats it."""
MOST_S = 1800.0
"""Longest wait: half an hour, several times what an operator takes to compile."""


def own_folder() -> Path:
    """This environment's operators: a folder named by its Python, torch and DeepSpeed, versions and places."""
    versions = {name: metadata.version(name) for name in ("torch", "deepspeed")}
    places = [spec.origin for name in versions if (spec := find_spec(name))]  # without importing them
    text = "\n".join(map(str, (sys.prefix, sys.version, *versions.items(), *places)))
    name = f"torch-{versions['torch'].partition('+')[0]}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    return cache() / "operators" / name


def prepare() -> None:
    """Set this environment's folder, unless the user chose one, and locks that end with their process.

    Call it before an operator is loaded. If the folder cannot be made (a read-only home), torch chooses its own. This
    environment's ninja comes before others on the PATH: another version does not read its log, and compiles all again.
    """
    from torch.utils import cpp_extension  # here, so that `own_folder` costs no torch

    if FOLDER_VARIABLE not in os.environ:
        folder = own_folder()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            print(f"{folder}: {error.strerror}: torch keeps compiled operators where it likes", file=sys.stderr)
        else:
            os.environ[FOLDER_VARIABLE] = str(folder)
    scripts = sysconfig.get_path("scripts")
    if os.path.exists(os.path.join(scripts, "ninja")):
        os.environ["PATH"] = os.pathsep.join((scripts, os.environ.get("PATH", "")))
    cpp_extension.FileBaton = Baton  # type: ignore[assignment, attr-defined]


class Baton:
    """The lock on one operator's folder, in the place of torch's `FileBaton`.

    It is a kernel lock on a file that is never removed; the kernel releases it when its process ends in any way.
    Torch's own lock file is made as well, for programs that know that one alone. One that is left over, with no process
    behind it, is removed.
    """

    def __init__(self, lock_file_path: str, wait_seconds: float = 0.1, warn_after_seconds: int | None = None) -> None:
        """Torch's arguments: its file, in the operator's folder; seconds between two looks. The last is not used."""
        self.torch_lock = Path(lock_file_path)
        self.folder = self.torch_lock.parent
        self.pause = wait_seconds
        self._held: IO[str] | None = None
        self._torch_lock: int | None = None

    def try_acquire(self) -> bool:
        """Wait for the lock. Always True: torch then compiles, and finds nothing to do if another process has done it.

        Torch itself would only wait, and then take the operator for compiled. That is wrong after the other was killed.

        Raises:
            UserError: another process holds it for MOST_S.
        """
        self._held = (self.folder / "clkd.lock").open("a+")
        began, word_at = time.monotonic(), FIRST_WORD_S
        while (holder := self._take()) is not None:
            waited = time.monotonic() - began
            where = f"{self.folder}: {holder} compiles this operator of DeepSpeed; process {os.getpid()}"
            if waited > MOST_S:
                self._held.close()
                raise UserError(
                    f"{where} waited {waited:.0f} s. End that process if it hangs, or set {FOLDER_VARIABLE} to another "
                    "folder. Nothing was changed."
                )
            if waited >= word_at:
                print(f"{where} waits for it, {waited:.0f} s so far", file=sys.stderr, flush=True)
                word_at = waited + WORD_EVERY_S
            time.sleep(self.pause)
        return True

    def wait(self) -> None:
        """Torch waits here when `try_acquire` gives False, which it never does."""
        raise AssertionError("try_acquire waits itself")

    def release(self) -> None:
        """Give the lock to the next process."""
        assert self._held is not None and self._torch_lock is not None
        self.torch_lock.unlink(missing_ok=True)
        os.close(self._torch_lock)
        self._held.close()

    def _take(self) -> str | None:
        """None once both locks are ours; else the process that has one of them."""
        assert self._held is not None
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._held.seek(0)
            return self._held.read() or "another process"
        except OSError:
            pass  # no such locks on this file system: torch's file alone
        self._held.truncate(0)
        self._held.write(_named(os.getpid()))
        self._held.flush()
        if self.torch_lock.exists():
            if holder := process_at_work(self.torch_lock):
                return holder
            self.torch_lock.unlink(missing_ok=True)
        try:
            self._torch_lock = os.open(self.torch_lock, os.O_CREAT | os.O_EXCL)
        except FileExistsError:
            return "another process"
        return None


def process_at_work(lock: Path) -> str | None:
    """A process of this machine that has torch's lock file open, or a ninja that goes on after such a process ended."""
    wanted, folder = os.path.realpath(lock), os.path.realpath(lock.parent)
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # ended meanwhile, or another user's
            compiles = os.readlink(process / "cwd") == folder and "ninja" in (process / "comm").read_text()
            if compiles or any(_target(file) == wanted for file in (process / "fd").iterdir()):
                return _named(process.name)
    return None


def _named(process: int | str) -> str:
    return f"process {process} on {os.uname().nodename}"


def _target(link: Path) -> str:
    try:
        return os.readlink(link)
    except OSError:  # closed meanwhile
        return ""
