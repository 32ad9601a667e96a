"""`clkd hardness` on real files: the prior, a student's scores against one sample at a time, the page."""

import base64
import io
import re
import shutil
from html import unescape

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.benchmark import random_models
from pipeline.cli import main as clkd
from pipeline.errors import UserError
from pipeline.export import stage as export
from pipeline.hardness import scores as hardness_scores
from pipeline.hardness import stage as hardness
from pipeline.hardness.scores import Scorer, matching_layer, open_student
from pipeline.method import features
from pipeline.method.hardness import HardnessTable
from pipeline.models import loading
from pipeline.recipe import HardnessConfig, load_recipe
from pipeline.targets.container.writer import StoreWriter
from pipeline.targets.identity import dataset_fingerprint, expected_identity
from pipeline.targets.soft_targets import from_logits
from pipeline.targets.store import write_targets
from pipeline.teacher.stage import run_pass
from pipeline.training import checkpoint
from tests.helpers import recipes, single_rank, tiny
from tests.helpers.teacher_run import SAMPLES, SIZES, TARGETS, make_run, parts

TOP_K = 16


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A teacher's store with sketches, and a student of other weights; temperature 1."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            random_models, "VOCAB_MULTIPLE", 1
        )  # rows that are no tokens take mass in models without training
        return _make(tmp_path_factory.mktemp("hardness") / "run")


def _make(folder):
    run = make_run(folder)
    targets = TARGETS | {"temperature": 1.0, "sketches": {"layer": 1, "dim": 64}}
    chat = recipes.chat(run, "train", targets, random=["student"])
    recipe = load_recipe(recipes.write(run / "recipe.yaml", chat))
    processor = parts(recipe)[0]
    model = random_models.build(SIZES, processor, seed=1)
    model.model.language_model.norm.weight.data.mul_(30.0)
    loading.save_model(model, processor, run / "models" / "student")
    run_pass(recipe)
    return run


def opened(run, *overrides, student="models.student", gate=True, batch_size=4):
    """(the stage's inputs, a scorer)."""
    inputs = hardness.Run.open(load_recipe(run / "recipe.yaml", list(overrides)))
    made = open_student(inputs.recipe, student, inputs.processor)
    settings, distill = HardnessConfig(gate=gate), inputs.settings[1]
    scorer = Scorer(made, inputs.processor, inputs.store, inputs.sketches, inputs.recipe.data, settings, distill,
                    1.0, batch_size)  # fmt: skip
    return inputs, scorer


