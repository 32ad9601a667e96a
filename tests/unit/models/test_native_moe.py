"""DeepSpeed's own MoE layer in one process: the same function as Hugging Face's blocks, and what dropping does."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import Qwen2MoeConfig
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

from pipeline.errors import CheckpointError, ConfigError
from pipeline.method.fused_head import FusedHead
from pipeline.models import checkpoint_folder, deepspeed_config, router
from pipeline.models.native_moe import NativeMoe, PaddingMask
from pipeline.recipe import NativeMoeConfig, Recipe
from pipeline.training import checkpoint, step, step_metrics
from pipeline.training import job_settings as train
from tests.helpers import single_rank, tiny, uneven

ROOMY = {"drop_tokens": True, "capacity_factor": 4.0, "eval_capacity_factor": 4.0}
LAYERS: dict[str, dict[str, Any]] = {
    "autoep": {},
    "native": {"layer": "native"},
    "native, capacity for all": {"layer": "native", "native": ROOMY},
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("training", [True, False])
def test_forwards_agree_with_hugging_face(layer: str, training: bool) -> None:
    """Logits of real tokens and router logits; the second call gives the same bits as the first."""
    inputs, _ = tiny.global_batch()
    valid_BS = inputs["attention_mask"].bool()
    plain = tiny.moe_model().train(training)
    engine = single_rank.engine(tiny.moe_model(), **LAYERS[layer])
    engine.train(training)
    with torch.no_grad(), router.RouterProbe(plain) as theirs, router.RouterProbe(engine.module) as ours:
        wanted, found = plain(**inputs).logits, engine(**inputs).logits
        for mine, reference in zip(ours.take(), theirs.take(), strict=True):
            torch.testing.assert_close(mine[valid_BS.flatten()], reference[valid_BS.flatten()], rtol=0, atol=1e-6)
        torch.testing.assert_close(found[valid_BS], wanted[valid_BS], rtol=0, atol=1e-6)
        assert torch.equal(engine(**inputs).logits, found)


# --- one block ----------------------------------------------------------------------------------------------


class Host(torch.nn.Module):
    """Gives a layer its attention mask, as a model's forward does."""

    def __init__(self, block: torch.nn.Module, **settings: object) -> None:
        super().__init__()
        self.layer = NativeMoe(block, NativeMoeConfig.model_validate(settings), PaddingMask(self), ep_size=1, rank=0)

    def forward(self, hidden_BSD: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.layer(hidden_BSD)


def qwen2_block(top_k: int = 2, norm: bool = False) -> Qwen2MoeSparseMoeBlock:
    """A block with a gated shared expert."""
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        hidden_size=16, moe_intermediate_size=24, shared_expert_intermediate_size=20, num_experts=4,
        num_experts_per_tok=top_k, norm_topk_prob=norm,
    )  # fmt: skip
    block = Qwen2MoeSparseMoeBlock(config)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return block


def hidden(batch: int = 2, length: int = 16) -> Tensor:
    return torch.randn(batch, length, 16, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("norm", [True, False])
def test_every_k_and_a_shared_expert(top_k: int, norm: bool) -> None:
    block = qwen2_block(top_k, norm)
    found, wanted = Host(block)(hidden()), block(hidden())
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6)


def test_one_token_decodes_as_in_hugging_face() -> None:
    block = qwen2_block()
    host = Host(block, drop_tokens=True).eval()
    torch.testing.assert_close(host(hidden(1, 1)), block(hidden(1, 1)), rtol=0, atol=2e-6)


