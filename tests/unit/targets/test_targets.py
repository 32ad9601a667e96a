import math

import pytest
import torch

from pipeline.errors import StoreError
from pipeline.targets import soft_targets as targets_module
from pipeline.targets.soft_targets import clipped_top_k, concatenate, draw_offsets, drawn_from_logits, from_logits
from pipeline.training.batches import _inert
from tests.helpers.soft_targets import counts_of, peaky_logits, random_draws, random_targets


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_from_logits_equals_the_dense_distribution(temperature):
    logits, gold = peaky_logits(9, 50), torch.arange(9)
    p = (logits.double() / temperature).softmax(-1)
    targets = from_logits(logits, gold, 5, temperature)
    for t in range(9):
        order = p[t].argsort(descending=True)
        assert targets.ids[t].tolist() == order[:5].tolist()
        torch.testing.assert_close(targets.logprobs[t].double(), p[t, order[:5]].log(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(targets.tail_logprob[t].double(), p[t, order[5:]].sum().log(), rtol=1e-5, atol=1e-6)
    dense = torch.distributions.Categorical(p)
    torch.testing.assert_close(targets.entropy.double(), dense.entropy(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(targets.gold_logprob.double(), dense.log_prob(gold), rtol=1e-5, atol=1e-6)


def test_the_tail_of_a_sharp_teacher_is_not_lost_to_cancellation():
    logits = torch.zeros(1, 1000)
    logits[0, 0] = 40.0
    exact = math.log(995) - 40.0  # 1 - sum of the head would be 0 in float32
    assert from_logits(logits, torch.zeros(1, dtype=torch.long), 5, 1.0).tail_logprob.item() == pytest.approx(
        exact, rel=1e-5
    )


def test_a_tail_or_a_gold_token_too_improbable_for_float32_keeps_its_logprob():
    logits = torch.zeros(3, 100)
    logits[0, :2] = torch.tensor([250.0, 240.0])
    logits[1, 4:] = -math.inf  # fewer finite logits than entries kept, and nothing left for the tail
    logits[2, 0], logits[2, 50:] = 100.0, -math.inf
    targets = from_logits(logits, torch.tensor([9, 50, 9]), 6, 2.0)
    gold = -125 - math.log1p(math.exp(-5))
    assert targets.gold_logprob.tolist() == pytest.approx([gold, -math.inf, -50], rel=1e-5)
    assert targets.tail_logprob.tolist() == pytest.approx([math.log(94) + gold, -math.inf, math.log(44) - 50], rel=1e-5)
    assert targets.entropy.tolist() == pytest.approx([0.0401796, math.log(4), 0], rel=1e-4, abs=1e-6)
    assert targets.logprobs[1].tolist() == pytest.approx(4 * [-math.log(4)] + 2 * [-math.inf])


def test_entries_of_a_large_vocabulary_are_found_wherever_they_lie():
    """Blocks whose maxima count, and columns behind the last whole block."""
    vocab = 64 * 40 + 17
    logits = peaky_logits(30, vocab)
    logits[0, -3:], logits[1, 64:70], logits[2] = 90.0, 90.0, 1.5  # in the rest; many in one block; all alike
    targets = from_logits(logits, torch.zeros(30, dtype=torch.long), 9, 1.0)
    log_p = logits.double().log_softmax(-1)
    torch.testing.assert_close(targets.logprobs.double(), log_p.topk(9).values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(targets.logprobs.double(), log_p.gather(-1, targets.ids), rtol=1e-5, atol=1e-5)
    assert all(len(set(row)) == 9 for row in targets.ids.tolist())


def test_pieces_of_rows_change_nothing(monkeypatch):
    logits, gold, offsets = peaky_logits(11, 3000), torch.arange(11), draw_offsets("x", 11)
    ways = (lambda: from_logits(logits, gold, 8, 1.5), lambda: drawn_from_logits(logits, gold, 20, 1.5, offsets))
    whole = [way() for way in ways]
    monkeypatch.setattr(targets_module, "PIECE_ELEMENTS", {"cpu": 4 * 3000 + 1})
    for way, wanted in zip(ways, whole, strict=True):
        for name in ("ids", "logprobs", "tail_logprob", "gold_logprob", "entropy"):
            assert torch.equal(getattr(way(), name), getattr(wanted, name)), name
    assert len(from_logits(logits[:0], gold[:0], 8, 1.0)) == 0


def test_top_k_is_clipped_below_the_vocabulary():
    assert clipped_top_k(32, 20) == 19
    assert random_targets(3, 20, 32).ids.shape == (3, 19)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_refused(value):
    logits = torch.zeros(3, 10)
    logits[1, 4] = value
    gold = torch.zeros(3, dtype=torch.long)
    with pytest.raises(StoreError, match="not finite"):
        from_logits(logits, gold, 4, 1.0)
    with pytest.raises(StoreError, match="not finite"):
        drawn_from_logits(logits, gold, 4, 1.0, draw_offsets("x", 3))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_every_token_is_drawn_as_often_as_its_probability_asks_for(temperature):
    """Counts against p itself, in float64: each is N p rounded down or up."""
    logits, draws = peaky_logits(40, 300), 50
    targets = drawn_from_logits(logits, torch.arange(40), draws, temperature, draw_offsets("x", 40))
    counts = counts_of(targets, draws, 300)
    expected = draws * (logits.double() / temperature).softmax(-1)
    assert (counts.sum(-1) == draws).all()
    assert (counts - expected).abs().max() < 1 + 1e-4
    assert targets.sampled and targets.tail_logprob.isinf().all()
    assert (targets.logprobs[:, 1:] <= targets.logprobs[:, :-1]).all()
    dense = from_logits(logits, torch.arange(40), 5, temperature)
    assert torch.equal(targets.gold_logprob, dense.gold_logprob)
    assert torch.equal(targets.entropy, dense.entropy)


def test_the_gradient_of_draws_is_unbiased():
    """Mean over many draws of q - share, against the dense q - p: within four standard errors everywhere.

    A count is N p rounded up with probability frac(N p): hence its standard error.
    """
    rows, draws, vocab = 3000, 12, 60
    teacher, student = peaky_logits(1, vocab, 3) / 4, peaky_logits(1, vocab, 4) / 4
    p, q = teacher.double().softmax(-1)[0], student.double().softmax(-1)[0]
    offsets = draw_offsets("many", rows)
    targets = drawn_from_logits(teacher.expand(rows, vocab), torch.zeros(rows).long(), draws, 1.0, offsets)
    gradient = q - counts_of(targets, draws, vocab).double() / draws
    error = gradient.mean(0) - (q - p)
    fraction = draws * p % 1
    standard_error = (fraction * (1 - fraction)).sqrt() / draws / rows**0.5
    assert (error.abs() <= 4 * standard_error).all()
    assert (error.abs() > standard_error / 4).sum() > vocab / 2  # it is a random thing, and the bound no loose one
    top = from_logits(teacher, torch.zeros(1).long(), 3, 1.0)
    assert (1 - top.logprobs.exp().sum()) > 0.05  # a top-k of this teacher would be biased


def test_systematic_draws_have_less_noise_than_independent_ones():
    rows, draws, vocab = 2000, 16, 100
    teacher = peaky_logits(1, vocab, 5) / 2
    p = teacher.softmax(-1)[0]
    ours = drawn_from_logits(teacher.expand(rows, vocab), torch.zeros(rows).long(), draws, 1.0, draw_offsets("n", rows))
    independent = torch.multinomial(p.expand(rows, vocab), draws, replacement=True)
    other = torch.zeros(rows, vocab).scatter_add(-1, independent, torch.ones_like(independent, dtype=torch.float))

    def noise(counts):
        return (counts / draws - p).square().sum(-1).mean()

    assert noise(counts_of(ours, draws, vocab)) < 0.5 * noise(other)


def test_draws_depend_on_the_sample_and_token_alone():
    logits, gold = peaky_logits(9, 200), torch.zeros(9).long()
    whole = drawn_from_logits(logits, gold, 30, 1.0, draw_offsets("a", 9))
    part = drawn_from_logits(logits[4:7], gold[4:7], 30, 1.0, draw_offsets("a", 9)[4:7])
    assert torch.equal(counts_of(whole, 30, 200)[4:7], counts_of(part, 30, 200))
    other = drawn_from_logits(logits, gold, 30, 1.0, draw_offsets("b", 9))
    assert not torch.equal(counts_of(whole, 30, 200), counts_of(other, 30, 200))
    many = torch.cat([draw_offsets(str(i), 20) for i in range(200)])
    assert many.min() >= 0 and many.max() < 1 and abs(many.mean() - 0.5) < 0.02
    assert len(many.unique()) == len(many)


def test_draws_at_the_ends_of_the_unit_interval():
    """u = 0 and the largest u below 1: quantiles stay within the vocabulary."""
    logits = torch.full((2, 50), -40.0)
    logits[:, [0, 49]] = 0.0
    offsets = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    targets = drawn_from_logits(logits, torch.zeros(2).long(), 10, 1.0, offsets)
    assert targets.ids[:, :2].sort(-1).values.tolist() == [[0, 49]] * 2
    assert (counts_of(targets, 10, 50).sum(-1) == 10).all()
    assert (counts_of(targets, 10, 50)[:, [0, 49]].sum(-1) == 10).all()


def test_concatenate_keeps_order_and_refuses_mixed_widths():
    a, b = random_targets(3, 50, 4, seed=1), random_targets(2, 50, 4, seed=2)
    assert torch.equal(concatenate([a, b]).ids, torch.cat([a.ids, b.ids]))
    with pytest.raises(StoreError, match=r"one top_k, got \[4, 5\]"):
        concatenate([a, random_targets(2, 50, 5)])


def test_sampled_parts_are_padded_and_not_mixed_with_others():
    a, b = random_draws(3, 50, 2, seed=1), random_draws(2, 50, 40, seed=2)
    assert a.top_k < b.top_k
    joined = concatenate([a, b])
    assert joined.sampled and joined.top_k == b.top_k
    assert torch.equal(joined.ids[:3, : a.top_k], a.ids)
    assert joined.logprobs[:3, a.top_k :].eq(-math.inf).all()
    assert torch.equal(joined.rows(slice(3, 5)).to("cpu").logprobs, b.logprobs)
    released = concatenate([a, _inert(2, a)])  # of samples that are no longer distilled
    assert released.sampled and len(released) == 5
    assert released.logprobs[3:].exp().sum() == 0 and released.entropy[3:].sum() == 0
    with pytest.raises(StoreError, match="sampled and top-k"):
        concatenate([a, random_targets(2, 50, a.top_k)])
