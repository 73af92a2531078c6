"""What the architectures of llama.cpp compute, and what they call the tensors of a GGUF file. No code runs here.

Read from llama.cpp's `src/models/*.cpp`. Roles and features are those of `ir/family.py`.

- `llama` takes optional biases everywhere, with one width for all layers. `deci` is `llama` with a width per layer.
- `qwen2` wants query heads that span the hidden size and has no output biases. `qwen3` has no biases at all.
- `granite` is `llama` with four factors. `mistral3` is `llama` whose queries grow with their position.
- `smollm3` does not rotate every fourth layer, by position, and has no biases.
- `gemma2` and `gemma3` scale scores by the head dim (their 27B, told by its number of layers, by hidden size / heads),
  which a file does not say; so what differs from that goes into q. Norms have 1 added by whoever writes the file.
- `phi3` has fused matrices and heads that span the hidden size, and may rotate a part of each head.
- `olmo2` and `exaone4` norm what a block gives, not what it reads. `olmo2` norms q and k over all heads and
  scales no RoPE in layers with a window (OLMo 3). `exaone4` has windows with 64 layers alone. Both want a square `o`.
- `qwen3moe` is `qwen3` with one number of experts for all layers. Shares of a token's experts always sum to 1.
- All but `qwen*`, `gemma*`, `phi3`, `olmo2` and `exaone4` rotate neighbouring pairs, so rows of q and k are permuted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

KindsRule = Literal["alike", "listed", "every_fourth"]
"""How layers come to attend in different ways: not at all; a window where a list says so; no RoPE in each fourth."""

EVERY_BIAS = frozenset(("q", "k", "v", "o", "gate", "up", "down"))


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaCppArchitecture:
    """One architecture of llama.cpp.

    Attributes:
        name: `general.architecture`.
        computes: Features beyond Llama's layer that it can compute.
        always: Those of them that it computes whether a file says so or not.
        qk_norm: Whether it norms q and k, head by head but for `whole_qk_norm`.
        biases: Roles whose bias it reads.
        needs: Those of them that it does not open a file without.
        whole: Whether it is taken for uncut layers alone.
        in_pairs: Whether RoPE turns neighbouring pairs of a head, not its halves.
        per_layer: Whether layers may have widths of their own, or no attention.
        square: Whether query heads have to span the hidden size.
        fused: Whether q, k and v are one matrix, and gate and up another.
        ropes: Types of RoPE beyond plain.
        kinds: How layers may differ.
        window: Tokens of a window where a file says none; 0 for no window then.
        period: Of the layers' kinds where a file with windows says nothing: the last of each so many has none.
        one_base: Whether layers with and without a window have the same base of RoPE, whatever a file says.
        local_base: Base of RoPE in layers with a window where a file says none; None for that of the others.
        untied: Whether the head has to be there beside the embedding.
        hybrid: Number of layers at which it takes windows and layers without RoPE for granted.
        large: Number of layers at which scores are scaled by hidden size / heads; None: a file may say the scale.
    """

    name: str
    computes: frozenset[str] = frozenset()
    always: frozenset[str] = frozenset()
    qk_norm: bool = False
    biases: frozenset[str] = EVERY_BIAS
    needs: frozenset[str] = frozenset()
    whole: bool = False
    in_pairs: bool = True
    per_layer: bool = False
    square: bool = False
    fused: bool = False
    ropes: frozenset[str] = frozenset(("linear", "yarn", "llama3"))
    kinds: KindsRule = "alike"
    window: int = 0
    period: int = 0
    one_base: bool = False
    local_base: float | None = None
    untied: bool = False
    hybrid: int = 0
    large: int | None = None


_GEMMA = frozenset(("norm_offset", "output_norms", "activation", "attention_scale", "embedding_scale"))
_SANDWICH = frozenset(("output_norms", "activation", "embedding_scale"))
_AFTER = frozenset(("output_norms", "no_input_norms"))
_CAPS = frozenset(("attention_softcap", "final_softcap"))

_ALL = (
    LlamaCppArchitecture(
        name="qwen2",
        biases=frozenset(("q", "k", "v")),
        needs=frozenset(("q", "k", "v")),
        whole=True,
        in_pairs=False,
        square=True,
        ropes=frozenset(("linear", "yarn")),
    ),
    LlamaCppArchitecture(name="llama", ropes=frozenset(("linear", "yarn", "llama3", "longrope"))),
    LlamaCppArchitecture(name="deci", per_layer=True, ropes=frozenset(("linear", "yarn", "llama3", "longrope"))),
    LlamaCppArchitecture(
        name="qwen3", qk_norm=True, biases=frozenset(), in_pairs=False, ropes=frozenset(("linear", "yarn"))
    ),
    LlamaCppArchitecture(
        name="qwen3moe",
        computes=frozenset(("experts",)),
        always=frozenset(("experts",)),
        qk_norm=True,
        biases=frozenset(),
        in_pairs=False,
        ropes=frozenset(("linear", "yarn")),
    ),
    LlamaCppArchitecture(
        name="granite",
        computes=frozenset(("attention_scale", "embedding_scale", "residual_scale", "logits_divisor")),
        ropes=frozenset(("linear", "yarn", "llama3", "longrope")),
    ),
    LlamaCppArchitecture(name="mistral3", computes=frozenset(("query_temperature",)), ropes=frozenset(("yarn",))),
    LlamaCppArchitecture(
        name="smollm3",
        computes=frozenset(("no_rope", "layer_kinds")),
        biases=frozenset(),
        ropes=frozenset(("linear", "yarn")),
        kinds="every_fourth",
    ),
    LlamaCppArchitecture(
        name="gemma3",
        computes=_GEMMA | {"layer_kinds", "final_softcap"},
        always=_SANDWICH,
        qk_norm=True,
        biases=frozenset(),
        in_pairs=False,
        ropes=frozenset(("linear",)),
        kinds="listed",
        period=6,
        local_base=10000.0,
        large=62,
    ),
    LlamaCppArchitecture(
        name="gemma2",
        computes=_GEMMA | _CAPS | {"layer_kinds"},
        always=_SANDWICH | _CAPS,
        biases=frozenset(),
        in_pairs=False,
        ropes=frozenset(),
        kinds="listed",
        window=4096,
        period=2,
        large=46,
    ),
    LlamaCppArchitecture(
        name="phi3",
        computes=frozenset(("partial_rotary",)),
        biases=frozenset(),
        in_pairs=False,
        square=True,
        fused=True,
        ropes=frozenset(("longrope",)),
    ),
    LlamaCppArchitecture(
        name="olmo2",
        computes=_AFTER | {"whole_qk_norm", "layer_kinds"},
        always=_AFTER | {"whole_qk_norm"},
        qk_norm=True,
        biases=frozenset(),
        in_pairs=False,
        square=True,
        ropes=frozenset(("linear", "yarn")),
        kinds="listed",
        period=4,
        one_base=True,
        untied=True,
    ),
    LlamaCppArchitecture(
        name="exaone4",
        computes=_AFTER,
        always=_AFTER,
        qk_norm=True,
        biases=frozenset(),
        in_pairs=False,
        square=True,
        ropes=frozenset(("linear", "yarn", "llama3")),
        hybrid=64,
    ),
)
ARCHITECTURES: Mapping[str, LlamaCppArchitecture] = {one.name: one for one in _ALL}
"""By name, in the order in which a writer should ask them."""

NOPE_STEP = 4
"""`smollm3` does not rotate the last of each so many layers."""

_STEMS: Mapping[str, str] = {
    "embedding": "token_embd",
    "final_norm": "output_norm",
    "head": "output",
    "attn_in_norm": "attn_norm",
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "o": "attn_output",
    "attn_out_norm": "post_attention_norm",
    "ffn_in_norm": "ffn_norm",
    "router": "ffn_gate_inp",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
    "ffn_out_norm": "post_ffw_norm",
}
"""Role -> stem of a tensor's name."""