@torch.no_grad()
def by_hand(model, processor, sample, targets, gate=True):
    """(score, nats of each token as far as they count) of one sample alone, from Hugging Face's logits, in float64."""
    encoded = processor.encode(sample)
    ids = encoded.input_ids[None]
    logits = model(
        input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=encoded.pixel_values,
        image_grid_thw=encoded.image_grid_thw, mm_token_type_ids=(ids == processor.image_token_id).long(),
    ).logits[0]  # fmt: skip
    where = (encoded.labels >= 0).nonzero()[:, 0]
    log_q = logits[where - 1].double().log_softmax(-1)
    p, tail = targets.logprobs.double().exp(), targets.tail_logprob.double().exp()
    q = log_q.gather(-1, targets.ids)
    rest = torch.log(1 - q.exp().sum(-1))
    kl = (p * (targets.logprobs - q)).sum(-1) + torch.where(tail > 0, tail * (targets.tail_logprob - rest), 0.0)
    h = kl.clamp(0, 6)
    ce = -log_q[torch.arange(len(where)), encoded.labels[where]]
    if gate:
        h = h * (2 / (1 + (-(ce + targets.gold_logprob) - 2).exp())).clamp(max=1)
    hardest = h.sort(descending=True).values[: -(-len(h) // 5)]
    return float(0.5 * h.mean() + 0.5 * hardest.mean()), h


@pytest.mark.parametrize("gate", [True, False])
def test_scores_equal_one_sample_at_a_time(run, gate):
    inputs, scorer = opened(run, gate=gate)
    visits = dict(scorer.visits(inputs.samples))
    assert len(visits) == SAMPLES
    model = loading.load_model(run / "models" / "student")
    for sample in inputs.samples[::4]:
        score, h = by_hand(model, inputs.processor, sample, inputs.store.read(sample.sample_id), gate)
        visit = visits[sample.sample_id]
        torch.testing.assert_close(visit.chased_T.double(), h, rtol=1e-3, atol=2e-3)
        assert visit.score == pytest.approx(score, abs=1e-3)


def test_a_student_equal_to_its_teacher_has_nothing_hard(run):
    """Up to the codec's error in the stored targets; cells too, whose map is fitted."""
    inputs, scorer = opened(run, student="models.teacher")
    scorer.fit_map(inputs.samples, layer=1)
    visits = [visit for _, visit in scorer.visits(inputs.samples)]
    assert max(float(visit.kl_T.max()) for visit in visits) < 0.01
    assert max(visit.score for visit in visits) < 0.01
    assert max(float(visit.distance_C.max()) for visit in visits) < 0.01
    _, other = opened(run)
    others = [visit for _, visit in other.visits(inputs.samples)]
    assert np.mean([float(visit.kl_T.max()) for visit in others]) > 0.3  # the same measures see another student


# -- a teacher made by hand ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def constructed(run, tmp_path_factory):
    """A teacher equal to the student but for two tokens: right where the student is wrong, and the other way round.

    Returns (run folder, sample and token where the teacher is right, sample and token where it is wrong).
    """
    copy = tmp_path_factory.mktemp("constructed") / "run"
    shutil.copytree(run, copy)
    targets = TARGETS | {"temperature": 1.0, "store": str(copy / "by-hand")}
    chat = recipes.chat(copy, "train", targets, random=["student"])
    recipe = load_recipe(recipes.write(copy / "recipe.yaml", chat))
    processor, samples, _ = parts(recipe)
    model = loading.load_model(copy / "models" / "student")
    golds, logits = {}, {}
    for sample in samples:
        encoded = processor.encode(sample)
        ids = encoded.input_ids[None]
        where = (encoded.labels >= 0).nonzero()[:, 0]
        with torch.no_grad():
            out = model(
                input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=encoded.pixel_values,
                image_grid_thw=encoded.image_grid_thw, mm_token_type_ids=(ids == processor.image_token_id).long(),
            ).logits[0, where - 1, : processor.vocab_size]  # fmt: skip
        golds[sample.sample_id], logits[sample.sample_id] = encoded.labels[where], out.float()
    counts = torch.bincount(torch.cat(list(golds.values())), minlength=processor.vocab_size)
    places = [(i, t) for i, gold in golds.items() for t in range(len(gold))]
    loss = {(i, t): float(-logits[i][t].log_softmax(-1)[golds[i][t]]) for i, t in places}
    wrong = min(places, key=loss.__getitem__)  # the student knows this token best
    rare = next(p for p in places if counts[golds[p[0]][p[1]]] == 1 and p[0] != wrong[0] and loss[p] > 3)
    for (sample_id, token), right in ((rare, True), (wrong, False)):
        gold = int(golds[sample_id][token])
        row = torch.zeros(processor.vocab_size)
        row[gold if right else (gold + 1) % processor.vocab_size] = 12.0
        if not right:
            row[gold] = -12.0
        logits[sample_id][token] = row
    writer = StoreWriter(recipe.store_url, expected_identity(recipe, processor))
    for shard, ids in writer.plan(list(golds), 10, dataset_fingerprint(samples)).items():
        write_targets(writer, shard, [(i, from_logits(logits[i], golds[i], TOP_K, 1.0)) for i in ids])
    return copy, rare, wrong


def scored(run, *, gate):
    inputs, scorer = opened(run, gate=gate)
    visits = dict(scorer.visits(inputs.samples))
    ids = [sample.sample_id for sample in inputs.samples]
    table = HardnessTable(ids, ["chat"] * len(ids), np.array([visits[i].score for i in ids], np.float32))
    rank = table.percentile(step=0, half_life_steps=float("inf"))
    return visits, dict(zip(ids, rank.tolist(), strict=True))


def test_one_rare_token_that_the_student_gets_wrong_ranks_its_sample_hardest(constructed):
    run, (sample_id, token), _ = constructed
    visits, rank = scored(run, gate=True)
    assert max(rank, key=rank.__getitem__) == sample_id
    chased = visits[sample_id].chased_T
    assert int(chased.argmax()) == token and chased[token] > 3
    others = [float(h) for i, v in visits.items() for t, h in enumerate(v.chased_T) if (i, t) != (sample_id, token)]
    assert max(others) < 0.01


def test_a_wrong_teacher_is_not_chased(constructed):
    """Without the gate its sample ranks with the hardest; with it, it is as easy as those on which both agree."""
    run, (rare, _), (sample_id, token) = constructed
    visits, rank = scored(run, gate=False)
    assert visits[sample_id].kl_T[token] > 3
    assert set(sorted(rank, key=rank.__getitem__)[-2:]) == {rare, sample_id}
    visits, rank = scored(run, gate=True)
    assert visits[sample_id].teacher_ce_T[token] > visits[sample_id].ce_T[token] + 10
    assert visits[sample_id].kl_T[token] > 3 and visits[sample_id].chased_T[token] < 0.001
    assert visits[sample_id].score < 0.01


# -- the command -----------------------------------------------------------------------------------------------------


def command(run, *words):
    clkd(["hardness", str(run / "recipe.yaml"), *words])


def test_the_priors_table_is_kept_and_remade_for_another_teacher(run, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / "recipe.yaml").write_text((run / "recipe.yaml").read_text().replace(str(run), str(copy)))
    path, seen = copy / "hardness.parquet", []
    for teacher in ("models.teacher", "models.teacher", "models.student"):
        words = [f"targets.teacher={teacher}", f"targets.store={copy / teacher}"]
        run_pass(load_recipe(copy / "recipe.yaml", words))
        command(copy, *words)
        seen.append((path.stat().st_mtime_ns, HardnessTable.load(path).prior))
    assert seen[0][0] == seen[1][0]
    assert not np.array_equal(seen[1][1], seen[2][1])
    assert f"{SAMPLES} samples" in capsys.readouterr().out


def test_scoring_goes_on_where_it_was_stopped(run, tmp_path, monkeypatch, capsys):
    """Parts of 16 samples; the second has an image that cannot be read at first."""
    monkeypatch.setattr(hardness, "PART_SAMPLES", 16)
    whole, path = tmp_path / "whole.parquet", tmp_path / "scores.parquet"
    command(run, "--student", "models.student", "--out", str(whole))
    inputs, _ = opened(run)
    image = inputs.samples[20].images[0]
    hidden = image.with_suffix(".hidden")
    parts_written = path.with_suffix(".parts")
    theirs = Scorer.visits
    seen = []

    def counted(self, samples):
        for sample_id, visit in theirs(self, samples):
            seen.append(sample_id)
            yield sample_id, visit

    monkeypatch.setattr(Scorer, "visits", counted)
    scorer = opened(run)[1]
    hardness.scored_table(scorer, inputs.samples[:16], path, "other")  # of another origin: not to be taken over
    seen.clear()
    image.rename(hidden)
    try:
        with pytest.raises(UserError, match=image.name):
            command(run, "--student", "models.student", "--out", str(path))
    finally:
        hidden.rename(image)
    before = len(seen)
    command(run, "--student", "models.student", "--out", str(path))
    assert len(seen) == SAMPLES + before % 16
    assert np.array_equal(HardnessTable.load(path).prior, HardnessTable.load(whole).prior)
    assert not parts_written.exists()
    time = path.stat().st_mtime_ns
    command(run, "--student", "models.student", "--out", str(path))
    assert path.stat().st_mtime_ns == time
    assert f"hardness.table={path}" in capsys.readouterr().out


def test_a_table_of_scores_is_one_to_start_from(run, tmp_path):
    path = tmp_path / "scores.parquet"
    command(run, "--student", "models.student", "--out", str(path))
    table, (inputs, scorer) = HardnessTable.load(path), opened(run)
    visits = dict(scorer.visits(inputs.samples))
    ids = [sample.sample_id for sample in inputs.samples]
    assert table.is_of(ids)
    assert table.difficulty.tolist() == pytest.approx([visits[i].score for i in ids], abs=1e-6)
    assert np.array_equal(table.prior, table.difficulty)
    assert (table.visits == 0).all() and (table.last_step == -1).all()


def test_a_checkpoint_is_scored_with_its_own_map(run, tmp_path):
    """Logits of the model that was trained, cells through W and at its own layer; the score is of tokens alone."""
    recipe = load_recipe(run / "recipe.yaml")
    folder = recipe.model_dir("models.student")
    model = loading.load_model(folder)
    features.attach_map(model, 64, seed=5)
    engine = single_rank.engine(model, experts=False)
    template = export.template_files(folder, recipe.processor_dir)
    state = {"fingerprint": {"distill": {"features": {"student_layer": 2}}}}
    checkpoint.save(engine, tmp_path, 0, state, {}, 1, template)
    inputs, plain = opened(run)
    _, scorer = opened(run, student=str(tmp_path))
    assert (scorer.layer, scorer.has_fitted_map) == (2, False)
    assert torch.equal(scorer.map_RD, model.feature_map.weight.detach())
    tokens_alone = dict(plain.visits(inputs.samples))
    for sample_id, visit in scorer.visits(inputs.samples):
        torch.testing.assert_close(visit.kl_T, tokens_alone[sample_id].kl_T, rtol=1e-4, atol=1e-4)
        assert visit.distance_C.mean() == pytest.approx(0.5, abs=0.1)  # a map that was not trained
        assert visit.score == pytest.approx(tokens_alone[sample_id].score, abs=1e-4)


def test_a_student_that_is_not_there_is_refused(run):
    for ref, words in (("models.other", "no such model"), ("jobs.other", "does not exist"), ("/no", "does not exist")):
        with pytest.raises(UserError, match=words):
            command(run, "--student", ref)
    with pytest.raises(UserError, match="where training looks for it"):
        command(run, "--out", "x.parquet")


def test_layers_match_by_depth():
    assert [matching_layer(3, 8, layer) for layer in (0, 4, 6, 8)] == [0, 2, 2, 3]
    assert tiny.TEXT["hidden_size"] < hardness_scores.FIT_SAMPLES


@pytest.mark.parametrize("student", ["models.student", None])
def test_the_page_shows_images_tokens_and_cells(run, tmp_path, student):
    out = tmp_path / "page.html"
    command(run, "--inspect", "--count", "3", "--out", str(out), *(["--student", student] if student else []))
    html = out.read_text()
    inputs, scorer = opened(run)
    by_id = {sample.sample_id: sample for sample in inputs.samples}
    shown = re.findall(r"<code>([0-9a-f]{32})</code>", html)
    assert len(shown) == len(set(shown)) == 6
    if student:
        scores = {i: visit.score for i, visit in scorer.visits(inputs.samples)}
        ranked = sorted(scores.values())  # the scores: which of two equal samples comes first is the table's rounding
        assert [scores[i] for i in shown] == pytest.approx([*reversed(ranked[-3:]), *ranked[:3]], abs=1e-4)
    answers = [re.sub(r"<[^>]+>", "", part) for part in re.findall(r'<p class="answer">(.*?)</p>', html, re.S)]
    assert [unescape(answer) for answer in answers] == [by_id[i].answer + "¶" for i in shown]
    images = [image for i in shown for image in by_id[i].images]
    uris = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', html)
    assert [Image.open(io.BytesIO(base64.b64decode(u))).size for u in uris] == [Image.open(i).size for i in images]
    assert html.count('class="cell"') == (16 * len(images) if student else 0)
    assert html.count('class="ring"') == (3 * len(images) if student else 0)
    assert 'class="hard"' in html
