"""A Hugging Face folder: `config.json`, the weights (`shards.py`), tokenizer, model card."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

from amoeba_export.errors import NotRepresentable
from amoeba_export.formats.config import dense_config
from amoeba_export.formats.model_type import (
    AMOEBA,
    check_family,
    check_head,
    container_type,
    num_zero_biases,
    zero_biases,
)
from amoeba_export.formats.packed import (
    SCHEMES,
    PackedWriter,
    Round,
    group_size,
    nearest_group,
    parts_of,
    quantization_config,
    round_to_nearest,
)
from amoeba_export.formats.packed_rounding import equalizer
from amoeba_export.formats.shards import MAX_SHARD_BYTES, NOT_IN_PIECES, NOTHING, SafetensorsWriter
from amoeba_export.formats.sidecars import copy_generation_config, copy_license, copy_tokenizer, write_model_card
from amoeba_export.formats.sizes import WeightBytes, sum_bytes
from amoeba_export.ir import (
    Architecture,
    ContainerLimits,
    DenseArchitecture,
    Family,
    Subnet,
    TensorSource,
    TensorSpec,
    Writer,
)
from amoeba_export.ir.dtype import DTYPES, FLOATS, SOURCE
from amoeba_export.load.experts import Pieces, pieces_of_layer
from amoeba_export.load.family_file import read_family
from amoeba_export.model.foreign_code import MODELING, modeling_file
from amoeba_export.shown import an

default_dtype = SOURCE
dtypes = (SOURCE, *FLOATS, *SCHEMES)


def check(dense: DenseArchitecture, *, dtype: str) -> None:
    """Every plan can be held. Raises `NotRepresentable` for another precision, or rows that it does not pack."""
    check_family(dense)
    check_head(dense, "safetensors")
    if dtype not in dtypes:
        raise NotRepresentable(
            "safetensors",
            f"{dtype} is not one of its precisions",
            ("--dtype bf16", "--dtype w4a16", f"--format onnx --dtype {dtype}", f"--format gguf --dtype {dtype}"),
        )
    if dtype in SCHEMES:
        if dense.base.expert_size:
            raise NotRepresentable(
                "safetensors", f"packed weights of {an(dense.base.family)} are not written yet", ("--dtype bf16",)
            )
        if read_family(dense.base.family).family.fused and container_type(dense) == dense.base.family:
            raise NotRepresentable(
                "safetensors",
                f"packed weights of {an(dense.base.family)}, which has several matrices in one, are not written",
                ("--dtype bf16", "--format onnx --dtype int4", "--format gguf --dtype int4"),
            )
        group_size(dense)


def limits(base: Architecture) -> ContainerLimits:
    """See `Format`: none."""
    return ContainerLimits(container="safetensors")


def weight_bytes(dense: DenseArchitecture, *, dtype: str) -> WeightBytes:
    """See `Format`. Biases that the container's type has, and the model not, are zeros in the file."""
    number = DTYPES[dtype].torch_dtype.itemsize
    zeros = num_zero_biases(dense) * number

    def plain_matrix(rows: int, columns: int) -> int:
        return rows * columns * number

    def matrix(rows: int, columns: int) -> int:
        if dtype not in SCHEMES:
            return plain_matrix(rows, columns)
        spec = TensorSpec(name=".weight", shape=(rows, columns))
        parts = parts_of(spec, group, SCHEMES[dtype], DTYPES[dtype].torch_dtype)
        return sum(math.prod(part.shape) * part.dtype.itemsize for part in parts if part.dtype)

    group = nearest_group(dense)
    plain = sum_bytes(dense, matrix=matrix, head=plain_matrix, vector_bytes=number)
    return dataclasses.replace(plain, layers=plain.layers + zeros)


