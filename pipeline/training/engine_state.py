"""A DeepSpeed engine's parameters and optimizer moments as whole tensors under their Hugging Face names.

ZeRO cuts every tensor over the ranks, and DeepSpeed's MoE layers rename and split experts. This module undoes both when
it reads and does both again when it writes. So what is stored depends neither on the number of ranks, nor on the ZeRO
stage, nor on the kind of MoE layer. Everything that touches DeepSpeed's internals is in the last section: its public
`safe_*` functions can neither create optimizer state before the first step, nor set ZeRO-3 partitions that do not
divide evenly, nor copy the fp32 masters into the model's weights.

Works for ZeRO stages 0 to 3, fp32 or bf16 weights, frozen parameters, torch's AdamW and SGD without momentum.
Optimizer state offloaded to NVMe is not supported.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.models.moe import converted_layers
from pipeline.models.native_moe import NativeMoe

MOMENTS: dict[str, tuple[str, ...]] = {"AdamW": ("exp_avg", "exp_avg_sq"), "SGD": ()}
"""Tensors that each optimizer keeps per parameter, besides the parameter itself."""


# -- names: one Hugging Face tensor, and the parameters that hold it ---------------------------------------------------


@dataclass(frozen=True, slots=True)
class Slot:
    """One Hugging Face tensor and the live parameters that hold it.

    `parts` are joined along dim 1 (AutoEP: gate and up projection in `gate_up_proj`) or stacked along a new dim 0
    (DeepSpeed's own layer: one matrix per expert); `layer`, if any, is the expert-parallel layer whose ranks hold
    consecutive experts along dim 0.
    """

    name: str
    parts: tuple[nn.Parameter, ...]
    layer: Any = None
    stacked: bool = False

    @property
    def trainable(self) -> bool:
        """Whether an optimizer updates this tensor."""
        return self.parts[0].requires_grad

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        if self.stacked:
            return (self.layer.num_experts, *self.parts[0].shape)
        first, *rest = _whole_shape(self.parts[0])
        if self.layer is not None:
            first = self.layer.num_experts
        return (first, rest[0] * len(self.parts), *rest[1:]) if rest else (first,)


def slots(engine: Any) -> list[Slot]:
    """Every parameter of the engine's model under its Hugging Face name, tied ones once."""
    layers = converted_layers(engine.module)
    found: list[Slot] = []
    for name, parameter in engine.module.named_parameters():
        layer_name = next((prefix for prefix in layers if name.startswith(prefix + ".")), None)
        if layer_name is None:
            found.append(Slot(name, (parameter,)))
        else:
            layer, inner = layers[layer_name], name.removeprefix(layer_name + ".")
            kind = _native_slot if isinstance(layer, NativeMoe) else _autoep_slot
            found += kind(layer_name, layer, inner, parameter)
    return found


_RENAMED = {"router.gate.": "gate.", "shared_experts.": "shared_expert.", "shared_experts_gate.": "shared_expert_gate."}
"""AutoEP's names of a layer's other parts, and Hugging Face's."""


def _native_slot(prefix: str, layer: NativeMoe, inner: str, parameter: nn.Parameter) -> list[Slot]:
    """DeepSpeed's `gate.wg` and its list of experts as Hugging Face names and packs them.

    The residual MLP and its coefficient have no Hugging Face name; they get `residual.` in theirs.
    """
    inner = inner.replace("moe.deepspeed_moe.gate.wg.", "gate.", 1)
    inner = inner.replace("moe.mlp.", "residual.mlp.", 1).replace("moe.coefficient.", "residual.coefficient.", 1)
    expert = re.fullmatch(r"moe\.deepspeed_moe\.experts\.deepspeed_experts\.(\d+)\.(\w+)\.weight", inner)
    if expert is None:
        return [Slot(f"{prefix}.{inner}", (parameter,))]
    if expert[1] != "0":  # the first expert's slot holds all of them
        return []
    return [Slot(f"{prefix}.experts.{expert[2]}", layer.expert_weights(expert[2]), layer, stacked=True)]


def _autoep_slot(prefix: str, layer: Any, inner: str, parameter: nn.Parameter) -> list[Slot]:
    """AutoEP's `router.gate`, `experts.w1` (gate), `.w2` (down), `.w3` (up) as Hugging Face names them."""
    if inner == "experts.w1":
        return [Slot(f"{prefix}.experts.gate_up_proj", (parameter, layer.experts.w3), layer)]
    if inner == "experts.w2":
        return [Slot(f"{prefix}.experts.down_proj", (parameter,), layer)]
    if inner == "experts.w3":  # is in w1's slot
        return []
    for theirs, name in _RENAMED.items():
        if inner.startswith(theirs):
            inner = name + inner.removeprefix(theirs)
    return [Slot(f"{prefix}.{inner}", (parameter,))]


# -- whole tensors, out and in -----------------------------------------------------------------------------------------
# Reading joins ZeRO's partitions to this rank's own tensor, and then the experts of all ranks of a layer to one tensor.
# Writing cuts in the opposite order.


@torch.no_grad()
def read(engine: Any, slot: Slot, moment: str | None = None) -> Tensor:
    """The whole tensor in fp32 on the CPU, or one of its optimizer moments. Collective."""
    parts = [_read_local(engine, part, moment) for part in slot.parts]
    local = _join(slot, parts)
    if slot.layer is None or slot.layer.ep_size == 1:
        return local.detach().cpu()
    gathered = [torch.empty_like(local) for _ in range(slot.layer.ep_size)]
    dist.all_gather(gathered, local.contiguous(), group=slot.layer.ep_group)
    return torch.cat(gathered).cpu()


@torch.no_grad()
def write(engine: Any, slot: Slot, whole: Tensor, moment: str | None = None) -> None:
    """Put a whole tensor back where `read` found it. Call `publish` after the last one."""
    if slot.layer is not None:  # every rank reads the whole tensor from disk and keeps its own experts
        experts = slot.layer.num_local_experts
        whole = whole.narrow(0, slot.layer.ep_rank * experts, experts)
    for part, piece in zip(slot.parts, _split(slot, whole), strict=True):
        _write_local(engine, part, piece.contiguous(), moment)


def _join(slot: Slot, parts: list[Tensor]) -> Tensor:
    if slot.stacked:
        return torch.stack(parts)
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


def _split(slot: Slot, whole: Tensor) -> tuple[Tensor, ...]:
    if slot.stacked:
        return whole.unbind()
    return whole.chunk(len(slot.parts), dim=1) if len(slot.parts) > 1 else (whole,)


def full_parameters(engine: Any) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, whole fp32 tensor) of every parameter. Collective: all ranks iterate to the end."""
    for slot in slots(engine):
        yield slot.name, read(engine, slot)


def optimizer_kind(engine: Any) -> str:
    """Class name of the optimizer underneath ZeRO: a key of MOMENTS."""
    return type(_base_optimizer(engine)).__name__


def optimizer_steps(engine: Any) -> float:
    """Updates that the optimizer's moments have seen; 0 before the first step or without moments."""
    steps = {float(state["step"]) for state in _base_optimizer(engine).state.values() if "step" in state}
    assert len(steps) <= 1, f"parameters with different optimizer step counts {sorted(steps)}"
    return steps.pop() if steps else 0.0


