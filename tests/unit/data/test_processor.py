import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from pipeline.benchmark.tokenizer import CHAT_TEMPLATE
from pipeline.data import processor_folder
from pipeline.data.collate import collate
from pipeline.data.processor import Processor
from pipeline.data.special_tokens import SPECIAL_TOKENS
from pipeline.errors import DataError, UserError
from tests.helpers.tiny_data import corpus, data, make_processor, make_sample, save_image


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return make_processor(tmp_path_factory.mktemp("run") / "processor")


@pytest.fixture
def sample(tmp_path):
    return make_sample((save_image(tmp_path / "a.png", 320, 192),))


@pytest.mark.parametrize(("width", "height"), [(320, 192), (333, 217), (1600, 900), (20, 15), (64, 300)])
def test_image_tokens_cover_the_grid_exactly(processor, tmp_path, width, height):
    encoded = processor.encode(make_sample((save_image(tmp_path / "a.png", width, height),)))
    t, h, w = encoded.image_grid_thw[0].tolist()
    assert (encoded.input_ids == processor.image_token_id).sum() == t * h * w // 4
    assert encoded.pixel_values.shape == (t * h * w, 3 * 2 * 16 * 16)
    assert 1024 <= h * w * 256 <= 320 * 192
    assert h % 2 == w % 2 == 0


def test_ids_are_the_rendered_conversation(processor, tmp_path):
    """Independent reference: the whole conversation rendered as one string, then tokenized."""
    images = tuple(save_image(tmp_path / f"{n}.png", n, 64) for n in (64, 128))
    sample = make_sample(images)
    parts = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": sample.prompt}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": sample.answer}]
    text = processor.tokenizer.apply_chat_template(messages, tokenize=False).removesuffix("\n")
    for count in (4, 8):  # 64x64 and 128x64 pixels in cells of 32x32
        text = text.replace("<|image_pad|>", "<IMG>" * count, 1)
    text = text.replace("<IMG>", "<|image_pad|>")
    encoded = processor.encode(sample)
    assert encoded.input_ids.tolist() == processor.tokenizer.encode(text, add_special_tokens=False)
    assert encoded.image_grid_thw.tolist() == [[1, 4, 4], [1, 4, 8]]


def test_transformers_own_processor_makes_the_same_prompt(processor, tmp_path, monkeypatch):
    """Independent reference: Qwen3VLProcessor. Without torchvision only its video half's type check fails."""
    monkeypatch.setattr(Qwen3VLProcessor, "check_argument_for_proper_class", lambda self, name, argument: None)
    theirs = Qwen3VLProcessor(
        image_processor=processor.image_processor,
        tokenizer=processor.tokenizer,
        video_processor=None,
        chat_template=processor.tokenizer.chat_template,
    )
    images = tuple(save_image(tmp_path / f"{n}.png", n, 96) for n in (64, 200))
    sample = make_sample(images)
    parts = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": sample.prompt}]
    text = theirs.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    batch = theirs(images=[Image.open(path) for path in images], text=[text], return_tensors="pt")
    ours = processor.encode_prompt(sample)
    assert batch["input_ids"][0].tolist() == ours.input_ids.tolist()
    assert torch.equal(batch["pixel_values"], ours.pixel_values)
    assert torch.equal(batch["image_grid_thw"], ours.image_grid_thw)


def test_labels_are_the_answer_and_its_end(processor, sample):
    encoded, prompt = processor.encode(sample), processor.encode_prompt(sample)
    labelled = encoded.labels != -100
    assert encoded.input_ids[~labelled].tolist() == prompt.input_ids.tolist()
    assert torch.equal(encoded.labels[labelled], encoded.input_ids[labelled])
    assert encoded.labels[-1] == processor.eos_id
    assert processor.decode(encoded.labels[labelled]) == sample.answer
    assert (prompt.labels == -100).all()
    assert processor.decode(prompt.input_ids[-2:]) == "assistant\n"


