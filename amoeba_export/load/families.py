"""Model families as data: `architectures/<model_type>.toml` says how to read a config and which weights follow."""

from __future__ import annotations

import dataclasses
import functools
import tomllib
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amoeba_export.errors import InputError, UnsupportedError, UnsupportedModel, nearest
from amoeba_export.ir import Architecture, Axis, Family, TensorTemplate
from amoeba_export.load.rope import read_rope, stretched_positions
from amoeba_export.reading import WrongValue, decode, dim_problems
from amoeba_export.reading.bounds import shown

FOLDER = Path(__file__).parent / "architectures"

EMBEDDING = "model.embed_tokens.weight"

BITSANDBYTES = "bitsandbytes"
"""The `quant_method` whose checkpoints can be cut: `quantized.py` reads them."""

_TABLES = ("config", "defaults", "constants", "requires", "weights", "ignored", "window", "transformers")
_FIELDS = tuple(f.name for f in dataclasses.fields(Architecture) if f.name not in ("family", "config", "rope_scaling"))
_FLAGS = ("untied", *(f.name for f in dataclasses.fields(Architecture) if f.type == "bool"))
_OPTIONAL = ("num_kv_heads", "head_dim", "sliding_window", "rope_theta")


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyFile:
    """One `architectures/*.toml`, with what it extends merged in.

    Attributes:
        config: Architecture field -> key of config.json.
        defaults: Architecture field -> its value where config.json leaves the key out.
        constants: Architecture field -> its value, whatever config.json says.
        requires: Key of config.json -> the only value that computes what we compute.
        ignored: Names of saved buffers that are no weights, with `{layer}`.
        window: How a sliding window is switched on, or empty when `config` alone says it.
        nullable: Architecture fields that may be null in config.json.
        even_heads: Whether the number of heads must divide the hidden size, whatever a head's size is.
    """

    family: Family
    config: Mapping[str, str]
    defaults: Mapping[str, Any]
    constants: Mapping[str, Any]
    requires: Mapping[str, Any]
    ignored: tuple[str, ...]
    window: Mapping[str, Any]
    nullable: tuple[str, ...]
    even_heads: bool


