"""Time and memory of MoE layers and of whole training steps, by the way experts are computed, as tokens grow.

    python -m tools.bench.moe [--json FILE] [--plot FILE.png] [--model small] [--tokens 1024 4096 16384]
                              [--step-tokens 1024 4096] [--rounds 3] [--cases dense eager ...]

`layer`: forward and backward of one MoE layer. `step`: a whole student under DeepSpeed (ZeRO-1, one rank): forward with
an image in every sequence, fused loss, backward, AdamW; `step_checkpointing` with activation checkpointing. The
baseline is a dense MLP as wide as the experts that a token passes: equal active parameters. Weights are random, so
tokens spread over experts almost evenly.

A case of a round has a process of its own; cases take turns in an order that turns too. Times are medians over rounds,
ratios are taken within a round. Peaks are of torch's allocator beyond what was there before (CPU: from its profiler, in
a run that is not timed). The matrix rate is measured in every process, at the data type of the run; a share is the
operations that the mathematics needs (`pipeline/models/cost/flops.py`) over time, over that rate. On a GPU:

    python -m tools.bench.moe --model qwen3-vl-2b --checkpointing off on --step-tokens 4096 16384 --json FILE
"""

import argparse
import functools
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from pipeline.cluster.plan import shapes
from pipeline.errors import UserError, run_main
from pipeline.evaluation import results
from pipeline.method.fused_head import FusedHead, fused_distillation_loss
from pipeline.models import loading
from pipeline.models.cost import flops
from pipeline.models.cost.activations import Load, Settings
from pipeline.training.process import start_distributed
from tools.bench.moe_cases import BASELINE, CASES, SIZES, TRAINING, Size, batch, build, config_of, expert_layer
from tools.bench.moe_plot import plot
from tools.bench.runs import quartiles, rotated

MIB = 2**20
MATMUL_SIDE = {"cpu": 1024, "cuda": 8192}
PARTS = ("layer", "step", "step_checkpointing")
Measurement = dict[str, float]
"""`seconds`, and in the first round `peak_mib`."""


# -- one case, in a process of its own ---------------------------------------------------------------------


def measure_case(options: argparse.Namespace) -> dict[str, Any]:
    """Everything of one case in one round, by part and tokens."""
    start_distributed()
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    size, case = SIZES[options.model], CASES[options.worker]
    found: dict[str, Any] = {"matmul_tflops": matmul_tflops(device, dtype)}
    if options.tokens:
        engine = build(size, case, device, dtype, layers=2)
        runs = {tokens: layer_run(engine, size, tokens, device, dtype) for tokens in options.tokens}
        found["layer"] = measure(runs, device, with_memory=options.first)
        del engine, runs
        gc.collect()
    if options.step_tokens:
        engine = build(size, case, device, dtype)
        head = FusedHead(engine.module)
        runs = {tokens: step_run(engine, head, size, tokens, device, dtype) for tokens in options.step_tokens}
        if "off" in options.checkpointing:
            found["step"] = measure(runs, device, with_memory=options.first)
        if "on" in options.checkpointing:
            loading.enable_activation_checkpointing(engine.module)
            found["step_checkpointing"] = measure(runs, device, with_memory=options.first)
    return found


def layer_run(engine: Any, size: Size, tokens: int, device: torch.device, dtype: torch.dtype) -> Callable[[], None]:
    """Forward and backward of one layer; the gradients are dropped."""
    layer, width = expert_layer(engine), size.text["hidden_size"]
    generator = torch.Generator(device).manual_seed(tokens)
    hidden_1TD = torch.randn(1, tokens, width, generator=generator, device=device, dtype=dtype).requires_grad_()

    def run() -> None:
        output = layer(hidden_1TD)
        output = output[0] if isinstance(output, tuple) else output
        torch.autograd.grad(output.square().mean(), [hidden_1TD, *layer.parameters()], allow_unused=True)

    return run


