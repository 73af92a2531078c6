"""The keys of a GGUF file's architecture, each of which must be asked for or be harmless.

llama.cpp computes from the keys of its architecture and ignores what it does not know. Here every key is read, or
known to change nothing, or refused by name: a key that is new to us may be one that scales, caps or masks something.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from amoeba_export.errors import DamagedFile, UnsupportedError
from amoeba_export.gguf_file import GgufFile
from amoeba_export.llama_cpp.architectures import LlamaCppArchitecture

NEXT_STEP = "Give the model as a Hugging Face folder instead."

_NEUTRAL: Mapping[str, Collection[Any]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.temperature_scale": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "embedding_scale": (0.0, 1.0),
    "expert_count": (0,),
    "expert_gating_func": (0, 1),
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "expert_used_count": (0,),
    "expert_weights_norm": (True,),
    "expert_weights_scale": (0.0, 1.0),
    "final_logit_softcapping": (0.0,),
    "logit_scale": (0.0, 1.0),
    "nextn_predict_layers": (0,),
    "residual_scale": (0.0, 1.0),
    "rope.scaling.yarn_log_multiplier": (0.0,),
}
"""Key -> the values of it that change nothing. 0 means unset to llama.cpp. Experts stand in one group, are gated by
softmax (1), and their shares sum to 1."""

_DESCRIPTIVE = ("vocab_size", "tensor_data_layout", "use_parallel_residual")
"""Say nothing that llama.cpp computes with in these architectures; the vocabulary's size is that of the embedding."""


def decimal(value: float) -> float:
    """The shortest decimal of a number that was rounded to fp32: what it was before."""
    return float(str(np.float32(value)))


class Keys:
    """The keys of the architecture, each of which must be asked for or be harmless."""

    def __init__(self, file: GgufFile, arch: LlamaCppArchitecture) -> None:
        self._path = file.path
        self.arch = arch
        self._arch = arch.name
        prefix = f"{arch.name}."
        self._left = {key.removeprefix(prefix): v for key, v in file.fields.items() if key.startswith(prefix)}

    def take(self, key: str, default: Any = None) -> Any:
        """The value as it is. Raises `DamagedFile` when it is missing and has no default."""
        value = self._left.pop(key, default)
        if value is None:
            raise DamagedFile(self._path, f"it does not say {self._arch}.{key}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number. Raises as `take`."""
        value = self.take(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise DamagedFile(self._path, f"{self._arch}.{key} is {str(value)[:60]}, which is no number")
        return float(value)

    def count(self, key: str, default: int | None = None) -> int:
        """A size above 0. Raises as `take`."""
        value = self.take(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 31:
            raise DamagedFile(self._path, f"{self._arch}.{key} is {str(value)[:60]}, which is no size")
        return value

    def per_layer(self, key: str, num_layers: int, default: list[int] | None = None) -> list[int]:
        """One number for all layers, or one for each."""
        value = self.take(key, default)
        values = value if isinstance(value, list) else [value]
        sane = all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 1 << 24 for v in values)
        if not sane or (isinstance(value, list) and len(value) != num_layers) or num_layers > 1 << 16:
            raise DamagedFile(self._path, f"{self._arch}.{key} does not have a size for each of {num_layers} layers")
        return values if isinstance(value, list) else values * num_layers

    def refused(self, key: str, value: Any, why: str) -> UnsupportedError:
        """The error for a value that changes what we do not compute."""
        return UnsupportedError(
            f"A GGUF file with {self._arch}.{key} = {str(value)[:60]} is not supported: {why}.",
            where=self._path,
            next_step=NEXT_STEP,
        )

    def finish(self) -> None:
        """Refuse what is left and not known to be harmless."""
        for key, value in self._left.items():
            if key not in _DESCRIPTIVE and not (isinstance(value, int | float) and value in _NEUTRAL.get(key, ())):
                raise self.refused(key, value, "we do not know what it changes")
