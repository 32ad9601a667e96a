"""From a training checkpoint to an ordinary Hugging Face folder, and the proof that it is the same model.

    python -m pipeline.export --config RECIPE.yaml job=NAME --out DIR

One process, no DeepSpeed: the checkpoint already holds whole tensors under Hugging Face names. The folder is
loaded back by plain `AutoModelForImageTextToText.from_pretrained` and compared with the checkpoint, tensor
by tensor and logit by logit, before it appears under its name.
"""

import argparse
import gc
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from pipeline import checkpoint, models
from pipeline.command_line import parse_args
from pipeline.config import Recipe
from pipeline.errors import CheckpointError, run_main
from pipeline.hf_folder import Building, ShardWriter, copy_companions, packed_on_disk
from pipeline.moe import moe_layers
from pipeline.student import ORIGIN, random_text_ids
from pipeline.student import REPORT as UPCYCLE_REPORT

REPORT = "export.json"
PROBE_SHAPE = (2, 32)
"""Sequences and tokens on which logits are compared."""


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What was written, and how the reloaded folder compares with the checkpoint."""

    checkpoint: str
    step: int
    dtype: str
    tensors: int
    total_parameters: int
    active_parameters: int
    max_tensor_difference: float
    """Reloaded against the checkpoint in `dtype`; 0 means bit for bit."""
    max_logit_difference: float
    """Reloaded against the checkpoint's tensors put into the model directly."""


def write_model(recipe: Recipe, name: str, out: Path | None = None) -> ExportReport:
    """Write the newest checkpoint of a job as a Hugging Face folder, replacing an older one.

    Args:
        recipe: the run.
        name: key of `jobs`.
        out: folder to write; None: `jobs/NAME/model`, where other stages look for `jobs.NAME`.

    Raises:
        CheckpointError: no checkpoint, a damaged one, or one that does not load back as the same model.
    """
    root = recipe.job_dir(name) / "checkpoints"
    folder = checkpoint.latest(root)
    if folder is None:
        raise CheckpointError(f"{root}: no checkpoint. Train first: `deepspeed train.py --config ... job={name}`.")
    checkpoint.verify(folder)
    template = recipe.model_dir(recipe.jobs[name].init)
    card = _card(name, recipe, template)
    return write_hf(folder, template, out or recipe.model_dir(f"jobs.{name}"), recipe.processor_dir, card)


def write_hf(folder: Path, template: Path, out: Path, processor_dir: Path, card: str) -> ExportReport:
    """Write one checkpoint folder as a Hugging Face folder and compare it after loading it back.

    Args:
        folder: a complete checkpoint, `step-...`.
        template: Hugging Face folder that training started from: configuration, generation settings.
        out: folder to write or replace; it appears only when complete and compared.
        processor_dir: tokenizer and image processor that training used.
        card: text of the README.

    Raises:
        CheckpointError: the reloaded model differs from the checkpoint; `out` is left as it was.
    """
    config = AutoConfig.from_pretrained(str(template))
    dtype = getattr(torch, str(config.dtype or "float32").removeprefix("torch."))
    with Building(out, replace=True) as building:
        config.save_pretrained(str(building))
        copy_companions(template, building, skip=(UPCYCLE_REPORT, ORIGIN, REPORT))
        for path in processor_dir.iterdir():
            if path.name in models.PROCESSOR_FILES:
                (building / path.name).write_bytes(path.read_bytes())
        writer = ShardWriter(building)
        for name, tensor in checkpoint.read_parameters(folder):
            writer.add(name, packed_on_disk(name, tensor.to(dtype)))
        writer.finish()
        report = _compare(folder, building, config, dtype)
        (building / "README.md").write_text(card + _facts(report, config))
        (building / REPORT).write_text(json.dumps(asdict(report), indent=1))
    return report


