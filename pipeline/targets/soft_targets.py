"""Soft targets of a teacher: a sparse view of its distribution at every answer token, made from logits.

Shape suffixes: T = answer tokens (`<|im_end|>` included, in order), t = some of them, V = vocabulary, K = entries a
token, N = draws, B = blocks of the vocabulary, C = candidates.
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

PIECE_ELEMENTS = {"cpu": 1 << 21}
"""Logits that are worked on at a time, in two float32 tensors. CPUs: what caches hold."""
PIECE_ELEMENTS_ELSEWHERE = 1 << 24
"""GPUs: not measured."""
_BLOCK = 64
"""Columns of which `_top_k` first takes the maximum alone."""
_LOWEST = -87.0
"""Distance below the top logit from which a token counts as e^-87: e^-88 is subnormal, and slow on CPUs."""
_THIN = 1e-30
"""Tail mass over the top token's, below which `_LOWEST` would be seen in it."""


# -- what is kept ------------------------------------------------------------------------------------------------------


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


# -- from logits -------------------------------------------------------------------------------------------------------


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

    def keep(rows: slice, room_2tV: Tensor) -> SoftTargets:
        logits_tV = logits_TV[rows].float()
        top_tK, ids_tK = _top_k(logits_tV, clipped_top_k(top_k, logits_tV.shape[-1]))
        view = _Softmax.of(logits_tV, top_tK[:, :1], temperature, room_2tV)
        gold_t, entropy_t = view.gold_and_entropy(gold_T[rows])
        return SoftTargets(ids_tK, view.logprobs(top_tK), view.logprob_outside(ids_tK), gold_t, entropy_t)

    return _in_pieces(keep, logits_TV)


def _top_k(values_TV: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """`values_TV.topk(top_k)`, several times faster for few of many: sought in the blocks with the largest maxima.

    A block that is left out has K others whose maxima are at least as large as all of it.
    """
    size = values_TV.shape[-1]
    blocks = size // _BLOCK
    if blocks <= 4 * top_k:
        values_TK, ids_TK = values_TV.topk(top_k, dim=-1)
        return values_TK, ids_TK
    whole, column = blocks * _BLOCK, torch.arange(size, device=values_TV.device)
    maxima_TB = values_TV[:, :whole].reshape(-1, blocks, _BLOCK).amax(dim=-1)
    chosen_TK = maxima_TB.topk(top_k, dim=-1, sorted=False).indices
    inside_TC = (chosen_TK[:, :, None] * _BLOCK + column[:_BLOCK]).flatten(1)
    candidates_TC = torch.cat([inside_TC, column[whole:].expand(len(values_TV), -1)], dim=1)
    values_TK, places_TK = values_TV.gather(-1, candidates_TC).topk(top_k, dim=-1)
    return values_TK, candidates_TC.gather(-1, places_TK)


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

    def keep(rows: slice, room_2tV: Tensor) -> SoftTargets:
        logits_tV, offsets_t = logits_TV[rows].float(), offsets_T[rows]
        view = _Softmax.of(logits_tV, logits_tV.amax(dim=-1, keepdim=True), temperature, room_2tV)
        # In integers: a sum of floats would depend on the order of adding. The scaling by 2^40 is exact.
        mass_tV = ((view.mass_TV / view.total_T1) * 2.0**40).long().cumsum(dim=-1)
        gold_t, entropy_t = view.gold_and_entropy(gold_T[rows])
        quantile_tN = (torch.arange(draws, device=offsets_t.device) + offsets_t[:, None]) / draws
        total_t1 = mass_tV[:, -1:]
        # u close to 1 may be rounded up to the next draw's place, the last one's beyond the end.
        ids_tN = torch.searchsorted(mass_tV, (quantile_tN * total_t1).long().minimum(total_t1 - 1), right=True)
        ids_tK, counts_tK = _counted(ids_tN)
        nothing_t = torch.full_like(entropy_t, float("-inf"))
        return SoftTargets(ids_tK, (counts_tK / draws).log(), nothing_t, gold_t, entropy_t, sampled=True)

    return _in_pieces(keep, logits_TV)


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


# -- softmax in pieces -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Softmax:
    """softmax(logits / temperature) of a few rows with one exponential a logit: all relative to the largest logit."""

    logits_TV: Tensor
    max_T1: Tensor
    temperature: float
    d_TV: Tensor
    """(logit - max) / temperature, at least `_LOWEST`."""
    mass_TV: Tensor
    """e^d"""
    total_T1: Tensor
    """Z: p is mass / Z."""

    @classmethod
    def of(cls, logits_TV: Tensor, max_T1: Tensor, temperature: float, room_2TV: Tensor) -> "_Softmax":
        """Of float32 logits; d and mass go to `room_2TV`. StoreError when a maximum is not finite."""
        if not torch.isfinite(max_T1).all():
            raise StoreError("the teacher's logits are not finite, so they are no distribution")
        d_TV = torch.sub(logits_TV, max_T1, out=room_2TV[0])
        if temperature != 1.0:
            d_TV.div_(temperature)
        d_TV.clamp_min_(_LOWEST)
        mass_TV = torch.exp(d_TV, out=room_2TV[1])
        return cls(logits_TV, max_T1, temperature, d_TV, mass_TV, mass_TV.sum(dim=-1, keepdim=True))

    def logprobs(self, logits: Tensor) -> Tensor:
        """Log-probabilities of some logits of each row."""
        return (logits - self.max_T1) / self.temperature - self.total_T1.log()

    def gold_and_entropy(self, gold_T: Tensor) -> tuple[Tensor, Tensor]:
        """log p(gold) and H(p) = log Z - sum(mass d) / Z, both [T]. Uses `d_TV` up."""
        weighted_T = self.d_TV.mul_(self.mass_TV).sum(dim=-1)
        total_T = self.total_T1[:, 0]
        gold_T1 = self.logits_TV.gather(-1, gold_T[:, None])
        return self.logprobs(gold_T1)[:, 0], total_T.log() - weighted_T / total_T

    def logprob_outside(self, ids_TK: Tensor) -> Tensor:
        """Log of the mass of all other ids [T], exactly: 1 - sum_k p_k would cancel. Uses `mass_TV` up."""
        mass_T = self.mass_TV.scatter_(-1, ids_TK, 0.0).sum(dim=-1)
        logprob_T = mass_T.log() - self.total_T1[:, 0].log()
        thin_T = mass_T < _THIN
        if thin_T.any():
            others_TV = self.logits_TV[thin_T].scatter(-1, ids_TK[thin_T], float("-inf"))
            distance_TV = (others_TV - self.max_T1[thin_T]) / self.temperature
            logprob_T[thin_T] = distance_TV.logsumexp(dim=-1) - self.total_T1[thin_T, 0].log()
        return logprob_T


@torch.no_grad()
def _in_pieces(keep: Callable[[slice, Tensor], SoftTargets], logits_TV: Tensor) -> SoftTargets:
    """What `keep` makes of t rows at a time, given the rows and room for two float32 tensors [t, V].

    All pieces use the same room: on CPUs the first use of fresh memory takes longer than the arithmetic.
    """
    num_rows, num_vocab = logits_TV.shape
    size = max(1, PIECE_ELEMENTS.get(logits_TV.device.type, PIECE_ELEMENTS_ELSEWHERE) // num_vocab)
    room = torch.empty(2, min(size, num_rows), num_vocab, device=logits_TV.device)
    parts = []
    for start in range(0, max(1, num_rows), size):
        rows = slice(start, min(start + size, num_rows))
        parts.append(keep(rows, room[:, : rows.stop - rows.start]))
    return concatenate(parts)


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