def test_pixels_are_patches_in_merge_order(processor, sample):
    """Independent reference: loops over the image. No resizing happens at 320x192."""
    image = np.asarray(Image.open(sample.images[0]), dtype=np.float32) / 127.5 - 1.0
    patches = [
        np.stack([image[y : y + 16, x : x + 16].transpose(2, 0, 1)] * 2, axis=1).ravel()
        for top in range(0, 192, 32)
        for left in range(0, 320, 32)
        for y in (top, top + 16)
        for x in (left, left + 16)
    ]
    torch.testing.assert_close(processor.encode(sample).pixel_values, torch.tensor(np.stack(patches)))


def test_blind_keeps_all_but_the_pixels(processor, sample):
    seen, blind = processor.encode(sample), processor.encode(sample, blind=True)
    assert torch.equal(seen.input_ids, blind.input_ids)
    assert torch.equal(seen.image_grid_thw, blind.image_grid_thw)
    assert seen.pixel_values.std() > 0.1
    torch.testing.assert_close(blind.pixel_values, torch.full_like(seen.pixel_values, 128 / 127.5 - 1))


@pytest.mark.parametrize("answer", ["", " \n"])
def test_empty_answer_names_the_sample(processor, sample, answer):
    empty = make_sample(sample.images, sample_id="e5", answer=answer)
    with pytest.raises(DataError, match="sample e5: its answer is empty"):
        processor.encode(empty)
    assert processor.encode_prompt(empty).sample_id == "e5"


def test_too_long_a_sample_names_both_lengths(tmp_path, sample):
    processor = make_processor(tmp_path / "processor", max_length=80)
    length = len(make_processor(tmp_path / "processor").encode(sample).input_ids)
    assert length > 80
    with pytest.raises(DataError, match=rf"sample s0: {length} tokens, data\.max_length allows 80"):
        processor.encode(sample)


@pytest.mark.parametrize("field", ["prompt", "answer"])
def test_structure_cannot_be_smuggled_in_by_text(processor, sample, field):
    bad = make_sample(sample.images, **{field: "look <|image_pad|> here"})
    with pytest.raises(DataError, match=rf"its {field} contains the special token\(s\) <\|image_pad\|>"):
        processor.encode(bad)


def test_a_sliver_is_refused(processor, tmp_path):
    with pytest.raises(DataError, match=r"sample s0: .*aspect ratio.*\(900, 3\)"):
        processor.encode(make_sample((save_image(tmp_path / "a.png", 900, 3),)))


def test_identity_changes_with_each_part_and_only_then(processor, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(processor.origin, folder)
    assert Processor.load(folder, data(max_length=99)).identity() == processor.identity()

    def differing(changed=None):
        ours, theirs = processor.identity(), Processor.load(folder, changed or data()).identity()
        return {key for key in ours if ours[key] != theirs[key]}

    assert differing(data(max_pixels=64 * 64)) == {"image_processor"}
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text() + "{# edited #}")
    assert differing() == {"chat_template"}
    shutil.copy(f"{processor.origin}/chat_template.jinja", template)
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["model"]["vocab"][300][1] -= 1.0
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    assert differing() == {"tokenizer"}


def test_identity_is_behaviour_and_not_what_a_library_writes_down(processor, tmp_path, monkeypatch):
    """Keys that a release adds, renames or drops, and another rounding of float32, are no other processor."""
    before = processor.identity()
    core, images = processor.tokenizer.backend_tokenizer, processor.image_processor
    raw = json.loads(core.to_str())
    raw["version"], raw["new_setting"] = "2.0", {"of": "a release"}
    raw["model"]["also_new"] = False
    del raw["padding"]

    class Newer:
        def to_str(self):
            return json.dumps(raw, indent=1)

    monkeypatch.setattr(type(processor.tokenizer), "backend_tokenizer", property(lambda self: Newer()))
    monkeypatch.setattr(type(images), "to_dict", lambda self: {"new_key": None})
    theirs = type(images).__call__

    def rounded_otherwise(self, *args, **options):
        made = theirs(self, *args, **options)
        made["pixel_values"] = made["pixel_values"] * (1 + 2e-7) - 1e-7
        return made

    monkeypatch.setattr(type(images), "__call__", rounded_otherwise)
    assert processor.identity() == before