def open_writer(
    subnet: Subnet,
    folder: Path,
    *,
    dtype: str = default_dtype,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    round_weight: Round = round_to_nearest,
    rounded: TensorSource | None = None,
) -> Writer:
    """Write everything but the weights, reserve their space, and return the writer that takes them.

    Args:
        subnet: The cut model.
        folder: Where the files go.
        dtype: `w4a16` and `w4a16-asym` pack the matrices of layers in 4 bits; the rest is bf16 then.
        max_shard_bytes: Of weights in a file.
        round_weight: How packed weights are rounded.
        rounded: Weights that are written in place of those given: on grids that `dtype` holds, and keeps.

    Raises:
        NotRepresentable: As `check`; or from `accept`, when a weight is too large for fp16.
        DiskFull: The shards do not fit on the disk.
    """
    # Long on purpose: every file of the folder is begun here, in order.
    dense = subnet.architecture
    check(dense, dtype=dtype)
    specs, torch_dtype = subnet.specs, subnet.source_dtype
    if dtype != SOURCE:
        torch_dtype = DTYPES[dtype].torch_dtype
        specs = tuple(dataclasses.replace(spec, dtype=torch_dtype) for spec in specs)
    model_type = container_type(dense)
    config = dense_config(subnet, dtype=str(torch_dtype).removeprefix("torch."))
    stored, scheme = specs, SCHEMES.get(dtype)
    packed = _packed_names(subnet) if scheme else frozenset()
    if scheme:
        group = group_size(dense)
        config["quantization_config"] = quantization_config(group, scheme, head=subnet.family.module("head"))
        parts = {spec.name: parts_of(spec, group, scheme, torch_dtype) for spec in specs if spec.name in packed}
        stored = tuple(part for spec in specs for part in parts.get(spec.name, (spec,)))
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    _write_sidecars(subnet, folder, needs_code=model_type == AMOEBA)
    writer = SafetensorsWriter(
        folder,
        stored,
        zeros=tuple(zero_biases(dense, subnet.family)),
        layers_prefix=subnet.family.layers_prefix,
        fused=_fused(stored, subnet.family) if model_type == dense.base.family else NOTHING,
        pieces=_pieces(subnet) if model_type == dense.base.family else NOT_IN_PIECES,
        dtype=torch_dtype,
        limit=max_shard_bytes,
    )
    if not scheme:
        return writer
    names = () if rounded is not None else tuple(spec.name for spec in specs)  # those were scaled before
    return PackedWriter(
        writer,
        specs,
        packed,
        equalizer=equalizer(names, subnet, dtype),
        round_weight=lambda name, values: round_weight(name, values, group, scheme),
        rounded=rounded,
        folder=folder,
    )


def _write_sidecars(subnet: Subnet, folder: Path, *, needs_code: bool) -> None:
    if needs_code:
        shutil.copyfile(modeling_file(), folder / MODELING)
    copy_tokenizer(subnet, folder)
    copy_generation_config(subnet.source_folder, folder)
    copy_license(subnet.source_folder, folder)
    write_model_card(subnet, folder, needs_code=needs_code)


def _packed_names(subnet: Subnet) -> frozenset[str]:
    """The matrices of layers."""
    places = {spec.name: subnet.family.place(spec.name) for spec in subnet.specs if len(spec.shape) == 2}
    return frozenset(name for name, place in places.items() if place.layer is not None)


def _pieces(subnet: Subnet) -> dict[str, Pieces]:
    """Weight -> the weights of the file that it lies in, expert by expert."""
    pieces: dict[str, Pieces] = {}
    for position, dims in enumerate(subnet.architecture.layers):
        pieces |= pieces_of_layer(subnet.family, position, dims.ffn_size)
    return pieces


def _fused(specs: Sequence[TensorSpec], family: Family) -> dict[str, str]:
    """Weight -> the weight of the file that it is part of, from the top in the order of `specs`."""
    modules = {role: fused.module for fused in family.fused for role in fused.roles}
    places = {spec.name: family.place(spec.name) for spec in specs} if modules else {}
    return {
        name: f"{modules[place.role].format(layer=place.layer)}.{place.part}"
        for name, place in places.items()
        if place.role in modules
    }
