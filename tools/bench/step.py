"""Time of a training step with cached soft targets, against plain SFT and against a teacher in the loop.

    python -m tools.bench.step [--json FILE] [--vocab 151936] [--rounds 12] [--steps 5] [--workers 1]

Four ways through `pipeline.training.step.run_step`, engine and optimizer step included, on the same samples, with the
sizes of the demo's recipe and random weights: `sft` (no store; the baseline), `cached` (soft targets read from a store
on disk by `MicroBatches`), `released` (the same job and store once every sample is released: alpha 0) and `online` (the
teacher's forward on every batch, targets by `teacher.batch_outputs`, then the same step as `cached`). A step's time
includes the wait for its batches, which DataLoader workers build. `<way>_targets_read`: samples of a step whose targets
were read from the store, by training's own counter.

A round runs a block of steps of each way, one loader at a time, in turning order; a block's first step is not timed.
Times are medians over rounds; ratios are taken within a round, given as median and quartiles. `<way>_cpu` is processor
time of the training thread alone, which other processes on the machine hardly change. `targets_read` is the time that
reading and decoding a step's soft targets takes by itself, in one thread. Writes one flat JSON object.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from pipeline.data.collate import IGNORED, Batch
from pipeline.data.processor import Processor
from pipeline.data.readers import read_samples
from pipeline.errors import run_main
from pipeline.evaluation import results
from pipeline.method.curriculum import uniform_order
from pipeline.method.fused_head import FusedHead
from pipeline.models import loading
from pipeline.recipe import DistillConfig, JobConfig, Recipe
from pipeline.targets.identity import expected_identity
from pipeline.targets.soft_targets import concatenate
from pipeline.targets.store import SoftTargetStore
from pipeline.teacher.forward import batch_outputs
from pipeline.teacher.stage import run_pass
from pipeline.training import engine
from pipeline.training.batches import MicroBatch, MicroBatches, Request, iterate
from pipeline.training.process import start_distributed
from pipeline.training.step import StepContext, run_step
from tools.bench.runs import RECIPE, Figures, make_model, make_run, ratios, rotated, table

LABELS = {
    "sft": "plain SFT",
    "cached": "cached soft targets",
    "released": "released, store open",
    "online": "online teacher",
}
ALPHA = 0.7
DS_CONFIG = RECIPE.parents[2] / "ds_configs" / "dense.json"


@dataclass(slots=True)
class Block:
    """Seconds of a block's timed steps, by step."""

    step: list[float] = field(default_factory=list)
    """All of a step: waiting, the teacher, forwards, backwards, optimizer."""
    cpu: list[float] = field(default_factory=list)
    """The same in processor time of the training thread."""
    wait: list[float] = field(default_factory=list)
    """Waiting for the loader."""
    teacher: list[float] = field(default_factory=list)
    """The teacher's forward and its targets."""
    targets_read: list[float] = field(default_factory=list)
    """Samples whose soft targets were read from the store, as training counts them."""


