"""DeepSpeed's configuration for a job, and the router's view of a Mixture-of-Experts model.

The only module that knows how expert parallelism (DeepSpeed AutoEP) is switched on. The recipe owns batch
sizes, optimizer and clipping; the DeepSpeed JSON owns ZeRO, precision and the expert-parallel size. A value
that both give differently is refused, so that neither silently wins.

Shape suffixes: T = tokens (batch and sequence flattened), E = experts of a layer.
"""

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from pipeline.config import JobConfig
from pipeline.errors import ConfigError, UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MoeFamily:
    """Where an architecture keeps its experts, in the words of DeepSpeed's `expert_parallel`."""

    layer_pattern: str
    router: str = "gate"
    experts: str = "experts"
    num_experts_attr: str = "num_experts"
    top_k_attr: str = "num_experts_per_tok"


FAMILIES: dict[str, MoeFamily] = {
    "qwen3_vl_moe": MoeFamily(layer_pattern=r"model\.language_model\.layers\.\d+\.mlp"),
}
"""Architectures by `model_type`. Another family whose experts are packed the same way needs one more line."""


class RouterError(UserError):
    """Router logits cannot be collected from this model as it is set up."""


def moe_layers(model_config: PreTrainedConfig) -> list[int]:
    """Indices of the decoder layers that are MoE layers, ascending; empty for a dense model."""
    text = model_config.get_text_config()
    if not getattr(text, "num_experts", 0):
        return []
    step, dense = text.decoder_sparse_step, set(text.mlp_only_layers or ())
    return [i for i in range(text.num_hidden_layers) if (i + 1) % step == 0 and i not in dense]


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
    _fill(config, "gradient_clipping", job.grad_clip, "jobs.*.grad_clip")
    _fill_experts(config, model_config, world_size)
    _refuse_unsupported(config, job)
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
    per_pass = job.micro_batch_size * world_size
    if job.global_batch_size % per_pass:
        raise ConfigError(
            f"global_batch_size {job.global_batch_size} is not a multiple of micro_batch_size "
            f"{job.micro_batch_size} x {world_size} rank(s) = {per_pass}. "
            "Change one of them, or the number of ranks. Nothing was started."
        )
    _fill(config, "train_batch_size", job.global_batch_size, "global_batch_size")
    _fill(config, "train_micro_batch_size_per_gpu", job.micro_batch_size, "micro_batch_size")
    steps = job.global_batch_size // per_pass
    _fill(config, "gradient_accumulation_steps", steps, "global_batch_size / (micro_batch_size x ranks)")


def _fill_optimizer(config: dict[str, Any], job: JobConfig) -> None:
    for key in ("optimizer", "scheduler"):
        if key in config:
            raise ConfigError(
                f"DeepSpeed JSON: remove `{key}`: optimizer and learning rate come from the recipe "
                f"(here {job.optimizer}, lr {job.lr}). Nothing was started."
            )
    params: dict[str, Any] = {"lr": job.lr, "weight_decay": job.weight_decay}
    if job.optimizer == "adamw":
        # torch's AdamW: DeepSpeed's own ones compile a kernel for a minute at the first start.
        params |= {"betas": list(job.betas), "eps": 1e-8, "torch_adam": True}
        config["optimizer"] = {"type": "AdamW", "params": params}
    else:
        config["optimizer"] = {"type": "SGD", "params": params}
        config["zero_allow_untested_optimizer"] = True
    config["zero_force_ds_cpu_optimizer"] = False


def _fill_experts(config: dict[str, Any], model_config: PreTrainedConfig, world_size: int) -> None:
    """Complete `expert_parallel` for the model's family, or drop it when the model has no experts."""
    block = config.get("expert_parallel")
    if not block or not block.get("enabled", False):
        config.pop("expert_parallel", None)
        return
    if not moe_layers(model_config):
        logger.info("expert parallelism is off: %s has no experts", model_config.model_type)
        del config["expert_parallel"]
        return
    family = FAMILIES.get(model_config.model_type)
    if family is None:
        raise ConfigError(
            f"expert parallelism for model type {model_config.model_type!r} is not known; known: "
            f"{sorted(FAMILIES)}. "
            "Use ds_configs/dense.json, or add the family to pipeline/moe.py. Nothing was started."
        )
    text = model_config.get_text_config()
    _check_expert_parallel_size(block.get("autoep_size", 1), world_size, getattr(text, family.num_experts_attr))
    known = {
        "moe_layer_pattern": family.layer_pattern,
        "router_pattern": family.router,
        "expert_pattern": family.experts,
        "num_experts_attr": family.num_experts_attr,
        "top_k_attr": family.top_k_attr,
        "top_k": getattr(text, family.top_k_attr),
        "route_norm": True,
    }
    for key, value in known.items():
        _fill(block, key, value, f"{model_config.model_type}'s configuration")


def _check_expert_parallel_size(size: int, world_size: int, num_experts: int) -> None:
    for what, whole in (("ranks", world_size), ("experts per layer", num_experts)):
        if whole % size:
            raise ConfigError(
                f"expert_parallel.autoep_size {size} does not divide the {whole} {what}. "
                f"Choose a divisor of both {world_size} (ranks) and {num_experts} (experts). "
                "Nothing was started."
            )


def expert_parallel_size(config: Mapping[str, Any]) -> int:
    """Ranks that share the experts of one layer; 1 without expert parallelism."""
    block = config.get("expert_parallel") or {}
    return int(block.get("autoep_size", 1)) if block.get("enabled", False) else 1


def _refuse_unsupported(config: dict[str, Any], job: JobConfig) -> None:
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage == 0 and expert_parallel_size(config) > 1 and job.grad_clip > 0:
        # DeepSpeed#8475: the norms of different experts are averaged, so that ranks clip differently.
        raise ConfigError(
            f"ZeRO stage 0 with expert parallelism (autoep_size {expert_parallel_size(config)}) clips "
            f"gradients wrongly in DeepSpeed 0.19 (grad_clip {job.grad_clip}). "
            "Use stage 1, 2 or 3, or grad_clip 0. Nothing was started."
        )
    if config.get("fp16", {}).get("enabled", False):
        raise ConfigError("DeepSpeed JSON: fp16 is not supported (no loss scaling); use bf16. Nothing was started.")


def converted_layers(model: nn.Module) -> dict[str, Any]:
    """DeepSpeed's expert-parallel layers by module path, in layer order."""
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

    return {name: module for name, module in model.named_modules() if isinstance(module, AutoEPMoELayer)}


def expect_converted(engine: Any, model_config: PreTrainedConfig) -> int:
    """Check that DeepSpeed converted exactly the model's MoE layers; returns how many.

    AutoEP only warns when its pattern matches nothing, and then trains without expert parallelism.

    Raises:
        ConfigError: expert parallelism is on and the number of converted layers is not the model's.
    """
    config = engine.config if isinstance(engine.config, Mapping) else {}
    found = len(converted_layers(engine.module))
    wanted = len(moe_layers(model_config)) if config.get("expert_parallel", {}).get("enabled", False) else 0
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
    family = FAMILIES.get(getattr(config, "model_type", ""))
    if config is None or family is None or not moe_layers(config):
        return []
    layers = model.get_submodule("model.language_model.layers")
    return [layers.get_submodule(f"{i}.mlp.{family.router}") for i in moe_layers(config)]
