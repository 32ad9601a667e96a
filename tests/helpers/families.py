"""Tiny dense models of every family, and what they read."""

from typing import Any

import torch
from torch import Tensor
from transformers import InternVLConfig, LlavaOnevisionConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from tests.helpers import tiny

TEXT = {key: value for key, value in tiny.TEXT.items() if key not in ("rope_parameters", "head_dim")}
WIDE = {"intermediate_size": 96}
"""Half of what a shared expert of half the MLP leaves is still a multiple of 8."""
TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}


def text_config(kind: str) -> PreTrainedConfig:
    return Qwen3Config(**TEXT, head_dim=8) if kind == "qwen3" else Qwen2Config(**(TEXT | WIDE))


def dense_config(family: tuple[str, str]) -> PreTrainedConfig:
    model, text = family
    if model == "qwen3_vl":
        return tiny.dense_model().config
    if model == "internvl":
        tower = TOWER | {"image_size": [16, 16], "patch_size": [4, 4]}
        return InternVLConfig(vision_config=tower, text_config=text_config(text).to_dict(), image_token_id=110)
    if model == "llava_onevision":
        return LlavaOnevisionConfig(
            vision_config=TOWER | {"model_type": "siglip_vision_model", "image_size": 16, "patch_size": 4},
            text_config=text_config(text).to_dict(),
            image_token_index=110,
            video_token_index=113,
            image_grid_pinpoints=[[16, 16]],
            vision_feature_layer=-1,
        )
    return text_config(text)


def inputs(config: PreTrainedConfig) -> dict[str, Tensor]:
    """Two sequences with an image each, where the family reads images."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(0, 100, (2, 40), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if config.model_type in ("qwen3_vl", "qwen3_vl_moe"):
        return tiny.global_batch()[0]
    if config.model_type == "internvl":  # 4 x 4 patches, downsampled by 2 each way
        ids[:, 1:5] = 110
        return batch | {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    if config.model_type == "llava_onevision":  # one base view and one tile of 4 x 4 patches, and its row ends
        ids[:, 1:37] = 110
        pixels = torch.randn(2, 2, 3, 16, 16, generator=generator)
        return batch | {"pixel_values": pixels, "image_sizes": torch.tensor([[16, 16]] * 2)}
    return batch
