"""What decoder-only models differ in: the role of every weight, and the facts beside the dims.

A room that works on weights asks for them by role (`Family.weight("o", 3)`) and asks `Architecture` for facts; it
neither spells a weight's name nor compares a family's.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Axis = Literal["vocab", "hidden", "query", "kv", "ffn", "expert", "head_dim"]
"""What one axis of a weight indexes. `query` is N * H long, `kv` K * H. `ffn` is F, all neurons: with experts E * F."""

Role = Literal[
    "embedding",
    "attn_in_norm",
    "q",
    "k",
    "v",
    "q_norm",
    "k_norm",
    "o",
    "attn_out_norm",
    "ffn_in_norm",
    "router",
    "gate",
    "up",
    "down",
    "ffn_out_norm",
    "final_norm",
    "head",
]
"""What a module does. Outside the layers: `embedding`, `final_norm` and `head` (absent where it is tied).

Attention: `attn_in_norm` (before q, k and v), `q`, `k`, `v`, `q_norm` and `k_norm` (of queries and keys, before RoPE),
`o`, `attn_out_norm` (of what `o` gives, before it is added to the residual stream). The FFN likewise: down(act(gate(x))
* up(x)) between `ffn_in_norm` and `ffn_out_norm`. With experts, `router` scores each of them, and `gate`, `up` and
`down` hold the neurons of all, expert after expert.
"""

Block = Literal["attention", "ffn"]
"""What is cut away together: without heads, nothing of `attention` is left but the bias of `o`; likewise the FFN."""

Part = Literal["weight", "bias"]

LAYER_ROLES: Mapping[Block, tuple[Role, ...]] = {
    "attention": ("attn_in_norm", "q", "k", "v", "q_norm", "k_norm", "o", "attn_out_norm"),
    "ffn": ("ffn_in_norm", "router", "gate", "up", "down", "ffn_out_norm"),
}
LINEARS: tuple[Role, ...] = ("q", "k", "v", "o", "gate", "up", "down")
"""The matrices of a layer: what heads and neurons are cut from, and what adapters change."""
WRITERS: tuple[Role, ...] = ("o", "down")
"""What writes into the residual stream, in the order of a layer. Only these get compensation biases."""
READERS: Mapping[Role, tuple[Role, ...]] = {"attn_in_norm": ("q", "k", "v"), "ffn_in_norm": ("gate", "up")}
"""Norm -> the matrices that read what it gives, and nothing else does."""

_BLOCKS: Mapping[Role, Block] = {role: block for block, roles in LAYER_ROLES.items() for role in roles}


def block_of(role: Role) -> Block | None:
    """The block that a module of a layer belongs to; None outside the layers."""
    return _BLOCKS.get(role)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorTemplate:
    """One weight of a family, as data: its role, its name (with `{layer}`), and what each axis indexes.

    Attributes:
        when: The `Architecture` flag that says whether this weight exists (`qkv_bias`, `qk_norm`, ...), or None for
            always. `untied` means: only when embeddings are not tied.
    """

    name: str
    role: Role
    axes: tuple[Axis, ...]
    when: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Fused:
    """A module of the source's files that holds several of ours, one under the other.

    It is split where it is read and put together where the source's own type is written; all else sees its parts.

    Attributes:
        module: Its name, with `{layer}`.
        roles: What it holds, from the top.
    """

    module: str
    roles: tuple[Role, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class OfExperts:
    """A matrix of ours that the source's files hold in pieces, one per expert.

    It is joined where it is read and split where the source's own type is written; all else sees the whole.

    Attributes:
        role: `gate`, `up` or `down`.
        module: Name of a piece, with `{layer}` and `{expert}`.
    """

    role: Role
    module: str


@dataclass(frozen=True, slots=True)
class Place:
    """What a weight is. `layer` is None outside the layers."""

    role: Role
    layer: int | None
    part: Part


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One model family: which weights it has. Read from `load/architectures/<model_type>.toml`.

    The names hold for the supernet and for its cuts, whose layers are counted anew.

    Attributes:
        experts: What the files hold in pieces; empty without experts.
        expert_size_key: Key of config.json for the neurons of an expert, or None.
    """

    model_type: str
    globals: tuple[TensorTemplate, ...]
    layer: tuple[TensorTemplate, ...]
    fused: tuple[Fused, ...] = ()
    experts: tuple[OfExperts, ...] = ()
    expert_size_key: str | None = None

    @property
    def templates(self) -> tuple[TensorTemplate, ...]:
        """Every weight, whether a model has it or not."""
        return self.globals + self.layer

    def has(self, role: Role) -> bool:
        """Whether models of the family may have such a module."""
        return role in _modules(self)

    def module(self, role: Role, layer: int | None = None) -> str:
        """Name of a module, such as `model.layers.3.self_attn.o_proj`. Raises `KeyError` where the family has none."""
        return _modules(self)[role].format(layer=layer)

    def weight(self, role: Role, layer: int | None = None) -> str:
        """Name of a module's weight."""
        return f"{self.module(role, layer)}.weight"

    def bias(self, role: Role, layer: int | None = None) -> str:
        """Name of a module's bias, which a cut may have where the source has none."""
        return f"{self.module(role, layer)}.bias"

    @property
    def expert_list(self) -> str:
        """Name of what holds the experts of a layer in the files, with `{layer}`."""
        return self.experts[0].module.partition(".{expert}")[0]

    @property
    def layers_prefix(self) -> str:
        """What names of all layers' weights begin with, such as `model.layers.`."""
        return self.layer[0].name.partition("{layer}")[0]

    def layer_prefix(self, layer: int) -> str:
        """What names of a layer's weights begin with, such as `model.layers.3.`."""
        return f"{self.layers_prefix}{layer}."

    def find(self, name: str) -> Place | None:
        """What the weight `name` is, in the supernet or a cut of it; None for a name that is none of this family's."""
        if (match := _pattern(self).fullmatch(name)) is None:
            return None
        number, part = match["layer"], match["part"]
        role = _roles(self).get((match["before"] or match["outside"], match["after"] or ""))
        return None if role is None else Place(role, None if number is None else int(number), part)  # type: ignore[arg-type]

    def place(self, name: str) -> Place:
        """As `find`, for a name that must be one. Raises `KeyError`."""
        if (found := self.find(name)) is None:
            raise KeyError(name)
        return found


