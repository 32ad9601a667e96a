"""Student checkpoints: a dense vision-language model becomes the Mixture-of-Experts model of its own family.

Every n-th decoder MLP turns into E experts, copies of it, behind a router. With renormalised top-k weights
identical copies compute exactly what the MLP did [published: sparse upcycling, 2212.05055], but then the
router gets no gradient from the task: whichever experts it picks, the output is the same. So the copies are
perturbed by a stated amount, and the report says what that costs in logits at step 0 [ours; METHOD section
8].

    python -m pipeline.student --config RECIPE.yaml --model NAME      builds models.NAME, random or upcycled

Shapes: E experts, H hidden size, I width of the dense MLP, W width of an expert.
"""

import argparse
import gc
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, Qwen3VLMoeConfig

from pipeline import models
from pipeline.command_line import parse_args
from pipeline.config import Recipe, UpcycleConfig
from pipeline.errors import ConfigError, UserError, run_main
from pipeline.hf_folder import Building, ShardWriter, TensorFiles, copy_companions, packed_on_disk
from pipeline.processor import Processor

REPORT = "upcycle.json"
ORIGIN = "origin.json"
PARTS = ("gate", "up", "down")
PROBE_SHAPE = (4, 48)
"""Sequences and tokens on which the logit change is measured."""


@dataclass(frozen=True, slots=True)
class UpcycleReport:
    """What was built, and what it changed. Logit changes are absolute, over positions and vocabulary."""

    source: str
    source_hash: str
    seed: int
    settings: dict[str, Any]
    moe_layers: list[int]
    function_preserved: bool
    """True when the copies are exact: then the student computes what the dense model did, up to rounding."""
    max_logit_change: float
    mean_logit_change: float
    mean_logit_size: float
    """Mean absolute logit of the dense model, to compare the change with."""
    dense_parameters: int
    total_parameters: int
    active_parameters: int
    """Per token: all but the experts that are not chosen."""


def upcycle(src: Path, dst: Path, config: UpcycleConfig, seed: int) -> UpcycleReport:
    """Write the MoE version of a dense checkpoint folder.

    Reads and writes tensor by tensor; deterministic in (source, config, seed). Tokenizer, image processor and
    generation settings are copied. A finished folder made from the same source and settings is left alone.

    Args:
        src: dense checkpoint in Hugging Face format.
        dst: folder to create; appears only when complete.
        config: experts, layers, noise. `expert_width` < 1 draws columns per expert: the function is then
            approximated, not preserved.
        seed: of router, noise and columns.

    Raises:
        ConfigError: a setting that cannot work for this model (all problems at once).
        UserError: no dense checkpoint of a known family at `src`, or another model at `dst`.
    """
    origin = {"source_hash": models.weights_hash(src), "settings": config.model_dump(), "seed": seed}
    if _finished(dst, origin):
        return UpcycleReport(**json.loads((dst / REPORT).read_text()))
    dense = AutoConfig.from_pretrained(str(src))
    family = _family(dense, src)
    _check(dense, config)
    with Building(dst) as folder:
        moe_config = family(dense, config)
        moe_config.save_pretrained(str(folder))
        copy_companions(src, folder, skip=(REPORT, ORIGIN))
        writer = ShardWriter(folder)
        for name, tensor in _moe_tensors(src, dense, config, seed):
            writer.add(name, packed_on_disk(name, tensor))
        writer.finish()
        report = _measure(src, folder, config, origin)
        (folder / REPORT).write_text(json.dumps(asdict(report), indent=1))
        (folder / ORIGIN).write_text(json.dumps(origin, indent=1))
    return report


# --- configuration ----------------------------------------------------------------------------------------


def _qwen3_vl(dense: PreTrainedConfig, config: UpcycleConfig) -> PreTrainedConfig:
    """Qwen3-VL's configuration as Qwen3-VL-MoE's."""
    own = ("model_type", "architectures", "transformers_version")
    both = {key: value for key, value in dense.to_dict().items() if key not in own}
    text = {key: value for key, value in both.pop("text_config").items() if key not in own}
    vision = {key: value for key, value in both.pop("vision_config").items() if key not in own}
    text |= {
        "num_experts": config.experts,
        "num_experts_per_tok": config.top_k,
        "decoder_sparse_step": config.every,
        "moe_intermediate_size": expert_width(dense, config),
        "norm_topk_prob": True,
        "mlp_only_layers": [],
    }
    return Qwen3VLMoeConfig(
        text_config=text, vision_config=vision, architectures=["Qwen3VLMoeForConditionalGeneration"], **both
    )


