"""Folders of the project, for tests that start its commands or read its files."""

from pathlib import Path

HELPERS = Path(__file__).parent
ROOT = HELPERS.parent.parent
RECIPES = ROOT / "pipeline" / "recipes"
FROM_NOTHING = ROOT / "tools" / "bench" / "from_nothing.yaml"
"""A chain whose teacher is trained first."""
LAYERS = (
    "errors", "files", "recipe", "data", "benchmark", "targets", "method", "models", "teacher", "export", "training",
    "evaluation", "report", "hardness", "cluster", "preparation", "cli", "__main__",
)  # fmt: skip
"""What stands in pipeline/, in the order of imports: each imports only what stands before it."""
