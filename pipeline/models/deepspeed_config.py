"""DeepSpeed's configuration for a job: what the recipe and the model add to the user's JSON, and what is refused.

The recipe owns batch sizes, optimizer, clipping and the kind of MoE layer; the DeepSpeed JSON owns ZeRO, precision and
the expert-parallel size. A value that both give differently is refused, so that neither silently wins.
"""

import copy
import logging
import re
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from pipeline.errors import ConfigError
from pipeline.models.families import decoder_layers, moe_family, moe_layers
from pipeline.models.topology import accumulation_steps, check_expert_parallel_size, expert_parallel_size
from pipeline.recipe import JobConfig

logger = logging.getLogger(__name__)


# -- what the recipe owns ----------------------------------------------------------------------------------------------


def complete(raw: Mapping[str, Any], job: JobConfig, model_config: PreTrainedConfig, world_size: int) -> dict[str, Any]:
    """Complete a DeepSpeed JSON with what the recipe and the model say.

    Args:
        raw: the parsed JSON file; not modified.
        job: batch sizes, optimizer, clipping.
        model_config: configuration of the model that will be trained; decides whether there are experts.
        world_size: number of ranks.

    Raises:
        ConfigError: the JSON contradicts the recipe, the world size divides neither the batch nor into the
            expert-parallel groups, or the combination is known to train wrongly.
    """
    config = copy.deepcopy(dict(raw))
    _fill_batch(config, job, world_size)
    _fill_optimizer(config, job)
    _fill(config, "gradient_clipping", job.optimizer.grad_clip, "jobs.*.optimizer.grad_clip")
    _fill_experts(config, job, model_config, world_size)
    _refuse_unsupported(config, raw)
    return config


def _fill(config: dict[str, Any], key: str, value: Any, source: str) -> None:
    """Set a key that the recipe owns; "auto" or an equal value in the JSON is fine."""
    given = config.get(key, "auto")
    if given not in ("auto", value):
        raise ConfigError(
            f"DeepSpeed JSON: {key} is {given!r}, but the recipe says {value!r} ({source}). "
            f"Remove {key} from the JSON, or change the recipe. Nothing was started."
        )
    config[key] = value


def _fill_batch(config: dict[str, Any], job: JobConfig, world_size: int) -> None:
    steps = accumulation_steps(job, world_size)
    _fill(config, "train_batch_size", job.batch.global_size, "jobs.*.batch.global_size")
    _fill(config, "train_micro_batch_size_per_gpu", job.batch.micro_size, "jobs.*.batch.micro_size")
    _fill(config, "gradient_accumulation_steps", steps, "batch.global_size / (batch.micro_size x ranks)")


def _fill_optimizer(config: dict[str, Any], job: JobConfig) -> None:
    for key in ("optimizer", "scheduler"):
        if key in config:
            raise ConfigError(
                f"DeepSpeed JSON: remove `{key}`: optimizer and learning rate come from the recipe "
                f"(here {job.optimizer.kind}, lr {job.optimizer.lr}). Nothing was started."
            )
    settings = job.optimizer
    params: dict[str, Any] = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    if settings.kind == "adamw":
        # torch's AdamW: DeepSpeed's own ones compile a kernel for a minute at the first start.
        params |= {"betas": list(settings.betas), "eps": 1e-8, "torch_adam": True}
        config["optimizer"] = {"type": "AdamW", "params": params}
    else:
        config["optimizer"] = {"type": "SGD", "params": params}
        config["zero_allow_untested_optimizer"] = True
    config["zero_force_ds_cpu_optimizer"] = False


# -- experts -----------------------------------------------------------------------------------------------------------
# A block `expert_parallel` switches AutoEP on. Its patterns and counts follow from the model's family; the user gives
# the expert-parallel size alone. DeepSpeed's own layer takes that size from the same block, which is then removed.


def _fill_experts(config: dict[str, Any], job: JobConfig, model_config: PreTrainedConfig, world_size: int) -> None:
    """Complete `expert_parallel` for the model's family, or drop it when AutoEP has nothing to do."""
    if job.moe.layer == "native" and moe_layers(model_config):
        _check_native(config, model_config, world_size)
        config.pop("expert_parallel", None)  # it would switch AutoEP on
        return
    block = config.get("expert_parallel")
    if not block or not block.get("enabled", False):
        config.pop("expert_parallel", None)
        return
    if not moe_layers(model_config):
        logger.info("expert parallelism is off: %s has no experts", model_config.model_type)
        del config["expert_parallel"]
        return
    family = moe_family(model_config)
    assert family is not None
    text = model_config.get_text_config()
    check_expert_parallel_size(block.get("autoep_size", 1), world_size, getattr(text, family.num_experts_attr))
    known = {
        "moe_layer_pattern": rf"{re.escape(decoder_layers(model_config))}\.\d+\.mlp",
        "router_pattern": family.router,
        "expert_pattern": family.experts,
        "num_experts_attr": family.num_experts_attr,
        "top_k_attr": family.top_k_attr,
        "top_k": getattr(text, family.top_k_attr),
        "route_norm": True,
    }
    if family.shared_expert is not None:
        known |= {
            "has_shared_experts": True,
            "shared_experts_pattern": family.shared_expert,
            "shared_experts_gate_pattern": family.shared_expert_gate,
        }
    # A pattern that matched nothing would switch expert parallelism off with no more than a warning: all are ours.
    for key, value in known.items():
        _fill(block, key, value, f"{model_config.model_type}'s configuration")


def _check_native(config: Mapping[str, Any], model_config: PreTrainedConfig, world_size: int) -> None:
    """Refuse what DeepSpeed's own MoE layer cannot do."""
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage == 3:
        raise ConfigError(
            "moe.layer native with ZeRO stage 3: DeepSpeed's own MoE layer has no ZeRO-3. "
            "Use stage 0, 1 or 2, or `moe.layer: autoep`. Nothing was started."
        )
    foreign = sorted(set(config.get("expert_parallel") or {}) - {"enabled", "autoep_size"})
    if foreign:
        raise ConfigError(
            f"expert_parallel.{foreign[0]} is a setting of AutoEP, but the job says `moe.layer: native`. "
            f"Take {foreign} out of the DeepSpeed JSON. Nothing was started."
        )
    family = moe_family(model_config)
    assert family is not None
    num_experts = getattr(model_config.get_text_config(), family.num_experts_attr)
    check_expert_parallel_size(expert_parallel_size(config), world_size, num_experts)


# -- combinations that train wrongly, or were not tried ----------------------------------------------------------------


def _refuse_unsupported(config: Mapping[str, Any], raw: Mapping[str, Any]) -> None:
    """ConfigError for what would run and give a worse model, or none after a restart."""
    stage, bf16 = config.get("zero_optimization", {}).get("stage", 0), config.get("bf16", {}).get("enabled", False)
    if stage == 0 and bf16 and expert_parallel_size(raw) > 1:
        raise ConfigError(
            f"ZeRO stage 0 with bf16 and expert parallelism (autoep_size {expert_parallel_size(raw)}): gradients are "
            "kept in bf16, less exact than under stage 1, and resuming was not tried. Use stage 1, 2 or 3. "
            "Nothing was started."
        )
    if "elasticity" in config:
        raise ConfigError(
            "DeepSpeed JSON: remove `elasticity`: DeepSpeed has removed elastic training. A job goes on with another "
            "number of ranks whenever it is started again (docs/CLUSTER.md). Nothing was started."
        )
    if config.get("fp16", {}).get("enabled", False):
        raise ConfigError("DeepSpeed JSON: fp16 is not supported (no loss scaling); use bf16. Nothing was started.")
