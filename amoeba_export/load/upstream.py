"""The published strategy file, `dp_selection_strategy.npy`: a pickled dict inside a numpy file.

Layout (upstream `main.py` and `width_shrink/prune.py`):

    strategy    {removed layers: 0/1 vector [L]}
    metric      {removed layers: metric of that choice}
    width_mask  {"base_model.model.model.layers.{i}.{module}": None, or {ratio: bool mask over the module's outputs}}
    bias        {the same names: None, or {ratio: vector [D]}}

Masks are on q, k, v, gate and up; biases are on o and down. A ratio is a float, or an int 1, which need not be all
ones. Without it, width 1 has no mask and no bias. `final_strategy.npy` is the same without masks and biases.
"""

from __future__ import annotations

import hashlib
import numbers
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from amoeba_export.errors import DamagedFile, UnsupportedError, WrongModel
from amoeba_export.ir import Architecture, FixedWidth, Strategy
from amoeba_export.load.unpickle import load_pickled_npy

PREFIX = "base_model.model."
_MODULE = re.compile(re.escape(PREFIX) + r"model\.layers\.(\d+)\.((?:self_attn|mlp)\.(?:q|k|v|o|gate|up|down)_proj)")
_MASKED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
_BIASED = ("self_attn.o_proj", "mlp.down_proj")

_Table = Mapping[tuple[int, str], Mapping[Any, NDArray[Any]] | None]
"""(layer, module) -> ratio -> array; None where the module has no mask (no bias)."""


def import_upstream(path: Path, architecture: Architecture, *, metric: str = "loss") -> Strategy:
    """Read a published strategy for the model that it was made for.

    Args:
        path: `dp_selection_strategy.npy` or `final_strategy.npy`.
        architecture: Of that model. The file names no head dim, and its masks are checked against this.
        metric: What the file's `metric` is; it does not say.

    Returns:
        A strategy with `depth`, and masks and biases in `widths`. `model_id` is None: the file knows dims, not weights.

    Raises:
        NotFound: There is no such file.
        UnsafePickle: It asks for something that is not an array.
        DamagedFile: It is not a strategy, or contradicts itself.
        WrongModel: Its layers, heads, neurons or hidden size are not those of `architecture`.
        UnsupportedError: Its masks cut inside a head, or a module that is never cut.
    """
    data = load_pickled_npy(path)
    if not isinstance(data, dict):
        raise DamagedFile(path, f"a pickled {type(data).__name__}, not a strategy")
    depth = _depth(data.get("strategy"), path)
    num_layers = len(depth[0])
    if num_layers != architecture.num_layers:
        raise WrongModel(
            "The strategy", [f"num_layers is {num_layers} there and {architecture.num_layers} here"], where=path
        )
    masks = _by_layer(data.get("width_mask"), "width_mask", _MASKED, num_layers, path)
    biases = _by_layer(data.get("bias"), "bias", _BIASED, num_layers, path)
    ratios = sorted({ratio for entry in masks.values() for ratio in entry or ()}, reverse=True)
    return Strategy(
        model_id=None,
        num_layers=num_layers,
        num_heads=architecture.num_heads,
        num_kv_heads=architecture.num_kv_heads,
        head_dim=architecture.head_dim,
        ffn_size=architecture.ffn_size,
        depth=depth,
        depth_metric=_metric(data.get("metric"), path),
        metric=metric,
        widths={float(ratio): _fixed_width(ratio, masks, biases, architecture, path) for ratio in ratios},
        policy="adaptive",
        provenance={"imported_from": path.name, "imported_sha256": hashlib.sha256(path.read_bytes()).hexdigest()},
    )


def _depth(table: Any, path: Path) -> dict[int, tuple[int, ...]]:
    if not isinstance(table, dict) or not table:
        raise DamagedFile(path, "it has no table of kept layers")
    depth: dict[int, tuple[int, ...]] = {}
    for removed, vector in table.items():
        kept = np.asarray(vector)
        if kept.dtype.kind not in "bif" or kept.ndim != 1 or not np.isin(kept, (0, 1)).all():
            raise DamagedFile(path, f"the layers kept without {removed} are not a vector of 0 and 1")
        if removed != kept.size - kept.sum():
            raise DamagedFile(path, f"the layers kept without {removed} are {int(kept.sum())} of {kept.size}")
        depth[int(removed)] = tuple(int(keep) for keep in kept)
    lengths = {len(kept) for kept in depth.values()}
    if len(lengths) != 1:
        raise DamagedFile(path, f"its depths have {sorted(lengths)} layers")
    depth[0] = (1,) * lengths.pop()
    return dict(sorted(depth.items()))


def _metric(table: Any, path: Path) -> dict[int, float]:
    if table is None:
        return {}
    if not isinstance(table, dict) or not all(
        isinstance(key, numbers.Integral) and isinstance(value, numbers.Real) for key, value in table.items()
    ):
        raise DamagedFile(path, "its metric is not a table of numbers")
    return {int(removed): float(value) for removed, value in table.items()}


