"""Questions without an answer: what the teacher is asked, and the training samples with its answers.

    <run.dir>/answers/<split>.jsonl       the teacher's answers as chats, for any other tool
    <run.dir>/answers/index-<split>       index of the training samples with them; made anew when they change
    <run.dir>/answers/questions-<split>   index of what the teacher is asked, if that is more than the training split

A question keeps its sample_id, a hash of the record, whatever the teacher says. So answers, soft targets, hardness and
shards are joined by it as those of any other sample. Further answers to a question have ids that are hashes of it.
"""

import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from pipeline.data.index.derived import Row, open_derived
from pipeline.data.index.samples import Index
from pipeline.data.processor import Processor
from pipeline.data.readers.conversation import PLACEHOLDER
from pipeline.data.sample import Sample
from pipeline.data.splits import named_records, open_split, open_training_split
from pipeline.errors import DataError, StoreError
from pipeline.files import replacing
from pipeline.recipe import Recipe
from pipeline.targets.answers import Answer, AnswerStore, answer_ids
from pipeline.targets.identity import known_identity

FOLDER = "answers"


# -- what is opened ----------------------------------------------------------------------------------------------------


def open_questions(recipe: Recipe) -> Index:
    """The samples of the teacher pass: those of the training split, and each question as often as it is answered.

    Raises:
        DataError: see `splits.open_training_split`; or a record of `data.pool_split` has an answer.
    """
    settings = recipe.targets.answers
    if settings is None:
        return open_training_split(recipe)
    bases = [open_split(recipe, recipe.data.train_split)]
    if recipe.data.pool_split is not None:
        bases.append(_open_pool(recipe, recipe.data.pool_split))
    if len(bases) == 1 and settings.samples == 1:
        return bases[0]
    folder = _folder(recipe, "questions")
    return open_derived(
        folder, bases, {"samples": settings.samples}, partial(_asked, count=settings.samples), "questions"
    )


def open_every(recipe: Recipe) -> Index:
    """What a store may know of, to look at: `open_questions`; without `targets.answers` questions are no error.

    Raises:
        DataError: see `open_questions`.
    """
    return open_questions(recipe) if recipe.targets.answers else open_split(recipe, recipe.data.train_split)


def open_training_samples(recipe: Recipe, processor: Processor, job: str | None = None) -> Index:
    """The samples that are trained on, all with an answer: the record's, or the teacher's where it has none.

    Those whose answer is uncertain, empty, not finished or of no use are left out, and one line says how many.

    Args:
        job: that trains on them. One that the teacher comes from has the labelled samples alone.

    Raises:
        DataError: see `open_questions`; or no sample is left.
        StoreError: the teacher has not answered all questions, or the store is of another run or damaged.
    """
    settings = recipe.targets.answers
    if job is not None and not recipe.jobs[job].pool:
        return _labelled(recipe, job)
    if settings is None:
        return open_training_split(recipe)
    if job is not None and recipe.makes_the_teacher(job):
        return _labelled(recipe, job)
    questions = open_questions(recipe)
    if not questions.from_pool().any():
        return questions
    store = open_answers(recipe, processor, questions)
    identity = {"answers": digest_of(store), "min_certainty": settings.min_certainty}
    change = partial(_answered, store=store, min_certainty=settings.min_certainty)
    samples = open_derived(_folder(recipe, "index"), [questions], identity, change, "answers")
    _say(recipe, samples)
    return samples


def open_answers(recipe: Recipe, processor: Processor, questions: Index) -> AnswerStore:
    """The teacher's answers to all of these questions.

    Raises:
        StoreError: some are missing, or the store is of another run or damaged.
    """
    store = AnswerStore.open(recipe.store_url, known_identity(recipe, processor))
    asked = np.flatnonzero(questions.from_pool())
    missing = store.missing(questions.select(asked).sample_ids)
    if missing:
        raise StoreError(
            f"{store.folder}: the teacher has answered {len(asked) - len(missing):,} of {len(asked):,} questions of "
            f"{recipe.data_root}, split {recipe.data.train_split!r}, that have no answer; {missing[0]} is missing. "
            "`clkd teacher RECIPE.yaml` answers them. Nothing was started."
        )
    return store


def digest_of(store: AnswerStore) -> str:
    """Of all answers in the store: their shards' hashes."""
    return xxhash.xxh3_128_hexdigest("\n".join(commit.xxh3_128 for commit in store.commits))


