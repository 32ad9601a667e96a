"""One command for everything: `clkd STAGE RECIPE [section.key=value ...]`, the same as `python -m pipeline STAGE ...`.

What a stage accepts is said here, so that help costs no more than Python's own start, and a recipe's mistakes no torch:
a stage's code is imported when it runs. Each module that `STAGES` names has `main(recipe, options)`, which returns an
exit status or None.
"""

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from pipeline import __version__
from pipeline.errors import ConfigError, run_main

Add = Callable[..., argparse.Action]


@dataclass(frozen=True, slots=True)
class Stage:
    """One word of the command line."""

    group: str
    help: str
    module: str
    arguments: Callable[[Add], None] = lambda add: None
    subject: str = "RECIPE"
    """Its first words. A recipe, and an action before it, are read here; all else is left in `options.words`."""


# -- what each stage accepts -------------------------------------------------------------------------------------------


def _index(add: Add) -> None:
    add("--split", action="append", metavar="NAME", help="only this one, in place of the recipe's; may be repeated")


def _init(add: Add) -> None:
    add("--teacher", type=Path, required=True, metavar="DIR", help="checkpoint folder of the teacher")
    add("--student", type=Path, required=True, metavar="DIR", help="checkpoint folder that the student starts from")
    add("--data", type=Path, required=True, metavar="DIR", help="folder of the data set")
    add("--out", type=Path, default=Path("recipe.yaml"), metavar="FILE", help="the recipe to write (recipe.yaml)")


def _check(add: Add) -> None:
    add("--gpus", type=int, default=8, metavar="N", help="ranks of a training job (8)")
    add("--gpu-mem", type=float, metavar="GIB", help="memory of a GPU in GiB")
    add("--tflops", type=float, metavar="X", help="10^12 operations a second that a GPU reaches in training")
    add("--no-images", action="store_true", help="read images' headers only")


def _student(add: Add) -> None:
    add("--model", action="append", required=True, metavar="NAME", help="key of `models`; may be given more than once")


def _upcycle(add: Add) -> None:
    add("--experts", type=int, default=4, help="experts per MoE layer (4)")
    add("--top-k", type=int, default=2, help="experts per token (2)")
    add("--every", type=int, help="every n-th decoder layer (2)")
    add("--layers", type=_numbers, help="in place of --every: these decoder layers, from 0: 1,3,5")
    add("--expert-width", type=float, default=1.0, help="share of the MLP's width: 1, 0.5, 0.25, ...")
    add("--shared-expert", type=float, help="share of the MLP in a shared expert, if there is one")
    add("--router-noise", type=float, default=0.02, help="standard deviation of the router's weights (0.02)")
    add("--expert-noise", type=float, default=0.02, help="relative noise on the copies (0.02); 0: exact copies")
    add("--seed", type=int, default=0)
    add("--measure-logits", action="store_true", help="compare logits; needs a whole model in memory")


def _teacher(add: Add) -> None:
    # `accelerate launch` and torchrun number their processes in the environment.
    launched = {name: int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1))}
    add("--worker", type=int, default=launched["RANK"], metavar="I", help="this worker's number, from 0")
    add("--workers", type=int, default=launched["WORLD_SIZE"], metavar="N", help="workers that share the pass")
    add("--json", type=Path, metavar="FILE", help="also write the summary there; {worker} is replaced")


def _hardness(add: Add) -> None:
    add("--student", metavar="REF", help="score for this student instead of the teacher-only prior")
    add("--inspect", action="store_true", help="write a page with the hardest and easiest samples")
    add("--batch-size", type=int, default=32, metavar="N", help="samples per forward (32)")
    add("--out", type=Path, metavar="FILE", help="the table (.parquet), or the page (.html) of --inspect")
    add("--count", type=int, default=6, metavar="N", help="--inspect: samples of either kind (6)")
    add("--student-layer", type=int, metavar="N", help="--inspect: layer of image cells, if W is fitted")


