"""From a supernet and plans to streams of named weights, each source weight read once.

No model object is built. The next modules are computed in threads while the consumer writes the last ones.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from amoeba_export.errors import NonFiniteWeights
from amoeba_export.ir import Architecture, Subnet, SubnetPlan, Supernet
from amoeba_export.materialize.buffers import Buffers
from amoeba_export.materialize.inputs import check_inputs
from amoeba_export.materialize.walk import Module, Use, compensated_axis, modules, subnet_specs
from amoeba_export.model.bias import compensation_bias
from amoeba_export.model.merge import cut_and_merge
from amoeba_export.model.slice import Empty, kept_positions, take

WORKERS = 2
"""Modules computed at once, by one torch thread each. While one waits for the disk, the other computes. Two threads on
one module took twice as long on two cores: between operations they spin, and the writer has to wait for a core."""

AHEAD = 2
"""Modules computed while the consumer writes. More would only cost memory: one of a 7B model is up to 260 MB."""

_Made = tuple[int, str, torch.Tensor]


def materialize_subnet(supernet: Supernet, plan: SubnetPlan, *, dtype: torch.dtype | None = None) -> Subnet:
    """The dense model that `plan` cuts out of `supernet`, as a stream of named weights.

    Nothing is read before the stream is opened, and it can be opened again. A few weights at most are in memory.
    Adapters are merged in fp32 and rounded once.

    Args:
        supernet: The source, its adapters (applied in order) and, for compensation biases, its strategy.
        plan: What to keep. Validated here.
        dtype: Of every weight, or None to keep the source's.

    Raises:
        InputError: The plan is not valid, or (while streaming) asks for biases that the strategy cannot give.
        WrongModel: The plan or an adapter belongs to another model.
        DamagedFile: While streaming: a weight can no longer be read.
        NonFiniteWeights: While streaming: a weight has NaN or infinity in it.
    """
    check_inputs(supernet, [plan])

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, weight) for _, name, weight in stream_subnets(supernet, [plan], dtype=dtype))

    return Subnet(
        architecture=plan.dense(supernet.architecture),
        family=supernet.family,
        plan=plan,
        specs=tuple(subnet_specs(supernet, plan, dtype=dtype)),
        stream=stream,
        source_folder=supernet.folder,
        source_dtype=dtype or supernet.dtype,
        model_name=supernet.name,
        tokenizer_folder=supernet.tokenizer_folder,
    )


def stream_subnets(
    supernet: Supernet, plans: Sequence[SubnetPlan], *, dtype: torch.dtype | None = None
) -> Iterator[tuple[int, str, torch.Tensor]]:
    """The weights of several subnets in one pass: (position in `plans`, name, weight), each exactly once.

    Within a plan the order is that of its `Subnet.specs`. Arguments and errors as in `materialize_subnet`.
    """
    check_inputs(supernet, plans)
    missing = [{spec.name: spec.shape for spec in subnet_specs(supernet, plan)} for plan in plans]
    num_threads = torch.get_num_threads()
    executor = ThreadPoolExecutor(WORKERS, "materialize", initializer=torch.set_num_threads, initargs=(1,))
    maker = Maker(supernet=supernet, plans=plans, dtype=dtype, empty=Buffers().empty)
    pending: deque[Future[list[_Made]]] = deque()
    try:
        for module in modules(supernet, plans):
            pending.append(executor.submit(maker.make, module))
            if len(pending) > AHEAD:
                yield from _tick_off(pending.popleft().result(), missing)
        while pending:
            yield from _tick_off(pending.popleft().result(), missing)
    finally:
        executor.shutdown(cancel_futures=True)
        torch.set_num_threads(num_threads)  # of threads yet to come: torch remembers what was set last, by any thread
    assert not any(missing), f"weights that were never made: {missing}"


def _tick_off(made: list[_Made], missing: list[dict[str, tuple[int, ...]]]) -> Iterator[_Made]:
    """Pass on what was made. A weight made twice, unasked for or of another shape is a bug of ours."""
    made.reverse()
    while made:  # popped, so that a weight is freed as soon as the consumer is done with it
        plan_idx, name, weight = made.pop()
        expected = missing[plan_idx].pop(name, None)
        assert expected == tuple(weight.shape), f"{name}: made {tuple(weight.shape)}, expected {expected}"
        yield plan_idx, name, weight


@dataclass(frozen=True, slots=True, kw_only=True)
class Maker:
    """What of a source module becomes of each plan's. Safe in several threads.

    Attributes:
        dtype: Of every weight, or None to keep the source's.
        empty: Where a cut is put.
    """

    supernet: Supernet
    plans: Sequence[SubnetPlan]
    dtype: torch.dtype | None
    empty: Empty

    def make(self, module: Module) -> list[_Made]:
        """Read the weights of one source module and make what each plan wants of them."""
        source = {part: self.supernet.tensors.read(f"{module.name}.{part}") for part in module.axes}
        made = []
        for use in module.uses:
            plan = self.plans[use.plan_idx]
            parts = self._fitted(use, plan, self.dtype or next(iter(source.values())).dtype)
            if parts is None:
                parts = self._cut(module, source, use, plan)
            for part, weight in parts.items():
                # Either end is NaN or infinite when any item is.
                if not torch.isfinite(torch.stack(torch.aminmax(weight))).all():
                    raise NonFiniteWeights(f"{use.name}.{part}", f"an adapter or a bias made it so for {plan.shape}")
                made.append((use.plan_idx, f"{use.name}.{part}", weight))
        return made

    def _fitted(self, use: Use, plan: SubnetPlan, dtype: torch.dtype) -> dict[str, torch.Tensor] | None:
        """Weight and bias of a module that a refit holds, all of it in them; None where it has neither."""
        if (refit := self.supernet.refit_of(plan)) is None:
            return None
        names = {part: f"{use.name}.{part}" for part in ("weight", "bias")}
        present = {part: name for part, name in names.items() if name in refit.tensors.names()}
        return {part: refit.tensors.read(name).to(dtype) for part, name in present.items()} or None

    def _cut(
        self, module: Module, source: dict[str, torch.Tensor], use: Use, plan: SubnetPlan
    ) -> dict[str, torch.Tensor]:
        """Weight and bias of one module for one plan. Nothing for a part that has no element left."""
        supernet, architecture = self.supernet, self.supernet.architecture
        cut = {}
        if "weight" in source:
            positions = _positions(module, "weight", use, architecture)
            if not any(p is not None and len(p) == 0 for p in positions):
                cut["weight"] = self._cut_weight(module.name, source["weight"], positions, plan)
        bias = None
        if "bias" in source:
            bias = take(source["bias"], 0, _positions(module, "bias", use, architecture)[0])
        if axis := compensated_axis(module.axes, use.layer, plan, architecture):
            assert use.layer is not None
            columns = _positions(module, "weight", use, architecture)[1]
            constant = compensation_bias(source["weight"], columns, axis, use.layer, plan, supernet.strategy)
            bias = constant if bias is None else bias.to(torch.float32) + constant
        if bias is not None and len(bias):
            cut["bias"] = bias.to(self.dtype or source["bias" if "bias" in source else "weight"].dtype)
        return cut

    def _cut_weight(
        self, module: str, weight: torch.Tensor, positions: Sequence[torch.Tensor | None], plan: SubnetPlan
    ) -> torch.Tensor:
        dtype = self.dtype or weight.dtype
        if len(positions) == 1:
            return take(weight, 0, positions[0]).to(dtype)
        deltas = [adapter.delta(module, plan) for adapter in self.supernet.adapters if module in adapter.modules()]
        present = [delta for delta in deltas if delta is not None]
        return cut_and_merge(weight, positions[0], positions[1], present, dtype, empty=self.empty)


def _positions(module: Module, part: str, use: Use, architecture: Architecture) -> list[torch.Tensor | None]:
    return [kept_positions(axis, use.layer, architecture) for axis in module.axes[part]]
