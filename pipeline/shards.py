"""One shard of the soft-target store on disk: a safetensors file, and the commit record that makes it count.

The file holds flat tensors: `rec` u8 (what a codec made of each sample, one behind the other), `off`
i64[samples + 1] (where each begins in `rec`), `tokens` i64[samples], `crc32c` u32[samples], `sample_id` u8 (UTF-8,
one id a line). The record, a small JSON file written last, holds sizes, counts and hashes. A shard without a record
does not exist. Bytes outside `rec` are hashed when a shard is opened, `rec` carries one crc32c a sample: no number is
returned before its bytes were checked.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import crc32c
import numpy as np
import xxhash
from numpy.typing import NDArray
from safetensors.numpy import save

from pipeline.codecs import Bytes
from pipeline.errors import StoreError

FORMAT_VERSION = 2
_SUFFIX = ".safetensors"


class ShardDamagedError(StoreError):
    """A committed shard, or its record, is not what was written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitRecord:
    """What a shard file must look like. Written after the shard is safely on disk."""

    format_version: int
    shard: int
    """Shard number."""
    identity: str
    """Digest of the manifest's identity."""
    codec: str
    samples: int
    tokens: int
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

    path: Path
    record: CommitRecord
    sample_ids: tuple[str, ...]
    offsets: NDArray[np.int64]
    """i64[samples + 1], positions in `rec`."""
    tokens: NDArray[np.int64]
    """i64[samples]"""
    crcs: NDArray[np.uint32]
    """u32[samples]"""

    def read(self, row: int) -> tuple[Bytes, int]:
        """Bytes u8 of one sample, and its answer tokens.

        Raises:
            ShardDamagedError: the bytes on disk do not match their checksum.
        """
        first, last = int(self.offsets[row]), int(self.offsets[row + 1])
        raw = _pread(self.path, last - first, self.record.rec_begin + first)
        if len(raw) != last - first or crc32c.crc32c(raw) != int(self.crcs[row]):
            sample_id = self.sample_ids[row]
            raise ShardDamagedError(f"{self.path}: sample {sample_id} does not match its checksum")
        # frombuffer is read-only, and torch wants memory that it may write to.
        return np.frombuffer(bytearray(raw), np.uint8), int(self.tokens[row])


def shard_path(root: Path, shard: int) -> Path:
    """File of a shard."""
    return root / f"shard-{shard:05d}{_SUFFIX}"


def record_path(root: Path, shard: int) -> Path:
    """Commit record of a shard."""
    return root / f"shard-{shard:05d}.json"


def recorded_shards(root: Path) -> list[int]:
    """Numbers of the shards that have a commit record, ascending."""
    return sorted(int(path.stem.removeprefix("shard-")) for path in root.glob("shard-[0-9]*.json"))


def write_shard(
    root: Path,
    shard: int,
    samples: Sequence[tuple[str, int, Bytes]],
    *,
    identity: str,
    codec: str,
) -> CommitRecord:
    """Write and commit one shard. Killed at any moment it leaves either no shard or the whole of it.

    Args:
        samples: (sample_id, answer tokens, bytes u8); the bytes on disk are a function of these alone.
    """
    raw = _shard_bytes(samples)
    begin, end = _rec_span(raw)
    record = CommitRecord(
        format_version=FORMAT_VERSION,
        shard=shard,
        identity=identity,
        codec=codec,
        samples=len(samples),
        tokens=sum(tokens for _, tokens, _ in samples),
        bytes=len(raw),
        rec_begin=begin,
        rec_end=end,
        index_xxh3_64=xxhash.xxh3_64_hexdigest(raw[:begin] + raw[end:]),
        xxh3_128=xxhash.xxh3_128_hexdigest(raw),
    )
    try:
        write_atomic(shard_path(root, shard), raw)
        write_atomic(record_path(root, shard), sealed_json(asdict(record)))
    except FileNotFoundError:  # whoever commits a shard clears its leftovers
        problem = f"{shard_path(root, shard)}: another process writes it too; give each a different --worker"
        raise StoreError(problem) from None
    clear_leftovers(shard_path(root, shard))
    return record


