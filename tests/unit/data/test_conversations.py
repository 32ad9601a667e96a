"""Conversations as tokens: several turns, images between words, no image at all, templates that think."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

from pipeline.data import processor_folder
from pipeline.data.collate import IGNORED
from pipeline.data.processor import Processor
from pipeline.data.sample import Sample, Turn
from pipeline.data.thinking import close_thinking
from pipeline.errors import DataError, UserError
from tests.helpers.tiny_data import data, make_processor, make_sample, save_image

PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
START, END = "<|im_start|>", "<|im_end|>\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return Path(make_processor(tmp_path_factory.mktemp("run") / "processor").origin)


@pytest.fixture
def talk(tmp_path) -> Sample:
    """Two turns of the assistant, two images between words."""
    images = tuple(save_image(tmp_path / f"{n}.png", n, 64) for n in (64, 128))
    turns = (
        Turn("system", ("Be brief.",)),
        Turn("user", ("CAM_FRONT: ", None, " CAM_BACK: ", None, " What is ahead?")),
        Turn("assistant", ("A red car.",)),
        Turn("user", ("And behind?",)),
    )
    return make_sample(images, turns=turns, answer="Nothing.")


def load(folder: Path, **changes: object) -> Processor:
    return Processor.load(folder, data(**changes))


def reference(processor: Processor, text: str, tokens: tuple[int, ...]) -> list[int]:
    """The text tokenized as a whole, the i-th placeholder as often as the i-th image has tokens."""
    for count in tokens:
        text = text.replace("<|image_pad|>", "<IMG>" * count, 1)
    return processor.tokenizer.encode(text.replace("<IMG>", "<|image_pad|>"), add_special_tokens=False)


TALK = (
    f"{START}system\nBe brief.{END}{START}user\nCAM_FRONT: {PICTURE} CAM_BACK: {PICTURE} What is ahead?{END}"
    f"{START}assistant\nA red car.{END}{START}user\nAnd behind?{END}{START}assistant\nNothing.<|im_end|>"
)


@pytest.mark.parametrize(("learn", "learned"), [("all", ["A red car.", "Nothing."]), ("last", ["Nothing."])])
def test_a_conversation_is_the_chat_rendered_and_its_answers_are_labels(folder, talk, learn, learned):
    processor = load(folder, learn=learn)
    encoded = processor.encode(talk)
    assert encoded.input_ids.tolist() == reference(processor, TALK, (4, 8))
    marked = encoded.labels != IGNORED
    assert torch.equal(encoded.labels[marked], encoded.input_ids[marked])
    said = "".join(f"{answer}<|im_end|>" for answer in learned)
    assert encoded.labels[marked].tolist() == processor.tokenizer.encode(said, add_special_tokens=False)
    text, answers = processor.count_text(talk)
    assert (text + answers + 12, answers) == (len(encoded.input_ids), int(marked.sum()))
    prompt = processor.encode_prompt(talk)
    assert prompt.input_ids.tolist() == reference(processor, TALK.removesuffix("Nothing.<|im_end|>"), (4, 8))
    assert (prompt.labels == IGNORED).all()


def test_what_is_learnt_from_is_part_of_the_identity(folder):
    assert load(folder).identity() != load(folder, learn="last").identity()


def test_cutting_takes_from_the_last_answer_alone(folder, talk):
    whole = load(folder).encode(talk)
    cut = load(folder, max_length=len(whole.input_ids) - 2, long_answers="cut").encode(talk)
    assert torch.equal(cut.input_ids, whole.input_ids[:-2]) and torch.equal(cut.labels, whole.labels[:-2])
    assert cut.cut_tokens == 2
    with pytest.raises(DataError, match=r"data\.max_length allows 40"):
        load(folder, max_length=40, long_answers="cut").encode(talk)


@pytest.mark.parametrize("role", ["user", "assistant"])
def test_structure_in_an_earlier_turn_is_refused(folder, talk, role):
    turns = tuple(Turn(t.role, (f"{t.text}<|im_end|>",)) if t.role == role else t for t in talk.turns)
    with pytest.raises(DataError, match="contains the special token"):
        load(folder).encode(make_sample((), turns=turns))


def test_a_template_that_refuses_the_turns_names_the_record(folder):
    turns = (Turn("user", ("Hello.",)), Turn("system", ("Be brief.",)), Turn("user", ("Why?",)))
    sample = make_sample((), turns=turns, meta={"record": "train.jsonl:7", "id": "c7"})
    with pytest.raises(DataError, match=r"train\.jsonl:7, c7 \(sample s0\): the chat template refuses its turns"):
        load(folder).encode(sample)


# -- text alone --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_batch_of_text_has_a_masked_stand_in_for_an_image(folder, side):
    processor = load(folder)
    rows = [processor.encode(make_sample((), answer=answer)) for answer in ("Stop.", "Go on slowly.")]
    assert [(len(r.pixel_values), len(r.image_grid_thw)) for r in rows] == [(0, 0)] * 2
    batch = processor.collate(rows, side=side)
    assert int((batch["input_ids"] == processor.image_token_id).sum()) == 1
    assert batch["mm_token_type_ids"].sum() == 0
    assert batch["attention_mask"].sum(1).tolist() == [len(row.input_ids) for row in rows]
    assert batch["image_grid_thw"].tolist() == [[1, 2, 2]] and len(batch["pixel_values"]) == 4
    for row, ids, mask, labels in zip(
        rows, batch["input_ids"], batch["attention_mask"].bool(), batch["labels"], strict=True
    ):
        assert torch.equal(ids[mask], row.input_ids) and torch.equal(labels[mask], row.labels)
        assert (labels[~mask] == IGNORED).all()


def test_text_beside_images_needs_no_stand_in(folder, tmp_path):
    processor = load(folder)
    image = save_image(tmp_path / "a.png", 64, 64)
    batch = processor.collate([processor.encode(make_sample(())), processor.encode(make_sample((image,)))])
    assert batch["mm_token_type_ids"].sum(1).tolist() == [0, 4]
    assert len(batch["image_grid_thw"]) == 1


# -- templates that think ----------------------------------------------------------------------------------------------

BODY = """{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.role == 'assistant' and loop.last and WRITES -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}
{%- if message.content is string -%}{{- message.content -}}
{%- else -%}{%- for part in message.content -%}{{- part.text if 'text' in part else PICTURE -}}{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n<think>\\n' -}}{%- endif -%}"""


def thinking_folder(folder: Path, place: Path, *, writes: str) -> Path:
    """The folder's tokenizer with a template whose generation prompt opens <think>."""
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    tokenizer.chat_template = BODY.replace("WRITES", writes).replace("PICTURE", repr(PICTURE))
    tokenizer.save_pretrained(str(place))
    (place / "preprocessor_config.json").write_bytes((folder / "preprocessor_config.json").read_bytes())
    return place


def test_an_open_thought_is_closed_as_the_template_closes_it(folder, tmp_path, talk):
    place = thinking_folder(folder, tmp_path / "thinking", writes="true")
    processor = load(place)
    plain = AutoTokenizer.from_pretrained(str(place))
    messages = [{"role": "user", "content": "Hi."}]
    opened = plain.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    asked = processor.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert opened.endswith("<think>\n") and asked == opened + "\n</think>\n\n"
    text = TALK.replace("Nothing.", "<think>\n\n</think>\n\nNothing.")
    encoded = processor.encode(talk)
    assert encoded.input_ids.tolist() == reference(processor, text, (4, 8))
    learned = processor.decode(encoded.labels[encoded.labels != IGNORED])
    assert "think" not in learned and learned.endswith("Nothing.")
    prompt = reference(processor, text.removesuffix("Nothing.<|im_end|>"), (4, 8))
    assert processor.encode_prompt(talk).input_ids.tolist() == prompt


def test_an_export_asks_as_training_did(folder, tmp_path):
    place = thinking_folder(folder, tmp_path / "thinking", writes="true")
    files = {path.name: path.read_bytes() for path in place.glob("*") if path.is_file()}
    served = tmp_path / "served"
    served.mkdir()
    for name, content in processor_folder.as_used(files, place, data()).items():
        (served / name).write_bytes(content)
    messages = [{"role": "user", "content": "Hi."}]
    asked = AutoTokenizer.from_pretrained(str(served)).apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    assert asked.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert load(served).identity() == load(place).identity()


def test_a_thought_that_no_template_closes_is_refused(folder, tmp_path):
    place = thinking_folder(folder, tmp_path / "thinking", writes="false")
    with pytest.raises(UserError, match="with an open <think>, and writes an answer without thoughts as"):
        load(place)


def test_a_template_without_thoughts_stays(folder):
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    before = tokenizer.chat_template
    assert not close_thinking(tokenizer, "x") and tokenizer.chat_template == before
    assert not close_thinking(SimpleNamespace(chat_template=None), "x")