def _compare(folder: Path, written: Path, config: PreTrainedConfig, dtype: torch.dtype) -> ExportReport:
    """Load `written` as any user would; compare tensors and logits with the checkpoint's."""
    reloaded = AutoModelForImageTextToText.from_pretrained(str(written), dtype=dtype)
    assert isinstance(reloaded, PreTrainedModel)
    reloaded.train(False)
    live = dict(reloaded.named_parameters())
    stored = {name: tensor.to(dtype) for name, tensor in checkpoint.read_parameters(folder)}
    if live.keys() != stored.keys():
        raise CheckpointError(
            f"{written}: loads with other tensors than {folder} holds: "
            f"{sorted(live.keys() ^ stored.keys())[:6]}. "
            "The job's `init` is not the model that the checkpoint was trained from. Nothing was replaced."
        )
    worst = max(_difference(live[name], tensor) for name, tensor in stored.items())
    logits, counts = _logits(reloaded), models.parameter_counts(reloaded)
    del reloaded, live
    gc.collect()
    logit_change = _difference(logits, _logits(_in_memory(config, stored, dtype)))
    if worst or logit_change:
        raise CheckpointError(
            f"{written}: differs from {folder} after loading: tensors by {worst:g}, "
            f"logits by {logit_change:g}. Nothing was replaced."
        )
    step = int(checkpoint.read_meta(folder)["step"])
    return ExportReport(str(folder), step, str(dtype).removeprefix("torch."), len(stored), *counts, worst, logit_change)


def _in_memory(config: PreTrainedConfig, stored: dict[str, Tensor], dtype: torch.dtype) -> PreTrainedModel:
    """The model of `config` with tensors put in directly, past all file formats."""
    model: PreTrainedModel = AutoModelForImageTextToText.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    parameters = dict(model.train(False).named_parameters())
    with torch.no_grad():
        for name, tensor in stored.items():
            parameters[name].copy_(tensor)
    return model


@torch.no_grad()
def _logits(model: PreTrainedModel) -> Tensor:
    """Logits [B, S, V] on fixed text tokens."""
    logits: Tensor = model(input_ids=random_text_ids(model.config, PROBE_SHAPE, seed=0)).logits.float()
    return logits


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a.detach().float() - b.detach().float()).abs().max())


def _card(name: str, recipe: Recipe, template: Path) -> str:
    """Model card: how it was trained."""
    job = recipe.jobs[name]
    kind = "supervised fine-tuning" if job.distill is None else f"distillation from `{recipe.targets.teacher}`"
    curriculum = "hardness-ordered" if job.curriculum else "uniform"
    return (
        "---\nlibrary_name: transformers\npipeline_tag: image-text-to-text\n---\n\n"
        f"# {name}\n\n"
        f"Trained by {kind}, starting from `{job.init}` ({template.name}): {job.steps} steps of "
        f"{job.global_batch_size} samples, {job.optimizer}, peak learning rate {job.lr:g}, {curriculum} "
        f"sampling, seed {recipe.run.seed}.\n"
    )


def _facts(report: ExportReport, config: PreTrainedConfig) -> str:
    """Model card: what it is and how to load it."""
    layers, text = moe_layers(config), config.get_text_config()
    experts = f"{text.num_experts} experts, top-{text.num_experts_per_tok}, in layers {layers}" if layers else "none"
    return (
        f"\n| | |\n|---|---|\n| architecture | `{config.model_type}` |\n"
        f"| parameters | {report.total_parameters:,} |\n"
        f"| active per token | {report.active_parameters:,} |\n| experts | {experts} |\n"
        f"| weights | {report.dtype}, step {report.step} |\n\n"
        "```python\nfrom transformers import AutoModelForImageTextToText, AutoTokenizer\n"
        'model = AutoModelForImageTextToText.from_pretrained("PATH")\n'
        'tokenizer = AutoTokenizer.from_pretrained("PATH")\n```\n'
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: export one job's newest checkpoint."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.export")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, or to replace")
    arguments = parse_args("export", argv, parser)
    name, _ = arguments.recipe.selected_job()
    print(json.dumps(asdict(write_model(arguments.recipe, name, arguments.options.out)), indent=1))
    print(f"{arguments.options.out}: loads with AutoModelForImageTextToText.from_pretrained")


if __name__ == "__main__":
    run_main(main)
