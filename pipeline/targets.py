"""Soft targets of a teacher: a sparse view of its distribution at every answer token, made from logits.

Shape suffixes: T = answer tokens (`<|im_end|>` included, in order), V = vocabulary, K = entries a token, N = draws.
Everything is in nats, at the softmax temperature the targets were made with. `codecs` turns them into bytes.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import xxhash
from torch import Tensor

from pipeline.errors import StoreError


@dataclass(frozen=True, slots=True)
class SoftTargets:
    """What is kept of the teacher's distribution p, one row per answer token [METHOD section 1].

    Either the top K with the mass of the rest, or draws from p with their shares. Ranks descend: column 0 holds the
    most probable token, or the one drawn most often. Head and tail together sum to 1.
    """

    ids: Tensor
    """i64[T, K], distinct within a row (but for padding)."""
    logprobs: Tensor
    """f32[T, K], log p of `ids`; of sampled targets log of an id's share of the draws, -inf where a row is padded."""
    tail_logprob: Tensor
    """f32[T], log of the mass outside the top K; -inf if there is none, and of sampled targets."""
    gold_logprob: Tensor
    """f32[T], log p of the token that the data set has."""
    entropy: Tensor
    """f32[T], H(p) over the whole vocabulary."""
    sampled: bool = False
    """The rows are draws: an unbiased estimate of p, not its head. KL(p || q) is then -sum_k share log q - entropy."""

    def __len__(self) -> int:
        return self.ids.shape[0]

    @property
    def top_k(self) -> int:
        """K, entries kept per token."""
        return self.ids.shape[1]

    def rows(self, index: slice | Tensor) -> "SoftTargets":
        """The selected rows, as views where the index allows it."""
        return self.each(lambda tensor: tensor[index])

    def split(self, counts: Sequence[int]) -> list["SoftTargets"]:
        """Views of so many rows each, one behind the other."""
        ends = list(itertools.accumulate(counts))
        return [self.rows(slice(begin, end)) for begin, end in zip([0, *ends], ends, strict=False)]

    def to(self, device: torch.device | str) -> "SoftTargets":
        """The same targets on another device."""
        return self.each(lambda tensor: tensor.to(device))

    def padded(self, top_k: int) -> "SoftTargets":
        """Sampled targets with more columns, which no draw fell on."""
        more = (0, top_k - self.top_k)
        ids, shares = F.pad(self.ids, more), F.pad(self.logprobs, more, value=float("-inf"))
        return SoftTargets(ids, shares, self.tail_logprob, self.gold_logprob, self.entropy, self.sampled)

    def each(self, change: Callable[[Tensor], Tensor]) -> "SoftTargets":
        """The same targets with every tensor changed."""
        ids, logprobs, tail, gold, entropy = map(change, self._tensors())
        return SoftTargets(ids, logprobs, tail, gold, entropy, self.sampled)

    def _tensors(self) -> tuple[Tensor, ...]:
        return self.ids, self.logprobs, self.tail_logprob, self.gold_logprob, self.entropy


def clipped_top_k(top_k: int, vocab_size: int) -> int:
    """Entries kept of a vocabulary: at most V - 1, so that the tail is never an empty set."""
    return min(top_k, vocab_size - 1)


def from_logits(logits_TV: Tensor, gold_T: Tensor, top_k: int, temperature: float) -> SoftTargets:
    """Keep the top K of softmax(logits / temperature), the exact tail mass, log p(gold) and H(p).

    Args:
        logits_TV: any float dtype, computed in float32; row t is the one that *predicts* gold_T[t].
        gold_T: i64, the data set's tokens.
        top_k: clipped to V - 1.
        temperature: > 0; a truncated tail cannot be re-tempered afterwards.

    Raises:
        StoreError: a row has no finite maximum (NaN, or infinite logits).
    """
    log_p_TV = _log_softmax(logits_TV, temperature)
    gold_logprob_T, entropy_T = _gold_and_entropy(log_p_TV, gold_T)
    logprobs_TK, ids_TK = log_p_TV.topk(clipped_top_k(top_k, log_p_TV.shape[-1]), dim=-1)
    # Exact tail: 1 - sum_k p_k would cancel once the teacher is sharp.
    tail_T = log_p_TV.scatter_(-1, ids_TK, float("-inf")).logsumexp(dim=-1)
    return SoftTargets(ids_TK, logprobs_TK, tail_T, gold_logprob_T, entropy_T)