def _by_layer(table: Any, kind: str, wanted: tuple[str, ...], num_layers: int, path: Path) -> _Table:
    """The entries of `width_mask` or `bias`: every layer and wanted module is there, and nothing else."""
    every = [(layer, module) for layer in range(num_layers) for module in wanted]
    if table is None:
        return dict.fromkeys(every)
    if not isinstance(table, dict):
        raise DamagedFile(path, f"its {kind} is not a table")
    entries: dict[tuple[int, str], Mapping[Any, NDArray[Any]] | None] = {}
    for name, entry in table.items():
        match = _MODULE.fullmatch(str(name))
        key = (int(match[1]), match[2]) if match else None
        if key in every:
            if entry is not None and not _is_vectors(entry):
                raise DamagedFile(path, f"the {kind} of {name} is not a table of vectors by ratio")
            entries[key] = entry
        elif entry is not None:
            raise UnsupportedError(
                f"The strategy has a {kind} for {name}.",
                where=path,
                next_step=f"A {kind} can be on {', '.join(wanted)} of the layers 0 to {num_layers - 1}, named "
                f"{PREFIX}model.layers.N.MODULE, as the published code writes them.",
            )
    for layer, module in every:
        if (layer, module) not in entries:
            raise DamagedFile(path, f"its {kind} has nothing for {PREFIX}model.layers.{layer}.{module}")
    return entries


def _is_vectors(entry: Any) -> bool:
    return isinstance(entry, dict) and all(
        isinstance(ratio, numbers.Real) and 0 < float(ratio) <= 1 and isinstance(array, np.ndarray) and array.ndim == 1
        for ratio, array in entry.items()
    )


def _fixed_width(ratio: Any, masks: _Table, biases: _Table, architecture: Architecture, path: Path) -> FixedWidth:
    query, kv = architecture.axis_size("query"), architecture.axis_size("kv")
    heads, neurons, o_bias, down_bias = [], [], [], []
    for layer in range(architecture.num_layers):
        q_Q, k_K, v_K, gate_F, up_F = (
            _mask(masks, layer, module, ratio, size, path)
            for module, size in zip(_MASKED, (query, kv, kv, architecture.ffn_size, architecture.ffn_size), strict=True)
        )
        if not np.array_equal(gate_F, up_F):
            raise DamagedFile(path, f"layer {layer}: gate_proj and up_proj keep different neurons")
        heads.append(_heads(q_Q, k_K, v_K, layer, architecture, path))
        neurons.append(gate_F)
        o_bias.append(_bias(biases, layer, _BIASED[0], ratio, architecture.hidden_size, path))
        down_bias.append(_bias(biases, layer, _BIASED[1], ratio, architecture.hidden_size, path))
    return FixedWidth(
        heads_LN=np.stack(heads),
        ffn_LF=np.stack(neurons),
        o_bias_LD=np.stack(o_bias),
        down_bias_LD=np.stack(down_bias),
    )


def _mask(table: _Table, layer: int, module: str, ratio: Any, size: int, path: Path) -> NDArray[np.bool_]:
    mask = _entry(table, layer, module, ratio, size, path)
    if mask is None:
        return np.ones(size, dtype=bool)
    if mask.dtype.kind not in "bif" or not np.isin(mask, (0, 1)).all():
        raise DamagedFile(path, f"layer {layer}: the mask of {module} is not 0 and 1")
    return mask.astype(bool)


def _bias(table: _Table, layer: int, module: str, ratio: Any, size: int, path: Path) -> NDArray[np.float32]:
    bias = _entry(table, layer, module, ratio, size, path)
    if bias is None:
        return np.zeros(size, dtype=np.float32)
    if bias.dtype.kind != "f" or not np.isfinite(bias).all():
        raise DamagedFile(path, f"layer {layer}: the bias of {module} is not finite")
    return bias.astype(np.float32)


def _entry(table: _Table, layer: int, module: str, ratio: Any, size: int, path: Path) -> NDArray[Any] | None:
    entry = table[layer, module]
    if entry is None:
        return None
    if ratio not in entry:
        raise DamagedFile(path, f"layer {layer}: {module} has nothing for the ratio {ratio}")
    if entry[ratio].size != size:
        raise WrongModel(
            "The strategy", [f"{module} has {entry[ratio].size} channels there and {size} here"], where=path
        )
    return entry[ratio]


def _heads(
    q_Q: NDArray[np.bool_],
    k_K: NDArray[np.bool_],
    v_K: NDArray[np.bool_],
    layer: int,
    architecture: Architecture,
    path: Path,
) -> NDArray[np.bool_]:
    """Kept query heads [N] from the masks over the outputs of q, k and v."""
    rows = [mask.reshape(-1, architecture.head_dim) for mask in (q_Q, k_K, v_K)]
    if not all((row == row[:, :1]).all() for row in rows):
        raise UnsupportedError(
            f"The strategy cuts inside a head of layer {layer} (heads here have {architecture.head_dim} channels).",
            where=path,
            next_step="Give the model that it was made for; parts of a head cannot be kept.",
        )
    heads_N, keys_K, values_K = (row[:, 0] for row in rows)
    served_K = heads_N.reshape(architecture.num_kv_heads, architecture.heads_per_kv).any(axis=1)
    if not (np.array_equal(served_K, keys_K) and np.array_equal(served_K, values_K)):
        raise DamagedFile(path, f"layer {layer}: k_proj or v_proj keeps other heads than q_proj")
    return heads_N