class Bench:
    """A student under training, a teacher, and the teacher's store."""

    def __init__(self, recipe: Recipe, workers: int) -> None:
        """Makes the store with `run_pass`; the models must be there."""
        self.recipe, self.loading = recipe, recipe.data.model_copy(update={"workers": workers})
        run_pass(recipe)
        self.processor = Processor.load(recipe.processor_dir, recipe.data)
        self.samples = read_samples(recipe.data.format, recipe.data_root, recipe.data.train_split)
        self.store = SoftTargetStore.open(recipe.store_url, expected_identity(recipe, self.processor))
        self.teacher = self._load("teacher")
        self.sft = recipe.jobs["dense_sft"]
        self.kd = self.sft.model_copy(update={"distill": DistillConfig()})
        self.engine = self._engine()
        self.head = FusedHead(self.engine.module)

    def _load(self, name: str) -> PreTrainedModel:
        return loading.load_model(self.recipe.model_dir(f"models.{name}"), attention=loading.batch_attention())

    def _engine(self) -> Any:
        return engine.start(self._load("student").train(), self.sft, json.loads(DS_CONFIG.read_text()))

    def requests(self, first: int, steps: int, alpha: float) -> list[Request]:
        """Micro-batches of consecutive steps, in order."""
        size, start = self.sft.batch.micro_size, first * self.sft.batch.global_size
        order = uniform_order(len(self.samples), 0, start, steps * self.sft.batch.global_size)
        alpha_B = np.full(size, alpha, np.float32)
        return [Request(order[i : i + size], alpha_B) for i in range(0, len(order), size)]

    def block(self, way: str, first: int, steps: int) -> Block:
        """Run one untimed step and then `steps` timed ones."""
        store = self.store if way in ("cached", "released") else None
        requests = self.requests(first, steps + 1, 0.0 if way in ("sft", "released") else ALPHA)
        stream = iterate(MicroBatches(self.samples, self.processor, store, requests, None), self.loading)
        timed = Block()
        for number in range(steps + 1):
            self._step(way, stream, timed if number else Block())
        return timed

    def _step(self, way: str, stream: Iterator[MicroBatch], timed: Block) -> None:
        started, cpu = time.perf_counter(), time.thread_time()
        micros = [next(stream) for _ in range(self.sft.batch.global_size // self.sft.batch.micro_size)]
        loaded = time.perf_counter()
        if way == "online":
            micros = [self._with_targets(micro) for micro in micros]
        taught = time.perf_counter()
        stats = run_step(self._context(self.sft if way == "sft" else self.kd), micros)
        self.engine.step()
        timed.step.append(time.perf_counter() - started)
        timed.cpu.append(time.thread_time() - cpu)
        timed.wait.append(loaded - started)
        timed.teacher.append(taught - loaded)
        timed.targets_read.append(stats.sums["targets_read"])

    def _with_targets(self, micro: MicroBatch) -> MicroBatch:
        targets = batch_outputs(self.teacher, batch_of(micro), self.recipe.targets, self.processor.vocab_size).targets
        return replace(micro, targets=concatenate([targets[i] for i in micro.sample_ids]))

    def _context(self, job: JobConfig) -> StepContext:
        return StepContext(
            engine=self.engine,
            head=self.head,
            probe=None,
            top_k=0,
            vision=None,
            job=job,
            temperature=self.recipe.targets.temperature,
            beta=job.distill.token_tilt[1] if job.distill else 0.0,
            normaliser=1.0,
        )

    def seconds_to_read(self, first: int) -> float:
        """Reading and decoding the soft targets of one step."""
        ids = [self.samples[i].sample_id for request in self.requests(first, 1, ALPHA) for i in request.index_B]
        started = time.perf_counter()
        for sample_id in ids:
            self.store.read(sample_id)
        return time.perf_counter() - started


def batch_of(micro: MicroBatch) -> Batch:
    """The micro-batch as the teacher reads it: labels at their own positions."""
    next_BW = torch.full(micro.rows_BW.shape, IGNORED)
    next_BW[micro.rows_BW] = micro.labels_N
    labels_BS = torch.full_like(micro.inputs["input_ids"], IGNORED)
    labels_BS[:, micro.keep + 1] = next_BW
    rest: Any = {**micro.inputs, "labels": labels_BS, "sample_ids": list(micro.sample_ids), "cut_tokens": 0}
    rest["left_out"] = micro.left_out
    batch: Batch = rest
    return batch


def bench(options: argparse.Namespace, folder: Path) -> Figures:
    """The figures and what they were measured on."""
    recipe = make_run(folder, options.scenes, [])
    about: Figures = {
        f"{name}_parameters": make_model(recipe, name, options.vocab, peaky=name == "teacher")
        for name in ("student", "teacher")
    }
    torch.set_float32_matmul_precision(recipe.run.matmul_precision)
    start_distributed()
    runner = Bench(recipe, options.workers)
    blocks = measure(runner, options.rounds, options.steps)
    reading = [runner.seconds_to_read(first) for first in range(options.rounds * options.steps)]
    about |= {"vocab": runner.teacher.config.get_text_config().vocab_size, "tokens_per_step": tokens(runner)}
    return summarise(blocks, reading) | about


def measure(runner: Bench, rounds: int, steps: int) -> dict[str, list[Block]]:
    """Blocks of every way; round 0 is a warm-up."""
    blocks: dict[str, list[Block]] = {way: [] for way in LABELS}
    for turn in tqdm(range(rounds + 1), desc="step", unit="round", disable=None):
        for way in rotated(list(LABELS), turn):
            block = runner.block(way, turn * (steps + 1), steps if turn else 1)
            if turn:
                blocks[way].append(block)
    return blocks


def summarise(blocks: dict[str, list[Block]], reading: Sequence[float]) -> Figures:
    """Times of a step in milliseconds, ratios to plain SFT, and shares of a step."""
    figures = ratios({way: [statistics.mean(b.step) for b in of_way] for way, of_way in blocks.items()}, "sft")
    cpu = {f"{way}_cpu": [statistics.mean(b.cpu) for b in of_way] for way, of_way in blocks.items()}
    figures |= ratios(cpu, "sft_cpu")
    for way, of_way in blocks.items():
        shares = [sum(b.wait) / sum(b.step) for b in of_way]
        figures |= {f"{way}_wait_ms": 1e3 * statistics.median(statistics.mean(b.wait) for b in of_way)}
        figures |= {f"{way}_wait_share": statistics.median(shares)}
        figures |= {f"{way}_targets_read": statistics.mean(n for b in of_way for n in b.targets_read)}
    figures["online_teacher_ms"] = 1e3 * statistics.median(statistics.mean(b.teacher) for b in blocks["online"])
    steps = [seconds for block in blocks["cached"] for seconds in block.step]
    figures["targets_read_ms"] = 1e3 * statistics.median(reading)
    return figures | {"targets_read_share": statistics.median(reading) / statistics.median(steps)}


def tokens(runner: Bench) -> float:
    """Answer tokens of a step, mean over the data set."""
    mean = statistics.mean(len(runner.store.read(sample_id)) for sample_id in runner.store.sample_ids)
    return mean * runner.sft.batch.global_size


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="file that receives the figures")
    parser.add_argument("--vocab", type=int, help="columns of the models' logits; default: the demo's tokenizer")
    parser.add_argument("--scenes", type=int, default=60, help="images drawn; about four samples each")
    parser.add_argument("--rounds", type=int, default=12, help="interleaved blocks of each way")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of a block")
    parser.add_argument("--workers", type=int, default=1, help="DataLoader workers")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        figures = bench(options, Path(folder))
    figures |= {k: getattr(options, k) for k in ("scenes", "rounds", "steps", "workers")}
    figures |= {"machine": results.machine(torch.device("cpu"))}
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    print(table(figures, LABELS, "sft", "ms a step"))
    on_cpu = {f"{way}_cpu": f"{label}, thread's CPU" for way, label in LABELS.items()}
    print(table(figures, on_cpu, "sft_cpu", "ms a step"))
    for name in ("sft_wait", "cached_wait", "targets_read"):
        print(f"{name}: {figures[f'{name}_ms']:.2f} ms, {figures[f'{name}_share']:.2%} of the step")
    reads = ", ".join(f"{label} {figures[f'{way}_targets_read']:g}" for way, label in LABELS.items())
    print(f"samples read from the store in a step: {reads}")
    print(f"of the online step the teacher takes {figures['online_teacher_ms']:.1f} ms")


if __name__ == "__main__":
    run_main(main)
