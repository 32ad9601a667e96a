"""Memory and time of upcycling against the size of what is upcycled.

    python -m tools.bench.upcycle --gigabytes 4.5 --folder /scratch [--json FILE]

Makes a dense Qwen3-VL checkpoint of random bf16 tensors and runs `clkd upcycle` on it. Memory is
the peak of the process's anonymous pages (RssAnon) above what it holds after its imports: the files themselves are
mapped and belong to the page cache. The baseline is the size of the MoE model, which a script that builds it in memory
holds at least.
"""

import argparse
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3VLConfig

from pipeline.models.families import without_weights
from pipeline.models.hf_folder import DiskLayout, ShardWriter, TensorFiles, save_config
from tools.bench.process_memory import peak_of


def make_dense(folder: Path, gigabytes: float, hidden: int, vocab: int, seed: int = 0) -> None:
    """Write a checkpoint of at least the given size: Qwen3-VL-2B's proportions, as many layers as it takes."""
    one, two = (_bytes(_config(layers, hidden, vocab)) for layers in (1, 2))
    config = _config(max(2, math.ceil((gigabytes * 1e9 - one) / (two - one)) + 1), hidden, vocab)
    folder.mkdir(parents=True)
    save_config(config, folder)
    writer, layout, generator = ShardWriter(folder), DiskLayout(config), torch.Generator().manual_seed(seed)
    for name, parameter in without_weights(config).named_parameters():
        values = torch.empty(parameter.shape, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)
        for disk_name, tensor in layout(name, values):
            writer.add(disk_name, tensor)
    writer.finish()


def _config(layers: int, hidden: int, vocab: int) -> Qwen3VLConfig:
    text = {
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": vocab,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]},
    }
    vision = {"depth": 2, "hidden_size": 256, "intermediate_size": 512, "num_heads": 4, "out_hidden_size": hidden}
    vision["deepstack_visual_indexes"] = [0]  # type: ignore[assignment]
    return Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, dtype="bfloat16")


def _bytes(config: Qwen3VLConfig) -> int:
    return 2 * sum(p.numel() for p in without_weights(config).parameters())


def folder_bytes(folder: Path) -> int:
    """Size of a checkpoint's tensors."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def largest_tensor(folder: Path) -> int:
    """Bytes of a bf16 checkpoint's largest tensor."""
    with TensorFiles(folder.glob("*.safetensors")) as tensors:
        return max(2 * math.prod(tensors.shape(name)) for name in tensors)


def run(gigabytes: float, hidden: int, vocab: int, folder: Path, options: list[str]) -> dict[str, Any]:
    """Figures of one size; `options` are those of `upcycle`."""
    dense, moe = folder / "dense", folder / "moe"
    make_dense(dense, gigabytes, hidden, vocab)
    python = sys.executable
    idle = peak_of([python, "-c", "import pipeline.models.student"])
    whole = peak_of([python, "-m", "pipeline", "upcycle", str(dense), str(moe), *options])
    peak = whole.held - idle.held
    largest, size = largest_tensor(moe), folder_bytes(moe)
    return {
        "dense_bytes": folder_bytes(dense),
        "moe_bytes": size,
        "largest_tensor_bytes": largest,
        "upcycle_peak_bytes": peak,
        "upcycle_seconds": whole.seconds,
        "peak_to_largest_tensor": peak / largest,
        "peak_to_moe": peak / size,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench.upcycle", description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=4.5, help="of the dense checkpoint, at least")
    parser.add_argument("--hidden", type=int, default=2048, help="hidden size; MLPs are three times as wide")
    parser.add_argument("--vocab", type=int, default=151_936, help="rows of the embedding")
    parser.add_argument(
        "--folder", type=Path, help="where there is room for three times that; default: a temporary one"
    )
    parser.add_argument("--json", type=Path, help="write the figures there too")
    known, options = parser.parse_known_args(argv)
    folder = Path(tempfile.mkdtemp(dir=known.folder))
    try:
        figures = run(known.gigabytes, known.hidden, known.vocab, folder, options)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for name, value in figures.items():
        print(f"{name:28s} {value:16,.2f}" if isinstance(value, float) else f"{name:28s} {value:16,d}")
    if known.json:
        known.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
