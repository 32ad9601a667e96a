"""The teacher pass: soft targets of the training split, once, into the store.

    clkd teacher RECIPE.yaml [--worker I --workers N] [--json FILE]
    accelerate launch --multi_gpu --num_processes N -m pipeline.teacher.stage --config RECIPE.yaml

The sorted list of samples is planned into shards. Worker I takes shards j = I mod N first and then those that no other
worker holds, so workers may be killed, added or left out. A shard that is committed is skipped: the same command goes
on after any interruption, and adds the samples that the data set has gained.
"""

import argparse
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import PreTrainedModel

from pipeline.data.index.samples import sample_ids
from pipeline.data.processor import Batch, Processor, collate
from pipeline.data.sample import Sample
from pipeline.data.splits import open_training_split
from pipeline.errors import ConfigError
from pipeline.files import write_json
from pipeline.models.compatibility import check_compatible, check_own_files
from pipeline.models.loading import batch_attention, compute_device, load_model
from pipeline.recipe import Recipe
from pipeline.targets import sketches
from pipeline.targets.container.leases import ShardLeases, clear_leases
from pipeline.targets.container.records import RecordWriter
from pipeline.targets.container.shards import CommitRecord
from pipeline.targets.identity import dataset_fingerprint, expected_identity
from pipeline.targets.store import write_targets
from pipeline.teacher.forward import Outputs, batch_outputs

WINDOW_BATCHES = 8
"""Batches whose samples are encoded together and sorted by length: little padding, bounded memory."""


@dataclass(frozen=True, slots=True)
class Window:
    """Consecutive samples of one shard."""

    shard: int
    samples: Sequence[Sample]


@dataclass(frozen=True, slots=True)
class PassSummary:
    """What one run of the stage did."""

    shards: int
    """Written by this run."""
    skipped: int
    """Committed before it began."""
    elsewhere: int
    """Left to other workers, or committed by them meanwhile."""
    samples: int
    tokens: int
    bytes: int
    cut_tokens: int
    """Answer tokens left out because of `data.long_answers: cut`."""
    seconds: float

    def __str__(self) -> str:
        others = f", {self.elsewhere} left to other workers" if self.elsewhere else ""
        if not self.shards:
            return f"teacher pass: nothing to do, {self.skipped} shard(s) are committed{others}"
        return (
            f"teacher pass: {self.shards} shard(s) written, {self.skipped} already committed{others}; "
            f"{self.samples} samples, {self.tokens} answer tokens in {self.seconds:.1f} s "
            f"({self.tokens / self.seconds:.0f} tokens/s), {self.bytes / max(self.tokens, 1):.1f} bytes/token"
            + (f"; {self.cut_tokens} answer tokens CUT to fit data.max_length" if self.cut_tokens else "")
        )


class EncodedWindows(Dataset[tuple[int, list[Batch]]]):
    """(shard, batches of similar length) of each window; encoding runs in DataLoader workers."""

    def __init__(self, windows: Sequence[Window], processor: Processor, batch_size: int) -> None:
        self.windows, self.processor, self.batch_size = windows, processor, batch_size

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> tuple[int, list[Batch]]:
        window, processor = self.windows[index], self.processor
        encoded = [processor.encode(sample) for sample in window.samples]
        encoded.sort(key=lambda e: len(e.input_ids))  # stable: the batches are the same in every run
        chunks = [encoded[i : i + self.batch_size] for i in range(0, len(encoded), self.batch_size)]
        return window.shard, [collate(chunk, processor.pad_id, processor.image_token_id) for chunk in chunks]


def run_pass(recipe: Recipe, worker: int = 0, workers: int = 1) -> PassSummary:
    """Write the shards that are neither committed nor in another worker's hands, this worker's share first.

    Raises:
        UserError: bad data, no teacher, or a store that was made for another identity (nothing was changed).
    """
    if not 0 <= worker < workers:
        raise ConfigError(f"--worker {worker} must lie in [0, --workers {workers})")
    torch.set_float32_matmul_precision(recipe.run.matmul_precision)
    processor = Processor.load(recipe.processor_dir, recipe.data)
    samples = open_training_split(recipe)
    writer = RecordWriter(recipe.store_url, expected_identity(recipe, processor))
    committed, damaged = writer.committed()
    planned = writer.plan(samples.sample_ids, recipe.targets.shard_samples, dataset_fingerprint(samples), committed)
    for problem in damaged:
        print(f"rebuilding: {problem}")
    clear_leases(writer.folder, committed)
    own_first = sorted(planned, key=lambda shard: ((shard - worker) % workers, shard))
    todo = {n: samples.select(samples.places(planned[n])) for n in own_first if n not in committed}
    skipped = len(planned) - len(todo)
    if not todo:
        return PassSummary(0, skipped, 0, 0, 0, 0, 0, 0.0)
    return _write_shards(recipe, writer, _load_teacher(recipe, processor), processor, todo, skipped)


