"""Exports: an ordinary Hugging Face folder that is the trained model, bit for bit. Foreign code is never run."""

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import silu
from transformers import AutoConfig, AutoModelForImageTextToText, Qwen3VLMoeConfig
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextExperts

from pipeline.benchmark import random_models
from pipeline.cli import main as clkd
from pipeline.data.collate import collate
from pipeline.errors import CheckpointError, ConfigError, UserError
from pipeline.export import stage as export
from pipeline.files import weights_hash
from pipeline.models import checkpoint_folder, loading
from pipeline.models.hf_folder import DiskLayout
from pipeline.models.student import upcycle
from pipeline.recipe import RandomModelConfig, Recipe, TextSize, UpcycleConfig, VisionSize
from pipeline.training import checkpoint
from pipeline.training import job_settings as train
from tests.helpers import single_rank, tiny
from tests.helpers.paths import HELPERS
from tests.helpers.tiny_data import corpus, make_processor, save_image

STATE: dict[str, Any] = {"metrics": {"loss": 1.25, "kl": 0.5}}


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
            "data": {"root": str(tmp_path / "data"), "processor": str(processor)},
            "models": {"start": {"path": str(tmp_path / "start")}},
            "jobs": {"x": {"init": "models.start", "steps": 2}},
        }
    )
    engine = single_rank.engine(model.float())
    single_rank.train(engine, 0, 2)
    save(recipe, engine, 2)
    return recipe, engine


def save(recipe: Recipe, engine: Any, step: int) -> Path:
    """As the training loop saves."""
    template = export.template_files(recipe.model_dir(recipe.jobs["x"].init), recipe.processor_dir)
    state = {
        "about": train.about(recipe, "x", 40),
        "fingerprint": train.settings(recipe, "x"),
        **STATE,
    }
    return checkpoint.save(engine, recipe.job_dir("x") / "checkpoints", step, state, {}, 1, template)


def tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


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
    assert (report.step, report.max_tensor_difference) == (2, 0.0)
    if dtype == torch.float32:
        inputs, _ = tiny.global_batch()
        with torch.no_grad():
            torch.testing.assert_close(loaded(**inputs).logits, engine(**inputs).logits, rtol=0, atol=1e-6)
    assert json.loads((folder / "tokenizer_config.json").read_text()) == {"made": "by the test"}
    assert (folder / "generation_config.json").is_file()


