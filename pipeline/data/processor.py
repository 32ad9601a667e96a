"""Samples to model inputs and back: chat template, tokenizer and image processor of one checkpoint.

transformers' own Qwen3VLProcessor needs torchvision for its video half. This one does the same for images
with the PIL image processor, so that a machine with torchvision computes the same pixels.
Shapes: B samples, S sequence, P patches of all images, n images; C*T*p*p values per patch.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from pipeline.data import processor_folder, processor_identity
from pipeline.data.collate import IGNORED, Encoded
from pipeline.data.sample import Sample, load_image
from pipeline.data.special_tokens import (
    END_OF_TEXT,
    IMAGE_PAD,
    MESSAGE_END,
    SPECIAL_TOKENS,
    VIDEO_PAD,
    VISION_END,
    VISION_START,
)
from pipeline.errors import DataError
from pipeline.recipe import DataConfig

GREY = (128, 128, 128)
"""Colour of a blanked image."""


class Processor:
    """Encodes samples for one family of checkpoints. Make one with `Processor.load`."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: Qwen2VLImageProcessorPil,
        max_length: int,
        origin: str,
        cuts_answers: bool = False,
        box_width: int = 2,
    ) -> None:
        """Wrap parts loaded from the folder `origin`. Raises UserError as `load` does."""
        processor_folder.check_tokenizer(tokenizer, origin)
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.max_length, self.cuts_answers, self.box_width = max_length, cuts_answers, box_width
        self.origin = origin
        vocab = tokenizer.get_vocab()
        token_id = {token: vocab[token] for token in SPECIAL_TOKENS}
        self.pad_id = token_id[END_OF_TEXT]
        self.eos_id = token_id[MESSAGE_END]
        self.image_token_id = token_id[IMAGE_PAD]
        self.video_token_id = token_id[VIDEO_PAD]
        self.vision_start_id = token_id[VISION_START]
        self.vision_end_id = token_id[VISION_END]
        self.vocab_size = max(vocab.values()) + 1
        """Ids that tokens have; a model's embedding may be padded beyond them."""

    @classmethod
    def load(cls, path: Path, data: DataConfig) -> "Processor":
        """Read a folder with a tokenizer and an image processor; `data` bounds images and lengths.

        Raises:
            UserError: no such folder, unreadable parts, or a tokenizer without chat template or special
                tokens.
        """
        path = Path(path)
        tokenizer, image_processor = processor_folder.read(path, data)
        return cls(tokenizer, image_processor, data.max_length, str(path), data.long_answers == "cut", data.box_width)

    def encode(self, sample: Sample, *, blind: bool = False) -> Encoded:
        """Prompt, answer and <|im_end|>; the answer and its end are labels.

        Args:
            blind: blank the images to grey, keeping their sizes.

        Raises:
            DataError: empty answer, special tokens in a text, or more than max_length tokens.
        """
        answer_text = sample.answer or ""
        if not answer_text.strip():
            raise DataError(f"sample {sample.sample_id}: its answer is empty: there is nothing to learn from it.")
        _check_text(sample, "answer", answer_text)
        prompt = self.encode_prompt(sample, blind=blind)
        answer_ids = [*self.tokenizer.encode(answer_text, add_special_tokens=False), self.eos_id]
        room = self.max_length - len(prompt.input_ids)
        kept = answer_ids[:room] if self.cuts_answers and room > 0 else answer_ids
        self._check_length(sample, len(prompt.input_ids) + len(kept))
        answer = torch.tensor(kept, dtype=torch.int64)
        return Encoded(
            sample_id=sample.sample_id,
            input_ids=torch.cat([prompt.input_ids, answer]),
            labels=torch.cat([prompt.labels, answer]),
            pixel_values=prompt.pixel_values,
            image_grid_thw=prompt.image_grid_thw,
            cut_tokens=len(answer_ids) - len(kept),
        )

    def encode_prompt(self, sample: Sample, *, blind: bool = False) -> Encoded:
        """Everything up to and with the assistant's header, all labels -100. Raises DataError as `encode`."""
        _check_text(sample, "prompt", sample.prompt)
        images = [load_image(sample, i, box_width=self.box_width) for i in range(len(sample.images))]
        if blind:
            images = [Image.new("RGB", image.size, GREY) for image in images]
        pixel_values, grid_n3 = self._encode_images(sample, images)
        tokens_n = grid_n3.prod(dim=1) // self.image_processor.merge_size**2
        input_ids = self._expand_images(self._prompt_ids(sample), tokens_n.tolist())
        self._check_length(sample, len(input_ids))
        return Encoded(
            sample_id=sample.sample_id,
            input_ids=input_ids,
            labels=torch.full_like(input_ids, IGNORED),
            pixel_values=pixel_values,
            image_grid_thw=grid_n3,
        )

    def count_text(self, sample: Sample) -> tuple[int, int]:
        """Tokens of the prompt without its images, and of the answer and its end: what `encode` makes, without images.

        Raises:
            DataError: empty answer, or special tokens in a text.
        """
        if not sample.answer.strip():
            raise DataError("its answer is empty: there is nothing to learn from it.")
        for name, text in (("answer", sample.answer), ("prompt", sample.prompt)):
            _check_text(sample, name, text)
        answer_ids = self.tokenizer.encode(sample.answer, add_special_tokens=False)
        return len(self._prompt_ids(sample)) - len(sample.images), len(answer_ids) + 1

    def pixels(self, images: list[Image.Image]) -> tuple[Tensor, Tensor]:
        """Patches f32[P, C*T*p*p] of the images and their grids i64[n, 3]."""
        features = self.image_processor(images=images, return_tensors="pt")
        return features["pixel_values"], features["image_grid_thw"]

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """Text of token ids [S]; special tokens are dropped."""
        ids = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def identity(self) -> dict[str, str]:
        """sha256 of all that changes an encoding; a box's line; the length at which answers are cut, if they are."""
        settings = {"box_width": str(self.box_width)}
        if self.cuts_answers:
            settings["max_length"] = str(self.max_length)
        return settings | processor_identity.identity(self.tokenizer, self.image_processor)

    def _prompt_ids(self, sample: Sample) -> list[int]:
        """Token ids of the rendered chat, one placeholder per image."""
        content = [{"type": "image"} for _ in sample.images] + [{"type": "text", "text": sample.prompt}]
        messages: list[Any] = [{"role": "user", "content": content}]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return list(self.tokenizer.encode(str(text), add_special_tokens=False))

    def _encode_images(self, sample: Sample, images: list[Image.Image]) -> tuple[Tensor, Tensor]:
        """Patches f32[P, C*T*p*p] and grids i64[n, 3]."""
        if not images:
            raise DataError(f"sample {sample.sample_id}: it has no image; this pipeline trains on images with text.")
        try:
            return self.pixels(images)
        except ValueError as error:  # an aspect ratio beyond 200
            raise DataError(f"sample {sample.sample_id}: {error}; image sizes {[i.size for i in images]}") from error

    def _expand_images(self, ids: list[int], tokens_n: list[int]) -> Tensor:
        """Repeat the i-th image placeholder tokens_n[i] times: i64[S]."""
        ids_T = torch.tensor(ids, dtype=torch.int64)
        repeats_T = torch.ones_like(ids_T)
        repeats_T[ids_T == self.image_token_id] = torch.tensor(tokens_n)
        return ids_T.repeat_interleave(repeats_T)

    def _check_length(self, sample: Sample, length: int) -> None:
        if length > self.max_length:
            raise DataError(
                f"sample {sample.sample_id}: {length} tokens, data.max_length allows {self.max_length}. "
                "Raise data.max_length, lower data.max_pixels, drop the sample, or set data.long_answers to cut."
            )


def _check_text(sample: Sample, name: str, text: str) -> None:
    found = [token for token in SPECIAL_TOKENS if token in text]
    if found:
        raise DataError(
            f"sample {sample.sample_id}: its {name} contains the special token(s) {', '.join(found)}, which "
            "would be read as structure. Remove them from the data."
        )
