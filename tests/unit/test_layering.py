"""Data flows one way: a folder imports only folders before it, and within a folder imports make no circle."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.helpers.paths import LAYERS, ROOT

PACKAGE = ROOT / "pipeline"
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """(dotted module of ours, name taken from it) of every import statement in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((a.name, "") for a in node.names if a.name.split(".")[0] == "pipeline")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "pipeline":
            yield from ((str(node.module), a.name) for a in node.names if a.name != "__version__")


def place(path: Path) -> str:
    """The word of LAYERS that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_the_order_names_every_folder_and_file_of_the_package_once_and_nothing_else():
    top = {place(path) for path in FILES} - {"__init__"}
    assert sorted(LAYERS) == sorted(top)


@pytest.mark.parametrize(
    "path", [p for p in FILES if place(p) != "__init__"], ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_imports_point_upstream(path):
    for module, name in imports(path):
        word = module.split(".")[1] if "." in module else name
        assert word in LAYERS, f"{path}: imports {name or module} from the package itself: say its module"
        assert LAYERS.index(word) <= LAYERS.index(place(path)), (
            f"{path}: {place(path)}/ may not import {module} ({word}/)"
        )


def test_no_circle_among_files():
    known = {str(p.relative_to(ROOT).with_suffix("")).replace("/", "."): p for p in FILES if p.name != "__init__.py"}
    needs: dict[str, set[str]] = {}
    for name, path in known.items():
        taken = {(f"{module}.{what}", module) for module, what in imports(path)}
        needs[name] = {next((n for n in pair if n in known), name) for pair in taken} - {name}
    assert sum(len(found) for found in needs.values()) > 200
    list(TopologicalSorter(needs).static_order())  # raises CycleError


def test_imports_are_absolute():
    """What these tests read are absolute imports."""
    for path in FILES:
        nodes = ast.walk(ast.parse(path.read_text()))
        assert not any(isinstance(node, ast.ImportFrom) and node.level for node in nodes), f"{path}: relative import"


def test_only_the_training_side_sees_deepspeed():
    allowed = {
        "models/moe.py",
        "models/native_moe.py",
        "training/engine.py",
        "training/gradients.py",
        "training/engine_state.py",
    }
    allowed |= {"training/process.py"}
    for path in FILES:
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = [a.name for n in nodes if isinstance(n, ast.Import) for a in n.names]
        names += [n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)]
        if any(name.split(".")[0] == "deepspeed" for name in names):
            where = str(path.relative_to(PACKAGE))
            assert where in allowed, f"{path}: DeepSpeed belongs to {sorted(allowed)}"
