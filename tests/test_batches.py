from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_store import IDENTITY, SAMPLES, shard_samples

from pipeline.batches import MODEL_INPUTS, Request, assemble
from pipeline.errors import StoreError
from pipeline.records import RecordWriter
from pipeline.target_store import SoftTargetStore, write_targets

IDS = ("id-0-2", "id-0-1", "id-0-0")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    root = tmp_path_factory.mktemp("batches")
    write_targets(RecordWriter(root, IDENTITY), 0, shard_samples(0))
    return SoftTargetStore.open(root, IDENTITY)


def joined(store, alpha, answer_tokens):
    labels_BS = torch.full((len(IDS), 12), -100)
    for row, tokens in enumerate(answer_tokens):
        labels_BS[row, 1 : 1 + tokens] = 5
    batch = {"labels": labels_BS, **dict.fromkeys(MODEL_INPUTS)}
    request = Request(np.arange(len(IDS)), np.array(alpha, np.float32))
    return assemble(request, [SimpleNamespace(sample_id=i) for i in IDS], batch, store).targets


def test_targets_stand_in_the_order_of_the_batch(store):
    assert joined(store, (1, 1, 1), (9, 1, 3)).ids.tolist() == [
        row for sample_id in IDS for row in SAMPLES[sample_id].ids.tolist()
    ]


def test_a_released_sample_gets_rows_without_mass(store):
    targets, first, last = joined(store, (1, 0, 0.5), (9, 2, 3)), SAMPLES[IDS[0]], SAMPLES[IDS[2]]
    assert torch.equal(targets.ids[:9], first.ids) and torch.equal(targets.ids[11:], last.ids)
    assert (targets.logprobs[9:11] == -torch.inf).all()
    assert joined(store, (0, 0, 0), (9, 2, 3)) is None


def test_another_number_of_answer_tokens_is_refused(store):
    with pytest.raises(StoreError, match="sample id-0-1: the store has 1 answer tokens, this run has 2"):
        joined(store, (1, 1, 1), (9, 2, 3))
