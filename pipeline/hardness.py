"""H2G: hardness of samples, kept fresh from the losses of every visit.

    python -m pipeline.hardness --config RECIPE.yaml

writes the table's prior from the teacher's own entropy and cross-entropy (no student needed) and shows what it ranks.
Shapes: N answer tokens of a micro-batch, B its samples, M samples of the data set.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from pipeline.command_line import parse_args
from pipeline.config import HardnessConfig, Recipe
from pipeline.data import Sample, read_samples
from pipeline.errors import CheckpointError, UserError, run_main
from pipeline.processor import Processor
from pipeline.records import identity_digest
from pipeline.target_store import SoftTargetStore
from pipeline.targets import SoftTargets
from pipeline.teacher import dataset_fingerprint, expected_identity

Floats = NDArray[np.float32]
ORIGIN = b"soft_targets"
"""Key of the Parquet file's metadata that says which store the priors came from."""


def instance_scores(
    hardness_N: Tensor, sample_N: Tensor, num_samples: int, *, tail_weight: float, tail_share: float
) -> Tensor:
    """s_i = (1 - k) mean_t h_it + k mean(hardest ceil(tail_share * tokens) of h_it), float32 [B] on the CPU.

    0 for a sample without tokens. Pooling the tail keeps one rare token from being averaged away. [ours]
    A sample's score depends on its own tokens only, to the last bit: not on the batch it came in.
    """
    # On the CPU: GPU scatter-adds sum in any order, and resuming must be bit-exact.
    h_N, owner_N = hardness_N.detach().double().cpu().numpy(), sample_N.cpu().numpy()
    order = np.lexsort((-h_N, owner_N))
    h_N, owner_N = h_N[order], owner_N[order]
    count_B = np.bincount(owner_N, minlength=num_samples)
    place_N = np.arange(len(h_N)) - (np.cumsum(count_B) - count_B)[owner_N]
    # The small term keeps 0.2 * 15 from rounding up to 4.
    tail_B = np.ceil(tail_share * count_B - 1e-9)
    in_tail_N = place_N < tail_B[owner_N]
    mean_B = np.bincount(owner_N, h_N, num_samples) / np.maximum(count_B, 1)
    hardest_B = np.bincount(owner_N, h_N * in_tail_N, num_samples) / np.maximum(tail_B, 1)
    return torch.from_numpy((1 - tail_weight) * mean_B + tail_weight * hardest_B).float()


def teacher_prior(targets: SoftTargets, settings: HardnessConfig) -> float:
    """Hardness before any visit: the teacher's entropy and cross-entropy, each as sqrt(1 - exp(-x)), averaged, pooled.

    The same scale and pooling as a visit's score, so that visited and unvisited samples can be ranked together. [ours]
    """
    as_hardness = [torch.sqrt(-torch.expm1(-x.clamp(min=0))) for x in (targets.entropy, -targets.gold_logprob)]
    h_N = (as_hardness[0] + as_hardness[1]) / 2
    one = torch.zeros(len(h_N), dtype=torch.int64)
    return float(instance_scores(h_N, one, 1, tail_weight=settings.tail_weight, tail_share=settings.tail_share)[0])


