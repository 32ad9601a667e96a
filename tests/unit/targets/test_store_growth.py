"""What happens to a store after it was made: it grows, moves, merges, and leaves for other tools."""

import hashlib
import json

import datasets
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from pipeline.cli import main as clkd
from pipeline.errors import ConfigError, StoreError
from pipeline.targets import sketches
from pipeline.targets.container.folders import LocalFolder, folder_at
from pipeline.targets.container.manifest import read_parts
from pipeline.targets.container.reader import damaged_shards
from pipeline.targets.container.sealed import DamagedError
from pipeline.targets.container.shards import commit_name, shard_name
from pipeline.targets.container.writer import StoreWriter
from pipeline.targets.maintenance import merge
from pipeline.targets.sketches import Sketch, SketchStore
from pipeline.targets.store import SoftTargetStore, write_targets
from tests.helpers.object_store import s3_bucket
from tests.helpers.stores import IDENTITY, SAMPLES, assert_same, contents, read_all, write_drawn

WITH_SKETCHES = IDENTITY | {"sketch_layer": 1, "sketch_dim": 64, "sketch_seed": 0}
IDS = sorted(SAMPLES)


@pytest.fixture(scope="module")
def bucket():
    with s3_bucket() as url:
        yield url


def sketch_of(sample_id):
    torch.manual_seed(int.from_bytes(sample_id.encode(), "little") % 2**31)
    return Sketch(torch.randn(16, 64), torch.randn(len(SAMPLES[sample_id]), 64))


def fill(url, ids, shard_samples=2, identity=IDENTITY, dataset="first"):
    """Plan and write all that is missing, as the teacher does. The shards written."""
    writer = StoreWriter(url, identity)
    planned = writer.plan(ids, shard_samples, dataset)
    todo = {n: members for n, members in planned.items() if n not in writer.committed()[0]}
    for shard, members in todo.items():
        if "sketches" in writer.kinds:
            made = [(i, sketch_of(i)) for i in members]
            rows = [(i, len(s.cells_CR) + len(s.tokens_TR), sketches.encode(s)) for i, s in made]
            writer.write_shard(shard, rows, "sketches")
        write_targets(writer, shard, [(i, SAMPLES[i]) for i in members])
    return sorted(todo)


# -- growing -----------------------------------------------------------------------------------------------


class Late(LocalFolder):
    """A network folder on which another worker's files appear after some looks at the list of names."""

    looks = 0

    def names(self):
        Late.looks -= 1
        return [] if Late.looks > 0 else LocalFolder.names(self)


@pytest.mark.parametrize("looks", [3, 10**9])
def test_another_workers_part_is_waited_for_and_not_for_ever(tmp_path, monkeypatch, looks):
    StoreWriter(tmp_path, IDENTITY).plan(IDS[:3], 2, "first")
    writer = StoreWriter(tmp_path, IDENTITY)
    writer.folder = Late(tmp_path)
    monkeypatch.setattr(Late, "looks", looks)
    monkeypatch.setattr("pipeline.targets.container.writer.UNSEEN_S", 0.3)
    if looks == 3:
        assert writer.plan(IDS[:3], 2, "first", set()) == {0: IDS[:2], 1: IDS[2:3]}
    else:
        with pytest.raises(StoreError, match=r"part-00000\.json is said to be there and cannot be seen, for 0\.3 s"):
            writer.plan(IDS[:3], 2, "first", set())


def test_more_data_extend_a_store_and_touch_nothing(tmp_path):
    assert fill(tmp_path, IDS[:4]) == [0, 1]
    before = contents(tmp_path)
    assert fill(tmp_path, IDS, dataset="second") == [2, 3]
    after = contents(tmp_path)
    assert {name: after[name] for name in before} == before
    assert read_all(tmp_path).keys() == SAMPLES.keys()
    assert [part["dataset"] for part in read_parts(LocalFolder(tmp_path))] == ["first", "second"]
    assert fill(tmp_path, IDS[2:6], dataset="third") == [], "a smaller data set needs nothing"


