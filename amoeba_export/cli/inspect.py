"""`amoeba inspect`: what a file or folder is, whatever amoeba can read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import RenderableType

from amoeba_export.artifact import is_artifact, read_manifest
from amoeba_export.cli.artifacts import files_table, result_table
from amoeba_export.cli.console import answer, facts, percent, print_json, table, titled
from amoeba_export.cli.options import AsJson
from amoeba_export.cli.strategies import strategy_facts, strategy_to_json
from amoeba_export.errors import InputError, NotFound
from amoeba_export.ir import SubnetPlan
from amoeba_export.reading import read_json_object

Shown = tuple[dict[str, Any], list[RenderableType]]
"""The answer for programs, and for people."""


def inspect(
    path: Annotated[Path, typer.Argument(metavar="FILE|DIR", help="The file or folder to show.")],
    html: Annotated[
        Path | None,
        typer.Option("--html", metavar="F", help="Write a page about an artifact: plan, latency, quality, provenance."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a file or folder contains. Reads no weights.

    It knows artifacts, plans, strategies, cost tables, models and adapters.
    """
    data, shown = _look(path)
    if html is not None:
        _write_page(path, html)
    if as_json:
        print_json(data)
        return
    console = answer()
    for position, renderable in enumerate(shown):
        if position:
            console.print()
        console.print(renderable)


def _write_page(folder: Path, page: Path) -> None:
    from amoeba_export.application.card import artifact_page
    from amoeba_export.replacing import replace_text

    if not is_artifact(folder):
        raise InputError(
            "--html makes a page about an artifact.",
            where=folder,
            next_step="Give a folder that 'amoeba export' wrote.",
        )
    replace_text(page, artifact_page(folder))


def _look(path: Path) -> Shown:
    if not path.exists():
        raise NotFound("What should be inspected", path)
    if path.is_dir():
        if is_artifact(path):
            return _artifact(path)
        if (path / "adapter_config.json").is_file():
            return _adapter(path)
        if (path / "config.json").is_file():
            return _model(path)
    elif path.suffix == ".json":
        return _json(path)
    elif path.suffix in (".safetensors", ".npy"):
        return _strategy(path)
    elif path.suffix == ".gguf":
        return _model(path)
    raise InputError(
        "This is nothing that amoeba can inspect.",
        where=path,
        next_step="Give an artifact, a model or adapter folder, a plan.json, a cost table, or a strategy.safetensors.",
    )


def _artifact(folder: Path) -> Shown:
    manifest = read_manifest(folder)
    origins = table("input", "name", "sha256")
    for item in manifest.inputs:
        origins.add_row(item.role, item.id, item.sha256)
    return (
        {"kind": "artifact", **manifest.to_json()},
        [result_table(manifest), files_table(manifest.files, folder), origins, facts(dict(manifest.tool))],
    )


def _json(path: Path) -> Shown:
    data = read_json_object(path, what="What should be inspected")
    if "fits" in data:
        return inspect_cost_table(path)
    if "layers" in data:
        return _plan(SubnetPlan.from_json(data, where=str(path)), path)
    if path.name == "amoeba.json":
        return _artifact(path.parent)
    raise InputError(
        "This JSON file is neither a plan nor a cost table.", where=path, next_step="Give a plan.json or a cost table."
    )


def _plan(plan: SubnetPlan, path: Path) -> Shown:
    rows = {
        "shape": str(plan.shape),
        "policy": plan.policy,
        "compensation": "removed channels are replaced by their mean" if plan.compensate else "none",
        "model id": plan.model_id or "any",
        "strategy": plan.strategy_id or "none",
    }
    if plan.gate_width is not None:
        rows["gate width"] = f"{plan.gate_width:g}"
    layers = table("layer", "of", "query heads", "KV heads", "FFN units", right=("layer", "of", "FFN units"))
    for position, layer in enumerate(plan.layers):
        layers.add_row(
            str(position),
            str(layer.source_layer),
            " ".join(map(str, layer.query_heads)) or "-",
            " ".join(map(str, layer.kv_heads)) or "-",
            str(len(layer.ffn)),
        )
    return {"kind": "plan", **plan.to_json()}, [titled(str(path), facts(rows)), layers]


def _strategy(path: Path) -> Shown:
    from amoeba_export.load import read_strategy

    strategy = read_strategy(path)
    depths = table("depth", strategy.metric, "removed layers", right=("depth", strategy.metric))
    for removed, kept in sorted(strategy.depth.items()):
        metric = strategy.depth_metric.get(removed)
        gone = " ".join(str(i) for i, keep in enumerate(kept) if not keep)
        depths.add_row(str(sum(kept)), "-" if metric is None else f"{metric:.4f}", gone or "-")
    shown: list[RenderableType] = [titled(str(path), facts(strategy_facts(strategy))), depths]
    if strategy.quality:
        widths = sorted({shape.width for shape in strategy.quality}, reverse=True)
        columns = [f"x{width:g}" for width in widths]
        grid = table("depth", *columns, right=("depth", *columns))
        values = {(shape.depth, shape.width): value for shape, value in strategy.quality.items()}
        for depth in sorted({shape.depth for shape in strategy.quality}, reverse=True):
            cells = [values.get((depth, width)) for width in widths]
            grid.add_row(str(depth), *("-" if cell is None else f"{cell:.4f}" for cell in cells))
        shown.append(titled(f"quality ({strategy.quality_metric})", grid))
    return strategy_to_json(strategy), shown


def inspect_cost_table(path: Path) -> Shown:
    """The answer about a cost table file, which `profile` gives too."""
    from amoeba_export.profile import read_table, table_to_json

    costs = read_table(path)
    rows = {
        "target": costs.target,
        "dtype": costs.dtype,
        "source": costs.source,
        "workload": f"prompt {costs.workload.prompt_tokens}, batch {costs.workload.batch}",
        "graphs": str(len(costs.measurements)),
    }
    for name, fit in costs.fits.items():
        errors = sorted(abs(error) for error in fit.leave_one_out)
        rows[name.replace("_", " ")] = f"{percent(errors[len(errors) // 2])} median leave-one-out error"
    return {"kind": "cost table", **table_to_json(costs)}, [titled(str(path), facts(rows | dict(costs.device)))]


def _model(path: Path) -> Shown:
    from amoeba_export.load import load_supernet

    supernet = load_supernet(str(path))
    full = supernet.architecture.uncut
    dims = supernet.architecture
    data: dict[str, Any] = {
        "kind": "model",
        "name": supernet.name,
        "family": dims.family,
        "identity": supernet.identity,
        "num_params": full.num_params,
        "num_layers": dims.num_layers,
        "hidden_size": dims.hidden_size,
        "num_heads": dims.num_heads,
        "num_kv_heads": dims.num_kv_heads,
        "head_dim": dims.head_dim,
        "ffn_size": dims.ffn_size,
        "vocab_size": dims.vocab_size,
        "max_positions": dims.max_positions,
        "tied_embeddings": dims.tied_embeddings,
        "rope_theta": dims.rope_theta,
    }
    rows = {name.replace("_", " "): f"{value}" for name, value in data.items() if name != "kind"}
    rows["num params"] = f"{full.num_params:,}"
    return data, [titled(str(path), facts(rows))]


def _adapter(folder: Path) -> Shown:
    path = folder / "adapter_config.json"
    config = read_json_object(path, what="The adapter's config")
    shown = {key: value for key, value in config.items() if value not in (None, [], {}, False)}
    rows = {key: value if isinstance(value, str) else json.dumps(value) for key, value in shown.items()}
    return {"kind": "adapter", "config": config}, [titled(str(folder), facts(rows))]
