"""The reference: the supernet itself, with what a plan drops multiplied by zero.

Nothing here is shared with `materialize`. The forward pass is that of transformers' own model of the source's family,
at full width: weights stay as they are in the files, adapters are applied beside them instead of merged, dropped heads
and neurons are zeroed in the activations, and dropped layers are skipped. One physical layer of each kind takes the
weights of every kept layer of its kind in turn, so that a large supernet needs the memory of few layers and its
embeddings.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, DynamicCache

from amoeba_export.ir import LayerPlan, Refit, Role, SubnetPlan, Supernet
from amoeba_export.model.loading import ONE_AT_A_TIME
from amoeba_export.model.opening import blank_model
from amoeba_export.verify.loaded import cache_name, rope_tables
from amoeba_export.verify.opened import Past
from amoeba_export.verify.unmerged import Experts, Fitted, Together, Unmerged, weight_of

_LINEARS: tuple[Role, ...] = ("q", "k", "v", "o", "gate", "up", "down")

_PER_LAYER = ("layer_types", "no_rope_layers")
"""What transformers' configs list per layer."""


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
        [B, T, V]; minus infinity for tokens that logits are not computed of.
    """
    model, refit, family = _reference_model(supernet, plan), supernet.refit_of(plan), supernet.family
    embedding, norm = family.module("embedding"), family.weight("final_norm")
    model.set_submodule(embedding, _UnmergedEmbedding(supernet, plan, model.get_submodule(embedding)))
    model.get_parameter(norm).copy_(weight_of(supernet, refit, norm, norm))
    head = None if refit is None else _held_head(supernet, refit)
    model.set_submodule(family.module("head"), Unmerged(supernet, plan, "head") if head is None else head)
    cache = {} if past is None else {cache_name(model): _full_cache(supernet, plan, past)}
    logits: torch.Tensor = model(input_ids, use_cache=past is not None, **cache).logits.float()
    if plan.head_tokens is None:
        return logits
    tokens = torch.tensor(plan.head_tokens)
    return torch.full_like(logits, -torch.inf).index_copy(-1, tokens, logits[..., tokens])


def _held_head(supernet: Supernet, refit: Refit) -> nn.Module | None:
    """The head that a refit holds; None where it leaves the supernet's."""
    name = supernet.family.weight(supernet.architecture.logits_role)
    if name not in refit.tensors.names():
        return None
    held_VD = refit.tensors.read(name).float()
    head = nn.Linear(held_VD.shape[1], held_VD.shape[0], bias=False, device="meta")
    head.weight = nn.Parameter(held_VD, requires_grad=False)
    return head


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
    if (key := supernet.family.expert_size_key) is not None:
        values[key] = 1
    values |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    with ONE_AT_A_TIME:
        model = blank_model(AutoConfig.for_model(**values), dtype=torch.float32).eval()
    layers = supernet.family.layers_prefix.removesuffix(".")
    physical = dict(zip(first, model.get_submodule(layers), strict=True))
    kept_layers = (
        _KeptLayer(physical[ways[kept.source_layer]], supernet, plan, position)
        for position, kept in enumerate(plan.layers)
    )
    model.set_submodule(layers, nn.ModuleList(kept_layers))
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
        self._expert_roles = {held.role for held in supernet.family.experts}
        inside = supernet.family.module("o", 0).removeprefix(supernet.family.layer_prefix(0))
        self._attention = inside.rpartition(".")[0]
        if hasattr(layer, "attention_type"):
            self.attention_type = layer.attention_type

    def forward(self, hidden_BTD: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        (layer,) = self._layer
        self._load(layer)
        attention: Any = layer.get_submodule(self._attention)
        attention.layer_idx = self._position
        output = layer(hidden_BTD, *args, **kwargs)
        stream_BTD: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return stream_BTD

    def _load(self, layer: nn.Module) -> None:
        kept, family = self._plan.layers[self._position], self._supernet.family
        beside = {role: self._linear(role, kept) for role in _LINEARS if role not in self._expert_roles}
        modules = {
            fused.module.format(layer=0): Together([beside.pop(role) for role in fused.roles]) for fused in family.fused
        } | {family.module(role, 0): linear for role, linear in beside.items()}
        for module, linear in modules.items():
            owner, _, name = module.removeprefix(family.layer_prefix(0)).rpartition(".")
            setattr(layer.get_submodule(owner), name, linear)
        router = self._load_experts(layer, kept) if self._expert_roles else None
        refit = self._supernet.refit_of(self._plan)
        prefix, cut_prefix = (family.layer_prefix(i) for i in (kept.source_layer, self._position))
        for name, parameter in layer.named_parameters():
            if parameter is not router:
                parameter.copy_(weight_of(self._supernet, refit, f"{prefix}{name}", f"{cut_prefix}{name}"))

    def _load_experts(self, layer: nn.Module, kept: LayerPlan) -> nn.Parameter:
        """Transformers' router over the kept experts, and all experts behind it. Returns the router's weight."""
        family, tensors = self._supernet.family, self._supernet.tensors
        prefix = family.layer_prefix(0)
        owner, _, name = family.expert_list.format(layer=0).removeprefix(prefix).rpartition(".")
        stock: Any = getattr(layer.get_submodule(owner), name)
        setattr(layer.get_submodule(owner), name, Experts(self._supernet, kept, stock.act_fn))
        router: Any = layer.get_submodule(family.module("router", 0).removeprefix(prefix))
        rows = list(kept.ffn) or [0]  # one that leads nowhere, where none is kept
        router.weight = nn.Parameter(tensors.read(family.weight("router", kept.source_layer)).float()[rows])
        router.top_k = min(self._supernet.architecture.experts_per_token, len(rows))
        weight: nn.Parameter = router.weight
        return weight

    def _linear(self, role: Role, kept: LayerPlan) -> nn.Module:
        family, refit = self._supernet.family, self._supernet.refit_of(self._plan)
        cut_module = family.module(role, self._position)
        if refit is not None and any(f"{cut_module}.{part}" in refit.tensors.names() for part in ("weight", "bias")):
            return Fitted(self._supernet, refit, role, kept, cut_module)
        unmerged = Unmerged(self._supernet, self._plan, role, kept.source_layer)
        if role in ("o", "down"):
            unmerged.mask(kept)
        return unmerged
