"""What all tests have in common: their environment, their order, and how a failing one is run again."""

import importlib
import os
import shlex
import sys
from collections.abc import Iterator

import pytest

CPU = {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
"""Set where the caller has not chosen: before anything imports torch, and inherited by every process of the tests."""
for _name, _value in CPU.items():
    os.environ.setdefault(_name, _value)

LONGEST = (
    "launchers", "bench_tools", "resuming", "expert_parallel", "ablation", "bench_moe", "teacher_options", "teacher",
    "families", "engine", "curriculum", "evaluate", "student", "report", "feature_training", "checkpoint",
    "bench_stages", "export",
)  # fmt: skip
"""Test files that take longest, by falling length."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first: with several workers none of them is left to the end."""
    if "deepspeed" in sys.modules:  # for engines that tests start without going through the training stage
        importlib.import_module("pipeline.training.operators").prepare()
    place = {f"test_{name}": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Under a failure: the command that runs this test alone."""
    report = yield
    if report.failed:
        report.sections.append(("To run it again alone", again(item.nodeid)))
    return report


def again(nodeid: str) -> str:
    """The command, in the environment that the tests have."""
    return f"make test-one T={shlex.quote(nodeid)}"