def _open_pool(recipe: Recipe, name: str) -> Index:
    pool = open_split(recipe, name)
    labelled = np.flatnonzero(~pool.from_pool())
    if len(labelled):
        named, more = named_records(pool, labelled)
        raise DataError(
            f"{recipe.data_root}, split {name!r}: {len(labelled)} of {len(pool)} records have an answer: {named}{more}"
            ". data.pool_split is for questions alone: move these records to the training split, or take their answers "
            "away. Nothing was started."
        )
    return pool


def _labelled(recipe: Recipe, job: str) -> Index:
    samples = open_split(recipe, recipe.data.train_split)
    places = np.flatnonzero(~samples.from_pool())
    where = f"{recipe.data_root}, split {recipe.data.train_split!r}"
    if not len(places):
        raise DataError(
            f"{where}: no record has an answer, and job {job!r} trains on labelled records alone. Nothing was started."
        )
    if len(places) == len(samples):
        return samples
    print(f"{where}: {len(places):,} of {len(samples):,} samples have an answer; job {job!r} trains on these")
    return samples.select(places)


def _asked(row: Row, count: int) -> list[Row]:
    """A labelled row as it is; a question's row under each of its ids."""
    if not row["pool"]:
        return [row]
    return [row | {"sample_id": bytes.fromhex(made)} for made in answer_ids(row["sample_id"].hex(), count)]


def _answered(row: Row, store: AnswerStore, min_certainty: float) -> Iterable[Row] | str:
    """A labelled row as it is; a question's row with the answer, or why it is left out."""
    if not row["pool"]:
        return [row]
    answer = store.read(row["sample_id"].hex())
    text = {"answer": answer.text, "characters": row["characters"] + len(answer.text), "answered": True}
    return answer.left_out(min_certainty) or [row | text]


def _say(recipe: Recipe, samples: Index) -> None:
    """DataError when nothing is left."""
    pool, left_out = int(samples.from_pool().sum()), samples.about.left_out
    words = ", ".join(f"{count:,} {why}" for why, count in sorted(left_out.items()))
    out = f"; {sum(left_out.values()):,} answer(s) left out: {words}" if left_out else ""
    where = f"{recipe.data_root}, split {recipe.data.train_split!r}"
    if not len(samples):
        raise DataError(f"{where}: no sample is left to train on{out}. Nothing was started.")
    print(f"{where}: {len(samples) - pool:,} labelled samples, {pool:,} with the teacher's answer{out}")


def _folder(recipe: Recipe, kind: str) -> Path:
    return recipe.run.dir / FOLDER / f"{kind}-{recipe.data.train_split}"


# -- for other tools ---------------------------------------------------------------------------------------------------


def chats_path(recipe: Recipe) -> Path:
    """File of the teacher's answers as chats."""
    return recipe.run.dir / FOLDER / f"{recipe.data.train_split}.jsonl"


def write_chats(recipe: Recipe, questions: Index, store: AnswerStore) -> int:
    """Every answer that has ended as a chat of `data.format: chat`, uncertain ones too; a JSON line each.

    Nothing is written where the file is of these answers already.

    Returns:
        Answers in the file.
    """
    path, digest = chats_path(recipe), f"{digest_of(store)}-{questions.fingerprint}"
    note = _folder(recipe, "index") / "chats.json"
    if path.is_file() and (known := _note(note)).get("answers") == digest:
        return int(known["count"])
    count = 0
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for sample in questions.select(np.flatnonzero(questions.from_pool())):
            answer = store.read(sample.sample_id)
            if answer.left_out(min_certainty=0.0) is None:
                file.write(json.dumps(chat_of(sample, answer), ensure_ascii=False) + "\n")
                count += 1
    with replacing(note) as temporary:
        temporary.write_text(json.dumps({"answers": digest, "count": count}))
    return count


def chat_of(sample: Sample, answer: Answer) -> dict[str, Any]:
    """A question and the teacher's answer as a record of `data.format: chat`; `certainty` is for the reader."""
    turns = [
        (turn.role, "".join(PLACEHOLDER if part is None else part for part in turn.parts)) for turn in sample.turns
    ]
    return {
        "id": sample.meta.get("id") or sample.sample_id,
        "images": [str(path) for path in sample.images],
        "messages": [{"role": role, "content": text} for role, text in [*turns, ("assistant", answer.text)]],
        "task": sample.task,
        "slice": sample.slice,
        **({"box": list(sample.box)} if sample.box else {}),
        "certainty": answer.certainty,
        "sample_id": sample.sample_id,
    }


def _note(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return {}
