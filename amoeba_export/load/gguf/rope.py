"""`rope_freqs.weight`: by what each frequency of RoPE is divided, as the parameters of transformers' `llama3` RoPE.

Long waves are divided by `factor`, short ones by 1, those between by 1 / ((1 - blend) / factor + blend) with a blend
linear in the number of turns in the original context (Llama 3.1). Only three numbers of four can be told from the
divisors, so `low_freq_factor` is 1 as in every published model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

TOLERANCE = 2e-6
"""Of a divisor, relative: they are stored in fp32."""

_LOW = 1.0
_HIGHS = (4.0, 2.0, 8.0, 1.05, 1.01)
"""Tried where the divisors do not tell: the published one in front, and steep ones last, which fit a single blend."""


def llama3_parameters(divisors: NDArray[np.float32], *, theta: float) -> dict[str, Any] | None:
    """Parameters that give these divisors; `{}` when all are 1; None when no parameters do."""
    given = divisors.astype(np.float64)
    if not np.isfinite(given).all() or (given < 1 - TOLERANCE).any():
        return None
    if np.allclose(given, 1, rtol=TOLERANCE, atol=0):
        return {}
    factor = _plain(float(given.max()))
    size = 2 * len(given)
    turns = theta ** -(np.arange(0, size, 2, dtype=np.float64) / size) / (2 * np.pi)  # of one position
    blend = (1 / given - 1 / factor) / (1 - 1 / factor)
    between = (blend > TOLERANCE) & (blend < 1 - TOLERANCE)
    for high, original in _candidates(turns, blend, between):
        for context in (round(original), _plain(float(original))):
            parameters = {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": _LOW,
                "high_freq_factor": _plain(float(high)),
                "original_max_position_embeddings": context,
            }
            found = llama3_divisors(parameters, theta=theta, size=size) if high > _LOW else np.zeros_like(given)
            if np.allclose(found, given, rtol=TOLERANCE, atol=0):
                return parameters
    return None


def llama3_divisors(parameters: Mapping[str, Any], *, theta: float, size: int) -> NDArray[np.float64]:
    """What `parameters` divide the frequencies of a head of `size` by [size / 2]."""
    waves = 2 * np.pi * theta ** (np.arange(0, size, 2, dtype=np.float64) / size)
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    turns = parameters["original_max_position_embeddings"] / waves
    blend = np.clip((turns - low) / (high - low), 0, 1)
    divisors: NDArray[np.float64] = 1 / ((1 - blend) / parameters["factor"] + blend)
    return divisors


def _candidates(
    turns: NDArray[np.float64], blend: NDArray[np.float64], between: NDArray[np.bool_]
) -> list[tuple[float, float]]:
    """(high_freq_factor, original context) worth a try. The blend is (original * turns - low) / (high - low)."""
    if between.sum() >= 2:
        slope, offset = np.polyfit(turns[between], blend[between], 1)
        fits = [(_LOW - _LOW / offset, -_LOW * slope / offset)] if offset < 0 else []
        # Two points and rounding: the published factor may fit just as well, and then is what was meant.
        return [
            (high, float(np.median((blend * (high - _LOW) + _LOW)[between] / turns[between]))) for high in _HIGHS
        ] + fits
    if between.sum() == 1:
        return [(high, float((blend[between][0] * (high - _LOW) + _LOW) / turns[between][0])) for high in _HIGHS]
    # Nothing between: the longest kept wave must turn `high` times, the shortest slowed one `low` times at most.
    kept, slowed = turns[blend > 0.5].min(initial=np.inf), turns[blend <= 0.5].max()
    if not np.isfinite(kept):
        return [(_HIGHS[0], _LOW / slowed)]
    return [(high, high / kept) for high in _HIGHS] + [(1 + (kept / slowed - 1) / 2, _LOW / slowed)]


def _plain(value: float) -> float:
    """The number that was meant, where rounding left it a hair beside a short decimal."""
    short = float(f"{value:.5g}")
    return short if np.isclose(value, short, rtol=2e-6) else value
