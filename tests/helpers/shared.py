"""Folders that take long to make: once in a test session, for all of its workers."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The folder that `make` has filled: by this call, or by another one of the session. Nobody may change it.

    Args:
        factory: pytest's fixture `tmp_path_factory`.
        name: of the folder; the same for all workers.
        make: receives the folder, which is there and empty.
    """
    base = factory.getbasetemp()
    session = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base  # a worker's own is a folder in it
    folder, made = session / f"shared-{name}", session / f"shared-{name}.made"
    with FileLock(session / f"shared-{name}.lock"):
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)  # another worker failed to make it, and its test said why
            folder.mkdir()
            make(folder)
            made.touch()
    return folder
