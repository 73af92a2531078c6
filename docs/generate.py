"""Write what is made from the code: the reference pages, the JSON schemas, the layers. Tests compare them.

Long on purpose: one list of pages, a function for each.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import runpy
import subprocess
import sys
import tomllib
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter

from amoeba_export import api, errors
from amoeba_export.artifact.manifest import Manifest
from amoeba_export.backends.targets import LimitsTable, TargetFile
from amoeba_export.builds.config import BuildFile, json_schema
from amoeba_export.builds.outcome import BuildReport
from amoeba_export.calibrate.recipe import Recipe
from amoeba_export.evaluate.quality import ShapeQuality
from amoeba_export.ir import RuntimeLimits, SubnetPlan, Target
from amoeba_export.ir.dtype import DTYPE_NAMES
from amoeba_export.ir.frontier import Frontier
from amoeba_export.load.families import supported_families
from amoeba_export.refit.recipe import RefitRecipe

HERE = Path(__file__).parent
_with_pieces = runpy.run_path(str(HERE / "pieces.py"))["with_pieces"]
ARCHITECTURE, README = HERE.parent / "ARCHITECTURE.md", HERE.parent / "README.md"


def commands_page() -> str:
    """Every command and option, by Typer's own generator, which shortens its lists of commands: here they are whole."""
    call = [sys.executable, "-m", "typer", "amoeba_export.cli.app", "utils", "docs", "--name", "amoeba"]
    page = subprocess.run(call, capture_output=True, check=True, text=True).stdout.rstrip() + "\n"
    says = dict(re.findall(r"^#+ `(.+)`\n\n(.+)", page, re.MULTILINE))
    lines, inside = [], ""
    for line in page.splitlines():
        if heading := re.fullmatch(r"#+ `(.+)`", line):
            inside = heading[1]
        listed = re.fullmatch(r"\* `([a-z]+)`: .*", line)
        lines.append(f"* `{listed[1]}`: {says[f'{inside} {listed[1]}']}" if listed else line)
    return "\n".join(lines) + "\n"


def errors_page() -> str:
    """Every exit code, its kind, and the mistakes of that kind."""
    lines = [
        "# Exit codes and errors",
        "",
        "| code | kind | meaning |",
        "|---|---|---|",
        "| 0 | | done |",
        "| 1 | | a bug in amoeba: run it again with `--debug` and report it |",
        *(f"| {kind.exit_code} | `{kind.__name__}` | {inspect.getdoc(kind)} |" for kind in _kinds()),
        "| 130 | | interrupted (Ctrl-C, SIGTERM, SIGHUP); nothing half-written is left |",
        "",
        "A signal ends every command within five seconds. Temporary files are removed, also after `kill -9`. Scores in",
        "the cache and checkpoints of a fine-tuning stay, so that you can continue. If the reader of stdout or stderr",
        "goes away (`| head`), the command continues, and the exit code shows its result.",
        "",
        "In Python, every error is an `amoeba_export.errors.AmoebaError` with `what`, `where` and `next_step`.",
    ]
    for kind in _kinds():
        mistakes = kind.__subclasses__()
        if mistakes:
            lines += ["", f"## {kind.exit_code}: {kind.__name__}", ""]
            lines += [f"- `{mistake.__name__}`: {_first_line(mistake)}" for mistake in mistakes]
    return "\n".join(lines) + "\n"


def _kinds() -> list[type[errors.AmoebaError]]:
    return sorted(errors.AmoebaError.__subclasses__(), key=lambda kind: kind.exit_code)


def _first_line(of: type) -> str:
    return (inspect.getdoc(of) or "").splitlines()[0]


def schema_page() -> str:
    """The JSON schema of amoeba.toml, for editors."""
    return json.dumps(json_schema(), indent=2) + "\n"


SHAPE = {"type": "string", "pattern": r"^\d+x\d+(\.\d+)?$", "description": "DEPTHxWIDTH, such as 24x0.75"}

EXPLAINED_BY = {TargetFile: Target, LimitsTable: RuntimeLimits}
"""Models whose keys another class explains."""

