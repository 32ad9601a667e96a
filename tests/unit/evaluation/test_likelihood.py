"""Cross-entropy of gold answers against transformers' own loss, sample by sample."""

import pytest
import torch

from pipeline.benchmark.random_models import build
from pipeline.data.collate import collate
from pipeline.evaluation.likelihood import gold_cross_entropy
from pipeline.recipe import RandomModelConfig, TextSize, VisionSize
from tests.helpers.tiny_data import corpus, make_processor, save_image

TEXT = TextSize(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, head_dim=8)  # fmt: skip
VISION = VisionSize(hidden_size=32, intermediate_size=48, depth=1, num_heads=2)


@pytest.mark.parametrize("blind", [False, True])
def test_padded_batches_give_what_transformers_gives_for_each_sample_alone(tmp_path, blind):
    processor = make_processor(tmp_path / "processor")
    samples = corpus(save_image(tmp_path / "a.png", 64, 64))[:7]
    model = build(RandomModelConfig(text=TEXT, vision=VISION), processor, 0).eval()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "embed" not in name:
            torch.nn.init.normal_(parameter, std=0.3)  # answers differ in how likely they are
    done = []
    found = gold_cross_entropy(model, processor, samples, batch_size=3, blind=blind, on_progress=done.append)
    assert done == [3, 3, 1]
    for sample in samples:
        alone = dict(collate([processor.encode(sample, blind=blind)], processor.pad_id, processor.image_token_id))
        with torch.no_grad():
            mean = float(model(**alone).loss)
        nats, tokens = found[sample.sample_id]
        assert tokens == int((alone["labels"] != -100).sum())
        assert nats / tokens == pytest.approx(mean, rel=1e-4)
    assert len({round(nats, 3) for nats, _ in found.values()}) == len(samples)
