import contextlib
import copy
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.benchmark.random_models import build
from pipeline.cli import main as clkd
from pipeline.data.collate import collate
from pipeline.errors import ConfigError, UserError
from pipeline.evaluation import generate, latency, results, stage
from pipeline.evaluation.bars import bar_lines, bars, gaps_closed
from pipeline.evaluation.generate import answers, open_model, use_experts
from pipeline.evaluation.latency import Timing
from pipeline.evaluation.metrics import METRICS, SCENE_SCORE, rouge_l
from pipeline.evaluation.results import Row, cut_line
from pipeline.evaluation.stage import Evaluation, evaluate, questions, timed_samples, with_gold
from pipeline.models.generation import Decoder, continuations, model_inputs
from pipeline.models.loading import load_model, save_model
from pipeline.models.student import upcycle
from pipeline.recipe import EvaluationConfig, RandomModelConfig, UpcycleConfig, load_recipe
from tests.helpers import recipes
from tests.helpers.tiny_data import corpus, make_processor, save_image

SIZES = RandomModelConfig.model_validate(recipes.SIZES)
OTHER = METRICS[3:]
"""The metrics of data that are no drawn scenes."""
TASKS, SLICES, NEW_TOKENS = ("general", "region", "suggestion"), ("regular", "corner"), 12
CPU = torch.device("cpu")


def write_recipe(run: Path) -> Path:
    rows = [
        {"name": "teacher", "model": "models.teacher"},
        {"name": "teacher, blind", "model": "models.teacher", "blind": True},
        {"name": "MoE student CLKD", "model": "models.moe"},
    ]
    settings = {"rows": rows, "batch_size": 5, "max_new_tokens": NEW_TOKENS, "latency_samples": 2, "latency_repeats": 2}
    models = {"moe": {"upcycle": {"source": "models.teacher"}}}
    return recipes.write(run / "recipe.yaml", recipes.chat(run, "test", {}, models=models, evaluation=settings))