def kept_by_hand(block: Any, hidden_TD: Tensor, capacity: int) -> tuple[Tensor, int]:
    """(output [T, D] without the shared expert, dropped routes): every expert keeps its most probable routes."""
    probability_TE = (hidden_TD @ block.gate.weight.T).softmax(-1)
    routes: dict[int, list[tuple[float, int]]] = {expert: [] for expert in range(4)}
    for token, row in enumerate(probability_TE):
        for expert in row.topk(2).indices.tolist():
            routes[expert].append((row[expert].item(), token))
    kept = {expert: sorted(found, reverse=True)[:capacity] for expert, found in routes.items()}
    weights: dict[int, float] = dict.fromkeys(range(len(hidden_TD)), 0.0)
    for found in kept.values():
        for weight, token in found:
            weights[token] += weight
    output = torch.zeros_like(hidden_TD)
    for expert, found in kept.items():
        for weight, token in found:
            gate, up = (block.experts.gate_up_proj[expert] @ hidden_TD[token]).chunk(2)
            result = block.experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)
            output[token] += result * weight / weights[token]
    dropped = sum(len(routes[expert]) - len(kept[expert]) for expert in routes)
    return output, dropped


@pytest.mark.parametrize(("training", "capacity"), [(True, 8), (False, 16)])
def test_a_full_expert_drops_its_least_probable_tokens(training: bool, capacity: int) -> None:
    """32 tokens, 2 of 4 experts each: an even share of 16, times 0.5 in training and 1 in evaluation."""
    block = qwen2_block(norm=True)
    block.shared_expert.down_proj.weight.data.zero_()
    host = Host(block, drop_tokens=True, capacity_factor=0.5, eval_capacity_factor=1.0).train(training)
    with torch.no_grad():
        wanted, dropped = kept_by_hand(block, hidden().flatten(0, 1), capacity)
        torch.testing.assert_close(host(hidden()).flatten(0, 1), wanted, rtol=0, atol=1e-5)
    assert host.layer.router.dropped == dropped > 0


def test_random_token_selection_is_random_in_training_only() -> None:
    host = Host(qwen2_block(), drop_tokens=True, capacity_factor=0.5, eval_capacity_factor=0.5, use_rts=True)
    least = Host(qwen2_block(), drop_tokens=True, capacity_factor=0.5, eval_capacity_factor=0.5)
    outputs, dropped = [], []
    for _ in range(6):
        outputs.append(host(hidden()).detach())
        dropped.append(int(host.layer.router.dropped))
    assert any(not torch.equal(outputs[0], other) for other in outputs[1:])
    torch.testing.assert_close(torch.tensor(dropped).unique(), torch.tensor([dropped[0]]))  # as many, but others
    least(hidden())
    assert dropped[0] == least.layer.router.dropped
    assert torch.equal(host.eval()(hidden()), least.eval()(hidden()))


def test_padding_takes_no_capacity() -> None:
    """Ten more padded positions change nothing for the real tokens, dropped ones included."""
    host = Host(qwen2_block(), drop_tokens=True, capacity_factor=0.5)
    mask = torch.ones(2, 16, dtype=torch.int64)
    mask[1, 5:] = 0
    short = host(hidden(), attention_mask=mask)
    dropped = host.layer.router.dropped
    padded = torch.cat([hidden(), torch.ones(2, 10, 16)], dim=1)
    long = host(padded, attention_mask=torch.cat([mask, torch.zeros_like(mask[:, :10])], dim=1))[:, :16]
    torch.testing.assert_close(long[mask.bool()], short[mask.bool()], rtol=0, atol=1e-6)
    assert host.layer.router.dropped == dropped > 0


@pytest.mark.parametrize("drop", [True, False])
def test_a_batch_of_padding_alone(drop: bool) -> None:
    """The routed part is zero, and so are its gradients, not NaN."""
    block = qwen2_block()
    block.shared_expert.down_proj.weight.data.zero_()
    host = Host(block, drop_tokens=drop)
    output = host(hidden(), attention_mask=torch.zeros(2, 16, dtype=torch.int64))
    output.sum().backward()
    assert not output.any()
    assert all(not p.grad.any() for p in host.layer.moe.parameters() if p.grad is not None)


