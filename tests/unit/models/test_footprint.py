"""The formulae of planned bytes against brute force; tests/ranks/test_memory.py measures real engines."""

import pytest
import torch

from pipeline.cluster.plan import shapes
from pipeline.models import upcycling
from pipeline.models.cost import footprint
from pipeline.models.cost.activations import Load, Settings, activations
from pipeline.models.cost.footprint import Spread, Weight
from pipeline.models.families import DENSE_FAMILIES, auto_class
from pipeline.recipe import UpcycleConfig
from tests.helpers import families, memory_run, tiny


@pytest.mark.parametrize("family", DENSE_FAMILIES, ids="-".join)
def test_activations_of_every_family(family: tuple[str, str]) -> None:
    """Against what autograd saves in plain transformers, logits of all positions and no loss."""
    settings = UpcycleConfig(source="x", experts=4, top_k=2, every=2)
    config = upcycling.moe_config(upcycling.plan(families.dense_config(family), settings, "x"))
    model = auto_class(config).from_config(config, attn_implementation="eager").train()
    inputs, held = families.inputs(config), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: held.append(tensor) or tensor, lambda tensor: tensor):
        model(**inputs, use_cache=False)
    saved = memory_run.without(memory_run.storages(held), memory_run.storages(model.parameters()))
    text, vision = shapes(config)
    pixels = inputs.get("pixel_values", torch.empty(0))
    # Images are patches already, or tiles of 4 x 4 of them and a class token.
    tiles = len(inputs["image_grid_thw"]) if pixels.ndim == 2 else pixels.shape[:-3].numel() if len(pixels) else 0
    patches = len(pixels) if pixels.ndim == 2 else 17 * tiles
    load = Load(*inputs["input_ids"].shape, patches=patches, images=tiles, answers=0)
    kept = activations(text, vision, load, Settings(bytes=4, eager_attention=True))
    head_gradient = 4 * text.vocabulary * text.width  # of the fused loss, which does not run here
    assert kept.saved - head_gradient == pytest.approx(sum(saved.values()), rel=0.05)


WEIGHTS = [
    Weight(1000, expert=False, trains=False),
    Weight(70, expert=False, trains=True),
    Weight(33, expert=True, trains=True),
    Weight(501, expert=False, trains=True),
    Weight(9, expert=True, trains=True),
    Weight(200, expert=False, trains=True),
]


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_gradients_of_partitions_cover_all_parameters_that_touch_them(ranks: int) -> None:
    """Brute force: every element knows its parameter and its rank."""
    spread = Spread(ranks, stage=2, bucket=0)
    wanted = 0
    for expert in (False, True):
        sizes = [w.numel for w in WEIGHTS if w.trains and w.expert is expert]
        owner = [i for i, size in enumerate(sizes) for _ in range(size)]
        part = -(-len(owner) // (2 * ranks)) * 2
        touched = [{*owner[r * part : (r + 1) * part]} for r in range(ranks)]
        wanted += max(sum(sizes[i] for i in indices) for indices in touched)
    assert footprint.state(WEIGHTS, spread).gradients == 4 * wanted


def test_partitions_shrink_with_the_ranks_that_hold_a_parameter() -> None:
    one, eight = (footprint.state(WEIGHTS, Spread(ranks, stage=3, persistent=0)) for ranks in (1, 8))
    assert one.weights == 4 * 1813 and one.optimizer == 12 * 813
    assert 1813 / 8 <= eight.weights / 4 < 1813 / 8 + len(WEIGHTS)
    experts = footprint.state(WEIGHTS, Spread(8, stage=3, persistent=0, expert_parallel=8))
    assert experts.weights - eight.weights == 4 * (33 + 9 - 5 - 2)  # local experts have no other rank to share with


def test_experts_are_counted_as_the_engine_holds_them() -> None:
    model = tiny.moe_model()
    total = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    apart = footprint.local_weights(model.named_parameters(), Spread(2, expert_parallel=2, experts_apart=True))
    assert sum(w.numel for w in apart) == total - experts // 2
    assert sum(w.expert for w in apart) == 6  # gate, up and down of two layers
    whole = footprint.local_weights(model.named_parameters(), Spread(2))
    assert sum(w.numel for w in whole) == total and not any(w.expert for w in whole)
