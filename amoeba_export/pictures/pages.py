"""A page with frontiers: the pictures, and their choices as a table."""

from __future__ import annotations

from collections.abc import Sequence

from amoeba_export.ir.frontier import Frontier
from amoeba_export.pictures.frontier import frontier_picture
from amoeba_export.pictures.templates import render

WIDE = (760.0, 440.0)
NARROW = (380.0, 320.0)


def frontier_page(frontiers: Sequence[Frontier]) -> str:
    """One self-contained HTML page."""
    first = frontiers[0]
    title = f"{first.model} on {first.target}" if len(frontiers) == 1 else "Latency and quality"
    work = first.workload
    summary = (
        f"{first.metric} p{first.percentile} for {work.prompt_tokens}+{work.generate_tokens} tokens, batch "
        f"{work.batch}, against {first.quality_metric}."
    )
    drawn = [(one, *(frontier_picture(one, width=w, height=h) for w, h in (WIDE, NARROW))) for one in frontiers]
    return render("frontier.html.j2", title=title, summary=summary, drawn=drawn)
