"""Every family: a tiny dense checkpoint, upcycled, computes the dense function in plain transformers, and trains."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import (
    PreTrainedModel,
    Qwen3Config,
)

from pipeline.errors import ConfigError, UserError
from pipeline.export import stage as export
from pipeline.models import loading, moe, router
from pipeline.models.compatibility import check_compatible
from pipeline.models.families import DENSE_FAMILIES, auto_class, load_config, moe_family, without_weights
from pipeline.models.hf_folder import DiskLayout
from pipeline.models.student import upcycle
from pipeline.recipe import UpcycleConfig
from pipeline.training import checkpoint
from tests.helpers import single_rank, tiny
from tests.helpers.families import TEXT, dense_config, inputs

MOE_TYPES = {"qwen3_vl": "qwen3_vl_moe", "qwen3": "qwen3_moe", "qwen2": "qwen2_moe"}


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(**inputs(model.config)).logits


def make_dense(family: tuple[str, str], folder: Path) -> PreTrainedModel:
    """A tiny checkpoint whose MLPs matter to the logits."""
    torch.manual_seed(3)
    config = dense_config(family)
    model = auto_class(config).from_config(config).eval()
    for name, parameter in model.named_parameters():
        if "layers." in name and "_proj.weight" in name:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder)
    return model


def plain(folder: Path) -> PreTrainedModel:
    """As any user of transformers loads it; refuses missing or surplus tensors."""
    model, info = auto_class(load_config(folder)).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def settings(**changes: object) -> UpcycleConfig:
    return UpcycleConfig.model_validate({"source": "-", "expert_noise": 0.0, "experts": 4, "top_k": 2} | changes)


FAMILY_IDS = ["-".join(dict.fromkeys(family)) for family in DENSE_FAMILIES]


@pytest.fixture(scope="module", params=list(DENSE_FAMILIES), ids=FAMILY_IDS)
def dense(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[tuple[str, str], Path]:
    folder = tmp_path_factory.mktemp("dense") / "model"
    make_dense(request.param, folder)
    return request.param, folder


Dense = tuple[tuple[str, str], Path]


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"expert_width": 1 / 2, "layers": [0, 3]}], ids=["whole", "fine-grained"])
def test_exact_copies_compute_the_dense_function(dense: Dense, tmp_path: Path, changes: dict[str, object]) -> None:
    (model_type, _), folder = dense
    report = upcycle(folder, tmp_path / "moe", settings(**changes), seed=0)
    model, old = plain(tmp_path / "moe"), plain(folder)
    assert model.config.model_type == MOE_TYPES.get(model_type, model_type)
    assert model.config.model_type == report.model_type
    blocks = [name for name, m in model.named_modules() if type(m).__name__.endswith("SparseMoeBlock")]
    assert [int(name.split("layers.")[1].split(".")[0]) for name in blocks] == report.moe_layers
    torch.testing.assert_close(logits(model), logits(old), rtol=0, atol=2e-5)
    assert report.logit_change is not None
    assert report.logit_change.max < 2e-5
    assert max(report.layer_change) < 1e-6
    assert (report.total_parameters, report.active_parameters) == loading.parameter_counts(model)


@pytest.mark.slow
def test_tensors_on_disk_are_those_that_transformers_writes(dense: Dense, tmp_path: Path) -> None:
    """Names and shapes, but for Qwen3-VL-MoE's packed experts, which are published input-first."""
    _, folder = dense
    upcycle(folder, tmp_path / "moe", settings(), seed=0)
    model = plain(tmp_path / "moe")
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = on_disk(tmp_path / "moe"), on_disk(tmp_path / "theirs")
    if moe_family(model.config).on_disk == "packed":
        theirs = {
            n: (s[0], s[2], s[1]) if n.endswith(("_up_proj", ".down_proj")) and len(s) == 3 else s
            for n, s in theirs.items()
        }
    assert ours == theirs
    # and from the loaded model, as export does it
    layout = DiskLayout(model.config)
    exported = {n: tuple(t.shape) for name, p in model.named_parameters() for n, t in layout(name, p.detach())}
    assert exported == ours


def on_disk(folder: Path) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return shapes


@pytest.mark.slow
def test_configuration_says_the_number_of_experts_in_both_words(dense: Dense, tmp_path: Path) -> None:
    """transformers 5 writes `num_local_experts`; serving engines and older releases read `num_experts`."""
    upcycle(dense[1], tmp_path / "moe", settings(), seed=0)
    content = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert content.get("text_config", content)["num_experts"] == 4
    assert content["architectures"] == [type(plain(tmp_path / "moe")).__name__]


