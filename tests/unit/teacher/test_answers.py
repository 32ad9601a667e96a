"""The teacher answers questions: what it says, what the store and training make of it."""

import dataclasses
import json
import pickle
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.cli import main as clkd
from pipeline.cluster import status
from pipeline.data.collate import collate
from pipeline.data.index.samples import from_pool, select, sizes, words
from pipeline.data.processor import Processor
from pipeline.data.readers import read_samples
from pipeline.data.sample import LABELLED, POOL
from pipeline.data.splits import open_split
from pipeline.errors import ConfigError, DataError, StoreError
from pipeline.models.generation import Drawn
from pipeline.models.loading import load_model
from pipeline.recipe import load_recipe
from pipeline.targets.answers import AnswerStore, answer_ids
from pipeline.targets.identity import dataset_fingerprint
from pipeline.targets.pool import chats_path, open_questions, open_training_samples
from pipeline.targets.sketches import SketchStore
from pipeline.targets.store import SoftTargetStore
from pipeline.teacher.stage import run_pass
from tests.helpers import pool_run
from tests.helpers.pool_run import ANSWERS, QUESTIONS, recipe_of
from tests.helpers.pool_run import LABELLED as GOLD
from tests.helpers.stores import contents

MOST = ANSWERS["max_new_tokens"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return pool_run.make(tmp_path_factory.mktemp("pool") / "run")


@pytest.fixture(scope="module")
def finished(run):
    """The undisturbed pass of one worker."""
    recipe = recipe_of(run)
    summary = run_pass(recipe)
    assert (summary.samples, summary.answered) == (GOLD + QUESTIONS, QUESTIONS)
    return recipe


def elsewhere(run, folder, *overrides):
    """The same data and teacher with a run folder of its own."""
    for name in ("models", "processor", "data"):
        (folder / name).symlink_to(run / name)
    return recipe_of(run, f"run.dir={folder}", *overrides)


def processor_of(recipe):
    return Processor.load(recipe.processor_dir, recipe.data)


def answers_of(recipe):
    store = AnswerStore.open(recipe.store_url, None)
    return {sample_id: store.read(sample_id) for sample_id in store.sample_ids}


def opened(recipe):
    return open_training_samples(recipe, processor_of(recipe))


def generated(model, processor, sample):
    """transformers' own greedy answer to one unpadded prompt: its text, and whether it has ended."""
    prompt = collate([processor.encode_prompt(sample)], processor.pad_id, processor.image_token_id, side="left")
    inputs = {k: v for k, v in prompt.items() if isinstance(v, torch.Tensor) and k != "labels"}
    stops = [processor.eos_id, processor.pad_id]
    out = model.generate(**inputs, do_sample=False, max_new_tokens=MOST, eos_token_id=stops, pad_token_id=0)
    tokens = out[0, inputs["input_ids"].shape[1] :].tolist()
    said = [token for token in tokens if token not in stops]
    return processor.decode(said).strip(), len(said) < len(tokens)


# -- what is said ------------------------------------------------------------------------------------------------------


def test_greedy_answers_are_those_of_transformers(finished):
    processor, model = processor_of(finished), load_model(finished.model_dir(finished.teacher))
    asked = [s for s in open_split(finished, "train") if s.source == POOL]
    found = answers_of(finished)
    assert list(found) == [s.sample_id for s in asked] and len(asked) == QUESTIONS
    kinds = Counter((bool(a.text), a.finished) for a in found.values())
    assert kinds[True, True] >= 3 and kinds[True, False] >= 3 and kinds[False, True] >= 1, "one kind of answer only"
    for sample in asked:
        answer = found[sample.sample_id]
        assert (answer.text, answer.finished) == generated(model, processor, sample)


def test_an_ordinary_pass_over_the_chats_gives_the_same_targets_and_samples(run, finished, tmp_path):
    chats = chats_path(finished)
    folders = [f"data.root={chats.parent}", f"data.image_roots=[{run / 'data'}]", "targets.answers=null"]
    recipe = elsewhere(run, tmp_path, *folders)
    plain = read_samples("chat", chats.parent, "train", [run / "data"])
    assert run_pass(recipe).samples == len(plain) >= 3
    ours = {s.turns: s for s in opened(finished) if s.source == POOL}
    assert len(ours) == len(plain)
    processor, earlier = processor_of(finished), set()
    stores = [SoftTargetStore.open(each.store_url, None) for each in (finished, recipe)]
    looks = [SketchStore.open(each.store_url, None) for each in (finished, recipe)]
    lines = {line["sample_id"]: line for line in map(json.loads, chats.read_text().splitlines())}
    for theirs in plain:
        mine = ours[theirs.turns]
        same = {"sample_id": mine.sample_id, "source": POOL, "meta": mine.meta}
        assert dataclasses.replace(theirs, **same) == mine
        assert theirs.meta["id"] == mine.meta["id"] and theirs.source == LABELLED
        got, wanted = stores[0].read(mine.sample_id), stores[1].read(theirs.sample_id)
        assert len(got) == len(wanted) > 1
        close = {"rtol": 1e-3, "atol": 1e-3}
        torch.testing.assert_close(got.gold_logprob, wanted.gold_logprob, **close)
        torch.testing.assert_close(got.entropy, wanted.entropy, **close)
        torch.testing.assert_close(got.logprobs[:, 0], wanted.logprobs[:, 0], **close)
        one, other = looks[0].read(mine.sample_id), looks[1].read(theirs.sample_id)
        for a, b in ((one.cells_CR, other.cells_CR), (one.tokens_TR, other.tokens_TR)):
            assert (a - b).norm() < 0.01 * b.norm()
        own = len(processor.tokenizer.encode(theirs.answer, add_special_tokens=False)) + 1
        certainty = float(wanted.gold_logprob[-own:].mean().exp())  # not of the answers in earlier turns
        assert lines[mine.sample_id]["certainty"] == pytest.approx(certainty, rel=1e-2)
        earlier.add(len(got) > own)
    assert earlier == {True, False}


def test_what_is_drawn_follows_the_probabilities_and_is_a_function_of_seed_sample_and_place():
    logits_BV = torch.tensor([0.0, 1.0, 2.0, -1.0, 50.0]).expand(4000, 5)
    ids = [f"{n:032x}" for n in range(4000)]
    drawn_B = Drawn(ids, seed=3, temperature=2.0, vocab_size=4)(logits_BV, 7)
    wanted_V = (logits_BV[0, :4] / 2).softmax(0)
    share_V = torch.bincount(drawn_B, minlength=4) / 4000
    assert (share_V - wanted_V).abs().max() < 4 * (0.25 / 4000) ** 0.5
    part = slice(100, 103)
    assert torch.equal(Drawn(ids[part], 3, 2.0, 4)(logits_BV[part], 7), drawn_B[part])
    for other in (Drawn(ids, 4, 2.0, 4)(logits_BV, 7), Drawn(ids, 3, 2.0, 4)(logits_BV, 8)):
        assert 0.2 < (other == drawn_B).float().mean() < 0.5


def test_several_drawn_answers_do_not_depend_on_batches_or_workers(run, tmp_path):
    drawn = ["targets.answers={temperature: 1.5, samples: 3, max_new_tokens: 10}"]
    folders = [tmp_path / name for name in ("one", "other", "seed")]
    for folder in folders:
        folder.mkdir()
    one = elsewhere(run, folders[0], *drawn)
    other = elsewhere(run, folders[1], *drawn, "targets.batch_size=3", "data.workers=1", "targets.shard_samples=100")
    assert run_pass(one).answered == run_pass(other, worker=1, workers=2).answered == 3 * QUESTIONS
    mine, theirs = answers_of(one), answers_of(other)
    assert {i: a.text for i, a in mine.items()} == {i: a.text for i, a in theirs.items()}
    asked = [s.sample_id for s in open_split(one, "train") if s.source == POOL]
    assert mine.keys() == {made for i in asked for made in answer_ids(i, 3)}
    assert sum(len({mine[made].text for made in answer_ids(i, 3)}) > 1 for i in asked) > QUESTIONS / 2
    samples = opened(one)
    assert list(samples.sample_ids) == sorted(samples.sample_ids)
    assert len(SoftTargetStore.open(one.store_url, None)) == GOLD + 3 * QUESTIONS
    usable = [i for i, a in mine.items() if a.text and a.finished]
    assert {s.sample_id: s.answer for s in samples if s.source == POOL} == {i: mine[i].text for i in usable}
    seeded = elsewhere(run, folders[2], drawn[0].replace("{", "{seed: 1, "))
    run_pass(seeded)
    assert answers_of(seeded) != mine


# -- what training opens -----------------------------------------------------------------------------------------------


def test_training_has_the_records_answers_and_the_teachers(finished, capsys):
    found, plain = answers_of(finished), {s.sample_id: s for s in open_split(finished, "train")}
    usable = {i: a.text for i, a in found.items() if a.text and a.finished}
    capsys.readouterr()
    samples = opened(finished)
    said = capsys.readouterr().out
    empty = sum(not a.text for a in found.values())
    unfinished = len(found) - len(usable) - empty
    assert f"{GOLD} labelled samples, {len(usable)} with the teacher's answer; " in said
    assert f"{empty} empty, {unfinished} unfinished" in said
    wanted = [
        dataclasses.replace(s, answer=usable[i]) if s.source == POOL else s
        for i, s in plain.items()
        if s.source == LABELLED or i in usable
    ]
    assert list(samples) == wanted
    whole = [wanted, select(wanted, range(1, 20, 3))]
    for ours, theirs in zip((samples, samples[1:20:3]), whole, strict=True):
        assert list(ours) == theirs and pickle.loads(pickle.dumps(ours))[3] == theirs[3]
        np.testing.assert_array_equal(from_pool(ours), from_pool(theirs))
        places = np.arange(len(theirs))[::-1]
        np.testing.assert_array_equal(ours.sizes(places), sizes(theirs, places))
        assert ours.places(ours.sample_ids).tolist() == list(range(len(theirs)))
        assert list(ours.words("task")) == words(theirs, "task")
        assert not len(ours.unanswered())
    assert len(pickle.dumps(samples)) < 3000


def test_uncertain_answers_are_left_out_and_counted_and_the_store_stays(finished, capsys):
    before = contents(Path(finished.store_url))
    usable = sorted(a.certainty for a in answers_of(finished).values() if a.text and a.finished)
    least = float(np.median(usable))
    recipe = recipe_of(finished.run.dir, f"targets.answers.min_certainty={least}")
    capsys.readouterr()
    samples = opened(recipe)
    out = sum(certainty < least for certainty in usable)
    assert 0 < out < len(usable) and f"{out} below certainty {least:g}" in capsys.readouterr().out
    assert int(from_pool(samples).sum()) == len(usable) - out
    assert len(opened(finished)) == len(samples) + out
    assert contents(Path(finished.store_url)) == before
    assert run_pass(recipe).shards == 0, "the pass is made anew for another threshold"
    with pytest.raises(ConfigError, match="min_certainty"):
        recipe_of(finished.run.dir, "targets.answers.min_certainty=1.5")


def test_a_pass_that_has_not_run_or_is_not_whole_is_named(run, tmp_path):
    recipe = elsewhere(run, tmp_path)
    with pytest.raises(StoreError, match="clkd teacher RECIPE"):
        opened(recipe)
    run_pass(recipe)
    for kind in ("targets", "answers"):
        (tmp_path / "store" / f"shard-00001.{kind}.json").unlink()
    with pytest.raises(StoreError, match=rf"has answered \d+ of {QUESTIONS} questions .*clkd teacher RECIPE"):
        opened(recipe)
    assert run_pass(recipe).shards == 1
    assert len(opened(recipe)) > GOLD


def test_without_the_setting_questions_are_refused_with_the_way_out(run, tmp_path):
    recipe = elsewhere(run, tmp_path, "targets.answers=null")
    with pytest.raises(DataError, match=rf"{QUESTIONS} of 41 .*targets\.answers: {{}}.*clkd teacher"):
        run_pass(recipe)
    skipping = recipe_of(run, f"run.dir={tmp_path}", "targets.answers=null", "data.bad_samples=skip")
    assert len(opened(skipping)) == GOLD


def test_other_answers_are_another_data_set(run, finished, tmp_path):
    """By the fingerprint, which checkpoints and tables of scores keep; the ids alone are the same."""
    recipe = elsewhere(run, tmp_path)
    run_pass(recipe)
    same = opened(recipe)
    assert same.fingerprint == opened(finished).fingerprint == dataset_fingerprint(same)
    assert same[:7].fingerprint != same[:8].fingerprint
    ids, answers = list(same.sample_ids), [s.answer for s in same]
    pool_run.reword(recipe, " Go.")
    other = opened(recipe)
    assert list(other.sample_ids) == ids and other.fingerprint != same.fingerprint
    wanted = [a + " Go." if s.source == POOL else a for s, a in zip(same, answers, strict=True)]
    assert [s.answer for s in other] == wanted != answers
    assert other[:7].fingerprint.split("-")[0] == same[:7].fingerprint.split("-")[0]
    assert [s.answer for s in same] == answers, "what has been opened stays as it was"
    with pytest.raises(StoreError, match=r"answers_max_new_tokens: store 10, this run 9"):
        opened(recipe_of(finished.run.dir, "targets.answers.max_new_tokens=9"))


def test_a_job_that_the_teacher_comes_from_has_the_labelled_samples_alone(finished, tmp_path, capsys):
    jobs = "jobs={teach: {init: models.teacher, steps: 1}, student: {init: models.teacher, steps: 1}}"
    recipe = recipe_of(finished.run.dir, jobs, "targets.teacher=jobs.teach")
    samples = open_training_samples(recipe, processor_of(recipe), "teach")
    assert [s.source for s in samples] == [LABELLED] * GOLD
    assert f"{GOLD} of 41 samples have an answer; job 'teach'" in capsys.readouterr().out
    assert recipe.needs_answers("student") and not recipe.needs_answers("teach")


# -- the pool's own split, and what goes wrong -------------------------------------------------------------------------


def split_apart(run, folder):
    """Questions in a file of their own; (labelled, questions)."""
    (folder / "data").mkdir()
    for image in (run / "data").glob("*.png"):
        shutil.copy(image, folder / "data")
    records = [json.loads(line) for line in (run / "data" / "train.jsonl").read_text().splitlines()]
    for name in ("train", "pool"):
        chosen = [r for r in records if (r["messages"][-1]["role"] == "user") == (name == "pool")]
        (folder / "data" / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in chosen))


