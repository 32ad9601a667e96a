"""Training metrics: one JSON line per logged step, mirrored to TensorBoard. Rank 0 only."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pipeline.files import write_text


class MetricsLogger:
    """Appends to `metrics.jsonl` and `tensorboard/`; on resume, lines after the resumed step are dropped."""

    def __init__(self, job_dir: Path, *, resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and readers of metrics do not need it

        self.path = job_dir / "metrics.jsonl"
        job_dir.mkdir(parents=True, exist_ok=True)
        drop_after(self.path, resume_step)
        self._file = self.path.open("a", buffering=1)
        self._board = SummaryWriter(str(job_dir / "tensorboard"), purge_step=resume_step + 1)  # type: ignore[no-untyped-call]

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Write one step. Nested lists (expert load) go to JSON only, as scalars per layer to TensorBoard."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        for key, value in values.items():
            for name, number in _scalars(key, value):
                self._board.add_scalar(name, number, step)  # type: ignore[no-untyped-call]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._file.close()
        self._board.close()  # type: ignore[no-untyped-call]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete lines of a metrics file; a last line torn by a kill is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def drop_after(path: Path, step: int) -> None:
    """Take the lines of later steps out of a file that has a line a step."""
    kept = [row for row in read_metrics(path) if row["step"] <= step]
    if path.exists():
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))


def _scalars(key: str, value: Any) -> list[tuple[str, float]]:
    if isinstance(value, list):
        return [pair for i, item in enumerate(value) for pair in _scalars(f"{key}/{i}", item)]
    return [(key, float(value))] if isinstance(value, int | float) else []
