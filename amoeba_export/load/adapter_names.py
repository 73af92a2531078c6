"""What the weights of an adapter file belong to: LoRA of a module, or a weight of the model trained as a whole.

peft names a weight by the path of its module in the model that was trained. That model may have been compiled,
distributed, wrapped, the text half of a larger one, or a model without a head, and each adds to the path or takes from
it. What is left must name a module of this model.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from amoeba_export.errors import DamagedFile, UnsupportedAdapter, WrongModel
from amoeba_export.load.wrappers import TEXT_STEPS

PREFIX = "base_model.model."

_WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", *TEXT_STEPS)
"""Steps of a path that are no part of this model: of torch.compile, of what trains on many devices, of a model that
also sees or hears."""

_LORA = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_(?:embedding_)?[AB]|lora_magnitude_vector)"
    r"(?:\.(?:(?P<expert>\d+)|default))?(?:\.weight)?"
)
_OWN = re.compile(
    r"(?P<module>.+?)(?P<from>\.base_layer|\.modules_to_save(?:\.default)?|\.original_module)?\.(?P<leaf>weight|bias)"
)
_PARTNERS = {
    "lora_A": ("lora_B",),
    "lora_B": ("lora_A",),
    "lora_embedding_A": ("lora_embedding_B",),
    "lora_embedding_B": ("lora_embedding_A",),
    "lora_magnitude_vector": ("lora_A", "lora_embedding_A"),
}

Parts = dict[tuple[str, int | None], str]
"""(part of `_PARTNERS`, expert or None) -> the name of the weight in the file."""


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """The weights of an adapter file, by what they are.

    Attributes:
        lora: Module -> its parts, each with at least an A and a B.
        own: Weight of the model -> the weight in the file that takes its place: `modules_to_save`, trained biases, the
            layer that LoRA was put on where peft saves it too, embeddings that were resized.
    """

    lora: dict[str, Parts] = field(default_factory=dict)
    own: dict[str, str] = field(default_factory=dict)


def sort_weights(names: Iterable[str], known: Collection[str], where: Path) -> AdapterWeights:
    """Say what every weight of an adapter file is.

    Args:
        names: In the file.
        known: Every weight that the model may have.
        where: The file.

    Raises:
        UnsupportedAdapter: A weight that is neither LoRA nor one of the model's.
        WrongModel: A module or weight that the model does not have.
        DamagedFile: An A without its B or the other way round, one thing twice, or nothing at all.
    """
    modules = {name.rpartition(".")[0] for name in known}
    found = AdapterWeights()
    spare = {}
    for name in names:
        path = _unwrapped(name)
        if match := _LORA.fullmatch(path):
            module = _module(match["module"], modules, name, where)
            key = (match["part"], int(match["expert"]) if match["expert"] else None)
            if other := found.lora.setdefault(module, {}).get(key):
                raise DamagedFile(where, f"{name} and {other} are the same weight")
            found.lora[module][key] = name
        elif (match := _OWN.fullmatch(path)) and "lora_" not in path:
            if match["from"] == ".original_module":
                continue  # what the module was before it was trained
            weight = f"{_module(match['module'], modules, name, where)}.{match['leaf']}"
            if weight not in known:
                raise WrongModel("The adapter", [f"it has {weight}, which this model does not have"], where=where)
            if match["from"] and "modules_to_save" in match["from"]:
                spare[weight] = name  # peft saves some twice, under both names
            elif other := found.own.get(weight):
                raise DamagedFile(where, f"{name} and {other} are the same weight")
            else:
                found.own[weight] = name
        else:
            raise UnsupportedAdapter(f"the weight {name}", where=where)
    for weight, name in spare.items():
        found.own.setdefault(weight, name)
    _check_whole(found, where)
    return found


def _unwrapped(name: str) -> str:
    return ".".join(step for step in name.split(".") if step not in _WRAPPERS)


def _module(path: str, modules: Collection[str], name: str, where: Path) -> str:
    for candidate in _candidates(path):
        if candidate in modules:
            return candidate
    path = path.removeprefix(PREFIX)
    raise WrongModel(
        "The adapter", [f"it changes {path}, which this model does not have (the weight {name})"], where=where
    )


def _candidates(path: str) -> Iterator[str]:
    """Where a module may be, by the class of the model that was trained: with a head, without one, with another one."""
    path = path.removeprefix(PREFIX)
    yield path
    yield f"model.{path}"
    while path.startswith(("model.", "base_model.")):
        path = path.partition(".")[2]
        yield path
        yield f"model.{path}"


def _check_whole(found: AdapterWeights, where: Path) -> None:
    for parts in found.lora.values():
        for (part, expert), name in parts.items():
            if not any((partner, expert) in parts for partner in _PARTNERS[part]):
                raise DamagedFile(where, f"{name} is there without its {_PARTNERS[part][0]}")
    if not found.lora and not found.own:
        raise DamagedFile(where, "it changes nothing")
