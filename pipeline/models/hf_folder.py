"""Checkpoint folders in Hugging Face format, read and written tensor by tensor.

Nothing here holds more than one tensor, so a model may be larger than the memory.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from pipeline.errors import UserError
from pipeline.files import put_in_place, sync
from pipeline.models.families import MOE_FAMILIES, moe_family, without_weights

SHARD_BYTES = 4 << 30
HEADER_BYTES = 1 << 19
"""Room for a shard's header: some 4,000 tensors."""
INDEX = "model.safetensors.index.json"


# -- safetensors files -------------------------------------------------------------------------------------------------


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
    """Writes tensors into safetensors shards of bounded size, and the index that transformers reads.

    Each tensor goes to disk as it comes, so memory holds one tensor; safetensors' `save_file` would need a whole shard.
    Room for the header is left at the beginning and filled in when the shard is full (the format allows blanks at the
    header's end).
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._shards: list[dict[str, Any]] = []
        self._file: IO[bytes] | None = None
        self._bytes, self._header_bytes, self._total = 0, 0, 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, in the layout on disk."""
        raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        entry = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape)}
        room = len(json.dumps({name: entry})) + 80  # and two offsets of up to 20 digits
        if self._bytes >= SHARD_BYTES or self._header_bytes + room > HEADER_BYTES:
            self._close()
        if self._file is None:
            self._file = (self._folder / _shard_name(len(self._shards) + 1)).open("wb")
            self._file.seek(8 + HEADER_BYTES)
            self._shards.append({"__metadata__": {"format": "pt"}})
            self._bytes, self._header_bytes = 0, 80
        self._file.write(raw.data)
        self._shards[-1][name] = entry | {"data_offsets": [self._bytes, self._bytes + raw.nbytes]}
        self._header_bytes += room
        self._bytes += raw.nbytes
        self._total += raw.nbytes

    def finish(self) -> None:
        """Complete the last shard, give the shards their final names and write the index."""
        self._close()
        weight_map: dict[str, str] = {}
        for number, header in enumerate(self._shards, 1):
            final = f"model-{number:05d}-of-{len(self._shards):05d}.safetensors"
            (self._folder / _shard_name(number)).rename(self._folder / final)
            weight_map |= {name: final for name in header if name != "__metadata__"}
        index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(weight_map.items()))}
        (self._folder / INDEX).write_text(json.dumps(index, indent=1))

    def _close(self) -> None:
        if self._file is None:
            return
        header = json.dumps(self._shards[-1]).encode().ljust(HEADER_BYTES)
        self._file.seek(0)
        self._file.write(HEADER_BYTES.to_bytes(8, "little") + header)
        self._file.close()
        self._file = None


def _shard_name(number: int) -> str:
    return f"model-{number:05d}.safetensors"


_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Names of element types in a safetensors header."""


# -- folders -----------------------------------------------------------------------------------------------------------


class Building:
    """Context manager: a folder that appears under its name only when its content is complete.

    An older folder of that name is replaced if `replace`, and refused otherwise. After a power cut there is the older
    folder or the new one, whole.
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
        for path in (*self._temp.rglob("*"), self._temp):
            sync(path)
        put_in_place(self._temp, self._final)


# -- names and layouts of published checkpoints ------------------------------------------------------------------------


class DiskLayout:
    """Names and layout that checkpoints have on disk, for the tensors of a loaded model.

    transformers itself turns its modules' names and packed experts into those of published checkpoints
    (`language_model.model...` of older composites, one matrix per expert and projection). One thing is added here.
    Qwen3-VL-MoE is published, and read by serving engines, with the input dimension of packed experts first:
    `experts.gate_up_proj` [E, H, 2W] and `experts.down_proj` [E, W, H]. transformers has and writes [E, 2W, H] and
    [E, H, W]. It reads both and tells them apart by shape, which a square matrix does not say: a model with square
    experts is written as transformers writes it, and `turn_square_experts` reads it either way.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        self._model = without_weights(config)
        family = moe_family(config)
        self._packed = family is not None and family.on_disk == "packed" and square_expert(config) is None

    def __call__(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) pairs on disk of one module tensor: several for experts that are stored one by one."""
        for disk_name, stored in revert_weight_conversion(self._model, {name: tensor}).items():
            packed = self._packed and disk_name.endswith((".experts.gate_up_proj", ".experts.down_proj"))
            yield disk_name, stored.transpose(1, 2) if packed else stored


