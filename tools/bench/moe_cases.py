"""What `tools.bench.moe` compares: ways to compute the same Mixture-of-Experts student, and its sizes.

Another way is a line in `CASES`; another model a line in `SIZES`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextMLP

from pipeline.benchmark import random_models
from pipeline.models import experts, loading, moe
from pipeline.recipe import JobConfig
from pipeline.training import engine

SPECIAL_TOKENS = {"image_token_id": 1, "video_token_id": 2, "vision_start_token_id": 3, "vision_end_token_id": 4}
FIRST_WORD = 5
PATCH_VALUES = 3 * 2 * 16 * 16


@dataclass(frozen=True, slots=True)
class Case:
    """A way to compute the MoE layers. All start from the same weights, but for `dense`."""

    label: str
    experts: str | None = None
    """transformers' implementation of the experts; None where its layer is replaced."""
    deepspeed: Mapping[str, Any] = field(default_factory=dict)
    """What is added to the DeepSpeed JSON."""
    moe: Mapping[str, Any] = field(default_factory=dict)
    """The `moe` of the job."""
    dense: bool = False
    """An MLP in place of the experts, as wide as the experts that one token passes."""


def _expert_parallel(**settings: object) -> dict[str, Any]:
    return {"expert_parallel": {"enabled": True, "autoep_size": 1, **settings}}


def _native(**settings: object) -> dict[str, Any]:
    return {"layer": "native", "native": settings}


BASELINE = "dense"
TRAINING = "autoep_grouped"
"""What training runs: its rate is the one that `pipeline.cluster.plan --rate` reads."""
CASES: dict[str, Case] = {
    BASELINE: Case("dense MLP, equal active parameters", dense=True),
    "eager": Case("Hugging Face eager", experts="eager"),
    "grouped_mm": Case("Hugging Face grouped_mm", experts="grouped_mm"),
    "by_expert": Case("by_expert (ours)", experts=experts.NAME),
    "autoep_loop": Case("AutoEP, loop over experts", deepspeed=_expert_parallel(use_grouped_mm=False)),
    TRAINING: Case("AutoEP, grouped", deepspeed=_expert_parallel(use_grouped_mm=True)),
    "native": Case("native, no token dropped", deepspeed=_expert_parallel(), moe=_native()),
    "native_drop": Case("native, capacity 1.25", deepspeed=_expert_parallel(), moe=_native(drop_tokens=True)),
}


