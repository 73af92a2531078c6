"""Supernets opened from tiny folders, strategies made of seeded noise, and adapters held in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from amoeba_export.formats import FORMATS
from amoeba_export.ir import (
    AdapterDelta,
    Architecture,
    Importance,
    InputId,
    LayerPlan,
    Shape,
    Strategy,
    Subnet,
    SubnetPlan,
    Supernet,
)
from amoeba_export.ir.derive import CutRules, derive_plan
from amoeba_export.load import load_supernet


def noise_strategy(architecture: Architecture, seed: int = 0) -> Strategy:
    """Random importances and input means; every depth drops layers from the middle."""
    noise = np.random.default_rng(seed)
    num_layers, num_heads = architecture.num_layers, architecture.num_heads
    importance = Importance(
        heads_LN=noise.normal(size=(num_layers, num_heads)),
        ffn_LF=noise.normal(size=(num_layers, architecture.ffn_size)),
        o_mean_LQ=noise.normal(size=(num_layers, num_heads * architecture.head_dim)).astype(np.float32),
        down_mean_LF=noise.normal(size=(num_layers, architecture.ffn_size)).astype(np.float32),
        metric="WIFV",
    )
    return Strategy(
        model_id=None,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=architecture.num_kv_heads,
        head_dim=architecture.head_dim,
        ffn_size=architecture.ffn_size,
        depth={m: (1,) + (0,) * m + (1,) * (num_layers - 1 - m) for m in range(num_layers - 1)},
        importance=importance,
    )


def open_supernet(folder: Path) -> Supernet:
    """The model in `folder` with a noise strategy."""
    supernet = load_supernet(str(folder))
    return dataclasses.replace(supernet, strategy=noise_strategy(supernet.architecture))


def plan_for(supernet: Supernet, shape: str, policy: str = "uniform") -> SubnetPlan:
    """Of the supernet's strategy, with the head that its cuts have."""
    assert supernet.strategy is not None
    plan = derive_plan(supernet.strategy, supernet.architecture, Shape.parse(shape), CutRules(policy=policy))  # type: ignore[arg-type]
    return dataclasses.replace(plan, head_tokens=supernet.head_tokens)


def bare_plan(supernet: Supernet) -> SubnetPlan:
    """Layer 0 whole, layer 1 without heads, layer 2 without neurons, layer 3 cut, as far as heads can be. Biases where
    something is gone."""
    full = SubnetPlan.full(supernet.architecture)
    a, b, c, d = full.layers
    cut_kv = int(supernet.architecture.cuts_heads)
    cut_heads = cut_kv * supernet.architecture.heads_per_kv
    layers = (
        a,
        LayerPlan(source_layer=b.source_layer, query_heads=(), kv_heads=(), ffn=b.ffn[::3]),
        LayerPlan(source_layer=c.source_layer, query_heads=c.query_heads, kv_heads=c.kv_heads, ffn=()),
        LayerPlan(
            source_layer=d.source_layer,
            query_heads=d.query_heads[cut_heads:],
            kv_heads=d.kv_heads[cut_kv:],
            ffn=d.ffn[1::2],
        ),
    )
    return dataclasses.replace(full, shape=Shape(4, 0.5), policy="adaptive", layers=layers)


class MemoryAdapter:
    """An adapter whose deltas were made by a test."""

    width_choices = ()

    def __init__(self, deltas: Mapping[str, AdapterDelta]) -> None:
        self._deltas = deltas
        self.input = InputId(role="adapter", id="memory", sha256="0" * 64)

    def modules(self) -> set[str]:
        return set(self._deltas)

    def delta(self, module: str, plan: SubnetPlan) -> AdapterDelta | None:
        return self._deltas[module]


def noise_adapter(supernet: Supernet, *, rank: int = 3, dora: bool = False, seed: int = 0) -> MemoryAdapter:
    """Changes every projection of every layer."""
    generator = torch.Generator().manual_seed(seed)
    deltas = {}
    for name in sorted(supernet.tensors.names()):
        if "_proj.weight" in name:
            out_features, in_features = supernet.tensors.shape(name)
            deltas[name.removesuffix(".weight")] = AdapterDelta(
                a_RI=torch.randn(rank, in_features, generator=generator) * 0.1,
                b_OR=torch.randn(out_features, rank, generator=generator) * 0.1,
                scale=1.5,
                magnitude_O=torch.rand(out_features, generator=generator) + 0.5 if dora else None,
            )
    return MemoryAdapter(deltas)


def write(
    subnet: Subnet, folder: Path, format_name: str = "safetensors", dtype: str = "source", **options: int
) -> Path:
    """Write `subnet` into a new `folder`."""
    folder.mkdir(parents=True)
    writer = FORMATS[format_name].open_writer(subnet, folder, dtype=dtype, **options)
    for name, weight in subnet.stream():
        writer.accept(name, weight)
    writer.close()
    return folder
