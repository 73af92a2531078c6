"""OpenVINO on its CPU, GPU or NPU devices, from the same ONNX files."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from amoeba_export.backends.graphs import prepare_onnx
from amoeba_export.backends.runtime import RuntimeBackend
from amoeba_export.backends.targets import Strict


class Options(Strict):
    """The `[options]` table.

    Attributes:
        device: OpenVINO's name of the device.
        threads: Threads on a CPU, or None for one per physical core.
        precision: What OpenVINO computes in. Left alone it takes bf16 where the CPU has it, whatever the model says.
        properties: Further properties, in OpenVINO's spelling.
        dialect: Operators of the graphs. OpenVINO reads both, but runs `standard` a quarter faster, and in fp16 it
            fails to convert one of onnxruntime's. `auto` is `ort` for int8 and int4, which `standard` cannot hold.
    """

    device: str = "CPU"
    threads: Annotated[int, Field(ge=1)] | None = None
    precision: Literal["f32", "f16", "bf16"] = "f32"
    properties: dict[str, Any] = Field(default_factory=dict)
    dialect: Literal["auto", "ort", "standard"] = "auto"


BACKEND = RuntimeBackend(engine="openvino", containers=("onnx",), options_model=Options, prepare=prepare_onnx)
