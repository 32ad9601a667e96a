"""Latency at batch 1 of every model in a recipe's evaluation rows, and of every expert loop of its MoE models.

    python -m tools.bench.latency RECIPE.yaml --json FILE [section.key=value ...]

Writes one flat JSON object. Figures of a model carry its reference, `jobs.clkd` as `jobs_clkd`: `<model>_ttft_ms`,
`<model>_tpot_ms`, `<model>_e2e_ms`, `<model>_speedup_vs_teacher`; those of an expert loop `<model>_<loop>_...`.
Everything is measured interleaved in one go; ratios are to the first row's model.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from pipeline.errors import run_main
from pipeline.evaluation import latency, results
from pipeline.evaluation.generate import is_moe, use_experts
from pipeline.evaluation.stage import Evaluation, timed_samples
from pipeline.models import experts
from pipeline.recipe import parse_args

EXPERT_LOOPS = ("eager", "grouped_mm", "batched_mm", experts.NAME)


def variants(evaluation: Evaluation) -> Iterator[tuple[str, PreTrainedModel]]:
    """(name, model): every distinct model as evaluation runs it, then MoE models once per expert loop."""
    moe = []
    for reference in evaluation.weights:
        model = evaluation.open(reference)
        yield reference.replace(".", "_"), model
        if is_moe(model):
            moe.append(reference)
    for reference in moe:
        for loop in EXPERT_LOOPS:
            model = evaluation.open(reference)
            use_experts(model, loop)
            yield f"{reference.replace('.', '_')}_{loop}", model


def bench(evaluation: Evaluation) -> dict[str, object]:
    """The figures and what they were measured on."""
    models, settings = dict(variants(evaluation)), evaluation.settings
    samples = timed_samples(evaluation.samples, settings.latency_samples)
    prompts = [evaluation.processor.encode_prompt(sample) for sample in samples]
    total = len(models) * len(prompts) * settings.latency_repeats
    with tqdm(total=total, desc="latency", unit="answer", disable=None) as bar:
        timings = latency.measure(
            models, evaluation.processor, prompts, repeats=settings.latency_repeats, on_progress=bar.update
        )
    figures: dict[str, object] = {}
    for name, speed in latency.summarise(timings, reference=next(iter(models))).items():
        figures |= {
            f"{name}_ttft_ms": speed.ttft_ms,
            f"{name}_tpot_ms": speed.tpot_ms,
            f"{name}_e2e_ms": speed.e2e_ms,
            f"{name}_speedup_vs_teacher": speed.speedup,
        }
    measured = {"new_tokens": latency.NEW_TOKENS, "samples": len(prompts), "repeats": settings.latency_repeats}
    return figures | measured | {"machine": results.machine(torch.device(evaluation.device))}


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench.latency", description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="file that receives the figures")
    arguments = parse_args("bench.latency", argv, parser)
    figures = bench(Evaluation(arguments.recipe))
    arguments.options.json.write_text(json.dumps(figures, indent=1) + "\n")
    for name, value in figures.items():
        print(f"{name}: {value:.3f}" if isinstance(value, float) else f"{name}: {value}")


if __name__ == "__main__":
    run_main(main)