@pytest.mark.parametrize("trained", ["moe"], indirect=True)
def test_the_card_has_the_runs_figures(trained: tuple[Recipe, Any]) -> None:
    recipe, _ = trained
    report = export.write_model(recipe, "x")
    weights = weights_hash(recipe.model_dir("jobs.x"))
    metrics = [
        {"name": "rouge_l", "title": "ROUGE-L", "unit": "%", "about": "Words in common."},
        {"name": "gold_ce", "title": "gold cross-entropy", "unit": "nats a token", "about": "Lower is better."},
    ]
    folder = recipe.run.dir / "evaluation"
    folder.mkdir()
    for name, digest, blind in (("other", "0" * 32, False), ("x-blind", weights, True), ("x", weights, False)):
        value = 0.625 if name == "x" else 0.9
        tasks = {task: {"value": value, "n": 15} for task in ("qa", "a|b")}
        night = {"value": value, "n": 30, "tasks": tasks}
        day = {"value": 1.5, "n": 10, "tasks": {"qa": {"value": 1.5, "n": 10}}}
        scores = {"rouge_l": {"night": night}, "gold_ce": {"day": day}}
        content = {"identity": {"weights": digest}, "blind": blind, "metrics": metrics, "scores": scores}
        content["overall"] = {"rouge_l": {"value": 0.55, "n": 40, "tasks": {}}}
        (folder / f"{name}.json").write_text(json.dumps(content))
    older = {"identity": {"weights": weights}, "blind": False, "scores": {"corner": {"mean": 0.9, "rouge_l": 0.9}}}
    (folder / "a.json").write_text(json.dumps(older))
    export.write_model(recipe, "x")
    card = (recipe.model_dir("jobs.x") / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: image-text-to-text\n---\n\n# x\n")
    for fact in (
        "supervised fine-tuning, starting from `models.start`: 2 steps of 64 samples, adamw",
        f"{report.total_parameters:,}",
        f"{report.active_parameters:,}",
        "4, 2 per token, in layers [1, 3]",
        "Qwen3VLMoeForConditionalGeneration",
        f"float32, step 2, xxh3-128 {weights}",
        "split Train, 40 samples",
        "| loss | 1.25 |",
        "| ROUGE-L, % | night | all | 62.5 | 30 |\n| ROUGE-L, % | night | qa | 62.5 | 15 |",
        "| ROUGE-L, % | night | a\\|b | 62.5 | 15 |\n| ROUGE-L, % | all samples | all | 55.0 | 40 |",
        "| gold cross-entropy, nats a token | day | qa | 1.5000 | 10 |",
        "- ROUGE-L, %: Words in common.",
        "## Licence",
    ):
        assert fact in card, fact
    assert "90.0" not in card
    assert str(recipe.run.dir) not in card


@pytest.mark.parametrize("trained", ["moe"], indirect=True)
def test_command_line_and_replacing(trained: tuple[Recipe, Any], tmp_path: Path) -> None:
    """A recipe's job, a job's folder, its checkpoints, one of them, and one that was copied away alone: all equal."""
    recipe, engine = trained
    (tmp_path / "r.yaml").write_text(recipe.model_dump_json(exclude_none=True))
    out = tmp_path / "out"
    clkd(["export", str(tmp_path / "r.yaml"), "--out", str(out), "job=x"])
    first = tensors(out)
    job = recipe.job_dir("x")
    newest = save(recipe, engine, 3)
    shutil.copytree(newest, tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "start")
    for path in (job, job / "checkpoints", newest, tmp_path / "elsewhere"):
        clkd(["export", str(path), "--out", str(out)])
        assert json.loads((out / "export.json").read_text())["step"] == 3
        assert all(torch.equal(tensor, first[name]) for name, tensor in tensors(out).items())
        assert json.loads((out / "tokenizer_config.json").read_text()) == {"made": "by the test"}
    assert not list(tmp_path.glob(".out*"))
    for words in ([], [str(job), "more"], [str(tmp_path / "r.yaml"), "job=x", "--template", str(job)]):
        with pytest.raises(ConfigError, match="clkd export"):
            clkd(["export", "--out", str(out), *words])
    with pytest.raises(CheckpointError, match="no checkpoint"):
        clkd(["export", str(tmp_path), "--out", str(out)])


def test_no_checkpoint(tmp_path: Path) -> None:
    recipe = Recipe.model_validate({"run": {"dir": str(tmp_path)}, "jobs": {"x": {"init": "elsewhere", "steps": 1}}})
    with pytest.raises(CheckpointError, match="Train first"):
        export.write_model(recipe, "x")


@pytest.mark.parametrize("trained", ["dense"], indirect=True)
def test_a_checkpoint_without_a_template_needs_one(trained: tuple[Recipe, Any], tmp_path: Path) -> None:
    _, engine = trained
    folder = checkpoint.save(engine, tmp_path / "bare", 5, {}, {}, 1)
    with pytest.raises(CheckpointError, match="--template DIR"):
        clkd(["export", str(folder), "--out", str(tmp_path / "out")])
    with pytest.raises(UserError, match=r"no config\.json"):
        clkd(["export", str(folder), "--out", str(tmp_path / "out"), "--template", str(tmp_path)])
    assert not (tmp_path / "out").exists()
    clkd(["export", str(folder), "--out", str(tmp_path / "out"), "--template", str(tmp_path / "start")])
    assert "# Exported model" in (tmp_path / "out" / "README.md").read_text()
    assert tensors(tmp_path / "out").keys() == single_rank.parameters(engine).keys()


@pytest.mark.parametrize("trained", ["dense"], indirect=True)
def test_wrong_template_changes_nothing(trained: tuple[Recipe, Any], tmp_path: Path) -> None:
    recipe, _ = trained
    tiny.moe_model().save_pretrained(tmp_path / "other")
    folder = checkpoint_folder.latest(recipe.job_dir("x") / "checkpoints")
    assert folder is not None
    out = tmp_path / "out"
    out.mkdir()
    (out / "kept").write_text("")
    with pytest.raises(CheckpointError, match="other tensors"):
        export.write_hf(folder, out, export.template_files(tmp_path / "other"))
    assert [path.name for path in out.iterdir()] == ["kept"]


# --- pickle -----------------------------------------------------------------------------------------------


class Canary:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def plant(folder: Path, canary: Path) -> None:
    """Pickles under the names that training and checkpoint tools look for."""
    torch.save({"x": Canary(canary)}, folder / "pytorch_model.bin")
    for name in ("training_args.bin", "optimizer.pt", "mp_rank_00_model_states.pt", "tokenizer.pkl", "scaler.ckpt"):
        (folder / name).write_bytes(pickle.dumps(Canary(canary)))


@pytest.mark.parametrize("trained", ["moe"], indirect=True)
def test_planted_pickles_are_never_run(trained: tuple[Recipe, Any], tmp_path: Path) -> None:
    recipe, _ = trained
    folder, canary, out = checkpoint_folder.find(recipe.job_dir("x")), tmp_path / "canary", tmp_path / "out"
    for planted in (tmp_path / "start", recipe.processor_dir):
        plant(planted, canary)
    clkd(["export", str(folder), "--out", str(out), "--template", str(tmp_path / "start")])
    export.write_model(recipe, "x")
    loading.load_model(tmp_path / "start")
    for written in (out, recipe.model_dir("jobs.x")):
        assert {path.suffix for path in written.iterdir()} <= {".json", ".safetensors", ".md"}
    for inside in (folder, folder / "template"):
        plant(inside, canary)
        with pytest.raises(CheckpointError, match="not written with this checkpoint"):
            clkd(["export", str(folder), "--out", str(out)])
        for path in inside.iterdir():
            if path.suffix in (".bin", ".pt", ".pkl", ".ckpt"):
                path.unlink()
    for path in (tmp_path / "start").glob("*.safetensors"):
        path.unlink()
    with pytest.raises(UserError, match=r"pytorch_model\.bin.*pickle, which can run any code and is not read"):
        loading.load_model(tmp_path / "start")
    assert not canary.exists()
    torch.load(tmp_path / "start" / "pytorch_model.bin", weights_only=False)
    assert canary.exists()  # it would have


# --- layout on disk ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", ["moe"], indirect=True)
def test_names_and_shapes_are_those_of_published_checkpoints(trained: tuple[Recipe, Any], tmp_path: Path) -> None:
    """Names as transformers saves them; shapes too, but packed experts [E, H, 2W] and [E, W, H], as Qwen publishes."""
    recipe, _ = trained
    export.write_model(recipe, "x")
    found = {name: tuple(tensor.shape) for name, tensor in tensors(recipe.model_dir("jobs.x")).items()}
    tiny.moe_model().save_pretrained(tmp_path / "saved")
    saved = {name: tuple(tensor.shape) for name, tensor in tensors(tmp_path / "saved").items()}
    assert found.keys() == saved.keys()
    experts = {name for name in found if ".experts." in name}
    assert {name: found[name] for name in found if name not in experts} == {
        name: saved[name] for name in saved if name not in experts
    }
    hidden, width = tiny.TEXT["hidden_size"], tiny.EXPERTS["moe_intermediate_size"]
    for layer in (1, 3):
        prefix = f"model.language_model.layers.{layer}.mlp."
        assert found.pop(f"{prefix}experts.gate_up_proj") == (4, hidden, 2 * width)
        assert found.pop(f"{prefix}experts.down_proj") == (4, width, hidden)
        assert found[f"{prefix}gate.weight"] == (4, hidden)
    assert not any(".experts." in name for name in found)
    # Qwen/Qwen3-VL-30B-A3B-Instruct, 128 experts, hidden size 2048, width 768 (huggingface/transformers#43201).
    text = {"num_experts": 128, "hidden_size": 2048, "moe_intermediate_size": 768, "num_hidden_layers": 1}
    layout, wide = DiskLayout(Qwen3VLMoeConfig(text_config=text)), "model.language_model.layers.0.mlp.experts."
    with torch.device("meta"):
        experts_of = Qwen3VLMoeTextExperts(Qwen3VLMoeConfig(text_config=text).text_config)
    stored = [pair for n, p in experts_of.named_parameters() for pair in layout(wide + n, p.detach())]
    packed = {name.removeprefix(wide): tuple(tensor.shape) for name, tensor in stored}
    assert packed == {"gate_up_proj": (128, 2048, 1536), "down_proj": (128, 768, 2048)}


@pytest.mark.parametrize("trained", ["moe"], indirect=True)
def test_the_configuration_reads_alike_in_old_and_new_forms(trained: tuple[Recipe, Any], tmp_path: Path) -> None:
    """transformers 5 reads what training used; an older form's reader, here plain JSON, finds its own keys."""
    recipe, _ = trained
    export.write_model(recipe, "x")
    folder = recipe.model_dir("jobs.x")
    ours, theirs = (AutoConfig.from_pretrained(path).to_dict() for path in (folder, tmp_path / "start"))
    assert ours.pop("_name_or_path") != theirs.pop("_name_or_path")
    assert ours == theirs
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Qwen3VLMoeForConditionalGeneration"]
    rope = dict(tiny.TEXT["rope_parameters"])
    assert config["text_config"]["num_experts"] == tiny.EXPERTS["num_experts"]
    assert config["text_config"]["rope_theta"] == rope.pop("rope_theta")
    assert config["text_config"]["rope_scaling"] == rope


@pytest.mark.parametrize("trained", ["moe"], indirect=True)
def test_serving_engines_reading_of_the_experts_is_the_model(trained: tuple[Recipe, Any]) -> None:
    """vLLM and SGLang transpose the packed tensors and halve gate_up_proj's rows: w1 (gate), then w3 (up); w2 is down.

    One expert computed from that reading equals transformers' module.
    """
    recipe, _ = trained
    export.write_model(recipe, "x")
    folder = recipe.model_dir("jobs.x")
    prefix = "model.language_model.layers.1.mlp.experts"
    stored = tensors(folder)
    w1_EWH, w3_EWH = stored[f"{prefix}.gate_up_proj"].transpose(-1, -2).chunk(2, dim=-2)
    w2_EHW = stored[f"{prefix}.down_proj"].transpose(-1, -2)
    module = AutoModelForImageTextToText.from_pretrained(folder).get_submodule(prefix)
    x_TH = torch.randn(5, tiny.TEXT["hidden_size"], generator=torch.Generator().manual_seed(0))
    for expert in range(4):
        ours = (silu(x_TH @ w1_EWH[expert].T) * (x_TH @ w3_EWH[expert].T)) @ w2_EHW[expert].T
        with torch.no_grad():
            theirs = module(x_TH, torch.full((5, 1), expert), torch.ones(5, 1))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("trained", ["moe"], indirect=True)
def test_the_index_names_every_tensor(trained: tuple[Recipe, Any]) -> None:
    recipe, _ = trained
    export.write_model(recipe, "x")
    folder = recipe.model_dir("jobs.x")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    there = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            there |= dict.fromkeys(file.keys(), path.name)
            assert file.metadata() == {"format": "pt"}
    assert index["weight_map"] == there
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors(folder).values())


