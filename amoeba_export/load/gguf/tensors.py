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

import gguf
import torch

from amoeba_export.errors import DamagedFile, UnsupportedError
from amoeba_export.gguf_file import GgufFile, GgufTensor
from amoeba_export.ir import Architecture, TensorTemplate
from amoeba_export.load.families import expected_weights, read_architecture
from amoeba_export.load.family_file import FamilyFile, read_family
from amoeba_export.load.gguf.metadata import FAMILIES, NEXT_STEP, PAIRED, LayerSize, Metadata
from amoeba_export.load.gguf.rope import llama3_parameters

ROPE_FREQS = "rope_freqs.weight"

_KIND = gguf.MODEL_TENSOR
_ATTENTION = (_KIND.ATTN_NORM, _KIND.ATTN_Q, _KIND.ATTN_K, _KIND.ATTN_V, _KIND.ATTN_OUT)
_FFN = (_KIND.FFN_NORM, _KIND.FFN_GATE, _KIND.FFN_UP, _KIND.FFN_DOWN)
"""The tensors of a block, its norm first."""
_ARCHITECTURES = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}


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
    names = gguf.get_tensor_name_map(_ARCHITECTURES[metadata.arch], len(metadata.layers))
    size, family_name = _largest(metadata), FAMILIES[metadata.arch]
    if family_name == "llama" and metadata.hidden_size % size.num_heads:
        # Llama's config wants the heads to divide the hidden size. Mistral's does not, and has no biases.
        if any(name.endswith(".bias") for name in file.tensors):
            size = _dividing(size, metadata.hidden_size)
        else:
            family_name = "mistral"
    family = read_family(family_name)
    config = _config(file, metadata, family, size, names)
    architecture, _ = read_architecture(config, where=file.path)
    model = Model(file=file, metadata=metadata, family=family, config=config, architecture=architecture, size=size)
    _check_tensors(model, names)
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


def _config(
    file: GgufFile, metadata: Metadata, family: FamilyFile, size: LayerSize, names: gguf.TensorNameMap
) -> dict[str, Any]:
    """The config of a stock model; flags follow from the tensors."""
    embedding = next(template for template in family.family.globals if "vocab" in template.axes)
    config: dict[str, Any] = {
        "model_type": family.family.model_type,
        "vocab_size": _tensor(file, _name(names, embedding, 0)).shape[0],
        "hidden_size": metadata.hidden_size,
        "num_hidden_layers": len(metadata.layers),
        "num_attention_heads": size.num_heads,
        "num_key_value_heads": size.num_kv_heads,
        "head_dim": metadata.head_dim,
        "intermediate_size": size.ffn_size,
        "max_position_embeddings": metadata.max_positions,
        "rms_norm_eps": metadata.norm_eps,
        "rope_parameters": _rope(file, metadata),
        "tie_word_embeddings": not any(
            _name(names, template, 0) in file.tensors for template in family.family.globals if template.when == "untied"
        ),
    }
    if "sliding_window" in family.config and not family.window:
        config[str(family.key("sliding_window"))] = None
    for flag in ("qkv_bias", "o_bias", "mlp_bias"):
        if flag in family.config and flag not in family.constants:
            there = any(
                _name(names, template, idx) in file.tensors
                for template in family.family.layer
                if template.when == flag
                for idx in range(len(metadata.layers))
            )
            key = str(family.key(flag))
            config[key] = there or config.get(key, False)
    return config


