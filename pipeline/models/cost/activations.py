"""Bytes that the forward pass keeps for the backward pass on one rank. Arithmetic only.

Counts the tensors that autograd saves in transformers' Qwen3-VL (dense and MoE) and in DeepSpeed's expert-parallel
layer: one term for each tensor, also where several operations save the same one [ours; tests count them in a real
forward].

Shapes: T positions of the padded micro-batch (B sequences of S), D width, A query heads x head width, F width of an
MLP or expert, K experts a token, M = K T pairs of token and expert, P patches of the images, N answer tokens,
V vocabulary, b bytes of an activation (bf16 2, float32 4).
"""

from dataclasses import dataclass
from typing import Any

from pipeline.method.fused_head import CHUNK_ELEMENTS, PIECE_ELEMENTS, PIECE_ELEMENTS_ELSEWHERE

FLOAT_BYTES = 4
INDEX_BYTES = 8
LOSS_TENSORS = 6
GROUP_ALIGNMENT = 8
"""DeepSpeed pads every local expert's rows to a multiple of this, and makes room for it on top of M."""


@dataclass(frozen=True, slots=True)
class TextShape:
    """Sizes of the decoder, as far as activations and arithmetic depend on them."""

    layers: int
    moe_layers: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    mlp_width: int
    """Of the dense MLPs."""
    expert_width: int
    experts: int
    top_k: int
    shared_width: int
    """Of an expert that sees every token; 0: none."""
    vocabulary: int
    normed_heads: bool
    """Queries and keys are normalised (Qwen3)."""

    @classmethod
    def of(cls, text: Any, moe_layers: int) -> "TextShape":
        """From transformers' text configuration."""
        heads = text.num_attention_heads
        return cls(
            layers=text.num_hidden_layers,
            moe_layers=moe_layers,
            width=text.hidden_size,
            heads=heads,
            kv_heads=text.num_key_value_heads,
            head_width=getattr(text, "head_dim", None) or text.hidden_size // heads,
            mlp_width=text.intermediate_size,
            expert_width=getattr(text, "moe_intermediate_size", 0),
            experts=getattr(text, "num_experts", 0),
            top_k=getattr(text, "num_experts_per_tok", 0),
            shared_width=getattr(text, "shared_expert_intermediate_size", 0) or 0,
            vocabulary=text.vocab_size,
            normed_heads=text.model_type.startswith("qwen3"),
        )


@dataclass(frozen=True, slots=True)
class VisionShape:
    """Sizes of the vision tower."""

    layers: int
    width: int
    heads: int
    mlp_width: int
    mergers: int
    """Projections into the decoder: one, and one for every layer whose features enter it too."""
    patch_pixels: int
    """Area of a patch."""
    patch_values: int
    """Numbers of a patch: channels x frames x area."""

    @classmethod
    def of(cls, vision: Any) -> "VisionShape":
        """From transformers' vision configuration. Towers other than Qwen3-VL's are counted as if built like it."""
        side: int = vision.patch_size if isinstance(vision.patch_size, int) else vision.patch_size[0]
        channels: int = getattr(vision, "in_channels", None) or vision.num_channels
        return cls(
            layers=getattr(vision, "depth", None) or vision.num_hidden_layers,
            width=vision.hidden_size,
            heads=getattr(vision, "num_heads", None) or vision.num_attention_heads,
            mlp_width=vision.intermediate_size,
            mergers=1 + len(getattr(vision, "deepstack_visual_indexes", ())),
            patch_pixels=side**2,
            patch_values=channels * getattr(vision, "temporal_patch_size", 1) * side**2,
        )


@dataclass(frozen=True, slots=True)
class Load:
    """A micro-batch of one rank."""

    sequences: int
    length: int
    """S, of the longest sequence: the others are padded to it."""
    patches: int
    """P, of all images."""
    images: int
    answers: int
    """N, answer tokens."""

    @property
    def positions(self) -> int:
        """T."""
        return self.sequences * self.length


