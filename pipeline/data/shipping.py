"""From a DataLoader's worker to the process that trains: all tensors of a batch as one block of shared memory.

torch opens a connection for every tensor that it hands from one process to another. A micro-batch has a dozen and more
tensors, and for those that takes far longer than copying them into one block.
"""

import io
import pickle
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

T = TypeVar("T")
Place = tuple[int, torch.dtype, tuple[int, ...]]
"""First byte in the block, dtype and shape of a tensor."""
_ALIGNED = 64


class _Pickler(pickle.Pickler):
    """Writes a place instead of each tensor."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=5)
        self.tensors: list[tuple[Place, Tensor]] = []
        self.size = 0

    def persistent_id(self, value: Any) -> Place | None:
        if not isinstance(value, Tensor):
            return None
        place = self.size, value.dtype, tuple(value.shape)
        self.tensors.append((place, value))
        self.size += -(-value.nbytes // _ALIGNED) * _ALIGNED
        return place


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, block: Tensor) -> None:
        super().__init__(file)
        self.block = block

    def persistent_load(self, place: Place) -> Tensor:
        return _at(self.block, place)


def _at(block: Tensor, place: Place) -> Tensor:
    begin, dtype, shape = place
    return block[begin : begin + torch.Size(shape).numel() * dtype.itemsize].view(dtype).view(shape)


def pack(value: object) -> tuple[bytes, Tensor]:
    """Anything that can be pickled, with tensors on the CPU: pickle without the tensors, and their bytes u8."""
    out = io.BytesIO()
    pickler = _Pickler(out)
    pickler.dump(value)
    block = torch.empty(pickler.size, dtype=torch.uint8)
    for place, tensor in pickler.tensors:
        _at(block, place).copy_(tensor)
    return out.getvalue(), block


def unpack(head: bytes, block: Tensor) -> Any:
    """Inverse of `pack`; the tensors are views of the block, pinned if it is."""
    return _Unpickler(io.BytesIO(head), block).load()


def loaded(dataset: Dataset[T], workers: int) -> Iterator[T]:
    """A data set's items in order, made by worker processes ahead of their use; 0: in this process, when asked for.

    Their tensors are in pinned memory where there is a GPU; then the items need a method `pin_memory`.
    """
    pinned = torch.cuda.is_available()
    if workers:
        for parcel in DataLoader(dataset, batch_size=None, num_workers=workers, collate_fn=pack, pin_memory=pinned):
            yield unpack(*parcel)
    else:
        yield from DataLoader(dataset, batch_size=None, pin_memory=pinned)
