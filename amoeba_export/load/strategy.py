"""`strategy.safetensors`: arrays as tensors, everything else as one JSON text in the file's metadata."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from amoeba_export.errors import DamagedFile, InputError, NotFound, WrongModel
from amoeba_export.ir import FixedWidth, Importance, Policy, Shape, Strategy, Supernet
from amoeba_export.ir.belongs import STRATEGY_DIMS, identity_difference, strategy_differences
from amoeba_export.reading import check_schema, decode, dim_problems, parse_json_object
from amoeba_export.replacing import replacing

SCHEMA = 1
_METADATA = "amoeba_strategy"
_NEXT_STEP = "Make it again with 'amoeba calibrate' or 'amoeba import'."


def write_strategy(strategy: Strategy, path: Path) -> Strategy:
    """Write `strategy` to `path` at once or not at all, and return it with the identity of the file.

    The same strategy gives the same bytes: safetensors orders tensors itself, and its metadata has a single entry,
    because it writes several in random order.
    """
    content = _serialize(strategy)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, shared=True) as part:
        part.write_bytes(content)
    return dataclasses.replace(strategy, identity=hashlib.sha256(content).hexdigest())


def read_strategy(path: Path) -> Strategy:
    """Read what `write_strategy` wrote.

    Raises:
        NotFound: There is no such file.
        DamagedFile: It is not a strategy, or its parts do not fit together.
        InputError: It is an upstream file, or of another version.
    """
    if not path.is_file():
        raise NotFound("The strategy", path, next_step="Make one with 'amoeba calibrate --out strategy.safetensors'.")
    if path.suffix == ".npy":
        raise InputError(
            "This is a strategy of the published AmoebaLLM code.",
            where=path,
            next_step="Convert it once: 'amoeba import FILE MODEL --out strategy.safetensors'.",
        )
    try:
        with safe_open(path, framework="np") as file:
            text = (file.metadata() or {}).get(_METADATA)
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 a safe_open does not iterate
        data = None if text is None else parse_json_object(text)
    except (SafetensorError, ValueError, TypeError) as error:  # TypeError: a type that numpy does not have
        raise DamagedFile(path, str(error), next_step=_NEXT_STEP) from error
    if data is None:
        raise DamagedFile(path, "a safetensors file without a strategy in it", next_step=_NEXT_STEP)
    check_schema(data, SCHEMA, what="strategy", where=path, next_step=_NEXT_STEP)
    try:
        strategy = _deserialize(decode(_Content, data), arrays)
        problems = dim_problems({name: getattr(strategy, name) for name in STRATEGY_DIMS}) or _problems(strategy)
    except KeyError as error:
        raise DamagedFile(path, f"it has no array {error}", next_step=_NEXT_STEP) from error
    except (TypeError, ValueError) as error:
        raise DamagedFile(path, str(error), next_step=_NEXT_STEP) from error
    if problems:
        raise DamagedFile(path, "; ".join(problems), next_step=_NEXT_STEP)
    return dataclasses.replace(strategy, identity=hashlib.sha256(path.read_bytes()).hexdigest())


def check_strategy(strategy: Strategy, supernet: Supernet, *, where: Path | None = None) -> None:
    """Refuse a strategy that was made for another model. Raises `WrongModel` naming every difference."""
    differences = strategy_differences(strategy, supernet.architecture)
    differences = differences or identity_difference("model", strategy.model_id, supernet.identity)
    if differences:
        raise WrongModel("The strategy", differences, where=where)


def _serialize(strategy: Strategy) -> bytes:
    arrays: dict[str, NDArray[Any]] = {}
    if strategy.importance is not None:
        arrays |= {f"importance.{name}": value for name, value in _arrays(strategy.importance).items()}
    for width, masks in strategy.widths.items():
        arrays |= {f"width.{width!r}.{name}": value for name, value in _arrays(masks).items()}
    data = {
        "schema_version": SCHEMA,
        "model_id": strategy.model_id,
        **{name: getattr(strategy, name) for name in STRATEGY_DIMS},
        "depth": {str(removed): list(map(int, kept)) for removed, kept in sorted(strategy.depth.items())},
        "depth_metric": {str(removed): float(value) for removed, value in sorted(strategy.depth_metric.items())},
        "metric": strategy.metric,
        "importance_metric": None if strategy.importance is None else strategy.importance.metric,
        "widths": sorted(map(float, strategy.widths), reverse=True),
        "quality": [[shape.depth, shape.width, float(value)] for shape, value in sorted(strategy.quality.items())],
        "quality_metric": strategy.quality_metric,
        "policy": strategy.policy,
        "provenance": dict(sorted(strategy.provenance.items())),
    }
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return save({name: np.ascontiguousarray(array) for name, array in arrays.items()}, metadata={_METADATA: text})


def _arrays(record: Importance | FixedWidth) -> dict[str, NDArray[Any]]:
    values = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    return {name: value for name, value in values.items() if isinstance(value, np.ndarray)}


@dataclass(frozen=True, kw_only=True)
class _Content:
    """The JSON text in the file's metadata. Keys of `depth` and `depth_metric` are numbers, which JSON makes text."""

    schema_version: int
    model_id: str | None
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    depth: Mapping[str, tuple[int, ...]]
    depth_metric: Mapping[str, float]
    metric: str
    importance_metric: str | None
    widths: tuple[float, ...]
    quality: tuple[tuple[int, float, float], ...]
    quality_metric: str
    policy: Policy
    provenance: Mapping[str, str]


