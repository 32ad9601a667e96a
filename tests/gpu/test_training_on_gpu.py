"""Steps of a tiny MoE model under DeepSpeed on one GPU, against plain torch on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.gpu.train_worker import JOB, STEPS
from tests.helpers import tiny
from tests.helpers.paths import ROOT
from tests.helpers.ranks import free_port

ACCELERATOR = "cuda"


def trained(folder: Path, dtype: str) -> tuple[list[list[float]], dict[str, torch.Tensor]]:
    """([loss, gradient norm] of each step, final parameters); in a process of its own, where DeepSpeed sees the GPU."""
    launcher = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    environment = os.environ | launcher | {"MASTER_PORT": str(free_port()), "DS_ACCELERATOR": ACCELERATOR}
    command = [sys.executable, "-m", "tests.gpu.train_worker", str(folder / "out"), dtype]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "out.json").read_text()), load_file(folder / "out.safetensors")


@pytest.fixture(scope="module")
def reference() -> tuple[list[tuple[float, float]], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(loss and gradient norm of each step, parameters before, parameters after) of plain torch on the CPU."""
    model = tiny.moe_model().train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    history = tiny.reference_run(model, STEPS, lr=JOB["lr"], clip=JOB["grad_clip"])
    assert min(norm for _, norm in history) > 10 * JOB["grad_clip"]  # clipping acts
    return history, before, {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_float32_trains_as_on_the_cpu(tmp_path: Path, reference: Any) -> None:
    wanted, _, after = reference
    history, parameters = trained(tmp_path, "float32")
    assert [loss for loss, _ in history] == pytest.approx([loss for loss, _ in wanted], rel=1e-4)
    assert [norm for _, norm in history] == pytest.approx([norm for _, norm in wanted], rel=1e-3)
    for name, tensor in after.items():
        torch.testing.assert_close(parameters[name], tensor, rtol=0, atol=1e-4, msg=name)


def test_bfloat16_goes_the_same_way(tmp_path: Path, reference: Any) -> None:
    """Rounded inputs and weights: the losses within 2%, and the whole update in the direction of the exact one."""
    wanted, before, after = reference
    history, parameters = trained(tmp_path, "bfloat16")
    assert [loss for loss, _ in history] == pytest.approx([loss for loss, _ in wanted], rel=0.02)
    first = {name: tensor.bfloat16().float() for name, tensor in before.items()}
    ours = torch.cat([(parameters[name] - first[name]).flatten() for name in before])
    exact = torch.cat([(after[name] - before[name]).flatten() for name in before])
    assert float(torch.nn.functional.cosine_similarity(ours, exact, dim=0)) > 0.9
