"""What `evaluate` runs: the masked supernet at some shapes, or an artifact."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from amoeba_export.artifact import is_artifact, read_manifest
from amoeba_export.errors import InputError, UnknownName, UsageError
from amoeba_export.ir import Architecture, Policy, Progress, Shape, SubnetPlan, Supernet
from amoeba_export.ir.dtype import DTYPES, TRAINED_DTYPES

if TYPE_CHECKING:
    from amoeba_export.evaluate import EvaluatedModel, ShapeQuality
    from amoeba_export.finetune.model import RunningSubnet

GRID_WIDTHS = (1.0, 0.875, 0.75, 0.625, 0.5)
"""Widths of a grid where neither adapter nor strategy lists any."""

FORMATS = ("safetensors", "onnx")
"""Containers that can be evaluated, the preferred one first."""


@dataclass(frozen=True)
class Grid:
    """Depths and widths to measure; empty means the usual ones."""

    depths: tuple[int, ...] = ()
    widths: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class EvaluateRequest:
    """What is measured, and on what. One of `text` and `tasks` at least.

    A supernet runs masked, at any shape, with its adapters. An artifact runs as it was written: `shape`, `grid`,
    `strategy` and `adapters` are of a supernet only, `container` is of an artifact only.

    Attributes:
        model: A supernet (folder, hub id, `demo`), or a folder that export wrote.
        text: A text file, for perplexity.
        window: Tokens that see each other.
        windows: Only the first so many windows; None for all.
        tasks: Files (.jsonl, .toml), or names of lm-eval tasks.
        task_folder: Task files for lm-eval (YAML).
        limit: Items per task; None for all.
        shape: Such as `24x0.75` (layers x width); None for the full model.
        grid: All of these shapes instead.
        strategy: What calibration found; needed for every shape but the full one.
        policy: `uniform` or `adaptive`: how a width is spread over layers.
        dtype: In which a supernet runs.
        container: Which of an artifact's formats; None for the first it has.
        out: Where to keep the result; shapes in it are not repeated. None for a grid with adapters: `quality.json` of
            the last adapter, where `export` finds it.
    """

    model: str = "demo"
    text: Path | None = None
    window: int = 512
    windows: int | None = None
    tasks: tuple[str, ...] = ()
    task_folder: Path | None = None
    limit: int | None = None
    shape: str | None = None
    grid: Grid | None = None
    strategy: Path | None = None
    adapters: tuple[Path, ...] = ()
    policy: str = "uniform"
    dtype: str = TRAINED_DTYPES[0]
    container: str | None = None
    out: Path | None = None


def subject_of(request: EvaluateRequest, progress: Progress) -> EvaluatedModel:
    """What `request` wants to be run.

    Raises:
        UsageError: A setting that an artifact cannot have.
        UnknownName: The artifact does not have the format.
        InputError: A file is missing or belongs to another model; there is no strategy for the shape; or the artifact
            has nothing that can be evaluated, or computes logits of some tokens alone.
    """
    if not is_artifact(Path(request.model)):
        return _of_supernet(request, progress)
    if request.grid or request.shape or request.strategy or request.adapters:
        raise UsageError(
            "An artifact has one shape, with everything in it.",
            next_step="Leave out --grid, --shape, --strategy and --adapter.",
        )
    return _of_artifact(Path(request.model), request.container)


def _of_artifact(folder: Path, container: str | None) -> EvaluatedModel:
    """One format of an artifact."""
    from amoeba_export.application.resolve import read_plan
    from amoeba_export.evaluate import ArtifactModel, EvaluatedModel
    from amoeba_export.verify.reload import open_format

    manifest = read_manifest(folder)
    there = [name for name in FORMATS if (folder / name).is_dir()]
    architecture = manifest.architecture()
    if not there or architecture is None:
        raise InputError(
            "This artifact has no format that can be evaluated."
            if architecture
            else "This artifact's manifest does not say the dims of its model.",
            where=folder,
            next_step=f"Export it again with --format {' or '.join(FORMATS)}.",
        )
    if container is not None and container not in there:
        raise UnknownName("format in this artifact", container, there)
    chosen = container or there[0]
    plan = read_plan(folder)
    if plan.head_tokens is not None:
        raise InputError(
            f"This artifact computes logits of {len(plan.head_tokens):,} of {architecture.vocab_size:,} tokens: a text "
            "with any other token has no finite loss.",
            where=folder,
            next_step="'vocabulary' in its amoeba.json has the loss of what it can write; or export it again without "
            "--vocab-keep, and evaluate that.",
        )
    return EvaluatedModel(
        facts={"artifact": manifest.model, "format": chosen, "files": {f.path: f.sha256 for f in manifest.files}},
        tokenizer=folder / chosen,
        max_length=architecture.max_positions,
        shapes=(_sizes(plan, architecture),),
        open=lambda shape: ArtifactModel(open_format(chosen, folder)),
    )


def _of_supernet(request: EvaluateRequest, progress: Progress) -> EvaluatedModel:
    """The masked supernet, read into memory when its first shape is run."""
    import torch

    from amoeba_export.evaluate import EvaluatedModel
    from amoeba_export.finetune.model import RunningSubnet, SlicedSupernet
    from amoeba_export.finetune.smol import adapters_at
    from amoeba_export.load import load_supernet

    given = Shape.parse(request.shape) if request.shape else None
    supernet = load_supernet(request.model, adapters=request.adapters, strategy=request.strategy, progress=progress)
    shapes = _grid_shapes(request.grid, supernet) if request.grid else (given or _full(supernet),)
    plans = {known: _plan(supernet, known, request.policy) for known in shapes}
    held: list[SlicedSupernet] = []

    def running(shape: Shape) -> RunningSubnet:
        if not held:
            device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
            precision = DTYPES[request.dtype].torch_dtype
            held.append(SlicedSupernet(supernet, dtype=precision, device=device or "cpu"))
        plan = plans[shape]
        return RunningSubnet(held[0], held[0].cut(plan), adapters_at(supernet.adapters, plan, device=held[0].device))

    return EvaluatedModel(
        facts={
            "model": supernet.name,
            "inputs": {f"{item.role} {item.id}": item.sha256 for item in supernet.inputs},
            "policy": request.policy,
            "dtype": request.dtype,
        },
        tokenizer=supernet.text_folder,
        max_length=supernet.architecture.max_positions,
        shapes=tuple(_sizes(plans[known], supernet.architecture) for known in shapes),
        open=running,
    )


def _sizes(plan: SubnetPlan, architecture: Architecture) -> ShapeQuality:
    from amoeba_export.evaluate import ShapeQuality

    dense = plan.dense(architecture)
    kept = sum(architecture.prunable_params(layer) for layer in dense.layers)
    whole = architecture.num_layers * architecture.prunable_params()
    return ShapeQuality(shape=plan.shape, num_params=dense.num_params, prunable=kept / whole)


def _full(supernet: Supernet) -> Shape:
    return Shape(supernet.architecture.num_layers, 1.0)


def _grid_shapes(grid: Grid, supernet: Supernet) -> tuple[Shape, ...]:
    known = supernet.strategy
    if known is None:
        raise _no_strategy()
    depths = grid.depths or tuple(known.num_layers - removed for removed in known.depth)
    widths = grid.widths or supernet.gate_widths or ({1.0, *known.widths} if known.widths else GRID_WIDTHS)
    return tuple(Shape(d, w) for d in sorted(set(depths), reverse=True) for w in sorted(set(widths), reverse=True))


def _plan(supernet: Supernet, shape: Shape, policy: str) -> SubnetPlan:
    from amoeba_export.ir.derive import CutRules, derive_plan

    if supernet.strategy is None:
        if shape != _full(supernet):
            raise _no_strategy()
        return supernet.full_plan()
    kind: Policy = "adaptive" if policy == "adaptive" else "uniform"
    rules = CutRules(policy=kind, gate_widths=supernet.gate_widths)
    return derive_plan(supernet.strategy, supernet.architecture, shape, rules)


def _no_strategy() -> InputError:
    return InputError(
        "A shape needs a strategy, which says what it keeps.",
        next_step="Make one with 'amoeba calibrate', and give it with --strategy.",
    )