@dataclass(frozen=True, slots=True)
class Settings:
    """What decides which tensors are saved."""

    bytes: int
    """b."""
    eager_attention: bool
    """Attention weights exist; otherwise a fused kernel keeps their row sums."""
    checkpointing: bool = False
    """Layers are computed again in the backward pass."""
    attention_trains: bool = True
    """Weights of attention, norms and embeddings train; frozen, their inputs are not needed."""
    vision_trains: bool = True
    on_cpu: bool = False
    """The loss works on smaller pieces there."""
    slack: float = 1.0
    """Rows that the experts of this rank get, as a multiple of an even share: above 1 where routing is unbalanced, or
    where DeepSpeed's own layer pads every expert to its capacity or to the busiest one."""
    local_experts: int = 0
    """Experts of a layer on this rank: of all E without expert parallelism."""


@dataclass(frozen=True, slots=True)
class Kept:
    """Bytes of one micro-batch's forward and backward."""

    saved: int
    """Saved for the backward when the forward ends."""
    recomputed: int
    """Saved by the largest layer when the backward computes it again; 0 without checkpointing."""
    head: int
    """For a moment at the forward's end: logits of a chunk, and what the loss makes of a piece of it."""
    backward: int
    """For a moment within the largest layer's backward: gradients of what it saved."""


def activations(text: TextShape, vision: VisionShape | None, load: Load, settings: Settings) -> Kept:
    """What a micro-batch's forward keeps for its backward, and what both need beside it."""
    b, positions = settings.bytes, load.positions
    layers = [decoder_layer(text, load, settings, moe=i < text.moe_layers) for i in range(text.layers)]
    inputs = [b * positions * text.width] * text.layers
    outside = _embedding_and_head(text, load, settings)
    if vision is not None and settings.vision_trains:
        layers += [vision_layer(vision, load, settings)] * vision.layers
        inputs += [b * load.patches * vision.width] * vision.layers
        outside += _patches_and_mergers(vision, load, settings)
    head, backward = _head_workspace(text, load, settings), _backward_workspace(text, load, settings)
    if settings.checkpointing:
        return Kept(outside + sum(inputs), max(layers), head, backward)
    if not settings.attention_trains:  # nothing before the first MLP trains
        outside -= _attention(text, load, settings) + _rms_norm(positions, text.width, settings)
    return Kept(outside + sum(layers), 0, head, backward)


def decoder_layer(text: TextShape, load: Load, settings: Settings, *, moe: bool) -> int:
    """Two norms, attention, and an MLP or its experts."""
    norms = 2 * _rms_norm(load.positions, text.width, settings)
    mlp = _experts(text, load, settings) if moe else _mlp(load.positions, text.width, text.mlp_width, settings.bytes)
    return norms + _attention(text, load, settings) + mlp


def _rms_norm(rows: int, width: int, settings: Settings) -> int:
    """Input in float32, one over its norm, and, for the weight's gradient, the normalised input."""
    normalised = settings.bytes if settings.attention_trains else 0
    return rows * (width * (FLOAT_BYTES + normalised) + FLOAT_BYTES)


def _attention(text: TextShape, load: Load, settings: Settings) -> int:
    b, positions = settings.bytes, load.positions
    queries = text.heads * text.head_width
    total = 3 * b * positions * queries  # queries, keys and values as attention reads them: one for every query head
    if settings.attention_trains:
        total += b * positions * (text.width + queries)  # inputs of the projections
    if text.normed_heads:
        total += _rms_norm(positions * (text.heads + text.kv_heads), text.head_width, settings)
    return total + _attention_weights(text.heads, load.sequences * load.length**2, positions, queries, settings)


def _attention_weights(heads: int, pairs: int, rows: int, width: int, settings: Settings) -> int:
    """The softmax in float32 and, if that differs, in the activations' type; or a fused kernel's output and sums."""
    if settings.eager_attention:
        return heads * pairs * (FLOAT_BYTES + (settings.bytes if settings.bytes < FLOAT_BYTES else 0))
    return heads * rows * FLOAT_BYTES + (0 if settings.attention_trains else settings.bytes * rows * width)


