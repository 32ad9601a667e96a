"""One forward of the teacher: soft targets, and sketches if wanted, of a batch.

Shapes: B samples, S sequence, P image tokens, D width, R width of a sketch, N answer tokens of a batch, V vocabulary.
"""

import itertools
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.data.collate import IGNORED, Batch
from pipeline.errors import StoreError
from pipeline.method.features import HiddenStates, find_places, gather
from pipeline.recipe import SketchConfig, TargetsConfig
from pipeline.targets.answers import Answer
from pipeline.targets.codecs import CODECS, make_spec
from pipeline.targets.sketches import Sketch, projection
from pipeline.targets.soft_targets import SoftTargets, concatenate, draw_offsets

_LOGITS_AT_ONCE = 1 << 25
"""Elements of the largest logit matrix: 128 MiB in float32."""
_WEIGHT_AT_ONCE = 1 << 25
"""Elements of the LM head's weight that are float32 at a time: 128 MiB."""


@dataclass(slots=True)
class Outputs:
    """What a forward gives, by sample id."""

    targets: dict[str, SoftTargets] = field(default_factory=dict)
    sketches: dict[str, Sketch] = field(default_factory=dict)
    cut_tokens: int = 0
    """Answer tokens that were left out to fit `data.max_length`."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Samples that could not be encoded, and why: they have targets of no token."""
    answers: dict[str, Answer] = field(default_factory=dict)
    """The teacher's own, to the questions among the samples."""

    def add(self, other: "Outputs") -> None:
        """Take in what another forward gave, for other samples."""
        self.targets.update(other.targets)
        self.sketches.update(other.sketches)
        self.cut_tokens += other.cut_tokens
        self.left_out.update(other.left_out)
        self.answers.update(other.answers)


@torch.no_grad()
def batch_outputs(model: PreTrainedModel, batch: Batch, settings: TargetsConfig, vocab_size: int) -> Outputs:
    """Soft targets, and sketches if wanted, of a batch. Logits exist only for rows that predict an answer token.

    Args:
        model: in evaluation mode, on the device (or devices) that compute.
        batch: padded on the right, labels not shifted.
        settings: codec, its settings, temperature, sketches.
        vocab_size: ids that are tokens. The rows by which embeddings are padded beyond them (151,936 or 152,064 for one
            tokenizer) stand for nothing and are left out of the distribution: a student may have fewer or more.

    Raises:
        StoreError: the teacher's logits are not finite.
    """
    inputs = {k: v.to(model.device) for k, v in batch.items() if isinstance(v, Tensor) and k != "labels"}
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    answer_BS = batch["labels"] != IGNORED
    assert not answer_BS[:, 0].any(), "an answer token without a row that predicts it"
    sample_N, position_N = answer_BS.nonzero(as_tuple=True)  # sample by sample, in answer order
    gold_N, position_N = batch["labels"][sample_N, position_N], position_N - 1  # row t - 1 predicts token t
    with ExitStack() as stack:
        states = None
        if settings.sketches is not None:
            states = stack.enter_context(
                HiddenStates(model, settings.sketches.layer, "targets.sketches.layer", "teacher")
            )
        last_BSD = model.base_model(**inputs, use_cache=False).last_hidden_state
    rows_ND = last_BSD[sample_N.to(last_BSD.device), position_N.to(last_BSD.device)]
    ends = list(itertools.accumulate(answer_BS.sum(dim=1).tolist()))
    spans = [slice(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]
    ids = batch["sample_ids"]
    offsets_N = torch.cat([draw_offsets(i, s.stop - s.start) for i, s in zip(ids, spans, strict=True)])
    try:
        targets = _head_targets(model, rows_ND, gold_N, offsets_N, settings, vocab_size)
    except StoreError as error:
        raise StoreError(f"{error} (samples {ids}). The shard was not written.") from None
    by_id = {i: targets.rows(span) for i, span in zip(ids, spans, strict=True)}
    outputs = Outputs(by_id, {}, batch["cut_tokens"], batch["left_out"])
    if states is not None and settings.sketches is not None:
        samples = sample_N, position_N
        outputs.sketches = _sketches(states.hidden_BSD, batch, samples, settings.sketches, _merge_size(model))
    return outputs


def _head_targets(
    model: PreTrainedModel,
    rows_ND: Tensor,
    gold_N: Tensor,
    offsets_N: Tensor,
    settings: TargetsConfig,
    vocab_size: int,
) -> SoftTargets:
    """Soft targets on the CPU; the LM head runs over a few rows at a time."""
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    step = max(1, _LOGITS_AT_ONCE // vocab_size)
    keep, spec = CODECS[settings.codec].keep, make_spec(settings, vocab_size)
    parts = []
    for begin in range(0, max(len(rows_ND), 1), step):
        logits = head_logits(head, rows_ND[begin : begin + step], vocab_size)
        gold, offsets = (x[begin : begin + step].to(logits.device) for x in (gold_N, offsets_N))
        parts.append(keep(logits, gold, offsets, settings.temperature, spec))
    return concatenate(parts).to("cpu")


def head_logits(head: Any, rows_ND: Tensor, vocab_size: int) -> Tensor:
    """Logits f32[N, V] of the LM head, summed and kept in float32 whatever dtype it has.

    A head in bfloat16 would round its logits to 8 bits: up to 0.1 nats of a log-probability. Its weight becomes
    float32 a few rows at a time, so memory beside the logits is bounded by `_WEIGHT_AT_ONCE`.

    Args:
        head: the linear layer; accelerate's hook on it, if any, brings its weight to the device that computes.
        rows_ND: what it reads, in the teacher's dtype.
        vocab_size: leading rows of the weight that stand for tokens.
    """
    hook = getattr(head, "_hf_hook", None)
    if hook is not None:
        (rows_ND,), _ = hook.pre_forward(head, rows_ND)
    weight_VD, bias_V = head.weight[:vocab_size], head.bias
    rows_ND = rows_ND.to(weight_VD.device, torch.float32)
    logits_NV = rows_ND.new_empty(len(rows_ND), len(weight_VD))
    step = max(1, _WEIGHT_AT_ONCE // weight_VD.shape[1])
    for begin in range(0, len(weight_VD), step):
        part = slice(begin, begin + step)
        logits_NV[:, part] = rows_ND @ weight_VD[part].float().T
    if bias_V is not None:
        logits_NV += bias_V[:vocab_size].float()
    return logits_NV if hook is None else hook.post_forward(head, logits_NV)


def _sketches(
    hidden_BSD: Tensor, batch: Batch, answer_rows: tuple[Tensor, Tensor], settings: SketchConfig, merge_size: int
) -> dict[str, Sketch]:
    """Sketches of the image cells and of the rows that predict answer tokens, by sample id."""
    ids = batch["sample_ids"]
    types_BS, grids = batch["mm_token_type_ids"], batch["image_grid_thw"]
    places = find_places(types_BS, grids, merge_size, *answer_rows, range(len(ids)))
    rows_JD = gather(hidden_BSD, places.each(lambda tensor: tensor.to(hidden_BSD.device)))
    rows_JR = (rows_JD @ projection(hidden_BSD.shape[-1], settings).to(hidden_BSD.device)).cpu()
    parts = torch.split(rows_JR, [*places.cells, *places.tokens])
    return {
        i: Sketch(*pair) for i, pair in zip(ids, zip(parts[: len(ids)], parts[len(ids) :], strict=True), strict=True)
    }


def _merge_size(model: PreTrainedModel) -> int:
    config: Any = model.config
    return int(config.vision_config.spatial_merge_size)
