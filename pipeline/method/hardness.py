"""The hardness of every sample of a data set, brought up to date by the scores of its visits.

Shapes: M samples of the data set, S strata, Q codes of quantised hardness.

Only numbers are held in memory, 19 bytes a sample (20 with more than 256 strata), and 2 more while ranks are in use.
Sample ids stay in the Parquet file that a table was read from, and are read a block at a time.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.errors import CheckpointError, UserError
from pipeline.files import replacing
from pipeline.method import table_loops
from pipeline.method.table_loops import CODES

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Indices = NDArray[np.int64]
ORIGIN = b"soft_targets"
"""Key of the Parquet file's metadata that says which store the priors came from."""
ROWS = 1 << 18
"""Rows of a row group, which are also read at a time."""
CHANGING = ("difficulty", "visits", "last_step", "last_window")
"""What training changes: the columns of a checkpoint."""
NEVER = -1
"""`last_step` of a sample never scored, `last_window` of one never drawn."""
FINEST = 1e-5
"""Nats between two codes at the least: what is closer is rounding, which depends on how many ranks there are. [ours]"""
_POOL = "pool, "
_SCHEMA = pa.schema(
    {
        "sample_id": pa.string(),
        "stratum": pa.dictionary(pa.int32(), pa.string()),
        "hardness": pa.float32(),
        "rank": pa.float32(),
        "visits": pa.int32(),
        "last_step": pa.int32(),
        "prior": pa.float32(),
    }
)


@dataclass(frozen=True, slots=True)
class Ranks:
    """Percentiles of all samples at one moment: u_i = percentile_SQ[stratum_i, code_i]."""

    code_M: NDArray[np.uint16]
    count_SQ: NDArray[np.int64]
    """Samples of each stratum with each code."""
    percentile_SQ: Floats
    """(samples below + half of those with the code) / samples of the stratum; ascending."""
    low_S: Doubles
    """Hardness of a stratum's code 0."""
    step_S: Doubles
    """Hardness from one code to the next."""

    @classmethod
    def from_codes(
        cls, code_M: NDArray[np.uint16], count_SQ: NDArray[np.int64], low_S: Doubles, step_S: Doubles
    ) -> "Ranks":
        """Ranks of codes and their counts."""
        below_SQ = np.cumsum(count_SQ, axis=1) - count_SQ
        size_S1 = np.maximum(count_SQ.sum(axis=1, keepdims=True), 1)
        percentile_SQ = ((below_SQ + count_SQ / 2) / size_S1).astype(np.float32)
        return cls(code_M, count_SQ, percentile_SQ, low_S, step_S)

    def relative_sizes(self) -> Doubles:
        """f64[S, Q]: the hardness of each code as a multiple of its stratum's mean; 1 where all are 0."""
        number_S = np.maximum(self.count_SQ.sum(axis=1), 1)
        sum_S = (self.count_SQ * np.arange(CODES)).sum(axis=1)  # of integers: the same in any order
        mean_S1 = (self.low_S + self.step_S * (sum_S / number_S))[:, None]
        hardness_SQ = self.low_S[:, None] + self.step_S[:, None] * np.arange(CODES)
        return np.where(mean_S1 > 0, hardness_SQ / np.where(mean_S1 > 0, mean_S1, 1), 1.0)

    def of(self, stratum: NDArray[np.integer], index: Indices | slice) -> Floats:
        """u of some samples; `stratum` of all."""
        percentile: Floats = self.percentile_SQ[stratum[index], self.code_M[index]]
        return percentile


