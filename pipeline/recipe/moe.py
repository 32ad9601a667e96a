"""`jobs.NAME.moe`: the layer that computes experts, and the losses of their routers."""

from typing import Literal, Self

from pydantic import model_validator

from pipeline.recipe.base import Count, NonNegative, PositiveFloat, Section


class NativeMoeConfig(Section):
    """DeepSpeed's own MoE layer, for jobs with `moe.layer: native`. As it stands it drops nothing, like AutoEP."""

    drop_tokens: bool = False
    """Let an expert take at most its capacity of each rank's tokens; the least probable routes go first."""
    capacity_factor: PositiveFloat = 1.25
    """Capacity in training, as a multiple of an expert's even share: tokens x experts per token / experts."""
    eval_capacity_factor: PositiveFloat = 2.0
    """The same in evaluation."""
    min_capacity: Count = 0
    """Smallest capacity in tokens; 0 suits decoding, where a rank brings one token per sample."""
    use_rts: bool = False
    """Random token selection: drop routes at random in training, instead of the least probable ones."""
    use_residual: bool = False
    """Residual MoE (PR-MoE): an MLP beside the experts. No Hugging Face layout holds it: such a job is not exported."""

    @model_validator(mode="after")
    def _selection_needs_dropping(self) -> Self:
        if self.use_rts and not self.drop_tokens:
            raise ValueError("use_rts chooses the tokens that are dropped; it needs drop_tokens: true")
        return self


class MoeConfig(Section):
    """The layer that computes experts, and the losses of their routers, per MoE layer, padding excluded."""

    layer: Literal["autoep", "native"] = "autoep"
    """DeepSpeed's layer for experts: AutoEP, or `deepspeed.moe.layer.MoE` (drops tokens, has no ZeRO-3). How many ranks
    share a layer's experts is `expert_parallel.autoep_size` of the DeepSpeed JSON for both."""
    native: NativeMoeConfig = NativeMoeConfig()
    """Settings of `layer: native`."""
    balance: NonNegative = 0.01
    """l_b: weight of the load-balance loss; Switch Transformer's."""
    z: NonNegative = 1e-3
    """l_z: weight of the router z-loss; ST-MoE's."""

    @model_validator(mode="after")
    def _native_settings_are_used(self) -> Self:
        if self.layer != "native" and self.native != NativeMoeConfig():
            raise ValueError("native is set, but layer is not native; say `layer: native`, or leave it out")
        return self
