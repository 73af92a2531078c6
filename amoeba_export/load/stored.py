"""How the files of a folder hold a family's weights: some joined, some in pieces. What we see are the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from amoeba_export.ir import Architecture, TensorSource
from amoeba_export.load.checkpoint import Checkpoint, open_checkpoint
from amoeba_export.load.experts import JoinedTensors, pieces_of, shapes_in_pieces
from amoeba_export.load.families import expected_weights, tied_copies
from amoeba_export.load.family_file import FamilyFile
from amoeba_export.load.fused import SplitTensors, parts_of, put_together, stored_shapes


def open_tensors(
    folder: Path,
    file: FamilyFile,
    architecture: Architecture,
    rename: Callable[[str], str | None] | None = None,
) -> tuple[Checkpoint, TensorSource]:
    """The files of a checkpoint, and the family's weights in them.

    Args:
        folder: Of the checkpoint.
        file: Says what the files join or split.
        architecture: Says which weights there are.
        rename: See `open_checkpoint`.
    """
    expected = expected_weights(file.family, architecture)
    parts, pieces = parts_of(file.family, expected, architecture.num_layers), pieces_of(file.family, architecture)
    files = open_checkpoint(
        folder,
        shapes_in_files(file, architecture),
        copies=tied_copies(file.family, architecture),
        ignored={name.format(layer=i) for name in file.ignored for i in range(architecture.num_layers)},
        rename=rename,
    )
    tensors: TensorSource = SplitTensors(files, expected, parts) if parts else files
    return files, JoinedTensors(tensors, expected, pieces) if pieces else tensors


def shapes_in_files(file: FamilyFile, architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Name -> shape of what the files have."""
    expected = expected_weights(file.family, architecture)
    parts = parts_of(file.family, expected, architecture.num_layers)
    return shapes_in_pieces(stored_shapes(expected, parts), pieces_of(file.family, architecture))


def as_in_files(
    weights: Iterable[tuple[str, torch.Tensor]], file: FamilyFile, architecture: Architecture
) -> Iterator[tuple[str, torch.Tensor]]:
    """`weights` under the names that the files have, joined or taken apart as there."""
    expected, pieces = expected_weights(file.family, architecture), pieces_of(file.family, architecture)
    parts = parts_of(file.family, expected, architecture.num_layers)
    for name, weight in put_together(weights, expected, parts):
        place = pieces.get(name)
        if place is None:
            yield name, weight
        else:
            yield from zip(place.names, weight.chunk(len(place.names), place.dim), strict=True)
