"""Peak memory and time of the distillation loss with its LM head: fused in chunks, on logits, and with a dense teacher.

    python -m tools.bench.loss --json FILE [--rows 4096] [--vocab 151936] [--width 1024] [--top-k 64] [--repeats 3]

Three ways from hidden states to the gradients of hidden states and head weight, at alpha 0.7, without gate and tilt:
`dense` (logits f32[N, V], torch's kl_div against a teacher f32[N, V]), `unfused` (logits, sparse targets) and `fused`
(what training runs). The teacher's mass lies on K tokens, so that all three have the same gradient; it is compared.

Each way has a process of its own; their runs are interleaved. Peaks are of the process's resident memory (CUDA: of
the allocator) over what its inputs take, the dense teacher not counted; times are medians. Writes one flat JSON object.
The dense way takes five tensors [N, V] at once beside its teacher: 15 GB by default.
"""

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from pipeline.errors import UserError, run_main
from pipeline.evaluation import results
from pipeline.method.fused_head import fused_distillation_loss
from pipeline.method.losses import distillation_loss
from pipeline.targets.soft_targets import SoftTargets

ALPHA = 0.7
MIB = 2.0**20
Inputs = dict[str, Any]


def make_inputs(options: argparse.Namespace, rows: int) -> Inputs:
    """Hidden states, weight, labels and a teacher whose mass lies on K tokens a row; the same in every process."""
    generator = torch.Generator().manual_seed(0)
    device, dtype = options.device, getattr(torch, options.dtype)
    hidden_ND = torch.randn(rows, options.width, generator=generator)
    weight_VD = torch.empty(options.vocab, options.width).normal_(std=options.width**-0.5, generator=generator)
    first_N1 = torch.randint(options.vocab, (rows, 1), generator=generator)
    ids_NK = (first_N1 + 97 * torch.arange(options.top_k)) % options.vocab
    logprobs_NK = (3 * torch.randn(rows, options.top_k, generator=generator)).log_softmax(-1)
    zeros_N = torch.zeros(rows)
    targets = SoftTargets(ids_NK, logprobs_NK, torch.full((rows,), float("-inf")), zeros_N, zeros_N)
    return {
        "hidden_ND": hidden_ND.to(device, dtype).requires_grad_(),
        "weight_VD": weight_VD.to(device, dtype).requires_grad_(),
        "labels_N": ids_NK[:, 0].to(device),
        "targets": targets.to(device),
        "alpha_N": torch.full((rows,), ALPHA, device=device),
    }


def dense(inputs: Inputs) -> Tensor:
    """Student and teacher over the whole vocabulary, by torch's own functions."""
    logits_NV = (inputs["hidden_ND"] @ inputs["weight_VD"].t()).float()
    log_q_NV = F.log_softmax(logits_NV, dim=-1)
    ce = F.nll_loss(log_q_NV, inputs["labels_N"], reduction="sum")
    return (1 - ALPHA) * ce + ALPHA * F.kl_div(log_q_NV, inputs["teacher_NV"], reduction="sum")


def unfused(inputs: Inputs) -> Tensor:
    """Sparse targets on logits that are kept."""
    logits_NV = inputs["hidden_ND"] @ inputs["weight_VD"].t()
    return distillation_loss(logits_NV, inputs["labels_N"], inputs["targets"], inputs["alpha_N"]).loss_sum


def fused(inputs: Inputs) -> Tensor:
    """Sparse targets, logits in chunks: the training step's way."""
    return fused_distillation_loss(**inputs).loss_sum


WAYS: dict[str, Callable[[Inputs], Tensor]] = {"dense": dense, "unfused": unfused, "fused": fused}


def serve(way: str, options: argparse.Namespace, gradients: Path, pipe: Connection) -> None:
    """A way's process: sends (seconds, peak MiB) for every message it gets; the first run's gradients go to a file."""
    for rows in (8, options.rows):  # the first is a warm-up: libraries allocate their own
        inputs = make_inputs(options, rows)
        if way == "dense":
            targets: SoftTargets = inputs["targets"]
            teacher_NV = torch.zeros(rows, options.vocab, device=options.device)
            inputs["teacher_NV"] = teacher_NV.scatter_(-1, targets.ids, targets.logprobs.exp())
        if rows == 8:
            run(way, inputs)
    pipe.send("ready")
    while pipe.recv():
        figures, grads = run(way, inputs)
        if not gradients.exists():
            torch.save([grad.cpu() for grad in grads], gradients)
        del grads
        pipe.send(figures)


