"""Checkpoints in Hugging Face format: random Qwen3-VL models of any size, saving, loading, checks, counts."""

import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from pipeline.config import ModelConfig, TextSize, VisionSize
from pipeline.errors import ConfigError, UserError
from pipeline.families import auto_class, load_config
from pipeline.processor import Processor

ROPE_THETA = 10_000.0
MAX_POSITIONS = 4096
POSITION_GRID = 16
"""Side of the vision tower's learned position grid; it is interpolated to each image's own grid."""
VOCAB_MULTIPLE = 64
PROCESSOR_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "sentencepiece.model",
    "tokenizer.model",
    "processor_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
"""Files of a tokenizer and image processor: what may be copied from a folder that is a checkpoint itself."""
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def build(config: ModelConfig, processor: Processor, seed: int) -> Qwen3VLForConditionalGeneration:
    """A dense Qwen3-VL with random float32 weights that depend on `config`, the vocabulary and `seed` only.

    Raises:
        ConfigError: `config` has no `text` and `vision`, or sizes that do not fit together (all problems at
            once).
    """
    if config.text is None or config.vision is None:
        raise ConfigError("a model with random weights needs both `text` and `vision` sizes")
    problems = [
        *_text_problems(config.text),
        *_vision_problems(config.vision, config.text),
        *_patch_problems(config.vision, processor),
    ]
    if problems:
        raise ConfigError("model sizes do not fit together:\n  " + "\n  ".join(problems))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3VLForConditionalGeneration(qwen3_vl_config(config.text, config.vision, processor))
        _widen_vision_init(model)
    generation: dict[str, Any] = {"eos_token_id": processor.eos_id, "pad_token_id": processor.pad_id}
    model.generation_config = GenerationConfig(do_sample=False, **generation)  # type: ignore[no-untyped-call]
    model.train(False)
    return model


def _widen_vision_init(model: Qwen3VLForConditionalGeneration) -> None:
    """Weights of the tower by fan-in: transformers' 0.02 fits wide towers, and small ones then learn slowly."""
    for name, weight in model.model.visual.named_parameters():
        if weight.ndim >= 2 and "pos_embed" not in name:
            torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5)


def qwen3_vl_config(text: TextSize, vision: VisionSize, processor: Processor) -> Qwen3VLConfig:
    """The transformers configuration of the given sizes over the processor's vocabulary."""
    values: dict[str, Any] = {
        "text_config": {
            **text.model_dump(),
            "vocab_size": math.ceil(processor.vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE,
            "max_position_embeddings": MAX_POSITIONS,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": ROPE_THETA,
                "mrope_section": mrope_section(text.head_dim),
                "mrope_interleaved": True,
            },
            "tie_word_embeddings": True,
            "pad_token_id": processor.pad_id,
            "eos_token_id": processor.eos_id,
        },
        "vision_config": {
            **vision.model_dump(),
            "deepstack_visual_indexes": list(vision.deepstack_visual_indexes),
            "out_hidden_size": text.hidden_size,
            "num_position_embeddings": POSITION_GRID**2,
            "temporal_patch_size": processor.image_processor.temporal_patch_size,
        },
        "image_token_id": processor.image_token_id,
        "video_token_id": processor.video_token_id,
        "vision_start_token_id": processor.vision_start_id,
        "vision_end_token_id": processor.vision_end_id,
        "tie_word_embeddings": True,
        "attn_implementation": "sdpa",
    }
    return Qwen3VLConfig(**values)


def mrope_section(head_dim: int) -> list[int]:
    """Rotary frequencies for time, height and width: Qwen3-VL's 24 : 20 : 20 scaled to head_dim // 2."""
    half = head_dim // 2
    side = half * 20 // 64
    return [half - 2 * side, side, side]


def _text_problems(text: TextSize) -> list[str]:
    problems = []
    if text.num_attention_heads % text.num_key_value_heads:
        problems.append(
            f"text.num_attention_heads {text.num_attention_heads} is not a multiple of "
            f"text.num_key_value_heads {text.num_key_value_heads}"
        )
    if text.head_dim % 2 or text.head_dim < 8:
        problems.append(f"text.head_dim {text.head_dim} must be even and at least 8 (three rotary sections)")
    return problems


def _vision_problems(vision: VisionSize, text: TextSize) -> list[str]:
    problems = []
    if vision.hidden_size % (4 * vision.num_heads):
        problems.append(
            f"vision.hidden_size {vision.hidden_size} is not a multiple of 4 x vision.num_heads "
            f"{vision.num_heads} (two rotary axes per head)"
        )
    if any(index >= vision.depth or index < 0 for index in vision.deepstack_visual_indexes):
        problems.append(
            f"vision.deepstack_visual_indexes {list(vision.deepstack_visual_indexes)} must lie in "
            f"[0, vision.depth {vision.depth})"
        )
    if len(vision.deepstack_visual_indexes) > text.num_hidden_layers:
        problems.append(
            f"{len(vision.deepstack_visual_indexes)} deepstack features enter the first decoder layers, "
            f"but text.num_hidden_layers is {text.num_hidden_layers}"
        )
    return problems


