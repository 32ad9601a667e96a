"""The benchmark of MoE layers runs, its ways compute one function, and its counts are torch's."""

import json

import pytest
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextMLP

from pipeline.cluster.plan import measured_rate
from tests.helpers import ranks
from tools.bench import moe as bench_moe
from tools.bench import moe_cases


@pytest.mark.slow
def test_bench_moe_compares_every_way_with_the_dense_mlp(tmp_path):
    out, plot = tmp_path / "f.json", tmp_path / "f.png"
    words = ["--model", "tiny", "--tokens", "64", "--step-tokens", "64", "--rounds", "1", "--device", "cpu"]
    words += ["--cases", "dense", "autoep_grouped", "--checkpointing", "off", "on", "--dtype", "float32"]
    words += ["--json", str(out), "--plot", str(plot)]
    ranks.run(bench_moe.main, words, env={"TMPDIR": str(tmp_path)})
    figures = json.loads(out.read_text())
    rows = {(row["part"], row["case"]): row for row in figures["rows"]}
    assert len(rows) == 6 and plot.read_bytes().startswith(b"\x89PNG")
    for part in ("layer", "step", "step_checkpointing"):
        dense, autoep = rows[part, "dense"], rows[part, "autoep_grouped"]
        assert autoep["vs_dense"] == pytest.approx(autoep["ms"] / dense["ms"])
        assert autoep["peak_mib"] > 0 and 0 < autoep["matmul_share"] < 1
    assert figures["step_tflops"] == rows["step", "autoep_grouped"]["tflops"]
    assert measured_rate(out) == figures["step_tflops"]  # what plan_run reads


def test_all_ways_of_bench_moe_compute_the_same_layer():
    """From the same seed; native with dropped tokens is another function, and so is the dense baseline."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    generator = torch.Generator().manual_seed(0)
    # Tokens that are much alike crowd into few experts, beyond their capacity.
    x_1TD = torch.randn(1, 1, 64, generator=generator) + 0.3 * torch.randn(1, 48, 64, generator=generator)
    outputs = {}
    for name, case in moe_cases.CASES.items():
        engine = moe_cases.build(moe_cases.SIZES["tiny"], case, torch.device("cpu"), torch.float32)
        found = moe_cases.expert_layer(engine)(x_1TD)
        outputs[name] = (found[0] if isinstance(found, tuple) else found).detach()
    for name in outputs.keys() - {"dense", "native_drop"}:
        torch.testing.assert_close(outputs[name], outputs["eager"])
    assert outputs["eager"].abs().max() > 0 and outputs["dense"].shape == x_1TD.shape
    assert not torch.allclose(outputs["native_drop"], outputs["eager"])


def test_bench_moe_counts_the_operations_that_torch_counts():
    """Of a dense layer of the same active width."""
    size, tokens = moe_cases.SIZES["tiny"], 32
    mlp = Qwen3VLMoeTextMLP(moe_cases.config_of(size).text_config, intermediate_size=2 * 96)
    x_TD = torch.randn(tokens, 64, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        mlp(x_TD).sum().backward()
    assert bench_moe.operations("layer", tokens, "tiny") == counter.get_total_flops()
