"""Every stage as a function. The commands of the same names call these. `docs/python.md` has an example of each.

    from amoeba_export.api import ExportRequest, export
    export(ExportRequest(model="demo", target="cpu", latency="75%"))

This is a separate module, because `amoeba_export.calibrate` and others are packages. Names are imported at their first
use, so that importing this module imports no torch. Every stage takes `progress`, a `Progress` that it reports to, and
raises an `AmoebaError` for every mistake that amoeba can name.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from amoeba_export.application.bench import Benched, bench, refuse_slower
    from amoeba_export.application.calibrate import calibrate
    from amoeba_export.application.card import artifact_page
    from amoeba_export.application.evaluate import evaluate
    from amoeba_export.application.finetune import finetune
    from amoeba_export.application.pipeline import ExportResult, export, frontier, search
    from amoeba_export.application.profile import profile
    from amoeba_export.application.refit import heal, refit
    from amoeba_export.application.request import ExportRequest
    from amoeba_export.application.subjects import EvaluateRequest, Grid
    from amoeba_export.application.verify import Verified, verify
    from amoeba_export.backends.targets import over_ssh, read_target
    from amoeba_export.builds.outcome import BuildReport
    from amoeba_export.builds.run import BuildOptions, build
    from amoeba_export.errors import AmoebaError
    from amoeba_export.evaluate.quality import QualityFile
    from amoeba_export.finetune import Finetuned, LowRankSettings, ObjectiveSettings, Settings
    from amoeba_export.ir import Progress, Shape, Strategy, Workload
    from amoeba_export.ir.frontier import Frontier
    from amoeba_export.load import load_supernet
    from amoeba_export.profile import CostTable

_HOMES = {
    "application.bench": ("Benched", "bench", "refuse_slower"),
    "application.calibrate": ("calibrate",),
    "application.card": ("artifact_page",),
    "application.evaluate": ("evaluate",),
    "application.finetune": ("finetune",),
    "application.pipeline": ("ExportResult", "export", "frontier", "search"),
    "application.profile": ("profile",),
    "application.refit": ("heal", "refit"),
    "application.request": ("ExportRequest",),
    "application.subjects": ("EvaluateRequest", "Grid"),
    "application.verify": ("Verified", "verify"),
    "backends.targets": ("over_ssh", "read_target"),
    "builds.outcome": ("BuildReport",),
    "builds.run": ("BuildOptions", "build"),
    "errors": ("AmoebaError",),
    "evaluate.quality": ("QualityFile",),
    "finetune": ("Finetuned", "LowRankSettings", "ObjectiveSettings", "Settings"),
    "ir": ("Progress", "Shape", "Strategy", "Workload"),
    "ir.frontier": ("Frontier",),
    "load": ("load_supernet",),
    "profile": ("CostTable",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "AmoebaError",
    "Benched",
    "BuildOptions",
    "BuildReport",
    "CostTable",
    "EvaluateRequest",
    "ExportRequest",
    "ExportResult",
    "Finetuned",
    "Frontier",
    "Grid",
    "LowRankSettings",
    "ObjectiveSettings",
    "Progress",
    "QualityFile",
    "Settings",
    "Shape",
    "Strategy",
    "Verified",
    "Workload",
    "artifact_page",
    "bench",
    "build",
    "calibrate",
    "evaluate",
    "export",
    "finetune",
    "frontier",
    "heal",
    "load_supernet",
    "over_ssh",
    "profile",
    "read_target",
    "refit",
    "refuse_slower",
    "search",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"amoeba_export.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value
