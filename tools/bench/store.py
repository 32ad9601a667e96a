"""What is stored per answer token: bytes, error and speed of every codec, beside what else one might store.

    python -m tools.bench.store --json FILE [--logits FILE] [--rows N]

Writes one flat JSON object. A figure carries its setting's name, `packed_k32_bytes_per_token`; what each means is in
`MEANING`. Teacher and student are synthetic unless `--logits` names a .npy file [tokens, vocabulary] or a .safetensors
file with `teacher`, perhaps `student` and `gold`. Everything is measured in one go, on one core.
Shape suffixes: T = tokens, V = vocabulary, K = entries a token.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from pipeline.errors import UserError, run_main
from pipeline.evaluation import results
from pipeline.targets.codecs import CODECS, Bytes, Spec, id_bits
from pipeline.targets.soft_targets import SoftTargets, concatenate, draw_offsets, drawn_from_logits, from_logits

VOCAB = 151_936
MEANING = {
    "bytes_per_token": "gold log-prob and entropy included",
    "codec_error": "KL(top K and tail || the same as stored), mean in nats, in float64",
    "codec_error_max": "the largest of a token",
    "kl_bias": "mean KL from what is stored, minus mean KL from the whole distribution, in nats",
    "kl_bias_share": "the same as a share of the mean KL",
    "kl_error": "standard deviation over tokens of that difference, in nats",
    "gradient_cosine": "of the gradient by the logits and the dense one; mean over tokens",
    "gradient_norm_ratio": "their norms; mean over tokens",
    "gradient_l1": "L1 of their difference over the L1 of the dense one; sums over tokens",
    "mean_gradient_cosine": "of the gradients averaged over all tokens: noise cancels, bias stays",
    "mean_gradient_l1": "L1 of the difference of the averages over the L1 of the dense average",
    "sum_above_one": "share of tokens whose stored probabilities sum to more than 1",
    "encode_mtok_s": "million tokens a second and core, 4,096 at a time",
    "decode_mtok_s": "the same",
    "encode_sample_mtok_s": "118 tokens at a time: one sample",
    "decode_sample_mtok_s": "the same",
}
_ROWS_AT_ONCE, _BULK, _SAMPLE = 64, 4096, 118


@dataclass(frozen=True, slots=True)
class Setting:
    """One way to store soft targets."""

    name: str
    keep: Callable[[Tensor, Tensor, Tensor], SoftTargets]
    """(logits_TV, gold_T, offsets_T) -> what is kept, not yet rounded"""
    encode: Callable[[SoftTargets], Sequence[Bytes]]
    """Bytes, in one array or several; anything that the method's own format would hold."""
    decode: Callable[[Sequence[Bytes], int], SoftTargets]
    tail: bool = True
    """Whether the tail is kept: without it the head is renormalised."""


def settings(vocab: int) -> Iterator[Setting]:
    """Ours, then the baselines."""
    for top_k in (32, 64):
        yield of_codec(f"packed_k{top_k}", "packed", Spec(vocab, top_k, 7))
        yield of_codec(f"packed_6bit_k{top_k}", "packed", Spec(vocab, top_k, 6))
        yield of_codec(f"compact_k{top_k}", "compact", Spec(vocab, top_k, 5))
        yield of_codec(f"compact_6bit_k{top_k}", "compact", Spec(vocab, top_k, 6))
    yield of_codec("sampled_n64", "sampled", Spec(vocab, draws=64))
    for top_k in (32, 64):
        yield raw(f"int32_f16_k{top_k}", top_k)
        yield raw(f"renormalised_k{top_k}", top_k, tail=False)
        yield polynomial(f"polynomial_exact16_k{top_k}", top_k, 16, (0, 1, 2, 3, 4, 0.5), vocab)
        yield polynomial(f"polynomial_exact1_k{top_k}", top_k, 1, (0, 1, 2), vocab)
    yield independent_draws("independent_draws_n64", 64, vocab)


