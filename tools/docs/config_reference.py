"""The configuration reference, made from the recipe's own schema: keys, types, defaults and what they mean.

    python -m tools.docs.config_reference > docs/CONFIG.md

Meanings are the docstrings in `pipeline/recipe/`, a file a part; a test fails when docs/CONFIG.md is behind them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from pipeline.recipe import Recipe, Section

INTRO = """\
# Configuration reference

*Made by `python -m tools.docs.config_reference > docs/CONFIG.md` from `pipeline/recipe/`; do not edit.*

A recipe is one YAML file with these parts. Unknown keys are refused, and all problems are reported at once.
`extends: OTHER.yaml` (a path relative to the recipe) inherits from another recipe: mappings are merged, everything
else is replaced. Any value can be given on the command line as `section.key=value`, in YAML syntax.

`NAME` stands for a name of your choice. A *model reference* is `models.NAME` (also for a name of `benchmark.models`),
`jobs.NAME` (that job's final model) or a checkpoint folder. Defaults are for full fine-tuning of a pretrained Qwen3-VL
of 2B to 8B; those of the embedded benchmark are in `benchmark` alone.
"""
NAMES = {int: "integer", float: "number", str: "text", bool: "true or false", Path: "path", NoneType: "null"}
BOUNDS = {Ge: ("ge", "≥"), Gt: ("gt", ">"), Le: ("le", "≤"), Lt: ("lt", "<")}


@dataclass(frozen=True, slots=True)
class Place:
    """A section and where it stands in a recipe."""

    path: str
    """Dotted, empty for the recipe itself."""
    section: type[Section]

    @property
    def heading(self) -> str:
        """A part of the recipe is a chapter; the sections inside it follow, one level deeper."""
        if not self.path:
            return "## The recipe"
        depth = 2 if "." not in self.path.replace(".NAME", "") else 3
        return f"{'#' * depth} `{self.path}`"


def places(section: type[Section] = Recipe, path: str = "") -> Iterator[Place]:
    """Every section that a recipe can hold, depth first, in the schema's order."""
    yield Place(path, section)
    for name, field in section.model_fields.items():
        found = _inner_section(field.annotation)
        if found:
            child, suffix = found
            yield from places(child, f"{path}.{name}{suffix}".lstrip("."))


def _inner_section(kind: Any) -> tuple[type[Section], str] | None:
    """The section inside a field's type, and how its entries are addressed: `.NAME`, `[i]` or nothing."""
    if isinstance(kind, type) and issubclass(kind, Section):
        return kind, ""
    origin = get_origin(kind)
    suffix = ".NAME" if origin is dict else "[i]" if origin is tuple else ""
    found = next(filter(None, map(_inner_section, get_args(kind))), None)
    return (found[0], suffix + found[1]) if found else None


def type_text(kind: Any, metadata: Sequence[Any] = ()) -> str:
    """A type in plain words, with its bounds: `integer ≥ 1, or null`."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        inner = [bound for item in args[1:] for bound in getattr(item, "metadata", [item])]
        return type_text(args[0], [*inner, *metadata])
    if origin in (Union, UnionType):
        return ", or ".join(type_text(arg, () if arg is NoneType else metadata) for arg in args)
    if origin is Literal:
        return ", ".join(f"`{arg}`" for arg in args)
    if origin is dict:
        return f"mapping of names to {type_text(args[1])}"
    if origin is tuple:
        length = "" if args[-1] is Ellipsis else f"{len(args)} x "
        return f"list of {length}{type_text(args[0])}"
    if isinstance(kind, type) and issubclass(kind, Section):
        return "section"
    bounds = [f"{BOUNDS[type(b)][1]} {getattr(b, BOUNDS[type(b)][0])}" for b in metadata if type(b) in BOUNDS]
    return " ".join([NAMES[kind], " and ".join(bounds)]).strip()


def default_text(field: FieldInfo) -> str:
    """The default as one would write it in YAML."""
    if field.is_required():
        return "**required**"
    value = field.default
    if isinstance(value, Section):
        return "its defaults"
    if isinstance(value, bool) or value is None:
        return {True: "`true`", False: "`false`", None: "`null`"}[value]
    return f"`{list(value) if isinstance(value, tuple) else value}`"


def table(place: Place) -> str:
    """One section as Markdown: heading, docstring, a row per key."""
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, field in place.section.model_fields.items():
        kind = type_text(field.annotation, field.metadata)
        inner = _inner_section(field.annotation)
        meaning = field.description or (inner[0].__doc__ if inner else None) or ""
        cells = (f"`{name}`", kind, default_text(field), " ".join(meaning.split()))
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    about = " ".join((place.section.__doc__ or "").split())
    return "\n".join([place.heading, "", about, "", *rows, ""])


def render() -> str:
    """The whole reference as Markdown."""
    return "\n".join([INTRO, *map(table, places())])


if __name__ == "__main__":
    print(render(), end="")