def test_an_unfinished_part_is_finished_before_more_is_planned(tmp_path):
    StoreWriter(tmp_path, IDENTITY).plan(IDS[:3], 2, "first")
    assert fill(tmp_path, IDS, shard_samples=3, dataset="second") == [0, 1, 2, 3]
    shards = SoftTargetStore.open(tmp_path, IDENTITY).shard_members
    assert [list(ids) for _, ids in shards] == [IDS[:2], IDS[2:3], IDS[3:6], IDS[6:]]


def test_a_shard_whose_data_are_gone_is_planned_anew(tmp_path):
    """Shard 1 holds samples 2 and 3; it is lost, and the data set has sample 2 only."""
    fill(tmp_path, IDS)
    (tmp_path / commit_name(1, "targets")).unlink()
    left = [i for i in IDS if i != IDS[3]]
    assert fill(tmp_path, left, dataset="second") == [4]
    store = SoftTargetStore.open(tmp_path, IDENTITY)
    assert store.missing(IDS) == [IDS[3]]
    store.require(left, "second")
    # Whoever has the rest can still write the shard; the sample in two shards is read from the first.
    assert fill(tmp_path, IDS) == [1]
    assert read_all(tmp_path).keys() == SAMPLES.keys()


def test_a_lost_part_file_costs_no_shard(tmp_path):
    fill(tmp_path, IDS[:4])
    fill(tmp_path, IDS, dataset="second")
    before = contents(tmp_path)
    (tmp_path / "part-00001.json").unlink()
    assert fill(tmp_path, IDS, dataset="second") == [4, 5], "numbers of shards that are there are not used again"
    assert {n: r for n, r in contents(tmp_path).items() if n in before and "part" not in n} == {
        n: r for n, r in before.items() if "part" not in n
    }
    assert read_all(tmp_path).keys() == SAMPLES.keys()


def test_a_data_set_beyond_the_store_is_refused_with_both_fingerprints(tmp_path):
    fill(tmp_path, IDS[:4])
    store = SoftTargetStore.open(tmp_path, IDENTITY)
    store.require(IDS[1:3], "part of it")
    with pytest.raises(StoreError, match=rf"(?s)3 of 7 samples .* as {IDS[4]}.*store \['first'\], this run 'second'"):
        store.require(IDS, "second")


# -- object stores -----------------------------------------------------------------------------------------


class Reads(Dataset):
    def __init__(self, store, ids):
        self.store, self.ids = store, ids

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return self.store.read(self.ids[index])


def test_a_store_lives_in_an_object_store(bucket, tmp_path):
    url = f"{bucket}/lives"
    fill(url, IDS[:4], identity=WITH_SKETCHES)
    assert fill(url, IDS, identity=WITH_SKETCHES) == [2, 3]
    store = SoftTargetStore.open(url, WITH_SKETCHES)
    fill(tmp_path, IDS[:4], identity=WITH_SKETCHES)
    fill(tmp_path, IDS, identity=WITH_SKETCHES)
    here = SoftTargetStore.open(tmp_path, WITH_SKETCHES)
    loader = DataLoader(Reads(store, IDS), batch_size=None, num_workers=2)  # forks after the parent has read
    for sample_id, got in zip(IDS, loader, strict=True):
        assert_same(got, here.read(sample_id))
    local, remote = LocalFolder(tmp_path), folder_at(url)
    assert {name: remote.read(name) for name in remote.names()} == {name: local.read(name) for name in local.names()}
    assert damaged_shards(url) == {}


