"""DeepSpeed's own MoE layer (`deepspeed.moe.layer.MoE`) in the place of Hugging Face's MoE blocks.

It is one of two expert-parallel layers. AutoEP never drops a token; this one can. Each expert takes at most its
capacity of a rank's tokens, so that every all-to-all has one size and a busy expert cannot stall the others [published:
GShard, arXiv:2006.16668]. Without dropping it computes what Hugging Face's block does (a test).

Three things differ from DeepSpeed's layer, all in the gate:
- one gating function, DeepSpeed's top-k, for every k: its functions for top-1 and top-2 sample in evaluation too;
- padding is never routed: it takes no capacity and no computation;
- ranks may have different numbers of tokens even when tokens are dropped: all of them use the capacity of the rank with
  most tokens, so their all-to-alls have one size (DeepSpeed's own layer aborts).

Shapes: B samples, S positions, T = B * S tokens, N of them routed (not padding), D width, F width of an expert,
E experts of a layer, K experts per token.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.moe.sharded_moe import TopKGate, topkgating
from torch import Tensor, nn
from torch.nn.functional import linear

from pipeline.recipe import NativeMoeConfig

# -- parts of the layer ------------------------------------------------------------------------------------------------


class PaddingMask:
    """Which tokens of the running forward are no padding, for layers that are given hidden states alone.

    Layers that are recomputed in backward use the mask of the last forward, which is the right one: each forward's
    backward comes before the next forward.
    """

    def __init__(self, model: nn.Module) -> None:
        self._valid_BS: Tensor | None = None
        model.register_forward_pre_hook(self._remember, with_kwargs=True)

    def _remember(self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        # A mask of another shape is an attention pattern, not padding: then every token counts.
        mask = named.get("attention_mask", inputs[1] if len(inputs) > 1 else None)
        self._valid_BS = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def valid(self, hidden_BSD: Tensor) -> Tensor:
        """bool[T], True where a token of these hidden states is no padding.

        In generation the mask covers the cached tokens too; the hidden states are of the last ones alone.
        """
        batch, length = hidden_BSD.shape[:2]
        if self._valid_BS is None:
            return torch.ones(batch * length, dtype=torch.bool, device=hidden_BSD.device)
        valid_BS = self._valid_BS[:, self._valid_BS.shape[1] - length :]
        assert valid_BS.shape == (batch, length), f"mask {tuple(self._valid_BS.shape)} for hidden {hidden_BSD.shape}"
        return valid_BS.flatten()


class GatedMlp(nn.Module):
    """One expert: act(gate) * up, then down, gate and up in one matrix [2F, D] as in Hugging Face's packed tensors."""

    def __init__(self, width: int, expert_width: int, act_fn: Any) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(width, 2 * expert_width, bias=False)
        self.down_proj = nn.Linear(expert_width, width, bias=False)
        self.act_fn = act_fn

    def forward(self, hidden: Tensor) -> Tensor:
        """Output [rows, D] of rows of hidden states."""
        gate, up = self.gate_up_proj(hidden).chunk(2, dim=-1)
        output: Tensor = self.down_proj(self.act_fn(gate) * up)
        return output


class RouterLogits(nn.Linear):
    """The router's product in fp32, as DeepSpeed computes it, but as a module: hooks see the logits [T, E]."""

    def forward(self, input: Tensor) -> Tensor:
        """Logits f32[T, E] of hidden states [T, D]."""
        return linear(input.float(), self.weight.float())


class Router(TopKGate):  # type: ignore[misc]
    """DeepSpeed's gate, with the three differences that this file's first lines list."""

    def __init__(self, width: int, num_experts: int, top_k: int, config: NativeMoeConfig, *, normalise: bool) -> None:
        """`normalise`: whether the weights of a token's experts sum to 1, as the architecture has it."""
        super().__init__(
            width,
            num_experts,
            top_k,
            config.capacity_factor,
            config.eval_capacity_factor,
            config.min_capacity,
            drop_tokens=config.drop_tokens,
            use_rts=config.use_rts,
            top2_2nd_expert_sampling=False,
        )
        self.wg = RouterLogits(width, num_experts, bias=False)
        self.normalise = normalise
        self.dropped: Tensor = torch.zeros((), dtype=torch.int64)
        """Pairs of token and expert that the last forward dropped."""

    @property
    def gate(self) -> nn.Module:
        """The module whose output is the router logits, named as in AutoEP's router."""
        return self.wg

    def forward(
        self, input: Tensor, used_token: Tensor | None = None, sparse_routes: bool = True, use_tutel: bool = False
    ) -> tuple[Any, ...]:
        """Routes of all tokens as MOELayer wants them: expert (-1: none), slot and weight, each [K, T].

        Args:
            input: hidden states [T, D].
            used_token: bool[T], False for padding.
            sparse_routes, use_tutel: DeepSpeed's signature; always True and False here.
        """
        assert used_token is not None and sparse_routes and not use_tutel
        # Logits of all tokens, for hooks that collect them; routes of the tokens that are no padding.
        logits_TE = self.wg(input)
        token_N = used_token.nonzero().squeeze(1)
        random = self.use_rts and self.training
        if random:  # the first tokens get an expert's places, so a random order is random token selection
            token_N = token_N[torch.randperm(len(token_N), device=token_N.device)]
        _, capacity, num_experts, expert_KN, slot_KN, weight_KN, counts_E = topkgating(
            logits_TE[token_N],
            self.k,
            self.capacity_factor if self.training else self.eval_capacity_factor,
            self.min_capacity,
            self.drop_tokens,
            self.ep_group,
            drop_policy="position" if random else "probs",
            sparse_routes=True,
        )
        # Without dropping, DeepSpeed's gate has agreed on the largest count already.
        if self.drop_tokens and self.ep_group is not None:
            capacity = capacity.to(input.device)
            dist.all_reduce(capacity, op=dist.ReduceOp.MAX, group=self.ep_group)
        kept_KN = expert_KN >= 0
        self.dropped = (~kept_KN).sum()
        if not self.normalise:
            # The gate has made the weights of a token's experts sum to 1: take the probabilities in their place.
            probability_NE = torch.softmax(logits_TE[token_N], dim=-1)
            weight_KN = probability_NE.gather(1, expert_KN.clamp(min=0).long().t()).t() * kept_KN
        whole = (self.k, len(input))
        no_loss = logits_TE.new_zeros(())  # for DeepSpeed's balance loss: ours comes from the logits (training/step.py)
        return (
            no_loss,
            capacity,
            num_experts,
            # From the N routed tokens back to all T: padding has no expert, and weight 0.
            expert_KN.new_full(whole, -1).index_copy(1, token_N, expert_KN),
            slot_KN.new_zeros(whole).index_copy(1, token_N, slot_KN),
            weight_KN.new_zeros(whole).index_copy(1, token_N, weight_KN),
            counts_E,
        )


