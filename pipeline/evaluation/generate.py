"""Greedy generation over a model's own forward: batched for answers, step by step for timing.

transformers' `generate()` gives the same tokens (tests compare them), but with small models it spends as much time
around the forward as in it. This loop does little besides the forward, so timing it measures the model.
Shapes: B samples, S prompt length (padded on the left), T new tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from pipeline.data.collate import Batch, Encoded
from pipeline.data.processor import Processor
from pipeline.data.sample import Sample
from pipeline.errors import DataError
from pipeline.models import experts
from pipeline.models.compatibility import check_compatible
from pipeline.models.loading import load_model

WINDOW_BATCHES = 8
"""Batches whose prompts are encoded together and sorted: little padding, bounded memory."""
_INPUTS = ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw")


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


class GreedyDecoder:
    """One batch's generation with a key-value cache: `first`, then `next` once per token."""

    def __init__(self, model: PreTrainedModel, inputs: dict[str, Tensor]) -> None:
        """`inputs`: as `model_inputs` gives them, prompts padded on the left."""
        self.model, self.inputs = model, dict[str, Any](inputs)
        self.length_B1 = inputs["attention_mask"].sum(dim=1, keepdim=True)
        # Without padding there is nothing to mask, and attention without a mask is cheaper.
        self.mask: Tensor | None = None if bool(inputs["attention_mask"].all()) else inputs["attention_mask"]
        self.inputs["attention_mask"] = self.mask
        self.cache: Any = None

    def first(self) -> Tensor:
        """Read the prompt, images included; the first token ids i64[B]."""
        token_B = self._forward(**self.inputs)
        # An image's tokens share positions, so the text after it has smaller positions than its place in the sequence.
        base: Any = self.model.base_model
        self.position_B1: Tensor = self.length_B1 + base.rope_deltas
        return token_B

    def next(self, token_B: Tensor) -> Tensor:
        """Append one token per sample; the tokens after it i64[B]."""
        if self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(token_B), 1)], dim=1)
        position_3B1 = self.position_B1.expand(3, -1, -1)
        self.position_B1 = self.position_B1 + 1
        return self._forward(input_ids=token_B[:, None], attention_mask=self.mask, position_ids=position_3B1)

    @torch.inference_mode()
    def _forward(self, **inputs: Any) -> Tensor:
        out = self.model(**inputs, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache = out.past_key_values
        token_B: Tensor = out.logits[:, -1].argmax(dim=-1)
        return token_B


def model_inputs(batch: Batch, device: torch.device | str) -> dict[str, Tensor]:
    """What the forward takes of a batch, on a device."""
    tensors: dict[str, Any] = dict(batch)
    return {name: tensors[name].to(device) for name in _INPUTS}


def greedy(
    model: PreTrainedModel,
    inputs: dict[str, Tensor],
    max_new_tokens: int,
    stop_ids: Sequence[int],
    *,
    in_step: bool = False,
) -> list[list[int]]:
    """The most likely continuation of each prompt, up to (without) its first stop token.

    Args:
        model: in evaluation mode.
        inputs: as `model_inputs` gives them, on the model's device.
        max_new_tokens: longest continuation, at least 1.
        stop_ids: tokens that end a sample; with none every continuation has max_new_tokens.
        in_step: the ranks share this model's experts or weights, so each must go on until all are done. Every rank
            then calls this with the same max_new_tokens; all else may differ.
    """
    decoder = GreedyDecoder(model, inputs)
    token_B = decoder.first()
    stop_N = torch.tensor(list(stop_ids), dtype=token_B.dtype, device=token_B.device)
    done_B, tokens = torch.isin(token_B, stop_N), [token_B]
    while len(tokens) < max_new_tokens and not _finished(done_B, in_step):
        token_B = decoder.next(token_B)
        tokens.append(token_B)
        done_B |= torch.isin(token_B, stop_N)
    return [_until(row, stop_ids) for row in torch.stack(tokens, dim=1).tolist()]


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
        in_step: see `greedy`; every rank has as many samples.
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
        rows = greedy(model, model_inputs(batch, model.device), max_new_tokens, stop_ids, in_step=in_step)
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


def _finished(done_B: Tensor, in_step: bool) -> bool:
    """Whether all samples are done, those of all ranks if `in_step`."""
    done = done_B.all().to(torch.int32)
    if in_step:
        dist.all_reduce(done, op=dist.ReduceOp.MIN)
    return bool(done)


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


def _until(row: list[int], stop_ids: Sequence[int]) -> list[int]:
    return row[: next((i for i, token in enumerate(row) if token in stop_ids), len(row))]


def _stored_dtype(folder: Path) -> torch.dtype:
    dtype = AutoConfig.from_pretrained(str(folder)).dtype if (folder / "config.json").is_file() else None
    return dtype if isinstance(dtype, torch.dtype) else torch.float32