def test_damage_in_an_object_store_is_seen(bucket):
    url = f"{bucket}/damage"
    fill(url, IDS)
    folder, name = folder_at(url), shard_name(1, "targets")
    whole = folder.read(name)
    folder.write(name, whole[:-1])
    with pytest.raises(DamagedError, match=f"{url}/{name}: {len(whole) - 1} bytes"):
        SoftTargetStore.open(url, IDENTITY)
    begin = (
        SoftTargetStore.open(f"{bucket}/damage2", None).commits[1].rec_begin if fill(f"{bucket}/damage2", IDS) else 0
    )
    folder.write(name, whole[:begin] + bytes([whole[begin] ^ 4]) + whole[begin + 1 :])
    with pytest.raises(DamagedError, match=f"sample {IDS[2]} does not match"):
        SoftTargetStore.open(url, IDENTITY).read(IDS[2])
    assert list(damaged_shards(url)) == [(1, "targets")]
    folder.remove(name)
    with pytest.raises(DamagedError, match="missing"):
        SoftTargetStore.open(url, IDENTITY)


# -- merging and moving ------------------------------------------------------------------------------------


@pytest.mark.parametrize("identity", [IDENTITY, WITH_SKETCHES])
def test_merge_gathers_what_several_stores_hold(tmp_path, identity):
    fill(tmp_path / "a", IDS[:3], identity=identity)
    fill(tmp_path / "b", IDS[2:], identity=identity, dataset="second")
    assert merge(tmp_path / "all", [str(tmp_path / "a"), str(tmp_path / "b")], shard_samples=4) == 7
    fill(tmp_path / "direct", [*IDS[:2], *IDS[2:]], identity=identity, shard_samples=4)
    merged, direct = read_all_kinds(tmp_path / "all", identity), read_all_kinds(tmp_path / "direct", identity)
    assert merged == direct
    before = contents(tmp_path / "all")
    assert merge(tmp_path / "all", [str(tmp_path / "b")], shard_samples=4) == 0
    assert contents(tmp_path / "all") == before


def read_all_kinds(root, identity):
    readers = [SoftTargetStore, *([SketchStore] if "sketch_dim" in identity else [])]
    stores = [reader.open(root, identity) for reader in readers]
    return [
        {i: (rows, raw.tobytes()) for i in store.sample_ids for raw, rows in [store.read_record(i)]} for store in stores
    ]


def test_an_interrupted_merge_goes_on(tmp_path):
    fill(tmp_path / "a", IDS)
    merge(tmp_path / "all", [str(tmp_path / "a")], shard_samples=2)
    whole = contents(tmp_path / "all")
    (tmp_path / "all" / commit_name(2, "targets")).unlink()
    assert merge(tmp_path / "all", [str(tmp_path / "a")], shard_samples=2) == 2
    assert contents(tmp_path / "all") == whole


def test_merge_refuses_another_identity_and_damage(tmp_path):
    fill(tmp_path / "a", IDS[:3])
    fill(tmp_path / "b", IDS[3:], identity=IDENTITY | {"temperature": 2.0})
    with pytest.raises(StoreError, match=r"temperature: store 2\.0, this run 1\.0"):
        merge(tmp_path / "all", [str(tmp_path / "a"), str(tmp_path / "b")], shard_samples=2)
    assert not (tmp_path / "all").exists()
    record = SoftTargetStore.open(tmp_path / "a", None).commits[0]
    raw = bytearray((tmp_path / "a" / shard_name(0, "targets")).read_bytes())
    raw[record.rec_begin] ^= 1
    (tmp_path / "a" / shard_name(0, "targets")).write_bytes(raw)
    with pytest.raises(DamagedError, match="does not match its checksum"):
        merge(tmp_path / "all", [str(tmp_path / "a")], shard_samples=2)


def command(root, *arguments):
    recipe = root.parent / "recipe.yaml"
    recipe.write_text(json.dumps({"run": {"dir": str(root.parent)}, "targets": {"store": str(root)}}))
    return clkd(["store", *arguments, str(recipe)])


