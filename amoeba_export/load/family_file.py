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

from amoeba_export.errors import InputError, nearest
from amoeba_export.ir import Architecture, Axis, Family, Role, TensorTemplate
from amoeba_export.ir.family import Fused, OfExperts

FOLDER = Path(__file__).parent / "architectures"

_TABLES = (
    *("config", "defaults", "constants", "requires", "weights", "fused", "experts", "ignored", "window", "rope"),
    *("transformers", "containers"),
)
_COMPUTED = (
    *("family", "config", "containers", "rope_theta", "rope_scaling", "rotary_dims"),
    *("kinds", "kind_of_layer", "query_temperature"),
)
"""What [window] and [rope] say, and what is no fact of a config."""
FIELDS = tuple(f.name for f in dataclasses.fields(Architecture) if f.name not in _COMPUTED)
"""What [config], [defaults] and [constants] may name."""
FLAGS = ("untied", *(f.name for f in dataclasses.fields(Architecture) if f.type == "bool"))
_WINDOW = ("layer_types", "enabled", "first_layer", "full_every", "only_without_rope")
_ROPE = (
    *("theta", "default", "partial", "renamed", "by_layer_type", "skipped", "windows_only", "temperature"),
    "original_positions",
)
_KEYS_OF = {
    "ignored": ("names",),
    "window": _WINDOW,
    "rope": _ROPE,
    "transformers": ("class", "nullable", "even_heads", "head_dim_follows"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyFile:
    """One `architectures/*.toml`, with what it extends merged in.

    Attributes:
        config: Architecture field -> key of config.json, or a table: `key`; `power`, for a power of what it says;
            `also`, another name of the key.
        defaults: Architecture field -> its value where config.json leaves the key out. `false` for a number is null,
            which TOML does not have; likewise in `constants`.
        constants: Architecture field -> its value, whatever config.json says.
        requires: Key of config.json -> the only value that computes what we compute.
        ignored: Names of saved buffers that are no weights, with `{layer}`.
        window: Which layers have the window; empty when all of them have it. `kinds.py` reads it.
        rope: What is special about RoPE; empty when one plain set of parameters says it all. `kinds.py` reads it.
        containers: By container, what it needs to know of the family.
        nullable: Architecture fields that may be null in config.json.
        even_heads: Whether the number of heads must divide the hidden size, whatever a head's size is.
        head_dim_follows: Whether scaled RoPE is checked against hidden size / heads, whatever a head's size is.
        class_name: transformers' causal LM.
    """

    family: Family
    config: Mapping[str, str | Mapping[str, Any]]
    defaults: Mapping[str, Any]
    constants: Mapping[str, Any]
    requires: Mapping[str, Any]
    ignored: tuple[str, ...]
    window: Mapping[str, Any]
    rope: Mapping[str, Any]
    containers: Mapping[str, Mapping[str, Any]]
    nullable: tuple[str, ...]
    even_heads: bool
    head_dim_follows: bool
    class_name: str

    def key(self, field: str) -> str | None:
        """The key of config.json that says an Architecture field, or None."""
        entry = self.config.get(field)
        return entry if entry is None or isinstance(entry, str) else str(entry["key"])


def supported_families() -> tuple[str, ...]:
    """Every `model_type` that has a file."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.toml")))


@functools.cache
def stand_ins() -> tuple[str, ...]:
    """The types that hold other families' cuts where they compute the same, the simplest first."""
    places = {
        name: read_family(name).containers.get("safetensors", {}).get("stands_in", 0) for name in supported_families()
    }
    return tuple(sorted((name for name, place in places.items() if place), key=places.__getitem__))


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
        _check_keys(tables[name], FIELDS, f"in [{name}] a dimension", where)
    for entry in tables["config"].values():
        if isinstance(entry, dict):
            _check_keys(entry, ("key", "power", "also"), "in [config] a key", where)
    for name, known in _KEYS_OF.items():
        _check_keys(tables[name], known, f"in [{name}] a key", where)
    size_key = tables["config"].get("expert_size")
    templates = tuple(_template(name, entry, where) for name, entry in tables["weights"].items())
    return FamilyFile(
        family=Family(
            model_type=model_type,
            globals=tuple(t for t in templates if "{layer}" not in t.name),
            layer=tuple(t for t in templates if "{layer}" in t.name),
            fused=tuple(_fused(name, roles, where) for name, roles in tables["fused"].items()),
            experts=tuple(_of_experts(role, module, where) for role, module in tables["experts"].items()),
            expert_size_key=size_key,
        ),
        config=tables["config"],
        defaults=tables["defaults"],
        constants=tables["constants"],
        requires=tables["requires"],
        ignored=tuple(tables["ignored"].get("names", ())),
        window=tables["window"],
        rope=tables["rope"],
        containers=tables["containers"],
        nullable=tuple(tables["transformers"].get("nullable", ())),
        even_heads=bool(tables["transformers"].get("even_heads", False)),
        head_dim_follows=bool(tables["transformers"].get("head_dim_follows", False)),
        class_name=str(tables["transformers"].get("class", "")),
    )


def _merged(model_type: str, folder: Path) -> dict[str, Any]:
    """The tables of a file over those of the file it extends, entry by entry."""
    own = tomllib.loads((folder / f"{model_type}.toml").read_text(encoding="utf-8"))
    parent = _merged(own["extends"], folder) if "extends" in own else {}
    parent.pop("containers", None)  # what a container calls a family is no one else's name
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
    _check_keys(entry, ("role", "axes", "when"), f"for the weight {name} a key", where)
    _check_keys(dict.fromkeys(entry["axes"]), typing.get_args(Axis), f"for the weight {name} an axis", where)
    if "when" in entry:
        _check_keys({entry["when"]: None}, FLAGS, f"for the weight {name} a condition", where)
    _check_keys({entry.get("role", ""): None}, typing.get_args(Role), f"for the weight {name} a role", where)
    return TensorTemplate(name=name, role=entry["role"], axes=tuple(entry["axes"]), when=entry.get("when"))


def _fused(module: str, roles: Sequence[str], where: Path) -> Fused:
    _check_keys(dict.fromkeys(roles), typing.get_args(Role), f"for the fused module {module} a role", where)
    return Fused(module=module, roles=tuple(roles))  # type: ignore[arg-type]


def _of_experts(role: str, module: str, where: Path) -> OfExperts:
    _check_keys({role: None}, typing.get_args(Role), "in [experts] a role", where)
    return OfExperts(role=role, module=module)  # type: ignore[arg-type]