def test_residual_expert_starts_as_half_of_the_sum() -> None:
    """PR-MoE: softmax of a zero coefficient gives both branches one half; the MLP is the experts' mean."""
    block = qwen2_block()
    block.shared_expert.down_proj.weight.data.zero_()
    with torch.no_grad():
        gate, up = (hidden() @ block.experts.gate_up_proj.mean(0).T).chunk(2, dim=-1)
        mlp = (torch.nn.functional.silu(gate) * up) @ block.experts.down_proj.mean(0).T
        wanted = 0.5 * block(hidden()) + 0.5 * mlp
        torch.testing.assert_close(Host(block, use_residual=True)(hidden()), wanted, rtol=0, atol=2e-6)


# --- checkpoints --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("before", "after"), [("autoep", "native"), ("native", "autoep"), ("native", "native")])
@pytest.mark.parametrize("stages", [(1, 2), (2, 0)])
def test_either_layer_goes_on_from_the_others_checkpoint(
    tmp_path: Path, before: str, after: str, stages: tuple[int, int]
) -> None:
    """AdamW, moments included: resumed = uninterrupted, to rounding."""
    engine = single_rank.engine(tiny.moe_model(), stage=stages[0], **LAYERS[before])
    single_rank.train(engine, 0, 2)
    checkpoint.save(engine, tmp_path, 2, {}, {}, 1)
    wanted = single_rank.train(engine, 2, 4)
    other = single_rank.engine(tiny.moe_model(seed=9), stage=stages[1], **LAYERS[after])
    assert checkpoint.load(other, tmp_path) is not None
    assert single_rank.train(other, 2, 4) == pytest.approx(wanted, abs=2e-6)
    ours, theirs = single_rank.parameters(other), single_rank.parameters(engine)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=2e-5)


def test_stored_tensors_are_hugging_faces(tmp_path: Path) -> None:
    model = tiny.moe_model()
    wanted = {name: p.detach().clone() for name, p in model.named_parameters()}
    checkpoint.save(single_rank.engine(model, layer="native"), tmp_path, 0, {}, {}, 1)
    stored = dict(checkpoint_folder.read_parameters(tmp_path / "step-00000000"))
    assert stored.keys() == wanted.keys()
    assert all(torch.equal(stored[name], wanted[name]) for name in wanted)


def test_residual_checkpoints_resume_and_fit_nothing_else(tmp_path: Path) -> None:
    settings = {"layer": "native", "native": {"use_residual": True}}
    engine = single_rank.engine(tiny.moe_model(), **settings)
    before = single_rank.parameters(engine)
    single_rank.train(engine, 0, 2)
    checkpoint.save(engine, tmp_path, 2, {}, {}, 1)
    wanted = single_rank.train(engine, 2, 3)
    other = single_rank.engine(tiny.moe_model(seed=9), **settings)
    checkpoint.load(other, tmp_path)
    assert single_rank.train(other, 2, 3) == wanted
    moved = {name for name, tensor in single_rank.parameters(other).items() if not torch.equal(tensor, before[name])}
    assert {name for name in before if ".residual." in name} <= moved
    with pytest.raises(CheckpointError, match=r"residual\.coefficient\.bias: checkpoint \(2,\), model absent"):
        checkpoint.load(single_rank.engine(tiny.moe_model()), tmp_path)


def test_frozen_experts_stay_frozen() -> None:
    model = tiny.moe_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".experts.down_proj" not in name)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine = single_rank.engine(model, layer="native")
    single_rank.train(engine, 0, 1)
    after = single_rank.parameters(engine)
    assert all(torch.equal(after[n], before[n]) == (".experts.down_proj" in n) for n in before if ".experts." in n)


