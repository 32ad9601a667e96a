"""From a training checkpoint to an ordinary Hugging Face folder, and the proof that it is the same model.

    clkd export CKPT --out OUT [--template DIR]
    clkd export RECIPE.yaml job=NAME --out OUT

CKPT is a checkpoint `step-...`, or a job's folder or its `checkpoints`, meaning the newest one. One process, no
DeepSpeed: the checkpoint holds whole tensors under Hugging Face names, and the configuration, tokenizer and image
processor that training used. Only safetensors, JSON and text are read, never pickle.

The folder is loaded back by plain `from_pretrained` before it appears under its name: its tensors must be the
checkpoint's bit for bit, and its logits on a fixed question with an image the training engine's, which the checkpoint
holds, within what rounding explains (`pipeline.models.probe`). One model is in memory at a time: tensors are written
and compared one after the other.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from pipeline.data import processor_folder
from pipeline.errors import CheckpointError, ConfigError, UserError
from pipeline.export.model_card import model_card
from pipeline.files import put_in_place, weights_hash
from pipeline.method.features import is_ours
from pipeline.models import checkpoint_folder, loading, probe
from pipeline.models.families import auto_class, load_config
from pipeline.models.hf_folder import Building, DiskLayout, ShardWriter, save_config
from pipeline.models.student import ORIGIN
from pipeline.models.student import REPORT as UPCYCLE_REPORT
from pipeline.recipe import DataConfig, Recipe, load_recipe

REPORT = "export.json"
DIFFERS = ".differs"
"""End of the name that an export gets whose logits are not the engine's."""
TEXT_SUFFIXES = (".json", ".txt", ".jinja", ".model")
"""Of files that come along: configuration, tokenizers (`.model` is sentencepiece's), templates. No code, no pickle."""
COMPARED_AT_ONCE = 1 << 24
"""Elements of a tensor whose differences are computed at a time."""


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What was written, and how the reloaded folder compares with the checkpoint."""

    checkpoint: str
    step: int
    dtype: str
    weights: str
    """Hash of the weights, as in the evaluation's records."""
    tensors: int
    total_parameters: int
    active_parameters: int
    max_tensor_difference: float
    """Reloaded against the checkpoint in `dtype`; 0 means bit for bit."""
    logits: dict[str, float] | None
    """`difference` and `tolerance` on the probe (see `pipeline.models.probe.Agreement`); None: not compared."""


def template_files(
    model_dir: Path, processor_dir: Path | None = None, data: DataConfig | None = None
) -> dict[str, bytes]:
    """The small files of an export, by name: configuration, generation settings, tokenizer, image processor.

    Args:
        model_dir: Hugging Face folder that training starts from.
        processor_dir: where tokenizer and image processor come from; None: `model_dir`.
        data: of the run, whose bounds of images the image processor gets; None: it stays as it is.

    Raises:
        UserError: `model_dir` has no config.json.
    """
    files = _text_files(model_dir)
    if "config.json" not in files:
        raise UserError(f"{model_dir}: no config.json: not a Hugging Face folder. Nothing was written.")
    if processor_dir is not None:
        own = {name: content for name, content in files.items() if name not in loading.PROCESSOR_FILES}
        files = own | {n: content for n, content in _text_files(processor_dir).items() if n in loading.PROCESSOR_FILES}
    return files if data is None else processor_folder.as_used(files, processor_dir or model_dir, data)


def _text_files(folder: Path) -> dict[str, bytes]:
    left_out = (UPCYCLE_REPORT, ORIGIN, REPORT)
    return {
        path.name: path.read_bytes()
        for path in sorted(folder.glob("*"))
        if path.is_file()
        and path.suffix in TEXT_SUFFIXES
        and path.name not in left_out
        and not path.name.endswith(".index.json")
    }


def write_model(recipe: Recipe, name: str, out: Path | None = None, *, accept: bool = False) -> ExportReport:
    """Write the newest checkpoint of a job as a Hugging Face folder, replacing an older one.

    Args:
        recipe: the run.
        name: key of `jobs`.
        out: folder to write; None: `jobs/NAME/model`, where other stages look for `jobs.NAME`.
        accept: see `write_hf`.

    Raises:
        CheckpointError: no checkpoint, a damaged one, or one that does not load back as the same model.
    """
    root = recipe.job_dir(name) / "checkpoints"
    folder = checkpoint_folder.latest(root)
    if folder is None:
        raise CheckpointError(f"{root}: no checkpoint. Train first: `deepspeed train.py --config ... job={name}`.")
    template = checkpoint_folder.read_template(folder) or template_files(
        recipe.model_dir(recipe.jobs[name].init), recipe.processor_dir, recipe.data
    )
    return write_hf(folder, out or recipe.model_dir(f"jobs.{name}"), template, accept=accept)


