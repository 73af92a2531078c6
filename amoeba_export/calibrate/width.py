"""How much each head and neuron matters: FLAP statistics, layer by layer (FLAP; upstream `width_shrink/prune.py`).

C counts the input channels of a writer (`o` or `down`), T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.numpy import load, save
from torch import nn

from amoeba_export.cache.sealed import read_sealed, write_sealed
from amoeba_export.calibrate.experts import ExpertStatistics
from amoeba_export.calibrate.recipe import WidthMetric
from amoeba_export.errors import NotANumber
from amoeba_export.ir import SILENT, Importance, Progress, Role
from amoeba_export.ir.family import WRITERS
from amoeba_export.model.layer import DecoderLayer
from amoeba_export.model.samples import Samples
from amoeba_export.model.states import StateStore

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(slots=True)
class ChannelStatistics:
    """Mean and spread of each input channel over tokens that come in batches, in float64 and one pass.

    Batches are merged by the pairwise update of Chan, Golub and LeVeque, which does not cancel. Upstream's update is
    not used: it mixes token and sample counts, and drops the first sample from the fluctuation.

    Attributes:
        count: Tokens seen.
        mean_C: Their mean.
        spread_C: Their summed squared distance from the mean.
    """

    count: int = 0
    mean_C: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    spread_C: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))

    def add(self, x_TC: torch.Tensor) -> None:
        """Take in the inputs of some tokens."""
        values_TC = x_TC.double()
        count = values_TC.shape[0]
        mean_C = values_TC.mean(dim=0)
        spread_C = (values_TC - mean_C).square().sum(dim=0)
        if not self.count:
            self.count, self.mean_C, self.spread_C = count, mean_C.numpy(), spread_C.numpy()
            return
        total = self.count + count
        shift_C = mean_C.numpy() - self.mean_C
        self.mean_C = self.mean_C + shift_C * (count / total)
        self.spread_C = self.spread_C + spread_C.numpy() + shift_C**2 * (self.count * count / total)
        self.count = total

    def variance(self) -> NDArray[np.float64]:
        """Of each channel, unbiased. [C]."""
        return self.spread_C / max(self.count - 1, 1)

    def mean_square(self) -> NDArray[np.float64]:
        """Mean of the squares of each channel. [C]."""
        return self.spread_C / self.count + self.mean_C**2


def channel_scores(statistics: ChannelStatistics, w_OC: torch.Tensor, metric: WidthMetric) -> NDArray[np.float64]:
    """Importance of each input channel of a projection, before standardisation. [C].

    `IFV` var(x); `WIFV` var(x) * ||W[:, c]||^2; `WIFN` and `wanda` mean_o |W[o, c]| * rms(x).
    """
    if metric == "IFV":
        return statistics.variance()
    if metric == "WIFV":
        energy_C: NDArray[np.float64] = w_OC.double().square().sum(dim=0).numpy()
        return np.asarray(statistics.variance() * energy_C)
    magnitude_C: NDArray[np.float64] = w_OC.double().abs().mean(dim=0).numpy()
    return np.asarray(magnitude_C * statistics.mean_square() ** 0.5)


def standardise(scores_LC: NDArray[np.float64]) -> NDArray[np.float64]:
    """Zero mean and unit deviation in each layer; all zero where a layer's scores do not differ."""
    centred_LC = scores_LC - scores_LC.mean(axis=1, keepdims=True)
    deviation_L1 = scores_LC.std(axis=1, ddof=1, keepdims=True) if scores_LC.shape[1] > 1 else np.zeros((1, 1))
    standardised_LC: NDArray[np.float64] = np.zeros(centred_LC.shape)
    np.divide(centred_LC, deviation_L1, out=standardised_LC, where=deviation_L1 > 0)
    return standardised_LC


def make_importance(
    o_LQ: NDArray[np.float64],
    down_LF: NDArray[np.float64],
    o_mean_LQ: NDArray[np.float64],
    down_mean_LF: NDArray[np.float64],
    *,
    metric: WidthMetric,
    head_dim: int,
) -> Importance:
    """From channel scores of all layers to the importance of heads and neurons.

    Attention scores are squared, but for `wanda`, standardised per layer, and averaged over a head's channels.
    """
    attention_LQ = o_LQ if metric == "wanda" else o_LQ**2
    heads_LNH = standardise(attention_LQ).reshape(o_LQ.shape[0], -1, head_dim)
    return Importance(
        heads_LN=heads_LNH.mean(axis=2),
        ffn_LF=standardise(down_LF),
        o_mean_LQ=o_mean_LQ.astype(np.float32),
        down_mean_LF=down_mean_LF.astype(np.float32),
        metric=metric,
    )


