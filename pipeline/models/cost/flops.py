"""Operations and bytes sent of a training step on one rank. Arithmetic only.

A product of [M, K] and [K, N] counts 2 M K N. Its backward takes two such products, one for the input and one for the
weight, or one where the weight is frozen; activation checkpointing repeats the forward. Attention counts every pair of
positions, although causal kernels may skip half of them. Norms, rotary tables and softmax are left out. Shapes as in
`activations`.
"""

from dataclasses import dataclass

from pipeline.models.cost.activations import Load, Settings, TextShape, VisionShape


@dataclass(frozen=True, slots=True)
class Forward:
    """Operations of a micro-batch's forward, by what may be frozen apart from the rest."""

    attention: int
    """Projections and attention of the decoder."""
    mlp: int
    """MLPs, routers, and the experts that tokens choose."""
    vision: int
    head: int
    """LM head, of answer tokens only."""

    @property
    def total(self) -> int:
        """Operations of the whole forward."""
        return self.attention + self.mlp + self.vision + self.head


def forward(text: TextShape, vision: VisionShape | None, load: Load) -> Forward:
    """Operations of one micro-batch's forward."""
    positions, queries = load.positions, text.heads * text.head_width
    projections = 2 * text.width * (2 * queries + 2 * text.kv_heads * text.head_width)
    attention = text.layers * positions * (projections + 4 * load.length * queries)
    dense = (text.layers - text.moe_layers) * 6 * text.width * text.mlp_width
    experts = 6 * text.width * (text.top_k * text.expert_width + text.shared_width) + 2 * text.width * text.experts
    mlp = positions * (dense + text.moe_layers * experts)
    head = 2 * load.answers * text.vocabulary * text.width
    return Forward(attention, mlp, _vision(vision, text.width, load) if vision else 0, head)


def _vision(vision: VisionShape, text_width: int, load: Load) -> int:
    rows, width = load.patches, vision.width
    image = rows // max(load.images, 1)
    layer = 8 * width**2 + 4 * width * vision.mlp_width + 4 * image * width
    # A merger reads 4 patches as one row: 4 D to 4 D, and that to the decoder's width.
    mergers = vision.mergers * (8 * width**2 + 2 * width * text_width)
    return rows * (2 * vision.patch_values * width + vision.layers * layer + mergers)


@dataclass(frozen=True, slots=True)
class Training:
    """Operations of a micro-batch's forward and backward."""

    needed: int
    """What the mathematics asks for: comparable between settings."""
    computed: int
    """With the forwards that checkpointing repeats."""


def training(text: TextShape, vision: VisionShape | None, load: Load, settings: Settings) -> Training:
    """Operations of one micro-batch's forward and backward."""
    once = forward(text, vision, load)
    attention = (3 if settings.attention_trains else 2) * once.attention
    head = (3 if settings.attention_trains else 2) * once.head
    needed = attention + head + 3 * once.mlp + (3 if settings.vision_trains else 1) * once.vision
    again = once.attention + once.mlp + (once.vision if settings.vision_trains else 0)
    return Training(needed, needed + (again if settings.checkpointing else 0))


def all_to_all_bytes(text: TextShape, load: Load, settings: Settings, expert_parallel: int) -> int:
    """Bytes that a rank sends to others in a micro-batch: every chosen token's hidden state, and padding.

    Of each MoE layer: to the experts and back, the same for gradients, and once more to and fro where the layer is
    computed again.
    """
    passes = 6 if settings.checkpointing else 4
    rows = round(settings.slack * text.top_k * load.positions)
    sent = text.moe_layers * passes * rows * text.width * settings.bytes
    return sent * (expert_parallel - 1) // expert_parallel
