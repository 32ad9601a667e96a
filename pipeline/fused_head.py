"""The LM head and the loss in one: logits exist for a few rows at a time, and none are kept for backward.

The gradients with respect to the hidden states and the head's weight are computed in the forward pass, right after a
chunk's loss [published: fused linear cross-entropy, Liger Kernel, arXiv:2410.10989]. So the largest tensors of
training, student logits f32[N, V] and what is made of them, shrink to one chunk.

Shapes: N answer tokens, n rows of a chunk, V vocabulary, D decoder width, B samples, W positions given to the head.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pipeline.losses import DistillationTerms, distillation_loss, joined
from pipeline.targets import SoftTargets

CHUNK_ELEMENTS = 1 << 24
"""Logits of one chunk: 110 rows at V = 151,936. The loss works on about five float32 tensors of this size."""

ChunkLoss = Callable[[Tensor, slice], Tensor]
"""(logits [n, V], which rows they are) -> differentiable scalar, a sum over the rows."""
HeadLoss = Callable[[Tensor, Tensor], DistillationTerms]
"""(hidden states [N, D], the head's weight [V, D]) -> the loss and its measures."""


def fused_distillation_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    targets: SoftTargets | None,
    alpha_N: Tensor,
    *,
    chunk_elements: int = CHUNK_ELEMENTS,
    **settings: Any,
) -> DistillationTerms:
    """`losses.distillation_loss` of the logits hidden @ weight^T, chunk by chunk.

    The matrix products run in the dtype of hidden states and weight, the loss in float32; the weight's gradient is
    summed over chunks in float32.

    Args:
        hidden_ND: what the head reads, only the rows that predict `labels_N`.
        weight_VD: the head's weight; frozen (`requires_grad` False), its gradient is not computed.
        labels_N, targets, alpha_N, settings: as for `distillation_loss`.
        chunk_elements: logits held at a time; at least one row.

    Raises:
        ValueError: as `distillation_loss`, or hidden states and labels differ in number.
    """
    num_rows, num_vocab = len(labels_N), len(weight_VD)
    if len(hidden_ND) != num_rows:
        raise ValueError(f"{len(hidden_ND)} hidden states, but {num_rows} labels")
    if targets is not None and len(targets) != num_rows:
        raise ValueError(f"soft targets have {len(targets)} rows, the hidden states have {num_rows}")
    parts: list[DistillationTerms] = []

    def loss(logits_nV: Tensor, rows: slice) -> Tensor:
        chunk_targets = None if targets is None else targets.rows(rows)
        terms = distillation_loss(logits_nV, labels_N[rows], chunk_targets, alpha_N[rows], **settings)
        parts.append(replace(terms, loss_sum=terms.loss_sum.detach()))
        return terms.loss_sum

    loss_sum = linear_loss(hidden_ND, weight_VD, loss, max(1, chunk_elements // num_vocab))
    return replace(joined(parts), loss_sum=loss_sum)


def linear_loss(hidden_ND: Tensor, weight_VD: Tensor, loss: ChunkLoss, chunk_rows: int) -> Tensor:
    """Sum over chunks of `loss` of the logits hidden @ weight^T: a float32 scalar, differentiable once."""
    if not torch.is_grad_enabled():
        hidden_ND, weight_VD = hidden_ND.detach(), weight_VD.detach()
    total: Tensor = _LinearLoss.apply(hidden_ND, weight_VD, loss, chunk_rows)  # type: ignore[no-untyped-call]
    return total


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, loss: ChunkLoss, chunk_rows: int) -> Tensor:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_ND = torch.empty_like(hidden_ND) if wants_hidden else None
        grad_VD = torch.empty_like(weight_VD, dtype=torch.float32) if wants_weight else None
        total = torch.zeros((), device=hidden_ND.device)
        for start in range(0, max(1, len(hidden_ND)), chunk_rows):
            rows = slice(start, start + chunk_rows)
            logits_nV = hidden_ND[rows] @ weight_VD.t()
            value, grad_nV = _value_and_grad(loss, logits_nV, rows, wants_hidden or wants_weight)
            total += value
            del logits_nV
            if grad_nV is not None and grad_ND is not None:
                torch.mm(grad_nV, weight_VD, out=grad_ND[rows])
            if grad_nV is not None and grad_VD is not None:
                _add_product(grad_VD, grad_nV, hidden_ND[rows], first=start == 0)
        ctx.save_for_backward(grad_ND, grad_VD)
        ctx.weight_dtype = weight_VD.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_ND, grad_VD = ctx.saved_tensors
        if grad_ND is not None:
            grad_ND = grad_ND * scale
        if grad_VD is not None:  # in place, it is large: a second backward is refused by autograd
            grad_VD = grad_VD.mul_(scale).to(ctx.weight_dtype)
        return grad_ND, grad_VD, None, None


def _value_and_grad(loss: ChunkLoss, logits_nV: Tensor, rows: slice, wants_grad: bool) -> tuple[Tensor, Tensor | None]:
    """The chunk's loss and its gradient with respect to the logits; autograd's graph ends here."""
    if not wants_grad:
        return loss(logits_nV, rows), None
    with torch.enable_grad():
        value = loss(logits_nV.requires_grad_(), rows)
    (grad_nV,) = torch.autograd.grad(value, logits_nV)
    return value.detach(), grad_nV


def _add_product(sum_VD: Tensor, grad_nV: Tensor, hidden_nD: Tensor, *, first: bool) -> None:
    """sum += grad^T @ hidden in float32, without a product [V, D] of lower precision beside it."""
    if grad_nV.dtype == sum_VD.dtype:
        sum_VD.addmm_(grad_nV.t(), hidden_nD, beta=0 if first else 1)
        return
    step = max(1, CHUNK_ELEMENTS // hidden_nD.shape[1])
    for start in range(0, len(sum_VD), step):
        words = slice(start, start + step)
        product = grad_nV[:, words].t() @ hidden_nD
        if first:
            sum_VD[words] = product
        else:
            sum_VD[words] += product


class FusedHead:
    """Lets a model's LM head compute a loss in the logits' place, during forwards that ask for it.

    The head stays the same module with the same parameters: DeepSpeed's hooks gather its weight, tied embeddings stay
    tied, names in checkpoints do not change. A forward that asks for nothing, as in generation, gives logits.
    """

    def __init__(self, model: nn.Module) -> None:
        """Attach to `model`, a Hugging Face causal LM (for DeepSpeed: `engine.module`, after `initialize`).

        Raises:
            ValueError: the model's head has a bias.
        """
        head: Any = model.get_output_embeddings()  # type: ignore[operator]
        if getattr(head, "bias", None) is not None:
            raise ValueError(f"the LM head of {type(model).__name__} has a bias, which the fused loss leaves out")
        self._head, self._logits = head, head.forward
        self._rows_BW: Tensor | None = None
        self._loss: HeadLoss | None = None
        self._terms: DistillationTerms | None = None
        head.forward = self._compute

    def loss(self, forward: Callable[[], Any], rows_BW: Tensor, loss: HeadLoss) -> DistillationTerms:
        """Call `forward`, in which the model runs once, and return the loss of the selected rows.

        Args:
            forward: runs the model; its output's `logits` is what the head returned.
            rows_BW: bool, the positions that the loss sees; padding costs nothing.
            loss: computes the terms; their `loss_sum` is given back as the *model's* output, so that hooks on modules'
                outputs (ZeRO-3 gathers weights before backward) see it.
        """
        self._rows_BW, self._loss = rows_BW, loss
        try:
            loss_sum = forward().logits
            assert self._terms is not None, "the forward did not reach the LM head"
            return replace(self._terms, loss_sum=loss_sum)
        finally:
            self._rows_BW = self._loss = self._terms = None

    def _compute(self, hidden_BWD: Tensor) -> Tensor:
        if self._loss is None or self._rows_BW is None:
            logits: Tensor = self._logits(hidden_BWD)
            return logits
        terms = self._loss(hidden_BWD[self._rows_BW], self._head.weight)
        self._terms = replace(terms, loss_sum=terms.loss_sum.detach())
        return terms.loss_sum
