"""Folders that hold a store: on a local (or network) file system, or in an object store named by an fsspec URL.

Both give what commits need. A file appears whole or not at all. When several processes create one file, exactly one of
them succeeds. A file that was written survives a power cut: locally by fsync, in an object store by its own promise.
"""

import contextlib
import os
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import fsspec

from pipeline.errors import StoreError
from pipeline.files import replacing


class Folder(Protocol):
    """A flat set of named files. `str()` of it is its path or URL. Holds no open files: safe to fork and pickle."""

    def names(self) -> list[str]:
        """Names of all files, ascending; none when the folder is not there."""

    def size(self, name: str) -> int | None:
        """Bytes of a file; None when it is missing."""

    def read(self, name: str, begin: int = 0, end: int | None = None) -> bytes:
        """Bytes [begin, end) as far as they are there. Raises OSError."""

    def write(self, name: str, raw: bytes) -> None:
        """Create or replace a file: after a crash it is either as before or whole. Raises OSError.

        FileNotFoundError means that another process wrote the same file at the same time, and that one is there now.
        """

    def create(self, name: str, raw: bytes) -> bool:
        """Write a file unless it is there; False if it is. One of several callers at the same time gets True."""

    def remove(self, name: str) -> bool:
        """Delete a file; False when it was missing."""

    def age(self, name: str) -> float | None:
        """Seconds since the file was written or touched, by this machine's clock; None when it is missing."""

    def touch(self, name: str) -> None:
        """Make the age 0. Nothing happens when the file is missing."""

    def tidy(self, names: Collection[str]) -> None:
        """Remove temporary files of killed writers of these files. Nobody may be writing the files now."""


def folder_at(url: str | Path) -> Folder:
    """The folder that a path or fsspec URL (`s3://bucket/store`) names. It need not be there.

    Raises:
        StoreError: unknown kind of URL, or the package that reads it is not installed.
    """
    scheme, sign, rest = str(url).partition("://")
    if not sign or scheme == "file":
        return LocalFolder(Path(rest if sign else url))
    try:
        fsspec.core.url_to_fs(str(url))
    except (ImportError, ValueError) as error:
        raise StoreError(f"{url}: cannot be opened: {error}") from None
    return ObjectFolder(str(url).rstrip("/"))


@dataclass(frozen=True, slots=True)
class LocalFolder:
    """See `Folder`."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def names(self) -> list[str]:
        return sorted(p.name for p in self.path.iterdir() if p.is_file()) if self.path.is_dir() else []

    def size(self, name: str) -> int | None:
        try:
            return (self.path / name).stat().st_size
        except FileNotFoundError:
            return None

    def read(self, name: str, begin: int = 0, end: int | None = None) -> bytes:
        file = os.open(f"{self.path}/{name}", os.O_RDONLY)  # joining paths would take as long as opening
        try:
            return os.pread(file, (os.fstat(file).st_size if end is None else end) - begin, begin)
        finally:
            os.close(file)

    def write(self, name: str, raw: bytes) -> None:
        with replacing(self.path / name) as temporary:
            temporary.write_bytes(raw)

    def create(self, name: str, raw: bytes) -> bool:
        try:
            with replacing(self.path / name, exclusive=True) as temporary:
                temporary.write_bytes(raw)
        except (FileExistsError, FileNotFoundError):  # the latter: the process that created it removed our temporary
            return False
        return True

    def remove(self, name: str) -> bool:
        try:
            (self.path / name).unlink()
        except FileNotFoundError:
            return False
        return True

    def age(self, name: str) -> float | None:
        try:
            return time.time() - (self.path / name).stat().st_mtime
        except FileNotFoundError:
            return None

    def touch(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.utime(self.path / name)

    def tidy(self, names: Collection[str]) -> None:
        for leftover in self.path.glob(".*.tmp"):
            if leftover.name[1:].rsplit(".", 2)[0] in names:
                leftover.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class ObjectFolder:
    """See `Folder`. StoreError when the object store cannot be reached, or refuses."""

    url: str

    def __str__(self) -> str:
        return self.url

    def names(self) -> list[str]:
        with self._opened() as (fs, path):
            try:
                found = fs.ls(path, detail=True)
            except FileNotFoundError:
                return []
        return sorted(entry["name"].rsplit("/", 1)[1] for entry in found if entry["type"] == "file")

    def size(self, name: str) -> int | None:
        info = self._info(name)
        return None if info is None else int(info["size"])

    def read(self, name: str, begin: int = 0, end: int | None = None) -> bytes:
        if end is not None and end <= begin:
            return b""  # an object store refuses an empty range
        with self._opened() as (fs, path):
            return bytes(fs.cat_file(f"{path}/{name}", start=begin, end=end))

    def write(self, name: str, raw: bytes) -> None:
        with self._opened() as (fs, path):
            fs.pipe_file(f"{path}/{name}", raw)

    def create(self, name: str, raw: bytes) -> bool:
        with self._opened() as (fs, path):
            try:
                fs.pipe_file(f"{path}/{name}", raw, mode="create")
            except FileExistsError:
                return False
        return True

    def remove(self, name: str) -> bool:
        if self._info(name) is None:  # S3 does not say whether there was anything to delete
            return False
        with self._opened() as (fs, path), contextlib.suppress(FileNotFoundError):
            fs.rm_file(f"{path}/{name}")
        return True

    def age(self, name: str) -> float | None:
        with self._opened() as (fs, path):
            try:
                return time.time() - float(fs.modified(f"{path}/{name}").timestamp())
            except FileNotFoundError:
                return None

    def touch(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.write(name, self.read(name))

    def tidy(self, names: Collection[str]) -> None:
        """Nothing: an object is whole or not there."""

    def _info(self, name: str) -> dict[str, Any] | None:
        with self._opened() as (fs, path):
            try:
                return dict(fs.info(f"{path}/{name}"))
            except FileNotFoundError:
                return None

    @contextlib.contextmanager
    def _opened(self) -> Iterator[tuple[Any, str]]:
        """The file system, and the folder's path in it. fsspec keeps one a process, and makes another after a fork."""
        try:
            fs, path = fsspec.core.url_to_fs(self.url)
            fs.invalidate_cache()  # other processes write too
            yield fs, str(path).rstrip("/")
        except (StoreError, FileNotFoundError):
            raise
        except Exception as error:  # every object store has exceptions of its own
            raise StoreError(f"{self.url}: {type(error).__name__}: {error}. Nothing was lost.") from error
