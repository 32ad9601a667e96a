"""Generation over a model's own forward: batched for answers, step by step for timing.

transformers' `generate()` gives the same tokens (tests compare them), but with small models it spends as much time
around the forward as in it. This loop does little besides the forward, so timing it measures the model.
Shapes: B samples, S prompt length (padded on the left), T new tokens, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.data.collate import Batch

_INPUTS = ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw")
Choose = Callable[[Tensor, int], Tensor]
"""Token ids i64[B] from logits [B, V] and the number of tokens before, the prompt's apart."""


def most_probable(logits_BV: Tensor, position: int) -> Tensor:
    """Greedy choice, i64[B]."""
    return logits_BV.argmax(dim=-1)


class Drawn:
    """Choice at random from softmax(logits / temperature), i64[B].

    What is drawn is a function of seed, sample and place in the answer: batch, worker and device play no part, but for
    logits that differ in their last bits. Of two batches, tokens then differ as seldom as their probabilities do (by
    the total variation between them), and with a token all that follows it.
    """

    def __init__(self, sample_ids: Sequence[str], seed: int, temperature: float, vocab_size: int) -> None:
        """`vocab_size`: ids that are tokens; the rows by which embeddings are padded are never drawn."""
        self.sample_ids, self.seed, self.temperature, self.vocab_size = sample_ids, seed, temperature, vocab_size

    def __call__(self, logits_BV: Tensor, position: int) -> Tensor:
        share_BV = (logits_BV[:, : self.vocab_size].float() / self.temperature).softmax(dim=-1)
        # In integers: a sum of floats would depend on the order of adding. The scaling by 2^40 is exact.
        mass_BV = (share_BV.double() * 2.0**40).long().cumsum(dim=-1)
        hashes = [xxhash.xxh3_64_intdigest(f"{self.seed}\n{i}\n{position}") for i in self.sample_ids]
        number_B1 = torch.tensor([[(h >> 11) * 2.0**-53] for h in hashes], dtype=torch.float64).to(mass_BV.device)
        total_B1 = mass_BV[:, -1:]
        place_B1 = (number_B1 * total_B1).long().minimum(total_B1 - 1)
        return torch.searchsorted(mass_BV, place_B1, right=True)[:, 0]


class Decoder:
    """One batch's generation with a key-value cache: `first`, then `next` once per token."""

    def __init__(self, model: PreTrainedModel, inputs: dict[str, Tensor], choose: Choose = most_probable) -> None:
        """`inputs`: as `model_inputs` gives them, prompts padded on the left."""
        self.model, self.inputs, self.choose = model, dict[str, Any](inputs), choose
        self.length_B1 = inputs["attention_mask"].sum(dim=1, keepdim=True)
        # Without padding there is nothing to mask, and attention without a mask is cheaper.
        self.mask: Tensor | None = None if bool(inputs["attention_mask"].all()) else inputs["attention_mask"]
        self.inputs["attention_mask"] = self.mask
        self.cache: Any = None
        self.position = 0
        """Tokens chosen so far."""

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
        token_B = self.choose(out.logits[:, -1], self.position)
        self.position += 1
        return token_B


def model_inputs(batch: Batch, device: torch.device | str) -> dict[str, Tensor]:
    """What the forward takes of a batch, on a device."""
    tensors: dict[str, Any] = dict(batch)
    return {name: tensors[name].to(device) for name in _INPUTS}


def continuations(
    model: PreTrainedModel,
    inputs: dict[str, Tensor],
    max_new_tokens: int,
    stop_ids: Sequence[int],
    choose: Choose = most_probable,
    *,
    in_step: bool = False,
) -> list[list[int]]:
    """What the model says after each prompt, up to (without) its first stop token.

    One of max_new_tokens has not ended by itself.

    Args:
        model: in evaluation mode.
        inputs: as `model_inputs` gives them, on the model's device.
        max_new_tokens: longest continuation, at least 1.
        stop_ids: tokens that end a sample; with none every continuation has max_new_tokens.
        choose: the next tokens from their logits.
        in_step: the ranks share this model's experts or weights, so each must go on until all are done. Every rank
            then calls this with the same max_new_tokens; all else may differ.
    """
    decoder = Decoder(model, inputs, choose)
    token_B = decoder.first()
    stop_N = torch.tensor(list(stop_ids), dtype=token_B.dtype, device=token_B.device)
    done_B, tokens = torch.isin(token_B, stop_N), [token_B]
    while len(tokens) < max_new_tokens and not _finished(done_B, in_step):
        token_B = decoder.next(token_B)
        tokens.append(token_B)
        done_B |= torch.isin(token_B, stop_N)
    return [_until(row, stop_ids) for row in torch.stack(tokens, dim=1).tolist()]


def _finished(done_B: Tensor, in_step: bool) -> bool:
    """Whether all samples are done, those of all ranks if `in_step`."""
    done = done_B.all().to(torch.int32)
    if in_step:
        dist.all_reduce(done, op=dist.ReduceOp.MIN)
    return bool(done)


def _until(row: list[int], stop_ids: Sequence[int]) -> list[int]:
    return row[: next((i for i, token in enumerate(row) if token in stop_ids), len(row))]
