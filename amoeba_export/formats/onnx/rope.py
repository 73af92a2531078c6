"""RoPE as tables of cosines and sines, in the arithmetic of transformers so that they agree to the bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch

from amoeba_export.ir import LayerKind, Rope

TABULATED_TYPES = ("default", "linear", "llama3", "yarn", "longrope")
"""RoPE types whose angles depend on the position, and for `longrope` on whether a text is longer than the first
training's. `dynamic` changes with every length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeTable:
    """Cosines and sines of every position.

    Attributes:
        cos: [rows, R / 2]; `sin` alike. A row is a position, but for those of short texts, which come first.
        num_short: Rows of short texts: as many as the texts that use them have tokens at most. 0 where length does not
            matter.
    """

    cos: npt.NDArray[np.float32]
    sin: npt.NDArray[np.float32]
    num_short: int


def rope_type(rope: Rope) -> str:
    """The type that transformers calls a RoPE."""
    return str((rope.scaling or {}).get("rope_type", "default"))


def distinct_ropes(kinds: Sequence[LayerKind]) -> dict[str, Rope]:
    """Every RoPE of `kinds`, once. Named by its first kind where there are several, and empty otherwise."""
    named: dict[str, Rope] = {}
    for kind in kinds:
        if kind.rope is not None and kind.rope not in named.values():
            named[kind.name] = kind.rope
    return named if len(named) > 1 else dict(zip([""], named.values(), strict=False))


def rope_rows(rope: Rope, max_positions: int) -> int:
    """Rows of the table of `rope`."""
    return max_positions + _num_short(rope, max_positions)


def rope_table(rope: Rope, max_positions: int) -> RopeTable:
    """The table of all positions of a context."""
    num_short = _num_short(rope, max_positions)
    parts = [_turned(rope, max_positions, max_positions)]
    if num_short:
        parts.insert(0, _turned(rope, max_positions, num_short, length=num_short))
    cos, sin = (np.concatenate(tables) for tables in zip(*parts, strict=True))
    return RopeTable(cos=cos, sin=sin, num_short=num_short)


def _num_short(rope: Rope, max_positions: int) -> int:
    if rope_type(rope) != "longrope":
        return 0
    return min(int((rope.scaling or {})["original_max_position_embeddings"]), max_positions)


def _turned(
    rope: Rope, max_positions: int, rows: int, *, length: int | None = None
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    frequency_H, factor = _frequencies(rope, max_positions, length or max_positions)
    angle_TH = torch.arange(rows, dtype=torch.float32)[:, None] * frequency_H
    return (angle_TH.cos() * factor).numpy(), (angle_TH.sin() * factor).numpy()


def _frequencies(rope: Rope, max_positions: int, length: int) -> tuple[torch.Tensor, float]:
    """Angles per position [R / 2] in a text of `length`, and what cosines and sines are multiplied with."""
    kind = rope_type(rope)
    if kind == "default":
        exponents_H = torch.arange(0, rope.dims, 2, dtype=torch.float32) / rope.dims
        return 1.0 / (rope.theta**exponents_H), 1.0
    # Only here, because it costs a second and 20 MB, and plain RoPE is what most models have.
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = dict(rope.scaling or {})
    if kind == "longrope":  # as transformers takes it where it is not said, which it remarks on
        scaling["factor"] = scaling.get("factor") or max_positions / scaling["original_max_position_embeddings"]

    class AnyKeys(LlamaConfig):  # type: ignore[misc] # some families keep facts of their own beside RoPE's
        ignore_keys_at_rope_validation: ClassVar[set[str]] = set(scaling)

    config = AnyKeys(
        hidden_size=rope.dims,
        num_attention_heads=1,
        head_dim=rope.dims,
        max_position_embeddings=max_positions,
        rope_parameters={**scaling, "rope_theta": rope.theta},
    )
    frequency_H, factor = ROPE_INIT_FUNCTIONS[kind](config, seq_len=length)
    return frequency_H, float(factor)
