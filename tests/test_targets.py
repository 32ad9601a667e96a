import math

import pytest
import torch
import torch.nn.functional as F

from pipeline.errors import StoreError
from pipeline.targets import (
    CODECS,
    LOGPROB_FLOOR,
    SoftTargets,
    clipped_top_k,
    concatenate,
    from_logits,
    id_bits,
)

CODEC = CODECS["packed8"]
QWEN_VOCAB = 151_936


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


def roundtrip(targets, vocab):
    return CODEC.decode(CODEC.encode(targets, vocab), targets.top_k, vocab)


def sparse_kl(targets, student_logits, temperature=1.0):
    """Independent of pipeline.losses: float64, the tail as one more class."""
    log_q = F.log_softmax(student_logits.double() / temperature, -1)
    log_q_tail = log_q.scatter(-1, targets.ids, -math.inf).logsumexp(-1, keepdim=True)
    log_p = torch.cat([targets.logprobs, targets.tail_logprob[:, None]], -1).double()
    return F.kl_div(
        torch.cat([log_q.gather(-1, targets.ids), log_q_tail], -1), log_p, log_target=True, reduction="none"
    ).sum(-1)


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


def test_top_k_is_clipped_below_the_vocabulary():
    assert clipped_top_k(32, 20) == 19
    assert random_targets(3, 20, 32).ids.shape == (3, 19)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_refused(value):
    logits = torch.zeros(3, 10)
    logits[1, 4] = value
    with pytest.raises(StoreError, match="not finite"):
        from_logits(logits, torch.zeros(3, dtype=torch.long), 4, 1.0)


@pytest.mark.parametrize(
    ("vocab", "bits"), [(2, 1), (3, 2), (256, 8), (257, 9), (640, 10), (QWEN_VOCAB, 18), (1 << 25, 25)]
)
def test_ids_survive_at_every_width(vocab, bits):
    assert id_bits(vocab) == bits
    for top_k in [k for k in (1, 2, 7, 8, 9, 32) if k < vocab]:
        ids = torch.stack([torch.randperm(min(vocab, 1 << 16))[:top_k] + vocab - min(vocab, 1 << 16) for _ in range(5)])
        ids[0, 0], ids[-1, -1] = vocab - 1, 0
        targets = SoftTargets(ids, torch.full(ids.shape, -4.0), *torch.full((3, 5), -1.0))
        records = CODEC.encode(targets, vocab)
        assert records.shape == (5, math.ceil(top_k * bits / 8) + top_k + 10) == (5, CODEC.record_bytes(top_k, vocab))
        assert torch.equal(CODEC.decode(records, top_k, vocab).ids, ids)


def test_ids_are_a_plain_little_endian_bit_stream():
    """Independent packer: one Python integer per row."""
    targets = random_targets(4, QWEN_VOCAB, 11)
    packed = CODEC.encode(targets, QWEN_VOCAB)[:, :25]
    for row, ids in zip(packed, targets.ids.tolist(), strict=True):
        number = sum(token << (18 * slot) for slot, token in enumerate(ids))
        assert row.tobytes() == number.to_bytes(25, "little")


@pytest.mark.parametrize("top_k", [32, 64])
def test_the_stored_kl_is_within_a_hundred_thousandth_of_the_exact_one(top_k):
    exact = random_targets(256, 20_000, top_k)
    student = peaky_logits(256, 20_000) + 0.7 * torch.randn(256, 20_000, generator=torch.Generator().manual_seed(9))
    stored = roundtrip(exact, 20_000)
    assert 0.6 < exact.logprobs[:, 0].exp().mean() < 0.9
    kl_exact, kl_stored = sparse_kl(exact, student), sparse_kl(stored, student)
    assert kl_exact.mean() > 0.05
    state_error = sparse_kl_between(exact, stored)
    assert 0 <= state_error < 2e-5
    assert (kl_stored - kl_exact).mean().abs() / kl_exact.mean() < 2e-3
    assert kl_stored.min() >= -1e-6  # hardness takes sqrt(1 - exp(-KL))


