"""Takes the weights of a cut model and writes `model.onnx` and `model.onnx.data`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from amoeba_export.formats.awaited import Awaited
from amoeba_export.formats.equalize import Equalizer, is_equalized
from amoeba_export.formats.onnx.data import DATA_NAME, DataFile
from amoeba_export.formats.onnx.decoder import Dialect, record_decoder
from amoeba_export.formats.onnx.graph import Recorder
from amoeba_export.formats.onnx.names import Names
from amoeba_export.formats.onnx.ort import HEAD_MULTIPLE, OrtDialect
from amoeba_export.formats.onnx.precision import PRECISIONS
from amoeba_export.formats.onnx.quantize import is_rounded
from amoeba_export.formats.onnx.random_weights import fill_random
from amoeba_export.formats.onnx.standard import StandardDialect
from amoeba_export.formats.onnx.weights import WeightStore
from amoeba_export.ir import DenseArchitecture, Family, TensorSource

if TYPE_CHECKING:
    import onnx

MODEL_NAME = "model.onnx"

DIALECTS = ("ort", "standard")


def spelled_dialect(dense: DenseArchitecture, dialect: str) -> str:
    """The dialect that a graph is written in: onnxruntime runs both, and its own attention not at every head dim."""
    return "standard" if dialect == "ort" and not fits_attention(dense) else dialect


def fits_attention(dense: DenseArchitecture) -> bool:
    """Whether onnxruntime's own attention takes the heads of a model, and turns as much of them as it should."""
    sizes = {dense.base.head_dim, *(kind.rope.dims for kind in dense.base.layer_kinds if kind.rope is not None)}
    return all(size % HEAD_MULTIPLE == 0 for size in sizes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spelling:
    """How the function of a cut model is put into a graph. See `open_writer` for the settings.

    Attributes:
        head_tokens: Tokens that logits are computed of; None for all.
    """

    dtype: str
    dialect: str
    last_logits: bool
    head_tokens: tuple[int, ...] | None = None


class OnnxWriter:
    """A model being written. Weights go straight to their place in the data file; `model.onnx` is written last."""

    def __init__(
        self,
        dense: DenseArchitecture,
        family: Family,
        folder: Path,
        spelling: Spelling,
        *,
        rounded: TensorSource | None = None,
    ) -> None:
        self._folder = folder
        self._rounded = rounded
        self._graph, self._store = _record(dense, Names(family), spelling)
        self._awaited = Awaited({name: one.shape for name, one in self._store.placements.items()}, folder)
        linear = PRECISIONS[spelling.dtype].linear
        is_kept = partial(is_rounded, encoding=linear) if linear else None
        self._equalizer = Equalizer(
            tuple(self._awaited) if is_equalized("onnx", spelling.dtype) else (),
            family,
            norm_offset=dense.base.norm_offset,
            is_kept=is_kept,
        )
        self._file = DataFile(folder / DATA_NAME, self._store.layout.size_bytes)
        for region, values in self._store.tables:
            self._file.write(region, 0, values)

    def accept(self, name: str, weight: torch.Tensor) -> None:
        """Write one weight to its place, or keep it until those are there that are scaled together with it.

        Raises:
            WeightsMismatch: It is unknown, given twice, or of another shape.
            NotRepresentable: fp16 cannot hold its values.
            DiskFull: The space that was reserved is not there after all.
        """
        self._awaited.given(name, weight)
        if self._rounded is not None and name in self._rounded.names():
            weight = self._rounded.read(name)
        for ready, values in self._equalizer.take(name, weight):
            self._store.placements[ready].write(self._file, ready, values)

    def close(self) -> None:
        """Write the graph and finish, unsynced. Raises `WeightsMismatch` when a weight was not given."""
        self._file.close()
        self._awaited.check_complete()
        self._save_graph()

    def close_random(self, seed: int) -> None:
        """Fill every weight at random and finish."""
        fill_random(self._file, self._store, seed=seed)
        self._file.close()
        self._save_graph()

    def _save_graph(self) -> None:
        content = self._graph().SerializeToString(deterministic=True)
        (self._folder / MODEL_NAME).write_bytes(content)


def _record(
    dense: DenseArchitecture, names: Names, spelling: Spelling
) -> tuple[Callable[[], onnx.ModelProto], WeightStore]:
    """What makes the graph of `dense`, and the store that says where each of its weights goes."""
    precision = PRECISIONS[spelling.dtype]
    recorder = Recorder()
    store = WeightStore(recorder, precision)
    dialects: Mapping[str, Callable[..., Dialect]] = {"ort": OrtDialect, "standard": StandardDialect}
    dialect = dialects[spelling.dialect](dense, names, recorder, store, last_logits=spelling.last_logits)
    record_decoder(dense, names, dialect, store, spelling.head_tokens)
    return partial(recorder.model, opsets=dialect.opsets, ir_version=dialect.ir_version), store