class HardnessTable:
    """D_i of every sample, in the order of the sample ids (ascending).

    Everywhere else a sample is an index into this table: plans, requests and scores say a number, not an id.
    """

    def __init__(self, sample_ids: Sequence[str], strata: Sequence[str], prior: Floats) -> None:
        ids = pa.array(sample_ids, pa.string())
        if not _ascending(ids):
            raise ValueError("sample_ids must be ascending and distinct")
        names = sorted(set(strata))
        codes = {name: code for code, name in enumerate(names)}
        stratum: NDArray[np.integer] = np.array([codes[s] for s in strata], _code_type(len(names)))
        self._start(ids, names, stratum, prior.astype(np.float32))

    def _start(
        self, ids: pa.Array | pq.ParquetFile, strata: list[str], stratum: NDArray[np.integer], prior: Floats
    ) -> None:
        # Ids are an array, or the open file that they are in; of a subset, `_kept` says which of them it has.
        self._ids = ids
        self._kept: NDArray[np.bool_] | None = None
        self.strata, self.stratum, self.prior = strata, stratum, prior
        self.difficulty = prior.copy()
        self.visits = np.zeros(len(prior), np.uint16)
        self.last_step = np.full(len(prior), NEVER, np.int32)
        self.last_window = np.full(len(prior), NEVER, np.int32)
        self._waiting: list[tuple[Indices, Floats, int, float]] | None = None

    def __len__(self) -> int:
        return len(self.prior)

    @property
    def pool_S(self) -> NDArray[np.bool_]:
        """Which strata are of samples that the teacher answered."""
        return np.array([name.startswith(_POOL) for name in self.strata], bool)

    def ids(self) -> Iterator[pa.Array]:
        """The sample ids in order, in blocks of at most ROWS."""
        start = 0
        for block in self._all_ids():
            yield block if self._kept is None else block.filter(pa.array(self._kept[start : start + len(block)]))
            start += len(block)

    def _all_ids(self) -> Iterator[pa.Array]:
        if isinstance(self._ids, pq.ParquetFile):
            for batch in self._ids.iter_batches(ROWS, columns=["sample_id"], use_threads=False):
                yield batch.column(0)
        else:
            yield from (self._ids[start : start + ROWS] for start in range(0, len(self._ids), ROWS))

    def subset(self, sample_ids: Sequence[str]) -> "HardnessTable":
        """The table of some of its samples, in the same order."""
        wanted = pa.array(sample_ids, pa.string())
        kept = np.concatenate(
            [pc.is_in(block, value_set=wanted).to_numpy(zero_copy_only=False) for block in self.ids()]
        )
        part = HardnessTable.__new__(HardnessTable)
        part._start(self._ids, self.strata, self.stratum[kept], self.prior[kept])
        part._kept = np.ones(len(kept), bool) if self._kept is None else self._kept.copy()
        part._kept[part._kept] = kept
        part.load_arrays({name: values[kept] for name, values in self.arrays().items()})
        return part

    def is_of(self, sample_ids: Sequence[str]) -> bool:
        """Whether the table is of exactly these samples, in this order."""
        rest = iter(sample_ids)
        return len(sample_ids) == len(self) and all(
            block.to_pylist() == list(islice(rest, len(block))) for block in self.ids()
        )

    # -- what training changes -----------------------------------------------------------------------------------------
    # A planned window is drawn at once, before it is trained; scores come back step by step, to the samples that the
    # teacher still teaches. While a thread plans the next window from the table, scores wait.

    def draw(self, index: Indices, window: int) -> None:
        """Count the visits of a window's samples. Called when it is planned: all are trained on, scored or not."""
        drawn, times = np.unique(index, return_counts=True)
        room = np.iinfo(np.uint16).max - self.visits[drawn].astype(np.int64)
        self.visits[drawn] += np.minimum(times, room).astype(np.uint16)
        self.last_window[drawn] = window

    def update(self, index: Indices, scores: Floats, step: int, ema: float) -> None:
        """D_i <- mu D_i + (1 - mu) s_i for the scored; a sample met twice in a step is updated once, by its mean.

        The first score replaces the prior, which was the teacher's view and not the student's. NaN is no score.
        Between `freeze` and `thaw` the scores are set aside; `thaw` takes them in.
        """
        if self._waiting is not None:
            self._waiting.append((index, scores, step, ema))
            return
        scored = np.isfinite(scores)
        seen, inverse = np.unique(index[scored], return_inverse=True)
        # bincount sums float32 scores in float64: exact, so it does not matter in which order the ranks sent them.
        mean = (np.bincount(inverse, scores[scored]) / np.bincount(inverse)).astype(np.float32)
        blended = np.float32(ema) * self.difficulty[seen] + np.float32(1 - ema) * mean
        self.difficulty[seen] = np.where(self.last_step[seen] < 0, mean, blended)
        self.last_step[seen] = step

    def freeze(self) -> None:
        """Keep the table as it is while another thread reads it; nothing is copied."""
        self._waiting = []

    def thaw(self) -> None:
        """Do the updates that came since `freeze`, in their order."""
        waiting, self._waiting = self._waiting or [], None
        for arguments in waiting:
            self.update(*arguments)

    # -- percentiles ---------------------------------------------------------------------------------------------------
    # A hardness means something only among samples of one stratum (a task), so ranks are within strata. Three passes
    # over the table: sums of each stratum, the range of what is ranked, and its codes; nothing is sorted.

    def ranks(self, *, step: int, half_life_steps: float) -> Ranks:
        """u_i in (0, 1): rank of D_i within its stratum. D_i is rounded to 65,536 steps of the stratum's range, of
        FINEST at the least; samples with the same step share a rank.

        A scored entry relaxes toward its stratum's mean with the given half-life since its last score. An entry never
        scored is taken at its prior times the ratio of scores to priors in its stratum: the student learns from what it
        sees about what it does not see, and a prior of the teacher's is on another scale. [ours]
        """
        # First pass: how far scores lie from priors, and the mean that scored entries relax to.
        columns = self.difficulty, self.prior, self.last_step, self.stratum
        sums_S5 = np.zeros((len(self.strata), 5))
        table_loops.stratum_sums(*columns, sums_S5)
        scored_S, old_S, difficulty_S, unscored_S, prior_S = sums_S5.T
        ratio_S = np.where(old_S > 0, difficulty_S / np.where(old_S > 0, old_S, 1), 1)
        mean_S = (difficulty_S + prior_S * ratio_S) / np.maximum(scored_S + unscored_S, 1)
        # Second pass: the range, after relaxing. The decay of every possible age is looked up, not computed a sample.
        oldest = max(step - int(self.last_step.min(where=self.last_step >= 0, initial=step)), 0)
        relaxing = *columns, step, decay(oldest, half_life_steps), mean_S, ratio_S
        low_S, high_S = np.full(len(self.strata), np.inf), np.full(len(self.strata), -np.inf)
        table_loops.relaxed_range(*relaxing, low_S, high_S)
        # Third pass: codes and their counts, from which percentiles follow by cumulative sums.
        width_S = np.maximum(high_S - low_S, (CODES - 1) * FINEST)
        code_M, count_SQ = np.empty(len(self), np.uint16), np.zeros((len(self.strata), CODES), np.int64)
        table_loops.quantise(*relaxing, low_S, (CODES - 1) / width_S, code_M, count_SQ)
        return Ranks.from_codes(code_M, count_SQ, low_S, width_S / (CODES - 1))

    def percentile(self, *, step: int, half_life_steps: float) -> Floats:
        """u_i of all samples, see `ranks`."""
        return self.ranks(step=step, half_life_steps=half_life_steps).of(self.stratum, slice(None))

    # -- checkpoints and files -----------------------------------------------------------------------------------------
    # A checkpoint has what training changes, as arrays; the Parquet file has all of it, for the next stage and for
    # people. Files are read and written a row group at a time: a table of any size needs little more than its numbers.

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What changes during training, for the checkpoint. Not between `freeze` and `thaw`."""
        assert self._waiting is None
        return {f"hardness/{k}": getattr(self, k) for k in CHANGING}

    def load_arrays(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Restore what `arrays` gave. CheckpointError if that was a table of another length or of an older version."""
        for saved in _columns(arrays).values():
            if saved.shape != (len(self),):
                raise CheckpointError(
                    f"the checkpoint's hardness table has {len(saved)} samples, this run's has {len(self)}. Resume "
                    "with the data set the job was started with. Nothing was changed."
                )
        for key in CHANGING:
            getattr(self, key)[:] = arrays[f"hardness/{key}"]

    def carry(self, arrays: Mapping[str, NDArray[Any]], place: Indices, untrained: Indices) -> None:
        """Take over what `arrays` of a table of other samples says of those that are in both; the others stay as new.

        Args:
            place: where each of this table's samples is in the other one; -1: it is not there.
            untrained: places in the other one that were drawn and will not be trained on after all; one may come
                several times. These draws do not count; a sample's last window is then not known any more, which lets
                the sweep take it the earlier.

        Raises:
            CheckpointError: an older version wrote the arrays.
        """
        saved = _columns(arrays)
        drawn, times = np.unique(untrained, return_counts=True)
        visits = saved["visits"] = saved["visits"].copy()
        visits[drawn] -= np.minimum(times, visits[drawn]).astype(visits.dtype)
        last_window = saved["last_window"] = saved["last_window"].copy()
        last_window[drawn] = NEVER
        for start in range(0, len(self), ROWS):
            block = place[start : start + ROWS]
            known = block >= 0
            for key, column in saved.items():
                getattr(self, key)[start : start + ROWS][known] = column[block[known]]

    def save(self, path: Path, origin: str = "") -> None:
        """Write a Parquet file that people can open, atomically. `origin`: digest of the store behind the priors.

        `rank` is the percentile without relaxation; `visits` counts the whole current window. Row group by row group.
        """
        assert self._waiting is None
        ranks = self.ranks(step=int(self.last_step.max(initial=0)), half_life_steps=float("inf"))
        names, start = pa.array(self.strata, pa.string()), 0
        schema = _SCHEMA.with_metadata({ORIGIN: origin})
        with replacing(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
            for block in self.ids():
                rows = slice(start, start + len(block))
                columns = (
                    block,
                    pa.DictionaryArray.from_arrays(self.stratum[rows].astype(np.int32), names),
                    self.difficulty[rows],
                    ranks.of(self.stratum, rows),
                    self.visits[rows].astype(np.int32),
                    self.last_step[rows],
                    self.prior[rows],
                )
                writer.write_batch(pa.record_batch(list(columns), schema=writer.schema))
                start = rows.stop

    @classmethod
    def load(cls, path: Path, command: str = "clkd hardness RECIPE.yaml") -> "HardnessTable":
        """Read what `save` wrote. UserError if it is missing or not such a table; `command` makes it."""
        if not path.is_file():
            raise UserError(f"{path}: no hardness table. Make it with `{command}`.")
        try:
            return cls._read(pq.ParquetFile(path, pre_buffer=False))  # buffers would stay in memory
        except (pa.ArrowException, KeyError, ValueError) as error:
            raise UserError(f"{path}: not a hardness table: {error}. Make it again with `{command}`.") from None

    @classmethod
    def _read(cls, file: pq.ParquetFile) -> "HardnessTable":
        """The file stays open: it may be replaced meanwhile, and its ids are read again when the table is saved."""
        rows = file.metadata.num_rows
        # Strata are numbered as they are met, and renumbered by name at the end, as in a table that was made here.
        table, codes, last = cls.__new__(cls), dict[str, int](), ""
        table._start(file, [], np.zeros(rows, np.uint16), np.zeros(rows, np.float32))
        start, wanted = 0, ["sample_id", "stratum", "hardness", "visits", "last_step", "prior"]
        for batch in file.iter_batches(ROWS, columns=wanted, use_threads=False):
            part = slice(start, start + len(batch))
            ids = batch["sample_id"].cast(pa.string())
            if not (last < ids[0].as_py() and _ascending(ids)):
                raise ValueError(f"rows {part.start} to {part.stop}: sample_id is not ascending and distinct")
            stratum = batch["stratum"].cast(pa.string()).dictionary_encode()
            known = np.array([codes.setdefault(s, len(codes)) for s in stratum.dictionary.to_pylist()], np.uint16)
            table.stratum[part] = known[stratum.indices.to_numpy()]
            table.difficulty[part], table.prior[part] = batch["hardness"].to_numpy(), batch["prior"].to_numpy()
            table.visits[part] = np.clip(batch["visits"].to_numpy(), 0, np.iinfo(np.uint16).max)
            table.last_step[part] = batch["last_step"].to_numpy()
            start, last = part.stop, ids[-1].as_py()
        table.strata = sorted(codes)
        by_name = np.array([table.strata.index(s) for s in codes], _code_type(len(codes)))
        table.stratum = by_name[table.stratum] if codes else table.stratum.astype(np.uint8)
        return table


def strata_of(tasks: Iterable[str], from_pool_M: NDArray[np.bool_]) -> list[str]:
    """The stratum of every sample: its task, and whether the teacher answered it."""
    return [_POOL + task if pooled else task for task, pooled in zip(tasks, from_pool_M.tolist(), strict=True)]


def decay(oldest: int, half_life: float) -> NDArray[np.float64]:
    """2^(-age / half_life) of the ages 0 to `oldest`, f64: products of one root, the same on every machine."""
    root = float(Decimal(2) ** (-1 / Decimal(half_life))) if half_life < float("inf") else 1.0
    return np.cumprod(np.concatenate([[1.0], np.full(oldest, root)]))


def _columns(arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """What a checkpoint has of a table, by column."""
    for key in CHANGING:
        if f"hardness/{key}" not in arrays:
            raise CheckpointError(
                f"the checkpoint has no hardness/{key}: an older version wrote it. Train under another job name. "
                "Nothing was changed."
            )
    return {key: arrays[f"hardness/{key}"] for key in CHANGING}


def table_origin(path: Path) -> str | None:
    """Which store a saved table's priors came from: the `origin` it was saved with; None if there is no such table."""
    try:
        found = (pq.read_schema(path).metadata or {}).get(ORIGIN)
    except (OSError, pa.ArrowException):
        return None
    return None if found is None else found.decode()


def _ascending(ids: pa.Array) -> bool:
    return len(ids) < 2 or bool(pc.all(pc.less(ids[:-1], ids[1:])).as_py())


def _code_type(strata: int) -> type[np.uint8] | type[np.uint16]:
    if strata > 1 << 16:
        raise ValueError(f"{strata} strata; at most 65,536 can be told apart")
    return np.uint8 if strata <= 1 << 8 else np.uint16
