"""One layer whose matrices are rounded, and the tensors that it is kept as while the others are done."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from amoeba_export.ir.rounded import Grid
from amoeba_export.refit.gptq import Rounded, RoundedBlocks

_PARTS = ("codes_OC", "steps_OG", "offsets_OG")
_BLOCK_PARTS = ("packed_ON", "values_OC")


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundedLayer:
    """One layer: matrices on their grids, and the vectors that its format may scale with them, by name."""

    matrices: Mapping[str, Rounded | RoundedBlocks]
    others: Mapping[str, torch.Tensor]


def tensors_of(layer: RoundedLayer) -> dict[str, torch.Tensor]:
    """All of a layer, by name and part."""
    tensors = {name: weight.contiguous() for name, weight in layer.others.items()}
    for name, rounded in layer.matrices.items():
        if isinstance(rounded, RoundedBlocks):
            tensors |= {f"{name}/{part}": getattr(rounded, part).cpu().contiguous() for part in _BLOCK_PARTS}
            tensors[f"{name}/kind"] = torch.tensor(rounded.kind)
            continue
        tensors |= {f"{name}/{part}": getattr(rounded, part).cpu().contiguous() for part in _PARTS}
        tensors[f"{name}/grid"] = torch.tensor(list(json.dumps(dataclasses.asdict(rounded.grid)).encode()))
    return tensors


def layer_of(tensors: Mapping[str, torch.Tensor]) -> RoundedLayer:
    """What `tensors_of` was given."""
    matrices: dict[str, Rounded | RoundedBlocks] = {}
    for name in (key.removesuffix("/kind") for key in tensors if key.endswith("/kind")):
        parts = {part: tensors[f"{name}/{part}"] for part in _BLOCK_PARTS}
        matrices[name] = RoundedBlocks(**parts, kind=int(tensors[f"{name}/kind"]))
    for name in (key.removesuffix("/grid") for key in tensors if key.endswith("/grid")):
        grid = Grid(**json.loads(bytes(tensors[f"{name}/grid"].tolist())))
        matrices[name] = Rounded(**{part: tensors[f"{name}/{part}"] for part in _PARTS}, grid=grid)
    return RoundedLayer(matrices=matrices, others={name: weight for name, weight in tensors.items() if "/" not in name})
