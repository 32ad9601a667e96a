"""Model families: which Mixture-of-Experts architecture a dense one becomes, and where that keeps its experts.

A family is a pair of transformers architectures: a dense model and the native MoE model of the same kind, whose
vision tower, projector, attention and norms are the same tensors under the same names. Only decoder MLPs differ.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

from pipeline.errors import ConfigError


@dataclass(frozen=True, slots=True)
class MoeFamily:
    """How a MoE decoder names and stores its experts, by the `model_type` of its text configuration."""

    on_disk: Literal["packed", "each"]
    """Layout that is published and that serving engines read. `packed`: `experts.gate_up_proj` [E, H, 2W] and
    `experts.down_proj` [E, W, H]; `each`: `experts.N.{gate,up,down}_proj.weight`, one matrix each."""
    router: str = "gate"
    experts: str = "experts"
    num_experts_attr: str = "num_experts"
    top_k_attr: str = "num_experts_per_tok"
    shared_expert: str | None = None
    """Name of the expert that every token passes, beside the routed ones; None where the architecture has none."""
    shared_expert_gate: str | None = None
    """Name of its gate, a [1, H] projection whose sigmoid scales the shared expert's output."""


MOE_FAMILIES: dict[str, MoeFamily] = {
    "qwen3_vl_moe_text": MoeFamily(on_disk="packed"),
    "qwen3_moe": MoeFamily(on_disk="each"),
    "qwen2_moe": MoeFamily(on_disk="each", shared_expert="shared_expert", shared_expert_gate="shared_expert_gate"),
}


@dataclass(frozen=True, slots=True)
class Upcycling:
    """The MoE architecture that a dense one becomes."""

    model_type: str
    text_type: str
    architecture: str


DENSE_FAMILIES: dict[tuple[str, str], Upcycling] = {
    ("qwen3_vl", "qwen3_vl_text"): Upcycling("qwen3_vl_moe", "qwen3_vl_moe_text", "Qwen3VLMoeForConditionalGeneration"),
    ("internvl", "qwen3"): Upcycling("internvl", "qwen3_moe", "InternVLForConditionalGeneration"),
    ("internvl", "qwen2"): Upcycling("internvl", "qwen2_moe", "InternVLForConditionalGeneration"),
    ("llava_onevision", "qwen3"): Upcycling("llava_onevision", "qwen3_moe", "LlavaOnevisionForConditionalGeneration"),
    ("llava_onevision", "qwen2"): Upcycling("llava_onevision", "qwen2_moe", "LlavaOnevisionForConditionalGeneration"),
    ("qwen3", "qwen3"): Upcycling("qwen3_moe", "qwen3_moe", "Qwen3MoeForCausalLM"),
    ("qwen2", "qwen2"): Upcycling("qwen2_moe", "qwen2_moe", "Qwen2MoeForCausalLM"),
}
"""Dense architectures by (`model_type`, `model_type` of the text model)."""


def text_type(config: PreTrainedConfig) -> str:
    """`model_type` of a model's decoder; the model's own for a text-only one."""
    return str(config.get_text_config().model_type)


def moe_family(config: PreTrainedConfig) -> MoeFamily | None:
    """Where this model keeps its experts; None for a dense model.

    Raises:
        ConfigError: it has experts, but of an architecture that is not known here.
    """
    text: Any = config.get_text_config()
    if not getattr(text, "num_experts", 0):
        return None
    if text.model_type not in MOE_FAMILIES:
        raise ConfigError(
            f"MoE decoder {text.model_type!r} (of {config.model_type!r}) is not known; known: {sorted(MOE_FAMILIES)}. "
            "Add it to pipeline/models/families.py. Nothing was started."
        )
    return MOE_FAMILIES[text.model_type]


def moe_layers(config: PreTrainedConfig) -> list[int]:
    """Indices of the decoder layers that are MoE layers, ascending; empty for a dense model."""
    text: Any = config.get_text_config()
    if not getattr(text, "num_experts", 0):
        return []
    step, dense = text.decoder_sparse_step, set(text.mlp_only_layers or ())
    return [i for i in range(text.num_hidden_layers) if (i + 1) % step == 0 and i not in dense]


def decoder_layers(config: PreTrainedConfig) -> str:
    """Path of the decoder's layers inside the loaded model."""
    composite = config.get_text_config() is not config
    return "model.language_model.layers" if composite else "model.layers"


def auto_class(config: PreTrainedConfig) -> Any:
    """The transformers class that loads this model with its LM head."""
    return AutoModelForCausalLM if config.get_text_config() is config else AutoModelForImageTextToText


def load_config(folder: Any) -> PreTrainedConfig:
    """A checkpoint folder's configuration."""
    config: PreTrainedConfig = AutoConfig.from_pretrained(str(folder))
    return config


def without_weights(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a configuration on the meta device: names and shapes, no memory."""
    with torch.device("meta"):
        model: PreTrainedModel = auto_class(config).from_config(config)
    return model
