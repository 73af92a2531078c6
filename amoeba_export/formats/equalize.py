"""Channels made alike before weights become integers: the function stays the same, and so does its speed.

A block of a quantized row has one step, which its largest weight sets. Training leaves small weights behind channels
with large values; beside larger weights they get few of the levels, and their error is multiplied by the large values.
So columns are multiplied by factors, and what makes their inputs is divided by them:

    columns of q, k, v      the norm before attention
    columns of gate, up     the norm before the FFN
    columns of down         rows of up, and its bias

A model without such norms keeps these columns as they are.

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

from amoeba_export.ir import Family, Role, Subnet

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


EQUALIZED = {"onnx": ("int8", "int4-mixed", "int4"), "gguf": ("int4",)}
"""In ONNX, int8 too: blocks of 64, and kernels that round what enters a matrix to 8 bits, block by block."""


def is_equalized(container: str, dtype: str) -> bool:
    """Whether a file in a `--dtype` is. K-quants have scales enough, and Q8_0 may be what the source is in."""
    return dtype in EQUALIZED[container]


class Equalizer:
    """Takes the weights of a cut model in any order and gives them back scaled, a group as soon as it is complete."""

    def __init__(
        self, names: Iterable[str], family: Family, *, norm_offset: float = 0.0, is_kept: _IsKept | None = None
    ) -> None:
        """Nothing is read yet.

        Args:
            names: All weights that will come; none if nothing is to be scaled.
            family: Says what they are.
            norm_offset: What the family adds to the weight of a norm. What is scaled is the sum.
            is_kept: Whether the columns of a matrix must stay as they are. None: of none.
        """
        is_kept = is_kept or (lambda _: False)
        known = set(names)
        self._groups: dict[str, _Group] = {}
        for name in known:
            place = family.find(name)
            if place is None or place.layer is None or place.part != "weight":
                continue
            of = _Names(family, place.layer, norm_offset)
            if place.role == "q" and of("attn_in_norm") in known:
                self._add(_attention(of, is_kept))
            if place.role == "down":
                # A router reads what that norm gives, too, and is not scaled.
                has_norm = of("ffn_in_norm") in known and of("router") not in known
                is_biased = family.bias("up", place.layer) in known
                self._add(_mlp(of, is_kept, has_norm=has_norm, biased=is_biased))

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


def layer_names(subnet: Subnet) -> frozenset[str]:
    """The weights in the layers of a cut."""
    return frozenset(spec.name for spec in subnet.specs if subnet.family.place(spec.name).layer is not None)


def scaled(subnet: Subnet, equalizer: Equalizer) -> Iterator[_Named]:
    """The weights in the layers of a cut in fp32, in order, as `equalizer` scales them."""
    names = layer_names(subnet)
    for name, weight in subnet.stream():
        if name in names:
            for ready, values in equalizer.take(name, weight):
                yield ready, values.float()


@dataclass(frozen=True, slots=True)
class _Names:
    """Names of the weights of a layer by role, and how its norms are scaled."""

    family: Family
    layer: int
    norm_offset: float

    def __call__(self, role: Role) -> str:
        """Empty for a role that the family has not."""
        return self.family.weight(role, self.layer) if self.family.has(role) else ""

    def divided(self, gain_D: torch.Tensor, factor_D: torch.Tensor) -> torch.Tensor:
        """The weight of a norm that multiplies with `gain_D` / `factor_D`."""
        scaled_D = gain_D / factor_D
        return scaled_D - self.norm_offset if self.norm_offset else scaled_D

    def gain(self, weight_D: torch.Tensor) -> torch.Tensor:
        """What a norm multiplies with."""
        return weight_D.float() + self.norm_offset if self.norm_offset else weight_D.float()


def _attention(of: _Names, is_kept: _IsKept) -> _Group:
    norm, q, k, v = of("attn_in_norm"), of("q"), of("k"), of("v")

    def scale(held: _Weights) -> Iterator[_Named]:
        if any(is_kept(held[name]) for name in (q, k, v)):
            yield from held.items()
            return
        factor_D = _factors(-0.75 * _levels(held[v]) - 0.25 * _levels(held[q], held[k]))
        yield norm, of.divided(of.gain(held[norm]), factor_D)
        for name in (q, k, v):
            yield name, held[name].float() * factor_D

    return _Group((norm, q, k, v), scale)


def _mlp(of: _Names, is_kept: _IsKept, *, has_norm: bool, biased: bool) -> _Group:
    norm, bias = of("ffn_in_norm"), of.family.bias("up", of.layer)
    gate, up, down = of("gate"), of("up"), of("down")

    def scale(held: _Weights) -> Iterator[_Named]:
        gain_D = of.gain(held[norm]) if has_norm else torch.ones(held[up].shape[1])
        if any(is_kept(held[name]) for name in (gate, up)):
            yield from held.items()
            return
        factor_D = _factors(-0.75 * _levels(held[up]) - 0.5 * _levels(held[gate]))
        if not has_norm:
            factor_D = torch.ones_like(factor_D)
        # A row of up with its gain says how large what it makes is likely to be.
        made_F = _levels(held[up].float() * gain_D, dim=1)
        factor_F = _factors(0.5 * made_F - _levels(held[down]))
        if is_kept(held[down]):
            factor_F = torch.ones_like(factor_F)
        if has_norm:
            yield norm, of.divided(gain_D, factor_D)
        yield gate, held[gate].float() * factor_D
        yield up, (held[up].float() * factor_D).div_(factor_F[:, None])
        if biased:
            yield bias, held[bias].float() / factor_F
        yield down, held[down].float() * factor_F

    return _Group((*([norm] if has_norm else []), gate, up, down, *([bias] if biased else [])), scale)


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
