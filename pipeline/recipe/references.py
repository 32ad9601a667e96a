"""What a model reference names. The one place that takes references apart.

A reference is `models.NAME` (a key of `models` or `benchmark.models`), `jobs.NAME` (that job's final model), or else a
checkpoint folder. What it comes from, and where its folder is, says the recipe: `Recipe.model_dir`, `Recipe.lineage`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

_PACKAGED = "package:"
_CHECKPOINTS = Path(__file__).parent.parent / "benchmark/checkpoints"


def folder_of(text: str | Path) -> Path:
    """A folder as recipes write it; `package:NAME` is a checkpoint that comes with the package."""
    name = str(text)
    return _CHECKPOINTS / name.removeprefix(_PACKAGED) if name.startswith(_PACKAGED) else Path(name)


@dataclass(frozen=True, slots=True)
class Reference:
    """A model reference, taken apart."""

    kind: Literal["models", "jobs", "folder"]
    name: str
    """Key of `models` or `jobs`, or the folder as it was written."""

    @classmethod
    def parse(cls, text: str) -> "Reference":
        """Take `models.NAME`, `jobs.NAME` or a folder apart; whether it is there is not looked at."""
        kind, dot, name = text.partition(".")
        if dot and kind == "models":
            return cls("models", name)
        if dot and kind == "jobs":
            return cls("jobs", name)
        return cls("folder", text)

    @property
    def model(self) -> str | None:
        """Key of `models`, if it is one."""
        return self.name if self.kind == "models" else None

    @property
    def job(self) -> str | None:
        """Key of `jobs`, if it is one."""
        return self.name if self.kind == "jobs" else None
