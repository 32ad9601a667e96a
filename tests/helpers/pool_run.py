"""A run whose teacher answers: half of its training records have no answer, and some of the teacher's answers end."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from pipeline.data.processor import Processor
from pipeline.recipe import Recipe, load_recipe
from pipeline.targets import answers
from pipeline.targets.answers import AnswerStore
from pipeline.targets.container.writer import StoreWriter
from tests.helpers import recipes
from tests.helpers.teacher_run import TARGETS, make_run
from tests.helpers.tiny_data import data

ANSWERS = {"max_new_tokens": 10}
QUESTIONS, LABELLED = 21, 20
EARLIER = [{"role": "user", "content": "Is there a car?"}, {"role": "assistant", "content": "A red car."}]
"""Turns before every other question."""
ENDING = 4.5
"""Factor on the weights of a message's end: a random teacher would hardly ever say it."""


def make(run: Path, **targets: object) -> Path:
    """`teacher_run.make_run` with QUESTIONS among the records, and `targets.answers`."""
    make_run(run)
    make_lively(run / "models" / "teacher", Processor.load(run / "processor", data()).eos_id)
    path = run / "data" / "train.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for number, record in enumerate(records):
        if number % 2 == 0:
            asked = f"{record['messages'][0]['content']} ({number})"
            record["messages"] = [*EARLIER[: 2 * (number % 4 // 2)], {"role": "user", "content": asked}]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    given = {**TARGETS, "sketches": {"layer": 1}, "answers": ANSWERS, **targets}
    return recipes.write(run / "recipe.yaml", recipes.chat(run, "train", given)).parent


def make_lively(model: Path, eos_id: int, sharpness: float = 1.0) -> None:
    """Change a random model so that what it says depends on image and question, and ends here and there.

    Args:
        sharpness: factor on its logits; a random model's are close to 0.
    """
    (path,) = model.glob("*.safetensors")
    weights, drawn = load_file(path), torch.Generator().manual_seed(1)
    for name, values in weights.items():
        if values.ndim > 1 and "embed" not in name:
            weights[name] = torch.randn(values.shape, generator=drawn) * 0.3
    weights["model.language_model.norm.weight"] *= sharpness
    words = weights["model.language_model.embed_tokens.weight"]  # of the LM head, too
    words[:256] *= 0.3  # single bytes, which seldom make a text
    words[eos_id] *= ENDING
    save_file(weights, path, metadata={"format": "pt"})


def recipe_of(run: Path, *overrides: str) -> Recipe:
    return load_recipe(run / "recipe.yaml", overrides)


def reword(recipe: Recipe, more: str) -> None:
    """Change the teacher's answers in the store, as another machine's pass might; soft targets stay as they are."""
    store = AnswerStore.open(recipe.store_url, None)
    writer = StoreWriter(recipe.store_url, store.identity)
    for shard, ids in store.shard_members:
        rows = []
        for sample_id in ids:
            answer, (_, tokens) = store.read(sample_id), store.read_record(sample_id)
            said = replace(answer, text=answer.text + more if answer.text else "")
            rows.append((sample_id, tokens, answers.encode(said)))
        writer.write_shard(shard, rows, "answers")
