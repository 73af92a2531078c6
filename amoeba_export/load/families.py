"""From a config.json to an `Architecture`, and from that to the weights that a checkpoint must have."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from amoeba_export.errors import InputError, MixtureOfExperts, UnsupportedError, UnsupportedModel
from amoeba_export.ir import Architecture, Family
from amoeba_export.load.family_file import FIELDS, FLAGS, FamilyFile, read_family, stand_ins, supported_families
from amoeba_export.load.kinds import read_kinds
from amoeba_export.load.rope import stretched_positions
from amoeba_export.reading import dim_problems
from amoeba_export.reading.bounds import MAX_EXPERTS_OF_ALL_LAYERS, MAX_FLOAT, shown
from amoeba_export.shown import an

BITSANDBYTES = "bitsandbytes"
"""The `quant_method` whose checkpoints can be cut: `quantized.py` reads them."""

_DEFAULTS = {f.name: f.default for f in dataclasses.fields(Architecture) if f.default is not dataclasses.MISSING}
_OPTIONAL = ("num_kv_heads", "head_dim", *(name for name, value in _DEFAULTS.items() if value is None))
_NUMBERS = (
    *("norm_offset", "attention_scale", "attention_softcap", "embedding_scale", "residual_scale"),
    *("logits_divisor", "final_softcap"),
)
"""Facts that are numbers, not sizes."""
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Keys by which a config says that it is a mixture of experts."""
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
}
"""transformers' names of the activations that we compute."""


def read_architecture(config: Mapping[str, Any], *, where: Path) -> tuple[Architecture, FamilyFile]:
    """The dims that a config.json stands for, in the spelling of transformers 4 or 5.

    Raises:
        InputError: A required key is missing or is not a sensible number.
        UnsupportedError: The family, the activation, the windows or the RoPE is one that we do not compute.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in supported_families():
        raise unsupported(config, supported_families(), where=where)
    file = read_family(model_type)
    _check_computable(config, file, where)
    config = _one_name(config, file)
    fields = {name: _value(name, config, file, where) for name in FIELDS}
    fields["activation"] = _activation(fields["activation"], file, where)
    _check_types(fields, where)
    fields["num_kv_heads"] = fields["num_kv_heads"] or fields["num_heads"]
    fields["head_dim"] = fields["head_dim"] or fields["hidden_size"] // fields["num_heads"]
    for name, entry in file.config.items():
        if not isinstance(entry, str) and "power" in entry and fields[name] is not None:
            fields[name] = float(fields[name]) ** entry["power"]
    _refuse(dim_problems({"head_dim": fields["head_dim"]}), where)
    # What a subnet is written with is not quantized, nor is what it is compared with.
    config = {key: value for key, value in config.items() if key != "quantization_config"}
    kinds, lists = read_kinds(
        config,
        file,
        num_layers=fields["num_layers"],
        head_dim=fields["head_dim"],
        max_positions=fields["max_positions"],
        window=fields["sliding_window"],
        where=where,
    )
    fields |= kinds
    architecture = Architecture(family=model_type, config=config | lists, containers=file.containers, **fields)
    _check_dims(architecture, where)
    if file.even_heads and architecture.hidden_size % architecture.num_heads:
        raise _uneven_heads(architecture, file, where)
    positions = stretched_positions(architecture)
    _refuse(dim_problems({"max_positions": positions}), where)
    return dataclasses.replace(architecture, max_positions=positions), file


def _one_name(config: Mapping[str, Any], file: FamilyFile) -> dict[str, Any]:
    """The config with keys that have two names under the first one."""
    named = {
        entry["also"]: entry["key"] for entry in file.config.values() if not isinstance(entry, str) and "also" in entry
    }
    return {named.get(key, key): value for key, value in config.items() if named.get(key) not in config}


def unsupported(config: Mapping[str, Any], supported: Collection[str], *, where: Path) -> UnsupportedError:
    """What is said of a model of a type that is not one of `supported`."""
    model_type = config.get("model_type")
    text = config.get("text_config")
    for keys in (config, text if isinstance(text, Mapping) else {}):
        for key in _EXPERTS:
            if isinstance(count := keys.get(key), int) and count > 1:
                return MixtureOfExperts(model_type, count, supported_families(), where=where)
    return UnsupportedModel(model_type, supported, where=where)


def quantization_method(config: Mapping[str, Any]) -> str | None:
    """`quant_method` of a quantized checkpoint, None for one that is not."""
    facts = config.get("quantization_config")
    if not facts:
        return None
    return str(facts.get("quant_method", "an unnamed method")) if isinstance(facts, dict) else "an unnamed method"


def _check_computable(config: Mapping[str, Any], file: FamilyFile, where: Path) -> None:
    method = quantization_method(config)
    if method not in (None, BITSANDBYTES):
        raise UnsupportedError(
            f"This checkpoint is quantized ({method}); its weights cannot be cut as they are.",
            where=where,
            next_step="Give the checkpoint that it was quantized from, in fp32, fp16 or bf16.",
        )
    for key, value in file.requires.items():
        if config.get(key) not in (None, value):
            raise UnsupportedError(
                f"{an(file.family.model_type, begins=True)} with {key} = {config[key]!r} is not supported.",
                where=where,
                next_step=f"Use a model with {key} = {value!r}.",
            )


def _value(field: str, config: Mapping[str, Any], file: FamilyFile, where: Path) -> Any:
    value = _given(field, config, file, where)
    return None if value is False and field in _NUMBERS else value


def _given(field: str, config: Mapping[str, Any], file: FamilyFile, where: Path) -> Any:
    if field in file.constants:
        return file.constants[field]
    key = file.key(field)
    if key is not None and config.get(key) is not None:
        return config[key]
    if key in config and field not in file.nullable:
        raise InputError(
            f"The config of the model has {key} = null, which transformers does not accept of "
            f"{an(config['model_type'])}.",
            where=where,
            next_step=f"Write what it is into config.json, or remove '{key}' where transformers' default is meant.",
        )
    if field in file.defaults and (key is None or key not in config):
        return _default(field, file)
    if field in _OPTIONAL:
        return None
    if field in file.defaults:
        return _default(field, file)
    if field in _DEFAULTS and (key is None or key not in config):
        return _DEFAULTS[field]
    raise InputError(
        f"The config of the model does not say '{key}'.",
        where=where,
        next_step="Get config.json again from where the weights come from.",
    )


def _default(field: str, file: FamilyFile) -> Any:
    value = file.defaults[field]
    return None if value is False and field not in FLAGS else value


def _uneven_heads(architecture: Architecture, file: FamilyFile, where: Path) -> UnsupportedError:
    heads, hidden = (file.key(field) for field in ("num_heads", "hidden_size"))
    next_step = f"Use a model whose {hidden} is a multiple of {heads}."
    if not architecture.qkv_bias and not architecture.mlp_bias:
        other = next(one for one in map(read_family, stand_ins()) if not one.even_heads)
        window = other.key("sliding_window")
        next_step = (
            f'In a copy of its folder, write "model_type": "{other.family.model_type}", "architectures": '
            f'["{other.class_name}"] and "{window}": null into config.json: without biases that is the same model, and '
            "is accepted."
        )
    return UnsupportedError(
        f"{an(architecture.family, begins=True)} with {hidden} = {architecture.hidden_size}, which is no multiple of "
        f"{heads} = {architecture.num_heads}, is not accepted by transformers.",
        where=where,
        next_step=next_step,
    )


def _activation(name: object, file: FamilyFile, where: Path) -> str:
    """Our name of an activation. Null stands for the family's own."""
    name = file.defaults.get("activation", "silu") if name is None else name
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        key = file.key("activation")
        raise UnsupportedError(
            f"{an(file.family.model_type, begins=True)} with {key} = {shown(name)} is not supported.",
            where=where,
            next_step=f"Use a model with {key} = {file.defaults.get('activation', 'silu')!r}.",
        )
    return _ACTIVATIONS[name]


