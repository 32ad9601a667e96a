"""Models in Hugging Face format: saving and loading them, preparing them for training, counting their parameters."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from pipeline.data.processor import Processor
from pipeline.errors import UserError
from pipeline.models.families import auto_class, load_config
from pipeline.models.hf_folder import turn_square_experts

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
    turn_square_experts(model, path)
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


def compute_device(name: str) -> torch.device:
    """The device that `run.device` names; `auto` is a launched process's own GPU where there is one."""
    if name == "auto":
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    return torch.device(name)


def freeze(model: PreTrainedModel, trainable: str) -> None:
    """Leave gradients on for `all`, for the decoder (`language`), or for its MLPs and routers only."""
    for name, parameter in model.named_parameters():
        in_decoder = ".visual." not in name
        parameter.requires_grad_(trainable == "all" or (in_decoder and (trainable == "language" or ".mlp." in name)))


def enable_activation_checkpointing(model: Any) -> None:
    """Recompute decoder layers in backward; non-reentrant, so that losses on router logits are kept."""
    model.gradient_checkpointing_enable({"use_reentrant": False})


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
