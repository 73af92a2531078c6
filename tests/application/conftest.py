"""An export is refitted on the texts that the refit is tested on."""

from tests.refit.conftest import recipe, texts

__all__ = ["recipe", "texts"]
