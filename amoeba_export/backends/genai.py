"""ONNX Runtime GenAI: the runtime's own generation loop on the ONNX files of an artifact."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from amoeba_export.backends.graphs import prepare_genai
from amoeba_export.backends.runtime import RuntimeBackend
from amoeba_export.backends.targets import Strict


class Options(Strict):
    """The `[options]` table.

    Attributes:
        provider: GenAI's name of the execution provider.
        threads: Threads of an operator, or None for one per physical core.
        dialect: Operators of the graphs; GenAI needs GroupQueryAttention.
    """

    provider: Literal["cpu", "cuda", "dml", "webgpu"] = "cpu"
    threads: Annotated[int, Field(ge=1)] | None = None
    dialect: Literal["ort"] = "ort"


BACKEND = RuntimeBackend(engine="genai", containers=("onnx",), options_model=Options, prepare=prepare_genai)
