"""Refit: what stays after a cut is fitted, in closed form, to do the work of what is gone."""

from amoeba_export.refit.recipe import RefitRecipe, load_refit_recipe, shipped_refits
from amoeba_export.refit.stage import Refitted, adapter_ids, refit

__all__ = ["RefitRecipe", "Refitted", "adapter_ids", "load_refit_recipe", "refit", "shipped_refits"]
