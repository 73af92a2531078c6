"""Rounding with data: layer by layer, each for the inputs that the rounded layers before it make.

Prune, refit, round: each sees the error of those before it. The cut comes as the stream of its final weights, scaled as
its format scales them, so that inputs and Gram matrices are those of the file. Matrices that have the same input share
a Gram matrix; which ones do is seen when the layer runs. In memory are one layer or the head, one Gram matrix with its
factor, and the stream of tokens as far as it fits into a bound.

A token counts by the inverse mean square of the stream that enters the layer, as the next norm sees it: the few tokens
of huge norm, which the first position of a text often is, do not decide alone. Behind a norm, all tokens count alike.

The head comes last. Where it is the embedding, too, what is chosen for its logits is what tokens are looked up in: that
costs a twentieth of what it gains (dev/LOG.md), and more damping keeps the values nearer to where they were.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import nn

from amoeba_export.cache.kinds import CHOOSING_INTEGERS
from amoeba_export.cache.sealed import read_sealed, write_sealed
from amoeba_export.ir import LayerPlan, Progress, Role, SubnetPlan, Supernet
from amoeba_export.ir.family import WRITERS
from amoeba_export.ir.rounded import Grid
from amoeba_export.model.host import Host
from amoeba_export.model.layer import DecoderLayer
from amoeba_export.model.layers import LayerStack
from amoeba_export.model.merged import MergedTensors, RefittedTensors
from amoeba_export.model.samples import Samples
from amoeba_export.model.workplace import open_workplace
from amoeba_export.refit.data import read_data
from amoeba_export.refit.gptq import Rounded, RoundedBlocks, factor_inverse, round_blocks, round_matrix
from amoeba_export.refit.recipe import Draw
from amoeba_export.refit.rounded_layer import RoundedLayer, layer_of, tensors_of
from amoeba_export.refit.scaled_cut import ScaledCut
from amoeba_export.refit.streams import Room, Stream

MEMORY_BYTES = 1 << 30
"""What the stream of tokens may take in memory."""

HEAD_DAMPING = 0.1
"""Instead of `gptq.DAMPING`."""

TINY = 1e-12


def round_with_data(
    supernet: Supernet,
    plan: SubnetPlan,
    cut: ScaledCut,
    draw: Draw,
    *,
    take: Callable[[Iterator[RoundedLayer]], None],
    identity: Mapping[str, object],
    host: Host,
) -> None:
    """Choose the integers of every matrix in the layers of a cut, and of its head.

    Args:
        supernet: With its adapters: where the embedding and what a layer computes come from.
        plan: The cut.
        cut: Its weights, and their grids.
        draw: Its tokens.
        take: Is given the layers, in order, and the head as one more, and has to store what it wants of them before it
            returns.
        identity: What else decides the weights, for what is kept of a run that was stopped.
        host: Where layers run and finished ones are kept.

    Raises:
        InputError: The texts of the recipe cannot be used.
    """
    device = host.chosen_device
    samples = read_data(draw, supernet.text_folder).fit
    tensors = RefittedTensors(MergedTensors(supernet, plan), supernet, plan)
    stack = LayerStack(supernet, memory_bytes=0, device=device, tensors=tensors)
    facts = {
        "rounding": CHOOSING_INTEGERS.version,
        "samples": samples.digest,
        "plan": plan.geometry,
        "device": device.type,
        **identity,
    }
    with open_workplace(supernet.identity, host) as workplace:
        folder = workplace.folder_of(facts)
        sweep = _Sweep(stack, samples, folder, cut, host.progress)
        with host.progress.track(f"Rounding {plan.shape} with data", len(plan.layers) + 1) as advance:
            for position, own in cut.by_layer(supernet.family, len(plan.layers)):
                sweep.through(position, plan.layers[position], own)
                advance(1)
            sweep.close(len(plan.layers))
            advance(1)
        take(sweep.read(position) for position in range(len(plan.layers) + 1))
        shutil.rmtree(folder, ignore_errors=True)


class _Reached(Exception):
    """A matrix was reached; what enters it."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x