def _deserialize(content: _Content, arrays: Mapping[str, NDArray[Any]]) -> Strategy:
    importance = None
    if content.importance_metric is not None:
        importance = Importance(
            **{name: arrays[f"importance.{name}"] for name in ("heads_LN", "ffn_LF", "o_mean_LQ", "down_mean_LF")},
            metric=content.importance_metric,
        )
    fixed = ("heads_LN", "ffn_LF", "o_bias_LD", "down_bias_LD")
    return Strategy(
        model_id=content.model_id,
        **{name: getattr(content, name) for name in STRATEGY_DIMS},
        depth={int(removed): kept for removed, kept in content.depth.items()},
        depth_metric={int(removed): float(value) for removed, value in content.depth_metric.items()},
        metric=content.metric,
        importance=importance,
        widths={
            width: FixedWidth(**{name: arrays[f"width.{width!r}.{name}"] for name in fixed})
            for width in map(float, content.widths)
        },
        quality={Shape(depth, float(width)): float(value) for depth, width, value in content.quality},
        quality_metric=content.quality_metric,
        policy=content.policy,
        provenance=content.provenance,
    )


def _problems(strategy: Strategy) -> list[str]:
    """What does not fit together inside a strategy."""
    num_layers = strategy.num_layers
    problems = [
        f"the layers kept without {removed} are not {num_layers - removed} of {num_layers}"
        for removed, kept in strategy.depth.items()
        if len(kept) != num_layers or sum(kept) != num_layers - removed or not set(kept) <= {0, 1}
    ]
    problems += [f"there is no depth without {removed}" for removed in strategy.depth if not 0 <= removed < num_layers]
    problems += [f"there is no width {width}" for width in strategy.widths if not 0 < width <= 1]
    problems += [
        f"there is no shape {shape}"
        for shape in strategy.quality
        if not (1 <= shape.depth <= num_layers and 0 < shape.width <= 1)
    ]
    if strategy.num_heads % strategy.num_kv_heads:
        problems.append(f"{strategy.num_heads} heads cannot share {strategy.num_kv_heads} KV heads evenly")
    if 0 not in strategy.depth:
        problems.append("the full depth is missing")
    query, ffn = strategy.num_heads * strategy.head_dim, strategy.ffn_size
    if strategy.importance is not None:
        sizes = {"heads_LN": strategy.num_heads, "ffn_LF": ffn, "o_mean_LQ": query, "down_mean_LF": ffn}
        problems += _array_problems(strategy.importance, num_layers, sizes)
    for width in strategy.widths.values():
        problems += _array_problems(width, num_layers, {"heads_LN": strategy.num_heads, "ffn_LF": ffn})
    return problems


def _array_problems(record: Importance | FixedWidth, num_layers: int, sizes: Mapping[str, int]) -> list[str]:
    problems = []
    for name, array in _arrays(record).items():
        is_mask = isinstance(record, FixedWidth) and name in sizes
        if array.dtype.kind != ("b" if is_mask else "f") or array.ndim != 2:
            problems.append(f"{name} is {array.dtype} {list(array.shape)}")
        elif array.shape != (num_layers, sizes.get(name, array.shape[1])):
            problems.append(f"{name} has shape {list(array.shape)}")
        elif not is_mask and not np.isfinite(array).all():
            problems.append(f"{name} is not finite")
    return problems
