"""Files that appear whole or not at all, files that come with the package, and what to say when settings differ."""

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import xxhash

from pipeline.errors import ConfigError, UserError

PACKAGE = Path(__file__).parent
READ_BYTES = 1 << 22
AT_FDCWD, RENAME_NOREPLACE, RENAME_EXCHANGE = -100, 1, 2  # of Linux
NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EMLINK}
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
"""What file systems say that have no hard links, or no locks."""
_ME = os.uname().nodename.replace(".", "-")  # names are taken apart at dots


# -- writing -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(path: Path, *, durable: bool = True, exclusive: bool = False) -> Iterator[Path]:
    """A temporary path beside `path`; what the body wrote there takes the place of `path`, safely on disk.

    A crash, a full disk or a power cut leaves `path` as it was. The temporary name is this process's own, so that two
    writers of one file do not write into each other's.

    Args:
        path: file to create or replace; its folder is made.
        durable: wait for the disk; False leaves that to the caller.
        exclusive: create only: FileExistsError if `path` is there; one of several callers at the same time succeeds.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{_ME}-{os.getpid()}.tmp")
    try:
        yield temporary
        if durable:
            sync(temporary)
        if exclusive:
            _create(temporary, path)
        else:
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if durable:
        sync(path.parent)  # the rename itself is durable only then


def write_text(path: Path, text: str) -> None:
    """Create or replace a text file."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Create or replace a JSON file."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def put_in_place(folder: Path, final: Path) -> None:
    """Give a folder, whose content is on disk already, its final name; what had that name is removed.

    Both names change owners in one step where the file system can do that (Linux: all common ones), so that at no
    moment there is no folder of that name. Elsewhere the older one is moved aside first.
    """
    if not final.exists():
        folder.rename(final)
    elif _exchange(folder, final):
        shutil.rmtree(folder, ignore_errors=True)
    else:
        aside = final.with_name(f".{final.name}.old-{os.getpid()}")
        final.rename(aside)
        folder.rename(final)
        shutil.rmtree(aside, ignore_errors=True)
    sync(final.parent)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step; False where the system or the file system cannot."""
    return _rename(a, b, RENAME_EXCHANGE) == 0


def _create(temporary: Path, path: Path) -> None:
    """Give a whole file a name that is free; FileExistsError if it is not. Without hard links, by renaming."""
    try:
        os.link(temporary, path)
        return
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
    number = _rename(temporary, path, RENAME_NOREPLACE)
    if number in NO_LINKS:
        raise UserError(
            f"{path}: its file system has neither hard links nor renames that keep what is there, so two processes "
            "could write one file. Put this folder on another file system. Nothing was changed."
        )
    if number:
        raise OSError(number, os.strerror(number), str(path))


def _rename(a: Path, b: Path, flag: int) -> int:
    """Linux's renameat2; its errno, 0 for success."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return errno.ENOSYS
    done = rename(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), flag)
    return 0 if done == 0 else ctypes.get_errno()


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# -- one process at a time ---------------------------------------------------------------------------------------------

POLL_S = 0.2


@contextlib.contextmanager
def locked(
    path: Path, patience_s: Callable[[str], float], refusal: Callable[[str], str], note: str = ""
) -> Iterator[None]:
    """Hold a lock file while the context is open; wait for another process that has it, and say so.

    The system gives the lock back when its holder dies. Where the file system has no locks, a second file stands for
    it, and that of a dead process of this machine is taken over.

    Args:
        path: the lock file, which stays; its folder is made.
        patience_s: seconds to wait, by what the holder wrote about itself.
        refusal: what to say then, by the same.
        note: added to what this process writes about itself.

    Raises:
        UserError: the holder keeps it for longer.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    began, said = time.monotonic(), False
    with path.open("a+") as file:
        while (give_back := _take(file, path)) is None:
            file.seek(0)
            holder = file.read() or "another process"
            if time.monotonic() - began > patience_s(holder):
                raise UserError(refusal(holder))
            if not said:
                print(f"{path}: waiting for {holder}", file=sys.stderr, flush=True)
                said = True
            time.sleep(POLL_S)
        try:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {os.uname().nodename}{note}")
            file.flush()
            yield
        finally:
            give_back()


def _take(file: IO[str], path: Path) -> Callable[[], None] | None:
    """What gives the lock back; None while another process has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return lambda: fcntl.flock(file, fcntl.LOCK_UN)
    except BlockingIOError:
        return None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    stand_in = path.with_name(f"{path.name}.held")
    _clear_dead(stand_in)
    try:
        with replacing(stand_in, exclusive=True) as temporary:
            temporary.write_text(f"{os.getpid()} {_ME}")
    except FileExistsError:
        return None
    return lambda: stand_in.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def _clear_dead(stand_in: Path) -> None:
    """Remove the file of a process of this machine that is dead. Of several that see this, one may move it away."""
    try:
        content = stand_in.read_text()
    except FileNotFoundError:
        return
    pid, _, host = content.partition(" ")
    if host != _ME or not pid.isdigit() or _alive(int(pid)):
        return
    aside = stand_in.with_name(f".{stand_in.name}.{_ME}-{os.getpid()}.dead")
    with contextlib.suppress(FileNotFoundError):
        stand_in.rename(aside)
        if aside.read_text() != content:  # another process was first, and this is its own, living one
            aside.rename(stand_in)
        aside.unlink(missing_ok=True)


