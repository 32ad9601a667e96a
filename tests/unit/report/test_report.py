"""The report of a run folder that is written by the stages' own writers, whole and with parts missing or broken."""

import base64
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.benchmark.scenes import write_scenes
from pipeline.benchmark.scoring import SLICES, TASKS
from pipeline.cli import main as clkd
from pipeline.data.readers import read_samples
from pipeline.data.sample import Sample, load_image
from pipeline.evaluation.bars import bars, gaps_closed
from pipeline.evaluation.intervals import Resamples, interval
from pipeline.evaluation.metrics import METRICS, score_all, score_together
from pipeline.evaluation.results import Row
from pipeline.method.curriculum import competence
from pipeline.method.hardness import HardnessTable
from pipeline.method.release import release_alpha
from pipeline.recipe import EvaluationConfig, ScenesConfig, load_recipe
from pipeline.report import plots as report_plots
from pipeline.report import stage as report
from pipeline.report.data import NUM_EXAMPLES, Answer, ResultBar, ResultMetric, _choose, verdict
from pipeline.training.metrics import MetricsLogger
from tests.helpers import recipes

STEPS = 150
COMPARED = {
    "baseline": "MoE student SFT",
    "rivals": ["MoE student vanilla KD"],
    "bars": {
        "gap": {"scene_score": {"corner": 0.1}},
        "gap_closed": {"scene_score": {"corner": 0.5, "regular": 0.9}},
        "ahead": {"rare_recall": {"corner": 0.1}},
    },
}


def reported(run: Path) -> dict[str, Any]:
    recipe = recipes.reported(run, STEPS)
    return recipe | {"evaluation": recipe["evaluation"] | COMPARED}


RECIPE = reported(Path("unused"))
SKILL = (0.9, 0.3, 0.72, 0.76, 0.83, 0.88)
"""Chance that each row's model gives the gold answer."""
EARLIER = json.dumps({"rows": [{"name": "teacher", "slug": "t", "model": "m", "regular": 0.9, "scores": {}}]})


def write_run(folder: Path) -> Path:
    """A whole run folder with made-up numbers; returns its recipe."""
    path = folder / "recipe.yaml"
    recipes.write(path, reported(folder / "run"))
    recipe = load_recipe(path)
    write_scenes(recipe.data_root, ScenesConfig.model_validate(RECIPE["benchmark"]["scenes"]))
    train = read_samples("coda_lm", recipe.data_root, "Train")
    write_evaluation(recipe.run.dir, read_samples("coda_lm", recipe.data_root, "Test"))
    write_hardness(recipe.run.dir, train)
    for seed, name in enumerate(("dense_sft", "moe_sft", "moe_kd", "clkd")):
        write_metrics(recipe.run.dir / "jobs" / name, name, recipe.jobs[name].distill, seed)
    stages = {"scenes": 21.4, "tokenizer": 3.9, "train teacher": 251.0, "teacher": 33.2, "train clkd": 140.8}
    (recipe.run.dir / "stages.json").write_text(json.dumps(stages))
    return path


def write_evaluation(run: Path, samples: Sequence[Sample]) -> None:
    (run / "evaluation").mkdir(parents=True)
    rng, rows, spreads = np.random.default_rng(0), [], {}
    draws = Resamples({s.sample_id: str(s.images[0]) for s in samples})
    for position, config in enumerate(RECIPE["evaluation"]["rows"]):
        slug = re.sub(r"[^a-z]+", "_", config["name"].lower())
        records = [
            {
                "sample_id": s.sample_id,
                "task": s.task,
                "slice": s.slice,
                "prompt": s.prompt,
                "gold": s.answer,
                "prediction": s.answer if rng.random() < SKILL[position] else rng.choice(samples).answer,
                "nats": 20 * (1.1 - SKILL[position]) + rng.random(),
                "tokens": 10,
            }
            for s in samples
        ]
        (run / "evaluation" / f"{slug}.json").write_text(json.dumps({"samples": records}))
        scores, overall = score_all(METRICS, records), score_together(METRICS, records)
        spreads[config["name"]] = {metric: {} for metric in scores}
        for metric in METRICS:
            for part, group in scores[metric.name].items():
                drawn = draws.values(metric, [r for r in records if r["slice"] == part])
                spreads[config["name"]][metric.name][part] = drawn
                group["interval"] = [*interval(drawn)]
        blind_records = [record | {"prediction": "a tram", "nats": 25.0} for record in records]
        scored = (scores, overall, score_all(METRICS, blind_records))
        size = (5_700_000, 5_700_000) if position < 2 else (2_400_000, 1_900_000)
        speed = (41.0, 9.1, 322.0, 1.0) if position < 2 else (17.0, 4.2, 147.0, 2.19)
        blind = config.get("blind", False)
        rows.append(Row(config["name"], slug, config["model"], blind, *scored, *size, *speed))
    settings = EvaluationConfig.model_validate(RECIPE["evaluation"])
    closed = gaps_closed(rows, METRICS, settings, spreads)
    content = {
        "metrics": [metric.described() for metric in METRICS],
        "rows": [asdict(row) | {"gap_closed": closed.get(row.name, {})} for row in rows],
        "bars": [asdict(bar) for bar in bars(rows, METRICS, settings, spreads)],
        "machine": {"cpu": "A processor", "cores": 2, "accelerator": None, "torch": "2.13.0"},
        "date": "2026-11-24T10:00:00+00:00",
        "seed": 7,
        "latency": {"new_tokens": 32, "threads": 1, "experts_implementation": "by_expert"},
    }
    (run / "results.json").write_text(json.dumps(content))