def write_hf(
    folder: Path, out: Path, template: checkpoint_folder.Template | None = None, *, accept: bool = False
) -> ExportReport:
    """Write one checkpoint folder as a Hugging Face folder and compare it after loading it back.

    Args:
        folder: a complete checkpoint, `step-...`.
        out: folder to write or replace; it appears only when complete and compared.
        template: files beside the weights, config.json among them; None: those stored in the checkpoint.
        accept: write `out` even if its logits are not the engine's; its report says so.

    Raises:
        CheckpointError: the checkpoint is damaged or has no template, or the reloaded model differs from it; `out` is
            left as it was. If tensors are equal and only logits differ, the export is kept as `out`.differs.
    """
    checkpoint_folder.verify(folder)
    template = checkpoint_folder.read_template(folder) if template is None else template
    if "config.json" not in template:
        raise CheckpointError(
            f"{folder}: holds no configuration of its model. Name the folder that training started from with "
            "--template DIR. Nothing was written."
        )
    _refuse_astray(folder)
    report = _write(folder, out.with_name(out.name + DIFFERS), template)
    if report.logits and not report.logits["difference"] <= report.logits["tolerance"] and not accept:
        raise CheckpointError(
            f"{folder}: the export has the checkpoint's tensors, but its logits are not those that the training engine "
            f"gave: they differ by {report.logits['difference']:.2g} of their spread, rounding explains "
            f"{report.logits['tolerance']:.2g}. Its configuration may not be that of the model that was trained. "
            f"The export is {out}{DIFFERS}; {out} is unchanged. To have it there all the same: "
            f"`clkd export {folder} --out {out} --accept-logits`."
        )
    put_in_place(out.with_name(out.name + DIFFERS), out)
    return report


def _refuse_astray(folder: Path) -> None:
    """CheckpointError for weights that give no numbers: a model of them is of no use to anybody."""
    logits_PV = checkpoint_folder.read_arrays(folder, probe.PREFIX).get("logits")
    if logits_PV is not None and not np.isfinite(logits_PV).all():
        raise CheckpointError(
            f"{folder}: the training engine's own logits are not finite there: the weights went astray. Write the "
            f"name of an older checkpoint into {folder.parent / checkpoint_folder.LATEST}, lower the job's "
            "optimizer.lr, and train on from it with --change-settings. Nothing was replaced."
        )


def _write(folder: Path, out: Path, template: checkpoint_folder.Template) -> ExportReport:
    """Write `out`, whole or not at all."""
    with Building(out, replace=True) as building:
        for name, content in template.items():
            (building / name).write_bytes(content)
        config = load_config(building)
        dtype = getattr(torch, str(config.dtype or "float32").removeprefix("torch."))
        save_config(config, building)
        writer, layout = ShardWriter(building), DiskLayout(config)
        for name, tensor in _parameters(folder):
            for disk_name, stored in layout(name, tensor.to(dtype)):
                writer.add(disk_name, stored)
        writer.finish()
        report = _compare(folder, building, config, dtype)
        state = checkpoint_folder.read_meta(folder)["state"]
        card = model_card(state, config, asdict(report), _scores(folder, report.weights))
        (building / "README.md").write_text(card)
        (building / REPORT).write_text(json.dumps(asdict(report), indent=1))
    return report


