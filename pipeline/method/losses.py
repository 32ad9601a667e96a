"""Distillation and router losses: pure functions of tensors. No config, no model, no collectives.

Shape suffixes: N = answer tokens (batch and sequence flattened), V = vocabulary, K = teacher top-k, T = positions of a
padded batch, E = experts, B = samples, J = feature rows (see `features`), R = width of a sketch. The caller divides
sums once, by counts over the global batch.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.targets.soft_targets import SoftTargets

IGNORE = -100
"""Label of a row that does not count."""
NORMALISER_EMA = 0.9
MOST_NATS = 6.0
"""Largest hardness of a token: a token that the student finds impossible must not outweigh all others."""
GATE_MARGIN = 2.0
"""How much worse than the student a teacher may be on a token, in units of s, before the gate begins to close."""


@dataclass(frozen=True, slots=True)
class FeatureTerms:
    """One micro-batch's share of METHOD section 7's feature term, as sums."""

    loss_sum: Tensor
    """Differentiable scalar: sum over rows of alpha f g."""
    distance_J: Tensor
    """g, without gradient."""
    weighted_sum: Tensor
    """Sum of alpha f g, before normalisation."""
    plain_sum: Tensor
    """Sum of alpha g."""


@dataclass(frozen=True, slots=True)
class DistillationTerms:
    """One micro-batch's share of METHOD section 7, as sums."""

    loss_sum: Tensor
    """Differentiable scalar: sum over tokens of (1 - alpha rho) CE + alpha rho b KL."""
    ce_N: Tensor
    kl_N: Tensor | None
    """KL per token at temperature 1 scale T^2; None without targets."""
    hardness_N: Tensor | None
    weighted_sum: Tensor
    """Sum of alpha rho w KL, before normalisation; a negative estimate of a KL counts as 0."""
    plain_sum: Tensor
    """Sum of alpha rho KL, counted the same way."""
    gate_N: Tensor | None = None
    """rho; None without targets or gate."""


# -- cross-entropy and KL of each token --------------------------------------------------------------------------------


