"""Weights that bitsandbytes quantized, as they lie in safetensors files: which tensors belong together, what they mean.

A 4-bit weight (nf4, fp4) is a row of nibbles, the first of a byte high, each an index into `quant_map`, times the
`absmax` of its block. With double quantization `absmax` is itself bytes: an index into `nested_quant_map`, times
`nested_absmax`, plus an offset. An 8-bit weight is int8 with one scale a row (`SCB`), which is 127 times the step.

The code tables are in the file, so bitsandbytes itself is not needed, nor imported; the tests compare with it. What it
makes of these weights on a CPU (0.50.2) is wrong where rows are no multiple of the block: 1.4 off at 96 columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from amoeba_export.ir.dtype import FLOATS
from amoeba_export.reading import parse_json_object

_STATES = (".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4")
_TABLES = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
_DTYPES = {dtype.torch_name: dtype.torch_dtype for dtype in FLOATS.values()}

Parts = Mapping[str, torch.Tensor]
"""The tensors of one weight: `packed` with `state`, `absmax`, `quant_map` ... at 4 bits, with `SCB` at 8."""


def packed_weights(names: set[str]) -> dict[str, dict[str, str]]:
    """Name of each quantized weight -> part -> name of its tensor."""
    packed: dict[str, dict[str, str]] = {}
    for name in names:
        for suffix in _STATES:
            if name.endswith(suffix):
                weight = name.removesuffix(suffix)
                tables = {table[1:]: weight + table for table in _TABLES if weight + table in names}
                packed[weight] = {"packed": weight, "state": name, **tables}
        if name.endswith(".SCB"):
            module = name.removesuffix(".SCB")
            parts = {"packed": f"{module}.weight", "SCB": name}
            if f"{module}.weight_format" in names:
                parts["format"] = f"{module}.weight_format"
            packed[f"{module}.weight"] = parts
    return packed


def read_state(state: torch.Tensor) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of the weight that a `quant_state` describes. Raises `ValueError` or `KeyError`."""
    facts = _facts(state)
    return tuple(int(size) for size in facts["shape"]), _DTYPES[facts["dtype"]]


def dequantize(parts: Parts, dtype: torch.dtype) -> torch.Tensor:
    """The weight, computed in fp32 and rounded to `dtype`. Raises `ValueError` or `KeyError` when parts do not fit."""
    if "SCB" in parts:
        if int(parts.get("format", torch.tensor(0))) != 0:
            raise ValueError("its int8 rows are in a tiled order, which only a GPU's library wrote; save it again")
        return (parts["packed"].float() * (parts["SCB"].float() / 127)[:, None]).to(dtype)
    facts = _facts(parts["state"])
    absmax = parts["absmax"]
    if "nested_absmax" in parts:
        scales = parts["nested_absmax"].repeat_interleave(facts["nested_blocksize"])[: absmax.numel()]
        absmax = parts["nested_quant_map"][absmax.int()] * scales + facts["nested_offset"]
    count, block = math.prod(facts["shape"]), facts["blocksize"]
    packed = parts["packed"].reshape(-1).view(torch.uint8)  # it may pretend to be floats, for FSDP's sake
    if packed.numel() != -(-count // 2) or absmax.numel() != -(-count // block):
        raise ValueError(f"{packed.numel()} bytes and {absmax.numel()} scales do not make {facts['shape']}")
    table = parts["quant_map"].float()
    pairs = torch.cartesian_prod(table, table)  # what each byte stands for
    values = pairs[packed.int()].reshape(-1)[:count]
    padding = -count % block
    blocks = torch.nn.functional.pad(values, (0, padding)).view(-1, block) * absmax.float()[:, None]
    return blocks.view(-1)[:count].view(*facts["shape"]).to(dtype)


def _facts(state: torch.Tensor) -> dict[str, Any]:
    return parse_json_object(bytes(state.tolist()))
