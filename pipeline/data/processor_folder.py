"""The tokenizer and image processor in a checkpoint folder: reading and checking them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from pipeline.data.special_tokens import SPECIAL_TOKENS
from pipeline.data.thinking import OPEN, close_thinking
from pipeline.errors import UserError
from pipeline.recipe import DataConfig

IMAGES, WHOLE = "preprocessor_config.json", "processor_config.json"
"""Files that describe an image processor; of two, transformers reads the second if it has one inside."""
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "vocab.json")
"""Files of which a folder with a tokenizer has one at least."""


def has_image_processor(folder: Path) -> bool:
    """Whether a folder describes one: in a file of its own, or as transformers 5 saves a whole processor."""
    return (folder / IMAGES).is_file() or _is_nested(folder / WHOLE)


def _is_nested(path: Path) -> bool:
    try:
        return "image_processor" in json.loads(path.read_text())
    except (OSError, ValueError):
        return False


def read(path: Path, data: DataConfig) -> tuple[PreTrainedTokenizerBase, Qwen2VLImageProcessorPil]:
    """Tokenizer and image processor of a folder; `data` bounds the images' pixels.

    Raises:
        UserError: no such folder, or unreadable parts.
    """
    if not has_image_processor(path):
        raise UserError(
            f"{path}: no {IMAGES} there, and no {WHOLE} with an image processor. Let data.processor name a Qwen3-VL "
            "checkpoint folder; the embedded benchmark's is made by `clkd tokenizer RECIPE.yaml`."
        )
    return read_tokenizer(path), read_image_processor(path, data)


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has one, in any of the forms that transformers reads."""
    return any((folder / name).is_file() for name in TOKENIZERS)


def read_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, its chat template as `close_thinking` leaves it. UserError when it cannot be read."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot read its tokenizer: {error}") from error
    close_thinking(tokenizer, str(path))
    return tokenizer


def read_image_processor(path: Path, data: DataConfig) -> Qwen2VLImageProcessorPil:
    """The image processor of a folder; `data` bounds the images' pixels. UserError when it cannot be read."""
    # What older files call the bounds would win over `size` there.
    bounds: dict[str, Any] = {"size": _size(data), "min_pixels": data.min_pixels, "max_pixels": data.max_pixels}
    try:
        return Qwen2VLImageProcessorPil.from_pretrained(str(path), **bounds)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot read its image processor: {error}") from error


def _size(data: DataConfig) -> dict[str, int]:
    return {"shortest_edge": data.min_pixels, "longest_edge": data.max_pixels}


def as_used(files: Mapping[str, bytes], folder: Path, data: DataConfig) -> dict[str, bytes]:
    """A folder's small files, by name, with what the run uses in place of what came along.

    Its bounds of images: others are other image tokens. Its chat template where that opens a <think>: the model learnt
    to answer behind a closed one. Whoever serves the model then asks it as training did.

    Args:
        folder: where tokenizer and image processor come from.
    """
    changed = dict(files)
    if any(OPEN.encode() in content for content in files.values()) and has_tokenizer(folder):
        changed["chat_template.jinja"] = str(read_tokenizer(folder).chat_template).encode()
    for name in (IMAGES, WHOLE):
        content = json.loads(files[name]) if name in files else {}
        settings = content.get("image_processor") if name == WHOLE else content
        if settings:
            settings["size"] = _size(data)
            for older in ("min_pixels", "max_pixels"):
                settings.pop(older, None)
            changed[name] = (json.dumps(content, indent=2) + "\n").encode()
    return changed


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
