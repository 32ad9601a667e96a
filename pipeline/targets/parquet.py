"""A store as Parquet, for tools that know nothing of us: one file a shard, page checksums, and SHA256SUMS.

Columns: `sample_id`; `ids`, `logprobs` (lists over answer tokens of lists over kept entries, most probable first);
`tail_logprob`, `gold_logprob`, `entropy` (lists over answer tokens); `prompt`, `answer`, `images` where the data set
is at hand. The identity is in the file's metadata under `soft_targets`.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from tqdm import tqdm

from pipeline.data.sample import Sample
from pipeline.errors import StoreError
from pipeline.files import replacing
from pipeline.targets.store import SoftTargetStore, columns_of, features

SCHEMA = pa.schema(
    [
        *features().arrow_schema,
        pa.field("prompt", pa.string()),
        pa.field("answer", pa.string()),
        pa.field("images", pa.list_(pa.string())),
    ]
)


def export_parquet(store: SoftTargetStore, out: Path, samples: Mapping[str, Sample]) -> list[Path]:
    """Write each shard as Parquet, read it back with its checksums verified, and compare.

    Args:
        samples: those of the data set that are at hand, by sample id.

    Raises:
        StoreError: damage in the store, or a file that does not read back as written.
    """
    out.mkdir(parents=True, exist_ok=True)
    schema = SCHEMA.with_metadata({"soft_targets": json.dumps(store.identity)})
    files, sums = [], []
    for shard, sample_ids in tqdm(store.shard_members, desc="export", unit="shard", disable=None):
        table = _table(store, sample_ids, samples, schema)
        path = out / f"soft-targets-{shard:05d}.parquet"
        with replacing(path) as temporary:
            pq.write_table(table, temporary, write_page_checksum=True)
            if not pq.read_table(temporary, page_checksum_verification=True).equals(table):
                raise StoreError(f"{temporary}: does not read back as it was written; the disk may be failing")
        files.append(path)
        sums.append(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n")
    (out / "SHA256SUMS").write_text("".join(sums))
    return files


def _table(
    store: SoftTargetStore, sample_ids: Sequence[str], samples: Mapping[str, Sample], schema: pa.Schema
) -> pa.Table:
    """Rows of some samples. From flat arrays: Python lists of every number would take minutes a shard."""
    columns = [columns_of(store.read(sample_id)) for sample_id in sample_ids]
    about = [samples.get(sample_id) for sample_id in sample_ids]
    data: dict[str, Any] = {
        "sample_id": list(sample_ids),
        **{name: _lists_of_lists([c[name] for c in columns]) for name in ("ids", "logprobs")},
        **{name: _lists([c[name] for c in columns]) for name in ("tail_logprob", "gold_logprob", "entropy")},
        "prompt": [s and s.prompt for s in about],
        "answer": [s and s.answer for s in about],
        "images": [s and [str(path) for path in s.images] for s in about],
    }
    return pa.table([pa.array(v, f.type) if isinstance(v, list) else v.cast(f.type)
                     for f, v in zip(schema, (data[f.name] for f in schema), strict=True)], schema=schema)  # fmt: skip


def _lists(parts: Sequence[NDArray[Any]]) -> pa.ListArray:
    values = np.concatenate(parts) if parts else np.zeros(0, np.int32)  # none: all samples of a shard were left out
    return pa.ListArray.from_arrays(_offsets(parts), pa.array(values))


def _lists_of_lists(parts: Sequence[Sequence[NDArray[Any]]]) -> pa.ListArray:
    rows = [row for part in parts for row in part]
    return pa.ListArray.from_arrays(_offsets(parts), _lists(rows))


def _offsets(parts: Sequence[Any]) -> pa.Array:
    return pa.array([0, *accumulate(map(len, parts))], pa.int32())
