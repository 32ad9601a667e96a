"""What identifies a tokenizer and an image processor: what they do, and the data that they do it with.

Not their settings as a library writes them down: a new release of one adds a key that changes nothing, and a store of
terabytes would be of another origin.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from pipeline.data.special_tokens import SPECIAL_TOKENS

PROBE_SIZES = ((100, 70), (640, 480))
"""Widths and heights of probe images: one is scaled up by common bounds, one down or not at all."""
PROBE_TEXTS = (
    "",
    " ",
    "  two  spaces, three   spaces,\ttab\t\tand\n\nlines \r\n of text. ",
    "There is a red car on the left; keep 12 m of distance.\nIt's moving slowly (25 km/h).",
    "I'm you're he's we'd they'll I'VE DON'T ISN'T can't've",
    "0 1 12 123 1234 12345 3.14159 1,000,000 -7 1e-5 25% $9.99 0x1F 2026-01-31T08:05:09Z",
    "def f(x):\n    return {'a': [x**2, x//3], \"b\": not x}  # comment\n",
    "https://example.org/a/b_c?d=e&f=%20g#h user@example.org C:\\dir\\file.txt ~/x/y.py",
    "!?.,;:'\"()[]{}<>|/\\@#$%^&*-_=+`~ ... --- *** <<< >>> === !== -> => ::",
    "UPPER lower MiXeD camelCase snake_case kebab-case naïve café Straße ÅNGSTRÖM ﬁne ½ ² ™",
    "e\u0301 \u00e9 A\u030a \u00c5 \u212b \u1100\u1161 \uac00 \uff21\uff22 \u200b\u200d\u00a0\u3000\ufeff",
    "前方有一辆蓝色的车，请减速。日本語のテキスト。한국어 문장입니다.",
    "Привет, мир! Γειά σου Κόσμε. שלום עולם مرحبا بالعالم नमस्ते दुनिया สวัสดีชาวโลก",
    "\U0001f697\U0001f6a6 \U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \u2603\ufe0f \U0001d504",
    "\x00\x07\x1b\x7f \ud7ff \U0010ffff",
    "<0x0A><unk><s></s>[CLS][MASK]<pad>##ing ▁under Ġbyte <|not_a_token|> <think>x</think> <tool_call>",
    f"before{'between'.join(SPECIAL_TOKENS)}after {' '.join(SPECIAL_TOKENS)} {SPECIAL_TOKENS[0].upper()}",
)


def identity(tokenizer: PreTrainedTokenizerBase, image_processor: Qwen2VLImageProcessorPil) -> dict[str, str]:
    """sha256 of all that changes an encoding, by part: tokenizer, image processor, chat template."""
    return {
        "tokenizer": _sha256(_tokenizer_facts(tokenizer)),
        "image_processor": _sha256(_image_facts(image_processor)),
        "chat_template": _sha256(str(tokenizer.chat_template)),
    }


def _tokenizer_facts(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Every token's id, the model's data (pieces with scores, or merges), and the ids of probe texts."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    pieces = model.get("vocab")
    scores = pieces if isinstance(pieces, list) else []
    # Older releases write a merge as one text with a blank inside.
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model.get("merges") or []]
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in PROBE_TEXTS]
    return {"vocabulary": tokenizer.get_vocab(), "scores": scores, "merges": merges, "ids": ids}


def _image_facts(processor: Qwen2VLImageProcessorPil) -> dict[str, Any]:
    """Bounds and sizes, and the patches of probe images in the images' own 256 levels."""
    size: Mapping[str, int] = dict(processor.size)
    facts: dict[str, Any] = {
        name: getattr(processor, name) for name in ("patch_size", "temporal_patch_size", "merge_size")
    }
    facts["bounds"] = [size["shortest_edge"], size["longest_edge"]]
    facts["probes"] = [_patches(processor, width, height) for width, height in PROBE_SIZES]
    return facts


def _patches(processor: Qwen2VLImageProcessorPil, width: int, height: int) -> list[Any]:
    """Grid, levels, and what black and white become.

    Pixels are whole numbers before they are scaled and shifted. Taken back to those, they do not depend on how a
    release of a library, or a machine, rounds float32.
    """
    pictures = [Image.new("RGB", (width, height), level) for level in ("black", "white")]
    (black, _), (white, _), (seen, grid) = (_encoded(processor, p) for p in (*pictures, _drawn(width, height)))
    levels = ((seen - black) / (white - black) * 255).round().to(torch.int16)
    ends = [sorted({round(value, 4) for value in torch.unique(plain).tolist()}) for plain in (black, white)]
    channels = [[round(float(plain[0, place]), 4) for place in _channel_places(processor)] for plain in (black, white)]
    return [grid.tolist(), hashlib.sha256(levels.numpy().tobytes()).hexdigest(), ends, channels]


def _channel_places(processor: Qwen2VLImageProcessorPil) -> list[int]:
    """A patch's first value of each channel."""
    values = processor.temporal_patch_size * processor.patch_size**2
    return [0, values, 2 * values]


def _encoded(processor: Qwen2VLImageProcessorPil, image: Image.Image) -> tuple[Tensor, Tensor]:
    made = processor(images=[image], return_tensors="pt")
    return made["pixel_values"].double(), made["image_grid_thw"]


def _drawn(width: int, height: int) -> Image.Image:
    """Slopes, edges and fine stripes, another pattern in each colour."""
    y, x = np.mgrid[:height, :width]
    planes = (x * 255 // width, (x // 9 + y // 7) % 2 * 200 + y * 55 // height, (x * 31 + y * 17) % 256)
    return Image.fromarray(np.stack(planes, axis=-1).astype(np.uint8))


def _sha256(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
