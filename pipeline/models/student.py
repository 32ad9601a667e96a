"""Student checkpoints: a dense model becomes the Mixture-of-Experts model of its own family.

    clkd upcycle SRC DST --experts 4 --top-k 2 --every 2     any dense checkpoint folder
    clkd student RECIPE.yaml --model NAME                   builds models.NAME of a recipe

Reads and writes tensor by tensor; what the tensors are is in `upcycling.py`, which families there are in `families.py`.
"""

import argparse
import gc
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from pipeline.benchmark import random_models
from pipeline.data.processor import Processor
from pipeline.errors import ConfigError, UserError
from pipeline.files import differences, listed, weights_hash
from pipeline.models import loading, upcycling
from pipeline.models.families import load_config, without_weights
from pipeline.models.hf_folder import Building, ShardWriter, TensorFiles, copy_companions, save_config
from pipeline.models.probe import random_text_ids
from pipeline.recipe import RandomModelConfig, Recipe, UpcycleConfig

REPORT = "upcycle.json"
ORIGIN = "origin.json"
PROBE_SHAPE = (4, 48)
"""Sequences and tokens on which the logit change is measured."""


@dataclass(frozen=True, slots=True)
class LogitChange:
    """Of the MoE model against the dense one: absolute, over positions and vocabulary, on random text tokens."""

    max: float
    mean: float
    mean_logit_size: float
    """Mean absolute logit of the dense model, to compare the change with."""


@dataclass(frozen=True, slots=True)
class UpcycleReport:
    """What was built, and what it changed."""

    source: str
    source_hash: str
    seed: int
    settings: dict[str, Any]
    model_type: str
    moe_layers: list[int]
    function_preserved: bool
    """True when the copies are exact: then the student computes what the dense model did, up to rounding."""
    layer_change: list[float]
    """Of each MoE layer against its MLP: relative l2 size of the difference over random inputs."""
    logit_change: LogitChange | None
    """None when it was not measured, which needs both models in memory, one after the other."""
    total_parameters: int
    active_parameters: int
    """Per token: all but the experts that are not chosen."""


def upcycle(src: Path, dst: Path, config: UpcycleConfig, seed: int, *, measure_logits: bool = True) -> UpcycleReport:
    """Write the MoE version of a dense checkpoint folder.

    Deterministic in (source, config, seed). Tokenizer, image processor and generation settings are copied. A finished
    folder made from the same source and settings is left alone.

    Args:
        src: dense checkpoint in Hugging Face format, safetensors.
        dst: folder to create; appears only when complete.
        config: experts, layers, widths, noise.
        seed: of router and noise.
        measure_logits: load both models in the end, one after the other, and compare their logits; without it no
            model is ever whole in memory.

    Raises:
        ConfigError: a setting that cannot work for this model (all problems at once).
        UserError: no dense checkpoint of a known family at `src`, or another model at `dst`.
    """
    if not (src / "config.json").is_file():
        raise UserError(f"{src}: there is no checkpoint (no config.json). Nothing was written.")
    made = upcycling.plan(load_config(src), config, str(src))
    origin: dict[str, Any] = {
        "source_hash": weights_hash(src),
        "settings": config.model_dump(mode="json"),
        "seed": seed,
    }
    if _finished(dst, origin):
        return _read_report(dst / REPORT)
    moe_config = upcycling.moe_config(made)
    changes = upcycling.Changes()
    with Building(dst) as folder:
        save_config(moe_config, folder)
        copy_companions(src, folder, skip=(REPORT, ORIGIN))
        _write(src, folder, made, seed, changes)
        total, active = loading.parameter_counts(without_weights(moe_config))
        report = UpcycleReport(
            source=str(src),
            model_type=moe_config.model_type,
            moe_layers=list(made.layers),
            function_preserved=config.expert_noise == 0.0,
            layer_change=[changes.by_layer[layer] for layer in made.layers],
            logit_change=_logit_change(src, folder, seed) if measure_logits else None,
            total_parameters=total,
            active_parameters=active,
            **origin,
        )
        (folder / REPORT).write_text(json.dumps(asdict(report), indent=1))
        (folder / ORIGIN).write_text(json.dumps(origin, indent=1))
    return report