@dataclass(frozen=True, slots=True)
class Size:
    """A Qwen3-VL-MoE with random weights, and what a sequence of it holds."""

    text: Mapping[str, int]
    vision: Mapping[str, Any]
    length: int
    """Positions of a sequence at most; more tokens make more sequences."""
    side: int
    """Patches along a side of the image of a sequence."""

    @property
    def image_tokens(self) -> int:
        return (self.side // 2) ** 2

    def sequences(self, tokens: int) -> tuple[int, int]:
        """(sequences, positions of each) of about `tokens` positions."""
        length = min(self.length, tokens)
        return max(1, tokens // length), length

    def answers(self, tokens: int) -> int:
        """Answer tokens of a sequence: the last eighth."""
        return max(1, self.sequences(tokens)[1] // 8)


def _text(width: int, mlp: int, layers: int, heads: int, kv: int, head: int, words: int, count: int) -> dict[str, int]:
    return {
        "hidden_size": width,
        "intermediate_size": mlp,
        "moe_intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": head,
        "vocab_size": words,
        "num_experts": count,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 2,
    }


def _vision(width: int, mlp: int, depth: int, heads: int, out: int, deepstack: tuple[int, ...]) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": mlp,
        "depth": depth,
        "num_heads": heads,
        "out_hidden_size": out,
        "deepstack_visual_indexes": list(deepstack),
    }


SIZES: dict[str, Size] = {
    "tiny": Size(_text(64, 96, 2, 4, 2, 16, 500, 4), _vision(32, 64, 1, 2, 64, (0,)), length=32, side=4),
    "small": Size(_text(256, 512, 4, 4, 2, 64, 8192, 8), _vision(128, 256, 2, 4, 256, (0,)), length=256, side=8),
    "qwen3-vl-2b": Size(
        _text(2048, 6144, 28, 16, 8, 128, 151_936, 4),
        _vision(1024, 4096, 24, 16, 2048, (5, 11, 17)),
        length=2048,
        side=32,
    ),
}
"""`qwen3-vl-2b`: Qwen3-VL-2B's sizes, every second MLP four full-width experts, top-2."""


def config_of(size: Size, *, layers: int | None = None) -> Qwen3VLMoeConfig:
    """The model's configuration, with `layers` decoder layers only if given."""
    rope = {
        "rope_type": "default",
        "rope_theta": 5e6,
        "mrope_section": random_models.mrope_section(size.text["head_dim"]),
        "mrope_interleaved": True,
    }
    text = {**size.text, "max_position_embeddings": 65_536, "mlp_only_layers": [], "rope_parameters": rope}
    if layers is not None:
        text["num_hidden_layers"] = layers
    return Qwen3VLMoeConfig(
        text_config=text, vision_config=dict(size.vision), tie_word_embeddings=True, **SPECIAL_TOKENS
    )


def build(size: Size, case: Case, device: torch.device, dtype: torch.dtype, *, layers: int | None = None) -> Any:
    """A DeepSpeed engine of one rank around the case's model."""
    torch.manual_seed(0)
    config = config_of(size, layers=layers)
    with device:
        model = Qwen3VLMoeForConditionalGeneration._from_config(config, attn_implementation=loading.batch_attention())
        if case.dense:
            _make_dense(model, size.text)
    if case.experts is not None:
        model.set_experts_implementation(case.experts)
    loading._multiply_patches(model)
    job = JobConfig.model_validate(
        {"init": "/x", "steps": 1, "batch": {"global_size": 1}, "optimizer": {"lr": 1e-4}, "moe": case.moe}
    )
    # One rank sends nothing: no buckets, which by default are larger than small models.
    zero = {"stage": 1, "contiguous_gradients": False}
    raw = {"zero_optimization": zero, "bf16": {"enabled": dtype is torch.bfloat16}, "steps_per_print": 10**9}
    return engine.start(model.train(), job, {**raw, **case.deepspeed})


def _make_dense(model: Any, text: Mapping[str, int]) -> None:
    config = model.config.get_text_config()
    for path in moe.block_paths(model.config):
        mlp = Qwen3VLMoeTextMLP(config, intermediate_size=text["num_experts_per_tok"] * text["moe_intermediate_size"])
        for weight in mlp.parameters():
            nn.init.normal_(weight, std=0.02)
        model.set_submodule(path, mlp)


def expert_layer(started: Any) -> nn.Module:
    """The engine's first MoE layer, or what stands in its place: [1, T, D] -> [1, T, D]."""
    layer: nn.Module = started.module.get_submodule(moe.block_paths(started.module.config)[0])
    return layer


Batch = tuple[dict[str, Tensor], Tensor, Tensor]
"""(model inputs, positions W that reach the head, labels [N])"""


def batch(size: Size, tokens: int, device: torch.device, dtype: torch.dtype) -> Batch:
    """Random sequences: an image at the start, answers at the end."""
    count, length = size.sequences(tokens)
    generator = torch.Generator().manual_seed(tokens)
    ids_BS = torch.randint(FIRST_WORD, size.text["vocab_size"], (count, length), generator=generator)
    ids_BS[:, 0] = SPECIAL_TOKENS["vision_start_token_id"]
    ids_BS[:, 1 : 1 + size.image_tokens] = SPECIAL_TOKENS["image_token_id"]
    ids_BS[:, 1 + size.image_tokens] = SPECIAL_TOKENS["vision_end_token_id"]
    keep_W = torch.arange(length - 1 - size.answers(tokens), length - 1)
    inputs = {
        "input_ids": ids_BS,
        "attention_mask": torch.ones_like(ids_BS),
        "pixel_values": torch.randn(count * size.side**2, PATCH_VALUES, generator=generator).to(dtype),
        "image_grid_thw": torch.tensor([[1, size.side, size.side]] * count),
        "mm_token_type_ids": (ids_BS == SPECIAL_TOKENS["image_token_id"]).int(),
    }
    labels_N = ids_BS[:, keep_W + 1].flatten()
    return {name: tensor.to(device) for name, tensor in inputs.items()}, keep_W.to(device), labels_N.to(device)
