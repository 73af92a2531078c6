"""The reference: the supernet itself, with what a plan drops multiplied by zero.

Nothing here is shared with `materialize`. The forward pass is that of transformers' own model of the source's family,
at full width: weights stay as they are in the files, adapters are applied beside them instead of merged, dropped heads
and neurons are zeroed in the activations, and dropped layers are skipped. One physical layer of each kind takes the
weights of every kept layer of its kind in turn, so that a large supernet needs the memory of few layers and its
embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, DynamicCache

from amoeba_export.errors import InputError
from amoeba_export.ir import AdapterDelta, LayerPlan, Refit, Role, SubnetPlan, Supernet
from amoeba_export.model.loading import ONE_AT_A_TIME
from amoeba_export.model.opening import blank_model
from amoeba_export.verify.loaded import cache_name, rope_tables
from amoeba_export.verify.opened import Past

_LINEARS: tuple[Role, ...] = ("q", "k", "v", "o", "gate", "up", "down")

_PER_LAYER = ("layer_types", "no_rope_layers")
"""What transformers' configs list per layer."""

_ADDED = 1e-5
"""How far two orders of adding thousands of products in fp32 may be apart, as a share of the sum of their sizes."""


@torch.no_grad()
def masked_logits(
    supernet: Supernet, plan: SubnetPlan, input_ids: torch.Tensor, *, past: Past | None = None
) -> torch.Tensor:
    """Logits of the subnet `plan`, computed by masking the supernet. fp32.

    Args:
        supernet: With its adapters, and its strategy when the plan compensates.
        plan: What stays.
        input_ids: [B, T], without padding.
        past: What the KV cache holds before `input_ids`; B is 1 then.

    Returns:
        [B, T, V].
    """
    model, refit, norm = _reference_model(supernet, plan), supernet.refit_of(plan), supernet.family.weight("final_norm")
    model.model.embed_tokens = _UnmergedEmbedding(supernet, plan, model.model.embed_tokens)
    model.model.norm.weight.copy_(_weight(supernet, refit, norm, norm))
    model.lm_head = Unmerged(supernet, plan, "head")
    if refit is not None:
        _take_head(model, supernet, refit)
    cache = {} if past is None else {cache_name(model): _full_cache(supernet, plan, past)}
    logits: torch.Tensor = model(input_ids, use_cache=past is not None, **cache).logits
    return logits.float()


def _take_head(model: Any, supernet: Supernet, refit: Refit) -> None:
    """The head that a refit holds, in place of the supernet's."""
    tied = supernet.architecture.tied_embeddings
    name = supernet.family.weight("embedding" if tied else "head")
    if name in refit.tensors.names():
        held_VD = refit.tensors.read(name).float()
        model.lm_head = nn.Linear(held_VD.shape[1], held_VD.shape[0], bias=False, device="meta")
        model.lm_head.weight = nn.Parameter(held_VD, requires_grad=False)


class _UnmergedEmbedding(nn.Module):
    """The embedding of the supernet with adapters beside it, or that of a refit, scaled as `stock` scales its own."""

    def __init__(self, supernet: Supernet, plan: SubnetPlan, stock: Any) -> None:
        super().__init__()
        module, refit = supernet.family.module("embedding"), supernet.refit_of(plan)
        is_held = refit is not None and f"{module}.weight" in refit.tensors.names()
        source = refit.tensors if refit is not None and is_held else supernet.tensors
        self._w_VD = source.read(f"{module}.weight")
        changing = [] if is_held else [adapter for adapter in supernet.adapters if module in adapter.modules()]
        self._deltas = [adapter.delta(module, plan) for adapter in changing]
        scale = getattr(stock, "embed_scale", 1.0)
        self._scale = scale.float() if isinstance(scale, torch.Tensor) else scale

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        x_BTD = nn.functional.embedding(ids_BT, self._w_VD).float()
        for delta in self._deltas:
            if delta is not None:
                x_BTD = x_BTD + delta.scale * (nn.functional.embedding(ids_BT, delta.b_OR.float()) @ delta.a_RI.float())
        return x_BTD * self._scale


