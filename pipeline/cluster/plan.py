"""What a training job will take, before any GPU is asked for: parameters, memory a rank by part, traffic, hours.

    clkd plan RECIPE.yaml --gpus 64 --gpu-mem 80 [--deepspeed_config ds_configs/X.json] job=NAME

Reads configurations, never weights: a model may be a checkpoint folder, random, or upcycled from either, made or not.
Micro-batch, optimizer, frozen parts and activation checkpointing come from the recipe; ZeRO stage, precision and
expert-parallel size from the DeepSpeed JSON. The micro-batch is planned at its worst: every sample as long as
`data.max_length`, with an image of `data.max_pixels`. `--length`, `--images` and `--answers` say otherwise.

Ends with status 2 when the job does not fit, and names changes with which it would. `--reserve` is left for what is not
computed: CUDA's context, NCCL, fragmentation. Hours need a rate: `--tflops`, what a GPU reaches in training (not its
peak), or `--rate FILE`, what `tools.bench.moe --json FILE` measured. The formulae: pipeline/models/cost/footprint.py,
pipeline/models/cost/activations.py and pipeline/models/cost/flops.py; tests hold them against real engines.
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import PreTrainedConfig

from pipeline.benchmark import random_models
from pipeline.cluster.plan_topology import show_topology
from pipeline.data import processor_folder
from pipeline.data.processor import Processor
from pipeline.errors import ConfigError, UserError
from pipeline.files import write_json
from pipeline.models import deepspeed_config, families, loading, topology, upcycling
from pipeline.models.cost import flops, footprint
from pipeline.models.cost.activations import Kept, Load, Settings, TextShape, VisionShape, activations
from pipeline.models.cost.footprint import Spread, State
from pipeline.models.loading import freeze
from pipeline.models.topology import read_deepspeed_config
from pipeline.recipe import JobConfig, Recipe, Reference
from pipeline.targets import codecs
from pipeline.targets.pool import open_every

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Plan:
    """A job on some ranks."""

    spread: Spread
    state: State
    kept: Kept
    load: Load
    total_parameters: int
    active_parameters: int
    trained_parameters: int
    operations: flops.Training
    """Of a rank's optimizer step."""
    all_to_all: int
    """Bytes that a rank sends in an optimizer step."""

    @property
    def peaks(self) -> dict[str, int]:
        """Bytes of a rank at each moment of a step that may be the largest."""
        return footprint.peaks(self.state, self.spread, self.kept)

    @property
    def peak(self) -> int:
        """The largest of them."""
        return max(self.peaks.values())


# -- configurations without weights ------------------------------------------------------------------------


def model_config(recipe: Recipe, ref: str) -> PreTrainedConfig:
    """Configuration of the model that a reference names, whether its folder exists or not.

    Raises:
        UserError: it is neither there nor described by the recipe.
    """
    folder = recipe.model_dir(ref)
    if (folder / "config.json").is_file():
        return families.load_config(folder)
    reference = Reference.parse(ref)
    if reference.job is not None:
        return model_config(recipe, recipe.jobs[reference.job].init)
    if reference.model in recipe.random_models:
        sizes = recipe.random_models[reference.name]
        return random_models.qwen3_vl_config(sizes.text, sizes.vision, _processor(recipe))
    settings = recipe.models[reference.name].upcycle if reference.model in recipe.models else None
    if settings is not None:
        return upcycling.moe_config(upcycling.plan(model_config(recipe, settings.source), settings, ref))
    raise UserError(
        f"{ref}: no config.json in {folder}. Correct the reference, or download the checkpoint's config.json."
    )


def _processor(recipe: Recipe) -> Any:
    """The run's processor, or what a configuration needs of one that is not made yet: the size of its vocabulary."""
    if processor_folder.has_image_processor(recipe.processor_dir):
        return Processor.load(recipe.processor_dir, recipe.data)
    ids = {"pad_id": 0, "eos_id": 1, "image_token_id": 2, "video_token_id": 3}
    ids |= {"vision_start_id": 4, "vision_end_id": 5, "vocab_size": recipe.required_benchmark.vocab_size}
    return SimpleNamespace(**ids, image_processor=SimpleNamespace(temporal_patch_size=2))


