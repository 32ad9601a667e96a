"""The teacher's own answers to questions that have none: what the store keeps of each, by sample_id."""

import json
from dataclasses import asdict, dataclass
from hashlib import blake2b
from typing import Any

import numpy as np

from pipeline.recipe import AnswersConfig
from pipeline.targets.container.reader import StoreReader
from pipeline.targets.container.shards import Bytes
from pipeline.targets.soft_targets import SoftTargets

_DIGITS = 6
"""Significant ones of a certainty that is kept."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the teacher said to one question."""

    text: str
    """Without blanks at its ends, as records are read."""
    finished: bool
    """False: `max_new_tokens` ended it."""
    tokens: int = 0
    """Of its own soft targets, the end included; 0 where nothing can be learnt from it."""
    certainty: float = 0.0
    """exp(mean_t log p(y_t)) over its tokens, the end included: their geometric mean probability [ours]."""
    problem: str = ""
    """Why it cannot be learnt from, or was never given: what encoding the question or the answer has refused."""

    def left_out(self, min_certainty: float) -> str | None:
        """Why it is left out of training, in a word or two; None: it is not."""
        if self.problem:
            return "unusable"
        if not self.text:
            return "empty"
        if not self.finished:
            return "unfinished"
        return f"below certainty {min_certainty:g}" if self.certainty < min_certainty else None


class AnswerStore(StoreReader):
    """Random access to the teacher's answers by sample_id. Safe to fork and pickle."""

    kind = "answers"

    def read(self, sample_id: str) -> Answer:
        """A question's answer. StoreError when the store has none, or its bytes do not match their checksum."""
        raw, _ = self.read_record(sample_id)
        return decode(raw)


def identity_of(settings: AnswersConfig | None) -> dict[str, Any]:
    """What a store's identity says about its answers; nothing when it has none."""
    values = {} if settings is None else settings.model_dump(exclude={"min_certainty"})
    return {f"answers_{name}": value for name, value in values.items()}


def encode(answer: Answer) -> Bytes:
    """u8: JSON."""
    return np.frombuffer(json.dumps(asdict(answer), ensure_ascii=False).encode(), np.uint8)


def decode(raw: Bytes) -> Answer:
    """Inverse of `encode`."""
    return Answer(**json.loads(raw.tobytes()))


def certainty(targets: SoftTargets, tokens: int) -> float:
    """Of an answer: the last so many of its sample's soft targets. Those before are of earlier turns. 0 without any."""
    if not tokens:
        return 0.0
    mean = float(targets.gold_logprob[-tokens:].double().mean().exp())
    return float(f"{mean:.{_DIGITS}g}")


def answer_ids(sample_id: str, count: int) -> list[str]:
    """Ids of the samples that one question becomes with so many answers: its own, and hashes of it."""
    further = (blake2b(f"{sample_id}/{n}".encode(), digest_size=16).hexdigest() for n in range(1, count))
    return [sample_id, *further]
