"""File systems without hard links or locks, by the errors that they raise: one writer still, and no endless wait."""

import errno
import fcntl
import os
import signal
import time
from pathlib import Path

import pytest

from pipeline import files
from pipeline.errors import UserError
from pipeline.files import locked
from pipeline.targets.container.folders import LocalFolder
from pipeline.teacher.stage import run_pass
from tests.helpers.teacher_run import SAMPLES, elsewhere, make_run


def fails(number):
    def call(*args, **options):
        raise OSError(number, os.strerror(number))

    return call


@pytest.fixture(params=[errno.EPERM, errno.EOPNOTSUPP])
def no_links(request, monkeypatch):
    monkeypatch.setattr(os, "link", fails(request.param))


@pytest.fixture(params=[errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def no_locks(request, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", fails(request.param))


def impatient(path):
    return locked(path, lambda holder: 0.3, lambda holder: f"{path}: held by {holder}")


def creators(folder: LocalFolder, count: int) -> int:
    """How many of `count` processes that create one file at the same time succeed."""
    gate = time.monotonic() + 0.2
    children = []
    for number in range(count):
        child = os.fork()
        if not child:
            status = 9
            try:
                time.sleep(max(0.0, gate - time.monotonic()))
                status = int(folder.create("part", bytes([number]) * 1000))
            finally:
                os._exit(status)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert set(codes) <= {0, 1}
    return sum(codes)


def test_one_of_many_creates_without_hard_links(no_links, tmp_path):
    for turn in range(5):
        folder = LocalFolder(tmp_path / str(turn))
        assert creators(folder, 6) == 1
        assert folder.names() == ["part"]
        assert len(set(folder.read("part"))) == 1 and folder.size("part") == 1000


def test_without_links_and_such_renames_it_is_refused(no_links, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_rename", lambda a, b, flag: errno.EINVAL)
    with pytest.raises(UserError, match=r"manifest: .*neither hard links nor"):
        LocalFolder(tmp_path).create("manifest", b"x")
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_not_taken_for_a_lack_of_links(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", fails(errno.ENOSPC))
    with pytest.raises(OSError, match="No space left"):
        LocalFolder(tmp_path).create("a", b"x")


def test_a_teacher_pass_without_links_and_locks(no_links, tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", fails(errno.ENOLCK))
    (tmp_path / "run").mkdir()
    recipe = elsewhere(make_run(tmp_path / "run"), tmp_path / "store")
    assert run_pass(recipe).samples == SAMPLES
    assert run_pass(recipe).shards == 0


def hold(path: Path, ready: int) -> None:
    with locked(path, lambda holder: 5.0, str):
        os.write(ready, b"x")
        time.sleep(60)


@pytest.fixture
def holder(tmp_path):
    """Another process that has the lock, in the environment of the test."""
    started = []

    def start() -> int:
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            try:
                hold(tmp_path / "lock", writer)
            finally:
                os._exit(1)
        started.append(child)
        assert os.read(reader, 1) == b"x"
        return child

    yield start
    for child in started:
        try:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        except (ProcessLookupError, ChildProcessError):
            pass


def excludes_until_dead(path, holder, capsys):
    child = holder()
    with pytest.raises(UserError, match=rf"held by process {child} on "), impatient(path):
        raise AssertionError("two at a time")
    assert f"waiting for process {child}" in capsys.readouterr().err
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with impatient(path):
        pass
    with impatient(path):
        pass


def test_a_lock_excludes_others_and_ends_with_its_process(tmp_path, holder, capsys):
    excludes_until_dead(tmp_path / "lock", holder, capsys)


def test_the_same_without_locks_of_the_file_system(no_locks, tmp_path, holder, capsys):
    excludes_until_dead(tmp_path / "lock", holder, capsys)
    assert sorted(os.listdir(tmp_path)) == ["lock"]


def test_a_stand_in_of_another_machine_is_left_alone(no_locks, tmp_path):
    (tmp_path / "lock.held").write_text("1 elsewhere")
    with pytest.raises(UserError, match="held by"), impatient(tmp_path / "lock"):
        raise AssertionError("taken from a machine that may be alive")
    assert (tmp_path / "lock.held").read_text() == "1 elsewhere"
