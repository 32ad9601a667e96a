"""The sampler as the data set grows: planning a window, memory, the next batch, and the table's file.

    python -m tools.bench.sampler [--json FILE] [--plot PNG] [--sizes 1e5 1e6 1e7 1e8] [--repeats 3] [--folder DIR]

For each size a process of its own reads a hardness table from a Parquet file (random; three strata of 60, 30 and 10%,
seven tenths scored) and plans windows of 50 steps of 1,024 samples, in one thread. The baseline `sort_all` does what a
window is defined by: it weighs all samples and sorts them by perturbed weights, in numpy; up to 1e7.
The largest size writes 2 GB below DIR (default: the system's temporary folder). `MEANING` says what the figures are.
"""

import argparse
import ctypes
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from matplotlib.figure import Figure

from pipeline.errors import run_main
from pipeline.method.curriculum import Weights, Window, plan_window
from pipeline.method.hardness import ROWS, HardnessTable
from pipeline.method.plan import WindowPlan
from pipeline.recipe import CurriculumConfig, HardnessConfig

MEANING = {
    "samples": "size of the data set",
    "plan_s": "seconds from the table to a window's order (ranks, and the race), median",
    "plan_cpu_s": "the same in processor time, which other processes on the machine disturb less",
    "sort_all_s": "seconds of the baseline; null where it was not measured",
    "bytes_a_sample": "growth of the process's anonymous memory by the read table and one planned window, a sample",
    "peak_bytes_a_sample": "growth of its largest resident memory up to the end of planning, a sample",
    "batch_us": "microseconds to the next step's batch, median",
    "load_s": "seconds to read the table from its file",
    "save_s": "seconds to write the table's file, ranks included",
    "save_extra_mb": "by how many 10^6 bytes writing raised the largest resident memory",
    "file_bytes_a_sample": "size of the file, a sample",
}
BATCH, STEPS, STEP = 1024, 50, 20_000
STRATA, SHARES = ("general", "region", "suggestion"), (0.6, 0.3, 0.1)
LARGEST_BASELINE = 10_000_000


def make_file(path: Path, samples: int) -> None:
    """A table as training would have left it, written block by block."""
    rng, writer = np.random.default_rng(0), None
    for start in range(0, samples, ROWS):
        count = min(ROWS, samples - start)
        numbers = pa.array(np.arange(start, start + count)).cast(pa.string())
        last_step = np.where(rng.random(count) < 0.7, rng.integers(0, STEP, count), -1).astype(np.int32)
        stratum = np.searchsorted(np.cumsum(SHARES), rng.random(count)).clip(0, len(STRATA) - 1).astype(np.int32)
        block = pa.record_batch(
            {
                "sample_id": pc.utf8_lpad(numbers, 16, "0"),  # as long as a short content hash
                "stratum": pa.DictionaryArray.from_arrays(stratum, list(STRATA)),
                "hardness": rng.random(count, dtype=np.float32) ** 2,
                "visits": rng.integers(0, 4, count).astype(np.int32),
                "last_step": last_step,
                "prior": rng.random(count, dtype=np.float32) ** 2,
            }
        )
        writer = writer or pq.ParquetWriter(path, block.schema)
        writer.write_batch(block)
    assert writer is not None
    writer.close()


def sort_all(table: HardnessTable, number: int) -> np.ndarray:
    """A window by weighing and sorting everybody; noise from numpy's generator."""
    size = np.empty(len(table), np.float32)
    for code in range(len(table.strata)):
        members = np.flatnonzero(table.stratum == code)
        size[members] = table.difficulty[members] / table.difficulty[members].mean()
    noise = np.random.default_rng(number).random(len(table))
    with np.errstate(divide="ignore"):
        key = np.log(-np.log(noise)) - 2.0 * np.log(size) + 0.1 * table.visits
    return np.argsort(key, kind="stable")[: BATCH * STEPS]


def anonymous() -> int:
    """Bytes of memory that the kernel cannot drop, after what is free was given back to it."""
    gc.collect()
    pa.default_memory_pool().release_unused()
    ctypes.CDLL(None).malloc_trim(0)
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon"))
    return int(line.split()[1]) << 10


def peak() -> int:
    """Largest resident memory so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def timed(function: Callable[[], Any], repeats: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """Median seconds of a call."""
    seconds = []
    for _ in range(repeats):
        started = clock()
        function()
        seconds.append(clock() - started)
    return statistics.median(seconds)


def plan_once(table: HardnessTable, number: int) -> np.ndarray:
    """What a window's planning does, all samples eligible."""
    ranks = table.ranks(step=STEP, half_life_steps=len(table) / BATCH)
    window = Window(number, BATCH * STEPS, floor=0.5, weights=Weights(gamma=2.0, visit_penalty=0.1))
    return plan_window(ranks, table.visits, table.last_window, table.stratum, table.pool_S, window, seed=0)


