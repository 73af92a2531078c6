"""Calibrate: Stage 1, from a supernet and a recipe to a `Strategy`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from amoeba_export.calibrate.recipe import Recipe, load_recipe, shipped_recipes

if TYPE_CHECKING:
    from amoeba_export.calibrate.depth import DepthStrategy, search_depth
    from amoeba_export.calibrate.stage import calibrate

__all__ = ["DepthStrategy", "Recipe", "calibrate", "load_recipe", "search_depth", "shipped_recipes"]

_LATER = {"DepthStrategy": "depth", "search_depth": "depth", "calibrate": "stage"}


def __getattr__(name: str) -> Any:
    """What needs torch is imported when it is used: what a recipe is can be asked without."""
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