class HardnessTable:
    """D_i of every sample, in the order of `sample_ids` (ascending)."""

    def __init__(self, sample_ids: Sequence[str], strata: Sequence[str], prior: Floats) -> None:
        if list(sample_ids) != sorted(set(sample_ids)):
            raise ValueError("sample_ids must be ascending and distinct")
        self.sample_ids = list(sample_ids)
        self.strata = sorted(set(strata))
        codes = {name: code for code, name in enumerate(self.strata)}
        self.stratum = np.array([codes[s] for s in strata], np.int32)
        self.prior = prior.astype(np.float32)
        self.difficulty = self.prior.copy()
        self.visits = np.zeros(len(self.sample_ids), np.int32)
        self.last_step = np.full(len(self.sample_ids), -1, np.int32)

    def __len__(self) -> int:
        return len(self.sample_ids)

    def update(self, index: NDArray[np.int64], scores: Floats, step: int, ema: float) -> None:
        """D_i <- mu D_i + (1 - mu) s_i for the visited; a sample met twice in a step is updated once, by its mean.

        The first score replaces the prior, which was the teacher's view and not the student's. A score of NaN counts
        the visit and leaves D_i and `last_step` alone: the sample was trained on without its KL.
        """
        self.visits[np.unique(index)] += 1
        scored = np.isfinite(scores)
        seen, inverse = np.unique(index[scored], return_inverse=True)
        # bincount sums float32 scores in float64, so the order that ranks deliver them in leaves no trace.
        mean = (np.bincount(inverse, scores[scored]) / np.bincount(inverse)).astype(np.float32)
        blended = np.float32(ema) * self.difficulty[seen] + np.float32(1 - ema) * mean
        self.difficulty[seen] = np.where(self.last_step[seen] < 0, mean, blended)
        self.last_step[seen] = step

    def percentile(self, *, step: int, half_life_steps: float) -> Floats:
        """u_i in (0, 1): rank of D_i within its stratum; ties by sample_id.

        A scored entry relaxes toward its stratum's mean with the given half-life since its last score. An entry never
        scored is ranked by its prior, moved by how far scores lie from priors on average in its stratum: while the
        student is weak every visit scores high, and seen easy samples would otherwise outrank unseen hard ones. [ours]
        """
        relaxed = self._relaxed(step, half_life_steps)
        u = np.empty(len(self), np.float32)
        for code in range(len(self.strata)):
            members = np.flatnonzero(self.stratum == code)
            order = np.argsort(relaxed[members], kind="stable")
            u[members[order]] = (np.arange(len(members)) + 0.5) / len(members)
        return u

    def _relaxed(self, step: int, half_life_steps: float) -> NDArray[np.float64]:
        scored = self.last_step >= 0
        shift = self._stratum_mean(np.where(scored, self.difficulty - self.prior, 0), scored)
        comparable: NDArray[np.float64] = np.where(scored, self.difficulty, self.prior + shift[self.stratum])
        means = self._stratum_mean(comparable, np.ones(len(self), bool))
        keep: NDArray[np.float64] = 0.5 ** (np.where(scored, step - self.last_step, 0) / half_life_steps)
        relaxed: NDArray[np.float64] = keep * comparable + (1 - keep) * means[self.stratum]
        return relaxed

    def _stratum_mean(self, values_M: NDArray[Any], counted_M: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Mean over the counted entries of each stratum; 0 for a stratum without any. Values elsewhere must be 0."""
        counts = np.bincount(self.stratum, counted_M, minlength=len(self.strata))
        sums = np.bincount(self.stratum, values_M.astype(np.float64), minlength=len(self.strata))
        means: NDArray[np.float64] = sums / np.maximum(counts, 1)
        return means

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What changes during training, for the checkpoint."""
        return {f"hardness/{k}": getattr(self, k) for k in ("difficulty", "visits", "last_step")}

    def load_arrays(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Restore what `arrays` gave. CheckpointError if that was a table of another length."""
        for key in ("difficulty", "visits", "last_step"):
            saved = arrays[f"hardness/{key}"]
            if saved.shape != (len(self),):
                raise CheckpointError(
                    f"the checkpoint's hardness table has {len(saved)} samples, this run's has {len(self)}. Resume "
                    "with the data set the job was started with. Nothing was changed."
                )
        for key in ("difficulty", "visits", "last_step"):
            setattr(self, key, arrays[f"hardness/{key}"].copy())

    def save(self, path: Path, origin: str = "") -> None:
        """Write a Parquet file that people can open, atomically. `origin`: digest of the store behind the priors."""
        rank = self.percentile(step=int(self.last_step.max(initial=0)), half_life_steps=float("inf"))
        table = pa.table(
            {
                "sample_id": self.sample_ids,
                "stratum": [self.strata[c] for c in self.stratum],
                "hardness": self.difficulty,
                "rank": rank,
                "visits": self.visits,
                "last_step": self.last_step,
                "prior": self.prior,
            }
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        pq.write_table(table.replace_schema_metadata({ORIGIN: origin}), temporary)
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: Path) -> "HardnessTable":
        """Read what `save` wrote. UserError if it is missing or not such a table."""
        if not path.is_file():
            raise UserError(f"{path}: no hardness table. Make it with `python -m pipeline.hardness`.")
        try:
            columns = pq.read_table(path).to_pydict()
            table = cls(columns["sample_id"], columns["stratum"], np.array(columns["prior"], np.float32))
            table.difficulty = np.array(columns["hardness"], np.float32)
            table.visits = np.array(columns["visits"], np.int32)
            table.last_step = np.array(columns["last_step"], np.int32)
        except (pa.ArrowException, KeyError, ValueError) as error:
            raise UserError(
                f"{path}: not a hardness table: {error}. Make it again with `python -m pipeline.hardness`."
            ) from None
        return table


def prior_table(samples: Sequence[Sample], store: SoftTargetStore, settings: HardnessConfig) -> HardnessTable:
    """The table before training: every sample at its teacher-only prior; strata are the tasks."""
    prior = [teacher_prior(store.read(s.sample_id), settings) for s in tqdm(samples, desc="hardness", mininterval=1)]
    return HardnessTable([s.sample_id for s in samples], [s.task for s in samples], np.array(prior, np.float32))


def describe(table: HardnessTable, samples: Sequence[Sample]) -> str:
    """Strata, the hardest and easiest samples, and (metadata only) how corner cases are spread."""
    rank = table.percentile(step=0, half_life_steps=float("inf"))
    lines = [
        f"{len(table)} samples; "
        + ", ".join(f"{s}: {int((table.stratum == i).sum())}" for i, s in enumerate(table.strata))
    ]
    order = np.argsort(table.difficulty, kind="stable")
    for title, picked in (("hardest", order[::-1][:3]), ("easiest", order[:3])):
        for i in picked:
            sample = samples[i]
            about = f"{sample.task} {sample.slice}: {sample.prompt[:60]} -> {sample.answer[:80]}"
            lines.append(f"{title} {table.difficulty[i]:.3f} {about}")
    corner = np.array([s.slice == "corner" for s in samples])
    if corner.any():
        lines.append(
            f"corner cases: {corner.mean():.1%} of all, {corner[rank >= 0.9].mean():.1%} of the hardest decile"
        )
    return "\n".join(lines)


def _store(recipe: Recipe, samples: Sequence[Sample]) -> SoftTargetStore:
    processor = Processor.load(recipe.processor_dir, recipe.data)
    store = SoftTargetStore.open(recipe.store_url, expected_identity(recipe, processor))
    store.require([sample.sample_id for sample in samples], dataset_fingerprint(samples))
    return store


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of the hardness stage."""
    recipe = parse_args("hardness", argv).recipe
    samples = read_samples(recipe.data.format, recipe.data_root, recipe.data.train_split)
    path = recipe.run.dir / "hardness.parquet"
    store = _store(recipe, samples)
    origin = identity_digest({**store.identity, "dataset": dataset_fingerprint(samples)})
    if not _is_from(path, origin):
        prior_table(samples, store, HardnessConfig()).save(path, origin)
    print(describe(HardnessTable.load(path), samples))


def _is_from(path: Path, origin: str) -> bool:
    """Whether a table is there whose priors came from this store: same teacher, processor and samples."""
    try:
        return (pq.read_schema(path).metadata or {}).get(ORIGIN) == origin.encode()
    except (OSError, pa.ArrowException):
        return False


if __name__ == "__main__":
    run_main(main)
