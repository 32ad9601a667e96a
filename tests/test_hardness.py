import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pipeline import hardness
from pipeline.command_line import load_recipe
from pipeline.config import HardnessConfig
from pipeline.data import Sample
from pipeline.errors import CheckpointError, UserError
from pipeline.hardness import HardnessTable, describe, instance_scores, prior_table, teacher_prior
from pipeline.records import RecordWriter
from pipeline.target_store import write_targets
from pipeline.targets import from_logits

FOREVER = float("inf")


def make_table(num_samples=60, seed=0, strata=("general", "region", "suggestion")):
    prior = np.random.default_rng(seed).random(num_samples).astype(np.float32)
    return HardnessTable(
        [f"s{i:04d}" for i in range(num_samples)], [strata[i % len(strata)] for i in range(num_samples)], prior
    )


def rank_by_hand(values, strata):
    """Percentile within each stratum by counting, one sample at a time."""
    ranks = []
    for i, (value, stratum) in enumerate(zip(values, strata, strict=True)):
        peers = [(v, j) for j, (v, s) in enumerate(zip(values, strata, strict=True)) if s == stratum]
        ranks.append((sum(p < (value, i) for p in peers) + 0.5) / len(peers))
    return np.array(ranks, np.float32)


# -- scores of a visit -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tail_weight", "tail_share"), [(0.5, 0.2), (0.0, 0.2), (1.0, 0.35), (0.3, 1.0)])
def test_instance_scores_equal_a_loop_over_samples(tail_weight, tail_share):
    generator = torch.Generator().manual_seed(0)
    owner = torch.randint(6, (97,), generator=generator)
    owner[owner == 4] = 5  # sample 4 has no tokens
    h = torch.rand(97, generator=generator)
    scores = instance_scores(h, owner, 7, tail_weight=tail_weight, tail_share=tail_share)
    for sample in range(7):
        own = sorted((float(x) for x, o in zip(h, owner, strict=True) if o == sample), reverse=True)
        tail = own[: -(-len(own) * round(tail_share * 100) // 100)]  # ceil in whole numbers
        expected = (1 - tail_weight) * np.mean(own) + tail_weight * np.mean(tail) if own else 0.0
        assert float(scores[sample]) == pytest.approx(expected, abs=1e-6)


def test_one_rare_hard_token_is_not_averaged_away():
    easy = torch.zeros(20)
    rare = easy.clone()
    rare[7] = 1.0
    owner = torch.zeros(20, dtype=torch.int64)
    plain, pooled = (float(instance_scores(rare, owner, 1, tail_weight=k, tail_share=0.05)[0]) for k in (0.0, 0.5))
    assert plain == pytest.approx(0.05)
    assert pooled == pytest.approx(0.525)


def test_a_score_does_not_depend_on_the_rest_of_the_batch():
    h, owner = torch.rand(50, generator=torch.Generator().manual_seed(1)), torch.arange(50) % 5
    together = instance_scores(h, owner, 5, tail_weight=0.5, tail_share=0.2)
    for sample in range(5):
        own = h[owner == sample]
        alone = instance_scores(own, torch.zeros(len(own), dtype=torch.int64), 1, tail_weight=0.5, tail_share=0.2)
        assert torch.equal(alone[0], together[sample])


# -- prior -------------------------------------------------------------------------------------------------------


def soft_targets(sharpness, gold, tokens=12):
    logits = torch.randn(tokens, 30, generator=torch.Generator().manual_seed(2)) * sharpness
    best = logits.argmax(-1)
    return from_logits(logits, best if gold == "best" else (best + 1) % 30, 4, 1.0)


def test_prior_grows_with_the_teachers_doubt_and_with_its_errors():
    settings = HardnessConfig()
    sure, unsure, wrong = soft_targets(80.0, "best"), soft_targets(1.0, "best"), soft_targets(80.0, "other")
    priors = [teacher_prior(t, settings) for t in (sure, unsure, wrong)]
    assert 0 <= priors[0] < 0.3 < priors[1] < 1
    assert priors[2] > priors[0] + 0.3


def test_prior_by_hand():
    targets = soft_targets(1.5, "other")
    halves = [np.sqrt(1 - np.exp(-x.double().numpy())) for x in (targets.entropy, -targets.gold_logprob)]
    h = np.sort((halves[0] + halves[1]) / 2)[::-1]
    expected = 0.5 * h.mean() + 0.5 * h[:3].mean()  # the hardest fifth of 12 tokens, rounded up
    assert teacher_prior(targets, HardnessConfig()) == pytest.approx(expected, abs=1e-6)


# -- the table ---------------------------------------------------------------------------------------------------


def test_a_sample_never_visited_has_its_prior():
    table = make_table()
    table.update(np.array([3, 5]), np.array([0.9, 0.1], np.float32), step=7, ema=0.7)
    untouched = np.setdiff1d(np.arange(60), [3, 5])
    assert np.array_equal(table.difficulty[untouched], table.prior[untouched])
    assert table.visits.sum() == 2
    assert table.last_step[3] == 7
    assert np.all(table.last_step[untouched] == -1)


def test_update_is_a_running_mean_that_the_first_score_starts():
    table = make_table()
    for step, score in enumerate((0.8, 0.4, 0.2)):
        table.update(np.array([4]), np.array([score], np.float32), step, ema=0.7)
    assert table.difficulty[4] == pytest.approx(0.7 * (0.7 * 0.8 + 0.3 * 0.4) + 0.3 * 0.2)
    assert (table.visits[4], table.last_step[4]) == (3, 2)


def test_update_does_not_depend_on_which_rank_saw_what():
    rng = np.random.default_rng(3)
    index, scores = rng.integers(0, 60, 40), rng.random(40).astype(np.float32)  # some samples repeat
    tables = []
    for _ in range(5):
        order = rng.permutation(40)
        table = make_table()
        table.update(np.arange(60), np.full(60, 0.5, np.float32), 0, ema=0.7)
        table.update(index[order], scores[order], 1, ema=0.7)
        tables.append(table.difficulty)
    assert all(np.array_equal(tables[0], other) for other in tables[1:])
    repeated = np.flatnonzero(np.bincount(index) > 1)[0]
    assert tables[0][repeated] == pytest.approx(0.35 + 0.3 * scores[index == repeated].mean(), abs=1e-6)


def test_a_visit_without_a_score_counts_and_changes_nothing_else():
    table = make_table()
    table.update(np.array([2, 9]), np.array([np.nan, 0.6], np.float32), 5, ema=0.7)
    assert table.visits[[2, 9]].tolist() == [1, 1]
    assert table.difficulty[2] == table.prior[2]
    assert table.last_step[[2, 9]].tolist() == [-1, 5]
    table.update(np.array([2]), np.array([0.9], np.float32), 6, ema=0.7)
    assert table.difficulty[2] == pytest.approx(0.9)  # the first score, although the second visit


def test_no_visits_at_all_is_fine():
    table = make_table()
    table.update(np.zeros(0, np.int64), np.zeros(0, np.float32), 0, ema=0.7)
    assert table.visits.sum() == 0


# -- percentiles -------------------------------------------------------------------------------------------------


def test_percentile_equals_counting_within_the_stratum():
    table = make_table(num_samples=50)
    table.prior[10:20] = table.difficulty[10:20] = 0.5  # ties go by sample_id
    strata = [table.strata[c] for c in table.stratum]
    assert np.array_equal(table.percentile(step=0, half_life_steps=10.0), rank_by_hand(table.prior, strata))


def test_hardness_does_not_measure_the_stratum():
    """One task scores twice as high throughout: its samples are not all "hard"."""
    table = make_table(num_samples=300)
    table.prior[table.stratum == 1] += 2.0
    table.difficulty = table.prior.copy()
    rank = table.percentile(step=0, half_life_steps=FOREVER)
    for code in range(3):
        assert rank[table.stratum == code].mean() == pytest.approx(0.5)


def test_entries_relax_half_way_to_their_stratums_mean_in_a_half_life():
    table = make_table(num_samples=4, strata=("all",))
    table.update(np.arange(4), np.array([0.1, 0.2, 0.3, 1.0], np.float32), 0, ema=0.7)
    table.update(np.array([0]), np.array([0.1], np.float32), 20, ema=0.7)  # 0 is fresh, the others 20 steps old
    relaxed = table._relaxed(step=20, half_life_steps=20.0)
    assert relaxed == pytest.approx([0.1, 0.3, 0.35, 0.7])  # mean 0.4


def test_seen_easy_samples_do_not_outrank_unseen_hard_ones_while_the_student_is_weak():
    """A novice scores 1 above every prior; what the prior ranks last must not become "easy" by not being visited."""
    table = make_table(num_samples=200, strata=("all",))
    before = table.percentile(step=0, half_life_steps=FOREVER)
    easy = np.flatnonzero(before <= 0.3)
    table.update(easy, table.prior[easy] + 1, 1, ema=0.7)
    assert table.difficulty[easy].min() > np.median(table.difficulty)  # raw values do mislead
    after = table.percentile(step=1, half_life_steps=FOREVER)
    assert np.abs(after - before).max() < 0.02
    assert np.array_equal(table.prior, make_table(num_samples=200).prior)


# -- files and checkpoints ---------------------------------------------------------------------------------------


def test_a_saved_table_is_read_back_exactly(tmp_path):
    table = make_table()
    table.update(np.array([3, 5]), np.array([0.9, 0.1], np.float32), 7, ema=0.7)
    table.save(tmp_path / "hardness.parquet")
    loaded = HardnessTable.load(tmp_path / "hardness.parquet")
    for name in ("stratum", "prior", "difficulty", "visits", "last_step"):
        assert np.array_equal(getattr(loaded, name), getattr(table, name)), name
    assert (loaded.sample_ids, loaded.strata) == (table.sample_ids, table.strata)
    columns = {"sample_id", "hardness", "rank", "visits", "last_step", "stratum", "prior"}
    assert set(pq.read_table(tmp_path / "hardness.parquet").column_names) == columns
    assert [p.name for p in tmp_path.iterdir()] == ["hardness.parquet"]


def test_a_checkpoints_arrays_restore_the_table():
    table, other = make_table(), make_table()
    table.update(np.array([3, 5]), np.array([0.9, 0.1], np.float32), 7, ema=0.7)
    other.load_arrays(table.arrays())
    for step in (8, 30):
        expected = table.percentile(step=step, half_life_steps=10.0)
        assert np.array_equal(other.percentile(step=step, half_life_steps=10.0), expected)
    table.update(np.array([3]), np.array([0.2], np.float32), 8, ema=0.7)
    assert other.visits[3] == 1  # a copy, not a view


def test_a_checkpoint_of_another_data_set_is_refused():
    with pytest.raises(CheckpointError, match="has 60 samples, this run's has 61"):
        make_table(61).load_arrays(make_table(60).arrays())


def test_missing_and_broken_tables_say_what_to_do(tmp_path):
    path = tmp_path / "hardness.parquet"
    with pytest.raises(UserError, match=r"no hardness table. Make it with `python -m pipeline.hardness`"):
        HardnessTable.load(path)
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match="not a hardness table"):
        HardnessTable.load(path)


def test_ids_out_of_order_are_refused():
    with pytest.raises(ValueError, match="ascending and distinct"):
        HardnessTable(["b", "a"], ["x", "x"], np.zeros(2, np.float32))


# -- the stage ---------------------------------------------------------------------------------------------------


def make_samples(num_samples=20):
    return [
        Sample(
            f"s{i:04d}",
            (),
            f"question {i}",
            f"answer {i}",
            ("general", "region")[i % 2],
            "corner" if i >= 16 else "regular",
        )
        for i in range(num_samples)
    ]


def write_store(root, samples, doubt):
    """A store in which the later samples make the teacher doubt `doubt` times as much."""
    identity = {"codec": "packed", "bits": 7, "top_k": 4, "vocab_size": 30, "doubt": doubt}
    writer = RecordWriter(root, identity)
    targets = [(s.sample_id, soft_targets(20.0 / (1 + doubt * i), "best")) for i, s in enumerate(samples)]
    write_targets(writer, 0, targets)
    return hardness.SoftTargetStore.open(root, None)


def test_prior_table_ranks_what_the_teacher_doubts(tmp_path):
    samples = make_samples()
    table = prior_table(samples, write_store(tmp_path, samples, 0.5), HardnessConfig())
    assert table.strata == ["general", "region"]
    rank = table.percentile(step=0, half_life_steps=FOREVER)
    assert np.corrcoef(rank, np.arange(20))[0, 1] > 0.9
    text = describe(table, samples)
    assert "20 samples; general: 10, region: 10" in text
    assert "corner cases: 20.0% of all, 100.0% of the hardest decile" in text
    assert text.count("hardest 0.") == 3
    assert text.count("easiest 0.") == 3
    assert "question 19" in text


def test_the_stage_remakes_a_table_of_another_teacher(tmp_path, monkeypatch, capsys):
    samples, recipe = make_samples(), tmp_path / "recipe.yaml"
    recipe.write_text(f"run: {{dir: {tmp_path / 'run'}}}\n")
    assert load_recipe(recipe).run.dir == tmp_path / "run"
    stores = {doubt: write_store(tmp_path / f"store{doubt}", samples, doubt) for doubt in (1, 4)}
    monkeypatch.setattr(hardness, "read_samples", lambda *_: samples)
    path, seen = tmp_path / "run" / "hardness.parquet", []
    for doubt in (1, 1, 4):
        monkeypatch.setattr(hardness, "_store", lambda *_, doubt=doubt: stores[doubt])
        hardness.main(["--config", str(recipe)])
        seen.append((path.stat().st_mtime_ns, HardnessTable.load(path).prior))
    assert seen[0][0] == seen[1][0]  # kept
    assert not np.array_equal(seen[1][1], seen[2][1])  # made again
    assert "20 samples" in capsys.readouterr().out
