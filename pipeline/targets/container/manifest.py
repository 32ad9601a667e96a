"""What a store was made from, and which samples belong to which shard: its manifest, and its parts.

`manifest.json` holds the identity. `part-00000.json` lists samples and how they are cut into shards; data that come
later add a part and touch nothing that is there.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import xxhash

from pipeline.errors import StoreError
from pipeline.files import differences, listed
from pipeline.targets.container.folders import Folder
from pipeline.targets.container.sealed import DamagedError, sealed_json, unsealed_json
from pipeline.targets.container.shards import Kind

Identity = dict[str, Any]
"""JSON scalars by name; equality is the reuse test."""

MANIFEST = "manifest.json"
_START_AGAIN = "Delete the folder and run `clkd teacher RECIPE.yaml` again."


def create_manifest(folder: Folder, identity: Identity) -> None:
    """Make the folder a store of this identity, or check that it is one already.

    Raises:
        StoreError: the store was made for another identity; nothing was changed.
    """
    if folder.size(MANIFEST) is None:
        folder.create(MANIFEST, sealed_json({"identity": identity}))
    refuse_differences(folder, read_identity(folder), identity)  # read back: another worker may be first


def read_identity(folder: Folder) -> Identity:
    """What the store was made from. StoreError when there is no store, or its manifest is damaged."""
    if folder.size(MANIFEST) is None:
        raise StoreError(f"{folder}: no soft-target store; `clkd teacher RECIPE.yaml` makes it")
    try:
        return dict(unsealed_json(folder, MANIFEST)["identity"])
    except DamagedError as error:
        raise StoreError(f"{error}. {_START_AGAIN}") from None


TEACHER = "teacher_weights"


def refuse_differences(folder: Folder, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """StoreError naming every field of the identity that differs, with both values.

    `wanted` may lack the teacher's weights: who reads need not have the teacher.
    """
    ours = {name: None for name in stored if name != TEACHER} | dict(wanted)
    if differs := differences(stored, ours, ("store", "this run")):
        raise StoreError(
            f"{folder}: the soft-target store was made with another identity.{listed(differs)}\n"
            "Set targets.store to another folder (or delete this one), then run "
            "`clkd teacher RECIPE.yaml`. Nothing was read or changed."
        )


def identity_digest(identity: Mapping[str, Any]) -> str:
    """Short form of an identity that every commit carries."""
    return xxhash.xxh3_128_hexdigest(json.dumps(dict(identity), sort_keys=True))


def kinds_of(identity: Mapping[str, Any]) -> tuple[Kind, ...]:
    """Kinds of records, and so of files, that each shard of a store has; the soft targets are written last."""
    optional: dict[Kind, str] = {"sketches": "sketch_layer", "answers": "answers_samples"}
    return ("targets", *(kind for kind, setting in optional.items() if setting in identity))


def read_parts(folder: Folder) -> list[dict[str, Any]]:
    """The parts in the order they were added. StoreError when one is damaged."""
    count = sum(name.startswith("part-") and name.endswith(".json") for name in folder.names())
    try:
        return [unsealed_json(folder, part_name(number)) for number in range(count)]
    except DamagedError as error:
        raise StoreError(f"{error}. {_START_AGAIN}") from None


def planned_shards(parts: Iterable[Mapping[str, Any]]) -> Iterable[tuple[int, list[str]]]:
    """(shard number, sample ids) of every shard that the parts plan."""
    for part in parts:
        ids, size = part["sample_ids"], part["shard_samples"]
        for place, start in enumerate(range(0, len(ids), size)):
            yield part["first_shard"] + place, ids[start : start + size]


def part_name(number: int) -> str:
    """File of a part."""
    return f"part-{number:05d}.json"
