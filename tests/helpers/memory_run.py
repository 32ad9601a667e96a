"""What a real training step allocates on one rank, by part.

Live tensors are counted by storage, each once: weights are the module's parameters (under ZeRO-3 their partitions),
gradients what backward left for the optimizer, optimizer the master weights and moments. Activations are the storages
that autograd saves in the forward, parameters left out. The peak is that of the allocator, from torch's profiler.
"""

import contextlib
import gc
import json
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

from pipeline.method.fused_head import FusedHead, fused_distillation_loss
from pipeline.models import loading
from pipeline.models.loading import freeze
from pipeline.training.engine import start
from tests.helpers import tiny

Storages = dict[int, int]
MASTERS = (
    "single_partition_of_fp32_groups",  # ZeRO-1 and 2
    "fp32_groups_flat_partition",  # ZeRO-1 that accumulates gradients in float32
    "fp32_partitioned_groups_flat",  # ZeRO-3
    "fp32_groups",  # ZeRO-0
)


def storages(tensors: Iterable[Any]) -> Storages:
    """Bytes of every storage behind the tensors, by address; nested lists are walked, other things left out."""
    found: Storages = {}
    for item in tensors:
        if isinstance(item, Tensor):
            if item.device.type != "meta" and item.untyped_storage().nbytes():
                found[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif isinstance(item, list | tuple):
            found |= storages(item)
        elif isinstance(item, dict):
            found |= storages(item.values())
    return found


def weights(engine: Any) -> Storages:
    """The module's parameters: whole, or this rank's partitions under ZeRO-3."""
    parameters = list(engine.module.parameters())
    return storages(parameters) | storages(getattr(p, "ds_tensor", None) for p in parameters)


def optimizer(engine: Any) -> Storages:
    """Master weights and moments."""
    zero = engine.optimizer
    masters = [getattr(zero, name, None) for name in MASTERS]
    inner = getattr(zero, "optimizer", zero)
    return storages([masters, [list(state.values()) for state in inner.state.values()]])


def gradients(engine: Any) -> Storages:
    """What backward left."""
    zero = engine.optimizer
    held = [getattr(zero, "grad_partitions_flat_buffer", None), getattr(zero, "averaged_gradients", None)]
    held += [getattr(zero, "all_grad_tensors", None), getattr(zero, "fp32_groups_gradients_flat", None)]
    return storages([p.grad for p in engine.module.parameters()]) | storages(held)


def buckets(engine: Any) -> Storages:
    """Gradient buckets."""
    return storages(getattr(b, "buffer", None) for b in getattr(engine.optimizer, "ipg_buckets", {}).values())


def build(spec: dict[str, Any]) -> Qwen3VLMoeForConditionalGeneration:
    """A Qwen3-VL-MoE of the spec's `text` and `vision` sizes."""
    torch.manual_seed(0)
    config = Qwen3VLMoeConfig(
        text_config=tiny.TEXT | tiny.EXPERTS | spec["text"],
        vision_config=tiny.VISION | spec["vision"],
        tie_word_embeddings=True,
        **tiny.TOKENS,
    )
    model = Qwen3VLMoeForConditionalGeneration._from_config(config, attn_implementation=spec["attention"])
    loading._multiply_patches(model)
    return model.train()


def batch(spec: dict[str, Any], step: int) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
    """(model inputs, positions kept for the head [W], rows of answers [B, W], labels [N])."""
    load: dict[str, Any] = spec["load"]
    generator = torch.Generator().manual_seed(step)
    shape = (load["sequences"], load["length"])
    ids = torch.randint(0, 100, shape, generator=generator)
    side = load["side"]
    words = (side // 2) ** 2
    ids[:, 0], ids[:, 1 : 1 + words], ids[:, 1 + words] = 111, 110, 112
    keep = torch.arange(shape[1] - 1 - load["answers"], shape[1] - 1)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones(shape, dtype=torch.long),
        "pixel_values": torch.randn(shape[0] * side * side, 3 * 2 * 4 * 4, generator=generator),
        "image_grid_thw": torch.tensor([[1, side, side]] * shape[0]),
        "mm_token_type_ids": (ids == 110).int(),
    }
    return inputs, keep, torch.ones(shape[0], load["answers"], dtype=torch.bool), ids[:, keep + 1].flatten()


class Measured:
    """Largest bytes of each part, over the moments at which `look` was called."""

    def __init__(self, engine: Any, older: Storages) -> None:
        """`older`: storages that were there before the run."""
        self.engine, self.parts = engine, dict.fromkeys(("weights", "gradients", "optimizer", "rest"), 0)
        self.older, self.resident = older, 0

    def look(self) -> None:
        weight, bucket = weights(self.engine), buckets(self.engine)
        state, grads = without(optimizer(self.engine), weight), without(gradients(self.engine), weight | bucket)
        known = weight | bucket | state | grads
        rest = without(living(), known | self.older)
        found = {"weights": weight, "gradients": grads, "optimizer": state, "rest": rest}
        self.parts = {name: max(self.parts[name], sum(found[name].values())) for name in found}
        self.resident = sum(known.values()) + sum(rest.values())


def living() -> Storages:
    """Every tensor that Python's collector knows."""
    gc.collect()
    return storages(o for o in gc.get_objects() if issubclass(type(o), Tensor))


def without(found: Storages, known: Storages) -> Storages:
    """Storages that are not among the known ones."""
    return {address: size for address, size in found.items() if address not in known}


def run(spec: dict[str, Any]) -> dict[str, float]:
    """Two optimizer steps, the second one measured: bytes by part, and the allocator's peak over the whole step."""
    older = living()
    model = build(spec)
    if spec.get("checkpointing"):
        loading.enable_activation_checkpointing(model)
    freeze(model, spec["job"]["trainable"])
    engine = start(model, tiny.job(**spec["job"]), spec["deepspeed"])
    head = FusedHead(engine.module)
    measured = Measured(engine, older)
    with counted_all_to_all() as sent:
        optimize(engine, head, spec, 0, None, {})
    saved: Storages = {}
    optimize(engine, head, spec, 1, measured, saved)
    measured.look()
    before = measured.resident
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        optimize(engine, head, spec, 2, None, {})
    return measured.parts | {
        "activations": sum(saved.values()),
        "peak": before + peak(profiler),
        "all_to_all": sum(sent),
    }


@contextlib.contextmanager
def counted_all_to_all() -> Iterator[list[int]]:
    """Bytes that this rank puts into every exchange of hidden states, those for itself included."""
    sent: list[int] = []
    exchange = deepspeed.comm.all_to_all_single

    def count(output: Tensor, tensor: Tensor, *rest: Any, **more: Any) -> Any:
        if tensor.is_floating_point():
            sent.append(tensor.numel() * tensor.element_size())
        return exchange(output, tensor, *rest, **more)

    deepspeed.comm.all_to_all_single = count
    try:
        yield sent
    finally:
        deepspeed.comm.all_to_all_single = exchange


def optimize(
    engine: Any, head: FusedHead, spec: dict[str, Any], step: int, measured: Measured | None, saved: Storages
) -> None:
    """One optimizer step, looked at after every backward; `saved` receives the storages that the forward keeps."""
    for part in range(engine.gradient_accumulation_steps()):
        inputs, keep, rows_BW, labels_N = batch(spec, 10 * step + part)
        inputs["pixel_values"] = inputs["pixel_values"].to(next(engine.module.parameters()).dtype)
        forward = partial(engine, **inputs, logits_to_keep=keep, use_cache=False)
        loss = partial(fused_distillation_loss, labels_N=labels_N, targets=None, alpha_N=torch.zeros(len(labels_N)))
        if measured is None:
            loss_sum = head.loss(forward, rows_BW, loss).loss_sum
        else:
            loss_sum, kept = keeping(engine, partial(head.loss, forward, rows_BW, loss))
            if len(kept) and sum(kept.values()) > sum(saved.values()):
                saved.clear()
                saved.update(kept)
        engine.backward(loss_sum / len(labels_N))
        del loss_sum, inputs, forward
        if measured is not None:
            measured.look()
        engine.step()


def keeping(engine: Any, forward: Any) -> tuple[Tensor, Storages]:
    """(loss, the storages that autograd keeps for its backward, parameters left out)."""
    held: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        if not storages([tensor]).keys() & storages(engine.module.parameters()).keys():  # ZeRO-3's are whole just now
            held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = forward().loss_sum
    return loss, storages(held)


def peak(profiler: Any) -> int:
    """Largest sum of allocations minus frees since the profile began, in bytes."""
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        most = max(most, total)
    return most


def main(runs: list[dict[str, Any]], out: Path) -> None:
    """On each rank: writes the largest figures of any rank, run by run."""
    torch.set_num_threads(1)
    deepspeed.init_distributed()
    results = []
    for spec in runs:
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, run(spec))
        results.append({part: max(rank[part] for rank in everyone) for part in everyone[0]})
    if dist.get_rank() == 0:
        out.write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()
