"""What a container stores, weight by weight, read without the runtime that runs it.

Names are those of the family with layers counted from 0, whatever the container calls its tensors; shapes are
those of the plan. What a container adds to the plan's weights (zeros that a runtime wants) is checked to be zero here.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from amoeba_export.verify.stored.gguf import GgufWeights
from amoeba_export.verify.stored.onnx import OnnxWeights
from amoeba_export.verify.stored.safetensors import SafetensorsWeights
from amoeba_export.verify.stored.tensor import Shapes, Stored, StoredWeights, Wanted

STORED: Mapping[str, Callable[[Path, Wanted], StoredWeights]] = {
    "safetensors": SafetensorsWeights,
    "onnx": OnnxWeights,
    "gguf": GgufWeights,
}
"""By the folder's name in an artifact."""

__all__ = ["STORED", "Shapes", "Stored", "StoredWeights", "Wanted"]
