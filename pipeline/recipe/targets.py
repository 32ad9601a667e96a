"""`targets`: the teacher pass and its store."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pipeline.recipe.base import Count, Fraction, Integer, NonNegative, Positive, PositiveFloat, Section


class SketchConfig(Section):
    """Sketches of a teacher's hidden states at image cells and answer tokens (METHOD section 1)."""

    layer: Count
    """Hidden states that this decoder layer reads, from 0; the number of layers means those that the LM head reads."""
    dim: Annotated[Integer, Field(ge=64, le=1024, multiple_of=64)] = 128
    """Values a sketch has; bytes = 1.03 times that."""
    seed: Integer = 0
    """Of the random projection."""


class AnswersConfig(Section):
    """Answers of the teacher to questions that have none. All but `min_certainty` is part of the store's identity."""

    temperature: NonNegative = 0.0
    """Of the softmax that tokens are drawn from; 0: the most probable token each time."""
    samples: Positive = 1
    """Answers to each question; more than one needs a temperature."""
    max_new_tokens: Positive = 512
    """Longest answer in tokens. One that has not ended by then is left out of training."""
    seed: Integer = 0
    """Of what is drawn, with the sample's id: neither batches nor workers change it."""
    min_certainty: Fraction = 0.0
    """Leave answers out of training that the teacher is less sure of: the geometric mean of its probabilities of the
    answer's tokens, at `targets.temperature`. Applied when samples are opened, so the store stays as it is."""

    @model_validator(mode="after")
    def _several_answers_differ(self) -> Self:
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(f"samples {self.samples} at temperature 0 would be one answer {self.samples} times")
        return self


class TargetsConfig(Section):
    """The teacher pass and its store."""

    teacher: str | None = None
    """Model reference of the teacher. Required where a job distils or orders by hardness."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision that the teacher computes in: that in which 2B to 8B checkpoints are published, at half the memory of
    float32. Logits and log-probabilities are always taken in float32."""
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    """torch.set_float32_matmul_precision of the teacher pass, whatever `run.matmul_precision` says: `medium` moves
    log-probabilities by up to 0.03 nats on a CPU with AMX. Part of the store's identity."""
    device_map: str | dict[str, int | str] | None = None
    """Spread a teacher that one device cannot hold: as in transformers, `auto` or module names and their devices."""
    store: str | None = None
    """Folder or fsspec URL (`s3://bucket/store`) of the store; None: `<run.dir>/store`."""
    codec: Literal["packed", "compact", "sampled"] = "packed"
    """What is kept of a token's distribution. `packed`: the `top_k` most probable tokens, codec error below 1e-5 nats;
    `compact`: the same in a quarter less room, below 1e-3 nats; `sampled`: `draws` random tokens, unbiased."""
    top_k: Annotated[Integer, Field(ge=1, le=256)] = 32
    """Teacher entries kept per answer token; the mass of all others is kept as one number."""
    bits: Annotated[Integer, Field(ge=4, le=8)] | None = None
    """Bits of a stored log-probability; None: 7 for `packed`, 5 for `compact`. One less: 4 times the codec error."""
    draws: Annotated[Integer, Field(ge=1, le=255)] = 64
    """Draws per answer token (`sampled`)."""
    temperature: PositiveFloat = 1.0
    """Softmax temperature the targets are made at; it cannot be changed afterwards."""
    sketches: SketchConfig | None = None
    """Also keep feature sketches; None: soft targets alone."""
    answers: AnswersConfig | None = None
    """Let the teacher answer the training questions that have no answer, and `data.pool_split`; None: they are refused,
    or left out with `data.bad_samples: skip`. `{}`: its most probable answers."""
    shard_samples: Positive = 512
    """Samples per shard, of shards that are planned from now on."""
    batch_size: Positive = 8
    """Samples per teacher forward: at `data.max_length` a few GB beside the 16 GB of an 8B teacher."""
