"""Whether a model, its own tokenizer and image processor, and those that a run uses belong together.

Teacher and student share a run's processor, and soft targets are token ids. So the processor that each of them was
trained with must number the tokens, render a chat and cut an image into tokens as the run's does. Checked when a stage
starts.
"""

from pathlib import Path
from typing import Any

from PIL import Image
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from pipeline.data import processor_folder
from pipeline.data.processor import Processor
from pipeline.errors import UserError
from pipeline.recipe import DataConfig

PROBE_IMAGES = ((64, 64), (640, 480), (1600, 900))
"""Widths and heights of the images whose tokens are counted."""


def check_compatible(model: PreTrainedModel, processor: Processor) -> None:
    """Check that the model can read the processor's ids and patches.

    Raises:
        UserError: it cannot; names every difference with both values.
    """
    config: Any = model.config
    if config.model_type not in ("qwen3_vl", "qwen3_vl_moe"):
        raise UserError(
            f"model {config._name_or_path}: type {config.model_type!r}. Stages that read images encode them as "
            "Qwen3-VL does; other families can be upcycled and exported, not trained here. Nothing was started."
        )
    vision, images = config.vision_config, processor.image_processor
    pairs = {
        "image_token_id": (config.image_token_id, processor.image_token_id),
        "video_token_id": (config.video_token_id, processor.video_token_id),
        "vision_start_token_id": (config.vision_start_token_id, processor.vision_start_id),
        "vision_end_token_id": (config.vision_end_token_id, processor.vision_end_id),
        "patch_size": (vision.patch_size, images.patch_size),
        "temporal_patch_size": (vision.temporal_patch_size, images.temporal_patch_size),
        "spatial_merge_size": (vision.spatial_merge_size, images.merge_size),
    }
    problems = [f"{name}: model {m}, processor {p}" for name, (m, p) in pairs.items() if m != p]
    rows = config.get_text_config().vocab_size
    if rows < processor.vocab_size:
        problems.append(f"vocabulary: model {rows} rows, processor {processor.vocab_size} tokens")
    if problems:
        name = config._name_or_path or type(model).__name__
        raise UserError(
            f"model {name} and processor {processor.origin} do not belong together.\n  "
            + "\n  ".join(problems)
            + "\nUse the processor that the model was made with, or make the model again."
        )


def check_own_files(folder: Path, processor: Processor, data: DataConfig) -> list[str]:
    """Check that a checkpoint's own tokenizer, chat template and image processor do what the run's do.

    Embeddings padded to another size are no difference: ids are compared token by token, and rows beyond the last
    token stand for none. What a folder lacks cannot be checked; what it has is, each by itself.

    Args:
        folder: the teacher's or the student's checkpoint.
        processor: the run's.
        data: bounds of images and lengths, the same for both.

    Returns:
        What the folder lacks: `tokenizer`, `image processor`.

    Raises:
        UserError: they do not; names every kind of difference with both values.
    """
    folder = Path(folder)
    if folder.resolve() == Path(processor.origin).resolve():
        return []
    lacking, problems = [], []
    if processor_folder.has_tokenizer(folder):
        tokenizer = processor_folder.read_tokenizer(folder)
        problems += [
            *_token_problems(tokenizer, processor.tokenizer),
            *_template_problems(tokenizer, processor.tokenizer),
        ]
    else:
        lacking.append("tokenizer")
    if processor_folder.has_image_processor(folder):
        problems += _image_problems(processor_folder.read_image_processor(folder, data), processor.image_processor)
    else:
        lacking.append("image processor")
    if problems:
        raise UserError(
            f"{folder}: its own tokenizer or image processor differs from the run's ({processor.origin}).\n  "
            + "\n  ".join(problems)
            + "\nDistillation needs one of both: take teacher and student from one family, and let data.processor name "
            "the folder that both agree with. Nothing was started."
        )
    return lacking


def _token_problems(own: PreTrainedTokenizerBase, run: PreTrainedTokenizerBase) -> list[str]:
    ids, wanted = own.get_vocab(), run.get_vocab()
    differing = [token for token in {**ids, **wanted} if ids.get(token) != wanted.get(token)]
    if not differing:
        return []
    differing.sort(key=lambda token: min(known[token] for known in (ids, wanted) if token in known))
    shown = ", ".join(f"{t!r}: {ids.get(t, 'none')} there, {wanted.get(t, 'none')} here" for t in differing[:5])
    return [f"{len(differing)} token(s) have other ids or are missing in one; first: {shown}"]


def _template_problems(own: PreTrainedTokenizerBase, run: PreTrainedTokenizerBase) -> list[str]:
    there, here = str(own.chat_template), str(run.chat_template)
    if there == here:
        return []
    at = next((i for i, (a, b) in enumerate(zip(there, here, strict=False)) if a != b), min(len(there), len(here)))
    return [f"chat template, from character {at}: {there[at : at + 40]!r} there, {here[at : at + 40]!r} here"]


def _image_problems(own: Qwen2VLImageProcessorPil, run: Qwen2VLImageProcessorPil) -> list[str]:
    problems = []
    for size in PROBE_IMAGES:
        counts = [_image_tokens(processor, size) for processor in (own, run)]
        if counts[0] != counts[1]:
            problems.append(f"an image of {size[0]} x {size[1]}: {counts[0]} tokens there, {counts[1]} here")
    for name in ("image_mean", "image_std", "rescale_factor"):
        there, here = (_numbers(getattr(processor, name)) for processor in (own, run))
        if there != here:
            problems.append(f"image processor's {name}: {there} there, {here} here")
    return problems


def _numbers(value: Any) -> Any:
    """JSON's lists and a library's tuples are the same."""
    return list(value) if isinstance(value, (list, tuple)) else value


def _image_tokens(processor: Qwen2VLImageProcessorPil, size: tuple[int, int]) -> int:
    """Tokens that one image takes in a prompt."""
    grid_13 = processor(images=[Image.new("RGB", size)], return_tensors="pt")["image_grid_thw"]
    return int(grid_13.prod()) // int(processor.merge_size) ** 2
