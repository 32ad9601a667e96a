"""The teacher's LM head in float32 from bfloat16 hidden states: exact, and bounded in memory at a real vocabulary."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.teacher import forward
from pipeline.teacher.forward import head_logits

REAL_VOCAB, WIDTH = 151_936, 64


def head(vocab: int, width: int = WIDTH, bias: bool = False) -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(width, vocab, bias=bias).to(torch.bfloat16)


def peaky_rows(count: int, width: int = WIDTH) -> torch.Tensor:
    """Logits up to some 20, as a trained teacher's."""
    return (torch.randn(count, width, generator=torch.Generator().manual_seed(1)) * 8).to(torch.bfloat16)


def exact(layer: torch.nn.Linear, rows: torch.Tensor, vocab: int) -> torch.Tensor:
    logits = rows.double() @ layer.weight[:vocab].double().T
    return logits if layer.bias is None else logits + layer.bias[:vocab].double()


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
def test_log_probs_are_those_of_the_same_hidden_states_in_float64(bias):
    layer, rows = head(5000, bias=bias), peaky_rows(40)
    wanted = exact(layer, rows, 4900).log_softmax(-1)
    ours = head_logits(layer, rows, 4900)
    assert ours.dtype == torch.float32 and ours.shape == (40, 4900)
    error = (ours.double().log_softmax(-1) - wanted).abs().max()
    rounded = (layer(rows)[:, :4900].double().log_softmax(-1) - wanted).abs().max()
    assert error < 1e-5  # nats
    assert rounded > 100 * error, "a head in bfloat16 would do as well: this test shows nothing"


class Largest(TorchDispatchMode):
    """Elements of the largest float32 tensor with storage of its own that any operation makes."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dtype == torch.float32:
            self.elements = max(self.elements, out.untyped_storage().nbytes() // 4)
        return out


@torch.no_grad()
def test_memory_is_bounded_at_a_real_vocabulary(monkeypatch):
    monkeypatch.setattr(forward, "_WEIGHT_AT_ONCE", 1 << 18)
    layer, rows = head(REAL_VOCAB), peaky_rows(3)
    with Largest() as made:
        ours = head_logits(layer, rows, REAL_VOCAB)
    assert made.elements == 3 * REAL_VOCAB > 1 << 18  # the logits; the weight has 9.7 million
    torch.testing.assert_close(ours.double(), exact(layer, rows, REAL_VOCAB), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_float32_head_is_what_torch_computes():
    layer = torch.nn.Linear(WIDTH, 700)
    rows = torch.randn(5, WIDTH)
    torch.testing.assert_close(head_logits(layer, rows, 700), layer(rows), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_no_row_gives_no_logit():
    assert head_logits(head(50), peaky_rows(0), 50).shape == (0, 50)
