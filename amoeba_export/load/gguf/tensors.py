"""The tensors of a GGUF file as the weights of our family: every one consumed, every weight made once.

A file may have layers that differ (`deci`, the cuts that amoeba writes), and head counts that a config of transformers
refuses. Our supernets have layers that are alike, so narrower layers are filled up with heads and neurons of zeros.
Those add exactly nothing; calibration finds them worthless and they are the first to go.

Letters: D hidden, Q query channels, H head dim; see `ir.architecture`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from amoeba_export.errors import DamagedFile, UnsupportedError
from amoeba_export.gguf_file import GgufFile, GgufTensor
from amoeba_export.ir import Architecture, TensorTemplate
from amoeba_export.ir.family import LAYER_ROLES, Block, block_of
from amoeba_export.llama_cpp.architectures import MATRICES_OF_EXPERTS, GgufPlace, gguf_place
from amoeba_export.load.families import expected_weights, read_architecture
from amoeba_export.load.family_file import FamilyFile, read_family
from amoeba_export.load.gguf.config import model_config, rope_tensors
from amoeba_export.load.gguf.keys import NEXT_STEP
from amoeba_export.load.gguf.metadata import LayerSize, Metadata, families_by_architecture


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What the file is to us.

    Attributes:
        config: The keys of a `config.json`, but for tokens and class names.
        architecture: What `config` means.
        size: The dims of every layer of `architecture`; those of `metadata` lie in them.
    """

    file: GgufFile
    metadata: Metadata
    family: FamilyFile
    config: Mapping[str, Any]
    architecture: Architecture
    size: LayerSize

    @property
    def is_padded(self) -> bool:
        """Whether a layer is filled up with zeros."""
        return any(layer != self.size for layer in self.metadata.layers)


def read_model(file: GgufFile, metadata: Metadata) -> Model:
    """Which weights there are and what they make.

    Raises:
        DamagedFile: A tensor is missing or has another shape.
        UnsupportedError: There are tensors that no weight of ours comes from.
    """
    size, family_name = _largest(metadata), families_by_architecture()[metadata.arch.name]
    if any(metadata.local):
        family_name = read_family(family_name).containers["gguf"].get("with_window", family_name)
    if read_family(family_name).even_heads and metadata.hidden_size % size.num_heads:
        # Llama's config wants the heads to divide the hidden size. Mistral's does not, and has no biases.
        if any(name.endswith(".bias") for name in file.tensors):
            size = _dividing(size, metadata.hidden_size)
        else:
            family_name = read_family(family_name).containers["gguf"].get("without_biases", family_name)
    family = read_family(family_name)
    config = model_config(file, metadata, family, size)
    architecture, _ = read_architecture(config, where=file.path)
    model = Model(file=file, metadata=metadata, family=family, config=config, architecture=architecture, size=size)
    _check_tensors(model)
    return model


