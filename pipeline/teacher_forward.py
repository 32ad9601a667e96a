"""One forward of the teacher: soft targets, and sketches if wanted, of a batch.

Shapes: B samples, S sequence, P image tokens, D width, R width of a sketch, N answer tokens of a batch, V vocabulary.
"""

import itertools
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.codecs import CODECS, make_spec
from pipeline.config import SketchConfig, TargetsConfig
from pipeline.errors import ConfigError, StoreError
from pipeline.processor import IGNORED, Batch
from pipeline.sketches import Sketch, cell_means, projection
from pipeline.targets import SoftTargets, concatenate, draw_offsets

_LOGITS_AT_ONCE = 1 << 25
"""Elements of the largest logit matrix: 128 MiB in float32."""


@dataclass(slots=True)
class Outputs:
    """What a forward gives, by sample id."""

    targets: dict[str, SoftTargets] = field(default_factory=dict)
    sketches: dict[str, Sketch] = field(default_factory=dict)
    cut_tokens: int = 0


@torch.no_grad()
def batch_outputs(model: PreTrainedModel, batch: Batch, settings: TargetsConfig) -> Outputs:
    """Soft targets, and sketches if wanted, of a batch. Logits exist only for rows that predict an answer token.

    Args:
        model: in evaluation mode, on the device (or devices) that compute.
        batch: padded on the right, labels not shifted.
        settings: codec, its settings, temperature, sketches.

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
        states = (
            None if settings.sketches is None else stack.enter_context(_HiddenStates(model, settings.sketches.layer))
        )
        last_BSD = model.base_model(**inputs, use_cache=False).last_hidden_state
    rows_ND = last_BSD[sample_N.to(last_BSD.device), position_N.to(last_BSD.device)]
    ends = list(itertools.accumulate(answer_BS.sum(dim=1).tolist()))
    spans = [slice(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]
    ids = batch["sample_ids"]
    offsets_N = torch.cat([draw_offsets(i, s.stop - s.start) for i, s in zip(ids, spans, strict=True)])
    try:
        targets = _head_targets(model, rows_ND, gold_N, offsets_N, settings)
    except StoreError as error:
        raise StoreError(f"{error} (samples {ids}). The shard was not written.") from None
    outputs = Outputs({i: targets.rows(span) for i, span in zip(ids, spans, strict=True)}, {}, batch["cut_tokens"])
    if states is not None:
        hidden_BSD = states.seen if states.seen is not None else last_BSD
        outputs.sketches = _sketches(hidden_BSD, batch, position_N, spans, settings.sketches, _merge_size(model))
    return outputs


def _head_targets(
    model: PreTrainedModel, rows_ND: Tensor, gold_N: Tensor, offsets_N: Tensor, settings: TargetsConfig
) -> SoftTargets:
    """Soft targets on the CPU; the LM head runs over a few rows at a time."""
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    vocab_size = int(head.weight.shape[0])
    step = max(1, _LOGITS_AT_ONCE // vocab_size)
    keep, spec = CODECS[settings.codec].keep, make_spec(settings, vocab_size)
    parts = []
    for begin in range(0, max(len(rows_ND), 1), step):
        logits = head(rows_ND[begin : begin + step])
        gold, offsets = (x[begin : begin + step].to(logits.device) for x in (gold_N, offsets_N))
        parts.append(keep(logits, gold, offsets, settings.temperature, spec))
    return concatenate(parts).to("cpu")


class _HiddenStates:
    """Holds what a decoder layer reads while the context is open; `seen` stays None for the last hidden states."""

    def __init__(self, model: PreTrainedModel, layer: int) -> None:
        self.seen: Tensor | None = None
        base: Any = model.base_model
        layers = base.get_decoder().layers
        if layer > len(layers):
            raise ConfigError(f"targets.sketches.layer is {layer}, but the teacher has {len(layers)} decoder layers")
        self._handle = None
        if layer < len(layers):
            self._handle = layers[layer].register_forward_pre_hook(self._keep, with_kwargs=True)

    def _keep(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.seen = args[0] if args else kwargs["hidden_states"]

    def __enter__(self) -> "_HiddenStates":
        return self

    def __exit__(self, *error: object) -> None:
        if self._handle is not None:
            self._handle.remove()


def _sketches(
    hidden_BSD: Tensor,
    batch: Batch,
    position_N: Tensor,
    spans: Sequence[slice],
    settings: SketchConfig | None,
    merge_size: int,
) -> dict[str, Sketch]:
    """Sketches of the image cells and of the rows that predict answer tokens, by sample id."""
    assert settings is not None
    matrix_DR = projection(hidden_BSD.shape[-1], settings).to(hidden_BSD.device)
    merged = (batch["image_grid_thw"][:, 1:] // merge_size).tolist()
    grids = iter([(int(rows), int(columns)) for rows, columns in merged])
    made: dict[str, Sketch] = {}
    for place, (sample_id, span) in enumerate(zip(batch["sample_ids"], spans, strict=True)):
        is_image_S = (batch["mm_token_type_ids"][place] == 1).to(hidden_BSD.device)
        image_PD, means = hidden_BSD[place][is_image_S], []
        while len(image_PD):
            grid = next(grids)
            size = grid[0] * grid[1]
            means.append(cell_means(image_PD[:size], grid))
            image_PD = image_PD[size:]
        tokens_TD = hidden_BSD[place][position_N[span].to(hidden_BSD.device)].float()
        cells_CR, tokens_TR = torch.cat(means) @ matrix_DR, tokens_TD @ matrix_DR
        made[sample_id] = Sketch(cells_CR.cpu(), tokens_TR.cpu())
    return made


def _merge_size(model: PreTrainedModel) -> int:
    config: Any = model.config
    return int(config.vision_config.spatial_merge_size)
