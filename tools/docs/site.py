"""Hook of mkdocs.yml: the pages that lie beside docs/ are part of the site, and links to them lead there.

In the repository README.md is the first page and CONTRIBUTING.md stands where people look for it; the site shows the
same files. A link is written as GitHub follows it, from file to file, and rewritten here from page to page.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
BESIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "LICENSE": "LICENSE.txt",
}
"""Files of the repository's top level by their names in the site."""
LINK = re.compile(r"(?<=\]\()(?!https?:|#|mailto:)([^)#\s]+)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages of the top level."""
    for name, page in BESIDE.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links between files as links between pages."""
    written_in = next(
        (name for name, there in BESIDE.items() if there == page.file.src_uri), f"docs/{page.file.src_uri}"
    )
    here = posixpath.dirname(written_in)
    return LINK.sub(lambda link: place(posixpath.normpath(posixpath.join(here, link[1]))), markdown)


def place(path: str) -> str:
    """Where the site has a file of the repository; as it stands where it has none, which mkdocs then reports."""
    return BESIDE.get(path, path.removeprefix("docs/"))
