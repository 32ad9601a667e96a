"""Vision pretraining of a random model on the embedded scenes: image tokens learn the words of what they show.

    python -m pipeline.vision --config RECIPE.yaml --model NAME

No checkpoint can be downloaded for the embedded default, and a decoder does not find a random vision tower's features
in minutes. So the tower is aligned with words first, as real towers are with captions: each image token's logits over
the (tied) word embeddings shall name the object in its cell. The decoder takes no part. A model loaded from a
checkpoint skips this stage.

Shapes: B images, C cells (image tokens) of an image, D decoder width, V vocabulary.
"""

import argparse
import json
import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import PreTrainedModel

from pipeline.config import Recipe, VisionPretraining, parse_args
from pipeline.data import Sample, load_image
from pipeline.errors import ConfigError, DataError, run_main
from pipeline.hf_folder import Building, copy_companions
from pipeline.models import load_model, save_model
from pipeline.processor import Processor

DONE = "vision.json"
MARKED = "rectangle"
"""The word of cells inside a marked region."""
OBJECT_WEIGHT = 4.0
"""Weight of a cell that shows an object against one that shows road or sky."""
MIN_OVERLAP = 0.2
"""A cell shows an object that covers this share of the cell, or has this share of itself inside it."""


class CellWords(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """(pixel_values, grid [1, 3], target distribution over words [C, V]) of one image; half the visits mark a region."""

    def __init__(self, root: Path, split: str, processor: Processor, visits: int, seed: int) -> None:
        self.records = sorted((root / "CODA-LM" / split).glob("*.json"))
        if not self.records:
            raise DataError(f"{root / 'CODA-LM' / split}: no records. Draw the scenes first.")
        self.root, self.processor, self.visits, self.seed = root, processor, visits, seed
        self.merge = processor.image_processor.merge_size

    def __len__(self) -> int:
        return self.visits

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor, Tensor]:
        epoch, place = divmod(position, len(self.records))
        path = self.records[_epoch_order(self.seed, epoch, len(self.records))[place]]
        record = json.loads(path.read_text())
        if "objects" not in record:
            raise DataError(f"{path}: no `objects`: vision pretraining needs the embedded scenes' records.")
        rng = Random(f"{self.seed}/{position}")
        marked = rng.choice(record["objects"])["box"] if rng.random() < 0.5 else None
        folder, _, number = path.stem.rpartition("_")
        images = (self.root / folder / "images" / f"{number}.jpg",)
        box = None if marked is None else (marked[0], marked[1], marked[2], marked[3])
        image = load_image(Sample(path.stem, images, "", "", "region", "unknown", box))
        pixels, grid = self.processor.pixels([image])
        rows, columns = int(grid[0, 1]) // self.merge, int(grid[0, 2]) // self.merge
        return pixels, grid, self._targets(record, marked, image.size, rows, columns)

    def _targets(
        self, record: dict[str, Any], marked: list[float] | None, size: tuple[int, int], rows: int, columns: int
    ) -> Tensor:
        width, height = size[0] / columns, size[1] / rows
        target_CV = torch.zeros(rows * columns, self.processor.vocab_size)
        for cell in range(rows * columns):
            frame = (cell % columns * width, cell // columns * height, width, height)
            shown = [o for o in record["objects"] if _covers(o["box"], frame)]
            words = " ".join(shown[-1]["words"]) if shown else record["weather"]
            if marked is not None and _overlap(marked, frame) > 0:
                words += f" {MARKED}"
            ids = self.processor.tokenizer.encode(f" {words}", add_special_tokens=False)  # as inside a sentence
            target_CV[cell, ids] = 1.0
        return target_CV / target_CV.sum(-1, keepdim=True)


def _overlap(box: Sequence[float], frame: Sequence[float]) -> float:
    sides = [min(box[i] + box[i + 2], frame[i] + frame[i + 2]) - max(box[i], frame[i]) for i in (0, 1)]
    return max(0.0, sides[0]) * max(0.0, sides[1])


def _covers(box: Sequence[float], frame: Sequence[float]) -> bool:
    return _overlap(box, frame) > MIN_OVERLAP * min(frame[2] * frame[3], box[2] * box[3])


def cell_loss(features_CD: Tensor, embeddings_VD: Tensor, targets_CV: Tensor) -> Tensor:
    """Cross-entropy between each cell's words and its image token's distribution over word embeddings. [ours]"""
    log_q_CV = torch.log_softmax(features_CD @ embeddings_VD.T, dim=-1)[:, : targets_CV.shape[1]]
    loss_C = -(targets_CV * log_q_CV).sum(-1)
    weight_C = torch.where(targets_CV.max(-1).values < 1, OBJECT_WEIGHT, 1.0)
    return (weight_C * loss_C).sum() / weight_C.sum()


def pretrain(
    model: PreTrainedModel, processor: Processor, root: Path, split: str, settings: VisionPretraining, seed: int
) -> float:
    """Train tower, merger and word embeddings in place; returns the mean loss of the last tenth of the steps."""
    words = CellWords(root, split, processor, settings.steps * settings.batch_size, seed)
    batches = DataLoader(words, batch_size=settings.batch_size, collate_fn=_collate)
    visual, embeddings = model.model.visual, model.get_input_embeddings()
    parameters = [*visual.parameters(), *embeddings.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, betas=(0.9, 0.98), weight_decay=0.01)
    losses: list[float] = []
    progress = tqdm(batches, desc="vision", mininterval=1)
    for step, (pixels, grid, targets) in enumerate(progress):
        share = (step + 1) / settings.steps
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * min(1.0, share / 0.05) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share)))
        output = visual(pixels, grid_thw=grid)
        loss = cell_loss(output.pooler_output, embeddings.weight, targets)
        for feature in output.deepstack_features:
            loss = loss + 0.3 * cell_loss(feature, embeddings.weight, targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss.item())
        progress.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail)


@lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, count: int) -> list[int]:
    order = list(range(count))
    Random(f"{seed}/{epoch}").shuffle(order)
    return order


def _collate(items: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    pixels, grids, targets = zip(*items, strict=True)
    return torch.cat(pixels), torch.cat(grids), torch.cat(targets)


def pretrain_model(recipe: Recipe, name: str) -> Path:
    """Pretrain `models.NAME` where the recipe asks for it and it is not done yet; returns its folder."""
    settings, folder = recipe.models[name].pretrain, recipe.model_dir(f"models.{name}")
    if settings is None:
        raise ConfigError(f"models.{name}: has no `pretrain` section")
    if (folder / DONE).is_file():
        return folder
    processor = Processor.load(recipe.processor_dir, recipe.data)
    model = load_model(folder, attention="eager")
    loss = pretrain(model, processor, recipe.data_root, recipe.data.train_split, settings, recipe.run.seed)
    with Building(folder, replace=True) as writing:
        save_model(model, recipe.processor_dir, writing)
        copy_companions(folder, writing, skip=())
        (writing / DONE).write_text(json.dumps({"steps": settings.steps, "loss": loss}))
    return folder


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of the vision pretraining."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.vision")
    parser.add_argument("--model", required=True, help="key of `models` with a `pretrain` section")
    args = parse_args("vision", argv, parser)
    torch.set_float32_matmul_precision(args.recipe.run.matmul_precision)
    torch.manual_seed(args.recipe.run.seed)
    print(f"models.{args.options.model}: {pretrain_model(args.recipe, args.options.model)}")


if __name__ == "__main__":
    run_main(main)
