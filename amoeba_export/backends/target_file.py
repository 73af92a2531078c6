"""A target file made of measurements: everything but the figures is that of a target like it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from amoeba_export.backends.fitted import Usual, fit_figures, leave_one_out, uncertainty_of
from amoeba_export.backends.points import Point, by_group
from amoeba_export.backends.targets import parse_options, read_target
from amoeba_export.errors import InputError, UnknownName, UsageError
from amoeba_export.ir import NO_LIMITS, RuntimeLimits, Target
from amoeba_export.replacing import replace_text

ENOUGH = 3
"""Points from which a leave-one-out error says how far off an estimate is."""

NO_COMMENTS: Mapping[str, str] = MappingProxyType({})

_LOOSE = {"layer_spread": 0.7, "efficiency_spread": 0.4}
"""How far a board may be from the one that it is like: its own measurements decide."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedTarget:
    """A target whose figures are fitted to points.

    Attributes:
        rows: Each point with what the figures say in milliseconds, and the relative error of a fit without it, or None
            where the others cannot tell.
    """

    target: Target
    rows: tuple[tuple[Point, float, float | None], ...]


def fit_target(points: Sequence[Point], *, name: str, like: str | None) -> FittedTarget:
    """A target called `name` with the figures that `points` show.

    Args:
        points: Of one device and flow.
        name: Of the file.
        like: A target whose formats, limits and memory it has, and whose figures stand where points say nothing; None
            for the one that is named after the points' device and flow.

    Raises:
        InputError: The points are of several devices or flows, or the target like it is not an estimate.
        UnknownName: There is no such target.
    """
    groups = by_group(list(points))
    if len(groups) > 1:
        listed = ", ".join(f"{device} with {flow}" for device, flow in groups)
        raise InputError(
            f"The points are of {len(groups)} devices and flows: {listed}.",
            next_step="A target is one device and one flow: give the rows of one.",
        )
    first = points[0]
    model = _target_like(like, first)
    known = parse_options(model)
    prior = Usual(
        per_layer_ms=max(known.per_layer_ms, 1e-3), efficiency=known.bandwidth_efficiency, noise=0.03, **_LOOSE
    )
    figures = fit_figures(points, bandwidth_gb_s=known.bandwidth_gb_s, prior=prior)
    errors = leave_one_out(points, bandwidth_gb_s=known.bandwidth_gb_s, prior=prior)
    left_out = {id(point): error for point, error in errors}
    stated = uncertainty_of([error for _, error in errors])
    uncertainty = stated if len(errors) >= ENOUGH else min(0.99, max(stated if errors else 0.0, known.uncertainty))
    options = {
        "bandwidth_gb_s": known.bandwidth_gb_s,
        "bandwidth_efficiency": round(figures.efficiency, 4),
        "compute_tflops": round(figures.compute_tflops or known.compute_tflops, 5),
        "per_layer_ms": round(figures.per_layer_ms, 5),
        "uncertainty": min(0.99, uncertainty),
    }
    target = dataclasses.replace(
        model,
        name=name,
        description=f"{first.device}, with {model.flow or first.flow}",
        power_mode=first.power_mode or model.power_mode,
        aliases=(),
        options=options,
        sources=_sources(points, model, len(errors)),
    )
    rows = tuple((point, figures.predict_ms(point), left_out.get(id(point))) for point in points)
    return FittedTarget(target=target, rows=rows)


def _target_like(like: str | None, point: Point) -> Target:
    name = like or f"{point.device}-{point.flow}"
    try:
        target = read_target(name)
    except UnknownName as error:
        if like:
            raise
        raise UsageError(
            f"There is no target '{name}' to take formats, limits and the memory's bandwidth from.",
            next_step="Name one with --like; 'amoeba targets' lists them.",
        ) from error
    if target.backend != "analytic":
        raise InputError(
            f"Target '{target.name}' is measured, not estimated: it has no figures to fit.",
            next_step="Give --like a target whose backend is 'analytic'.",
        )
    return target


