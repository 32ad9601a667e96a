"""Memory that an export needs, as a share of the model it writes.

    python -m tools.bench.export [--json FILE] [--gib 1.0] [--dtype float32 bfloat16]

Makes a checkpoint of a Qwen3-VL-MoE with random weights, `--gib` GiB in float32, with DeepSpeed and the code that
training uses, and runs `clkd export` on it. Its memory is read from /proc 200 times a second. The
baseline, which is subtracted, is the same command on a model of one layer: what Python, torch and transformers need by
themselves.
Writes one flat JSON object; `MEANING` says what the figures are.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

from pipeline.errors import run_main
from pipeline.evaluation import results
from pipeline.recipe import JobConfig
from pipeline.training import checkpoint, engine
from pipeline.training.process import start_distributed
from tools.bench.process_memory import peak_of

MEANING = {
    "model_mb": "size of the exported weights, in 10^6 bytes",
    "held": "peak of anonymous memory above the baseline's, over the size of the model: what the kernel cannot drop",
    "resident": "peak of all resident memory above the baseline's, over the size of the model: files that are mapped, "
    "and that the kernel drops when memory is short, count as well",
}
HIDDEN, WIDTH, EXPERTS = 768, 720, 8


def make_model(layers: int) -> Qwen3VLMoeForConditionalGeneration:
    """Every layer an MoE layer of about 61 MB in float32, its packed experts 35 and 18 MB."""
    text: dict[str, Any] = {
        "vocab_size": 8000,
        "hidden_size": HIDDEN,
        "intermediate_size": WIDTH,
        "moe_intermediate_size": WIDTH,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "num_hidden_layers": layers,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [12, 10, 10],
            "mrope_interleaved": True,
        },
    }
    vision: dict[str, Any] = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 2,
        "out_hidden_size": HIDDEN,
        "deepstack_visual_indexes": [0],
    }
    tokens = {f"{name}_token_id": 7990 + i for i, name in enumerate(("image", "video", "vision_start", "vision_end"))}
    torch.manual_seed(0)
    return Qwen3VLMoeForConditionalGeneration(
        Qwen3VLMoeConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **tokens)
    )


def make_checkpoint(root: Path, layers: int, dtype: str) -> Path:
    """A checkpoint of a model that is exported in `dtype`, saved by an engine of one rank."""
    start_distributed()
    model = make_model(layers)
    job = JobConfig.model_validate(
        {"init": "/x", "steps": 1, "batch": {"global_size": 1}, "optimizer": {"kind": "sgd"}}
    )
    written = model.config.to_dict() | {"dtype": dtype, "architectures": [type(model).__name__]}
    live = engine.start(model, job, {"zero_optimization": {"stage": 0}})
    return checkpoint.save(live, root, 1, {}, {}, 1, {"config.json": json.dumps(written).encode()})


def measure(gib: float, dtype: str) -> dict[str, float]:
    """The figures of `MEANING` for one dtype."""
    peaks, sizes = [], []
    layer_bytes = 4 * sum(p.numel() for p in make_model(1).model.language_model.layers.parameters())
    with tempfile.TemporaryDirectory() as scratch:
        for layers in (1, max(2, round(gib * 2**30 / layer_bytes))):
            root, out = Path(scratch) / f"checkpoints{layers}", Path(scratch) / f"out{layers}"
            folder = make_checkpoint(root, layers, dtype)
            peaks.append(peak_of([sys.executable, "-m", "pipeline", "export", str(folder), "--out", str(out)]))
            sizes.append(sum(path.stat().st_size for path in out.glob("*.safetensors")))
    small, large = peaks
    return {
        "model_mb": sizes[1] / 1e6,
        "held": (large.held - small.held) / (sizes[1] - sizes[0]),
        "resident": (large.resident - small.resident) / (sizes[1] - sizes[0]),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench.export", description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--gib", type=float, default=1.0, help="size of the checkpoint's parameters in float32")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    options = parser.parse_args(argv)
    figures: dict[str, Any] = results.machine(torch.device("cpu")) | {"gib": options.gib}
    print(f"{'dtype':10}{'model MB':>10}{'held':>8}{'resident':>10}   shares of the model's size")
    for dtype in options.dtype:
        measured = measure(options.gib, dtype)
        print(f"{dtype:10}{measured['model_mb']:10.0f}{measured['held']:8.2f}{measured['resident']:10.2f}", flush=True)
        figures |= {f"{dtype}_{name}": value for name, value in measured.items()}
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    run_main(main)
