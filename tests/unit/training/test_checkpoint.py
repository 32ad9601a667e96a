"""Checkpoints: exact resumption on any topology, and survival of damage, full disks and kills."""

import json
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.errors import CheckpointError, UserError
from pipeline.models import checkpoint_folder
from pipeline.training import checkpoint
from tests.helpers import kill_worker, ranks, single_rank, tiny

STATE = {"note": "kept", "numbers": [1, 2]}
TEMPLATE = {"config.json": b'{"model_type": "x"}', "tokenizer.json": b"{}"}
ARRAYS = {"scores": np.arange(5, dtype=np.float32), "visits": np.arange(3)}


def engine_with(steps: int, **options: Any) -> Any:
    engine = single_rank.engine(tiny.moe_model(), **options)
    single_rank.train(engine, 0, steps)
    return engine


def save(engine: Any, root: Path, step: int, keep: int = 2) -> Path:
    return checkpoint.save(engine, root, step, STATE, ARRAYS, keep, TEMPLATE)


@pytest.mark.parametrize(
    ("stage", "experts"), [(0, False), (1, True), (2, True), pytest.param(3, True, marks=pytest.mark.slow)]
)
def test_resumed_equals_uninterrupted(tmp_path: Path, stage: int, experts: bool) -> None:
    engine = engine_with(2, stage=stage, experts=experts)
    save(engine, tmp_path, 2)
    wanted = single_rank.train(engine, 2, 4)
    other = single_rank.engine(tiny.moe_model(seed=9), stage=stage, experts=experts)
    loaded = checkpoint.load(other, tmp_path)
    assert loaded is not None
    assert (loaded.step, loaded.state) == (2, STATE)
    assert loaded.arrays.keys() == ARRAYS.keys()
    assert all(np.array_equal(loaded.arrays[key], value) for key, value in ARRAYS.items())
    assert single_rank.train(other, 2, 4) == wanted
    ours, theirs = single_rank.parameters(other), single_rank.parameters(engine)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_without_moments_training_would_differ(tmp_path: Path) -> None:
    """The test above can fail: parameters alone do not continue the run."""
    engine = engine_with(2)
    folder = save(engine, tmp_path, 2)
    wanted = single_rank.train(engine, 2, 4)
    model = tiny.moe_model(seed=9)
    with torch.no_grad():
        live = dict(model.named_parameters())
        for name, tensor in checkpoint_folder.read_parameters(folder):
            live[name].copy_(tensor)
    found = single_rank.train(single_rank.engine(model), 2, 4)
    assert found[0] == wanted[0]
    assert found[1] != wanted[1]


def test_stored_parameters_are_the_models(tmp_path: Path) -> None:
    """Names and layouts are Hugging Face's, experts included, before any step."""
    model = tiny.moe_model()
    wanted = {name: p.detach().clone() for name, p in model.named_parameters()}
    stored = dict(checkpoint_folder.read_parameters(save(single_rank.engine(model), tmp_path, 0)))
    assert stored.keys() == wanted.keys()
    assert all(torch.equal(stored[name], wanted[name]) for name in wanted)


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert checkpoint.load(engine_with(0), tmp_path / "absent") is None


@pytest.fixture(scope="module")
def two_saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """An engine and the folder with its checkpoints of steps 1 and 2."""
    root = tmp_path_factory.mktemp("saved")
    engine = engine_with(1)
    save(engine, root, 1)
    single_rank.train(engine, 1, 2)
    save(engine, root, 2)
    return engine, root


@pytest.fixture
def saved(two_saved: tuple[Any, Path], tmp_path: Path) -> tuple[Any, Path]:
    """A copy that a test may damage."""
    shutil.copytree(two_saved[1], tmp_path / "copy")
    return two_saved[0], tmp_path / "copy"


@pytest.mark.parametrize(
    "name", ["model-00001.safetensors", "optimizer-00001.safetensors", "state.json", "arrays.safetensors"]
)
def test_damage_is_named(saved: tuple[Any, Path], name: str) -> None:
    engine, root = saved
    path = root / "step-00000002" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{name}: damaged") as error:
        checkpoint.load(engine, root)
    assert "step-00000001" in str(error.value)  # the way out
    path.unlink()
    with pytest.raises(CheckpointError, match=rf"{name}: missing"):
        checkpoint.load(engine, root)


def test_older_checkpoint_can_be_chosen(saved: tuple[Any, Path]) -> None:
    _, root = saved
    (root / "latest").write_text("step-00000001\n")
    other = engine_with(0)
    loaded = checkpoint.load(other, root)
    assert loaded is not None
    assert loaded.step == 1
    assert save(other, root, 2).name == "step-00000002-2"  # the abandoned one is not overwritten


def test_leftovers_of_a_kill_are_ignored_and_removed(saved: tuple[Any, Path]) -> None:
    engine, root = saved
    (root / ".writing-step-00000003").mkdir()
    (root / ".writing-step-00000003" / "model-00001.safetensors").write_bytes(b"half")
    newest = checkpoint_folder.latest(root)
    assert newest is not None
    assert newest.name == "step-00000002"
    save(engine, root, 3)
    assert sorted(p.name for p in root.iterdir()) == ["latest", "step-00000002", "step-00000003"]