def _sources(points: Sequence[Point], like: Target, num_errors: int) -> tuple[str, ...]:
    models = ", ".join(dict.fromkeys(point.model for point in points))
    error = "the worst leave-one-out error" if num_errors >= ENOUGH else f"at least that of {like.name}: points are few"
    prefills = any(point.kind == "prefill" for point in points)
    return (
        f"Fitted to {len(points)} points of {models} ('amoeba targets fit').",
        *dict.fromkeys(f"Points: {point.source}" for point in points if point.source),
        "Compute: fitted to the prefills." if prefills else f"Compute: that of {like.name}, as no prefill was given.",
        f"Bandwidth, formats, limits and memory: those of {like.name}.",
        f"Uncertainty: {error}.",
    )


def write_target(target: Target, path: Path) -> None:
    """Write `target` as a file that `read_target` reads as the same target. Raises as `write_text`."""
    keys: dict[str, Any] = {
        "description": target.description,
        "flow": target.flow,
        "power_mode": target.power_mode,
        "backend": target.backend,
        "metric": target.metric,
        "dtype": list(target.dtypes),
        "formats": list(target.formats),
        "align": target.align,
        "memory_limit_mb": target.memory_limit_mb,
        "sources": list(target.sources),
        "options": dict(target.options),
        "limits": limits_table(target.limits),
        "on_device": dict(target.on_device),
    }
    optional = ("limits", "on_device")
    write_text(to_toml({key: value for key, value in keys.items() if value or key not in optional}), path)


def check_new(path: Path) -> None:
    """Raise `UsageError` where the path does not end in `.toml`, or is there already. Asked before the work."""
    if path.suffix != ".toml":
        raise UsageError(f"A target file ends in .toml, and '{path}' does not.", next_step=f"Write {path}.toml.")
    if path.exists():
        raise UsageError(f"'{path}' is there already.", next_step="Choose another name, or remove it.")


def write_text(text: str, path: Path) -> None:
    """Write a target file. Raises as `check_new`."""
    check_new(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, text)


def to_toml(data: Mapping[str, Any], comments: Mapping[str, str] = NO_COMMENTS) -> str:
    """A target file: keys, then tables, with what each means beside it where that is said."""
    keys = {key: value for key, value in data.items() if not isinstance(value, Mapping)}
    tables = {key: value for key, value in data.items() if isinstance(value, Mapping)}
    blocks = [_lines(keys, comments)]
    for name, table in tables.items():
        inner = {key.removeprefix(f"{name}."): text for key, text in comments.items() if key.startswith(f"{name}.")}
        blocks.append(f"[{name}]{_comment(name, comments)}\n{_lines(table, inner)}".rstrip())
    return "\n\n".join(blocks) + "\n"


def limits_table(limits: RuntimeLimits) -> dict[str, Any]:
    """Keys that differ from what holds without them, and `runtime`; empty where nothing is limited."""
    if limits == NO_LIMITS:
        return {}
    unlimited = dataclasses.asdict(NO_LIMITS)
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(limits).items()
        if name == "runtime" or value != unlimited[name]
    }


def _lines(table: Mapping[str, Any], comments: Mapping[str, str]) -> str:
    given = {key: value for key, value in table.items() if value not in (None, "")}
    return "\n".join(f"{key} = {_value(value)}{_comment(key, comments)}" for key, value in given.items())


def _comment(key: str, comments: Mapping[str, str]) -> str:
    return f"  # {comments[key]}" if key in comments else ""


def _value(value: object) -> str:
    if isinstance(value, Mapping):
        inside = ", ".join(f"{_value(key)} = {_value(one)}" for key, one in value.items())
        return f"{{ {inside} }}" if inside else "{}"
    if isinstance(value, (list, tuple)):
        if len(value) > 1 and all(isinstance(one, str) and len(one) > 30 for one in value):
            return "[\n" + "".join(f"    {_value(one)},\n" for one in value) + "]"
        return f"[{', '.join(map(_value, value))}]"
    return json.dumps(value, ensure_ascii=True)
