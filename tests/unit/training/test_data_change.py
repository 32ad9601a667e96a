"""A job whose samples have changed, against plain Python that looks every sample up by its id."""

import json

import numpy as np
import pytest
import torch.distributed as dist
import xxhash

from pipeline.errors import CheckpointError, UserError
from pipeline.method.hardness import NEVER, HardnessTable
from pipeline.training import data_change
from pipeline.training.data_change import TrainingData
from pipeline.training.job_settings import changes
from tests.helpers.tiny_data import make_sample


def hexes(count, seed=0):
    """Ids as the index has them; some end in zeros, which numpy leaves out of strings."""
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (count, 16), dtype=np.uint8)
    raw[::5, 13:] = 0
    return sorted(row.tobytes().hex() for row in raw)


def data_of(ids):
    fingerprint = xxhash.xxh3_128("".join(f"{i}\n" for i in ids)).hexdigest()
    samples = [make_sample((), sample_id=i, meta={"record": f"r{i[:4]}.json", "part": ""}) for i in ids]
    return TrainingData(samples, fingerprint)


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(data_change, "_ROWS", 7)
    monkeypatch.setattr("pipeline.method.hardness.ROWS", 9)


def changed(tmp_path, before, now, held=()):
    """What `change` says of a job with these ids before and now."""
    data_of(before).keep_ids(tmp_path)
    trained = [s for s in data_of(now).samples if s.sample_id not in set(held)]
    return data_change.change(tmp_path, data_of(before).state_dict(), data_of(now), trained, held)


CASES = {
    "removed": (range(60), [i for i in range(60) if i % 7]),
    "added": ([i for i in range(60) if i % 5], range(60)),
    "both": ([i for i in range(60) if i % 5], [i for i in range(60) if i % 7]),
    "others at both ends": (range(20, 40), range(60)),
    "none in common": (range(30), range(30, 60)),
}


@pytest.mark.parametrize("name", CASES)
def test_every_sample_is_found_by_its_id(tmp_path, name):
    every = hexes(60)
    before, now = ([every[i] for i in places] for places in CASES[name])
    moved = changed(tmp_path, before, now)
    assert moved.place_M.tolist() == [before.index(i) if i in before else -1 for i in now]
    assert [before[place] for place in moved.removed] == [i for i in before if i not in now]
    record = {"before": len(before), "after": len(now), "added": len(set(now) - set(before))}
    assert moved.record() == {"setting": "samples", **record, "removed": len(set(before) - set(now))}


def test_the_table_goes_along_and_samples_held_out_are_no_part_of_it(tmp_path):
    every = hexes(60)
    before, now = every[:50], [i for n, i in enumerate(every) if n % 6]
    held = [every[n] for n in (0, 3, 25, 49)]
    still_held = [i for i in held if i in now]
    assert 0 < len(still_held) < len(held)
    moved = changed(tmp_path, before, now, still_held)
    assert moved.removed.tolist() == [n for n, i in enumerate(before) if i not in now]
    trained_before, trained = ([i for i in ids if i not in held] for ids in (before, now))
    rng = np.random.default_rng(1)
    old = HardnessTable(trained_before, ["a"] * len(trained_before), rng.random(len(trained_before), np.float32))
    old.draw(rng.integers(0, len(old), 80), 3)
    old.update(np.arange(0, len(old), 2), rng.random(len(old), np.float32)[::2], 11, 0.5)
    untrained = np.array([4, 4, 9, 20])
    drawn = {i: (int(v), int(w)) for i, v, w in zip(trained_before, old.visits, old.last_window, strict=True)}
    new = HardnessTable(trained, ["a"] * len(trained), np.arange(len(trained), dtype=np.float32))
    new.carry(old.arrays(), moved.place_in_table(held), untrained)
    taken_back = [trained_before[place] for place in untrained]
    for place, sample_id in enumerate(trained):
        got = new.difficulty[place], new.last_step[place], (new.visits[place], new.last_window[place])
        if sample_id not in trained_before:
            assert got == (place, NEVER, (0, NEVER))
            continue
        was, (visits, window) = trained_before.index(sample_id), drawn[sample_id]
        if sample_id in taken_back:
            visits, window = max(0, visits - taken_back.count(sample_id)), NEVER
        assert got == (old.difficulty[was], old.last_step[was], (visits, window))
    assert old.visits.tolist() == [visits for visits, _ in drawn.values()]  # the checkpoint's own are left alone


