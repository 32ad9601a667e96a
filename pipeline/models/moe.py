"""The MoE layers of a model: Hugging Face's blocks, and DeepSpeed's expert-parallel layers that take their place.

There are two kinds of expert-parallel layer. AutoEP replaces the blocks inside `deepspeed.initialize`, as
`pipeline.models.deepspeed_config` tells it to; DeepSpeed's own layer is put in before (`pipeline.models.native_moe`).
"""

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from pipeline.errors import ConfigError
from pipeline.models.families import decoder_layers, moe_layers


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
