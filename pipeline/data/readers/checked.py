"""What every reader takes from disk, checked: text, JSON objects, and image paths below the data root."""

import json
from pathlib import Path
from typing import Any

from pipeline.errors import DataError


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text: {error}") from None


def parse_object(text: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except ValueError as error:
        raise DataError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: a record is an object, got {type(record).__name__}")
    return record


def image_inside(root: Path, path: Path, where: str) -> Path:
    """The image's real path, refused outside the data root."""
    try:
        resolved = path.resolve()
        inside, exists = resolved.is_relative_to(root.resolve()), resolved.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a name too long, a NUL character
        raise DataError(f"{where}: image {str(path)!r} is no usable path: {error}") from None
    if not inside:
        raise DataError(f"{where}: image {path} lies outside the data root {root.resolve()}. Nothing was read.")
    if not exists:
        raise DataError(f"{where}: image {path} is missing")
    return resolved
