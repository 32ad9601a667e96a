"""Soft targets by sample_id: reading and writing a store's records of the kind `targets`.

`SoftTargetStore.to_dataset` opens them with Hugging Face `datasets`, for people who bring their own trainer.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import StoreError
from pipeline.targets.codecs import CODECS, spec_of
from pipeline.targets.container.folders import Folder
from pipeline.targets.container.manifest import Identity, identity_digest
from pipeline.targets.container.reader import StoreReader
from pipeline.targets.container.shards import Commit, ShardIndex
from pipeline.targets.container.writer import StoreWriter
from pipeline.targets.soft_targets import SoftTargets, concatenate

if TYPE_CHECKING:  # slow to import, and no stage of the pipeline needs it
    import datasets


class SoftTargetStore(StoreReader):
    """Random access to soft targets by sample_id. Safe to fork and pickle."""

    kind = "targets"

    def __init__(self, folder: Folder, identity: Identity, shards: Sequence[ShardIndex]) -> None:
        """Raises StoreError when the codec is unknown; use `open`."""
        super().__init__(folder, identity, shards)
        if identity["codec"] not in CODECS:
            raise StoreError(f"{folder}: unknown codec {identity['codec']!r}; known here: {sorted(CODECS)}")
        self._codec, self._spec = identity["codec"], spec_of(identity)

    @property
    def temperature(self) -> float:
        """The softmax temperature that the targets were made at. Losses need the same: the tail is cut already."""
        return float(self.identity["temperature"])

    def read(self, sample_id: str) -> SoftTargets:
        """A sample's targets, one row per answer token.

        Raises:
            StoreError: the sample is not in the store, or its bytes do not match their checksum.
        """
        raw, tokens = self.read_record(sample_id)
        return CODECS[self._codec].decode(raw, tokens, self._spec)

    def read_joined(self, sample_ids: Sequence[str]) -> tuple[SoftTargets, list[int]]:
        """Targets of one or more samples, one behind the other, and the answer tokens of each.

        Faster than `read` for each: where the codec allows it, all are decoded at once. Raises as `read` does.
        """
        if not CODECS[self._codec].joinable:
            parts = [self.read(sample_id) for sample_id in sample_ids]
            return concatenate(parts), [len(part) for part in parts]
        raws, tokens = zip(*map(self.read_record, sample_ids), strict=True)
        return CODECS[self._codec].decode(np.concatenate(raws), sum(tokens), self._spec), list(tokens)

    def to_dataset(self, **options: Any) -> "datasets.Dataset":
        """All samples as a memory-mapped `datasets.Dataset` with the columns `features()`, cached by `datasets`.

        Args:
            options: of `datasets.Dataset.from_generator`, as `cache_dir` or `num_proc`.

        Raises:
            StoreError: a record does not match its checksum.
        """
        import datasets

        digest = identity_digest({**self.identity, "shards": [record.xxh3_128 for record in self.commits]})
        made = datasets.Dataset.from_generator(
            _dataset_rows,
            features=features(),
            gen_kwargs={"store": self, "sample_ids": self.sample_ids},
            fingerprint=digest,
            **options,
        )
        assert isinstance(made, datasets.Dataset)
        return made


def features() -> "datasets.Features":
    """Columns of `to_dataset`: lists over answer tokens, `ids` and `logprobs` of lists over kept entries."""
    from datasets import Features, List, Value

    columns = {"sample_id": Value("string")}
    columns |= {"ids": List(List(Value("int32"))), "logprobs": List(List(Value("float32")))}
    return Features(columns | {name: List(Value("float32")) for name in ("tail_logprob", "gold_logprob", "entropy")})


def write_targets(writer: StoreWriter, shard: int, samples: Sequence[tuple[str, SoftTargets]]) -> Commit:
    """Encode and commit a shard's soft targets. StoreError naming the sample whose targets the codec refuses."""
    encoded = [
        (sample_id, len(targets), _encode(writer.identity, sample_id, targets)) for sample_id, targets in samples
    ]
    return writer.write_shard(shard, encoded, "targets")


def columns_of(targets: SoftTargets) -> dict[str, Any]:
    """One sample's targets as arrays; entries that no draw fell on are left out."""
    ids, logprobs = targets.ids.numpy().astype(np.int32), targets.logprobs.numpy()
    pairs: Any = (ids, logprobs)
    if targets.sampled:
        drawn = np.isfinite(logprobs)
        pairs = ([row[d] for row, d in zip(rows, drawn, strict=True)] for rows in (ids, logprobs))
    columns = dict(zip(("ids", "logprobs"), pairs, strict=True))
    rest = {name: getattr(targets, name).numpy() for name in ("tail_logprob", "gold_logprob", "entropy")}
    return {**columns, **rest}


def _dataset_rows(store: SoftTargetStore, sample_ids: Sequence[str]) -> Iterator[dict[str, Any]]:
    for sample_id in sample_ids:
        yield {"sample_id": sample_id, **columns_of(store.read(sample_id))}


def _encode(identity: Mapping[str, Any], sample_id: str, targets: SoftTargets) -> NDArray[np.uint8]:
    try:
        return CODECS[identity["codec"]].encode(targets, spec_of(identity))
    except StoreError as error:
        raise StoreError(f"sample {sample_id}: {error}") from None
