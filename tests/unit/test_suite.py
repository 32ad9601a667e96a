"""The suite's own promises: no test file imports another, names are unique, and a failure says how to run it again."""

import ast
import shlex
from collections import Counter

import pytest

from tests.conftest import again
from tests.helpers.paths import ROOT

FILES = sorted((ROOT / "tests").rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_imports_a_test_file(path):
    nodes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)]
    imported = {f"{node.module}.{alias.name}" for node in nodes for alias in node.names}
    assert not [name for name in imported if any(part.startswith("test_") for part in name.split("."))]


def test_names_of_test_files_are_unique():
    """pytest imports them by their bare names."""
    names = Counter(path.name for path in FILES if path.name.startswith("test_"))
    assert [name for name, count in names.items() if count > 1] == []


def test_a_failure_says_how_to_run_it_again(pytester):
    """With the suite's own conftest, a test that fails and one that passes."""
    pytester.makeconftest((ROOT / "tests" / "conftest.py").read_text())
    pytester.makepyfile(test_x="def test_bad():\n    assert False\n\ndef test_good():\n    pass\n")
    result = pytester.runpytest_inprocess()
    result.assert_outcomes(passed=1, failed=1)
    assert [line for line in result.outlines if line.startswith("make test-one")] == [again("test_x.py::test_bad")]


def test_the_command_survives_a_shell():
    nodeid = "tests/unit/test_x.py::test_x[it's a $ b]"
    assert shlex.split(again(nodeid)) == ["make", "test-one", f"T={nodeid}"]
