"""Which layers attend through a window, which are rotated, and how: what [window] and [rope] of a family's file mean.

[window]: without it, a window holds for every layer.
- `layer_types = true`: the config may list `full_attention` or `sliding_attention` per layer.
- `enabled`: the key that says whether there is a window.
- `first_layer = { key, default }`: layers from this one on have it.
- `full_every = { key, default }`: the last of each so many layers has none.
- `only_without_rope = true`: the layers without RoPE have it.

[rope]: without it, one set of parameters holds for every layer.
- `theta`, `default`: the base, and all parameters, where the config has none.
- `partial = true`: `partial_rotary_factor` may be below 1.
- `renamed`: old name of a type -> its name now.
- `by_layer_type.NAME = { key, default, scaled }`: the key of a layer type's base, if any, and whether `rope_scaling` is
  for it.
- `windows_only = true`: where the config has a window, layers without it have no RoPE.
- `skipped = { key, every, default }`: the key that lists 1 or 0 per layer; else the last of each so many has no RoPE.
- `original_positions`: `original_max_position_embeddings` outside RoPE's parameters, where the config has none.
- `temperature`: the parameter by which queries grow with their position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from amoeba_export.errors import InputError, UnsupportedError
from amoeba_export.ir.family import LayerKind, QueryTemperature, Rope
from amoeba_export.load.family_file import FamilyFile
from amoeba_export.load.rope import read_rope
from amoeba_export.reading import WrongValue, decode
from amoeba_export.reading.bounds import MAX_SIZES, shown
from amoeba_export.shown import an

FULL, SLIDING = "full_attention", "sliding_attention"
TYPES_KEY = "layer_types"


def read_kinds(
    config: Mapping[str, Any],
    file: FamilyFile,
    *,
    num_layers: int,
    head_dim: int,
    max_positions: int,
    window: int | None,
    where: Path,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """How the layers of a config attend, as fields of `Architecture`, and its lists with an entry a layer.

    The lists are written out where transformers would make them from a layer's position, which a cut changes.

    Raises:
        InputError: A list or number that makes no sense.
        UnsupportedError: Attention or RoPE that we do not compute.
    """
    if file.window.get("enabled") and not config.get(file.window["enabled"], False):
        window = None
    try:
        rotated = _rotated(config, file, num_layers)
        types = _types(config, file, num_layers, window, rotated, where)
        if file.rope.get("windows_only") and window is not None:
            rotated = [name == SLIDING for name in types]
        ropes = {name: _rope(name, config, file, head_dim, max_positions, where) for name in sorted(set(types))}
        temperature = _temperature(ropes[types[0]], file, max_positions)
    except WrongValue as error:
        raise InputError(
            f"The config of the model is wrong: {error}.",
            where=where,
            next_step="Get config.json again from where the weights come from.",
        ) from error
    per_layer = [
        LayerKind(name=name, window=window if name == SLIDING else None, rope=ropes[name] if is_rotated else None)
        for name, is_rotated in zip(types, rotated, strict=True)
    ]
    kinds: list[LayerKind] = []
    for kind in sorted(per_layer, key=lambda kind: (kind.name, kind.rope is None)):
        if kind not in kinds:
            kinds.append(kind)
    first = next((kind.rope for kind in kinds if kind.rope), None) or ropes[kinds[0].name]
    fields: dict[str, Any] = {
        "sliding_window": kinds[0].window if len({kind.window for kind in kinds}) == 1 else None,
        "rope_theta": first.theta,
        "rope_scaling": first.scaling,
        "rotary_dims": first.dims if first.dims != head_dim else None,
        "query_temperature": temperature,
    }
    if len(kinds) > 1 or kinds[0].rope is None:
        fields |= {"kinds": tuple(kinds), "kind_of_layer": tuple(map(kinds.index, per_layer))}
    lists: dict[str, Any] = {}
    if len(set(types)) > 1 or "full_every" in file.window or "only_without_rope" in file.window:
        lists[TYPES_KEY] = types
    if "skipped" in file.rope:
        lists[file.rope["skipped"]["key"]] = [int(is_rotated) for is_rotated in rotated]
    return fields, lists


def _types(
    config: Mapping[str, Any],
    file: FamilyFile,
    num_layers: int,
    window: int | None,
    rotated: Sequence[bool],
    where: Path,
) -> list[str]:
    """Of each layer. What a config lists goes before what follows from a layer's position."""
    rules, listed = file.window, decode(list[str], config.get(TYPES_KEY) or [], TYPES_KEY)
    if unknown := sorted(set(listed) - {FULL, SLIDING}):
        raise UnsupportedError(
            f"Layers of type {', '.join(unknown)} are not supported.",
            where=where,
            next_step=f"Use a model whose layers are of the types {FULL} and {SLIDING}.",
        )
    if window is None:
        return [FULL] * num_layers
    if not rules.get("layer_types"):
        if len(set(listed)) > 1 or set(listed) == {FULL}:
            raise UnsupportedError(
                f"The {TYPES_KEY} of {an(file.family.model_type)} differ from what transformers computes: a window for "
                "every layer.",
                where=where,
                next_step="Use a model_type whose class in transformers reads them, such as ministral.",
            )
        return [SLIDING] * num_layers
    if listed:
        if len(listed) != num_layers:
            raise WrongValue(TYPES_KEY, f"has {len(listed)} entries for {num_layers} layers")
        return list(listed)
    if "only_without_rope" in rules:
        return [FULL if is_rotated else SLIDING for is_rotated in rotated]
    if "full_every" in rules:
        period = _count(config, rules["full_every"])
        return [SLIDING if (i + 1) % period else FULL for i in range(num_layers)]
    first_layer = 0
    if rule := rules.get("first_layer"):
        first_layer = decode(int, config.get(rule["key"], rule["default"]), rule["key"])
    return [SLIDING if i >= first_layer else FULL for i in range(num_layers)]