_EXPERTS = re.compile(r".*\blayers\.(?P<layer>\d+)\.mlp\.experts\.(?P<part>gate_up_proj|down_proj)")


def square_expert(config: PreTrainedConfig) -> str | None:
    """Which tensor of packed experts has square matrices, `gate_up_proj` (H = 2W) or `down_proj` (H = W), if any."""
    text: Any = config.get_text_config()
    family = MOE_FAMILIES.get(text.model_type)
    if family is None or family.on_disk != "packed" or not getattr(text, "num_experts", 0):
        return None
    return {2 * text.moe_intermediate_size: "gate_up_proj", text.moe_intermediate_size: "down_proj"}.get(
        text.hidden_size
    )


def turn_square_experts(model: PreTrainedModel, folder: Path) -> None:
    """Transpose the square experts of a model that transformers has just loaded from the published layout.

    It takes them as they are. The layer's other tensor is not square and says which layout the folder has.

    Raises:
        UserError: the folder does not say, or the weights are not in memory.
    """
    square = square_expert(model.config)
    if square is None:
        return
    config: Any = model.config.get_text_config()
    # [E, 2W, H] and [E, H, W] in transformers' layout, the last two swapped in the published one.
    hidden, width = config.hidden_size, config.moe_intermediate_size
    ours = (2 * width, hidden) if square == "down_proj" else (hidden, width)
    with TensorFiles(folder.glob("*.safetensors")) as files:
        shapes = {
            int(match["layer"]): files.shape(name)[1:]
            for name in files
            if (match := _EXPERTS.fullmatch(name)) and match["part"] != square
        }
    for name, parameter in model.named_parameters():
        match = _EXPERTS.fullmatch(name)
        if match is None or match["part"] != square:
            continue
        found = shapes.get(int(match["layer"]))
        if found not in (ours, ours[::-1]):
            raise UserError(
                f"{folder}: {name} has square matrices, and no other tensor of its layer tells in which layout "
                f"(sizes {found}, expected {ours} or {ours[::-1]}). Nothing was started."
            )
        if found == ours:
            continue
        if parameter.is_meta:
            raise UserError(
                f"{folder}: {name} has square matrices in the published layout, which can only be turned in memory; "
                "targets.device_map leaves it on disk. Nothing was started."
            )
        parameter.data = parameter.data.transpose(1, 2).contiguous()


def save_config(config: PreTrainedConfig, folder: Path) -> None:
    """Write config.json; keys that transformers 5 has renamed are written under their old names too.

    Readers that know the old names alone, serving engines among them, ignore the new ones and silently take their own
    defaults for the number of experts and the rotary base. transformers 5 reads both, with the same result.
    """
    config.save_pretrained(str(folder))
    path = folder / "config.json"
    content = json.loads(path.read_text())
    text = content.get("text_config", content)
    if "num_local_experts" in text:
        text.setdefault("num_experts", text["num_local_experts"])
    rope = dict(text.get("rope_parameters") or {})
    if "rope_theta" in rope:
        text.setdefault("rope_theta", rope.pop("rope_theta"))
        text.setdefault("rope_scaling", rope if rope.keys() != {"rope_type"} else None)
    path.write_text(json.dumps(content, indent=2) + "\n")


def copy_companions(src: Path, dst: Path, skip: Sequence[str] = ()) -> None:
    """Copy a checkpoint's other files: tokenizer, image processor, generation settings."""
    for path in src.iterdir():
        weights = path.suffix in (".safetensors", ".bin", ".pt") or path.name == INDEX
        if path.is_file() and not weights and path.name not in ("config.json", "README.md", *skip):
            shutil.copy2(path, dst / path.name)
