"""A real DeepSpeed engine of one rank inside the test process."""

import os
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("LOCAL_RANK", "0")

import torch
import torch.distributed as dist

from pipeline.training.engine import start
from tests.helpers import tiny


def engine(model: Any, *, stage: int = 1, experts: bool = True, persistent: int | None = None, **job: object) -> Any:
    """`model` under DeepSpeed, with expert parallelism of size 1 unless `experts` is False.

    `persistent`: elements up to which ZeRO-3 leaves a parameter whole; by default all of a tiny model's.
    """
    raw: dict[str, Any] = {"zero_optimization": {"stage": stage}, "steps_per_print": 10**9}
    if persistent is not None:
        raw["zero_optimization"]["stage3_param_persistence_threshold"] = persistent
    if experts:
        raw["expert_parallel"] = {"enabled": True, "autoep_size": 1}
    return configured(model, raw, micro_size=4, **job)


def configured(model: Any, raw: dict[str, Any], **job: object) -> Any:
    """`model` under DeepSpeed with the JSON `raw`."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return start(model, tiny.job(**job), raw)


def train(engine: Any, first: int, last: int) -> list[float]:
    """Optimizer steps `first` to `last - 1` on whole global batches; the loss of each."""
    losses = []
    for step in range(first, last):
        inputs, labels = tiny.global_batch(step)
        loss = tiny.loss_sum(engine(**inputs).logits, labels) / tiny.global_tokens(step)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def parameters(engine: Any) -> dict[str, torch.Tensor]:
    """Whole fp32 parameters by Hugging Face name."""
    from pipeline.training.engine_state import full_parameters

    return {name: tensor.clone() for name, tensor in full_parameters(engine)}