def supported_families() -> tuple[str, ...]:
    """Every `model_type` that has a file."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.toml")))


@functools.cache
def read_family(model_type: str, folder: Path = FOLDER) -> FamilyFile:
    """Read the file of one family.

    Raises:
        InputError: The file has a key that we do not know.
    """
    tables = _merged(model_type, folder)
    where = folder / f"{model_type}.toml"
    _check_keys(tables, ("model_type", "extends", *_TABLES), "a table", where)
    for name in ("config", "defaults", "constants"):
        _check_keys(tables[name], _FIELDS, f"in [{name}] a dimension", where)
    _check_keys(tables["ignored"], ("names",), "in [ignored] a key", where)
    _check_keys(tables["window"], ("enabled", "first_layer"), "in [window] a key", where)
    _check_keys(tables["transformers"], ("nullable", "even_heads"), "in [transformers] a key", where)
    templates = tuple(_template(name, entry, where) for name, entry in tables["weights"].items())
    return FamilyFile(
        family=Family(
            model_type=model_type,
            globals=tuple(t for t in templates if "{layer}" not in t.name),
            layer=tuple(t for t in templates if "{layer}" in t.name),
        ),
        config=tables["config"],
        defaults=tables["defaults"],
        constants=tables["constants"],
        requires=tables["requires"],
        ignored=tuple(tables["ignored"].get("names", ())),
        window=tables["window"],
        nullable=tuple(tables["transformers"].get("nullable", ())),
        even_heads=bool(tables["transformers"].get("even_heads", False)),
    )


def _merged(model_type: str, folder: Path) -> dict[str, Any]:
    """The tables of a file over those of the file it extends, entry by entry."""
    own = tomllib.loads((folder / f"{model_type}.toml").read_text(encoding="utf-8"))
    parent = _merged(own["extends"], folder) if "extends" in own else {}
    return own | {table: parent.get(table, {}) | own.get(table, {}) for table in _TABLES}


def _check_keys(table: Mapping[str, Any], known: tuple[str, ...], kind: str, where: Path) -> None:
    for key in table:
        if key not in known:
            raise InputError(
                f"A family file has {kind} named '{key}', which means nothing.{nearest(key, known)}",
                where=where,
                next_step=f"Use one of: {', '.join(known)}.",
            )


def _template(name: str, entry: Mapping[str, Any], where: Path) -> TensorTemplate:
    _check_keys(entry, ("axes", "when"), f"for the weight {name} a key", where)
    _check_keys(dict.fromkeys(entry["axes"]), typing.get_args(Axis), f"for the weight {name} an axis", where)
    if "when" in entry:
        _check_keys({entry["when"]: None}, _FLAGS, f"for the weight {name} a condition", where)
    return TensorTemplate(name=name, axes=tuple(entry["axes"]), when=entry.get("when"))


def read_architecture(config: Mapping[str, Any], *, where: Path) -> tuple[Architecture, FamilyFile]:
    """The dims that a config.json stands for, in the spelling of transformers 4 or 5.

    Raises:
        InputError: A required key is missing or is not a sensible number.
        UnsupportedError: The family, the activation, the window or the RoPE is one that we do not compute.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in supported_families():
        raise UnsupportedModel(model_type, supported_families(), where=where)
    file = read_family(model_type)
    _check_computable(config, file, where)
    fields = {name: _value(name, config, file, where) for name in _FIELDS if name not in ("rope_theta",)}
    _check_types(fields, where)
    fields["num_kv_heads"] = fields["num_kv_heads"] or fields["num_heads"]
    fields["head_dim"] = fields["head_dim"] or fields["hidden_size"] // fields["num_heads"]
    fields["sliding_window"] = _window(fields["sliding_window"], fields["num_layers"], config, file, where)
    # What a subnet is written with is not quantized, nor is what it is compared with.
    config = {key: value for key, value in config.items() if key != "quantization_config"}
    theta, scaling = read_rope(config, max_positions=fields["max_positions"], where=where)
    architecture = Architecture(family=model_type, rope_theta=theta, rope_scaling=scaling, config=config, **fields)
    _check_dims(architecture, where)
    if file.even_heads and architecture.hidden_size % architecture.num_heads:
        raise _uneven_heads(architecture, file, where)
    positions = stretched_positions(architecture)
    _refuse(dim_problems({"max_positions": positions}), where)
    return dataclasses.replace(architecture, max_positions=positions), file


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
                f"A {file.family.model_type} with {key} = {config[key]!r} is not supported.",
                where=where,
                next_step=f"Use a model with {key} = {value!r}.",
            )


def _value(field: str, config: Mapping[str, Any], file: FamilyFile, where: Path) -> Any:
    if field in file.constants:
        return file.constants[field]
    key = file.config.get(field)
    if key is not None and config.get(key) is not None:
        return config[key]
    if key in config and field not in file.nullable:
        raise InputError(
            f"The config of the model has {key} = null, which transformers does not accept of a "
            f"{config['model_type']}.",
            where=where,
            next_step=f"Write what it is into config.json, or remove '{key}' where transformers' default is meant.",
        )
    if field in file.defaults and (key is None or key not in config):
        return file.defaults[field]
    if field in _OPTIONAL:
        return None
    if field in file.defaults:
        return file.defaults[field]
    raise InputError(
        f"The config of the model does not say '{key}'.",
        where=where,
        next_step="Get config.json again from where the weights come from.",
    )


def _uneven_heads(architecture: Architecture, file: FamilyFile, where: Path) -> UnsupportedError:
    heads, hidden = (file.config[field] for field in ("num_heads", "hidden_size"))
    next_step = f"Use a model whose {hidden} is a multiple of {heads}."
    if not architecture.qkv_bias and not architecture.mlp_bias:
        next_step = (
            'In a copy of its folder, write "model_type": "mistral", "architectures": ["MistralForCausalLM"] and '
            '"sliding_window": null into config.json: without biases that is the same model, and is accepted.'
        )
    return UnsupportedError(
        f"A {architecture.family} with {hidden} = {architecture.hidden_size}, which is no multiple of {heads} = "
        f"{architecture.num_heads}, is not accepted by transformers.",
        where=where,
        next_step=next_step,
    )