def _check_types(fields: Mapping[str, Any], where: Path) -> None:
    """Refuse what is no size, before anything is computed with it or laid out by it."""
    given = {name: value for name, value in fields.items() if value is not None or name not in _OPTIONAL}
    problems = dim_problems(given)
    for name, value in given.items():
        if name in FLAGS and not isinstance(value, bool):
            problems.append(f"{name} is {shown(value)}")
    eps = given["norm_eps"]
    if not isinstance(eps, int | float) or isinstance(eps, bool) or not 0 < eps < 1:
        problems.append(f"norm_eps is {shown(eps)}")
    for name in _NUMBERS:
        value = given.get(name)
        if value is not None and (
            not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= MAX_FLOAT
        ):
            problems.append(f"{name} is {shown(value)}")
    problems += [
        f"{name} is 0"
        for name in ("attention_scale", "attention_softcap", "logits_divisor", "final_softcap")
        if given.get(name) == 0
    ]
    _refuse(problems, where)


def _check_dims(architecture: Architecture, where: Path) -> None:
    problems = []
    if architecture.num_heads % architecture.num_kv_heads:
        problems.append(f"{architecture.num_heads} heads cannot share {architecture.num_kv_heads} KV heads evenly")
    if architecture.expert_size:
        experts, picked = architecture.ffn_size, architecture.experts_per_token
        if not isinstance(picked, int) or isinstance(picked, bool) or not 1 <= picked <= experts:
            problems.append(f"a token cannot go through {shown(picked)} of {experts} experts")
        if experts * architecture.num_layers > MAX_EXPERTS_OF_ALL_LAYERS:
            problems.append(f"{experts} experts in each of {architecture.num_layers} layers are too many")
    _refuse(problems, where)


def _refuse(problems: Sequence[str], where: Path) -> None:
    if problems:
        raise _nonsense(problems, where)


def _nonsense(problems: Sequence[str], where: Path) -> InputError:
    return InputError(
        f"The config of the model is wrong: {'; '.join(problems)}.",
        where=where,
        next_step="Get config.json again from where the weights come from.",
    )


def expected_weights(family: Family, architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight that a checkpoint of this architecture must have."""
    names: dict[str, tuple[int, ...]] = {}
    for template in family.globals + family.layer:
        if not architecture.has(template):
            continue
        shape = tuple(architecture.axis_size(axis) for axis in template.axes)
        layers = range(architecture.num_layers) if template in family.layer else range(1)
        names |= {template.name.format(layer=i): shape for i in layers}
    return names


def tied_copies(family: Family, architecture: Architecture) -> dict[str, str]:
    """Name -> what it repeats, for weights that tied embeddings make superfluous and that some checkpoints have."""
    return {family.weight("head"): family.weight("embedding")} if architecture.tied_embeddings else {}


def matrix_shapes(family: Family, architecture: Architecture) -> dict[str, tuple[int, int]]:
    """Module -> (out, in) of every linear layer, and (words, hidden) of the embedding. A tied head is not one."""
    return {
        name.removesuffix(".weight"): (shape[0], shape[1])
        for name, shape in expected_weights(family, architecture).items()
        if len(shape) == 2
    }