# -- hashing and comparing ---------------------------------------------------------------------------------------------


YOUNG_S = 3.0
"""A file younger than this may still change without another time stamp, so its hash is not remembered."""


def weights_hash(folder: Path) -> str:
    """xxh3-128 over a folder's safetensors files in name order, names included.

    Remembered in the user's cache folder as long as size, time and inode of every file stay the same: to read the
    weights of an 8B model takes half a minute and more.

    Raises:
        UserError: there are no weights.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder}: there are no weights (*.safetensors)")
    seen = [_stamp(file) for file in files]
    note = cache() / "weights" / f"{xxhash.xxh3_64_hexdigest(str(Path(folder).resolve()))}.json"
    with contextlib.suppress(OSError, ValueError, KeyError):
        known = json.loads(note.read_text())
        if known["files"] == seen:
            return str(known["hash"])
    digest = xxhash.xxh3_128()
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while block := stream.read(READ_BYTES):
                digest.update(block)
    old = all(time.time() - time_ns / 1e9 > YOUNG_S for _, _, time_ns, _ in seen)
    if old and seen == [_stamp(file) for file in files]:
        with contextlib.suppress(OSError):  # a cache that cannot be written costs time alone
            note.parent.mkdir(parents=True, exist_ok=True)
            write_json(note, {"folder": str(folder), "files": seen, "hash": digest.hexdigest()})
    return digest.hexdigest()


def _stamp(file: Path) -> list[Any]:
    found = file.stat()
    return [file.name, found.st_size, max(found.st_mtime_ns, found.st_ctime_ns), found.st_ino]


def cache() -> Path:
    """The folder for what can be made again, of this user: $XDG_CACHE_HOME/clkd."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "clkd")


def differences(there: Mapping[str, Any], wanted: Mapping[str, Any], names: tuple[str, str]) -> list[str]:
    """A line with both values for every key of `wanted` that `there` has otherwise; `names`: whose they are.

    Of groups that both have, the line names the key inside: `optimizer.lr`.
    """
    lines: list[str] = []
    for key, value in wanted.items():
        found = there.get(key)
        if isinstance(found, Mapping) and isinstance(value, Mapping):
            lines += [f"{key}.{line}" for line in differences(found, dict.fromkeys(found) | dict(value), names)]
        elif found != value:
            lines.append(f"{key}: {names[0]} {found!r}, {names[1]} {value!r}")
    return lines


def listed(lines: list[str]) -> str:
    """Lines of a message, one below the other."""
    return "".join(f"\n  {line}" for line in lines)


# -- what comes with the package ---------------------------------------------------------------------------------------


def home() -> Path:
    """The folder that holds `ds_configs/` and `slurm/`: the checkout, or the installed package."""
    return PACKAGE if (PACKAGE / "slurm").is_dir() else PACKAGE.parent


def shipped(path: Path, kind: str) -> Path:
    """The file that a user names: one of theirs, else one that comes with the package (`demo`, `zero2_ep.json`).

    Args:
        path: as typed; with or without its folder and suffix.
        kind: `recipes` or `ds_configs`.

    Raises:
        ConfigError: neither; names those that come with the package.
    """
    if path.is_file():
        return path
    folder = {"recipes": PACKAGE / "recipes", "ds_configs": home() / "ds_configs"}[kind]
    known = {file.stem: file for file in sorted(folder.iterdir()) if file.suffix in (".yaml", ".json")}
    if path.parent.name in ("", kind) and path.stem in known:
        return known[path.stem]
    raise ConfigError(f"{path}: no such file, and none of those that come with the package: {', '.join(known)}.")
