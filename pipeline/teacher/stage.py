"""The teacher pass: soft targets of the training split, once, into the store; answers too, where records have none.

    clkd teacher RECIPE.yaml [--worker I --workers N] [--json FILE]
    accelerate launch --multi_gpu --num_processes N -m pipeline teacher RECIPE.yaml

The sorted list of samples is planned into shards. Worker I takes shards j = I mod N first and then those that no other
worker holds, so workers may be killed, added or left out. A shard that is committed is skipped: the same command goes
on after any interruption, and adds the samples that the data set has gained. The worker that finds all shards written
writes the answers as chats too, see `targets.pool`.
"""

import argparse
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from pipeline.data.index.samples import Index
from pipeline.data.problems import LEFT_OUT, append_left_out
from pipeline.data.processor import Processor
from pipeline.errors import ConfigError
from pipeline.files import write_json
from pipeline.models.compatibility import check_compatible, check_own_files
from pipeline.models.loading import batch_attention, compute_device, load_model
from pipeline.recipe import Recipe
from pipeline.targets.container.leases import clear_leases
from pipeline.targets.container.shards import committed_shards
from pipeline.targets.container.writer import StoreWriter
from pipeline.targets.identity import dataset_fingerprint, expected_identity
from pipeline.targets.pool import chats_path, open_answers, open_questions, open_training_samples, write_chats
from pipeline.teacher.shard_pass import ShardPass


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
    left_out: int = 0
    """Samples that could not be encoded, left out because of `data.bad_samples: skip`."""
    answered: int = 0
    """Questions that the teacher has answered, among the samples."""

    def __str__(self) -> str:
        answered = f", {self.answered} of them answered by the teacher" if self.answered else ""
        others = f", {self.elsewhere} left to other workers" if self.elsewhere else ""
        if not self.shards:
            return f"teacher pass: nothing to do, {self.skipped} shard(s) are committed{others}"
        return (
            f"teacher pass: {self.shards} shard(s) written, {self.skipped} already committed{others}; "
            f"{self.samples} samples{answered}, {self.tokens} answer tokens in {self.seconds:.1f} s "
            f"({self.tokens / self.seconds:.0f} tokens/s), {self.bytes / max(self.tokens, 1):.1f} bytes/token"
            + (f"; {self.cut_tokens} answer tokens CUT to fit data.max_length" if self.cut_tokens else "")
            + (f"; {self.left_out} bad sample(s) LEFT OUT, see {LEFT_OUT} of the run" if self.left_out else "")
        )


def run_pass(recipe: Recipe, worker: int = 0, workers: int = 1) -> PassSummary:
    """Write the shards that are neither committed nor in another worker's hands, this worker's share first.

    Raises:
        UserError: bad data, no teacher, or a store that was made for another identity (nothing was changed).
    """
    if not 0 <= worker < workers:
        raise ConfigError(f"--worker {worker} must lie in [0, --workers {workers})")
    torch.set_float32_matmul_precision(recipe.targets.matmul_precision)
    processor = Processor.load(recipe.processor_dir, recipe.data)
    samples = open_questions(recipe)
    writer = StoreWriter(recipe.store_url, expected_identity(recipe, processor))
    committed, damaged = writer.committed()
    planned = writer.plan(samples.sample_ids, recipe.targets.shard_samples, dataset_fingerprint(samples), committed)
    for problem in damaged:
        print(f"rebuilding: {problem}")
    clear_leases(writer.folder, committed)
    own_first = sorted(planned, key=lambda shard: ((shard - worker) % workers, shard))
    todo = {n: samples.select(samples.places(planned[n])) for n in own_first if n not in committed}
    skipped = len(planned) - len(todo)
    if not todo:
        _hand_on_answers(recipe, processor, samples)
        return PassSummary(0, skipped, 0, 0, 0, 0, 0, 0.0)
    done = ShardPass(recipe, writer, _load_teacher(recipe, processor), processor, todo)
    done.run()
    append_left_out(recipe.run.dir / LEFT_OUT, done.left_out, {"stage": "teacher"})
    if planned.keys() <= set(committed_shards(writer.folder, "targets")):
        _hand_on_answers(recipe, processor, samples)
    return PassSummary(
        shards=len(done.commits),
        skipped=skipped,
        elsewhere=len(todo) - len(done.commits),
        samples=sum(commit.samples for commit in done.commits),
        tokens=sum(commit.rows for commit in done.commits),
        bytes=sum(commit.bytes for commit in done.commits),
        cut_tokens=done.cut_tokens,
        seconds=done.seconds,
        left_out=len(done.left_out),
        answered=done.answered,
    )


def _hand_on_answers(recipe: Recipe, processor: Processor, questions: Index) -> None:
    """Once all questions are answered: the answers as chats, and the samples that training reads."""
    if recipe.targets.answers is None or not questions.from_pool().any():
        return
    count = write_chats(recipe, questions, open_answers(recipe, processor, questions))
    print(f"{chats_path(recipe)}: {count:,} answers as chats")
    open_training_samples(recipe, processor)


def _load_teacher(recipe: Recipe, processor: Processor) -> PreTrainedModel:
    settings = recipe.targets
    dtype: torch.dtype = getattr(torch, settings.dtype)
    path = recipe.model_dir(recipe.teacher)
    model = load_model(path, dtype, attention=batch_attention(), device_map=settings.device_map)
    check_compatible(model, processor)
    if lacking := check_own_files(path, processor, recipe.data):
        print(
            f"{path}: has no {' and no '.join(lacking)} of its own to compare with {processor.origin}: that it was "
            "trained with that one is taken on trust",
            file=sys.stderr,
        )
    if settings.device_map is None:
        torch.nn.Module.to(model, compute_device(recipe.run.device))
    return model


def main(recipe: Recipe, options: argparse.Namespace) -> None:
    """The stage `teacher`."""
    summary = run_pass(recipe, options.worker, options.workers)
    print(summary)
    if options.json:
        path = Path(str(options.json).replace("{worker}", str(options.worker)))
        write_json(path, asdict(summary))
