"""A DeepSpeed engine for a job: its configuration, the MoE layer that it asks for, and how it treats gradients."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import deepspeed
import torch.distributed as dist
from torch import nn

from pipeline.models import deepspeed_config, moe, native_moe, topology
from pipeline.models.families import moe_layers
from pipeline.recipe import JobConfig
from pipeline.training import gradients


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
    gradients.prepare(engine)
    return engine


def whole(parameter: nn.Parameter) -> contextlib.AbstractContextManager[None]:
    """ZeRO-3 has a parameter in parts outside its module: whole while the context is open. Collective under ZeRO-3."""
    gathered: contextlib.AbstractContextManager[None] = deepspeed.zero.GatheredParameters([parameter])
    return gathered


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