FAMILIES: dict[str, Callable[[PreTrainedConfig, UpcycleConfig], PreTrainedConfig]] = {"qwen3_vl": _qwen3_vl}
"""Dense architectures by `model_type`, and how their configuration becomes the MoE one.

Another family fits when its decoder MLPs are `model.language_model.layers.N.mlp.{gate,up,down}_proj` and its
MoE blocks are packed as Qwen3-VL-MoE's; vision tower, deepstack mergers and attention keep their names.
"""


def _family(dense: PreTrainedConfig, src: Path) -> Callable[[PreTrainedConfig, UpcycleConfig], PreTrainedConfig]:
    if dense.model_type not in FAMILIES:
        raise UserError(
            f"{src}: model type {dense.model_type!r} cannot be upcycled; known dense types: "
            f"{sorted(FAMILIES)}. Nothing was written."
        )
    return FAMILIES[dense.model_type]


def expert_width(dense: PreTrainedConfig, config: UpcycleConfig) -> int:
    """W, rounded; `_check` refuses shares that do not give a whole number."""
    width: int = dense.get_text_config().intermediate_size
    return round(width * config.expert_width)


def _check(dense: PreTrainedConfig, config: UpcycleConfig) -> None:
    text, problems = dense.get_text_config(), []
    if config.top_k < 2:
        problems.append("top_k 1: its renormalised weight is always 1, so the router gets no gradient; use 2 or more")
    if config.top_k > config.experts:
        problems.append(f"top_k {config.top_k} exceeds experts {config.experts}")
    if config.every > text.num_hidden_layers:
        problems.append(f"every {config.every}: the model has only {text.num_hidden_layers} layers, none would change")
    width = text.intermediate_size * config.expert_width
    if width < 1 or abs(width - round(width)) > 1e-6:
        problems.append(
            f"expert_width {config.expert_width} of intermediate_size {text.intermediate_size} is {width:g}, "
            "not a whole number"
        )
    elif text.hidden_size in (round(width), 2 * round(width)):
        problems.append(
            f"experts of width {round(width)} with hidden_size {text.hidden_size} have square packed "
            "matrices, whose layout readers cannot tell. Choose another expert_width"
        )
    if problems:
        raise ConfigError("upcycle: " + "; ".join(problems) + ". Nothing was written.")


# --- weights ----------------------------------------------------------------------------------------------


