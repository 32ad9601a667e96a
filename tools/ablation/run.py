"""What each part of the method is worth: every row of `ablation_rows` with several seeds, in one table.

    python -m tools.ablation.run ablation --split val [--rows sft,kd] [--jobs 2]

A cell is one row with one seed. Its seed changes the noise of routers and experts when the dense base student becomes a
Mixture of Experts, and the order of samples; scenes, teacher, soft targets and base student are the same for all and
made once. Cells are kept in `<run.dir>/cells`: a finished one is not computed again, one that was interrupted, in
whatever way, goes on from its last checkpoint, one whose settings changed starts anew (the old one is set aside).
Choose settings with `--split val`. `--split test` scores the test split once per cell: a cell that has such a score and
would get another is refused. `--collect` makes the table of what is there.
"""

import argparse
import contextlib
import fcntl
import json
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
import yaml
from tqdm import tqdm

from pipeline.cluster import local as demo
from pipeline.cluster.local import Stage
from pipeline.errors import UserError, run_main
from pipeline.files import weights_hash, write_json, write_text
from pipeline.recipe import Recipe, Reference, merge, parse_args
from pipeline.training.job_settings import settings
from tools.ablation import table
from tools.ablation.cell import JOB
from tools.ablation.data import subset
from tools.ablation.rows import LARGEST, ROWS, Row

DS_CONFIG = "ds_configs/one_rank.json"
POLL_S = 0.5
Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Cell:
    """One row with one seed."""

    row: str
    seed: int
    folder: Path
    recipe: Json
    fingerprints: Mapping[str, str]
    """What its training and its results depend on: `training`, `val`, `test`."""

    @property
    def name(self) -> str:
        return f"{self.row} seed {self.seed}"

    def scored(self, split: str) -> str | None:
        """Fingerprint of the split's result, if there is one."""
        path = self.folder / f"{split}.json"
        return str(json.loads(path.read_text())["fingerprint"]) if path.is_file() else None

    def progress(self) -> str:
        """Steps trained so far, for the eye."""
        lines = self.folder / "run" / "jobs" / JOB / "metrics.jsonl"
        last = lines.read_text().splitlines()[-1:] if lines.is_file() else []
        with contextlib.suppress(ValueError):  # a line that is being written
            return f"{self.name}: step {json.loads(last[0])['step']}" if last else self.name
        return self.name


# -- what all cells share -------------------------------------------------------------------------------------------


def data_root(recipe: Recipe, data: int) -> Path:
    """Root of the set with `data` times the scenes of the smallest."""
    return recipe.run.dir / "data" if data == LARGEST else recipe.run.dir / f"data-x{data}"


def store_dir(recipe: Recipe, row: Row) -> Path:
    """The soft-target store that a row reads."""
    return recipe.run.dir / "-".join(["store", *map(str, row.targets.values())])


def prepare(recipe: Recipe, args: Sequence[str], rows: Mapping[str, Row]) -> None:
    """Scenes, teacher, base student and the stores that the rows read; what is finished with these settings stays."""

    def command(stage: str, *more: str) -> tuple[str, ...]:
        return (sys.executable, "-m", "pipeline", stage, *args, *more)

    train = ("--deepspeed_config", DS_CONFIG)
    scenes = Stage("scenes", (command("scenes"),))
    smallest = f"data.root={data_root(recipe, 1)}"
    stages = [
        Stage("tokenizer", (command("tokenizer"),)),
        Stage("models", (command("student", "--model", "teacher", "--model", "student"),)),
        Stage("train teacher", (command("train", *train, "job=teacher"),)),
        Stage("train base", (command("train", *train, "job=base", smallest),)),
    ]
    for folder, readers in _readers(recipe, rows).items():
        given = [f"targets.{key}={value}" for key, value in readers[0].targets.items()]
        most = max(row.data for row in readers)
        root = f"data.root={data_root(recipe, most)}"
        stages.append(
            Stage(f"soft targets {folder.name} x{most}", (command("teacher", f"targets.store={folder}", root, *given),))
        )
    done_path, digest = recipe.run.dir / "shared.json", shared_digest(recipe)
    done: Json = json.loads(done_path.read_text()) if done_path.is_file() else {}
    for stage in (scenes, *stages):
        if done.get(stage.name) != digest:
            demo.run([stage], recipe.run.dir)
            done[stage.name] = digest
            write_json(done_path, done)
        if stage is scenes:
            for data in sorted({row.data for row in ROWS.values()} - {LARGEST}):
                subset(data_root(recipe, LARGEST), data_root(recipe, data), recipe.data, _scenes(recipe, data))


