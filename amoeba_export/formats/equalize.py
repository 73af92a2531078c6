"""Channels made alike before weights become integers of 4 bits: the function stays the same, and so does its speed.

A block of a quantized row has one step, which its largest weight sets. Training leaves small weights behind channels
with large values; beside larger weights they get few of the levels, and their error is multiplied by the large values.
So columns are multiplied by factors, and what makes their inputs is divided by them:

    columns of q, k, v      input_layernorm
    columns of gate, up     post_attention_layernorm
    columns of down         rows of up, and its bias

The idea is cross-layer equalization (Nagel et al., 2019, arXiv:1906.04721), with exponents that differ by matrix as in
AWQ (Lin et al., 2023, arXiv:2306.00978), but from weights alone: no data is needed. Not applied to o, which loses
little as it is, nor to lm_head, which shares its matrix with the embedding, nor to a matrix that is rounded already,
which would be rounded a second time (`formats/grid.py`).

`python -m benchmarks.equalize` prints what each group loses without and with factors.

Legend: O out, D hidden, F FFN neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

_STEPS = 4
"""Factors are powers of two to the multiples of 1 / this: coarse, so that the last bit of a sum, which depends on the
order in which a processor adds, all but never changes the file."""

_OCTAVES = 8
"""No factor is further than so many powers of two from the (geometric) mean."""

_FACTORS = np.array([2.0 ** (i / _STEPS) for i in range(-_OCTAVES * _STEPS, _OCTAVES * _STEPS + 1)], np.float32)

_Vector = npt.NDArray[np.float64]
_IsKept = Callable[[torch.Tensor], bool]
_Weights = Mapping[str, torch.Tensor]
_Named = tuple[str, torch.Tensor]


@dataclass(slots=True)
class _Group:
    """Weights that share factors, held until all of them are there."""

    names: tuple[str, ...]
    scale: Callable[[_Weights], Iterator[_Named]]
    held: dict[str, torch.Tensor] = field(default_factory=dict)


EQUALIZED = ("int4", "int4-mixed", "w4a16", "w4a16-asym")


def is_equalized(dtype: str) -> bool:
    """Whether files in a `--dtype` are: 8 bits lose nothing that would be worth it, K-quants have scales enough."""
    return dtype in EQUALIZED


class Equalizer:
    """Takes the weights of a cut model in any order and gives them back scaled, a group as soon as it is complete."""

    def __init__(self, names: Iterable[str], *, is_kept: _IsKept | None = None) -> None:
        """Nothing is read yet.

        Args:
            names: All weights that will come, named as in stock transformers; none if nothing is to be scaled.
            is_kept: Whether the columns of a matrix must stay as they are. None: of none.
        """
        is_kept = is_kept or (lambda _: False)
        known = set(names)
        self._groups: dict[str, _Group] = {}
        for name in known:
            layer, found, _ = name.partition(".self_attn.q_proj.weight")
            if found:
                self._add(_attention(layer, is_kept))
            layer, found, _ = name.partition(".mlp.down_proj.weight")
            if found:
                self._add(_mlp(layer, is_kept, biased=f"{layer}.mlp.up_proj.bias" in known))

    def _add(self, group: _Group) -> None:
        self._groups |= dict.fromkeys(group.names, group)

    def take(self, name: str, weight: torch.Tensor) -> Iterator[_Named]:
        """What can be written now that `weight` is there: itself if nothing scales it, or its group, or nothing yet.

        What was scaled is fp32. `weight` itself is never written into.
        """
        group = self._groups.get(name)
        if group is None:
            yield name, weight
            return
        group.held[name] = weight
        if len(group.held) == len(group.names):
            held, group.held = group.held, {}
            yield from group.scale(held)


def _attention(layer: str, is_kept: _IsKept) -> _Group:
    norm = f"{layer}.input_layernorm.weight"
    q, k, v = (f"{layer}.self_attn.{part}_proj.weight" for part in "qkv")

    def scale(held: _Weights) -> Iterator[_Named]:
        if any(is_kept(held[name]) for name in (q, k, v)):
            yield from held.items()
            return
        factor_D = _factors(-0.75 * _levels(held[v]) - 0.25 * _levels(held[q], held[k]))
        yield norm, held[norm].float() / factor_D
        for name in (q, k, v):
            yield name, held[name].float() * factor_D

    return _Group((norm, q, k, v), scale)


def _mlp(layer: str, is_kept: _IsKept, *, biased: bool) -> _Group:
    norm, bias = f"{layer}.post_attention_layernorm.weight", f"{layer}.mlp.up_proj.bias"
    gate, up, down = (f"{layer}.mlp.{part}_proj.weight" for part in ("gate", "up", "down"))

    def scale(held: _Weights) -> Iterator[_Named]:
        gain_D = held[norm].float()
        if any(is_kept(held[name]) for name in (gate, up)):
            yield from held.items()
            return
        factor_D = _factors(-0.75 * _levels(held[up]) - 0.5 * _levels(held[gate]))
        # A row of up with its gain says how large what it makes is likely to be.
        made_F = _levels(held[up].float() * gain_D, dim=1)
        factor_F = _factors(0.5 * made_F - _levels(held[down]))
        if is_kept(held[down]):
            factor_F = torch.ones_like(factor_F)
        yield norm, gain_D / factor_D
        yield gate, held[gate].float() * factor_D
        yield up, (held[up].float() * factor_D).div_(factor_F[:, None])
        if biased:
            yield bias, held[bias].float() / factor_F
        yield down, held[down].float() * factor_F

    return _Group((norm, gate, up, down, *([bias] if biased else [])), scale)


def _levels(*weights: torch.Tensor, dim: int = 0) -> _Vector:
    """The binary logarithm of the root mean square of each column (row: dim 1) of matrices; NaN where all are zero."""
    norms = [torch.linalg.vector_norm(weight.float(), dim=dim).double().numpy() for weight in weights]
    mean_I = np.square(norms).sum(0) / sum(weight.shape[dim] for weight in weights)
    levels_I: _Vector = np.log2(mean_I, out=np.full_like(mean_I, np.nan), where=mean_I > 0) / 2
    return levels_I


def _factors(exponent_I: _Vector) -> torch.Tensor:
    """2 to the power of what `exponent_I` is above its mean, rounded and limited; 1 where it is NaN."""
    present_I = ~np.isnan(exponent_I)
    mean = exponent_I.mean(where=present_I) if present_I.any() else 0.0
    steps_I = np.where(present_I, np.rint((exponent_I - mean) * _STEPS), 0)
    limit = _OCTAVES * _STEPS
    return torch.from_numpy(_FACTORS[np.clip(steps_I, -limit, limit).astype(int) + limit])
