"""Stage 2, one-for-all fine-tuning: one run trains adapters for every shape at once (paper sec. 3.3)."""

from amoeba_export.finetune.settings import LowRankSettings, ObjectiveSettings, Settings
from amoeba_export.finetune.trainer import Finetuned, finetune_adapter

__all__ = ["Finetuned", "LowRankSettings", "ObjectiveSettings", "Settings", "finetune_adapter"]