def write_hardness(run: Path, samples: Sequence[Sample]) -> None:
    rng = np.random.default_rng(1)
    corner = np.array([s.slice == "corner" for s in samples])
    prior = rng.beta(2, 5, len(samples)).astype(np.float32)
    table = HardnessTable([s.sample_id for s in samples], [s.task for s in samples], prior)
    table.save(run / "hardness.parquet")
    scores = np.clip(0.8 * prior - 0.1 + 0.15 * corner, 0, 1).astype(np.float32)
    table.update(np.arange(len(samples) - 5), scores[:-5], 100, 0.7)
    table.save(run / "jobs" / "clkd" / "hardness.parquet")


def write_metrics(job_dir: Path, name: str, distill: object, seed: int) -> None:
    rng = np.random.default_rng(seed)
    with MetricsLogger(job_dir, resume_step=0) as logger:
        for step in range(5, STEPS + 1, 5):
            tau = step / STEPS
            percentile_G = np.array([0.5, 0.0, 1.0], np.float32)
            alpha, most, least = (
                release_alpha(tau, percentile_G, np.zeros(3, bool), distill).tolist() if distill else (0.0, 0.0, 0.0)
            )
            ce = 0.9 * np.exp(-3 * tau) + 0.35 - 0.02 * seed + 0.03 * rng.random()
            kl = 0.6 * np.exp(-2 * tau) + 0.03 * rng.random() if alpha else 0.0
            values = {
                "ce": ce,
                "kl": kl,
                "loss": (1 - alpha) * ce + alpha * kl,
                "samples": 16 * step,
                "alpha": alpha,
                "alpha_min": min(most, least),
                "alpha_max": max(most, least),
                "targets_read": 16.0 * (alpha > 0),
                "retired": 40 * tau if name == "clkd" else 0,
                "competence": competence(tau, 0.3, 0.5) if name == "clkd" else 1.0,
                "token_hardness": np.sqrt(1 - np.exp(-kl)),
            }
            if name != "dense_sft":
                load = rng.dirichlet(np.full(4, 8 + 60 * tau), size=2)
                values["expert_load"] = load.tolist()
            logger.log(step, values)


class Page(HTMLParser):
    """Tags, attributes and text of a page; `stack` must end empty."""

    VOID = ("meta", "img", "br")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[str] = []
        self.html = html
        self.feed(html)
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, key, value or "") for key, value in attrs]
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, key, value or "") for key, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.stack or self.stack[-1] not in ("style",):
            self.texts.append(data)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def page(whole: Path) -> Page:
    clkd(["report", str(whole)])
    return Page((whole.parent / "run" / "report.html").read_text())


def rebuild(recipe: Path) -> Page:
    return Page(report.build(load_recipe(recipe), "make demo"))


def test_is_well_formed_and_asks_nothing_of_the_network(page: Page) -> None:
    assert page.stack == []
    for tag, key, value in page.attributes:
        if key in ("src", "href", "xlink:href"):
            assert value.startswith(("data:", "#")), (tag, key, value[:60])
    assert not [tag for tag, _, _ in page.attributes if tag in ("script", "link", "iframe")]


