"""Training and generating with one MoE layer after another, on as many ranks as call it."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from pipeline.data.processor import Processor
from pipeline.evaluation import generate
from pipeline.method.fused_head import FusedHead
from pipeline.models import loading, router
from pipeline.models.generation import continuations
from pipeline.models.loading import load_model
from pipeline.training import checkpoint, engine_state, step
from pipeline.training.engine import start
from tests.helpers import tiny, tiny_data, uneven


def main(spec: dict[str, Any]) -> None:
    """On each rank: `runs` train tests/helpers/uneven.py's batches one after another, `generate` answers a corpus.

    Writes what rank 0 saw to the spec's `out` and the final parameters of each run to `out`.NAME.safetensors.
    """
    torch.set_num_threads(1)
    deepspeed.init_distributed()
    result: dict[str, Any] = {"runs": {}}
    for name, run in spec["runs"].items():
        records, parameters = _train(run)
        result["runs"][name] = records
        if dist.get_rank() == 0:
            save_file(parameters, f"{spec['out']}.{name}.safetensors")
    result["generated"] = {name: _generate(run) for name, run in spec.get("generate", {}).items()}
    result["answers"] = {name: _answers(run) for name, run in spec.get("answers", {}).items()}
    if dist.get_rank() == 0:
        Path(spec["out"]).write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def _start(model: Any, run: dict[str, Any]) -> tuple[Any, step.StepContext]:
    ds_json = {
        "zero_optimization": {"stage": run["stage"]},
        "expert_parallel": {"enabled": True, "autoep_size": run["ep"]},
        "steps_per_print": 10**9,
    }
    job = tiny.job(
        global_size=len(uneven.LENGTHS),
        micro_size=len(uneven.LENGTHS) // dist.get_world_size() // run.get("parts", 1),
        layer=run["layer"],
        native=run.get("native", {}),
        kind=run.get("optimizer", "sgd"),
        lr=run.get("lr", uneven.LR),
        weight_decay=0.0,
        grad_clip=uneven.CLIP,
        **uneven.ROUTER,
    )
    engine = start(model, job, ds_json)
    if run.get("deepspeeds_clipping"):
        del engine.clip_fp32_gradients
    context = step.StepContext(
        engine, FusedHead(engine.module), router.RouterProbe(engine.module), 2, None, job, 1, 0, 1
    )
    return engine, context


def _train(run: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """(what each step measured, final parameters)."""
    model = uneven.model(starved=run.get("starved", False)).train()
    engine, context = _start(model, run)
    if run.get("checkpointing"):
        loading.enable_activation_checkpointing(engine.module)
    first = 0
    if run.get("load"):
        loaded = checkpoint.load(engine, Path(run["load"]))
        assert loaded is not None
        first = loaded.step
    records = []
    for number in range(first, run["steps"]):
        records.append(asdict(_step(context, number, run.get("empty", ()))))
        if number + 1 == run.get("save_at"):
            checkpoint.save(engine, Path(run["save"]), number + 1, {}, {}, 1)
    return records, {name: tensor.clone() for name, tensor in engine_state.full_parameters(engine)}


def _step(context: step.StepContext, number: int, empty: Any) -> uneven.Record:
    rank, world, engine = dist.get_rank(), dist.get_world_size(), context.engine
    count, parts = uneven.tokens(number, empty), engine.gradient_accumulation_steps()
    stats, total = step.StepStats(), torch.zeros(2)
    mine = range(rank, len(uneven.LENGTHS), world)
    size = len(mine) // parts
    for part in range(parts):
        inputs, labels = uneven.batch(number, mine[part * size : (part + 1) * size], empty)
        loss = tiny.loss_sum(engine(**inputs).logits, labels) / count
        aux = step.router_loss(context, context.probe.take(), inputs["attention_mask"], stats)
        engine.backward((loss + aux) * context.gradient_scale)
        engine.step()
        total += torch.stack([loss.detach(), aux.detach()])
    dist.all_reduce(total)
    stats.reduce(total.device)
    loads = stats.router_load_LE
    assert loads is not None
    balance_L, z_L = ([stats.sums[f"{name}/{layer}"] for layer in range(len(loads))] for name in ("balance", "z"))
    norm = float(engine.get_global_grad_norm() or 0.0)
    return uneven.Record(total[0].item(), total[1].item(), norm, balance_L, z_L, loads.int().tolist())


def _generate(run: dict[str, Any]) -> dict[str, Any]:
    """Continuations of every rank's own prompt, by our loop and by transformers', and answers to a corpus."""
    engine, _ = _start(uneven.model(), run)
    engine.eval()
    inputs = uneven.prompt(dist.get_rank())
    ours = continuations(engine.module, inputs, uneven.NEW_TOKENS, uneven.STOPS, in_step=True)
    theirs = uneven.hugging_face(engine.module, inputs, synced_gpus=True)
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (ours[0], theirs))
    return {"ours": [pair[0] for pair in gathered], "theirs": [pair[1] for pair in gathered]}


def _answers(run: dict[str, Any]) -> dict[str, str]:
    folder = Path(run["folder"])
    processor = Processor.load(folder / "processor", tiny_data.data())
    engine, _ = _start(load_model(folder / "moe"), run)
    engine.eval()
    samples = uneven.questions(folder / "corpus.png", run["samples"])
    return generate.shared_answers(engine.module, processor, samples, batch_size=2, max_new_tokens=uneven.NEW_TOKENS)