class _Sweep:
    """See the module."""

    def __init__(self, stack: LayerStack, samples: Samples, folder: Path, cut: ScaledCut, progress: Progress) -> None:
        self._stack, self._samples, self._folder, self._cut, self._progress = stack, samples, folder, cut, progress
        shapes = [tuple(batch.tokens_BT.shape) for batch in samples.batches]
        self._room = Room(folder, shapes, memory_bytes=MEMORY_BYTES, device=stack.device, progress=progress)
        self._width = stack.architecture.hidden_size
        self._stream: Stream | None = None

    @torch.no_grad()
    def through(self, position: int, kept: LayerPlan, own: Mapping[str, torch.Tensor]) -> None:
        """Round a layer where that is not done yet, and take the stream through it."""
        layer = self._known(position)
        module = _module(self._stack, kept, {self._local(name): weight for name, weight in own.items()})
        if layer is None:
            layer = self._round(module, own)
            write_sealed(self._path(position), save(tensors_of(layer)))
        for name, rounded in layer.matrices.items():
            _put(module, self._local(name), rounded.values().to(self._stack.device))
        before, after = self._stream, self._room.stream(f"rounded-{position:04d}", self._width, sealed=False)
        after.write(self._stack.run(module, self._entering(idx)) for idx in range(len(self._samples.batches)))
        self._stream = after
        if before is not None:
            before.remove()

    @torch.no_grad()
    def close(self, position: int) -> None:
        """Round the head, which is kept at `position`, where that is not done yet."""
        if self._known(position) is None:
            name = self._stack.head_name()
            weight_VD = self._stack.weight(name)
            grid = self._cut.head_grid(weight_VD)
            matrices = {} if grid is None else {name: self._round_head(weight_VD, grid)}
            write_sealed(self._path(position), save(tensors_of(RoundedLayer(matrices=matrices, others={}))))
        if self._stream is not None:
            self._stream.remove()

    def _round_head(self, weight_VD: torch.Tensor, grid: Grid) -> Rounded:
        gram_DD = torch.zeros(self._width, self._width, dtype=torch.float64, device=weight_VD.device)
        for batch_idx in range(len(self._samples.batches)):
            x_TD = self._stack.norm(self._entering(batch_idx)).flatten(0, 1)
            gram_DD += x_TD.T @ x_TD
        inverse_DD = factor_inverse(gram_DD, damping=HEAD_DAMPING)
        with _one_thread():
            return round_matrix(weight_VD, inverse_DD, grid)

    def read(self, position: int) -> RoundedLayer:
        """A layer that was rounded, or the head."""
        layer = self._known(position)
        assert layer is not None, "asked for when all layers are rounded"
        return layer

    def _local(self, name: str) -> str:
        """What a weight of the cut model is called in its layer."""
        place = self._stack.family.place(name)
        return f"{place.role}.{place.part}"

    def _round(self, module: DecoderLayer, own: Mapping[str, torch.Tensor]) -> RoundedLayer:
        grids = {
            self._local(name): (name, grid)
            for name, weight in own.items()
            if weight.dim() == 2 and (grid := self._cut.grid_of(name, weight)) is not None
        }
        matrices: dict[str, Rounded | RoundedBlocks] = {}
        for names in self._sharing(module, list(grids)):
            gram_CC = self._gram(module, self._stack.family.place(grids[names[0]][0]).role)
            square_C = gram_CC.diagonal().clone()
            is_compensated = any(isinstance(grids[name][1], Grid) for name in names)
            inverse_CC = factor_inverse(gram_CC) if is_compensated else gram_CC
            for name in names:
                weight_OC = module.get_parameter(name).detach()
                full_name, grid = grids[name]
                with _one_thread():
                    rounded = (
                        round_matrix(weight_OC, inverse_CC, grid)
                        if isinstance(grid, Grid)
                        else round_blocks(weight_OC, square_C, grid)
                    )
                _put(module, name, rounded.values())
                matrices[full_name] = rounded
        others = {name: weight for name, weight in own.items() if weight.dim() == 1}
        return RoundedLayer(matrices=matrices, others=others)

    def _sharing(self, module: DecoderLayer, names: Sequence[str]) -> list[list[str]]:
        """The matrices in the order in which they are used, those together that have the same input."""
        seen: list[tuple[torch.Tensor, list[str]]] = []

        def note(name: str, x: torch.Tensor) -> None:
            if seen and seen[-1][0] is x:
                seen[-1][1].append(name)
            else:
                seen.append((x, [name]))

        hooks = [
            module.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(
                lambda _, inputs, name=name: note(name, inputs[0])
            )
            for name in names
        ]
        try:
            self._stack.run(module, self._entering(0)[:1])
        finally:
            for hook in hooks:
                hook.remove()
        return [names for _, names in seen]

    def _gram(self, module: DecoderLayer, role: Role) -> torch.Tensor:
        """The Gram matrix of what enters a matrix, tokens weighted. [C, C], fp64."""
        linear = module.get_submodule(role)

        def reach(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            raise _Reached(inputs[0])

        gram_CC: torch.Tensor | None = None
        hook = linear.register_forward_pre_hook(reach)
        try:
            for batch_idx in range(len(self._samples.batches)):
                hidden_BTD = self._entering(batch_idx)
                try:
                    self._stack.run(module, hidden_BTD)
                except _Reached as reached:
                    x_TC = reached.x.flatten(0, 1)
                if gram_CC is None:
                    gram_CC = torch.zeros(x_TC.shape[1], x_TC.shape[1], dtype=torch.float64, device=x_TC.device)
                counted_TC = x_TC
                if not module.reads_norm(role):
                    counted_TC = x_TC / hidden_BTD.square().mean(-1).clamp_min(TINY).flatten()[:, None]
                gram_CC += counted_TC.T @ x_TC
        finally:
            hook.remove()
        assert gram_CC is not None, "samples have batches"
        return gram_CC

    def _entering(self, batch_idx: int) -> torch.Tensor:
        """The stream before the next layer. [B, T, D]."""
        if self._stream is None:
            return self._stack.embed(self._samples.batches[batch_idx].tokens_BT)
        return self._stream.read(batch_idx)

    def _path(self, position: int) -> Path:
        return self._folder / f"layer-{position:04d}"

    def _known(self, position: int) -> RoundedLayer | None:
        """What was rounded already; None where it was not, or its file is not what was written."""
        content = read_sealed(self._path(position))
        return None if content is None else layer_of(load(content))


def _module(stack: LayerStack, kept: LayerPlan, own: Mapping[str, torch.Tensor]) -> DecoderLayer:
    """The layer with weights of its own."""
    biases: dict[Role, torch.Tensor] = {writer: own[f"{writer}.bias"] for writer in WRITERS if f"{writer}.bias" in own}
    module = stack.sliced_layer(kept, biases, replace=True)
    present = {name for name, _ in module.named_parameters()}
    for name, weight in own.items():
        if name in present:
            _put(module, name, weight.to(stack.device, torch.float32))
    return module


def _put(module: nn.Module, name: str, weight: torch.Tensor) -> None:
    owner, _, kind = name.rpartition(".")
    setattr(module.get_submodule(owner), kind, nn.Parameter(weight, requires_grad=False))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Many small operations: threads that wait for each other between them take several times as long."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
