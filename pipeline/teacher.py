"""The teacher pass: soft targets of the training split, once, into the store.

    python -m pipeline.teacher --config RECIPE.yaml [--worker I --workers N] [--json FILE]

Shard j holds samples [j * S, (j + 1) * S) of the sorted list. Worker I takes shards j = I mod N first and then those
that no other worker holds, so workers may be killed, added or left out. A shard that is committed is skipped: the
same command goes on after any interruption.
Shapes: B samples, S sequence, D width, N answer tokens of a batch, V vocabulary.
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import xxhash
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import AutoConfig, PreTrainedModel

from pipeline.codecs import CODECS, identity_of, make_spec
from pipeline.command_line import parse_args
from pipeline.config import Recipe, TargetsConfig
from pipeline.data import Sample, read_samples, require_answers
from pipeline.errors import ConfigError, StoreError, UserError, run_main
from pipeline.leases import ShardLeases, clear_leases
from pipeline.models import batch_attention, check_compatible, compute_device, load_model, weights_hash
from pipeline.processor import IGNORED, Batch, Processor, collate
from pipeline.shards import FORMAT_VERSION
from pipeline.store import Identity, StoreWriter
from pipeline.targets import SoftTargets, concatenate, draw_offsets

WINDOW_BATCHES = 8
"""Batches whose samples are encoded together and sorted by length: little padding, bounded memory."""
_LOGITS_AT_ONCE = 1 << 25
"""Elements of the largest logit matrix: 128 MiB in float32."""


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
    seconds: float

    def __str__(self) -> str:
        others = f", {self.elsewhere} left to other workers" if self.elsewhere else ""
        if not self.shards:
            return f"teacher pass: nothing to do, {self.skipped} shard(s) are committed{others}"
        return (
            f"teacher pass: {self.shards} shard(s) written, {self.skipped} already committed{others}; "
            f"{self.samples} samples, {self.tokens} answer tokens in {self.seconds:.1f} s "
            f"({self.tokens / self.seconds:.0f} tokens/s), {self.bytes / max(self.tokens, 1):.1f} bytes/token"
        )


class _EncodedWindows(Dataset[tuple[int, list[Batch]]]):
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


def expected_identity(recipe: Recipe, processor: Processor, samples: Sequence[Sample]) -> Identity:
    """Everything that changes a stored number: what a store for this run must say.

    Args:
        samples: the whole train split, sorted by sample_id.

    Raises:
        UserError: the teacher is not there.
    """
    teacher_dir = recipe.model_dir(recipe.targets.teacher)
    vocab_size = _vocab_size(teacher_dir)
    return {
        "format_version": FORMAT_VERSION,
        **identity_of(recipe.targets.codec, make_spec(recipe.targets, vocab_size)),
        "temperature": recipe.targets.temperature,
        "teacher_weights": weights_hash(teacher_dir),
        **{f"processor_{name}": value for name, value in processor.identity().items()},
        "dataset": dataset_fingerprint(samples),
    }


def dataset_fingerprint(samples: Sequence[Sample]) -> str:
    """Hash of all ids, prompts and answers in order."""
    digest = xxhash.xxh3_128()
    for sample in samples:
        for text in (sample.sample_id, sample.prompt, sample.answer):
            raw = text.encode()
            digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()


@torch.no_grad()
def batch_targets(model: PreTrainedModel, batch: Batch, settings: TargetsConfig) -> list[SoftTargets]:
    """Soft targets of each sample of a batch. Logits exist only for the rows that predict an answer token.

    Args:
        model: in evaluation mode, on the device that computes.
        batch: padded on the right, labels not shifted.
        settings: codec, its settings, temperature.

    Raises:
        StoreError: the teacher's logits are not finite.
    """
    device = model.device
    tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor) and key != "labels"}
    inputs = {key: tensor.to(device) for key, tensor in tensors.items()}
    hidden_BSD = model.base_model(**inputs, use_cache=False).last_hidden_state
    answer_BS = batch["labels"] != IGNORED
    assert not answer_BS[:, 0].any(), "an answer token without a row that predicts it"
    sample_N, position_N = answer_BS.nonzero(as_tuple=True)  # sample by sample, in answer order
    gold_N = batch["labels"][sample_N, position_N].to(device)
    rows_ND = hidden_BSD[sample_N.to(device), position_N.to(device) - 1]  # row t - 1 predicts token t
    head: torch.nn.Linear = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    counts = answer_BS.sum(dim=1).tolist()
    offsets_N = torch.cat([draw_offsets(*pair) for pair in zip(batch["sample_ids"], counts, strict=True)]).to(device)
    step = max(1, _LOGITS_AT_ONCE // head.weight.shape[0])
    keep, spec = CODECS[settings.codec].keep, make_spec(settings, head.weight.shape[0])
    try:
        parts = [
            keep(head(rows_ND[s]), gold_N[s], offsets_N[s], settings.temperature, spec).to("cpu")
            for s in (slice(i, i + step) for i in range(0, max(len(rows_ND), 1), step))
        ]
    except StoreError as error:
        raise StoreError(f"{error} (samples {batch['sample_ids']}). The shard was not written.") from None
    targets, ends = concatenate(parts), list(itertools.accumulate(counts))
    return [targets.rows(slice(begin, end)) for begin, end in zip([0, *ends], ends, strict=False)]


def run_pass(recipe: Recipe, worker: int = 0, workers: int = 1) -> PassSummary:
    """Write the shards that are neither committed nor in another worker's hands, this worker's share first.

    Raises:
        UserError: bad data, no teacher, or a store that was made for another identity (nothing was changed).
    """
    if not 0 <= worker < workers:
        raise ConfigError(f"--worker {worker} must lie in [0, --workers {workers})")
    torch.set_float32_matmul_precision(recipe.run.matmul_precision)
    processor = Processor.load(recipe.processor_dir, recipe.data)
    samples = read_samples(recipe.data.format, recipe.data_root, recipe.data.train_split)
    require_answers(samples, f"{recipe.data_root}, split {recipe.data.train_split!r}")
    identity = expected_identity(recipe, processor, samples)
    size = recipe.targets.shard_samples
    writer = StoreWriter(recipe.store_dir, identity, num_samples=len(samples), shard_samples=size)
    committed, damaged = writer.committed()
    for problem in damaged:
        print(f"rebuilding: {problem}")
    clear_leases(recipe.store_dir, committed)
    own_first = sorted(range(-(-len(samples) // size)), key=lambda shard: ((shard - worker) % workers, shard))
    todo = {shard: samples[shard * size : (shard + 1) * size] for shard in own_first if shard not in committed}
    if not todo:
        return PassSummary(0, len(committed), 0, 0, 0, 0, 0.0)
    model = load_model(recipe.model_dir(recipe.targets.teacher), attention=batch_attention())
    check_compatible(model, processor)
    torch.nn.Module.to(model, compute_device(recipe.run.device))
    return _write_shards(recipe, writer, model, processor, todo, skipped=len(committed))


def _write_shards(
    recipe: Recipe,
    writer: StoreWriter,
    model: PreTrainedModel,
    processor: Processor,
    todo: dict[int, list[Sample]],
    skipped: int,
) -> PassSummary:
    started, records = time.perf_counter(), []
    done: dict[str, SoftTargets] = {}
    left = {shard: len(samples) for shard, samples in todo.items()}
    bar = tqdm(total=sum(left.values()), desc="teacher pass", unit="sample", disable=None)
    with ShardLeases(recipe.store_dir) as leases, bar:

        def take(shard: int) -> bool:
            taken = leases.claim(shard)
            if taken and writer.is_whole(shard):  # another worker's work since this one began
                leases.release(shard)
                taken = False
            if not taken:
                left.pop(shard)
                bar.total = sum(left.values())
            return taken

        for shard, batches in _encoded_windows(recipe, processor, todo, take):
            for batch in batches:
                targets = batch_targets(model, batch, recipe.targets)
                done.update(zip(batch["sample_ids"], targets, strict=True))
                bar.update(len(targets))
            if len(done) == len(todo[shard]):
                in_order = [(s.sample_id, done[s.sample_id]) for s in todo[shard]]
                records.append(writer.write_shard(shard, in_order))
                leases.release(shard)
                done = {}
    assert not done, "a shard was left half done"
    return PassSummary(
        shards=len(records),
        skipped=skipped,
        elsewhere=len(todo) - len(records),
        samples=sum(record.samples for record in records),
        tokens=sum(record.tokens for record in records),
        bytes=sum(record.bytes for record in records),
        seconds=time.perf_counter() - started,
    )


def _encoded_windows(
    recipe: Recipe, processor: Processor, todo: dict[int, list[Sample]], take: Callable[[int], bool]
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
    dataset = _EncodedWindows(windows, processor, recipe.targets.batch_size)
    # A worker of the loader encodes while this process computes.
    yield from DataLoader(dataset, batch_size=None, sampler=taken, num_workers=max(1, recipe.data.workers))


def _vocab_size(teacher_dir: Path) -> int:
    """Columns of the teacher's logits, which may be padded beyond the tokenizer."""
    if not (teacher_dir / "config.json").is_file():
        raise UserError(f"{teacher_dir}: there is no teacher. Train it first, or correct targets.teacher.")
    return int(AutoConfig.from_pretrained(str(teacher_dir)).get_text_config().vocab_size)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.teacher", description=__doc__)
    parser.add_argument("--worker", type=int, default=0, help="this worker's number, from 0")
    parser.add_argument("--workers", type=int, default=1, help="workers that share the pass")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the summary there")
    arguments = parse_args("teacher", argv, parser)
    summary = run_pass(arguments.recipe, arguments.options.worker, arguments.options.workers)
    print(summary)
    if arguments.options.json:
        arguments.options.json.write_text(json.dumps(asdict(summary), indent=1))


if __name__ == "__main__":
    run_main(main)