def drawn_from_logits(
    logits_TV: Tensor, gold_T: Tensor, draws: int, temperature: float, offsets_T: Tensor
) -> SoftTargets:
    """N draws with replacement from softmax(logits / temperature), as shares of ids; exact log p(gold) and H(p).

    The gradient of the cross-entropy to the shares is an unbiased estimate of the one to p [published: random sampling
    KD, arXiv:2503.16870]. Draw n is p's quantile at (n + u) / N with one u a row, so a token is drawn floor(N p) or
    ceil(N p) times: less noise than independent draws [published: systematic sampling, Kitagawa 1996; here ours].

    Args:
        logits_TV, gold_T, temperature: as in `from_logits`.
        draws: N.
        offsets_T: u in [0, 1), f64; a function of the sample and the token alone (`draw_offsets`).

    Raises:
        StoreError: a row has no finite maximum (NaN, or infinite logits).
    """
    log_p_TV = _log_softmax(logits_TV, temperature)
    gold_logprob_T, entropy_T = _gold_and_entropy(log_p_TV, gold_T)
    # In integers: a sum of floats would depend on the order of adding. The scaling by 2^40 is exact.
    mass_TV = (log_p_TV.exp_() * 2.0**40).long().cumsum(dim=-1)
    quantile_TN = (torch.arange(draws, device=offsets_T.device) + offsets_T[:, None]) / draws
    total_T1 = mass_TV[:, -1:]
    # u close to 1 may be rounded up to the next draw's place, the last one's beyond the end.
    ids_TN = torch.searchsorted(mass_TV, (quantile_TN * total_T1).long().minimum(total_T1 - 1), right=True)
    ids_TK, counts_TK = _counted(ids_TN)
    nothing_T = torch.full_like(entropy_T, float("-inf"))
    return SoftTargets(ids_TK, (counts_TK / draws).log(), nothing_T, gold_logprob_T, entropy_T, sampled=True)


def draw_offsets(sample_id: str, tokens: int) -> Tensor:
    """u of each answer token for `drawn_from_logits`, f64[T] in [0, 1): the same in every run and batch."""
    hashes = (xxhash.xxh3_64_intdigest(f"{sample_id}\n{t}") for t in range(tokens))
    return torch.tensor([(h >> 11) * 2.0**-53 for h in hashes], dtype=torch.float64)


def _counted(ids_TN: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct ids [T, K] and their counts of rows that ascend; most frequent first, then by id. Padded with 0, 0."""
    is_new_TN = torch.ones_like(ids_TN)
    is_new_TN[:, 1:] = ids_TN[:, 1:] != ids_TN[:, :-1]
    slot_TN = is_new_TN.cumsum(dim=1) - 1
    width = int(slot_TN.max()) + 1 if len(ids_TN) else 1
    empty_TK = ids_TN.new_zeros(len(ids_TN), width)
    counts_TK = empty_TK.scatter_add(1, slot_TN, torch.ones_like(ids_TN))
    counts_TK, order_TK = counts_TK.sort(dim=1, descending=True, stable=True)
    return empty_TK.scatter(1, slot_TN, ids_TN).gather(1, order_TK), counts_TK


def _log_softmax(logits_TV: Tensor, temperature: float) -> Tensor:
    log_p_TV = torch.log_softmax(logits_TV.float() / temperature, dim=-1)
    if not torch.isfinite(log_p_TV.amax(dim=-1)).all():
        raise StoreError("the teacher's logits are not finite, so they are no distribution")
    return log_p_TV


def _gold_and_entropy(log_p_TV: Tensor, gold_T: Tensor) -> tuple[Tensor, Tensor]:
    """log p(gold) and H(p), both [T]."""
    return log_p_TV.gather(-1, gold_T[:, None])[:, 0], torch.special.entr(log_p_TV.exp()).sum(dim=-1)


def concatenate(parts: Sequence[SoftTargets]) -> SoftTargets:
    """Rows of all parts in order. K must agree; sampled parts are padded to the widest.

    Raises:
        StoreError: nothing to concatenate, parts with different K, or sampled and other parts.
    """
    if len({part.sampled for part in parts}) > 1:
        raise StoreError("sampled and top-k soft targets cannot be joined")
    widths = sorted({part.top_k for part in parts})
    if len(widths) > 1 and parts[0].sampled:
        parts, widths = [part.padded(widths[-1]) for part in parts], widths[-1:]
    if len(widths) != 1:
        raise StoreError(f"soft targets can be joined only at one top_k, got {widths or 'no parts'}")
    columns = zip(*(part._tensors() for part in parts), strict=True)
    ids, logprobs, tail, gold, entropy = map(torch.cat, columns)
    return SoftTargets(ids, logprobs, tail, gold, entropy, parts[0].sampled)
