"""A thousand damages to a store with soft targets and sketches: each is reported, and no wrong number comes back."""

import dataclasses
import random

import pytest
import torch

from pipeline.errors import StoreError
from pipeline.targets import sketches
from pipeline.targets.container.folders import LocalFolder
from pipeline.targets.container.manifest import read_parts
from pipeline.targets.container.shards import commit_name, shard_name
from pipeline.targets.container.writer import StoreWriter
from pipeline.targets.sketches import Sketch, SketchStore
from pipeline.targets.store import SoftTargetStore, write_targets
from tests.helpers.soft_targets import random_targets

VOCAB, TOP_K, DIM = 700, 8, 64
IDENTITY = {
    "codec": "packed",
    "top_k": TOP_K,
    "bits": 7,
    "vocab_size": VOCAB,
    "teacher_weights": "aa11",
    "sketch_layer": 6,
    "sketch_dim": DIM,
    "sketch_seed": 0,
}
SAMPLES = [f"id-{number}" for number in range(9)]
STORES = (SoftTargetStore, SketchStore)
LAST_PART = "part-00001.json"


def sketch_of(number):
    values_NR = torch.randn(4 + number % 3, DIM, generator=torch.Generator().manual_seed(number))
    return Sketch(values_NR[:4], values_NR[4:])


def write(root):
    """Two parts, four shards, each with both kinds of files."""
    writer = StoreWriter(root, IDENTITY)
    writer.plan(SAMPLES[:5], 3, "of the tests")
    for shard, sample_ids in writer.plan(SAMPLES, 3, "of the tests, grown").items():
        numbers = [SAMPLES.index(sample_id) for sample_id in sample_ids]
        made = [(i, sketch_of(n)) for i, n in zip(sample_ids, numbers, strict=True)]
        rows = [(i, len(s.cells_CR) + len(s.tokens_TR), sketches.encode(s)) for i, s in made]
        writer.write_shard(shard, rows, "sketches")
        write_targets(writer, shard, [(SAMPLES[n], random_targets(1 + n, VOCAB, TOP_K, seed=n)) for n in numbers])


def same(got, wanted):
    pairs = [(getattr(got, field.name), getattr(wanted, field.name)) for field in dataclasses.fields(wanted)]
    return all(torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two for one, two in pairs)


class Damaged:
    """A store in a folder that is damaged and mended again and again."""

    def __init__(self, root):
        write(root)
        self.root = root
        self.files = {path.name: path.read_bytes() for path in root.iterdir()}
        self.opened = [store.open(root, IDENTITY) for store in STORES]
        self.values = [{i: store.read(i) for i in SAMPLES} for store in self.opened]

    def reports(self, changes):
        """How often a StoreError was raised with these files changed (None: deleted). Wrong values fail the test."""
        for name, raw in changes.items():
            self.put(name, raw)
        try:
            return self.read_everything()
        finally:
            for name in changes:
                self.put(name, self.files[name])

    def put(self, name, raw):
        if raw is None:
            (self.root / name).unlink()
        else:
            (self.root / name).write_bytes(raw)

    def read_everything(self):
        reports = self.attempt(lambda: read_parts(LocalFolder(self.root)))
        for kind, opened_before in zip(STORES, self.opened, strict=True):
            self.read_all(opened_before)  # need not see what it does not read
            opened = []
            reports += self.attempt(lambda kind=kind, opened=opened: opened.append(kind.open(self.root, IDENTITY)))
            for store in opened:
                reports += self.attempt(lambda store=store: store.require(SAMPLES, "of the tests"))
                reports += self.read_all(store)
        return reports

    def read_all(self, store):
        assert set(store.sample_ids) <= set(SAMPLES)
        return sum(self.attempt(lambda i=i: self.check(store, i)) for i in store.sample_ids)

    def check(self, store, sample_id):
        assert same(store.read(sample_id), self.values[STORES.index(type(store))][sample_id])

    @staticmethod
    def attempt(work):
        try:
            work()
        except StoreError:
            return 1
        return 0


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    return Damaged(tmp_path_factory.mktemp("damaged") / "store")


def test_the_undamaged_store_has_nothing_to_report(damaged):
    assert len(damaged.files) == 1 + 2 + 4 * 2 * 2
    assert damaged.reports({}) == 0


@pytest.mark.slow
@pytest.mark.parametrize("count", [150, pytest.param(750, marks=pytest.mark.nightly)])
def test_flipped_bits(damaged, count):
    """Spread evenly over the files: small ones and the few bytes of a header are hit too."""
    rng = random.Random(0)
    for _ in range(count):
        name = rng.choice(list(damaged.files))
        raw = bytearray(damaged.files[name])
        bit = rng.randrange(8 * len(raw))
        raw[bit // 8] ^= 1 << bit % 8
        assert damaged.reports({name: raw}), f"{name}, bit {bit}"


@pytest.mark.parametrize("count", [50, pytest.param(200, marks=pytest.mark.nightly)])
def test_truncated_files(damaged, count):
    rng = random.Random(1)
    for _ in range(count):
        name = rng.choice(list(damaged.files))
        length = rng.randrange(len(damaged.files[name]))
        assert damaged.reports({name: damaged.files[name][:length]}), f"{name}, {length} bytes"


def test_missing_files(damaged):
    """One to four at a time, among them a shard together with its record: its samples are missing then."""
    rng, pairs = random.Random(2), []
    for shard in range(4):
        pairs += [[shard_name(shard, kind), commit_name(shard, kind)] for kind in ("targets", "sketches")]
    chosen = pairs + [rng.sample(list(damaged.files), rng.randint(1, 4)) for _ in range(42)]
    for names in chosen:
        # The last part alone: the shards still hold its samples, and a plan is made anew.
        assert damaged.reports(dict.fromkeys(names)) or names == [LAST_PART], names
