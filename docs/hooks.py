"""For MkDocs: links that leave `docs/` lead to the repository, and those to a page that is a symbolic link to the page.

The Markdown files are read on GitHub, too, so their links are paths of the repository. A link to nothing is an error.
On a page, lines end neither inside an option nor between a number and its unit.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"

_LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^()\s#]+)(#[^()\s]*)?(?=\))")
_CODE = re.compile(r"(<pre.*?</pre>|<code>[^<]*</code>)", re.DOTALL)
_OPTION = re.compile(r"(?<![\w-])--?\w[\w-]*")
_SPACE_OF_UNIT = re.compile(r"(?<=\d) (?=(?:%|[µmn]?s|[KMG]i?B)(?![\w/]))")


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """The page with its relative links as the site needs them."""
    source = Path(page.file.abs_src_path)
    repository = config["extra"]["repository"]
    return _LINK.sub(lambda match: resolved(match[1], source, repository) + (match[2] or ""), markdown)


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """The page with what belongs together on one line."""
    return kept_together(html)


def kept_together(html: str) -> str:
    """`html` with a span around each option in inline code, and spaces that do not break before units in text."""
    parts = _CODE.split(html)
    parts[::2] = [_SPACE_OF_UNIT.sub("\u00a0", text) for text in parts[::2]]
    parts[1::2] = [
        code if code.startswith("<pre") else _OPTION.sub(r'<span class="option">\g<0></span>', code)
        for code in parts[1::2]
    ]
    return "".join(parts)


def resolved(link: str, source: Path, repository: str) -> str:
    """Where `link` in the page `source` leads.

    Raises:
        FileNotFoundError: Nothing is there.
    """
    target = (source.resolve().parent / link).resolve()
    if not target.exists():
        raise FileNotFoundError(f"{source.name} links to {link}, which is not there")
    inside = pages().get(target)
    if inside is not None:
        return os.path.relpath(inside, source.parent)
    if target.is_relative_to(DOCS):
        return os.path.relpath(target, source.parent)
    kind = "tree" if target.is_dir() else "blob"
    return f"{repository}/{kind}/main/{target.relative_to(ROOT).as_posix()}"


def pages() -> dict[Path, Path]:
    """Files outside of `docs/` that are pages of the site, and the links that make them pages."""
    return {link.resolve(): link for link in DOCS.glob("*.md") if link.is_symlink()}
