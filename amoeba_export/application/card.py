"""One page about an artifact: what it keeps, how fast and how good it is, how it was verified, what it is made from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from amoeba_export.application.resolve import read_plan
from amoeba_export.artifact import LatencyRecord, Manifest, read_manifest
from amoeba_export.errors import DamagedFile, InputError
from amoeba_export.ir import SubnetPlan, validate
from amoeba_export.pictures import plan_picture, render
from amoeba_export.quantities import milliseconds, percent, size

Rows = list[tuple[str, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelBar:
    """The artifact, or the full model in one precision. `share` is in percents of the longest bar."""

    name: str
    share: float
    latency: str
    quality: str
    is_own: bool


def artifact_page(folder: Path) -> str:
    """The page, as one self-contained HTML file: what the artifact says of itself. It reads no weights.

    Raises:
        NotFound: It is no artifact.
        InputError: Its manifest or plan is damaged, or they are not of one model.
    """
    manifest, plan = read_manifest(folder), read_plan(folder)
    architecture = manifest.architecture()
    try:
        validate(plan, architecture)
    except InputError as error:
        raise DamagedFile(folder / "plan.json", f"it is no plan of the model of the manifest ({error.what})") from error
    bars, limit_at = _bars(manifest)
    latency, compensated = manifest.latency, plan.is_compensated(architecture)
    return render(
        "artifact.html.j2",
        title=f"{manifest.model}{f' for {latency.target}' if latency else ''}: {manifest.shape.shape}",
        summary=f"{folder.name}. What the artifact says of itself; 'amoeba verify' checks it.",
        tiles=_tiles(manifest, plan),
        models=bars,
        limit_at=limit_at,
        latency_words=_latency_words(latency) if latency else "",
        plan=plan_picture(plan, architecture),
        policy=plan.policy + (", removed channels are replaced by their mean" if compensated else ""),
        tables=_tables(manifest),
        inputs=manifest.inputs,
        files=manifest.files,
        tool=manifest.tool,
    )


def _tiles(manifest: Manifest, plan: SubnetPlan) -> list[tuple[str, str, str]]:
    dense = plan.dense(manifest.architecture())
    share = dense.num_params / manifest.architecture().uncut.num_params
    layers = f"{len(plan.layers)} of {manifest.architecture().num_layers} layers"
    tiles = [
        ("shape", str(plan.shape), f"{layers}, {percent(share)} of the weights"),
        ("precision", manifest.dtype, ""),
    ]
    if (latency := manifest.latency) and latency.actual_ms is not None:
        used = ""
        if latency.budget_ms:
            used = f", {percent(latency.actual_ms / latency.budget_ms)} of {milliseconds(latency.budget_ms)}"
        tiles.append(
            (f"{latency.metric} p{latency.percentile}", milliseconds(latency.actual_ms), latency.source + used)
        )
    for name, value in _own_quality(manifest):
        full = (manifest.quality or {}).get(f"{name}_full")
        tiles.append((name, f"{value:.4g}", "" if full is None else f"full model {full:.4g}"))
    record = manifest.verification
    if record is not None:
        tiles.append(("verified", "same tokens" if record.greedy_tokens_equal else "tokens differ", "greedy decoding"))
    total = sum(file.size_bytes for file in manifest.files)
    tiles.append(("size", size(total), f"{len(manifest.files)} files"))
    return tiles


def _own_quality(manifest: Manifest) -> list[tuple[str, float]]:
    return [(name, value) for name, value in (manifest.quality or {}).items() if not name.endswith("_full")]


def _bars(manifest: Manifest) -> tuple[list[ModelBar], float | None]:
    """The artifact beside the full model in each precision, and where the budget is, in percents."""
    latency = manifest.latency
    if latency is None or latency.actual_ms is None:
        return [], None
    known = [one.latency_ms for one in manifest.reference]
    most_ms = max(latency.actual_ms, latency.budget_ms or 0.0, *known)
    if not 0 < most_ms < float("inf"):
        return [], None
    own = ", ".join(f"{name} {value:.4g}" for name, value in _own_quality(manifest))
    bars = [
        ModelBar(
            name="this artifact",
            share=100 * latency.actual_ms / most_ms,
            latency=milliseconds(latency.actual_ms),
            quality=own,
            is_own=True,
        )
    ]
    for one in manifest.reference:
        quality = ", ".join(f"{name} {value:.4g}" for name, value in (one.quality or {}).items())
        bars.append(
            ModelBar(
                name=", ".join(filter(None, (f"full in {one.dtype}", one.rounding_words))),
                share=100 * one.latency_ms / most_ms,
                latency=milliseconds(one.latency_ms),
                quality=quality,
                is_own=False,
            )
        )
    return bars, 100 * latency.budget_ms / most_ms if latency.budget_ms else None


def _latency_words(latency: LatencyRecord) -> str:
    work = latency.workload
    use = f"{work.prompt_tokens} tokens of prompt, {work.generate_tokens} to generate, batch {work.batch}"
    how = "measured" if latency.source == "measured" else f"an estimate ({latency.source}), no device was asked"
    return f"{latency.metric} p{latency.percentile} on {latency.target}: {use}; {how}."


def _tables(manifest: Manifest) -> list[tuple[str, str, Rows]]:
    """Heading, what it is about, rows."""
    tables: list[tuple[str, str, Rows]] = []
    if (refit := manifest.refit) is not None:
        done = "Healed by distillation" if refit.kind == "heal" else "Refitted"
        rows = [
            (text, f"{losses['cut']:.3f} as it was cut, {losses['refit']:.3f} now, full model {losses['full']:.3f}")
            for text, losses in refit.losses.items()
            if {"cut", "refit", "full"} <= set(losses)
        ]
        tables.append(("Recovery", f"{done}. Loss on text that nothing was fitted on, in nats a token.", rows))
    if (kept := manifest.vocabulary) is not None:
        tables.append(("Vocabulary", "Token ids are the source's.", [("head", kept.words)]))
    if (record := manifest.verification) is not None:
        rows = [("greedy tokens", "the same" if record.greedy_tokens_equal else "differ")]
        rows.append(("largest difference of a logit", f"{record.max_abs_diff:.3g}"))
        if record.mean_kl is not None:
            rows.append(("KL divergence from the subnet unquantized", f"{record.mean_kl:.3g} nats a token"))
            rows.append(("perplexity over that of the subnet unquantized", f"{record.perplexity_ratio:.3f}"))
        about = "The files as they were re-opened from disk, compared with the masked full model."
        tables.append(("Verification", about, rows))
    if (latency := manifest.latency) is not None:
        rows = [(name.replace("_", " "), value) for name, value in latency.device.items()]
        if latency.predicted_ms is not None:
            error = f" ± {percent(latency.uncertainty)}" if latency.uncertainty else ""
            rows.insert(0, ("predicted", f"{milliseconds(latency.predicted_ms)}{error}"))
        rows += [(f"{latency.metric} {name}", milliseconds(ms)) for name, ms in (latency.measured_ms or {}).items()]
        tables.append(("Device", "", rows))
    return [table for table in tables if table[2]]
