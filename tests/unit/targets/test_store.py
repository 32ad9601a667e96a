import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file

from pipeline.cli import main as clkd
from pipeline.errors import StoreError
from pipeline.targets.container.folders import LocalFolder
from pipeline.targets.container.reader import damaged_shards
from pipeline.targets.container.sealed import DamagedError, sealed_json, unsealed_json
from pipeline.targets.container.shards import commit_name, shard_name
from pipeline.targets.container.writer import StoreWriter
from pipeline.targets.soft_targets import concatenate
from pipeline.targets.store import SoftTargetStore, write_targets
from tests.helpers.soft_targets import random_targets, roundtrip
from tests.helpers.stores import (
    IDENTITY,
    SAMPLES,
    TOP_K,
    VOCAB,
    assert_same,
    contents,
    read_all,
    shard_samples,
    write_drawn,
)


def shard_path(root, shard):
    return root / shard_name(shard, "targets")


def record_path(root, shard):
    return root / commit_name(shard, "targets")


def open_writer(root, **changes):
    """A writer with the samples planned as `LENGTHS` says."""
    writer = StoreWriter(root, IDENTITY | changes)
    assert writer.plan(list(SAMPLES), 3, "of the tests") == {n: [i for i, _ in shard_samples(n)] for n in range(3)}
    return writer


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("store")
    writer = open_writer(root)
    for shard in (1, 0, 2):
        write_targets(writer, shard, shard_samples(shard))
    return root


@pytest.fixture
def root(written, tmp_path):
    """A copy that may be damaged."""
    return shutil.copytree(written, tmp_path / "store")


def test_every_sample_comes_back_under_its_id(written):
    stored = read_all(written)
    assert stored.keys() == SAMPLES.keys()
    for sample_id, targets in SAMPLES.items():
        wanted = roundtrip(targets, VOCAB)
        assert_same(stored[sample_id], wanted)


def test_joined_reading_is_reading_one_by_one(written, tmp_path):
    write_drawn(tmp_path)
    for root in (written, tmp_path):
        store, chosen = SoftTargetStore.open(root, None), ["id-2-0", "id-0-2", "id-1-1", "id-0-0"]
        one_by_one = [store.read(sample_id) for sample_id in chosen]
        joined, tokens = store.read_joined(chosen)
        assert_same(joined, concatenate(one_by_one))
        assert tokens == [len(targets) for targets in one_by_one]
        for part, targets in zip(joined.split(tokens), one_by_one, strict=True):
            assert_same(part, targets.padded(joined.top_k) if joined.sampled else targets)


def test_a_shard_is_plain_safetensors(written):
    tensors = load_file(shard_path(written, 0))
    width = 16 + 10  # 8 ids of 10 bits and 6 log-probs of 7, in whole bytes; 5 f16
    assert tensors["rec"].shape == (13 * width,)
    assert tensors["off"].tolist() == [0, 3 * width, 4 * width, 13 * width]
    assert tensors["rows"].tolist() == [3, 1, 9]
    assert bytes(tensors["sample_id"].tolist()).decode().split("\n") == ["id-0-0", "id-0-1", "id-0-2"]


def test_membership(written):
    store = SoftTargetStore.open(written, None)
    assert len(store) == 7
    assert "id-1-1" in store
    assert store.missing(["id-0-0", "nope", "id-2-0", "id-9-9"]) == ["nope", "id-9-9"]
    assert damaged_shards(store.folder.path) == {}
    with pytest.raises(StoreError, match=r"no soft targets for sample nope; .*clkd teacher"):
        store.read("nope")


def test_a_store_travels_to_worker_processes(written):
    store = pickle.loads(pickle.dumps(SoftTargetStore.open(written, IDENTITY)))
    assert len(store.read("id-0-2")) == 9


def test_an_uncommitted_shard_does_not_exist(root):
    record_path(root, 1).unlink()
    store = SoftTargetStore.open(root, IDENTITY)
    assert store.missing(SAMPLES) == ["id-1-0", "id-1-1", "id-1-2"]


