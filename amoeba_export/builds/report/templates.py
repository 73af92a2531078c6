"""The templates beside this file, with the words that they share."""

from __future__ import annotations

from typing import Any

import jinja2
from markupsafe import Markup

from amoeba_export.builds.report import wording
from amoeba_export.shown import for_markdown, for_terminal


def render(name: str, **values: Any) -> str:
    """Fill the template `name` with text, which is escaped for HTML or for Markdown, as the name ends."""
    is_html = name.endswith(".html.j2")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("amoeba_export.builds.report", "."),
        autoescape=is_html,
        finalize=_plain if is_html else for_markdown,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    for function in (
        wording.artifact_bytes,
        wording.megabytes,
        wording.milliseconds,
        wording.reached,
        wording.use,
    ):
        environment.globals[function.__name__] = function
    verdict = wording.verdict(values["report"])
    return environment.get_template(name).render(verdict=verdict, **values)


def _plain(value: Any) -> Any:
    """Escaping for HTML follows; what escaping leaves as it is, a browser shows or a reader misreads."""
    return for_terminal(value) if isinstance(value, str) and not isinstance(value, Markup) else value