def test_a_split_of_questions_gives_what_the_same_questions_in_one_split_give(run, finished, tmp_path):
    split_apart(run, tmp_path)
    for name in ("models", "processor"):
        (tmp_path / name).symlink_to(run / name)
    recipe = recipe_of(run, f"run.dir={tmp_path}", f"data.root={tmp_path / 'data'}", "data.pool_split=pool")
    run_pass(recipe)
    assert contents(Path(recipe.store_url)).keys() == contents(Path(finished.store_url)).keys()
    assert answers_of(recipe) == answers_of(finished)
    ours, theirs = opened(recipe), opened(finished)
    assert ours.fingerprint == theirs.fingerprint
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine.answer, mine.turns, mine.source) == (other.answer, other.turns, other.source)
        assert [path.read_bytes() for path in mine.images] == [path.read_bytes() for path in other.images]
    path = tmp_path / "data" / "pool.jsonl"
    path.write_text(path.read_text() + (tmp_path / "data" / "train.jsonl").read_text())
    with pytest.raises(DataError, match=rf"split 'pool': {GOLD} of 41 records have an answer: .*pool\.jsonl:\d+"):
        open_questions(recipe)


def test_a_question_that_cannot_be_asked_is_refused_or_left_out(run, tmp_path, capsys):
    split_apart(run, tmp_path)
    for name in ("models", "processor"):
        (tmp_path / name).symlink_to(run / name)
    path = tmp_path / "data" / "train.jsonl"
    bad = {"image": "0.png", "query": "What is <|im_end|>?"}
    path.write_text(path.read_text() + json.dumps(bad) + "\n")
    words = [f"run.dir={tmp_path}", f"data.root={tmp_path / 'data'}"]
    with pytest.raises(DataError, match=r"train\.jsonl:21.*special token"):
        run_pass(recipe_of(run, *words))
    recipe = recipe_of(run, *words, "data.bad_samples=skip")
    summary = run_pass(recipe)
    assert (summary.left_out, summary.answered) == (1, 0)
    assert len(opened(recipe)) == GOLD
    assert "1 unusable" in capsys.readouterr().out


