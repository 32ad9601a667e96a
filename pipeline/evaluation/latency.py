"""How fast models answer one question at a time, measured together so that machine noise hits all of them alike.

Every prompt is answered by every model in turn, several times. Ratios are taken between answers that were given one
after the other, and then their median. All models write the same number of tokens, because a shorter answer does not
make a model faster. Image decoding and tokenizing are the same work for every model and are not timed; the vision tower
is.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.data.collate import Encoded
from pipeline.data.processor import Processor
from pipeline.models.generation import Decoder, model_inputs

NEW_TOKENS = 32
"""Tokens that every model writes per timed answer."""
CPU_THREADS = 1
"""Threads while timing on CPUs. Several wait for each other at every small product, and busy neighbours then slow the
larger model most: on two contended cores the demo teacher's answer took 5.4 s with two threads and 0.2 s with one, and
the dense student's ratio to it rose from 2.6 to 4.8, which says nothing about the models."""


@dataclass(frozen=True, slots=True)
class Timing:
    """One answer, in milliseconds."""

    ttft_ms: float
    """Until the first token is known: vision tower, prompt, argmax."""
    tpot_ms: float
    """Per token after the first."""
    e2e_ms: float
    """All NEW_TOKENS tokens."""


@dataclass(frozen=True, slots=True)
class Latency:
    """A model's medians, and the median of its per-pair ratios to the reference."""

    ttft_ms: float
    tpot_ms: float
    e2e_ms: float
    speedup: float
    """Reference end-to-end time over this model's, same prompt and repeat: above 1 is faster."""


def time_answer(model: PreTrainedModel, inputs: Mapping[str, Tensor], new_tokens: int = NEW_TOKENS) -> Timing:
    """Time one answer of exactly `new_tokens` >= 2 tokens at batch 1.

    Args:
        inputs: as `model_inputs` gives them for one prompt, on the model's device.
    """
    _synchronize(model)
    started = time.perf_counter()
    decoder = Decoder(model, dict(inputs))
    token_B = decoder.first()
    token_B.tolist()  # the first token counts from when it has reached the host
    first = time.perf_counter()
    for _ in range(new_tokens - 1):
        token_B = decoder.next(token_B)
        token_B.tolist()  # a real answer needs every token at once, to show it and to see whether it is the last
    ended = time.perf_counter()
    return Timing(
        ttft_ms=(first - started) * 1e3,
        tpot_ms=(ended - first) * 1e3 / (new_tokens - 1),
        e2e_ms=(ended - started) * 1e3,
    )


def measure(
    models: Mapping[str, PreTrainedModel],
    processor: Processor,
    prompts: Sequence[Encoded],
    *,
    repeats: int,
    new_tokens: int = NEW_TOKENS,
    on_progress: Callable[[int], object] = lambda count: None,
) -> dict[str, list[Timing]]:
    """Time every model on every prompt, `repeats` times; entry i of each list is the same prompt and round.

    The order of models rotates from round to round, so that none always runs after the same neighbour. One
    untimed answer per model goes first.
    """
    names, timings = list(models), {name: list[Timing]() for name in models}
    batches = [processor.collate([p], side="left") for p in prompts]
    with _timing_threads(models.values()):
        for model in models.values():
            time_answer(model, model_inputs(batches[0], model.device), 2)
        for turn, batch in enumerate(batch for _ in range(repeats) for batch in batches):
            shift = turn % len(names)
            for name in names[shift:] + names[:shift]:
                model = models[name]
                timings[name].append(time_answer(model, model_inputs(batch, model.device), new_tokens))
                on_progress(1)
    return timings


def summarise(timings: Mapping[str, Sequence[Timing]], reference: str) -> dict[str, Latency]:
    """Medians per model; ratios to `reference` are taken pair by pair first.

    Args:
        timings: as `measure` gives them.
        reference: key of `timings`.
    """
    return {
        name: Latency(
            ttft_ms=median(t.ttft_ms for t in rows),
            tpot_ms=median(t.tpot_ms for t in rows),
            e2e_ms=median(t.e2e_ms for t in rows),
            speedup=median(r.e2e_ms / t.e2e_ms for r, t in zip(timings[reference], rows, strict=True)),
        )
        for name, rows in timings.items()
    }


@contextmanager
def _timing_threads(models: Iterable[PreTrainedModel]) -> Iterator[None]:
    before = torch.get_num_threads()
    if all(model.device.type == "cpu" for model in models):
        torch.set_num_threads(CPU_THREADS)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _synchronize(model: PreTrainedModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
