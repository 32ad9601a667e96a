"""The loss, by itself and fused with the LM head, on a GPU against float32 on the CPU."""

from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.method.fused_head import fused_distillation_loss
from pipeline.method.losses import DistillationTerms, distillation_loss
from pipeline.targets.soft_targets import from_logits

ROWS, VOCAB, WIDTH = 300, 5000, 64
MEASURES = ("ce_N", "kl_N", "hardness_N", "gate_N")
SETTINGS: dict[str, Any] = {"gate_scale": 1.0, "beta": 0.5, "normaliser": 1.2}


def case(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Hidden states [N, D] and the head's weight [V, D] that bfloat16 holds exactly, labels, targets, alphas."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(VOCAB, (ROWS,), generator=generator)
    labels[5:9] = -100
    teacher = 2 * torch.randn(ROWS, VOCAB, generator=generator)
    hidden, weight = (torch.randn(n, WIDTH, generator=generator).bfloat16() for n in (ROWS, VOCAB))
    return {
        "hidden_ND": hidden.to(device, dtype).requires_grad_(),
        "weight_VD": (0.3 * weight).bfloat16().to(device, dtype).requires_grad_(),
        "labels_N": labels.to(device),
        "targets": from_logits(teacher, labels.clamp(min=0), 16, 1.0).to(str(device)),
        "alpha_N": torch.linspace(0, 1, ROWS).to(device),
    }


def unfused(hidden_ND: Tensor, weight_VD: Tensor, **options: Any) -> DistillationTerms:
    return distillation_loss((hidden_ND @ weight_VD.T).float(), **options)


def with_gradients(loss: Any, given: dict[str, Any]) -> tuple[DistillationTerms, list[Tensor]]:
    terms = loss(**given, **SETTINGS)
    gradients = torch.autograd.grad(terms.loss_sum, (given["hidden_ND"], given["weight_VD"]))
    return terms, [gradient.float().cpu() for gradient in gradients]


@pytest.mark.parametrize("loss", [unfused, fused_distillation_loss])
def test_float32_equals_the_cpu(device: torch.device, loss: Any) -> None:
    torch.set_float32_matmul_precision("highest")
    terms, gradients = with_gradients(loss, case(device, torch.float32))
    wanted, expected = with_gradients(unfused, case(torch.device("cpu"), torch.float32))
    assert float(terms.loss_sum) == pytest.approx(float(wanted.loss_sum), rel=1e-5)
    for name in MEASURES:
        torch.testing.assert_close(getattr(terms, name).cpu(), getattr(wanted, name), rtol=1e-4, atol=1e-4, msg=name)
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_bfloat16_is_as_near_as_rounded_logits_allow(device: torch.device) -> None:
    """Logits of bfloat16 products are rounded to 8 bits: the fused loss may be no further off than the unfused one."""
    wanted, expected = with_gradients(unfused, case(torch.device("cpu"), torch.float32))
    errors = {}
    for loss in (unfused, fused_distillation_loss):
        terms, gradients = with_gradients(loss, case(device, torch.bfloat16))
        assert float(terms.loss_sum) == pytest.approx(float(wanted.loss_sum), rel=1e-2)
        errors[loss] = [float((a - b).norm() / b.norm()) for a, b in zip(gradients, expected, strict=True)]
    for fused, plain in zip(errors[fused_distillation_loss], errors[unfused], strict=True):
        assert fused < 1.5 * plain + 1e-3 and plain < 0.05
