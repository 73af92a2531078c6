"""`rounded.safetensors`: matrices as integers with steps, vectors as they are, the rest as JSON in the file's metadata.

A matrix NAME is `NAME.codes`, two of 4 bits in a byte, `NAME.steps` of its blocks, and `NAME.offsets`, the value of
code 0, where that is not -8 steps. Or it is `NAME.packed`, the bytes of its rows in a type of GGUF.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors import SafetensorError, safe_open

from amoeba_export.errors import DamagedFile, NotFound
from amoeba_export.ir import TensorSpec
from amoeba_export.ir.rounded import RoundedWeights
from amoeba_export.ir.safetensors_header import safetensors_header
from amoeba_export.reading import check_schema, parse_json_object
from amoeba_export.replacing import replacing

SCHEMA = 1
_METADATA = "amoeba_rounded"
_NEXT_STEP = "Export again, or with --rounding nearest."
_FACTS = ("geometry", "model_id", "adapters", "refit_id", "format", "dtype", "block_size", "settings")

CODES, STEPS, OFFSETS, PACKED = ".codes", ".steps", ".offsets", ".packed"


def write_rounded(
    path: Path, facts: Mapping[str, Any], specs: Sequence[TensorSpec], tensors: Iterable[tuple[str, torch.Tensor]]
) -> RoundedWeights:
    """Write rounded weights at once or not at all, one tensor in memory at a time. Same tensors and facts, same bytes.

    Args:
        path: Where it goes.
        facts: What `RoundedWeights` says of them, but for `identity`, and `block_size`.
        specs: Every tensor of the file, with its dtype.
        tensors: Exactly these, in this order.
    """
    text = json.dumps({"schema_version": SCHEMA, **{key: facts[key] for key in _FACTS}}, sort_keys=True)
    kinds = {spec.name: spec.dtype or torch.float32 for spec in specs}
    header, _, size_bytes = safetensors_header(specs, kinds, metadata={_METADATA: text})
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, shared=True) as part, part.open("wb") as file:
        file.write(header)
        for spec, (name, tensor) in zip(specs, tensors, strict=True):
            assert (spec.name, spec.shape) == (name, tuple(tensor.shape)), (spec, name, tensor.shape)
            file.write(tensor.to(kinds[name]).contiguous().reshape(-1).view(torch.uint8).numpy().data)
        assert file.tell() == size_bytes, (file.tell(), size_bytes)
    return read_rounded(path)


def read_rounded(path: Path) -> RoundedWeights:
    """Open what `write_rounded` wrote. Weights stay on disk until they are asked for.

    Raises:
        NotFound: There is no such file.
        DamagedFile: It is something else, or its parts do not fit together.
        InputError: It is of another version.
    """
    if not path.is_file():
        raise NotFound("The rounded weights", path, next_step=_NEXT_STEP)
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_METADATA)
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
        data = None if text is None else parse_json_object(text)
    except (SafetensorError, ValueError, OSError) as error:
        raise DamagedFile(path, str(error), next_step=_NEXT_STEP) from error
    if data is None:
        raise DamagedFile(path, "a safetensors file without rounded weights in it", next_step=_NEXT_STEP)
    check_schema(data, SCHEMA, what="rounding", where=path, next_step=_NEXT_STEP)
    try:
        tensors = RoundedTensors(
            path=path,
            shapes=_shapes(shapes, data["settings"]),
            block_size=int(data["block_size"]),
            kinds={name: int(one["kind"]) for name, one in data["settings"].get("packed", {}).items()},
        )
        found = RoundedWeights(
            tensors=tensors,
            geometry=str(data["geometry"]),
            model_id=str(data["model_id"]),
            adapters=tuple(map(str, data["adapters"])),
            refit_id=data["refit_id"],
            format=str(data["format"]),
            dtype=str(data["dtype"]),
            settings=dict(data["settings"]),
            identity=_sha256(path),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedFile(path, f"{type(error).__name__}: {error}", next_step=_NEXT_STEP) from error
    return found


def pack_codes(codes_OC: torch.Tensor) -> torch.Tensor:
    """Codes [O, C] from 0 to 15 as bytes [O, C / 2], the first of two in the lower half."""
    padded = torch.nn.functional.pad(codes_OC, (0, codes_OC.shape[1] % 2))
    return padded[:, ::2] | (padded[:, 1::2] << 4)


def _shapes(stored: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights, from those of the tensors and the matrices whose last byte is half full."""
    odd = set(settings.get("odd", ()))
    packed: Mapping[str, Mapping[str, int]] = settings.get("packed", {})
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in stored.items():
        stem = name.removesuffix(CODES)
        if name.endswith(CODES):
            found[stem] = (shape[0], 2 * shape[1] - (stem in odd))
        elif name.endswith(PACKED):
            stem = name.removesuffix(PACKED)
            found[stem] = (shape[0], int(packed[stem]["columns"]))
        elif not name.endswith((STEPS, OFFSETS)):
            found[name] = shape
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundedTensors:
    """See `TensorSource`: matrices as what their integers stand for, fp32."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    block_size: int
    kinds: Mapping[str, int] = field(default_factory=dict)

    def names(self) -> Collection[str]:
        """Every weight there is."""
        return self.shapes.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """From the header alone."""
        return self.shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """Of what `read` gives."""
        return torch.float32

    def read(self, name: str) -> torch.Tensor:
        """The whole weight. Raises `DamagedFile`."""
        try:
            with safe_open(self.path, framework="pt") as file:
                stored = set(file.keys())
                if name in stored:
                    return _tensor(file, name).float()
                if name + PACKED in stored:
                    return self._unpacked(name, _tensor(file, name + PACKED))
                packed, steps_OG = _tensor(file, name + CODES), _tensor(file, name + STEPS)
                offsets_OG = _tensor(file, name + OFFSETS) if name + OFFSETS in stored else -8 * steps_OG
        except (SafetensorError, OSError) as error:
            raise DamagedFile(self.path, f"{name} cannot be read ({error})", next_step=_NEXT_STEP) from error
        columns = self.shapes[name][1]
        codes_OC = torch.stack([packed & 15, packed >> 4], -1).flatten(1)[:, :columns]
        if steps_OG.shape != offsets_OG.shape or steps_OG.shape[1] != -(-columns // self.block_size):
            raise DamagedFile(self.path, f"the blocks of {name} do not fit it", next_step=_NEXT_STEP)
        spread = (part.repeat_interleave(self.block_size, 1)[:, :columns] for part in (steps_OG, offsets_OG))
        steps_OC, offsets_OC = spread
        return codes_OC.float() * steps_OC + offsets_OC

    def packed(self, name: str) -> torch.Tensor | None:
        """Bytes [O, N] of a matrix in a type of GGUF; None for one on a grid. Raises `DamagedFile`."""
        if name not in self.kinds:
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                return _tensor(file, name + PACKED)
        except (SafetensorError, OSError) as error:
            raise DamagedFile(self.path, f"{name} cannot be read ({error})", next_step=_NEXT_STEP) from error

    def _unpacked(self, name: str, packed_ON: torch.Tensor) -> torch.Tensor:
        try:
            values = gguf.dequantize(packed_ON.numpy(), gguf.GGMLQuantizationType(self.kinds[name]))
        except (ValueError, KeyError, NotImplementedError) as error:
            raise DamagedFile(self.path, f"the blocks of {name} do not fit it", next_step=_NEXT_STEP) from error
        return torch.from_numpy(values)[:, : self.shapes[name][1]].contiguous()


def _tensor(file: Any, name: str) -> torch.Tensor:
    tensor = file.get_tensor(name)
    assert isinstance(tensor, torch.Tensor)
    return tensor


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