def sparse_kl_between(exact, stored):
    """Mean KL(exact || stored) over the K entries and the tail."""
    p, q = (torch.cat([t.logprobs, t.tail_logprob[:, None]], -1).double() for t in (exact, stored))
    return F.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean().item()


def test_decoded_targets_are_a_distribution_in_descending_order():
    stored = roundtrip(random_targets(500, 700, 32), 700)
    total = torch.logaddexp(stored.logprobs.logsumexp(-1), stored.tail_logprob)
    assert total.abs().max() < 1e-6
    assert (stored.logprobs.diff(dim=-1) <= 0).all()


def test_the_tail_entropy_and_gold_survive():
    """Renormalising the head instead would change the KL beyond recognition: the tail must come back."""
    exact = random_targets(500, 5000, 4)
    stored = roundtrip(exact, 5000)
    assert exact.tail_logprob.exp().max() > 0.3
    torch.testing.assert_close(stored.tail_logprob, exact.tail_logprob, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(stored.entropy, exact.entropy, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(stored.gold_logprob, exact.gold_logprob, rtol=1e-3, atol=1e-3)


def test_extreme_teachers_are_stored_without_nan():
    logits = torch.full((3, 40), -1e9)
    logits[0, :2] = 0.0  # no tail, impossible head entries
    logits[1] = 0.0  # uniform: range 0
    logits[2, 3] = 90.0  # one certain token
    logits[2, 4:20] = -math.inf
    stored = roundtrip(from_logits(logits, torch.tensor([39, 5, 3]), 8, 1.0), 40)
    assert not any(
        torch.isnan(getattr(stored, name)).any() for name in ("logprobs", "tail_logprob", "gold_logprob", "entropy")
    )
    assert stored.logprobs[0, :2].exp().sum() == pytest.approx(1.0, abs=1e-6)
    assert stored.logprobs[0, 2] == pytest.approx(math.log(0.5) - LOGPROB_FLOOR, abs=0.1)
    torch.testing.assert_close(stored.logprobs[1].exp(), torch.full((8,), 1 / 40), rtol=1e-3, atol=0)
    assert stored.logprobs[2, 0] == pytest.approx(0.0, abs=1e-6)


def test_rows_do_not_depend_on_the_rows_beside_them():
    """9,001 rows cross the codec's internal chunks."""
    targets = random_targets(9001, 640, 4)
    whole = CODEC.encode(targets, 640)
    assert (CODEC.encode(targets.rows(slice(8000, 8010)), 640) == whole[8000:8010]).all()
    assert torch.equal(CODEC.decode(whole, 4, 640).logprobs[4095:4097], CODEC.decode(whole[4095:4097], 4, 640).logprobs)


def test_no_tokens_are_fine():
    empty = random_targets(3, 50, 4).rows(slice(0, 0))
    assert roundtrip(empty, 50).ids.shape == (0, 4)


def test_concatenate_keeps_order_and_refuses_mixed_widths():
    a, b = random_targets(3, 50, 4, seed=1), random_targets(2, 50, 4, seed=2)
    assert torch.equal(concatenate([a, b]).ids, torch.cat([a.ids, b.ids]))
    with pytest.raises(StoreError, match=r"one top_k, got \[4, 5\]"):
        concatenate([a, random_targets(2, 50, 5)])


@pytest.mark.parametrize(("vocab", "message"), [(30, "do not fit"), (4, r"must lie in \[1, 3\]")])
def test_targets_of_a_larger_vocabulary_are_refused(vocab, message):
    targets = random_targets(64, 50, 4)
    with pytest.raises(StoreError, match=message):
        CODEC.encode(targets, vocab)


def test_records_of_another_width_are_refused():
    records = CODEC.encode(random_targets(3, 50, 4), 50)
    with pytest.raises(StoreError, match=r"\(3, 17\); top_k 5 and V 50 take 19 bytes"):
        CODEC.decode(records, 5, 50)
