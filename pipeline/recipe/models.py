"""`models`: checkpoints, and Mixture-of-Experts models made from them."""

from typing import Self

from pydantic import model_validator

from pipeline.recipe.base import Count, NonNegative, Positive, PositiveFraction, Section


class UpcycleConfig(Section):
    """How a dense checkpoint becomes a Mixture-of-Experts one."""

    source: str
    """Model reference of the dense checkpoint: `models.NAME`, `jobs.NAME` or a folder."""
    experts: Positive = 4
    """Experts per MoE layer."""
    top_k: Positive = 2
    """Experts per token. 1 is refused: with renormalised weights it gives the router no task gradient."""
    every: Positive = 2
    """Every n-th decoder layer becomes an MoE layer (the 2nd, 4th, ... for 2)."""
    layers: tuple[Count, ...] | None = None
    """The decoder layers, from 0, that become MoE layers; in place of `every`."""
    expert_width: PositiveFraction = 1.0
    """Width of an expert as a share of the dense MLP's: 1, 1/2, 1/3, ... Below 1 the MLP is cut into that many
    fine-grained experts, and `experts` and `top_k` are multiples of their number."""
    shared_expert: PositiveFraction | None = None
    """Share of the dense MLP that every token passes, where the architecture has a shared expert (qwen2_moe: None means
    0.5); the routed experts are made from the rest."""
    router_noise: NonNegative = 0.02
    """Standard deviation of the router's initial weights; transformers' own for a new layer."""
    expert_noise: NonNegative = 0.02
    """Relative noise on each expert copy: identical copies leave the router without gradient. What it changes is
    measured and written beside the model."""


class ModelConfig(Section):
    """One model. Exactly one of `path` and `upcycle`; random ones are the benchmark's (`benchmark.models`)."""

    path: str | None = None
    """Checkpoint folder in Hugging Face format; or `package:teacher` or `package:base`, the benchmark's own, which come
    with the package."""
    upcycle: UpcycleConfig | None = None
    """A Mixture-of-Experts model made from a dense one."""

    @model_validator(mode="after")
    def _exactly_one_origin(self) -> Self:
        if (self.path is None) == (self.upcycle is None):
            raise ValueError("give exactly one of `path` and `upcycle`")
        return self