def _patch_problems(vision: VisionSize, processor: Processor) -> list[str]:
    pairs = {
        "patch_size": (vision.patch_size, processor.image_processor.patch_size),
        "spatial_merge_size": (vision.spatial_merge_size, processor.image_processor.merge_size),
    }
    return [
        f"vision.{name} {model} differs from {processor.origin}: {images}"
        for name, (model, images) in pairs.items()
        if model != images
    ]


def save_model(model: PreTrainedModel, processor: Processor | Path | str, dst: Path) -> None:
    """Write weights and configuration, and copy the files of the processor (or its folder) beside them.

    transformers loads the folder alone: AutoModelForImageTextToText and AutoTokenizer.
    """
    dst = Path(dst)
    dst.mkdir(parents=True, exist_ok=True)
    folder = Path(processor.origin if isinstance(processor, Processor) else processor)
    for name in PROCESSOR_FILES:
        source = folder / name
        if source.is_file() and source.resolve() != (dst / name).resolve():
            shutil.copyfile(source, dst / name)
    model.save_pretrained(str(dst))


def load_model(
    path: Path,
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    device_map: str | Mapping[str, int | str] | None = None,
) -> PreTrainedModel:
    """Load a checkpoint folder in evaluation mode, on the CPU unless there is a `device_map` (as transformers').

    `attention` is transformers' attention implementation.

    Raises:
        UserError: no checkpoint there, or one that cannot be read or misses weights.
    """
    path = Path(path)
    if not (path / "config.json").is_file():
        raise UserError(
            f"{path}: there is no model (no config.json). Run the stage that writes it, "
            "or correct the model reference in the recipe."
        )
    if not any(path.glob("*.safetensors")):
        pickles = sorted(p.name for pattern in PICKLES for p in path.glob(pattern))
        also = f"; {pickles} hold(s) pickle, which can run any code and is not read" if pickles else ""
        raise UserError(f"{path}: there are no weights in safetensors{also}. Save the model again as safetensors.")
    options: dict[str, Any] = {
        "dtype": dtype,
        "attn_implementation": attention,
        "local_files_only": True,
        "use_safetensors": True,
        "trust_remote_code": False,
    }
    if device_map is not None:
        options["device_map"] = device_map if isinstance(device_map, str) else dict(device_map)
    loaded: Any
    try:
        loaded = auto_class(load_config(path)).from_pretrained(str(path), output_loading_info=True, **options)
    except Exception as error:  # safetensors, JSON and shape errors share no base class
        raise UserError(f"{path}: cannot read this model: {type(error).__name__}: {error}") from error
    model, info = loaded
    problems = [f"{kind}: {sorted(map(str, info[kind]))[:5]}" for kind in _LOADING_PROBLEMS if info.get(kind)]
    if problems:
        listing = "\n  ".join(problems)
        raise UserError(f"{path}: weights and config.json do not belong together.\n  {listing}")
    assert isinstance(model, PreTrainedModel)
    model.train(False)
    _multiply_patches(model)
    return model


def batch_attention() -> str:
    """Attention for batches of whole sequences: on CPUs torch's SDPA makes a training step take 1.8 times as long."""
    return "sdpa" if torch.cuda.is_available() else "eager"


class _PatchProjection(torch.nn.Conv3d):
    """A convolution whose kernel covers its whole input, computed as the matrix product that it is.

    On a CPU the convolution kernels take a third of a small model's training step for it.
    """

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """[P, C, T, H, W] -> [P, D, 1, 1, 1]."""
        rows = torch.nn.functional.linear(patches.flatten(1), self.weight.flatten(1), self.bias)
        return rows[:, :, None, None, None]


def _multiply_patches(model: PreTrainedModel) -> None:
    """Swap the vision tower's patch convolution for the equal matrix product; parameters and their names stay."""
    for module in model.modules():
        if isinstance(module, torch.nn.Conv3d) and module.stride == module.kernel_size:
            module.__class__ = _PatchProjection


_LOADING_PROBLEMS = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")


def weights_hash(path: Path) -> str:
    """xxh3-128 over the folder's safetensors files in name order, names included.

    Raises:
        UserError: there are no weights.
    """
    files = sorted(Path(path).glob("*.safetensors"))
    if not files:
        raise UserError(f"{path}: there are no weights (*.safetensors)")
    digest = xxhash.xxh3_128()
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def compute_device(name: str) -> torch.device:
    """The device that `run.device` names; `auto` is a launched process's own GPU where there is one."""
    if name == "auto":
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    return torch.device(name)


def parameter_counts(model: PreTrainedModel) -> tuple[int, int]:
    """(total, active per token): of an MoE layer's experts only top_k / num_experts count as active.

    Shared (tied) tensors count once.
    """
    text: Any = model.config.get_text_config()
    total = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    if not experts:
        return total, total
    return total, total - experts + experts * text.num_experts_per_tok // text.num_experts
