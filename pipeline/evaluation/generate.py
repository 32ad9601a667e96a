"""Models that are evaluated, and their answers to many questions: greedy, in batches of similar length."""

from collections.abc import Callable, Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoConfig, PreTrainedModel

from pipeline.data.collate import Encoded
from pipeline.data.processor import Processor
from pipeline.data.sample import Sample
from pipeline.errors import DataError
from pipeline.models import experts
from pipeline.models.compatibility import check_compatible
from pipeline.models.generation import continuations, model_inputs
from pipeline.models.loading import load_model

WINDOW_BATCHES = 8
"""Batches whose prompts are encoded together and sorted: little padding, bounded memory."""


def open_model(folder: Path, processor: Processor, device: torch.device) -> PreTrainedModel:
    """A checkpoint ready to generate: float32 on CPUs, its own dtype on accelerators.

    Raises:
        UserError: no such model, or one that does not fit the processor.
    """
    model = load_model(folder, torch.float32 if device.type == "cpu" else _stored_dtype(folder))
    check_compatible(model, processor)
    if device.type == "cpu":  # elsewhere transformers' own choice stays
        use_experts(model, experts.NAME)
    torch.nn.Module.to(model, device)
    return model


def use_experts(model: PreTrainedModel, implementation: str) -> None:
    """Choose the expert loop: `eager`, `grouped_mm`, `batched_mm` or experts.NAME. Dense models stay as they are."""
    if is_moe(model):
        model.set_experts_implementation(implementation)


def is_moe(model: PreTrainedModel) -> bool:
    """Whether the model has routed experts."""
    return getattr(model.config.get_text_config(), "num_experts", None) is not None


def answers(
    model: PreTrainedModel,
    processor: Processor,
    samples: Sequence[Sample],
    *,
    batch_size: int,
    max_new_tokens: int,
    blind: bool = False,
    in_step: bool = False,
    cut: set[str] | None = None,
    left_out: dict[str, str] | None = None,
    on_progress: Callable[[int], object] = lambda count: None,
) -> dict[str, str]:
    """The model's answer to each sample's question, by sample_id.

    Args:
        blind: blank the images to grey.
        in_step: see `continuations`; every rank has as many samples.
        cut: receives the ids of samples whose answer `max_new_tokens` ended.
        left_out: receives why, by sample_id, of samples that cannot be encoded, which `data.bad_samples: skip` leaves
            out. None: they are refused.
        on_progress: called with the number of samples of every finished batch.

    Raises:
        DataError: an image or prompt that cannot be encoded, if it is not left out.
    """
    texts: dict[str, str] = {}
    stop_ids = (processor.eos_id, processor.pad_id)
    given = left_out if processor.leaves_out else None
    for encoded in _prompt_batches(processor, samples, batch_size, blind, given):
        batch = processor.collate(encoded, side="left")
        rows = continuations(model, model_inputs(batch, model.device), max_new_tokens, stop_ids, in_step=in_step)
        texts |= {e.sample_id: processor.decode(row) for e, row in zip(encoded, rows, strict=True)}
        if cut is not None:
            cut |= {e.sample_id for e, row in zip(encoded, rows, strict=True) if len(row) == max_new_tokens}
        on_progress(len(rows))
    return texts


def shared_answers(
    model: PreTrainedModel, processor: Processor, samples: Sequence[Sample], *, batch_size: int, max_new_tokens: int
) -> dict[str, str]:
    """`answers` by all ranks together, each a share of the samples; every rank gets all answers. Collective.

    For a model whose experts or weights the ranks share (`engine.module` of a DeepSpeed engine, in evaluation mode).

    Raises:
        DataError: an image or prompt that cannot be encoded, on the rank that has it.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    # All ranks must run the same number of batches: the first samples fill up the shares that are one short.
    filled = list(islice(cycle(samples), -(-len(samples) // world) * world))
    share = filled[rank::world]
    ours = answers(model, processor, share, batch_size=batch_size, max_new_tokens=max_new_tokens, in_step=True)
    gathered: list[Any] = [None] * world
    dist.all_gather_object(gathered, ours)
    return {sample_id: text for texts in gathered for sample_id, text in texts.items()}


def _prompt_batches(
    processor: Processor, samples: Sequence[Sample], batch_size: int, blind: bool, left_out: dict[str, str] | None
) -> Iterator[list[Encoded]]:
    """Batches of one task where possible, similar in length: their answers end at about the same time."""
    size = WINDOW_BATCHES * batch_size
    for start in range(0, len(samples), size):
        prompts = []
        for sample in samples[start : start + size]:
            try:
                prompts.append((sample.task, processor.encode_prompt(sample, blind=blind)))
            except DataError as error:
                if left_out is None:
                    raise
                left_out[sample.sample_id] = str(error)
        prompts.sort(key=lambda p: (p[0], len(p[1].input_ids)))
        encoded = [prompt for _, prompt in prompts]
        yield from (encoded[i : i + batch_size] for i in range(0, len(encoded), batch_size))


def _stored_dtype(folder: Path) -> torch.dtype:
    dtype = AutoConfig.from_pretrained(str(folder)).dtype if (folder / "config.json").is_file() else None
    return dtype if isinstance(dtype, torch.dtype) else torch.float32
