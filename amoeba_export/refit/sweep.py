"""The sweep: the full model and its cuts side by side, layer by layer; each writer of a cut is solved, then used.

A writer of a cut aims at the residual stream of the full model: `o` at the stream after its block, `down` at the stream
after its layer and the dropped layers that follow. Its inputs are those of the cut, all of whose earlier writers
are solved already. So the error of a layer is seen, and answered, by the next one (sequential calibration; the target
across dropped layers is that of ReplaceMe, arXiv 2505.02819). A token weighs as the next norm sees it: by the inverse
mean square of the stream that is aimed at, so that the few tokens of huge norm do not decide alone. Experts are
run, not solved: each sees few tokens.

In memory are one layer, one Gram matrix and its factor, the held-out tokens of one writer, and the streams as far as
they fit into a bound; the others are on disk. Solved layers are on disk in any case: a run that was stopped goes on
from them.

Long on purpose: one pass, whose streams, statistics and solved layers depend on each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load, save

from amoeba_export.cache.sealed import read_sealed, write_sealed
from amoeba_export.ir import SILENT, Progress, Role, SubnetPlan
from amoeba_export.ir.family import WRITERS
from amoeba_export.model.layer import DecoderLayer, Exit
from amoeba_export.model.layers import LayerStack
from amoeba_export.refit.data import RefitData
from amoeba_export.refit.gram import NormalEquations
from amoeba_export.refit.solve import Solution, Tokens, solve_writer
from amoeba_export.refit.streams import Room, Stream

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
    biases: Sequence[dict[Role, torch.Tensor]]


class Sweep:
    """Refits several cuts of one model in one pass of the full model.

    Args:
        full: The teacher.
        cuts: What is refitted.
        data: Tokens.
        folder: Holds solved layers, and streams that do not fit in memory. Another process with the same inputs goes on
            from there.
        strengths: Of the ridge; see `solve_writer`.
        memory_bytes: What the streams may take in memory. Where they lie does not change a bit of the result.
        progress: Told of a file that is not what was written; it is made again.
    """

    def __init__(
        self,
        full: LayerStack,
        cuts: Sequence[Cut],
        data: RefitData,
        folder: Path,
        *,
        strengths: Sequence[float],
        memory_bytes: int,
        progress: Progress = SILENT,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._full, self._cuts, self._data, self._folder = full, cuts, data, folder
        self._strengths, self._progress = strengths, progress
        self._num_layers, self._hidden_size = full.architecture.num_layers, full.architecture.hidden_size
        shapes = [tuple(batch.tokens_BT.shape) for batch in data.batches]
        self._room = Room(folder, shapes, memory_bytes=memory_bytes, device=full.device, progress=progress)
        self._boundaries: dict[int, Stream] = {}
        self._states: list[Stream | None] = [None] * len(cuts)
        self._reached = 0

    @torch.no_grad()
    def layers(self) -> Iterator[int]:
        """Go through the layers; yield each index when what was solved of it is on disk."""
        self._reached = start = self._start()
        yield from range(start)
        for layer_idx in range(start, self._num_layers):
            keeping = [i for i, cut in enumerate(self._cuts) if layer_idx in cut.plan.kept_layers]
            known = {i: self._read_layer(i, layer_idx) for i in keeping}
            waiting = [i for i in keeping if known[i] is None]
            mid = self._room.stream(f"full-{layer_idx:04d}-mid", self._hidden_size, sealed=False)
            if waiting:
                module = self._full.layer(layer_idx)
                mid.write(
                    self._full.block(module, WRITERS[0], self._read_full(layer_idx, batch_idx))
                    for batch_idx in self._batches
                )
                del module
            self._advance(layer_idx, mid if waiting else None)
            for boundary in range(layer_idx + 1, max([self._next(i, layer_idx) for i in waiting], default=0)):
                self._advance(boundary)
                if not self._is_aimed_at(boundary):
                    self._boundary(boundary).remove()
            for cut_idx in keeping:
                self._through(cut_idx, layer_idx, mid, known[cut_idx])
            mid.remove()
            self._boundary(layer_idx).remove()
            yield layer_idx

    @property
    def _batches(self) -> range:
        return range(len(self._data.batches))

    def _start(self) -> int:
        """The highest boundary below all that waits where every stream is on disk, or 0.

        Streams that were in memory are made again, with what is solved already.
        """
        first = next(
            (
                layer_idx
                for layer_idx in range(self._num_layers)
                if any(
                    layer_idx in cut.plan.kept_layers and self._read_layer(i, layer_idx) is None
                    for i, cut in enumerate(self._cuts)
                )
            ),
            self._num_layers,
        )
        for boundary in range(first, 0, -1):
            if self._boundary(boundary).is_on_disk:
                states = [self._state_at(cut_idx, boundary) for cut_idx in range(len(self._cuts))]
                if all(state is None or state.is_on_disk for state in states):
                    self._states = states
                    return boundary
        return 0

    def _state_at(self, cut_idx: int, boundary: int) -> Stream | None:
        """The stream of a cut after its last layer below `boundary`; None where it has none: that is the embedding."""
        below = [layer for layer in self._cuts[cut_idx].plan.kept_layers if layer < boundary]
        return self._room.stream(f"cut-{cut_idx}-{below[-1]:04d}", self._hidden_size) if below else None

    def solved(self, cut_idx: int) -> Iterator[dict[str, torch.Tensor]]:
        """Per kept layer of a cut: `{writer}.weight` [D, C] and `{writer}.bias` [D], fp32, and the figures.

        One layer at a time is read: all of a large model would not fit.
        """
        for kept in self._cuts[cut_idx].plan.layers:
            layer = self._read_layer(cut_idx, kept.source_layer)
            assert layer is not None, "asked for when all layers are solved"
            yield layer

    def last(self, cut_idx: int | None, batch_idx: int) -> torch.Tensor:
        """The stream after the last layer, of a cut or (None) of the full model. [B, T, D]."""
        if cut_idx is None:
            return self._read_full(self._num_layers, batch_idx)
        return self._entering(cut_idx, batch_idx)

    def _next(self, cut_idx: int, layer_idx: int) -> int:
        """The next kept layer, or the end: the boundary that down_proj of `layer_idx` aims at."""
        later = [layer for layer in self._cuts[cut_idx].plan.kept_layers if layer > layer_idx]
        return later[0] if later else self._num_layers

    def _is_aimed_at(self, boundary: int) -> bool:
        """Whether a cut goes on there; so boundaries within a run of layers that all cuts drop are not kept."""
        return boundary == self._num_layers or any(boundary in cut.plan.kept_layers for cut in self._cuts)

    def _boundary(self, boundary: int) -> Stream:
        if boundary not in self._boundaries:
            self._boundaries[boundary] = self._room.stream(f"full-{boundary:04d}", self._hidden_size)
        return self._boundaries[boundary]

    def _layer_path(self, cut_idx: int, layer_idx: int) -> Path:
        return self._folder / f"solved-{cut_idx}-{layer_idx:04d}"

    def _read_layer(self, cut_idx: int, layer_idx: int) -> dict[str, torch.Tensor] | None:
        """What was solved of a layer; None where it waits, or its file is not what was written."""
        path = self._layer_path(cut_idx, layer_idx)
        content = read_sealed(path)
        if content is None:
            if path.exists():
                self._progress.note(f"{path} is damaged; it is computed again.")
                path.unlink()
            return None
        return load(content)

    def _read_full(self, boundary: int, batch_idx: int) -> torch.Tensor:
        if boundary == 0:
            return self._full.embed(self._data.batches[batch_idx].tokens_BT)
        return self._boundary(boundary).read(batch_idx)

    def _entering(self, cut_idx: int, batch_idx: int) -> torch.Tensor:
        """The stream of a cut as it enters its next layer. [B, T, D]."""
        state = self._states[cut_idx]
        if state is None:
            return self._cuts[cut_idx].stack.embed(self._data.batches[batch_idx].tokens_BT)
        return state.read(batch_idx)

    def _advance(self, layer_idx: int, mid: Stream | None = None) -> None:
        """Take the full stream through one layer, from between its blocks where that is there."""
        if self._reached > layer_idx:
            return
        module = self._full.layer(layer_idx)
        self._boundary(layer_idx + 1).write(
            self._full.run(module, self._read_full(layer_idx, batch_idx))
            if mid is None
            else self._full.block(module, WRITERS[1], mid.read(batch_idx))
            for batch_idx in self._batches
        )
        self._reached = layer_idx + 1

    def _through(self, cut_idx: int, layer_idx: int, mid: Stream, known: dict[str, torch.Tensor] | None) -> None:
        """Take a cut's stream through a layer that it keeps, solving its writers where they are not known."""
        cut = self._cuts[cut_idx]
        position = cut.plan.kept_layers.index(layer_idx)
        module: DecoderLayer | None = cut.stack.sliced_layer(cut.plan.layers[position])
        entered = self._states[cut_idx]
        names = (f"cut-{cut_idx}-mid", f"cut-{cut_idx}-{layer_idx:04d}")
        tensors: dict[str, torch.Tensor] = {}
        for writer, name in zip(WRITERS, names, strict=True):
            assert module is not None, "let go of at the end"
            bias_D = cut.biases[position].get(writer)
            weight_DC, leaving = module.writer(writer).weight.detach(), module.exit(writer)
            num_inputs = weight_DC.shape[1]
            result = self._room.stream(name, self._hidden_size, sealed=name == names[1])
            if module.is_routed(writer):
                result.write(
                    cut.stack.block(module, writer, self._entering(cut_idx, batch_idx)) for batch_idx in self._batches
                )
            elif num_inputs or bias_D is not None:
                inputs = self._room.stream(f"{name}-inputs", num_inputs, sealed=False)
                if known is None:
                    target = mid if writer == WRITERS[0] else self._boundary(self._next(cut_idx, layer_idx))
                    normal, heldout = self._collect(cut_idx, module, writer, bias_D, target, inputs)
                    if writer == WRITERS[-1]:
                        module = None  # a solve needs the room
                    solution = solve_writer(
                        normal,
                        weight_DC,
                        bias_D=bias_D,
                        strengths=self._strengths,
                        heldout=heldout,
                        added=None if leaving.changes_nothing else leaving.added,
                    )
                    del normal, heldout
                    tensors |= _tensors_of(writer, solution)
                    weight_DC, bias_D = solution.w_DC, solution.bias_D
                else:
                    inputs.write(self._inputs(cut_idx, module, writer, num_inputs, i)[1] for i in self._batches)
                    weight_DC = known[f"{writer}.weight"].to(weight_DC)
                    bias_D = None if bias_D is None else known[f"{writer}.bias"].to(bias_D)
                result.write(self._after(cut_idx, leaving, inputs, weight_DC, bias_D))
                inputs.remove()
            else:
                result.write(self._entering(cut_idx, batch_idx) for batch_idx in self._batches)
            before, self._states[cut_idx] = self._states[cut_idx], result
            if before is not None and (before is not entered or before.is_in_memory):
                before.remove()
        if known is None:
            write_sealed(self._layer_path(cut_idx, layer_idx), save(tensors))
        if entered is not None:  # until here, a run that is stopped goes on from it
            entered.remove()

    def _inputs(
        self, cut_idx: int, module: DecoderLayer, writer: Role, num_inputs: int, batch_idx: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A batch of the cut's stream [B, T, D], and what enters the writer when it enters the block [B, T, C]."""
        hidden_BTD = self._entering(cut_idx, batch_idx)
        if not num_inputs:
            return hidden_BTD, hidden_BTD.new_zeros(*hidden_BTD.shape[:2], 0)
        return hidden_BTD, self._cuts[cut_idx].stack.writer_input(module, writer, hidden_BTD)

    def _after(
        self,
        cut_idx: int,
        leaving: Exit,
        inputs: Stream,
        weight_DC: torch.Tensor,
        bias_D: torch.Tensor | None,
    ) -> Iterator[torch.Tensor]:
        """The stream after a writer, batch by batch."""
        for batch_idx in self._batches:
            added_BTD = inputs.take(batch_idx) @ weight_DC.T
            if not leaving.changes_nothing:
                written_BTD = added_BTD if bias_D is None else added_BTD.add_(bias_D)
                yield self._entering(cut_idx, batch_idx) + leaving.added(written_BTD)
                continue
            added_BTD += self._entering(cut_idx, batch_idx)
            yield added_BTD if bias_D is None else added_BTD.add_(bias_D)

    def _collect(
        self,
        cut_idx: int,
        module: DecoderLayer,
        writer: Role,
        bias_D: torch.Tensor | None,
        target: Stream,
        inputs: Stream,
    ) -> tuple[NormalEquations, Tokens]:
        """What a writer is fitted to and judged by; what enters it is kept in `inputs`."""
        weight_DC, leaving = module.writer(writer).weight.detach(), module.exit(writer)
        num_inputs = weight_DC.shape[1]
        normal = NormalEquations(num_inputs, self._hidden_size, weight_DC.device)
        heldout: list[Tokens] = []

        def through() -> Iterator[torch.Tensor]:
            for batch_idx in self._batches:
                hidden_BTD, x_BTC = self._inputs(cut_idx, module, writer, num_inputs, batch_idx)
                if batch_idx in self._data.fitted or batch_idx in self._data.judging:
                    aim_TD = target.read(batch_idx).flatten(0, 1)
                    weight_T = 1 / aim_TD.square().mean(dim=1).clamp_min(TINY)
                    tokens = Tokens(x_BTC.flatten(0, 1), aim_TD - hidden_BTD.flatten(0, 1), weight_T)
                    if batch_idx in self._data.fitted:
                        normal.add(*_before(leaving, tokens, weight_DC, bias_D))
                    else:
                        heldout.append(tokens)
                yield x_BTC

        inputs.write(through())
        return normal, Tokens(*(torch.cat(parts) for parts in zip(*heldout, strict=True)))


def _before(leaving: Exit, tokens: Tokens, weight_DC: torch.Tensor, bias_D: torch.Tensor | None) -> Tokens:
    """The same where a writer gives it. A norm behind it divides by its size: a token of small outputs weighs more."""
    if leaving.changes_nothing:
        return tokens
    written_TD = tokens.x_TC @ weight_DC.T if bias_D is None else tokens.x_TC @ weight_DC.T + bias_D
    weight_T = tokens.weight_T / written_TD.square().mean(dim=1).clamp_min(TINY)
    return Tokens(tokens.x_TC, leaving.aim(tokens.y_TD, written_TD), weight_T)


def _tensors_of(writer: Role, solution: Solution) -> dict[str, torch.Tensor]:
    """What is kept of a solution."""
    strength = -1.0 if solution.strength is None else solution.strength
    tensors = {
        f"{writer}.weight": solution.w_DC.cpu().contiguous(),
        f"{writer}.figures": torch.tensor([solution.before, solution.after, strength]),
    }
    if solution.bias_D is not None:
        tensors[f"{writer}.bias"] = solution.bias_D.cpu()
    return tensors
