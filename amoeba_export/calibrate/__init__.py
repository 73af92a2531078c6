"""Calibrate: Stage 1, from a supernet and a recipe to a `Strategy`."""

from amoeba_export.calibrate.depth import DepthStrategy, search_depth
from amoeba_export.calibrate.recipe import Recipe, load_recipe, shipped_recipes
from amoeba_export.calibrate.stage import calibrate

__all__ = ["DepthStrategy", "Recipe", "calibrate", "load_recipe", "search_depth", "shipped_recipes"]