@functools.cache
def _modules(family: Family) -> dict[Role, str]:
    return {template.role: template.name.rpartition(".")[0] for template in reversed(family.templates)}


@functools.cache
def _roles(family: Family) -> dict[tuple[str, str], Role]:
    """(name before the number of the layer, name after it) -> role."""
    return {
        (module.partition("{layer}")[0], module.partition("{layer}")[2]): role
        for role, module in _modules(family).items()
    }


@functools.cache
def _pattern(family: Family) -> re.Pattern[str]:
    prefixes = {head for head, tail in _roles(family) if tail}
    layers = "|".join(map(re.escape, sorted(prefixes))) or "(?!)"
    return re.compile(rf"(?:(?P<before>{layers})(?P<layer>\d+)(?P<after>\..+)|(?P<outside>.+))\.(?P<part>weight|bias)")


Activation = Literal["silu", "gelu_tanh"]
"""Of the FFN: act(gate) * up. `gelu_tanh` is the approximation of GELU by tanh."""

QkNormScope = Literal["head", "whole"]
"""What one norm of q or k runs over: the dims of a head (weight [H]), or all heads together (weight [N * H])."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary position embedding of q and k.

    Attributes:
        theta: The base: pair i of R rotated dims turns by theta ** (-2 i / R) radians a token.
        scaling: The other RoPE parameters in transformers' spelling (`rope_type`, `factor`, ...), or None for plain.
        dims: Leading dims of each head that are rotated; the rest pass. They pair as i and i + dims / 2.
    """

    theta: float
    scaling: Mapping[str, Any] | None = None
    dims: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerKind:
    """What layers that attend alike have in common.

    Attributes:
        name: As `layer_types` of a config calls it: `full_attention` or `sliding_attention`.
        window: A token attends to itself and the `window - 1` tokens before it; None for all before it.
        rope: None: q and k are not rotated.
    """

    name: str = "full_attention"
    window: int | None = None
    rope: Rope | None

    def seen(self, tokens: float) -> float:
        """How many of `tokens` one token attends to."""
        return tokens if self.window is None else min(self.window, tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryTemperature:
    """Queries after RoPE are multiplied by 1 + beta * ln(1 + floor(position / length)) (Llama 4, Ministral 3)."""

    beta: float
    length: int