def test_the_bytes_depend_on_the_samples_alone(written, tmp_path):
    writer = open_writer(tmp_path / "again")
    (tmp_path / "again" / f".{shard_name(0, 'targets')}.elsewhere-1.tmp").write_bytes(b"of a killed run")
    for shard in range(3):
        write_targets(writer, shard, shard_samples(shard))
    assert contents(tmp_path / "again") == contents(written)


# -- damage ------------------------------------------------------------------------------------------------


def flip(path, bit):
    raw = bytearray(path.read_bytes())
    raw[bit // 8] ^= 1 << bit % 8
    path.write_bytes(raw)


def test_a_damaged_record_stops_only_its_own_sample(root):
    record = SoftTargetStore.open(root, IDENTITY).commits[0]
    flip(shard_path(root, 0), 8 * record.rec_begin)
    store = SoftTargetStore.open(root, IDENTITY)
    assert len(store.read("id-0-1")) == 1
    with pytest.raises(
        DamagedError, match=r"shard-00000\.targets\.safetensors: sample id-0-0 .*verify RECIPE.yaml --discard"
    ):
        store.read("id-0-0")


@pytest.mark.parametrize("keep", [0, 1, 100, -1])
def test_a_truncated_shard_is_refused_at_open(root, keep):
    path = shard_path(root, 1)
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(
        DamagedError, match=rf"shard-00001\.targets\.safetensors: {keep % size} bytes, .* says {size}"
    ) as caught:
        SoftTargetStore.open(root, IDENTITY)
    assert "clkd teacher" in str(caught.value)


def test_a_missing_shard_is_refused_at_open(root):
    shard_path(root, 2).unlink()
    with pytest.raises(DamagedError, match=r"shard-00002\.targets\.safetensors: missing, .* promises 1 samples"):
        SoftTargetStore.open(root, IDENTITY)


def test_a_shard_that_vanishes_after_opening_is_an_error(root):
    store = SoftTargetStore.open(root, IDENTITY)
    shard_path(root, 0).unlink()
    with pytest.raises(DamagedError, match="cannot be read"):
        store.read("id-0-0")


@pytest.mark.parametrize("record", ["", "{}", "null", "{not json"])
def test_all_damaged_shards_are_named_together(root, record):
    shard_path(root, 0).unlink()
    record_path(root, 2).write_text(record)
    with pytest.raises(DamagedError, match=r"(?s)2 damaged shard.*shard-00000.*shard-00002"):
        SoftTargetStore.open(root, IDENTITY)


def test_exchanged_records_are_seen(root):
    one, two = record_path(root, 0), record_path(root, 1)
    raw = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(raw)
    with pytest.raises(DamagedError, match="describes shard 1, targets"):
        SoftTargetStore.open(root, IDENTITY)


def test_a_shard_of_another_store_is_seen(root, tmp_path):
    write_targets(open_writer(tmp_path / "other", teacher_weights="cc33"), 0, shard_samples(0))
    for path in (shard_path, record_path):
        shutil.copy(path(tmp_path / "other", 0), path(root, 0))
    with pytest.raises(DamagedError, match="another identity"):
        SoftTargetStore.open(root, IDENTITY)


def test_verify_sees_a_file_that_no_checksum_of_a_sample_covers(root):
    """A shard rewritten whole, with its index hash but not its file hash mended."""
    content = unsealed_json(LocalFolder(root), commit_name(0, "targets"))
    record_path(root, 0).write_bytes(sealed_json(content | {"xxh3_128": "0" * 32}))
    assert list(damaged_shards(root)) == [(0, "targets")]


# -- writing -----------------------------------------------------------------------------------------------


def test_a_damaged_shard_is_not_committed_and_can_be_written_again(root, written):
    flip(shard_path(root, 0), 100)
    writer = open_writer(root)
    whole, problems = writer.committed()
    assert whole == {1, 2}
    assert len(problems) == 1
    write_targets(writer, 0, shard_samples(0))
    assert contents(root) == contents(written)


def test_another_identity_is_refused_with_both_values(root, written):
    wanted = IDENTITY | {"teacher_weights": "dd44", "temperature": 2.0}
    for attempt in (lambda: SoftTargetStore.open(root, wanted), lambda: open_writer(root, **wanted)):
        with pytest.raises(StoreError) as caught:
            attempt()
        message = str(caught.value)
        assert "temperature: store 1.0, this run 2.0" in message
        assert "teacher_weights: store 'aa11', this run 'dd44'" in message
        assert "processor_tokenizer" not in message
    assert contents(root) == contents(written)


def test_an_unknown_codec_is_refused(tmp_path):
    open_writer(tmp_path, codec="packed8")
    with pytest.raises(StoreError, match=r"unknown codec 'packed8'; known here: \['compact', 'packed', 'sampled'\]"):
        SoftTargetStore.open(tmp_path, None)


def test_no_store_is_an_error_with_a_command(tmp_path):
    with pytest.raises(StoreError, match=r"no soft-target store; `clkd teacher"):
        SoftTargetStore.open(tmp_path, IDENTITY)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([("a", random_targets(2, VOCAB, TOP_K + 1))], "sample a: top_k is 9, the store's is 8"),
        ([("a", random_targets(2, VOCAB, TOP_K))] * 2, "occurs twice"),
        ([("a\nb", random_targets(2, VOCAB, TOP_K))], "without line breaks"),
    ],
)
def test_bad_samples_are_refused_before_anything_is_written(tmp_path, samples, message):
    writer = open_writer(tmp_path)
    with pytest.raises(StoreError, match=message):
        write_targets(writer, 0, samples)
    assert contents(tmp_path).keys() == {"manifest.json", "part-00000.json"}


