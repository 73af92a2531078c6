"""`refit.safetensors`: fitted weights of one cut as tensors, the rest as one JSON text in the file's metadata."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from amoeba_export.errors import DamagedFile, NotFound
from amoeba_export.ir import Refit, TensorSpec
from amoeba_export.ir.safetensors_header import safetensors_header
from amoeba_export.load.checkpoint import open_file
from amoeba_export.reading import check_schema, parse_json_object
from amoeba_export.replacing import replacing

SCHEMA = 1
_METADATA = "amoeba_refit"
_NEXT_STEP = "Make it again with 'amoeba refit', or leave --refit out."
_FACTS = ("geometry", "model_id", "adapters", "kind", "settings", "losses")


def write_refit(
    path: Path,
    facts: Mapping[str, Any],
    specs: Sequence[TensorSpec],
    weights: Iterable[tuple[str, torch.Tensor]],
    *,
    dtype: torch.dtype,
) -> Refit:
    """Write a refit at once or not at all, one weight in memory at a time. Same weights and facts, same bytes.

    Args:
        path: Where it goes.
        facts: `geometry`, `model_id`, `adapters`, `kind`, `settings`, `losses` of `Refit`.
        specs: What it will hold.
        weights: Exactly these, in this order.
        dtype: Of all of them in the file.
    """
    text = json.dumps({"schema_version": SCHEMA, **{key: facts[key] for key in _FACTS}}, sort_keys=True)
    kinds = dict.fromkeys((spec.name for spec in specs), dtype)
    header, _, size_bytes = safetensors_header(specs, kinds, metadata={_METADATA: text})
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, shared=True) as part, part.open("wb") as file:
        file.write(header)
        for spec, (name, weight) in zip(specs, weights, strict=True):
            assert (spec.name, spec.shape) == (name, tuple(weight.shape)), (spec, name, weight.shape)
            file.write(weight.detach().to(dtype).contiguous().reshape(-1).view(torch.uint8).numpy().data)
        assert file.tell() == size_bytes, (file.tell(), size_bytes)
    return read_refit(path)


def read_refit(path: Path) -> Refit:
    """Open what `write_refit` wrote. Weights stay on disk until they are asked for.

    Raises:
        NotFound: There is no such file.
        DamagedFile: It is not a refit, or its parts do not fit together.
        InputError: It is of another version.
        NonFiniteWeights: When a weight is read that has NaN or infinity in it.
    """
    if not path.is_file():
        raise NotFound("The refit", path, next_step="Make one with 'amoeba refit', or leave --refit out.")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_METADATA)
        data = None if text is None else parse_json_object(text)
    except (SafetensorError, ValueError) as error:
        raise DamagedFile(path, str(error), next_step=_NEXT_STEP) from error
    if data is None:
        raise DamagedFile(path, "a safetensors file without a refit in it", next_step=_NEXT_STEP)
    check_schema(data, SCHEMA, what="refit", where=path, next_step=_NEXT_STEP)
    try:
        refit = _deserialize(data, path)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedFile(path, f"{type(error).__name__}: {error}", next_step=_NEXT_STEP) from error
    return replace(refit, identity=_sha256(path))


def _deserialize(data: Mapping[str, Any], path: Path) -> Refit:
    losses = {
        str(text): {str(name): _finite(value) for name, value in figures.items()}
        for text, figures in data["losses"].items()
    }
    if data["kind"] not in ("refit", "heal"):
        raise ValueError(f"its kind is {data['kind']!r}")
    return Refit(
        tensors=open_file(path),
        geometry=str(data["geometry"]),
        model_id=str(data["model_id"]),
        adapters=tuple(map(str, data["adapters"])),
        kind=data["kind"],
        settings=dict(data["settings"]),
        losses=losses,
        identity="",
    )


def _finite(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is not a loss")
    return float(value)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