def test_an_answer_that_is_too_long_for_a_sample_is_left_out(run, finished, tmp_path):
    processor = processor_of(finished)
    asked = [s for s in open_split(finished, "train") if s.source == POOL]
    longest = max(len(processor.encode_prompt(s).input_ids) for s in asked)
    gold = max(len(processor.encode(s).input_ids) for s in opened(finished) if s.source == LABELLED)
    recipe = elsewhere(run, tmp_path, f"data.max_length={max(longest, gold)}")
    run_pass(recipe)
    problems = [a.problem for a in answers_of(recipe).values() if a.problem]
    assert all("data.max_length allows" in problem and "sample " not in problem for problem in problems)
    assert len(opened(recipe)) + len(problems) == len(opened(finished))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("{samples: 2}", "samples 2 at temperature 0"),
        ("{temperature: -1}", "temperature"),
        ("{max_new_tokens: 0}", "max_new_tokens"),
    ],
)
def test_settings_that_make_no_sense_are_refused(run, given, said):
    with pytest.raises(ConfigError, match=said):
        recipe_of(run, f"targets.answers={given}")
    with pytest.raises(ConfigError, match=r"targets\.answers: nobody is there to answer"):
        load_recipe(run / "recipe.yaml", ["targets.teacher=null"])


# -- looking after it --------------------------------------------------------------------------------------------------


