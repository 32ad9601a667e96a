"""What every reader takes from disk, checked: text, JSON objects, and images from where the data set may have them."""

import json
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.data.problems import Problems
from pipeline.errors import DataError

_BOM = b"\xef\xbb\xbf"


class SplitMissingError(DataError):
    """A data set does not have the split that was asked for."""


class Source:
    """One split of a data set on disk, as its reader gets it."""

    def __init__(self, root: Path, split: str, files: Sequence[Path], image_roots: Sequence[Path] = ()) -> None:
        """Read from a data root.

        Args:
            files: the split's annotation files.
            image_roots: folders beside `root` that images may lie in.
        """
        self.root, self.split, self.files = root, split, files
        self.problems = Problems()
        self.done = 0
        """Bytes of annotation files read so far."""
        roots = [place for given in (root, *image_roots) for place in (os.path.abspath(given), os.path.realpath(given))]
        self._allowed = tuple(dict.fromkeys(place.rstrip(os.sep) + os.sep for place in roots))
        self._folders: dict[str, str] = {}

    def text(self, path: Path) -> str:
        """A file as text. DataError when it cannot be read, or is no UTF-8."""
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path}: cannot be read as UTF-8 text: {error}") from None
        self.done += len(raw)
        return _decoded(raw, str(path))

    def lines(self, path: Path) -> Iterator[tuple[str, str]]:
        """(`path:number`, text) of every line that is not blank; one that is no UTF-8 becomes a problem.

        Only \\n ends a line: JSON allows U+2028 and U+0085 inside its strings.
        """
        for number, raw in enumerate(_raw_lines(path), 1):
            self.done += len(raw)
            where, text = f"{path}:{number}", ""
            with self.problems.at(where):
                text = _decoded(raw, where)
            if text.strip():
                yield where, text

    def image(self, name: object, where: str) -> Path:
        """The real path of an image that a record names, below the data root or a folder of `image_roots`.

        Links are followed wherever they lead: whoever put one into the data root allowed that. What counts is where
        the name itself lies once `..` is resolved, so a record alone leads nowhere else.

        Raises:
            DataError: no path, outside, or no such file.
        """
        if not isinstance(name, str) or not name:
            raise DataError(f"{where}: image must be a path below the data root, got {name!r}")
        path = os.path.abspath(os.path.join(self.root, name))
        if not path.startswith(self._allowed):
            raise DataError(
                f"{where}: image {path} lies outside the data root {self.root.resolve()} and data.image_roots. "
                "It was not read."
            )
        try:
            return self._regular_file(path)
        except FileNotFoundError:
            raise DataError(f"{where}: image {path} is missing") from None
        except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a name too long, a NUL character
            raise DataError(f"{where}: image {path!r} is no usable path: {error}") from None

    def _regular_file(self, path: str) -> Path:
        """The path without links; each folder is resolved once."""
        folder, name = os.path.split(path)
        real = self._folders.get(folder)
        if real is None:
            real = self._folders[folder] = os.path.realpath(folder, strict=True)
        found = os.path.join(real, name)
        mode = os.lstat(found).st_mode
        if stat.S_ISLNK(mode):
            found = os.path.realpath(found, strict=True)
            mode = os.stat(found).st_mode
        if not stat.S_ISREG(mode):
            raise FileNotFoundError(found)
        return Path(found)


def parse_object(text: str, where: str) -> dict[str, Any]:
    """A JSON object. DataError when it is none."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: a record is an object, got {type(record).__name__}")
    return record


def _raw_lines(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            yield from file
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


def _decoded(raw: bytes, where: str) -> str:
    try:
        return raw.removeprefix(_BOM).decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: cannot be read as UTF-8 text: {error}") from None
