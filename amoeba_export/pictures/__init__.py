"""Pictures of what was measured and chosen: marks for pages, figures for files. One home for all drawing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from amoeba_export.ir.frontier import Frontier
from amoeba_export.pictures.figures import (
    Ratio,
    SizedPoint,
    check_picture,
    draw_frontiers,
    draw_ratios,
    draw_sizes,
)
from amoeba_export.pictures.frontier import FrontierPicture, frontier_picture
from amoeba_export.pictures.pages import NARROW, WIDE, frontier_page
from amoeba_export.pictures.plan import PlanPicture, plan_picture
from amoeba_export.pictures.templates import render
from amoeba_export.replacing import replace_text

__all__ = [
    "NARROW",
    "WIDE",
    "FrontierPicture",
    "PlanPicture",
    "Ratio",
    "SizedPoint",
    "check_frontier_file",
    "check_picture",
    "draw_frontiers",
    "draw_ratios",
    "draw_sizes",
    "frontier_page",
    "frontier_picture",
    "plan_picture",
    "render",
    "write_frontiers",
]

PAGE, DATA = ".html", ".json"


def check_frontier_file(path: Path) -> Path:
    """`path`, if a frontier can be written there: a picture, a page or data. Raises as `check_picture`."""
    return check_picture(path, (PAGE, DATA))


def write_frontiers(frontiers: Sequence[Frontier], path: Path) -> None:
    """A picture, a page or data, as the file's name ends. Raises as `check_frontier_file`."""
    check_frontier_file(path)
    if path.suffix.lower() == PAGE:
        replace_text(path, frontier_page(frontiers))
    elif path.suffix.lower() == DATA:
        data = [one.to_json() for one in frontiers]
        replace_text(path, json.dumps(data[0] if len(data) == 1 else data, indent=1, allow_nan=False) + "\n")
    else:
        draw_frontiers(frontiers, path)
