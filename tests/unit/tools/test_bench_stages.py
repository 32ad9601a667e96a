"""The benchmarks of whole stages at their smallest: they run, and their figures have their names."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipeline.data.collate import collate
from tests.helpers import ranks
from tools.bench import step, teacher
from tools.bench.runs import make_run, ratios, rotated


def run(tool: Callable[[list[str]], None], folder: Path, *options: str) -> dict[str, object]:
    """The figures that a tool writes, in a process of its own, as DeepSpeed's state is global."""
    words = ["--json", str(folder / "f.json"), "--scenes", "3", *options]
    assert "ratio" in ranks.run(tool, words, env={"TMPDIR": str(folder)}).stdout
    return json.loads((folder / "f.json").read_text())


@pytest.mark.slow
def test_bench_step_compares_cached_targets_and_a_teacher_in_the_loop_with_sft(tmp_path):
    figures = run(step.main, tmp_path, "--rounds", "1", "--steps", "1")
    for way in ("sft", "cached", "online"):
        assert figures[f"{way}_ms"] > figures[f"{way}_wait_ms"] > 0
    assert figures["cached_vs_sft"] == pytest.approx(figures["cached_ms"] / figures["sft_ms"])
    assert figures["online_ms"] > figures["online_teacher_ms"] > 0
    assert 0 < figures["targets_read_ms"] < figures["cached_ms"] and figures["tokens_per_step"] > 16
    assert [figures[f"{way}_targets_read"] for way in ("sft", "cached", "released", "online")] == [0, 16, 0, 0]


@pytest.mark.slow
def test_bench_teacher_compares_the_pass_with_the_bare_forward(tmp_path):
    figures = run(teacher.main, tmp_path, "--repeats", "1", "--width", "128", "--layers", "2", "--vocab", "2000")
    for way in ("targets", "stored", "whole"):
        assert figures[f"{way}_vs_bare"] == pytest.approx(figures[f"{way}_ms"] / figures["bare_ms"])
    assert figures["targets_cpu_vs_bare_cpu"] > 0.5
    assert figures["samples"] > 8 and figures["tokens"] > figures["samples"]


def test_the_teacher_in_the_loop_reads_the_batch_that_the_pass_reads(tmp_path):
    """From a training micro-batch back to the labels that it was made from."""
    from pipeline.data.processor import Processor
    from pipeline.data.readers import read_samples
    from pipeline.training.batches import MicroBatches, Request
    from tools.bench.step import batch_of

    recipe = make_run(tmp_path / "run", 3, [])
    processor = Processor.load(recipe.processor_dir, recipe.data)
    samples = read_samples(recipe.data.format, recipe.data_root, recipe.data.train_split)
    index = torch.arange(4).numpy()
    micro = MicroBatches(samples, processor, None, [Request(index, 0 * index.astype("float32"))], None)[0]
    encoded = [processor.encode(sample) for sample in samples[:4]]
    wanted = collate(encoded, processor.pad_id, processor.image_token_id)
    got = batch_of(micro)
    assert got.keys() == wanted.keys()
    for key, value in wanted.items():
        same = torch.equal(got[key], value) if isinstance(value, torch.Tensor) else got[key] == value
        assert same, key


def test_ratios_are_taken_within_a_round():
    figures = ratios({"base": [1.0, 2.0, 4.0], "other": [2.0, 4.0, 4.0]}, "base")
    assert figures["base_ms"] == 2000 and figures["other_vs_base"] == 2.0
    assert (figures["other_vs_base_q1"], figures["other_vs_base_q3"]) == (1.5, 2.0)


def test_every_way_comes_first_once():
    assert [rotated(["a", "b", "c"], turn)[0] for turn in range(3)] == ["a", "b", "c"]