TOML_FILES: dict[str, tuple[type, str]] = {
    "amoeba.toml": (BuildFile, "The file for `amoeba build`. [Build many artifacts](build.md) explains it."),
    "A target": (
        TargetFile,
        "A device and its flow. [Targets](targets.md) explains it; `[options]` depend on the backend.",
    ),
    "A calibration recipe": (Recipe, "For `--recipe`. [Calibration](calibration.md) explains it."),
    "A refit recipe": (RefitRecipe, "In `calibration/refit/`. [Refit and heal](refit.md) explains it."),
}
JSON_FILES: dict[str, tuple[type, str]] = {
    "amoeba.json": (Manifest, "The manifest of an artifact. Amoeba writes it last."),
    "plan.json": (SubnetPlan, "The weights that a subnet keeps. `amoeba export --plan` exports it again."),
    "quality.json": (ShapeQuality, "One entry of `shapes`: the quality of a shape. From `amoeba evaluate --grid`."),
    "frontier.json": (Frontier, "All choices on a target. From `amoeba frontier --json` or `--plot F.json`."),
    "build-report.json": (BuildReport, "The outcome of each entry of a build."),
}


def schema_of(kind: type) -> dict[str, Any]:
    """The JSON schema of a dataclass or a pydantic model, with what docstrings say of its keys."""
    schema: dict[str, Any] = TypeAdapter(kind).json_schema()
    places = {kind.__name__: schema, **schema.get("$defs", {})}
    for one in set(_reachable(kind)):
        notes = _attributes(EXPLAINED_BY.get(one, one))
        for key, node in places.get(one.__name__, {}).get("properties", {}).items():
            node.pop("title", None)
            note = notes.get(key) or notes.get(f"{key}s")
            if note and "description" not in node:
                node["description"] = note
    if "Shape" in places and kind in (SubnetPlan, ShapeQuality):  # in these files a shape is a text
        schema["$defs"]["Shape"] = SHAPE
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _reachable(kind: Any) -> Iterator[type]:
    """A record and all records in its annotations."""
    if isinstance(kind, type) and (dataclasses.is_dataclass(kind) or issubclass(kind, BaseModel)):
        yield kind
        for hint in typing.get_type_hints(kind).values():
            yield from _reachable(hint)
    for inside in typing.get_args(kind):
        yield from _reachable(inside)


def _attributes(kind: type) -> dict[str, str]:
    """The section `Attributes` of the docstrings of a class and its bases."""
    found: dict[str, str] = {}
    for one in reversed(kind.__mro__):
        section = (inspect.getdoc(one) or "").partition("Attributes:\n")[2] if "__doc__" in vars(one) else ""
        for name, text in re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", section, re.MULTILINE):
            found[name] = " ".join(text.split())
    return found


def files_page(title: str, intro: str, files: Mapping[str, tuple[type, str]], *, nothing: str) -> str:
    """A page with a table of keys for each record of each file. `nothing` is what None is called in these files."""
    lines = [f"# {title}", "", intro]
    for name, (kind, about) in files.items():
        schema = schema_of(kind)
        records: dict[str, str] = {}
        for key, node in _references(schema):
            records.setdefault(node["$ref"].rpartition("/")[2], key)
        anchors = {record: _anchor(name, key) for record, key in records.items()}
        lines += ["", f"## {name}", "", about, "", *_keys(schema, anchors)]
        for record, key in records.items():
            node = schema["$defs"][record]
            if "properties" in node:
                lines += ["", f"### {name}: `{key}` {{#{anchors[record]}}}", "", *_keys(node, anchors)]
    return re.sub(r"\bNone\b", nothing, "\n".join(lines)) + "\n"


