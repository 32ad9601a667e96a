"""The values that are logged of a training step: its place in the schedules, and means of what it summed.

Shapes: G samples of a global batch, L MoE layers, E experts.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pipeline.training.setup import Setup
from pipeline.training.step import StepStats


def scheduled(setup: Setup, step: int) -> dict[str, Any]:
    """Where a step stands: samples seen after it, competence, the range of alpha over its global batch.

    Args:
        step: steps done before it.
    """
    job, schedules, gap = setup.job, setup.schedules, setup.gap
    index_G, percentile_G = setup.plan.batch(step)
    pool_G = setup.from_pool(index_G)
    alpha_G = schedules.alpha(step, percentile_G, pool_G, gap)
    values: dict[str, Any] = {
        "samples": schedules.samples(step + 1),
        "competence": schedules.competence(step) if job.curriculum else 1.0,
        "pool_share": float(pool_G.mean()),
        "retired": int(setup.plan.current.retired[0]),
        "alpha_min": float(alpha_G.min()),
        "alpha_max": float(alpha_G.max()),
    }
    if gap is not None and gap.gap is not None:
        values |= {"gap": gap.gap, "gap_left": gap.left}
    return values


def per_token(stats: StepStats, waited: float, seconds: float) -> dict[str, Any]:
    """Means over the global batch of what the step summed."""
    sums = stats.sums
    tokens, distilled, scored = (max(sums[k], 1.0) for k in ("tokens", "distilled", "scored"))
    values: dict[str, Any] = {
        "loss": sums["loss"] / tokens,
        "ce": sums["ce"] / tokens,
        "kl": sums["kl"] / distilled,
        "alpha": sums["alpha"] / tokens,
        "targets_read": sums["targets_read"],
        "token_hardness": sums["token_hardness"] / distilled,
        "instance_hardness": sums["instance_hardness"] / scored,
        "tokens_per_s": sums["positions"] / seconds,
        "data_wait_s": waited,
        "step_s": seconds,
    }
    if "features" in sums:
        values |= {
            "feature_loss": sums["feature_loss"] / sums["features"],
            "feature_alpha": sums["feature_alpha"] / sums["features"],
            "feature_hardness": sums["feature_hardness"] / max(sums["feature_rows"], 1.0),
        }
    if "vision" in sums:
        values["vision"] = sums["vision"] / sums["samples"]
    if stats.router_load_LE is not None:
        values |= router_metrics(sums, stats.router_load_LE)
    return values


def router_metrics(sums: Mapping[str, float], load_LE: Tensor) -> dict[str, Any]:
    """Per layer and over layers; the worst layer's balance shows one that collapsed, which the mean would hide."""
    layers = range(len(load_LE))
    balance_L, z_L = ([sums[f"{name}/{layer}"] for layer in layers] for name in ("balance", "z"))
    values: dict[str, Any] = {
        "expert_load": (load_LE / load_LE.sum(-1, keepdim=True)).tolist(),
        "router_entropy": [sums[f"router_entropy/{layer}"] for layer in layers],
        "balance": sum(balance_L) / len(layers),
        "balance_worst": max(balance_L),
        "z": sum(z_L) / len(layers),
    }
    if "dropped" in sums:  # a share of all pairs of token and expert
        values["dropped"] = sums["dropped"] / float(load_LE.sum())
    return values
