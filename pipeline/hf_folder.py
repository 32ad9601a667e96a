"""Checkpoint folders in Hugging Face format, read and written tensor by tensor.

A model larger than memory passes through: nothing here holds more than one shard.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline.errors import UserError

SHARD_BYTES = 4 << 30
INDEX = "model.safetensors.index.json"


class TensorFiles:
    """The tensors of several safetensors files by name, read on demand. Use as a context manager."""

    def __init__(self, paths: Iterable[Path]) -> None:
        """Open the files. Raises UserError naming one that cannot be read."""
        self._open: list[Any] = []
        self._shard: dict[str, Any] = {}
        for path in sorted(paths):
            try:
                shard: Any = safe_open(path, framework="pt")
                shard.__enter__()
            except (SafetensorError, OSError) as error:
                self.close()
                raise UserError(f"{path}: cannot be read: {error}") from None
            self._open.append(shard)
            self._shard |= dict.fromkeys(shard.keys(), shard)

    def close(self) -> None:
        """Close the files; tensors already read stay valid."""
        for shard in self._open:
            shard.__exit__(None, None, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._shard))

    def __contains__(self, name: str) -> bool:
        return name in self._shard

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._shard[name].get_tensor(name)
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the file's header alone."""
        return tuple(self._shard[name].get_slice(name).get_shape())


class ShardWriter:
    """Writes tensors into shards of bounded size, and the index that transformers reads."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pending: dict[str, Tensor] = {}
        self._bytes, self._total, self._count = 0, 0, 0
        self._index: dict[str, str] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one tensor, in the layout on disk."""
        self._pending[name] = tensor.contiguous()
        self._bytes += tensor.nbytes
        if self._bytes >= SHARD_BYTES:
            self._flush()

    def finish(self) -> None:
        """Write the last shard and the index."""
        self._flush()
        index = {"metadata": {"total_size": self._total}, "weight_map": self._index}
        (self._folder / INDEX).write_text(json.dumps(index, indent=1))

    def _flush(self) -> None:
        if self._pending:
            self._count += 1
            file = f"model-{self._count:05d}.safetensors"
            save_file(self._pending, self._folder / file, metadata={"format": "pt"})
            self._index |= dict.fromkeys(self._pending, file)
            self._total += self._bytes
        self._pending, self._bytes = {}, 0


class Building:
    """Context manager: a folder that appears under its name only when its content is complete.

    An older folder of that name is replaced if `replace`, and refused otherwise.
    """

    def __init__(self, final: Path, *, replace: bool = False) -> None:
        self._final, self._replace = final, replace
        self._temp = final.with_name(f".{final.name}.writing-{os.getpid()}")

    def __enter__(self) -> Path:
        if self._final.exists() and not self._replace:
            raise UserError(f"{self._final}: exists already. Nothing was changed.")
        self._temp.mkdir(parents=True)
        return self._temp

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            shutil.rmtree(self._temp, ignore_errors=True)
            return
        old = self._final.with_name(f".{self._final.name}.old-{os.getpid()}")
        if self._final.exists():
            self._final.rename(old)
        self._temp.rename(self._final)
        shutil.rmtree(old, ignore_errors=True)


def packed_on_disk(name: str, tensor: Tensor) -> Tensor:
    """A tensor of an MoE module as checkpoints hold it: packed experts transposed, input dimension first.

    Qwen publishes `experts.gate_up_proj` [E, H, 2W] and `experts.down_proj` [E, W, H], and serving engines
    expect that; transformers' module has [E, 2W, H] and [E, H, W]. transformers reads both, telling them
    apart by shape, and therefore takes square matrices as the module has them.
    """
    if not name.endswith((".experts.gate_up_proj", ".experts.down_proj")) or tensor.shape[1] == tensor.shape[2]:
        return tensor
    return tensor.transpose(1, 2).contiguous()


def copy_companions(src: Path, dst: Path, skip: Sequence[str] = ()) -> None:
    """Copy a checkpoint's other files: tokenizer, image processor, generation settings."""
    for path in src.iterdir():
        weights = path.suffix in (".safetensors", ".bin", ".pt") or path.name == INDEX
        if path.is_file() and not weights and path.name not in ("config.json", "README.md", *skip):
            shutil.copy2(path, dst / path.name)
