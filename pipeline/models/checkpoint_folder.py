"""A training checkpoint on disk: its layout, and reading it without an engine.

    <root>/step-00000100/model-00001.safetensors       fp32 parameters by Hugging Face name
                         optimizer-00001.safetensors   moments, as `exp_avg/NAME`
                         arrays.safetensors            the caller's arrays
                         state.json                    step, the caller's state, optimizer kind and step count
                         template/                     configuration, tokenizer, ...: what an export also needs
                         manifest.json                 size and xxh3 of each file above
    <root>/latest                                      name of the newest complete folder, written last

No pickle: safetensors, JSON and text only. A folder holds all that an export needs, so it may be copied away alone.
`pipeline.training.checkpoint` writes these folders and puts them back into an engine.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import xxhash
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from pipeline.errors import CheckpointError
from pipeline.models.hf_folder import TensorFiles

Template = Mapping[str, bytes]
"""Small files by name."""

FORMAT = 1
SHARD_BYTES = 2 << 30
LATEST = "latest"
MANIFEST = "manifest.json"
STATE = "state.json"
ARRAYS = "arrays.safetensors"
TEMPLATE = "template"
_NAME = re.compile(r"step-(\d+)(?:-(\d+))?")


def latest(root: Path) -> Path | None:
    """Folder of the newest complete checkpoint, None when there is none."""
    pointer = root / LATEST
    if not pointer.exists():
        return None
    folder = root / pointer.read_text().strip()
    if not _NAME.fullmatch(folder.name) or not folder.is_dir():
        raise CheckpointError(
            f"{pointer}: names {folder.name!r}, which is not a checkpoint in {root}. {_advice(folder)}"
        )
    return folder


def find(path: Path) -> Path:
    """The checkpoint folder that a path means: `step-...` itself, else the newest of a `checkpoints` or a job folder.

    Raises:
        CheckpointError: there is none.
    """
    if (path / MANIFEST).is_file():
        return path
    newest = latest(path) or latest(path / "checkpoints")
    if newest is None:
        raise CheckpointError(
            f"{path}: no checkpoint: neither a folder `step-...` with a {MANIFEST}, nor a job's folder, nor its "
            "`checkpoints`. Nothing was written."
        )
    return newest


def verify(folder: Path) -> None:
    """Check every file of a checkpoint against its manifest.

    Raises:
        CheckpointError: names the first file that is missing, of another size, of other content, or not listed.
    """
    manifest = _read_json(folder / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{folder}: format {manifest.get('format')!r}, this version reads {FORMAT}.")
    listed = manifest.get("files")
    if not isinstance(listed, dict):
        raise CheckpointError(f"{folder / MANIFEST}: damaged: it lists no files. {_advice(folder)}")
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    unlisted = sorted(there - listed.keys() - {MANIFEST})
    if unlisted:  # another shard would be read beside the listed ones
        raise CheckpointError(
            f"{folder / unlisted[0]}: not written with this checkpoint ({MANIFEST} does not list it). Remove it "
            "if you know where it came from. Nothing was changed."
        )
    for name, expected in listed.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path}: missing. {_advice(folder)}")
        found = fingerprint(path)
        if found != expected:
            raise CheckpointError(f"{path}: damaged: {found}, manifest {expected}. {_advice(folder)}")


def read_parameters(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, fp32 tensor) of every parameter in a checkpoint folder. No engine needed.

    One tensor at a time: a tensor of its own, no view on a mapped file, which would keep the whole shard resident.
    """
    for path in _shards(folder, "model"):
        with TensorFiles([path]) as tensors:
            names = list(tensors)
        for name in names:
            with TensorFiles([path]) as tensors:
                tensor = tensors[name].clone()
            yield name, tensor


def parameter_names(folder: Path) -> set[str]:
    """Hugging Face names of the parameters in a checkpoint folder."""
    with open_tensors(folder, "model") as tensors:
        return set(tensors)


def read_template(folder: Path) -> dict[str, bytes]:
    """The files that an export needs besides weights, as `save` got them; empty when it got none."""
    return {path.name: path.read_bytes() for path in sorted((folder / TEMPLATE).glob("*"))}


def read_arrays(folder: Path, prefix: str = "") -> dict[str, NDArray[Any]]:
    """The caller's arrays whose names begin with `prefix`, which is taken off; empty when there are none."""
    path = folder / ARRAYS
    if not path.exists():
        return {}
    with safe_open(path, framework="numpy") as file:
        every = list(file.keys())
        return {name.removeprefix(prefix): file.get_tensor(name) for name in every if name.startswith(prefix)}


def read_meta(folder: Path) -> dict[str, Any]:
    """Contents of a checkpoint's state.json: `step`, the caller's `state`, `optimizer`."""
    return _read_json(folder / STATE)


def open_tensors(folder: Path, prefix: str) -> TensorFiles:
    """The tensors of all shards of one kind: `model` or `optimizer`."""
    return TensorFiles(_shards(folder, prefix))


def _shards(folder: Path, prefix: str) -> list[Path]:
    return sorted(folder.glob(f"{prefix}-*.safetensors"))


def complete(root: Path) -> list[Path]:
    """Complete checkpoint folders, oldest first."""
    named = [(match, path) for path in root.iterdir() if (match := _NAME.fullmatch(path.name))]
    ordered = sorted(named, key=lambda pair: (int(pair[0][1]), int(pair[0][2] or 0)))
    return [path for _, path in ordered]


def fingerprint(path: Path) -> dict[str, Any]:
    """Size and hash of a file, as the manifest lists them."""
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while block := file.read(1 << 23):
            digest.update(block)
    return {"bytes": path.stat().st_size, "xxh3": digest.hexdigest()}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}. {_advice(path.parent)}") from None
    return content


def _advice(folder: Path) -> str:
    others = [path.name for path in complete(folder.parent) if path != folder] if folder.parent.is_dir() else []
    if others:
        return f"To use an older one, write {others[-1]!r} into {folder.parent / LATEST}. Nothing was changed."
    return f"To start afresh, remove {folder.parent}. Nothing was changed."
