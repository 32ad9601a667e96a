"""Saving an engine's state as a checkpoint folder, and restoring it on any number of ranks and ZeRO stage.

A folder appears under its name only when complete and on disk (temporary folder, fsync, rename); a crash, a full disk
or a power cut leaves the previous checkpoint as it was. The layout: `pipeline.models.checkpoint_folder`.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import save_file
from torch import Tensor

from pipeline.errors import CheckpointError
from pipeline.files import sync
from pipeline.models.checkpoint_folder import (
    ARRAYS,
    FORMAT,
    LATEST,
    MANIFEST,
    SHARD_BYTES,
    STATE,
    TEMPLATE,
    Template,
    complete,
    fingerprint,
    latest,
    open_tensors,
    read_meta,
    verify,
)
from pipeline.models.hf_folder import TensorFiles
from pipeline.training import engine_state
from pipeline.training.engine_state import full_parameters

Arrays = Mapping[str, np.ndarray[Any, Any]]

WRITING, REMOVING = ".writing-", ".removing-"
"""How a folder's name begins while it is not complete yet, or no longer."""


# -- saving and loading ------------------------------------------------------------------------------------------------
# Rank 0 writes, but every rank takes part: ZeRO and expert parallelism spread each tensor over the ranks. Tensors are
# gathered one at a time and written in shards of a bounded size, so no rank ever holds the whole model.


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a checkpoint says besides the engine's own state."""

    step: int
    state: dict[str, Any]
    arrays: dict[str, np.ndarray[Any, Any]]


def save(
    engine: Any,
    root: Path,
    step: int,
    state: Mapping[str, Any],
    arrays: Arrays,
    keep: int,
    template: Template | None = None,
) -> Path:
    """Write a checkpoint and remove all but the newest `keep`. Collective: every rank calls it.

    Args:
        engine: DeepSpeed engine, between two optimizer steps.
        root: folder of the job's checkpoints, on storage that every rank sees.
        step: optimizer steps done.
        state: JSON-able; rank 0's is stored.
        arrays: numeric arrays; rank 0's are stored.
        keep: complete checkpoints to keep, this one included; at least 1.
        template: files that an export needs besides weights; rank 0's are stored.

    Returns:
        The new folder.

    Raises:
        CheckpointError: it could not be written (on every rank); the previous checkpoint is still valid.
    """
    writer = _Writer(root, step) if dist.get_rank() == 0 else None
    for tensors, prefix in ((full_parameters(engine), "model"), (_moments(engine), "optimizer")):
        # Each iteration gathers a tensor, which is collective: no rank may leave this loop early, not even on an error.
        for name, tensor in tensors:
            if writer:
                writer.add(prefix, name, tensor)
    if writer:
        optimizer = {
            "kind": engine_state.optimizer_kind(engine),
            "steps": engine_state.optimizer_steps(engine),
        }
        meta = {"format": FORMAT, "step": step, "optimizer": optimizer, "state": dict(state)}
        writer.finish(meta, arrays, template or {}, keep)
    return Path(_agree(str(writer.final) if writer else "", writer.error if writer else None))


def load(engine: Any, root: Path) -> Loaded | None:
    """Restore the engine from the newest checkpoint; None when there is none. Collective.

    Raises:
        CheckpointError: a file is damaged or missing, or the checkpoint is of another model or optimizer.
    """
    # Rank 0 alone reads all bytes to check them, and tells the others what it found.
    folder, error = "", None
    if dist.get_rank() == 0:
        try:
            newest = latest(root)
            folder = str(newest) if newest else ""
            if newest:
                verify(newest)
        except CheckpointError as problem:
            error = str(problem)
    folder = _agree(folder, error)
    if not folder:
        return None
    meta = read_meta(Path(folder))
    _restore(engine, Path(folder), meta)
    engine.global_steps = meta["step"]
    arrays = Path(folder) / ARRAYS
    return Loaded(meta["step"], meta["state"], load_arrays(arrays) if arrays.exists() else {})


def _moments(engine: Any) -> Iterator[tuple[str, Tensor]]:
    """(MOMENT/NAME, whole tensor) of the optimizer's state; nothing before its first step. Collective."""
    if engine_state.optimizer_steps(engine) == 0:
        return
    engine_state.link_moments(engine)
    for slot in engine_state.slots(engine):
        if slot.trainable:
            for moment in engine_state.MOMENTS[engine_state.optimizer_kind(engine)]:
                yield f"{moment}/{slot.name}", engine_state.read(engine, slot, moment)


def _restore(engine: Any, folder: Path, meta: Mapping[str, Any]) -> None:
    """Put parameters and moments into the engine. Names and shapes are all checked before the first is written."""
    kind, saved = engine_state.optimizer_kind(engine), meta["optimizer"]
    if saved["kind"] != kind:
        raise CheckpointError(
            f"{folder}: written with optimizer {saved['kind']}, this job uses {kind}. "
            "Use the same optimizer, or another job name to start afresh. Nothing was changed."
        )
    slots = engine_state.slots(engine)
    keys = engine_state.MOMENTS[kind] if saved["steps"] else ()
    trainable = [slot for slot in slots if slot.trainable]
    with open_tensors(folder, "model") as parameters, open_tensors(folder, "optimizer") as moments:
        _check_fit(folder, parameters, {slot.name: slot.shape for slot in slots})
        _check_fit(folder, moments, {f"{key}/{slot.name}": slot.shape for slot in trainable for key in keys})
        for slot in slots:
            engine_state.write(engine, slot, parameters[slot.name])
        if keys:  # a new optimizer has no moments before its first step: there must be some to write to
            engine_state.create_moments(engine, saved["steps"])
        for slot in trainable:
            for key in keys:
                engine_state.write(engine, slot, moments[f"{key}/{slot.name}"], key)
    engine_state.publish(engine)