def test_latest_must_name_a_checkpoint(saved: tuple[Any, Path]) -> None:
    _, root = saved
    (root / "latest").write_text("../elsewhere\n")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        checkpoint_folder.latest(root)


def test_full_disk_keeps_the_previous(saved: tuple[Any, Path]) -> None:
    """A limit on file sizes stands in for the full disk: writing fails half-way through."""
    engine, root = saved
    old_limit, old_handler = (
        resource.getrlimit(resource.RLIMIT_FSIZE),
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
    )
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old_limit[1]))
    try:
        with pytest.raises(CheckpointError, match="previous checkpoint is still valid"):
            save(engine, root, 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old_limit)
        signal.signal(signal.SIGXFSZ, old_handler)
    assert sorted(p.name for p in root.iterdir()) == ["latest", "step-00000001", "step-00000002"]
    loaded = checkpoint.load(engine, root)
    assert loaded is not None
    assert loaded.step == 2


def test_state_that_is_not_json_is_refused(saved: tuple[Any, Path]) -> None:
    engine, root = saved
    with pytest.raises(CheckpointError, match="not JSON serializable"):
        checkpoint.save(engine, root, 3, {"path": Path("x")}, {}, 2)


def test_other_optimizer_is_refused(saved: tuple[Any, Path]) -> None:
    with pytest.raises(CheckpointError, match=r"AdamW, this job uses SGD"):
        checkpoint.load(engine_with(0, kind="sgd"), saved[1])


def test_other_model_is_refused(saved: tuple[Any, Path]) -> None:
    engine = single_rank.engine(tiny.dense_model())
    with pytest.raises(UserError, match=r"mlp\.gate_proj\.weight: checkpoint absent, model \(48, 32\)"):
        checkpoint.load(engine, saved[1])


def test_manifest_covers_every_file(saved: tuple[Any, Path]) -> None:
    folder = saved[1] / "step-00000002"
    listed = set(json.loads((folder / "manifest.json").read_text())["files"])
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert listed | {"manifest.json"} == there
    assert "template/config.json" in there
    assert checkpoint_folder.read_template(folder) == TEMPLATE


def test_any_damage_to_the_manifest_is_refused(saved: tuple[Any, Path]) -> None:
    folder = saved[1] / "step-00000002"
    path = folder / "manifest.json"
    content = path.read_bytes()
    for position in range(len(content)):
        path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        with pytest.raises(CheckpointError):
            checkpoint_folder.verify(folder)
    for rest in (b"", content[:100], b"[]", b'{"format": 1}'):
        path.write_bytes(rest)
        with pytest.raises(CheckpointError):
            checkpoint_folder.verify(folder)
    path.write_bytes(content)
    checkpoint_folder.verify(folder)


def test_a_file_that_was_not_written_with_it_is_refused(saved: tuple[Any, Path]) -> None:
    """A shard laid beside the others would win over them."""
    engine, root = saved
    folder = root / "step-00000002"
    shutil.copy(root / "step-00000001" / "model-00001.safetensors", folder / "model-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"model-00002\.safetensors: not written with this checkpoint"):
        checkpoint.load(engine, root)


def test_the_newest_are_kept_by_number(saved: tuple[Any, Path]) -> None:
    """Ordered by step, then by attempt, as numbers; `latest` is kept even when others have higher steps."""
    engine, root = saved
    for step in (2, 2, 10):
        save(engine, root, step, keep=9)
    names = {"step-00000001", "step-00000002", "step-00000002-2", "step-00000002-3", "step-00000010"}
    assert {p.name for p in root.glob("step-*")} == names
    assert save(engine, root, 9, keep=3).name == "step-00000009"
    assert {p.name for p in root.glob("step-*")} == {"step-00000009", "step-00000002-3", "step-00000010"}
    save(engine, root, 9, keep=1)
    assert [p.name for p in root.glob("step-*")] == ["step-00000009-2"]


def test_a_folder_that_cannot_be_written_is_an_error(two_saved: tuple[Any, Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="could not be written"):
        save(two_saved[0], tmp_path / "file" / "checkpoints", 3)


@pytest.mark.slow
def test_a_kill_at_any_file_operation_leaves_a_valid_newest(tmp_path: Path) -> None:
    """kill -9 before each operation on files of a save that also prunes; then training goes on from what is there."""
    newest = json.loads(ranks.run(kill_worker.main, tmp_path, env={"LOCAL_RANK": "0"}).stdout.splitlines()[-1])
    assert len(newest) > 30
    first_new = newest.index("step-00000003")
    assert set(newest[:first_new]) == {"step-00000002"}
    assert set(newest[first_new:]) == {"step-00000003"}
    assert 20 < first_new < len(newest) - 3  # kills lie before the switch and after it, in the pruning