def of_codec(name: str, codec: str, spec: Spec) -> Setting:
    """A codec of the pipeline."""
    chosen = CODECS[codec]
    return Setting(
        name,
        lambda logits_TV, gold_T, offsets_T: chosen.keep(logits_TV, gold_T, offsets_T, 1.0, spec),
        lambda targets: [chosen.encode(targets, spec)],
        lambda parts, tokens: chosen.decode(parts[0], tokens, spec),
    )


# -- baselines ---------------------------------------------------------------------------------------------


def raw(name: str, top_k: int, *, tail: bool = True) -> Setting:
    """int32 ids and f16 log-probs, gold log-prob and entropy; with the tail, or as most tools do without."""

    def encode(targets: SoftTargets) -> list[Bytes]:
        singles = singles_f16(targets, tail=tail)
        ids, logprobs = targets.ids.to(torch.int32).numpy(), targets.logprobs.half().numpy()
        return [ids.view(np.uint8), logprobs.view(np.uint8), singles]

    def decode(parts: Sequence[Bytes], tokens: int) -> SoftTargets:
        ids = torch.from_numpy(parts[0].view(np.int32)).long()
        logprobs = torch.from_numpy(parts[1].view(np.float16)).float()
        return with_singles(ids, logprobs, parts[2], tail=tail)

    return Setting(name, keep_top(top_k), encode, decode, tail)


def polynomial(name: str, top_k: int, exact: int, powers: Sequence[float], vocab: int) -> Setting:
    """As DistillKit stores a distribution: the first log-probs as f16, the rest as a least-squares fit in powers of the
    rank with f32 coefficients; bit-packed ids. Our own code after its settings; the tail is what the sum leaves."""
    rank = torch.linspace(0, 1, top_k - exact, dtype=torch.float64)
    basis_RC = torch.stack([rank**power for power in powers], dim=1)
    solve_CR = torch.linalg.pinv(basis_RC)
    shifts = torch.arange(id_bits(vocab))

    def encode(targets: SoftTargets) -> list[Bytes]:
        fit = (targets.logprobs[:, exact:].double() @ solve_CR.T).float().numpy()
        bits = (targets.ids[:, :, None] >> shifts & 1).to(torch.uint8).flatten(1).numpy()
        ids = np.packbits(bits, axis=1, bitorder="little")
        first = targets.logprobs[:, :exact].half().numpy()
        return [ids, first.view(np.uint8), fit.view(np.uint8), singles_f16(targets, tail=False)]

    def decode(parts: Sequence[Bytes], tokens: int) -> SoftTargets:
        bits = torch.from_numpy(np.unpackbits(parts[0], axis=1, bitorder="little")[:, : top_k * len(shifts)])
        ids = (bits.view(tokens, top_k, len(shifts)).long() << shifts).sum(-1)
        rest = torch.from_numpy(parts[2].view(np.float32)).double() @ basis_RC.T
        first = torch.from_numpy(parts[1].view(np.float16)).double()
        logprobs = torch.cat([first, rest], dim=1).float()
        stored = with_singles(ids, logprobs, parts[3], tail=False)
        left = 1 - logprobs.double().exp().sum(-1)
        tail = left.clamp(min=1e-8).log().float()  # a sum above 1 leaves nothing
        return SoftTargets(ids, logprobs, tail, stored.gold_logprob, stored.entropy)

    return Setting(name, keep_top(top_k), encode, decode)


