import dataclasses
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from pipeline.errors import StoreError
from pipeline.recipe import TargetsConfig
from pipeline.targets.codecs import (
    CODECS,
    Spec,
    compact_bytes,
    id_bits,
    identity_of,
    low_bits,
    make_spec,
    packed_bytes,
    spec_of,
)
from pipeline.targets.packing import LOGPROB_FLOOR
from pipeline.targets.soft_targets import SoftTargets, from_logits
from tests.helpers.paths import ROOT
from tests.helpers.soft_targets import counts_of, peaky_logits, random_draws, random_targets, roundtrip, zipf_logits

QWEN_VOCAB = 151_936
TOP_K_CODECS = ("packed", "compact")


def sparse_kl(targets, student_logits, temperature=1.0):
    """Independent of pipeline.method.losses: float64, the tail as one more class."""
    log_q = F.log_softmax(student_logits.double() / temperature, -1)
    log_q_tail = log_q.scatter(-1, targets.ids, -math.inf).logsumexp(-1, keepdim=True)
    log_p = torch.cat([targets.logprobs, targets.tail_logprob[:, None]], -1).double()
    return F.kl_div(
        torch.cat([log_q.gather(-1, targets.ids), log_q_tail], -1), log_p, log_target=True, reduction="none"
    ).sum(-1)


def codec_error(exact, stored, vocab):
    """KL(exact || stored) [T] over the K entries and the tail, in float64; by id, whatever the order of ranks.

    Of measures: sum p log(p / q) - p + q, so that the float32 sum of p, which is not quite 1, adds nothing.
    """

    def dense(targets):
        empty = torch.full((len(targets), vocab), -math.inf, dtype=torch.float64)
        return empty.scatter(-1, targets.ids, targets.logprobs.double())

    p, q = dense(exact), dense(stored)
    assert torch.equal(p > -math.inf, (p > -math.inf) & (q > -math.inf))
    p, q = (torch.cat([d, t.tail_logprob.double()[:, None]], -1) for d, t in ((p, exact), (q, stored)))
    return torch.where(p > -math.inf, p.exp() * (p - q) - p.exp(), 0.0).sum(-1) + q.exp().sum(-1)


def cliff_logits(tokens, vocab, seed=0):
    """A few plausible tokens, then nothing for 12 nats: the widest step is not the first."""
    generator = torch.Generator().manual_seed(seed)
    plausible = torch.randint(2, 12, (tokens, 1), generator=generator)
    logits = torch.randn(tokens, vocab, generator=generator)
    raised = 18 + 1.5 * torch.randn(tokens, vocab, generator=generator)
    return torch.where(torch.arange(vocab) < plausible, raised, logits)


# -- ids ---------------------------------------------------------------------------------------------------


def shapes(drawn):
    """(vocabulary, K): every corner, and some drawn at random."""
    rng = np.random.default_rng(0)
    corners = [(2, 1), (3, 2), (4, 3), (257, 256), (256, 255), (QWEN_VOCAB, 32), (QWEN_VOCAB, 64), (200_000, 256)]
    for _ in range(drawn):
        vocab = int(np.exp(rng.uniform(np.log(3), np.log(200_000))))
        corners.append((vocab, int(rng.integers(1, min(vocab, 257)))))
    return corners


@pytest.mark.parametrize("codec", TOP_K_CODECS)
@pytest.mark.parametrize("drawn", [20, pytest.param(60, marks=pytest.mark.nightly)])
def test_any_shape_comes_back(codec, drawn):
    """Exact ids, ranks that descend, a distribution: for K from 1 to 256, V from 2 to 200,000, 4 to 8 bits."""
    for number, (vocab, top_k) in enumerate(shapes(drawn)):
        generator = torch.Generator().manual_seed(number)
        rows = int(torch.randint(1, 80, (), generator=generator))
        ids = torch.stack([torch.randperm(vocab, generator=generator)[:top_k] for _ in range(rows)])
        ids[0, 0], ids[-1, -1] = (vocab - 1, vocab - 1) if top_k == 1 or rows == 1 else (ids[0, 0], ids[-1, -1])
        steps = torch.rand(rows, top_k, generator=generator) * torch.rand(rows, 1, generator=generator) * 6
        steps[torch.rand(rows, top_k, generator=generator) < 0.2] = 0.0  # ties
        head = -steps.cumsum(-1)
        tail = head[:, -1:] + torch.randn(rows, 1, generator=generator)
        log_p = torch.cat([head, tail], -1).log_softmax(-1)
        singles = -torch.rand(2, rows, generator=generator)
        exact = SoftTargets(ids, log_p[:, :-1], log_p[:, -1].clone(), *singles)
        bits = 4 + number % 5
        stored = roundtrip(exact, vocab, codec, bits)
        where = f"V {vocab}, K {top_k}, {bits} bits"
        if codec == "packed":
            assert torch.equal(stored.ids, exact.ids), where
        assert torch.equal(stored.ids.sort(-1).values, exact.ids.sort(-1).values), where
        assert (stored.logprobs.diff(dim=-1) <= 0).all(), where
        total = torch.logaddexp(stored.logprobs.logsumexp(-1), stored.tail_logprob)
        assert total.abs().max() < 2e-6, where
        error = codec_error(exact, stored, vocab)
        assert error.min() > -1e-12 and error.max() < 0.05, where
        assert (stored.gold_logprob - exact.gold_logprob).abs().max() < 1e-3, where