def _rope(file: GgufFile, metadata: Metadata) -> dict[str, Any]:
    rope = dict(metadata.rope)
    tensor = file.tensors.get(ROPE_FREQS)
    if tensor is None or metadata.arch not in PAIRED:  # the others do not read it, and it is left over
        return rope
    if tensor.shape != (metadata.head_dim // 2,):
        raise _misshapen(tensor, (metadata.head_dim // 2,))
    found = llama3_parameters(tensor.read(), theta=rope["rope_theta"])
    if found is None or (found and rope["rope_type"] != "default"):
        reason = "together with another scaling" if found else "that no RoPE of transformers has"
        raise UnsupportedError(
            f"The factors in {ROPE_FREQS} are divisors {reason}.", where=file.path, next_step=NEXT_STEP
        )
    return rope | found


def _check_tensors(model: Model, names: gguf.TensorNameMap) -> None:
    file, metadata = model.file, model.metadata
    left = set(file.tensors)
    if metadata.arch in PAIRED:
        left.discard(ROPE_FREQS)
    for source in _sources(model, names):
        if source.tensor_name in file.tensors and not source.is_gone:
            left.discard(source.tensor_name)
            tensor = file.tensors[source.tensor_name]
            if tensor.shape != source.shape:
                raise _misshapen(tensor, source.shape)
            if tensor.kind.name.startswith(("I8", "I16", "I32", "I64")):
                raise DamagedFile(tensor.path, f"{tensor.name} holds integers")
        elif source.filler is None:
            raise DamagedFile(file.path, f"{source.tensor_name} is not in it")
    if left:
        listed = ", ".join(sorted(left)[:6]) + (f" and {len(left) - 6} more" if len(left) > 6 else "")
        raise UnsupportedError(
            f"This GGUF file has tensors that '{metadata.arch}' models of ours do not have: {listed}.",
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
        shape: Of the tensor in the file.
        is_gone: It belongs to a block that this layer does not have.
        filler: What the weight consists of where the file has no such tensor; None: it must be there.
    """

    name: str
    template: TensorTemplate
    tensor_name: str
    kind: gguf.MODEL_TENSOR
    layer: LayerSize | None
    shape: tuple[int, ...]
    is_gone: bool
    filler: float | None


def _sources(model: Model, names: gguf.TensorNameMap) -> Iterator[_Source]:
    """Every weight of the architecture, in the family's order."""
    metadata = model.metadata
    expected = expected_weights(model.family.family, model.architecture)
    for template in model.family.family.globals + model.family.family.layer:
        layers: list[LayerSize | None] = [None]
        if template in model.family.family.layer:
            layers = list(metadata.layers)
        for idx, layer in enumerate(layers):
            name = template.name.format(layer=idx)
            if name not in expected:
                continue
            found = names.get_type_and_name(name, try_suffixes=(".weight", ".bias"))
            assert found is not None, f"gguf has no name for {name}"
            yield _Source(
                name=name,
                template=template,
                tensor_name=found[1],
                kind=found[0],
                layer=layer,
                shape=_shape(template, layer, model),
                is_gone=_is_gone(found[0], layer),
                filler=_filler(template, found[0], layer),
            )


def _is_gone(kind: gguf.MODEL_TENSOR, layer: LayerSize | None) -> bool:
    if layer is None:
        return False
    return (kind in _ATTENTION and not layer.num_heads) or (kind in _FFN and not layer.ffn_size)


def _filler(template: TensorTemplate, kind: gguf.MODEL_TENSOR, layer: LayerSize | None) -> float | None:
    """Zeros for a bias that others have, and for a block that is gone; its norm then does not matter."""
    if kind in (_ATTENTION[0], _FFN[0]):
        return 1.0 if _is_gone(kind, layer) else None
    is_bias = layer is not None and template.name.endswith(".bias")
    return 0.0 if is_bias or _is_gone(kind, layer) else None


def _shape(template: TensorTemplate, layer: LayerSize | None, model: Model) -> tuple[int, ...]:
    head_dim = model.metadata.head_dim
    sizes: dict[str, int] = {}
    if layer is not None:
        sizes = {"query": layer.num_heads * head_dim, "kv": layer.num_kv_heads * head_dim, "ffn": layer.ffn_size}
    return tuple(sizes.get(axis, 0) or model.architecture.axis_size(axis) for axis in template.axes)


def read_weights(model: Model) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and fp32 values of every weight, one at a time. The tensors were checked by `read_model`."""
    names = gguf.get_tensor_name_map(_ARCHITECTURES[model.metadata.arch], len(model.metadata.layers))
    expected = expected_weights(model.family.family, model.architecture)
    for source in _sources(model, names):
        tensor = None if source.is_gone else model.file.tensors.get(source.tensor_name)
        if tensor is None:
            assert source.filler is not None
            yield source.name, torch.full(expected[source.name], source.filler)
            continue
        weight = torch.from_numpy(tensor.read())
        if source.layer is not None:
            if model.metadata.arch in PAIRED and source.kind == _KIND.ATTN_Q:
                weight = unpermute_pairs(weight, source.layer.num_heads)
            elif model.metadata.arch in PAIRED and source.kind == _KIND.ATTN_K:
                weight = unpermute_pairs(weight, source.layer.num_kv_heads)
            weight = _filled_up(weight, source, model)
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
            full_size = size.num_kv_heads * head_dim if kind == "kv" else size.ffn_size
            if missing := full_size - weight.shape[axis]:
                filler = torch.zeros(*weight.shape[:axis], missing, *weight.shape[axis + 1 :])
                weight = torch.cat([weight, filler], dim=axis)
    return weight


def unpermute_pairs(w: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows of q or k (weight or bias) from rotating neighbouring pairs to rotating halves, head by head."""
    heads = w.reshape(num_heads, -1, 2, *w.shape[1:])
    return heads.transpose(1, 2).reshape(w.shape)


def _name(names: gguf.TensorNameMap, template: TensorTemplate, layer: int) -> str:
    name: str | None = names.get_name(template.name.format(layer=layer), try_suffixes=(".weight", ".bias"))
    assert name is not None, f"gguf has no name for {template.name}"
    return name


def _tensor(file: GgufFile, name: str) -> GgufTensor:
    if name not in file.tensors:
        raise DamagedFile(file.path, f"{name} is not in it")
    return file.tensors[name]


def _misshapen(tensor: GgufTensor, shape: tuple[int, ...]) -> DamagedFile:
    return DamagedFile(tensor.path, f"{tensor.name} has shape {list(tensor.shape)} and should have {list(shape)}")
