"""From a DataLoader's worker to the process that trains: all tensors of a batch as one block of shared memory.

torch opens a connection for every tensor that it hands from one process to another. A micro-batch has a dozen and more
tensors, and for those that takes far longer than copying them into one block. Where shared memory is short (containers
have 64 MB by default, and writing beyond it kills the worker) the block goes through the worker's pipe instead.
"""

import contextlib
import io
import os
import pickle
import signal
from collections.abc import Iterable, Iterator
from multiprocessing.sharedctypes import RawValue
from multiprocessing.util import Finalize
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipeline.errors import UserError

T = TypeVar("T")
Place = tuple[int, torch.dtype, tuple[int, ...]]
"""First byte in the block, dtype and shape of a tensor."""
_ALIGNED = 64
_SIGNALS = {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT}
SHARED = "/dev/shm"
ROOM = 16
"""How many times a block must fit into what is free: as many workers may be looking at the same moment."""


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


def pack(value: object) -> tuple[bytes, Tensor | bytes]:
    """Anything that can be pickled, with tensors on the CPU: pickle without the tensors, and their bytes.

    As a tensor u8, which torch hands on in shared memory, or as `bytes` where there is too little of that.
    """
    out = io.BytesIO()
    pickler = _Pickler(out)
    pickler.dump(value)
    block = torch.empty(pickler.size, dtype=torch.uint8)
    for place, tensor in pickler.tensors:
        _at(block, place).copy_(tensor)
    roomy = pickler.size == 0 or _free_bytes(SHARED) >= ROOM * pickler.size
    return out.getvalue(), block if roomy else block.numpy().tobytes()


def unpack(head: bytes, block: Tensor | bytes) -> Any:
    """Inverse of `pack`; the tensors are views of the block, pinned if it is."""
    whole = torch.frombuffer(bytearray(block), dtype=torch.uint8) if isinstance(block, bytes) else block
    return _Unpickler(io.BytesIO(head), whole).load()


def _free_bytes(folder: str) -> int:
    """Room in a file system; 0 where there is none of that name."""
    try:
        found = os.statvfs(folder)
    except OSError:
        return 0
    return found.f_bavail * found.f_frsize


def loaded(dataset: Dataset[T], workers: int, order: Iterable[int] | None = None) -> Iterator[T]:
    """A data set's items in order, made by worker processes ahead of their use; 0: in this process, when asked for.

    Tensors are in pinned memory where there is a GPU; then the items need a method `pin_memory`.

    Args:
        order: places of the items wanted, asked for a few ahead; None: all.
    """
    pinned = torch.cuda.is_available()
    if workers:
        dataset = _Told(dataset)
    if not workers:
        yield from DataLoader(dataset, batch_size=None, sampler=order, pin_memory=pinned)
        return
    crew = _Crew()
    options: dict[str, Any] = {"num_workers": workers, "worker_init_fn": crew.enter, "collate_fn": pack}
    try:
        with crew.held_back():
            parcels = iter(DataLoader(dataset, batch_size=None, sampler=order, pin_memory=pinned, **options))
        for parcel in parcels:
            item = unpack(*parcel)
            if isinstance(item, UserError):
                raise item
            yield item
    finally:
        crew.dismiss()


class _Told(Dataset[Any]):
    """A data set whose refusals travel as items: as an exception, a worker's would come with its whole traceback."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, place: int) -> Any:
        try:
            return self.dataset[place]
        except UserError as error:
            return type(error)(str(error))


class _Crew:
    """Workers that a SIGTERM to the whole job leaves alone: who trains writes a checkpoint first, and needs them.

    Slurm, torchrun and a shell's process groups send the signal to every process. A worker that died of it would be an
    error in the middle of a step, or of the checkpoint. But the process that has started the workers ends them with the
    same signal; a byte that they share says when it means it.
    """

    def __init__(self) -> None:
        self.dismissed = RawValue("b", 0)
        # Where an error ended the process with a loader open: before multiprocessing, also in a child of its own (where
        # nothing of `atexit` runs), sends its children SIGTERM and waits for them.
        self.at_exit = Finalize(None, self.dismiss, exitpriority=100)

    def dismiss(self) -> None:
        """From now on SIGTERM ends the workers."""
        self.dismissed.value = 1
        self.at_exit.cancel()

    @contextlib.contextmanager
    def held_back(self) -> Iterator[None]:
        """Signals wait while workers are started: one that came before `enter` would end a worker."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def enter(self, number: int) -> None:
        """In a worker, when it starts. Ctrl-C and SIGUSR1 are for the process that trains, too."""
        signal.signal(signal.SIGTERM, self._leave_if_dismissed)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)

    def _leave_if_dismissed(self, number: int, frame: FrameType | None) -> None:
        if self.dismissed.value:
            os._exit(0)
