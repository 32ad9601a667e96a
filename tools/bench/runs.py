"""What the benchmarks of whole stages share: a small run in a scratch folder, and ratios with their spread.

The run has few scenes and random weights. `peaky` makes a model's distributions about as
concentrated as a trained teacher's.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random

import torch

from pipeline.benchmark.art import render
from pipeline.benchmark.random_models import build
from pipeline.benchmark.text import record
from pipeline.benchmark.tokenizer import write_processor
from pipeline.benchmark.world import plan_scene
from pipeline.data.processor import Processor
from pipeline.data.readers import read_samples
from pipeline.models.loading import save_model
from pipeline.recipe import Recipe, load_recipe

RECIPE = Path(__file__).with_name("from_nothing.yaml")
LOGIT_STD = 5.0
"""Standard deviation of a peaky model's logits: an entropy of a few nats over 151,936 tokens."""
Figures = dict[str, object]


def make_run(folder: Path, scenes: int, overrides: Sequence[str]) -> Recipe:
    """A run in `folder` up to its processor: `from_nothing.yaml`, changed, with `scenes` images and their questions.

    Soft targets alone: its features are those of a layer that a model of another size need not have.
    """
    logits_only = ["targets.sketches=null", "jobs.clkd.distill.features=null"]
    recipe = load_recipe(RECIPE, [f"run.dir={folder}", "targets.teacher=models.teacher", *logits_only, *overrides])
    drawn = recipe.required_benchmark.scenes
    draw_scenes(recipe.data_root, scenes, drawn.width, drawn.height)
    write_processor(recipe, read_samples(recipe.data.format, recipe.data_root, recipe.data.train_split))
    return recipe


def draw_scenes(root: Path, count: int, width: int, height: int) -> None:
    """A Train split in CODA-LM's layout, drawn in this process."""
    images, records = root / "val" / "images", root / "CODA-LM" / "Train"
    for folder in (images, records):
        folder.mkdir(parents=True)
    for number in range(1, count + 1):
        rng = Random(number)
        scene = plan_scene(rng, corner=False, held_out=False)
        image, boxes = render(scene, width, height)
        image.save(images / f"{number:04d}.jpg", quality=92)
        (records / f"val_{number:04d}.json").write_text(json.dumps(record(scene, boxes, image.size, rng)))


def make_model(recipe: Recipe, name: str, vocab: int | None, *, peaky: bool) -> int:
    """Write `models.<name>` with random weights and `vocab` logits (None: the tokenizer's). Returns its parameters."""
    processor = Processor.load(recipe.processor_dir, recipe.data)
    model = build(recipe.random_models[name], processor, recipe.run.seed)
    if vocab is not None:
        torch.manual_seed(recipe.run.seed)
        model.resize_token_embeddings(vocab, mean_resizing=False)
    if peaky:
        decoder = model.model.language_model
        std = decoder.embed_tokens.weight.std() * decoder.config.hidden_size**0.5
        decoder.norm.weight.data.mul_(LOGIT_STD / std.item())
    save_model(model, processor, recipe.model_dir(f"models.{name}"))
    return model.num_parameters()


def ratios(seconds: Mapping[str, Sequence[float]], baseline: str) -> Figures:
    """Median milliseconds of each way, and of its ratios to the baseline in the same round the median and quartiles."""
    figures: Figures = {f"{way}_ms": 1e3 * statistics.median(values) for way, values in seconds.items()}
    for way in [way for way in seconds if way != baseline]:
        of_rounds = [a / b for a, b in zip(seconds[way], seconds[baseline], strict=True)]
        low, middle, high = quartiles(of_rounds)
        figures |= {f"{way}_vs_{baseline}": middle, f"{way}_vs_{baseline}_q1": low, f"{way}_vs_{baseline}_q3": high}
    return figures


def quartiles(values: Sequence[float]) -> list[float]:
    """First quartile, median, third quartile."""
    return [
        float(x) for x in torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75]).double())
    ]


def rotated(ways: Sequence[str], turn: int) -> list[str]:
    """The ways in an order that differs from round to round, so that each follows each."""
    start = turn % len(ways)
    return [*ways[start:], *ways[:start]]


def table(figures: Figures, labels: Mapping[str, str], baseline: str, unit: str) -> str:
    """A line for each way: its median time and its ratio to the baseline with quartiles."""
    lines = [f"{'':42}{unit:>14}{'ratio':>8}{'quartiles':>16}"]
    for way, label in labels.items():
        ratio = "1" if way == baseline else f"{figures[f'{way}_vs_{baseline}']:.3f}"
        spread = "" if way == baseline else " - ".join(f"{figures[f'{way}_vs_{baseline}_q{i}']:.3f}" for i in (1, 3))
        lines.append(f"{label:42}{figures[f'{way}_ms']:>14.2f}{ratio:>8}{spread:>16}")
    return "\n".join(lines)