MATRICES_OF_EXPERTS = ("gate", "up", "down")
"""Roles whose matrices [E, O, I] lie one after the other in a tensor, an expert each."""

ROUTER = _STEMS["router"]
"""It is never rounded: a router that picks other experts computes another function."""

_FUSED: Mapping[tuple[str, ...], str] = {("q", "k", "v"): "attn_qkv", ("gate", "up"): "ffn_up"}
"""Roles, from the top -> stem of the tensor that holds them, where an architecture has them fused."""


@dataclass(frozen=True, slots=True)
class GgufPlace:
    """Where a weight lies in a file.

    Attributes:
        tensor: Name of the tensor.
        roles: What it holds, from the top.
    """

    tensor: str
    roles: tuple[str, ...]


def gguf_place(architecture: LlamaCppArchitecture, role: str, layer: int | None, part: str) -> GgufPlace:
    """The place of a role's `weight` or `bias`."""
    stem, roles = _STEMS[role], tuple[str, ...]((role,))
    if "experts" in architecture.always and role in MATRICES_OF_EXPERTS:
        stem += "_exps"
    if architecture.fused:
        stem, roles = next(((one, held) for held, one in _FUSED.items() if role in held), (stem, roles))
    prefix = "" if layer is None else f"blk.{layer}."
    return GgufPlace(f"{prefix}{stem}.{part}", roles)


def rotates(architecture: LlamaCppArchitecture, layer: int) -> bool:
    """Whether RoPE turns the heads of a layer."""
    return architecture.kinds != "every_fourth" or (layer + 1) % NOPE_STEP != 0


def has_window(architecture: LlamaCppArchitecture, layer: int, pattern: int | list[int] | list[bool] | None) -> bool:
    """Whether a layer of a file with windows has one.

    Args:
        architecture: The file's.
        layer: Counted from 0.
        pattern: `attention.sliding_window_pattern`: a period, whose last layer has none (0: all have one), or one
            number or truth for each layer; None where the file does not say.
    """
    if isinstance(pattern, list):
        return bool(pattern[layer])
    period = architecture.period if pattern is None else pattern
    return period == 0 or layer % period < period - 1


def score_scale(architecture: LlamaCppArchitecture, num_layers: int, hidden: int, heads: int, head_dim: int) -> float:
    """By what scores are multiplied where the file does not say."""
    if architecture.large == num_layers:
        return float((hidden // heads) ** -0.5)
    return float(head_dim**-0.5)
