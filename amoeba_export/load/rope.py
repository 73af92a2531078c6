"""RoPE as configs spell it: `rope_theta` with `rope_scaling` (transformers 4) or `rope_parameters` (transformers 5)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from amoeba_export.errors import InputError, UnsupportedError
from amoeba_export.reading.bounds import MAX_FLOAT, shown

DEFAULT_THETA = 10000.0
STRETCHED_TYPES = ("yarn", "longrope", "llama3")
"""Types that depend on the length that the model was first trained with."""
NUMBERS = (
    *("rope_theta", "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
    *("mscale", "mscale_all_dim", "low_freq_factor", "high_freq_factor"),
)
"""Parameters that are positive numbers, in whatever type."""
KNOWN_TYPES = ("default", "linear", "dynamic", *STRETCHED_TYPES)


def read_rope(config: Mapping[str, Any], *, max_positions: int, where: Path) -> tuple[float, dict[str, Any] | None]:
    """Base and scaling of a config.

    Where both spellings are present, `rope_scaling` goes before `rope_parameters` and a base inside either goes before
    the top-level `rope_theta`: the order of transformers 5 (`RotaryEmbeddingConfigMixin`), which reads our output too.

    Args:
        config: Of the model.
        max_positions: Stands for `original_max_position_embeddings` where a type needs it and the config leaves it out.
        where: The config's file.

    Returns:
        The base, and the other parameters with `rope_type` among them, or None for plain RoPE.

    Raises:
        UnsupportedError: RoPE that differs between layers, covers part of a head, or has an unknown type.
    """
    parameters = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(parameters, dict):
        raise _nonsense(f"its RoPE parameters are {shown(parameters)}, not a table", where)
    parameters = dict(parameters)
    if any(isinstance(value, Mapping) for value in parameters.values()):
        raise UnsupportedError(
            f"RoPE that differs between layers is not supported: {', '.join(sorted(parameters))}.",
            where=where,
            next_step="Use a model with one RoPE for all layers.",
        )
    theta = parameters.pop("rope_theta", None) or config.get("rope_theta") or DEFAULT_THETA
    legacy_type = parameters.pop("type", "default")
    rope_type = parameters.setdefault("rope_type", legacy_type)
    if rope_type not in KNOWN_TYPES:
        raise UnsupportedError(
            f"RoPE of type '{rope_type}' is not supported.",
            where=where,
            next_step=f"Use a model whose RoPE is one of: {', '.join(KNOWN_TYPES)}.",
        )
    if parameters.pop("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedError(
            "RoPE over a part of each head is not supported.",
            where=where,
            next_step="Use a model that rotates whole heads.",
        )
    if rope_type in STRETCHED_TYPES:
        parameters.setdefault("original_max_position_embeddings", max_positions)
    _check_numbers({"rope_theta": theta} | parameters, where)
    return float(theta), None if rope_type == "default" else parameters


def _check_numbers(parameters: Mapping[str, Any], where: Path) -> None:
    """Refuse what no rotation can be computed from. None stands for a default."""
    for name in NUMBERS:
        value = parameters.get(name)
        if value is None:
            continue
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= MAX_FLOAT:
            raise _nonsense(f"{name} is {shown(value)}", where)
    for name in ("short_factor", "long_factor"):
        factors = parameters.get(name, [])
        if not isinstance(factors, list) or not all(
            isinstance(factor, int | float) and 0 < factor <= MAX_FLOAT for factor in factors
        ):
            raise _nonsense(f"{name} is not a list of positive numbers", where)


def _nonsense(problem: str, where: Path) -> InputError:
    return InputError(
        f"The config of the model makes no sense: {problem}.",
        where=where,
        next_step="Get config.json again from where the weights come from.",
    )
