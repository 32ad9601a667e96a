"""A run folder with tiny data and a teacher for tests of the teacher pass; an independent reference of its rows."""

import json
from pathlib import Path

import torch

from pipeline.benchmark.random_models import build
from pipeline.data.processor import Processor
from pipeline.data.readers import read_samples
from pipeline.models.loading import load_model, save_model
from pipeline.recipe import RandomModelConfig, Recipe, load_recipe
from tests.helpers import recipes
from tests.helpers.tiny_data import corpus, make_processor, save_image

SAMPLES, SHARD, TOP_K, TEMPERATURE = 41, 10, 16, 2.0
SIZES = RandomModelConfig.model_validate(recipes.SIZES)
TARGETS = {
    "dtype": "float32", "top_k": TOP_K, "temperature": TEMPERATURE, "shard_samples": SHARD, "batch_size": 4,
}  # fmt: skip


def write_recipe(run: Path) -> Path:
    return recipes.write(run / "recipe.yaml", recipes.chat(run, "train", TARGETS))


def write_data(root: Path) -> None:
    """Chat JSONL: one or two images of three sizes, answers of different lengths."""
    root.mkdir()
    for n, (width, height) in enumerate([(64, 64), (128, 64), (96, 96)]):
        save_image(root / f"{n}.png", width, height, seed=n)
    with (root / "train.jsonl").open("w") as file:
        for i, sample in enumerate(corpus(root / "0.png")[:SAMPLES]):
            answer = f"{i} {sample.answer[: 8 + 7 * (i % 9)]}"  # equal contents would be one sample
            turns = [{"role": "user", "content": sample.prompt}, {"role": "assistant", "content": answer}]
            images = [f"{i % 3}.png", *(["1.png"] if i % 5 == 4 else [])]
            file.write(json.dumps({"id": str(i), "images": images, "messages": turns}) + "\n")


def make_run(run: Path) -> Path:
    """A run folder up to the teacher, whose distributions are peaky, as a trained one's."""
    processor = make_processor(run / "processor")
    write_data(run / "data")
    model = build(SIZES, processor, seed=0)
    model.model.language_model.norm.weight.data.mul_(60.0)
    save_model(model, processor, run / "models" / "teacher")
    return write_recipe(run).parent


def elsewhere(run: Path, store: Path, *overrides: str) -> Recipe:
    """The same run with another store."""
    return load_recipe(run / "recipe.yaml", [f"targets.store={store}", *overrides])


def parts(recipe):
    processor = Processor.load(recipe.processor_dir, recipe.data)
    samples = read_samples(recipe.data.format, recipe.data_root, recipe.data.train_split)
    return processor, samples, load_model(recipe.model_dir(recipe.targets.teacher))


@torch.no_grad()
def alone(model, processor, sample):
    """Independent reference: Hugging Face's own logits for one unpadded sample.

    Returns the answer's tokens and the log-probabilities [T, V] that each was predicted with.
    """
    encoded = processor.encode(sample)
    ids = encoded.input_ids[None]
    logits = model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=encoded.pixel_values.to(model.dtype),
        image_grid_thw=encoded.image_grid_thw,
        mm_token_type_ids=(ids == processor.image_token_id).long(),
    ).logits[0]
    answer = [*processor.tokenizer.encode(sample.answer, add_special_tokens=False), processor.eos_id]
    before = len(encoded.input_ids) - len(answer)
    assert encoded.input_ids[before:].tolist() == answer
    log_p = (logits[:, : len(processor.tokenizer)].double() / TEMPERATURE).log_softmax(-1)  # padding rows are no tokens
    return torch.tensor(answer), torch.stack([log_p[before + t - 1] for t in range(len(answer))])
