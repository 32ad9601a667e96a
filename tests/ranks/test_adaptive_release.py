"""A release that follows the gap to the teacher, trained: against transformers and the store, resumed, on two ranks."""

import pytest
import torch
from transformers import Qwen3VLMoeForConditionalGeneration

from pipeline.data.collate import collate
from pipeline.data.processor import Processor
from pipeline.data.readers import read_samples
from pipeline.method.hardness import HardnessTable
from pipeline.recipe import load_recipe
from pipeline.targets.store import SoftTargetStore
from pipeline.training.batches import MODEL_INPUTS
from pipeline.training.validation_gap import hold_out
from tests.helpers.recipes import ADAPTIVE, BATCH, STEPS, WINDOW
from tests.helpers.training import (
    ONE_RANK,
    copied,
    interrupt,
    losses,
    metrics,
    same_weights,
    saved_step,
    train,
    weights,
)


@pytest.fixture
def run(prepared, tmp_path):
    return copied(prepared, tmp_path / "run", **ADAPTIVE)


@pytest.fixture(scope="module")
def adaptive(prepared, tmp_path_factory):
    """A finished job on one rank."""
    run = copied(prepared, tmp_path_factory.mktemp("adaptive") / "run", **ADAPTIVE)
    train(run, **ONE_RANK)
    return run


def release_of(run):
    return [metrics(run, key) for key in ("alpha_min", "alpha_max", "gap_left", "targets_read")]


def test_the_gap_is_what_transformers_and_the_store_say(adaptive):
    """Before the first step: every held-out sample by itself through transformers' model, against the stored log p."""
    recipe = load_recipe(adaptive / "recipe.yaml")
    processor = Processor.load(recipe.processor_dir, recipe.data)
    model = Qwen3VLMoeForConditionalGeneration.from_pretrained(adaptive / "models" / "moe", dtype=torch.float32)
    store = SoftTargetStore.open(recipe.store_url, None)
    trained, held = hold_out(read_samples("coda_lm", recipe.data_root, "Train"), 9, recipe.run.seed)
    student, teacher, tokens = 0.0, 0.0, 0
    for sample in held:
        batch = collate([processor.encode(sample)], processor.pad_id, processor.image_token_id)
        with torch.no_grad():
            logits = model(**{k: batch[k] for k in MODEL_INPUTS}).logits[0, :-1]
        labels = batch["labels"][0, 1:]
        student += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
        teacher -= float(store.read(sample.sample_id).gold_logprob.double().sum())
        tokens += int((labels != -100).sum())
    assert metrics(adaptive, "gap")[0] == pytest.approx((student - teacher) / tokens, abs=1e-5)
    left = metrics(adaptive, "gap_left")
    assert left[0] == left[1] == 1 and left[2] == left[3] and left[4] == left[5] and left == sorted(left, reverse=True)
    assert 0 < left[-1] < left[2] < 1
    assert all(64 * share == round(64 * share) for share in left)
    table = HardnessTable.load(adaptive / "jobs" / "clkd" / "hardness.parquet")
    assert table.is_of([s.sample_id for s in trained])
    assert table.visits.sum() == -(-STEPS // WINDOW) * WINDOW * BATCH  # of whole windows
    assert (table.last_step == -1).all()  # not dynamic: nothing was scored, and yet visits count


def test_it_resumes_bit_for_bit(run, adaptive):
    interrupt(run, after=3, ranks=1)
    assert 3 <= saved_step(run) < STEPS
    train(run, **ONE_RANK)
    assert release_of(run) == release_of(adaptive)
    assert metrics(run, "gap") == metrics(adaptive, "gap")
    assert same_weights(weights(run), weights(adaptive))


def test_it_is_the_same_on_two_ranks(run, adaptive):
    """Nine held-out samples: one rank has five, the other four and a filler."""
    train(run)
    assert release_of(run) == release_of(adaptive)
    assert metrics(run, "gap") == pytest.approx(metrics(adaptive, "gap"), abs=1e-5)
    assert losses(run) == pytest.approx(losses(adaptive), rel=1e-5)
