import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.data.sample import Sample, question
from pipeline.errors import CheckpointError, UserError
from pipeline.hardness.stage import describe, prior_table
from pipeline.method.hardness import HardnessTable, decay
from pipeline.method.pooling import instance_scores, teacher_prior
from pipeline.recipe import HardnessConfig
from pipeline.targets.container.writer import StoreWriter
from pipeline.targets.soft_targets import from_logits
from pipeline.targets.store import SoftTargetStore, write_targets

FOREVER = float("inf")


def make_table(num_samples=60, seed=0, strata=("general", "region", "suggestion")):
    prior = np.random.default_rng(seed).random(num_samples).astype(np.float32)
    return HardnessTable(
        [f"s{i:04d}" for i in range(num_samples)], [strata[i % len(strata)] for i in range(num_samples)], prior
    )


def rank_by_hand(values, strata):
    """Percentile within each stratum by counting, one sample at a time; values in 65,536 steps of the range."""
    ranks = []
    for value, stratum in zip(values, strata, strict=True):
        peers = [float(v) for v, s in zip(values, strata, strict=True) if s == stratum]
        low, width = min(peers), max(max(peers) - min(peers), 65535e-5)
        codes = [int((v - low) * (65535 / width) + 0.5) for v in [*peers, float(value)]]
        own = codes.pop()
        ranks.append((sum(c < own for c in codes) + sum(c == own for c in codes) / 2) / len(peers))
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
    assert (table.last_step >= 0).sum() == 2
    assert table.last_step[3] == 7
    assert np.all(table.last_step[untouched] == -1)


def test_update_is_a_running_mean_that_the_first_score_starts():
    table = make_table()
    for step, score in enumerate((0.8, 0.4, 0.2)):
        table.update(np.array([4]), np.array([score], np.float32), step, ema=0.7)
    assert table.difficulty[4] == pytest.approx(0.7 * (0.7 * 0.8 + 0.3 * 0.4) + 0.3 * 0.2)
    assert table.last_step[4] == 2


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


def test_no_score_changes_nothing():
    table = make_table()
    table.update(np.array([2, 9]), np.array([np.nan, 0.6], np.float32), 5, ema=0.7)
    assert table.difficulty[2] == table.prior[2]
    assert table.last_step[[2, 9]].tolist() == [-1, 5]
    table.update(np.array([2]), np.array([0.9], np.float32), 6, ema=0.7)
    assert table.difficulty[2] == pytest.approx(0.9)


def test_draws_are_visits_and_visits_do_not_wrap():
    table = make_table()
    table.draw(np.array([3, 5, 3]), 4)
    assert table.visits[[3, 4, 5]].tolist() == [2, 0, 1]
    assert table.last_window[[3, 4, 5]].tolist() == [4, -1, 4]
    table.visits[3] = 65534
    table.draw(np.array([3, 3, 3]), 5)
    assert table.visits[3] == 65535


def test_no_visits_at_all_is_fine():
    table = make_table()
    table.update(np.zeros(0, np.int64), np.zeros(0, np.float32), 0, ema=0.7)
    assert (table.last_step == -1).all()


# -- percentiles -------------------------------------------------------------------------------------------------


def test_percentile_equals_counting_within_the_stratum():
    table = make_table(num_samples=50)
    table.prior[10:20] = table.difficulty[10:20] = 0.5
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


def relaxed_by_hand(table, step, half_life):
    """METHOD section 4, one sample at a time."""
    columns = table.difficulty, table.prior, table.last_step, table.stratum
    rows = [(float(d), float(p), int(t), int(s)) for d, p, t, s in zip(*columns, strict=True)]
    values = []
    for d, p, t, stratum in rows:
        peers = [r for r in rows if r[3] == stratum]
        scored = [(a, b) for a, b, last, _ in peers if last >= 0]
        ratio = sum(a for a, _ in scored) / sum(b for _, b in scored) if scored else 1.0
        mean = np.mean([a if last >= 0 else b * ratio for a, b, last, _ in peers])
        keep = 0.5 ** ((step - t) / half_life) if t >= 0 else 1.0
        values.append(keep * d + (1 - keep) * mean if t >= 0 else p * ratio)
    return values


@pytest.mark.parametrize("seed", range(5))
def test_percentile_equals_the_method_by_hand(seed):
    rng, table = np.random.default_rng(seed), make_table(num_samples=80, seed=seed)
    for step in range(30):
        index = rng.choice(60, 4)
        table.update(index, rng.random(4).astype(np.float32), step, ema=0.7)
    values = relaxed_by_hand(table, 30, 9.0)
    strata = [table.strata[c] for c in table.stratum]
    assert np.array_equal(table.percentile(step=30, half_life_steps=9.0), rank_by_hand(values, strata))


