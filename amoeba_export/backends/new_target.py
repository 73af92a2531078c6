"""A target file from answers: what must be known of a device and its flow, each question with an option of its own."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from amoeba_export.backends import find_backend, list_backends
from amoeba_export.backends.target_file import check_new, limits_table, to_toml, write_text
from amoeba_export.backends.targets import Container, TargetFile, list_targets, read_target, target_of
from amoeba_export.errors import BadValue, UsageError
from amoeba_export.formats import FORMATS
from amoeba_export.ir import Metric, Target
from amoeba_export.ir.dtype import DTYPE_NAMES

Answers = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is asked once.

    Attributes:
        key: Of the target file; `options.KEY` and `limits.KEY` are keys of these tables.
        words: The question.
        default: Taken for no answer; None where there has to be one.
        choices: The only answers, if there are such.
        is_list: Whether commas part several answers.
    """

    key: str
    words: str
    default: str | None = None
    choices: tuple[str, ...] = ()
    is_list: bool = False

    @property
    def option(self) -> str:
        """How a script answers it."""
        table, _, key = self.key.rpartition(".")
        flags = {"dtype": "--dtype", "formats": "--format", "memory_limit_mb": "--memory", "power_mode": "--power-mode"}
        return f"--{table.removesuffix('s')} {key}=VALUE" if table else flags.get(key, f"--{key}")


Ask = Callable[[Question], str]
"""Gives the answer to a question, "" for none."""

COMMENTS: Mapping[str, str] = {
    "description": "shown by 'amoeba targets'",
    "flow": "common name of the runtime",
    "power_mode": "the mode that the figures hold for, such as 15 W",
    "backend": "measures or estimates the target",
    "metric": "the latency that a budget limits: decode, prefill, e2e",
    "dtype": "its precisions, the preferred one first",
    "formats": "formats to write; the backend runs the first one",
    "align": "FFN sizes are multiples of this: other sizes can be slower than the full model",
    "memory_limit_mb": "most memory for a model, in MiB",
    "sources": "where each figure comes from",
    "options": "options of the backend: docs/targets.md lists them",
    "limits": "the shapes that the runtime loads: a search stays inside",
    "on_device": "backend that measures the device itself (--host)",
    "limits.runtime": "its name in messages",
    "limits.ffn_multiple": "FFN sizes are multiples of it",
    "limits.query_multiple": "heads x head dim is a multiple of it",
    "limits.hidden_multiple": "the hidden size is a multiple of it: a cut does not change the hidden size",
    "limits.multiples_of": "the multiples hold in these precisions only",
    "limits.hidden_by_heads": "the hidden size is a multiple of the number of heads",
    "limits.output_biases": "families whose o_proj and down_proj may have a bias",
    "limits.uniform": "all layers have the same dims",
}

_TABLES = ("options", "limits", "on_device")
_ORDER = (*(key for key in TargetFile.model_fields if key not in _TABLES), *_TABLES)


def new_target(given: Answers, ask: Ask, *, path: Path, like: str | None = None) -> Target:
    """Ask what `given` does not say, and write a commented target file.

    Args:
        given: Answers by key, as in a target file: what is here is not asked.
        ask: Asks a person, or takes what holds without an answer.
        path: The file.
        like: A target whose formats, precisions, limits and figures stand where nothing else is said; None for the
            first one that amoeba ships with the same backend.

    Raises:
        UsageError: A question that needs an answer has none; the path is not a new `.toml` file.
        InputError: The answers make no target; all mistakes are listed.
    """
    check_new(path)
    model = read_target(like) if like else None
    found: dict[str, Any] = {}
    for question in _first(model):
        found[question.key] = _answer(question, given, ask)
    backend = str(found["backend"])
    model = model or _shipped_with(backend)
    for question in _others(backend, model, found):
        if (value := _answer(question, given, ask)) not in ("", []):
            found[question.key] = value
    data = _nested({**_kept(backend, model), **given, **found})
    target = target_of(data, path, next_step="Answer otherwise: nothing was written.")
    write_text(to_toml(data, COMMENTS), path)
    return target


