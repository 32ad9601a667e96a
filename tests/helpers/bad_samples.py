"""A training with one sample whose image is not a number: what broken files and overflows end in."""

from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pyarrow.parquet as pq
import torch

from pipeline import cli
from pipeline.errors import run_main
from pipeline.training.batches import MicroBatch, MicroBatches


def easiest(run: Path) -> str:
    """sample_id that a curriculum draws first and often: the one of the least hardness."""
    table = pq.read_table(run / "hardness.parquet").sort_by("hardness")
    return str(table["sample_id"][0].as_py())


def clkd(bad: str, *words: str) -> NoReturn:
    """`clkd WORDS`, in a process of its own."""
    theirs = MicroBatches.__getitem__

    def get(self: MicroBatches, position: int) -> MicroBatch:
        micro = theirs(self, position)
        if bad not in micro.sample_ids:
            return micro
        return replace(micro, inputs=micro.inputs | {"pixel_values": micro.inputs["pixel_values"] * torch.nan})

    MicroBatches.__getitem__ = get  # type: ignore[method-assign]
    run_main(lambda: cli.main(words))
