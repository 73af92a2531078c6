"""A model with weights that an adapter brings whole: replaced ones, a vocabulary of another size, a head of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from amoeba_export.errors import WrongModel
from amoeba_export.ir import Architecture, Family, Progress, Supernet, TensorSource
from amoeba_export.load.adapter_names import AdapterWeights
from amoeba_export.load.families import expected_weights
from amoeba_export.load.family_file import read_family


class Replaced:
    """A `TensorSource` in which some weights are those of another one.

    Dtypes are those of the model, which decide what an artifact is written in. What is read is as it was trained.
    """

    def __init__(
        self,
        base: TensorSource,
        own: TensorSource,
        names: Mapping[str, str],
        copies: Mapping[str, str],
        *,
        embedding: str,
    ) -> None:
        """`names`: weight -> its name in `own`. `copies`: weight -> the weight of `base` that it starts from."""
        self._base, self._own, self._embedding = base, own, embedding
        self._names, self._copies = dict(names), dict(copies)

    def names(self) -> Collection[str]:
        """Every weight there is."""
        return {*self._base.names(), *self._names, *self._copies}

    def shape(self, name: str) -> tuple[int, ...]:
        """From the header alone."""
        if name in self._names:
            return self._own.shape(self._names[name])
        return self._base.shape(self._copies.get(name, name))

    def dtype(self, name: str) -> torch.dtype:
        """Of the model's weight that it stands for."""
        return self._base.dtype(name if name in self._base.names() else self._embedding)

    def read(self, name: str) -> torch.Tensor:
        """The whole weight. Raises `DamagedFile`, `NonFiniteWeights`."""
        if name in self._names:
            return self._own.read(self._names[name])
        return self._base.read(self._copies.get(name, name))


def possible_weights(family: Family, architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Name -> shape of what an adapter may bring: every weight of the model, and a head where it is tied."""
    return expected_weights(family, dataclasses.replace(architecture, tied_embeddings=False))


def with_own_weights(
    supernet: Supernet, weights: AdapterWeights, source: TensorSource, *, where: Path, progress: Progress
) -> Supernet:
    """`supernet` with the weights of an adapter that take the place of its own. What is LoRA is not applied.

    A head that is tied to the embedding stays so when both are replaced by the same weight. Where they part (one of
    them is trained, or has LoRA), the model has a head of its own from then on: that is the function that was trained.
    peft's `merge_and_unload` changes both when LoRA of either is merged, and warns of it.

    Raises:
        WrongModel: A weight of another shape; embedding and head with vocabularies of different sizes.
    """
    own, architecture = dict(weights.own), supernet.architecture
    head, embedding = supernet.family.weight("head"), supernet.family.weight("embedding")
    sizes = {name: source.shape(own[name])[0] for name in (embedding, head) if name in own}
    resized = any(size != architecture.vocab_size for size in sizes.values())
    if resized:
        if architecture.tied_embeddings and embedding not in own:
            own[embedding] = own.pop(head)  # one of two names of one weight
        architecture = _with(architecture, vocab_size=source.shape(own.get(embedding, own.get(head, "")))[0])
    copies: dict[str, str] = {}
    if architecture.tied_embeddings:
        # The embedding that the head was tied to: the model's, unless the adapter brings the one it was trained on.
        is_base = embedding in own and (resized or ".base_layer." in own[embedding])
        if _has_lora(weights, embedding, head) or _differ(supernet, own, source, is_base=is_base):
            if head not in own:
                own |= {head: own[embedding]} if is_base else {}
                copies |= {} if is_base else {head: embedding}
            architecture = _with(architecture, tied_embeddings=False)
            progress.note(
                f"The adapter {where.parent.name} parts the head of {supernet.name} from its embedding, to which it "
                "was tied."
            )
        else:
            own.pop(head, None)
    _check_shapes(expected_weights(supernet.family, architecture), own, copies, supernet.tensors, source, where)
    if not own and not copies:
        return supernet
    tensors = Replaced(supernet.tensors, source, own, copies, embedding=embedding)
    return dataclasses.replace(supernet, architecture=architecture, tensors=tensors, bare=supernet.bare or supernet)


def _with(architecture: Architecture, **fields: Any) -> Architecture:
    """Other dims, in the config that they were read from too."""
    file = read_family(architecture.family)
    config = {**architecture.config, **{str(file.key(field)): value for field, value in fields.items()}}
    return dataclasses.replace(architecture, config=config, **fields)


def _has_lora(weights: AdapterWeights, *names: str) -> bool:
    return any(name.rpartition(".")[0] in weights.lora for name in names)


def _differ(supernet: Supernet, own: Mapping[str, str], source: TensorSource, *, is_base: bool) -> bool:
    """Whether what an adapter brings for a tied head and its embedding is two weights."""
    head, embedding = supernet.family.weight("head"), supernet.family.weight("embedding")
    if head not in own and (is_base or embedding not in own):
        return False
    one, other = (
        source.read(own[name]) if name in own else supernet.tensors.read(embedding) for name in (embedding, head)
    )
    return one.shape != other.shape or not torch.equal(one.to(torch.float32), other.to(torch.float32))


def _check_shapes(
    expected: Mapping[str, tuple[int, ...]],
    own: Mapping[str, str],
    copies: Mapping[str, str],
    base: TensorSource,
    source: TensorSource,
    where: Path,
) -> None:
    differences = []
    for name, shape in expected.items():
        found = source.shape(own[name]) if name in own else base.shape(copies.get(name, name))
        if found != shape:
            origin = own.get(name, f"{name} of the model")
            differences.append(f"{origin} has shape {list(found)}, this model needs {list(shape)}")
    if differences:
        raise WrongModel("The adapter", differences[:4], where=where)
