"""ONNX Runtime on CPU, CUDA or TensorRT; the target file chooses the providers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from amoeba_export.backends.graphs import prepare_onnx
from amoeba_export.backends.runtime import RuntimeBackend
from amoeba_export.backends.targets import Strict


class Options(Strict):
    """The `[options]` table.

    Attributes:
        providers: Execution providers by preference, in onnxruntime's spelling.
        provider_options: Further settings by provider.
        threads: Threads of an operator, or None for one per physical core.
        spinning: Whether idle threads spin: faster when nothing else runs, unfair when something does.
        session: Session config entries, in onnxruntime's spelling.
        dialect: Operators of the graphs: `ort`, or `standard` for TensorRT.
    """

    providers: Annotated[tuple[str, ...], Field(min_length=1)] = ("CPUExecutionProvider",)
    provider_options: dict[str, dict[str, Any]] = Field(default_factory=dict)
    threads: Annotated[int, Field(ge=1)] | None = None
    spinning: bool = True
    session: dict[str, str] = Field(default_factory=dict)
    dialect: Literal["ort", "standard"] = "ort"


BACKEND = RuntimeBackend(engine="onnxruntime", containers=("onnx",), options_model=Options, prepare=prepare_onnx)
