"""What an optimizer step does with gradients: clip them by their global norm, or drop a step that is not finite.

DeepSpeed (0.19.8 and before) clips wrongly under ZeRO-0 with expert parallelism (DeepSpeed#8475): every rank takes the
norm of the gradients that it holds, its own experts' among them, and the ranks' norms are then averaged. The global
norm is another number: the root of the sum of the shared parameters' squares and *all* experts' squares. `prepare`
replaces DeepSpeed's clipping by one with this norm; ZeRO 1 to 3 compute it themselves.

A dropped step changes no weight, no moment and no step count of the optimizer. DeepSpeed has such a branch for
gradients that overflow, and takes it in fp16 alone, or by settings. `prepare` opens it in fp32 and bf16 for every ZeRO
stage. Whether a step is dropped must be the same on all ranks: a loss is summed over them first, and the global norm is
one number by nature. So nothing is read or sent for it that a step does not need anyway.
"""

import math
from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.moe.utils import is_moe_param
from deepspeed.utils import groups
from torch import Tensor


def prepare(engine: Any) -> None:
    """Let an engine clip by the global norm, and drop steps: those that `drop` names, and those without a finite norm.

    To be called once, on a new engine.
    """
    engine.drops_step = False
    optimizer = engine.optimizer
    # Attributes that a stage lacks tell the stages apart, as in engine_state.
    if hasattr(optimizer, "check_grad_overflow"):
        _stage_1_and_2(engine, optimizer)
    elif hasattr(optimizer, "_overflow_check_and_loss_scale_update"):
        _stage_3(engine, optimizer)
    elif hasattr(optimizer, "clear_hp_grads"):
        _stage_0_bf16(engine, optimizer)
    else:
        _stage_0(engine, optimizer)


def step(engine: Any, *, drop: bool = False) -> float:
    """The engine's optimizer step. Collective.

    Args:
        drop: change nothing, whatever the gradients are. The same on every rank.

    Returns:
        The gradients' global norm before clipping. Not finite: the step was dropped, and so it is if `drop`.
    """
    engine.drops_step = drop
    engine.step()
    engine.drops_step = False
    norm = engine.get_global_grad_norm()
    if engine.optimizer.overflow:
        return math.inf
    return float(norm) if norm is not None else 0.0


# -- DeepSpeed's internals (0.19.8), by stage --------------------------------------------------------------------------


def _stage_1_and_2(engine: Any, optimizer: Any) -> None:
    def check_overflow(partition_gradients: bool = True) -> None:
        # The norm finds what is not finite; gradients are searched for it only where the JSON switched the norm off.
        unseen = not optimizer.compute_grad_norm and bool(optimizer.has_overflow(partition_gradients))
        optimizer.overflow = engine.drops_step or unseen

    optimizer.check_grad_overflow = True  # in bf16 the norm is looked at only with this
    optimizer.check_overflow = check_overflow


def _stage_3(engine: Any, optimizer: Any) -> None:
    def check(update_scale: bool = True) -> bool:
        optimizer.overflow = engine.drops_step
        return bool(engine.drops_step)

    # `step` looks at the norm after this, and then cleans up for both reasons.
    optimizer._overflow_check_and_loss_scale_update = check


def _stage_0_bf16(engine: Any, optimizer: Any) -> None:
    theirs = optimizer.step

    def step(closure: None = None) -> None:
        if not engine.drops_step:
            theirs(closure)  # looks at the norm itself
            return
        optimizer.overflow, optimizer._global_grad_norm = True, math.inf
        optimizer.clear_hp_grads()
        optimizer.clear_lp_grads()

    optimizer.step = step


def _stage_0(engine: Any, optimizer: Any) -> None:
    theirs = optimizer.step

    def step(closure: None = None) -> None:
        if engine.gradient_clipping() == 0:
            engine._global_grad_norm = float(global_norm(_with_gradients(engine)))
        norm = engine.get_global_grad_norm()
        optimizer.overflow = engine.drops_step or (norm is not None and not math.isfinite(norm))
        if optimizer.overflow:
            engine.zero_grad()
        else:
            theirs(closure)

    optimizer.overflow = False
    optimizer.step = step
    # The engine calls this before the optimizer's step if clipping is on.
    engine.clip_fp32_gradients = lambda: clip_gradients(engine)


# -- the norm ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def clip_gradients(engine: Any) -> None:
    """Scale all gradients so that their global norm is at most the engine's limit. Collective.

    `engine.get_global_grad_norm()` then gives the norm before clipping.
    """
    parameters = _with_gradients(engine)
    norm = global_norm(parameters)
    scale = (engine.gradient_clipping() / (norm + 1e-6)).clamp(max=1.0)
    for parameter in parameters:
        parameter.grad.mul_(scale)
    engine._global_grad_norm = float(norm)


def _with_gradients(engine: Any) -> list[Any]:
    return [p for p in engine.module.parameters() if p.grad is not None]


@torch.no_grad()
def global_norm(parameters: list[Any]) -> Tensor:
    """2-norm of reduced gradients as one vector: shared ones count once, experts on whichever rank they are.

    Args:
        parameters: with gradients; in one order on every rank.
    """
    squares: dict[str, list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        squares[parameter.group_name if is_moe_param(parameter) else ""].append(parameter.grad.float().square().sum())
    sums = {name: torch.stack(terms).sum() for name, terms in sorted(squares.items())}
    for name, total in sums.items():
        if name:
            dist.all_reduce(total, group=groups._get_expert_parallel_group(name))
    return torch.stack(list(sums.values())).sum().sqrt()
