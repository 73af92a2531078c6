"""Regular expressions from outside."""

from __future__ import annotations

import re


def read_pattern(text: str) -> re.Pattern[str]:
    """Compile a regular expression. Raises `ValueError` with Python's words for what is none."""
    try:
        return re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"it is no regular expression ({error})") from error
