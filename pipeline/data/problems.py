"""What is wrong in the records of a data set: collected, so that all of it is said at once."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from pipeline.errors import DataError
from pipeline.files import listed, replacing

SHOWN = 20
"""Problems that a message lists; a file lists all."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Why one record, or a part of it, makes no sample."""

    record: str
    """Its file, and the line where a file holds several."""
    field: str
    """The part of the record; empty: all of it."""
    problem: str
    """What is wrong, with the value that was found."""


class Problems:
    """The problems of one data set, in the order they were found."""

    def __init__(self) -> None:
        self.found: list[Problem] = []

    def __len__(self) -> int:
        return len(self.found)

    def at(self, record: str | Path, field: str = "") -> "_At":
        """A context: a DataError in it is kept as a problem of this part of a record, and what follows it goes on."""
        return _At(self, record, field)

    @property
    def records(self) -> int:
        """How many records have a problem."""
        return len({problem.record for problem in self.found})

    def error(self, where: str, file: Path | None = None) -> DataError:
        """The refusal that names them.

        Args:
            where: the data set and split.
            file: lists all of them, see `write_problems`.
        """
        more = [f"and {len(self) - SHOWN} more"] if len(self) > SHOWN else []
        rest = f" {file} lists them all." if file is not None else ""
        return DataError(
            f"{where}: {len(self)} problem(s) in {self.records} record(s):"
            f"{listed([*(problem.problem for problem in self.found[:SHOWN]), *more])}\n"
            f"Mend these records, or leave them out with data.bad_samples=skip.{rest} Nothing was started."
        )


class _At:
    """Written out: `contextlib` takes three times as long, and each sample passes several of these."""

    __slots__ = ("_field", "_problems", "_record")

    def __init__(self, problems: Problems, record: str | Path, field: str) -> None:
        self._problems, self._record, self._field = problems, record, field

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if isinstance(error, DataError):
            self._problems.found.append(Problem(str(self._record), self._field, str(error)))
            return True
        return False


LEFT_OUT = "left_out.jsonl"
"""In a run's or a job's folder: samples that a stage could not encode, with `data.bad_samples: skip`."""


def append_left_out(path: Path, problems: Mapping[str, str], about: Mapping[str, object]) -> None:
    """A JSON line for each sample: `sample_id`, `problem`, and what `about` adds. Workers may share a file."""
    if problems:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({**about, "sample_id": i, "problem": problem}) + "\n" for i, problem in problems.items()]
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(lines))


def write_problems(path: Path, problems: Sequence[Problem]) -> None:
    """A JSON line for each problem: `record`, `field`, `problem`."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for problem in problems:
            file.write(json.dumps(asdict(problem)) + "\n")
