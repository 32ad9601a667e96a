import json

import pytest
import sentencepiece as spm
from transformers import AutoImageProcessor, AutoTokenizer

from pipeline.benchmark.tokenizer import PROVENANCE_FILE, train_tokenizer, vision_patches, write_processor
from pipeline.data.special_tokens import SPECIAL_TOKENS
from pipeline.errors import ConfigError, DataError
from pipeline.recipe import Recipe
from tests.helpers.teacher_run import SIZES
from tests.helpers.tiny_data import DATA, corpus, make_sample, save_image

ODD_TEXTS = [
    "Café 漢字 🚗 — “quoted”…",
    "  two  spaces, a\ttab \n\n and a line\r\nbreak ",
    "literal <0x41> and <0xZZ> and <unk>",
    "zebra-crossing 3.14 / 1,000 (50 %) #7",
    "",
]


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    return save_image(tmp_path_factory.mktemp("image") / "a.png", 64, 64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, image):
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(corpus(image), 640, path, seed=0)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    """Loaded by transformers alone."""
    return AutoTokenizer.from_pretrained(str(folder))


def ids_of(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


def test_every_text_comes_back_exactly(tokenizer, image):
    texts = [t for s in corpus(image) for t in (s.prompt, s.answer)] + ODD_TEXTS
    assert [tokenizer.decode(ids_of(tokenizer, t), skip_special_tokens=True) for t in texts] == texts


def test_segments_as_sentencepiece_does(folder, tokenizer, image):
    """Independent reference: sentencepiece's own encoder on the model it trained."""
    reference = spm.SentencePieceProcessor(model_file=str(folder / "sentencepiece.model"))
    lines = [line for s in corpus(image) for line in s.answer.split("\n")]
    lines += ["an unseen zebra crosses", "Überholen 漢 verboten", "12345 m,,; ok?"]
    assert [ids_of(tokenizer, line) for line in lines] == [reference.encode(line) for line in lines]


def test_frequent_words_are_one_token(tokenizer):
    """Answers are generated token by token: fragments would make the student slow."""
    assert len(ids_of(tokenizer, "There is a white pedestrian in the oncoming lane;")) == 10
    assert len(ids_of(tokenizer, "assistant")) == len(ids_of(tokenizer, "user")) == 1


def test_special_tokens_are_one_id_each_behind_the_pieces(tokenizer):
    ids = [ids_of(tokenizer, token) for token in SPECIAL_TOKENS]
    first = len(tokenizer) - len(SPECIAL_TOKENS)
    assert ids == [[first + i] for i in range(len(SPECIAL_TOKENS))]
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")
    assert len(tokenizer) <= 640
    text = "keep<|im_end|>distance"
    assert tokenizer.decode(ids_of(tokenizer, text), skip_special_tokens=True) == "keepdistance"


def test_same_corpus_gives_the_same_bytes(folder, tmp_path, image):
    train_tokenizer(corpus(image), 640, tmp_path, seed=0)
    for name in ("tokenizer.json", "tokenizer_config.json", "sentencepiece.model", "chat_template.jinja"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name


def test_vocabulary_bound_holds_and_too_small_a_bound_is_refused(tmp_path, image):
    assert len(train_tokenizer(corpus(image), 330, tmp_path, seed=0)) <= 330
    with pytest.raises(ConfigError, match=r"benchmark\.vocab_size: 200 does not work"):
        train_tokenizer(corpus(image), 200, tmp_path, seed=0)


@pytest.mark.parametrize("text", ["stop<|im_end|>", "a \N{LOWER ONE EIGHTH BLOCK} b"])
def test_text_that_cannot_come_back_names_its_sample(tmp_path, image, text):
    bad = make_sample((image,), sample_id="bad7", answer=text)
    with pytest.raises(DataError, match="sample bad7: its answer does not survive"):
        train_tokenizer([*corpus(image), bad], 640, tmp_path, seed=0)
    assert not list(tmp_path.iterdir())


def test_empty_corpus_is_refused(tmp_path):
    with pytest.raises(DataError, match="no sample"):
        train_tokenizer([], 640, tmp_path, seed=0)


def test_chat_template_is_qwens_format(tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "image"}, {"image": "b.png"}, {"type": "text", "text": "Which?"}],
        },
        {"role": "assistant", "content": "The first."},
        {"role": "user", "content": "Why?"},
    ]
    picture = "<|vision_start|><|image_pad|><|vision_end|>"
    expected = (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        f"<|im_start|>user\n{picture}{picture}Which?<|im_end|>\n"
        "<|im_start|>assistant\nThe first.<|im_end|>\n"
        "<|im_start|>user\nWhy?<|im_end|>\n"
    )
    assert tokenizer.apply_chat_template(messages, tokenize=False) == expected
    prompted = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompted == expected + "<|im_start|>assistant\n"
    numbered = tokenizer.apply_chat_template(messages[1:2], tokenize=False, add_vision_id=True)
    assert f"Picture 1: {picture}Picture 2: {picture}Which?" in numbered


def recipe(tmp_path, **changes):
    return Recipe.model_validate({"run": {"dir": tmp_path / "run"}, "benchmark": changes, "data": DATA})


def test_a_finished_folder_is_kept_and_another_corpus_is_refused(tmp_path, image):
    samples = corpus(image)
    assert write_processor(recipe(tmp_path), samples)
    target = tmp_path / "run" / "processor"
    before = {p.name: p.stat().st_mtime_ns for p in target.iterdir()}
    assert not write_processor(recipe(tmp_path), samples)
    assert {p.name: p.stat().st_mtime_ns for p in target.iterdir()} == before
    with pytest.raises(ConfigError, match=r"corpus: folder '[0-9a-f]{64}', recipe '[0-9a-f]{64}'"):
        write_processor(recipe(tmp_path), samples[1:])
    with pytest.raises(ConfigError, match="vocab_size: folder 640, recipe 500"):
        write_processor(recipe(tmp_path, vocab_size=500), samples)


def test_an_interrupted_folder_is_made_again(tmp_path, image):
    partial = tmp_path / "run" / "processor.partial"
    partial.mkdir(parents=True)
    (partial / "tokenizer.json").write_text("{")
    assert write_processor(recipe(tmp_path), corpus(image))
    target = tmp_path / "run" / "processor"
    assert not partial.exists()
    assert json.loads((target / PROVENANCE_FILE).read_text())["vocab_size"] == 640
    loaded = AutoImageProcessor.from_pretrained(str(target))
    assert (loaded.patch_size, loaded.merge_size, loaded.size["longest_edge"]) == (16, 2, 320 * 192)


def test_a_foreign_folder_is_left_alone(tmp_path, image):
    target = tmp_path / "run" / "processor"
    target.mkdir(parents=True)
    (target / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="did not make it"):
        write_processor(recipe(tmp_path), corpus(image))
    assert [p.name for p in target.iterdir()] == ["notes.txt"]


def test_models_must_share_their_patches(tmp_path):
    teacher = SIZES.model_dump()
    models = {"teacher": teacher, "student": teacher | {"vision": teacher["vision"] | {"patch_size": 14}}}
    with pytest.raises(ConfigError, match=r"\['teacher'\]: 16, 2; \['student'\]: 14, 2"):
        vision_patches(recipe(tmp_path, models=models))
    del models["teacher"]
    assert vision_patches(recipe(tmp_path, models=models)) == (14, 2)
