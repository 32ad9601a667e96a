"""Bytes of a training job's state on one rank: weights, gradients, optimizer, communication buffers. Arithmetic only.

Follows what DeepSpeed 0.19 allocates for each ZeRO stage [published: ZeRO, arXiv:1910.02054; its partitions and
buffers as found in DeepSpeed's code, and measured by the tests]. Experts are split first, over the E ranks of an
expert-parallel group. Each rank's experts are then held by D / E of the D ranks, and ZeRO can partition them over those
alone. Below, P is a parameter's elements on a rank before ZeRO, R the ranks that hold it (D; of experts D / E), b the
bytes of a weight (bf16 2, float32 4), m the moments of the optimizer (AdamW 2, SGD 0).

| stage | weights | gradients at their largest | master weights and moments |
|---|---|---|---|
| 0, float32 | b P | b P | 4 m P |
| 0, bf16 | b P | b P | 4 (1 + m) P |
| 1 | b P | b P with accumulation, else as stage 2 | 4 (1 + m) P / R |
| 2 | b P | b P / R, parameters at a partition's borders whole | 4 (1 + m) P / R |
| 3 | b P / R, small ones also whole | b P / R | 4 (1 + m) P / R |

With bf16 weights and `data_types.grad_accum_dtype: fp32` gradients are (4 + b) P under stage 1, of which 4 P stay, and
4 P / R under 2 and 3. Only parameters that train have gradients and optimizer state.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.models.cost.activations import Kept

MASTER_BYTES = 4
"""Master weights and moments are float32."""
ALIGNMENT = 2
"""ZeRO-1 and 2 pad a group of parameters to a multiple of this times the ranks."""
BUCKET, PERSISTENT, LIVE = 500_000_000, 100_000, 1_000_000_000
"""DeepSpeed's defaults, in elements: `reduce_bucket_size` and two thresholds of ZeRO-3."""


@dataclass(frozen=True, slots=True)
class Weight:
    """A parameter tensor as a rank holds it before ZeRO: of experts, the local ones."""

    numel: int
    expert: bool
    trains: bool


@dataclass(frozen=True, slots=True)
class Spread:
    """How a job is spread over ranks, in DeepSpeed's terms."""

    ranks: int
    stage: int = 0
    """ZeRO stage, 0 to 3."""
    expert_parallel: int = 1
    """Ranks that share the experts of a layer."""
    experts_apart: bool = False
    """DeepSpeed's expert-parallel layers hold the experts, in groups of parameters of their own."""
    weight_bytes: int = 4
    """Of a weight, a gradient and an activation: 2 in bf16."""
    moments: int = 2
    """Tensors of optimizer state per weight: AdamW 2, SGD 0."""
    accumulation_steps: int = 1
    """Micro-batches of a rank in an optimizer step."""
    float32_gradients: bool = False
    """`data_types.grad_accum_dtype: fp32` with bf16 weights: gradients are kept and summed in float32."""
    bucket: int = BUCKET
    """`reduce_bucket_size`, in elements."""
    double_buckets: bool = False
    """`overlap_comm`: ZeRO-1 and 2 then fill one bucket while they send the other."""
    contiguous_gradients: bool = True
    """Without it there are no buckets."""
    persistent: int = PERSISTENT
    """`stage3_param_persistence_threshold`: parameters of at most so many elements stay whole under ZeRO-3."""
    live: int = LIVE
    """`stage3_max_live_parameters`: elements of gathered weights that ZeRO-3 keeps."""

    @classmethod
    def from_deepspeed(cls, config: Mapping[str, Any], ranks: int) -> "Spread":
        """From a DeepSpeed configuration that `deepspeed_config.complete` has completed."""
        zero = config.get("zero_optimization", {})
        experts = config.get("expert_parallel") or {}
        stage, apart = int(zero.get("stage", 0)), bool(experts.get("enabled", False))
        bf16 = bool(config.get("bf16", {}).get("enabled", False))
        return cls(
            ranks=ranks,
            stage=stage,
            expert_parallel=int(experts.get("autoep_size", 1)) if apart else 1,
            experts_apart=apart,
            weight_bytes=2 if bf16 else 4,
            moments=0 if config["optimizer"]["type"] == "SGD" else 2,
            accumulation_steps=int(config["gradient_accumulation_steps"]),
            float32_gradients=bf16 and config.get("data_types", {}).get("grad_accum_dtype") == "fp32",
            bucket=int(zero.get("reduce_bucket_size", BUCKET)),
            double_buckets=bool(zero.get("overlap_comm", stage == 3)),
            contiguous_gradients=bool(zero.get("contiguous_gradients", True)),
            persistent=int(zero.get("stage3_param_persistence_threshold", PERSISTENT)),
            live=int(zero.get("stage3_max_live_parameters", LIVE)),
        )

    def holders(self, *, expert: bool) -> int:
        """R: ranks that hold the same parameter, over which ZeRO partitions."""
        return self.ranks // self.expert_parallel if expert else self.ranks


@dataclass(frozen=True, slots=True)
class State:
    """Bytes on the rank that holds most."""

    weights: int
    gradients: int
    """When they are largest: at the end of a backward."""
    accumulated: int
    """Of them, what is there in the forward and when the backward begins."""
    optimizer: int
    buckets: int
    """Buffers that gradients are sent from; ZeRO-3 keeps them, the other stages have them during the backward."""
    gathered: int
    """Whole weights that ZeRO-3 has gathered at a time, at most."""
    step: int
    """What the optimizer's step takes for a moment: gradients in float32, and temporaries of AdamW."""


