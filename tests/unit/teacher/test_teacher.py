import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.cli import main as clkd
from pipeline.data.collate import collate
from pipeline.errors import ConfigError, StoreError, UserError
from pipeline.recipe import load_recipe
from pipeline.targets.container.leases import LEASE_S, ShardLeases, lease_name
from pipeline.targets.container.shards import shard_name
from pipeline.targets.identity import expected_identity
from pipeline.targets.store import SoftTargetStore
from pipeline.teacher import forward, shard_pass
from pipeline.teacher.forward import batch_outputs, head_logits
from pipeline.teacher.stage import run_pass
from tests.helpers import ranks
from tests.helpers.ranks import Running
from tests.helpers.stores import contents
from tests.helpers.teacher_run import SAMPLES, TOP_K, alone, elsewhere, make_run, parts, write_recipe


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("teacher") / "run")


@pytest.fixture(scope="module")
def finished(run):
    """The store of an uninterrupted pass by one worker."""
    recipe = load_recipe(run / "recipe.yaml")
    summary = run_pass(recipe)
    assert (summary.shards, summary.skipped, summary.samples) == (5, 0, SAMPLES)
    return recipe


def test_a_padded_batch_gives_each_sample_what_it_gets_alone(finished, monkeypatch):
    processor, samples, model = parts(finished)
    chosen = samples[:7]
    encoded = [processor.encode(sample) for sample in chosen]
    assert len({len(e.input_ids) for e in encoded}) > 4
    rows = []
    monkeypatch.setattr(forward, "head_logits", lambda *given: (rows.append(len(given[1])), head_logits(*given))[1])
    batch = collate(encoded, processor.pad_id, processor.image_token_id)
    targets = list(batch_outputs(model, batch, finished.targets, processor.vocab_size).targets.values())
    assert sum(rows) == sum(len(t) for t in targets)  # the full [B, S, V] never existed
    for sample, got in zip(chosen, targets, strict=True):
        gold, log_p = alone(model, processor, sample)
        order = log_p.argsort(dim=-1, descending=True)
        assert (log_p.gather(-1, got.ids) - log_p.gather(-1, order[:, :TOP_K])).abs().max() < 1e-4
        close = {"rtol": 1e-4, "atol": 1e-4, "check_dtype": False}
        torch.testing.assert_close(got.logprobs, log_p.gather(-1, got.ids), **close)
        torch.testing.assert_close(got.tail_logprob, log_p.gather(-1, order[:, TOP_K:]).logsumexp(-1), **close)
        torch.testing.assert_close(got.gold_logprob, log_p.gather(-1, gold[:, None])[:, 0], **close)
        torch.testing.assert_close(got.entropy, -(log_p.exp() * log_p).sum(-1), **close)


def test_the_stage_stores_every_sample_under_its_id_within_the_codec(finished):
    processor, samples, model = parts(finished)
    store = SoftTargetStore.open(Path(finished.store_url), expected_identity(finished, processor))
    assert store.sample_ids == [sample.sample_id for sample in samples]
    error, tokens = 0.0, 0
    for sample in samples:
        gold, log_p = alone(model, processor, sample)
        got = store.read(sample.sample_id)
        assert len(got) == len(gold)
        torch.testing.assert_close(
            got.gold_logprob, log_p.gather(-1, gold[:, None])[:, 0], rtol=1e-3, atol=1e-3, check_dtype=False
        )
        head = log_p.gather(-1, got.ids)
        tail = log_p.scatter(-1, got.ids, float("-inf")).logsumexp(-1)
        kl = (head.exp() * (head - got.logprobs)).sum(-1) + tail.exp() * (tail - got.tail_logprob)
        error, tokens = error + kl.sum().item(), tokens + len(gold)
    assert -1e-6 < error / tokens < 5e-5
    assert sum(record.rows for record in store.commits) == tokens


def test_sampled_targets_are_draws_from_the_teacher(run, finished, tmp_path):
    """Whatever the batches: each token's counts are its probabilities times the draws, rounded down or up."""
    recipe = elsewhere(run, tmp_path / "store", "targets.codec=sampled", "targets.draws=40")
    assert run_pass(recipe).samples == SAMPLES
    again = elsewhere(run, tmp_path / "again", "targets.codec=sampled", "targets.draws=40", "targets.batch_size=3")
    assert run_pass(again).samples == SAMPLES
    processor, samples, model = parts(recipe)
    identity = expected_identity(recipe, processor)
    assert "top_k" not in identity and identity["draws"] == 40
    store = SoftTargetStore.open(Path(recipe.store_url), identity)
    other = SoftTargetStore.open(Path(again.store_url), identity)
    for sample in samples:
        gold, log_p = alone(model, processor, sample)
        got = store.read(sample.sample_id)
        assert got.sampled and len(got) == len(gold)
        counts = torch.zeros_like(log_p).scatter_add(-1, got.ids, got.logprobs.double().exp() * 40)
        assert (counts - 40 * log_p.exp()).abs().max() < 1.02
        entropy = -(log_p.exp() * log_p).sum(-1)
        torch.testing.assert_close(got.entropy, entropy, rtol=1e-3, atol=1e-3, check_dtype=False)
        # Logits of other batches differ in the last bit, which a draw on the edge between two tokens may notice.
        assert torch.equal(other.read(sample.sample_id).ids[:, 0], got.ids[:, 0])