# --- losses and metrics -------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", LAYERS)
def test_one_collapsed_layer_is_seen(layer: str) -> None:
    """One layer sends every token to the same two of four experts: its balance is E / top_k = 2, the other's near 1."""
    model = uneven.model()
    with torch.no_grad():
        model.model.language_model.embed_tokens.weight[:, 0] = 5.0
        model.model.visual.merger.linear_fc2.bias[0] = 5.0
        for index, row in ((1, [0.0, 0.0, 0.0, 0.0]), (3, [20.0, 19.0, 0.0, 0.0])):
            model.model.language_model.layers[index].mlp.gate.weight[:, 0] = torch.tensor(row)
    engine = single_rank.engine(model, **uneven.ROUTER, **LAYERS[layer])
    probe = router.RouterProbe(engine.module)
    job = tiny.job(**uneven.ROUTER)
    context = step.StepContext(engine, FusedHead(engine.module), probe, 2, None, job, 1, 0, 1)
    inputs, stats = tiny.global_batch()[0], step.StepStats()
    engine(**inputs)
    loss = step.router_loss(context, probe.take(), inputs["attention_mask"], stats)
    assert stats.router_load_LE is not None
    metrics = step_metrics.router_metrics(stats.sums, stats.router_load_LE)
    assert metrics["balance_worst"] == pytest.approx(2.0, abs=1e-3)
    assert metrics["balance"] < 1.7
    assert metrics["expert_load"][1] == [0.5, 0.5, 0.0, 0.0]
    assert metrics["router_entropy"][1] < 0.75 < metrics["router_entropy"][0]
    assert loss.item() == pytest.approx(0.1 * 2 * metrics["balance"] + 0.01 * 2 * metrics["z"], rel=1e-5)
    assert ("dropped" in metrics) == (layer != "autoep")


def test_dropped_routes_are_counted_in_the_metrics() -> None:
    native = {"drop_tokens": True, "capacity_factor": 0.5}
    engine = single_rank.engine(tiny.moe_model().train(), layer="native", native=native)
    probe = router.RouterProbe(engine.module)
    inputs, _ = tiny.global_batch()
    routes = 2 * int(inputs["attention_mask"].sum())
    engine(**inputs)
    counts = [router.expert_counts(x, 2, inputs["attention_mask"].flatten().bool()) for x in probe.take()]
    capacity = -(-routes // 8)  # half of an even share of 4 experts
    dropped_L = probe.dropped()
    assert dropped_L is not None
    assert dropped_L.tolist() == [int((count - capacity).clamp(min=0).sum()) for count in counts]
    assert min(dropped_L.tolist()) > 0


# --- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ds_json", "words"),
    [
        ({"zero_optimization": {"stage": 3}}, ["moe.layer native", "ZeRO stage 3", "autoep"]),
        ({"expert_parallel": {"enabled": True, "autoep_size": 3}}, ["autoep_size 3", "does not divide the 4 experts"]),
        ({"expert_parallel": {"enabled": True, "async_split_plan": True}}, ["async_split_plan", "AutoEP", "native"]),
        ({"bf16": {"enabled": True}, "expert_parallel": {"enabled": True, "autoep_size": 2}}, ["stage 0", "bf16"]),
    ],
)
def test_refusals_say_what_to_change(ds_json: dict[str, Any], words: list[str]) -> None:
    ranks = ds_json.get("expert_parallel", {}).get("autoep_size", 1)
    job = tiny.job(layer="native", global_size=12)
    with pytest.raises(ConfigError) as error:
        deepspeed_config.complete(ds_json, job, tiny.moe_model().config, ranks)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("job", "message"),
    [
        ({"native": {"drop_tokens": True}}, "layer is not native"),
        ({"layer": "native", "native": {"use_rts": True}}, "it needs drop_tokens: true"),
        ({"layer": "native", "native": {"capacity_factor": 0.0}}, "greater than 0"),
        ({"layer": "tutel"}, "'autoep' or 'native'"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(job: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        tiny.job(**job)


def test_the_layer_may_change_on_resume_unless_it_drops() -> None:
    def settings(**moe: object) -> dict[str, Any]:
        jobs = {"x": tiny.job(init="/x", **moe).model_dump()}
        return train.settings(Recipe.model_validate({"run": {"dir": "r"}, "jobs": jobs}), "x")

    plain = settings()
    assert settings(layer="native") == plain
    dropping = settings(layer="native", native={"drop_tokens": True})
    assert dropping["moe"]["native"]["capacity_factor"] == 1.25
    del dropping["moe"]["native"]
    assert dropping == plain