@pytest.mark.parametrize("samples", [[], [("a", random_targets(2, VOCAB, TOP_K).rows(slice(0, 0)))]])
def test_shards_without_tokens(tmp_path, samples):
    write_targets(open_writer(tmp_path), 0, samples)
    assert [len(targets) for targets in read_all(tmp_path).values()] == [0] * len(samples)
    assert damaged_shards(tmp_path) == {}


# -- command line ------------------------------------------------------------------------------------------


def command(root, *arguments):
    recipe = root.parent / "recipe.yaml"
    recipe.write_text(f"run: {{dir: {root.parent}}}\ntargets: {{store: {root}}}\n")
    return clkd(["store", *arguments, str(recipe)])


def test_verify_and_discard(root, capsys):
    assert command(root, "verify") == 0
    assert "3 shard(s) whole, 0 damaged" in capsys.readouterr().out
    record = SoftTargetStore.open(root, IDENTITY).commits[1]
    flip(shard_path(root, 1), 8 * record.rec_begin + 3)  # a byte that opening does not read
    assert command(root, "verify") == 1
    assert "2 shard(s) whole, 1 damaged" in capsys.readouterr().out
    assert command(root, "verify", "--discard") == 1
    assert command(root, "verify") == 0
    assert open_writer(root).committed()[0] == {0, 2}


def test_stats(root, capsys):
    assert command(root, "stats") == 0
    out = capsys.readouterr().out
    entropy = torch.cat([targets.entropy for targets in SAMPLES.values()]).mean().item()
    assert f"entropy (nats)         {entropy:.3f}"[:-1] in out


def test_records_of_varying_size(tmp_path, capsys):
    samples = write_drawn(tmp_path / "store")
    store = SoftTargetStore.open(tmp_path / "store", None)
    assert damaged_shards(store.folder.path) == {}
    for sample_id, targets in samples.items():
        got = store.read(sample_id)
        assert got.sampled
        assert torch.equal(got.ids, targets.ids[:, : got.top_k])
        torch.testing.assert_close(got.logprobs, targets.logprobs[:, : got.top_k])
        torch.testing.assert_close(got.entropy, targets.entropy, rtol=1e-3, atol=1e-3)
    distinct = torch.cat([targets.logprobs.isfinite().sum(1) for targets in samples.values()]).float().mean()
    assert command(tmp_path / "store", "stats") == 0
    assert f"ids drawn              {distinct:.4f}" in capsys.readouterr().out