def _largest(metadata: Metadata) -> LayerSize:
    """The smallest layer that all layers lie in, group by group."""
    layers = metadata.layers
    kv_heads = max(max(layer.num_kv_heads for layer in layers), 1)
    group = max(max(layer.num_heads // max(layer.num_kv_heads, 1) for layer in layers), 1)
    ffn_size = max(max(layer.ffn_size for layer in layers), 1)
    return LayerSize(num_heads=kv_heads * group, num_kv_heads=kv_heads, ffn_size=ffn_size)


def _dividing(size: LayerSize, hidden_size: int) -> LayerSize:
    """The smallest that `size` lies in whose heads divide the hidden size; `size` itself when there is none."""
    group = size.num_heads // size.num_kv_heads
    fitting = [
        (kv_heads * more, kv_heads)
        for kv_heads in range(size.num_kv_heads, hidden_size // group + 1)
        for more in range(group, hidden_size // kv_heads + 1)
        if hidden_size % (kv_heads * more) == 0
    ]
    num_heads, num_kv_heads = min(fitting, default=(size.num_heads, size.num_kv_heads))
    return dataclasses.replace(size, num_heads=num_heads, num_kv_heads=num_kv_heads)


def _check_tensors(model: Model) -> None:
    file, metadata = model.file, model.metadata
    left = set(file.tensors) - set(rope_tensors(metadata))
    for source in _sources(model):
        if source.tensor_name in file.tensors and not source.is_gone:
            left.discard(source.tensor_name)
            tensor = file.tensors[source.tensor_name]
            shape = _tensor_shape(source, model)
            if tensor.shape != shape:
                raise misshapen(tensor, shape)
            if tensor.kind.name.startswith(("I8", "I16", "I32", "I64")):
                raise DamagedFile(tensor.path, f"{tensor.name} holds integers")
        elif source.filler is None:
            raise DamagedFile(file.path, f"{source.tensor_name} is not in it")
    if left:
        listed = ", ".join(sorted(left)[:6]) + (f" and {len(left) - 6} more" if len(left) > 6 else "")
        raise UnsupportedError(
            f"This GGUF file has tensors that '{metadata.arch.name}' models of ours do not have: {listed}.",
            where=file.path,
            next_step=NEXT_STEP,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """Where one weight comes from.

    Attributes:
        name: Of our weight.
        template: What its axes are.
        layer: Dims of the layer in the file, None for weights that are in no layer.
        shape: Of the weight in the file.
        first_row: Where it begins in the tensor, which may hold others.
        tensor_rows: Of the tensor; 0 where it holds no others.
        is_gone: It belongs to a block that this layer does not have.
        filler: What the weight consists of where the file has no such tensor; None: it must be there.
    """

    name: str
    template: TensorTemplate
    tensor_name: str
    layer: LayerSize | None
    shape: tuple[int, ...]
    first_row: int
    tensor_rows: int
    is_gone: bool
    filler: float | None


def _sources(model: Model) -> Iterator[_Source]:
    """Every weight of the architecture, in the family's order."""
    metadata, family = model.metadata, model.family.family
    expected = expected_weights(family, model.architecture)
    for template in family.templates:
        layers: list[LayerSize | None] = [None]
        if template in family.layer:
            layers = list(metadata.layers)
        part = template.name.rpartition(".")[2]
        for idx, layer in enumerate(layers):
            name = template.name.format(layer=idx)
            if name not in expected:
                continue
            place = gguf_place(metadata.arch, template.role, None if layer is None else idx, part)
            first, rows = _rows(place, template, layer, model)
            yield _Source(
                name=name,
                template=template,
                tensor_name=place.tensor,
                layer=layer,
                shape=_shape(template, layer, model),
                first_row=first,
                tensor_rows=rows,
                is_gone=_is_gone(block_of(template.role), layer),
                filler=_filler(template, layer),
            )


def _tensor_shape(source: _Source, model: Model) -> tuple[int, ...]:
    """Of the tensor in the file. Matrices of experts are three-dimensional there, one expert after the other."""
    size = model.architecture.expert_size
    if source.layer is not None and size and source.template.role in MATRICES_OF_EXPERTS:
        shape = tuple(size if axis == "ffn" else model.architecture.axis_size(axis) for axis in source.template.axes)
        return (source.layer.ffn_size, *shape)
    return (source.tensor_rows or source.shape[0], *source.shape[1:])


def _rows(place: GgufPlace, template: TensorTemplate, layer: LayerSize | None, model: Model) -> tuple[int, int]:
    """Where a weight begins in a tensor that holds several, and the rows of that; zeros for a tensor of its own."""
    if len(place.roles) == 1:
        return 0, 0
    sizes: dict[str, int] = {
        one.role: _shape(one, layer, model)[0]
        for one in model.family.family.layer
        if one.role in place.roles and one.name.endswith(".weight")
    }
    before = place.roles[: place.roles.index(template.role)]
    return sum(sizes[role] for role in before), sum(sizes.values())


def _is_gone(block: Block | None, layer: LayerSize | None) -> bool:
    if layer is None or block is None:
        return False
    return not (layer.num_heads if block == "attention" else layer.ffn_size)


def _filler(template: TensorTemplate, layer: LayerSize | None) -> float | None:
    """Zeros for a bias that others have, and for a block that is gone; its norm then does not matter."""
    block = block_of(template.role)
    if block is not None and template.role == LAYER_ROLES[block][0]:
        return 1.0 if _is_gone(block, layer) else None
    is_bias = layer is not None and template.name.endswith(".bias")
    return 0.0 if is_bias or _is_gone(block, layer) else None


def _shape(template: TensorTemplate, layer: LayerSize | None, model: Model) -> tuple[int, ...]:
    head_dim = model.metadata.head_dim
    sizes: dict[str, int] = {}
    if layer is not None:
        sizes = {"query": layer.num_heads * head_dim, "kv": layer.num_kv_heads * head_dim}
        sizes |= {"ffn": layer.ffn_size * model.architecture.unit_size, "expert": layer.ffn_size}
    return tuple(sizes.get(axis, 0) or model.architecture.axis_size(axis) for axis in template.axes)


def read_weights(model: Model) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and fp32 values of every weight, one at a time. The tensors were checked by `read_model`."""
    expected = expected_weights(model.family.family, model.architecture)
    offset = model.architecture.norm_offset
    for source in _sources(model):
        tensor = None if source.is_gone else model.file.tensors.get(source.tensor_name)
        if tensor is None:
            assert source.filler is not None
            yield source.name, torch.full(expected[source.name], source.filler)
            continue
        weight = torch.from_numpy(tensor.read())
        if weight.dim() > len(source.shape):  # experts: beside each other where neurons are columns
            weight = weight.transpose(0, source.template.axes.index("ffn")).reshape(source.shape)
        if source.tensor_rows:
            weight = weight[source.first_row : source.first_row + source.shape[0]]
        if source.layer is not None:
            if model.metadata.arch.in_pairs and source.template.role == "q":
                weight = unpermute_pairs(weight, source.layer.num_heads)
            elif model.metadata.arch.in_pairs and source.template.role == "k":
                weight = unpermute_pairs(weight, source.layer.num_kv_heads)
            weight = _filled_up(weight, source, model)
        if offset and source.template.role.endswith("_norm"):
            weight = weight - offset
        yield source.name, weight


def _filled_up(weight: torch.Tensor, source: _Source, model: Model) -> torch.Tensor:
    """`weight` in the size of all layers: KV head i stays KV head i, and its query heads the first of its group."""
    assert source.layer is not None
    layer, size, head_dim = source.layer, model.size, model.metadata.head_dim
    for axis, kind in enumerate(source.template.axes):
        if kind == "query" and layer.num_heads and layer != size:
            group, full_group = layer.num_heads // layer.num_kv_heads, size.num_heads // size.num_kv_heads
            heads = torch.arange(layer.num_heads)
            places = heads // group * full_group + heads % group
            channels = (places[:, None] * head_dim + torch.arange(head_dim)).flatten()
            full = torch.zeros(*weight.shape[:axis], size.num_heads * head_dim, *weight.shape[axis + 1 :])
            weight = full.index_copy(axis, channels, weight)
        elif kind in ("kv", "ffn"):
            full_size = size.num_kv_heads * head_dim if kind == "kv" else size.ffn_size * model.architecture.unit_size
            if missing := full_size - weight.shape[axis]:
                filler = torch.zeros(*weight.shape[:axis], missing, *weight.shape[axis + 1 :])
                weight = torch.cat([weight, filler], dim=axis)
    return weight


def unpermute_pairs(w: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows of q or k (weight or bias) from rotating neighbouring pairs to rotating halves, head by head."""
    heads = w.reshape(num_heads, -1, 2, *w.shape[1:])
    return heads.transpose(1, 2).reshape(w.shape)


def misshapen(tensor: GgufTensor, shape: tuple[int, ...]) -> DamagedFile:
    """The error for a tensor of another shape."""
    return DamagedFile(tensor.path, f"{tensor.name} has shape {list(tensor.shape)} and should have {list(shape)}")
