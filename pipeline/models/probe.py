"""A fixed question with an image, the logits that an engine gave on it, and how far another model's are from them.

Training stores them in every checkpoint, and an export is held against them: it is the only comparison that sees the
whole way from the engine's memory to a model that plain transformers loads, configuration and layout included. Two
forwards of one model need not agree bit for bit (threads, alignment, the order of experts, atomics), so the comparison
has a tolerance, which follows from the coarsest arithmetic that takes part.

Shape suffixes: S = tokens of the probe, P = its last positions, V = vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import PreTrainedConfig

from pipeline.data.processor import Processor

POSITIONS = 16
"""P: positions whose logits are kept: 16 x 151,936 x 4 bytes = 9.7 MB."""
TEXT_TOKENS = 32
IMAGE_SIZE = (160, 96)
PREFIX = "probe/"
UNITS = 64
"""Units of rounding that a forward may differ by: bf16 forwards of deep models differ by up to 10 of them."""
LEAST_TOLERANCE = 1e-4
PRECISION = {"highest": 2.0**-24, "high": 2.0**-11, "medium": 2.0**-8}
"""Unit of rounding of float32 products under torch's matmul precisions: float32, TF32, bfloat16."""

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Agreement:
    """How a model's logits on the probe compare with the engine's."""

    difference: float
    """Median over positions of |a - b| / |b - mean b|, 2-norms over the vocabulary; of two other models about 1."""
    tolerance: float
    """Largest difference that arithmetic of this precision explains."""

    @property
    def holds(self) -> bool:
        """Whether both can be the same model. False for NaN."""
        return self.difference <= self.tolerance


def make_probe(config: PreTrainedConfig, processor: Processor) -> dict[str, NDArray[Any]]:
    """Inputs of one forward, batch size 1: an image between its markers, then text tokens drawn with a fixed seed.

    Depends on the vocabulary, the special tokens and the image processor only.
    """
    side = np.arange(IMAGE_SIZE[1])[:, None] * np.ones(IMAGE_SIZE[0])[None]
    across = np.ones(IMAGE_SIZE[1])[:, None] * np.arange(IMAGE_SIZE[0])[None]
    pixels = np.stack([side * 2, across, (side * across) % 251], axis=-1).astype(np.uint8)
    patches, grid_13 = processor.pixels([Image.fromarray(pixels)])
    image_tokens = int(grid_13.prod()) // processor.image_processor.merge_size**2
    ids = [processor.vision_start_id, *[processor.image_token_id] * image_tokens, processor.vision_end_id]
    ids_1S = torch.cat([torch.tensor([ids]), random_text_ids(config, (1, TEXT_TOKENS), seed=0)], dim=1)
    return {
        "input_ids": ids_1S.numpy(),
        "attention_mask": np.ones_like(ids_1S.numpy()),
        "mm_token_type_ids": (ids_1S == processor.image_token_id).long().numpy(),
        "pixel_values": patches.numpy(),
        "image_grid_thw": grid_13.numpy(),
    }


def random_text_ids(config: PreTrainedConfig, shape: tuple[int, int], seed: int) -> Tensor:
    """i64[shape]: random ids of the vocabulary, except the tokens that stand for images and videos."""
    named = {key: value for key, value in config.to_dict().items() if key.endswith(("_token_id", "_token_index"))}
    special = {value for value in named.values() if isinstance(value, int)}
    allowed = torch.tensor([i for i in range(config.get_text_config().vocab_size) if i not in special])
    return allowed[torch.randint(len(allowed), shape, generator=torch.Generator().manual_seed(seed))]


@torch.no_grad()
def probe_logits(model: Any, inputs: Arrays, device: torch.device, dtype: torch.dtype) -> NDArray[np.float32]:
    """Logits f32[P, V] at the probe's last positions.

    Args:
        model: a Hugging Face model or a DeepSpeed engine of one, in evaluation mode. Under expert parallelism every
            rank calls it.
        inputs: of `make_probe`.
        device: of the model.
        dtype: of its parameters; pixels are given in it.
    """
    tensors = {name: torch.from_numpy(np.array(array)).to(device) for name, array in inputs.items()}
    tensors["pixel_values"] = tensors["pixel_values"].to(dtype)
    logits = model(**tensors, use_cache=False, logits_to_keep=POSITIONS).logits
    found: NDArray[np.float32] = logits[0].float().cpu().numpy()
    return found


def precision(device: torch.device, dtype: torch.dtype) -> float:
    """Unit of rounding of a forward here: of the parameters' type, or of the products that float32 is allowed to be."""
    if dtype != torch.float32:
        return float(torch.finfo(dtype).eps) / 2
    allowed = PRECISION[torch.get_float32_matmul_precision()]
    return max(allowed, PRECISION["high"]) if device.type == "cuda" else allowed  # cuDNN's convolutions take TF32


def agreement(logits_PV: NDArray[np.float32], engine_PV: NDArray[np.float32], units: tuple[float, ...]) -> Agreement:
    """Compare a model's logits with the engine's; `units` are the units of rounding of both (see `precision`).

    The median over positions, because near a tie a router may choose another expert in another forward, which moves
    one position and says nothing about the model.
    """
    wanted = engine_PV.astype(np.float64)
    spread = np.linalg.norm(wanted - wanted.mean(axis=1, keepdims=True), axis=1)
    distance = np.linalg.norm(logits_PV.astype(np.float64) - wanted, axis=1)
    difference = float(np.median(distance / np.maximum(spread, 1e-12)))
    return Agreement(difference, max(LEAST_TOLERANCE, UNITS * max(units)))
