"""A graph being recorded: named nodes, small constants inline, weights by their place in the data file.

Recorded as plain records and spelled as ONNX's protobuf messages at the end. onnx-ir, which this resembles, imports
sympy for shapes that we do not compute: 35 MB and half a second, a tenth and a third of what a small model takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from amoeba_export.formats.onnx.data import DATA_NAME, Region
from amoeba_export.formats.onnx.datatype import DataType

if TYPE_CHECKING:
    import onnx

Dims = Sequence[int | str]


@dataclass(eq=False, slots=True)
class Value:
    """What nodes read and make, known by its name. Graph outputs are renamed after they were made."""

    name: str


@dataclass(frozen=True, slots=True)
class _Node:
    op_type: str
    domain: str
    name: str
    inputs: tuple[Value | None, ...]
    outputs: tuple[Value, ...]
    attributes: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Port:
    """An input or output of the graph."""

    value: Value
    dtype: DataType
    dims: Dims


@dataclass(frozen=True, slots=True)
class _Stored:
    """An initializer: `content` is inline, or where it lies in the data file."""

    value: Value
    dtype: DataType
    shape: tuple[int, ...]
    content: bytes | Region


class Recorder:
    """Records one graph. A node's first output is named after the node, so that profiles and viewers read well."""

    def __init__(self) -> None:
        self._nodes: list[_Node] = []
        self._inputs: list[_Port] = []
        self._outputs: list[_Port] = []
        self._initializers: dict[str, _Stored] = {}

    def input(self, name: str, dtype: DataType, shape: Dims) -> Value:
        """A graph input."""
        value = Value(name)
        self._inputs.append(_Port(value, dtype, shape))
        return value

    def output(self, value: Value, name: str, dtype: DataType, shape: Dims) -> None:
        """Make `value` the next graph output, under `name`."""
        value.name = name
        self._outputs.append(_Port(value, dtype, shape))

    def constant(self, name: str, value: npt.ArrayLike, dtype: DataType = DataType.INT64) -> Value:
        """A constant inside `model.onnx`; asking twice for one name gives the same value."""
        if name not in self._initializers:
            array = np.asarray(value, dtype=dtype.numpy())
            # Little-endian is what ONNX asks for, and what every machine that runs this is.
            self._initializers[name] = _Stored(Value(name), dtype, array.shape, array.tobytes())
        return self._initializers[name].value

    def stored(self, region: Region, *, name: str | None = None, shape: tuple[int, ...] | None = None) -> Value:
        """A tensor of the data file. With `name` and `shape`, a second view of the same bytes."""
        key = name or region.name
        if key not in self._initializers:
            self._initializers[key] = _Stored(Value(key), region.dtype, shape or region.shape, region)
        return self._initializers[key].value

    def op(
        self, op_type: str, inputs: Sequence[Value | None], *, name: str, domain: str = "", **attributes: Any
    ) -> Value:
        """A node with one output."""
        return self.ops(op_type, inputs, name=name, domain=domain, outputs=("",), **attributes)[0]

    def ops(
        self,
        op_type: str,
        inputs: Sequence[Value | None],
        *,
        name: str,
        outputs: Sequence[str | None],
        domain: str = "",
        **attributes: Any,
    ) -> list[Value]:
        """A node with several outputs, named `name` plus a suffix each; None leaves an optional output out."""
        values = [Value("" if suffix is None else name + suffix) for suffix in outputs]
        self._nodes.append(_Node(op_type, domain, name, tuple(inputs), tuple(values), attributes))
        return values

    def inner(self) -> Recorder:
        """A graph inside this one, such as the body of a Loop: an attribute of a node, that reads what this one has."""
        body = Recorder()
        body._initializers = self._initializers
        return body

    def model(self, *, opsets: Mapping[str, int], ir_version: int) -> onnx.ModelProto:
        """The recorded graph as a model."""
        # Imported here, once the weights are written: they are what memory peaks at.
        from onnx import ModelProto, helper

        model = ModelProto(ir_version=ir_version, producer_name="amoeba-export")
        model.opset_import.extend(helper.make_opsetid(domain, version) for domain, version in opsets.items())
        graph = model.graph
        self._spell(graph, "amoeba")
        for stored in self._initializers.values():
            tensor = graph.initializer.add(name=stored.value.name, data_type=stored.dtype, dims=stored.shape)
            if isinstance(stored.content, bytes):
                tensor.raw_data = stored.content
            else:
                place = {
                    "location": DATA_NAME,
                    "offset": stored.content.offset,
                    "length": stored.content.size_bytes,
                }
                tensor.data_location = tensor.EXTERNAL
                for key, fact in place.items():
                    tensor.external_data.add(key=key, value=str(fact))
        return model

    def _spell(self, graph: onnx.GraphProto, name: str) -> onnx.GraphProto:
        """Put all but initializers into `graph`."""
        from onnx import GraphProto, helper

        graph.name = name
        for node in self._nodes:
            attributes = {
                key: value._spell(GraphProto(), node.name) if isinstance(value, Recorder) else value
                for key, value in node.attributes.items()
            }
            graph.node.add(
                op_type=node.op_type,
                domain=node.domain or None,
                name=node.name,
                input=[value.name if value else "" for value in node.inputs],
                output=[value.name for value in node.outputs],
                attribute=[helper.make_attribute(key, value) for key, value in attributes.items()],
            )
        for ports, infos in ((self._inputs, graph.input), (self._outputs, graph.output)):
            infos.extend(helper.make_tensor_value_info(port.value.name, port.dtype, port.dims) for port in ports)
        return graph