def independent_draws(name: str, draws: int, vocab: int) -> Setting:
    """Random sampling KD as published: independent draws. Stored by our codec of draws."""
    ours, generator = of_codec(name, "sampled", Spec(vocab, draws=draws)), torch.Generator().manual_seed(0)

    def keep(logits_TV: Tensor, gold_T: Tensor, offsets_T: Tensor) -> SoftTargets:
        exact = drawn_from_logits(logits_TV, gold_T, 1, 1.0, offsets_T)
        drawn_TN = torch.multinomial(logits_TV.softmax(-1), draws, replacement=True, generator=generator)
        counts_TV = torch.zeros_like(logits_TV).scatter_add_(-1, drawn_TN, torch.ones(drawn_TN.shape))
        counts_TN, ids_TN = counts_TV.topk(draws, dim=-1)
        ids_TN = torch.where(counts_TN > 0, ids_TN, 0)
        logprobs = (counts_TN / draws).log()
        return SoftTargets(ids_TN, logprobs, exact.tail_logprob, exact.gold_logprob, exact.entropy, sampled=True)

    return Setting(name, keep, ours.encode, ours.decode)


def keep_top(top_k: int) -> Callable[[Tensor, Tensor, Tensor], SoftTargets]:
    """The top K, whatever the offsets."""
    return lambda logits_TV, gold_T, offsets_T: from_logits(logits_TV, gold_T, top_k, 1.0)


def singles_f16(targets: SoftTargets, *, tail: bool) -> Bytes:
    """Gold log-prob and entropy, perhaps the tail, as f16; u8[T, bytes]."""
    columns = [targets.gold_logprob, targets.entropy, *([targets.tail_logprob] if tail else [])]
    return torch.stack(columns, dim=1).half().numpy().view(np.uint8)


def with_singles(ids: Tensor, logprobs: Tensor, singles: Bytes, *, tail: bool) -> SoftTargets:
    """Targets; without a tail the head is renormalised."""
    columns = torch.from_numpy(singles.view(np.float16)).float()
    if not tail:
        logprobs = logprobs.log_softmax(-1)
    tail_T = columns[:, 2] if tail else torch.full_like(columns[:, 0], float("-inf"))
    return SoftTargets(ids, logprobs, tail_T, columns[:, 0], columns[:, 1])


# -- teacher and student -----------------------------------------------------------------------------------


def synthetic(rows: int, vocab: int, seed: int) -> tuple[Tensor, Tensor]:
    """Logits [T, V] of a teacher whose log-probs fall with the logarithm of the rank, as a language model's do.

    Ranks are a random order in which common tokens (Zipf) tend to come first; the slope goes from 1.1 to 8 over the
    rows, mean top-1 probability about 0.75. The student is a milder teacher with noise.
    """
    generator = torch.Generator().manual_seed(seed)
    common_V = -torch.arange(1, vocab + 1).log()
    exponential_TV = torch.empty(rows, vocab).exponential_(generator=generator)
    rank_TV = (common_V - exponential_TV.log()).argsort(dim=-1, descending=True).argsort(dim=-1)
    slope_T1 = torch.linspace(0.1, 2.08, rows)[:, None].exp()
    teacher_TV = -slope_T1 * (rank_TV + 1).log() + 0.3 * torch.randn(rows, vocab, generator=generator)
    return teacher_TV, 0.8 * teacher_TV + 0.7 * torch.randn(rows, vocab, generator=generator)


@dataclass(frozen=True, slots=True)
class Logits:
    """One chunk: teacher and student [T, V], gold [T], offsets of the draws [T]."""

    teacher: Tensor
    student: Tensor
    gold: Tensor
    offsets: Tensor


def chunks(path: Path | None, rows: int) -> Iterator[Logits]:
    """The data to measure on, a few rows at a time."""
    stored = None if path is None else load(path)
    if stored is not None:
        rows = min(rows, len(stored["teacher"]))
    for start in range(0, rows, _ROWS_AT_ONCE):
        count = min(_ROWS_AT_ONCE, rows - start)
        offsets = draw_offsets(f"bench {start}", count)
        if stored is None:
            teacher, student = synthetic(count, VOCAB, start)
            gold = torch.multinomial(teacher.softmax(-1), 1, generator=torch.Generator().manual_seed(start))[:, 0]
        else:
            part = {name: tensor[start : start + count] for name, tensor in stored.items()}
            teacher, generator = part["teacher"].float(), torch.Generator().manual_seed(start)
            noisy = 0.8 * teacher + 0.7 * torch.randn(teacher.shape, generator=generator)
            student, gold = part.get("student", noisy).float(), part.get("gold", teacher.argmax(-1)).long()
        yield Logits(teacher, student, gold, offsets)


