"""The teacher pass in the ways people run it: sketches, growing data, object stores, launchers, large teachers."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from pipeline.cli import main as clkd
from pipeline.data.collate import collate
from pipeline.errors import ConfigError, DataError, StoreError
from pipeline.recipe import SketchConfig, load_recipe
from pipeline.targets.container.folders import LocalFolder, folder_at
from pipeline.targets.identity import expected_identity
from pipeline.targets.sketches import SketchStore, projection
from pipeline.targets.store import SoftTargetStore
from pipeline.teacher.forward import batch_outputs
from pipeline.teacher.stage import run_pass
from tests.helpers import ranks
from tests.helpers.object_store import s3_bucket
from tests.helpers.paths import ROOT
from tests.helpers.stores import contents
from tests.helpers.teacher_run import SAMPLES, alone, elsewhere, make_run, parts


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("teacher") / "run")


@pytest.fixture(scope="module")
def finished(run):
    """An undisturbed pass."""
    recipe = load_recipe(run / "recipe.yaml")
    run_pass(recipe)
    return recipe


# -- sketches ----------------------------------------------------------------------------------------------


@torch.no_grad()
def reference_features(model, processor, sample, layer):
    """Hugging Face's own hidden states of one unpadded sample, pooled by hand: (cells [C, D], tokens [T, D]).

    Those are what a layer gave; before the next one reads them, Qwen3-VL adds deepstack features at image tokens.
    """
    encoded = processor.encode(sample)
    ids = encoded.input_ids[None]
    hidden = model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=encoded.pixel_values,
        image_grid_thw=encoded.image_grid_thw,
        mm_token_type_ids=(ids == processor.image_token_id).long(),
        output_hidden_states=True,
    ).hidden_states[layer][0]
    seen = model.model.visual(encoded.pixel_values, encoded.image_grid_thw)
    if 0 < layer <= min(len(seen.deepstack_features), model.config.text_config.num_hidden_layers - 1):
        hidden[encoded.input_ids == processor.image_token_id] += seen.deepstack_features[layer - 1]
    image, cells = hidden[encoded.input_ids == processor.image_token_id], []
    for height, width in (encoded.image_grid_thw[:, 1:] // 2).tolist():
        grid, image = image[: height * width].view(height, width, -1), image[height * width :]
        for row in range(4):
            for column in range(4):
                top, bottom = row * height // 4, -(-(row + 1) * height // 4)
                left, right = column * width // 4, -(-(column + 1) * width // 4)
                cells.append(grid[top:bottom, left:right].flatten(0, 1).mean(0))
    assert not len(image)
    answer = (encoded.labels >= 0).nonzero()[:, 0]
    return torch.stack(cells), hidden[answer - 1]


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_sketches_are_projections_of_hugging_faces_hidden_states(run, tmp_path, layer):
    """Layer 2 of 2 is what the LM head reads."""
    recipe = elsewhere(run, tmp_path / "store", f"targets.sketches={{layer: {layer}, dim: 64, seed: 5}}")
    assert run_pass(recipe).samples == SAMPLES
    processor, samples, model = parts(recipe)
    identity = expected_identity(recipe, processor)
    store, targets = (reader.open(recipe.store_url, identity) for reader in (SketchStore, SoftTargetStore))
    matrix = projection(32, SketchConfig(layer=layer, dim=64, seed=5))
    for sample in samples[::3]:
        cells, tokens = reference_features(model, processor, sample, layer)
        got = store.read(sample.sample_id)
        assert len(got.tokens_TR) == len(targets.read(sample.sample_id)) == len(tokens)
        for sketch, features in ((got.cells_CR, cells), (got.tokens_TR, tokens)):
            exact = features @ matrix
            assert (sketch - exact).norm() < 0.01 * exact.norm()


def test_sketches_leave_the_soft_targets_as_they_are(run, finished, tmp_path):
    recipe = elsewhere(run, tmp_path / "store", "targets.sketches={layer: 1}")
    run_pass(recipe)
    one, other = SoftTargetStore.open(recipe.store_url, None), SoftTargetStore.open(finished.store_url, None)
    for sample_id in other.sample_ids:
        assert (one.read_record(sample_id)[0] == other.read_record(sample_id)[0]).all()


def test_a_lost_sketch_file_is_rebuilt(run, tmp_path):
    recipe = elsewhere(run, tmp_path / "store", "targets.sketches={layer: 1}")
    run_pass(recipe)
    before = contents(tmp_path / "store")
    (tmp_path / "store" / "shard-00002.sketches.json").unlink()
    assert run_pass(recipe).shards == 1
    assert contents(tmp_path / "store") == before


def test_cosines_survive_the_sketch():
    """Johnson-Lindenstrauss: standard deviation about (1 - cos^2) / sqrt(r)."""
    torch.manual_seed(0)
    features = torch.randn(400, 1024)
    partner = 0.6 * features + 0.8 * torch.randn(400, 1024)
    matrix = projection(1024, SketchConfig(layer=0, dim=128))
    exact = F.cosine_similarity(features, partner)
    sketched = F.cosine_similarity(features @ matrix, partner @ matrix)
    error = sketched - exact
    assert abs(error.mean()) < 0.02
    assert error.std() < 1.3 * (1 - 0.36) / 128**0.5


def test_a_layer_that_the_teacher_lacks_is_refused(run, tmp_path):
    with pytest.raises(ConfigError, match=r"targets\.sketches\.layer is 3, but the teacher has 2 decoder layers"):
        run_pass(elsewhere(run, tmp_path / "store", "targets.sketches={layer: 3}"))


def test_an_identity_with_other_sketches_is_refused(run, tmp_path):
    run_pass(elsewhere(run, tmp_path / "store", "targets.sketches={layer: 1}"))
    with pytest.raises(StoreError, match="sketch_layer: store 1, this run 2"):
        run_pass(elsewhere(run, tmp_path / "store", "targets.sketches={layer: 2}"))


# -- data --------------------------------------------------------------------------------------------------


def test_more_data_extend_the_store(run, finished, tmp_path):
    """First 25 samples, then all of them: the first shards stay, and every sample has its targets."""
    run = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("store"))
    recipe = load_recipe(run / "recipe.yaml", [f"run.dir={run}", f"data.root={run / 'data'}"])
    lines = (run / "data" / "train.jsonl").read_text().splitlines(keepends=True)
    (run / "data" / "train.jsonl").write_text("".join(lines[:25]))
    assert run_pass(recipe).samples == 25
    before = contents(run / "store")
    (run / "data" / "train.jsonl").write_text("".join(lines))
    grown = run_pass(recipe)
    assert (grown.samples, grown.skipped) == (16, 3)
    after = contents(run / "store")
    assert {name: after[name] for name in before} == before
    store, whole = SoftTargetStore.open(recipe.store_url, None), SoftTargetStore.open(finished.store_url, None)
    assert sorted(store.sample_ids) == whole.sample_ids
    for sample_id in whole.sample_ids:
        assert torch.equal(store.read(sample_id).ids[:, 0], whole.read(sample_id).ids[:, 0])


def test_long_answers_are_cut_and_counted_if_asked(run, tmp_path):
    everything = [processor_of(run).encode(sample) for sample in samples_of(run)]
    lengths = [len(encoded.input_ids) for encoded in everything]
    limit = max(int((encoded.labels < 0).sum()) for encoded in everything) + 3
    with pytest.raises(DataError, match=rf"data\.max_length allows {limit}"):
        run_pass(elsewhere(run, tmp_path / "refused", f"data.max_length={limit}"))
    recipe = elsewhere(run, tmp_path / "store", f"data.max_length={limit}", "data.long_answers=cut")
    summary = run_pass(recipe)
    assert summary.cut_tokens == sum(max(0, length - limit) for length in lengths) > 0
    assert f"{summary.cut_tokens} answer tokens CUT" in str(summary)
    processor, samples, model = parts(recipe)
    store = SoftTargetStore.open(recipe.store_url, expected_identity(recipe, processor))
    sample = samples[lengths.index(max(lengths))]
    got = store.read(sample.sample_id)
    uncut = parts(load_recipe(run / "recipe.yaml"))[0]
    gold, log_p = alone(model, uncut, sample)
    assert len(got) == len(gold) - (max(lengths) - limit)
    torch.testing.assert_close(
        got.gold_logprob, log_p.gather(-1, gold[:, None])[: len(got), 0], rtol=1e-3, atol=1e-3, check_dtype=False
    )
    with pytest.raises(StoreError, match=rf"processor_max_length: store '{limit}', this run None"):
        run_pass(elsewhere(run, tmp_path / "store"))


def processor_of(run):
    return parts(load_recipe(run / "recipe.yaml"))[0]


def samples_of(run):
    return parts(load_recipe(run / "recipe.yaml"))[1]


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_are_the_same_whatever_side_is_padded(finished, side):
    """One and two images, several lengths in one batch; the reference is each sample alone."""
    processor, samples, model = parts(finished)
    by_images = {n: [sample for sample in samples if len(sample.images) == n] for n in (1, 2)}
    chosen = [*by_images[1][:4], *by_images[2][:3]]
    assert len(chosen) == 7
    batch = collate([processor.encode(s) for s in chosen], processor.pad_id, processor.image_token_id)
    if side == "left":
        lengths = batch["attention_mask"].sum(1)
        for key in ("input_ids", "attention_mask", "labels", "mm_token_type_ids"):
            batch[key] = torch.stack([row.roll(len(row) - int(n)) for row, n in zip(batch[key], lengths, strict=True)])
    outputs = batch_outputs(model, batch, finished.targets, processor.vocab_size)
    for sample in chosen:
        gold, log_p = alone(model, processor, sample)
        expected = log_p.gather(-1, gold[:, None])[:, 0]
        got = outputs.targets[sample.sample_id].gold_logprob
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4, check_dtype=False)


def test_stats_say_what_the_store_covers(run, finished, tmp_path, capsys):
    run = shutil.copytree(run, tmp_path / "run")
    lines = (run / "data" / "train.jsonl").read_text().splitlines(keepends=True)
    more = json.loads(lines[0]) | {
        "messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    }
    (run / "data" / "train.jsonl").write_text("".join(lines[4:]) + json.dumps(more) + "\n")
    overrides = [f"run.dir={run}", f"data.root={run / 'data'}"]
    assert clkd(["store", "stats", str(run / "recipe.yaml"), *overrides]) == 0
    out = capsys.readouterr().out
    assert f"coverage               {SAMPLES - 4} of {SAMPLES - 3} samples" in out
    assert "beyond it              4 samples" in out
    store = SoftTargetStore.open(finished.store_url, None)
    tail = torch.cat([store.read(i).tail_logprob.exp() for i in store.sample_ids])
    share = ((tail <= 0.05) & (tail > 0.01)).float().mean()
    row = next(line for line in out.splitlines() if ">= 0.95" in line)
    assert f" {100 * share:.1f} %" in row
    assert sum(float(line.split("%")[0].split()[-1]) for line in out.splitlines() if " % " in line) == pytest.approx(
        100, abs=0.5
    )


def test_inspect_shows_the_answer_beside_its_targets(finished, capsys):
    processor, samples, model = parts(finished)
    sample = samples[2]
    config = [str(finished.run.dir / "recipe.yaml")]
    assert clkd(["store", "inspect", "--sample", sample.sample_id, *config]) == 0
    out = capsys.readouterr().out
    assert f"prompt: {sample.prompt}" in out and f"answer: {sample.answer}" in out and str(sample.images[0]) in out
    gold, log_p = alone(model, processor, sample)
    rows = [line for line in out.splitlines() if "  H " in line]
    assert len(rows) == len(gold)
    for row, token, log_p_V in zip(rows, processor.tokenizer.convert_ids_to_tokens(gold.tolist()), log_p, strict=True):
        chance = 100 * log_p_V[processor.tokenizer.convert_tokens_to_ids(token)].exp()
        shown = row.split(" | ")[0].rsplit(maxsplit=1)
        assert repr(token) in shown[0] and abs(float(shown[1]) - chance) < 0.2


# -- where and how -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_workers_share_a_pass_into_an_object_store(run, finished, tmp_path):
    with s3_bucket() as bucket:
        url = f"{bucket}/targets"
        words = ("teacher", run / "recipe.yaml", f"targets.store={url}", "--json", tmp_path / "{worker}.json")
        workers = [ranks.start(ranks.clkd, *words, "--worker", i, "--workers", 2) for i in range(2)]
        assert [worker.wait().returncode for worker in workers] == [0, 0]
        summaries = [json.loads((tmp_path / f"{i}.json").read_text()) for i in range(2)]
        assert sum(summary["samples"] for summary in summaries) == SAMPLES
        remote, local = folder_at(url), LocalFolder(Path(finished.store_url))
        assert {n: remote.read(n) for n in remote.names()} == {n: local.read(n) for n in local.names()}


@pytest.mark.slow
def test_accelerate_launch_numbers_the_workers(run, finished, tmp_path):
    store = tmp_path / "store"
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
        "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
        "-m", "pipeline", "teacher", str(run / "recipe.yaml"), f"targets.store={store}",
        "--json", str(tmp_path / "{worker}.json"),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=240)
    assert done.returncode == 0
    summaries = [json.loads((tmp_path / f"{i}.json").read_text()) for i in range(2)]
    assert sum(summary["samples"] for summary in summaries) == SAMPLES
    assert contents(store) == contents(Path(finished.store_url))


def test_a_teacher_spread_over_devices_gives_the_same(run, finished, tmp_path):
    """accelerate's hooks move weights in and out of one device: the disk here, cards elsewhere."""
    devices = {
        "model.visual": "cpu",
        "model.language_model.embed_tokens": "cpu",
        "model.language_model.rotary_emb": "cpu",
        "model.language_model.layers.0": "cpu",
        "model.language_model.layers.1": "disk",
        "model.language_model.norm": "cpu",
        "lm_head": "cpu",
    }
    recipe = elsewhere(run, tmp_path / "store", f"targets.device_map={json.dumps(devices)}")
    assert run_pass(recipe).samples == SAMPLES
    one, other = SoftTargetStore.open(recipe.store_url, None), SoftTargetStore.open(finished.store_url, None)
    for sample_id in other.sample_ids:
        torch.testing.assert_close(one.read(sample_id).entropy, other.read(sample_id).entropy, rtol=2e-3, atol=2e-3)


def test_a_teacher_in_bfloat16_is_as_near_as_transformers_in_bfloat16(run, finished, tmp_path):
    """To the float32 model, in the log-probs of the answers' tokens; and the store says what it is."""
    recipe = elsewhere(run, tmp_path / "store", "targets.dtype=bfloat16")
    run_pass(recipe)
    one, other = SoftTargetStore.open(recipe.store_url, None), SoftTargetStore.open(finished.store_url, None)
    assert (one.identity["dtype"], other.identity["dtype"]) == ("bfloat16", "float32")
    processor, samples, model = parts(finished)
    rounded = parts(finished)[2].to(torch.bfloat16)
    errors = {"ours": [], "theirs": []}
    for sample in samples[::3]:
        gold, exact = alone(model, processor, sample)
        exact, theirs = (
            log_p.gather(-1, gold[:, None])[:, 0] for log_p in (exact, alone(rounded, processor, sample)[1])
        )
        errors["ours"].append(one.read(sample.sample_id).gold_logprob - exact)
        errors["theirs"].append(theirs - exact)
    ours, theirs = (torch.cat(parts).abs().mean() for parts in errors.values())
    assert 0 < ours < 1.25 * theirs
