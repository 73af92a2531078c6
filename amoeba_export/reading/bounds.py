"""How large a figure in a file may be. Every reader asks here before it loops or allocates.

The bounds lie far above any model that exists: what passes them is a mistake or an attack.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

MAX_INT = 2**53
"""Of a figure that we compute with. Integers beyond it are not the same in every JSON reader."""
MAX_FLOAT = 1e30
"""Likewise: products of a few of them stay finite."""
MAX_ANY = 1e300
"""Of any number in a file, also of one that we carry and do not read: a float can hold it."""
MAX_DEPTH = 64
"""Levels of lists and tables in one another."""
MAX_NAME_BYTES = 255
"""Of the name of a file: the longest one that common file systems hold."""
_MAX_PATH_BYTES = 2048
"""Of a path in a file. Systems take 4096 bytes, with the folder that it is relative to."""
MAX_EXPERTS = 1024
MAX_EXPERTS_OF_ALL_LAYERS = 2**17
MAX_SIZES = {
    "num_layers": 4096,
    "hidden_size": 2**20,
    "num_heads": 2**14,
    "num_kv_heads": 2**14,
    "head_dim": 2**14,
    "ffn_size": 2**20,
    "expert_size": 2**20,
    "vocab_size": 2**24,
    "head_rows": 2**24,
    "max_positions": 2**30,
    "sliding_window": 2**30,
}
"""Of a model, by the names of `Architecture`."""


def dim_problems(dims: Mapping[str, Any], names: Iterable[str] = MAX_SIZES) -> list[str]:
    """What is no possible size among `names` of `dims`, in words. None is passed over."""
    problems = []
    for name in names:
        value = dims.get(name)
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            problems.append(f"{name} is {shown(value)}")
        elif value > MAX_SIZES[name]:
            problems.append(f"{name} is {shown(value)}, and can be {MAX_SIZES[name]} at most")
    return problems


def number_problem(value: float, *, most: float = MAX_FLOAT) -> str | None:
    """What is wrong with a number: not finite, or too large to compute with."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"is {value}"
    return f"is {shown(value)}, which is too large" if abs(value) > most else None


def shown(value: object, *, longest: int = 60) -> str:
    """A value as errors show it. Never long, and never a number that Python will not print."""
    if isinstance(value, int) and value.bit_length() > 200:
        return f"a number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= longest else f"{text[:longest]}..."


def is_name_too_long(path: str) -> bool:
    """Whether a path, or a part of it, is longer than file systems hold: asking for such a file is an OSError."""
    encoded = path.encode("utf-8", "surrogatepass")
    return len(encoded) > _MAX_PATH_BYTES or any(len(part) > MAX_NAME_BYTES for part in encoded.split(b"/"))
