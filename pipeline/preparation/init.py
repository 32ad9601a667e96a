"""The command `init`: look at two model folders and a data folder, and write a recipe that fits them."""

import argparse
import math
from datetime import date
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from tqdm import tqdm

from pipeline.data.processor import Processor
from pipeline.data.readers import READERS
from pipeline.data.readers.source import Source
from pipeline.data.sample import Sample
from pipeline.errors import ConfigError, DataError, UserError
from pipeline.files import listed, write_text
from pipeline.models.compatibility import check_own_files
from pipeline.preparation.data_facts import Length, Lengths, detect, header_size, length_of
from pipeline.preparation.model_facts import TRAINED_HERE, ModelFacts, collected, model_facts
from pipeline.recipe import AnswersConfig, DataConfig, load_recipe

LOOKED_AT = 400
"""Samples that are measured, up to twice as many; all are counted."""
EPOCHS, GLOBAL_SIZE = 3, 64
PIXELS_OF_A_TOKEN = 32 * 32
LONGEST_ANSWER = AnswersConfig().max_new_tokens
"""Where no record has an answer to go by."""
TEMPLATE = "recipe.yaml.j2"


def main(recipe: None, options: argparse.Namespace) -> None:
    """Write the recipe; refuses with all problems at once, and to overwrite a file."""
    out: Path = options.out
    problems: list[str] = []
    if out.exists():
        problems.append(f"{out}: is there already. Name another file with --out, or move it away")
    teacher = collected(problems, lambda: _fitting(options.teacher.resolve(), "teacher"))
    student = collected(problems, lambda: _fitting(options.student.resolve(), "student"))
    data = collected(problems, lambda: detect(options.data.resolve()))
    processor = collected(problems, lambda: _processor(teacher, student)) if teacher and student else None
    if problems or processor is None:
        raise UserError(f"clkd init: {len(problems)} problem(s), nothing was written.{listed(problems)}")
    values = _values(teacher, student, options.data.resolve(), data[0], data[1], processor)
    write_text(out, _render(values))
    load_recipe(out)  # what is written is a recipe
    lengths: Lengths = values["lengths"]
    print(f"teacher  {teacher.folder}: {teacher}\nstudent  {student.folder}: {student}")
    splits = ", ".join(f"{name} {found}" for name, found in values["splits"].items() if found is not None)
    asked = f", {lengths.questions:,} of them for the teacher to answer" if lengths.questions else ""
    print(f"data     {values['root']}: {values['format']}, {splits}; {lengths.samples:,} samples to train on{asked}")
    print(f"{out}: written. Next: `clkd check {out}`")


def _fitting(folder: Path, role: str) -> ModelFacts:
    facts = model_facts(folder)
    if facts.model_type not in TRAINED_HERE:
        raise ConfigError(
            f"{folder}: a {role} of type {facts.model_type!r}; the stages that read images know {list(TRAINED_HERE)}"
        )
    return facts


def _processor(teacher: ModelFacts, student: ModelFacts) -> Processor:
    """The teacher's, once the student's own is seen to be the same."""
    data = DataConfig()
    processor = Processor.load(teacher.folder, data)
    check_own_files(student.folder, processor, data)
    return processor


def _values(
    teacher: ModelFacts, student: ModelFacts, root: Path, format: str, splits: dict[str, str], processor: Processor
) -> dict[str, Any]:
    """What the template asks for."""
    lengths = _looked_at(root, format, splits["train"], processor)
    defaults = DataConfig()
    largest = _rounded(lengths.quantile("pixels", 1.0), PIXELS_OF_A_TOKEN)
    max_pixels = min(defaults.max_pixels, largest)
    # Small images are not blown up: that would cost tokens and show nothing more.
    smallest = max(PIXELS_OF_A_TOKEN, lengths.quantile("pixels", 0.0) // PIXELS_OF_A_TOKEN * PIXELS_OF_A_TOKEN)
    longest, longest_answer = lengths.quantile("tokens", 1.0), lengths.quantile("answer", 1.0)
    steps = max(1, math.ceil(EPOCHS * lengths.samples / GLOBAL_SIZE))
    return {
        "date": date.today().isoformat(),
        "teacher": teacher,
        "student": student,
        "root": root,
        "format": format,
        "splits": {"val": None, "test": None} | splits,
        "lengths": lengths,
        "run_dir": Path("runs") / root.name,
        "max_pixels": max_pixels,
        "min_pixels": min(defaults.min_pixels, smallest),
        # A quarter above the longest of those looked at: `clkd check` looks at all.
        "max_length": min(_rounded(math.ceil(1.25 * longest), 256), student.positions, teacher.positions),
        "max_new_tokens": max(128, _rounded(2 * longest_answer, 64)) if longest_answer else LONGEST_ANSWER,
        "upcycled": student.can_be_upcycled,
        "teacher_dtype": "float32" if teacher.dtype == "float32" else "bfloat16",
        "epochs": EPOCHS,
        "global_size": GLOBAL_SIZE,
        "steps": steps,
        "checkpoint_every": max(1, min(500, steps // 4)),
    }


def _looked_at(root: Path, format: str, split: str, processor: Processor) -> Lengths:
    """Lengths of the training split; images are known by their headers."""
    reader = READERS[format]
    source = Source(root, split, reader.files(root, split))
    bar = tqdm(reader.read(source), desc=f"look at {split}", unit=" samples", disable=None)
    lengths = Lengths(LOOKED_AT)
    for sample in bar:
        lengths.add(sample, _length(sample, processor) if lengths.due() else None)
    if not lengths.rows:
        raise DataError(f"{root}, split {split!r}: no sample can be read.{listed(_shown(source))} Nothing was written.")
    if source.problems:
        print(f"{root}, split {split!r}: {len(source.problems)} problem(s); `clkd check` lists them")
    return lengths


def _length(sample: Sample, processor: Processor) -> Length | None:
    """None for a sample that cannot be encoded: the check names it."""
    try:
        return length_of(sample, header_size, processor)
    except DataError:
        return None


def _shown(source: Source) -> list[str]:
    return [problem.problem for problem in source.problems.found[:5]]


def _rounded(value: int, unit: int) -> int:
    """Up to a multiple of `unit`, at least one."""
    return max(1, math.ceil(value / unit)) * unit


def _render(values: dict[str, Any]) -> str:
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, undefined=StrictUndefined, trim_blocks=False, keep_trailing_newline=True)
    return environment.get_template(TEMPLATE).render(**values)