def test_the_command_moves_a_store_to_s3_and_back(bucket, tmp_path, capsys):
    fill(tmp_path / "a", IDS, shard_samples=512)
    url = f"{bucket}/moved"
    assert command(tmp_path / "a", "merge", "--from", str(tmp_path / "a"), f"targets.store={url}") == 0
    assert "7 samples copied from 1 store(s)" in capsys.readouterr().out
    assert command(tmp_path / "back", "merge", "--from", url) == 0
    assert contents(tmp_path / "back") == contents(tmp_path / "a")
    with pytest.raises(ConfigError, match="name the stores to copy from"):
        command(tmp_path / "back", "merge")
    with pytest.raises(ConfigError, match="name a folder with --out"):
        command(tmp_path / "back", "export")


# -- other tools -------------------------------------------------------------------------------------------


@pytest.fixture(params=["packed", "sampled"])
def any_store(request, tmp_path):
    root = tmp_path / "store"
    if request.param == "packed":
        fill(root, IDS)
    else:
        write_drawn(root)
    return SoftTargetStore.open(root, None)


def assert_row(row, targets):
    kept = [logprobs.isfinite() for logprobs in targets.logprobs]
    assert row["ids"] == [ids[k].tolist() for ids, k in zip(targets.ids, kept, strict=True)]
    for name in ("tail_logprob", "gold_logprob", "entropy"):
        assert torch.equal(torch.tensor(row[name]), getattr(targets, name))
    for got, logprobs, k in zip(row["logprobs"], targets.logprobs, kept, strict=True):
        assert torch.equal(torch.tensor(got), logprobs[k])


def test_hugging_face_datasets_opens_it(any_store, tmp_path):
    opened = any_store.to_dataset(cache_dir=str(tmp_path / "cache"))
    assert isinstance(opened, datasets.Dataset)
    assert opened["sample_id"][:] == any_store.sample_ids
    for row in opened:
        assert_row(row, any_store.read(row["sample_id"]))
    assert opened.filter(lambda row: len(row["ids"]) > 2).num_rows == sum(len(t) > 2 for t in SAMPLES.values())


def test_a_dataset_is_made_anew_when_the_store_has_grown(tmp_path):
    fill(tmp_path / "store", IDS[:4])
    options = {"cache_dir": str(tmp_path / "cache")}
    assert SoftTargetStore.open(tmp_path / "store", None).to_dataset(**options).num_rows == 4
    fill(tmp_path / "store", IDS)
    assert SoftTargetStore.open(tmp_path / "store", None).to_dataset(**options).num_rows == 7


def test_export_writes_parquet_that_anything_reads(any_store, tmp_path, capsys):
    out = tmp_path / "parquet"
    assert command(any_store.folder.path, "export", "--out", str(out)) == 0
    assert "7 samples in" in capsys.readouterr().out
    rows = [row for path in sorted(out.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    assert [row["sample_id"] for row in rows] == any_store.sample_ids
    for row in rows:
        assert_row(row, any_store.read(row["sample_id"]))
    sums = dict(line.split("  ")[::-1] for line in (out / "SHA256SUMS").read_text().splitlines())
    assert sums == {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in out.glob("*.parquet")}
    metadata = pq.read_schema(next(out.glob("*.parquet"))).metadata
    assert json.loads(metadata[b"soft_targets"]) == any_store.identity


def test_a_flipped_bit_in_exported_pages_is_found(tmp_path):
    fill(tmp_path / "store", IDS, shard_samples=7)
    command(tmp_path / "store", "export", "--out", str(tmp_path / "out"))
    path = tmp_path / "out" / "soft-targets-00000.parquet"
    assert pq.read_table(path, page_checksum_verification=True).num_rows == len(IDS)
    raw = bytearray(path.read_bytes())
    column = pq.ParquetFile(path).metadata.row_group(0).column(1)
    raw[column.data_page_offset + column.total_compressed_size - 3] ^= 8
    path.write_bytes(raw)
    with pytest.raises(OSError):
        pq.read_table(path, page_checksum_verification=True)
