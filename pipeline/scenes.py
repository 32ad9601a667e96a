"""The embedded data set: front-camera driving scenes in CODA-LM's published layout, deterministic by seed.

    python -m pipeline.scenes --config RECIPE.yaml

Every image's randomness comes from (seed, split, number) alone, so any number of processes draws the same bytes.
Corner or regular goes to `slices.json`, for evaluation only: no prompt or answer holds it.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from random import Random

from tqdm import tqdm

from pipeline.config import ScenesConfig, parse_args
from pipeline.errors import DataError, run_main
from pipeline.scene_art import render
from pipeline.scene_text import record
from pipeline.scene_world import plan_scene

FORMAT = 1
JPEG_QUALITY = 92


@dataclass(frozen=True, slots=True)
class _Job:
    """One image to draw."""

    root: Path
    split: str
    folder: str
    number: int
    corner: bool
    config: ScenesConfig


def write_scenes(root: Path, config: ScenesConfig) -> None:
    """Draw what is missing below `root`. A finished split with the same settings is left as it is.

    Raises:
        DataError: a split there was drawn with other settings.
    """
    plans = (
        ("Train", "train", config.train, config.corner_share),
        ("val", "val", config.val, config.corner_share),
        ("Test", "test", config.test, config.test_corner_share),
    )
    for split, folder, count, corner_share in plans:
        marker = root / f".{folder}.json"
        wanted = {"format": FORMAT, "images": count, "corner_share": corner_share} | config.model_dump(
            include={"seed", "width", "height"}
        )
        if _finished(marker, wanted):
            continue
        corner = _corner_flags(config.seed, split, count, corner_share)
        jobs = [_Job(root, split, folder, n, corner[n - 1], config) for n in range(1, count + 1)]
        _draw_all(jobs, config.workers)
        _write_json(root / f".{folder}.slices.json", {_stem(j): "corner" if j.corner else "regular" for j in jobs})
        _write_json(marker, wanted)
    slices = [json.loads((root / f".{folder}.slices.json").read_text()) for _, folder, _, _ in plans]
    _write_json(root / "slices.json", {stem: kind for part in slices for stem, kind in part.items()})


def _finished(marker: Path, wanted: dict[str, object]) -> bool:
    if not marker.is_file():
        return False
    found = json.loads(marker.read_text())
    differs = [f"{k}: on disk {found.get(k)!r}, recipe {v!r}" for k, v in wanted.items() if found.get(k) != v]
    if differs:
        raise DataError(
            f"{marker.parent}: scenes were drawn with other settings.\n  " + "\n  ".join(differs) + "\n"
            "Use another run.dir, or remove that folder. Nothing was changed."
        )
    return True


def _corner_flags(seed: int, split: str, count: int, share: float) -> list[bool]:
    """Which images are corner cases: exactly the rounded share, spread by seed."""
    flags = [n < round(share * count) for n in range(count)]
    Random(f"{seed}/{split}/corner").shuffle(flags)
    return flags


def _draw_all(jobs: Sequence[_Job], workers: int) -> None:
    for folder in (jobs[0].root / jobs[0].folder / "images", jobs[0].root / "CODA-LM" / jobs[0].split):
        folder.mkdir(parents=True, exist_ok=True)
    with get_context("spawn").Pool(min(workers, len(jobs))) as pool:
        done = pool.imap_unordered(_draw, jobs, chunksize=16)
        for _ in tqdm(done, total=len(jobs), desc=f"scenes {jobs[0].split}", mininterval=1):
            pass


def _draw(job: _Job) -> None:
    rng = Random(f"{job.config.seed}/{job.split}/{job.number}")
    scene = plan_scene(rng, corner=job.corner, held_out=job.split == "Test")
    image, boxes = render(scene, job.config.width, job.config.height)
    image.save(job.root / job.folder / "images" / f"{job.number:04d}.jpg", quality=JPEG_QUALITY)
    _write_json(job.root / "CODA-LM" / job.split / f"{_stem(job)}.json", record(scene, boxes, image.size, rng))


def _stem(job: _Job) -> str:
    return f"{job.folder}_{job.number:04d}"


def _write_json(path: Path, content: object) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1))
    os.replace(temporary, path)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of the scenes stage."""
    recipe = parse_args("scenes", argv).recipe
    write_scenes(recipe.run.dir / "data", recipe.scenes)


if __name__ == "__main__":
    run_main(main)
