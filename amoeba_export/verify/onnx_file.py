"""`model.onnx` opened again, in ONNX Runtime on the CPU: as it is, or with its arithmetic in fp32."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch

from amoeba_export.errors import DamagedFile
from amoeba_export.verify.opened import LARGE_BYTES, Continuation, Past, Rope, greedy
from amoeba_export.verify.stored.onnx import MODEL_NAME, initializer, read_model

_HALVES = {onnx.TensorProto.FLOAT16: "fp16", onnx.TensorProto.BFLOAT16: "bf16"}
_NAMES = {onnx.TensorProto.FLOAT: "fp32", **_HALVES}
_PADDING = 3
_TABLE = re.compile(r"rope(?:\.(?P<kind>\w+))?\.(?P<part>cos|sin)")
"""A table of RoPE, and the layer type that it is for where there are several."""

_INPUTS = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class OpenedOnnx:
    """Prefill and decode through the same graph.

    bf16 runs in fp32 at once: ONNX Runtime has no kernels for it on a CPU.
    """

    def __init__(self, folder: Path, *, rope: Rope | None = None) -> None:
        import onnxruntime

        onnxruntime.disable_telemetry_events()  # for who imported it before amoeba, which set the variable too late
        self._folder = folder
        path = folder / MODEL_NAME
        model = read_model(path)
        self.dtype = _dtype(model.graph, path)
        self.is_exact = rope is not None or self.dtype == "fp32"
        names = sorted(one.name for one in model.graph.initializer if _TABLE.fullmatch(one.name))
        by_name = {one.name: one for one in model.graph.initializer}
        self._tables = {name: initializer(by_name[name], path) for name in names}
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = torch.get_num_threads()  # of this thread: others may verify beside it
        source: str | bytes = str(path)
        if self.dtype == "bf16" or rope is not None:
            self._widened = _widen(model, path, rope)  # held: the session reads it where it is
            options.add_external_initializers(list(self._widened), list(self._widened.values()))
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
            source = model.SerializeToString()
        self._session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        self._inputs = {value.name: value for value in self._session.get_inputs()}
        self._outputs = [value.name for value in self._session.get_outputs()]

    def exact(self, rope: Rope) -> OpenedOnnx | None:
        """See `Opened`. Halves are widened in memory, so not those of a very large file."""
        if self.is_exact:
            return self
        size_bytes = sum(path.stat().st_size for path in self._folder.glob(f"{MODEL_NAME}*"))
        return None if self.dtype == "fp16" and size_bytes > LARGE_BYTES else OpenedOnnx(self._folder, rope=rope)

    def logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        """See `Opened`."""
        return self._step(input_ids, self._cache(None))[0]

    def continued(self, prompt: torch.Tensor, num_tokens: int) -> Continuation:
        """See `Opened`."""
        past: Mapping[str, np.ndarray[Any, Any]] = self._cache(None)

        def step(ids: torch.Tensor) -> torch.Tensor:
            nonlocal past
            logits, past = self._step(ids, past)
            return logits

        return greedy(step, prompt, num_tokens)

    def with_past(self, past: Past, input_ids: torch.Tensor) -> torch.Tensor:
        """See `Opened`."""
        return self._step(input_ids, self._cache(past))[0]

    def padded(self, input_ids: torch.Tensor) -> torch.Tensor:
        """See `Opened`."""
        row = torch.nn.functional.pad(input_ids, (_PADDING, 0))
        return self._step(row, self._cache(None), padding=_PADDING)[0][:, _PADDING:]

    def rope(self, num_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Opened`: the tables of the file, those of several layer types side by side."""
        path = self._folder / MODEL_NAME
        found = []
        for part in ("cos", "sin"):
            tables = [table for name, table in self._tables.items() if name.endswith(f".{part}")]
            if not tables or any(table.ndim != 2 or not _has_rows(len(table), num_positions) for table in tables):
                shapes = [list(table.shape) for table in tables]
                raise DamagedFile(path, f"its tables of RoPE are {shapes}, for {num_positions} positions")
            found.append(torch.from_numpy(np.concatenate([np.array(one, dtype=np.float32) for one in tables], axis=1)))
        return found[0], found[1]

    def _cache(self, past: Past | None) -> dict[str, np.ndarray[Any, Any]]:
        arrays = {}
        for name, value in self._inputs.items():
            if not name.startswith("past_key_values."):
                continue
            _, idx, kind = name.split(".")
            if past is None:
                _, heads, _, head_dim = value.shape
                arrays[name] = np.zeros((1, heads, 0, head_dim), dtype=_INPUTS[value.type])
            else:
                arrays[name] = past[int(idx)][kind == "value"].numpy().astype(_INPUTS[value.type])
        return arrays

    def _step(
        self, input_ids: torch.Tensor, past: Mapping[str, np.ndarray[Any, Any]], *, padding: int = 0
    ) -> tuple[torch.Tensor, dict[str, np.ndarray[Any, Any]]]:
        seen = next((values.shape[2] for values in past.values()), 0)
        length = input_ids.shape[1]
        is_token = np.arange(seen + length)[None] >= padding
        known = {
            "input_ids": input_ids.numpy(),
            "attention_mask": is_token.astype(np.int64),
            "position_ids": np.arange(seen, seen + length, dtype=np.int64)[None],
        }
        feeds = {**{name: values for name, values in known.items() if name in self._inputs}, **past}
        results = dict(zip(self._outputs, self._session.run(None, feeds), strict=True))
        present = {name.replace("present.", "past_key_values."): v for name, v in results.items() if name != "logits"}
        return torch.from_numpy(results["logits"].astype(np.float32)), present


