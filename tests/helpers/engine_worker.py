"""A tiny MoE model trained under DeepSpeed on several ranks."""

import json
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.models import loading, moe, router
from pipeline.training import checkpoint, engine_state, gradients
from pipeline.training.engine import start
from tests.helpers import ranks, tiny


def launch(folder: Path, count: int, **spec: object) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Train on `count` ranks as the spec says: (what rank 0 recorded, final parameters by Hugging Face's names)."""
    folder.mkdir(parents=True, exist_ok=True)
    ranks.run(main, spec | {"out": str(folder / "result")}, ranks=count)
    return json.loads((folder / "result.json").read_text()), load_file(folder / "result.safetensors")


def main(spec: dict[str, Any]) -> None:
    """On each rank: writes losses, gradient norms and the conversion count to `out`.json, parameters beside it."""
    torch.set_num_threads(1)
    deepspeed.init_distributed()
    rank, world = dist.get_rank(), dist.get_world_size()
    model = tiny.dense_model() if spec.get("dense") else tiny.moe_model()
    _freeze(model, spec.get("trainable", "all"))
    engine = _engine(model, spec)
    if spec.get("checkpointing"):
        loading.enable_activation_checkpointing(engine.module)
    converted = moe.expect_converted(engine, model.config)
    probe = router.RouterProbe(engine.module)
    first, history = 0, []
    if spec.get("load"):
        loaded = checkpoint.load(engine, Path(spec["load"]))
        assert loaded is not None
        assert loaded.state["note"] == "kept"
        assert loaded.arrays["a"].tolist() == [1.0, 2.0]
        first = loaded.step
    for step in range(first, spec["steps"]):
        history.append(_step(engine, probe, spec, step, rank, world))
        if step + 1 == spec.get("save_at"):
            import numpy as np

            checkpoint.save(engine, Path(spec["save"]), step + 1, {"note": "kept"}, {"a": np.array([1.0, 2.0])}, 2)
    parameters = dict(engine_state.full_parameters(engine))
    if rank == 0:
        result = {"history": history, "converted": converted, "optimizer": type(engine.optimizer).__name__}
        Path(spec["out"] + ".json").write_text(json.dumps(result))
        save_file({k: v.clone() for k, v in parameters.items()}, spec["out"] + ".safetensors")
    dist.barrier()
    dist.destroy_process_group()


def _engine(model: Any, spec: dict[str, Any]) -> Any:
    raw = json.loads(Path(spec["deepspeed"]).read_text()) if isinstance(spec["deepspeed"], str) else spec["deepspeed"]
    return start(model, tiny.job(**spec["job"]), raw)


def _freeze(model: Any, trainable: str) -> None:
    if trainable == "mlp_and_router":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("language_model" in name and ".mlp." in name)


def _step(engine: Any, probe: router.RouterProbe, spec: dict[str, Any], step: int, rank: int, world: int) -> list[Any]:
    """(global mean loss, gradient norm before clipping, per-layer expert counts) of one optimizer step."""
    count = tiny.global_tokens(step)
    gas = engine.gradient_accumulation_steps()
    mine = range(rank, len(tiny.LENGTHS), world)
    size = len(mine) // gas
    total, loads = torch.zeros(()), []
    for part in range(gas):
        inputs, labels = tiny.collate([tiny.sample(step, i) for i in list(mine)[part * size : (part + 1) * size]])
        inputs["pixel_values"] = inputs["pixel_values"].to(next(engine.module.parameters()).dtype)
        local = tiny.loss_sum(engine(**inputs).logits, labels)
        if len(probe):
            loads = [
                router.expert_counts(x, 2, inputs["attention_mask"].flatten().bool()).tolist() for x in probe.take()
            ]
        bad = spec.get("bad", {}).get(str(step))
        poison = float("nan") if bad == "gradient" and rank == 1 and part == 0 else 1.0
        engine.backward(local * world * gas / count * poison)
        if part + 1 < gas:
            engine.step()
        total += local.detach()
    norm = gradients.step(engine, drop=bad == "drop")
    dist.all_reduce(total)
    return [total.item() / count, norm, loads]
