"""Upcycling: the student computes what the dense model did, unless told otherwise, and says so."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, LlamaConfig

from pipeline.cli import main as clkd
from pipeline.errors import ConfigError, UserError
from pipeline.models import hf_folder
from pipeline.models.router import RouterProbe
from pipeline.models.student import upcycle
from pipeline.recipe import UpcycleConfig
from tests.helpers import tiny


@pytest.fixture(scope="module")
def dense_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense") / "model"
    tiny.dense_model().save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def settings(**changes: object) -> UpcycleConfig:
    return UpcycleConfig.model_validate({"source": "models.dense", "expert_noise": 0.0} | changes)


def logits(folder: Path) -> torch.Tensor:
    """Of a global batch with images, so that vision tower and deepstack take part."""
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(**tiny.global_batch()[0]).logits


@pytest.mark.parametrize("every", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_exact_copies_compute_the_dense_function(dense_dir: Path, tmp_path: Path, every: int) -> None:
    report = upcycle(dense_dir, tmp_path / "moe", settings(every=every), seed=0)
    torch.testing.assert_close(logits(tmp_path / "moe"), logits(dense_dir), rtol=0, atol=1e-5)
    assert report.function_preserved
    assert report.logit_change.max < 1e-5
    assert max(report.layer_change) < 1e-6
    assert report.moe_layers == ([1, 3] if every == 2 else [0, 1, 2, 3])


def test_dense_tensors_map_one_to_one(dense_dir: Path, tmp_path: Path) -> None:
    """Vision tower, deepstack mergers, attention, norms and the MLPs of dense layers are the same bytes."""
    upcycle(dense_dir, tmp_path / "moe", settings(expert_noise=0.1), seed=0)
    old, new = (
        load_file(dense_dir / "model.safetensors"),
        load_file(tmp_path / "moe" / "model-00001-of-00001.safetensors"),
    )
    replaced = {name for name in old if any(f"layers.{i}.mlp." in name for i in (1, 3))}
    assert len(replaced) == 6
    assert any("deepstack" in name for name in old.keys() - replaced)
    assert all(torch.equal(new[name], old[name]) for name in old.keys() - replaced)
    assert {name.split("mlp.")[1] for name in new.keys() - old.keys()} == {
        "gate.weight",
        "experts.gate_up_proj",
        "experts.down_proj",
    }


def test_layout_on_disk_is_the_published_one(dense_dir: Path, tmp_path: Path) -> None:
    """Qwen3-VL-MoE checkpoints hold experts input-first: [E, H, 2W] and [E, W, H]."""
    upcycle(dense_dir, tmp_path / "moe", settings(), seed=0)
    stored = load_file(tmp_path / "moe" / "model-00001-of-00001.safetensors")
    dense = load_file(dense_dir / "model.safetensors")
    mlp = "model.language_model.layers.1.mlp."
    gate_up = torch.cat([dense[f"{mlp}gate_proj.weight"], dense[f"{mlp}up_proj.weight"]])
    for expert in range(4):
        assert torch.equal(stored[f"{mlp}experts.gate_up_proj"][expert], gate_up.T)
        assert torch.equal(stored[f"{mlp}experts.down_proj"][expert], dense[f"{mlp}down_proj.weight"].T)


def test_noise_is_relative_differs_and_is_reported(dense_dir: Path, tmp_path: Path) -> None:
    report = upcycle(dense_dir, tmp_path / "moe", settings(expert_noise=0.05), seed=0)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "moe")
    down = model.model.language_model.layers[1].mlp.experts.down_proj.detach()
    dense = tiny.dense_model().model.language_model.layers[1].mlp.down_proj.weight.detach()
    for expert in range(4):  # expert 0 too
        assert (down[expert] - dense).std() / dense.square().mean().sqrt() == pytest.approx(0.05, rel=0.1)
    assert not torch.equal(down[0], down[1])
    assert not report.function_preserved
    change = (logits(tmp_path / "moe") - logits(dense_dir)).abs()
    assert 0 < report.logit_change.max < 5 * change.max()
    assert 0 < report.logit_change.mean < report.logit_change.mean_logit_size


@pytest.mark.slow
def test_perturbed_experts_give_the_router_a_gradient(dense_dir: Path, tmp_path: Path) -> None:
    """Identical copies leave it dead: the reason for `expert_noise`."""
    sizes = []
    for noise in (0.0, 0.05):
        upcycle(dense_dir, tmp_path / str(noise), settings(expert_noise=noise), seed=0)
        model = AutoModelForImageTextToText.from_pretrained(tmp_path / str(noise))
        inputs, labels = tiny.global_batch()
        tiny.loss_sum(model(**inputs).logits, labels).backward()
        sizes.append(float(model.model.language_model.layers[1].mlp.gate.weight.grad.abs().max()))
    assert sizes[0] < 1e-4 * sizes[1]


@pytest.mark.parametrize(
    ("width", "experts", "top_k"),
    [(1 / 6, 12, 6), *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((1 / 2, 4, 2), (1 / 2, 8, 4)))],
)
def test_fine_grained_experts_preserve_the_function(
    dense_dir: Path, tmp_path: Path, width: float, experts: int, top_k: int
) -> None:
    """Every copy of the MLP is cut into shards that are chosen together: columns appear once per copy."""
    report = upcycle(dense_dir, tmp_path / "moe", settings(expert_width=width, experts=experts, top_k=top_k), seed=0)
    torch.testing.assert_close(logits(tmp_path / "moe"), logits(dense_dir), rtol=0, atol=1e-5)
    assert report.function_preserved
    assert max(report.layer_change) < 1e-6
    assert report.active_parameters < report.total_parameters
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "moe")
    block = model.model.language_model.layers[1].mlp
    dense = tiny.dense_model().model.language_model.layers[1].mlp
    shards, copies = round(1 / width), round(experts * width)
    assert len({tuple(row.tolist()) for row in block.gate.weight}) == copies
    columns: list[int] = []
    for expert in range(0, experts, round(copies)):  # one copy's experts
        gate, up = block.experts.gate_up_proj[expert].chunk(2)
        chosen = [int((dense.gate_proj.weight - row).abs().sum(-1).argmin()) for row in gate]
        assert torch.equal(gate, dense.gate_proj.weight[chosen])
        assert torch.equal(up, dense.up_proj.weight[chosen])
        assert torch.equal(block.experts.down_proj[expert], shards * dense.down_proj.weight[:, chosen])
        columns += chosen
    assert sorted(columns) == list(range(48))


@pytest.mark.slow
def test_layers_by_list(dense_dir: Path, tmp_path: Path) -> None:
    report = upcycle(dense_dir, tmp_path / "moe", settings(layers=[2, 0]), seed=0)
    assert report.moe_layers == [0, 2]
    torch.testing.assert_close(logits(tmp_path / "moe"), logits(dense_dir), rtol=0, atol=1e-5)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "moe")
    kinds = [type(layer.mlp).__name__ for layer in model.model.language_model.layers]
    assert [kind.endswith("SparseMoeBlock") for kind in kinds] == [True, False, True, False]
    assert len(RouterProbe(model)) == 2


def test_router_and_configuration(dense_dir: Path, tmp_path: Path) -> None:
    upcycle(dense_dir, tmp_path / "moe", settings(router_noise=0.3, experts=6, top_k=3), seed=0)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "moe")
    text = model.config.get_text_config()
    assert model.config.model_type == "qwen3_vl_moe"
    assert (text.num_experts, text.num_experts_per_tok, text.moe_intermediate_size) == (6, 3, 48)
    assert json.loads((tmp_path / "moe" / "config.json").read_text())["text_config"]["norm_topk_prob"] is True
    assert len(RouterProbe(model)) == 2
    gate = model.model.language_model.layers[1].mlp.gate.weight
    assert gate.shape == (6, 32)
    assert float(gate.detach().std()) == pytest.approx(0.3, rel=0.15)


def test_restartable_and_deterministic(dense_dir: Path, tmp_path: Path) -> None:
    config = settings(expert_noise=0.1)
    first = upcycle(dense_dir, tmp_path / "a", config, seed=3)
    made = (tmp_path / "a" / "model-00001-of-00001.safetensors").stat().st_mtime_ns
    assert upcycle(dense_dir, tmp_path / "a", config, seed=3) == first
    assert (tmp_path / "a" / "model-00001-of-00001.safetensors").stat().st_mtime_ns == made
    upcycle(dense_dir, tmp_path / "b", config, seed=3)
    a, b = (load_file(tmp_path / name / "model-00001-of-00001.safetensors") for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert (tmp_path / "a" / "tokenizer.json").is_file()
    with pytest.raises(UserError, match=r"seed: there 3, recipe 4"):
        upcycle(dense_dir, tmp_path / "a", config, seed=4)


def test_command_line_builds_a_models_entry(
    dense_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"run: {{dir: {tmp_path / 'run'}}}\n"
        f"models: {{dense: {{path: {dense_dir}}}, moe: {{upcycle: {{source: models.dense}}}}}}\n"
    )
    clkd(["student", str(recipe), "--model", "moe"])
    report = json.loads((tmp_path / "run" / "models" / "moe" / "upcycle.json").read_text())
    assert report["moe_layers"] == [1, 3]
    assert report["settings"]["expert_noise"] == 0.02
    assert str(tmp_path / "run" / "models" / "moe") in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"no such entry; models: \['dense', 'moe'\]"):
        clkd(["student", str(recipe), "--model", "absent"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"top_k": 1}, "no gradient"),
        ({"top_k": 4, "experts": 3}, "top_k 4 exceeds experts 3"),
        ({"every": 5}, "only 4 layers"),
        ({"layers": [1, 4, 7]}, r"layers \[4, 7\]: the model has layers 0 to 3"),
        ({"layers": []}, "the list is empty"),
        ({"expert_width": 0.3}, "cannot be cut into 3.33333 equal experts"),
        ({"expert_width": 1 / 5}, "the 48 columns of the MLP cannot be cut into 5"),
        ({"expert_width": 1 / 4, "experts": 8, "top_k": 4}, "experts of width 12: .* a multiple of 8"),
        ({"expert_width": 1 / 3, "experts": 6, "top_k": 3}, "square"),
        ({"expert_width": 1 / 2, "experts": 5, "top_k": 3}, "experts 5 is not a multiple of 2.*top_k 3 is not"),
        ({"expert_width": 1 / 2, "router_noise": 0.0}, "router_noise 0.*tie"),
        ({"shared_expert": 0.5}, "qwen3_vl_moe_text has no shared expert"),
    ],
)
def test_refusals(dense_dir: Path, tmp_path: Path, changes: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        upcycle(dense_dir, tmp_path / "moe", settings(**changes), seed=0)
    assert not (tmp_path / "moe").exists()


def test_unknown_family_and_incomplete_source(dense_dir: Path, tmp_path: Path) -> None:
    tiny.moe_model().save_pretrained(tmp_path / "already")
    with pytest.raises(UserError, match=r"'qwen3_vl_moe'.*has experts already.*qwen3_vl with qwen3_vl_text, internvl"):
        upcycle(tmp_path / "already", tmp_path / "moe", settings(), seed=0)
    (tmp_path / "llama").mkdir()
    LlamaConfig().save_pretrained(tmp_path / "llama")
    with pytest.raises(UserError, match=r"'llama' with text model 'llama' cannot be upcycled.*qwen2\. Nothing"):
        upcycle(tmp_path / "llama", tmp_path / "moe", settings(), seed=0)
    with pytest.raises(UserError, match=r"no checkpoint \(no config.json\)"):
        upcycle(tmp_path / "absent", tmp_path / "moe", settings(), seed=0)
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "config.json").write_bytes((dense_dir / "config.json").read_bytes())
    tensors = load_file(dense_dir / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if "up_proj" not in n}, tmp_path / "part" / "model.safetensors")
    with pytest.raises(UserError, match="layer 1 has no \\['up'\\] projection"):
        upcycle(tmp_path / "part", tmp_path / "moe", settings(), seed=0)
    assert not list(tmp_path.glob(".moe*"))


def test_command_line_without_a_recipe(dense_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "moe"
    clkd(
        [
            "upcycle",
            str(dense_dir),
            str(out),
            "--experts",
            "8",
            "--top-k",
            "4",
            "--layers",
            "1,2",
            "--expert-width",
            ".5",
        ]
    )
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((out / "upcycle.json").read_text())
    assert (report["moe_layers"], report["settings"]["experts"], report["logit_change"]) == ([1, 2], 8, None)
    assert all(0.005 < change < 0.1 for change in report["layer_change"])  # expert_noise 0.02
    assert (logits(out) - logits(dense_dir)).abs().max() > 0
    with pytest.raises(ConfigError, match=r"--experts: .*greater than or equal to 1, got 0"):
        clkd(["upcycle", str(dense_dir), str(tmp_path / "b"), "--experts", "0"])
    with pytest.raises(UserError, match=r"settings\.experts: there 8, recipe 4"):
        clkd(["upcycle", str(dense_dir), str(out)])


@pytest.mark.slow
def test_layer_change_is_what_the_layers_do(dense_dir: Path, tmp_path: Path) -> None:
    """Against Hugging Face's modules on inputs of our own."""
    report = upcycle(dense_dir, tmp_path / "moe", settings(expert_noise=0.1), seed=0)
    moe = AutoModelForImageTextToText.from_pretrained(tmp_path / "moe").eval()
    x = torch.randn(1, 2000, 32, generator=torch.Generator().manual_seed(5))
    for layer, stated in zip(report.moe_layers, report.layer_change, strict=True):
        with torch.no_grad():
            old = tiny.dense_model().model.language_model.layers[layer].mlp(x)
            new = moe.model.language_model.layers[layer].mlp(x)
        assert stated == pytest.approx(float((new - old).norm() / old.norm()), rel=0.15)


