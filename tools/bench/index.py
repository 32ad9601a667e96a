"""The index of a large data set: how fast it is made, how fast it opens, and what a rank holds of it.

    python -m tools.bench.index [--samples 1000000] [--images N] [--folder DIR] [--json FILE]

Makes chat JSONL about small images, hard links to a few files, in folders of a thousand; an image to four questions
unless told otherwise. Each step runs in a process of its own: the index is made; made again after a record was added
(images read are counted as the interpreter opens them); opened, and read by a rank as training does. Memory is the
kernel's own account in /proc (Linux). Writes one flat JSON object; `MEANING` says what the figures are.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from pipeline.data.index.samples import Index
from pipeline.data.splits import open_split
from pipeline.errors import UserError, run_main
from pipeline.evaluation import results
from pipeline.recipe import Recipe, load_recipe

MEANING = {
    "make_s": "seconds until the index is there, images read",
    "make_samples_s": "samples a second of that",
    "make_images_read": "images opened for it",
    "again_s": "seconds to make it again after a record was added",
    "again_images_read": "images opened for that",
    "make_peak_mb": "largest memory of the process that makes it",
    "open_s": "seconds to open it, the annotation file's time of change looked at",
    "open_images_read": "images opened for that, and for all that a rank reads below",
    "disk_bytes_a_sample": "of the index: all that can ever be shared",
    "shared_start": "bytes of the index in memory, a sample, after opening and reading all ids and one step's lengths",
    "shared_all": "the same once the samples of many steps were read in random order",
    "private_open": "anonymous bytes that opening added, a sample",
    "private_start": "that opening and reading all ids and one step's lengths added",
    "private_all": "that reading the samples of many steps added as well",
    "read_us": "microseconds to read one sample in random order",
}
FOLDER_IMAGES, FILE_LINKS, QUESTIONS, STEP = 1000, 30_000, 97, 4096
READ_SAMPLES = 200_000


# -- the data set ------------------------------------------------------------------------------------------------------


def make_data(root: Path, samples: int, images: int) -> None:
    """`train.jsonl`, and images that are links to one file in FILE_LINKS."""
    rng = np.random.default_rng(0)
    for number in tqdm(range(images), desc="images", unit="image", unit_scale=True, disable=None):
        path, first = image_path(root, number), image_path(root, number - number % FILE_LINKS)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path == first:
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
        else:
            os.link(first, path)
    with (root / "train.jsonl").open("w") as file:
        for number in range(samples):
            file.write(record(root, number, images))


def image_path(root: Path, number: int) -> Path:
    return root / "images" / f"{number // FOLDER_IMAGES:04d}" / f"{number:07d}.png"


def record(root: Path, number: int, images: int) -> str:
    """One line. Few questions and many answers, as data sets have them."""
    turns = [f"What does the driver of vehicle {number % QUESTIONS} need to know?", f"Vehicle {number} is in lane 2."]
    roles = zip(("user", "assistant"), turns, strict=True)
    image = image_path(root, number % images).relative_to(root)
    messages = [{"role": role, "content": text} for role, text in roles]
    return json.dumps({"id": str(number), "image": str(image), "messages": messages}) + "\n"


# -- one step, in a process of its own ---------------------------------------------------------------------------------


def count_image_reads() -> Callable[[], int]:
    """Counts from now on how often this process opens a file of `images/`."""
    seen = 0

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event == "open" and isinstance(arguments[0], str) and arguments[0].endswith(".png"):
            seen += 1

    sys.addaudithook(look)
    return lambda: seen


def anonymous() -> int:
    """Bytes that this process alone holds."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon"))
    return int(line.split()[1]) << 10


def mapped(folder: Path) -> int:
    """Bytes of the folder's files that are in memory and mapped by this process."""
    size, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            ours = len(words) > 5 and words[-1].startswith(str(folder))
        elif ours and words[0] == "Rss:":
            size += int(words[1]) << 10
    return size


def measure_making(recipe: Recipe, name: str) -> dict[str, float]:
    reads, started = count_image_reads(), time.monotonic()
    samples = len(open_split(recipe, "train"))
    seconds = time.monotonic() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    figures = {f"{name}_s": seconds, f"{name}_images_read": reads(), f"{name}_peak_mb": peak}
    return figures | ({f"{name}_samples_s": samples / seconds} if name == "make" else {})


def measure_rank(recipe: Recipe) -> dict[str, float]:
    """What a rank does: opens the split, goes through the ids once, and reads samples of one step after the other."""
    folder = (recipe.index_dir / "train").resolve()
    about = json.loads((folder / "index.json").read_text())
    order = np.random.default_rng(0).permutation(about["samples"])[:READ_SAMPLES]
    mapped(folder)  # what looking takes is no part of it
    reads, before, started = count_image_reads(), anonymous(), time.monotonic()
    index = open_split(recipe, "train")
    figures: dict[str, float] = {"open_s": time.monotonic() - started, "samples": len(index)}

    def look(name: str) -> None:
        figures[f"private_{name}"] = (anonymous() - before) / len(index)
        figures[f"shared_{name}"] = mapped(folder) / len(index)

    look("open")
    for _ in index.sample_ids:
        pass
    index.sizes(order[:STEP])
    look("start")
    figures["read_us"] = read(index, order) / len(order) * 1e6
    look("all")
    return figures | {"open_images_read": reads(), "disk_bytes_a_sample": sum(about["bytes"].values()) / len(index)}


def read(index: Index, order: Sequence[int]) -> float:
    """Seconds to read these samples."""
    started = time.monotonic()
    for place in order:
        index[int(place)]
    return time.monotonic() - started


# -- all steps ---------------------------------------------------------------------------------------------------------


def step(recipe: Path, name: str) -> dict[str, float]:
    """Run one step in a process of its own."""
    command = [sys.executable, "-m", "tools.bench.index", "--step", name, "--recipe", str(recipe)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise UserError(f"{' '.join(command)} ended with {done.returncode}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measure(folder: Path, samples: int, images: int) -> dict[str, float]:
    """The figures by the names in MEANING."""
    root, recipe = folder / "data", folder / "recipe.yaml"
    make_data(root, samples, images)
    data = {"format": "chat", "root": str(root), "train_split": "train"}
    recipe.write_text(json.dumps({"run": {"dir": str(folder / "run")}, "data": data}))
    figures = step(recipe, "make")
    with (root / "train.jsonl").open("a") as file:
        file.write(record(root, samples + random.Random(0).randrange(samples), images))
    figures |= {name: value for name, value in step(recipe, "again").items() if name != "again_peak_mb"}
    return {"images": images, **figures, **step(recipe, "rank")}


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.index", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="file that receives the figures")
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--images", type=int, help="default: a quarter of the samples")
    parser.add_argument("--folder", type=Path, help="where the data are made; default: a temporary folder")
    parser.add_argument("--step", choices=("make", "again", "rank"), help=argparse.SUPPRESS)
    parser.add_argument("--recipe", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.step:
        recipe = load_recipe(options.recipe)
        print(json.dumps(measure_rank(recipe) if options.step == "rank" else measure_making(recipe, options.step)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        figures = measure(Path(folder), options.samples, options.images or -(-options.samples // 4))
    if options.json:
        about = {"meaning": MEANING, "machine": results.machine(torch.device("cpu"))}
        options.json.write_text(json.dumps(figures | about, indent=1) + "\n")
    print(f"{figures['samples']:,} samples of {figures['images']:,} images")
    for name, meaning in MEANING.items():
        print(f"{name:20}{figures[name]:14,.2f}   {meaning}")


if __name__ == "__main__":
    run_main(main)