# --- as a user loads it -----------------------------------------------------------------------------------

QUESTION, TOKENS = "Which objects affect the ego car?", 12


@pytest.fixture(scope="module")
def answering(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """Folder of an MoE student with real tokenizer and image processor, its engine after two steps, its processor."""
    folder = tmp_path_factory.mktemp("answering")
    processor = make_processor(folder / "processor")
    text = TextSize(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    vision = VisionSize(hidden_size=32, intermediate_size=48, depth=1, num_heads=4)
    dense = random_models.build(RandomModelConfig(text=text, vision=vision), processor, seed=0)
    for name, parameter in dense.named_parameters():
        if "language_model" in name and parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)  # logits that differ, so that greedy choices are no near-ties
    loading.save_model(dense, processor, folder / "dense")
    upcycle(folder / "dense", folder / "start", UpcycleConfig(source="models.dense"), seed=0)
    engine = single_rank.engine(loading.load_model(folder / "start"), lr=0.01)
    samples = corpus(save_image(folder / "image.png", 128, 96, seed=1))[:4]
    for _ in range(2):
        batch: dict[str, Any] = dict(
            collate([processor.encode(s) for s in samples], processor.pad_id, processor.image_token_id)
        )
        labels = batch.pop("labels")
        loss = tiny.loss_sum(engine(**{k: v for k, v in batch.items() if isinstance(v, Tensor)}).logits, labels)
        engine.backward(loss / int((labels != -100).sum()))
        engine.step()
    return folder, engine, processor


@pytest.fixture(scope="module")
def answered(answering: tuple[Path, Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the exports by dtype, for each of which a process without this project has answered."""
    folder, engine, _ = answering
    out = tmp_path_factory.mktemp("answered")
    template = export.template_files(folder / "start", folder / "processor")
    for dtype in ("float32", "bfloat16"):
        config = json.loads(template["config.json"]) | {"dtype": dtype}
        wanted = template | {"config.json": json.dumps(config).encode()}
        saved = checkpoint.save(engine, out / f"saved-{dtype}", 2, {}, {}, 1, wanted)
        assert export.write_hf(saved, out / dtype).dtype == dtype
    command = [sys.executable, "-I", str(HELPERS / "plain_transformers.py"), str(folder / "image.png")]
    command += [QUESTION, str(TOKENS), str(out / "float32"), str(out / "bfloat16")]
    done = subprocess.run(command, cwd=out, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_another_process_with_plain_transformers_answers_alike(
    answering: tuple[Path, Any, Any], answered: Path, dtype: str
) -> None:
    """Logits on an image and text, and the greedy answer.

    float32: against the training engine's own forward, within 1e-5. bfloat16: against transformers' model with the
    trained tensors rounded and put in, exactly.
    """
    folder, engine, processor = answering
    theirs = json.loads((answered / dtype / "answer.json").read_text())
    logits = load_file(answered / dtype / "answer.tensors")["logits"]

    sample = corpus(folder / "image.png")[0]
    prompt: dict[str, Any] = dict(
        collate([processor.encode_prompt(sample)], processor.pad_id, processor.image_token_id)
    )
    inputs = {k: v for k, v in prompt.items() if isinstance(v, Tensor) and k != "labels"}
    assert theirs["prompt_ids"] == inputs["input_ids"][0].tolist()
    model = engine if dtype == "float32" else rounded(engine, folder / "start")
    inputs["pixel_values"] = inputs["pixel_values"].to(getattr(torch, dtype))
    ours, answer = greedy(model, inputs, processor)
    torch.testing.assert_close(logits, ours, rtol=0, atol=1e-5 if dtype == "float32" else 0)
    assert theirs["text"] == answer
    assert len(answer) > 10


def rounded(engine: Any, start: Path) -> Any:
    """transformers' model in bfloat16 with the engine's parameters put in."""
    model = AutoModelForImageTextToText.from_pretrained(start, dtype=torch.bfloat16).eval()
    live = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in single_rank.parameters(engine).items():
            live[name].copy_(tensor)
    return model


@torch.no_grad()
def greedy(model: Any, inputs: dict[str, Tensor], processor: Any) -> tuple[Tensor, str]:
    """(logits [S, V] of the prompt, greedy answer), the whole sequence forwarded for every token."""
    first: Tensor = model(**inputs).logits[0].float()
    logits, new = first, []
    while len(new) < TOKENS:
        new.append(int(logits[-1].argmax()))
        if new[-1] == processor.eos_id:
            break
        ids = torch.cat([inputs["input_ids"], torch.tensor([new])], dim=1)
        types = (ids == processor.image_token_id).long()
        longer = inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": types}
        logits = model(**longer).logits[0].float()
    return first, processor.decode(new)
