"""The templates beside this file, with the words that they share."""

from __future__ import annotations

from typing import Any

import jinja2

from amoeba_export.builds.report import wording


def render(name: str, **values: Any) -> str:
    """Fill the template `name`. Names ending in `.html.j2` are escaped for HTML."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("amoeba_export.builds.report", "."),
        autoescape=lambda template: bool(template and template.endswith(".html.j2")),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["cell"] = _cell
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


def _cell(text: str) -> str:
    """Text that neither ends a Markdown table cell nor starts a new line."""
    return " ".join(str(text).split()).replace("|", "\\|")