def test_ids_are_unique_and_references_resolve(page: Page) -> None:
    ids = [value for _, key, value in page.attributes if key == "id"]
    assert len(ids) == len(set(ids)) > 100
    used = {v[1:] for _, key, v in page.attributes if key in ("href", "xlink:href") and v.startswith("#")}
    used |= {m for _, _, v in page.attributes for m in re.findall(r"url\(#([^)]*)\)", v)}
    assert used <= set(ids)
    assert used


def test_headline_and_bars_are_those_of_the_results(whole: Path, page: Page) -> None:
    content = json.loads((whole.parent / "run" / "results.json").read_text())
    teacher, student = content["rows"][0], content["rows"][-1]
    values = [row["scores"]["scene_score"]["corner"]["value"] for row in (student, teacher)]
    assert f"{np.floor(1000 * values[0] / values[1]) / 10:.1f}% on corner cases." in page.text
    assert "Of the teacher’s scene score, it reaches" in page.text
    assert "answers 2.19 times as fast" in page.text
    assert "2.19× the teacher’s speed" in page.text
    assert "5.70 million" in page.text
    assert "32 new tokens per answer; threads: 1; expert loop of Mixture-of-Experts models: by_expert" in page.text
    marks = [page.text.count(f"{mark} · bar") for mark in ("✓ reached", "✗ missed", "– not measured")]
    missed = [b for b in content["bars"] if not b["reached"]]
    unknown = sum(b["value"] is None for b in missed)
    assert marks == [sum(b["reached"] for b in content["bars"]), len(missed) - unknown, unknown]


def test_a_bar_missed_by_a_hair_does_not_read_as_reached() -> None:
    bars = [
        ResultBar(name="a", kind="teacher", metric="m", slice="corner", value=0.9496, target=0.95, reached=False),
        ResultBar(name="b", kind="speed", value=1.999, target=2.0, reached=False),
        ResultBar(name="c", kind="teacher", metric="m", slice="night", target=0.95, reached=False),
    ]
    cards = report.cards(bars, [ResultMetric(name="m", title="ROUGE-L", unit="%")])
    assert [(card["figure"], card["target"], card["verdict"]) for card in cards] == [
        ("1.99×", "2×", "missed"),
        ("94.9%", "95%", "missed"),
        ("–", "95%", "not measured"),
    ]
    assert [(card["unit"], card["what"]) for card in cards[1:]] == [
        ("of the teacher’s ROUGE-L", "on corner cases"),
        ("of the teacher’s ROUGE-L", "on night"),
    ]