def load(path: Path) -> dict[str, Tensor]:
    """`teacher` [tokens, vocabulary], perhaps `student` and `gold`."""
    if path.suffix == ".npy":
        return {"teacher": torch.from_numpy(np.load(path))}
    tensors = load_file(path)
    if "teacher" not in tensors:
        raise UserError(f"{path}: no tensor `teacher`, only {sorted(tensors)}")
    return tensors


# -- measures ----------------------------------------------------------------------------------------------


def stored_kl(targets: SoftTargets, log_q_TV: Tensor) -> Tensor:
    """KL of the stored teacher to the student [T], in float64: METHOD section 2."""
    log_p, log_q_TK = targets.logprobs.double(), log_q_TV.gather(-1, targets.ids)
    p = log_p.exp()
    if targets.sampled:
        return -torch.where(p > 0, p * log_q_TK, 0.0).sum(-1) - targets.entropy.double()
    head = torch.where(p > 0, p * (log_p - log_q_TK), 0.0).sum(-1)
    tail = targets.tail_logprob.double()
    log_q_tail = log_q_TV.scatter(-1, targets.ids, float("-inf")).logsumexp(-1)
    return head + torch.where(tail > -torch.inf, tail.exp() * (tail - log_q_tail), 0.0)


def stored_gradient(targets: SoftTargets, q_TV: Tensor) -> Tensor:
    """Gradient [T, V] of that KL by the student's logits: q - p, the tail's mass spread as the student spreads it."""
    p_TV = torch.zeros_like(q_TV).scatter_add(-1, targets.ids, targets.logprobs.exp().to(q_TV.dtype))
    if targets.sampled:
        return q_TV - p_TV
    rest_TV = q_TV.scatter(-1, targets.ids, 0.0)
    tail_T1 = targets.tail_logprob.exp().to(q_TV.dtype)[:, None]
    mass_T1 = p_TV.sum(-1, keepdim=True) + tail_T1  # 1, but for a packing that does not keep it there
    return q_TV * mass_T1 - p_TV - rest_TV / rest_TV.sum(-1, keepdim=True) * tail_T1


def codec_error(exact: SoftTargets, stored: SoftTargets) -> Tensor:
    """KL(exact || stored) over head and tail [T], in float64; 0 for draws, which are stored as they are.

    Of measures, sum p log(p / q) - p + q: it is >= 0 for a packing whose probabilities do not sum to 1, too.
    """
    if exact.sampled:
        return torch.zeros(len(exact), dtype=torch.float64)
    order, back = exact.ids.argsort(-1), stored.ids.argsort(-1)
    assert torch.equal(exact.ids.gather(-1, order), stored.ids.gather(-1, back)), "ids were not stored exactly"
    p = torch.cat([exact.logprobs.gather(-1, order), exact.tail_logprob[:, None]], dim=-1).double()
    q = torch.cat([stored.logprobs.gather(-1, back), stored.tail_logprob[:, None]], dim=-1).double()
    return torch.where(p > -torch.inf, p.exp() * (p - q) - p.exp(), 0.0).sum(-1) + q.exp().sum(-1)


@dataclass(slots=True)
class Sums:
    """Running sums of one setting."""

    parts: dict[str, list[Tensor]]
    """Values of each token, a chunk at a time."""
    gradient_V: Tensor | float = 0.0
    size: int = 0

    def add(self, name: str, values_T: Tensor) -> None:
        self.parts.setdefault(name, []).append(values_T)

    def all(self, name: str) -> Tensor:
        return torch.cat(self.parts[name])


