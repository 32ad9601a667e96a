"""The run that these tests train in, made once; all of them start processes."""

from pathlib import Path

import pytest

from tests.helpers import training
from tests.helpers.shared import once


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder in which everything before the student's training is made."""
    return once(tmp_path_factory, "prepared", training.prepare)


@pytest.fixture
def run(prepared: Path, tmp_path: Path) -> Path:
    """A private copy of the prepared run."""
    return training.copied(prepared, tmp_path / "run")


@pytest.fixture(scope="session")
def uninterrupted(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose job was trained on two ranks with EP = 2, in one go."""
    folder = once(tmp_path_factory, "uninterrupted", lambda f: training.train(training.copied(prepared, f / "run")))
    return folder / "run"
