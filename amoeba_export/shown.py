"""Text of others on its way out: names and messages out of files, that a terminal, Markdown or HTML would act on.

Applied where text leaves (the console, a template), not where it is made.
"""

from __future__ import annotations

import re
import unicodedata

_HIDDEN = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
"""They turn the direction of what follows, so that text reads otherwise than it is."""

_MARKDOWN = re.compile(r"[\\`*\[\]<>|]|&(?=#?\w+;)|(?<!\w)_|_(?!\w)")


def an(name: object, *, begins: bool = False) -> str:
    """A name behind its article, which may begin a sentence: a llama, an olmo2, An exaone4."""
    article = "an" if str(name)[:1].lower() in tuple("aeiou") else "a"
    return f"{article.capitalize() if begins else article} {name}"


def for_terminal(text: str) -> str:
    r"""`text` with what is not seen spelled out, as `\x1b`: control characters, turns of direction, half characters.

    Lines and tabs stay. Doing it twice changes nothing.
    """
    if text.isprintable():
        return text
    return "".join(character if _is_seen(character) else _spelled(character) for character in text)


def for_markdown(text: object) -> str:
    """One line of plain text inside Markdown: no markup, HTML, link or table cell begins or ends in it."""
    line = " ".join(for_terminal(str(text)).split())
    return _MARKDOWN.sub(lambda found: _ENTITIES.get(found[0], f"\\{found[0]}"), line)


def as_code(text: object) -> str:
    """The same as code, between as many backticks as it takes."""
    line = " ".join(for_terminal(str(text)).split())
    longest = max((len(run) for run in re.findall("`+", line)), default=0)
    fence, space = "`" * (longest + 1), " " if longest else ""
    return f"{fence}{space}{line}{space}{fence}"


_ENTITIES = {"<": "&lt;", ">": "&gt;", "&": "&amp;"}


def _is_seen(character: str) -> bool:
    if character in "\n\t":
        return True
    is_character = unicodedata.category(character) not in ("Cc", "Cs", "Zl", "Zp") and character not in "\ufffe\uffff"
    return is_character and character not in _HIDDEN


def _spelled(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
