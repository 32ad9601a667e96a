"""A CUDA device's numbers against the CPU's. Tiny, but real kernels: where tests on CPUs cannot look."""

from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    absent = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.gpu)
            item.add_marker(absent)


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda")