def _dtype(graph: onnx.GraphProto, path: Path) -> str:
    """`int4`, `int8` or what mixes both when the graph has such matmuls, else the dtype of embedding and linears."""
    bits = {
        one.i for node in graph.node if node.op_type == "MatMulNBits" for one in node.attribute if one.name == "bits"
    }
    if bits:
        return "int4-mixed" if bits == {4, 8} else f"int{min(bits)}"
    matrices = [tensor.data_type for tensor in graph.initializer if len(tensor.dims) == 2 and ".weight" in tensor.name]
    kinds = {_NAMES.get(kind) for kind in matrices}
    if len(kinds) != 1 or None in kinds:
        raise DamagedFile(path, "its weights are of no one type that is written")
    return str(kinds.pop())


def _widen(model: onnx.ModelProto, path: Path, rope: Rope | None) -> dict[str, Any]:
    """Make a graph compute in fp32: integers against fp32 activations, halves as fp32.

    Returns:
        Initializers that lie in the data file as halves, in fp32, by name.
    """
    from onnxruntime import OrtValue

    graph, widened, exact = model.graph, {}, {} if rope is None else _exact_tables(model.graph, rope)
    for node in graph.node:
        for one in node.attribute:
            if one.name == "accuracy_level":
                one.i = 1
            elif one.name == "to" and one.i in _HALVES:
                one.i = onnx.TensorProto.FLOAT
    for port in (*graph.input, *graph.output, *graph.value_info):
        if port.type.tensor_type.elem_type in _HALVES:
            port.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    for tensor in graph.initializer:
        if tensor.data_type not in _HALVES:
            continue
        values = np.ascontiguousarray(initializer(tensor, path).astype(np.float32))
        if tensor.name in exact:
            values = exact[tensor.name]
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            widened[tensor.name] = OrtValue.ortvalue_from_numpy(values)
            tensor.data_type = onnx.TensorProto.FLOAT
        else:
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    return widened


def _has_rows(rows: int, num_positions: int) -> bool:
    """Whether a table has all positions, and maybe those of short texts again."""
    return num_positions <= rows <= 2 * num_positions


def _exact_tables(graph: onnx.GraphProto, rope: Rope) -> dict[str, npt.NDArray[np.float32]]:
    """`rope` as the tables of a graph, by name."""
    exact: dict[str, npt.NDArray[np.float32]] = {}
    for part, whole in zip(("cos", "sin"), rope, strict=True):
        tables = {
            one.name: int(one.dims[1])
            for one in graph.initializer
            if (match := _TABLE.fullmatch(one.name)) and match["part"] == part
        }
        widths = [tables[name] for name in sorted(tables)]
        pieces = torch.split(whole, widths, dim=1)
        exact |= {name: piece.contiguous().numpy() for name, piece in zip(sorted(tables), pieces, strict=True)}
    return exact
