"""Files that appear whole or not at all, files that come with the package, and what to say when settings differ."""

import contextlib
import ctypes
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import xxhash

from pipeline.errors import ConfigError, UserError

PACKAGE = Path(__file__).parent
READ_BYTES = 1 << 22
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux
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
            os.link(temporary, path)
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
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    return bool(rename(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), RENAME_EXCHANGE) == 0)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
