"""Reading speed of a store of many shards: batches of soft targets in a random order.

    python -m tools.bench.reading [--json FILE] [--shards 1000] [--samples 12] [--tokens 100] [--repeats 5]

Makes a store (`packed`, k = 32, V = 151,936, synthetic teacher) in a temporary folder, and reads batches of 8 samples
in a permuted order: in this process, and with a torch DataLoader, which ships decoded targets as
`pipeline.training.batches` does. The baseline `sequential` reads the same files whole, one after the other, and checks
and decodes nothing. The files are in the page cache, so software is measured and no disk. Writes one flat JSON object;
`MEANING` says what the figures are.
"""

import argparse
import functools
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from pipeline.data.shipping import loaded
from pipeline.errors import run_main
from pipeline.evaluation import results
from pipeline.targets.codecs import CODECS, Spec, identity_of
from pipeline.targets.container.writer import StoreWriter
from pipeline.targets.soft_targets import SoftTargets, from_logits
from pipeline.targets.store import SoftTargetStore
from tools.bench.store import VOCAB, repeated, synthetic

MEANING = {
    "samples_s": "samples a second, median of the repeats",
    "mb_s": "their encoded bytes a second, in 10^6",
    "vs_sequential": "samples a second over those of the sequential reading of the files",
    "spread": "slowest and fastest repeat, as shares of the median speed",
    "open_s": "seconds to open the store: every shard's record and index read and checked",
    "raw": "records read and checked, not decoded, in this process",
    "in_process": "batches read, decoded and joined in this process",
    "workers_N": "the same by N workers of a torch DataLoader, as this process receives them",
}
SPEC = Spec(VOCAB, top_k=32, bits=7)
BATCH = 8
_DISTINCT = 16
"""Encoded samples that fill the whole store: what reading costs depends on their sizes alone."""
_PEAKY = 64
"""Rows of the synthetic teacher that all samples are made of."""


def make_store(folder: Path, shards: int, samples: int, tokens: int) -> None:
    """A store whose samples have between half and one and a half times `tokens` answer tokens."""
    encode, rng = CODECS["packed"].encode, random.Random(0)
    teacher_TV = synthetic(_PEAKY, VOCAB, 0)[0]
    targets = from_logits(teacher_TV, teacher_TV.argmax(-1), SPEC.top_k, 1.0)
    lengths = [rng.randint(tokens // 2, tokens + tokens // 2) for _ in range(_DISTINCT)]
    encoded = [(length, encode(repeated(targets, length, VOCAB), SPEC)) for length in lengths]
    sample_ids = [f"{number:032x}" for number in range(shards * samples)]  # as long as a content hash
    writer = StoreWriter(folder, identity_of("packed", SPEC))
    planned = writer.plan(sample_ids, samples, "of a benchmark")
    for shard, ids in tqdm(planned.items(), desc="write", unit="shard", disable=None):
        writer.write_shard(shard, [(sample_id, *rng.choice(encoded)) for sample_id in ids], "targets")


class Batches(Dataset[SoftTargets]):
    """The soft targets of one batch after the other."""

    def __init__(self, store: SoftTargetStore, batches: Sequence[Sequence[str]]) -> None:
        self.store, self.batches = store, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, position: int) -> SoftTargets:
        return self.store.read_joined(self.batches[position])[0]


def permuted(sample_ids: Sequence[str], seed: int) -> list[list[str]]:
    """Batches of 8 in a random order of the samples."""
    order = random.Random(seed).sample(sample_ids, len(sample_ids))
    return [order[start : start + BATCH] for start in range(0, len(order), BATCH)]


def read_files(store: SoftTargetStore, files: Sequence[str]) -> int:
    """Bytes of all files, each read whole."""
    return sum(len(store.folder.read(name)) for name in files)


def read_raw(store: SoftTargetStore, batches: Sequence[Sequence[str]]) -> int:
    """Samples whose bytes were read and checked."""
    return sum(len([store.read_record(sample_id) for sample_id in batch]) for batch in batches)


def read_batches(store: SoftTargetStore, batches: Sequence[Sequence[str]], workers: int) -> int:
    """Answer tokens of all batches as training gets them; 0 workers: decoded in this process."""
    return sum(len(targets) for targets in loaded(Batches(store, batches), workers))


def seconds(work: Callable[[], object]) -> float:
    """Of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure(folder: Path, repeats: int) -> dict[str, object]:
    """The figures by the names in MEANING; every way of reading once in each repeat, after one to warm up."""
    store = SoftTargetStore.open(folder, None)
    size, samples = sum(record.rec_end - record.rec_begin for record in store.commits), len(store)
    files = [name for name in store.folder.names() if name.endswith(".safetensors")]
    ways: dict[str, Callable[[list[list[str]]], object]] = {
        "sequential": lambda batches: read_files(store, files),
        "raw": lambda batches: read_raw(store, batches),
        "in_process": lambda batches: read_batches(store, batches, 0),
        "workers_1": lambda batches: read_batches(store, batches, 1),
        "workers_2": lambda batches: read_batches(store, batches, 2),
        "open": lambda batches: SoftTargetStore.open(folder, None),
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in tqdm(range(repeats + 1), desc="read", disable=None):
        batches = permuted(store.sample_ids, repeat)
        for name, work in ways.items():
            taken[name].append(seconds(functools.partial(work, batches)))
    medians = {name: statistics.median(times[1:]) for name, times in taken.items()}
    figures: dict[str, object] = {"open_s": medians.pop("open"), "open_s_spread": spread(taken.pop("open")[1:])}
    for name, median in medians.items():
        figures |= {
            f"{name}_samples_s": samples / median,
            f"{name}_mb_s": size / median / 1e6,
            f"{name}_vs_sequential": medians["sequential"] / median,
            f"{name}_spread": spread(taken[name][1:]),
        }
    rows = sum(record.rows for record in store.commits)
    return figures | {"samples": samples, "shards": len(files), "mb": size / 1e6, "tokens_a_sample": rows / samples}


def spread(times: Sequence[float]) -> list[float]:
    """Speed of the slowest and of the fastest run, as shares of the median's."""
    median = statistics.median(times)
    return [median / max(times), median / min(times)]


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.reading", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="file that receives the figures")
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=12, help="samples a shard")
    parser.add_argument("--tokens", type=int, default=100, help="mean answer tokens a sample")
    parser.add_argument("--repeats", type=int, default=5, help="timings of each way of reading")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        make_store(Path(folder), options.shards, options.samples, options.tokens)
        figures = measure(Path(folder), options.repeats)
    if options.json:
        about = {"meaning": MEANING, "machine": results.machine(torch.device("cpu"))}
        options.json.write_text(json.dumps(figures | about, indent=1) + "\n")
    print_table(figures)


def print_table(figures: dict[str, object]) -> None:
    """A line for each way of reading."""
    print(f"{figures['samples']} samples in {figures['shards']} shards, {figures['mb']:.0f} MB; opened in "
          f"{figures['open_s']:.2f} s {rounded(figures['open_s_spread'])}")  # fmt: skip
    for name in ("sequential", "raw", "in_process", "workers_1", "workers_2"):
        speed, rate, ratio, of_runs = (figures[f"{name}_{what}"] for what in MEANING if f"{name}_{what}" in figures)
        print(f"{name:12}{speed:10,.0f} samples/s{rate:8,.0f} MB/s{ratio:8.3f}   {rounded(of_runs)}")


def rounded(spread: object) -> str:
    """Two decimals each."""
    assert isinstance(spread, list)
    return f"({spread[0]:.2f} to {spread[1]:.2f})"


if __name__ == "__main__":
    run_main(main)
