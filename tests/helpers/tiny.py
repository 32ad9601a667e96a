"""Tiny Qwen3-VL models, uneven batches and a plain torch trainer that the parallel ones are compared with."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    PreTrainedModel,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from pipeline.recipe import JobConfig

TEXT: dict[str, Any] = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    },
}
VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 32,
    "deepstack_visual_indexes": [0],
    "num_position_embeddings": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
TOKENS = {
    "image_token_id": 110,
    "vision_start_token_id": 111,
    "vision_end_token_id": 112,
    "video_token_id": 113,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 2,
    "moe_intermediate_size": 48,
}
LENGTHS = (29, 7, 18, 12)
"""Tokens of the four samples of a global batch: uneven on purpose."""


def dense_model(seed: int = 0) -> Qwen3VLForConditionalGeneration:
    """Weights large enough that logits are not all alike."""
    torch.manual_seed(seed)
    config = Qwen3VLConfig(text_config=TEXT, vision_config=VISION, tie_word_embeddings=True, **TOKENS)
    model = Qwen3VLForConditionalGeneration(config).eval()
    for name, parameter in model.named_parameters():
        if ".mlp." in name and "weight" in name:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


def moe_model(seed: int = 0) -> Qwen3VLMoeForConditionalGeneration:
    """Weights large enough that routing differs between tokens and experts matter."""
    torch.manual_seed(seed)
    config = Qwen3VLMoeConfig(text_config=TEXT | EXPERTS, vision_config=VISION, tie_word_embeddings=True, **TOKENS)
    model = Qwen3VLMoeForConditionalGeneration(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("gate.weight") or ".experts." in name:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


def sample(step: int, index: int) -> dict[str, Tensor]:
    """One sample of a global batch: an image, then text; labels (unshifted) on a sample-dependent tail."""
    generator = torch.Generator().manual_seed(1000 * step + index)
    ids = torch.randint(0, 100, (LENGTHS[index],), generator=generator)
    ids[:3] = torch.tensor([111, 110, 112])
    labels = ids.clone()
    labels[: 4 + index] = -100
    pixels = torch.randn(4, 3 * 2 * 4 * 4, generator=generator)
    return {"input_ids": ids, "labels": labels, "pixel_values": pixels}


def collate(samples: list[dict[str, Tensor]]) -> tuple[dict[str, Tensor], Tensor]:
    """(model inputs, labels [B, S]) of right-padded samples."""
    ids, labels = (
        torch.nn.utils.rnn.pad_sequence([s[key] for s in samples], batch_first=True, padding_value=fill)
        for key, fill in (("input_ids", 0), ("labels", -100))
    )
    lengths = torch.tensor([len(s["input_ids"]) for s in samples])
    inputs = {
        "input_ids": ids,
        "attention_mask": (torch.arange(ids.shape[1])[None] < lengths[:, None]).long(),
        "pixel_values": torch.cat([s["pixel_values"] for s in samples]),
        "image_grid_thw": torch.tensor([[1, 2, 2]] * len(samples)),
        "mm_token_type_ids": (ids == TOKENS["image_token_id"]).int(),
    }
    return inputs, labels


def global_batch(step: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    """(model inputs, labels) of all samples of a step."""
    return collate([sample(step, i) for i in range(len(LENGTHS))])


def global_tokens(step: int) -> int:
    """Labels of a global batch that a shifted loss sees."""
    return sum(int((sample(step, i)["labels"][1:] != -100).sum()) for i in range(len(LENGTHS)))


def loss_sum(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    """Sum of next-token cross-entropies in nats."""
    logits_NV = logits_BSV[:, :-1].float().flatten(0, 1)
    return cross_entropy(logits_NV, labels_BS[:, 1:].flatten(), reduction="sum")


SECTIONS = ("optimizer", "batch", "moe", "performance", "checkpoint")
"""Of a job, whose keys tests write without them: each name is in one of them only."""


def job(**changes: object) -> JobConfig:
    """A job over the four samples, clipping active. `lr=1.0` stands for `optimizer={"lr": 1.0}`, and so on."""
    values: dict[str, object] = {
        "steps": 10,
        "trainable": "all",
        "global_size": 4,
        "micro_size": 2,
        "lr": 0.01,
        "weight_decay": 0.1,
        "grad_clip": 0.05,
    }
    return JobConfig.model_validate(sections({"init": "models.x", **values, **changes}))


def sections(values: dict[str, object]) -> dict[str, object]:
    """A job's settings as a recipe has them, from keys without their sections."""
    inner = {name: set(JobConfig.model_fields[name].annotation.model_fields) for name in SECTIONS}
    nested: dict[str, object] = {name: {} for name in SECTIONS}
    for key, value in values.items():
        place = next((name for name in SECTIONS if key in inner[name]), None)
        if place is None:
            nested[key] = value
        else:
            nested[place][key] = value
    return nested


def reference_run(
    model: PreTrainedModel,
    steps: int,
    lr: float,
    clip: float,
    optimizer: torch.optim.Optimizer | None = None,
    left_out: Collection[int] = (),
) -> list[tuple[float, float]]:
    """Plain torch on whole batches in one process: (mean loss, gradient norm before clipping) per step.

    `optimizer`: over the model's parameters; None: SGD with `lr`. `left_out`: steps that change nothing.
    """
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=lr)
    history = []
    for step in range(steps):
        inputs, labels = global_batch(step)
        loss = loss_sum(model(**inputs).logits, labels) / global_tokens(step)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        if step not in left_out:
            optimizer.step()
        history.append((loss.item(), norm.item()))
    return history