def _moe_tensors(src: Path, dense: PreTrainedConfig, config: UpcycleConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the MoE model: the dense tensors, the MLPs of MoE layers replaced."""
    layers = [i for i in range(dense.get_text_config().num_hidden_layers) if (i + 1) % config.every == 0]
    prefixes = {f"model.language_model.layers.{i}.mlp." for i in layers}
    with TensorFiles(src.glob("*.safetensors")) as tensors:
        for name in tensors:
            if not any(name.startswith(prefix) for prefix in prefixes):
                yield name, tensors[name]
        for prefix in sorted(prefixes):
            missing = [p for p in PARTS if f"{prefix}{p}_proj.weight" not in tensors]
            if missing:
                raise UserError(f"{src}: {prefix} has no {missing} projection: not a complete dense checkpoint.")
            mlp = {part: tensors[f"{prefix}{part}_proj.weight"] for part in PARTS}
            yield from _experts(prefix, mlp, config, seed)


def _experts(prefix: str, mlp: dict[str, Tensor], config: UpcycleConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Router and packed experts of one layer."""
    dtype, hidden, width = mlp["gate"].dtype, mlp["gate"].shape[1], mlp["gate"].shape[0]
    kept = round(width * config.expert_width)
    gate_up, down = [], []
    for expert in range(config.experts):
        noisy = {
            part: _perturbed(weight.float(), config.expert_noise, _generator(seed, prefix, part, expert))
            for part, weight in mlp.items()
        }
        columns = torch.arange(width)
        if kept < width:
            drawn = torch.randperm(width, generator=_generator(seed, prefix, "columns", expert))[:kept]
            columns = drawn.sort().values
            # Keeps the expected output: a share kept / I of the columns carries that share of the sum.
            noisy["down"] *= width / kept
        gate_up.append(torch.cat([noisy["gate"][columns], noisy["up"][columns]]))  # [2W, H]
        down.append(noisy["down"][:, columns])  # [H, W]
    router = torch.randn(config.experts, hidden, generator=_generator(seed, prefix, "router", 0)) * config.router_noise
    yield f"{prefix}gate.weight", router.to(dtype)
    yield f"{prefix}experts.gate_up_proj", torch.stack(gate_up).to(dtype)
    yield f"{prefix}experts.down_proj", torch.stack(down).to(dtype)


def _perturbed(weight: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    """Gaussian noise with a standard deviation of `noise` times the tensor's root mean square."""
    if noise == 0.0:
        return weight.clone()
    std = noise * weight.square().mean().sqrt()
    return weight + std * torch.randn(weight.shape, generator=generator)


def _generator(seed: int, prefix: str, part: str, expert: int) -> torch.Generator:
    """Noise of a tensor depends on its own name only, not on the order in which tensors are read."""
    key = xxhash.xxh3_64_intdigest(f"{seed}/{prefix}/{part}/{expert}") >> 1
    return torch.Generator().manual_seed(key)


# --- measuring --------------------------------------------------------------------------------------------


def _measure(src: Path, dst: Path, config: UpcycleConfig, origin: dict[str, Any]) -> UpcycleReport:
    """Compare logits of both checkpoints, one loaded after the other, on the same random text tokens."""
    dense, dense_parameters, _ = _probe(src, origin["seed"])
    student, total, active = _probe(dst, origin["seed"])
    change = (student - dense).abs()
    layers = [i for i in range(_layers(dst)) if (i + 1) % config.every == 0]
    return UpcycleReport(
        source=str(src),
        moe_layers=layers,
        function_preserved=config.expert_noise == 0.0 and config.expert_width == 1.0,
        max_logit_change=change.max().item(),
        mean_logit_change=change.mean().item(),
        mean_logit_size=dense.abs().mean().item(),
        dense_parameters=dense_parameters,
        total_parameters=total,
        active_parameters=active,
        **origin,
    )


def _layers(folder: Path) -> int:
    return int(AutoConfig.from_pretrained(str(folder)).get_text_config().num_hidden_layers)


def random_text_ids(config: PreTrainedConfig, shape: tuple[int, int], seed: int) -> Tensor:
    """i64[shape]: ids drawn from the whole vocabulary but the four vision tokens."""
    special = {getattr(config, f"{name}_token_id") for name in ("image", "video", "vision_start", "vision_end")}
    allowed = torch.tensor([i for i in range(config.get_text_config().vocab_size) if i not in special])
    return allowed[torch.randint(len(allowed), shape, generator=torch.Generator().manual_seed(seed))]


@torch.no_grad()
def _probe(folder: Path, seed: int) -> tuple[Tensor, int, int]:
    """(logits [B, S, V], total parameters, active parameters) of a checkpoint."""
    model: PreTrainedModel = models.load_model(folder)
    ids_BS = random_text_ids(model.config, PROBE_SHAPE, seed)
    logits: Tensor = model(input_ids=ids_BS).logits.float()
    counts = models.parameter_counts(model)
    del model
    gc.collect()
    return logits, *counts


# --- folders ----------------------------------------------------------------------------------------------


def _finished(dst: Path, origin: dict[str, Any]) -> bool:
    """Whether the folder is there, made from this origin.

    Raises:
        UserError: there is another model: naming what differs.
    """
    if not dst.exists():
        return False
    path = dst / ORIGIN
    found = json.loads(path.read_text()) if path.is_file() else {}
    origin = json.loads(json.dumps(origin))
    if found != origin:
        differs = [
            f"{key}: there {found.get(key)!r}, recipe {origin.get(key)!r}"
            for key in sorted(found | origin)
            if found.get(key) != origin.get(key)
        ]
        raise UserError(
            f"{dst}: holds a model that was made from something else.\n  " + "\n  ".join(differs) + "\n"
            "Remove the folder to build it again (and what was trained from it). Nothing was changed."
        )
    return True


def build_model(recipe: Recipe, name: str) -> Path:
    """Make `models.NAME` if it is not there yet; returns its folder.

    Raises:
        ConfigError: no such entry. UserError: see `upcycle` and `models.build`.
    """
    if name not in recipe.models:
        raise ConfigError(f"--model {name}: no such entry; models: {sorted(recipe.models)}")
    config, dst = recipe.models[name], recipe.model_dir(f"models.{name}")
    if config.path is not None:
        return dst
    if config.upcycle is not None:
        report = upcycle(recipe.model_dir(config.upcycle.source), dst, config.upcycle, recipe.run.seed)
        print(json.dumps(asdict(report), indent=1))
        return dst
    processor = Processor.load(recipe.processor_dir, recipe.data)
    origin = {
        "settings": config.model_dump(mode="json"),
        "seed": recipe.run.seed,
        "processor": processor.identity(),
    }
    if not _finished(dst, origin):
        with Building(dst) as folder:
            models.save_model(models.build(config, processor, recipe.run.seed), recipe.processor_dir, folder)
            (folder / ORIGIN).write_text(json.dumps(origin, indent=1))
    return dst


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: build the models that `--model` names."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.student")
    parser.add_argument("--model", action="append", required=True, help="key of `models`; may be given more than once")
    arguments = parse_args("student", argv, parser)
    for name in arguments.options.model:
        print(f"models.{name}: {build_model(arguments.recipe, name)}")


if __name__ == "__main__":
    run_main(main)