def write_data(root: Path) -> None:
    """Four samples per task and slice, images of three sizes, questions of different lengths."""
    root.mkdir()
    for n, (width, height) in enumerate([(64, 64), (128, 64), (96, 96)]):
        save_image(root / f"{n}.png", width, height, seed=n)
    with (root / "test.jsonl").open("w") as file:
        for i, sample in enumerate(corpus(root / "0.png")[:24]):
            question = sample.prompt + " Look again." * (i % 4)
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": sample.answer}]
            record = {"id": str(i), "image": f"{i % 3}.png", "messages": turns, "task": TASKS[i % 3],
                      "slice": SLICES[i // 3 % 2]}  # fmt: skip
            file.write(json.dumps(record) + "\n")


def lively(model):
    """Weights so large that the next token depends on image, question and what was said."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "embed" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = tmp_path_factory.mktemp("evaluate") / "run"
    processor = make_processor(run / "processor")
    write_data(run / "data")
    save_model(lively(build(SIZES, processor, 0)), processor, run / "models/teacher")
    config = UpcycleConfig(source="models.teacher", router_noise=1.0, expert_noise=0.5)
    upcycle(run / "models/teacher", run / "models/moe", config, seed=0)
    write_recipe(run)
    return run


@pytest.fixture(scope="module")
def shared(run):
    return Evaluation(load_recipe(run / "recipe.yaml"))


def elsewhere(run, folder):
    """The same models and data with a run folder of its own."""
    for name in ("models", "processor", "data"):
        (folder / name).symlink_to(run / name)
    return load_recipe(run / "recipe.yaml", [f"run.dir={folder}"])


@pytest.fixture
def recipe(run, tmp_path):
    return elsewhere(run, tmp_path)


@pytest.fixture(scope="module")
def first(run, tmp_path_factory):
    """(run folder that was evaluated once, what the stage printed)."""
    recipe, printed = elsewhere(run, tmp_path_factory.mktemp("first")), io.StringIO()
    with contextlib.redirect_stdout(printed):
        clkd(["evaluate", str(run / "recipe.yaml"), f"run.dir={recipe.run.dir}"])
    return recipe.run.dir, printed.getvalue()


@pytest.fixture
def evaluated(first, recipe):
    """A run that has been evaluated, to go on with."""
    shutil.copytree(first[0] / "evaluation", recipe.run.dir / "evaluation")
    return recipe


def single(processor, sample, **options):
    prompt = processor.encode_prompt(sample, **options)
    return model_inputs(collate([prompt], processor.pad_id, processor.image_token_id, side="left"), "cpu")


def hugging_face(model, inputs, stop_ids, new_tokens=NEW_TOKENS):
    """Independent reference: generate() on one unpadded prompt; tokens before the first stop."""
    stops = list(stop_ids) or None
    out = model.generate(**inputs, do_sample=False, max_new_tokens=new_tokens, eos_token_id=stops, pad_token_id=0)
    tokens = out[0, inputs["input_ids"].shape[1] :].tolist()
    return tokens[:-1] if stops and tokens[-1] in stops else tokens


@pytest.mark.parametrize("name", ["teacher", "moe"])
def test_padded_batches_give_generates_tokens(shared, run, name):
    reference, model = load_model(run / "models" / name), shared.open(f"models.{name}")
    assert (model.config.model_type == "qwen3_vl_moe") == (name == "moe")
    processor, samples = shared.processor, shared.samples[:8]
    singles = [single(processor, sample) for sample in samples]
    assert len({len(inputs["input_ids"][0]) for inputs in singles}) > 3, "nothing is padded"
    free = [hugging_face(reference, inputs, ()) for inputs in singles]
    assert len({tuple(row) for row in free}) > 4, "every sample says the same"
    stops = (free[0][3], free[1][-1])  # these two prompts end early, the others at any time or never
    expected = [hugging_face(reference, inputs, stops) for inputs in singles]
    assert min(map(len, expected)) < NEW_TOKENS

    batch = collate(
        [processor.encode_prompt(s) for s in samples], processor.pad_id, processor.image_token_id, side="left"
    )
    assert continuations(model, model_inputs(batch, "cpu"), NEW_TOKENS, ()) == free
    assert continuations(model, model_inputs(batch, "cpu"), NEW_TOKENS, stops) == expected


def test_the_timed_loop_gives_generates_tokens(shared, run):
    model = shared.open("models.moe")
    for sample in shared.samples[:3]:
        inputs = single(shared.processor, sample)
        decoder = Decoder(model, inputs)
        tokens = [decoder.first()]
        while len(tokens) < NEW_TOKENS:
            tokens.append(decoder.next(tokens[-1]))
        assert torch.cat(tokens).tolist() == hugging_face(load_model(run / "models/moe"), inputs, ())


@pytest.mark.parametrize("tokens", [1, 2, 37])
def test_the_expert_loop_equals_eager(shared, tokens):
    model = shared.open("models.moe")
    block = next(m for m in model.modules() if hasattr(m, "experts"))
    hidden = torch.randn(1, tokens, SIZES.text.hidden_size, generator=torch.Generator().manual_seed(tokens))
    with torch.no_grad():
        ours = block(hidden)
        use_experts(model, "eager")
        torch.testing.assert_close(ours, block(hidden), rtol=1e-5, atol=1e-6)


def test_answers_belong_to_their_samples_whatever_the_batches(shared):
    model, processor, samples = shared.open("models.teacher"), shared.processor, shared.samples
    small = answers(model, processor, samples, batch_size=3, max_new_tokens=NEW_TOKENS)
    assert list(small) != [s.sample_id for s in samples], "never reordered: the test shows nothing"
    stops = (processor.eos_id, processor.pad_id)
    for sample in samples[::5]:
        alone = processor.decode(hugging_face(model, single(processor, sample), stops))
        assert small[sample.sample_id] == alone
    assert small == answers(model, processor, samples, batch_size=24, max_new_tokens=NEW_TOKENS)


def test_answers_without_an_end_count_as_cut(shared):
    model, processor, samples = shared.open("models.teacher"), shared.processor, shared.samples
    cut, stops = set[str](), (processor.eos_id, processor.pad_id)
    answers(model, processor, samples, batch_size=5, max_new_tokens=NEW_TOKENS, cut=cut)
    tokens = {s.sample_id: hugging_face(model, single(processor, s), stops) for s in samples}
    assert cut == {sample_id for sample_id, ids in tokens.items() if len(ids) == NEW_TOKENS}
    line = cut_line([row("teacher", cut=3), row("sft"), row("kd", cut=1)], 40, 512)
    assert "max_new_tokens = 512, of 40 answers each" in line and line.endswith(": teacher 3, kd 1")


def test_blind_models_see_grey_and_nothing_else(shared):
    model, processor = shared.open("models.teacher"), shared.processor
    seen: list[torch.Tensor] = []
    model.model.visual.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append([*args, *kwargs.values()][0]), with_kwargs=True
    )
    sample = shared.samples[0]
    options = {"batch_size": 4, "max_new_tokens": 4}
    sighted = answers(model, processor, [sample], **options)
    blind = answers(model, processor, [sample], blind=True, **options)
    image = processor.image_processor
    grey = [(128 / 255 - mean) / std for mean, std in zip(image.image_mean, image.image_std, strict=True)]
    channels = seen[1].view(len(seen[1]), 3, -1)  # a patch is C x (T*p*p)
    for channel, value in enumerate(grey):
        torch.testing.assert_close(channels[:, channel], torch.full_like(channels[:, channel], value))
    assert seen[0].shape == seen[1].shape
    assert seen[0].std() > 0.1
    assert sighted != blind


def test_the_limit_takes_the_first_ids_of_every_task_and_slice(run):
    recipe = load_recipe(run / "recipe.yaml", ["evaluation.limit=3"])
    every, chosen = questions(load_recipe(run / "recipe.yaml")), questions(recipe)
    assert len(every) == 24
    assert len(chosen) == 18
    for task in TASKS:
        for part in SLICES:
            group = sorted(s.sample_id for s in every if (s.task, s.slice) == (task, part))
            assert [s.sample_id for s in chosen if (s.task, s.slice) == (task, part)] == group[:3]
    assert {(s.task, s.slice) for s in timed_samples(every, 6)} == {(t, p) for t in TASKS for p in SLICES}


def silenced(run, folder, count):
    """The recipe with data whose first records have no answer, and no models or answers yet."""
    lines = [json.loads(line) for line in (run / "data/test.jsonl").read_text().splitlines()]
    for i, line in enumerate(lines[:count]):
        line["messages"] = [{"role": "user", "content": f"Question {i}?"}, {"role": "assistant", "content": ""}]
    (folder / "data").mkdir()
    for n in range(3):
        (folder / "data" / f"{n}.png").write_bytes((run / "data" / f"{n}.png").read_bytes())
    (folder / "data/test.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for name in ("models", "processor"):
        (folder / name).symlink_to(run / name)
    return load_recipe(run / "recipe.yaml", [f"run.dir={folder}", f"data.root={folder / 'data'}"])


def test_samples_without_a_gold_answer_take_no_other_ones_place(run, tmp_path):
    recipe = silenced(run, tmp_path, 5)
    chosen = questions(recipe)
    assert (len(chosen), len(with_gold(chosen))) == (24, 19)
    limited = questions(changed(recipe, limit=3))
    before = {s.sample_id for s in questions(changed(recipe, limit=3)) if s.answer}
    golds = [s for s in chosen if s.answer]
    for task in TASKS:
        for part in SLICES:
            group = sorted(s.sample_id for s in golds if (s.task, s.slice) == (task, part))
            assert set(group[:3]) <= before and not set(group[3:]) & before
    assert len(limited) - len(before) == 5, "at most three without an answer in each task and slice: all five"


@pytest.mark.parametrize("count", [5, 24])
def test_samples_without_a_gold_answer_are_answered_and_counted(run, tmp_path, capsys, count):
    content = evaluate(silenced(run, tmp_path, count))
    lines = [json.loads(line) for line in (tmp_path / "evaluation/teacher.jsonl").read_text().splitlines()]
    silent = [line for line in lines if not line["gold"]]
    assert {line["id"] for line in lines} == {str(i) for i in range(24)}
    assert len(silent) == content["unanswered"] == count
    assert any(line["prediction"] for line in silent)
    teacher, said = content["rows"][0], capsys.readouterr().out
    scored = [sum(group["n"] for group in teacher["scores"][name].values()) for name in ("rouge_l", "gold_ce")]
    assert scored == [24 - count] * 2
    if count == 24:
        assert "none of the 24 samples has a gold answer: nothing can be scored" in said
        assert [bar["name"] for bar in content["bars"]] == ["clkd_speedup"]
        assert "ROUGE-L" not in said and "active / total" in said, "sizes and speed, and no empty columns"
    else:
        assert "5 of 24 samples have no gold answer: answered, in no score" in said
        assert content["notes"][0] in said


def test_every_timed_answer_has_the_forced_length_and_models_take_turns(shared, monkeypatch):
    models = {name: shared.open(f"models.{name}") for name in ("teacher", "moe")}
    calls: list[str] = []
    for name, model in models.items():
        model.register_forward_hook(lambda *_, name=name: calls.append(name))
    prompts = [shared.processor.encode_prompt(s) for s in shared.samples[:3]]
    threads = torch.get_num_threads()
    monkeypatch.setattr(shared.processor, "eos_id", None)  # no stop token plays a part
    timings = latency.measure(models, shared.processor, prompts, repeats=2, new_tokens=5)
    assert {name: len(rows) for name, rows in timings.items()} == {"teacher": 6, "moe": 6}
    rounds = [calls[4:][i : i + 10] for i in range(0, 60, 10)]  # after one answer of two tokens per model
    teacher_first, moe_first = ["teacher"] * 5 + ["moe"] * 5, ["moe"] * 5 + ["teacher"] * 5
    assert rounds == [teacher_first, moe_first] * 3
    assert len(calls) == 64
    assert torch.get_num_threads() == threads
    for row in timings["moe"]:
        assert row.e2e_ms == pytest.approx(row.ttft_ms + 4 * row.tpot_ms)


def test_ratios_are_taken_pair_by_pair():
    """A slow spell that hits one pair leaves the ratio alone; a ratio of medians or means would move."""
    teacher = [Timing(1, 1, e) for e in (10.0, 80.0, 30.0)]
    student = [Timing(2, 3, e) for e in (5.0, 20.0, 24.0)]  # ratios 2, 4, 1.25; of medians 1.5, of means 2.45
    speeds = latency.summarise({"t": teacher, "s": student}, "t")
    assert speeds["s"] == latency.Latency(ttft_ms=2, tpot_ms=3, e2e_ms=20.0, speedup=2.0)
    assert speeds["t"].speedup == 1.0
    assert speeds["t"].e2e_ms == 30.0


def group(value):
    return {"value": value, "n": 3, "tasks": {"qa": {"value": value, "n": 3}}}


def by_slice(**values):
    return {name: group(value) for name, value in values.items()}


def row(name: str, scores=None, blind=None, speedup: float = 1.0, **changes) -> Row:
    """`scores`, `blind`: {metric: {slice: value}}."""
    given = {key: {m: by_slice(**v) for m, v in (of or {}).items()} for key, of in (("s", scores), ("b", blind))}
    values = {"slug": name, "model": "jobs.teacher", "blind": False, "params_total": 2_500_000,
              "params_active": 1_250_000, "ttft_ms": 12.34, "tpot_ms": 1.5, "e2e_ms": 60.0,
              "scores": given["s"], "blind_scores": given["b"], "overall": {}}  # fmt: skip
    return Row(**({"name": name, "speedup_vs_teacher": speedup} | values | changes))


def scene(regular, corner):
    return {"scene_score": {"regular": regular, "corner": corner}}


def test_bars_of_drawn_scenes_by_hand():
    rows = [row("teacher", scene(0.8, 0.5) | {"rouge_l": {"regular": 0.9}}, scene(0.4, 0.3)),
            row("sft", scene(0.1, 0.1), model="jobs.sft"),
            row("clkd", scene(0.72, 0.55) | {"rouge_l": {"regular": 0.1}}, speedup=2.5, model="jobs.clkd")]  # fmt: skip
    measured = {bar.name: (bar.value, bar.target, bar.reached) for bar in bars(rows, METRICS)}
    assert measured == {
        "teacher_vs_blind_regular": (2.0, 2.0, True),
        "teacher_vs_blind_corner": (pytest.approx(0.5 / 0.3), 2.0, False),
        "clkd_vs_teacher_regular": (pytest.approx(0.9), 0.95, False),
        "clkd_vs_teacher_corner": (pytest.approx(1.1), 0.95, True),
        "clkd_speedup": (2.5, 2.0, True),
    }
    text = bar_lines(bars(rows, METRICS), METRICS)
    assert [line.split()[-1] for line in text.splitlines()[1:]] == ["reached", "MISSED", "MISSED", "reached", "reached"]


def test_bars_of_other_data_are_by_metric_and_slice_and_only_measured_ones():
    teacher = row("teacher", {"rouge_l": {"day": 0.5, "night": 0.4}, "gold_ce": {"day": 1.9, "night": 1.5}})
    student = row("clkd", {"rouge_l": {"day": 0.5, "night": 0.3}, "gold_ce": {"day": 2.0, "night": 2.0}}, speedup=1.5)
    assert [(b.name, b.value, b.target, b.reached) for b in bars([teacher, student], OTHER)] == [
        ("clkd_vs_teacher_rouge_l_day", 1.0, 0.95, True),
        ("clkd_vs_teacher_rouge_l_night", pytest.approx(0.75), 0.95, False),
        ("clkd_vs_teacher_gold_ce_day", pytest.approx(0.95), 0.95, True),
        ("clkd_vs_teacher_gold_ce_night", pytest.approx(0.75), 0.95, False),
        ("clkd_speedup", 1.5, 2.0, False),
    ]
    assert bars([teacher], OTHER) == []


def test_bars_that_cannot_be_measured_are_not_reached():
    alone = bars([row("teacher", scene(0.8, 0.7))], [SCENE_SCORE])
    assert [(bar.value, bar.reached) for bar in alone] == [(None, False)] * 5
    assert "not measured" in bar_lines(alone, METRICS)
    zero = {b.name: b for b in bars([row("teacher", scene(0.8, 0.0), scene(0.0, 0.0))], METRICS)}
    assert (zero["teacher_vs_blind_regular"].value, zero["teacher_vs_blind_regular"].reached) == (None, True)
    nothing = zero["teacher_vs_blind_corner"]
    assert (nothing.value, nothing.reached) == (0.0, False), "0 is not twice 0, and it was measured"
    blind_row = replace(row("other, blind", scene(0.1, 0.1)), blind=True)
    blind_student = bars([row("teacher", scene(0.8, 0.8)), blind_row], METRICS)
    assert blind_student[-1].value is None, "a blind row is no student"


def test_bars_against_the_baseline_and_the_rivals_by_hand():
    targets = {
        "quality": {"scene_score": {"corner": 0.9}, "rare_errors": {"corner": 1.0}},
        "gap": {"scene_score": {"corner": 0.25}},
        "gap_closed": {"scene_score": {"corner": 0.7, "regular": 0.9}},
        "ahead": {"scene_score": {"corner": 0.09, "regular": 0.0}, "rare_errors": {"corner": 0.01}},
        "speed": 3.0,
    }
    names = ("teacher", "sft", "kd", "clkd")
    rows = [{"name": name, "model": "jobs.x"} for name in names]
    settings = EvaluationConfig.model_validate({"rows": rows, "baseline": "sft", "rivals": ["kd"], "bars": targets})
    values = {"teacher": (0.9, 0.8, 0.05), "sft": (0.7, 0.4, 0.0), "kd": (0.86, 0.6, 0.08), "clkd": (0.85, 0.7, 0.04)}
    table = [row(name, scene(a, b) | {"rare_errors": {"corner": c}}, speedup=2.5) for name, (a, b, c) in values.items()]
    apart = np.linspace(-0.05, 0.05, 2001)
    spreads = {
        name: {
            "scene_score": {"regular": a + sign * apart, "corner": b + 0 * apart},
            "rare_errors": {"corner": c + 0 * apart},
        }
        for sign, (name, (a, b, c)) in zip((0, 0, 0, 1), values.items(), strict=True)
    }
    measured = {bar.name: bar for bar in bars(table, METRICS, settings, spreads)}
    figures = {name: (pytest.approx(bar.value), bar.target, bar.reached) for name, bar in measured.items() if bar.value}
    assert figures == {
        "clkd_vs_teacher_regular": (0.85 / 0.9, 0.95, False),
        "clkd_vs_teacher_corner": (0.7 / 0.8, 0.9, False),
        "clkd_vs_teacher_rare_errors_corner": (0.05 / 0.04, 1.0, True),
        "teacher_ahead_of_baseline_scene_score_corner": (0.4, 0.25, True),
        "gap_closed_scene_score_corner": (0.3 / 0.4, 0.7, True),
        "gap_closed_scene_score_regular": (0.15 / 0.2, 0.9, False),
        "ahead_of_kd_scene_score_corner": (0.1, 0.09, True),
        "ahead_of_kd_scene_score_regular": (-0.01, 0.0, True),
        "ahead_of_kd_rare_errors_corner": (0.04, 0.01, True),
        "clkd_speedup": (2.5, 3.0, False),
    }  # fmt: skip
    closed, level = measured["gap_closed_scene_score_regular"], measured["ahead_of_kd_scene_score_regular"]
    assert closed.interval == pytest.approx((0.75 - 0.0475 / 0.2, 0.75 + 0.0475 / 0.2))
    assert level.interval == pytest.approx((-0.0575, 0.0375)), "behind by chance"
    sure = {**spreads, "clkd": {"scene_score": {"regular": 0.85 + 0 * apart, "corner": 0.62 + 12 * apart}}}
    again = {bar.name: bar.reached for bar in bars(table, METRICS, settings, sure)}
    assert not again["ahead_of_kd_scene_score_regular"], "behind, and not by chance"
    assert not again["ahead_of_kd_scene_score_corner"], "ahead, and perhaps by chance"
    assert "10.0 [10.0, 10.0]" in bar_lines(list(measured.values()), METRICS)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"baseline": "sft"}, "none of"),
        ({"bars": {"gap": {"rouge_l": {"day": 0.1}}}}, "need a baseline"),
        ({"bars": {"ahead": {"rouge_l": {"day": 0.1}}}}, "needs rivals"),
    ],
)
def test_bars_that_compare_with_no_row_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        EvaluationConfig.model_validate({"rows": [{"name": "teacher", "model": "jobs.t"}], **settings})


def test_the_share_of_the_gap_that_each_row_closes():
    names = ("teacher", "teacher, blind", "sft", "kd", "clkd")
    rows = [{"name": name, "model": "jobs.x"} for name in names]
    settings = EvaluationConfig.model_validate({"rows": rows, "baseline": "sft"})
    values = {"teacher": (0.9, 0.8), "sft": (0.5, 0.4), "kd": (0.7, 0.5), "clkd": (0.9, 0.7)}
    table = [row(name, scene(*pair)) for name, pair in values.items()]
    table.insert(1, replace(row("teacher, blind", scene(0.1, 0.1)), blind=True))
    steps = np.linspace(-0.01, 0.01, 2001)
    spreads = {
        n: {"scene_score": {"regular": a + 0 * steps, "corner": b + (n == "kd") * steps}}
        for n, (a, b) in values.items()
    }
    closed = gaps_closed(table, METRICS, settings, spreads)
    shares = {name: {part: group["value"] for part, group in parts.items()} for name, parts in closed.items()}
    assert shares == {
        "kd": {"regular": pytest.approx(0.5), "corner": pytest.approx(0.25)},
        "clkd": {"regular": pytest.approx(1.0), "corner": pytest.approx(0.75)},
    }
    assert closed["kd"]["corner"]["interval"] == pytest.approx([0.25 - 0.0095 / 0.4, 0.25 + 0.0095 / 0.4])
    rows_closed = [replace(each, gap_closed=closed.get(each.name, {})) for each in table]
    _, block, *_ = results.table(rows_closed, METRICS).split("\n\n")
    assert block.splitlines()[0].split() == ["gap", "closed", "in", "scene", "score,", "%", "regular", "corner"]
    assert block.splitlines()[2].split() == ["clkd", "100.0", "[100.0,", "100.0]", "75.0", "[75.0,", "75.0]"]
    assert gaps_closed(table, METRICS, EvaluationConfig(), {}) == {}


def test_every_metric_has_an_aligned_block_with_the_slices_that_are_there():
    scores = {"rouge_l": {"day": 0.456, "night": 0.1}, "gold_ce": {"day": 1.25, "night": 2.5}}
    rows = [
        row("teacher", scores, {"rouge_l": {"day": 0.2, "night": 0.0}}, overall={"rouge_l": group(0.3)}),
        row("a longer name", scores, speedup=2.0),
    ]
    rouge, ce, speed = (block.splitlines() for block in results.table(rows, METRICS).split("\n\n"))
    for block in (rouge, ce, speed):
        assert len({len(line) for line in block}) == 1
    columns = [head.strip() for head in rouge[0].split("  ") if head]
    assert columns == ["ROUGE-L, %", "day", "night", "all samples", "day (blind)", "night (blind)"]
    assert rouge[1].split() == ["teacher", "45.6", "10.0", "30.0", "20.0", "0.0"]
    assert ce[0].split()[:6] == ["gold", "cross-entropy,", "nats", "a", "token", "day"]
    assert ce[2].split()[3:5] == ["1.2500", "2.5000"]
    assert speed[2].split() == ["a", "longer", "name", "1.25", "/", "2.50", "M", "12.3", "1.50", "60.0", "2.00x"]


def test_data_without_slices_have_one_column_and_no_dashes():
    one = {"rouge_l": {"unknown": 0.5}, "gold_ce": {"unknown": 1.5}}
    text = results.table([row("teacher", one, one), row("student", one, one)], OTHER)
    assert text.splitlines()[0].split("  ")[-2:] == ["all samples", "all samples (blind)"]
    assert not any("-" in line.split() for line in text.splitlines())
    assert "unknown" not in text


def test_gold_answers_that_a_metric_cannot_score_are_said():
    few = {"scene_score": {"regular": 0.5}, "rouge_l": {"regular": 0.5}, "gold_ce": {"regular": 1.0}}
    scores = row("teacher", few).scores
    scores["rouge_l"]["regular"]["n"] = scores["gold_ce"]["regular"]["n"] = 5
    assert results.gold_lines(scores, METRICS, 5, 0) == [
        "scene score: 2 of 5 gold answers hold nothing that it knows: in no score"
    ]


def test_the_stage_writes_what_it_prints(first):
    folder, printed = first
    content = json.loads((folder / "results.json").read_text())
    teacher, blind, moe = content["rows"]
    assert [r["slug"] for r in content["rows"]] == ["teacher", "teacher_blind", "moe_student_clkd"]
    assert [r["blind"] for r in content["rows"]] == [False, True, False]
    assert teacher["speedup_vs_teacher"] == 1.0
    assert [metric["name"] for metric in content["metrics"]] == ["rouge_l", "gold_ce"], "no drawn scenes"
    assert teacher["blind_scores"] == blind["scores"] != teacher["scores"]
    alone = json.loads((folder / "evaluation" / "moe_student_clkd_blind.json").read_text())
    assert alone["blind"] and alone["scores"] == moe["blind_scores"]
    assert all(teacher[key] == blind[key] for key in ("ttft_ms", "tpot_ms", "e2e_ms", "params_total")), "one model"
    assert moe["params_active"] < moe["params_total"]
    assert content["seed"] == 7
    assert content["config"]["evaluation"]["max_new_tokens"] == NEW_TOKENS
    assert content["machine"]["torch"] == torch.__version__
    for line in content["rows"]:
        record = json.loads((folder / "evaluation" / f"{line['slug']}.json").read_text())
        assert record["scores"] == line["scores"]
        assert line["cut"] == record["cut"] == sum(s["cut"] for s in record["samples"])
        assert {(s["task"], s["slice"]) for s in record["samples"]} == {(t, p) for t in TASKS for p in SLICES}
        corner = [s for s in record["samples"] if s["slice"] == "corner"]
        assert list(line["scores"]["rouge_l"]) == list(SLICES)
        assert line["scores"]["rouge_l"]["corner"]["value"] == pytest.approx(
            sum(rouge_l(s["prediction"], s["gold"]) for s in corner) / len(corner)
        )
        handed_in = [json.loads(x) for x in (folder / "evaluation" / f"{line['slug']}.jsonl").read_text().splitlines()]
        for told, kept in zip(handed_in, record["samples"], strict=True):
            assert told == {key: value for key, value in kept.items() if key not in ("nats", "tokens")}
        assert {told["id"] for told in handed_in} == {str(i) for i in range(24)}
    timings = json.loads((folder / "evaluation/latency.json").read_text())["timings"]
    assert {name: len(rows) for name, rows in timings.items()} == {"models.teacher": 4, "models.moe": 4}
    assert "MoE student CLKD" in printed
    assert "clkd_speedup" in printed
    assert "32 forced new tokens, 2 samples x 2 repeats, 1 thread(s), expert loop of MoE models: by_expert" in printed


@pytest.mark.parametrize("blind", [False, True])
def test_gold_cross_entropy_of_a_slice_is_transformers_own_over_all_its_tokens(first, shared, blind):
    slug = "teacher_blind" if blind else "teacher"
    scores = json.loads((first[0] / "evaluation" / f"{slug}.json").read_text())["scores"]["gold_ce"]
    model, processor = load_model(first[0] / "models/teacher").eval(), shared.processor
    nats, tokens = dict.fromkeys(SLICES, 0.0), dict.fromkeys(SLICES, 0)
    for sample in shared.samples:
        alone = dict(collate([processor.encode(sample, blind=blind)], processor.pad_id, processor.image_token_id))
        count = int((alone["labels"] != -100).sum())
        with torch.no_grad():
            nats[sample.slice] += count * float(model(**alone).loss)
        tokens[sample.slice] += count
    for name in SLICES:
        assert scores[name]["value"] == pytest.approx(nats[name] / tokens[name], rel=1e-4)


def test_answers_of_an_earlier_version_are_made_anew(evaluated, opened):
    path = evaluated.run.dir / "evaluation/teacher.json"
    content = json.loads(path.read_text())
    stored = content["samples"]
    content["scores"] = {"regular": {"mean": 1.0, "rouge_l": 1.0, "n": 12}}
    content["samples"] = [{k: v for k, v in s.items() if k not in ("nats", "tokens", "id")} for s in stored]
    del content["identity"]["format"]
    path.write_text(json.dumps(content))
    evaluate(evaluated)
    assert opened == ["teacher"]
    assert json.loads(path.read_text())["samples"] == stored


@pytest.fixture
def opened(monkeypatch):
    """Folder names of the models that were opened."""
    names: list[str] = []

    def spy(folder, *args):
        names.append(folder.name)
        return open_model(folder, *args)

    monkeypatch.setattr(stage, "open_model", spy)
    return names


@pytest.mark.slow
def test_finished_rows_are_used_again_and_only_those(recipe, opened):
    first = evaluate(recipe)
    assert opened == ["teacher", "teacher", "moe", "moe", "teacher", "moe"]
    opened.clear()
    again = evaluate(recipe)
    assert opened == []
    assert (again["rows"], again["bars"]) == (first["rows"], first["bars"])

    (recipe.run.dir / "evaluation/teacher_blind.json").write_text('{"identity": {"wei')  # a torn file
    assert evaluate(recipe)["rows"] == first["rows"]
    assert opened == ["teacher"]
    opened.clear()
    evaluate(changed(recipe, max_new_tokens=NEW_TOKENS - 1))
    assert opened == ["teacher", "teacher", "moe", "moe"], "timings do not depend on max_new_tokens"
    opened.clear()
    evaluate(changed(recipe, max_new_tokens=NEW_TOKENS - 1, limit=2))
    assert opened == ["teacher", "teacher", "moe", "moe", "teacher", "moe"]


def changed(recipe, **settings):
    return recipe.model_copy(update={"evaluation": recipe.evaluation.model_copy(update=settings)})


@pytest.mark.slow
def test_new_weights_are_evaluated_anew(evaluated, run, opened):
    recipe = evaluated
    (recipe.run.dir / "models").unlink()
    for name in ("teacher", "moe"):
        folder = recipe.run.dir / "models" / name
        folder.mkdir(parents=True)
        for path in (run / "models" / name).iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
    evaluate(recipe)
    assert opened == [], "the same bytes elsewhere"
    [path] = (recipe.run.dir / "models/moe").glob("*.safetensors")
    tensors = load_file(path)
    tensors["model.language_model.norm.weight"] *= -1
    save_file(tensors, path, metadata={"format": "pt"})
    evaluate(recipe)
    assert opened == ["moe", "moe", "teacher", "moe"]


def test_rescoring_does_not_need_the_models(evaluated, opened, monkeypatch):
    made_up = {"rouge_l": {"corner": {"value": 0.25, "n": 1, "tasks": {}}}, "gold_ce": {}}
    monkeypatch.setattr(stage, "score_all", lambda metrics, records: copy.deepcopy(made_up))
    values = [
        r[key]["rouge_l"]["corner"]["value"] for r in evaluate(evaluated)["rows"] for key in ("scores", "blind_scores")
    ]
    assert values == [0.25] * 6
    assert opened == []
    stored = json.loads((evaluated.run.dir / "evaluation/teacher.json").read_text())
    assert stored["scores"]["rouge_l"]["corner"]["value"] == 0.25


def test_all_missing_models_are_named_before_anything_runs(run, tmp_path):
    recipe = load_recipe(run / "recipe.yaml", [f"run.dir={tmp_path}", f"data.processor={run / 'processor'}"])
    with pytest.raises(UserError, match=r"(?s)models\.teacher: .*models\.moe: .*Nothing was evaluated"):
        evaluate(recipe)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("names", "message"),
    [([], "is empty"), (["MoE KD", "moe: kd"], "'MoE KD', 'moe: kd'"), (["a", "Latency"], "'latency'")],
)
def test_rows_need_distinct_file_names(run, names, message):
    rows = json.dumps([{"name": name, "model": "models.teacher"} for name in names])
    with pytest.raises(ConfigError, match=message):
        evaluate(load_recipe(run / "recipe.yaml", [f"evaluation.rows={rows}"]))


def test_stored_dtype_is_kept_off_the_cpu(run, tmp_path):
    """Stands in for an accelerator: the dtype that a bf16 checkpoint would be loaded in there."""
    model, processor = load_model(run / "models/teacher").to(torch.bfloat16), run / "processor"
    save_model(model, processor, tmp_path)
    assert generate._stored_dtype(tmp_path) == torch.bfloat16
