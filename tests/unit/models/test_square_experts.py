"""Qwen3-VL-MoE checkpoints whose packed experts are square: transformers cannot tell their layout by shape."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

from pipeline.errors import UserError
from pipeline.models.hf_folder import DiskLayout, ShardWriter, save_config
from pipeline.models.loading import load_model
from tests.helpers import tiny

WIDTHS = (32, 16, 48)
"""Of experts, for a hidden size of 32: `down_proj` square, `gate_up_proj` square, neither."""


def model_of(width: int) -> Qwen3VLMoeForConditionalGeneration:
    torch.manual_seed(0)
    text = tiny.TEXT | tiny.EXPERTS | {"moe_intermediate_size": width}
    config = Qwen3VLMoeConfig(text_config=text, vision_config=tiny.VISION, tie_word_embeddings=True, **tiny.TOKENS)
    model = Qwen3VLMoeForConditionalGeneration(config).eval()
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    inputs, _ = tiny.global_batch()
    return model(**inputs).logits


def publish(folder: Path) -> None:
    """The published layout: the input dimension of all packed experts first, square or not."""
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    experts = [name for name in tensors if ".experts." in name]
    assert experts
    tensors |= {name: tensors[name].transpose(1, 2).contiguous() for name in experts}
    save_file(tensors, file, metadata={"format": "pt"})


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("width", WIDTHS)
def test_either_layout_is_read_right(tmp_path: Path, width: int) -> None:
    model = model_of(width)
    wanted = logits(model)
    model.save_pretrained(tmp_path)
    close(logits(load_model(tmp_path)), wanted)
    publish(tmp_path)
    close(logits(load_model(tmp_path)), wanted)
    by_shape_alone = logits(AutoModelForImageTextToText.from_pretrained(tmp_path).eval())
    assert ((by_shape_alone - wanted).abs().max() > 0.01) == (width != 48)


@pytest.mark.parametrize("width", WIDTHS)
def test_an_export_is_read_right_by_transformers_and_here(tmp_path: Path, width: int) -> None:
    model = model_of(width)
    save_config(model.config, tmp_path)
    writer, layout = ShardWriter(tmp_path), DiskLayout(model.config)
    for name, parameter in model.named_parameters():
        for disk_name, stored in layout(name, parameter.data):
            writer.add(disk_name, stored)
    writer.finish()
    close(logits(AutoModelForImageTextToText.from_pretrained(tmp_path).eval()), logits(model))
    close(logits(load_model(tmp_path)), logits(model))


def test_a_layout_that_nothing_tells_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model_of(32).save_pretrained(tmp_path)
    monkeypatch.setattr("pipeline.models.hf_folder.TensorFiles.shape", lambda self, name: (4, 7, 9))
    with pytest.raises(UserError, match=r"experts\.down_proj has square matrices, and no other tensor"):
        load_model(tmp_path)
