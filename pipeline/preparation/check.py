"""The command `check`: all that is wrong or surprising about a recipe, its models and its data; what each stage takes.

    clkd check RECIPE.yaml [--gpus 8 --gpu-mem 80] [--tflops X] [--no-images]

Nothing is written but the index of the data set. Ends with status 2 when something is wrong.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

from pipeline.cluster import chain
from pipeline.data.processor import Processor
from pipeline.data.readers.source import SplitMissingError
from pipeline.data.splits import open_split
from pipeline.errors import EXIT_USER_ERROR, DataError, UserError
from pipeline.models.compatibility import check_own_files
from pipeline.preparation.costs import costs
from pipeline.preparation.model_facts import ModelFacts, collected, model_facts
from pipeline.preparation.split_check import SplitCheck, check_split
from pipeline.recipe import Recipe, folder_of


@dataclass(slots=True)
class Findings:
    """What was found, to be said together."""

    wrong: list[str] = field(default_factory=list)
    """Something a stage would refuse, or do wrongly."""
    surprising: list[str] = field(default_factory=list)
    """Allowed, and perhaps not meant."""
    models: dict[str, ModelFacts] = field(default_factory=dict)
    splits: dict[str, SplitCheck] = field(default_factory=dict)
    costs: list[str] = field(default_factory=list)


def main(recipe: Recipe, options: argparse.Namespace) -> int:
    """Print the findings; the exit status."""
    found = Findings()
    _check_folders(recipe, found)
    _check_models(recipe, found)
    processor = collected(found.wrong, lambda: Processor.load(recipe.processor_dir, recipe.data))
    if processor is not None:
        _check_processors(recipe, processor, found)
    _check_data(recipe, processor, found, decode=not options.no_images)
    _check_jobs(recipe, found)
    found.costs = costs(recipe, found.models, found.splits, options, found.wrong)
    print("\n".join(_page(recipe, options, found)))
    return EXIT_USER_ERROR if found.wrong else 0


# -- what is looked at -------------------------------------------------------------------------------------------------


def _check_folders(recipe: Recipe, found: Findings) -> None:
    """The run's folder can be written."""
    place = recipe.run.dir
    while not place.exists():
        place = place.parent
    probe = place / ".clkd-check"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        found.wrong.append(f"run.dir {recipe.run.dir}: cannot be written: {error.strerror}")


def _check_models(recipe: Recipe, found: Findings) -> None:
    """Checkpoints that the recipe names are there and of families that are known."""
    for name, model in recipe.models.items():
        if model.path is not None:
            facts = collected(found.wrong, partial(model_facts, folder_of(model.path)))
            if facts is None:
                continue
            found.models[f"models.{name}"] = facts
            if not facts.weights_bytes:
                found.wrong.append(f"models.{name}: {facts.folder} has no weights (*.safetensors)")
    for name, model in recipe.models.items():
        ref = model.upcycle.source if model.upcycle else ""
        source = found.models.get(ref)
        if source and not source.can_be_upcycled:
            why = "has experts already" if source.experts else "is of a family without an MoE architecture of its kind"
            found.wrong.append(f"models.{name}.upcycle.source: {ref} {why} ({source})")
    _check_layers(recipe, found)


def _check_layers(recipe: Recipe, found: Findings) -> None:
    """Layers that sketches and features name are there."""
    sketches, teacher = recipe.targets.sketches, found.models.get(recipe.targets.teacher or "")
    if sketches and teacher and sketches.layer > teacher.layers:
        found.wrong.append(f"targets.sketches.layer: {sketches.layer}, but the teacher has {teacher.layers} layers")
    for name, job in recipe.jobs.items():
        features = job.distill.active_features if job.distill else None
        student = found.models.get(str(next((ref for ref in _lineage(recipe, job.init) if ref in found.models), "")))
        if features and student and features.student_layer > student.layers:
            found.wrong.append(
                f"jobs.{name}.distill.features.student_layer: {features.student_layer}, but the student has "
                f"{student.layers} layers"
            )


def _lineage(recipe: Recipe, ref: str) -> Iterator[str]:
    """The reference, and all that it is made from."""
    source: str | None = ref
    while source is not None:
        yield source
        source = recipe.made_from(source)