def _mlp(rows: int, width: int, hidden: int, b: int) -> int:
    """Input; gate, up, activated gate and their product."""
    return b * rows * (width + 4 * hidden)


def _experts(text: TextShape, load: Load, settings: Settings) -> int:
    """Router, the rows that experts read and write, and what combines them."""
    b, positions, pairs = settings.bytes, load.positions, text.top_k * load.positions
    rows = round(settings.slack * pairs) + GROUP_ALIGNMENT * settings.local_experts
    router = b * positions * text.width + positions * FLOAT_BYTES * (text.experts + 1)
    choice = pairs * (3 * INDEX_BYTES + 3 * FLOAT_BYTES)
    shared = _mlp(positions, 0, text.shared_width, b) if text.shared_width else 0
    return router + choice + _mlp(rows, text.width, text.expert_width, b) + b * pairs * text.width + shared


def _embedding_and_head(text: TextShape, load: Load, settings: Settings) -> int:
    """Rotary tables, the last norm, and the fused head: gradients of what it read, its weight's in float32."""
    b, positions = settings.bytes, load.positions
    rotary = 2 * b * positions * text.head_width
    # Eager attention adds the mask, which only checkpointing keeps; a fused kernel keeps its truth values.
    mask = (b * settings.checkpointing if settings.eager_attention else 1) * load.sequences * load.length**2
    norm = _rms_norm(positions, text.width, settings)
    head = b * load.answers * text.width
    if settings.attention_trains:
        head += FLOAT_BYTES * text.vocabulary * text.width
    return rotary + mask + norm + head


def _head_workspace(text: TextShape, load: Load, settings: Settings) -> int:
    """`fused_head`: a chunk's logits, and about six float32 tensors of one piece."""
    logits = load.answers * text.vocabulary
    piece = PIECE_ELEMENTS["cpu"] if settings.on_cpu else PIECE_ELEMENTS_ELSEWHERE
    return settings.bytes * min(logits, CHUNK_ELEMENTS) + LOSS_TENSORS * FLOAT_BYTES * min(logits, piece)


def _backward_workspace(text: TextShape, load: Load, settings: Settings) -> int:
    """Gradients of gate, up and their product, or of attention weights in float32, before and after the softmax."""
    rows, hidden = load.positions, text.mlp_width
    if text.moe_layers:
        rows, hidden = max((rows, hidden), (text.top_k * rows, text.expert_width), key=lambda pair: pair[0] * pair[1])
    mlp = settings.bytes * rows * (3 * hidden + text.width)
    pairs = load.sequences * load.length**2 if settings.eager_attention else 0
    return max(mlp, 2 * FLOAT_BYTES * text.heads * pairs)


def vision_layer(vision: VisionShape, load: Load, settings: Settings) -> int:
    """Two norms, attention of each image in itself, MLP."""
    b, rows, width = settings.bytes, load.patches, vision.width
    # Norms: input and output each. Attention: rotated queries and keys, the product that values are a view of, output.
    streams = 4 + 2 + 3 + 1
    pairs = rows**2 // max(load.images, 1)  # images of one size
    weights = _attention_weights(vision.heads, pairs, rows, width, settings)
    return b * rows * (streams * width + 2 * vision.mlp_width + 4) + weights


def _patches_and_mergers(vision: VisionShape, load: Load, settings: Settings) -> int:
    b, rows = settings.bytes, load.patches
    positions = 4 * rows * (INDEX_BYTES + FLOAT_BYTES)  # of the position table, four neighbours a patch
    rotary = 2 * FLOAT_BYTES * rows * vision.width // vision.heads
    mergers = b * rows * vision.width * (3 * vision.mergers + 1)
    return b * rows * vision.patch_values + positions + rotary + mergers
