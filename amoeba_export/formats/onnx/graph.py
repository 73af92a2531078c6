"""A graph being recorded: named nodes over onnx-ir, small constants inline, weights by their place in the data file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from amoeba_export.formats.onnx.data import DATA_NAME, Region

Dims = Sequence[int | str]


class Recorder:
    """Records one graph. A node's first output is named after the node, so that profiles and viewers read well."""

    def __init__(self) -> None:
        self._nodes: list[ir.Node] = []
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []
        self._initializers: dict[str, ir.Value] = {}

    def input(self, name: str, dtype: ir.DataType, shape: Dims) -> ir.Value:
        """A graph input."""
        value = ir.val(name, dtype=dtype, shape=shape)
        self._inputs.append(value)
        return value

    def output(self, value: ir.Value, name: str, dtype: ir.DataType, shape: Dims) -> None:
        """Make `value` the next graph output, under `name`."""
        value.name, value.dtype, value.shape = name, dtype, ir.Shape(shape)
        self._outputs.append(value)

    def constant(self, name: str, value: npt.ArrayLike, dtype: ir.DataType = ir.DataType.INT64) -> ir.Value:
        """A constant inside `model.onnx`; asking twice for one name gives the same value."""
        if name not in self._initializers:
            array = np.asarray(value, dtype=dtype.numpy())
            self._initializers[name] = ir.Value(
                name=name,
                shape=ir.Shape(array.shape),
                type=ir.TensorType(dtype),
                const_value=ir.Tensor(array, dtype=dtype, name=name),
            )
        return self._initializers[name]

    def stored(self, region: Region, *, name: str | None = None, shape: tuple[int, ...] | None = None) -> ir.Value:
        """A tensor of the data file. With `name` and `shape`, a second view of the same bytes."""
        key, dims = name or region.name, ir.Shape(shape or region.shape)
        if key not in self._initializers:
            tensor = ir.ExternalTensor(DATA_NAME, region.offset, region.size_bytes, region.dtype, shape=dims, name=key)
            self._initializers[key] = ir.Value(
                name=key, shape=dims, type=ir.TensorType(region.dtype), const_value=tensor
            )
        return self._initializers[key]

    def op(
        self, op_type: str, inputs: Sequence[ir.Value | None], *, name: str, domain: str = "", **attributes: Any
    ) -> ir.Value:
        """A node with one output."""
        return self.ops(op_type, inputs, name=name, domain=domain, outputs=("",), **attributes)[0]

    def ops(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        *,
        name: str,
        outputs: Sequence[str | None],
        domain: str = "",
        **attributes: Any,
    ) -> list[ir.Value]:
        """A node with several outputs, named `name` plus a suffix each; None leaves an optional output out."""
        values = [ir.Value(name="" if suffix is None else name + suffix) for suffix in outputs]
        self._nodes.append(ir.node(op_type, inputs, attributes, domain=domain, outputs=values, name=name))
        return values

    def model(self, *, opsets: Mapping[str, int], ir_version: int) -> ir.Model:
        """The recorded graph as a model."""
        graph = ir.Graph(
            self._inputs,
            self._outputs,
            nodes=self._nodes,
            initializers=list(self._initializers.values()),
            opset_imports=dict(opsets),
            name="amoeba",
        )
        return ir.Model(graph, ir_version=ir_version, producer_name="amoeba-export")
