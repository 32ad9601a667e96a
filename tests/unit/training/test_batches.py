from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipeline.data.sample import Sample, question
from pipeline.errors import StoreError
from pipeline.method.curriculum import rank_share
from pipeline.targets.container.writer import StoreWriter
from pipeline.targets.store import SoftTargetStore, write_targets
from pipeline.training.batches import MODEL_INPUTS, Request, assemble, by_length
from tests.helpers.stores import IDENTITY, SAMPLES, shard_samples

IDS = ("id-0-2", "id-0-1", "id-0-0")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    root = tmp_path_factory.mktemp("batches")
    write_targets(StoreWriter(root, IDENTITY), 0, shard_samples(0))
    return SoftTargetStore.open(root, IDENTITY)


def joined(store, alpha, answer_tokens):
    return assembled(store, alpha, answer_tokens).targets


def assembled(store, alpha, answer_tokens):
    labels_BS = torch.full((len(IDS), 12), -100)
    for row, tokens in enumerate(answer_tokens):
        labels_BS[row, 1 : 1 + tokens] = 5
    batch = {"labels": labels_BS, **dict.fromkeys(MODEL_INPUTS)}
    request = Request(np.arange(len(IDS)), np.array(alpha, np.float32))
    return assemble(request, [SimpleNamespace(sample_id=i, problem=None) for i in IDS], batch, store)


def test_targets_stand_in_the_order_of_the_batch(store):
    assert joined(store, (1, 1, 1), (9, 1, 3)).ids.tolist() == [
        row for sample_id in IDS for row in SAMPLES[sample_id].ids.tolist()
    ]


def test_a_released_sample_gets_rows_without_mass(store):
    targets, first, last = joined(store, (1, 0, 0.5), (9, 2, 3)), SAMPLES[IDS[0]], SAMPLES[IDS[2]]
    assert torch.equal(targets.ids[:9], first.ids) and torch.equal(targets.ids[11:], last.ids)
    assert (targets.logprobs[9:11] == -torch.inf).all()
    assert joined(store, (0, 0, 0), (9, 2, 3)) is None


def test_the_store_is_not_read_for_released_samples(tmp_path):
    """With the shards gone, whatever reads them fails."""
    write_targets(StoreWriter(tmp_path, IDENTITY), 0, shard_samples(0))
    store = SoftTargetStore.open(tmp_path, IDENTITY)
    assert [assembled(store, alpha, (9, 1, 3)).targets_read for alpha in ((1, 1, 1), (0, 0.1, 0))] == [3, 1]
    store = SoftTargetStore.open(tmp_path, IDENTITY)
    for shard in tmp_path.rglob("*.safetensors"):
        shard.unlink()
    released = assembled(store, (0, 0, 0), (9, 1, 3))
    assert released.targets is None and released.targets_read == 0
    with pytest.raises((OSError, StoreError)):
        assembled(store, (0, 0.1, 0), (9, 1, 3))


def test_another_number_of_answer_tokens_is_refused(store):
    with pytest.raises(StoreError, match="sample id-0-1: the store has 1 answer tokens, this run has 2"):
        joined(store, (1, 1, 1), (9, 2, 3))


def scene(number, images, characters):
    asked = characters // 3
    turns = question("?" * asked, images)
    return Sample(f"s{number}", (Path("x.png"),) * images, turns, "!" * (characters - asked), "chat", "unknown")


def scene_lengths(count):
    rng = np.random.default_rng(count)
    return [(int(n), int(c)) for n, c in zip(rng.integers(1, 3, count), rng.integers(3, 300, count), strict=True)]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_sorting_by_length_keeps_each_steps_samples_and_saves_padding(world):
    """The union over ranks is the step's batch as planned; a micro-step's samples are alike, on all ranks."""
    lengths = scene_lengths(200)
    samples = [scene(i, images, characters) for i, (images, characters) in enumerate(lengths)]
    batch = np.random.default_rng(0).permutation(200)[:96]
    size = np.array([1000 * images + characters for images, characters in lengths])

    def padded(order):
        shares = [rank_share(96, rank, world, 4) for rank in range(world)]
        micro = [[batch[order[p]] for p in share] for share in shares]
        assert sorted(np.concatenate([m for share in micro for m in share])) == sorted(batch)
        return sum(len(m) * size[m].max() for share in micro for m in share), micro

    plain, _ = padded(np.arange(96))
    ours, micro = padded(by_length(samples, batch))
    needed = size[batch].sum()
    assert ours - needed < (0.2 if world < 4 else 0.5) * (plain - needed)  # 96 samples in 24, 12, 8, 6 or 3 micro-steps
    for k in range(len(micro[0]) - 1):  # every rank's k-th is at most as long as every rank's next
        assert max(size[share[k]].max() for share in micro) <= min(size[share[k + 1]].min() for share in micro)


def test_equal_lengths_keep_the_planned_order():
    samples = [scene(i, 1, 30) for i in range(9)]
    assert by_length(samples, np.array([5, 2, 8, 0])).tolist() == [0, 1, 2, 3]
