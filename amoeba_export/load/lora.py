"""Standard PEFT LoRA: A and B per module, with peft's alpha and rank patterns, rsLoRA scaling and DoRA magnitudes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from amoeba_export.errors import DamagedFile, UnsupportedAdapter, WrongModel
from amoeba_export.ir import AdapterDelta, InputId, SubnetPlan, TensorSource
from amoeba_export.load.adapter_folder import AdapterFile
from amoeba_export.load.adapter_names import AdapterWeights, Parts


@dataclass(frozen=True, slots=True, kw_only=True)
class _Module:
    a: str
    b: str
    magnitude: str | None
    scale: float
    is_embedding: bool


class LoraAdapter:
    """W' = W + scale * B @ A, with DoRA's row norms where they are. The same for every plan."""

    width_choices: tuple[float, ...] = ()

    def __init__(self, weights: TensorSource, modules: Mapping[str, _Module], identity: InputId) -> None:
        self._weights = weights
        self._modules = dict(modules)
        self.input = identity

    @classmethod
    def open(
        cls, file: AdapterFile, found: Mapping[str, Parts], matrices: Mapping[str, tuple[int, int]]
    ) -> LoraAdapter:
        """Check the shapes of A, B and magnitude of every module in `found`. `matrices`: module -> (out, in).

        An embedding is a matrix of a row for each word here, and of a column for each in peft: its B @ A is transposed.
        """
        config, where = file.config, file.path
        modules, differences = {}, []
        for module, parts in found.items():
            if unknown := {part for part, expert in parts if expert is not None}:
                raise DamagedFile(where, f"{module} has experts in {', '.join(sorted(unknown))}, the config has none")
            names = {part: name for (part, _), name in parts.items()}
            rank = file.count("r", file.by_pattern("rank_pattern", module, config.get("r", 8)))
            alpha = file.alpha(file.by_pattern("alpha_pattern", module, config.get("lora_alpha", 8)))
            is_embedding = "lora_embedding_A" in names
            kind = "lora_embedding" if is_embedding else "lora"
            entry = _Module(
                a=names[f"{kind}_A"],
                b=names[f"{kind}_B"],
                magnitude=names.get("lora_magnitude_vector"),
                scale=scaling(alpha, rank, use_rslora=bool(config.get("use_rslora"))),
                is_embedding=is_embedding,
            )
            if bool(config.get("use_dora")) != (entry.magnitude is not None):
                raise DamagedFile(where, f"{module}: use_dora and the magnitudes in the file do not agree")
            if is_embedding and entry.magnitude is not None:
                raise UnsupportedAdapter(f"DoRA on the embedding {module}", where=where)
            out, inner = reversed(matrices[module]) if is_embedding else matrices[module]
            differences += file.differences(entry.a, (rank, inner))
            differences += file.differences(entry.b, (out, rank))
            if entry.magnitude is not None:
                differences += file.differences(entry.magnitude, (out,))
            modules[module] = entry
        if differences:
            raise WrongModel("The adapter", differences[:4], where=where)
        return cls(file.weights, modules, file.input)

    def modules(self) -> Collection[str]:
        """Supernet module names it changes."""
        return self._modules.keys()

    def delta(self, module: str, plan: SubnetPlan) -> AdapterDelta | None:
        """The change of `module`, the same for every plan, or None when there is none."""
        del plan
        if module not in self._modules:
            return None
        entry = self._modules[module]
        a_RI, b_OR = self._read(entry.a), self._read(entry.b)
        if entry.is_embedding:
            a_RI, b_OR = b_OR.t(), a_RI.t()
        return AdapterDelta(
            a_RI=a_RI,
            b_OR=b_OR,
            scale=entry.scale,
            magnitude_O=None if entry.magnitude is None else self._read(entry.magnitude),
        )

    def _read(self, name: str) -> torch.Tensor:
        return self._weights.read(name).to(torch.float32)


def scaling(alpha: float, rank: int, *, use_rslora: bool) -> float:
    """LoRA's alpha / r, or alpha / sqrt(r) for rsLoRA (peft `tuners/lora/layer.py`)."""
    return alpha / math.sqrt(rank) if use_rslora else alpha / rank


def check_targets(file: AdapterFile, weights: AdapterWeights, modules: Collection[str]) -> None:
    """What a config names must be there: modules with LoRA, modules trained as a whole, biases.

    Patterns (a regular expression, `all-linear`) say where LoRA was put and are not evaluated.

    Args:
        file: The adapter.
        weights: What the file has.
        modules: Every module with a weight of two axes.

    Raises:
        DamagedFile: Something is missing.
    """
    config, where = file.config, file.path
    targets, excluded = config.get("target_modules"), config.get("exclude_modules")
    if isinstance(targets, list) and not isinstance(excluded, str):
        for module in modules:
            if (
                _is_named(module, targets)
                and not _is_named(module, excluded or ())
                and _is_of_layers(module, config)
                and module not in weights.lora
                and f"{module}.weight" not in weights.own  # trained as a whole: peft leaves it without LoRA
            ):
                raise DamagedFile(where, f"its config names {module}, for which it has no weights")
    own = {name.rpartition(".")[0] for name in weights.own}
    for name in config.get("modules_to_save") or ():
        if not any(module.endswith(str(name)) for module in own):
            raise DamagedFile(where, f"its config saves {name}, for which it has no weights")


def check_biases(file: AdapterFile, weights: AdapterWeights, known: Collection[str]) -> None:
    """Biases that were trained must be there. Raises `DamagedFile`."""
    bias = str(file.config.get("bias"))
    for name in known:
        module, _, leaf = name.rpartition(".")
        is_trained = leaf == "bias" and (bias == "all" or (bias == "lora_only" and module in weights.lora))
        if is_trained and name not in weights.own:
            raise DamagedFile(file.path, f"its config says bias = {bias!r}, and it has no {name}")


def _is_named(module: str, names: Iterable[Any]) -> bool:
    return any(module == name or module.endswith(f".{name}") for name in names)


def _is_of_layers(module: str, config: Mapping[str, Any]) -> bool:
    """Whether a module is in one of `layers_to_transform` (peft `check_target_module_exists`): a list, or one index."""
    wanted = config.get("layers_to_transform")
    if wanted is None or wanted == []:
        return True
    patterns = config.get("layers_pattern") or ()
    steps = module.split(".")
    for before, index in itertools.pairwise(steps[:-1]):
        if index.isdigit() and (not patterns or before in ([patterns] if isinstance(patterns, str) else patterns)):
            return int(index) in (wanted if isinstance(wanted, list) else [wanted])
    return False
