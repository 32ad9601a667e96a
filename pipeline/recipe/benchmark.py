"""`benchmark`: all that belongs to the embedded data set of drawn scenes. It sets no default for anyone else."""

from pipeline.recipe.base import Count, Fraction, Integer, NonNegative, Positive, Section


class ScenesConfig(Section):
    """How many driving scenes are drawn, and how."""

    train: Positive = 1500
    """Labelled images of the Train split."""
    pool: Count = 0
    """Further images of the Train split, of the same drives, whose questions have no answer: the teacher gives them."""
    pool_gold: bool = False
    """Give the pool its true answers all the same: what a student could learn at the most."""
    val: Positive = 100
    """Images of the val split."""
    test: Positive = 200
    """Images of the Test split."""
    seed: Integer = 0
    """Seed of the scenes; the same seed draws the same bytes."""
    width: Positive = 320
    """Image width in pixels."""
    height: Positive = 192
    """Image height in pixels."""
    corner_share: Fraction = 0.15
    """Share of corner cases among Train images, labelled ones and pool alike."""
    test_corner_share: Fraction = 0.5
    """Share of corner cases among val and Test images, so that both slices are measured equally well."""
    workers: Positive = 2
    """Drawing processes."""


class TextSize(Section):
    """Decoder sizes, named as in Qwen3-VL's text_config."""

    hidden_size: Positive
    """Width of the residual stream."""
    intermediate_size: Positive
    """Width of the MLP."""
    num_hidden_layers: Positive
    """Decoder layers."""
    num_attention_heads: Positive
    """Query heads."""
    num_key_value_heads: Positive
    """Key and value heads; a divisor of the query heads."""
    head_dim: Positive
    """Width of a head."""


class VisionSize(Section):
    """Vision tower sizes, named as in Qwen3-VL's vision_config."""

    hidden_size: Positive
    """Width of the tower."""
    intermediate_size: Positive
    """Width of its MLP."""
    depth: Positive
    """Tower layers."""
    num_heads: Positive
    """Attention heads."""
    patch_size: Positive = 16
    """Side of a patch in pixels; Qwen3-VL's."""
    spatial_merge_size: Positive = 2
    """Side of the square of patches that becomes one image token; Qwen3-VL's."""
    deepstack_visual_indexes: tuple[Count, ...] = (0,)
    """Tower layers whose features also enter the first decoder layers."""


class RandomModelConfig(Section):
    """A dense Qwen3-VL with random weights."""

    text: TextSize
    """Its decoder."""
    vision: VisionSize
    """Its vision tower."""


class BenchmarkConfig(Section):
    """The embedded data set: drawn driving scenes, a tokenizer trained on them, models with random weights.

    Absent: nothing is drawn, and `data.root` is yours.
    """

    scenes: ScenesConfig = ScenesConfig()
    """The scenes: `clkd scenes` draws them into `<run.dir>/data`."""
    vocab_size: Positive = 640
    """Upper bound of the vocabulary that `clkd tokenizer` trains, special tokens included."""
    models: dict[str, RandomModelConfig] = {}
    """Models with random weights, referred to as `models.NAME` like others."""
    word_alignment: dict[str, NonNegative] = {}
    """Weight of the word alignment of image tokens by job (METHOD section 8b); jobs that are not named have none. A
    random vision tower needs it, a pretrained one does not."""
