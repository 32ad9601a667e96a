"""What a checkpoint folder says of its model, from its configuration: weights are not read."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError, UserError
from pipeline.models.families import DENSE_FAMILIES, load_config, moe_layers, text_type, without_weights
from pipeline.models.loading import parameter_counts

TRAINED_HERE = ("qwen3_vl", "qwen3_vl_moe")
"""Families whose image encoding the stages know (see `models.compatibility`)."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """One checkpoint folder."""

    folder: Path
    model_type: str
    text_type: str
    parameters: int
    active_parameters: int
    layers: int
    experts: int
    """Of an MoE layer; 0: the model is dense."""
    vocabulary: int
    """Rows of the embedding."""
    positions: int
    """Longest sequence that the configuration allows."""
    dtype: str
    weights_bytes: int
    """Of the safetensors files that are there; 0: there are none."""

    @property
    def can_be_upcycled(self) -> bool:
        """Whether there is an MoE architecture that it can become."""
        return not self.experts and (self.model_type, self.text_type) in DENSE_FAMILIES

    def __str__(self) -> str:
        experts = f", {self.experts} experts ({billions(self.active_parameters)} active)" if self.experts else ""
        return (
            f"{self.model_type}, {billions(self.parameters)} parameters{experts}, {self.layers} decoder layers, "
            f"{self.vocabulary:,} rows of vocabulary, {self.dtype}"
        )


def model_facts(folder: Path) -> ModelFacts:
    """Look at a checkpoint folder.

    Raises:
        UserError: no configuration there, or one that transformers cannot read.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: there is no model (no config.json).")
    try:
        config: Any = load_config(folder)
        total, active = parameter_counts(without_weights(config))
        layers = moe_layers(config)
    except UserError:
        raise
    except Exception as error:  # transformers raises many kinds for a configuration that it does not know
        raise ConfigError(f"{folder}: cannot read its config.json: {type(error).__name__}: {error}") from error
    text = config.get_text_config()
    return ModelFacts(
        folder=folder,
        model_type=config.model_type,
        text_type=text_type(config),
        parameters=total,
        active_parameters=active,
        layers=text.num_hidden_layers,
        experts=text.num_experts if layers else 0,
        vocabulary=text.vocab_size,
        positions=text.max_position_embeddings,
        dtype=str(config.dtype or "float32").removeprefix("torch."),
        weights_bytes=sum(path.stat().st_size for path in folder.glob("*.safetensors")),
    )


def billions(count: int) -> str:
    """A number of parameters as people say it."""
    return f"{count / 1e9:.2f} B" if count >= 1e8 else f"{count / 1e6:.2f} M"


def collected(problems: list[str], action: Callable[[], Any]) -> Any:
    """The action's result; None after a UserError, which becomes a problem, so that all of them are said at once."""
    try:
        return action()
    except UserError as error:
        problems.append(str(error))
        return None
