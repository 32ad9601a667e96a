"""One shard of a store: a safetensors file, and the commit record that makes it count.

The file holds flat tensors: `rec` u8 (the encoded samples, one behind the other), `off` i64[samples + 1] (where each
begins in `rec`), `rows` i64[samples], `crc32c` u32[samples], `sample_id` u8 (UTF-8, one id a line). The record, a
small JSON file written last, holds sizes, counts and hashes. A shard without a record does not exist. Bytes outside
`rec` are hashed when a shard is opened, `rec` carries one crc32c a sample: no number is returned before its bytes were
checked. What belongs to the same samples but is read apart has a file and a record of its own `kind`.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import crc32c
import numpy as np
import xxhash
from numpy.typing import NDArray
from safetensors.numpy import save

from pipeline.errors import StoreError
from pipeline.targets.container.folders import Folder

FORMAT_VERSION = 3

Bytes = NDArray[np.uint8]
Kind = Literal["targets", "sketches"]
"""Soft targets (one row per answer token), or feature sketches (one row per image cell and answer token)."""


class ShardDamagedError(StoreError):
    """A committed shard, or its record, is not what was written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitRecord:
    """What a shard file must look like. Written after the shard is safely on disk."""

    format_version: int
    kind: Kind
    shard: int
    """Shard number."""
    identity: str
    """Digest of the manifest's identity."""
    samples: int
    rows: int
    bytes: int
    """Size of the shard file."""
    rec_begin: int
    """File position of the records."""
    rec_end: int
    index_xxh3_64: str
    """Hash of every byte outside the records."""
    xxh3_128: str
    """Hash of the whole file."""


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """Where the samples of one shard are. Checked against the commit record."""

    folder: Folder
    record: CommitRecord
    sample_ids: tuple[str, ...]
    offsets: NDArray[np.int64]
    """i64[samples + 1], positions in `rec`."""
    rows: NDArray[np.int64]
    """i64[samples]"""
    crcs: NDArray[np.uint32]
    """u32[samples]"""

    def read(self, place: int) -> tuple[Bytes, int]:
        """Bytes u8 of one sample, and its rows.

        Raises:
            ShardDamagedError: the bytes in the store do not match their checksum.
        """
        first, last = int(self.offsets[place]), int(self.offsets[place + 1])
        begin, name = self.record.rec_begin, shard_name(self.record.shard, self.record.kind)
        raw = _read(self.folder, name, begin + first, begin + last)
        if len(raw) != last - first or crc32c.crc32c(raw) != int(self.crcs[place]):
            sample_id = self.sample_ids[place]
            raise ShardDamagedError(f"{self.folder}/{name}: sample {sample_id} does not match its checksum")
        # frombuffer is read-only, and torch wants memory that it may write to.
        return np.frombuffer(bytearray(raw), np.uint8), int(self.rows[place])


def shard_name(shard: int, kind: Kind) -> str:
    """File of a shard."""
    return f"shard-{shard:05d}.{kind}.safetensors"


def record_name(shard: int, kind: Kind) -> str:
    """Commit record of a shard."""
    return f"shard-{shard:05d}.{kind}.json"


def recorded_shards(folder: Folder, kind: Kind) -> list[int]:
    """Numbers of the shards that have a commit record, ascending."""
    ending = f".{kind}.json"
    names = [n for n in folder.names() if n.startswith("shard-") and n.endswith(ending)]
    return sorted(int(name.removeprefix("shard-").removesuffix(ending)) for name in names)


def write_shard(
    folder: Folder, shard: int, kind: Kind, samples: Sequence[tuple[str, int, Bytes]], identity: str
) -> CommitRecord:
    """Write and commit one shard. Killed at any moment it leaves either no shard or the whole of it.

    Args:
        samples: (sample_id, rows, bytes u8); the bytes in the file are a function of these alone.
        identity: digest of the store's identity.

    Raises:
        StoreError: a bad sample id, or another process writes the shard too.
    """
    raw = _shard_bytes(samples)
    begin, end = _rec_span(raw)
    record = CommitRecord(
        format_version=FORMAT_VERSION,
        kind=kind,
        shard=shard,
        identity=identity,
        samples=len(samples),
        rows=sum(rows for _, rows, _ in samples),
        bytes=len(raw),
        rec_begin=begin,
        rec_end=end,
        index_xxh3_64=xxhash.xxh3_64_hexdigest(raw[:begin] + raw[end:]),
        xxh3_128=xxhash.xxh3_128_hexdigest(raw),
    )
    try:
        folder.write(shard_name(shard, kind), raw)
        folder.write(record_name(shard, kind), sealed_json(asdict(record)))
    except FileNotFoundError:
        problem = f"{folder}/{shard_name(shard, kind)}: another process writes it too; give each a different --worker"
        raise StoreError(problem) from None
    return record


