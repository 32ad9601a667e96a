"""What the teacher pass costs beyond the teacher's forward.

    python -m tools.bench.teacher [--json FILE] [--vocab 151936] [--width 512] [--layers 8] [--scenes 30] [--repeats 5]

Four ways over the same batches: `bare` (the bare forward and the baseline: model.base_model and the LM head on answer
rows only, batches encoded before), `targets` (`teacher.batch_outputs` on these batches), `stored` (the same, and a
thread encodes and commits each shard meanwhile) and `whole` (`teacher.run_pass` from image files to the finished store,
model loading left out; DataLoader workers encode the batches). Rounds run all ways in turning order; ratios are taken
within a round, given as median and quartiles. `<way>_cpu` is processor time of the computing thread alone, which other
processes on the machine hardly change. Writes one flat JSON object.

The smaller the teacher, the larger the overhead: work on a row of logits depends on the vocabulary, the forward on the
model's size. Few samples count against `whole`: its first window of batches is waited for.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from pipeline.data.collate import IGNORED, Batch
from pipeline.data.processor import Processor
from pipeline.data.readers import read_samples
from pipeline.errors import run_main
from pipeline.evaluation import results
from pipeline.models.loading import batch_attention, load_model
from pipeline.recipe import Recipe
from pipeline.targets.container.writer import StoreWriter
from pipeline.targets.identity import expected_identity
from pipeline.targets.soft_targets import SoftTargets
from pipeline.targets.store import write_targets
from pipeline.teacher.encoding import WINDOW_BATCHES, EncodedWindows, Window
from pipeline.teacher.forward import batch_outputs
from pipeline.teacher.stage import run_pass
from tools.bench.runs import Figures, make_model, make_run, ratios, rotated, table

LABELS = {
    "bare": "bare forward",
    "targets": "with soft targets",
    "stored": "with soft targets and store",
    "whole": "whole pass, images to store",
}
LOGITS_AT_ONCE = 1 << 25
"""Logits that the bare forward makes at a time, as the pass."""


@dataclass(frozen=True, slots=True)
class Timing:
    """One way over all batches, in seconds."""

    wall: float
    cpu: float | None = None
    """Of the computing thread."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """What all ways read: a shard is one window of batches."""

    shards: list[list[Batch]]
    processor: Processor

    @property
    def batches(self) -> list[Batch]:
        """All batches in order."""
        return [batch for shard in self.shards for batch in shard]


def encode(recipe: Recipe) -> Encoded:
    """The batches that the pass makes, encoded ahead."""
    processor = Processor.load(recipe.processor_dir, recipe.data)
    samples = read_samples(recipe.data.format, recipe.data_root, recipe.data.train_split)
    size = recipe.targets.shard_samples
    windows = [Window(n, samples[i : i + size]) for n, i in enumerate(range(0, len(samples), size))]
    encoded = EncodedWindows(windows, processor, recipe.targets.batch_size)
    return Encoded([encoded[n].batches for n in range(len(encoded))], processor)


@torch.no_grad()
def bare_forward(model: PreTrainedModel, batch: Batch) -> None:
    """Hidden states, then the logits of the rows that predict an answer token."""
    inputs: dict[str, Tensor] = {k: v for k, v in batch.items() if isinstance(v, Tensor) and k != "labels"}
    hidden_BSD = model.base_model(**inputs, use_cache=False).last_hidden_state
    sample_N, position_N = (batch["labels"] != IGNORED).nonzero(as_tuple=True)
    rows_ND = hidden_BSD[sample_N, position_N - 1]
    head: Any = model.get_output_embeddings()
    for part_nD in rows_ND.split(max(1, LOGITS_AT_ONCE // len(head.weight))):
        head(part_nD)


def run_bare(recipe: Recipe, model: PreTrainedModel, encoded: Encoded, store: Path) -> Timing:
    """The bare forward over all batches."""
    return timed(lambda: [bare_forward(model, batch) for batch in encoded.batches])


def run_targets(recipe: Recipe, model: PreTrainedModel, encoded: Encoded, store: Path) -> Timing:
    """Forward and soft targets."""
    return timed(
        lambda: [batch_outputs(model, batch, recipe.targets, encoded.processor.vocab_size) for batch in encoded.batches]
    )


def run_stored(recipe: Recipe, model: PreTrainedModel, encoded: Encoded, store: Path) -> Timing:
    """Forward, soft targets and their commit by a thread, until all is on disk."""
    writer = StoreWriter(store, expected_identity(recipe, encoded.processor))

    def work() -> None:
        with ThreadPoolExecutor(1) as pool:
            for number, batches in enumerate(encoded.shards):
                done: list[tuple[str, SoftTargets]] = []
                for batch in batches:
                    done.extend(
                        batch_outputs(model, batch, recipe.targets, encoded.processor.vocab_size).targets.items()
                    )
                pool.submit(write_targets, writer, number, done).add_done_callback(lambda future: future.result())

    return timed(work)


def run_whole(recipe: Recipe, model: PreTrainedModel, encoded: Encoded, store: Path) -> Timing:
    """The stage itself; it loads a model of its own before its clock starts."""
    settings = recipe.targets.model_copy(update={"store": str(store)})
    summary = run_pass(recipe.model_copy(update={"targets": settings}))
    assert summary.samples == sum(len(batch["sample_ids"]) for batch in encoded.batches)
    return Timing(summary.seconds)


WAYS: dict[str, Callable[[Recipe, PreTrainedModel, Encoded, Path], Timing]] = {
    "bare": run_bare,
    "targets": run_targets,
    "stored": run_stored,
    "whole": run_whole,
}


def timed(work: Callable[[], object]) -> Timing:
    """What the work takes."""
    started, cpu = time.perf_counter(), time.thread_time()
    work()
    return Timing(time.perf_counter() - started, time.thread_time() - cpu)


def make_teacher_run(folder: Path, options: argparse.Namespace) -> tuple[Recipe, int]:
    """A run with a teacher of the wanted size, and the teacher's parameters."""
    sizes = {"hidden_size": options.width, "intermediate_size": 3 * options.width, "head_dim": 64,
             "num_hidden_layers": options.layers, "num_attention_heads": max(1, options.width // 64),
             "num_key_value_heads": max(1, options.width // 128)}  # fmt: skip
    overrides = [f"benchmark.models.teacher.text.{key}={value}" for key, value in sizes.items()]
    batch_size = options.batch_size
    overrides += [f"targets.batch_size={batch_size}", f"targets.shard_samples={WINDOW_BATCHES * batch_size}"]
    overrides += [f"targets.matmul_precision={options.precision}", f"targets.codec={options.codec}"]
    recipe = make_run(folder, options.scenes, overrides)
    return recipe, make_model(recipe, "teacher", options.vocab, peaky=True)


def bench(options: argparse.Namespace, folder: Path) -> Figures:
    """The figures and what they were measured on."""
    recipe, parameters = make_teacher_run(folder, options)
    torch.set_float32_matmul_precision(recipe.targets.matmul_precision)
    model = load_model(recipe.model_dir("models.teacher"), attention=batch_attention())
    encoded = encode(recipe)
    bare_forward(model, encoded.batches[0])  # both once, to warm up
    batch_outputs(model, encoded.batches[0], recipe.targets, encoded.processor.vocab_size)
    timings: dict[str, list[Timing]] = {way: [] for way in WAYS}
    for turn in tqdm(range(options.repeats), desc="teacher", unit="round", disable=None):
        for way in rotated(list(WAYS), turn):
            timings[way].append(WAYS[way](recipe, model, encoded, folder / f"store-{way}-{turn}"))
    tokens = sum(int((batch["labels"] != IGNORED).sum()) for batch in encoded.batches)
    samples = sum(len(batch["sample_ids"]) for batch in encoded.batches)
    about = {"teacher_parameters": parameters, "samples": samples, "tokens": tokens}
    return summarise(timings, tokens) | about


def summarise(timings: dict[str, list[Timing]], tokens: int) -> Figures:
    """Milliseconds a token and ratios to the bare forward, of the clock and of the computing thread."""
    wall = {way: [t.wall / tokens for t in of_way] for way, of_way in timings.items()}
    cpu = {f"{way}_cpu": [t.cpu / tokens for t in of_way if t.cpu is not None] for way, of_way in timings.items()}
    return ratios(wall, "bare") | ratios({way: values for way, values in cpu.items() if values}, "bare_cpu")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.teacher", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="file that receives the figures")
    parser.add_argument("--vocab", type=int, default=151_936, help="columns of the logits, V")
    parser.add_argument("--width", type=int, default=512, help="the decoder's width")
    parser.add_argument("--layers", type=int, default=8, help="decoder layers")
    parser.add_argument("--scenes", type=int, default=30, help="images drawn; about four samples each")
    parser.add_argument("--batch-size", type=int, default=8, help="samples of a forward")
    parser.add_argument("--repeats", type=int, default=5, help="interleaved passes of each way")
    parser.add_argument("--precision", default="highest", choices=("highest", "medium"), help="of matrix products")
    parser.add_argument("--codec", default="packed", choices=("packed", "compact", "sampled"))
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        figures = bench(options, Path(folder))
    figures |= {k: v for k, v in vars(options).items() if k != "json"}
    figures |= {"machine": results.machine(torch.device("cpu"))}
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    print(f"{figures['samples']} samples, {figures['tokens']} answer tokens")
    print(table(figures, LABELS, "bare", "ms a token"))
    on_cpu = {f"{way}_cpu": f"{label}, thread's CPU" for way, label in LABELS.items() if way != "whole"}
    print(table(figures, on_cpu, "bare_cpu", "ms a token"))


if __name__ == "__main__":
    run_main(main)
