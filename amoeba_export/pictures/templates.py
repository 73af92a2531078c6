"""Pages from templates: self-contained, escaped, without scripts; light and dark, wide and narrow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jinja2
from markupsafe import Markup

from amoeba_export.quantities import milliseconds, percent
from amoeba_export.shown import for_markdown, for_terminal

OWN = "amoeba_export.pictures"


def render(
    name: str, *, package: str = OWN, functions: Mapping[str, Callable[..., Any]] | None = None, **values: Any
) -> str:
    """Fill the template `name` of `package` with text, which is escaped for HTML or for Markdown, as the name ends.

    Args:
        name: It may extend and import the templates beside this file.
        package: Where it is.
        functions: What it may call besides `milliseconds` and `percent`.
        values: What it shows.
    """
    is_html = name.endswith(".html.j2")
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader(one, ".") for one in dict.fromkeys((package, OWN))]),
        autoescape=is_html,
        finalize=_plain if is_html else for_markdown,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals |= {"milliseconds": milliseconds, "percent": percent, **(functions or {})}
    return environment.get_template(name).render(**values)


def _plain(value: Any) -> Any:
    """Escaping for HTML follows; what escaping leaves as it is, a browser shows or a reader misreads."""
    return for_terminal(value) if isinstance(value, str) and not isinstance(value, Markup) else value