@pytest.mark.parametrize("codec", ["compact", "sampled"])
def test_people_can_look_at_every_codec(run, tmp_path, capsys, codec):
    recipe = elsewhere(run, tmp_path / "store", f"targets.codec={codec}")
    run_pass(recipe)
    overrides = [str(run / "recipe.yaml"), f"targets.store={tmp_path / 'store'}"]
    assert clkd(["store", "inspect", *overrides]) == 0
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if line.startswith("   0  H"))
    shares = [float(part.rsplit(" ", 1)[1]) for part in row.split("  | ")[1].split("  ")]
    assert shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 100.3
    assert clkd(["store", "stats", *overrides]) == 0
    assert ("ids drawn" if codec == "sampled" else "tail mass") in capsys.readouterr().out


def test_a_second_run_has_nothing_to_do(finished, capsys):
    before = contents(Path(finished.store_url))
    clkd(["teacher", str(finished.run.dir / "recipe.yaml")])
    assert "nothing to do, 5 shard(s) are committed" in capsys.readouterr().out
    assert contents(Path(finished.store_url)) == before


def test_inspect_shows_the_most_probable_tokens(finished, capsys):
    processor, samples, model = parts(finished)
    chosen = samples[3]
    config = str(finished.run.dir / "recipe.yaml")
    assert clkd(["store", "inspect", config, "--sample", chosen.sample_id]) == 0
    out = capsys.readouterr().out
    assert f"5 shard(s), {SAMPLES} of {SAMPLES} samples" in out
    best = alone(model, processor, chosen)[1][0].argmax().item()
    row = next(line for line in out.splitlines() if line.startswith("   0  H"))
    assert row.split("  | ")[1].startswith(repr(processor.tokenizer.convert_ids_to_tokens(best)))


def hold(root: Path, *shards: int) -> None:
    """Leases of a worker on another node that lives."""
    root.mkdir()
    for shard in shards:
        (root / lease_name(shard)).write_text(json.dumps({"host": "another-node", "pid": 1}))


def test_a_worker_leaves_what_others_hold_and_takes_it_over_when_they_are_gone(run, finished, tmp_path):
    recipe = elsewhere(run, tmp_path / "store", "data.workers=1")
    hold(Path(recipe.store_url), 1, 4)
    first = run_pass(recipe, worker=1, workers=3)
    assert (first.shards, first.elsewhere) == (3, 2)
    assert {path.name for path in Path(recipe.store_url).glob("shard-*.json")} == {
        f"shard-0000{n}.targets.json" for n in (0, 2, 3)
    }
    (Path(recipe.store_url) / lease_name(4)).unlink()  # given back, not done
    long_ago = time.time() - 2 * LEASE_S
    os.utime((Path(recipe.store_url) / lease_name(1)), (long_ago, long_ago))
    second = run_pass(recipe, worker=0, workers=7)
    assert (second.shards, second.skipped, second.elsewhere) == (2, 3, 0)
    assert contents(Path(recipe.store_url)) == contents(Path(finished.store_url)), "no lease is left either"


def test_a_worker_takes_its_own_share_first(run, finished, tmp_path, monkeypatch):
    order: list[int] = []
    claim = ShardLeases.claim
    monkeypatch.setattr(ShardLeases, "claim", lambda self, shard: order.append(shard) or claim(self, shard))
    run_pass(elsewhere(run, tmp_path / "store"), worker=1, workers=2)
    assert order == [1, 3, 0, 2, 4]


@pytest.mark.slow
def test_workers_at_the_same_time_write_each_shard_once(run, finished, tmp_path):
    store = tmp_path / "store"
    workers = [start_worker(run, store, i, 3, "--json", tmp_path / f"{i}.json") for i in range(3)]
    assert [worker.wait().returncode for worker in workers] == [0, 0, 0]
    summaries = [json.loads((tmp_path / f"{i}.json").read_text()) for i in range(3)]
    assert sum(summary["shards"] for summary in summaries) == 5
    assert sum(summary["samples"] for summary in summaries) == SAMPLES
    assert contents(store) == contents(Path(finished.store_url))


def test_a_damaged_shard_is_rebuilt(run, finished, tmp_path, capsys):
    recipe = elsewhere(run, tmp_path / "store")
    shutil.copytree(Path(finished.store_url), Path(recipe.store_url))
    (Path(recipe.store_url) / shard_name(3, "targets")).write_bytes(b"torn")
    assert run_pass(recipe).shards == 1
    assert "rebuilding: " in capsys.readouterr().out
    assert contents(Path(recipe.store_url)) == contents(Path(finished.store_url))


def retrain(run: Path) -> None:
    path = run / "models" / "teacher" / "model.safetensors"
    weights = load_file(path)
    name = next(iter(weights))
    weights[name] = weights[name] + 1e-3
    save_file(weights, path, metadata={"format": "pt"})