def shapes(config: PreTrainedConfig) -> tuple[TextShape, VisionShape | None]:
    """Sizes of decoder and vision tower; None: a text-only model."""
    vision = getattr(config, "vision_config", None)
    text = TextShape.of(config.get_text_config(), len(families.moe_layers(config)))
    return text, None if vision is None else VisionShape.of(vision)


def worst_load(recipe: Recipe, job: JobConfig, config: PreTrainedConfig, options: argparse.Namespace) -> Load:
    """The largest micro-batch that the data settings allow, unless options say what it is."""
    vision = shapes(config)[1]
    patches = recipe.data.max_pixels // vision.patch_pixels if vision is not None else 0
    images = options.images * job.batch.micro_size if vision is not None else 0
    return Load(
        sequences=job.batch.micro_size,
        length=options.length or recipe.data.max_length,
        patches=images * patches,
        images=images,
        answers=options.answers * job.batch.micro_size,
    )


# -- the plan ----------------------------------------------------------------------------------------------


def make_plan(
    model: Any,
    job: JobConfig,
    ds_json: Mapping[str, Any],
    ranks: int,
    load: Load,
    *,
    attention: str = "sdpa",
    imbalance: float = 1.0,
    on_cpu: bool = False,
) -> Plan:
    """Plan a job of a model on the meta device.

    Raises:
        ConfigError: as training would at its start: batch sizes, expert-parallel size, combinations refused.
    """
    config = model.config
    freeze(model, job.trainable)
    spread = Spread.from_deepspeed(deepspeed_config.complete(ds_json, job, config, ranks), ranks)
    if job.moe.layer == "native" and families.moe_layers(config):  # has no block of AutoEP left
        spread = replace(spread, expert_parallel=topology.expert_parallel_size(ds_json), experts_apart=True)
    weights = footprint.local_weights(model.named_parameters(), spread)
    text, vision = shapes(config)
    dropping = job.moe.layer == "native" and job.moe.native.drop_tokens
    settings = Settings(
        bytes=spread.weight_bytes,
        eager_attention=attention == "eager",
        checkpointing=job.performance.activation_checkpointing,
        attention_trains=job.trainable != "mlp_and_router",
        vision_trains=job.trainable == "all",
        on_cpu=on_cpu,
        slack=job.moe.native.capacity_factor if dropping else imbalance,
        local_experts=text.experts // spread.expert_parallel,
    )
    total, active = loading.parameter_counts(model)
    once = flops.training(text, vision, load, settings)
    steps = spread.accumulation_steps
    return Plan(
        spread=spread,
        state=footprint.state(weights, spread),
        kept=activations(text, vision, load, settings),
        load=load,
        total_parameters=total,
        active_parameters=active,
        trained_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        operations=flops.Training(once.needed * steps, once.computed * steps),
        all_to_all=steps * flops.all_to_all_bytes(text, load, settings, spread.expert_parallel),
    )


Variant = tuple[JobConfig, dict[str, Any]]
"""A job and its DeepSpeed JSON, as they are or changed so that the job fits."""
PER_SAMPLE = ("sequences", "patches", "images", "answers")
"""Parts of a load that grow with the micro-batch."""


def remedies(model: Any, variant: Variant, plan: Plan, room: float, options: argparse.Namespace) -> list[str]:
    """Changes, each on top of those before it, until the job fits; those that cost least time come first."""
    job = variant[0]
    lines: list[str] = []
    for what, changed in _changes(variant, plan):
        share = changed[0].batch.micro_size / job.batch.micro_size
        load = replace(plan.load, **{part: round(share * getattr(plan.load, part)) for part in PER_SAMPLE})
        try:
            found = _planned(model, changed, load, options)
        except ConfigError:
            continue
        fits = found.peak <= room
        lines.append(f"{'and ' if lines else ''}{what}: {found.peak / GIB:.1f} GiB{', fits' if fits else ''}")
        if fits:
            return lines
    return [*lines, "none of these is enough: take more GPUs or a smaller model"]


