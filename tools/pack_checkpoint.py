"""A trained model of the benchmark as it comes with the package: bf16 weights, and how they came about.

    python -m tools.pack_checkpoint pipeline/recipes/teacher.yaml teacher pipeline/benchmark/checkpoints/teacher

Writes weights, tokenizer and image processor, and `training.jsonl`: every 50th line of the job's metrics. The weights'
hash, the job's settings and the machine go to `origin.json`. `card` (see there) writes README.md from evaluations of
what was packed:

    python -m tools.pack_checkpoint --card pipeline/benchmark/checkpoints/teacher RESULTS.json ...
"""

import argparse
import hashlib
import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import run_main
from pipeline.evaluation.results import machine
from pipeline.files import write_json, write_text
from pipeline.models.loading import load_model, save_model
from pipeline.recipe import load_recipe

ORIGIN = "origin.json"
LOG = "training.jsonl"
WEIGHTS = "model.safetensors"
EVERY = 50
"""Steps between the lines of the log."""
TITLES = {
    "teacher": "The teacher of the embedded benchmark",
    "base": "The base student of the embedded benchmark",
}
ROLES = {
    "teacher": "It plays a large pretrained VLM: it has seen scenes that nobody else has, with many corner cases.",
    "base": "It plays a small pretrained VLM: it knows common scenes and has never seen a corner case.",
}


def pack(recipe_path: Path, job: str, target: Path, overrides: Sequence[str]) -> None:
    """Write a finished job's model to `target`."""
    recipe = load_recipe(recipe_path, list(overrides))
    source, folder = recipe.model_dir(f"jobs.{job}"), recipe.job_dir(job)
    shutil.rmtree(target, ignore_errors=True)
    save_model(load_model(source, torch.bfloat16), source, target)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = ("step", "loss", "ce", "lr", "grad_norm", "vision")
    text = [json.dumps({key: line[key] for key in kept if key in line}) for line in lines if line["step"] % EVERY == 0]
    write_text(target / LOG, "\n".join(text) + "\n")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    about: dict[str, Any] = {
        "made_by": f"clkd run pipeline/recipes/{recipe_path.name}",
        "job": job,
        "commit": commit,
        "sha256": hashlib.sha256((target / WEIGHTS).read_bytes()).hexdigest(),
        "scenes": recipe.required_benchmark.scenes.model_dump(include={"train", "seed", "corner_share"}),
        "steps": recipe.jobs[job].steps,
        "global_batch_size": recipe.jobs[job].batch.global_size,
        "machine": {key: value for key, value in machine(torch.device("cpu")).items() if value is not None},
    }
    write_json(target / ORIGIN, about)


def card(target: Path, results: Sequence[Path]) -> None:
    """Write README.md: what the model is, and its scores in results.json files whose first row it is."""
    about = json.loads((target / ORIGIN).read_text())
    scenes = about["scenes"]
    share = f"{100 * scenes['corner_share']:g}% of them corner cases" if scenes["corner_share"] else "no corner case"
    scores = [
        f"| {content['config']['benchmark']['scenes'].get('seed', 0)} | {group['n']} | {metric['title']} | {part} | "
        f"{_shown(metric['unit'], group)} |"
        for content in (json.loads(path.read_text()) for path in results)
        for metric in content["metrics"]
        for part, group in content["rows"][0]["scores"][metric["name"]].items()
    ]
    lines = [
        f"# {TITLES[target.name]}",
        "",
        f"{ROLES[target.name]} It has never seen a scene that students learn from or that anybody is scored on.",
        "",
        f"A Qwen3-VL of {_parameters(results)} parameters, trained from random weights on {scenes['train']:,} drawn "
        f"scenes ({share}; scene seed {scenes['seed']}), {about['steps']:,} steps of {about['global_batch_size']} on "
        "two CPU cores. It knows nothing of real roads.",
        "",
        "```sh",
        f"{about['made_by']}   # makes it again; training.jsonl is the log of the run that made this one",
        "```",
        "",
        f"Weights in bfloat16, SHA-256 of {WEIGHTS} `{about['sha256']}`. Commit {about['commit'][:7]}; "
        + ", ".join(f"{key} {value}" for key, value in about["machine"].items())
        + ".",
        "",
        "Scores of these weights, computed in float32, on test scenes:",
        "",
        "| scene seed | answers | metric | slice | value |",
        "|--:|--:|---|---|--:|",
        *scores,
        "",
    ]
    write_text(target / "README.md", "\n".join(lines))


def _shown(unit: str, group: dict[str, Any]) -> str:
    scale, digits = (100, 1) if unit == "%" else (1, 4)
    ends = f" [{', '.join(f'{scale * end:.{digits}f}' for end in group['interval'])}]" if "interval" in group else ""
    return f"{scale * group['value']:.{digits}f}{ends} {unit}"


def _parameters(results: Sequence[Path]) -> str:
    return f"{json.loads(results[0].read_text())['rows'][0]['params_total'] / 1e6:.2f} million"


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.pack_checkpoint", description=__doc__)
    parser.add_argument("--card", action="store_true")
    parser.add_argument("places", nargs="+")
    options = parser.parse_args(argv)
    if options.card:
        card(Path(options.places[0]), [Path(place) for place in options.places[1:]])
    else:
        recipe, job, target, *overrides = options.places
        pack(Path(recipe), job, Path(target), overrides)


if __name__ == "__main__":
    run_main(main)