def _write(src: Path, folder: Path, made: upcycling.Plan, seed: int, changes: upcycling.Changes) -> None:
    writer = ShardWriter(folder)
    bar = tqdm(desc=f"upcycling {src.name}", unit="B", unit_scale=True, disable=None)
    with TensorFiles(src.glob("*.safetensors")) as tensors, bar:
        for name, tensor in upcycling.moe_tensors(tensors, made, seed, str(src), changes):
            writer.add(name, tensor)
            bar.update(tensor.nbytes)
    writer.finish()


def _read_report(path: Path) -> UpcycleReport:
    values = json.loads(path.read_text())
    change = values.pop("logit_change")
    return UpcycleReport(logit_change=LogitChange(**change) if change else None, **values)


# --- measuring --------------------------------------------------------------------------------------------


def _logit_change(src: Path, dst: Path, seed: int) -> LogitChange:
    """Compare logits of both checkpoints, one loaded after the other, on the same random text tokens."""
    dense = _logits(src, seed)
    change = (_logits(dst, seed) - dense).abs()
    return LogitChange(change.max().item(), change.mean().item(), dense.abs().mean().item())


@torch.no_grad()
def _logits(folder: Path, seed: int) -> Tensor:
    """Logits [B, S, V] of a checkpoint."""
    model: PreTrainedModel = loading.load_model(folder)
    logits: Tensor = model(input_ids=random_text_ids(model.config, PROBE_SHAPE, seed)).logits.float()
    del model
    gc.collect()
    return logits


# --- folders ----------------------------------------------------------------------------------------------


def _finished(dst: Path, origin: dict[str, Any]) -> bool:
    """Whether the folder is there and was made from this origin.

    Raises:
        UserError: it was made from another one; names what differs.
    """
    if not dst.exists():
        return False
    path = dst / ORIGIN
    found = json.loads(path.read_text()) if path.is_file() else {}
    origin = json.loads(json.dumps(origin))
    if differs := differences(found, dict.fromkeys(found) | origin, ("there", "recipe")):
        raise UserError(
            f"{dst}: holds a model that was made from something else.{listed(differs)}\n"
            "Remove the folder to build it again (and what was trained from it). Nothing was changed."
        )
    return True


def build_model(recipe: Recipe, name: str) -> Path:
    """Make `models.NAME` if it is not there yet; returns its folder.

    Raises:
        ConfigError: no such entry. UserError: see `upcycle` and `random_models.build`.
    """
    known, dst = {*recipe.models, *recipe.random_models}, recipe.model_dir(f"models.{name}")
    if name not in known:
        raise ConfigError(f"--model {name}: no such entry; models: {sorted(known)}")
    if name in recipe.random_models:
        _build_random(recipe, recipe.random_models[name], dst)
    elif (settings := recipe.models[name].upcycle) is not None:
        report = upcycle(recipe.model_dir(settings.source), dst, settings, recipe.run.seed)
        print(json.dumps(asdict(report), indent=1))
    return dst


def _build_random(recipe: Recipe, config: RandomModelConfig, dst: Path) -> None:
    processor = Processor.load(recipe.processor_dir, recipe.data)
    origin = {
        "settings": config.model_dump(mode="json"),
        "seed": recipe.run.seed,
        "processor": processor.identity(),
    }
    if not _finished(dst, origin):
        with Building(dst) as folder:
            loading.save_model(random_models.build(config, processor, recipe.run.seed), recipe.processor_dir, folder)
            (folder / ORIGIN).write_text(json.dumps(origin, indent=1))


def main(recipe: Recipe, options: argparse.Namespace) -> None:
    """The stage `student`: build the models of a recipe that `--model` names."""
    for name in options.model:
        print(f"models.{name}: {build_model(recipe, name)}")
