"""Score many cuts of one model at once, computing everything that they share only once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import nn

from amoeba_export.ir import Importance, SubnetPlan
from amoeba_export.ir.metric import ObjectiveName
from amoeba_export.model.head import Head
from amoeba_export.model.layers import LayerStack
from amoeba_export.model.samples import Samples
from amoeba_export.model.states import StateStore

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class KeptLayers:
    """Layers that stay, all at one width."""

    active: tuple[bool, ...]
    width: float = 1.0

    @property
    def first_removed(self) -> int:
        """Index of the lowest removed layer; the number of layers when none is."""
        return self.active.index(False) if False in self.active else len(self.active)

    def __str__(self) -> str:
        return f"{self.width!r}:{''.join('1' if keep else '0' for keep in self.active)}"


class Scorer(Protocol):
    """Scores cuts. A score depends on its cut and its batch alone, not on what is asked for together with it."""

    def scores(self, cuts: Sequence[KeptLayers], batches: range) -> list[NDArray[np.float64]]:
        """One array per cut: the scores of the batches' segments, in order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Widths:
    """What each width below 1 keeps of every layer: a plan of full depth per width."""

    importance: Importance
    plans: Mapping[float, SubnetPlan]

    @property
    def digest(self) -> str:
        """A name for what they compute: the plans, and the means of what these remove."""
        found = hashlib.sha256(json.dumps({repr(w): plan.to_json() for w, plan in self.plans.items()}).encode())
        for mean in (self.importance.o_mean_LQ, self.importance.down_mean_LF):
            found.update(mean.tobytes())
        return found.hexdigest()[:32]


@dataclass(slots=True)
class _Group:
    """Cuts that have kept the same layers so far, and where that has brought each batch. [B, T, D]."""

    cuts: list[int]
    states: list[torch.Tensor]


class LocalScorer:
    """Scores cuts in this process, layer by layer for all of them: cuts part where they first keep other layers.

    Args:
        stack: The model.
        samples: What it is scored on.
        objective: What a score is.
        states: Inputs of the full model's layers, over the same samples; or None to start at the embedding.
        widths: What widths below 1 mean, or None when there are none.
    """

    def __init__(
        self,
        stack: LayerStack,
        samples: Samples,
        objective: ObjectiveName,
        *,
        states: StateStore | None = None,
        widths: Widths | None = None,
    ) -> None:
        self._stack = stack
        self._samples = samples
        self._objective: ObjectiveName = objective
        self._states = states
        self._widths = widths
        self._head = Head(stack)

    @torch.no_grad()
    def scores(self, cuts: Sequence[KeptLayers], batches: range) -> list[NDArray[np.float64]]:
        """See `Scorer`. Batches are taken together as far as their states fit into a quarter of the memory bound."""
        found: list[list[NDArray[np.float64]]] = [[] for _ in cuts]
        for width in dict.fromkeys(cut.width for cut in cuts):
            chosen = [i for i, cut in enumerate(cuts) if cut.width == width]
            if width == 1.0 and self._states is not None:
                self._states.prepare(min(cuts[i].first_removed for i in chosen))
            for part in self._parts(batches, num_groups=len(chosen) + 1):
                for group in self._walk(cuts, chosen, width, part):
                    for batch_idx, hidden_BTD in zip(part, group.states, strict=True):
                        scores_B = self._head.scores(self._samples.batches[batch_idx], hidden_BTD, self._objective)
                        for i in group.cuts:
                            found[i].append(scores_B)
        return [np.concatenate(parts) for parts in found]

    def _parts(self, batches: range, *, num_groups: int) -> list[range]:
        """Ranges of batches whose states fit in memory together."""
        limit_bytes = self._stack.memory_bytes // 4
        per_token = 4 * self._stack.architecture.hidden_size * num_groups
        parts, start, size_bytes = [], batches.start, 0
        for i in batches:
            batch_bytes = self._samples.batches[i].tokens_BT.numel() * per_token
            if size_bytes and size_bytes + batch_bytes > limit_bytes:
                parts.append(range(start, i))
                start, size_bytes = i, 0
            size_bytes += batch_bytes
        return [*parts, range(start, batches.stop)]

    def _walk(self, cuts: Sequence[KeptLayers], chosen: Sequence[int], width: float, part: range) -> list[_Group]:
        """Take the chosen cuts through all layers; the groups that are left are distinct."""
        waiting: dict[int, list[int]] = {}
        for i in chosen:
            waiting.setdefault(self._start(cuts[i]), []).append(i)
        groups: list[_Group] = []
        num_layers = self._stack.architecture.num_layers
        for layer_idx in range(min(waiting), num_layers + 1):
            if layer_idx in waiting:
                groups.append(_Group(waiting[layer_idx], self._read(layer_idx, part)))
            if layer_idx < num_layers:
                groups = self._through(layer_idx, groups, cuts, width)
        return groups

    def _start(self, cut: KeptLayers) -> int:
        if cut.width != 1.0 or self._states is None:
            return 0
        return self._states.nearest(cut.first_removed)

    def _read(self, boundary: int, part: range) -> list[torch.Tensor]:
        if self._states is not None:
            return [self._states.read(boundary, batch_idx) for batch_idx in part]
        return [self._stack.embed(self._samples.batches[batch_idx].tokens_BT) for batch_idx in part]

    def _through(self, layer_idx: int, groups: list[_Group], cuts: Sequence[KeptLayers], width: float) -> list[_Group]:
        """One layer: each group goes through it, around it, or parts into two."""
        after: list[_Group] = []
        module: nn.Module | None = None
        while groups:
            group = groups.pop(0)  # let go of its states as soon as they are through
            staying = [i for i in group.cuts if not cuts[i].active[layer_idx]]
            going = [i for i in group.cuts if cuts[i].active[layer_idx]]
            states = group.states
            if staying:
                after.append(_Group(staying, states))
                states = list(states)
            if going:
                module = module or self._layer(layer_idx, width)
                for i, hidden_BTD in enumerate(states):
                    states[i] = self._stack.run(module, hidden_BTD)
                after.append(_Group(going, states))
        return after

    def _layer(self, layer_idx: int, width: float) -> nn.Module:
        if width == 1.0:
            return self._stack.layer(layer_idx)
        assert self._widths is not None, "a width below 1 needs a plan"
        plan = self._widths.plans[width]
        return self._stack.cut_layer(plan.layers[layer_idx], self._widths.importance, compensation=plan.compensation)
