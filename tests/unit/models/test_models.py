from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoTokenizer
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

from pipeline import files
from pipeline.benchmark import random_models
from pipeline.data.collate import collate
from pipeline.data.processor import Processor
from pipeline.errors import ConfigError, UserError
from pipeline.files import weights_hash
from pipeline.models import loading
from pipeline.models.compatibility import check_compatible
from pipeline.models.generation import continuations, model_inputs
from pipeline.recipe import RandomModelConfig
from pipeline.training.batches import MODEL_INPUTS
from tests.helpers import tiny
from tests.helpers.tiny_data import corpus, data, make_processor, make_sample, save_image

TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16}  # fmt: skip
VISION = {"hidden_size": 32, "intermediate_size": 48, "depth": 2, "num_heads": 2}


def config(text=None, vision=None):
    return RandomModelConfig.model_validate({"text": TEXT | (text or {}), "vision": VISION | (vision or {})})


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return make_processor(tmp_path_factory.mktemp("run") / "processor")


@pytest.fixture(scope="module")
def model(processor):
    return random_models.build(config(), processor, seed=1)


@pytest.fixture
def folder(model, processor, tmp_path):
    loading.save_model(model, processor, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(scope="module")
def encoded(processor, tmp_path_factory):
    """Two samples of different lengths and image sizes."""
    path = tmp_path_factory.mktemp("images")
    images = [save_image(path / f"{n}.png", n, 96, seed=n) for n in (64, 160)]
    return [
        processor.encode(make_sample((images[0],))),
        processor.encode(corpus(images[1])[7]),
    ]


def inputs(batch):
    return {key: value for key, value in batch.items() if key in MODEL_INPUTS}


def logits(model, rows, processor, side="right"):
    batch = collate(rows, processor.pad_id, processor.image_token_id, side=side)
    with torch.no_grad():
        return model(**inputs(batch)).logits


def test_weights_depend_on_the_seed_alone(model, processor):
    torch.manual_seed(123)
    before = torch.get_rng_state()
    again, other = (random_models.build(config(), processor, seed=seed) for seed in (1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    pairs = zip(model.parameters(), again.parameters(), other.parameters(), strict=True)
    equal = [(torch.equal(a, b), torch.equal(a, c)) for a, b, c in pairs]
    assert all(same for same, _ in equal)
    assert not all(other for _, other in equal)


def test_config_says_what_the_tokenizer_says(model, processor):
    text = model.config.text_config
    assert text.vocab_size % 64 == 0
    assert 0 <= text.vocab_size - processor.vocab_size < 64
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.config._attn_implementation == text._attn_implementation == "sdpa"
    assert model.generation_config.eos_token_id == processor.eos_id
    assert not model.training
    check_compatible(model, processor)


@pytest.mark.parametrize("head_dim", [8, 16, 32, 40, 64, 80, 128])
def test_rotary_sections_share_out_all_frequencies(processor, head_dim):
    """Each frequency turns with exactly one of time, height, width: read off the embedding itself."""
    section = random_models.mrope_section(head_dim)
    assert sum(section) == head_dim // 2
    settings = random_models.qwen3_vl_config(config({"head_dim": head_dim}).text, config().vision, processor)
    rotary = Qwen3VLTextRotaryEmbedding(settings.text_config)
    owners = []
    for axis in range(3):
        position = torch.zeros(3, 1, 1, dtype=torch.long)
        position[axis] = 10_000  # far enough for the slowest frequency, about 1e-4, to turn
        cos, _ = rotary(torch.zeros(1, 1, head_dim), position)
        owners.append(int((cos[0, 0, : head_dim // 2] != 1).sum()))
    assert owners == section


def test_padding_changes_no_logit(model, processor, encoded):
    single = [logits(model, [row], processor)[0] for row in encoded]
    for side in ("right", "left"):
        both = logits(model, encoded, processor, side)
        for row, alone in zip(both, single, strict=True):
            kept = row[: len(alone)] if side == "right" else row[-len(alone) :]
            torch.testing.assert_close(kept, alone, rtol=1e-4, atol=1e-5)


def test_text_alone_is_what_transformers_makes_of_it(model, processor):
    """The stand-in for an image, which such a batch has, changes no logit and no generated token."""
    samples = [make_sample((), answer=answer) for answer in ("Stop.", "Go on slowly, and keep your distance.")]
    rows = [processor.encode(sample) for sample in samples]
    for side in ("right", "left"):
        ours = logits(model, rows, processor, side)
        for row, alone in zip(ours, rows, strict=True):
            with torch.no_grad():
                wanted = model(input_ids=alone.input_ids[None]).logits[0]
            start = len(row) - len(alone.input_ids) if side == "left" else 0
            torch.testing.assert_close(row[start:][: len(wanted)], wanted, rtol=1e-4, atol=1e-5)
    prompts = [processor.encode_prompt(sample) for sample in samples]
    for prompt, made in zip(
        prompts,
        continuations(model, model_inputs(processor.collate(prompts, side="left"), "cpu"), 5, ()),
        strict=True,
    ):
        plain = model.generate(input_ids=prompt.input_ids[None], max_new_tokens=5, do_sample=False, eos_token_id=None)
        assert made == plain[0, -5:].tolist()


def test_image_reaches_the_logits(model, processor, tmp_path):
    sample = make_sample((save_image(tmp_path / "a.png", 64, 64),))
    seen, blind = (logits(model, [processor.encode(sample, blind=b)], processor) for b in (False, True))
    assert (seen - blind).abs().max() > 1e-3


def test_generation_equals_greedy_forward(model, processor, tmp_path):
    """Independent reference: argmax of whole forwards, no cache, one sample at a time."""
    samples = corpus(save_image(tmp_path / "a.png", 96, 64))[:2]
    prompts = [processor.encode_prompt(s) for s in samples]
    batch = inputs(collate(prompts, processor.pad_id, processor.image_token_id, side="left"))
    made = model.generate(**batch, max_new_tokens=5, min_new_tokens=5, do_sample=False)[:, -5:]
    for row, prompt in zip(made.tolist(), prompts, strict=True):
        ids = prompt.input_ids
        for token in row:
            step = inputs(collate([prompt], processor.pad_id, processor.image_token_id))
            step |= {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]}
            step["mm_token_type_ids"] = (ids == processor.image_token_id).long()[None]
            with torch.no_grad():
                scores = model(**step).logits[0, -1]
            scores[processor.eos_id] = -torch.inf  # min_new_tokens
            assert token == scores.argmax()
            ids = torch.cat([ids, torch.tensor([token])])


def test_saved_folder_loads_with_transformers_alone(model, processor, encoded, folder):
    plain = AutoModelForImageTextToText.from_pretrained(str(folder)).eval()
    expected = logits(model, encoded, processor)
    assert torch.equal(logits(plain, encoded, processor), expected)
    loaded = loading.load_model(folder)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), plain.parameters(), strict=True))
    ours = logits(loaded, encoded, processor)  # patches by matrix product: other rounding
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    text = "There is a zebra <|im_end|>\n— 12 m ahead."
    assert AutoTokenizer.from_pretrained(str(folder))(text) == processor.tokenizer(text)
    assert Processor.load(folder, data()).identity() == processor.identity()
    check_compatible(plain, processor)


def test_saving_copies_no_weights_of_a_processor_that_is_a_checkpoint(model, folder, tmp_path):
    (folder / "model-00009-of-00009.safetensors").write_bytes(b"stale")
    loading.save_model(model, folder, tmp_path / "second")
    assert loading.load_model(tmp_path / "second")
    assert not (tmp_path / "second" / "model-00009-of-00009.safetensors").exists()


def test_sizes_that_do_not_fit_are_reported_together(processor):
    text = {"num_attention_heads": 3, "num_key_value_heads": 2, "head_dim": 15}
    vision = {"num_heads": 3, "deepstack_visual_indexes": (0, 5), "patch_size": 14}
    with pytest.raises(ConfigError) as error:
        random_models.build(config(text, vision), processor, seed=0)
    for part in (
        "num_attention_heads 3 is not a multiple of text.num_key_value_heads 2",
        "head_dim 15 must be even",
        "hidden_size 32 is not a multiple of 4 x vision.num_heads 3",
        "deepstack_visual_indexes [0, 5] must lie in [0, vision.depth 2)",
        f"vision.patch_size 14 differs from {processor.origin}: 16",
    ):
        assert part in str(error.value)


def test_missing_and_broken_checkpoints_are_refused(folder, tmp_path):
    with pytest.raises(UserError, match=r"nowhere: there is no model \(no config\.json\)"):
        loading.load_model(tmp_path / "nowhere")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cannot read this model"):
        loading.load_model(folder)
    weights.write_bytes(whole)
    tensors = load_file(weights)
    del tensors["model.language_model.norm.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"missing_keys: \['model\.language_model\.norm\.weight'\]"):
        loading.load_model(folder)


def test_weights_hash_sees_one_flipped_bit(folder):
    before = weights_hash(folder)
    assert weights_hash(folder) == before
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    assert weights_hash(folder) != before
    with pytest.raises(UserError, match="no weights"):
        weights_hash(folder.parent)


def test_weights_are_read_once_as_long_as_the_files_stay(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    read = []
    theirs = Path.open
    monkeypatch.setattr(
        Path, "open", lambda self, *rest, **more: (read.append(self.name), theirs(self, *rest, **more))[1]
    )
    young = weights_hash(folder)
    assert weights_hash(folder) == young and read.count("model.safetensors") == 2  # could still change unseen
    monkeypatch.setattr(files, "YOUNG_S", 0.0)
    assert weights_hash(folder) == young
    read.clear()
    assert weights_hash(folder) == young and "model.safetensors" not in read
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    assert weights_hash(folder) != young
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")  # no place to remember it
    assert weights_hash(folder) == weights_hash(folder)


def test_foreign_model_is_refused_with_every_difference(processor):
    with pytest.raises(UserError) as error:
        check_compatible(tiny.dense_model(), processor)
    for part in (
        f"image_token_id: model 110, processor {processor.image_token_id}",
        "patch_size: model 4, processor 16",
        f"vocabulary: model 120 rows, processor {processor.vocab_size} tokens",
    ):
        assert part in str(error.value)


def test_active_parameters_leave_out_idle_experts(model):
    """Independent reference: the sizes multiplied out by hand."""
    unique = {p.data_ptr(): p.numel() for p in model.parameters()}
    assert loading.parameter_counts(model) == (sum(unique.values()),) * 2
    moe = tiny.moe_model()
    total = sum(p.numel() for p in moe.parameters())
    one_expert = 3 * 32 * 48
    assert loading.parameter_counts(moe) == (
        total,
        total - 2 * (4 - 2) * one_expert,
    )  # 2 MoE layers, top 2 of 4
