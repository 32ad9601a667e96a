"""From a DataLoader's worker to the process that trains: all tensors of a batch as one block of shared memory.

torch opens a connection for every tensor that it hands from one process to another, which takes far longer than the
copying of a micro-batch's dozen and more tensors.
"""

import io
import pickle
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

T = TypeVar("T")
Parcel = tuple[bytes, list[int], Tensor]
"""Pickle without the tensors' bytes, bytes of each tensor, and those bytes u8, each from a multiple of 64 on."""
_ALIGNED = 64


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        """Tensors as arrays, whose bytes protocol 5 leaves out."""
        return (torch.from_numpy, (value.contiguous().numpy(),)) if isinstance(value, Tensor) else NotImplemented


def pack(value: object) -> Parcel:
    """Anything that can be pickled, with tensors on the CPU."""
    out, buffers = io.BytesIO(), list[pickle.PickleBuffer]()
    _Pickler(out, protocol=5, buffer_callback=buffers.append).dump(value)
    views = [buffer.raw() for buffer in buffers]
    sizes = [view.nbytes for view in views]
    block = torch.empty(sum(map(_padded, sizes)), dtype=torch.uint8)
    begin, room = 0, block.numpy().data
    for view in views:
        room[begin : begin + view.nbytes] = view
        begin += _padded(view.nbytes)
    return out.getvalue(), sizes, block


def unpack(parcel: Parcel) -> Any:
    """Inverse of `pack`; the tensors are views of the block."""
    head, sizes, block = parcel
    begin, buffers, room = 0, [], block.numpy().data
    for size in sizes:
        buffers.append(room[begin : begin + size])
        begin += _padded(size)
    return pickle.loads(head, buffers=buffers)


def loaded(dataset: Dataset[T], workers: int) -> Iterator[T]:
    """A data set's items in order, made by worker processes ahead of their use; 0: in this process, when asked for."""
    if workers:
        for parcel in DataLoader(dataset, batch_size=None, num_workers=workers, collate_fn=pack):
            yield unpack(parcel)
    else:
        yield from DataLoader(dataset, batch_size=None)


def _padded(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED
