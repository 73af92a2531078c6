"""Pages with the files, or parts of files, that their blocks of code are `from`. GitHub includes nothing by itself."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]

_BLOCK = re.compile(r"(<!-- from ([^\s:]+)(?::([\w-]+))? -->\n```\w+\n).*?(^```$)", re.MULTILINE | re.DOTALL)


def with_pieces(page: Path) -> str:
    """The text of a page with its blocks filled."""
    text = page.read_text(encoding="utf-8")
    return _BLOCK.sub(lambda block: block[1] + _piece(block[2], block[3]) + block[4], text)


def _piece(file: str, part: str | None) -> str:
    """A file of the repository, or what is between `[start:part]` and `[end:part]` in it."""
    text = (ROOT / file).read_text(encoding="utf-8")
    if part is None:
        return text
    return text.split(f"[start:{part}]\n")[1].split(f"# [end:{part}]")[0]