def step_run(
    engine: Any, head: FusedHead, size: Size, tokens: int, device: torch.device, dtype: torch.dtype
) -> Callable[[], None]:
    """A whole optimizer step."""
    inputs, keep_W, labels_N = batch(size, tokens, device, dtype)
    rows_BW = torch.ones(len(inputs["input_ids"]), len(keep_W), dtype=torch.bool, device=device)
    forward = functools.partial(engine, **inputs, logits_to_keep=keep_W, use_cache=False)
    alpha_N = torch.zeros(len(labels_N), device=device)
    loss = functools.partial(fused_distillation_loss, labels_N=labels_N, targets=None, alpha_N=alpha_N)

    def run() -> None:
        engine.backward(head.loss(forward, rows_BW, loss).loss_sum / len(labels_N))
        engine.step()

    return run


def measure(
    runs: dict[int, Callable[[], None]], device: torch.device, *, with_memory: bool
) -> dict[int, Measurement | None]:
    """Each run once as a warm-up, in the first round once more for its memory, and once timed; None: out of memory."""
    found: dict[int, Measurement | None] = {}
    for tokens, run in runs.items():
        try:
            run()
            peak = {"peak_mib": peak_mib(run, device)} if with_memory else {}
            found[tokens] = {"seconds": seconds(run, device)} | peak
        except torch.OutOfMemoryError:
            found[tokens] = None
    return found


def seconds(run: Callable[[], None], device: torch.device) -> float:
    """Of one run, all of the device's work included."""
    _wait(device)
    started = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - started


def peak_mib(run: Callable[[], None], device: torch.device) -> float:
    """Largest memory of the allocator during a run, beyond what it held before."""
    gc.collect()
    if device.type == "cuda":
        _wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        _wait(device)
        return (torch.cuda.max_memory_allocated(device) - before) / MIB
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    kineto: Any = profiler.profiler
    events = [e for e in kineto.kineto_results.events() if e.name() == "[memory]"]
    total = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        most = max(most, total)
    return most / MIB


def matmul_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """10^12 operations a second of a large square product: the best of 5 times, each of several products."""
    side = MATMUL_SIDE[device.type]
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    count = 10 if device.type == "cuda" else 2

    def run() -> None:
        for _ in range(count):
            a @ b

    run()
    return 2 * side**3 * count / min(seconds(run, device) for _ in range(5)) / 1e12


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# -- all cases ---------------------------------------------------------------------------------------------


def bench(options: argparse.Namespace, arguments: Sequence[str]) -> dict[str, Any]:
    """Rounds of all cases, as rows of figures."""
    rounds: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, tqdm(total=options.rounds * len(options.cases), disable=None) as bar:
        for turn in range(options.rounds):
            rounds.append({})
            for case in rotated(options.cases, turn):
                bar.set_description(case)
                rounds[-1][case] = in_own_process(case, arguments, Path(folder) / "case.json", first=turn == 0)
                bar.update()
    rate = statistics.median(found["matmul_tflops"] for of_round in rounds for found in of_round.values())
    rows = [row for part in PARTS for row in rows_of(part, rounds, rate, options)]
    figures: dict[str, Any] = {"matmul_tflops": rate, "rows": rows}
    steps = [row["tflops"] for row in rows if row["part"] == "step" and row["case"] == TRAINING and row["tflops"]]
    return figures | ({"step_tflops": max(steps)} if steps else {})


