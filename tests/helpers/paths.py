"""Folders of the project, for tests that start its commands or read its files."""

from pathlib import Path

HELPERS = Path(__file__).parent
ROOT = HELPERS.parent.parent
RECIPES = ROOT / "pipeline" / "recipes"
