"""Trains a tiny MoE model on one rank under DeepSpeed, on the accelerator that DS_ACCELERATOR names.

    python -m tests.gpu.train_worker OUT float32|bfloat16

Writes OUT.json ([loss, gradient norm] of each step) and OUT.safetensors, the final parameters.
"""

import json
import sys

import torch
from deepspeed.accelerator import get_accelerator
from safetensors.torch import save_file

from pipeline.models import moe
from pipeline.training import engine_state
from pipeline.training.engine import start
from pipeline.training.process import start_distributed
from tests.helpers import tiny

STEPS = 3
JOB = {"micro_batch_size": 4, "optimizer": "sgd", "lr": 0.5, "weight_decay": 0.0, "grad_clip": 0.05}


def main(out: str, dtype: str) -> None:
    """Three steps on whole global batches."""
    torch.set_float32_matmul_precision("highest")
    start_distributed()
    device = torch.device(get_accelerator().current_device_name())
    raw = {"zero_optimization": {"stage": 1}, "expert_parallel": {"enabled": True, "autoep_size": 1}}
    if dtype == "bfloat16":
        raw["bf16"] = {"enabled": True}
        raw["data_types"] = {"grad_accum_dtype": "fp32"}
    engine = start(tiny.moe_model().train(), tiny.job(**JOB), raw)
    assert moe.expect_converted(engine, engine.module.config) == 2
    history = []
    for step in range(STEPS):
        inputs, labels = tiny.global_batch(step)
        inputs["pixel_values"] = inputs["pixel_values"].to(getattr(torch, dtype))
        logits = engine(**{name: tensor.to(device) for name, tensor in inputs.items()}).logits
        loss = tiny.loss_sum(logits, labels.to(device)) / tiny.global_tokens(step)
        engine.backward(loss)
        engine.step()
        history.append([loss.item(), float(engine.get_global_grad_norm())])
    parameters = {name: tensor.cpu().clone() for name, tensor in engine_state.full_parameters(engine)}
    save_file(parameters, f"{out}.safetensors")
    with open(f"{out}.json", "w") as file:
        json.dump(history, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
