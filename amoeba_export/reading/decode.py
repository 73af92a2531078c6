"""Dataclasses from JSON values, checked by their annotations: a wrong value is found where it stands, and named.

Strict: no text for a number, no float for a count, no key that a dataclass does not have. Numbers are finite and in
bounds, so that what follows can compute with them.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import types
import typing
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin

from amoeba_export.errors import AmoebaError
from amoeba_export.reading.bounds import MAX_INT, number_problem, shown

T = TypeVar("T")


class WrongValue(ValueError):
    """Where a value stands, and what is wrong with it."""

    def __init__(self, place: str, problem: str) -> None:
        super().__init__(f"{place or 'it'} {problem}")


def decode(kind: type[T], data: object, place: str = "") -> T:
    """`data`, as a JSON reader gives it, as a `kind`: a dataclass, or any annotation of one's fields.

    A dataclass with a `parse` is also read from its text, as `Shape` is from `24x0.75`.

    Args:
        kind: What to make.
        data: JSON values.
        place: Where it stands in its file, for errors.

    Raises:
        WrongValue: A key is missing or unknown, or a value has the wrong type or is out of range.
    """
    return cast(T, _decoded(kind, data, place))


def _decoded(kind: Any, data: Any, place: str) -> Any:
    origin = get_origin(kind)
    if kind is Any:
        return data
    if dataclasses.is_dataclass(kind):
        return _record(cast(type, kind), data, place)
    if origin is Literal:
        if not any(type(data) is type(choice) and data == choice for choice in get_args(kind)):
            raise WrongValue(place, f"is {shown(data)}, not one of {', '.join(map(repr, get_args(kind)))}")
        return data
    if origin in (Union, types.UnionType):
        return _choice(kind, data, place)
    if origin in (tuple, list, collections.abc.Sequence):
        return _sequence(kind, data, place)
    if origin in (dict, collections.abc.Mapping):
        if not isinstance(data, dict):
            raise WrongValue(place, f"is {shown(data)}, not a table")
        return {key: _decoded(get_args(kind)[1], value, _below(place, key)) for key, value in data.items()}
    return _scalar(kind, data, place)


def _scalar(kind: Any, data: Any, place: str) -> Any:
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "null"}
    wanted = (int, float) if kind is float else kind
    if not isinstance(data, wanted) or (isinstance(data, bool) and kind is not bool):
        raise WrongValue(place, f"is {shown(data)}, not {names[kind]}")
    if kind in (int, float) and (problem := number_problem(data, **({"most": MAX_INT} if kind is int else {}))):
        raise WrongValue(place, problem)
    return data


def _record(kind: type, data: Any, place: str) -> Any:
    if isinstance(data, str) and (parse := getattr(kind, "parse", None)):
        try:
            return parse(data)
        except AmoebaError as error:
            raise WrongValue(place, f"is {shown(data)}: {error.what[0].lower()}{error.what[1:].rstrip('.')}") from error
    if not isinstance(data, dict):
        raise WrongValue(place, f"is {shown(data)}, not a table")
    hints, fields = _hints(kind), {field.name: field for field in dataclasses.fields(kind) if field.init}
    if unknown := sorted(set(data) - set(fields)):
        raise WrongValue(place, f"has the unknown key {shown(unknown[0])}")
    for name, field in fields.items():
        if name not in data and field.default is field.default_factory is dataclasses.MISSING:
            raise WrongValue(place, f"has no key '{name}'")
    return kind(**{key: _decoded(hints[key], value, _below(place, key)) for key, value in data.items()})


def _sequence(kind: Any, data: Any, place: str) -> Any:
    if not isinstance(data, list | tuple):
        raise WrongValue(place, f"is {shown(data)}, not a list")
    arguments = get_args(kind)
    if get_origin(kind) is tuple and arguments[-1] is not Ellipsis:
        if len(data) != len(arguments):
            raise WrongValue(place, f"has {len(data)} items, not {len(arguments)}")
        return tuple(_decoded(one, item, f"{place}[{i}]") for i, (one, item) in enumerate(zip(arguments, data)))  # noqa: B905 same length
    if arguments[0] is int and all(type(item) is int and -MAX_INT <= item <= MAX_INT for item in data):
        return tuple(data)  # the neurons of a plan are millions
    return tuple(_decoded(arguments[0], item, f"{place}[{i}]") for i, item in enumerate(data))


def _choice(kind: Any, data: Any, place: str) -> Any:
    """The first alternative that takes it; what the last one says otherwise, null set aside."""
    alternatives = [one for one in get_args(kind) if one is not type(None)]
    if data is None and len(alternatives) < len(get_args(kind)):
        return None
    for one in alternatives[:-1]:
        try:
            return _decoded(one, data, place)
        except WrongValue:
            continue
    return _decoded(alternatives[-1], data, place)


def _below(place: str, key: str) -> str:
    return f"{place}.{key}" if place else key


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)
