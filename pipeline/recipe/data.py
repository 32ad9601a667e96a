"""`data`: the data set, and how its samples become model inputs."""

from pathlib import Path
from typing import Literal, Self

from pydantic import model_validator

from pipeline.recipe.base import Count, Positive, Section


class DataConfig(Section):
    """The data set that is read, and how its samples become model inputs."""

    format: Literal["coda_lm", "chat"] = "coda_lm"
    """Layout on disk: CODA-LM's published folders, or conversations in `<split>.jsonl`, `.json` or `.parquet`."""
    root: Path | None = None
    """Data root; images outside it are refused, links inside it are followed. Required, unless `benchmark` draws its
    scenes into `<run.dir>/data`."""
    image_roots: tuple[Path, ...] = ()
    """Other folders that records may name images in, as in `../nuscenes/samples/...`."""
    bad_samples: Literal["refuse", "skip"] = "refuse"
    """Broken records, and samples that cannot become model inputs (a torn image, an answer too long): name them and
    end, or leave them out, counted and listed: `<index>/<split>/problems.jsonl` while reading, then `left_out.jsonl` of
    the run or of the job."""
    index: Path | None = None
    """Folder of the index, a folder a split; runs on the same data may share it. None: `<run.dir>/index`."""
    train_split: str = "Train"
    """Split for training and soft targets; CODA-LM's name for it."""
    pool_split: str | None = None
    """Another split for training, whose records have no answers: the teacher gives them. Read with `targets.answers`
    alone; questions without an answer in `train_split` are answered as well."""
    val_split: str = "val"
    """Split for choosing settings."""
    test_split: str = "Test"
    """Split for the final table; touched by `evaluate` only."""
    processor: Path | None = None
    """Folder of tokenizer, chat template and image processor, or `package:NAME` as in `models.NAME.path`. None: that of
    the checkpoint which the teacher, or else the first job, comes from; with models in `benchmark.models`, the one that
    `clkd tokenizer` trains."""
    min_pixels: Positive = 65_536
    """Smallest image area the vision tower sees; Qwen3-VL's own bound: 64 image tokens."""
    max_pixels: Positive = 1_048_576
    """Largest image area the vision tower sees; larger images are scaled down. 1,024 image tokens of Qwen3-VL: enough
    for small objects of a 1600 x 900 camera, a sixteenth of Qwen3-VL's own bound."""
    box_width: Positive = 2
    """Line of the red rectangle around a record's region, in pixels of the image as it is on disk; CODA-LM's."""
    max_length: Positive = 4096
    """Longest sequence in tokens, image tokens included; as in Qwen's own fine-tuning script. It has room for three
    images of `max_pixels` and their text."""
    learn: Literal["all", "last"] = "all"
    """Learn from every answer of a conversation, or from the last one alone. Part of a store's identity."""
    long_answers: Literal["refuse", "cut"] = "refuse"
    """Name a longer sample and end, or cut its last answer; the teacher pass counts the tokens cut."""
    workers: Count = 4
    """DataLoader workers per rank, as in LLaMA-Factory's and ms-swift's examples; 0 reads in the rank itself."""

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> Self:
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels {self.min_pixels} is above max_pixels {self.max_pixels}")
        return self
