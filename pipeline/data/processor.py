"""Samples to model inputs and back: chat template, tokenizer and image processor of one checkpoint.

transformers' own Qwen3VLProcessor needs torchvision for its video half. This one does the same for images
with the PIL image processor, so that a machine with torchvision computes the same pixels.
Shapes: B samples, S sequence, P patches of all images, n images; C*T*p*p values per patch.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from jinja2 import TemplateError
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from pipeline.data import processor_folder, processor_identity
from pipeline.data.collate import IGNORED, Batch, Encoded, collate
from pipeline.data.sample import ASSISTANT, IMAGE, USER, Sample, Turn, load_image
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
NO_ANSWER = "its answer is empty: there is nothing to learn from it."
"""Colour of a blanked image."""
_MARK = "\ufdd0", "\ufdd1"
"""Around the number of an answer while a chat is rendered: characters that Unicode keeps for such uses, in no text."""


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
        learns_all: bool = True,
        leaves_out: bool = False,
    ) -> None:
        """Wrap parts loaded from the folder `origin`. Raises UserError as `load` does."""
        processor_folder.check_tokenizer(tokenizer, origin)
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.max_length, self.cuts_answers, self.box_width = max_length, cuts_answers, box_width
        self.learns_all = learns_all
        """Whether earlier answers of a conversation are labels too."""
        self.leaves_out = leaves_out
        """Whether a sample that cannot be encoded is left out."""
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
        return cls(
            tokenizer,
            image_processor,
            data.max_length,
            str(path),
            cuts_answers=data.long_answers == "cut",
            box_width=data.box_width,
            learns_all=data.learn == "all",
            leaves_out=data.bad_samples == "skip",
        )

    def encode(self, sample: Sample, *, blind: bool = False) -> Encoded:
        """The whole conversation. Its answers, each with its <|im_end|>, are labels; with `data.learn: last` one is.

        Args:
            blind: blank the images to grey, keeping their sizes.

        Raises:
            DataError: empty answer, special tokens in a text, or more than max_length tokens.
        """
        ids, labels = self._answered_ids(sample)
        pixels = self._encode_images(sample, self._images(sample, blind=blind))
        return self._expanded(sample, ids, labels, pixels, cuts=self.cuts_answers)

    def encode_answer(self, sample: Sample, prompt: Encoded) -> Encoded:
        """`encode` of a sample whose images `encode_prompt` has encoded already, when it had no answer."""
        ids, labels = self._answered_ids(sample)
        pixels = prompt.pixel_values, prompt.image_grid_thw
        return self._expanded(sample, ids, labels, pixels, cuts=self.cuts_answers)

    def encode_or_leave_out(self, sample: Sample, *, blind: bool = False) -> Encoded:
        """`encode`; with `data.bad_samples: skip` a sample that it refuses becomes one token without a label."""
        try:
            return self.encode(sample, blind=blind)
        except DataError as error:
            if not self.leaves_out:
                raise
            return self.stand_in(sample, str(error))

    def stand_in(self, sample: Sample, problem: str) -> Encoded:
        """One token without a label, in the place of a sample from which nothing is learnt."""
        pixel_values, grid_n3 = self._encode_images(sample, [])
        ids_1 = torch.tensor([self.eos_id])
        return Encoded(sample.sample_id, ids_1, torch.full_like(ids_1, IGNORED), pixel_values, grid_n3, problem=problem)

    def encode_prompt(self, sample: Sample, *, blind: bool = False) -> Encoded:
        """Everything up to where the answer begins, all labels -100. Raises DataError as `encode`."""
        ids, labels = self._token_ids(replace(sample, answer=""))
        pixels = self._encode_images(sample, self._images(sample, blind=blind))
        return self._expanded(sample, ids, [IGNORED] * len(labels), pixels)

    def count_text(self, sample: Sample) -> tuple[int, int]:
        """Tokens of the sample without its images: that are read only, and that are labels. What `encode` makes.

        Raises:
            DataError: special tokens in a text.
        """
        ids, labels = self._token_ids(sample)
        learned = sum(label != IGNORED for label in labels)
        return len(ids) - learned - len(sample.images), learned

    def collate(self, encoded: Sequence[Encoded], *, side: Literal["left", "right"] = "right") -> Batch:
        """Samples padded to one length, see `collate.collate`."""
        merge_size = int(self.image_processor.merge_size)
        return collate(encoded, self.pad_id, self.image_token_id, merge_size=merge_size, side=side)

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
        settings = {"box_width": str(self.box_width), "learn": "all" if self.learns_all else "last"}
        if self.cuts_answers:
            settings["max_length"] = str(self.max_length)
        return settings | processor_identity.identity(self.tokenizer, self.image_processor)

    # -- text ----------------------------------------------------------------------------------------------------------

    def _answered_ids(self, sample: Sample) -> tuple[list[int], list[int]]:
        """`_token_ids` of a sample with an answer."""
        if not sample.answer.strip():
            raise DataError(f"{sample.where}: {NO_ANSWER}")
        return self._token_ids(sample)

    def _token_ids(self, sample: Sample) -> tuple[list[int], list[int]]:
        """(ids, labels) of the conversation, one placeholder an image; up to where the answer begins if it has none.

        The text around the answers and each answer are tokenized apart, as they are when the model answers.
        """
        for turn in sample.turns:
            _check_text(sample, "prompt", turn.text)
        _check_text(sample, "answer", sample.answer)
        ids, labels, answers = list[int](), list[int](), sample.answers
        for number, (around, answer) in enumerate(zip(self._around_answers(sample), answers, strict=True)):
            is_last = number == len(answers) - 1
            before = self._tokens(around)
            said = [*self._tokens(answer), self.eos_id] if answer or not is_last else []
            ids += before + said
            labels += [IGNORED] * len(before) + (said if is_last or self.learns_all else [IGNORED] * len(said))
        return ids, labels

    def _around_answers(self, sample: Sample) -> list[str]:
        """The rendered chat before each answer: after the end of the one before, and up to this one's first word.

        Marks stand for the answers while the template runs, so it decides about everything else: a system text of its
        own, a closed <think> before the last answer and none before earlier ones.
        """
        turns, marks, messages = [*sample.turns, Turn(ASSISTANT, ())], list[str](), list[dict[str, Any]]()
        for turn in turns:
            content: Any = turn.text
            if turn.role == ASSISTANT:
                content = f"{_MARK[0]}{len(marks)}{_MARK[1]}"
                marks.append(content)
            elif turn.role == USER:
                content = [{"type": "image"} if p is IMAGE else {"type": "text", "text": p} for p in turn.parts]
            messages.append({"role": turn.role, "content": content})
        try:
            rest = str(self.tokenizer.apply_chat_template(messages, tokenize=False))
        except TemplateError as error:
            raise DataError(f"{sample.where}: the chat template refuses its turns: {error}") from error
        around = []
        for number, mark in enumerate(marks):
            before, _, rest = rest.partition(mark)
            around.append(before if number == 0 else before.removeprefix(MESSAGE_END))
            if not rest.startswith(MESSAGE_END):
                raise DataError(
                    f"{sample.where}: the chat template of {self.origin} does not write answer {number + 1} "
                    f"and {MESSAGE_END} after it."
                )
        return around

    def _tokens(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    # -- images --------------------------------------------------------------------------------------------------------

    def _images(self, sample: Sample, *, blind: bool) -> list[Image.Image]:
        images = [load_image(sample, i, box_width=self.box_width) for i in range(len(sample.images))]
        return [Image.new("RGB", image.size, GREY) for image in images] if blind else images

    def _encode_images(self, sample: Sample, images: list[Image.Image]) -> tuple[Tensor, Tensor]:
        """Patches f32[P, C*T*p*p] and grids i64[n, 3]."""
        if not images:
            processor = self.image_processor
            values = 3 * processor.temporal_patch_size * processor.patch_size**2
            return torch.zeros(0, values), torch.zeros(0, 3, dtype=torch.int64)
        try:
            return self.pixels(images)
        except ValueError as error:  # an aspect ratio beyond 200
            raise DataError(f"{sample.where}: {error}; image sizes {[i.size for i in images]}") from error

    def _expanded(
        self, sample: Sample, ids: list[int], labels: list[int], pixels: tuple[Tensor, Tensor], *, cuts: bool = False
    ) -> Encoded:
        """With the i-th placeholder repeated as often as the i-th image has tokens.

        Args:
            pixels: of the images, as `_encode_images` gives them.
            cuts: leave out what is too long of the last answer.
        """
        pixel_values, grid_n3 = pixels
        tokens_n = grid_n3.prod(dim=1) // self.image_processor.merge_size**2
        ids_T, labels_T = (torch.tensor(values, dtype=torch.int64) for values in (ids, labels))
        repeats_T = torch.ones_like(ids_T)
        repeats_T[ids_T == self.image_token_id] = tokens_n
        input_ids, labels_S = (values.repeat_interleave(repeats_T) for values in (ids_T, labels_T))
        too_long = max(0, len(input_ids) - self.max_length) if cuts else 0
        if too_long and bool((labels_S[-too_long - 1 :] != IGNORED).all()):
            input_ids, labels_S = input_ids[:-too_long], labels_S[:-too_long]
        else:
            too_long = 0
        self._check_length(sample, len(input_ids))
        return Encoded(
            sample_id=sample.sample_id,
            input_ids=input_ids,
            labels=labels_S,
            pixel_values=pixel_values,
            image_grid_thw=grid_n3,
            cut_tokens=too_long,
        )

    def _check_length(self, sample: Sample, length: int) -> None:
        if length > self.max_length:
            raise DataError(
                f"{sample.where}: {length} tokens, data.max_length allows {self.max_length}. "
                "Raise data.max_length, lower data.max_pixels, drop the sample, or set data.long_answers to cut."
            )


def _check_text(sample: Sample, name: str, text: str) -> None:
    found = [token for token in SPECIAL_TOKENS if token in text]
    if found:
        raise DataError(
            f"{sample.where}: its {name} contains the special token(s) {', '.join(found)}, which "
            "would be read as structure. Remove them from the data."
        )