def run(way: str, inputs: Inputs) -> tuple[tuple[float, float], tuple[Tensor, ...]]:
    """((seconds, peak MiB over the inputs), gradients of hidden states and weight) of one forward and backward."""
    on_gpu = inputs["hidden_ND"].is_cuda
    before = _reset_peak(on_gpu)
    started = time.perf_counter()
    grads = torch.autograd.grad(WAYS[way](inputs), (inputs["hidden_ND"], inputs["weight_VD"]))
    if on_gpu:
        torch.cuda.synchronize()
    return (time.perf_counter() - started, (_peak(on_gpu) - before) / MIB), grads


def _reset_peak(on_gpu: bool) -> int:
    """Bytes in use now; from here on `_peak` is the largest."""
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # resets the kernel's high-water mark
    return _status("VmRSS")


def _peak(on_gpu: bool) -> int:
    return torch.cuda.max_memory_allocated() if on_gpu else _status("VmHWM")


def _status(key: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return 1024 * int(line.split()[1])


def bench(options: argparse.Namespace) -> dict[str, object]:
    """The figures and what they were measured on."""
    context = multiprocessing.get_context("spawn")
    measured: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        files = {way: Path(folder) / f"{way}.pt" for way in WAYS}
        pipes: dict[str, Connection] = {}
        for way in WAYS:
            pipes[way], theirs = context.Pipe()
            context.Process(target=serve, args=(way, options, files[way], theirs), daemon=True).start()
            theirs.close()
            receive(pipes[way], way)
        for _ in tqdm(range(options.repeats), desc="loss", unit="round", disable=None):
            for way, pipe in pipes.items():
                pipe.send(True)
                measured[way].append(receive(pipe, way))
        for pipe in pipes.values():
            pipe.send(False)
        errors = gradient_errors(files)
    return summarise(measured) | errors


def receive(pipe: Connection, way: str) -> Any:
    """What the way's process sends.

    Raises:
        UserError: it has ended.
    """
    try:
        return pipe.recv()
    except EOFError:
        raise UserError(f"the process of {way!r} has ended, for want of memory? Lower --rows or --vocab.") from None


def summarise(measured: dict[str, list[tuple[float, float]]]) -> dict[str, object]:
    """Median milliseconds and largest peak of each way, and the fused one's ratios to the others."""
    times = {way: 1e3 * statistics.median(seconds for seconds, _ in runs) for way, runs in measured.items()}
    peaks = {way: max(peak for _, peak in runs) for way, runs in measured.items()}
    figures: dict[str, object] = {f"{way}_ms": value for way, value in times.items()}
    figures |= {f"{way}_peak_mib": value for way, value in peaks.items()}
    for other in ("dense", "unfused"):
        figures[f"fused_time_vs_{other}"] = times["fused"] / times[other]
        figures[f"fused_memory_vs_{other}"] = peaks["fused"] / peaks[other]
    return figures


def gradient_errors(files: dict[str, Path]) -> dict[str, object]:
    """Largest difference of the fused gradients to the others', over the largest entry."""
    ours = torch.load(files["fused"], mmap=True)
    figures: dict[str, object] = {}
    for other in ("dense", "unfused"):
        theirs = torch.load(files[other], mmap=True)
        for name, found, wanted in zip(("hidden", "weight"), ours, theirs, strict=True):
            error = (found.float() - wanted.float()).abs().max() / wanted.float().abs().max()
            figures[f"{name}_gradient_error_vs_{other}"] = float(error)
    return figures


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.loss", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True, help="file that receives the figures")
    parser.add_argument("--rows", type=int, default=4096, help="answer tokens of a micro-batch, N")
    parser.add_argument("--vocab", type=int, default=151_936, help="V")
    parser.add_argument("--width", type=int, default=1024, help="the decoder's width, D")
    parser.add_argument("--top-k", type=int, default=64, help="teacher entries per token, K")
    parser.add_argument("--repeats", type=int, default=3, help="interleaved runs of each way")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    options = parser.parse_args(argv)
    setup = {k: getattr(options, k) for k in ("rows", "vocab", "width", "top_k", "repeats", "dtype")}
    figures = bench(options) | setup | {"machine": results.machine(torch.device(options.device))}
    options.json.write_text(json.dumps(figures, indent=1) + "\n")
    for name, value in figures.items():
        print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")


if __name__ == "__main__":
    run_main(main)