def _check_fit(folder: Path, tensors: TensorFiles, wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError unless names and shapes are exactly the wanted ones."""
    found = {name: tensors.shape(name) for name in tensors}
    if found == wanted:
        return
    names = sorted(found.keys() | wanted.keys())
    problems = [
        f"{name}: checkpoint {found.get(name, 'absent')}, model {wanted.get(name, 'absent')}"
        for name in names
        if found.get(name) != wanted.get(name)
    ]
    raise CheckpointError(
        f"{folder}: {len(problems)} tensor(s) do not fit the model:\n  " + "\n  ".join(problems[:8]) + "\n"
        "The model or `trainable` changed; use another job name to start afresh. Nothing was changed."
    )


# -- writing a folder --------------------------------------------------------------------------------------------------


@dataclass
class _Writer:
    """Rank 0's side of `save`: a temporary folder that gets its name when everything in it is on disk.

    An error is kept, not raised: the other ranks are in the middle of gathering tensors and would wait forever.
    """

    root: Path
    step: int
    error: str | None = None
    final: Path = field(init=False)
    _pending: dict[str, Tensor] = field(default_factory=dict)
    _prefix: str = "model"
    _count: int = 0
    _bytes: int = 0
    _files: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.final = _free_name(self.root, self.step)
        self._temp = self.root / f"{WRITING}{self.final.name}"
        self._try(self._prepare)

    def _prepare(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        # The job's lock says that no other run is writing here: such folders are of a run that was killed.
        for stale in (*self.root.glob(f"{WRITING}*"), *self.root.glob(f"{REMOVING}*")):
            shutil.rmtree(stale)
        self._temp.mkdir()

    def add(self, prefix: str, name: str, tensor: Tensor) -> None:
        """Take one tensor; writes a shard whenever enough have come together."""
        if prefix != self._prefix:
            self._flush()
            self._prefix, self._count = prefix, 0
        self._pending[name] = tensor.contiguous()
        self._bytes += tensor.nbytes
        if self._bytes >= SHARD_BYTES:
            self._flush()

    def finish(self, meta: dict[str, Any], arrays: Arrays, template: Template, keep: int) -> None:
        """Write the rest, bring everything to disk, let `latest` name the new folder, remove the oldest ones."""
        self._flush()
        self._try(lambda: self._write_rest(meta, arrays, template))
        self._try(self._commit)
        if self.error is None:
            self._try(lambda: _prune(self.root, keep))
        else:
            shutil.rmtree(self._temp, ignore_errors=True)

    def _flush(self) -> None:
        pending, self._pending, self._bytes = self._pending, {}, 0
        if pending:
            self._count += 1
            path = self._temp / f"{self._prefix}-{self._count:05d}.safetensors"
            self._try(lambda: self._write(path, lambda: save_file(pending, path)))

    def _write_rest(self, meta: dict[str, Any], arrays: Arrays, template: Template) -> None:
        if arrays:
            contiguous = {key: np.ascontiguousarray(value) for key, value in arrays.items()}
            self._write(self._temp / ARRAYS, lambda: save_arrays(contiguous, self._temp / ARRAYS))
        self._write(self._temp / STATE, lambda: (self._temp / STATE).write_text(json.dumps(meta)))
        if template:
            (self._temp / TEMPLATE).mkdir()
        for name, content in template.items():
            path = self._temp / TEMPLATE / name
            self._write(path, partial(path.write_bytes, content))
        if template:
            sync(self._temp / TEMPLATE)

    def _commit(self) -> None:
        """Manifest, then the folder's name, then the pointer `latest`: each is on disk before the next one begins."""
        (self._temp / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": self._files}, indent=1))
        sync(self._temp / MANIFEST)
        sync(self._temp)
        self._temp.rename(self.final)
        sync(self.root)
        pointer = self.root / f".{LATEST}"
        pointer.write_text(self.final.name + "\n")
        sync(pointer)
        pointer.replace(self.root / LATEST)
        sync(self.root)

    def _write(self, path: Path, write: Callable[[], object]) -> None:
        """Write a file, wait until it is on disk, and note its size and hash for the manifest."""
        write()
        sync(path)
        self._files[path.relative_to(self._temp).as_posix()] = fingerprint(path)

    def _try(self, action: Callable[[], object]) -> None:
        """Do something unless something has failed before."""
        if self.error is not None:
            return
        try:
            action()
        except (OSError, SafetensorError, TypeError, ValueError) as error:
            self.error = f"{self.final}: could not be written: {error}. The previous checkpoint is still valid."


# -- names and ranks ---------------------------------------------------------------------------------------------------


def _agree(value: str, error: str | None) -> str:
    """Rank 0's value on every rank; or its error, raised on every rank."""
    message: list[Any] = [value, error]
    dist.broadcast_object_list(message, src=0)
    if message[1] is not None:
        raise CheckpointError(message[1])
    return str(message[0])


def _free_name(root: Path, step: int) -> Path:
    """A folder name not in use: a step may be written again after a restart from an older checkpoint."""
    names = [f"step-{step:08d}"] + [f"step-{step:08d}-{n}" for n in range(2, 1000)]
    return next(root / name for name in names if not (root / name).exists())


def _prune(root: Path, keep: int) -> None:
    """Remove the oldest complete checkpoints but for `keep`; never the one that `latest` names."""
    current = latest(root)
    older = [path for path in complete(root) if path != current]
    for path in older[: max(0, len(older) - (keep - 1))]:
        # Renamed first: a kill half-way must not leave a part of a checkpoint under a checkpoint's name.
        dying = path.rename(root / f"{REMOVING}{path.name}")
        shutil.rmtree(dying)
