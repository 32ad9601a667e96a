"""The embedded data set: front-camera driving scenes in CODA-LM's published layout, deterministic by seed.

    clkd scenes RECIPE.yaml

Every image's randomness comes from (seed, split, number) alone, so any number of processes draws the same bytes.
Corner or regular goes to `slices.json`, for evaluation only: no prompt or answer holds it.
"""

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from random import Random

from tqdm import tqdm

from pipeline.benchmark.art import render
from pipeline.benchmark.text import record, unanswered
from pipeline.benchmark.world import plan_scene
from pipeline.errors import DataError
from pipeline.files import differences, listed, write_json
from pipeline.recipe import Recipe, ScenesConfig

FORMAT = 3
JPEG_QUALITY = 92


@dataclass(frozen=True, slots=True)
class _Split:
    """A split's records `<folder>_NNNN`, whose images lie in CODA's `val` or `test` folder."""

    name: str
    folder: str
    first: int
    """Number of its first image: Train and val share CODA's `val` folder."""
    count: int
    corner_share: float
    pool: int = 0
    """Its last images, the pool, which `count` includes."""
    pool_gold: bool = False

    def marker(self, root: Path) -> Path:
        """Settings that the finished split was drawn with."""
        return root / f".{self.name}.json"

    def slices(self, root: Path) -> Path:
        """The split's part of `slices.json`."""
        return root / f".{self.name}.slices.json"


@dataclass(frozen=True, slots=True)
class _Job:
    """One image to draw."""

    root: Path
    split: _Split
    index: int
    """Position in its split, from 1: with seed and split's name the source of all randomness."""
    corner: bool
    config: ScenesConfig

    @property
    def number(self) -> str:
        return f"{self.split.first + self.index - 1:04d}"

    @property
    def stem(self) -> str:
        return f"{self.split.folder}_{self.number}"


def write_scenes(root: Path, config: ScenesConfig) -> None:
    """Draw what is missing below `root`. A finished split with the same settings is left as it is.

    Raises:
        DataError: a split there was drawn with other settings.
    """
    drawn, share = config.train + config.pool, config.test_corner_share
    splits = (
        _Split("Train", "val", 1, drawn, config.corner_share, config.pool, config.pool_gold),
        _Split("val", "val", 1 + drawn, config.val, share),
        _Split("Test", "test", 1, config.test, share),
    )
    settings = {split: _settings(split, config) for split in splits}
    for split in [s for s in splits if not _finished(s.marker(root), settings[s])]:  # all are checked before any
        corner = _corner_flags(config.seed, split)
        jobs = [_Job(root, split, index, corner[index - 1], config) for index in range(1, split.count + 1)]
        _draw_all(jobs, config.workers)
        write_json(split.slices(root), {job.stem: "corner" if job.corner else "regular" for job in jobs})
        write_json(split.marker(root), settings[split])
    slices = [json.loads(split.slices(root).read_text()) for split in splits]
    write_json(root / "slices.json", {stem: kind for part in slices for stem, kind in part.items()})


def _settings(split: _Split, config: ScenesConfig) -> dict[str, object]:
    """All that decides a split's bytes."""
    own: dict[str, object] = {"format": FORMAT, "first": split.first, "images": split.count}
    own |= {"corner_share": split.corner_share, "pool": split.pool, "pool_gold": split.pool_gold}
    return own | config.model_dump(include={"seed", "width", "height"})


def _finished(marker: Path, wanted: dict[str, object]) -> bool:
    if not marker.is_file():
        return False
    found = json.loads(marker.read_text())
    if differs := differences(found, wanted, ("on disk", "recipe")):
        raise DataError(
            f"{marker.parent}: scenes were drawn with other settings.{listed(differs)}\n"
            "Use another run.dir, or remove that folder. Nothing was changed."
        )
    return True


def _corner_flags(seed: int, split: _Split) -> list[bool]:
    """Which images are corner cases: exactly the rounded share, spread by seed, of the pool and of the others."""
    flags = list[bool]()
    for name, count in ((split.name, split.count - split.pool), (f"{split.name} pool", split.pool)):
        part = [n < round(split.corner_share * count) for n in range(count)]
        Random(f"{seed}/{name}/corner").shuffle(part)
        flags += part
    return flags


def _draw_all(jobs: Sequence[_Job], workers: int) -> None:
    root, split = jobs[0].root, jobs[0].split
    for folder in (root / split.folder / "images", root / "CODA-LM" / split.name):
        folder.mkdir(parents=True, exist_ok=True)
    workers = min(workers, len(jobs))
    with get_context("spawn").Pool(workers) if workers > 1 else nullcontext() as pool:
        done = pool.imap_unordered(_draw, jobs, chunksize=16) if pool else map(_draw, jobs)
        for _ in tqdm(done, total=len(jobs), desc=f"scenes {split.name}", mininterval=1):
            pass


def _draw(job: _Job) -> None:
    rng = Random(f"{job.config.seed}/{job.split.name}/{job.index}")
    scene = plan_scene(rng, corner=job.corner, held_out=job.split.name == "Test")
    image, boxes = render(scene, job.config.width, job.config.height)
    image.save(job.root / job.split.folder / "images" / f"{job.number}.jpg", quality=JPEG_QUALITY)
    content = record(scene, boxes, image.size, rng)
    if job.index > job.split.count - job.split.pool and not job.split.pool_gold:
        content = unanswered(content)
    write_json(job.root / "CODA-LM" / job.split.name / f"{job.stem}.json", content)


def main(recipe: Recipe, options: object) -> None:
    """The stage `scenes`."""
    write_scenes(recipe.run.dir / "data", recipe.required_benchmark.scenes)