def cross_entropy_per_token(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """-log q(y) in nats, float32 [N]; rows labelled -100 are 0 and get a gradient of 0."""
    return F.cross_entropy(logits_NV.float(), labels_N, ignore_index=IGNORE, reduction="none")


class _HeadAndTail(torch.autograd.Function):
    """log q of K distinct tokens, and of all others together. Autograd alone would make four times the [N, V] tensors.

    With g the gradients that come in and G their sum, T dz_k = g_k - G q_k for the K tokens, and for the others
    T dz_j = (g_tail - G q_tail) q_j / q_tail, where q_j / q_tail is a softmax over the others alone. [ours]
    """

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, ids_NK: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        head_NK = logits_NV.gather(-1, ids_NK).float() / temperature
        # The tail's mass is summed: 1 - sum_k q_k loses all digits where the student is sure. In place, as V is large.
        tail_NV = logits_NV.to(torch.float32, copy=True).scatter_(-1, ids_NK, float("-inf"))
        top_N1 = tail_NV.amax(-1, keepdim=True)
        tail_NV.sub_(top_N1)
        if temperature != 1.0:
            tail_NV.div_(temperature)
        mass_N1 = tail_NV.exp_().sum(-1, keepdim=True)
        joined = torch.cat([head_NK, top_N1 / temperature], dim=-1)
        joined = joined - joined.amax(-1, keepdim=True)  # first: added to a large logit, the log would lose its digits
        joined[:, -1:] += mass_N1.log()
        log_q = torch.log_softmax(joined, dim=-1)
        ctx.save_for_backward(tail_NV, mass_N1, ids_NK, log_q)
        ctx.temperature, ctx.dtype = temperature, logits_NV.dtype
        return log_q[:, :-1], log_q[:, -1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NK: Tensor, grad_tail_N: Tensor) -> tuple[Tensor, None, None]:
        tail_NV, mass_N1, ids_NK, log_q = ctx.saved_tensors
        grad = torch.cat([grad_NK, grad_tail_N[:, None]], dim=-1) / ctx.temperature
        grad = grad - grad.sum(-1, keepdim=True) * log_q.exp()
        grad_NV = tail_NV * (grad[:, -1:] / mass_N1)
        return grad_NV.scatter_(-1, ids_NK, grad[:, :-1]).to(ctx.dtype), None, None


def _head_and_tail(logits_NV: Tensor, ids_NK: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    log_q_NK, log_q_tail_N = _HeadAndTail.apply(logits_NV, ids_NK, temperature)  # type: ignore[no-untyped-call]
    return log_q_NK, log_q_tail_N


def sparse_kl_per_token(
    student_logits_NV: Tensor,
    ids_NK: Tensor,
    logprobs_NK: Tensor,
    tail_logprob_N: Tensor,
    temperature: float = 1.0,
) -> Tensor:
    """KL(teacher || student) per token in nats, the teacher's unstored tail kept as one bucket.

        T^2 [ sum_k p_k (log p_k - log q_k) + p_tail (log p_tail - log q_tail) ]

    A lower bound of the full KL (log-sum inequality), equal when the tail is one token. T^2 keeps the gradient's size
    independent of T [published: Hinton 2015, arXiv:1503.02531, sec. 2].

    Args:
        student_logits_NV: raw logits, any float dtype; computed in float32.
        ids_NK: int64 in [0, V), distinct within a row, K < V.
        logprobs_NK: natural-log probabilities at `temperature`, not renormalised.
        tail_logprob_N: log of the mass outside the top K; -inf if there is none.
        temperature: the temperature the targets were made at.

    Raises:
        ValueError: K >= V, or ids and log-probabilities disagree in shape.
    """
    num_vocab, top_k = student_logits_NV.shape[-1], ids_NK.shape[-1]
    if top_k >= num_vocab:
        raise ValueError(f"top_k ({top_k}) must be smaller than the vocabulary ({num_vocab})")
    if ids_NK.shape != logprobs_NK.shape:
        raise ValueError(
            f"teacher ids {tuple(ids_NK.shape)} and log-probabilities {tuple(logprobs_NK.shape)} differ in shape"
        )
    log_q_NK, log_q_tail_N = _head_and_tail(student_logits_NV, ids_NK, temperature)
    log_q = torch.cat([log_q_NK, log_q_tail_N[:, None]], dim=-1)
    log_p = torch.cat([logprobs_NK, tail_logprob_N[:, None]], dim=-1).float()
    p = log_p.exp()
    return temperature**2 * torch.where(p > 0, p * (log_p - log_q), 0.0).sum(dim=-1)


def sampled_kl_per_token(
    student_logits_NV: Tensor, ids_NK: Tensor, logprobs_NK: Tensor, entropy_N: Tensor, temperature: float = 1.0
) -> Tensor:
    """KL(teacher || student) per token in nats, estimated without bias from tokens drawn from the teacher.

        T^2 [ -sum_k p^_k log q_k - H(p) ],  p^_k = draws of token k / all draws

    Gradient and value are unbiased; those of a truncated top K are not [published: sparse logit sampling, ACL 2025].
    The entropy is H(p), not H(p^), with which the KL would be wrong (METHOD section 2). One token's estimate can be
    negative.

    Args:
        student_logits_NV: raw logits, any float dtype; computed in float32.
        ids_NK: int64 in [0, V); entries with log-probability -inf are padding and may repeat.
        logprobs_NK: log p^.
        entropy_N: H(p) in nats over the whole vocabulary, at `temperature`.
        temperature: the temperature the targets were made at.
    """
    log_q_NK = torch.log_softmax(student_logits_NV.float() / temperature, dim=-1).gather(-1, ids_NK)
    p_NK = logprobs_NK.float().exp()
    cross_entropy_N = -torch.where(p_NK > 0, p_NK * log_q_NK, 0.0).sum(dim=-1)
    return temperature**2 * (cross_entropy_N - entropy_N.float())


def _kl_per_token(logits_NV: Tensor, targets: SoftTargets, temperature: float) -> Tensor:
    if targets.sampled:
        return sampled_kl_per_token(logits_NV, targets.ids, targets.logprobs, targets.entropy, temperature)
    return sparse_kl_per_token(logits_NV, targets.ids, targets.logprobs, targets.tail_logprob, temperature)


# -- hardness and weights of each token --------------------------------------------------------------------------------
# All of them are numbers that weigh the loss, without a gradient of their own.


def token_hardness(kl_N: Tensor) -> Tensor:
    """h = sqrt(1 - exp(-KL)) in [0, 1): Bretagnolle-Huber bound on total variation [published]; as hardness [ours].

    `kl_N` in nats at the targets' temperature, without the T^2.
    """
    return torch.sqrt((-torch.expm1(-kl_N.clamp(min=0))).clamp(0, 1))


def learnability_gate(ce_student_N: Tensor, ce_teacher_N: Tensor, scale: float) -> Tensor:
    """rho = min(1, 2 sigmoid((CE_student - CE_teacher) / s + 2)) in [0, 1]: 0 where the teacher itself is wrong.

    It stays at 1 until the teacher is worse than the student on the data's token by about 2 s nats. The data's token is
    one draw of many possible ones, so a teacher that gives it a little less probability need not be wrong. [published
    idea: excess loss, Rho-1, arXiv:2404.07965; its shape and margin ours]
    """
    return (2 * torch.sigmoid((ce_student_N - ce_teacher_N) / scale + GATE_MARGIN)).clamp(max=1)


def chased_nats(kl_N: Tensor, gate_N: Tensor | None) -> Tensor:
    """r = rho min(KL, 6) in nats: how far a token is from the teacher, as far as the teacher is worth following.

    In nats, because what a step can gain on a token grows with its KL: |q - p|_1 <= sqrt(2 KL) [published: Pinsker];
    as hardness, and its bound, ours. `kl_N` at the targets' temperature, without the T^2.
    """
    nats_N = kl_N.clamp(0, MOST_NATS)
    return nats_N if gate_N is None else nats_N * gate_N


def token_tilt(hardness_N: Tensor, beta: float) -> Tensor:
    """exp(beta (2h - 1)): hard tokens weigh more for beta > 0, less for beta < 0, and as much as others at 0. [ours]"""
    return torch.exp(beta * (2 * hardness_N - 1))


# -- the loss ----------------------------------------------------------------------------------------------------------
# Sums, never means: the caller divides once, by a count over the global batch.


def distillation_loss(
    logits_NV: Tensor,
    labels_N: Tensor,
    targets: SoftTargets | None,
    alpha_N: Tensor | float,
    *,
    temperature: float = 1.0,
    gate_scale: float | None = None,
    beta: float = 0.0,
    normaliser: float = 1.0,
) -> DistillationTerms:
    """sum_t [(1 - alpha rho) CE + alpha rho (w / normaliser) KL], no gradient through rho and w (METHOD section 7).

    alpha = 0 everywhere is exactly SFT; no gate, beta 0 and normaliser 1 is exactly vanilla KD.

    Args:
        logits_NV: student logits of the rows that predict `labels_N`.
        labels_N: int64; rows labelled -100 add nothing.
        targets: one row per token; None needs alpha 0 everywhere. Rows with alpha 0 may hold anything finite.
        alpha_N: share of the KL term, in [0, 1]; a number holds for all tokens.
        temperature: the one that the targets were made at.
        gate_scale: s of the learnability gate in nats; None turns the gate off (rho = 1).
        beta: tilt on token hardness.
        normaliser: mean weight of past global batches (`WeightNormaliser`).

    Raises:
        ValueError: alpha > 0 without targets, or targets with another number of rows.
    """
    ce_N = cross_entropy_per_token(logits_NV, labels_N)
    alpha_N = torch.where(labels_N == IGNORE, 0.0, alpha_N)
    if targets is None:
        if bool((alpha_N > 0).any()):
            raise ValueError("alpha > 0 needs soft targets, and there are none")
        zero = ce_N.new_zeros(())
        return DistillationTerms(ce_N.sum(), ce_N.detach(), None, None, zero, zero)
    if len(targets) != len(labels_N):
        raise ValueError(f"soft targets have {len(targets)} rows, the logits have {len(labels_N)}")
    kl_N = _kl_per_token(logits_NV, targets, temperature)
    with torch.no_grad():
        hardness_N = token_hardness(kl_N / temperature**2)
        weight_N, gate_N = token_tilt(hardness_N, beta), None
        if gate_scale is not None:
            # Both sides at the targets' temperature, so that the gate compares like with like. [ours]
            student_N = ce_N if temperature == 1.0 else cross_entropy_per_token(logits_NV / temperature, labels_N)
            gate_N = learnability_gate(student_N, -targets.gold_logprob, gate_scale)
            alpha_N = alpha_N * gate_N
    distilled_N = torch.where(alpha_N > 0, alpha_N * (weight_N / normaliser) * kl_N, 0.0)
    loss_sum = ((1 - alpha_N) * ce_N + distilled_N).sum()
    plain_N = torch.where(alpha_N > 0, alpha_N * kl_N.detach().clamp(min=0), 0.0)
    weighted_sum, plain_sum = (plain_N * weight_N).sum(), plain_N.sum()
    return DistillationTerms(loss_sum, ce_N.detach(), kl_N.detach(), hardness_N, weighted_sum, plain_sum, gate_N)


def feature_loss(
    mapped_JR: Tensor, sketch_JR: Tensor, alpha_J: Tensor, *, beta: float = 0.0, normaliser: float = 1.0
) -> FeatureTerms:
    """sum_j alpha (f / normaliser) g, g = (1 - cos(W q, R p)) / 2 in [0, 1], f = exp(beta (2g - 1)) without gradient.

    [cosine feature distillation is standard; g as hardness, and the tilt on it: ours; METHOD sections 3 and 7]

    Args:
        mapped_JR: the student's features through W.
        sketch_JR: the teacher's sketches R p.
        alpha_J: share of the feature term, in [0, 1].
        beta: tilt on g.
        normaliser: mean weight of past global batches (`WeightNormaliser`).
    """
    distance_J = (1 - F.cosine_similarity(mapped_JR.float(), sketch_JR, dim=-1)) / 2
    fixed_J = distance_J.detach()
    weight_J = token_tilt(fixed_J, beta)
    loss_sum = (alpha_J * (weight_J / normaliser) * distance_J).sum()
    plain_J = alpha_J * fixed_J
    return FeatureTerms(loss_sum, fixed_J, (plain_J * weight_J).sum(), plain_J.sum())


class WeightNormaliser:
    """Running mean of the KL weights of *previous* global batches; dividing by it keeps the size of the KL term.

    In the mean a token counts by its share of the unweighted KL term. If all tokens counted the same, the many tokens
    on which nothing is left to learn would decide the mean, and a tilt towards easy tokens would make the KL of all
    others vanish. [ours]

    Why not the mean over the current global batch: under gradient accumulation it is known only after the last forward,
    but needed in the first backward. The mean over the past depends on the training state alone; it is the same for
    every split into ranks and micro-batches, and is part of the checkpoint. [ours]
    """

    def __init__(self) -> None:
        self._mean: float | None = None

    @property
    def value(self) -> float:
        """The divisor for the next step: 1 before anything was seen."""
        return 1.0 if self._mean is None else self._mean

    def update(self, weighted_sum: float, plain_sum: float) -> None:
        """Take in one global batch's weighted and unweighted term; nothing if there is none."""
        if plain_sum <= 0:
            return
        mean = weighted_sum / plain_sum
        self._mean = mean if self._mean is None else NORMALISER_EMA * self._mean + (1 - NORMALISER_EMA) * mean

    def state_dict(self) -> dict[str, float | None]:
        """For the checkpoint."""
        return {"mean": self._mean}

    def load_state_dict(self, state: dict[str, float | None]) -> None:
        """Restore from the checkpoint."""
        self._mean = state["mean"]


# -- routers -----------------------------------------------------------------------------------------------------------


def balance_loss(router_logits_TE: Tensor, valid_T: Tensor, fractions_E: Tensor) -> Tensor:
    """One layer's load-balance loss as a sum over valid tokens: E sum_e f_e P_e after division by their number.

    1 when perfectly balanced, E / top_k when one set of top_k experts takes all. `fractions_E`: share of the routed
    assignments each expert received over the whole micro-step, all ranks, summing to 1; no gradient flows through it.
    [published: Switch, arXiv:2101.03961; per layer, padding excluded: ours]
    """
    probabilities_TE = torch.softmax(router_logits_TE.float(), dim=-1)
    per_token_T = router_logits_TE.shape[-1] * (probabilities_TE * fractions_E.detach()).sum(-1)
    return torch.where(valid_T, per_token_T, 0.0).sum()


def router_z_loss(router_logits_TE: Tensor, valid_T: Tensor) -> Tensor:
    """Sum over valid tokens of logsumexp(router logits)^2 [published: ST-MoE, arXiv:2202.08906]."""
    z_T = torch.logsumexp(router_logits_TE.float(), dim=-1) ** 2
    return torch.where(valid_T, z_T, 0.0).sum()


def router_entropy(router_logits_TE: Tensor, valid_T: Tensor) -> Tensor:
    """Sum over valid tokens of the router distribution's entropy in nats; a measure, not a loss."""
    log_p_TE = torch.log_softmax(router_logits_TE.float(), dim=-1)
    entropy_T = -(log_p_TE.exp() * log_p_TE).sum(-1)
    return torch.where(valid_T, entropy_T, 0.0).sum()
