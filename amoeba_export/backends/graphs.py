"""What the runner is given to open: the files of an artifact, or a graph of the same dims without weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amoeba_export.errors import NotFound

if TYPE_CHECKING:
    from amoeba_export.backends import Subject
    from amoeba_export.ir import DenseArchitecture

Prepare = Callable[["Subject", Path, Any], dict[str, Any]]
"""Given a subject, an empty folder and the backend's options: the folder to open and what the engine wants to know."""

_DTYPES: Mapping[int, str] = {1: "fp32", 10: "fp16", 16: "bf16"}
"""ONNX's numbers of float types; everything else is filled with random bytes."""


def artifact_folder(subject: Subject, container: str) -> Path:
    """The folder of `subject`'s artifact that holds `container`. Raises `NotFound`."""
    assert subject.artifact is not None
    folder = subject.artifact / container
    if not folder.is_dir():
        raise NotFound(
            f"The {container} files of {subject.label}",
            folder,
            next_step=f"Export it with --format {container}, or measure it on a target that runs what it has.",
        )
    return folder


def prepare_onnx(subject: Subject, folder: Path, options: Any) -> dict[str, Any]:
    """An ONNX graph; without an artifact, one whose weights the runner makes where it runs."""
    if subject.artifact is not None:
        found = artifact_folder(subject, "onnx")
        return {"folder": str(found), "model": "model.onnx", **_graph_facts(found / "model.onnx")}
    path = folder / "model.onnx"
    _write_graph(subject.dense, path, dtype=subject.dtype, dialect=options.dialect, on_cpu=options.runs_on_cpu)
    regions = _regions(path)
    weights = {"file": regions[0]["file"], "regions": regions} if regions else None
    return {"folder": str(folder), "model": path.name, "weights": weights, **_graph_facts(path)}


def _write_graph(dense: DenseArchitecture, path: Path, *, dtype: str, dialect: str, on_cpu: bool) -> None:
    """The graph that the ONNX writer makes for `dense`, without its weights."""
    import onnx
    import onnx_ir

    from amoeba_export.formats import onnx as onnx_format
    from amoeba_export.formats.onnx.precision import PRECISIONS
    from amoeba_export.formats.onnx.writer import record_model

    onnx_format.check(dense, dtype=dtype, dialect=dialect)
    model, _ = record_model(dense, PRECISIONS[dtype], dialect=dialect, left_padding=on_cpu, last_logits=False)
    onnx.save(onnx_ir.to_proto(model), path)


def _graph_facts(path: Path) -> dict[str, Any]:
    """GroupQueryAttention appends to the cache that it is given when past and present are one buffer."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    return {"shared_kv": any(node.op_type == "GroupQueryAttention" for node in graph.node)}


def _regions(path: Path) -> list[dict[str, Any]]:
    """Where each external weight of the graph lies, and its type."""
    import onnx

    regions = []
    for weight in onnx.load(path, load_external_data=False).graph.initializer:
        place = {entry.key: entry.value for entry in weight.external_data}
        if place:
            regions.append(
                {
                    "file": place["location"],
                    "offset": int(place.get("offset", 0)),
                    "length": int(place["length"]),
                    "dtype": _DTYPES.get(weight.data_type, "bytes"),
                }
            )
    return regions
