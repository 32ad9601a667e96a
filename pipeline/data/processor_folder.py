"""The tokenizer and image processor in a checkpoint folder: reading them, checking them, and what identifies them."""

import hashlib
import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from pipeline.data.special_tokens import SPECIAL_TOKENS
from pipeline.errors import UserError
from pipeline.recipe import DataConfig

_UNSTABLE_KEYS = (
    "image_processor_type",
    "processor_class",
    "_processor_class",
    "transformers_version",
    "device",
)
"""Settings that name classes or versions and change no pixel."""


def read(path: Path, data: DataConfig) -> tuple[PreTrainedTokenizerBase, Qwen2VLImageProcessorPil]:
    """Tokenizer and image processor of a folder with `preprocessor_config.json`; `data` bounds the images' pixels.

    Raises:
        UserError: no such folder, or unreadable parts.
    """
    if not (path / "preprocessor_config.json").is_file():
        raise UserError(
            f"{path}: no preprocessor_config.json there. Let data.processor name a Qwen3-VL checkpoint folder; the "
            "embedded benchmark's is made by `clkd tokenizer RECIPE.yaml`."
        )
    bounds: dict[str, Any] = {
        "size": {"shortest_edge": data.min_pixels, "longest_edge": data.max_pixels},
        "min_pixels": data.min_pixels,  # what older files call them; there they would win over `size`
        "max_pixels": data.max_pixels,
    }
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path))
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(str(path), **bounds)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot read its tokenizer or image processor: {error}") from error
    return tokenizer, image_processor


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, origin: str) -> None:
    """UserError unless the tokenizer of the folder `origin` has a chat template and all special tokens, each one id."""
    vocab = tokenizer.get_vocab()
    missing = [token for token in SPECIAL_TOKENS if token not in vocab]
    if missing:
        raise UserError(
            f"{origin}: its tokenizer lacks {', '.join(missing)}. The pipeline needs one of Qwen's VL "
            "family, or one made by `clkd tokenizer`."
        )
    split = [token for token in SPECIAL_TOKENS if len(tokenizer.encode(token, add_special_tokens=False)) != 1]
    if split:
        raise UserError(f"{origin}: its tokenizer splits {', '.join(split)} into pieces; they must be special tokens.")
    if not tokenizer.chat_template:
        raise UserError(f"{origin}: its tokenizer has no chat template (chat_template.jinja or tokenizer_config.json).")


def identity(tokenizer: PreTrainedTokenizerBase, image_processor: Qwen2VLImageProcessorPil) -> dict[str, str]:
    """sha256 of all that changes an encoding: tokenizer, image processor settings, chat template."""
    images = {key: value for key, value in image_processor.to_dict().items() if key not in _UNSTABLE_KEYS}
    return {
        "tokenizer": _sha256(tokenizer.backend_tokenizer.to_str()),
        "image_processor": _sha256(json.dumps(images, sort_keys=True, default=str)),
        "chat_template": _sha256(str(tokenizer.chat_template)),
    }


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
