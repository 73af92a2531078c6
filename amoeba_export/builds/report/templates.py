"""The templates beside this file, with the words that they share."""

from __future__ import annotations

from typing import Any

from amoeba_export import pictures
from amoeba_export.builds.report import wording


def render(name: str, **values: Any) -> str:
    """Fill the template `name` with text, which is escaped for HTML or for Markdown, as the name ends."""
    words = (wording.artifact_bytes, wording.megabytes, wording.milliseconds, wording.reached, wording.use)
    return pictures.render(
        name,
        package="amoeba_export.builds.report",
        functions={function.__name__: function for function in words},
        verdict=wording.verdict(values["report"]),
        **values,
    )