# -- the layer ---------------------------------------------------------------------------------------------------------


class NativeMoe(nn.Module):
    """A Hugging Face MoE block's router and this rank's experts inside DeepSpeed's layer.

    A shared expert stays the Hugging Face module that it was.
    """

    def __init__(
        self, block: nn.Module, config: NativeMoeConfig, padding: PaddingMask, ep_size: int, rank: int
    ) -> None:
        """Take over weights, dtype, device and frozen parameters of `block`; it can be thrown away afterwards.

        Args:
            block: with `gate.weight` [E, D], `experts.gate_up_proj` [E, 2F, D] and `experts.down_proj` [E, D, F].
            config: capacity and residual settings.
            padding: of the model that the block belongs to.
            ep_size: ranks that share the experts; divides E.
            rank: of this process; consecutive ranks share experts.
        """
        super().__init__()
        source: Any = block
        router, experts = source.gate, source.experts
        num_experts, width, expert_width = experts.down_proj.shape
        # Consecutive ranks share experts, as DeepSpeed groups them; `engine.start` checks that it did.
        self._padding, self.ep_size, self.ep_rank = padding, ep_size, rank % ep_size
        self.num_experts, self.num_local_experts = num_experts, num_experts // ep_size
        self.moe = MoE(
            width,
            GatedMlp(width, expert_width, experts.act_fn),
            num_experts,
            ep_size,
            router.top_k,
            use_residual=config.use_residual,
        )
        self.moe.deepspeed_moe.gate = Router(
            width, num_experts, router.top_k, config, normalise=getattr(router, "norm_topk_prob", True)
        )
        self.moe.to(device=router.weight.device, dtype=router.weight.dtype)
        self.shared_expert: nn.Module | None = getattr(block, "shared_expert", None)
        self.shared_expert_gate: nn.Module | None = getattr(block, "shared_expert_gate", None)
        self._take_over(router, experts)
        self.train(block.training)

    @torch.no_grad()
    def _take_over(self, router: Any, experts: Any) -> None:
        """Copy the router and this rank's experts; a residual expert starts as the mean of all experts."""
        first = self.ep_rank * self.num_local_experts
        _fill(self.router.wg.weight, router.weight, router.weight.requires_grad)
        for name in ("gate_up_proj", "down_proj"):
            packed = getattr(experts, name)
            for index, weight in enumerate(self.expert_weights(name)):
                _fill(weight, packed[first + index], packed.requires_grad)
            if self.moe.use_residual:
                _fill(getattr(self.moe.mlp, name).weight, packed.mean(dim=0), packed.requires_grad)
        if self.moe.use_residual:  # both branches alike: an upcycled student starts near its dense model
            for parameter in self.moe.coefficient.parameters():
                _fill(parameter, torch.zeros_like(parameter), router.weight.requires_grad)

    @property
    def router(self) -> Router:
        """The gate; its `gate` gives the router logits."""
        gate: Router = self.moe.deepspeed_moe.gate
        return gate

    @property
    def ep_group(self) -> Any:
        """Ranks that share the experts; known once DeepSpeed has taken the model."""
        return self.moe.deepspeed_moe.ep_group

    def expert_weights(self, name: str) -> tuple[nn.Parameter, ...]:
        """This rank's experts' `gate_up_proj` or `down_proj`, in order."""
        experts = self.moe.deepspeed_moe.experts.deepspeed_experts
        return tuple(expert.get_submodule(name).weight for expert in experts)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """The block's output [B, S, D]. Padding passes no routed expert, only a shared or residual one, if any."""
        valid_T = self._padding.valid(hidden_states)
        output: Tensor = self.moe(hidden_states, used_token=valid_T)[0]
        if self.shared_expert is None:
            return output
        shared: Tensor = self.shared_expert(hidden_states)
        if self.shared_expert_gate is not None:
            shared = torch.sigmoid(self.shared_expert_gate(hidden_states)) * shared
        return output + shared


def convert(model: nn.Module, blocks: Sequence[str], config: NativeMoeConfig, ep_size: int, rank: int) -> None:
    """Replace the MoE blocks at these module paths, before `deepspeed.initialize`."""
    padding = PaddingMask(model)
    for path in blocks:
        parent, _, name = path.rpartition(".")
        block = NativeMoe(model.get_submodule(path), config, padding, ep_size, rank)
        setattr(model.get_submodule(parent), name, block)


def _fill(parameter: Tensor, value: Tensor, trainable: bool) -> None:
    parameter.copy_(value)
    parameter.requires_grad_(trainable)