@torch.no_grad()
def source_rope(supernet: Supernet, plan: SubnetPlan) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of RoPE in the layers of `plan`, at all positions of the context. See `rope_tables`."""
    return rope_tables(_reference_model(supernet, plan), supernet.architecture.max_positions)


def _full_cache(supernet: Supernet, plan: SubnetPlan, past: Past) -> DynamicCache:
    """`past` at full width: dropped KV heads hold zeros, as their projections do not."""
    architecture, given, cache = supernet.architecture, iter(past), DynamicCache()
    length = past[0][0].shape[2]
    for position, kept in enumerate(plan.layers):
        pair = torch.zeros(2, 1, architecture.num_kv_heads, length, architecture.head_dim)
        if kept.kv_heads:
            pair[:, :, list(kept.kv_heads)] = torch.stack(next(given))
        cache.update(pair[0], pair[1], position)
    return cache


def _reference_model(supernet: Supernet, plan: SubnetPlan) -> Any:
    """Transformers' model of the source's family whose layers are those of `plan`, computed one at a time.

    Embeddings, head and FFN are replaced by the supernet's own: as small as can be, they cost no time to initialize.
    """
    values = {key: value for key, value in supernet.architecture.config.items() if key not in ("dtype", "torch_dtype")}
    whole = AutoConfig.for_model(**values)
    lists = {key: list(found) for key in _PER_LAYER if (found := getattr(whole, key, None))}
    ways = list(zip(*lists.values(), strict=True)) or [()] * supernet.architecture.num_layers
    first = {way: ways.index(way) for way in ways}
    values |= {key: [found[i] for i in first.values()] for key, found in lists.items()}
    values |= {"num_hidden_layers": len(first), "vocab_size": 1, "intermediate_size": 1}
    values |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    with ONE_AT_A_TIME:
        model = blank_model(AutoConfig.for_model(**values), dtype=torch.float32).eval()
    physical = dict(zip(first, model.model.layers, strict=True))
    model.model.layers = nn.ModuleList(
        _KeptLayer(physical[ways[kept.source_layer]], supernet, plan, position)
        for position, kept in enumerate(plan.layers)
    )
    model.config.num_hidden_layers = len(plan.layers)
    for key, found in lists.items():
        setattr(model.config, key, [found[i] for i in plan.kept_layers])
    return model


class _KeptLayer(nn.Module):
    """Stands where one kept layer stands, and lends its weights to the physical layer of its kind."""

    def __init__(self, layer: nn.Module, supernet: Supernet, plan: SubnetPlan, position: int) -> None:
        super().__init__()
        self._layer = [layer]  # in a list: its weights are no part of the model's state
        self._supernet, self._plan, self._position = supernet, plan, position
        for name in ("attention_type", "self_attn"):
            if hasattr(layer, name) and not isinstance(getattr(layer, name), nn.Module):
                setattr(self, name, getattr(layer, name))

    def forward(self, hidden_BTD: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        (layer,) = self._layer
        self._load(layer)
        setattr(layer.self_attn, "layer_idx", self._position)  # noqa: B010 - torch's stubs know no other attributes
        output = layer(hidden_BTD, *args, **kwargs)
        stream_BTD: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return stream_BTD

    def _load(self, layer: nn.Module) -> None:
        kept, family = self._plan.layers[self._position], self._supernet.family
        beside = {role: self._linear(role, kept) for role in _LINEARS}
        modules = {
            fused.module.format(layer=0): _Together([beside.pop(role) for role in fused.roles])
            for fused in family.fused
        } | {family.module(role, 0): linear for role, linear in beside.items()}
        for module, linear in modules.items():
            owner, _, name = module.removeprefix(family.layer_prefix(0)).rpartition(".")
            setattr(layer.get_submodule(owner), name, linear)
        refit = self._supernet.refit_of(self._plan)
        prefix, cut_prefix = (family.layer_prefix(i) for i in (kept.source_layer, self._position))
        for name, parameter in layer.named_parameters():
            parameter.copy_(_weight(self._supernet, refit, f"{prefix}{name}", f"{cut_prefix}{name}"))

    def _linear(self, role: Role, kept: LayerPlan) -> nn.Module:
        family, refit = self._supernet.family, self._supernet.refit_of(self._plan)
        cut_module = family.module(role, self._position)
        if refit is not None and any(f"{cut_module}.{part}" in refit.tensors.names() for part in ("weight", "bias")):
            return _Fitted(self._supernet, refit, role, kept, cut_module)
        unmerged = Unmerged(self._supernet, self._plan, role, kept.source_layer)
        if role in ("o", "down"):
            unmerged.mask(kept)
        return unmerged


class _Together(nn.Module):
    """Several linears as the one that transformers has in their place."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([part(x) for part in self.parts], dim=-1)


def _weight(supernet: Supernet, refit: Refit | None, name: str, cut_name: str) -> torch.Tensor:
    """A weight that no plan cuts: the refit's where it holds it, else the supernet's."""
    if refit is not None and cut_name in refit.tensors.names():
        return refit.tensors.read(cut_name)
    return supernet.tensors.read(name)


class _Fitted(nn.Module):
    """A linear whose weights a refit holds: they stand where they were cut from, and zeros everywhere else."""

    def __init__(self, supernet: Supernet, refit: Refit, role: Role, kept: LayerPlan, cut_module: str) -> None:
        super().__init__()
        held, names = refit.tensors, refit.tensors.names()
        num_out, num_in = supernet.tensors.shape(supernet.family.weight(role, kept.source_layer))
        rows_O, columns_I = torch.ones(num_out, dtype=torch.bool), torch.ones(num_in, dtype=torch.bool)
        for keep, roles in ((rows_O, _ROWS), (columns_I, _COLUMNS)):
            if role in roles:
                units = getattr(kept, roles[role])
                size = 1 if roles[role] == "ffn" else supernet.architecture.head_dim
                keep.zero_().view(-1, size)[list(units)] = True
        self._w_OI = torch.zeros(num_out, num_in)
        if f"{cut_module}.weight" in names:
            self._w_OI[rows_O.nonzero(), columns_I.nonzero().T] = held.read(f"{cut_module}.weight").float()
        self._bias_O: torch.Tensor | None = None
        if f"{cut_module}.bias" in names:
            self._bias_O = torch.zeros(num_out)
            self._bias_O[rows_O] = held.read(f"{cut_module}.bias").float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self._w_OI, self._bias_O)