def _rotated(config: Mapping[str, Any], file: FamilyFile, num_layers: int) -> list[bool]:
    if (rule := file.rope.get("skipped")) is None:
        return [True] * num_layers
    listed = decode(list[int], config.get(rule["key"]) or [], rule["key"])
    if listed:
        if len(listed) < num_layers or not set(listed) <= {0, 1}:
            raise WrongValue(rule["key"], f"is {shown(list(listed))} for {num_layers} layers")
        return [bool(value) for value in listed[:num_layers]]
    period = _count(config, {"key": rule["every"], "default": rule["default"]})
    return [bool((i + 1) % period) for i in range(num_layers)]


def _count(config: Mapping[str, Any], rule: Mapping[str, Any]) -> int:
    value = decode(int, config.get(rule["key"], rule["default"]), rule["key"])
    if not 0 < value <= MAX_SIZES["num_layers"]:
        raise WrongValue(rule["key"], f"is {shown(value)}")
    return value


def _rope(
    name: str, config: Mapping[str, Any], file: FamilyFile, head_dim: int, max_positions: int, where: Path
) -> Rope:
    """RoPE of one layer type. Configs of transformers 5 may have one set of parameters per layer type."""
    rules = file.rope
    if (rule := rules.get("by_layer_type", {}).get(name)) is not None:
        nested = config.get("rope_parameters")
        own = nested.get(name) if isinstance(nested, Mapping) else None
        base = config.get(rule["key"], rule["default"]) if "key" in rule else rule["default"]
        if isinstance(own, Mapping):
            scaling = config.get("rope_scaling") if rule.get("scaled") else None  # adds to the new key, as transformers
            config = {"rope_parameters": {"rope_theta": base, **own, **(scaling or {})}}
        else:
            config = {"rope_theta": base, "rope_scaling": config.get("rope_scaling") if rule.get("scaled") else None}
    given = config.get("rope_scaling") or config.get("rope_parameters")
    if not given and "default" in rules:
        config = {**config, "rope_parameters": rules["default"]}
    if "original_positions" in rules:
        config = {"original_max_position_embeddings": rules["original_positions"], **config}
    theta, scaling, share = read_rope(
        config,
        max_positions=max_positions,
        default_theta=rules.get("theta"),
        renamed=rules.get("renamed", {}),
        where=where,
    )
    if share != 1.0 and not rules.get("partial"):
        raise UnsupportedError(
            "RoPE over a part of each head is not supported.",
            where=where,
            next_step="Use a model that rotates whole heads.",
        )
    return Rope(theta=theta, scaling=scaling, dims=int(head_dim * share))


def _temperature(rope: Rope, file: FamilyFile, max_positions: int) -> QueryTemperature | None:
    if (key := file.rope.get("temperature")) is None:
        return None
    scaling = rope.scaling or {}
    if key not in scaling:
        raise WrongValue(key, "is missing among the RoPE parameters")
    beta = decode(float, scaling[key], key)
    length = decode(int, scaling.get("original_max_position_embeddings", max_positions), key)
    return QueryTemperature(beta=beta, length=length) if beta else None
