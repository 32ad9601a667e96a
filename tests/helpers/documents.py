"""The project's pages as tests read them: fenced blocks, commands, code spans, links and headings."""

import itertools
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.paths import ROOT

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    (ROOT / "docs").glob("*.md")
)
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"`([^`]+)`")
_LINK = re.compile(r"\]\((?!https?:)([^)\s]+)\)")


@dataclass(frozen=True, slots=True)
class Found:
    """A piece of a page."""

    page: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(*languages: str) -> Iterator[Found]:
    """Fenced blocks of these languages, in order; "" for those without one."""
    for page in PAGES:
        text = page.read_text()
        for block in _BLOCK.finditer(text):
            if block[1] in languages:
                yield Found(_name(page), text[: block.start()].count("\n") + 2, block[2])


def commands() -> Iterator[tuple[Found, list[str]]]:
    """Each command of the `sh` blocks with its words: comments gone, continued lines joined, `a && b` as two."""
    for block in blocks("sh"):
        pending = ""
        for number, line in enumerate(block.text.splitlines(), block.line):
            pending += line.removesuffix("\\") + ("" if line.endswith("\\") else "\n")
            try:
                words = [] if line.endswith("\\") else shlex.split(pending, comments=True)
            except ValueError:  # an open quotation: goes on in the next line
                continue
            if not words:
                continue
            for is_break, group in itertools.groupby(words, lambda word: word == "&&"):
                if not is_break:
                    yield Found(block.page, number, pending.strip()), list(group)
            pending = ""
        assert not pending.strip(), f"{block}: a command without its end: {pending}"


def spans() -> Iterator[Found]:
    """Code spans outside of fenced blocks."""
    for page, text in _prose():
        for span in _SPAN.finditer(text):
            yield Found(page, text[: span.start()].count("\n") + 1, " ".join(span[1].split()))


def links() -> Iterator[Found]:
    """Links within the project: a file of the repository from the page's folder, a heading, or both."""
    for page, text in _prose():
        for link in _LINK.finditer(text):
            yield Found(page, text[: link.start()].count("\n") + 1, link[1])


def headings(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub and the site make them."""
    text = _without_blocks(page.read_text())
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def _prose() -> Iterator[tuple[str, str]]:
    for page in PAGES:
        yield _name(page), _without_blocks(page.read_text())


def _without_blocks(text: str) -> str:
    """The text with the lines of its fenced blocks empty, so that line numbers stay."""
    return _BLOCK.sub(lambda block: "\n" * block[0].count("\n"), text)


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))