def _readers(recipe: Recipe, rows: Mapping[str, Row]) -> dict[Path, list[Row]]:
    """The rows that read each store."""
    readers = defaultdict[Path, list[Row]](list)
    for row in rows.values():
        if row.model is None and row.job.get("distill", {}) is not None:
            readers[store_dir(recipe, row)].append(row)
    return dict(readers)


def _scenes(recipe: Recipe, data: int) -> int:
    return recipe.required_benchmark.scenes.train * data // LARGEST


def shared_digest(recipe: Recipe) -> str:
    """Of the settings that what all cells share depends on."""
    content = recipe.model_dump(mode="json", include={"benchmark", "data", "targets"})
    jobs = {name: settings(recipe, name) for name in ("teacher", "base")}
    return _digest(content | {"jobs": jobs, "seed": recipe.run.seed})


# -- cells ----------------------------------------------------------------------------------------------------------


def make_cells(recipe: Recipe, rows: Mapping[str, Row], seeds: Sequence[int]) -> list[Cell]:
    """All cells, seed by seed, so that every row has one before any row has two. Reads the shared models' weights."""
    weights = {name: weights_hash(recipe.model_dir(f"jobs.{name}")) for name in ("teacher", "base")}
    cells = [_cell(recipe, name, row, seed, weights) for seed in seeds for name, row in rows.items() if not row.model]
    return [_cell(recipe, name, row, 0, weights) for name, row in rows.items() if row.model] + cells


def _cell(recipe: Recipe, name: str, row: Row, seed: int, weights: Mapping[str, str]) -> Cell:
    folder = recipe.run.dir.absolute() / "cells" / f"{name}-seed{seed}"
    raw = cell_recipe(recipe, row, seed, folder)
    training = {"weights": weights[row.model]} if row.model else _training(recipe, row, raw, weights)
    asked = {"data": recipe.data.model_dump(mode="json"), "evaluation": recipe.evaluation.model_dump(mode="json")}
    drawn = recipe.required_benchmark.scenes
    scenes = {split: getattr(drawn, split) for split in ("val", "test")}
    results = {s: _digest([training, asked, scenes[s], drawn.seed, s]) for s in ("val", "test")}
    return Cell(name, seed, folder, raw, {"training": _digest(training), **results})


def _training(recipe: Recipe, row: Row, raw: Json, weights: Mapping[str, str]) -> Json:
    """All that a cell's training depends on, without the places of files."""
    cell = Recipe.model_validate(raw)
    job, start = cell.jobs[JOB], cell.models[Reference.parse(cell.jobs[JOB].init).name]
    taught = job.distill is not None or job.curriculum is not None
    scenes = recipe.required_benchmark.scenes.model_dump(exclude={"workers", "val", "test"})
    return {
        "job": {k: v for k, v in settings(cell, JOB).items() if k != "hardness"},
        "hardness": job.hardness.model_dump(exclude={"table"}) | {"static": row.static},
        "base": weights["base"],
        "upcycle": start.upcycle.model_dump(exclude={"source"}) if start.upcycle else {},
        "teacher": weights["teacher"] if taught else None,
        "targets": {k: v for k, v in raw["targets"].items() if k not in ("store", "teacher")} if taught else None,
        "scenes": scenes | {"used": _scenes(recipe, row.data)},
    }