def test_stale_entries_give_way_to_fresh_ones():
    """0.9 and 0.6, mean 0.4625: when 0.9 is two half-lives old it counts as 0.57, below a fresh 0.6."""
    table = make_table(num_samples=4, strata=("all",))
    table.update(np.arange(4), np.array([0.05, 0.3, 0.6, 0.9], np.float32), 0, ema=0.7)
    table.update(np.array([2]), np.array([0.6], np.float32), 20, ema=0.7)
    assert table.percentile(step=20, half_life_steps=FOREVER).tolist() == [0.125, 0.375, 0.625, 0.875]
    assert table.percentile(step=20, half_life_steps=10.0).tolist() == [0.125, 0.375, 0.875, 0.625]


def test_scores_from_a_later_step_than_this_count_as_fresh():
    """A table that another job scored."""
    table, fresh = make_table(), make_table()
    scores = np.random.default_rng(3).random(60).astype(np.float32)
    table.update(np.arange(60), scores, 900, ema=0.7)
    fresh.update(np.arange(60), scores, 2, ema=0.7)
    assert np.array_equal(table.percentile(step=2, half_life_steps=5.0), fresh.percentile(step=2, half_life_steps=5.0))


def test_rounding_does_not_rank():
    """Scores of a student that is nearly its teacher, once with the noise of another number of ranks."""
    scores = np.repeat(np.array([2e-4, 3e-4, 4e-4], np.float32), 20)
    noise = np.random.default_rng(0).normal(0, 2e-8, 60).astype(np.float32)
    tables = [make_table(strata=("all",)) for _ in range(2)]
    for table, seen in zip(tables, (scores, scores + noise), strict=True):
        table.update(np.arange(60), seen, 1, ema=0.7)
    ranks = [table.percentile(step=1, half_life_steps=FOREVER) for table in tables]
    assert np.array_equal(*ranks) and len(set(ranks[0].tolist())) == 3


def test_decay_halves_in_a_half_life():
    assert decay(40, 10.0)[[0, 10, 20, 40]] == pytest.approx([1, 0.5, 0.25, 0.0625], rel=1e-14)
    assert decay(3, FOREVER).tolist() == [1.0] * 4


def test_equals_share_a_percentile():
    table = HardnessTable(list("abcd"), ["x"] * 4, np.array([0.2, 0.5, 0.5, 0.9], np.float32))
    assert table.percentile(step=0, half_life_steps=1.0).tolist() == [0.125, 0.5, 0.5, 0.875]
    same = HardnessTable(list("abc"), ["x"] * 3, np.full(3, 0.3, np.float32))
    assert same.percentile(step=0, half_life_steps=1.0).tolist() == [0.5] * 3


def test_seen_easy_samples_do_not_outrank_unseen_hard_ones_while_the_student_is_weak():
    """A novice scores 4 times every prior; what the prior ranks last must not become "easy" by not being visited."""
    table = make_table(num_samples=200, strata=("all",))
    before = table.percentile(step=0, half_life_steps=FOREVER)
    easy = np.flatnonzero(before <= 0.3)
    table.update(easy, 4 * table.prior[easy], 1, ema=0.7)
    assert table.difficulty[easy].max() > table.difficulty.max() - 0.1  # raw values do mislead
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
    assert loaded.strata == table.strata
    assert loaded.is_of([f"s{i:04d}" for i in range(60)]) and table.is_of([f"s{i:04d}" for i in range(60)])
    assert not loaded.is_of([f"s{i:04d}" for i in range(1, 61)]) and not loaded.is_of([f"s{i:04d}" for i in range(59)])
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
    assert other.last_step[3] == 7  # a copy, not a view
    older = {k: v for k, v in table.arrays().items() if k != "hardness/last_window"}
    with pytest.raises(CheckpointError, match="no hardness/last_window: an older version"):
        other.load_arrays(older)


def test_a_checkpoint_of_another_data_set_is_refused():
    with pytest.raises(CheckpointError, match="has 60 samples, this run's has 61"):
        make_table(61).load_arrays(make_table(60).arrays())


def test_missing_and_broken_tables_say_what_to_do(tmp_path):
    path = tmp_path / "hardness.parquet"
    with pytest.raises(UserError, match=r"no hardness table. Make it with `clkd hardness RECIPE.yaml`"):
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
            question(f"question {i}", 0),
            f"answer {i}",
            ("general", "region")[i % 2],
            "corner" if i >= 16 else "regular",
        )
        for i in range(num_samples)
    ]


def write_store(root, samples, doubt):
    """A store in which the later samples make the teacher doubt `doubt` times as much."""
    identity = {"codec": "packed", "bits": 7, "top_k": 4, "vocab_size": 30, "doubt": doubt}
    writer = StoreWriter(root, identity)
    targets = [(s.sample_id, soft_targets(20.0 / (1 + doubt * i), "best")) for i, s in enumerate(samples)]
    write_targets(writer, 0, targets)
    return SoftTargetStore.open(root, None)


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