def measure(path: Path, repeats: int) -> dict[str, float | None]:
    """One size, in this process."""
    warm = HardnessTable(
        [f"{i:03d}" for i in range(999)], [STRATA[i % 3] for i in range(999)], np.ones(999, np.float32)
    )
    plan_once(warm, 1)
    warm.save(path.with_suffix(".warm"))
    HardnessTable.load(path.with_suffix(".warm"))
    memory, highest = anonymous(), peak()
    started = time.perf_counter()
    table = HardnessTable.load(path)
    load_s, number = time.perf_counter() - started, STEP // STEPS
    np.floor_divide(table.last_step, STEPS, out=table.last_window)  # as such a run would have it
    plan = WindowPlan(len(table), BATCH, STEPS, 0, CurriculumConfig(), HardnessConfig())
    plan.refresh(STEP, 1.0, table)
    samples, held = len(table), anonymous() - memory
    plan_cpu_s = timed(lambda: plan_once(table, number), repeats, time.process_time)
    plan_s, planned = timed(lambda: plan_once(table, number + 1), repeats), peak()
    steps = iter(range(STEP, STEP + STEPS))
    batch_s = timed(lambda: plan.batch(next(steps)), STEPS)
    save_s = timed(lambda: table.save(path.with_suffix(".saved")), 1)
    extra = peak() - planned
    slow = timed(lambda: sort_all(table, number), 1) if samples <= LARGEST_BASELINE else None
    return {
        "samples": samples,
        "plan_s": plan_s,
        "plan_cpu_s": plan_cpu_s,
        "sort_all_s": slow,
        "bytes_a_sample": held / samples,
        "peak_bytes_a_sample": (planned - highest) / samples,
        "batch_us": 1e6 * batch_s,
        "load_s": load_s,
        "save_s": save_s,
        "save_extra_mb": extra / 1e6,
        "file_bytes_a_sample": path.with_suffix(".saved").stat().st_size / samples,
    }


def bench(sizes: Sequence[int], repeats: int, folder: Path | None) -> list[dict[str, Any]]:
    """Every size in a process of its own."""
    rows = []
    for size in sizes:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            path = Path(place) / "hardness.parquet"
            make_file(path, size)
            command = [sys.executable, "-m", "tools.bench.sampler", "--measure", str(path), "--repeats", str(repeats)]
            done = subprocess.run(
                command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True, check=True
            )
            rows.append(json.loads(done.stdout))
        print(line(rows[-1], rows[0]), flush=True)
    return rows


def line(row: dict[str, Any], first: dict[str, Any]) -> str:
    """A row of the printed table: figures, and planning's growth against the growth of the data set."""
    growth = row["plan_cpu_s"] / first["plan_cpu_s"]
    slower = f"{row['sort_all_s'] / row['plan_s']:.1f}x" if row["sort_all_s"] else "-"
    return (
        f"{row['samples']:>11,} samples: plan {row['plan_s']:.3f} s ({row['plan_cpu_s']:.3f} s of processor, "
        f"{growth:.1f}x for {row['samples'] / first['samples']:.0f}x the samples), sort_all {slower}, "
        f"{row['bytes_a_sample']:.1f} bytes a sample, peak {row['peak_bytes_a_sample']:.1f}, "
        f"batch {row['batch_us']:.1f} us, load {row['load_s']:.1f} s, save {row['save_s']:.1f} s "
        f"(+{row['save_extra_mb']:.0f} MB)"
    )


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Three panels over the number of samples: planning, memory, the next batch."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    samples = [row["samples"] for row in rows]
    slow = [(row["samples"], row["sort_all_s"]) for row in rows if row["sort_all_s"]]
    left.loglog(
        samples, [row["plan_cpu_s"] for row in rows], "o-", color="#4338ca", label="plan_window, processor time"
    )
    if slow:
        left.loglog(*zip(*slow, strict=True), "s--", color="#667085", label="baseline: sort all")
    left.axhline(5, color="#c2578a", linewidth=0.8, linestyle=":", label="5 s")
    left.set_title("Planning a window, s", fontsize=10, loc="left")
    figure.legend(loc="outside lower left", ncols=3, frameon=False, fontsize=8)
    shown = [row for row in rows if row["samples"] >= 1_000_000]  # below, a process's own changes outweigh the table
    middle.semilogx([r["samples"] for r in shown], [r["bytes_a_sample"] for r in shown], "o-", color="#0d9488")
    middle.axhline(24, color="#c2578a", linewidth=0.8, linestyle=":")
    middle.set_ylim(0, 30)
    middle.set_title("Resident bytes a sample", fontsize=10, loc="left")
    right.semilogx(samples, [row["batch_us"] for row in rows], "o-", color="#e08e45")
    right.set_ylim(bottom=0)
    right.set_title("Next batch, µs", fontsize=10, loc="left")
    for axes in (left, middle, right):
        axes.set_xlabel("samples", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(color="#e4e7ec", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=90)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--sizes", type=float, nargs="+", default=[1e5, 1e6, 1e7, 1e8])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.measure:
        print(json.dumps(measure(args.measure, args.repeats)))
        return
    rows = bench([int(size) for size in args.sizes], args.repeats, args.folder)
    if args.json:
        args.json.write_text(json.dumps({"meaning": MEANING, "rows": rows}, indent=1) + "\n")
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    run_main(main)