@pytest.mark.slow
def test_any_number_of_shards_loads(dense_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written tensor by tensor; read by safetensors and transformers, whatever the bounds of a shard."""
    upcycle(dense_dir, tmp_path / "one", settings(), seed=0)
    monkeypatch.setattr(hf_folder, "SHARD_BYTES", 40_000)
    upcycle(dense_dir, tmp_path / "bytes", settings(), seed=0)
    monkeypatch.setattr(hf_folder, "SHARD_BYTES", 4 << 30)
    monkeypatch.setattr(hf_folder, "HEADER_BYTES", 2048)
    upcycle(dense_dir, tmp_path / "names", settings(), seed=0)
    (whole,) = (tmp_path / "one").glob("*.safetensors")
    wanted = load_file(whole)
    for name in ("bytes", "names"):
        files = sorted((tmp_path / name).glob("*.safetensors"))
        assert len(files) > 3
        assert files[-1].name == f"model-{len(files):05d}-of-{len(files):05d}.safetensors"
        stored = {key: tensor for file in files for key, tensor in load_file(file).items()}
        assert stored.keys() == wanted.keys()
        assert all(torch.equal(stored[key], tensor) for key, tensor in wanted.items())
        assert torch.equal(logits(tmp_path / name), logits(tmp_path / "one"))