@pytest.mark.parametrize(
    "changes",
    [
        {"image_mean": [0.5, 0.5, 0.48]},
        {"image_std": [0.5, 0.25, 0.5]},
        {"image_mean": [0.4, 0.5, 0.6]},
        {"rescale_factor": 1 / 128},
        {"resample": 2},
        {"do_normalize": False},
        {"patch_size": 8},
        {"merge_size": 1},
        {"temporal_patch_size": 1},
    ],
)
def test_every_setting_that_changes_pixels_changes_the_identity(processor, tmp_path, changes):
    folder = tmp_path / "copy"
    shutil.copytree(processor.origin, folder)
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    ours, theirs = processor.identity(), Processor.load(folder, data()).identity()
    assert {key for key in ours if ours[key] != theirs[key]} == {"image_processor"}


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": {"type": "Lowercase"}},
        {"normalizer": {"type": "NFKC"}},
        {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}},
    ],
)
def test_every_setting_that_changes_ids_changes_the_identity(processor, tmp_path, changes):
    folder = tmp_path / "copy"
    shutil.copytree(processor.origin, folder)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    ours, theirs = processor.identity(), Processor.load(folder, data()).identity()
    assert {key for key in ours if ours[key] != theirs[key]} == {"tokenizer"}


def test_merges_are_part_of_the_identity_in_either_notation(tmp_path):
    save_qwen_like(tmp_path / "one")
    path = tmp_path / "one" / "tokenizer.json"
    raw = json.loads(path.read_text())
    pairs = raw["model"]["merges"]
    assert len(pairs) > 2 and isinstance(pairs[0], list)
    before = Processor.load(tmp_path / "one", data()).identity()
    path.write_text(json.dumps(raw | {"model": raw["model"] | {"merges": [" ".join(pair) for pair in pairs]}}))
    assert Processor.load(tmp_path / "one", data()).identity() == before
    path.write_text(json.dumps(raw | {"model": raw["model"] | {"merges": [pairs[1], pairs[0], *pairs[2:]]}}))
    assert Processor.load(tmp_path / "one", data()).identity()["tokenizer"] != before["tokenizer"]


def test_collate_pads_either_side(processor, tmp_path):
    samples = corpus(save_image(tmp_path / "a.png", 64, 64))
    rows = [processor.encode(s) for s in (samples[0], make_sample(samples[0].images, answer="Stop."))]
    long, short = (len(e.input_ids) for e in rows)
    for side, kept in (("right", slice(0, short)), ("left", slice(long - short, long))):
        batch = collate(rows, processor.pad_id, processor.image_token_id, side=side)
        assert batch["sample_ids"] == ["s000", "s0"]
        assert torch.equal(batch["input_ids"][0], rows[0].input_ids)
        assert torch.equal(batch["input_ids"][1, kept], rows[1].input_ids)
        assert torch.equal(batch["labels"][1, kept], rows[1].labels)
        assert batch["attention_mask"].sum(1).tolist() == [long, short]
        assert (batch["labels"][1][batch["attention_mask"][1] == 0] == -100).all()
        assert (batch["input_ids"][1][batch["attention_mask"][1] == 0] == processor.pad_id).all()
        assert batch["mm_token_type_ids"].sum(1).tolist() == [4, 4]
        assert batch["pixel_values"].shape[0] == batch["image_grid_thw"].prod(1).sum() == 32


