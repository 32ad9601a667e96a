"""`jobs`: training jobs. What a job's sections are for stands here, distillation, curriculum and experts beside it."""

from typing import Literal, Self

from pydantic import model_validator

from pipeline.recipe.base import Count, Fraction, NonNegative, Positive, PositiveFloat, Section, ShareBelowOne
from pipeline.recipe.curriculum import CurriculumConfig, HardnessConfig
from pipeline.recipe.distill import DistillConfig
from pipeline.recipe.moe import MoeConfig


class OptimizerConfig(Section):
    """Optimizer and learning rate: defaults for full fine-tuning of a pretrained decoder."""

    kind: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or plain SGD without momentum."""
    lr: PositiveFloat = 1e-5
    """Peak learning rate; what LLaMA-Factory's and ms-swift's examples take for full fine-tuning of Qwen3-VL."""
    min_lr_share: Fraction = 0.05
    """Learning rate at the end, as a share of the peak (cosine); above 0, so that the last steps still learn."""
    warmup_share: Fraction = 0.05
    """Share of steps with linear warm-up; ms-swift's."""
    betas: tuple[ShareBelowOne, ShareBelowOne] = (0.9, 0.95)
    """Decay rates of AdamW's two moments; ms-swift's. 0.999, torch's, remembers more steps than a short job has."""
    weight_decay: NonNegative = 0.01
    """Decoupled weight decay of AdamW (Qwen's own script has the same); SGD takes it as an L2 term."""
    grad_clip: NonNegative = 1.0
    """Largest global gradient norm, as in every one of those trainers; 0 turns clipping off."""
    max_bad_steps: Count = 20
    """Steps in all that may have a loss or gradient that is not finite: they change nothing, are counted and listed.
    One more, and the job saves its state and stops. Weights gone astray make every step bad, so the bound is small."""


class BatchConfig(Section):
    """How many samples an optimizer step and a forward have."""

    global_size: Positive = 64
    """Samples per optimizer step over all ranks and accumulation steps; Qwen's own script on four GPUs."""
    micro_size: Positive = 1
    """Samples per forward on one rank: what fits everywhere. `clkd plan` says what more would take."""

    @model_validator(mode="after")
    def _sizes_divide(self) -> Self:
        if self.global_size % self.micro_size:
            raise ValueError(f"global_size {self.global_size} is not a multiple of micro_size {self.micro_size}")
        return self


class PerformanceConfig(Section):
    """What changes time and memory, and no result."""

    activation_checkpointing: bool = True
    """Compute activations again in the backward pass: less memory, about a third more time. On, as in ms-swift and
    LLaMA-Factory; of a dense 2B model's sample of `data.max_length` 2 GiB stay in place of 14, by `clkd plan`."""


class CheckpointConfig(Section):
    """When a job's state is saved. A signal (SIGTERM, SIGUSR1) saves it as well."""

    every: Positive = 500
    """Steps between checkpoints, as in Qwen's own script and the Hugging Face trainer."""
    keep: Positive = 2
    """Newest checkpoints kept: each has weights and optimizer, 12 bytes a parameter and more."""


class JobConfig(Section):
    """One training job. The loop is the same for SFT, vanilla KD and CLKD: only these values differ."""

    init: str
    """Model reference of the starting weights: `models.NAME`, `jobs.NAME` or a folder."""
    steps: Positive
    """Optimizer steps."""
    trainable: Literal["all", "mlp_and_router", "language"] = "language"
    """Which parameters train. `language` leaves the vision tower and its merger alone, as LLaMA-Factory and Qwen's own
    script do: a learning rate for the decoder is too large for them. `all` is for models with random weights."""
    log_every: Positive = 5
    """Steps between metric lines."""
    optimizer: OptimizerConfig = OptimizerConfig()
    batch: BatchConfig = BatchConfig()
    pool: bool = True
    """Train on the questions that the teacher answered, too (`targets.answers`); False: on labelled records alone."""
    distill: DistillConfig | None = None
    """The teacher's part; absent: plain SFT."""
    curriculum: CurriculumConfig | None = None
    """Hardness-ordered sampling; absent: a uniform shuffle."""
    hardness: HardnessConfig = HardnessConfig()
    """How the hardness table follows training."""
    moe: MoeConfig = MoeConfig()
    performance: PerformanceConfig = PerformanceConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
