"""The student's features against the teacher's sketches: where they are in a batch, and the map that compares them.

W maps the student's hidden width to a sketch's. It is trained with the student as a submodule of the model, so that
DeepSpeed reduces, shards and saves it like any other weight; an exported model does not have it.
Shape suffixes: B = samples, S = sequence, P = image tokens, N = answer tokens, D = width, R = width of a sketch,
J = rows of features: image cells (16 an image), then answer tokens, each sample by sample.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from pipeline.errors import ConfigError, StoreError
from pipeline.targets.sketches import CELLS, SketchStore, cell_means

MODULE = "feature_map"
"""Name of W's module in a model under training."""
SETTING = "distill.features.student_layer"
"""Of a job: the student's layer."""
IMAGE = 1
"""Value of `mm_token_type_ids` at image tokens."""


# -- where features are in a batch -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Places:
    """Where a padded batch has the features of some of its samples."""

    image_P: Tensor
    """i64, image tokens of all images in order, as places in the flattened batch."""
    answer_N: Tensor
    """i64, rows that predict answer tokens, likewise."""
    grids: tuple[tuple[int, int], ...]
    """Rows and columns of image tokens of each image."""
    cells: tuple[int, ...]
    """Cells of each sample."""
    tokens: tuple[int, ...]
    """Answer tokens of each sample."""

    def each(self, change: Callable[[Tensor], Tensor]) -> "Places":
        """The same places with every tensor changed."""
        return Places(change(self.image_P), change(self.answer_N), self.grids, self.cells, self.tokens)