def _references(schema: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Every reference to a record with the key that has it, in the order of reading."""
    found: list[tuple[str, Mapping[str, Any]]] = []

    def look(node: Any, key: str) -> None:
        if isinstance(node, dict) and "$ref" in node:
            found.append((key, node))
            record = schema["$defs"][node["$ref"].rpartition("/")[2]]
            for name, inner in record.get("properties", {}).items():
                look(inner, name)
        elif isinstance(node, dict):
            for inner in node.values():
                look(inner, key)
        elif isinstance(node, list):
            for inner in node:
                look(inner, key)

    for name, node in schema["properties"].items():
        look(node, name)
    return found


def _keys(node: Mapping[str, Any], anchors: Mapping[str, str]) -> list[str]:
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key, value in node["properties"].items():
        default = "required" if key in node.get("required", ()) else _default(value.get("default"))
        rows.append(f"| `{key}` | {_type(value, anchors)} | {default} | {value.get('description', '')} |")
    return rows


def _default(value: Any) -> str:
    return "" if value is None or isinstance(value, dict) else f"`{json.dumps(value)}`"


def _type(node: Mapping[str, Any], anchors: Mapping[str, str]) -> str:
    """A JSON schema's type in words."""
    if node.get("$ref", "").endswith("/Shape"):
        return "text"
    if "$ref" in node:
        return f"[table](#{anchors[node['$ref'].rpartition('/')[2]]})"
    if "anyOf" in node:
        return " or ".join(_type(one, anchors) for one in node["anyOf"] if one.get("type") != "null")
    if "enum" in node:
        return ", ".join(f"`{value}`" for value in node["enum"])
    if node.get("type") == "array":
        return f"list of {_type(node['items'], anchors)}" if "items" in node else "list"
    if node.get("type") == "object":
        inside = node.get("additionalProperties")
        return f"table of {_type(inside, anchors)}" if isinstance(inside, dict) else "table"
    words = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true or false"}
    return words.get(node.get("type", ""), "anything")


def _anchor(file: str, name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", f"{file} {name}".lower()).strip("-")


def toml_page() -> str:
    """Every key of every file that people write."""
    intro = "The keys of the files that you write. The error for an unknown key names the nearest known key."
    return files_page("TOML files", intro, TOML_FILES, nothing="left out")


def json_page() -> str:
    """Every key of every file that amoeba writes for programs."""
    links = ", ".join(f"[{name}](schemas/{_schema_name(name)})" for name in JSON_FILES)
    intro = f"Keys of the files that amoeba writes. `schema_version` rises with a new meaning.\nJSON schemas: {links}."
    return files_page("JSON files", intro, JSON_FILES, nothing="null")


def _schema_name(file: str) -> str:
    return {"amoeba.json": "manifest.schema.json"}.get(file, file.replace(".json", ".schema.json"))


def api_page() -> str:
    """The public Python API, for mkdocstrings."""
    lines = [
        "# Python API",
        "",
        "The functions and types of `amoeba_export.api`. [Use it from Python](python.md) has an example of each stage.",
    ]
    kinds = {"Stages": inspect.isfunction, "Types": inspect.isclass}
    for title, is_one in kinds.items():
        lines += ["", f"## {title}"]
        for name in api.__all__:
            value = getattr(api, name)
            if is_one(value):
                lines += ["", f"::: {value.__module__}.{value.__qualname__}"]
    return "\n".join(lines) + "\n"


def architecture_page() -> str:
    """ARCHITECTURE.md with the layers of import-linter's contract."""
    begin, end = "<!-- layers: written by docs/generate.py from pyproject.toml -->", "<!-- /layers -->"
    before, rest = ARCHITECTURE.read_text(encoding="utf-8").split(begin)
    block = "\n".join(f"    {layer}" for layer in _layers())
    return f"{before}{begin}\n\n{block}\n\n{end}{rest.split(end)[1]}"


def readme_page() -> str:
    """README.md with the families and precisions that there are, between their marks."""
    text = README.read_text(encoding="utf-8")
    for mark, names in {"families": supported_families(), "dtypes": DTYPE_NAMES}.items():
        listed = ", ".join(f"`{name}`" for name in names)
        text = re.sub(rf"<!-- {mark} -->.*?(?=;|:)", f"<!-- {mark} -->{listed}", text, count=1)
    return text


def _layers() -> list[str]:
    """The layers from the top down, those of one layer with commas between them; rooms named once."""
    table = tomllib.loads((ARCHITECTURE.parent / "pyproject.toml").read_text(encoding="utf-8"))
    (contract,) = table["tool"]["importlinter"]["contracts"]
    lines = []
    for layer in contract["layers"]:
        names = re.findall(r"amoeba_export\.([\w.]+)", layer)
        room = names[0].rpartition(".")[0]
        inside = [name.removeprefix(f"{room}.") if room else name for name in names]
        lines.append((f"{room}: " if room else "") + ", ".join(inside))
    return lines


PAGES = {
    "commands.md": commands_page,
    "errors.md": errors_page,
    "toml.md": toml_page,
    "json.md": json_page,
    "api.md": api_page,
    "amoeba.schema.json": schema_page,
    "../ARCHITECTURE.md": architecture_page,
    "../README.md": readme_page,
    **{name: lambda name=name: _with_pieces(HERE / name) for name in ("tutorial.md", "extending.md")},
    **{
        f"schemas/{_schema_name(name)}": lambda kind=kind: json.dumps(schema_of(kind), indent=2) + "\n"
        for name, (kind, _) in JSON_FILES.items()
    },
}

if __name__ == "__main__":
    for name, make in PAGES.items():
        path = HERE / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(make(), encoding="utf-8")