def open_shard(root: Path, shard: int) -> ShardIndex:
    """Read a shard's index, checking its record, the file's size and every byte outside the records.

    Raises:
        ShardDamagedError: any of these is missing or not as written.
    """
    record = read_record(root, shard)
    path = shard_path(root, shard)
    size = path.stat().st_size if path.is_file() else None
    if size is None:
        raise ShardDamagedError(f"{path}: missing, but its commit record promises {record.samples} samples")
    if size != record.bytes:
        raise ShardDamagedError(f"{path}: {size} bytes, but its commit record says {record.bytes}")
    head = _pread(path, record.rec_begin, 0)
    index = head + _pread(path, size - record.rec_end, record.rec_end)
    if xxhash.xxh3_64_hexdigest(index) != record.index_xxh3_64:
        raise ShardDamagedError(f"{path}: the index does not match the hash in its commit record")
    tensors = _index_tensors(index, record)
    ids = tensors["sample_id"].tobytes().decode().split("\n") if record.samples else []
    offsets, tokens, crcs = tensors["off"].view("<i8"), tensors["tokens"].view("<i8"), tensors["crc32c"].view("<u4")
    return ShardIndex(path, record, tuple(ids), offsets, tokens, crcs)


def check_shard(root: Path, shard: int) -> None:
    """Read every byte of a shard and compare it with its record.

    Raises:
        ShardDamagedError: a difference.
    """
    index = open_shard(root, shard)
    with index.path.open("rb") as file:
        digest = xxhash.xxh3_128()
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    if digest.hexdigest() != index.record.xxh3_128:
        raise ShardDamagedError(f"{index.path}: the file does not match the hash in its commit record")
    for row in range(len(index.sample_ids)):
        index.read(row)


def read_record(root: Path, shard: int) -> CommitRecord:
    """A shard's commit record.

    Raises:
        ShardDamagedError: the record is not as written, or describes another shard or format.
    """
    path = record_path(root, shard)
    try:
        record = CommitRecord(**unsealed_json(path))
    except TypeError as error:
        raise ShardDamagedError(f"{path}: not a commit record of this version: {error}") from None
    if record.format_version != FORMAT_VERSION:
        raise ShardDamagedError(f"{path}: format version {record.format_version}, this code reads {FORMAT_VERSION}")
    if record.shard != shard:
        raise ShardDamagedError(f"{path}: describes shard {record.shard}")
    return record


def write_atomic(path: Path, raw: bytes) -> None:
    """Write a file so that after a crash or power cut it is either absent (or as before) or whole.

    Raises:
        FileNotFoundError: another process finished the same file and cleared this one's temporary.
    """
    temporary = path.with_name(f".{path.stem}.{os.uname().nodename}-{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(raw)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself is durable only then
    finally:
        os.close(folder)


def clear_leftovers(path: Path) -> None:
    """Remove the temporary files of killed runs beside a file that is whole."""
    for leftover in path.parent.glob(f".{path.stem}.*.tmp"):
        leftover.unlink(missing_ok=True)


def sealed_json(content: dict[str, Any]) -> bytes:
    """Canonical JSON with a hash of itself: any flipped bit shows."""
    seal = xxhash.xxh3_64_hexdigest(json.dumps(content, sort_keys=True))
    return (json.dumps({**content, "seal": seal}, sort_keys=True, indent=1) + "\n").encode()


def unsealed_json(path: Path) -> dict[str, Any]:
    """The content of a file written as `sealed_json`.

    Raises:
        ShardDamagedError: it is missing, or one bit of it changed.
    """
    try:
        raw = path.read_bytes()
        content = dict(json.loads(raw))
    except (OSError, ValueError) as error:
        raise ShardDamagedError(f"{path}: cannot be read: {error}") from None
    content.pop("seal", None)
    # Compared as bytes: white space, key order and number format are sealed too.
    if sealed_json(content) != raw:
        raise ShardDamagedError(f"{path}: does not match its own seal")
    return content


def _shard_bytes(samples: Sequence[tuple[str, int, Bytes]]) -> bytes:
    broken = [sample_id for sample_id, _, _ in samples if not sample_id or "\n" in sample_id]
    if broken:
        raise StoreError(f"sample ids must be non-empty and without line breaks, got {broken[:3]}")
    ids = "\n".join(sample_id for sample_id, _, _ in samples).encode()
    tensors: dict[str, NDArray[Any]] = {
        "rec": np.concatenate([np.zeros(0, np.uint8), *(raw for _, _, raw in samples)]),
        "off": np.array([0, *(len(raw) for _, _, raw in samples)], np.int64).cumsum(),
        "tokens": np.array([tokens for _, tokens, _ in samples], np.int64),
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
    for name in ("off", "tokens", "crc32c", "sample_id"):
        begin, end = (data + offset for offset in header[name]["data_offsets"])
        shift = cut if begin >= record.rec_end else 0
        tensors[name] = np.frombuffer(index[begin - shift : end - shift], np.uint8)
    return tensors


def _pread(path: Path, length: int, position: int) -> bytes:
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise ShardDamagedError(f"{path}: cannot be read: {error}") from None
    try:
        return os.pread(file, length, position)
    finally:
        os.close(file)
