import os
import pickle
import signal
import time

import pytest
import s3fs

from pipeline.errors import StoreError
from pipeline.targets.container.folders import LocalFolder, ObjectFolder, folder_at
from tests.helpers.object_store import s3_bucket


@pytest.fixture(scope="module")
def bucket():
    with s3_bucket() as url:
        yield url


@pytest.fixture(params=["local", "s3"])
def folder(request, tmp_path, bucket):
    if request.param == "local":
        return folder_at(tmp_path / "not" / "yet")
    return folder_at(f"{bucket}/{request.node.name}/")


def test_the_url_decides(tmp_path):
    assert folder_at(tmp_path) == folder_at(f"file://{tmp_path}") == LocalFolder(tmp_path)
    assert folder_at("memory://a/b/") == ObjectFolder("memory://a/b")
    with pytest.raises(StoreError, match=r"nonsense://x: cannot be opened: .*nonsense"):
        folder_at("nonsense://x")


def test_a_folder_that_is_not_there_is_empty(folder):
    assert folder.names() == []
    assert folder.size("a") is None
    assert folder.age("a") is None
    assert not folder.remove("a")
    folder.touch("a")
    with pytest.raises(OSError):
        folder.read("a")


def test_files_come_back_whole_and_in_ranges(folder):
    folder.write("b", b"0123456789")
    folder.write("a", b"")
    assert folder.names() == ["a", "b"]
    assert (folder.size("a"), folder.size("b")) == (0, 10)
    assert folder.read("b") == b"0123456789"
    assert folder.read("b", 2, 5) == b"234"
    assert folder.read("b", 7) == b"789"
    assert folder.read("b", 7, 100) == b"789"
    assert folder.read("b", 4, 4) == b""
    folder.write("b", b"new")
    assert folder.read("b") == b"new"
    assert folder.size("b") == 3


def test_one_caller_creates(folder):
    assert folder.create("a", b"first")
    assert not folder.create("a", b"second")
    assert folder.read("a") == b"first"
    assert folder.remove("a")
    assert folder.create("a", b"third")
    assert folder.names() == ["a"]


def test_age_and_touch(folder):
    folder.write("a", b"x")
    time.sleep(1.2)  # object stores keep whole seconds
    before = folder.age("a")
    assert 1 <= before < 60
    folder.touch("a")
    assert folder.age("a") < before
    assert folder.read("a") == b"x"


def test_a_folder_survives_pickling_and_a_fork(folder):
    """As DataLoader workers use it: the parent has already talked to the store."""
    folder.write("a", b"content")
    copy = pickle.loads(pickle.dumps(folder))
    assert copy == folder
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(writer, folder.read("a"))
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert os.read(reader, 100) == b"content"


def test_an_object_store_that_cannot_be_reached_is_an_error_with_its_name(monkeypatch, bucket):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(StoreError, match=r"s3://bucket/x: \w+: .*127\.0\.0\.1:9"):
        folder_at("s3://bucket/x").names()
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_killed_writer_leaves_the_old_file_and_a_trace_that_goes(tmp_path):
    folder = LocalFolder(tmp_path)
    folder.write("a", b"old")
    writer = os.fork()
    if writer == 0:
        try:
            os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)
            folder.write("a", b"new")
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(writer, 0)[1]) == -signal.SIGKILL
    assert folder.read("a") == b"old"
    assert len(folder.names()) == 2
    folder.tidy({"b"})
    assert len(folder.names()) == 2
    folder.tidy({"a"})
    assert folder.names() == ["a"]
