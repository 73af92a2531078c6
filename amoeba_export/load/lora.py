"""Standard PEFT LoRA: A and B per module, with peft's alpha and rank patterns, rsLoRA scaling and DoRA magnitudes."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from amoeba_export.errors import DamagedFile, UnsupportedAdapter, WrongModel
from amoeba_export.ir import AdapterDelta, InputId, SubnetPlan, TensorSource

PREFIX = "base_model.model."
_KEY = re.compile(re.escape(PREFIX) + r"(?P<module>.+)\.(?P<part>lora_[A-Za-z_]+)(?:\.(?P<expert>\d+))?(?P<end>\.\w+)?")

Parts = dict[tuple[str, int | None], str]
"""(`lora_A` | `lora_B` | `lora_magnitude_vector`, expert or None) -> the name of the weight in the file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Module:
    a: str
    b: str
    magnitude: str | None
    scale: float


class LoraAdapter:
    """W' = W + scale * B @ A, with DoRA's row norms where they are. The same for every plan."""

    width_choices: tuple[float, ...] = ()

    def __init__(self, weights: TensorSource, modules: Mapping[str, _Module], identity: InputId) -> None:
        self._weights = weights
        self._modules = dict(modules)
        self.input = identity

    @classmethod
    def open(
        cls,
        config: Mapping[str, Any],
        weights: TensorSource,
        *,
        linears: Mapping[str, tuple[int, int]],
        num_layers: int,
        identity: InputId,
        where: Path,
    ) -> LoraAdapter:
        """Find A, B and magnitude of every module and check their shapes. `linears`: module -> (out, in)."""
        del num_layers  # only a gate depends on it
        found = group_by_module(weights.names(), linears, where)
        check_targets(config, found, linears, where)
        modules, differences = {}, []
        for module, parts in found.items():
            if unknown := {part for part, expert in parts if expert is not None}:
                raise DamagedFile(where, f"{module} has experts in {', '.join(sorted(unknown))}, the config has none")
            names = {part: name for (part, _), name in parts.items()}
            rank = positive_int(by_pattern(config, "rank_pattern", module, config.get("r", 8), where), "r", where)
            alpha = number(by_pattern(config, "alpha_pattern", module, config.get("lora_alpha", 8), where), where)
            entry = _Module(
                a=names["lora_A"],
                b=names["lora_B"],
                magnitude=names.get("lora_magnitude_vector"),
                scale=scaling(alpha, rank, use_rslora=bool(config.get("use_rslora"))),
            )
            if bool(config.get("use_dora")) != (entry.magnitude is not None):
                raise DamagedFile(where, f"{module}: use_dora and the magnitudes in the file do not agree")
            out, inner = linears[module]
            differences += shape_differences(weights, entry.a, (rank, inner))
            differences += shape_differences(weights, entry.b, (out, rank))
            if entry.magnitude is not None:
                differences += shape_differences(weights, entry.magnitude, (out,))
            modules[module] = entry
        if differences:
            raise WrongModel("The adapter", differences[:4], where=where)
        return cls(weights, modules, identity)

    def modules(self) -> Collection[str]:
        """Supernet module names it changes."""
        return self._modules.keys()

    def delta(self, module: str, plan: SubnetPlan) -> AdapterDelta | None:
        """The change of `module`, the same for every plan, or None when there is none."""
        del plan
        if module not in self._modules:
            return None
        entry = self._modules[module]
        return AdapterDelta(
            a_RI=self._read(entry.a),
            b_OR=self._read(entry.b),
            scale=entry.scale,
            magnitude_O=None if entry.magnitude is None else self._read(entry.magnitude),
        )

    def _read(self, name: str) -> torch.Tensor:
        return self._weights.read(name).to(torch.float32)


def scaling(alpha: float, rank: int, *, use_rslora: bool) -> float:
    """LoRA's alpha / r, or alpha / sqrt(r) for rsLoRA (peft `tuners/lora/layer.py`)."""
    return alpha / math.sqrt(rank) if use_rslora else alpha / rank


def by_pattern(config: Mapping[str, Any], key: str, module: str, default: Any, where: Path) -> Any:
    """The value of the first pattern that matches the end of a module's name (peft `get_pattern_key`)."""
    for pattern, value in (config.get(key) or {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error as error:
            raise DamagedFile(where, f"{key} has a pattern that is none: {pattern!r} ({error})") from error
    return default


def positive_int(value: Any, key: str, where: Path) -> int:
    """A count from a config. Raises `DamagedFile`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise DamagedFile(where, f"its config has {key} = {value!r}")
    return value


def number(value: Any, where: Path) -> float:
    """The lora_alpha of a config. Raises `DamagedFile`."""
    if not isinstance(value, int | float):
        raise DamagedFile(where, f"its config has lora_alpha = {value!r}")
    return float(value)


def group_by_module(names: Iterable[str], linears: Collection[str], where: Path) -> dict[str, Parts]:
    """The weights of an adapter file by the linear layer they belong to, each with at least an A and a B.

    Raises:
        UnsupportedAdapter: A weight that is no LoRA, or LoRA on something other than a linear layer.
        WrongModel: A module that the model does not have.
        DamagedFile: An A without its B, or the other way round.
    """
    found: dict[str, Parts] = {}
    for name in names:
        match = _KEY.fullmatch(name)
        if match is None:
            raise UnsupportedAdapter(f"the weight {name}", where=where)
        module, part, end = match["module"], match["part"], match["end"]
        if part not in ("lora_A", "lora_B", "lora_magnitude_vector") or end not in (".weight", None):
            raise UnsupportedAdapter(f"{part}{end or ''} on {module}", where=where)
        if module in ("lm_head", "model.embed_tokens") and module not in linears:
            raise UnsupportedAdapter(f"LoRA on {module}, which is an embedding here", where=where)
        if module not in linears:
            raise WrongModel("The adapter", [f"it changes {module}, which this model does not have"], where=where)
        found.setdefault(module, {})[part, int(match["expert"]) if match["expert"] else None] = name
    partners = {"lora_A": "lora_B", "lora_B": "lora_A", "lora_magnitude_vector": "lora_A"}
    for parts in found.values():
        for (part, expert), name in parts.items():
            if (partners[part], expert) not in parts:
                raise DamagedFile(where, f"{name} is there without its {partners[part]}")
    if not found:
        raise DamagedFile(where, "it changes nothing")
    return found


def check_targets(config: Mapping[str, Any], found: Collection[str], linears: Collection[str], where: Path) -> None:
    """Every linear layer that a plain list of targets names must be there. Raises `DamagedFile`."""
    targets = config.get("target_modules")
    if not isinstance(targets, list) or config.get("layers_to_transform") or config.get("exclude_modules"):
        return
    for module in linears:
        if module not in found and any(module == target or module.endswith(f".{target}") for target in targets):
            raise DamagedFile(where, f"its config names {module}, for which it has no weights")


def shape_differences(weights: TensorSource, name: str, expected: tuple[int, ...]) -> list[str]:
    """What to say when a weight has another shape than this model implies."""
    shape = weights.shape(name)
    return [] if shape == expected else [f"{name} has shape {list(shape)}, this model needs {list(expected)}"]