@pytest.mark.parametrize(
    ("vocab", "bits"), [(2, 1), (3, 2), (256, 8), (257, 9), (640, 10), (QWEN_VOCAB, 18), (1 << 20, 20)]
)
def test_id_bits(vocab, bits):
    assert id_bits(vocab) == bits


@pytest.mark.parametrize(("top_k", "packed", "compact"), [(32, 109, 87), (64, 209, 156), (256, 809, 527)])
def test_bytes_of_a_token(top_k, packed, compact):
    """From the layout's formula, independently; what README and CONFIG promise."""
    spec7, spec5 = Spec(QWEN_VOCAB, top_k, 7), Spec(QWEN_VOCAB, top_k, 5)
    assert packed == packed_bytes(spec7) == math.ceil((18 * top_k + 7 * (top_k - 2)) / 8) + 10
    low = int(math.log2(QWEN_VOCAB / top_k))
    high = QWEN_VOCAB // 2**low + top_k
    assert low_bits(spec5) == low
    assert compact == compact_bytes(spec5) == math.ceil((top_k * (low + 5) + high) / 8) + 10
    targets = random_targets(3, 1000, top_k)
    assert len(CODECS["packed"].encode(targets, spec7)) == 3 * packed
    assert len(CODECS["compact"].encode(targets, spec5)) == 3 * compact


def test_packed_is_a_plain_little_endian_bit_stream():
    """Independent unpacker: one Python integer a row."""
    targets, spec = random_targets(4, QWEN_VOCAB, 11), Spec(QWEN_VOCAB, 11, 7)
    records = CODECS["packed"].encode(targets, spec).reshape(4, -1)
    for row, ids in zip(records, targets.ids.tolist(), strict=True):
        number = int.from_bytes(row[:-10].tobytes(), "little")
        assert [number & 0x3FFFF, (number >> 18) & 0x3FFFF] == ids[:2]
        assert [(number >> (36 + 25 * i + 7)) & 0x3FFFF for i in range(9)] == ids[2:]


def test_compact_stores_high_bits_in_unary():
    targets, spec = random_targets(4, QWEN_VOCAB, 11), Spec(QWEN_VOCAB, 11, 5)
    records, low = CODECS["compact"].encode(targets, spec).reshape(4, -1), low_bits(spec)
    for row, ids in zip(records, targets.ids.tolist(), strict=True):
        number = int.from_bytes(row[:-10].tobytes(), "little")
        fields = [(number >> (i * (low + 5) + 5)) % 2**low for i in range(11)]
        unary = number >> (11 * (low + 5))
        places = [i for i in range(unary.bit_length()) if unary >> i & 1]
        assert [(place - i) << low | field for i, (place, field) in enumerate(zip(places, fields, strict=True))] == (
            sorted(ids)
        )


# -- log-probabilities -------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [32, pytest.param(64, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("codec", "logits", "mean", "largest"),
    [
        ("packed", peaky_logits, 2e-6, 5e-5),
        ("packed", zipf_logits, 2e-6, 5e-5),
        ("packed", cliff_logits, 2e-5, 1e-4),
        ("compact", peaky_logits, 5e-4, 5e-3),
        ("compact", zipf_logits, 5e-4, 5e-3),
        ("compact", cliff_logits, 5e-4, 5e-3),
    ],
)
def test_the_codec_error(codec, logits, mean, largest, top_k):
    exact = from_logits(logits(256, 20_000), torch.arange(256), top_k, 1.0)
    error = codec_error(exact, roundtrip(exact, 20_000, codec), 20_000)
    assert error.min() > -1e-12
    assert error.mean() < mean
    assert error.max() < largest


