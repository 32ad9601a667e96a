"""A DeepSpeed engine for a job: the MoE layer that it asks for, and gradient clipping that is right for experts.

DeepSpeed (0.19.8 and before) clips wrongly under ZeRO-0 with expert parallelism (DeepSpeed#8475): every rank takes the
norm of the gradients that it holds, its own experts' among them, and the ranks' norms are then averaged. The global
norm is another number: the root of the sum of the shared parameters' squares and *all* experts' squares. `start`
replaces DeepSpeed's clipping by one with this norm; ZeRO 1 to 3 compute it themselves.
"""

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.moe.utils import is_moe_param
from deepspeed.utils import groups
from torch import Tensor

from pipeline.models import deepspeed_config, moe, native_moe, topology
from pipeline.models.families import moe_layers
from pipeline.recipe import JobConfig


def start(model: Any, job: JobConfig, ds_json: Mapping[str, Any]) -> Any:
    """Put a model under DeepSpeed, its MoE blocks replaced as the job says. Collective.

    Args:
        model: Hugging Face model, frozen parameters already marked; its MoE blocks are given away.
        job: batch sizes, optimizer, clipping, kind of MoE layer.
        ds_json: the parsed DeepSpeed JSON; not modified.

    Raises:
        ConfigError: see `deepspeed_config.complete`, or layers were not converted.
    """
    config = deepspeed_config.complete(ds_json, job, model.config, dist.get_world_size())
    if job.moe.layer == "native" and moe_layers(model.config):
        size = topology.expert_parallel_size(ds_json)
        native_moe.convert(model, moe.block_paths(model.config), job.moe.native, size, dist.get_rank())
    trainable = [p for p in model.parameters() if p.requires_grad]
    with _plain_lookups():
        engine, *_ = deepspeed.initialize(model=model, model_parameters=trainable, config=config)
    moe.expect_converted(engine, model.config)
    for layer in moe.converted_layers(engine.module).values():
        assert layer.ep_rank == dist.get_rank(group=layer.ep_group), "DeepSpeed grouped the ranks in another order"
    # The step calls this under ZeRO-0 in fp32, if clipping is on.
    engine.clip_fp32_gradients = lambda: clip_gradients(engine)
    return engine


@contextlib.contextmanager
def _plain_lookups() -> Iterator[None]:
    """Let DeepSpeed look up transformers' output recorders by name.

    AutoEP's presets for text-only Qwen2-MoE and Qwen3-MoE (DeepSpeed 0.19.8) call `get(name, default)` on a registry
    whose `get` takes a model and nothing else (transformers 5.23): a TypeError. Before 5.23 it is a plain dict.
    """
    from transformers.utils import output_capturing

    registry = type(output_capturing._CAN_RECORD_REGISTRY)
    if registry is dict:
        yield
        return
    theirs: Any = registry.get

    def get(self: Any, key: Any, *default: Any) -> Any:
        return dict.get(self, key, *default) if isinstance(key, str) else theirs(self, key)

    registry.get = get  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        registry.get = theirs  # type: ignore[method-assign]


@torch.no_grad()
def clip_gradients(engine: Any) -> None:
    """Scale all gradients so that their global norm is at most the engine's limit. Collective.

    `engine.get_global_grad_norm()` then gives the norm before clipping.
    """
    parameters = [p for p in engine.module.parameters() if p.grad is not None]
    norm = global_norm(parameters)
    scale = (engine.gradient_clipping() / (norm + 1e-6)).clamp(max=1.0)
    for parameter in parameters:
        parameter.grad.mul_(scale)
    engine._global_grad_norm = float(norm)


def global_norm(parameters: list[Any]) -> Tensor:
    """2-norm of reduced gradients as one vector: shared ones count once, experts on whichever rank they are.

    Args:
        parameters: with gradients; in one order on every rank.
    """
    squares: dict[str, list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        squares[parameter.group_name if is_moe_param(parameter) else ""].append(parameter.grad.float().square().sum())
    sums = {name: torch.stack(terms).sum() for name, terms in sorted(squares.items())}
    for name, total in sums.items():
        if name:
            dist.all_reduce(total, group=groups._get_expert_parallel_group(name))
    return torch.stack(list(sums.values())).sum().sqrt()
