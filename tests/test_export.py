"""Exports: an ordinary Hugging Face folder that is the trained model, bit for bit."""

import json
from pathlib import Path
from typing import Any

import pytest
import single_rank
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from pipeline import checkpoint, export
from pipeline.config import Recipe
from pipeline.errors import CheckpointError


@pytest.fixture(params=["moe", "dense", "bf16"])
def trained(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Recipe, Any]:
    """A recipe whose job `x` has one checkpoint, and the engine that wrote it."""
    model = tiny.dense_model() if request.param == "dense" else tiny.moe_model()
    start = model.to(torch.bfloat16) if request.param == "bf16" else model
    start.save_pretrained(tmp_path / "start")
    processor = tmp_path / "processor"
    processor.mkdir()
    (processor / "tokenizer_config.json").write_text('{"made": "by the test"}')
    recipe = Recipe.model_validate(
        {
            "run": {"dir": str(tmp_path / "run")},
            "tokenizer": {"path": str(processor)},
            "models": {"start": {"path": str(tmp_path / "start")}},
            "jobs": {"x": {"init": "models.start", "steps": 2}},
        }
    )
    engine = single_rank.engine(model.float())
    single_rank.train(engine, 0, 2)
    checkpoint.save(engine, recipe.job_dir("x") / "checkpoints", 2, {}, {}, 1)
    return recipe, engine


def test_exported_equals_trained(trained: tuple[Recipe, Any], tmp_path: Path) -> None:
    recipe, engine = trained
    report = export.write_model(recipe, "x")
    folder = recipe.model_dir("jobs.x")
    dtype = getattr(torch, report.dtype)
    loaded = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).eval()
    assert type(loaded).__module__.startswith("transformers.")
    live, wanted = dict(loaded.named_parameters()), single_rank.parameters(engine)
    assert live.keys() == wanted.keys()
    assert all(torch.equal(live[name], wanted[name].to(dtype)) for name in wanted)
    assert (report.step, report.max_tensor_difference, report.max_logit_difference) == (2, 0.0, 0.0)
    if dtype == torch.float32:
        inputs, _ = tiny.global_batch()
        with torch.no_grad():
            torch.testing.assert_close(loaded(**inputs).logits, engine(**inputs).logits, rtol=0, atol=1e-6)
    assert json.loads((folder / "tokenizer_config.json").read_text()) == {"made": "by the test"}
    card = (folder / "README.md").read_text()
    assert "pipeline_tag: image-text-to-text" in card
    assert f"{report.total_parameters:,}" in card


@pytest.mark.parametrize("trained", ["moe"], indirect=True)
def test_command_line_and_replacing(trained: tuple[Recipe, Any], tmp_path: Path) -> None:
    recipe, engine = trained
    (tmp_path / "r.yaml").write_text(recipe.model_dump_json(exclude_none=True))
    out = tmp_path / "out"
    command = ["--config", str(tmp_path / "r.yaml"), "--out", str(out), "job=x"]
    export.main(command)
    first = load_file(out / "model-00001.safetensors")
    single_rank.train(engine, 2, 3)
    checkpoint.save(engine, recipe.job_dir("x") / "checkpoints", 3, {}, {}, 1)
    export.main(command)
    second = load_file(out / "model-00001.safetensors")
    assert json.loads((out / "export.json").read_text())["step"] == 3
    assert any(not torch.equal(first[name], second[name]) for name in first)
    assert not list(tmp_path.glob(".out*"))


def test_no_checkpoint(tmp_path: Path) -> None:
    recipe = Recipe.model_validate({"run": {"dir": str(tmp_path)}, "jobs": {"x": {"init": "elsewhere", "steps": 1}}})
    with pytest.raises(CheckpointError, match="Train first"):
        export.write_model(recipe, "x")


@pytest.mark.parametrize("trained", ["dense"], indirect=True)
def test_wrong_template_changes_nothing(trained: tuple[Recipe, Any], tmp_path: Path) -> None:
    recipe, engine = trained
    other = tiny.moe_model() if engine.module.config.model_type == "qwen3_vl" else tiny.dense_model()
    other.save_pretrained(tmp_path / "other")
    folder = checkpoint.latest(recipe.job_dir("x") / "checkpoints")
    assert folder is not None
    out = tmp_path / "out"
    out.mkdir()
    (out / "kept").write_text("")
    with pytest.raises(CheckpointError, match="other tensors"):
        export.write_hf(folder, tmp_path / "other", out, recipe.processor_dir, "")
    assert [path.name for path in out.iterdir()] == ["kept"]
