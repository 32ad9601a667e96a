"""Soft targets of made-up teachers, drawn at random and the same every time."""

import torch

from pipeline.targets.codecs import CODECS, Spec
from pipeline.targets.soft_targets import draw_offsets, drawn_from_logits, from_logits


def peaky_logits(tokens, vocab, seed=0):
    """Like a language model's: most of the mass on a few tokens, mean top-1 probability about 0.75."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2.0 * torch.randn(tokens, vocab, generator=generator)
    sharpness = 8.0 + 12.0 * torch.rand(tokens, 1, generator=generator)
    winners = torch.randint(vocab, (tokens, 6), generator=generator)
    return logits.scatter_add(-1, winners, sharpness * torch.rand(tokens, 6, generator=generator) + 4.0)


def random_targets(tokens, vocab, top_k, seed=0, temperature=1.0):
    logits = peaky_logits(tokens, vocab, seed)
    gold = torch.randint(vocab, (tokens,), generator=torch.Generator().manual_seed(seed))
    return from_logits(logits, gold, top_k, temperature)


def zipf_logits(tokens, vocab, seed=0):
    """Log-probs fall with the logarithm of the rank, each row at its own slope; mean top-1 probability about 0.75."""
    generator = torch.Generator().manual_seed(seed)
    slope = torch.empty(tokens, 1).uniform_(0.1, 2.08, generator=generator).exp()
    rank = torch.rand(tokens, vocab, generator=generator).argsort(-1) + 1
    return -slope * rank.log() + 0.3 * torch.randn(tokens, vocab, generator=generator)


def random_draws(tokens, vocab, draws, seed=0):
    gold = torch.zeros(tokens, dtype=torch.long)
    return drawn_from_logits(zipf_logits(tokens, vocab, seed), gold, draws, 1.0, draw_offsets(f"seed {seed}", tokens))


def counts_of(targets, draws, vocab):
    """i64[T, V] of sampled targets."""
    counts = (targets.logprobs.double().exp() * draws).round().long()
    return torch.zeros(len(targets), vocab, dtype=torch.long).scatter_add(-1, targets.ids, counts)


def roundtrip(targets, vocab, codec="packed", bits=None):
    spec = Spec(vocab, targets.top_k, bits or CODECS[codec].default_bits)
    return CODECS[codec].decode(CODECS[codec].encode(targets, spec), len(targets), spec)