def _first_missing(paths: Sequence[Path], progress: Progress) -> int:
    """Index of the first layer whose file is not there or damaged; how many there are, where none is."""
    sound = [read_sealed(path) is not None for path in paths]
    for path, is_sound in zip(paths, sound, strict=True):
        if path.is_file() and not is_sound:
            progress.note(f"{path} is damaged; this layer is measured again.")
    return sound.index(False) if False in sound else len(paths)


@contextmanager
def _watched_writers(
    module: DecoderLayer, samples: Samples, experts: ExpertStatistics | None
) -> Iterator[Mapping[Role, ChannelStatistics]]:
    """Statistics of what the writers of a layer read while `samples` go through it; padding is left out.

    With `experts`, these are told what each of them gives, and no statistics of `down` are made.
    """
    watched = {name: ChannelStatistics() for name in (WRITERS[:1] if experts else WRITERS)}
    batches = {name: iter(samples.batches) for name in watched}

    def hook(name: Role) -> Any:
        def add(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            x_BTC, lengths_B = inputs[0], next(batches[name]).lengths_B
            real_BT = torch.arange(x_BTC.shape[1])[None] < lengths_B[:, None]
            watched[name].add(x_BTC[real_BT])

        return add

    with ExitStack() as listening:
        for name in watched:
            handle = module.writer(name).register_forward_pre_hook(hook(name))
            listening.callback(handle.remove)
        if experts:
            listening.enter_context(experts.watching(module, samples.batches))
        yield watched


def measure_importance(
    states: StateStore,
    *,
    metric: WidthMetric,
    folder: Path,
    progress: Progress = SILENT,
) -> Importance:
    """Watch the inputs of the writers while samples go through the model, one layer at a time.

    In memory at a time: one layer's weights (all of them where the stack keeps them), the input and output of one
    batch, and float64 copies of the two inputs that are watched.

    Args:
        states: Of the full model over the calibration tokens, where they are kept; padding is left out.
        metric: How channels are scored. Experts are scored by what they add (`experts.py`), whatever it is.
        folder: One file per finished layer; those that are there are not measured again.
        progress: Told of each layer.

    Raises:
        NotANumber: A statistic is not finite.
    """
    # Long on purpose: what is watched in a layer is written before the next one is loaded.
    folder.mkdir(parents=True, exist_ok=True)
    architecture, num_layers = states.stack.architecture, states.num_layers
    paths = [folder / f"importance-{layer_idx:04d}.sealed" for layer_idx in range(num_layers)]
    first = _first_missing(paths, progress)
    measured: dict[str, NDArray[np.float64]] = {}

    @contextmanager
    def observe(layer_idx: int, module: nn.Module) -> Iterator[None]:
        assert isinstance(module, DecoderLayer)
        experts = ExpertStatistics(architecture.ffn_size) if architecture.expert_size else None
        with _watched_writers(module, states.samples, experts) as watched:
            yield
        measured.clear()
        if experts:
            measured.update({"down.score": experts.scores(), "down.mean": experts.shares()})
        for name, statistics in watched.items():
            weight = module.get_parameter(f"{name}.weight").detach()
            measured[f"{name}.score"] = channel_scores(statistics, weight, metric)
            measured[f"{name}.mean"] = statistics.mean_C

    with progress.track("Measuring heads and neurons", num_layers) as advance:
        advance(first)
        for layer_idx in states.sweep(observe, first=first) if first < num_layers else ():
            if layer_idx >= first:
                if not all(np.isfinite(values).all() for values in measured.values()):
                    raise NotANumber(f"importance of layer {layer_idx}", [])
                write_sealed(paths[layer_idx], save(measured))
                advance(1)
    layers = [load(content) for path in paths if (content := read_sealed(path)) is not None]
    stacked = {key: np.stack([layer[key] for layer in layers]) for key in layers[0]}
    return make_importance(
        stacked["o.score"],
        stacked["down.score"],
        stacked["o.mean"],
        stacked["down.mean"],
        metric=metric,
        head_dim=architecture.head_dim,
    )