def _parameters(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The checkpoint's tensors that the Hugging Face model has: not what serves training alone."""
    return ((name, tensor) for name, tensor in checkpoint_folder.read_parameters(folder) if not is_ours(name))


def _compare(folder: Path, written: Path, config: PreTrainedConfig, dtype: torch.dtype) -> ExportReport:
    """Load `written` as any user would; compare tensors and logits with the checkpoint's."""
    model = auto_class(config).from_pretrained(str(written), dtype=dtype, use_safetensors=True, trust_remote_code=False)
    assert isinstance(model, PreTrainedModel)
    model.train(False)
    names = {name for name in checkpoint_folder.parameter_names(folder) if not is_ours(name)}
    live = {name for name, _ in model.named_parameters()}
    if live != names:
        raise CheckpointError(
            f"{written}: loads with other tensors than {folder} holds: {sorted(live ^ names)[:6]}. "
            "Its configuration is not that of the model that was trained. Nothing was replaced."
        )
    worst = _tensor_difference(folder, model, dtype)
    if worst:
        raise CheckpointError(
            f"{written}: its tensors differ from {folder} by {worst:g} after loading. Nothing was replaced."
        )
    total, active = loading.parameter_counts(model)
    return ExportReport(
        checkpoint=str(folder),
        step=int(checkpoint_folder.read_meta(folder)["step"]),
        dtype=str(dtype).removeprefix("torch."),
        weights=weights_hash(written),
        tensors=len(names),
        total_parameters=total,
        active_parameters=active,
        max_tensor_difference=worst,
        logits=_compare_logits(folder, model),
    )


@torch.no_grad()
def _tensor_difference(folder: Path, model: PreTrainedModel, dtype: torch.dtype) -> float:
    """Largest difference between the loaded model's tensors and the checkpoint's in `dtype`."""
    worst = 0.0
    parameters = dict(model.named_parameters())
    for name, tensor in _parameters(folder):
        wanted = tensor.to(dtype)
        if parameters[name].shape != wanted.shape:
            raise CheckpointError(
                f"{folder}: {name} has shape {tuple(wanted.shape)}, the configuration asks for "
                f"{tuple(parameters[name].shape)}. Nothing was replaced."
            )
        worst = max(worst, _difference(parameters[name], wanted))
    return worst


def _compare_logits(folder: Path, model: PreTrainedModel) -> dict[str, float] | None:
    """Compare with the engine's logits in the coarser of both data types. None: the checkpoint has none."""
    stored = checkpoint_folder.read_arrays(folder, probe.PREFIX)
    if not stored:
        return None
    engine_PV = stored.pop("logits")
    about = checkpoint_folder.read_meta(folder)["state"]["probe"]
    if about["dtype"] != "float32":
        model = model.to(getattr(torch, about["dtype"]))
    dtype = next(model.parameters()).dtype
    device = next(model.parameters()).device
    logits_PV = probe.probe_logits(model, stored, device, dtype)
    return asdict(probe.agreement(logits_PV, engine_PV, (about["unit"], probe.precision(device, dtype))))


@torch.no_grad()
def _difference(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference, inf for NaN; piecewise, so that no second copy of a large tensor is made."""
    if torch.equal(a, b):
        return 0.0
    rows_a, rows_b = a.flatten(), b.flatten()
    starts = range(0, len(rows_a), COMPARED_AT_ONCE)
    pieces = ((rows[i : i + COMPARED_AT_ONCE].float() for rows in (rows_a, rows_b)) for i in starts)
    return max(float((x - y).abs().nan_to_num(nan=torch.inf).max()) for x, y in pieces)


def _scores(folder: Path, weights: str) -> dict[str, Any] | None:
    """The file in which `evaluate` scored exactly these weights, if the checkpoint still lies in its run's folder.

    Files of before metrics had names are left alone: their numbers mean something else.
    """
    run = folder.resolve().parents[3] if len(folder.resolve().parents) > 3 else folder  # run/jobs/NAME/checkpoints/step
    for path in sorted((run / "evaluation").glob("*.json")):
        content: dict[str, Any] = json.loads(path.read_text())
        same = content.get("identity", {}).get("weights") == weights and "metrics" in content
        if same and not content["blind"]:
            return content
    return None


def main(recipe: None, options: argparse.Namespace) -> None:
    """The stage `export`: its first word is a recipe or a checkpoint."""
    if not options.words:
        raise ConfigError("clkd export: name a recipe or a checkpoint first. Nothing was written.")
    place = Path(options.words[0])
    report = _from_checkpoint(place, options) if place.is_dir() else _from_recipe(place, options)
    print(json.dumps(asdict(report), indent=1))
    print(f"{options.out}: loads with {auto_class(load_config(options.out)).__name__}.from_pretrained")


def _from_recipe(path: Path, options: argparse.Namespace) -> ExportReport:
    recipe = load_recipe(path, options.words[1:])
    name, _ = recipe.selected_job()
    if options.template is not None:
        raise ConfigError("clkd export: --template goes with a checkpoint, not with a recipe. Nothing was written.")
    return write_model(recipe, name, options.out, accept=options.accept_logits)


def _from_checkpoint(place: Path, options: argparse.Namespace) -> ExportReport:
    if options.words[1:]:
        raise ConfigError(f"clkd export {place}: a checkpoint takes no {options.words[1:]}. Nothing was written.")
    template = template_files(options.template) if options.template else None
    return write_hf(checkpoint_folder.find(place), options.out, template, accept=options.accept_logits)
