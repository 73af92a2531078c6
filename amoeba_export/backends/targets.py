"""Targets as data: one TOML file per device and flow. Unknown keys are errors that name the nearest known one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from amoeba_export.backends import find_backend, list_backends
from amoeba_export.backends.graphs import spelling
from amoeba_export.errors import InputError, UnknownName, UsageError, nearest
from amoeba_export.ir import NO_LIMITS, Metric, RuntimeLimits, Target
from amoeba_export.ir.dtype import DtypeName
from amoeba_export.locations import data_dir
from amoeba_export.reading import read_toml

Container = Literal["onnx", "safetensors", "gguf"]


def _listed(value: object) -> object:
    """One precision is a list of one."""
    return [value] if isinstance(value, str) else value


def _distinct(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))


class Strict(BaseModel):
    """A table in which a key that we do not know is a mistake."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class OnDevice(Strict):
    """How the device itself is measured when it can be reached, as by `--host`."""

    backend: str
    options: dict[str, Any] = {}


def _families(value: object) -> object:
    """`false` names no family, `true` all of them."""
    return value if not isinstance(value, bool) else None if value else ()


class LimitsTable(Strict):
    """The `[limits]` table. `ir.RuntimeLimits` says what its keys mean."""

    runtime: str
    ffn_multiple: Annotated[int, Field(ge=1)] = 1
    query_multiple: Annotated[int, Field(ge=1)] = 1
    hidden_multiple: Annotated[int, Field(ge=1)] = 1
    multiples_of: tuple[DtypeName, ...] = ()
    hidden_by_heads: bool = False
    output_biases: Annotated[tuple[str, ...] | None, BeforeValidator(_families)] = None
    uniform: bool = False


Dtypes = Annotated[tuple[DtypeName, ...], BeforeValidator(_listed), AfterValidator(_distinct), Field(min_length=1)]


class TargetFile(Strict):
    """The keys of a target file. `ir.Target` says what they mean."""

    description: str
    backend: str
    flow: str = ""
    power_mode: str = ""
    aliases: tuple[str, ...] = ()
    metric: Metric = "decode"
    dtype: Dtypes = ("fp32",)
    formats: Annotated[tuple[Container, ...], Field(min_length=1)] = ("onnx", "safetensors")
    align: Annotated[int, Field(ge=1)] = 1
    memory_limit_mb: Annotated[float, Field(gt=0)] | None = None
    sources: tuple[str, ...] = ()
    options: dict[str, Any] = {}
    on_device: OnDevice | None = None
    limits: LimitsTable | None = None


def list_targets() -> dict[str, Target]:
    """All targets that amoeba ships, by name, without aliases."""
    return {path.stem: _read(path) for path in _files()}


def read_target(name_or_file: str | Path) -> Target:
    """The target called `name_or_file` (its name or an alias), or the one described in that TOML file.

    Raises:
        UnknownName: No target has that name.
        NotFound: A path ending in `.toml` that is not there.
        InputError: The file has mistakes; all are listed.
    """
    text = str(name_or_file)
    if text.endswith(".toml"):
        path = Path(text)
        return _read(path)
    paths = {path.stem: path for path in _files()}
    if text in paths:
        return _read(paths[text])
    names = _aliases()
    if text not in names:
        raise UnknownName("target", text, {*paths, *names})
    return _read(paths[names[text]])


def parse_options(target: Target) -> Any:
    """The target's options as its backend's pydantic model. Raises `InputError` with every mistake."""
    problems: list[str] = []
    parsed = _validated(find_backend(target.backend).options_model, target.options, ("options",), problems)
    if problems:
        raise _mistakes(problems, target.name)
    return parsed


def graph_options(target: Target, dtype: str) -> dict[str, Any]:
    """How an ONNX graph of `dtype` for `target` is spelled: keyword arguments of the ONNX format's `open_writer`.

    The flow that runs the graph decides: the target's own backend, or the one it names for the device itself.
    """
    if target.on_device:
        target = replace(target, backend=target.on_device["backend"], options=target.on_device["options"], on_device={})
    elif target.backend == "ssh":
        target = replace(
            target, backend=target.options["backend"], options=target.options.get("options", {}), on_device={}
        )
    options = parse_options(target)
    if "dialect" not in type(options).model_fields:
        return {}
    return spelling(options, dtype)


def over_ssh(target: Target, host: str, *, port: int | None = None, identity: Path | None = None) -> Target:
    """`target` measured on the machine `host` (`user@host`) through SSH, with the flow that its file names.

    A target whose backend measures is measured there with the same backend and options; an estimated one needs an
    `[on_device]` table.

    Raises:
        InputError: The target does not say how the device is measured.
    """
    if target.on_device:
        flow = dict(target.on_device)
    elif find_backend(target.backend).source == "measured":
        flow = {"backend": target.backend, "options": dict(target.options)}
    else:
        raise InputError(
            f"Target '{target.name}' does not say how the device is measured.",
            next_step="Add an [on_device] table with a backend to the target's file.",
        )
    options: dict[str, Any] = {"host": host, **flow}
    if port is not None:
        options["port"] = port
    if identity is not None:
        options["identity"] = str(identity)
    return replace(target, backend="ssh", options=options)