def reword(run: Path) -> None:
    path = run / "data" / "train.jsonl"
    path.write_text(path.read_text().replace("Give a driving", "Give one driving"))


@pytest.mark.parametrize(
    ("change", "overrides", "field"),
    [
        (retrain, [], "teacher_weights"),
        (None, ["targets.temperature=1.0"], "temperature: store 2.0, this run 1.0"),
        (None, ["targets.matmul_precision=medium"], "matmul_precision: store 'highest', this run 'medium'"),
        (None, ["targets.top_k=8"], "top_k: store 16, this run 8"),
        (None, ["targets.bits=8"], "bits: store 7, this run 8"),
        (None, ["targets.codec=sampled", "targets.draws=9"], "draws: store None, this run 9"),
        (None, ["data.max_pixels=4096"], "processor_image_processor"),
    ],
)
def test_a_store_of_another_origin_is_not_extended(finished, tmp_path, change, overrides, field):
    run = shutil.copytree(finished.run.dir, tmp_path / "run")
    if change:
        change(run)
    recipe = load_recipe(write_recipe(run), overrides)
    before = contents(Path(recipe.store_url))
    with pytest.raises(StoreError, match=field):
        run_pass(recipe)
    assert contents(Path(recipe.store_url)) == before


@pytest.mark.parametrize(("given", "wanted"), [([], "highest"), (["targets.matmul_precision=high"], "high")])
def test_targets_are_computed_as_the_store_says_whatever_the_run_trains_with(run, tmp_path, monkeypatch, given, wanted):
    seen = []
    theirs = shard_pass.batch_outputs
    monkeypatch.setattr(
        shard_pass,
        "batch_outputs",
        lambda *rest: (seen.append(torch.get_float32_matmul_precision()), theirs(*rest))[1],
    )
    recipe = elsewhere(run, tmp_path / "store", "run.matmul_precision=medium", *given)
    try:
        run_pass(recipe)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(seen) == {wanted}
    assert SoftTargetStore.open(recipe.store_url, None).identity["matmul_precision"] == wanted


def test_a_teacher_that_gives_nan_writes_nothing(finished):
    processor, samples, model = parts(finished)
    model.model.language_model.norm.weight.data[3] = float("nan")
    batch = collate([processor.encode(samples[0])], processor.pad_id, processor.image_token_id)
    with pytest.raises(StoreError, match=f"not finite.*{samples[0].sample_id}"):
        batch_outputs(model, batch, finished.targets, processor.vocab_size)


def test_user_errors(run, tmp_path):
    with pytest.raises(UserError, match="there is no teacher"):
        run_pass(elsewhere(run, tmp_path / "store", f"targets.teacher={tmp_path}"))
    with pytest.raises(ConfigError, match="--worker 2 must lie in"):
        run_pass(elsewhere(run, tmp_path / "store"), worker=2, workers=2)
    assert not (tmp_path / "store").exists()


@pytest.mark.slow
@pytest.mark.parametrize("wanted_kills", [12, pytest.param(50, marks=pytest.mark.nightly)])
def test_killed_at_random_moments_no_sample_is_lost_doubled_or_torn(run, finished, tmp_path, wanted_kills):
    """Two workers at a time, each killed (-9) at a random moment of its life, until so many kills hit a living one."""
    reference = {path.name: path.read_bytes() for path in smaller_shards(run, tmp_path / "reference")}
    rng, kills, found, rounds = random.Random(0), 0, set(), 0

    def start(store: Path, worker: int) -> Running:
        return start_worker(run, store, worker, 2, "targets.shard_samples=3")

    def committed(store: Path) -> int:
        return len(list(store.glob("shard-*.json")))

    def kill(worker: Running, store: Path) -> bool:
        """After up to two more commits, and a moment on top; False if it had ended before."""
        wanted = committed(store) + rng.randrange(3)
        while worker.alive() and committed(store) < wanted:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05 if wanted else 1))
        worker.signal(signal.SIGKILL)
        return worker.wait().statuses == (-signal.SIGKILL,)

    while kills < wanted_kills:
        store = tmp_path / f"store-{rounds}"
        rounds += 1
        while kills < wanted_kills and committed(store) < 10:
            for worker in [start(store, worker) for worker in range(2)]:
                kills += kill(worker, store)
            found.add(committed(store))
        assert start(store, 0).wait().returncode == 0
        assert contents(store) == reference, f"round {rounds}, {kills} kills"
    assert len(found) > wanted_kills / 10, f"the kills hit workers in several states, got {found}"


def start_worker(run: Path, store: Path, worker: int, workers: int, *words: object) -> Running:
    """The real stage in a process of its own."""
    mine = ("--worker", worker, "--workers", workers)
    return ranks.start(ranks.clkd, "teacher", run / "recipe.yaml", f"targets.store={store}", *mine, *words)


def smaller_shards(run: Path, store: Path) -> list[Path]:
    """Files of an undisturbed pass by one worker with three samples a shard."""
    assert run_pass(elsewhere(run, store, "targets.shard_samples=3")).shards == 14
    return list(store.iterdir())
