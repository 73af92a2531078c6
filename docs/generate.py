"""Write what is made from the code: commands.md, errors.md, amoeba.schema.json, the layers. Tests compare them."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from amoeba_export import errors
from amoeba_export.builds.config import json_schema

HERE = Path(__file__).parent
ARCHITECTURE = HERE.parent / "ARCHITECTURE.md"


def commands_page() -> str:
    """Every command and option, by Typer's own generator."""
    call = [sys.executable, "-m", "typer", "amoeba_export.cli.app", "utils", "docs", "--name", "amoeba"]
    return subprocess.run(call, capture_output=True, check=True, text=True).stdout.rstrip() + "\n"


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
        "A signal ends every command within five seconds, and removes its temporary files. What a run can go on from",
        "stays: scores in the cache, and the checkpoints of a fine-tuning.",
        "A reader of stdout or stderr that goes away (`| head`) ends no work: the exit code tells how it went.",
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


def architecture_page() -> str:
    """ARCHITECTURE.md with the layers of import-linter's contract."""
    begin, end = "<!-- layers: written by docs/generate.py from pyproject.toml -->", "<!-- /layers -->"
    before, rest = ARCHITECTURE.read_text(encoding="utf-8").split(begin)
    block = "\n".join(f"    {layer}" for layer in _layers())
    return f"{before}{begin}\n\n{block}\n\n{end}{rest.split(end)[1]}"


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
    "amoeba.schema.json": schema_page,
    "../ARCHITECTURE.md": architecture_page,
}

if __name__ == "__main__":
    for name, make in PAGES.items():
        (HERE / name).write_text(make(), encoding="utf-8")
