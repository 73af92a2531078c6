"""PyTorch through transformers: eager or compiled, on CPU or CUDA."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from amoeba_export.backends.graphs import prepare_safetensors
from amoeba_export.backends.runtime import RuntimeBackend
from amoeba_export.backends.targets import Strict


class Options(Strict):
    """The `[options]` table.

    Attributes:
        device: torch's name of the device: `cpu`, `cuda`, `cuda:1`.
        compile: Whether the model goes through `torch.compile`.
        threads: Threads on a CPU, or None for one per physical core.
    """

    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:\d+)?)$")] = "cpu"
    compile: bool = False
    threads: Annotated[int, Field(ge=1)] | None = None


BACKEND = RuntimeBackend(
    engine="torch", containers=("safetensors",), options_model=Options, prepare=prepare_safetensors
)
