"""Both MoE layers on four ranks against one plain torch process on Hugging Face's own layers.

One launch runs everything: SGD (Adam would hide wrong gradient scales), clipping active, router losses on, four ranks
with different numbers of tokens, one of them without a single label, and one expert that no token chooses.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline.benchmark.random_models import build
from pipeline.data.processor import Processor
from pipeline.evaluation.generate import answers, open_model
from pipeline.models.loading import save_model
from pipeline.models.student import upcycle
from pipeline.recipe import RandomModelConfig, TextSize, UpcycleConfig, VisionSize
from tests.helpers import moe_worker, ranks, tiny_data, uneven

STEPS, EMPTY, SAMPLES = 5, (3, 7), 7
"""Rank 3 has samples 3 and 7. Seven questions: the shares of four ranks differ."""
COMMON: dict[str, Any] = {"steps": STEPS, "empty": EMPTY, "starved": True}
ROOMY = {"drop_tokens": True, "capacity_factor": 4.0}
RUNS: dict[str, dict[str, Any]] = {
    "autoep-ep1-zero1": {"layer": "autoep", "ep": 1, "stage": 1},
    "autoep-ep2-zero3": {"layer": "autoep", "ep": 2, "stage": 3},
    "autoep-ep4-zero2": {"layer": "autoep", "ep": 4, "stage": 2},
    "autoep-ep4-zero0": {"layer": "autoep", "ep": 4, "stage": 0},
    "autoep-ep2-zero0-accumulated": {"layer": "autoep", "ep": 2, "stage": 0, "parts": 2, "checkpointing": True},
    "native-ep1-zero0": {"layer": "native", "ep": 1, "stage": 0},
    "native-ep2-zero2": {"layer": "native", "ep": 2, "stage": 2},
    "native-ep4-zero0": {"layer": "native", "ep": 4, "stage": 0},
    "native-ep4-zero1-capacity": {"layer": "native", "ep": 4, "stage": 1, "native": ROOMY},
    "native-ep4-zero1-accumulated": {"layer": "native", "ep": 4, "stage": 1, "parts": 2, "checkpointing": True},
}
SHARED = {
    "autoep": {"layer": "autoep", "ep": 4, "stage": 1},
    "autoep-zero3": {"layer": "autoep", "ep": 2, "stage": 3},
    "native": {"layer": "native", "ep": 4, "stage": 1},
}
"""Engines that generate."""


@dataclass
class Launched:
    """What the four ranks recorded."""

    out: Path
    result: dict[str, Any]
    folder: Path

    def records(self, name: str) -> list[uneven.Record]:
        return [uneven.Record(**record) for record in self.result["runs"][name]]

    def parameters(self, name: str) -> dict[str, Tensor]:
        return load_file(f"{self.out}.{name}.safetensors")


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    folder = tmp_path_factory.mktemp("ranks")
    prepare_answers(folder)
    saved = str(folder / "saved")
    adam = {"steps": 4, "optimizer": "adamw", "lr": 0.01}
    others = {
        "deepspeeds-own-clipping": COMMON | {"layer": "autoep", "ep": 4, "stage": 0, "deepspeeds_clipping": True},
        "dropping": COMMON | {"layer": "native", "ep": 4, "stage": 1, "native": {"drop_tokens": True}},
        "before": adam | {"layer": "autoep", "ep": 2, "stage": 2, "save": saved, "save_at": 2},
        "after": adam | {"layer": "native", "ep": 4, "stage": 1, "load": saved},
    }
    spec = {
        "runs": {name: COMMON | run for name, run in RUNS.items()} | others,
        "generate": SHARED,
        "answers": {"native": SHARED["native"] | {"folder": str(folder), "samples": SAMPLES}},
    }
    out = folder / "result.json"
    ranks.run(moe_worker.main, spec | {"out": str(out)}, ranks=4)
    return Launched(out, json.loads(out.read_text()), folder)


def prepare_answers(folder: Path) -> None:
    """A processor and an upcycled model that says something else for every question."""
    processor = tiny_data.make_processor(folder / "processor")
    text = TextSize(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    vision = VisionSize(hidden_size=32, intermediate_size=48, depth=2, num_heads=2, patch_size=16)
    model = build(RandomModelConfig(text=text, vision=vision), processor, 0)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "embed" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    save_model(model, processor, folder / "dense")
    config = UpcycleConfig(source="models.dense", router_noise=1.0, expert_noise=0.5)
    upcycle(folder / "dense", folder / "moe", config, seed=0)


@pytest.fixture(scope="module")
def references() -> dict[int, tuple[list[uneven.Record], dict[str, Tensor]]]:
    """(records, final parameters) of one process, by number of micro-steps."""
    found = {}
    for parts in (1, 2):
        model = uneven.model(starved=True).train()
        records = uneven.reference(model, STEPS, empty=EMPTY, parts=parts)
        found[parts] = (records, {name: p.detach() for name, p in model.named_parameters()})
    return found


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in other)


@pytest.mark.parametrize("name", RUNS)
def test_losses_and_weights_equal_one_process(name: str, launched: Launched, references: Any) -> None:
    wanted, weights = references[RUNS[name].get("parts", 1)]
    for ours, theirs in zip(launched.records(name), wanted, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, abs=2e-6)
        assert ours.aux == pytest.approx(theirs.aux, abs=1e-6)
        assert ours.balance_L == pytest.approx(theirs.balance_L, abs=1e-5)
        assert ours.z_L == pytest.approx(theirs.z_L, rel=1e-5)
        assert ours.load_LE == theirs.load_LE
        assert ours.norm == pytest.approx(theirs.norm, rel=1e-5)
    assert largest_difference(launched.parameters(name), weights) < 5e-7


def test_the_comparison_is_hard(references: Any) -> None:
    """Clipping acts, experts move, and the last expert gets nothing in any step."""
    before = dict(uneven.model(starved=True).named_parameters())
    for records, weights in references.values():
        assert min(record.norm for record in records) > 10 * uneven.CLIP
        assert all(load_E[3] == 0 and min(load_E[:3]) > 0 for record in records for load_E in record.load_LE)
        moved = {n: float((weights[n] - before[n].detach()).abs().amax()) for n in weights}
        assert min(moved[n] for n in moved if ".experts." in n or "mlp.gate" in n) > 1e-4


def test_deepspeeds_own_clipping_is_wrong(launched: Launched, references: Any) -> None:
    """DeepSpeed#8475 in 0.19.8: ZeRO-0 averages the norms of different experts. When this fails, drop our fix."""
    _, weights = references[1]
    wrong = largest_difference(launched.parameters("deepspeeds-own-clipping"), weights)
    right = largest_difference(launched.parameters("autoep-ep4-zero0"), weights)
    assert wrong > 1000 * right