_ROWS: dict[Role, str] = {"q": "query_heads", "k": "kv_heads", "v": "kv_heads", "gate": "ffn", "up": "ffn"}
_COLUMNS: dict[Role, str] = {"o": "query_heads", "down": "ffn"}
"""What of a `LayerPlan` the rows and columns of a projection are."""


class Unmerged(nn.Module):
    """A linear of the supernet, full size, with adapters beside it and, on request, inputs masked."""

    def __init__(self, supernet: Supernet, plan: SubnetPlan, role: Role, layer: int | None = None) -> None:
        super().__init__()
        tensors, family = supernet.tensors, supernet.family
        self._supernet, self._plan, self._role = supernet, plan, role
        module = family.module(role, layer)
        tied = role == "head" and supernet.architecture.tied_embeddings
        self._w_OI = tensors.read(family.weight("embedding") if tied else f"{module}.weight").float()
        self._bias_O: torch.Tensor | None = None
        if f"{module}.bias" in tensors.names():
            self._bias_O = tensors.read(f"{module}.bias").float()
        self._deltas = [
            delta
            for adapter in supernet.adapters
            if module in adapter.modules() and (delta := adapter.delta(module, plan)) is not None
        ]
        self._keep_I: torch.Tensor | None = None
        self._constant_O: torch.Tensor | None = None
        self._mean_I: torch.Tensor | None = None

    @property
    def is_adapted(self) -> bool:
        """Whether an adapter changes it."""
        return bool(self._deltas)

    def merged(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | float]:
        """The same function as one full-size weight and bias, and what another order of adding may do to the bias."""
        w_OI = self._w_OI
        for delta in self._deltas:
            w_OI, _ = _rescaled(w_OI, delta)
        parts = [part for part in (self._bias_O, self._constant_O) if part is not None]
        slack_O: torch.Tensor | float = 0.0
        if self._mean_I is not None:
            slack_O = _ADDED * nn.functional.linear(self._mean_I.abs(), self._w_OI.abs())
        return w_OI, torch.stack(parts).sum(0) if parts else None, slack_O

    def mask(self, kept: LayerPlan) -> None:
        """Zero the inputs of dropped heads or neurons, and add what they contributed on average."""
        architecture, plan = self._supernet.architecture, self._plan
        keep = torch.zeros(self._w_OI.shape[1])
        if self._role == "o":
            keep.view(architecture.num_heads, -1)[list(kept.query_heads)] = 1
            wanted = plan.has_o_bias(kept, architecture)
        else:
            keep[list(kept.ffn)] = 1
            wanted = plan.has_down_bias(kept, architecture)
        self._keep_I = keep
        if wanted:
            self._constant_O = self._average(kept, 1 - keep)

    def _average(self, kept: LayerPlan, dropped_I: torch.Tensor) -> torch.Tensor:
        strategy, attention = self._supernet.strategy, self._role == "o"
        if strategy is None:
            raise InputError("The plan has compensation biases and no strategy is given.", next_step="Give --strategy.")
        if self._plan.width_key is not None:
            width = strategy.widths[self._plan.width_key]
            return torch.tensor((width.o_bias_LD if attention else width.down_bias_LD)[kept.source_layer]).float()
        assert strategy.importance is not None, "an upstream import names its width in the plan"
        means = strategy.importance.o_mean_LQ if attention else strategy.importance.down_mean_LF
        self._mean_I = torch.tensor(means[kept.source_layer]).float() * dropped_I
        return nn.functional.linear(self._mean_I, self._w_OI)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., I] -> [..., O]."""
        if self._keep_I is not None:
            x = x * self._keep_I
        y = nn.functional.linear(x, self._w_OI)
        w_OI = self._w_OI
        for delta in self._deltas:
            a_RI, b_OR = delta.a_RI.float(), delta.b_OR.float()
            y = y + delta.scale * ((x @ a_RI.T) @ b_OR.T)
            if any(other.magnitude_O is not None for other in self._deltas):
                w_OI, ratio_O = _rescaled(w_OI, delta)
                y = y * ratio_O
        for constant_O in (self._bias_O, self._constant_O):
            if constant_O is not None:
                y = y + constant_O
        return y


def _rescaled(w_OI: torch.Tensor, delta: AdapterDelta) -> tuple[torch.Tensor, torch.Tensor | float]:
    """The weight that a later DoRA adapter finds, and the factor by which this one rescales each output."""
    changed_OI = w_OI + delta.scale * (delta.b_OR.float() @ delta.a_RI.float())
    if delta.magnitude_O is None:
        return changed_OI, 1.0
    ratio_O = delta.magnitude_O.float() / torch.linalg.vector_norm(changed_OI, dim=1)
    return changed_OI * ratio_O[:, None], ratio_O