def cell_recipe(recipe: Recipe, row: Row, seed: int, folder: Path) -> Json:
    """The recipe of one cell, with the shared files in their places: any stage can be run with it by hand."""
    shared = recipe.run.dir.absolute()
    raw = recipe.model_dump(mode="json", exclude_unset=True)
    del raw["benchmark"]  # what cells share of it is made already, and they name where it is
    raw["models"] = {
        **raw["models"],
        "teacher": {"path": str(shared / "jobs" / "teacher" / "model")},
        "dense": {"path": str(shared / "jobs" / "base" / "model")},
    }
    for model in raw["models"].values():
        if "upcycle" in model:
            model["upcycle"] = merge(model["upcycle"], {"source": "models.dense"})
    raw["jobs"] = {JOB: merge(raw["jobs"][JOB], row.job)}
    if row.static:
        raw["jobs"] = merge(raw["jobs"], {JOB: {"hardness": {"table": str(folder / "run" / "static.parquet")}}})
    return merge(
        raw,
        {
            "run": {"dir": str(folder / "run"), "seed": seed},
            "data": {
                "root": str(data_root(recipe, row.data).absolute()),
                "processor": str(recipe.processor_dir.absolute()),
            },
            "targets": {"teacher": "models.teacher", "store": str(store_dir(recipe, row).absolute()), **row.targets},
        },
    )


def begin(cell: Cell, split: str) -> bool:
    """Bring a cell's folder up to date; whether there is work left.

    Raises:
        UserError: the test split was scored for this row and seed with other settings.
    """
    tested = cell.scored("test")
    if tested is not None and (split == "test" or not _same_training(cell)) and tested != cell.fingerprints["test"]:
        raise UserError(
            f"{cell.folder / 'test.json'}: the test split has been scored for {cell.name}, with other settings than "
            f"these ({tested}, now {cell.fingerprints['test']}). Scoring it again would be choosing settings by it. Go "
            "back to those settings, or use another run.dir. Nothing was changed."
        )
    if cell.scored(split) == cell.fingerprints[split]:
        return False
    _bring_out(cell)
    if cell.scored(split) == cell.fingerprints[split]:
        return False
    cell.folder.mkdir(parents=True, exist_ok=True)
    write_text(cell.folder / "recipe.yaml", yaml.safe_dump(cell.recipe, sort_keys=False))
    row = ROWS[cell.row]
    shared = cell.folder.parent.parent
    about = {
        "row": cell.row,
        "title": row.title,
        "seed": cell.seed,
        "model": str(shared / "jobs" / row.model / "model") if row.model else None,
        "fingerprints": dict(cell.fingerprints),
        "commit": _commit(),
    }
    write_json(cell.folder / "cell.json", about)
    return True


def _bring_out(cell: Cell) -> None:
    """Put a folder of another training aside, and one of this training back: hours of work are not deleted."""
    aside = cell.folder.parent.parent / "set_aside"
    aside.mkdir(exist_ok=True)
    if cell.folder.exists() and not _same_training(cell):
        cell.folder.rename(aside / f"{cell.folder.name}-{_trained_as(cell)}")
    mine = aside / f"{cell.folder.name}-{cell.fingerprints['training']}"
    if mine.exists() and not cell.folder.exists():
        mine.rename(cell.folder)


def _same_training(cell: Cell) -> bool:
    return _trained_as(cell) == cell.fingerprints["training"]


def _trained_as(cell: Cell) -> str | None:
    path = cell.folder / "cell.json"
    return str(json.loads(path.read_text())["fingerprints"]["training"]) if path.is_file() else None


