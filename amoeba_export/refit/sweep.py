"""The sweep: the full model and its cuts side by side, layer by layer; each writer of a cut is solved, then used.

A writer of a cut aims at the residual stream of the full model: o_proj at the stream after its block, down_proj at the
stream after its layer and the dropped layers that follow. Its inputs are those of the cut, all of whose earlier writers
are solved already. So the error of a layer is seen, and answered, by the next one (sequential calibration; the target
across dropped layers is that of ReplaceMe, arXiv 2505.02819). A token weighs as the next norm sees it: by the inverse
mean square of the stream that is aimed at, so that the few tokens of huge norm do not decide alone.

In memory at a time: one layer, one Gram matrix and its factor, the batches in flight, and the held-out tokens of one
writer. The rest is on disk, and what is on disk is enough to go on after a stop.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from amoeba_export.ir import SubnetPlan
from amoeba_export.model.layers import WRITERS, LayerStack
from amoeba_export.model.states import StateFile
from amoeba_export.refit.data import RefitData
from amoeba_export.refit.gram import NormalEquations
from amoeba_export.refit.solve import Solution, solve_writer

TINY = 1e-12
"""Keeps a token of zeros from weighing infinitely much."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """One plan to refit.

    Attributes:
        plan: What stays.
        stack: The layers that it is cut from: with its adapters merged.
        biases: Per kept layer, what its writers' biases are now [D] (FLAP's), by writer; a writer without one has no
            bias in the plan.
    """

    plan: SubnetPlan
    stack: LayerStack
    biases: Sequence[dict[str, torch.Tensor]]


class Sweep:
    """Refits several cuts of one model in one pass of the full model.

    Args:
        full: The teacher.
        cuts: What is refitted.
        data: Tokens.
        folder: Holds states and finished layers. Another process with the same inputs goes on from there.
        strengths: Of the ridge; see `solve_writer`.
    """

    def __init__(
        self, full: LayerStack, cuts: Sequence[Cut], data: RefitData, folder: Path, *, strengths: Sequence[float]
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._full, self._cuts, self._data, self._folder = full, cuts, data, folder
        self._strengths = strengths
        self._num_layers = full.architecture.num_layers
        self._wide = [(*batch.tokens_BT.shape, full.architecture.hidden_size) for batch in data.batches]

    @torch.no_grad()
    def layers(self) -> Iterator[int]:
        """Go through the layers; yield each index when everything about it is on disk."""
        first = self._first()
        yield from range(first)
        for layer_idx in range(first, self._num_layers):
            waiting = [cut_idx for cut_idx in range(len(self._cuts)) if self._is_waiting(cut_idx, layer_idx)]
            self._advance(layer_idx, mid=bool(waiting))
            for boundary in range(layer_idx + 1, max([self._next(i, layer_idx) for i in waiting], default=0)):
                self._advance(boundary)
            for cut_idx in waiting:
                self._solve(cut_idx, layer_idx)
            self._boundary(layer_idx).remove()
            self._mid(layer_idx).remove()
            yield layer_idx

    def _first(self) -> int:
        """The layer to begin with: the lowest that waits, or below it where the full stream is on disk."""
        first = next(
            (i for i in range(self._num_layers) if any(self._is_waiting(c, i) for c in range(len(self._cuts)))),
            self._num_layers,
        )
        return next(boundary for boundary in range(first, -1, -1) if boundary == 0 or self._boundary(boundary).exists)

    def _is_waiting(self, cut_idx: int, layer_idx: int) -> bool:
        """Whether a cut keeps a layer that is not solved yet."""
        kept = layer_idx in self._cuts[cut_idx].plan.kept_layers
        return kept and not self._layer_path(cut_idx, layer_idx).is_file()

    def solved(self, cut_idx: int) -> Iterator[dict[str, torch.Tensor]]:
        """Per kept layer of a cut: `{writer}.weight` [D, C] and `{writer}.bias` [D], fp32, and the figures.

        One layer at a time is read: all of a large model would not fit.
        """
        for kept in self._cuts[cut_idx].plan.layers:
            yield load_file(self._layer_path(cut_idx, kept.source_layer))

    def last(self, cut_idx: int | None, batch_idx: int) -> torch.Tensor:
        """The stream after the last layer, of a cut or (None) of the full model. [B, T, D]."""
        if cut_idx is None:
            return self._read_full(self._num_layers, batch_idx)
        return self._cut_file(cut_idx, self._cuts[cut_idx].plan.layers[-1].source_layer).read(batch_idx)

    def _next(self, cut_idx: int, layer_idx: int) -> int:
        """The next kept layer, or the end: the boundary that down_proj of `layer_idx` aims at."""
        later = [layer for layer in self._cuts[cut_idx].plan.kept_layers if layer > layer_idx]
        return later[0] if later else self._num_layers

    def _boundary(self, boundary: int) -> StateFile:
        return StateFile(self._folder / f"full-{boundary:04d}.f32", self._wide)

    def _mid(self, layer_idx: int) -> StateFile:
        return StateFile(self._folder / f"full-{layer_idx:04d}-mid.f32", self._wide)

    def _cut_file(self, cut_idx: int, layer_idx: int) -> StateFile:
        return StateFile(self._folder / f"cut-{cut_idx}-{layer_idx:04d}.f32", self._wide)

    def _layer_path(self, cut_idx: int, layer_idx: int) -> Path:
        return self._folder / f"solved-{cut_idx}-{layer_idx:04d}.safetensors"

    def _read_full(self, boundary: int, batch_idx: int) -> torch.Tensor:
        if boundary == 0:
            return self._full.embed(self._data.batches[batch_idx].tokens_BT)
        return self._boundary(boundary).read(batch_idx).to(self._full.device)

    def _advance(self, layer_idx: int, *, mid: bool = False) -> None:
        """Take the full stream through one layer; `mid` keeps what is between its blocks, too."""
        if self._boundary(layer_idx + 1).exists and (not mid or self._mid(layer_idx).exists):
            return
        module, num_batches = self._full.layer(layer_idx), range(len(self._data.batches))
        if not mid:
            self._boundary(layer_idx + 1).write(
                self._full.run(module, self._read_full(layer_idx, batch_idx)) for batch_idx in num_batches
            )
            return
        self._mid(layer_idx).write(
            self._full.block(module, WRITERS[0], self._read_full(layer_idx, batch_idx)) for batch_idx in num_batches
        )
        self._boundary(layer_idx + 1).write(
            self._full.block(module, WRITERS[1], self._mid(layer_idx).read(batch_idx).to(self._full.device))
            for batch_idx in num_batches
        )

    def _solve(self, cut_idx: int, layer_idx: int) -> None:
        """Solve both writers of a kept layer and take the cut's stream through it."""
        cut, plan = self._cuts[cut_idx], self._cuts[cut_idx].plan
        position = plan.kept_layers.index(layer_idx)
        module = cut.stack.sliced_layer(plan.layers[position])
        stream = StateFile(self._folder / f"cut-{cut_idx}-mid.f32", self._wide, sealed=False)
        out = self._cut_file(cut_idx, layer_idx)
        before = self._cut_file(cut_idx, plan.kept_layers[position - 1]) if position else None
        targets = (self._mid(layer_idx), self._boundary(self._next(cut_idx, layer_idx)))
        tensors: dict[str, torch.Tensor] = {}
        for writer, source, target, result in zip(WRITERS, (before, stream), targets, (stream, out), strict=True):
            bias_D = cut.biases[position].get(writer)
            solution = self._writer(cut, module, writer, bias_D, source, target, result)
            if solution is not None:
                tensors[f"{writer}.weight"] = solution.w_DC.cpu()
                tensors[f"{writer}.figures"] = torch.tensor(
                    [solution.before, solution.after, -1.0 if solution.strength is None else solution.strength]
                )
                if solution.bias_D is not None:
                    tensors[f"{writer}.bias"] = solution.bias_D.cpu()
        part = self._layer_path(cut_idx, layer_idx).with_suffix(".part")
        save_file(tensors, part)
        part.replace(self._layer_path(cut_idx, layer_idx))
        stream.remove()
        if before is not None:
            before.remove()

    def _writer(
        self,
        cut: Cut,
        module: nn.Module,
        writer: str,
        bias_D: torch.Tensor | None,
        source: StateFile | None,
        target: StateFile,
        result: StateFile,
    ) -> Solution | None:
        """Solve one writer and write the stream after it; None where the block is gone and has no bias either."""
        device, hidden_size = cut.stack.device, cut.stack.architecture.hidden_size
        weight_DC = _weight(module, writer, torch.zeros(hidden_size, 0, device=device))
        num_inputs = weight_DC.shape[1]

        def entering(batch_idx: int) -> torch.Tensor:
            if source is None:
                return cut.stack.embed(self._data.batches[batch_idx].tokens_BT)
            return source.read(batch_idx).to(device)

        if not num_inputs and bias_D is None:
            result.write(entering(batch_idx) for batch_idx in range(len(self._data.batches)))
            return None
        shapes = [(*batch.tokens_BT.shape, num_inputs) for batch in self._data.batches]
        inputs = StateFile(result.path.with_name(f"{result.path.stem}-inputs.f32"), shapes, sealed=False)
        normal = NormalEquations(num_inputs, hidden_size, device)
        heldout_x: list[torch.Tensor] = []
        heldout_y: list[torch.Tensor] = []
        heldout_weight: list[torch.Tensor] = []

        def collect() -> Iterator[torch.Tensor]:
            for batch_idx, batch in enumerate(self._data.batches):
                hidden_BTD = entering(batch_idx)
                x_BTC = hidden_BTD.new_zeros(*batch.tokens_BT.shape, 0)
                if num_inputs:
                    x_BTC = cut.stack.writer_input(module, writer, hidden_BTD)
                aim_TD = target.read(batch_idx).to(device).flatten(0, 1)
                weight_T = 1 / aim_TD.square().mean(dim=1).clamp_min(TINY)
                y_TD = aim_TD - hidden_BTD.flatten(0, 1)
                if batch_idx in self._data.fitted:
                    normal.add(x_BTC.flatten(0, 1), y_TD, weight_T)
                elif batch_idx in self._data.judging:
                    heldout_x.append(x_BTC.flatten(0, 1))
                    heldout_y.append(y_TD)
                    heldout_weight.append(weight_T)
                yield x_BTC

        inputs.write(collect())
        solution = solve_writer(
            normal,
            weight_DC,
            bias_D=bias_D,
            strengths=self._strengths,
            heldout_x_TC=torch.cat(heldout_x),
            heldout_y_TD=torch.cat(heldout_y),
            heldout_weight_T=torch.cat(heldout_weight),
        )

        def after(batch_idx: int) -> torch.Tensor:
            hidden_BTD = entering(batch_idx) + inputs.read(batch_idx).to(device) @ solution.w_DC.T
            return hidden_BTD if solution.bias_D is None else hidden_BTD + solution.bias_D

        result.write(after(batch_idx) for batch_idx in range(len(self._data.batches)))
        inputs.remove()
        return solution


def _weight(module: nn.Module, writer: str, nothing_D0: torch.Tensor) -> torch.Tensor:
    """The weight of a writer [D, C], or `nothing_D0` where its block is gone."""
    owner, _, name = writer.rpartition(".")
    linear = getattr(module.get_submodule(owner), name, None)
    return linear.weight.detach() if isinstance(linear, nn.Linear) else nothing_D0