def test_frames_show_every_task_and_slice_as_the_models_see_them(whole: Path, page: Page) -> None:
    uris = [value for tag, key, value in page.attributes if (tag, key) == ("img", "src")]
    alts = [value for tag, key, value in page.attributes if (tag, key) == ("img", "alt")]
    assert alts == [f"Test frame, {t}, {s}" for s in SLICES for t in TASKS]
    samples = read_samples("coda_lm", whole.parent / "run" / "data", "Test")
    firsts = [next(s for s in samples if (s.slice, s.task) == (part, task)) for part in SLICES for task in TASKS]
    for uri, sample in zip(uris, firsts, strict=True):
        shown = np.array(Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/jpeg;base64,")))), float)
        assert np.abs(shown - np.array(load_image(sample), float)).mean() < 4
        assert sample.prompt in page.text


def test_all_figures_are_there(page: Page) -> None:
    labels = [v for tag, key, v in page.attributes if (tag, key) == ("svg", "aria-label")]
    assert len(labels) == 6 + len(METRICS)
    assert "There is no" not in page.text


def test_the_gap_is_drawn_and_told(whole: Path, page: Page) -> None:
    rows = {row["name"]: row for row in json.loads((whole.parent / "run/results.json").read_text())["rows"]}
    student = rows["MoE student CLKD"]["gap_closed"]["corner"]
    assert f"{100 * student['value']:.0f}%" in page.text
    assert f"{100 * student['interval'][0]:.1f} to {100 * student['interval'][1]:.1f}" in page.text
    assert "of the gap from MoE student SFT to the teacher closed" in page.text
    assert "ahead of MoE student vanilla KD" in page.text and "teacher ahead of MoE student SFT" in page.text


def test_rare_objects_are_counted_by_kind_and_model(whole: Path, page: Page) -> None:
    rows = json.loads((whole.parent / "run/results.json").read_text())["rows"]
    table = page.html.split('<table class="rare">')[1].split("</table>")[0]
    cells = [re.findall(r"<td[^>]*>([^<]*)</td>", line) for line in table.split("<tr")[2:]]
    assert [line[0] for line in cells] == [row["name"] for row in rows]
    shown = [int(n) for n in re.findall(r"(\d+) shown", table)]
    for line, row in zip(cells, rows, strict=True):
        named = sum(int(cell) for cell in line[1:-1] if cell != "–")
        assert named / sum(shown) == pytest.approx(row["scores"]["rare_recall"]["corner"]["value"])
        answers = json.loads((whole.parent / "run/evaluation" / f"{row['slug']}.json").read_text())["samples"]
        parts = row["scores"]["rare_errors"]
        assert int(line[-1]) == pytest.approx(sum(part["value"] * part["n"] for part in parts.values()))
        assert len(answers) > sum(shown) > 0


@contextmanager
def changed(run: Path, files: Mapping[str, str | None]) -> Iterator[None]:
    """Other contents in a run folder for a while; None takes a file or folder away."""
    hidden = {run / name: run / f"hidden{i}" for i, name in enumerate(files)}
    for (path, aside), content in zip(hidden.items(), files.values(), strict=True):
        path.rename(aside)
        if content is not None:
            path.write_text(content)
    try:
        yield
    finally:
        for path, aside in reversed(hidden.items()):
            path.unlink(missing_ok=True)
            aside.rename(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sentences",
    [
        {
            "results.json": "There is no results.json",
            "stages.json": "There is no stages.json",
            "data/CODA-LM/Train": "the training data cannot be read",
        },
        {"evaluation/teacher.json": "There is no teacher.json", "jobs": "No student has logged metrics"},
        {"jobs/clkd/hardness.parquet": "No job has updated the table", "data/CODA-LM/Test": "test data cannot be read"},
        {"hardness.parquet": "There is no hardness table"},
    ],
)
def test_what_is_missing_is_said(whole: Path, sentences: dict[str, str]) -> None:
    with changed(whole.parent / "run", dict.fromkeys(sentences)):
        text = rebuild(whole).text
    assert [sentence for sentence in sentences.values() if sentence not in text] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "broken",
    [
        {
            "results.json": ("{", "results.json cannot be read"),
            "stages.json": ("{}", "No stage has recorded"),
            "hardness.parquet": ("no parquet", "The hardness table hardness.parquet cannot be read"),
        },
        {"results.json": ('{"metrics": [], "rows": [{"name": "teacher"}]}', "is not a result table: rows.0.slug")},
        {"results.json": ("[]", "does not hold a JSON object")},
        {"results.json": (EARLIER, "is of an earlier version, without scores by metric: run `clkd evaluate` again")},
        {
            "evaluation/teacher.json": ('{"samples": [{"sample_id": "a"}]}', "teacher.json is broken"),
            "jobs/clkd/metrics.jsonl": ('{"step": 5, "loss": 1.0}\n{"step": 10, "lo', "Training of the students"),
        },
        {
            "evaluation/teacher.json": ('{"samples": []}', "the answers belong to other data"),
            "jobs/clkd/metrics.jsonl": ('{"step": 5, "loss": NaN, "expert_load": [[1], [2, 3]]}\n', "cannot be drawn"),
        },
    ],
)
def test_what_is_broken_is_said(whole: Path, broken: dict[str, tuple[str, str]]) -> None:
    with changed(whole.parent / "run", {name: content for name, (content, _) in broken.items()}):
        text = rebuild(whole).text
    assert [sentence for _, sentence in broken.values() if sentence not in text] == []