def run_cells(cells: Sequence[Cell], split: str, jobs: int) -> list[str]:
    """Run the cells that are not finished, at most `jobs` at once; the names of those that failed, and their logs."""
    waiting = [cell for cell in cells if begin(cell, split)]
    running: dict[subprocess.Popen[bytes], Cell] = {}
    failed, shown = [], ""
    with tqdm(total=len(waiting), desc=f"cells ({len(cells) - len(waiting)} were finished)", unit="cell") as bar:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    cell = waiting.pop(0)
                    running[_start(cell, split, jobs)] = cell
                for process in [p for p in running if p.poll() is not None]:
                    cell = running.pop(process)
                    bar.update()
                    if process.returncode:
                        failed.append(f"{cell.name}: status {process.returncode}, {cell.folder / 'log.txt'}")
                doing = "; ".join(cell.progress() for cell in running.values())
                if doing != shown:  # a line of a log file each time
                    bar.set_postfix_str(doing)
                    shown = doing
                time.sleep(POLL_S)
        finally:  # interrupted: training writes its checkpoint before the prompt comes back
            for process in running:
                process.terminate()
            for process in running:
                process.wait()
    return failed


def _start(cell: Cell, split: str, jobs: int) -> subprocess.Popen[bytes]:
    command = (sys.executable, "-m", "tools.ablation.cell", str(cell.folder), "--split", split)
    with (cell.folder / "log.txt").open("ab") as log:
        environment = demo.environment(jobs, ())
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, preexec_fn=demo.die_with_parent)


def _digest(content: Any) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(content, sort_keys=True))


def _commit() -> str:
    asked = subprocess.run(("git", "describe", "--always", "--dirty"), capture_output=True, text=True, check=False)
    return asked.stdout.strip() or "unknown"


# -- command line ---------------------------------------------------------------------------------------------------


def collect(recipe: Recipe, split: str, document: Path | None) -> None:
    """Write and print the table of the finished cells; with `document` also there, between its markers."""
    cells = table.read_cells(recipe.run.dir / "cells", split)
    if not cells:
        print(f"{recipe.run.dir / 'cells'}: no cell has been scored on {split} yet")
        return
    content = table.markdown(cells, split)
    table.write_csv(cells, recipe.run.dir / f"ablation-{split}.csv")
    table.plot(cells, recipe.run.dir / f"ablation-{split}.png")
    if document is not None:
        picture = document.with_name("ablation.png")
        table.plot(cells, picture)
        table.write_between_markers(document, f"{content}\n\n![Every row's seeds, mean and spread]({picture.name})")
    print(content)


def _chosen(text: str | None) -> dict[str, Row]:
    names = text.split(",") if text else list(ROWS)
    unknown = sorted(set(names) - set(ROWS))
    if unknown:
        raise UserError(f"--rows: there is no row {', '.join(unknown)}; rows: {', '.join(ROWS)}. Nothing was started.")
    return {name: ROWS[name] for name in names}


@contextlib.contextmanager
def _alone(run_dir: Path) -> Iterator[None]:
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / "ablation.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{run_dir}: another ablation is at work here. Wait for it or stop it.") from None
        yield


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.ablation.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--split", choices=("val", "test"), default="val", help="val to choose settings, test at last")
    parser.add_argument("--rows", help="comma-separated names; all rows unless given")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated")
    parser.add_argument("--jobs", type=int, default=1, help="cells at once")
    parser.add_argument("--collect", action="store_true", help="only make the table of what is there")
    parser.add_argument("--document", type=Path, help="Markdown file with markers for the table, as docs/RESULTS.md")
    args = parse_args("ablation", argv, parser)
    recipe, options = args.recipe, args.options
    failed = []
    if not options.collect:
        with _alone(recipe.run.dir):
            rows = _chosen(options.rows)
            prepare(recipe, [str(options.config), *options.overrides], rows)
            seeds = [int(seed) for seed in options.seeds.split(",")]
            failed = run_cells(make_cells(recipe, rows, seeds), options.split, options.jobs)
    collect(recipe, options.split, options.document)
    if failed:
        raise UserError("cells failed; the same command tries them again:\n  " + "\n  ".join(failed))


if __name__ == "__main__":
    run_main(main)