def with_threads(target: Target, threads: int) -> Target:
    """`target` measured with so many threads, there where an SSH target is. Raises `UsageError` where it has none."""
    is_there = target.backend == "ssh"
    inner = dict(target.options.get("options", {}) if is_there else target.options)
    backend = target.options["backend"] if is_there else target.backend
    if "threads" not in find_backend(backend).options_model.model_fields:
        raise UsageError(
            f"The backend '{backend}' of target '{target.name}' has no threads to choose.",
            next_step="Leave --threads out.",
        )
    inner["threads"] = threads
    return replace(target, options={**target.options, "options": inner} if is_there else inner)


def _files() -> list[Path]:
    return sorted(data_dir("targets").glob("*.toml"))


@cache
def _aliases() -> dict[str, str]:
    return {alias: path.stem for path in _files() for alias in _read(path).aliases}


def _read(path: Path) -> Target:
    data = read_toml(path, what="The target file", missing="'amoeba targets' lists the targets that need no file.")
    return target_of(data, path)


def target_of(data: Mapping[str, Any], path: Path, *, next_step: str = "Correct the file.") -> Target:
    """The target that `data`, the content of `path`, describes. Raises `InputError` with all mistakes."""
    problems: list[str] = []
    file = _validated(TargetFile, data, (), problems)
    for table, key in ((data, "options"), (data.get("on_device"), "on_device.options")):
        if isinstance(table, Mapping) and isinstance(backend := table.get("backend"), str):
            _check_options(backend, table.get("options", {}), key, problems)
    if problems:
        raise _mistakes(problems, path, next_step)
    assert isinstance(file, TargetFile)
    fields = file.model_dump(exclude={"on_device", "dtype", "limits"}) | {"dtypes": file.dtype}
    on_device = file.on_device.model_dump() if file.on_device else {}
    if file.backend == "recorded":  # a table lies beside the target file that names it, wherever one stands
        fields["options"] = {**file.options, "table": str(path.parent / file.options["table"])}
    limits = RuntimeLimits(**file.limits.model_dump()) if file.limits else NO_LIMITS
    return Target(name=path.stem, **fields, on_device=on_device, limits=limits)


def _check_options(backend: str, options: object, key: str, problems: list[str]) -> None:
    """A plug-in's name is taken on trust: a target file may be read where the plug-in is not installed."""
    known = list_backends()
    if backend not in known:
        problems.append(
            f"{key.replace('options', 'backend')}: there is no backend '{backend}'.{nearest(backend, known)}"
        )
        return
    if isinstance(options, Mapping):
        _validated(find_backend(backend).options_model, options, tuple(key.split(".")), problems)


def _validated(
    model: type[BaseModel], data: Mapping[str, Any], prefix: tuple[str, ...], problems: list[str]
) -> BaseModel | None:
    try:
        return model.model_validate(data)
    except ValidationError as error:
        for detail in error.errors():
            if detail["type"] == "too_short" and detail["input"]:
                continue  # its items were wrong, and each of them is reported
            where = ".".join(map(str, (*prefix, *detail["loc"])))
            if detail["type"] == "extra_forbidden":
                hint = nearest(str(detail["loc"][-1]), _keys_at(model, detail["loc"][:-1]))
                problems.append(f"{where}: there is no such key.{hint}")
            elif detail["type"] == "missing":
                problems.append(f"{where}: it is required")
            elif detail["type"] == "value_error":  # a validator of ours says all of it
                problems.append(f"{where}: {detail['ctx']['error']}")
            else:
                problems.append(f"{where}: {detail['msg'][0].lower()}{detail['msg'][1:]}, not {detail['input']!r}")
        return None


def _keys_at(model: type[BaseModel], place: Sequence[str | int]) -> Iterable[str]:
    """The keys of the table at `place` in `model`."""
    for step in place:
        field = model.model_fields.get(str(step))
        kinds = [] if field is None else [field.annotation, *get_args(field.annotation)]
        tables = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if not tables:
            return ()
        model = tables[0]
    return model.model_fields


def _mistakes(problems: list[str], where: str | Path, next_step: str = "Correct the file.") -> InputError:
    listed = "\n".join(f"  - {problem}" for problem in problems)
    count = "a mistake" if len(problems) == 1 else f"{len(problems)} mistakes"
    return InputError(f"The target has {count}:\n{listed}", where=where, next_step=next_step)
