"""Random Qwen3-VL models of any size, for the embedded benchmark: real ones come from a checkpoint folder."""

import math
from typing import Any

import torch
from transformers import GenerationConfig, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from pipeline.data.processor import Processor
from pipeline.errors import ConfigError
from pipeline.recipe import RandomModelConfig, TextSize, VisionSize

ROPE_THETA = 10_000.0
MAX_POSITIONS = 4096
POSITION_GRID = 16
"""Side of the vision tower's learned position grid; it is interpolated to each image's own grid."""
VOCAB_MULTIPLE = 64


def build(config: RandomModelConfig, processor: Processor, seed: int) -> Qwen3VLForConditionalGeneration:
    """A dense Qwen3-VL with random float32 weights that depend on `config`, the vocabulary and `seed` only.

    Raises:
        ConfigError: sizes that do not fit together (all problems at once).
    """
    problems = [
        *_text_problems(config.text),
        *_vision_problems(config.vision, config.text),
        *_patch_problems(config.vision, processor),
    ]
    if problems:
        raise ConfigError("model sizes do not fit together:\n  " + "\n  ".join(problems))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        settings = qwen3_vl_config(config.text, config.vision, processor)
        model = Qwen3VLForConditionalGeneration(settings)  # type: ignore[no-untyped-call, unused-ignore]
        _widen_vision_init(model)
    generation: dict[str, Any] = {"eos_token_id": processor.eos_id, "pad_token_id": processor.pad_id}
    model.generation_config = GenerationConfig(do_sample=False, **generation)  # type: ignore[no-untyped-call]
    model.train(False)
    return model


def _widen_vision_init(model: Qwen3VLForConditionalGeneration) -> None:
    """Weights of the tower by fan-in: transformers' 0.02 fits wide towers, and small ones then learn slowly."""
    for name, weight in model.model.visual.named_parameters():
        if weight.ndim >= 2 and "pos_embed" not in name:
            torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5)


def qwen3_vl_config(text: TextSize, vision: VisionSize, processor: Processor) -> Qwen3VLConfig:
    """The transformers configuration of the given sizes over the processor's vocabulary."""
    values: dict[str, Any] = {
        "text_config": {
            **text.model_dump(),
            "vocab_size": math.ceil(processor.vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE,
            "max_position_embeddings": MAX_POSITIONS,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": ROPE_THETA,
                "mrope_section": mrope_section(text.head_dim),
                "mrope_interleaved": True,
            },
            "tie_word_embeddings": True,
            "pad_token_id": processor.pad_id,
            "eos_token_id": processor.eos_id,
        },
        "vision_config": {
            **vision.model_dump(),
            "deepstack_visual_indexes": list(vision.deepstack_visual_indexes),
            "out_hidden_size": text.hidden_size,
            "num_position_embeddings": POSITION_GRID**2,
            "temporal_patch_size": processor.image_processor.temporal_patch_size,
        },
        "image_token_id": processor.image_token_id,
        "video_token_id": processor.video_token_id,
        "vision_start_token_id": processor.vision_start_id,
        "vision_end_token_id": processor.vision_end_id,
        "tie_word_embeddings": True,
        "attn_implementation": "sdpa",
    }
    return Qwen3VLConfig(**values)


def mrope_section(head_dim: int) -> list[int]:
    """Rotary frequencies for time, height and width: Qwen3-VL's 24 : 20 : 20 scaled to head_dim // 2."""
    half = head_dim // 2
    side = half * 20 // 64
    return [half - 2 * side, side, side]


def _text_problems(text: TextSize) -> list[str]:
    problems = []
    if text.num_attention_heads % text.num_key_value_heads:
        problems.append(
            f"text.num_attention_heads {text.num_attention_heads} is not a multiple of "
            f"text.num_key_value_heads {text.num_key_value_heads}"
        )
    if text.head_dim % 2 or text.head_dim < 8:
        problems.append(f"text.head_dim {text.head_dim} must be even and at least 8 (three rotary sections)")
    return problems


def _vision_problems(vision: VisionSize, text: TextSize) -> list[str]:
    problems = []
    if vision.hidden_size % (4 * vision.num_heads):
        problems.append(
            f"vision.hidden_size {vision.hidden_size} is not a multiple of 4 x vision.num_heads "
            f"{vision.num_heads} (two rotary axes per head)"
        )
    if any(index >= vision.depth or index < 0 for index in vision.deepstack_visual_indexes):
        problems.append(
            f"vision.deepstack_visual_indexes {list(vision.deepstack_visual_indexes)} must lie in "
            f"[0, vision.depth {vision.depth})"
        )
    if len(vision.deepstack_visual_indexes) > text.num_hidden_layers:
        problems.append(
            f"{len(vision.deepstack_visual_indexes)} deepstack features enter the first decoder layers, "
            f"but text.num_hidden_layers is {text.num_hidden_layers}"
        )
    return problems


def _patch_problems(vision: VisionSize, processor: Processor) -> list[str]:
    pairs = {
        "patch_size": (vision.patch_size, processor.image_processor.patch_size),
        "spatial_merge_size": (vision.spatial_merge_size, processor.image_processor.merge_size),
    }
    return [
        f"vision.{name} {model} differs from {processor.origin}: {images}"
        for name, (model, images) in pairs.items()
        if model != images
    ]
