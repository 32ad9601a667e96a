"""A stage's command line and the recipe it names: reading, merging, overriding, and explaining what is wrong.

Unknown keys are refused with a hint and all problems are reported at once. `extends: OTHER.yaml` inherits from
another recipe (deep merge); the command line overrides single values as `section.key=value` (YAML syntax).
"""

import argparse
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import ValidationError

from pipeline.errors import ConfigError
from pipeline.files import shipped
from pipeline.recipe.base import Section
from pipeline.recipe.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Arguments:
    """A stage's parsed command line."""

    recipe: Recipe
    options: argparse.Namespace


def parse_args(
    stage: str, argv: Sequence[str] | None = None, parser: argparse.ArgumentParser | None = None
) -> Arguments:
    """Parse `RECIPE.yaml [section.key=value ...]` plus a tool's own options."""
    parser = parser or argparse.ArgumentParser(prog=f"python -m tools.{stage}")
    parser.add_argument("config", type=Path, metavar="RECIPE", help="recipe (YAML)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that replace the recipe's")
    options = parser.parse_intermixed_args(argv)
    return Arguments(load_recipe(options.config, options.overrides), options)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, merge and check a recipe.

    Args:
        path: a YAML file, or the name of a recipe that comes with the package (`demo`).
        overrides: `section.key=value`, in place of the file's.

    Raises:
        ConfigError: every problem at once.
    """
    raw = _read_yaml(shipped(Path(path), "recipes"))
    for override in overrides:
        key, sign, value = override.partition("=")
        if not sign:
            raise ConfigError(f"{override!r} is not of the form section.key=value. Nothing was read or changed.")
        _set_path(raw, key.split("."), _parse_yaml(value, override))
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        lines = [line for e in error.errors() for line in _explain(e)]
        raise ConfigError(f"{path}: {len(lines)} problem(s), nothing was changed.\n  " + "\n  ".join(lines)) from None


def _read_yaml(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    if path.resolve() in seen:
        raise ConfigError(f"{path}: `extends` goes in a circle: {[str(p) for p in seen]}")
    if not path.is_file():
        raise ConfigError(f"{path}: no such recipe")
    raw = _parse_yaml(path.read_bytes(), str(path)) or {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of sections, got {type(raw).__name__}")
    base = raw.pop("extends", None)
    if not isinstance(base, str | None):
        raise ConfigError(f"{path}: `extends` names another recipe's file, got {base!r}")
    return merge(_read_yaml(path.parent / base, (*seen, path.resolve())), raw) if base else raw


def _parse_yaml(text: str | bytes, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}: not valid YAML: {error}. Nothing was changed.") from None


def merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `top`'s values in their place, key by key at every level."""
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def _set_path(raw: dict[str, Any], keys: list[str], value: object) -> None:
    for key in keys[:-1]:
        child = raw.get(key)
        raw[key] = child if isinstance(child, dict) else {}
        raw = raw[key]
    raw[keys[-1]] = value


def _explain(error: Any) -> list[str]:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        section, key = _section_at(error["loc"][:-1]), str(error["loc"][-1])
        known = sorted(section.model_fields) if section else []
        near = difflib.get_close_matches(key, known, n=1) or _further_down(section, key)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {known}"
        return [f"{where}: unknown key; {hint}"]
    if error["type"] == "value_error":
        prefix = f"{where}: " if where else ""
        return [prefix + line for line in str(error["ctx"]["error"]).splitlines()]
    return [f"{where}: {error['msg']}, got {error['input']!r}"]


def _section_at(loc: tuple[str | int, ...]) -> type[Section] | None:
    """The section at a location of the recipe."""
    kind: Any = Recipe
    for part in loc:
        section = _section_of(kind)
        if section and str(part) in section.model_fields:
            kind = section.model_fields[str(part)].annotation
        else:  # an entry of dict[str, Section] or tuple[Section, ...]
            kind = next(k for k in reversed(get_args(kind)) if k is not Ellipsis)
    return _section_of(kind)


def _further_down(section: type[Section] | None, key: str) -> list[str]:
    """Where a section's own sections have the key: `optimizer.lr` for `lr`."""
    fields = section.model_fields if section else {}
    inner = {name: _section_of(field.annotation) for name, field in fields.items()}
    return [f"{name}.{key}" for name, found in inner.items() if found and key in found.model_fields][:1]


def _section_of(kind: Any) -> type[Section] | None:
    if get_origin(kind) in (UnionType, Union):
        kind = next((k for k in get_args(kind) if k is not type(None)), None)
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None