@pytest.mark.parametrize("codec", TOP_K_CODECS)
def test_a_bit_less_costs_four_times_the_error(codec):
    exact = random_targets(256, 20_000, 32)
    errors = [codec_error(exact, roundtrip(exact, 20_000, codec, bits), 20_000).mean() for bits in (6, 5, 4)]
    assert 2.5 < errors[1] / errors[0] < 6.5
    assert 2.5 < errors[2] / errors[1] < 6.5


@pytest.mark.parametrize(("codec", "relative"), [("packed", 2e-3), ("compact", 1e-2)])
def test_the_kl_to_a_student_survives(codec, relative):
    exact = random_targets(256, 20_000, 32)
    student = peaky_logits(256, 20_000) + 0.7 * torch.randn(256, 20_000, generator=torch.Generator().manual_seed(9))
    assert 0.6 < exact.logprobs[:, 0].exp().mean() < 0.9
    kl_exact, kl_stored = sparse_kl(exact, student), sparse_kl(roundtrip(exact, 20_000, codec), student)
    assert kl_exact.mean() > 0.05
    assert (kl_stored - kl_exact).mean().abs() / kl_exact.mean() < relative
    assert kl_stored.min() >= -1e-6  # hardness takes sqrt(1 - exp(-KL))


@pytest.mark.parametrize("codec", TOP_K_CODECS)
def test_the_tail_entropy_and_gold_survive(codec):
    """Renormalising the head instead would change the KL beyond recognition: the tail must come back."""
    exact = random_targets(500, 5000, 4)
    stored = roundtrip(exact, 5000, codec)
    assert exact.tail_logprob.exp().max() > 0.3
    torch.testing.assert_close(stored.tail_logprob, exact.tail_logprob, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(stored.entropy, exact.entropy, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(stored.gold_logprob, exact.gold_logprob, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("codec", TOP_K_CODECS)
def test_extreme_teachers_are_stored_without_nan(codec):
    logits = torch.full((4, 40), -1e9)
    logits[0, :2] = 0.0  # no tail, impossible head entries
    logits[1] = 0.0  # uniform: range 0
    logits[2, 3] = 90.0  # one certain token
    logits[2, 4:20] = -math.inf
    logits[3] = torch.linspace(0, -1e-6, 40)  # nearly uniform
    exact = from_logits(logits, torch.tensor([39, 5, 3, 2]), 8, 1.0)
    stored = roundtrip(exact, 40, codec)
    assert not any(
        torch.isnan(getattr(stored, name)).any() for name in ("logprobs", "tail_logprob", "gold_logprob", "entropy")
    )
    assert stored.logprobs[0, :2].exp().sum() == pytest.approx(1.0, abs=1e-6)
    assert stored.logprobs[0, 2] == pytest.approx(math.log(0.5) - LOGPROB_FLOOR, abs=0.3)
    assert stored.tail_logprob[0] == -math.inf
    torch.testing.assert_close(stored.logprobs[[1, 3]].exp(), torch.full((2, 8), 1 / 40), rtol=1e-3, atol=0)
    assert stored.logprobs[2, 0] == pytest.approx(0.0, abs=1e-6)
    assert stored.gold_logprob[0] == -math.inf


@pytest.mark.parametrize("codec", TOP_K_CODECS)
def test_a_tail_near_everything_and_near_nothing_keeps_its_precision(codec):
    """Flat over 200,000 tokens the head is 4e-5 of the mass; a sharp row's tail is 4e-14 of it."""
    flat, sharp = torch.zeros(1, 200_000), torch.zeros(1, 1000)
    sharp[0, 0] = 37.6
    for logits, vocab in ((flat, 200_000), (sharp, 1000)):
        exact = from_logits(logits, torch.zeros(1, dtype=torch.long), 8, 1.0)
        stored = roundtrip(exact, vocab, codec)
        torch.testing.assert_close(stored.logprobs.exp(), exact.logprobs.exp(), rtol=0.02, atol=1e-12)
        torch.testing.assert_close(stored.tail_logprob.exp(), exact.tail_logprob.exp(), rtol=0.02, atol=1e-30)


# -- draws -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draws", [1, 2, 64, 255])
@pytest.mark.parametrize("vocab", [2, 3, 700, QWEN_VOCAB])
def test_draws_come_back_exactly(draws, vocab):
    targets, spec = random_draws(30, vocab, draws), Spec(vocab, draws=draws)
    raw = CODECS["sampled"].encode(targets, spec)
    stored = CODECS["sampled"].decode(raw, 30, spec)
    assert stored.sampled
    assert torch.equal(counts_of(stored, draws, vocab), counts_of(targets, draws, vocab))
    assert torch.equal(stored.ids, targets.ids)
    torch.testing.assert_close(stored.logprobs, targets.logprobs)
    torch.testing.assert_close(stored.gold_logprob, targets.gold_logprob, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(stored.entropy, targets.entropy, rtol=1e-3, atol=1e-3)
    # The size, from the counts alone.
    counts = counts_of(targets, draws, vocab).sort(-1, descending=True).values
    ones = (counts > 0).sum(-1)
    bits = (ones * id_bits(vocab) + (ones - 1) + (counts[:, 1] - 1).clamp(min=0)).sum().item()
    assert len(raw) == 30 * 5 + math.ceil(bits / 8)


def test_draws_are_small():
    targets, spec = random_draws(64, QWEN_VOCAB, 64), Spec(QWEN_VOCAB, draws=64)
    assert len(CODECS["sampled"].encode(targets, spec)) / 64 <= 40


def test_draws_that_are_none_are_refused():
    encode, targets = CODECS["sampled"].encode, random_draws(5, 50, 12)
    with pytest.raises(StoreError, match="not 13 draws"):
        encode(targets, Spec(50, draws=13))
    shares = torch.tensor([[0.65, 0.35]]).log().expand(5, 2)
    with pytest.raises(StoreError, match="not 2 draws"):  # though they round to 1 and 1
        encode(dataclasses.replace(targets, ids=targets.ids[:, :2], logprobs=shares), Spec(50, draws=2))
    with pytest.raises(StoreError, match="not 12 draws"):
        encode(dataclasses.replace(targets, logprobs=targets.logprobs.flip(1)), Spec(50, draws=12))
    with pytest.raises(StoreError, match="not 12 draws"):
        encode(dataclasses.replace(targets, logprobs=targets.logprobs * math.nan), Spec(50, draws=12))
    gap = torch.cat([targets.logprobs[:, :1], torch.full((5, 1), -math.inf), targets.logprobs[:, 1:]], dim=1)
    with pytest.raises(StoreError, match="not 12 draws"):
        encode(
            dataclasses.replace(targets, ids=targets.ids[:, [0, *range(targets.top_k)]], logprobs=gap),
            Spec(50, draws=12),
        )
    with pytest.raises(StoreError, match="not 12 draws"):
        encode(dataclasses.replace(targets, logprobs=torch.full_like(targets.logprobs, -math.inf)), Spec(50, draws=12))
    with pytest.raises(StoreError, match="not 12 draws"):
        encode(dataclasses.replace(targets, sampled=False), Spec(50, draws=12))
    with pytest.raises(StoreError, match="do not fit a vocabulary of 9"):
        encode(targets, Spec(9, draws=12))
    with pytest.raises(StoreError, match="draws, the codec stores the top K"):
        CODECS["packed"].encode(targets, Spec(50, targets.top_k, 7))


# -- refusals and surroundings -----------------------------------------------------------------------------


@pytest.mark.parametrize("codec", TOP_K_CODECS)
@pytest.mark.parametrize(("vocab", "message"), [(30, "do not fit"), (4, r"must lie in \[1, 3\]"), (1 << 22, "exceed")])
def test_targets_of_another_vocabulary_are_refused(codec, vocab, message):
    with pytest.raises(StoreError, match=message):
        CODECS[codec].encode(random_targets(64, 50, 4), Spec(vocab, 4, 7))


@pytest.mark.parametrize("codec", TOP_K_CODECS)
@pytest.mark.parametrize(
    ("field", "place", "value", "message"),
    [
        ("logprobs", (70, 2), math.nan, "descend"),
        ("logprobs", (70, 0), math.nan, "descend"),
        ("logprobs", (70, 0), math.inf, "descend"),
        ("logprobs", (70, 3), 0.0, "descend"),
        ("tail_logprob", 70, math.nan, "descend"),
        ("gold_logprob", 70, math.nan, "NaN"),
        ("entropy", 70, math.nan, "NaN"),
        ("ids", (70, 1), -1, "do not fit"),
        ("ids", (70, 3), 50, "do not fit"),
    ],
)
def test_numbers_that_are_none_are_refused(codec, field, place, value, message):
    targets = random_targets(80, 50, 4)
    getattr(targets, field)[place] = value
    with pytest.raises(StoreError, match=message):
        CODECS[codec].encode(targets, Spec(50, 4, 7))


@pytest.mark.parametrize("codec", CODECS)
def test_bytes_of_another_size_are_refused(codec):
    targets = random_draws(3, 50, 9) if codec == "sampled" else random_targets(3, 50, 4)
    spec = Spec(50, 4, 7, 9)
    raw = CODECS[codec].encode(targets, spec)
    for bad, tokens in ((raw[:-1], 3), (np.append(raw, np.uint8(0)), 3), (raw, 2), (raw, 4), (raw[:0], 3)):
        with pytest.raises(StoreError, match=rf"^{len(bad)} bytes .* {tokens} tokens"):
            CODECS[codec].decode(bad, tokens, spec)


@pytest.mark.parametrize("vocab", [50, QWEN_VOCAB])
def test_damaged_bytes_of_sets_decode_to_ids_of_some_kind(vocab):
    """Checksums find damage; without them it must not lead a loop astray: too few ones in unary, or too many."""
    spec = Spec(vocab, 33, 5)
    size, noise = 40 * compact_bytes(spec), np.random.default_rng(0).integers(0, 256, 40 * compact_bytes(spec))
    for raw in (np.zeros(size, np.uint8), np.full(size, 255, np.uint8), noise.astype(np.uint8)):
        ids = CODECS["compact"].decode(raw, 40, spec).ids
        assert ids.shape == (40, 33)
        assert ((ids >= 0) & (ids < 2 ** id_bits(vocab))).all()


@pytest.mark.parametrize("codec", CODECS)
def test_no_tokens_are_fine(codec):
    spec = Spec(50, 4, 7, 9)
    empty = (random_draws(3, 50, 9) if codec == "sampled" else random_targets(3, 50, 4)).rows(slice(0, 0))
    raw = CODECS[codec].encode(empty, spec)
    assert raw.shape == (0,)
    assert len(CODECS[codec].decode(raw, 0, spec)) == 0


@pytest.mark.parametrize("codec", TOP_K_CODECS)
def test_rows_do_not_depend_on_the_rows_beside_them(codec):
    """Across the blocks of the compiled loops."""
    targets, spec = random_targets(301, 640, 6), Spec(640, 6, 6)
    encode, decode = CODECS[codec].encode, CODECS[codec].decode
    whole = encode(targets, spec).reshape(301, -1)
    assert (encode(targets.rows(slice(29, 99)), spec) == whole[29:99].reshape(-1)).all()
    one, many = decode(whole[40].copy(), 1, spec), decode(whole.reshape(-1), 301, spec)
    assert torch.equal(one.logprobs[0], many.logprobs[40])


def test_only_what_a_codec_uses_is_part_of_the_identity():
    settings = TargetsConfig(top_k=300 - 60, draws=9)
    assert identity_of("packed", make_spec(settings, 50)) == {
        "codec": "packed",
        "vocab_size": 50,
        "top_k": 49,
        "bits": 7,
    }
    drawn = settings.model_copy(update={"codec": "sampled"})
    assert identity_of("sampled", make_spec(drawn, 50)) == {"codec": "sampled", "vocab_size": 50, "draws": 9}
    compact = settings.model_copy(update={"codec": "compact", "bits": 6})
    for codec, chosen in (("packed", settings), ("sampled", drawn), ("compact", compact)):
        spec = make_spec(chosen, 1000)
        assert spec_of(identity_of(codec, spec)) == spec


def test_the_recipe_names_every_codec():
    assert set(CODECS) == set(TargetsConfig.model_fields["codec"].annotation.__args__)


class _Decoding(torch.utils.data.Dataset):
    def __init__(self, raw, spec):
        self.raw, self.spec = raw, spec

    def __len__(self):
        return 4

    def __getitem__(self, _):
        return CODECS["packed"].decode(self.raw, 20, self.spec).ids


def test_forked_workers_decode():
    """Compiled code was used in the parent before."""
    targets, spec = random_targets(20, 640, 6), Spec(640, 6, 7)
    raw = CODECS["packed"].encode(targets, spec)
    for ids in DataLoader(_Decoding(raw, spec), batch_size=None, num_workers=2):
        assert torch.equal(ids, targets.ids)


def test_an_installation_that_cannot_be_written_to_still_works(tmp_path):
    """numba finds no place for its cache: it compiles anew."""
    shutil.copytree(ROOT / "pipeline", tmp_path / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    script = (
        "from numba.core import caching\n"
        "for locator in caching.CacheImpl._locator_classes: locator.from_function = classmethod(lambda *_: None)\n"
        "from pipeline.targets.packing import _exp\n"
        "assert abs(float(_exp(1.0)) - 0.36787944) < 1e-6\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "NUMBA_CACHE_DIR"}
    command = [sys.executable, "-B", "-c", script]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert not list(tmp_path.rglob("*.nbi"))
