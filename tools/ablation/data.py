"""Smaller training sets made of a larger one's files: hard links, so that each stands alone and costs nothing."""

import json
import os
import shutil
from pathlib import Path

from pipeline.recipe import DataConfig


def subset(root: Path, target: Path, data: DataConfig, scenes: int) -> None:
    """A CODA-LM root that holds the first `scenes` training records of `root`, their images, and nothing else of Train.

    The embedded scenes are drawn independently of their number, so the first ones are a random subset. Files are
    linked; a finished root is left as it is.
    """
    if target.is_dir():
        return
    building = target.with_name(target.name + ".building")
    shutil.rmtree(building, ignore_errors=True)
    slices = json.loads((root / "slices.json").read_text())
    kept = {}
    for split in (data.train_split, data.val_split, data.test_split):
        records = sorted((root / "CODA-LM" / split).glob("*.json"))
        for record in records[:scenes] if split == data.train_split else records:
            folder, _, number = record.stem.rpartition("_")
            for file in (record, root / folder / "images" / f"{number}.jpg"):
                link = building / file.relative_to(root)
                link.parent.mkdir(parents=True, exist_ok=True)
                os.link(file, link)
            kept[record.stem] = slices[record.stem]
    (building / "slices.json").write_text(json.dumps(kept))
    building.rename(target)
