"""Takes the weights of a cut model and writes `model.onnx` and `model.onnx.data`."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import torch

from amoeba_export.errors import WeightsMismatch
from amoeba_export.formats.onnx import ort
from amoeba_export.formats.onnx.data import DATA_NAME, DataFile
from amoeba_export.formats.onnx.decoder import record_decoder
from amoeba_export.formats.onnx.graph import Recorder
from amoeba_export.formats.onnx.precision import Precision
from amoeba_export.formats.onnx.random_weights import fill_random
from amoeba_export.formats.onnx.weights import WeightStore
from amoeba_export.ir import DenseArchitecture

MODEL_NAME = "model.onnx"

DIALECTS = ("ort",)


def record_model(
    dense: DenseArchitecture, precision: Precision, *, dialect: str, left_padding: bool, last_logits: bool
) -> tuple[ir.Model, WeightStore]:
    """The graph of `dense`, and the store that says where each of its weights goes."""
    recorder = Recorder()
    store = WeightStore(recorder, precision)
    ops = ort.OrtDialect(dense.base, recorder, store, precision, left_padding=left_padding, last_logits=last_logits)
    record_decoder(dense, ops, recorder, precision.activation)
    return recorder.model(opsets=ort.OPSETS, ir_version=ort.IR_VERSION), store


class OnnxWriter:
    """A model being written. Weights go straight to their place in the data file; `model.onnx` is written last."""

    def __init__(self, model: ir.Model, store: WeightStore, folder: Path) -> None:
        self._model = model
        self._store = store
        self._folder = folder
        self._missing = dict(store.placements)
        self._file = DataFile(folder / DATA_NAME, store.layout.size_bytes)
        for region, values in store.tables:
            self._file.write(region, 0, values)

    def accept(self, name: str, weight: torch.Tensor) -> None:
        """See `Writer`. Raises `WeightsMismatch` for a weight that is unknown, given twice, or of another shape."""
        placement = self._missing.get(name)
        if placement is None:
            problem = "was given twice" if name in self._store.placements else "is not part of this model"
            raise WeightsMismatch([f"{name} {problem}"], where=self._folder)
        if tuple(weight.shape) != placement.shape:
            problem = f"{name} is {list(weight.shape)}, not {list(placement.shape)}"
            raise WeightsMismatch([problem], where=self._folder)
        placement.write(self._file, name, weight)
        del self._missing[name]

    def close(self) -> None:
        """See `Writer`. Raises `WeightsMismatch` when a weight was not given."""
        self._file.close()
        if self._missing:
            raise WeightsMismatch([f"{name} is missing" for name in self._missing], where=self._folder)
        self._save_graph()

    def close_random(self, seed: int) -> None:
        """Fill all weights at random and finish."""
        with self._file:
            fill_random(self._file, self._store, seed=seed)
        self._save_graph()

    def _save_graph(self) -> None:
        proto = ir.to_proto(self._model)
        (self._folder / MODEL_NAME).write_bytes(proto.SerializeToString(deterministic=True))