def test_the_same_samples_are_no_change_and_their_ids_are_not_read(tmp_path):
    data = data_of(hexes(20))
    assert data_change.change(tmp_path, data.state_dict(), data, data.samples, ()) is None


def refusal(tmp_path, moved, now, **options):
    ours = {"optimizer": {"lr": options.get("lr", 1)}, "steps": options.get("steps", 1)}
    with pytest.raises(UserError) as error:
        changes(tmp_path, {"optimizer": {"lr": 1}, "steps": 1}, ours, allowed=options.get("allowed", False),
                others=moved.lines(data_of(now).samples))  # fmt: skip
    return str(error.value)


def test_what_has_changed_is_said_with_names(tmp_path):
    every = hexes(40)
    before, now = every[:30], every[6:40]
    moved = changed(tmp_path, before, now)
    said = refusal(tmp_path, moved, now)
    assert "started with other samples" in said and "samples: checkpoint 30, now 34 (10 added, 6 removed)" in said
    assert f"added: r{every[30][:4]}.json ({every[30]});" in said and "and 7 more" in said
    assert f"removed: {every[0]}; {every[1]}; {every[2]} and 3 more" in said
    assert "start with --change-settings to go on from the checkpoint" in said
    said = refusal(tmp_path, moved, now, lr=2, steps=3)
    assert "other settings and samples" in said and "allows optimizer.lr, other samples alone" in said
    assert "steps: checkpoint 1, recipe 3" in refusal(tmp_path, moved, now, steps=3, allowed=True)


def test_as_many_but_other_samples_are_a_change(tmp_path):
    every = hexes(21)
    moved = changed(tmp_path, every[:20], every[1:])
    said = refusal(tmp_path, moved, every[1:])
    assert "samples: as many as in the checkpoint (20), but 1 are others (1 added, 1 removed)" in said


def test_other_answers_of_the_teacher_to_the_same_questions_are_a_change(tmp_path):
    ids = hexes(20)
    plain = data_of(ids)
    before, now = (TrainingData(plain.samples, f"{plain.fingerprint}-{answers}") for answers in ("aa", "bb"))
    before.keep_ids(tmp_path)
    assert data_change.change(tmp_path, before.state_dict(), before, before.samples, ()) is None
    moved = data_change.change(tmp_path, before.state_dict(), now, now.samples, ())
    said = refusal(tmp_path, moved, ids)
    assert "samples: the 20 of the checkpoint, but the teacher's answers to the pool are others" in said
    assert (moved.added, len(moved.removed), moved.place_M.tolist()) == (0, 0, list(range(20)))
    assert moved.record()["setting"] == "the teacher's answers"


@pytest.mark.parametrize("damage", ["missing", "short", "other"])
def test_ids_that_are_not_those_of_the_checkpoint_are_refused(tmp_path, damage):
    every = hexes(20)
    data_of(every[:15]).keep_ids(tmp_path)
    path = next((tmp_path / "samples").iterdir())
    content = path.read_bytes()
    path.unlink() if damage == "missing" else path.write_bytes(
        content[:-16] + (b"" if damage == "short" else b"x" * 16)
    )
    with pytest.raises(CheckpointError, match=r"ids: (cannot be read|damaged).*Restore the data"):
        changed_without_writing(tmp_path, every)


def changed_without_writing(tmp_path, every):
    now = data_of(every)
    return data_change.change(tmp_path, data_of(every[:15]).state_dict(), now, now.samples, ())


def test_a_checkpoint_that_does_not_say_its_samples_is_refused(tmp_path):
    data = data_of(hexes(4))
    with pytest.raises(CheckpointError, match="an older version wrote it"):
        data_change.change(tmp_path, None, data, data.samples, ())


def test_ids_are_written_once_and_a_full_disk_is_a_refusal(tmp_path, monkeypatch):
    data = data_of(hexes(40))
    data.keep_ids(tmp_path)
    path = next((tmp_path / "samples").iterdir())
    assert path.stem == json.loads(json.dumps(data.state_dict()))["fingerprint"]
    assert path.read_bytes().hex() == "".join(s.sample_id for s in data.samples)
    before = path.stat().st_mtime_ns
    data.keep_ids(tmp_path)
    assert path.stat().st_mtime_ns == before
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="could not be written"):
        data.keep_ids(tmp_path / "file")
