"""What the runner is given to open: the files of an artifact, or a graph of the same dims without weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amoeba_export.errors import InputError, NotFound
from amoeba_export.ir import DenseArchitecture, LayerPlan, Shape, Subnet, SubnetPlan
from amoeba_export.ir.dtype import DTYPES, FLOATS
from amoeba_export.load.family_file import read_family
from amoeba_export.model.foreign_code import refuse_foreign_code

if TYPE_CHECKING:
    from amoeba_export.backends import Subject

Prepare = Callable[["Subject", Path, Any], dict[str, Any]]
"""Given a subject, an empty folder and the backend's options: the folder to open and what the engine wants to know."""

RANDOM_BYTES = "bytes"
"""What the runner fills a weight with that is not of floats."""


def artifact_folder(subject: Subject, container: str) -> Path:
    """The folder of `subject`'s artifact that holds `container`. Raises `NotFound`, `ForeignCode`."""
    assert subject.artifact is not None
    folder = subject.artifact / container
    if not folder.is_dir():
        raise NotFound(
            f"The {container} files of {subject.label}",
            folder,
            next_step=f"Export it with --format {container}, or measure it on a target that runs what it has.",
        )
    refuse_foreign_code(folder)
    return folder


def spelling(options: Any, dtype: str) -> dict[str, Any]:
    """How a graph of `dtype` is spelled for a backend's `options`: settings of the ONNX format's `open_writer`."""
    dialect = options.dialect
    if dialect == "auto":
        dialect = "ort" if DTYPES[dtype].is_quantized else "standard"
    return {"dialect": dialect}


def prepare_onnx(subject: Subject, folder: Path, options: Any) -> dict[str, Any]:
    """An ONNX graph; without an artifact, one whose weights the runner makes where it runs."""
    if subject.artifact is not None:
        found = artifact_folder(subject, "onnx")
        return {
            "folder": str(found),
            "model": "model.onnx",
            "is_mapped": True,
            **_graph_facts(subject, found / "model.onnx"),
        }
    from amoeba_export.formats.onnx import write_random

    write_random(subject.dense, folder, dtype=subject.dtype, **spelling(options, subject.dtype))
    path = folder / "model.onnx"
    regions = _regions(path)
    for name in {region["file"] for region in regions}:
        (folder / name).unlink()  # the runner makes weights where and while it measures, so that none lie or travel
    weights = {"file": regions[0]["file"], "regions": regions} if regions else None
    return {"folder": str(folder), "model": path.name, "weights": weights, **_graph_facts(subject, path)}


def prepare_genai(subject: Subject, folder: Path, options: Any) -> dict[str, Any]:
    """As `prepare_onnx`, with the `genai_config.json` that ONNX Runtime GenAI reads."""
    prepared = prepare_onnx(subject, folder, options)
    config = Path(prepared["folder"]) / "genai_config.json"
    if subject.artifact is None:
        from amoeba_export.formats.onnx.genai import genai_config

        content = genai_config(subject.dense, folder)
        for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
            content["model"][token] = content["model"][token] or 0  # the runtime wants numbers and never stops by them
        config.write_text(json.dumps(content), encoding="utf-8")
    elif not config.is_file():
        raise NotFound("The GenAI configuration", config, next_step="Export the artifact again with --format onnx.")
    return prepared


def prepare_safetensors(subject: Subject, folder: Path, options: Any) -> dict[str, Any]:
    """A Hugging Face directory; without an artifact, its config alone: the engine makes the weights."""
    if subject.artifact is not None:
        found = artifact_folder(subject, "safetensors")
        return {"folder": str(found), "dtype": DTYPES[subject.dtype].torch_name, "random": False}
    from amoeba_export.formats import safetensors
    from amoeba_export.formats.config import dense_config

    if DTYPES[subject.dtype].is_quantized:
        raise InputError(
            f"{subject.label} has weights of {subject.dtype}, and random ones are made as floats alone.",
            next_step="Export it, and time the artifact.",
        )
    safetensors.check(subject.dense, dtype=subject.dtype)
    config = dense_config(_as_subnet(subject.dense), dtype=DTYPES[subject.dtype].torch_name)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return {"folder": str(folder), "dtype": DTYPES[subject.dtype].torch_name, "random": True}


def prepare_gguf(subject: Subject, folder: Path, options: Any) -> dict[str, Any]:
    """A GGUF file; without an artifact, its header alone: the runner makes the weights where it runs."""
    if subject.artifact is None:
        from amoeba_export.formats import gguf
        from amoeba_export.formats.gguf.random_weights import write_random

        gguf.check(subject.dense, dtype=subject.dtype)
        weights = write_random(subject.dense, folder, dtype=subject.dtype)
        return {"folder": str(folder), "model": weights["file"], "weights": weights}
    found = artifact_folder(subject, "gguf")
    files = sorted(found.glob("*.gguf"))
    if not files:
        raise NotFound(f"The GGUF file of {subject.label}", found, next_step="Export it again with --format gguf.")
    return {"folder": str(found), "model": files[0].name, "is_mapped": True}


def _as_subnet(dense: DenseArchitecture) -> Subnet:
    """`dense` as a cut of its supernet's first layers, for writers that want to know. It has no weights."""
    import torch

    base = dense.base
    heads, kv_heads, ffn = range(base.num_heads), range(base.num_kv_heads), range(base.ffn_size)
    layers = tuple(
        LayerPlan(
            source_layer=i,
            query_heads=tuple(heads[: dims.num_heads]),
            kv_heads=tuple(kv_heads[: dims.num_kv_heads]),
            ffn=tuple(ffn[: dims.ffn_size]),
        )
        for i, dims in enumerate(dense.layers)
    )
    return Subnet(
        architecture=dense,
        family=read_family(base.family).family,
        plan=SubnetPlan(shape=Shape(len(layers), 1.0), policy="adaptive", layers=layers),
        specs=(),
        stream=lambda: iter(()),
        source_folder=Path(),
        source_dtype=torch.float32,
        model_name="random",
    )


def _graph_facts(subject: Subject, path: Path) -> dict[str, Any]:
    """What the engine cannot see in a graph.

    That is whether past and present are one buffer, to which GroupQueryAttention appends, and the size of a head, which
    a graph may leave open.
    """
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    shared_kv = any(node.op_type == "GroupQueryAttention" for node in graph.node)
    return {"shared_kv": shared_kv, "head_dim": subject.dense.base.head_dim}


def _float_of(onnx_type: int) -> str:
    """The `--dtype` of an ONNX type of floats, `RANDOM_BYTES` for others."""
    from amoeba_export.formats.onnx.precision import PRECISIONS

    kinds = (name for name in FLOATS if PRECISIONS[name].activation == onnx_type)
    return next(kinds, RANDOM_BYTES)


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
                    "dtype": _float_of(weight.data_type),
                }
            )
    return regions