# -- DeepSpeed's internals (0.19.8) ------------------------------------------------------------------------------------
# The optimizer's state is keyed by what it updates: the parameters themselves in stage 0, this rank's flat fp32
# partitions in stages 1 to 3. Attributes that a stage lacks tell the stages apart.


def create_moments(engine: Any, steps: float) -> None:
    """Create the optimizer state that its first step would create: zero moments, step count `steps`."""
    base = _base_optimizer(engine)
    keys = MOMENTS[type(base).__name__]
    if not keys:
        return
    for parameter in _optimized_tensors(engine):
        # Every entry owns its step tensor: a shared one would count once per parameter.
        base.state[parameter] = {"step": torch.tensor(steps, dtype=torch.float32)} | {
            key: torch.zeros_like(parameter, memory_format=torch.preserve_format) for key in keys
        }
    link_moments(engine)


def link_moments(engine: Any) -> None:
    """Let DeepSpeed's `safe_*` functions find the moments. Call before reading or writing them, as often as you like.

    DeepSpeed links all parameter groups once, right after the first group's first step. The later groups, which are the
    experts', have no state at that moment, so theirs would never be found.
    """
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def publish(engine: Any) -> None:
    """Copy the fp32 masters into the weights that forward uses, on all ranks."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "update_lp_params"):  # stages 1 and 2
        optimizer.update_lp_params()
    elif hasattr(optimizer, "fp16_groups"):  # stage 3; the name is the same for bf16 and fp32 weights
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        # Small parameters stay gathered between steps: refresh those copies as a step would.
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)


def _base_optimizer(engine: Any) -> torch.optim.Optimizer:
    """torch's optimizer underneath ZeRO's."""
    optimizer = engine.optimizer
    base = optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer.optimizer
    assert isinstance(base, torch.optim.Optimizer)
    return base


def _optimized_tensors(engine: Any) -> list[Tensor]:
    """Keys of the optimizer's state: this rank's flat fp32 partitions, or the parameters in stage 0."""
    for attribute in (
        "single_partition_of_fp32_groups",
        "fp32_partitioned_groups_flat",
        "fp32_groups_flat_partition",
    ):
        partitions = getattr(engine.optimizer, attribute, None)
        if partitions is not None:
            return list(partitions)
    return [p for group in _base_optimizer(engine).param_groups for p in group["params"]]


def _whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Shape before ZeRO-3 cut the parameter."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _read_local(engine: Any, parameter: nn.Parameter, moment: str | None) -> Tensor:
    """This rank's experts, or the whole tensor, gathered over ZeRO's partitions."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    # Stages 1 to 3 keep an fp32 master of what is trained. Stage 0, and frozen parameters, have the weight alone.
    if parameter.requires_grad and (hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")):
        whole = (
            safe_get_full_fp32_param(parameter) if moment is None else safe_get_full_optimizer_state(parameter, moment)
        )
        return torch.as_tensor(whole).reshape(_whole_shape(parameter))
    if moment is not None:  # stage 0
        return torch.as_tensor(_base_optimizer(engine).state[parameter][moment])
    if hasattr(parameter, "ds_id"):  # frozen under stage 3: partitioned, and without a master
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().float().clone()
    return parameter.detach().float()


def _write_local(engine: Any, parameter: nn.Parameter, whole: Tensor, moment: str | None) -> None:
    """Inverse of `_read_local`: the master if there is one, else the weight, or one of the moments."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    if hasattr(parameter, "ds_id"):
        _write_partition(engine, parameter, whole, moment)
    elif parameter.requires_grad and hasattr(parameter, "_hp_mapping"):
        whole = whole.to(parameter.device)
        if moment is None:
            safe_set_full_fp32_param(parameter, whole)
        else:
            safe_set_full_optimizer_state(parameter, whole, moment)
    elif moment is not None:
        _base_optimizer(engine).state[parameter][moment].copy_(whole)
    else:
        parameter.data.copy_(whole)


def _write_partition(engine: Any, parameter: Any, whole: Tensor, moment: str | None) -> None:
    """ZeRO-3: this rank's padded share. `safe_set_full_*` refuses tensors that the ranks do not divide."""
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    # The last rank's share is padded to the size of the others.
    size, rank = parameter.ds_tensor.numel(), dist.get_rank(group=parameter.ds_process_group)
    flat = whole.flatten()[rank * size : (rank + 1) * size]
    share = torch.nn.functional.pad(flat, (0, size - flat.numel())).to(parameter.ds_tensor.device)
    if not parameter.requires_grad:
        parameter.ds_tensor.data.copy_(share)
        if parameter.data.numel() == whole.numel():  # kept gathered
            parameter.data.copy_(whole)
    elif moment is None:
        safe_set_local_fp32_param(parameter, share)
    else:
        safe_set_local_optimizer_state(parameter, share, moment)