@pytest.mark.slow
def test_deepspeed_trains_it_as_one_torch_process_does(dense: Dense, tmp_path: Path) -> None:
    """AutoEP's layers against Hugging Face's own: loss, weights after two steps of SGD, router logits."""
    _, folder = dense
    upcycle(folder, tmp_path / "moe", settings(expert_noise=0.3, router_noise=0.3), seed=0)
    model, twin = plain(tmp_path / "moe"), plain(tmp_path / "moe")
    batch = inputs(model.config)
    with router.RouterProbe(twin) as probe:
        logits(twin)
        routers = probe.take()
    engine = single_rank.engine(model, kind="sgd", lr=0.5, weight_decay=0.0, grad_clip=0.05)
    assert moe.expect_converted(engine, twin.config) == len(routers) == 2
    with torch.no_grad(), router.RouterProbe(engine.module) as probe:
        torch.testing.assert_close(engine(**batch).logits, logits(twin), rtol=0, atol=2e-6)
        for ours, theirs in zip(probe.take(), routers, strict=True):
            torch.testing.assert_close(ours, theirs.detach(), rtol=0, atol=5e-6)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.5)
    for _ in range(2):
        loss = tiny.loss_sum(engine(**batch).logits, batch["input_ids"]) / batch["input_ids"].numel()
        engine.backward(loss)
        engine.step()
        reference = tiny.loss_sum(twin(**batch).logits, batch["input_ids"]) / batch["input_ids"].numel()
        optimizer.zero_grad()
        reference.backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.05)
        optimizer.step()
        assert loss.item() == pytest.approx(reference.item(), abs=2e-6)
    template = export.template_files(tmp_path / "moe")
    saved = checkpoint.save(engine, tmp_path / "checkpoints", 2, {}, {}, 1, template)
    export.write_hf(saved, tmp_path / "exported")
    trained, wanted = dict(plain(tmp_path / "exported").named_parameters()), dict(twin.named_parameters())
    assert trained.keys() == wanted.keys()
    for name, parameter in wanted.items():
        torch.testing.assert_close(trained[name], parameter.detach(), rtol=0, atol=2e-6, msg=name)


@pytest.mark.slow
def test_shared_expert_takes_its_share(tmp_path: Path) -> None:
    dense = make_dense(("qwen2", "qwen2"), tmp_path / "dense")
    for share, width in ((None, 48), (1 / 3, 32)):
        out = tmp_path / str(share)
        upcycle(
            tmp_path / "dense", out, settings(shared_expert=share, expert_width=1.0 if share is None else 0.5), seed=0
        )
        model = plain(out)
        assert model.config.shared_expert_intermediate_size == width
        assert model.config.moe_intermediate_size == (48 if share is None else 32)
        torch.testing.assert_close(logits(model), logits(dense), rtol=0, atol=2e-5)
    with pytest.raises(
        ConfigError, match=r"shared_expert 1.0 of intermediate_size 96 is 96: not a whole number below 96"
    ):
        upcycle(tmp_path / "dense", tmp_path / "no", settings(shared_expert=1.0), seed=0)


def test_a_model_that_is_moe_already_is_loaded_as_it_is(tmp_path: Path) -> None:
    tiny.moe_model().save_pretrained(tmp_path / "moe")
    model = loading.load_model(tmp_path / "moe")
    assert len(router.RouterProbe(model)) == 2
    assert moe.expect_converted(single_rank.engine(model), model.config) == 2


def test_other_experts_are_refused() -> None:
    config = Qwen3Config(**TEXT, num_experts=4)
    config.model_type = "mixtral_of_mine"
    with pytest.raises(
        ConfigError, match=r"'mixtral_of_mine' .* known: \['qwen2_moe', 'qwen3_moe', 'qwen3_vl_moe_text'\]"
    ):
        moe_family(config)


def test_meta_model_has_the_names_and_no_memory() -> None:
    model = without_weights(tiny.moe_model().config)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in tiny.moe_model().named_parameters()]


def test_stages_that_read_images_refuse_other_families(tmp_path: Path) -> None:
    make_dense(("internvl", "qwen3"), tmp_path / "dense")
    with pytest.raises(UserError, match="type 'internvl'"):
        check_compatible(loading.load_model(tmp_path / "dense"), None)  # type: ignore[arg-type]