def _load_teacher(recipe: Recipe, processor: Processor) -> PreTrainedModel:
    settings = recipe.targets
    dtype: torch.dtype = getattr(torch, settings.dtype)
    path = recipe.model_dir(settings.teacher)
    model = load_model(path, dtype, attention=batch_attention(), device_map=settings.device_map)
    check_compatible(model, processor)
    check_own_files(path, processor, recipe.data)
    if settings.device_map is None:
        torch.nn.Module.to(model, compute_device(recipe.run.device))
    return model


def _write_shards(
    recipe: Recipe,
    writer: RecordWriter,
    model: PreTrainedModel,
    processor: Processor,
    todo: Mapping[int, Sequence[Sample]],
    skipped: int,
) -> PassSummary:
    started, records, cut_tokens = time.perf_counter(), [], 0
    done = Outputs()
    left = {shard: len(samples) for shard, samples in todo.items()}
    bar = tqdm(total=sum(left.values()), desc="teacher pass", unit="sample", disable=None)
    # One thread encodes and writes a shard while the next one is computed.
    with ShardLeases(writer.folder) as leases, bar, ThreadPoolExecutor(1) as pool:
        writing: list[Future[CommitRecord]] = []

        def take(shard: int) -> bool:
            taken = leases.claim(shard)
            if taken and writer.is_whole(shard):  # another worker's work since this one began
                leases.release(shard)
                taken = False
            if not taken:
                left.pop(shard)
                bar.total = sum(left.values())
            return taken

        def commit(shard: int, outputs: Outputs) -> CommitRecord:
            record = _commit(writer, shard, sample_ids(todo[shard]), outputs)
            leases.release(shard)
            return record

        def finish_writing() -> None:
            for future in writing:
                records.append(future.result())
                bar.set_postfix_str(_rates(records, time.perf_counter() - started))
            writing.clear()

        for shard, batches in _encoded_windows(recipe, processor, todo, take):
            for batch in batches:
                outputs = batch_outputs(model, batch, recipe.targets, processor.vocab_size)
                done.targets.update(outputs.targets)
                done.sketches.update(outputs.sketches)
                cut_tokens += outputs.cut_tokens
                bar.update(len(outputs.targets))
            if len(done.targets) == len(todo[shard]):
                finish_writing()  # at most one shard waits: bounded memory
                writing.append(pool.submit(commit, shard, done))
                done = Outputs()
        finish_writing()
    assert not done.targets, "a shard was left half done"
    return PassSummary(
        shards=len(records),
        skipped=skipped,
        elsewhere=len(todo) - len(records),
        samples=sum(record.samples for record in records),
        tokens=sum(record.rows for record in records),
        bytes=sum(record.bytes for record in records),
        cut_tokens=cut_tokens,
        seconds=time.perf_counter() - started,
    )


def _commit(writer: RecordWriter, shard: int, sample_ids: Sequence[str], outputs: Outputs) -> CommitRecord:
    """Write a shard's files; the soft targets are last, and their record is returned."""
    if "sketches" in writer.kinds:
        sketched = [(i, outputs.sketches[i]) for i in sample_ids]
        rows = [(i, len(s.cells_CR) + len(s.tokens_TR), sketches.encode(s)) for i, s in sketched]
        writer.write_shard(shard, rows, "sketches")
    return write_targets(writer, shard, [(i, outputs.targets[i]) for i in sample_ids])


def _rates(records: Sequence[CommitRecord], seconds: float) -> str:
    tokens, size = sum(r.rows for r in records), sum(r.bytes for r in records)
    return f"{tokens / seconds:.0f} tokens/s, {size / 2**20:.1f} MiB"


def _encoded_windows(
    recipe: Recipe, processor: Processor, todo: Mapping[int, Sequence[Sample]], take: Callable[[int], bool]
) -> Iterator[tuple[int, list[Batch]]]:
    """Windows of the shards that `take` allows, in order; it is asked shortly before a shard's first window."""
    size = WINDOW_BATCHES * recipe.targets.batch_size
    windows = [
        Window(shard, samples[start : start + size])
        for shard, samples in todo.items()
        for start in range(0, len(samples), size)
    ]
    places = itertools.groupby(range(len(windows)), key=lambda place: windows[place].shard)
    taken = (place for shard, of_shard in places if take(shard) for place in of_shard)
    dataset = EncodedWindows(windows, processor, recipe.targets.batch_size)
    # A worker of the loader encodes while this process computes.
    yield from DataLoader(dataset, batch_size=None, sampler=taken, num_workers=max(1, recipe.data.workers))


def main(recipe: Recipe, options: argparse.Namespace) -> None:
    """The stage `teacher`."""
    summary = run_pass(recipe, options.worker, options.workers)
    print(summary)
    if options.json:
        path = Path(str(options.json).replace("{worker}", str(options.worker)))
        write_json(path, asdict(summary))
