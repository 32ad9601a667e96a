"""A small store: its identity, its samples, and ways to look at stores."""

import dataclasses

import torch

from pipeline.targets.container.writer import StoreWriter
from pipeline.targets.store import SoftTargetStore, write_targets
from tests.helpers.soft_targets import random_draws, random_targets

VOCAB, TOP_K = 700, 8
IDENTITY = {
    "codec": "packed",
    "top_k": TOP_K,
    "bits": 7,
    "vocab_size": VOCAB,
    "temperature": 1.0,
    "teacher_weights": "aa11",
    "processor_tokenizer": "bb22",
}
LENGTHS = ((3, 1, 9), (4, 0, 6), (2,))
"""Answer tokens of each sample of each shard."""


def shard_samples(shard):
    return [
        (f"id-{shard}-{row}", random_targets(length, VOCAB, TOP_K, seed=10 * shard + row))
        for row, length in enumerate(LENGTHS[shard])
    ]


SAMPLES = {sample_id: targets for shard in range(3) for sample_id, targets in shard_samples(shard)}


def read_all(root):
    store = SoftTargetStore.open(root, IDENTITY)
    return {sample_id: store.read(sample_id) for sample_id in store.sample_ids}


def assert_same(got, wanted):
    for field in dataclasses.fields(wanted):
        one, other = getattr(got, field.name), getattr(wanted, field.name)
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def contents(root):
    return {path.name: path.read_bytes() for path in root.iterdir()}


def write_drawn(root):
    samples = [(sample_id, random_draws(len(t), VOCAB, 20, seed=n)) for n, (sample_id, t) in enumerate(SAMPLES.items())]
    identity = {k: v for k, v in IDENTITY.items() if k not in ("top_k", "bits")} | {"codec": "sampled", "draws": 20}
    writer = StoreWriter(root, identity)
    write_targets(writer, 0, samples[:4])
    write_targets(writer, 1, samples[4:])
    return dict(samples)
