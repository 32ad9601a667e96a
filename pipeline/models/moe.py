"""DeepSpeed's configuration for a job, and the router's view of a Mixture-of-Experts model.

The only module that knows how expert parallelism is switched on: DeepSpeed AutoEP, or DeepSpeed's own MoE layer
(`pipeline.models.native_moe`). The recipe owns batch sizes, optimizer, clipping and the kind of layer; the DeepSpeed
JSON owns ZeRO, precision and the expert-parallel size. A value that both give differently is refused, so that neither
silently wins.

Shape suffixes: T = tokens (batch and sequence flattened), E = experts of a layer.
"""

import copy
import logging
import re
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from pipeline.errors import ConfigError, UserError
from pipeline.models.families import decoder_layers, moe_family, moe_layers
from pipeline.models.topology import accumulation_steps, check_expert_parallel_size, expert_parallel_size
from pipeline.recipe import JobConfig

logger = logging.getLogger(__name__)


class RouterError(UserError):
    """Router logits cannot be collected from this model as it is set up."""


def prepare_deepspeed_config(
    raw: Mapping[str, Any], job: JobConfig, model_config: PreTrainedConfig, world_size: int
) -> dict[str, Any]:
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


def _refuse_unsupported(config: Mapping[str, Any], raw: Mapping[str, Any]) -> None:
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


def block_paths(model_config: PreTrainedConfig) -> list[str]:
    """Module paths of the model's Hugging Face MoE blocks, in layer order."""
    return [f"{decoder_layers(model_config)}.{layer}.mlp" for layer in moe_layers(model_config)]


def converted_layers(model: nn.Module) -> dict[str, Any]:
    """DeepSpeed's expert-parallel layers of either kind by module path, in layer order."""
    # Here, because stages that run without DeepSpeed import this module too.
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

    from pipeline.models.native_moe import NativeMoe

    kinds = (AutoEPMoELayer, NativeMoe)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def expect_converted(engine: Any, model_config: PreTrainedConfig) -> int:
    """Check that DeepSpeed converted exactly the model's MoE layers; returns how many.

    AutoEP only warns when its pattern matches nothing, and then trains without expert parallelism.

    Raises:
        ConfigError: expert parallelism is on and the number of converted layers is not the model's.
    """
    from pipeline.models.native_moe import NativeMoe

    config = engine.config if isinstance(engine.config, Mapping) else {}
    layers = converted_layers(engine.module)
    native = any(isinstance(layer, NativeMoe) for layer in layers.values())
    found = len(layers)
    wanted = len(moe_layers(model_config)) if native or config.get("expert_parallel", {}).get("enabled", False) else 0
    if found != wanted:
        raise ConfigError(
            f"expert parallelism: DeepSpeed converted {found} layer(s), the model has {wanted} MoE layer(s). "
            "Check expert_parallel.moe_layer_pattern in the DeepSpeed JSON."
        )
    return found


def enable_activation_checkpointing(model: Any) -> None:
    """Recompute decoder layers in backward; non-reentrant, so that losses on router logits are kept."""
    model.gradient_checkpointing_enable({"use_reentrant": False})


def expert_counts(router_logits_TE: Tensor, top_k: int, valid_T: Tensor | None = None) -> Tensor:
    """How many tokens each expert is chosen for: i64[E], summing to top_k x tokens.

    Args:
        router_logits_TE: one layer's router logits.
        top_k: experts per token.
        valid_T: bool, True where the token counts (padding False); None counts all.
    """
    chosen_TK = router_logits_TE.detach().topk(top_k, dim=-1).indices
    if valid_T is not None:
        chosen_TK = chosen_TK[valid_T]
    return torch.bincount(chosen_TK.flatten(), minlength=router_logits_TE.shape[-1])


class RouterProbe:
    """Collects every MoE layer's router logits from ordinary forward passes of the model.

    Works on Hugging Face's MoE blocks and on DeepSpeed's replacements, whichever the model holds when the
    probe is attached. Only tensors made while the *root* module's forward runs are kept: the recomputation
    of activation checkpointing happens in backward, outside of it, and so cannot double them.

    Use `take()` after each forward; a second forward without it starts afresh.
    """

    def __init__(self, model: nn.Module) -> None:
        """Attach to `model` (for DeepSpeed: `engine.module`, after `deepspeed.initialize`)."""
        self._routers = _find_routers(model)
        self._layers = list(converted_layers(model).values())
        self._logits: list[Tensor | None] = [None] * len(self._routers)
        self._recording = False
        self._handles = [
            model.register_forward_pre_hook(self._start),
            model.register_forward_hook(self._stop, always_call=True),
        ]
        self._handles += [r.register_forward_hook(self._keeper(i)) for i, r in enumerate(self._routers)]

    def __len__(self) -> int:
        """Number of MoE layers."""
        return len(self._routers)

    def take(self) -> list[Tensor]:
        """Router logits [T, E] of the last forward, one per MoE layer in layer order, gradients attached.

        Raises:
            RouterError: there was no forward since the last call, or a layer did not run.
        """
        missing = [i for i, logits in enumerate(self._logits) if logits is None]
        if missing:
            raise RouterError(f"no router logits of MoE layer(s) {missing}: run the model's forward before take()")
        taken = [logits for logits in self._logits if logits is not None]
        self._logits = [None] * len(self._routers)
        return taken

    def dropped(self) -> Tensor | None:
        """i64[L]: pairs of token and expert that each layer's last forward dropped; None if no layer can drop."""
        counts = [layer.router.dropped for layer in self._layers if hasattr(layer.router, "dropped")]
        return torch.stack(counts) if counts else None

    def close(self) -> None:
        """Detach from the model."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self, module: nn.Module, inputs: Any) -> None:
        self._logits = [None] * len(self._routers)
        self._recording, self._wants_grad = True, torch.is_grad_enabled()

    def _stop(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._recording = False

    def _keeper(self, index: int) -> Any:
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            if not self._recording:
                return
            if self._wants_grad and not torch.is_grad_enabled():
                raise RouterError(
                    "reentrant activation checkpointing would lose the router losses: "
                    'enable it with {"use_reentrant": False}'
                )
            self._logits[index] = output[0] if isinstance(output, tuple) else output

        return keep


def _find_routers(model: nn.Module) -> list[nn.Module]:
    """Modules whose (first) output is a layer's router logits, in layer order."""
    converted = converted_layers(model)
    if converted:
        return [layer.router.gate for layer in converted.values()]
    config = getattr(model, "config", None)
    family = moe_family(config) if config is not None else None
    if config is None or family is None:
        return []
    layers = model.get_submodule(decoder_layers(config))
    return [layers.get_submodule(f"{i}.mlp.{family.router}") for i in moe_layers(config)]
