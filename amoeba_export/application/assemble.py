"""Write what one plan keeps: every container that was asked for, and the plan itself, into the staging folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amoeba_export.application.session import Session
from amoeba_export.artifact import PLAN_NAME, Staging
from amoeba_export.backends.targets import graph_options
from amoeba_export.formats.write import WriteJob, format_dtypes, write_formats
from amoeba_export.ir import Progress, SubnetPlan, Supernet
from amoeba_export.ir.dtype import AUTO
from amoeba_export.materialize import materialize_subnet

Cutter = Callable[[Supernet, WriteJob, Progress], None]
"""Writes the weights of one cut of a supernet; returns when all of its files are complete."""


def cut_alone(supernet: Supernet, cut: WriteJob, progress: Progress) -> None:
    """The cutter of a single export: reads the supernet for this cut alone."""
    write_formats(cut.subnet, cut.folder, cut.dtypes, options=cut.options, progress=progress)


@dataclass(frozen=True, slots=True, kw_only=True)
class Assembler:
    """Fills `staging` with one plan after another; what was there before goes."""

    staging: Staging
    cut: Cutter

    def __call__(self, session: Session, plan: SubnetPlan) -> Path:
        """Write `plan`'s files in the session's dtype, and return their folder."""
        self.staging.clear()
        dtypes = container_dtypes(session, plan)
        subnet, folder = materialize_subnet(session.supernet, plan), self.staging.folder
        options = _spelling(session, dtypes)
        self.cut(
            session.supernet, WriteJob(subnet=subnet, folder=folder, dtypes=dtypes, options=options), session.progress
        )
        write_plan(plan, folder)
        return folder


def container_dtypes(session: Session, plan: SubnetPlan) -> dict[str, str]:
    """The dtype of each container. Raises `NotRepresentable` where one cannot hold `plan`."""
    settings = session.settings
    dense = plan.dense(session.architecture)
    return format_dtypes(dense, settings.formats, settings.dtype, explicit=settings.explicit_dtype)


def check_containers(session: Session) -> Session:
    """`session`; raises `NotRepresentable` where a container can hold no plan of its model. Asked before the work.

    The uncut model is what most of them can hold, if they can hold any.
    """
    settings = session.settings
    dtype = None if settings.dtype == AUTO else settings.dtype
    format_dtypes(session.full, settings.formats, dtype, explicit=settings.explicit_dtype)
    return session


def _spelling(session: Session, dtypes: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Settings of the formats that the runtime of the target wants, and the integers that were chosen for one."""
    options: dict[str, dict[str, Any]] = {}
    if session.settings.target is not None and "onnx" in dtypes:
        options["onnx"] = graph_options(session.settings.target, dtypes["onnx"])
    held = session.rounded
    if held is not None and dtypes.get(held.format) == held.dtype:
        options[held.format] = {**options.get(held.format, {}), "rounded": held.tensors}
    return options


def write_plan(plan: SubnetPlan, folder: Path) -> None:
    """Write `plan.json`: one key a line, each layer on a line of its own, so that a diff of two plans can be read."""
    data = plan.to_json()
    layers = ",\n    ".join(json.dumps(layer, separators=(",", ":")) for layer in data.pop("layers"))
    tokens = data.pop("head_tokens", None)
    head = json.dumps(data, indent=2)[:-2]
    if tokens is not None:
        head += f',\n  "head_tokens": {json.dumps(tokens, separators=(",", ":"))}'
    (folder / PLAN_NAME).write_text(f'{head},\n  "layers": [\n    {layers}\n  ]\n}}\n', encoding="utf-8")
