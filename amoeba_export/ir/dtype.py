"""The one table of `--dtype`s. What a container makes of one (blocks, scales, padding) is that format's own table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    import torch

DtypeName = Literal[
    "fp32", "fp16", "bf16", "int8", "q6_k", "q5_k_m", "int4-mixed", "q4_k_m", "int4", "w4a16-asym", "w4a16"
]

DTYPE_NAMES: tuple[DtypeName, ...] = get_args(DtypeName)

TRAINED_DTYPES: tuple[DtypeName, ...] = ("fp32", "bf16")
"""Of a supernet that runs or is trained here: no loss scaling, no kernels for integers. The first is the default."""

SOURCE = "source"
"""The dtype of a format that keeps what each weight of the source has."""


AUTO = "auto"
"""The `--dtype` that leaves the precision to the search."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dtype:
    """One precision of weights.

    Attributes:
        bits: Of one number of a layer's matrices, without the scales of quantized ones.
        torch_name: torch's name of its floats; of a quantized one, of what it is computed with.
        safetensors_name: The same in the header of a safetensors file.
        is_quantized: Weights are integers with a scale per block, so the artifact computes another function, within
            limits. The others compute the source's, up to rounding.
    """

    bits: int
    torch_name: str
    safetensors_name: str
    is_quantized: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        """Torch's own `torch_name`."""
        import torch

        found = getattr(torch, self.torch_name)
        assert isinstance(found, torch.dtype)
        return found

    @property
    def state_bytes(self) -> int:
        """Bytes of one number of the KV cache and of activations."""
        return self.torch_dtype.itemsize


DTYPES: Mapping[str, Dtype] = MappingProxyType(
    {
        "fp32": Dtype(bits=32, torch_name="float32", safetensors_name="F32"),
        "fp16": Dtype(bits=16, torch_name="float16", safetensors_name="F16"),
        "bf16": Dtype(bits=16, torch_name="bfloat16", safetensors_name="BF16"),
        "int8": Dtype(bits=8, torch_name="float32", safetensors_name="F32", is_quantized=True),
        "q6_k": Dtype(bits=6, torch_name="float32", safetensors_name="F32", is_quantized=True),
        "q5_k_m": Dtype(bits=5, torch_name="float32", safetensors_name="F32", is_quantized=True),
        "int4-mixed": Dtype(bits=4, torch_name="float32", safetensors_name="F32", is_quantized=True),
        "q4_k_m": Dtype(bits=4, torch_name="float32", safetensors_name="F32", is_quantized=True),
        "int4": Dtype(bits=4, torch_name="float32", safetensors_name="F32", is_quantized=True),
        "w4a16-asym": Dtype(bits=4, torch_name="bfloat16", safetensors_name="BF16", is_quantized=True),
        "w4a16": Dtype(bits=4, torch_name="bfloat16", safetensors_name="BF16", is_quantized=True),
    }
)
"""By `--dtype`, finest first. Those that begin with q are llama.cpp's mixtures, those with w what vLLM calls so."""

FLOATS: Mapping[str, Dtype] = MappingProxyType(
    {name: dtype for name, dtype in DTYPES.items() if not dtype.is_quantized}
)
"""Those that hold each weight by itself."""


def is_float(dtype: torch.dtype) -> bool:
    """Whether formats write it: whether it has a `float_name`."""
    return str(dtype).removeprefix("torch.") in _BY_TORCH_NAME


def float_name(dtype: torch.dtype | str) -> str:
    """The `--dtype` of a type of torch, or of its name. Raises `KeyError` for one that no format writes."""
    return _BY_TORCH_NAME[str(dtype).removeprefix("torch.")]


def written_as(dtype: torch.dtype) -> torch.dtype:
    """The type that a weight of the source has in a file that keeps it: its own; fp32 for wider ones."""
    import torch

    return dtype if is_float(dtype) else torch.float32


_BY_TORCH_NAME = {dtype.torch_name: name for name, dtype in FLOATS.items()}