def _planned(model: Any, variant: Variant, load: Load, options: argparse.Namespace) -> Plan:
    return make_plan(model, *variant, options.gpus, load, attention=options.attention, imbalance=options.imbalance)


def _changes(variant: Variant, plan: Plan) -> Iterator[tuple[str, Variant]]:
    """(what to write, the variant with this change and all before it)."""
    job, ds_json = variant
    if not job.performance.activation_checkpointing:
        job = _changed(job, "performance", activation_checkpointing=True)
        yield "performance.activation_checkpointing: true", (job, ds_json)
    for stage in range(plan.spread.stage + 1, 4):
        ds_json = ds_json | {"zero_optimization": ds_json.get("zero_optimization", {}) | {"stage": stage}}
        yield f"zero_optimization.stage {stage}", (job, ds_json)
    size = plan.spread.expert_parallel
    while plan.spread.experts_apart and size < plan.spread.ranks:
        size *= 2
        ds_json = ds_json | {"expert_parallel": ds_json["expert_parallel"] | {"autoep_size": size}}
        yield f"expert_parallel.autoep_size {size}", (job, ds_json)
    while job.batch.micro_size > 1:
        job = _changed(job, "batch", micro_size=job.batch.micro_size // 2)
        yield f"batch.micro_size {job.batch.micro_size}", (job, ds_json)


def _changed(job: JobConfig, section: str, **values: Any) -> JobConfig:
    return job.model_copy(update={section: getattr(job, section).model_copy(update=values)})


# -- soft targets ------------------------------------------------------------------------------------------


def soft_target_bytes(recipe: Recipe, vocabulary: int, samples: int, answers: int) -> int:
    """Bytes of the whole store. An upper bound for the codec `sampled`: there a token's bytes depend on the teacher."""
    spec = codecs.make_spec(recipe.targets, vocabulary)
    return samples * answers * codecs.CODECS[recipe.targets.codec].most_bytes(spec)


def count_samples(recipe: Recipe, given: int | None) -> int | None:
    """Training samples: the number given, else that of the data set; None when it is not on this machine."""
    if given is not None:
        return given
    try:
        return len(open_every(recipe))
    except (UserError, OSError):
        return None


# -- output ------------------------------------------------------------------------------------------------


def figures(
    plan: Plan, recipe: Recipe, job: JobConfig, config: PreTrainedConfig, options: argparse.Namespace
) -> dict[str, Any]:
    """Everything that is printed, as numbers."""
    samples = count_samples(recipe, options.samples)
    found: dict[str, Any] = {
        "parameters": {
            "total": plan.total_parameters,
            "active": plan.active_parameters,
            "trained": plan.trained_parameters,
        },
        "spread": asdict(plan.spread),
        "load": asdict(plan.load),
        "bytes": asdict(plan.state) | asdict(plan.kept),
        "peaks": plan.peaks,
        "peak": plan.peak,
        "all_to_all_bytes_per_rank_and_step": plan.all_to_all,
        "operations_per_rank_and_step": asdict(plan.operations),
        "samples": samples,
        "steps": job.steps,
    }
    if samples is not None and (job.distill or job.curriculum):
        found["soft_target_bytes"] = soft_target_bytes(
            recipe, config.get_text_config().vocab_size, samples, options.answers
        )
    rate = measured_rate(options.rate) if options.rate else options.tflops
    if rate:
        found |= {"tflops": rate, "hours": job.steps * plan.operations.computed / (rate * 1e12) / 3600}
    return found


def measured_rate(path: Path) -> float:
    """TFLOP/s of the training step that `tools.bench.moe` measured.

    Raises:
        UserError: the file holds none.
    """
    try:
        return float(json.loads(path.read_text())["step_tflops"])
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: no `step_tflops` of tools.bench.moe in it ({error!r}).") from error


def report(plan: Plan, found: Mapping[str, Any], job_name: str, ds_config: Path) -> str:
    """The plan as text."""
    spread, state, kept, load = plan.spread, plan.state, plan.kept, plan.load
    moments = ("master weights and moments", state.optimizer)
    parts = [
        ("weights", state.weights),
        ("gradients", state.gradients),
        moments,
        ("activations", kept.saved + kept.recomputed),
        ("working memory of head or backward", max(kept.head, kept.backward)),
        ("gradient buckets", state.buckets),
        ("weights that ZeRO-3 gathers", state.gathered),
        ("optimizer step, for a moment", state.step),
    ]
    sent = plan.all_to_all / GIB
    precision = "bf16" if spread.weight_bytes == 2 else "float32"
    lines = [
        f"job {job_name}, {ds_config.name}: {spread.ranks} GPUs, ZeRO {spread.stage}, {precision}, expert-parallel "
        f"{spread.expert_parallel}, {spread.accumulation_steps} micro-batch(es) of {load.sequences} x {load.length} "
        f"positions, {load.patches} patches, {load.answers} answer tokens",
        f"parameters: {plan.total_parameters / 1e9:.3f} B, active {plan.active_parameters / 1e9:.3f} B, "
        f"trained {plan.trained_parameters / 1e9:.3f} B",
        "memory a rank, GiB:",
        *(f"  {label:38}{size / GIB:10.3f}" for label, size in parts if size),
        f"  {'peak, ' + max(plan.peaks, key=lambda moment: plan.peaks[moment]):38}{plan.peak / GIB:10.3f}",
        f"host memory while the model is read: {4 * plan.total_parameters / GIB:.1f} GiB a rank (float32, whole)",
        f"all-to-all: {sent:.2f} GiB a rank and step, {sent * spread.ranks:.1f} GiB in all",
        f"operations: {plan.operations.computed / 1e12:.1f} TFLOP a rank and step, of which the mathematics needs "
        f"{plan.operations.needed / 1e12:.1f}",
    ]
    if "soft_target_bytes" in found:
        lines.append(f"soft targets: {found['soft_target_bytes'] / 1e9:.2f} GB for {found['samples']} samples")
    if "hours" in found:
        lines.append(
            f"training: {found['hours']:.2f} h for {found['steps']} steps at {found['tflops']:g} TFLOP/s a GPU"
        )
    else:
        lines.append("training: give --tflops or --rate to get hours")
    return "\n".join(lines)


def refuse(model: Any, variant: Variant, plan: Plan, room: float, options: argparse.Namespace) -> None:
    """UserError with what would make the job fit."""
    lines = remedies(model, variant, plan, room, options)
    raise UserError(
        f"the job needs {plan.peak / GIB:.1f} GiB on a rank; there are {options.gpu_mem:g} GiB, {options.reserve:g} "
        f"of them in reserve. Change, one on top of the other:\n  " + "\n  ".join(lines)
    )


def main(recipe: Recipe, options: argparse.Namespace) -> int | None:
    """The command `plan`."""
    name, job = recipe.selected_job()
    options.deepspeed_config = options.deepspeed_config or recipe.cluster.deepspeed
    ds_json = read_deepspeed_config(options.deepspeed_config)
    if options.topology:
        return show_topology(job, ds_json, model_config(recipe, job.init), options)
    if options.gpu_mem is None or len(options.gpus) != 1:
        raise ConfigError("clkd plan: give one number of --gpus and their memory, --gpu-mem GIB (or --topology).")
    options.gpus = options.gpus[0]
    model = families.without_weights(model_config(recipe, job.init))
    load = worst_load(recipe, job, model.config, options)
    plan = _planned(model, (job, ds_json), load, options)
    found = figures(plan, recipe, job, model.config, options)
    if options.json:
        write_json(options.json, found)
    print(report(plan, found, name, options.deepspeed_config))
    room = (options.gpu_mem - options.reserve) * GIB
    if plan.peak > room:
        refuse(model, (job, ds_json), plan, room, options)
    return None
