"""The LM head and the loss in one: logits exist for a few rows at a time, and none are kept for backward.

The gradients with respect to the hidden states and the head's weight are computed in the forward pass, right after a
chunk's loss [published: fused linear cross-entropy, Liger Kernel, arXiv:2410.10989]. So the largest tensors of
training, student logits f32[N, V] and what is made of them, shrink to one chunk. Within it the loss takes smaller
pieces and leaves each piece's gradient where its logits were [ours]: matrix products want many rows, the loss few.

Shapes: N answer tokens, n rows of a chunk or piece, V vocabulary, D decoder width, B samples, W positions of the head.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pipeline.method.losses import DistillationTerms, distillation_loss
from pipeline.targets.soft_targets import SoftTargets

# -- sizes -------------------------------------------------------------------------------------------------------------
# A chunk is what one matrix product makes; a piece is what the loss takes of it at a time.

CHUNK_ELEMENTS = 1 << 26
"""Logits that exist at a time: 441 rows at V = 151,936. Half as many make the matrix products 3% slower on a CPU."""
PIECE_ELEMENTS = {"cpu": 1 << 21}
"""Logits that the loss works on at a time, in about six float32 tensors. CPUs: what caches and the allocator's heap
hold; the loss then takes less than half the time that it takes on a whole chunk at once."""
PIECE_ELEMENTS_ELSEWHERE = 1 << 24
"""GPUs: larger, so that launching kernels does not dominate; not measured."""

RowsLoss = Callable[[slice, Tensor], Tensor]
"""(which rows, their logits [n, V]) -> differentiable scalar, a sum over the rows."""
HeadLoss = Callable[[Tensor, Tensor], DistillationTerms]
"""(hidden states [N, D], the head's weight [V, D]) -> the loss and its measures."""


# -- the loss, chunk by chunk ------------------------------------------------------------------------------------------


def fused_distillation_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    targets: SoftTargets | None,
    alpha_N: Tensor | float,
    *,
    chunk_elements: int = CHUNK_ELEMENTS,
    piece_elements: int | None = None,
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
        piece_elements: logits that the loss takes at a time; by default what suits the device.

    Raises:
        ValueError: as `distillation_loss`, or hidden states and labels differ in number.
    """
    num_rows, num_vocab = len(labels_N), len(weight_VD)
    if len(hidden_ND) != num_rows:
        raise ValueError(f"{len(hidden_ND)} hidden states, but {num_rows} labels")
    if targets is not None and len(targets) != num_rows:
        raise ValueError(f"soft targets have {len(targets)} rows, the hidden states have {num_rows}")
    if piece_elements is None:
        piece_elements = PIECE_ELEMENTS.get(hidden_ND.device.type, PIECE_ELEMENTS_ELSEWHERE)
    if not isinstance(alpha_N, Tensor):
        alpha_N = torch.full((num_rows,), float(alpha_N), device=labels_N.device)
    # The measures a row are written into these while the chunks go by; autograd sees the sum of the losses alone.
    gated = settings.get("gate_scale") is not None
    whole = _no_terms(labels_N, with_targets=targets is not None, with_gate=targets is not None and gated)

    def loss(rows: slice, logits_nV: Tensor) -> Tensor:
        some = None if targets is None else targets.rows(rows)
        terms = distillation_loss(logits_nV, labels_N[rows], some, alpha_N[rows], **settings)
        _take(terms, rows, whole)
        return terms.loss_sum

    chunk_rows, piece_rows = (max(1, elements // num_vocab) for elements in (chunk_elements, piece_elements))
    return replace(whole, loss_sum=linear_loss(hidden_ND, weight_VD, loss, chunk_rows, piece_rows))


def _no_terms(labels_N: Tensor, *, with_targets: bool, with_gate: bool) -> DistillationTerms:
    """What `_take` fills, made before any chunk: small tensors left between large ones fragment the CPU's heap."""
    zeros = partial(torch.zeros, dtype=torch.float32, device=labels_N.device)
    kl_N, hardness_N, gate_N = (zeros(len(labels_N)) if on else None for on in (with_targets, with_targets, with_gate))
    return DistillationTerms(zeros(()), zeros(len(labels_N)), kl_N, hardness_N, zeros(()), zeros(()), gate_N)


def _take(terms: DistillationTerms, rows: slice, whole: DistillationTerms) -> None:
    """Put the measures of some rows where they belong; `loss_sum` is not one of them."""
    whole.ce_N[rows] = terms.ce_N
    if whole.kl_N is not None and terms.kl_N is not None:
        whole.kl_N[rows] = terms.kl_N
    if whole.hardness_N is not None and terms.hardness_N is not None:
        whole.hardness_N[rows] = terms.hardness_N
    if whole.gate_N is not None and terms.gate_N is not None:
        whole.gate_N[rows] = terms.gate_N
    whole.weighted_sum.add_(terms.weighted_sum)
    whole.plain_sum.add_(terms.plain_sum)


def linear_loss(hidden_ND: Tensor, weight_VD: Tensor, loss: RowsLoss, chunk_rows: int, piece_rows: int) -> Tensor:
    """Sum over pieces of `loss` of the logits hidden @ weight^T: a float32 scalar, differentiable once."""
    # A custom function is told that inputs want gradients even where none are wanted: detach them then.
    if not torch.is_grad_enabled():
        hidden_ND, weight_VD = hidden_ND.detach(), weight_VD.detach()
    arguments = hidden_ND, weight_VD, loss, chunk_rows, piece_rows
    total: Tensor = _LinearLoss.apply(*arguments)  # type: ignore[no-untyped-call]
    return total


class _LinearLoss(torch.autograd.Function):
    """Forward computes the gradients too, so no logits are kept; backward scales them by the loss's own gradient."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, loss: RowsLoss, chunk_rows: int, piece_rows: int
    ) -> Tensor:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_ND = torch.empty_like(hidden_ND) if wants_hidden else None
        grad_VD = torch.empty_like(weight_VD, dtype=torch.float32) if wants_weight else None
        total = torch.zeros((), device=hidden_ND.device)
        for rows in _even_slices(len(hidden_ND), chunk_rows):
            logits_nV = hidden_ND[rows] @ weight_VD.t()
            # A piece's gradient takes the place of its logits: after the loop the chunk is all gradient.
            for piece in _even_slices(len(logits_nV), piece_rows):
                where = slice(rows.start + piece.start, rows.start + piece.stop)
                total += _into_gradient(logits_nV[piece], partial(loss, where), wants_hidden or wants_weight)
            grad_nV = logits_nV
            del logits_nV
            if grad_ND is not None:
                torch.mm(grad_nV, weight_VD, out=grad_ND[rows])
            if grad_VD is not None:
                _add_product(grad_VD, grad_nV, hidden_ND[rows], first=rows.start == 0)
            del grad_nV  # before the next chunk's logits are made
        ctx.save_for_backward(grad_ND, grad_VD)
        ctx.weight_dtype = weight_VD.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        grad_ND, grad_VD = ctx.saved_tensors
        if grad_ND is not None:
            grad_ND = grad_ND * scale
        if grad_VD is not None:  # in place, it is large: a second backward is refused by autograd
            grad_VD = grad_VD.mul_(scale).to(ctx.weight_dtype)
        return grad_ND, grad_VD, None, None, None


# -- pieces, and their gradients ---------------------------------------------------------------------------------------


def _even_slices(length: int, most: int) -> Iterator[slice]:
    """Slices that cover `length` rows, at most `most` each, as equal as can be. No rows: one empty slice, since a rank
    without answer tokens computes a loss of 0 and gradients of 0 like the others."""
    count = max(1, -(-length // most))
    size = max(1, -(-length // count))
    for start in range(0, max(1, length), size):
        yield slice(start, min(start + size, length))


def _into_gradient(logits_nV: Tensor, loss: Callable[[Tensor], Tensor], wants_grad: bool) -> Tensor:
    """The piece's loss; its logits are overwritten with its gradient, and autograd's graph ends here."""
    if not wants_grad:
        return loss(logits_nV)
    with torch.enable_grad():
        leaf_nV = logits_nV.detach().requires_grad_()
        value = loss(leaf_nV)
    (grad_nV,) = torch.autograd.grad(value, leaf_nV)
    logits_nV.copy_(grad_nV)
    return value.detach()


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


# -- inside the model --------------------------------------------------------------------------------------------------


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
        # Only the method is replaced: the module, its name and its hooks stay, which DeepSpeed and checkpoints rely on.
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
        # What is kept has no graph: the head's output alone carries the gradient.
        terms = self._loss(hidden_BWD[self._rows_BW], self._head.weight)
        self._terms = replace(terms, loss_sum=terms.loss_sum.detach())
        return terms.loss_sum
