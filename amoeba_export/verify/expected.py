"""What every weight of a cut model must be: merged at full size, then cut by masks.

The second path of `materialize`, which cuts first and merges what is left. Adapters and constants are those of the
masked reference (`masked.py`), so there is one reading of them on this side.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from amoeba_export.ir import Axis, LayerPlan, SubnetPlan, Supernet, TensorSource, TensorTemplate
from amoeba_export.ir.dtype import float_name, is_float
from amoeba_export.verify.stored.tensor import Wanted
from amoeba_export.verify.unmerged import Unmerged

_MERGED = 1e-5
"""Slack of what was computed, as a share of the largest value of the weight: two ways of adding in fp32."""

_LINEARS = ("q", "k", "v", "o", "gate", "up", "down", "embedding", "head")
"""Roles that adapters and constants may change."""
_WRITERS = ("o", "down")
_ATTENTION = ("attn_in_norm", "q", "k", "v", "q_norm", "k_norm", "o", "attn_out_norm")


@dataclass(frozen=True, slots=True)
class Expected:
    """One weight. `slack`: how far a file may be off before its own rounding, a number or one per output."""

    values: torch.Tensor
    slack: float | torch.Tensor


class ExpectedWeights:
    """The weights that the file of a plan must have, one at a time.

    Args:
        supernet: What it was cut from.
        plan: What was cut.
        rounded: Weights that a format has in place of those, because its integers were chosen with data.
    """

    def __init__(self, supernet: Supernet, plan: SubnetPlan, *, rounded: TensorSource | None = None) -> None:
        self._supernet, self._plan, self._rounded = supernet, plan, rounded
        self._places = dict(self._walk())
        self.shapes: dict[str, tuple[int, ...]] = {
            name: shape for name in self._places if 0 not in (shape := self._shape(name))
        }

    @property
    def wanted(self) -> Wanted:
        """What a file must have, before any weight is read."""
        dense = self._plan.dense(self._supernet.architecture)
        tokens = self._plan.head_tokens
        return Wanted(shapes=self.shapes, family=self._supernet.family, dense=dense, head_tokens=tokens)

    def is_chosen(self, name: str) -> bool:
        """Whether `read` gives what data chose."""
        return self._rounded is not None and name in self._rounded.names()

    def unrounded(self) -> ExpectedWeights | None:
        """The same without what data chose; None where it chose nothing."""
        return None if self._rounded is None else ExpectedWeights(self._supernet, self._plan)

    def read(self, name: str) -> Expected:
        """One of `shapes`."""
        if self._is_some_rows(name):
            whole = self._read(self._supernet.family.weight(self._supernet.architecture.logits_role))
            return Expected(whole.values[list(self._plan.head_tokens or ())], whole.slack)
        return self._read(name)

    def _is_some_rows(self, name: str) -> bool:
        """Whether a weight is a head of some tokens."""
        return self._plan.head_tokens is not None and self._places[name][0].role == "head"

    def _read(self, name: str) -> Expected:
        """One of `shapes`, with all tokens."""
        if self._rounded is not None and self.is_chosen(name):
            return Expected(self._rounded.read(name), 0.0)
        refit = self._supernet.refit_of(self._plan)
        if refit is not None and name in refit.tensors.names():
            return Expected(refit.tensors.read(name).float(), 0.0)
        template, kept = self._places[name]
        source = template.name.format(layer=kept.source_layer) if kept else template.name
        part = source.rpartition(".")[2]
        if template.role not in _LINEARS:
            return Expected(self._cut(self._supernet.tensors.read(source).float(), template.axes, kept), 0.0)
        linear = Unmerged(self._supernet, self._plan, template.role, kept.source_layer if kept else None)
        if template.role in _WRITERS:
            assert kept is not None
            linear.mask(kept)
        w_OI, bias_O, slack_O = linear.merged()
        if part == "weight":
            values = self._cut(w_OI, template.axes, kept)
            return Expected(values, _MERGED * float(values.abs().max()) if linear.is_adapted else 0.0)
        assert bias_O is not None, name
        return Expected(self._cut(bias_O, template.axes, kept), slack_O)

    def source_dtype(self, name: str) -> str | None:
        """What the source stores a weight in; None for one that it does not have."""
        if name not in self._places:
            return None
        template, kept = self._places[name]
        if self._is_some_rows(name) and self._supernet.architecture.tied_embeddings:
            return self.source_dtype(self._supernet.family.weight("embedding"))
        source = template.name.format(layer=kept.source_layer) if kept else template.name
        tensors = self._supernet.tensors
        if source not in tensors.names() or not is_float(dtype := tensors.dtype(source)):
            return None
        return float_name(dtype)

    def _walk(self) -> Iterator[tuple[str, tuple[TensorTemplate, LayerPlan | None]]]:
        family, architecture = self._supernet.family, self._supernet.architecture
        for template in family.globals:
            if architecture.has(template) or (template.role == "head" and self._plan.head_tokens is not None):
                yield template.name, (template, None)
        for position, kept in enumerate(self._plan.layers):
            compensated: dict[Axis, bool] = {
                "query": self._plan.has_o_bias(kept, architecture),
                "ffn": self._plan.has_down_bias(kept, architecture),
            }
            for template in family.layer:
                stem, _, part = template.name.rpartition(".")
                is_output = template.role in _WRITERS
                if architecture.has(template) and self._is_there(template, part, kept, compensated):
                    yield template.name.format(layer=position), (template, kept)
                if part == "weight" and is_output and compensated[template.axes[1]]:
                    bias = TensorTemplate(name=f"{stem}.bias", role=template.role, axes=template.axes[:1])
                    yield bias.name.format(layer=position), (bias, kept)

    def _is_there(self, template: TensorTemplate, part: str, kept: LayerPlan, compensated: Mapping[Axis, bool]) -> bool:
        """Whether a weight is left of its block: of one that is gone, the bias of its writer and the norm of that."""
        architecture = self._supernet.architecture
        attention = template.role in _ATTENTION
        if kept.query_heads if attention else kept.ffn:
            return True
        own, axis = (architecture.o_bias, "query") if attention else (architecture.mlp_bias, "ffn")
        if template.role in ("attn_out_norm", "ffn_out_norm"):
            return own or compensated[axis]  # type: ignore[index]
        return part == "bias" and template.role in _WRITERS

    def _shape(self, name: str) -> tuple[int, ...]:
        template, kept = self._places[name]
        shape = tuple(int(self._mask(axis, kept).sum()) for axis in template.axes)
        return (len(self._plan.head_tokens or ()), *shape[1:]) if self._is_some_rows(name) else shape

    def _cut(self, values: torch.Tensor, axes: tuple[Axis, ...], kept: LayerPlan | None) -> torch.Tensor:
        for dim, axis in enumerate(axes):
            mask = self._mask(axis, kept)
            if not mask.all():
                values = values[mask] if dim == 0 else values[:, mask]
        return values

    def _mask(self, axis: Axis, kept: LayerPlan | None) -> torch.Tensor:
        return kept_mask(axis, kept, self._supernet)


def kept_mask(axis: Axis, kept: LayerPlan | None, supernet: Supernet) -> torch.Tensor:
    """Which positions along a full axis a layer keeps."""
    architecture = supernet.architecture
    mask = torch.ones(architecture.axis_size(axis), dtype=torch.bool)
    units = (
        {} if kept is None else {"query": kept.query_heads, "kv": kept.kv_heads, "ffn": kept.ffn, "expert": kept.ffn}
    )
    if axis in units:
        count = {"query": architecture.num_heads, "kv": architecture.num_kv_heads}.get(axis, architecture.ffn_size)
        mask[:] = False
        mask.view(count, -1)[list(units[axis])] = True
    return mask