def measure_errors(
    path: Path | None, rows: int, chosen: Sequence[Setting]
) -> tuple[dict[str, object], dict[str, SoftTargets]]:
    """Figures of every setting, and its exact targets, for the timing."""
    sums = {s.name: Sums({}) for s in chosen}
    kept: dict[str, list[SoftTargets]] = {s.name: [] for s in chosen}
    dense, dense_V, top_1 = [], torch.zeros(()), []
    with tqdm(total=rows * len(chosen), desc="errors", unit="row", disable=None) as bar:
        for chunk in chunks(path, rows):
            log_p, log_q = chunk.teacher.double().log_softmax(-1), chunk.student.double().log_softmax(-1)
            gradient_TV = (log_q.exp() - log_p.exp()).float()
            dense.append((log_p.exp() * (log_p - log_q)).sum(-1))
            dense_V = dense_V + gradient_TV.sum(0)
            top_1.append(log_p.amax(-1).exp())
            del log_p
            for s in chosen:
                kept[s.name].append(add_chunk(s, chunk, log_q, dense[-1], gradient_TV, sums[s.name]))
                bar.update(len(chunk.gold))
    kl_T = torch.cat(dense)
    figures: dict[str, object] = {"dense_kl": kl_T.mean().item(), "top1_probability": torch.cat(top_1).mean().item()}
    for s in chosen:
        figures |= {
            f"{s.name}_{k}": v for k, v in summary(sums[s.name], kl_T, dense_V, kept[s.name][0].sampled).items()
        }
    return figures | {"tokens": len(kl_T)}, {name: concatenate(parts) for name, parts in kept.items()}


def add_chunk(s: Setting, chunk: Logits, log_q: Tensor, kl_T: Tensor, gradient_TV: Tensor, sums: Sums) -> SoftTargets:
    """One setting's values on one chunk. Returns the targets that were encoded."""
    exact = s.keep(chunk.teacher, chunk.gold, chunk.offsets)
    parts = s.encode(exact)
    stored = s.decode(parts, len(exact))
    sums.size += sum(part.nbytes for part in parts)
    if s.tail:
        sums.add("codec_error", codec_error(exact, stored))
    sums.add("kl_difference", stored_kl(stored, log_q) - kl_T)
    ours_TV = stored_gradient(stored, log_q.exp().float())
    norm, dense_norm = ours_TV.norm(dim=-1), gradient_TV.norm(dim=-1)
    sums.add("cosine", (ours_TV * gradient_TV).sum(-1) / (norm * dense_norm))
    sums.add("norm_ratio", norm / dense_norm)
    sums.add("l1", (ours_TV - gradient_TV).abs().sum(-1))
    sums.add("dense_l1", gradient_TV.abs().sum(-1))
    mass = stored.logprobs.double().exp().sum(-1)
    sums.add("above_one", (mass > 1 + 1e-3).double())
    sums.gradient_V = sums.gradient_V + ours_TV.sum(0)
    return exact


def summary(sums: Sums, kl_T: Tensor, dense_V: Tensor, sampled: bool) -> dict[str, float]:
    """The figures of one setting, by the names in MEANING."""
    difference, gradient_V = sums.all("kl_difference"), torch.as_tensor(sums.gradient_V)
    figures = {"bytes_per_token": sums.size / len(kl_T)}
    if "codec_error" in sums.parts and not sampled:
        error = sums.all("codec_error")
        figures |= {"codec_error": error.mean().item(), "codec_error_max": error.max().item()}
    return figures | {
        "kl_bias": difference.mean().item(),
        "kl_bias_share": (difference.mean() / kl_T.mean()).item(),
        "kl_error": difference.std().item(),
        "gradient_cosine": sums.all("cosine").mean().item(),
        "gradient_norm_ratio": sums.all("norm_ratio").mean().item(),
        "gradient_l1": (sums.all("l1").sum() / sums.all("dense_l1").sum()).item(),
        "mean_gradient_cosine": torch.cosine_similarity(gradient_V, dense_V, dim=0).item(),
        "mean_gradient_l1": ((gradient_V - dense_V).abs().sum() / dense_V.abs().sum()).item(),
        "sum_above_one": sums.all("above_one").mean().item(),
    }


