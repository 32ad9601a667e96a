"""Exports held against the training engine's own logits: the same model passes, another one does not."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.benchmark import random_models
from pipeline.cli import main as clkd
from pipeline.errors import CheckpointError
from pipeline.export import stage as export
from pipeline.files import put_in_place, weights_hash
from pipeline.models import checkpoint_folder, loading, probe
from pipeline.models.student import upcycle
from pipeline.recipe import RandomModelConfig, TextSize, UpcycleConfig, VisionSize
from pipeline.training import checkpoint
from pipeline.training.export_probe import ExportProbe
from tests.helpers import single_rank, tiny
from tests.helpers.tiny_data import make_processor

TEXT = TextSize(
    hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=16
)
VISION = VisionSize(hidden_size=32, intermediate_size=48, depth=1, num_heads=4)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Folder of an MoE model whose experts, image and routing all matter; its processor."""
    folder = tmp_path_factory.mktemp("probe")
    processor = make_processor(folder / "processor")
    dense = random_models.build(RandomModelConfig(text=TEXT, vision=VISION), processor, seed=0)
    for name, parameter in dense.named_parameters():
        if "language_model" in name and parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    loading.save_model(dense, processor, folder / "dense")
    upcycle(folder / "dense", folder / "moe", UpcycleConfig(source="models.dense", expert_noise=0.5), seed=0)
    return folder, processor


@pytest.fixture
def saved(start: tuple[Path, Any], tmp_path: Path) -> Path:
    """A checkpoint with its probe."""
    folder, processor = start
    engine = single_rank.engine(loading.load_model(folder / "moe"))
    return save(engine, processor, tmp_path / "checkpoints", folder)


def save(engine: Any, processor: Any, root: Path, folder: Path) -> Path:
    """As the training loop saves."""
    arrays, state = ExportProbe(engine, processor, tiny.job()).record()
    template = export.template_files(folder / "moe", folder / "processor")
    return checkpoint.save(engine, root, 1, dict(state), arrays, 1, template)


def test_the_probe_has_an_image_and_fits_the_model(start: tuple[Path, Any]) -> None:
    folder, processor = start
    model = loading.load_model(folder / "moe")
    inputs = probe.make_probe(model.config, processor)
    logits = probe.probe_logits(model, inputs, torch.device("cpu"), torch.float32)
    assert logits.shape == (probe.POSITIONS, model.config.get_text_config().vocab_size)
    inputs["pixel_values"] = np.zeros_like(inputs["pixel_values"])
    blind = probe.probe_logits(model, inputs, torch.device("cpu"), torch.float32)
    assert probe.agreement(blind, logits, (0.0,)).difference > 0.01, "the image does not reach the logits"


def test_an_export_agrees_with_the_engine(saved: Path, tmp_path: Path) -> None:
    report = export.write_hf(saved, tmp_path / "out")
    assert report.logits is not None
    assert report.logits["difference"] < 1e-5 < report.logits["tolerance"] == probe.LEAST_TOLERANCE
    assert not list(tmp_path.glob("*.differs"))


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_coarser_products_widen_the_tolerance(saved: Path, tmp_path: Path, precision: str) -> None:
    """An export on a machine that multiplies float32 in bfloat16 (AMX, GPUs) is no failure."""
    torch.set_float32_matmul_precision(precision)
    try:
        report = export.write_hf(saved, tmp_path / "out")
    finally:
        torch.set_float32_matmul_precision("highest")
    assert report.logits is not None
    assert report.logits["tolerance"] == probe.UNITS * probe.PRECISION[precision]


def test_a_rounded_export_agrees_within_what_rounding_explains(saved: Path, tmp_path: Path) -> None:
    template = checkpoint_folder.read_template(saved)
    config = json.loads(template["config.json"]) | {"dtype": "bfloat16"}
    report = export.write_hf(saved, tmp_path / "out", template | {"config.json": json.dumps(config).encode()})
    assert (report.dtype, report.max_tensor_difference) == ("bfloat16", 0.0)
    assert report.logits is not None and 1e-4 < report.logits["difference"] < report.logits["tolerance"] == 0.25


def other_top_k(template: dict[str, bytes]) -> dict[str, bytes]:
    config = json.loads(template["config.json"])
    config["text_config"]["num_experts_per_tok"] = 1
    return template | {"config.json": json.dumps(config).encode()}


def test_another_configuration_is_refused_and_kept_aside(saved: Path, tmp_path: Path) -> None:
    """Every tensor is right, and the model is another one: only the engine's logits can tell."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("before")
    (tmp_path / "start").mkdir()
    for name, content in other_top_k(checkpoint_folder.read_template(saved)).items():
        (tmp_path / "start" / name).write_bytes(content)
    words = ["export", str(saved), "--out", str(out), "--template", str(tmp_path / "start")]
    with pytest.raises(CheckpointError, match=r"not those that the training engine gave.*--accept-logits"):
        clkd(words)
    assert (out / "mine").read_text() == "before"
    assert (tmp_path / "out.differs" / "config.json").is_file()
    clkd([*words, "--accept-logits"])
    assert not (out / "mine").exists() and not (tmp_path / "out.differs").exists()
    report = json.loads((out / "export.json").read_text())
    assert report["logits"]["difference"] > 0.1 > report["logits"]["tolerance"]


def test_experts_in_another_order_are_seen(saved: Path, tmp_path: Path) -> None:
    """What a mistake of expert parallelism would leave behind: tensors that are whole, in the wrong places."""
    other = tmp_path / "other"
    shutil.copytree(saved, other)
    manifest = json.loads((other / "manifest.json").read_text())
    path = other / "model-00001.safetensors"
    tensors = load_file(path)
    name = next(n for n in tensors if n.endswith("experts.down_proj"))
    tensors[name] = tensors[name].roll(1, dims=0).contiguous()
    save_file(tensors, path)
    manifest["files"][path.name] = checkpoint_folder.fingerprint(path)
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="not those that the training engine gave"):
        export.write_hf(other, tmp_path / "out")


def test_a_checkpoint_without_a_probe_is_compared_by_its_tensors(start: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = start
    engine = single_rank.engine(loading.load_model(folder / "moe"))
    template = export.template_files(folder / "moe", folder / "processor")
    report = export.write_hf(checkpoint.save(engine, tmp_path, 1, {}, {}, 1, template), tmp_path / "out")
    assert (report.logits, report.max_tensor_difference) == (None, 0.0)


def test_one_strange_position_is_not_another_model() -> None:
    """A tie that a router breaks otherwise moves one position far; a NaN anywhere near the middle is refused."""
    engine = np.random.default_rng(0).normal(size=(probe.POSITIONS, 50)).astype(np.float32)
    other = engine.copy()
    other[3] += 1
    assert probe.agreement(other, engine, (2.0**-24,)).holds
    assert not probe.agreement(engine + np.arange(50, dtype=np.float32), engine, (2.0**-24,)).holds
    assert not probe.agreement(np.full_like(engine, np.nan), engine, (2.0**-8,)).holds


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool) -> None:
    if not exchange:  # as on a file system that cannot swap names
        monkeypatch.setattr("pipeline.files._exchange", lambda a, b: False)
    new, old = tmp_path / "new", tmp_path / "model"
    for folder in (new, old):
        folder.mkdir()
        save_file({"x": torch.full((2,), float(folder == new))}, folder / "model.safetensors")
    wanted = weights_hash(new)
    put_in_place(new, old)
    assert weights_hash(old) == wanted
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