def open_shard(folder: Folder, shard: int, kind: Kind) -> ShardIndex:
    """Read a shard's index, checking its record, the file's size and every byte outside the records.

    Raises:
        ShardDamagedError: any of these is missing or not as written.
    """
    record, name = read_record(folder, shard, kind), shard_name(shard, kind)
    path, size = f"{folder}/{name}", folder.size(name)
    if size is None:
        raise ShardDamagedError(f"{path}: missing, but its commit record promises {record.samples} samples")
    if size != record.bytes:
        raise ShardDamagedError(f"{path}: {size} bytes, but its commit record says {record.bytes}")
    index = _read(folder, name, 0, record.rec_begin) + _read(folder, name, record.rec_end, size)
    if xxhash.xxh3_64_hexdigest(index) != record.index_xxh3_64:
        raise ShardDamagedError(f"{path}: the index does not match the hash in its commit record")
    tensors = _index_tensors(index, record)
    ids = tensors["sample_id"].tobytes().decode().split("\n") if record.samples else []
    offsets, rows, crcs = tensors["off"].view("<i8"), tensors["rows"].view("<i8"), tensors["crc32c"].view("<u4")
    return ShardIndex(folder, record, tuple(ids), offsets, rows, crcs)


def check_shard(folder: Folder, shard: int, kind: Kind) -> CommitRecord:
    """Read every byte of a shard and compare it with its record.

    Raises:
        ShardDamagedError: a difference.
    """
    index, name = open_shard(folder, shard, kind), shard_name(shard, kind)
    if xxhash.xxh3_128_hexdigest(_read(folder, name, 0, index.record.bytes)) != index.record.xxh3_128:
        raise ShardDamagedError(f"{folder}/{name}: the file does not match the hash in its commit record")
    for place in range(len(index.sample_ids)):
        index.read(place)
    return index.record


def read_record(folder: Folder, shard: int, kind: Kind) -> CommitRecord:
    """A shard's commit record.

    Raises:
        ShardDamagedError: the record is not as written, or describes another shard or format.
    """
    path, content = f"{folder}/{record_name(shard, kind)}", unsealed_json(folder, record_name(shard, kind))
    if content.get("format_version") != FORMAT_VERSION:
        raise ShardDamagedError(
            f"{path}: format version {content.get('format_version')}, this code reads {FORMAT_VERSION}"
        )
    try:
        record = CommitRecord(**content)
    except TypeError as error:
        raise ShardDamagedError(f"{path}: not a commit record of this version: {error}") from None
    if (record.shard, record.kind) != (shard, kind):
        raise ShardDamagedError(f"{path}: describes shard {record.shard}, {record.kind}")
    return record


def sealed_json(content: dict[str, Any]) -> bytes:
    """Canonical JSON with a hash of itself: any flipped bit shows."""
    seal = xxhash.xxh3_64_hexdigest(json.dumps(content, sort_keys=True))
    return (json.dumps({**content, "seal": seal}, sort_keys=True, indent=1) + "\n").encode()


def unsealed_json(folder: Folder, name: str) -> dict[str, Any]:
    """The content of a file written as `sealed_json`.

    Raises:
        ShardDamagedError: it is missing, or one bit of it changed.
    """
    try:
        raw = folder.read(name)
        content = dict(json.loads(raw))
    except (OSError, ValueError, TypeError) as error:
        raise ShardDamagedError(f"{folder}/{name}: cannot be read: {error}") from None
    content.pop("seal", None)
    # Compared as bytes: white space, key order and number format are sealed too.
    if sealed_json(content) != raw:
        raise ShardDamagedError(f"{folder}/{name}: does not match its own seal")
    return content


def _shard_bytes(samples: Sequence[tuple[str, int, Bytes]]) -> bytes:
    broken = [sample_id for sample_id, _, _ in samples if not sample_id or "\n" in sample_id]
    if broken:
        raise StoreError(f"sample ids must be non-empty and without line breaks, got {broken[:3]}")
    ids = "\n".join(sample_id for sample_id, _, _ in samples).encode()
    tensors: dict[str, NDArray[Any]] = {
        "rec": np.concatenate([np.zeros(0, np.uint8), *(raw for _, _, raw in samples)]),
        "off": np.array([0, *(len(raw) for _, _, raw in samples)], np.int64).cumsum(),
        "rows": np.array([rows for _, rows, _ in samples], np.int64),
        "crc32c": np.array([crc32c.crc32c(np.ascontiguousarray(raw).data) for _, _, raw in samples], np.uint32),
        "sample_id": np.frombuffer(ids, np.uint8),
    }
    return save(tensors)


def _header(raw: bytes) -> tuple[dict[str, Any], int]:
    """safetensors' header and the position where its data begin."""
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), 8 + length


def _rec_span(raw: bytes) -> tuple[int, int]:
    header, data = _header(raw)
    begin, end = header["rec"]["data_offsets"]
    return data + begin, data + end


def _index_tensors(index: bytes, record: CommitRecord) -> dict[str, Bytes]:
    """Raw bytes of the small tensors, from the file's bytes with the records cut out."""
    header, data = _header(index)
    cut = record.rec_end - record.rec_begin
    tensors: dict[str, Bytes] = {}
    for name in ("off", "rows", "crc32c", "sample_id"):
        begin, end = (data + offset for offset in header[name]["data_offsets"])
        shift = cut if begin >= record.rec_end else 0
        tensors[name] = np.frombuffer(index[begin - shift : end - shift], np.uint8)
    return tensors


def _read(folder: Folder, name: str, begin: int, end: int) -> bytes:
    try:
        return folder.read(name, begin, end)
    except OSError as error:
        raise ShardDamagedError(f"{folder}/{name}: cannot be read: {error}") from None
