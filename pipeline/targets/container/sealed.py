"""JSON files with a hash of themselves, and the error that says that bytes of a store are not as they were written."""

import json
from typing import Any

import xxhash

from pipeline.errors import StoreError
from pipeline.targets.container.folders import Folder


class DamagedError(StoreError):
    """A file of a store is missing, or not what was written."""


def sealed_json(content: dict[str, Any]) -> bytes:
    """Canonical JSON with a hash of itself: any flipped bit shows."""
    seal = xxhash.xxh3_64_hexdigest(json.dumps(content, sort_keys=True))
    return (json.dumps({**content, "seal": seal}, sort_keys=True, indent=1) + "\n").encode()


def unsealed_json(folder: Folder, name: str) -> dict[str, Any]:
    """The content of a file written as `sealed_json`.

    Raises:
        DamagedError: it is missing, or one bit of it changed.
    """
    try:
        raw = folder.read(name)
        content = dict(json.loads(raw))
    except (OSError, ValueError, TypeError) as error:
        raise DamagedError(f"{folder}/{name}: cannot be read: {error}") from None
    content.pop("seal", None)
    # Compared as bytes: white space, key order and number format are sealed too.
    if sealed_json(content) != raw:
        raise DamagedError(f"{folder}/{name}: does not match its own seal")
    return content
