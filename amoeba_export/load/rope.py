"""RoPE as configs spell it: `rope_theta` with `rope_scaling` (transformers 4) or `rope_parameters` (transformers 5)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from amoeba_export.errors import InputError, UnsupportedError
from amoeba_export.ir import Architecture
from amoeba_export.reading.bounds import MAX_FLOAT, shown

NO_NAMES: Mapping[str, str] = {}
DEFAULT_THETA = 10000.0
STRETCHED_TYPES = ("yarn", "longrope", "llama3")
"""Types that depend on the length that the model was first trained with."""
NUMBERS = (
    *("rope_theta", "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
    *("mscale", "mscale_all_dim", "low_freq_factor", "high_freq_factor"),
)
"""Parameters that are positive numbers, in whatever type."""
KNOWN_TYPES = ("default", "linear", "dynamic", *STRETCHED_TYPES)
_NEEDED: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": ("original_max_position_embeddings",),
}
"""Numbers that a type cannot do without."""
_OPTIONAL = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
"""Null here means that the key is not there (transformers `modeling_rope_utils`)."""


def read_rope(
    config: Mapping[str, Any],
    *,
    max_positions: int,
    where: Path,
    default_theta: float | None = None,
    renamed: Mapping[str, str] = NO_NAMES,
) -> tuple[float, dict[str, Any] | None, float]:
    """Base, scaling, and the share of each head that is rotated, of a config with one RoPE.

    Where both spellings are present, `rope_scaling` goes before `rope_parameters` and a base inside either goes before
    the top-level `rope_theta`: the order of transformers 5 (`RotaryEmbeddingConfigMixin`), which reads our output too.

    Args:
        config: Of the model.
        max_positions: Stands for `original_max_position_embeddings` where a type needs it and the config leaves it out.
        where: The config's file.
        default_theta: The base where the config has none; None for `DEFAULT_THETA`.
        renamed: Old names of types.

    Returns:
        The base; the other parameters with `rope_type` among them, or None for plain RoPE; the share.

    Raises:
        InputError: Parameters that are no table, or a number that its type needs is missing or is none.
        UnsupportedError: RoPE that differs between layers, or has an unknown type.
    """
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    given = config.get(key) or {}
    if not isinstance(given, dict):
        raise _nonsense(f"{key} is {shown(given)}, not a table", where)
    parameters = {name: value for name, value in given.items() if value is not None or name not in _OPTIONAL}
    if any(isinstance(value, Mapping) for value in parameters.values()):
        raise UnsupportedError(
            f"RoPE that differs between layers is not supported: {', '.join(sorted(parameters))}.",
            where=where,
            next_step="Use a model with one RoPE for all layers.",
        )
    theta = parameters.pop("rope_theta", None) or config.get("rope_theta") or default_theta or DEFAULT_THETA
    legacy_type = parameters.pop("type", "default")
    rope_type = parameters.setdefault("rope_type", legacy_type)
    if not isinstance(rope_type, str):
        raise _nonsense(f"{key}.rope_type is {shown(rope_type)}, not a name", where)
    if rope_type in renamed:
        rope_type = parameters["rope_type"] = renamed[rope_type]
    if rope_type not in KNOWN_TYPES:
        raise UnsupportedError(
            f"RoPE of type '{rope_type}' is not supported.",
            where=where,
            next_step=f"Use a model whose RoPE is one of: {', '.join(KNOWN_TYPES)}.",
        )
    share = _rotated_share(parameters.pop("partial_rotary_factor", None), config, where)
    if rope_type in STRETCHED_TYPES:
        _fill_lengths(parameters, config, max_positions, where)
    _check_numbers({"rope_theta": theta} | parameters, where)
    for name in _NEEDED.get(rope_type, ()):
        if parameters.get(name) is None:
            raise _nonsense(f"{key}.{name} is null or missing, and RoPE of type {rope_type} needs it", where)
    return float(theta), None if rope_type == "default" else parameters, share


def _rotated_share(inside: Any, config: Mapping[str, Any], where: Path) -> float:
    """The share of each head that is rotated; `inside` is what the RoPE parameters say of it."""
    share = config.get("partial_rotary_factor", 1.0) if inside is None else inside
    share = 1.0 if share is None else share
    if not isinstance(share, int | float) or isinstance(share, bool) or not 0 < share <= 1:
        raise _nonsense(f"partial_rotary_factor is {shown(share)}", where)
    return float(share)


def _fill_lengths(parameters: dict[str, Any], config: Mapping[str, Any], max_positions: int, where: Path) -> None:
    """Put the length of the first training, and how much it is stretched, where transformers reads them."""
    # A config that says it outside, as Phi-3's do, is read that way by transformers.
    outside = config.get("original_max_position_embeddings")
    parameters.setdefault("original_max_position_embeddings", max_positions)
    if outside is not None:
        parameters["original_max_position_embeddings"] = outside
    if parameters.get("factor", 1) is None:  # transformers takes the ratio of the two lengths
        del parameters["factor"]
        if parameters["rope_type"] == "yarn":
            _check_numbers(parameters, where)
            parameters["factor"] = max_positions / (parameters["original_max_position_embeddings"] or max_positions)


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


def stretched_positions(architecture: Architecture) -> int:
    """Positions that the model is made for. Configs that a user switches to YaRN keep the length from before.

    Only where the config says what it stretches from: else `max_position_embeddings` may be either length.
    """
    scaling = architecture.rope_scaling or {}
    written = architecture.config.get("rope_scaling") or architecture.config.get("rope_parameters") or {}
    if scaling.get("rope_type") != "yarn" or "original_max_position_embeddings" not in written:
        return architecture.max_positions
    return max(architecture.max_positions, int(scaling["factor"] * scaling["original_max_position_embeddings"]))
