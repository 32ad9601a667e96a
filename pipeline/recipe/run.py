"""`run`: where a run lives and what every stage shares."""

from pathlib import Path
from typing import Literal

from pipeline.recipe.base import Integer, Section


class RunConfig(Section):
    """Where the run lives and what every stage shares."""

    dir: Path
    """Folder that receives every file of the run."""
    seed: Integer = 0
    """Seed of initialisation, sampling and drawing."""
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    """torch.set_float32_matmul_precision; `medium` lets CPUs with AMX and GPUs multiply float32 in bf16. `highest`: a
    run in bf16 gains nothing by less, and one in float32 means it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the stages that run without DeepSpeed."""
