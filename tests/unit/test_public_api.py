"""What `import pipeline` offers: cheap, typed, and as its own text says."""

import ast
import inspect
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pipeline
from pipeline.targets.container.writer import StoreWriter
from pipeline.targets.soft_targets import from_logits
from pipeline.targets.store import write_targets
from tests.helpers.paths import ROOT

HEAVY = {"torch", "transformers", "deepspeed", "datasets", "numpy", "pyarrow", "numba", "PIL", "matplotlib"}
VOCAB, WIDTH, TEMPERATURE = 12, 5, 2.0
ANSWERS = {"a": 3, "b": 1, "c": 4}
"""Answer tokens of each sample."""


def modules_after(code: str) -> set[str]:
    """Packages that a fresh interpreter has imported after some code."""
    script = f"{code}\nimport sys; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("code", "allowed"),
    [
        ("import pipeline; dir(pipeline); pipeline.UserError", set()),
        ("from pipeline import load_recipe; load_recipe('demo')", set()),
        ("from pipeline import HardnessTable, WindowPlan, release_alpha", {"numpy", "pyarrow", "numba"}),
    ],
)
def test_a_name_costs_only_what_it_needs(code, allowed):
    assert modules_after(code) & HEAVY <= allowed


def test_type_checkers_are_told_the_same_as_the_interpreter():
    tree = ast.parse(inspect.getsource(pipeline))
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    told = {name.name: node.module for node in guarded.body for name in node.names}
    assert told == {name: f"pipeline.{module}" for name, module in pipeline._MODULES.items()}
    assert sorted(pipeline.__all__) == sorted(told)


def test_every_name_is_there_and_described():
    star: dict[str, object] = {}
    exec("from pipeline import *", star)
    for name in pipeline.__all__:
        assert star[name] is getattr(pipeline, name)
        assert inspect.getdoc(star[name]) and name in pipeline.__doc__ and name in dir(pipeline)


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'SoftTarget'; it has HardnessTable, "):
        _ = pipeline.SoftTarget


class Student(nn.Module):
    """Logits of the next token from the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)

    def forward(self, input_ids):
        return SimpleNamespace(logits=self.head(self.embedding(input_ids)))


def make_store(folder) -> dict[str, torch.Tensor]:
    """All but one token of each distribution kept: then the store's KL is the whole one. Returns the labels."""
    torch.manual_seed(0)
    identity = {"codec": "packed", "top_k": VOCAB - 1, "bits": 8, "vocab_size": VOCAB, "temperature": TEMPERATURE}
    labels = {sample_id: torch.randint(VOCAB, (tokens,)) for sample_id, tokens in ANSWERS.items()}
    writer = StoreWriter(folder, identity)
    (shard,) = writer.plan(list(ANSWERS), 8, "of the test")
    kept = [(i, from_logits(3 * torch.randn(len(y), VOCAB), y, VOCAB - 1, TEMPERATURE)) for i, y in labels.items()]
    write_targets(writer, shard, kept)
    return labels


def make_batch(labels, *sample_ids):
    """Prompts of two tokens, and answers of different lengths, padded to one."""
    answers = nn.utils.rnn.pad_sequence([labels[i] for i in sample_ids], batch_first=True)
    input_ids = torch.cat([torch.ones(len(sample_ids), 2, dtype=torch.long), answers], dim=1)
    place, ends = torch.arange(input_ids.shape[1]), torch.tensor([[1 + len(labels[i])] for i in sample_ids])
    predicts = (place >= 1) & (place < ends)
    joined = torch.cat([labels[i] for i in sample_ids])
    return {"sample_ids": sample_ids, "inputs": {"input_ids": input_ids}, "predicts": predicts, "labels": joined}


def expected_loss(model, batch, store):
    """By torch alone, on whole distributions."""
    targets, _ = store.read_joined(batch["sample_ids"])
    p_NV = torch.zeros(len(targets), VOCAB).scatter_(1, targets.ids, targets.logprobs.exp())
    rest = torch.where(p_NV > 0, 0.0, targets.tail_logprob.exp()[:, None])  # of the one token that is not kept
    logits_NV = model(**batch["inputs"]).logits[batch["predicts"]]
    kl = F.kl_div(F.log_softmax(logits_NV / TEMPERATURE, dim=-1), p_NV + rest, reduction="sum")
    ce = F.cross_entropy(logits_NV, batch["labels"], reduction="sum")
    return (0.5 * ce + 0.5 * TEMPERATURE**2 * kl) / len(targets)


def test_the_example_trains_as_torchs_own_kl_would(tmp_path, monkeypatch):
    """The very lines of the package's text, on a store on disk."""
    labels = make_store(tmp_path / "runs" / "mine" / "store")
    loader, model = [make_batch(labels, "b", "a"), make_batch(labels, "c")], Student()
    monkeypatch.chdir(tmp_path)
    lines = pipeline.__doc__.splitlines()
    start = lines.index('    store = SoftTargetStore.open("runs/mine/store", None)')
    example = textwrap.dedent("\n".join(lines[start : lines.index("", start)]))
    names = {name: getattr(pipeline, name) for name in ("SoftTargetStore", "distillation_loss")}
    exec(example, names | {"loader": loader, "model": model})
    ours = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    store = pipeline.SoftTargetStore.open("runs/mine/store", None)
    for batch in loader:
        expected_loss(model, batch, store).backward()
    for gradient, parameter in zip(ours, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-5, atol=1e-7)
        assert gradient.abs().max() > 1e-3


def test_one_number_is_a_share_for_all_tokens():
    torch.manual_seed(0)
    hidden_ND, weight_VD, labels_N = torch.randn(6, WIDTH), torch.randn(VOCAB, WIDTH), torch.randint(VOCAB, (6,))
    targets = from_logits(torch.randn(6, VOCAB), labels_N, 4, 1.0)
    logits_NV = hidden_ND @ weight_VD.t()
    whole = pipeline.distillation_loss(logits_NV, labels_N, targets, torch.full((6,), 0.25)).loss_sum
    assert torch.equal(pipeline.distillation_loss(logits_NV, labels_N, targets, 0.25).loss_sum, whole)
    fused = pipeline.fused_distillation_loss(hidden_ND, weight_VD, labels_N, targets, 0.25).loss_sum
    torch.testing.assert_close(fused, whole)
    assert pipeline.fused_distillation_loss(hidden_ND, weight_VD, labels_N, targets, 1).kl_N is not None