def test_an_empty_run_still_gives_a_page(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    recipes.write(path, recipes.reported(tmp_path / "run", STEPS))
    clkd(["report", str(path)])
    page = Page((tmp_path / "run" / "report.html").read_text())
    assert "the evaluation has not been run" in page.text
    assert "How it was made" in page.text


def test_answers_are_text_and_never_markup(whole: Path) -> None:
    name = "evaluation/moe_student_clkd.json"
    content = json.loads((whole.parent / "run" / name).read_text())
    for record in content["samples"]:
        record["prediction"] = "<script>alert(1)</script> & more"
    with changed(whole.parent / "run", {name: json.dumps(content)}):
        page = rebuild(whole)
    assert page.text.count("<script>alert(1)</script> & more") == 6
    assert not [tag for tag, _, _ in page.attributes if tag == "script"]


@pytest.mark.parametrize(
    ("task", "gold", "prediction", "mark", "label", "notes"),
    [
        ("general", "a car and a bus", "a car, a truck", "part", "F1 0.50", ("left out: bus", "made up: truck")),
        ("general", "a car and a bus", "a bus. a car.", "good", "correct", ()),
        ("region", "a fallen tree far ahead", "a bus near ahead", "bad", "wrong", ()),
        ("suggestion", "keep speed, because x", "keep speed", "good", "correct", ()),
        ("suggestion", "", "keep speed", "none", "not scored", ()),
    ],
)
def test_verdicts_on_drawn_scenes(
    task: str, gold: str, prediction: str, mark: str, label: str, notes: tuple[str, ...]
) -> None:
    found = verdict("student", answered(task, gold, prediction), embedded=True)
    assert (found.mark, found.label, found.notes) == (mark, label, notes)


@pytest.mark.parametrize(
    ("task", "gold", "prediction", "mark", "label"),
    [
        ("suggestion", "There is no need to stop here", "Stop.", "part", "ROUGE-L 0.25"),
        ("general", "a car and a bus", "a car, a truck", "part", "ROUGE-L 0.67"),
        ("qa", "one two three four", "one two", "part", "ROUGE-L 0.67"),
        ("qa", "", "one two", "none", "not scored"),
    ],
)
def test_verdicts_on_other_data_say_what_was_measured(
    task: str, gold: str, prediction: str, mark: str, label: str
) -> None:
    found = verdict("student", answered(task, gold, prediction), embedded=False)
    assert (found.mark, found.label, found.notes) == (mark, label, ())


def answered(task: str, gold: str, prediction: str) -> Answer:
    return Answer(sample_id="a", task=task, prompt="?", gold=gold, prediction=prediction)


# -- data of one's own: any slices and tasks ---------------------------------------------------------------------------


def other_results(slices: Mapping[str, Sequence[str]], **changes: object) -> str:
    """results.json of two models on data whose slices have these tasks."""
    rows = []
    for position, name in enumerate(("teacher", "student")):
        records = [
            {"slice": part, "task": task, "gold": "a b c d", "prediction": "a b c d"[: 7 - 2 * (number % 2)],
             "nats": 8.0 + position, "tokens": 4}
            for part, tasks in slices.items() for number, task in enumerate(tasks)
        ]  # fmt: skip
        scores = score_all(METRICS[3:], records), score_together(METRICS[3:], records), score_all(METRICS[3:], records)
        rows.append(Row(name, name, f"models.{name}", False, *scores, 2_000_000, 1_000_000, 1.0, 1.0, 3.0, 1.5))
    content = {
        "metrics": [metric.described() for metric in METRICS[3:]],
        "rows": [asdict(row) for row in rows],
        "bars": [asdict(bar) for bar in bars(rows, METRICS[3:])],
        "notes": [],
    }
    return json.dumps(content | changes)


def heads(page: Page) -> list[str]:
    """Texts of all cells of tables' heads."""
    return re.findall(r"<th[^>]*>(.*?)</th>", page.html)


def test_the_page_has_the_slices_and_tasks_that_are_there(whole: Path) -> None:
    names = {"night": ("qa", "caption"), "day & $x_1$": ("qa", "caption")}
    with changed(whole.parent / "run", {"results.json": other_results(names)}):
        page = rebuild(whole)
    assert page.stack == []
    found = heads(page)
    for name in ("night", "day &amp; $x_1$"):
        assert found.count(name) == 2 * 2, "in the results and without the image, of either metric"
        assert found.count(f"{name} (2 answers)") == 2
    assert (found.count("qa"), found.count("caption")) == (4, 4)
    assert not {"regular", "corner", "general", "scene score, %"} & set(found)
    assert "on night" in page.text and "gold cross-entropy, nats a token" in page.text
    labels = [v for tag, key, v in page.attributes if (tag, key) == ("svg", "aria-label")]
    assert [label for label in labels if "by slice, one group" in label] == [
        "ROUGE-L by slice, one group of bars per model",
        "gold cross-entropy by slice, one group of bars per model",
    ]
    drawn = [re.sub(r"<[^>]+>", "", text) for text in re.findall(r"<text.*?</text>", page.html)]
    assert "day &amp; $x_1$" in drawn, "a slice's name is no formula"


def test_data_without_slices_have_one_column_and_no_dashes(whole: Path) -> None:
    with changed(whole.parent / "run", {"results.json": other_results({"unknown": ("qa",)})}):
        page = rebuild(whole)
    tables = page.html.split("<table>")[1:]
    assert len(tables) == 3
    for table in tables:
        assert not [cell for cell in re.findall(r"<td[^>]*>(.*?)</td>", table) if cell.strip()[:1] in "–-"]
    assert heads(page).count("all samples") == 2 * 2
    assert "it reaches 100.0% on all samples." in page.text


def test_many_slices_are_summed_up_in_the_first_table(whole: Path) -> None:
    names = {f"s{i}": ("qa",) for i in range(8)}
    with changed(whole.parent / "run", {"results.json": other_results(names)}):
        page = rebuild(whole)
    first = page.html.split("<table>")[1].split("</thead>")[0]
    assert re.findall(r"<th>([^<]*)</th>", first)[1:5] == ["model", "all samples", "all samples", "active"]
    assert "it reaches 100.0% on all samples." in page.text
    assert "s7 (1 answers)" in page.text


def test_a_split_without_gold_answers_says_so(whole: Path) -> None:
    note = "none of the 4 samples has a gold answer: nothing can be scored"
    with changed(whole.parent / "run", {"results.json": other_results({}, notes=[note])}):
        page = rebuild(whole)
    assert note in page.text
    assert "no sample of the test split has a gold answer" in page.text


def test_examples_are_of_evenly_spaced_slices_and_have_a_gold_answer() -> None:
    def sample(number: int, part: str, task: str, gold: str = "yes") -> Sample:
        return Sample(str(number), (), "?", gold, task, part)

    many = [sample(i, f"s{i:02}", "qa") for i in range(12)]
    assert [s.slice for s in _choose(many)] == ["s00", "s02", "s04", "s06", "s08", "s10"]
    few = [sample(0, "a", "qa", ""), sample(1, "a", "qa"), sample(2, "b", "qa", ""), sample(3, "a", "qa")]
    assert [s.sample_id for s in _choose(few)] == ["1", "3", "0", "2"]
    assert [s.sample_id for s in _choose([sample(i, "a", "qa", "") for i in range(9)])] == list("012345")
    assert len(_choose(many)) == NUM_EXAMPLES


def test_colours_of_slices_do_not_repeat_before_they_must() -> None:
    colours = report_plots.slice_colours(["corner", "regular", "unknown", "a", "b", "c", "d"])
    assert len(set(colours.values())) == 7
    assert colours["corner"] == report_plots.SLICE_COLOURS["corner"]


def test_rare_groups_of_a_histogram_are_drawn_as_one() -> None:
    names = [f"t{i}" for i in range(9) for _ in range(9 - i)]
    few = report_plots._few(names)
    assert sorted(set(few)) == ["others", *(f"t{i}" for i in range(7))]
    assert few.count("others") == 2 + 1
    assert report_plots._few(names[:-1]) == names[:-1], "eight are told apart"


def test_running_mean_equals_a_plain_loop() -> None:
    values = np.random.default_rng(0).random(23)
    plain = [values[max(0, i - 3) : i + 4].mean() for i in range(23)]
    np.testing.assert_allclose(report_plots._running_mean(values, 3), plain)


def test_kl_is_not_drawn_where_the_teacher_is_released() -> None:
    rows = [{"step": 1, "alpha": 0.5, "kl": 2.0}, {"step": 2, "alpha": 0.0, "kl": 0.0}, {"step": 3, "alpha": 0.1}]
    steps, values = report_plots.JobCurves("a", "red", rows).series("kl", distilling=True)
    assert steps.tolist() == [1.0]
    assert values.tolist() == [2.0]


@pytest.mark.parametrize(
    ("seconds", "text"), [(8.26, "8.3 s"), (59.97, "1 min 0 s"), (125.2, "2 min 5 s"), (3780, "1 h 3 min")]
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert report_plots.duration(seconds) == text