def _check_processors(recipe: Recipe, processor: Processor, found: Findings) -> None:
    """Every checkpoint's own tokenizer and image processor do what the run's do."""
    for facts in found.models.values():
        collected(found.wrong, partial(check_own_files, facts.folder, processor, recipe.data))
        if facts.vocabulary < processor.vocab_size:
            found.wrong.append(
                f"{facts.folder}: {facts.vocabulary} rows of vocabulary, {processor.origin} has {processor.vocab_size} "
                "tokens"
            )


def _check_data(recipe: Recipe, processor: Processor | None, found: Findings, *, decode: bool) -> None:
    """Every split that is there, record by record."""
    data = recipe.data
    pool = {data.pool_split: True} if data.pool_split and recipe.targets.answers else {}
    wanted = {data.train_split: bool(recipe.jobs), **pool, data.val_split: False}
    wanted[data.test_split] = bool(recipe.evaluation.rows)
    for name, needed in wanted.items():
        try:
            samples = open_split(recipe, name, look_at_images=True)
        except SplitMissingError as error:
            if needed:
                found.wrong.append(str(error))
            continue
        except (DataError, UserError) as error:
            found.wrong.append(str(error))
            continue
        if processor is not None:
            split = found.splits[name] = check_split(recipe, name, samples, processor, decode=decode)
            if name in pool and split.questions < len(samples):
                found.wrong.append(
                    f"data.pool_split {name}: {len(samples) - split.questions:,} record(s) have an answer: move them "
                    "to data.train_split"
                )
            (found.surprising if data.bad_samples == "skip" else found.wrong).extend(split.problem_lines())
            found.surprising += split.surprises(recipe)


def _check_jobs(recipe: Recipe, found: Findings) -> None:
    """Numbers that are allowed and seldom meant."""
    split = found.splits.get(recipe.data.train_split)
    for name, job in recipe.jobs.items():
        if split is None or not split.lengths.samples:
            continue
        seen = job.steps * job.batch.global_size / split.lengths.samples
        if not 0.5 <= seen <= 20:
            found.surprising.append(
                f"jobs.{name}: {job.steps} steps of {job.batch.global_size} samples see the {split.lengths.samples:,} "
                f"samples {seen:.3g} times"
            )
        if job.distill and not job.distill.active_features:
            found.surprising.append(
                f"jobs.{name}.distill: without `features`; of all parts of CLKD they gained most (docs/RESULTS.md)"
            )
        if job.steps < job.checkpoint.every:
            found.surprising.append(
                f"jobs.{name}.checkpoint.every: {job.checkpoint.every}, but the job has {job.steps} steps: one "
                "checkpoint, at its end"
            )


# -- what is said ------------------------------------------------------------------------------------------------------


def _page(recipe: Recipe, options: argparse.Namespace, found: Findings) -> Iterator[str]:
    yield from _section("models", [f"{name}: {facts}" for name, facts in found.models.items()])
    yield from _section("data", [str(split) for split in found.splits.values()])
    yield from _section("what it takes", found.costs)
    yield from _section(f"surprising: {len(found.surprising)}", found.surprising)
    yield from _section(f"wrong: {len(found.wrong)}", found.wrong)
    if found.wrong:
        yield f"\nMend what is wrong, then `clkd check {options.recipe}` again. Nothing was started."
    else:
        yield f"\nNothing is wrong. Next: {_next(recipe, options)}"


def _section(title: str, lines: list[str]) -> Iterator[str]:
    if lines:
        yield f"\n{title}"
        yield from ("  " + line.replace("\n", "\n    ") for line in lines)


def _next(recipe: Recipe, options: argparse.Namespace) -> str:
    """The command of the first stage whose files are not there."""
    words = " ".join([str(options.recipe), *options.overrides])
    stage = next((stage for stage in chain.chain(recipe) if not stage.output.exists()), None)
    if stage is None:
        return f"nothing is missing; `clkd report {words}` shows the run."
    kind, _, which = stage.name.partition(" ")
    if kind == "train":
        command = f"deepspeed train.py --config {words} --deepspeed_config {recipe.cluster.deepspeed} job={which}"
        return f"`{command}`, or `clkd run {words}` for all that is missing."
    command = f"clkd student {words} --model {which}" if kind == "model" else f"clkd {kind} {words}"
    return f"`{command}`, or `clkd run {words}` for all that is missing."