def measure_speed(
    chosen: Sequence[Setting], targets: dict[str, SoftTargets], vocab: int, repeats: int
) -> dict[str, object]:
    """Million tokens a second of encoding and decoding: the best of several interleaved runs."""
    best: dict[str, float] = {}
    prepared = [(s, size, key, repeated(targets[s.name], size, vocab)) for s in chosen for size, key in _SIZES.items()]
    for round_ in tqdm(range(repeats + 1), desc="speed", disable=None):
        for s, size, key, rows in prepared:
            for _ in range(5):  # the first ones find cold caches
                started = time.perf_counter()
                parts = s.encode(rows)
                encoded = time.perf_counter()
                s.decode(parts, size)
                decoded = time.perf_counter()
                if round_ == 0:  # compiles
                    continue
                for what, seconds in (("encode", encoded - started), ("decode", decoded - encoded)):
                    name = f"{s.name}_{what}{key}_mtok_s"
                    best[name] = max(best.get(name, 0.0), size / seconds / 1e6)
    return dict(best)


_SIZES = {_BULK: "", _SAMPLE: "_sample"}


def repeated(targets: SoftTargets, size: int, vocab: int) -> SoftTargets:
    """The targets again and again, with other ids each time: nothing to learn for the processor."""
    rows = targets.rows(torch.arange(size) % len(targets))
    return rows if rows.sampled else with_ids(rows, (rows.ids + torch.arange(size)[:, None] * 977) % vocab)


def with_ids(targets: SoftTargets, ids: Tensor) -> SoftTargets:
    """The targets with other ids."""
    return SoftTargets(ids, targets.logprobs, targets.tail_logprob, targets.gold_logprob, targets.entropy)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.store", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True, help="file that receives the figures")
    parser.add_argument("--logits", type=Path, help="real logits, .npy or .safetensors")
    parser.add_argument("--rows", type=int, default=192, help="tokens compared with the dense distribution")
    parser.add_argument("--repeats", type=int, default=15, help="timings of each setting")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    vocab = VOCAB if options.logits is None else load(options.logits)["teacher"].shape[-1]
    chosen = list(settings(vocab))
    figures, targets = measure_errors(options.logits, options.rows, chosen)
    figures |= measure_speed(chosen, targets, vocab, options.repeats)
    about = {"vocab_size": vocab, "data": str(options.logits or "synthetic"), "meaning": MEANING}
    options.json.write_text(
        json.dumps(figures | about | {"machine": results.machine(torch.device("cpu"))}, indent=1) + "\n"
    )
    print_table(figures, chosen)


def print_table(figures: dict[str, object], chosen: Sequence[Setting]) -> None:
    """A line for each setting."""
    columns = ("bytes_per_token", "codec_error", "codec_error_max", "kl_bias", "kl_error", "gradient_cosine",
               "gradient_norm_ratio", "gradient_l1", "mean_gradient_l1", "encode_mtok_s", "decode_mtok_s",
               "encode_sample_mtok_s", "decode_sample_mtok_s")  # fmt: skip
    print(f"dense KL {figures['dense_kl']:.4f} nats, {figures['tokens']} tokens")
    print(f"{'':26}" + "".join(f"{name.replace('gradient', 'grad')[:13]:>14}" for name in columns))
    for s in chosen:
        values = [figures.get(f"{s.name}_{name}") for name in columns]
        print(f"{s.name:26}" + "".join(f"{'' if v is None else format(v, '.4g'):>14}" for v in values))


if __name__ == "__main__":
    run_main(main)
