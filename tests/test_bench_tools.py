"""The benchmarks of reading and of sketches run, and say what they must."""

import json

import pytest
import torch
from safetensors.torch import save_file

from tools import bench_reading, bench_sketch


@pytest.mark.slow
def test_reading(tmp_path, capsys):
    path = tmp_path / "figures.json"
    bench_reading.main(["--json", str(path), "--shards", "3", "--samples", "9", "--tokens", "8", "--repeats", "2"])
    figures, table = json.loads(path.read_text()), capsys.readouterr().out
    assert (figures["samples"], figures["shards"]) == (27, 3)
    assert figures["mb"] == pytest.approx(27 * figures["tokens_a_sample"] * 109 / 1e6)
    assert figures["sequential_vs_sequential"] == 1
    for name in ("raw", "in_process", "workers_1", "workers_2"):
        assert 0 < figures[f"{name}_vs_sequential"] < 1
        slowest, fastest = figures[f"{name}_spread"]
        assert 0 < slowest <= 1 <= fastest
        assert name in table


def test_sketches(tmp_path, capsys):
    features, path = tmp_path / "features.safetensors", tmp_path / "figures.json"
    save_file({"cells": torch.randn(40, 96, generator=torch.Generator().manual_seed(0))}, features)
    bench_sketch.main(["--json", str(path), "--features", str(features), "--pairs", "300", "--seeds", "3"])
    figures = json.loads(path.read_text())
    assert capsys.readouterr().out.count("real_cells") == 3
    for name in ("gaussian", "outliers", "real_cells"):
        for dim in (64, 128, 256):
            measured = {what: figures[f"{name}_r{dim}_{what}"] for what in bench_sketch.MEANING}
            assert measured["bytes"] == dim + dim // 32
            assert measured["sd"] == pytest.approx(measured["theory_sd"], rel=0.35)
            assert 0 < measured["int8_sd"] < 0.03 * measured["float_sd"]