def test_ranks_with_different_tokens_may_drop(launched: Launched, references: Any) -> None:
    """DeepSpeed's own gate aborts here. What is dropped changes the result, so that it is not the reference's."""
    losses = [record.loss for record in launched.records("dropping")]
    wanted = [record.loss for record in references[1][0]]
    assert losses == pytest.approx(wanted, abs=0.2)
    assert all(abs(ours - theirs) > 1e-4 for ours, theirs in zip(losses, wanted, strict=True))


def test_another_layer_goes_on_from_a_checkpoint(launched: Launched) -> None:
    """AutoEP with EP 2 under ZeRO-2, then DeepSpeed's layer with EP 4 under ZeRO-1: AdamW's moments are kept."""
    whole, resumed = launched.records("before"), launched.records("after")
    for ours, theirs in zip(resumed, whole[2:], strict=True):
        assert ours.loss == pytest.approx(theirs.loss, abs=2e-6)
        assert ours.norm == pytest.approx(theirs.norm, rel=1e-5)
    assert largest_difference(launched.parameters("after"), launched.parameters("before")) < 2e-5


@pytest.mark.parametrize("name", SHARED)
def test_generation_equals_one_process_whatever_the_lengths(name: str, launched: Launched) -> None:
    """Our loop and transformers' generate(synced_gpus=True), against transformers' on one process."""
    plain = uneven.model()
    wanted = [uneven.hugging_face(plain, uneven.prompt(rank)) for rank in range(4)]
    assert len({len(continuation) for continuation in wanted}) > 2  # ranks are done after different numbers of steps
    assert launched.result["generated"][name] == {"ours": wanted, "theirs": wanted}


def test_answers_are_shared_out_and_equal_one_process(launched: Launched) -> None:
    processor = Processor.load(launched.folder / "processor", tiny_data.data())
    model = open_model(launched.folder / "moe", processor, torch.device("cpu"))
    samples = uneven.questions(launched.folder / "corpus.png", SAMPLES)
    wanted = answers(model, processor, samples, batch_size=2, max_new_tokens=uneven.NEW_TOKENS)
    assert launched.result["answers"]["native"] == wanted
    assert len(set(wanted.values())) > SAMPLES // 2
