"""What the weights and nodes of a graph are called: after the modules of the family, whatever it calls them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from amoeba_export.ir import Family, Role


@dataclass(frozen=True, slots=True)
class Names:
    """Names by role."""

    family: Family

    def weight(self, role: Role, layer: int | None = None) -> str:
        """A weight of the subnet."""
        return self.family.weight(role, layer)

    def bias(self, role: Role, layer: int | None = None) -> str:
        """A bias of the subnet."""
        return self.family.bias(role, layer)

    @property
    def tokens(self) -> str:
        """The ids of the tokens that a smaller head computes logits of."""
        return f"{self.family.module('head')}.tokens"

    def node(self, role: Role, layer: int | None = None) -> str:
        """The node of a module, such as `/model/layers/0/mlp/down_proj`."""
        return _path(self.family.module(role, layer))

    def block(self, role: Role, layer: int) -> str:
        """What the nodes of the block around a module begin with, such as `/model/layers/0/mlp`."""
        return _path(self.family.module(role, layer).rpartition(".")[0])

    def stacked(self, roles: Sequence[Role], layer: int) -> str:
        """A module made of several, one under the other: `q_proj`, `k_proj` and `v_proj` are `q_k_v_proj`."""
        modules = [self.family.module(role, layer) for role in roles]
        if len(modules) == 1:
            return modules[0]
        block = modules[0].rpartition(".")[0]
        stems, endings = zip(*(module.rpartition(".")[2].split("_", 1) for module in modules), strict=True)
        (ending,) = set(endings)
        return f"{block}.{'_'.join(stems)}_{ending}"


def _path(module: str) -> str:
    return f"/{module.replace('.', '/')}"