def _train(add: Add) -> None:
    add("--config", type=Path, metavar="RECIPE", help="the recipe, in place of the first word")
    _deepspeed(add)
    _changes(add)
    add("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # set by the deepspeed launcher


def _export(add: Add) -> None:
    add("--out", type=Path, required=True, metavar="DIR", help="folder to write, or to replace")
    add("--template", type=Path, metavar="DIR", help="of a checkpoint: take configuration and tokenizer from here")
    add("--accept-logits", action="store_true", help="write it even if its logits are not the training engine's")


def _store(add: Add) -> None:
    add("--discard", action="store_true", help="verify: drop damaged shards, to be rebuilt")
    add("--sample", metavar="ID", help="inspect: the sample to show")
    add("--from", dest="sources", action="append", metavar="URL", help="merge: a store to copy from")
    add("--out", type=Path, metavar="DIR", help="export: folder of the Parquet files")


def _plan(add: Add) -> None:
    add("--gpus", type=_numbers, required=True, metavar="N[,N...]", help="ranks of the job; with --topology, several")
    add("--gpu-mem", type=float, metavar="GIB", help="memory of a GPU in GiB")
    add("--reserve", type=float, default=4.0, metavar="GIB", help="of it that is left alone (4)")
    add("--topology", action="store_true", help="show which ranks form which groups, and plan no memory")
    add("--gpus-per-node", type=int, default=8, metavar="N", help="--topology: GPUs of a node (8)")
    _deepspeed(add)
    add("--length", type=int, metavar="N", help="positions of a sequence; default: data.max_length")
    add("--images", type=int, default=1, metavar="N", help="images of a sample (1)")
    add("--answers", type=int, default=128, metavar="N", help="answer tokens of a sample (128)")
    add("--samples", type=int, metavar="N", help="training samples; default: those of the data set, if it is there")
    add("--tflops", type=float, metavar="X", help="10^12 operations a second that a GPU reaches in training")
    add("--rate", type=Path, metavar="FILE", help="figures of tools.bench.moe, for the same")
    add("--attention", default="sdpa", choices=("sdpa", "eager"), help="training takes sdpa on GPUs")
    add(
        "--imbalance",
        type=float,
        default=1.0,
        metavar="X",
        help="rows of the busiest rank (moe.layer native without dropping: expert) over an even share (1)",
    )
    add("--json", type=Path, metavar="FILE", help="file that receives the figures")


def _run(add: Add) -> None:
    _deepspeed(add)
    _changes(add)
    add("--ranks", type=int, metavar="N", help="training processes on this machine (one a GPU; 2 on the CPU)")


def _submit(add: Add) -> None:
    add("--from", dest="start", metavar="STAGE", help="only this stage and those after it, done or not")
    add("--dry-run", action="store_true", help="print the commands and submit nothing")
    add("--workers", type=int, metavar="N", help="tasks of the teacher's array (the recipe's cluster.teacher_tasks)")
    add(
        "--with",
        dest="options",
        action="append",
        default=[],
        metavar="STAGE=OPTIONS",
        help="more options of sbatch, after the recipe's cluster.sbatch",
    )
    _deepspeed(add)
    _changes(add)


def _changes(add: Add) -> None:
    add("--change-settings", action="store_true", help="go on from checkpoints with other lr, clipping, ..., samples")


def _record(add: Add) -> None:
    add("--stage", required=True, help="file name of the stage, without the job's name or the array task")
    add("--state", default="RUNNING", help="Slurm's word for the job")


def _deepspeed(add: Add) -> None:
    add("--deepspeed_config", type=Path, metavar="JSON", help="DeepSpeed JSON (the recipe's cluster.deepspeed)")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


STAGES = {
    "init": Stage(
        "start here", "look at models and data, write a recipe that fits", "preparation.init", _init,
        subject="",
    ), "check": Stage("start here", "what is wrong or surprising, what it takes, what is next", "preparation.check",
    _check), "scenes": Stage("embedded benchmark", "draw driving scenes in CODA-LM's layout", "benchmark.scenes"),
    "tokenizer": Stage("embedded benchmark", "train a tokenizer on the corpus", "benchmark.tokenizer"), "index":
    Stage("stages", "read the data set once: its samples, checked, for every stage", "data.splits", _index), "teacher":
    Stage("stages", "soft targets of the training split, into the store", "teacher.stage", _teacher), "hardness":
    Stage("stages", "the H2G table; score a student; look at it", "hardness.stage", _hardness), "student":
    Stage("stages", "build a model of the recipe: upcycled, or random", "models.student", _student), "train":
    Stage("stages", "train a job (under deepspeed or torchrun: several ranks)", "training.stage", _train), "evaluate":
    Stage("stages", "answers, scores and latency of the recipe's models", "evaluation.stage"), "export": Stage(
        "stages", "a job's newest checkpoint, or CKPT, as a Hugging Face folder", "export.stage", _export,
        subject="RECIPE|CKPT",
    ),
    "report": Stage("stages", "one page about the run", "report.stage"),
    "run": Stage("running", "all that a recipe needs, in order, on this machine", "cluster.local", _run),
    "plan": Stage("running", "what a job will take: memory, traffic, hours", "cluster.plan", _plan),
    "submit": Stage("running", "all that a recipe needs, as Slurm jobs", "cluster.submit", _submit),
    "status": Stage("running", "how a submitted run stands", "cluster.status", subject="RECIPE|RUN"),
    "store": Stage(
        "tools", "look after a store: verify, inspect, stats, merge, export", "targets.maintenance", _store,
        subject="ACTION RECIPE",
    ),
    "upcycle": Stage(
        "tools", "a dense checkpoint folder as an MoE one, without a recipe", "models.upcycle_command", _upcycle,
        subject="SRC DST",
    ),
    "record": Stage("", "what a Slurm job writes down (used by slurm/*.sbatch)", "cluster.job_record", _record,
        subject="ACTION RECIPE"),
}  # fmt: skip
ACTIONS = {"store": ("verify", "inspect", "stats", "merge", "export"), "record": ("begin", "end")}


# -- the command -------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int | None:
    """Run one stage; returns its exit status. UserError for what the user has to mend."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0].startswith("--local_rank="):  # `deepspeed --module pipeline train ...` puts it first
        words.append(words.pop(0))
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if words[0] == "--version":
        print(f"clkd {__version__}")
        return 0
    name = words[0]
    if name not in STAGES:
        near = difflib.get_close_matches(name, STAGES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"stages: {', '.join(n for n in STAGES if STAGES[n].group)}"
        raise ConfigError(f"clkd {name}: no such stage; {hint}")
    stage = STAGES[name]
    options = parser_of(name).parse_intermixed_args(words[1:])
    recipe = None
    if stage.subject == "ACTION RECIPE":
        options.action = _action(options.words, ACTIONS[name], f"clkd {name}")
    if stage.subject.endswith("RECIPE"):
        options.recipe = getattr(options, "config", None) or Path(_first(options.words, f"clkd {name}"))
        options.overrides = options.words
        from pipeline.recipe.loading import load_recipe  # pydantic, which help does without

        recipe = load_recipe(options.recipe, options.overrides)
    result: int | None = importlib.import_module(f"pipeline.{stage.module}").main(recipe, options)
    return result


def _action(words: list[str], actions: Sequence[str], command: str) -> str:
    if not words or words[0] not in actions:
        raise ConfigError(
            f"{command}: say what to do, as in `{command} {actions[0]} RECIPE.yaml`; one of {list(actions)}."
        )
    return words.pop(0)


def _first(words: list[str], command: str) -> str:
    recipe = next((word for word in words if "=" not in word), None)
    if recipe is None:
        raise ConfigError(f"{command}: name a recipe, as in `{command} RECIPE.yaml`. Nothing was started.")
    words.remove(recipe)
    return recipe


def parser_of(name: str) -> argparse.ArgumentParser:
    """The parser of one stage's words."""
    stage = STAGES[name]
    ends = "" if stage.subject in ("", "SRC DST") else " [section.key=value ...]"
    parser = argparse.ArgumentParser(
        prog=f"clkd {name}",
        usage=" ".join(["clkd", name, *filter(None, [stage.subject]), f"[options]{ends}"]),
        description=f"{stage.help[0].upper()}{stage.help[1:]}.",
    )
    stage.arguments(parser.add_argument)
    if stage.subject:
        parser.add_argument("words", nargs="*", metavar=stage.subject, help=_WORDS[bool(ends)])
    return parser


_WORDS = {
    True: "the recipe (YAML, or the name of one that comes with the package), and values that replace the recipe's",
    False: "the dense checkpoint folder, and the folder to create",
}


def overview() -> str:
    """The help of the command as a whole."""
    lines = ["usage: clkd STAGE RECIPE [options] [section.key=value ...]"]
    for group in dict.fromkeys(stage.group for stage in STAGES.values() if stage.group):
        lines += ["", f"{group}:"]
        lines += [f"  {name:<10} {stage.help}" for name, stage in STAGES.items() if stage.group == group]
    return "\n".join([*lines, "", "clkd STAGE --help says what a stage accepts."])


def entry() -> NoReturn:
    """The command `clkd`, and `python -m pipeline`."""
    run_main(main)


def train() -> NoReturn:
    """`deepspeed train.py ...`, `torchrun train.py ...`: the training stage."""
    run_main(lambda: main(["train", *sys.argv[1:]]))
