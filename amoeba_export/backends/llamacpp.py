"""llama.cpp on GGUF files: through the xllamacpp wheel that carries it, or a `llama-bench` built for a board."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from amoeba_export.backends.graphs import prepare_gguf
from amoeba_export.backends.runtime import RuntimeBackend
from amoeba_export.backends.targets import Strict


class Options(Strict):
    """The `[options]` table.

    Attributes:
        binary: Path of `llama-bench` on the device, which then times models instead of the wheel.
        gpu_layers: Layers on the GPU; 999 for all of them.
        threads: Threads on the CPU, or None for one per physical core.
    """

    binary: str | None = None
    gpu_layers: Annotated[int, Field(ge=0)] = 0
    threads: Annotated[int, Field(ge=1)] | None = None


BACKEND = RuntimeBackend(engine="llamacpp", containers=("gguf",), options_model=Options, prepare=prepare_gguf)
