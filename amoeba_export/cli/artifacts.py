"""How an artifact is shown: what it is, how fast and how exact it was seen to be, and its files."""

from __future__ import annotations

import shlex
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path

import typer
from rich.console import RenderableType

from amoeba_export.artifact import FileEntry, FullModelRecord, LatencyRecord, Manifest, RefitRecord, VerificationRecord
from amoeba_export.cli.console import facts, milliseconds, percent, size, table, titled
from amoeba_export.ir import Latency


def result_table(manifest: Manifest, *, full: Latency | None = None) -> RenderableType:
    """Shape, latency against its budget, quality and verification of one artifact.

    Args:
        manifest: The artifact's.
        full: The uncut model's latency, where it was measured in the same run.
    """
    shape = manifest.shape
    rows = {"shape": f"{shape.shape} (layers x width), {layer_counts(manifest)}", "dtype": manifest.dtype}
    if manifest.latency:
        rows |= _latency_rows(manifest.latency, full)
    if len(manifest.reference) > 1:
        rows |= reference_rows(manifest.reference)
    if manifest.quality:
        rows["quality"] = _quality(manifest.quality)
    if manifest.refit:
        rows |= _refit_rows(manifest.refit)
    if manifest.vocabulary:
        rows["vocabulary"] = manifest.vocabulary.words
    if manifest.verification:
        rows["verified"] = verified(manifest.verification)
    target = f" for {manifest.latency.target}" if manifest.latency else ""
    return titled(f"{manifest.model}{target}", facts(rows))


def reference_rows(reference: Sequence[FullModelRecord]) -> dict[str, str]:
    """What the full model gives in each precision, for comparison with what was chosen."""
    return {f"whole in {one.dtype}": _whole(one) for one in reference}


def _whole(one: FullModelRecord) -> str:
    quality = "".join(f", {name} {value:.4g}" for name, value in (one.quality or {}).items())
    how = "" if one.source == "measured" else f" ({one.source})"
    rounding = f", {one.rounding_words}" if one.rounding_words else ""
    kept = {True: ", keeps the budget", False: ", misses the budget", None: ""}[one.keeps_budget]
    return f"{milliseconds(one.latency_ms)}{how}{quality}{rounding}{kept}"


def files_table(files: Sequence[FileEntry], folder: Path) -> RenderableType:
    """Files and their sizes."""
    made = table("file", "size", right=("size",))
    for file in files:
        made.add_row(file.path, size(file.size_bytes))
    made.add_row("total", size(sum(file.size_bytes for file in files)), style="bold")
    return titled(str(folder), made)


def layer_counts(manifest: Manifest) -> str:
    """What a layer keeps: the counts when all layers agree, else their ranges."""
    layers = manifest.shape.layers

    def span(counts: Sequence[int]) -> str:
        return f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"

    heads, kv_heads, ffn = (
        span([getattr(layer, name) for layer in layers]) for name in ("query_heads", "kv_heads", "ffn")
    )
    return f"{heads} query heads, {kv_heads} KV heads, {ffn} FFN units a layer"


def verified(record: VerificationRecord) -> str:
    """What a verification came to, in one line."""
    tokens = "same greedy tokens" if record.greedy_tokens_equal else "greedy tokens differ"
    if record.mean_kl is not None:
        perplexity = f"perplexity {record.perplexity_ratio:.2f} times as high"
        return f"KL divergence {record.mean_kl:.2g} nats a token from the subnet unquantized, {perplexity}, {tokens}"
    return f"largest difference {record.max_abs_diff:.2g} to the masked supernet, {tokens}"


def command(*words: str | Path) -> str:
    """A command line that can be pasted."""
    return shlex.join(map(str, words))


def words_given(context: typer.Context, *, but: Container[str]) -> Iterator[str]:
    """The arguments and options that the running command was given, to be pasted behind another one.

    Args:
        context: Of the running command.
        but: Parameters to leave out, by their names in Python.
    """
    for parameter in sorted(context.command.params, key=lambda one: one.param_type_name):  # arguments first
        name = parameter.name or ""
        source = context.get_parameter_source(name)
        if name in but or source is None or source.name != "COMMANDLINE":
            continue
        value = context.params[name]
        if value is True:
            yield parameter.opts[0]
            continue
        for one in value if isinstance(value, list | tuple) else [value]:
            yield from ([str(one)] if parameter.param_type_name == "argument" else [parameter.opts[0], str(one)])


def _latency_rows(latency: LatencyRecord, full: Latency | None) -> dict[str, str]:
    what = f"{latency.metric} p{latency.percentile}"
    rows = {}
    if latency.budget_ms is not None:
        rows["budget"] = f"{milliseconds(latency.budget_ms)}  {what}"
    if full is not None:
        named = f"  in {latency.full_dtype}" if latency.full_dtype else ""
        rows["full model"] = f"{milliseconds(full.of(latency.metric, latency.percentile))}{named}"
    uncertainty = f"  ± {percent(latency.uncertainty)}" if latency.uncertainty else ""
    if latency.measured_ms is None:
        rows["estimate"] = f"{milliseconds(latency.predicted_ms)}{uncertainty}  ({latency.source}, no device was asked)"
    else:
        if latency.predicted_ms is not None:
            rows["predicted"] = f"{milliseconds(latency.predicted_ms)}{uncertainty}"
        both = ", ".join(f"{name} {milliseconds(value)}" for name, value in latency.measured_ms.items())
        rows["measured"] = f"{milliseconds(latency.actual_ms)}  ({latency.metric} {both})"
    if latency.budget_ms is not None and latency.actual_ms is not None:
        rows["used"] = f"{percent(latency.actual_ms / latency.budget_ms)} of the budget"
    return rows


def _refit_rows(refit: RefitRecord) -> dict[str, str]:
    """Losses on text that nothing was fitted on: as it was cut, as it is shipped, and those of the full model."""
    name = "healed" if refit.kind == "heal" else "refitted"
    lines = [
        f"{text}: loss {losses['cut']:.3f} to {losses['refit']:.3f}  (full model {losses['full']:.3f})"
        for text, losses in refit.losses.items()
    ]
    return {name: "\n".join(lines)}


def _quality(quality: Mapping[str, float]) -> str:
    figures = [f"{name} {value:.4g}" for name, value in quality.items() if not name.endswith("_full")]
    full = [f"{value:.4g}" for name, value in quality.items() if name.endswith("_full")]
    return ", ".join(figures) + (f"  (full model {full[0]})" if full else "")