def peaks(state: State, spread: Spread, kept: Kept) -> dict[str, int]:
    """Bytes in use at the moments of a step that may be the largest.

    `forward`: at its end. `backward`: at its start, when all activations are there, or at its end, when all gradients
    are. `step`: of the optimizer, which takes one group of parameters after the other.
    """
    resident = state.weights + state.optimizer + state.gathered
    buckets = state.buckets if spread.accumulation_steps > 1 or spread.stage == 3 else 0
    begins = state.accumulated + state.buckets + kept.saved + kept.recomputed + kept.backward
    return {
        "forward": resident + state.accumulated + buckets + kept.saved + kept.head,
        "backward": resident + max(begins, state.gradients + state.buckets),
        "step": resident - state.gathered + state.gradients + state.step + (state.buckets if spread.stage == 3 else 0),
    }


def local_weights(named_parameters: Iterable[tuple[str, Any]], spread: Spread) -> list[Weight]:
    """A model's parameters as one rank holds them before ZeRO.

    Args:
        named_parameters: of the Hugging Face model, on any device, `meta` included.
    """
    found = []
    for name, parameter in named_parameters:
        expert = spread.experts_apart and ".experts." in name
        numel = parameter.numel() // (spread.expert_parallel if expert else 1)
        # DeepSpeed keeps gate and up apart.
        parts = 2 if expert and name.endswith("gate_up_proj") else 1
        found += [Weight(numel // parts, expert, parameter.requires_grad)] * parts
    return found


def state(weights: Sequence[Weight], spread: Spread) -> State:
    """Bytes of everything but activations.

    Args:
        weights: the model's parameters in the order of `model.parameters()`; tied ones once.
    """
    trained = [[w.numel for w in weights if w.trains and w.expert is expert] for expert in (False, True)]
    partitions = [_partition(sizes, spread.holders(expert=bool(e)), spread) for e, sizes in enumerate(trained)]
    whole_weights, whole_gradients = sum(w.numel for w in weights), sum(map(sum, trained))
    b, bucket, several = spread.weight_bytes, _buckets(spread), spread.accumulation_steps > 1
    if spread.stage == 0:
        masters = spread.moments + (b < MASTER_BYTES)
        step = MASTER_BYTES * whole_gradients if b < MASTER_BYTES else 0
        gradients = b * whole_gradients
        optimizer = MASTER_BYTES * masters * whole_gradients
        return State(b * whole_weights, gradients, gradients * several, optimizer, 0, 0, step)
    optimizer = MASTER_BYTES * (1 + spread.moments) * sum(partitions)
    # Gradients of one group at a time: float32, unless they are already, and two temporaries of AdamW's update.
    copies = 0 if spread.float32_gradients and spread.stage < 3 else 1
    step = MASTER_BYTES * (copies + (2 if spread.moments else 0)) * max(partitions)
    if spread.stage == 3:
        kept = sum(_share(w.numel, spread.holders(expert=w.expert)) for w in weights)
        split = [w.numel for w in weights if spread.holders(expert=w.expert) > 1]
        persistent = sum(numel for numel in split if numel <= spread.persistent)
        gathered = min(sum(split) - persistent, spread.live)
        gradients = _gradient_bytes(spread) * sum(partitions)
        return State(b * (kept + persistent), gradients, gradients, optimizer, bucket, b * gathered, step)
    gradients, accumulated = _gradients(trained, partitions, spread)
    return State(b * whole_weights, gradients, accumulated, optimizer, bucket, 0, step)


def _gradients(trained: Sequence[Sequence[int]], partitions: Sequence[int], spread: Spread) -> tuple[int, int]:
    """Bytes under ZeRO-1 and 2: at their largest, and of them what is there in the forward."""
    b, several = spread.weight_bytes, spread.accumulation_steps > 1
    holders = [spread.holders(expert=bool(e)) for e in range(len(trained))]
    whole = sum(map(sum, trained))
    if spread.float32_gradients and spread.stage == 1:  # whole buffers that stay, and those of the backward in bf16
        stay = MASTER_BYTES * sum(part * ranks for part, ranks in zip(partitions, holders, strict=True))
        return stay + b * whole, stay + b * whole * several
    if spread.float32_gradients:  # made when the backward sends its first bucket
        return MASTER_BYTES * sum(partitions), MASTER_BYTES * sum(partitions)
    if spread.stage == 1 and several:
        return b * whole, b * whole
    largest = b * sum(_touched(sizes, ranks) for sizes, ranks in zip(trained, holders, strict=True))
    return largest, largest * several


def _gradient_bytes(spread: Spread) -> int:
    return MASTER_BYTES if spread.float32_gradients else spread.weight_bytes


def _buckets(spread: Spread) -> int:
    if not spread.contiguous_gradients or spread.stage == 0 or (spread.stage == 1 and spread.float32_gradients):
        return 0
    count = 2 if spread.double_buckets and spread.stage < 3 else 1
    return count * spread.bucket * spread.weight_bytes


def _share(numel: int, holders: int) -> int:
    return -(-numel // holders)


def _partition(sizes: Sequence[int], holders: int, spread: Spread) -> int:
    """Elements of a rank's partition of one group: of each parameter under ZeRO-3, else of all laid end to end."""
    if spread.stage == 3:
        return sum(_share(size, holders) for size in sizes)
    return ALIGNMENT * _share(sum(sizes), ALIGNMENT * holders)


def _touched(sizes: Sequence[int], holders: int) -> int:
    """Elements of the parameters that lie in the partition, whole: the largest over ranks."""
    partition = ALIGNMENT * _share(sum(sizes), ALIGNMENT * holders)
    most = 0
    for rank in range(holders):
        low, high, start, touched = rank * partition, (rank + 1) * partition, 0, 0
        for size in sizes:
            if start < high and start + size > low:
                touched += size
            start += size
        most = max(most, touched)
    return most
