"""Refit: what stays after a cut is fitted, in closed form, to do the work of what is gone.

`stage.refit` fits, `heal.heal` distils from there on. Recipes are read here without torch.
"""

from amoeba_export.refit.recipe import (
    HEAL_RECIPE,
    HEALED_UP_TO,
    OFF,
    SHORTLIST_RECIPE,
    Draw,
    HealSettings,
    RefitRecipe,
    load_refit_recipe,
    shipped_refits,
)

__all__ = [
    "HEALED_UP_TO",
    "HEAL_RECIPE",
    "OFF",
    "SHORTLIST_RECIPE",
    "Draw",
    "HealSettings",
    "RefitRecipe",
    "load_refit_recipe",
    "shipped_refits",
]