def in_own_process(case: str, arguments: Sequence[str], out: Path, *, first: bool) -> dict[str, Any]:
    """What `measure_case` finds in a fresh process.

    Raises:
        UserError: it ended with an error, or was killed for want of memory.
    """
    command = [sys.executable, "-m", "tools.bench.moe", *arguments, "--worker", case, "--out", str(out)]
    command += ["--first"] if first else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"the process of {case!r} ended with status {done.returncode}:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def rows_of(part: str, rounds: list[dict[str, Any]], rate: float, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each case and number of tokens of one part."""
    rows = []
    for case in options.cases:
        for tokens in rounds[0][case].get(part, {}):
            runs = [of_round[case][part][tokens] for of_round in rounds]
            bases = [of_round[BASELINE][part][tokens] for of_round in rounds] if BASELINE in options.cases else [None]
            row = {"part": part, "case": case, "tokens": int(tokens), "ms": None, "vs_dense": None, "tflops": None}
            if all(runs):
                low, middle, high = quartiles([1e3 * run["seconds"] for run in runs])
                row |= {"ms": middle, "ms_q1": low, "ms_q3": high, "peak_mib": runs[0]["peak_mib"]}
                row["tflops"] = operations(part, int(tokens), options.model) / middle / 1e9
                row["matmul_share"] = row["tflops"] / rate
            if all(runs) and all(bases):
                ratios = [run["seconds"] / base["seconds"] for run, base in zip(runs, bases, strict=True)]
                low, middle, high = quartiles(ratios)
                row |= {"vs_dense": middle, "vs_dense_q1": low, "vs_dense_q3": high}
                row["peak_vs_dense"] = runs[0]["peak_mib"] / bases[0]["peak_mib"]
            rows.append(row)
    return rows


def operations(part: str, tokens: int, model: str) -> float:
    """What the mathematics of one run needs, with experts that drop nothing; equal for all cases but for routers."""
    size = SIZES[model]
    if part == "layer":
        text = size.text
        return 18 * tokens * text["hidden_size"] * text["num_experts_per_tok"] * text["moe_intermediate_size"]
    count, length = size.sequences(tokens)
    load = Load(count, length, count * size.side**2, count, count * size.answers(tokens))
    return flops.training(*shapes(config_of(size)), load, Settings(bytes=2, eager_attention=False)).needed


def table(figures: dict[str, Any]) -> str:
    """A line for each row."""
    heads = f"{'tokens':>8}{'ms':>10}{'vs dense':>10}{'quartiles':>16}{'peak MiB':>10}{'of matmul':>11}"
    lines = [f"{'':20}{'case':18}{heads}"]
    for row in figures["rows"]:
        name = f"{row['part']:20}{row['case']:18}{row['tokens']:>8}"
        if row["ms"] is None:
            lines.append(f"{name}  out of memory")
            continue
        ratio = f"{row['vs_dense']:.3f}" if row["vs_dense"] else ""
        spread = f"{row['vs_dense_q1']:.3f} - {row['vs_dense_q3']:.3f}" if row["vs_dense"] else ""
        share = f"{row['matmul_share']:.1%}"
        lines.append(f"{name}{row['ms']:>10.1f}{ratio:>10}{spread:>16}{row['peak_mib']:>10.1f}{share:>11}")
    return "\n".join([*lines, f"matrix products: {figures['matmul_tflops']:.3g} TFLOP/s"])


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.moe", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="file that receives the figures")
    parser.add_argument("--plot", type=Path, help="PNG that shows them")
    parser.add_argument("--model", default="qwen3-vl-2b" if on_gpu else "small", choices=SIZES)
    parser.add_argument("--tokens", type=int, nargs="*", default=[1024, 4096, 16384], help="of a layer")
    parser.add_argument("--step-tokens", type=int, nargs="*", default=[1024, 4096], help="of a training step")
    parser.add_argument("--checkpointing", nargs="+", default=["off"], choices=("off", "on"), help="of the step")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--rounds", type=int, default=3, help="interleaved runs of each case")
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if on_gpu else "float32", choices=("float32", "bfloat16"))
    parser.add_argument("--worker", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--first", action="store_true", help=argparse.SUPPRESS)
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = parser.parse_args(arguments)
    if options.worker:
        options.out.write_text(json.dumps(measure_case(options)))
        return
    figures = bench(options, arguments)
    figures |= {k: getattr(options, k) for k in ("model", "dtype", "rounds", "checkpointing")}
    figures |= {"machine": results.machine(torch.device(options.device))}
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    if options.plot:
        plot(figures, options.plot)
    print(table(figures))


if __name__ == "__main__":
    run_main(main)