def find_places(
    types_BS: Tensor,
    image_grid_thw: Tensor,
    merge_size: int,
    sample_N: Tensor,
    position_N: Tensor,
    samples: Sequence[int],
) -> Places:
    """Places of the features of some samples of a batch.

    Args:
        types_BS: 1 at image tokens.
        image_grid_thw: frames, rows and columns of patches of every image of the batch, in order.
        merge_size: side of the square of patches that makes an image token.
        sample_N, position_N: the rows that predict answer tokens, sample by sample.
        samples: positions in the batch, ascending.
    """
    # Images are listed over the whole batch: which sample has how many is told by its image tokens.
    images = [(int(rows) // merge_size, int(columns) // merge_size) for _, rows, columns in image_grid_thw.tolist()]
    is_image_BS, length = types_BS == IMAGE, types_BS.shape[1]
    image, answer, grids, cells, tokens, chosen = [], [], [], [], [], set(samples)
    left = iter(images)
    for sample in range(len(types_BS)):
        image_P = is_image_BS[sample].nonzero()[:, 0]
        own, filled = [], 0
        while filled < len(image_P):
            own.append(next(left))
            filled += own[-1][0] * own[-1][1]
        if sample in chosen:
            answer_N = position_N[sample_N == sample]
            image.append(sample * length + image_P)
            answer.append(sample * length + answer_N)
            grids += own
            cells.append(CELLS**2 * len(own))
            tokens.append(len(answer_N))
    nothing = torch.zeros(0, dtype=torch.int64)
    return Places(
        torch.cat([nothing, *image]), torch.cat([nothing, *answer]), tuple(grids), tuple(cells), tuple(tokens)
    )


def gather(hidden_BSD: Tensor, places: Places) -> Tensor:
    """Features f32[J, D]: means over the cells of every image, then the rows that predict answer tokens."""
    flat = hidden_BSD.flatten(0, 1)
    images = torch.split(flat[places.image_P], [rows * columns for rows, columns in places.grids])
    cells = [cell_means(image_PD, grid) for image_PD, grid in zip(images, places.grids, strict=True)]
    return torch.cat([*cells, flat[places.answer_N].float()])


# -- hidden states of the model ----------------------------------------------------------------------------------------


class HiddenStates:
    """Holds what a decoder layer reads while the context is open, gradients attached.

    Under activation checkpointing a layer runs again in backward. That happens after the context, so it is not kept.
    """

    def __init__(self, model: Any, layer: int, setting: str, whose: str) -> None:
        """Of a Hugging Face model's decoder. `layer` may be the number of its layers: that is what the LM head reads.

        Args:
            setting, whose: the setting that `layer` comes from, and `teacher` or `student`, for the error.

        Raises:
            ConfigError: the decoder has fewer layers.
        """
        self._base = model.base_model
        layers = self._base.get_decoder().layers
        if layer > len(layers):
            raise ConfigError(f"{setting} is {layer}, but the {whose} has {len(layers)} decoder layers")
        self._layer = layers[layer] if layer < len(layers) else None
        self._seen: Tensor | None = None

    @property
    def hidden_BSD(self) -> Tensor:
        """Hidden states of the last forward."""
        assert self._seen is not None, "no forward while the context was open"
        return self._seen

    def __enter__(self) -> Self:
        if self._layer is None:
            self._handle = self._base.register_forward_hook(self._keep_output)
        else:
            self._handle = self._layer.register_forward_pre_hook(self._keep_input, with_kwargs=True)
        return self

    def __exit__(self, *error: object) -> None:
        self._handle.remove()

    def _keep_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._seen = args[0] if args else kwargs["hidden_states"]

    def _keep_output(self, module: nn.Module, args: Any, output: Any) -> None:
        self._seen = output.last_hidden_state


# -- sketches of the teacher, and the map W ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FeatureTargets:
    """Sketches of a micro-batch's samples whose features are still distilled, and where the student's are."""

    places: Places
    sketch_JR: Tensor
    sample_J: Tensor
    """i64: position in the micro-batch of the sample that each row belongs to."""
    alpha_J: Tensor
    """f32: share of the feature term."""
    count: int
    """Rows of all samples of the micro-batch, released ones too: this micro-batch's part of M."""

    def each(self, change: Callable[[Tensor], Tensor]) -> "FeatureTargets":
        """The same with every tensor changed."""
        changed = {k: change(getattr(self, k)) for k in ("sketch_JR", "sample_J", "alpha_J")}
        return FeatureTargets(self.places.each(change), **changed, count=self.count)


def join_sketches(
    store: SketchStore, ids: Sequence[str], alpha_B: Tensor, places: Places, count: int
) -> FeatureTargets:
    """Stored sketches of the samples with alpha > 0. `places` are of the same samples.

    Args:
        ids: sample ids of the micro-batch.
        alpha_B: share of the feature term of each.
        count: see `FeatureTargets`.

    Raises:
        StoreError: a sample has no sketch, or one of other images or tokens.
    """
    wanted = alpha_B.nonzero()[:, 0]
    sketches = [store.read(ids[sample]) for sample in wanted.tolist()]
    for place, (sketch, cells, tokens) in enumerate(zip(sketches, places.cells, places.tokens, strict=True)):
        found = len(sketch.cells_CR), len(sketch.tokens_TR)
        if found != (cells, tokens):
            raise StoreError(
                f"sample {ids[int(wanted[place])]}: the store has sketches of {found[0]} image cells and {found[1]} "
                f"answer tokens, this run has {cells} and {tokens}. Make the store again for this data set."
            )
    nothing = torch.zeros(0, int(store.identity["sketch_dim"]))
    counts = (torch.tensor(n, dtype=torch.int64) for n in (places.cells, places.tokens))
    sample_J = torch.cat([wanted.repeat_interleave(n) for n in counts])
    rows = [*(s.cells_CR for s in sketches), *(s.tokens_TR for s in sketches)]
    return FeatureTargets(places, torch.cat([nothing, *rows]), sample_J, alpha_B[sample_J], count)


def attach_map(model: Any, dim: int, seed: int) -> None:
    """Give the model W as a submodule, entries N(0, 1/R): before `deepspeed.initialize`, the same on every rank."""
    width = model.config.get_text_config().hidden_size
    linear = nn.Linear(width, dim, bias=False, dtype=next(model.parameters()).dtype)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(dim, width, generator=torch.Generator().manual_seed(seed)) / dim**0.5)
    model.add_module(MODULE, linear)


def mapped(model: Any, rows_JD: Tensor) -> Tensor:
    """W q of each row: f32[J, R]."""
    linear = getattr(model, MODULE)
    projected_JR: Tensor = linear(rows_JD.to(linear.weight.dtype)).float()
    return projected_JR


def is_ours(name: str) -> bool:
    """Whether a parameter of a checkpoint is W's: no part of the Hugging Face model."""
    return name.startswith(f"{MODULE}.")