def read_pairs(pairs: Sequence[str], table: str, option: str) -> dict[str, Any]:
    """`KEY=VALUE` as answers of `table`. A value is TOML; what is none is text."""
    found = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not (key and equals):
            raise BadValue(option, pair, "KEY=VALUE, such as threads=4")
        found[f"{table}.{key}"] = _toml_value(text)
    return found


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        return text


def _first(model: Target | None) -> Iterator[Question]:
    yield Question(key="description", words="What is it, in a line")
    default = model.backend if model else "onnxruntime"
    yield Question(key="backend", words="Who measures it", default=default, choices=tuple(list_backends()))


def _others(backend: str, model: Target | None, found: Answers) -> Iterator[Question]:
    """After these two, in order. `found` has the answers so far."""
    base = model or Target(name="", description="", backend=backend)
    containers = find_backend(backend).containers
    runs = base.formats if not containers or containers[0] in base.formats else (containers[0], "safetensors")
    yield Question(key="flow", words="Which runtime, as people call it", default=base.flow or backend)
    yield Question(key="power_mode", words="In which power mode (empty: it has one)", default="")
    yield Question(
        key="formats",
        words="What is written, what the backend runs first",
        default=",".join(dict.fromkeys(runs)),
        choices=get_args(Container),
        is_list=True,
    )
    held = tuple(name for name in FORMATS[found["formats"][0]].dtypes if name in DTYPE_NAMES)
    known = tuple(dtype for dtype in base.dtypes if dtype in held) or held[:1]
    yield Question(
        key="dtype",
        words="Which precisions it runs, the preferred one first",
        default=",".join(known),
        choices=held,
        is_list=True,
    )
    yield Question(key="metric", words="What a budget is about", default=base.metric, choices=get_args(Metric))
    limit = "" if base.memory_limit_mb is None else f"{base.memory_limit_mb:g}"
    yield Question(key="memory_limit_mb", words="MiB that a model may occupy (empty: unknown)", default=limit)
    for name, field in find_backend(backend).options_model.model_fields.items():
        if field.is_required():
            known_value = base.options.get(name) if base.backend == backend else None
            default = None if known_value is None else str(known_value)
            yield Question(key=f"options.{name}", words=f"The backend's option {name}", default=default)


def _answer(question: Question, given: Answers, ask: Ask) -> Any:
    """What is given, or asked: a list where several are, a number where a number is."""
    value = given.get(question.key)
    if value is None:
        text = ask(question).strip() or question.default
        if text is None:
            raise UsageError(f"Not answered: {question.words}?", next_step=f"Give {question.option}.")
        value = text
        if question.is_list:
            value = [part.strip() for part in text.split(",") if part.strip()]
        elif text and (question.key == "memory_limit_mb" or question.key.startswith("options.")):
            value = _toml_value(text)
    for one in value if question.is_list else [value]:
        if question.choices and one not in question.choices:
            raise BadValue(question.option, str(one), f"one of {', '.join(question.choices)}")
    return value


def _kept(backend: str, model: Target | None) -> dict[str, Any]:
    """What is not asked for: that of the target like it."""
    if model is None:
        return {}
    kept: dict[str, Any] = {"align": model.align}
    kept |= {f"limits.{key}": value for key, value in limits_table(model.limits).items()}
    if model.backend == backend:
        kept |= {f"options.{key}": value for key, value in model.options.items()}
        kept |= {"on_device": dict(model.on_device)} if model.on_device else {}
        if find_backend(backend).source == "analytic":
            kept["sources"] = [f"What was not given is that of {model.name}."]
    return kept


def _shipped_with(backend: str) -> Target | None:
    """None for a backend that no shipped target has, and for estimates: which board would it be like?"""
    if find_backend(backend).source != "measured":
        return None
    return next((target for target in list_targets().values() if target.backend == backend), None)


def _nested(answers: Answers) -> dict[str, Any]:
    """`options.decode.unit` as tables in tables, keys in the order of a target file."""
    data: dict[str, Any] = {}
    for key, value in sorted(answers.items(), key=lambda pair: _ORDER.index(pair[0].partition(".")[0])):
        *tables, last = key.split(".")
        place = data
        for table in tables:
            place = place.setdefault(table, {})
        place[last] = value
    if "limits" in data:
        data["limits"] = {"runtime": data["flow"], **data["limits"]}
    return data