def _window(
    window: int | None, num_layers: int, config: Mapping[str, Any], file: FamilyFile, where: Path
) -> int | None:
    """The window that all layers share, or None. `layer_types` and `first_layer` as in transformers' Qwen2Config."""
    if not file.window or window is None:
        return window
    if not config.get(file.window["enabled"], False):
        return None
    first = file.window["first_layer"]
    try:
        first_layer = decode(int, config.get(first["key"], first["default"]), first["key"])
        layer_types = decode(list[str], config.get("layer_types") or [], "layer_types")
    except WrongValue as error:
        raise _nonsense([str(error)], where) from error
    layer_types = layer_types or [
        "sliding_attention" if i >= first_layer else "full_attention" for i in range(num_layers)
    ]
    if set(layer_types) == {"full_attention"}:
        return None
    if set(layer_types) == {"sliding_attention"}:
        return window
    raise UnsupportedError(
        f"Layers with different attention are not supported: {', '.join(sorted(set(layer_types)))}.",
        where=where,
        next_step="Use a model whose layers all attend to everything, or all through one window.",
    )


def _check_types(fields: Mapping[str, Any], where: Path) -> None:
    """Refuse what is no size, before anything is computed with it or laid out by it."""
    given = {name: value for name, value in fields.items() if value is not None or name not in _OPTIONAL}
    problems = dim_problems(given)
    for name, value in given.items():
        if name in _FLAGS and not isinstance(value, bool):
            problems.append(f"{name} is {shown(value)}")
    eps = given["norm_eps"]
    if not isinstance(eps, int | float) or isinstance(eps, bool) or not 0 < eps < 1:
        problems.append(f"norm_eps is {shown(eps)}")
    _refuse(problems, where)


def _check_dims(architecture: Architecture, where: Path) -> None:
    problems = dim_problems({"head_dim": architecture.head_dim})
    if not problems and architecture.num_heads % architecture.num_kv_heads:
        problems.append(f"{architecture.num_heads} heads cannot share {architecture.num_kv_heads} KV heads evenly")
    _refuse(problems, where)


def _refuse(problems: Sequence[str], where: Path) -> None:
    if problems:
        raise _nonsense(problems, where)


def _nonsense(problems: Sequence[str], where: Path) -> InputError:
    return InputError(
        f"The config of the model makes no sense: {'; '.join(problems)}.",
        where=where,
        next_step="Get config.json again from where the weights come from.",
    )


def expected_weights(family: Family, architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight that a checkpoint of this architecture must have."""
    names: dict[str, tuple[int, ...]] = {}
    for template in family.globals + family.layer:
        if not _present(template, architecture):
            continue
        shape = tuple(architecture.axis_size(axis) for axis in template.axes)
        layers = range(architecture.num_layers) if template in family.layer else range(1)
        names |= {template.name.format(layer=i): shape for i in layers}
    return names


def tied_copies(family: Family, architecture: Architecture) -> dict[str, str]:
    """Name -> what it repeats, for weights that tied embeddings make superfluous and that some checkpoints have."""
    return {head_name(family): EMBEDDING} if architecture.tied_embeddings else {}


def head_name(family: Family) -> str:
    """The weight of the head, which a model with tied embeddings does not have."""
    (name,) = (template.name for template in family.globals if template.when == "untied")
    return name


def matrix_shapes(family: Family, architecture: Architecture) -> dict[str, tuple[int, int]]:
    """Module -> (out, in) of every linear layer, and (words, hidden) of the embedding. A tied head is not one."""
    return {
        name.removesuffix(".weight"): (shape[0], shape[1])
        for name, shape in expected_weights(family, architecture).items()
        if len(shape) == 2
    }


def _present(template: TensorTemplate, architecture: Architecture) -> bool:
    if template.when is None:
        return True
    return not architecture.tied_embeddings if template.when == "untied" else bool(getattr(architecture, template.when))
