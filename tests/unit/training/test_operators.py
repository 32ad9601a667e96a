"""A killed process must not make every later one wait for its lock on an operator."""

import os
import signal
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow
CLEAR = "from pipeline.training.operators import clear_stale_locks; clear_stale_locks(); print('ready', flush=True); "


def start(root, then):
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(root)}
    process = subprocess.Popen(
        (sys.executable, "-c", CLEAR + then), env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def test_a_lock_goes_with_the_last_process_that_may_hold_it(tmp_path):
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    lock.touch()
    loading = start(tmp_path, "input()")
    assert not lock.exists()  # left by somebody before
    lock.touch()
    assert start(tmp_path, "").wait() == 0
    assert lock.exists()  # the first one lives, and it may be its lock
    loading.send_signal(signal.SIGKILL)
    loading.wait()
    assert start(tmp_path, "").wait() == 0
    assert not lock.exists()


def test_a_folder_that_cannot_be_written_is_left_to_torch(tmp_path):
    (tmp_path / "file").touch()
    assert start(tmp_path / "file", "").wait() == 0
