"""The teacher pass on a GPU against the one on the CPU, sample by sample."""

from pathlib import Path

import pytest
import torch

from pipeline.recipe import load_recipe
from pipeline.targets.store import SoftTargetStore
from pipeline.teacher.stage import run_pass
from tests.helpers.teacher_run import SAMPLES, make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("teacher") / "run")


def stored(run: Path, folder: Path, device: str, *words: str) -> SoftTargetStore:
    recipe = load_recipe(run / "recipe.yaml", [f"targets.store={folder}", f"run.device={device}", *words])
    assert run_pass(recipe).samples == SAMPLES
    return SoftTargetStore.open(recipe.store_url, None)


def test_soft_targets_equal_the_cpus(run: Path, tmp_path: Path, device: torch.device) -> None:
    """Up to the codec, which may round a step of a log-prob the other way."""
    ours, theirs = stored(run, tmp_path / "gpu", str(device)), stored(run, tmp_path / "cpu", "cpu")
    assert ours.sample_ids == theirs.sample_ids
    same = total = 0
    for sample_id in theirs.sample_ids:
        got, wanted = ours.read(sample_id), theirs.read(sample_id)
        same, total = same + int((got.ids == wanted.ids).sum()), total + wanted.ids.numel()
        torch.testing.assert_close(got.gold_logprob, wanted.gold_logprob, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(got.entropy, wanted.entropy, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(got.logprobs[:, 0], wanted.logprobs[:, 0], rtol=1e-2, atol=1e-2)
    assert same > 0.98 * total  # near-ties may change places


def test_bfloat16_is_as_near_as_on_the_cpu(run: Path, tmp_path: Path, device: torch.device) -> None:
    exact = stored(run, tmp_path / "exact", "cpu")
    errors = {}
    for name in ("cpu", str(device)):
        store = stored(run, tmp_path / f"bf16-{name}", name, "targets.dtype=bfloat16")
        pairs = [(store.read(i).gold_logprob, exact.read(i).gold_logprob) for i in exact.sample_ids]
        errors[name] = float((torch.cat([a for a, _ in pairs]) - torch.cat([b for _, b in pairs])).abs().mean())
    assert 0 < errors[str(device)] < 1.5 * errors["cpu"] + 1e-3
