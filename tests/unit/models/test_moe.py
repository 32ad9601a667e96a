"""DeepSpeed configurations, router probe, and expert parallelism against one plain torch process."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import ConfigError
from pipeline.models import deepspeed_config, loading, moe, router, topology
from pipeline.models.families import moe_layers
from tests.helpers import single_rank, tiny
from tests.helpers.paths import ROOT

DS_CONFIGS = sorted((ROOT / "ds_configs").glob("*.json"))
EP2: dict[str, Any] = {
    "zero_optimization": {"stage": 1},
    "expert_parallel": {"enabled": True, "autoep_size": 2},
}


def prepare(raw: dict[str, Any], ranks: int = 2, model: Any = None, **job: object) -> dict[str, Any]:
    config = (model or tiny.moe_model()).config
    return deepspeed_config.complete(raw, tiny.job(**job), config, ranks)


@pytest.mark.parametrize("path", DS_CONFIGS, ids=lambda path: path.stem)
def test_shipped_configurations_complete(path: Path) -> None:
    config = prepare(json.loads(path.read_text()), ranks=2, micro_size=1)
    assert config["train_batch_size"] == 4
    assert config["train_micro_batch_size_per_gpu"] == 1
    assert config["gradient_accumulation_steps"] == 2
    assert config["gradient_clipping"] == 0.05
    assert config["optimizer"]["params"]["torch_adam"] is True
    assert topology.expert_parallel_size(config) == (1 if path.stem in ("dense", "one_rank") else 2)


def test_no_clipping_is_said_explicitly() -> None:
    assert prepare(EP2, grad_clip=0.0)["gradient_clipping"] == 0.0  # DeepSpeed's default would be 1.0


def test_raw_configuration_is_not_modified() -> None:
    raw = json.loads(json.dumps(EP2))
    prepare(raw)
    assert raw == EP2


def test_dense_model_drops_expert_parallelism() -> None:
    assert "expert_parallel" not in prepare(EP2, model=tiny.dense_model())


@pytest.mark.parametrize(
    ("raw", "ranks", "job", "words"),
    [
        (EP2 | {"train_batch_size": 8}, 2, {}, ["train_batch_size", "8", "4"]),
        (EP2 | {"gradient_clipping": 1.0}, 2, {}, ["gradient_clipping", "1.0", "0.05"]),
        (EP2 | {"optimizer": {"type": "Adam"}}, 2, {}, ["optimizer"]),
        (EP2 | {"scheduler": {"type": "WarmupLR"}}, 2, {}, ["scheduler"]),
        (EP2 | {"fp16": {"enabled": True}}, 2, {}, ["fp16", "bf16"]),
        (EP2 | {"elasticity": {"enabled": True}}, 2, {}, ["remove `elasticity`"]),
        (EP2, 3, {"global_size": 6}, ["autoep_size 2", "3 ranks"]),
        (EP2, 2, {"global_size": 6}, ["batch.global_size 6", "= 4"]),
        (EP2 | {"zero_optimization": {"stage": 0}, "bf16": {"enabled": True}}, 2, {}, ["stage 0", "bf16", "stage 1"]),
    ],
)
def test_refusals_name_both_values(raw: dict[str, Any], ranks: int, job: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        prepare(raw, ranks, **job)
    assert all(word in str(error.value) for word in words), error.value


def test_experts_must_divide() -> None:
    raw = EP2 | {"expert_parallel": {"enabled": True, "autoep_size": 3}}
    with pytest.raises(ConfigError, match=r"autoep_size 3 does not divide the 4 experts"):
        prepare(raw, ranks=3, global_size=6)


def test_moe_layers() -> None:
    assert moe_layers(tiny.moe_model().config) == [1, 3]
    assert moe_layers(tiny.dense_model().config) == []


def test_probe_equals_hugging_face_router_logits() -> None:
    model = tiny.moe_model()
    inputs, _ = tiny.global_batch()
    with router.RouterProbe(model) as probe:
        output = model(**inputs, output_router_logits=True)
        taken = probe.take()
    assert len(taken) == 2
    for ours, theirs in zip(taken, output.router_logits, strict=True):
        assert ours.requires_grad
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_probe_under_activation_checkpointing() -> None:
    """Recomputation neither doubles the list nor loses the gradient of a loss on the logits."""
    inputs, labels = tiny.global_batch()
    gradients = []
    for checkpointing in (False, True):
        model = tiny.moe_model().train()
        if checkpointing:
            loading.enable_activation_checkpointing(model)
        probe = router.RouterProbe(model)
        loss = tiny.loss_sum(model(**inputs).logits, labels)
        taken = probe.take()
        (loss + sum(x.logsumexp(-1).square().sum() for x in taken)).backward()
        assert len(taken) == 2
        with pytest.raises(router.RouterError, match="before take"):
            probe.take()
        gradients.append([p.grad.clone() for n, p in model.named_parameters() if n.endswith("gate.weight")])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-5, atol=1e-5)


def test_probe_refuses_reentrant_checkpointing() -> None:
    model = tiny.moe_model().train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    router.RouterProbe(model)
    with pytest.raises(router.RouterError, match="reentrant"):
        model(**tiny.global_batch()[0])


def test_expert_counts_by_hand() -> None:
    logits_TE = torch.tensor([[3.0, 2.0, 1.0], [0.0, 5.0, 6.0], [9.0, 0.0, 8.0]])
    assert router.expert_counts(logits_TE, 2).tolist() == [2, 2, 2]
    assert router.expert_counts(logits_TE, 2, torch.tensor([True, False, True])).tolist() == [2, 1, 1]
    assert router.expert_counts(logits_TE, 1, torch.tensor([False] * 3)).tolist() == [0, 0, 0]


def test_deepspeed_layer_equals_hugging_face() -> None:
    """Same logits and same router logits after DeepSpeed replaced the MoE layers."""
    inputs, _ = tiny.global_batch()
    plain = tiny.moe_model()
    with torch.no_grad(), router.RouterProbe(plain) as probe:
        logits, routers = plain(**inputs).logits, probe.take()
    engine = single_rank.engine(tiny.moe_model())
    assert moe.expect_converted(engine, plain.config) == 2
    with torch.no_grad(), router.RouterProbe(engine.module) as probe:
        torch.testing.assert_close(engine(**inputs).logits, logits, rtol=0, atol=1e-6)
        for ours, theirs in zip(probe.take(), routers, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_unconverted_layers_are_noticed() -> None:
    engine = single_rank.engine(tiny.moe_model(), experts=False)
    engine.config = {"expert_parallel": {"enabled": True}}
    with pytest.raises(ConfigError, match="converted 0 layer"):
        moe.expect_converted(engine, engine.module.config)