def test_the_stores_commands_know_answers(finished, tmp_path, capsys):
    config, store = str(finished.run.dir / "recipe.yaml"), Path(finished.store_url)
    assert clkd(["store", "verify", config]) == 0
    assert clkd(["store", "stats", config]) == 0
    said = capsys.readouterr().out
    assert status._shards(finished) == f"5/5 shards, {QUESTIONS} questions answered"
    assert f"answers of the teacher {QUESTIONS}, " in said and "coverage               41 of 41" in said
    sample = next(s for s in opened(finished) if s.source == POOL)
    assert clkd(["store", "inspect", config, "--sample", sample.sample_id]) == 0
    assert f"answer: {sample.answer}" in capsys.readouterr().out
    copy = f"targets.store={tmp_path / 'copy'}"
    clkd(["store", "merge", config, copy, "--from", str(store)])
    assert answers_of(recipe_of(finished.run.dir, copy)) == answers_of(finished)
    clkd(["store", "export", config, "--out", str(tmp_path / "parquet")])
    assert (tmp_path / "parquet" / "soft-targets-00000.parquet").is_file()


def test_damaged_answers_are_found_and_made_again(finished, tmp_path, capsys):
    shutil.copytree(finished.store_url, tmp_path / "store")
    before, config = (
        contents(tmp_path / "store"),
        [str(finished.run.dir / "recipe.yaml"), f"targets.store={tmp_path}/store"],
    )
    path = tmp_path / "store" / "shard-00002.answers.safetensors"
    raw = bytearray(path.read_bytes())
    raw[raw.index(b'"text"')] ^= 1
    path.write_bytes(raw)
    assert clkd(["store", "verify", *config, "--discard"]) == 1
    assert "shard-00002.answers" in capsys.readouterr().out
    assert run_pass(load_recipe(config[0], config[1:])).shards == 1
    assert contents(tmp_path / "store") == before


def test_nothing_is_written_again_where_nothing_has_changed(finished):
    watched = [chats_path(finished), *(finished.run.dir / "answers" / "index-train").iterdir()]
    opened(finished)
    run_pass(finished)
    before = {path: path.stat().st_mtime_ns for path in watched if path.name != "lock"}
    run_pass(finished)
    opened(finished)
    assert {path: path.stat().st_mtime_ns for path in before} == before
