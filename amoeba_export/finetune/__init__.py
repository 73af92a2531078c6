"""Stage 2, one-for-all fine-tuning: one run trains adapters for every shape at once (paper sec. 3.3)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from amoeba_export.finetune.settings import LowRankSettings, ObjectiveSettings, Settings

if TYPE_CHECKING:
    from amoeba_export.finetune.trainer import Finetuned, finetune_adapter

__all__ = ["Finetuned", "LowRankSettings", "ObjectiveSettings", "Settings", "finetune_adapter"]


def __getattr__(name: str) -> Any:
    """What needs torch is imported when it is used: what the settings are can be asked without."""
    if name not in ("Finetuned", "finetune_adapter"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("amoeba_export.finetune.trainer"), name)
