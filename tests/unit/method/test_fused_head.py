"""The fused head against logits, autograd and plain torch; under DeepSpeed; and what it keeps in memory."""

import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.method.fused_head import FusedHead, fused_distillation_loss
from pipeline.method.losses import DistillationTerms, distillation_loss
from pipeline.models import loading
from pipeline.targets.soft_targets import from_logits
from tests.helpers import single_rank, tiny

ROWS, VOCAB, WIDTH = 23, 120, 16
MEASURES = ("loss_sum", "ce_N", "kl_N", "hardness_N", "gate_N", "weighted_sum", "plain_sum")


def make_case(rows: int = ROWS, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Hidden states, weight, labels (one row without), top-k targets and a mix of alphas that includes 0."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(VOCAB, (rows,), generator=generator)
    labels[2:3] = -100
    teacher = 2 * torch.randn(rows, VOCAB, generator=generator)
    return {
        "hidden_ND": torch.randn(rows, WIDTH, generator=generator).to(dtype).requires_grad_(),
        "weight_VD": torch.randn(VOCAB, WIDTH, generator=generator).to(dtype).requires_grad_(),
        "labels_N": labels,
        "targets": from_logits(teacher, labels.clamp(min=0), 8, 1.0),
        "alpha_N": torch.linspace(0, 1, rows),
    }


def with_targets(case: dict[str, Any], kind: str) -> dict[str, Any]:
    targets = case["targets"]
    if kind == "none":
        return case | {"targets": None, "alpha_N": torch.zeros_like(case["alpha_N"])}
    if kind == "sampled":
        return case | {"targets": replace(targets, sampled=True)}
    return case


def unfused(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, **options: Any) -> DistillationTerms:
    return distillation_loss(hidden_ND @ weight_VD.T, labels_N, **options)


def gradients(case: dict[str, Any], terms: DistillationTerms) -> tuple[Tensor, ...]:
    """Of a multiple of the loss, as training scales it."""
    return torch.autograd.grad(terms.loss_sum * 0.3, (case["hidden_ND"], case["weight_VD"]))


@pytest.mark.parametrize("kind", ["top_k", "sampled", "none"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("chunk_rows", "piece_rows"), [(1, 1), (5, 5), (9, 4), (ROWS, 5), (1000, 1000)])
def test_fused_equals_unfused(chunk_rows: int, piece_rows: int, temperature: float, kind: str) -> None:
    """Neither 5 nor 9 divides 23. Loss, every measure, and the gradients of hidden states and weight."""
    case = with_targets(make_case(), kind)
    settings = {"temperature": temperature, "gate_scale": 0.7, "beta": 0.8, "normaliser": 1.3}
    ours = fused_distillation_loss(
        **case, chunk_elements=chunk_rows * VOCAB + 1, piece_elements=piece_rows * VOCAB, **settings
    )
    wanted = unfused(**case, **settings)
    for name in MEASURES:
        torch.testing.assert_close(getattr(ours, name), getattr(wanted, name), rtol=1e-5, atol=1e-5, msg=name)
    for found, expected in zip(gradients(case, ours), gradients(case, wanted), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert expected.abs().max() > 0.5


def test_bf16_is_as_near_to_the_truth_as_unfused() -> None:
    """Products in bf16, loss in float32, sums over chunks in float32; the truth is in float64 on the same inputs."""
    case = make_case(rows=200, dtype=torch.bfloat16)
    exact = case | {k: case[k].detach().double().requires_grad_() for k in ("hidden_ND", "weight_VD")}
    truth = gradients(exact, unfused(**exact))
    ours = gradients(case, fused_distillation_loss(**case, chunk_elements=29 * VOCAB, piece_elements=7 * VOCAB))
    theirs = gradients(case, unfused(**case))
    for found, plain, wanted in zip(ours, theirs, truth, strict=True):
        assert found.dtype == torch.bfloat16
        error, plain_error = ((x.double() - wanted).norm() / wanted.norm() for x in (found, plain))
        assert error < 1.1 * plain_error < 0.02


@pytest.mark.parametrize("kind", ["top_k", "none"])
def test_no_answer_tokens(kind: str) -> None:
    case = with_targets(make_case(rows=0), kind)
    terms = fused_distillation_loss(**case)
    assert terms.loss_sum == 0
    assert terms.ce_N.shape == (0,)
    hidden, weight = gradients(case, terms)
    assert hidden.shape == (0, WIDTH)
    assert torch.equal(weight, torch.zeros(VOCAB, WIDTH))


def test_a_frozen_head_and_evaluation_compute_no_more_than_they_need() -> None:
    case = make_case()
    expected, _ = gradients(case, unfused(**case))
    frozen = case | {"weight_VD": case["weight_VD"].detach()}
    loss = fused_distillation_loss(**frozen, chunk_elements=5 * VOCAB).loss_sum
    torch.testing.assert_close(torch.autograd.grad(loss, case["hidden_ND"])[0], expected / 0.3, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        value = fused_distillation_loss(**case).loss_sum
    assert not value.requires_grad
    torch.testing.assert_close(value, loss.detach())


def test_a_second_backward_is_refused_not_wrong() -> None:
    case = make_case()
    terms = fused_distillation_loss(**case)
    terms.loss_sum.backward(retain_graph=True)
    with pytest.raises(RuntimeError):
        terms.loss_sum.backward()
    wanted = torch.autograd.grad(unfused(**case).loss_sum, (case["hidden_ND"], case["weight_VD"]))
    for found, expected in zip((case["hidden_ND"].grad, case["weight_VD"].grad), wanted, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # the first backward's, and nothing on top


def test_other_numbers_of_rows_are_refused() -> None:
    case = make_case()
    with pytest.raises(ValueError, match="23 hidden states, but 20 labels"):
        fused_distillation_loss(**case | {"labels_N": case["labels_N"][:20]})
    few = {"targets": case["targets"].rows(slice(0, 5))}
    with pytest.raises(ValueError, match="soft targets have 5 rows, the hidden states have 23"):
        fused_distillation_loss(**case | few)
    with pytest.raises(ValueError, match="alpha > 0 needs soft targets"):
        fused_distillation_loss(**case | {"targets": None})


# -- memory ------------------------------------------------------------------------------------------------------


class LargestFloat(TorchDispatchMode):
    """Elements of the largest float tensor that any operation returns, those of autograd included."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("kind", ["top_k", "sampled", "none"])
def test_no_tensor_is_larger_than_a_chunk(kind: str) -> None:
    case, chunk = with_targets(make_case(rows=400), kind), 60 * VOCAB
    assert chunk > case["weight_VD"].numel() and chunk > case["hidden_ND"].numel()
    with LargestFloat() as largest:
        gradients(case, fused_distillation_loss(**case, chunk_elements=chunk, gate_scale=1.0, beta=0.5))
    assert 0.9 * chunk < largest.elements <= chunk
    with LargestFloat() as largest:
        gradients(case, unfused(**case))
    assert largest.elements == 400 * VOCAB


def kept_shapes(compute: Callable[..., DistillationTerms], **case: Any) -> set[tuple[int, ...]]:
    """Shapes of the float matrices that autograd still holds when the loss is computed."""
    packed: list[weakref.ref[Tensor]] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(weakref.ref(tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        terms = compute(**case)
    held = [tensor for ref in packed if (tensor := ref()) is not None]
    assert terms.loss_sum.requires_grad  # the graph is alive
    return {tuple(t.shape) for t in held if t.is_floating_point() and t.ndim > 1}


@pytest.mark.parametrize("kind", ["top_k", "sampled", "none"])
def test_backward_waits_with_two_gradients_and_nothing_else(kind: str) -> None:
    case = with_targets(make_case(rows=400), kind)
    fused = partial(fused_distillation_loss, chunk_elements=60 * VOCAB)
    assert kept_shapes(fused, **case) == {(400, WIDTH), (VOCAB, WIDTH)}
    assert (400, VOCAB) in kept_shapes(unfused, **case)


# -- the model's head --------------------------------------------------------------------------------------------


def rows_and_labels(labels_BS: Tensor) -> tuple[Tensor, Tensor]:
    """(which positions predict an answer token, the tokens)."""
    next_BS = torch.full_like(labels_BS, -100)
    next_BS[:, :-1] = labels_BS[:, 1:]
    rows_BS = next_BS != -100
    return rows_BS, next_BS[rows_BS]


def step_case(step: int) -> tuple[dict[str, Tensor], Tensor, dict[str, Any]]:
    """(model inputs, rows, what the loss takes) of a global batch, with targets of a random teacher."""
    inputs, labels_BS = tiny.global_batch(step)
    rows_BS, labels_N = rows_and_labels(labels_BS)
    generator = torch.Generator().manual_seed(step)
    teacher = 2 * torch.randn(len(labels_N), tiny.TEXT["vocab_size"], generator=generator)
    targets = from_logits(teacher, labels_N, 8, 1.0)
    alpha_N = torch.linspace(0, 0.9, len(labels_N))
    return inputs, rows_BS, {"labels_N": labels_N, "targets": targets, "alpha_N": alpha_N, "gate_scale": 1.0}


def head_loss(head: FusedHead, model: Any, step: int) -> DistillationTerms:
    inputs, rows_BS, options = step_case(step)
    loss = partial(fused_distillation_loss, chunk_elements=9 * tiny.TEXT["vocab_size"], piece_elements=500, **options)
    return head.loss(partial(model, **inputs, use_cache=False), rows_BS, loss)


def plain_loss(model: Any, step: int) -> DistillationTerms:
    inputs, rows_BS, options = step_case(step)
    return distillation_loss(model(**inputs, use_cache=False).logits[rows_BS], **options)


@pytest.mark.parametrize("make", [tiny.dense_model, tiny.moe_model])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_parameter_gets_the_gradient_of_the_logits_path(make: Any, checkpointing: bool) -> None:
    ours, plain = make().train(), make().train()
    if checkpointing:
        loading.enable_activation_checkpointing(ours)
    terms, wanted = head_loss(FusedHead(ours), ours, 0), plain_loss(plain, 0)
    for name in MEASURES:
        torch.testing.assert_close(getattr(terms, name), getattr(wanted, name), rtol=1e-5, atol=1e-5, msg=name)
    terms.loss_sum.backward()
    wanted.loss_sum.backward()
    expected = dict(plain.named_parameters())
    assert "lm_head.weight" not in expected  # tied: the head's gradient joins the embedding's
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-4, atol=1e-4, msg=name)


def test_names_generation_and_logits_stay_as_they_were() -> None:
    model = tiny.moe_model()
    inputs, _ = tiny.collate([tiny.sample(0, 0)])
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    names, logits = list(model.state_dict()), model(**inputs).logits
    answer = model.generate(**inputs, **options)
    head = FusedHead(model)
    head_loss(head, model, 0).loss_sum.backward()
    assert list(model.state_dict()) == names
    assert torch.equal(model(**inputs).logits, logits)
    assert torch.equal(model.generate(**inputs, **options), answer)


def test_a_forward_that_fails_leaves_nothing_pending() -> None:
    model = tiny.dense_model()
    inputs, rows_BS, _ = step_case(0)
    head, logits = FusedHead(model), model(**inputs).logits

    def fail(hidden_ND: Tensor, weight_VD: Tensor) -> DistillationTerms:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        head.loss(partial(model, **inputs), rows_BS, fail)
    assert torch.equal(model(**inputs).logits, logits)


def test_a_head_with_a_bias_is_refused() -> None:
    model = tiny.dense_model()
    model.lm_head = torch.nn.Linear(32, 120)
    with pytest.raises(ValueError, match="has a bias"):
        FusedHead(model)


@pytest.mark.parametrize("stage", [0, 1, 2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("trainable", ["all", "mlp"])
def test_every_zero_stage_trains_like_plain_torch(stage: int, trainable: str) -> None:
    """SGD, so that a wrong scale shows; ZeRO-3 has to gather the head's weight, tied and split, around its forward."""

    def freeze(model: Any) -> Any:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trainable == "all" or ".mlp." in name)
        return model

    plain = freeze(tiny.moe_model())
    before = {name: p.detach().clone() for name, p in plain.named_parameters()}
    optimizer = torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], lr=0.5)
    job = {"kind": "sgd", "lr": 0.5, "weight_decay": 0.0, "grad_clip": 0.0}
    engine = single_rank.engine(freeze(tiny.moe_model()), stage=stage, experts=stage > 0, persistent=0, **job)
    head = FusedHead(engine.module)
    for step in range(3):
        count = tiny.global_tokens(step)
        loss = plain_loss(plain, step).loss_sum / count
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        terms = head_loss(head, engine, step)
        engine.backward(terms.loss_sum / count)
        engine.step()
        torch.testing.assert_close(terms.loss_sum.detach() / count, loss.detach(), rtol=1e-5, atol=1e-6)
    found = single_rank.parameters(engine)
    moved = 0.0
    for name, parameter in plain.named_parameters():
        # At this rate three steps grow the rounding of grouped products (1e-7) to 2e-6; a wrong scale moves 1e-3.
        torch.testing.assert_close(found[name], parameter.detach(), rtol=1e-5, atol=1e-5, msg=name)
        moved = max(moved, float((parameter.detach() - before[name]).abs().max()))
    assert moved > 1e-2