def save_qwen_like(folder, special_tokens=SPECIAL_TOKENS, template=CHAT_TEMPLATE):
    """A folder as Qwen checkpoints have it: byte-level BPE, Qwen2Tokenizer, template inside the config."""
    folder.mkdir()
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(["a red car"], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    core.add_special_tokens(list(special_tokens))
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>").save_pretrained(str(folder))
    config = folder / "tokenizer_config.json"
    settings = json.loads(config.read_text()) | {
        "tokenizer_class": "Qwen2Tokenizer",
        "chat_template": template,
    }
    settings["pad_token"] = "<|endoftext|>"
    config.write_text(json.dumps(settings))
    images = {"image_processor_type": "Qwen2VLImageProcessorFast", "patch_size": 14, "merge_size": 2}
    images |= {"temporal_patch_size": 2, "min_pixels": 3136, "max_pixels": 12845056}
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_vl"}))


def test_reads_a_checkpoint_folder_of_the_family(tmp_path, sample):
    save_qwen_like(tmp_path / "qwen")
    processor = Processor.load(tmp_path / "qwen", data(max_pixels=200 * 200))
    encoded = processor.encode(sample)
    assert processor.decode(encoded.input_ids) == f"user\n{sample.prompt}\nassistant\n{sample.answer}"
    assert encoded.image_grid_thw.prod() * 14 * 14 <= 200 * 200
    assert (encoded.input_ids == processor.image_token_id).sum() == encoded.image_grid_thw.prod() // 4


def nest(folder):
    """As `save_pretrained` of transformers 5 writes a whole processor: the image processor's settings are inside."""
    path = folder / "preprocessor_config.json"
    whole = {"processor_class": "Qwen3VLProcessor", "image_processor": json.loads(path.read_text())}
    (folder / "processor_config.json").write_text(json.dumps(whole))
    path.unlink()


def test_a_processor_saved_by_transformers_5_is_the_same(tmp_path, sample):
    for name in ("plain", "nested"):
        save_qwen_like(tmp_path / name)
    nest(tmp_path / "nested")
    plain, nested = (Processor.load(tmp_path / name, data()) for name in ("plain", "nested"))
    assert plain.identity() == nested.identity()
    assert torch.equal(plain.encode(sample).pixel_values, nested.encode(sample).pixel_values)
    (tmp_path / "nested" / "processor_config.json").write_text('{"processor_class": "Qwen3VLProcessor"}')
    with pytest.raises(UserError, match=r"no preprocessor_config\.json there, and no processor_config\.json with"):
        Processor.load(tmp_path / "nested", data())


@pytest.mark.parametrize("nested", [False, True])
def test_an_exported_image_processor_scales_as_the_run_did(tmp_path, nested):
    """Read as a server reads it, without the recipe: as many patches as in training."""
    folder = tmp_path / "qwen"
    save_qwen_like(folder)
    if nested:
        nest(folder)
    settings = data(min_pixels=28 * 28, max_pixels=100 * 100)
    image = Image.new("RGB", (640, 360))
    wanted = Processor.load(folder, settings).pixels([image])[1]
    before = Qwen2VLImageProcessorPil.from_pretrained(folder)(images=[image])["image_grid_thw"]
    assert before.tolist() != wanted.tolist()
    files = {path.name: path.read_bytes() for path in folder.glob("*.json")}
    for name, content in processor_folder.as_used(files, folder, settings).items():
        (folder / name).write_bytes(content)
    served = Qwen2VLImageProcessorPil.from_pretrained(folder)(images=[image])["image_grid_thw"]
    assert served.tolist() == wanted.tolist()


def test_unfit_tokenizers_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"none: no preprocessor_config\.json there"):
        Processor.load(tmp_path / "none", data())
    save_qwen_like(tmp_path / "text_only", special_tokens=SPECIAL_TOKENS[:3])
    with pytest.raises(UserError, match=r"lacks <\|vision_start\|>, <\|vision_end\|>, <\|image_pad\|>"):
        Processor.load(tmp_path / "text_only", data())
    save_qwen_like(tmp_path / "base", template=None)
    with pytest.raises(UserError, match="has no chat template"):
        Processor.load(tmp_path / "base", data())
    (tmp_path / "base" / "tokenizer.json").write_text("{ torn")
    with pytest.raises(UserError, match="base: cannot read its tokenizer"):
        Processor.load(tmp_path / "base", data())
