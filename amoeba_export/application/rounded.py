"""Integers chosen with data: made once for a model, a plan and a precision, kept, and found again by who verifies.

Values do not change how fast a model is, so this comes last: for the shape and the weights that are shipped, and for
the full model, where precisions are weighed.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from amoeba_export.application.request import ResolvedRequest
from amoeba_export.application.session import Session
from amoeba_export.artifact import Manifest
from amoeba_export.cache import Cache
from amoeba_export.cache.kinds import ROUNDED, ROUNDINGS
from amoeba_export.errors import InputError, NotFound, WrongModel
from amoeba_export.ir import SILENT, InputId, Progress, SubnetPlan, Supernet, TensorSpec
from amoeba_export.ir.rounded import RoundedWeights
from amoeba_export.load.rounded import CODES, OFFSETS, PACKED, STEPS, pack_codes, read_rounded, write_rounded
from amoeba_export.materialize import materialize_subnet
from amoeba_export.refit import OFF, Draw

ROUNDED_NAME = "rounded.safetensors"
ID_NAME = "id.json"

RECIPE = "fast"
"""Whose texts are used."""

TOKENS = 16384
"""Of them."""


def with_rounding(session: Session, plan: SubnetPlan) -> Session:
    """`session` with the integers of `plan`, chosen with data; without any where none are to be chosen.

    None are with `--rounding nearest`, in a precision or format that has none, where the texts of the recipe cannot be
    used, and where every matrix keeps a grid that it has.

    Raises:
        InputError: The plan or its refit does not belong to the model.
    """
    bare, container = dataclasses.replace(session, rounded=None), _container(session.settings, session.settings.dtype)
    if session.settings.request.rounding == "nearest" or container is None:
        return bare
    held = _made(_Wanted(session=bare, plan=plan, container=container, draw=session.draw(RECIPE, tokens=TOKENS)))
    return bare if held is None else dataclasses.replace(session, rounded=held)


def can_use_data(session: Session) -> bool:
    """Whether the session's dtype and formats have integers that data chooses, if it may."""
    return _container(session.settings, session.settings.dtype) is not None


def reads_texts(settings: ResolvedRequest) -> bool:
    """Whether anything is fitted, chosen or counted on texts, of which half are the user's."""
    request = settings.request
    if settings.refit != OFF or (request.vocab_keep is not None and request.vocab_keep.isdecimal()):
        return True
    return request.rounding != "nearest" and any(_container(settings, dtype) for dtype in settings.dtypes)


def _container(settings: ResolvedRequest, dtype: str | None) -> str | None:
    """Whose integers are chosen in a precision."""
    from amoeba_export.formats.rounding import container_with_data

    asked = settings.request.rounding == "data"
    return None if dtype is None else container_with_data(settings.formats, dtype, asked=asked)


def rounded_input(held: RoundedWeights) -> InputId:
    """What a manifest says of them among its inputs."""
    return InputId(role="rounding", id=f"{held.dtype}, recipe {held.settings.get('recipe')}", sha256=held.identity)


def holding_rounded(
    manifest: Manifest, plan: SubnetPlan, file: Path | None, cache: Cache, *, progress: Progress = SILENT
) -> RoundedWeights | None:
    """The integers that `manifest` names: from the file, or by their content from the cache; None where it names none.

    Raises:
        NotFound: Neither has them.
        WrongModel: They are of another model, plan or precision.
    """
    named = next((item for item in manifest.inputs if item.role == "rounding"), None)
    if named is None:
        return None
    held = read_rounded(file) if file else _found(cache, named.sha256, progress)
    if held is None or held.identity != named.sha256:
        raise NotFound(
            "The rounded weights that the artifact was made with",
            f"sha256 {named.sha256}",
            next_step="Say where they are with --rounding; the cache does not have them.",
        )
    model = next((item.sha256 for item in manifest.inputs if item.role == "model"), None)
    adapters = tuple(item.sha256 for item in manifest.inputs if item.role == "adapter")
    pairs = {
        "model": (held.model_id, model),
        "plan": (held.geometry, plan.geometry),
        "refit": (held.refit_id, plan.refit_id),
        "precision": (held.dtype, manifest.dtype),
        "list of adapters": (held.adapters, adapters),
    }
    if differences := [f"they are of another {what}" for what, (theirs, ours) in pairs.items() if theirs != ours]:
        raise WrongModel("The rounded weights", differences)
    return held


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wanted:
    """Integers that are looked up, or chosen: those of a plan, in the session's precision, for one container."""

    session: Session
    plan: SubnetPlan
    container: str
    draw: Draw

    @property
    def facts(self) -> dict[str, Any]:
        """What they are looked up by."""
        supernet, plan = self.session.supernet, self.plan
        strategy = supernet.strategy if plan.is_compensated(supernet.architecture) else None
        return {
            "model": supernet.identity,
            "adapters": _adapters(supernet),
            "strategy": strategy.identity if strategy else None,
            "plan": plan.geometry,
            "refit": plan.refit_id,
            "format": self.container,
            "dtype": self.session.dtype,
            **self.draw.facts,
        }


def _made(wanted: _Wanted) -> RoundedWeights | None:
    """From the cache, or made now. None where nothing is to be rounded."""
    cache, progress, facts = wanted.session.cache, wanted.session.progress, wanted.facts
    known = cache.get_json(ROUNDINGS, facts, ID_NAME, progress=progress)
    if known is not None:
        identity = known["sha256"]
        if identity is None:
            return None
        if (held := _found(cache, identity, progress)) is not None:
            return held
    held = _choose(wanted)
    cache.put_json(ROUNDINGS, facts, ID_NAME, {"sha256": held and held.identity}, again=True)
    return held


def _choose(wanted: _Wanted) -> RoundedWeights | None:
    from amoeba_export.formats.rounding import chosen_with_data
    from amoeba_export.refit.rounded_layer import RoundedLayer
    from amoeba_export.refit.rounding import round_with_data
    from amoeba_export.refit.scaled_cut import ScaledCut

    session, dtype = wanted.session, wanted.session.dtype
    subnet = materialize_subnet(session.supernet, wanted.plan)
    container = chosen_with_data(wanted.container)
    cut = ScaledCut(
        weights=lambda: container.scaled_layers(subnet, dtype),
        grid_of=lambda name, weight: container.grid_of(name, weight, subnet, dtype),
        head_grid=lambda weight: container.head_grid(weight, dtype),
    )
    head = subnet.family.weight(session.architecture.logits_role)
    if not cut.has_choice(lambda: next(weight for name, weight in subnet.stream() if name == head)):
        return None
    made: list[RoundedWeights] = []

    def take(layers: Iterator[RoundedLayer]) -> None:
        made.append(_stored(wanted, layers))

    try:
        round_with_data(
            session.supernet,
            wanted.plan,
            cut,
            wanted.draw,
            take=take,
            identity={"facts": wanted.facts},
            host=session.host,
        )
    except InputError as error:
        if session.settings.request.rounding is not None:
            raise
        session.progress.note(f"The weights are rounded to nearest, without data. {error.what}")
        return None
    return made[0]


def _stored(wanted: _Wanted, layers: Iterator[Any]) -> RoundedWeights:
    """Into a file of the cache, by its content."""
    session, plan, supernet = wanted.session, wanted.plan, wanted.session.supernet
    with tempfile.TemporaryDirectory(prefix="amoeba-rounded-") as scratch:
        parts = Path(scratch) / "parts"
        parts.mkdir()
        specs, odd, packed, block_size = _spread(layers, parts)
        facts = {
            "geometry": plan.geometry,
            "model_id": supernet.identity,
            "adapters": _adapters(supernet),
            "refit_id": plan.refit_id,
            "format": wanted.container,
            "dtype": session.dtype,
            "block_size": block_size,
            "settings": {**wanted.draw.settings, "odd": odd, "packed": packed},
        }
        path = Path(scratch) / ROUNDED_NAME
        tensors = ((spec.name, torch.load(parts / f"{i}.pt", weights_only=True)) for i, spec in enumerate(specs))
        held = write_rounded(path, facts, specs, tensors)

        def move(folder: Path) -> None:
            shutil.copyfile(path, folder / ROUNDED_NAME)

        entry = session.cache.put(ROUNDED, {"sha256": held.identity}, move)
    return read_rounded(entry / ROUNDED_NAME)


def _spread(layers: Iterator[Any], folder: Path) -> tuple[list[TensorSpec], list[str], dict[str, dict[str, int]], int]:
    """Every tensor of the file on disk by its place, since a header comes first.

    Returns:
        Specs; the matrices of an odd number of columns; kind and columns of those in a type of GGUF; the block size.
    """
    from amoeba_export.refit.gptq import RoundedBlocks

    packed: dict[str, dict[str, int]] = {}
    specs: list[TensorSpec] = []
    odd: list[str] = []
    block_size = 0

    def put(name: str, tensor: torch.Tensor) -> None:
        torch.save(tensor, folder / f"{len(specs)}.pt")
        specs.append(TensorSpec(name=name, shape=tuple(tensor.shape), dtype=tensor.dtype))

    for layer in layers:
        for name, vector in sorted(layer.others.items()):  # a file is known by its bytes
            put(name, vector.float())
        for name, rounded in sorted(layer.matrices.items()):
            if isinstance(rounded, RoundedBlocks):
                packed[name] = {"kind": rounded.kind, "columns": rounded.values_OC.shape[1]}
                put(name + PACKED, rounded.packed_ON)
                continue
            block_size = rounded.grid.block_size
            odd += [name] if rounded.codes_OC.shape[1] % 2 else []
            put(name + CODES, pack_codes(rounded.codes_OC))
            put(name + STEPS, rounded.steps_OG)
            if rounded.grid.has_offsets:
                put(name + OFFSETS, rounded.offsets_OG)
    return specs, odd, packed, block_size


def _adapters(supernet: Supernet) -> list[str]:
    return [item.sha256 for item in supernet.inputs if item.role == "adapter"]


def _found(cache: Cache, identity: str, progress: Progress) -> RoundedWeights | None:
    folder = cache.get(ROUNDED, {"sha256": identity}, progress=progress)
    return None if folder is None else read_rounded(folder / ROUNDED_NAME)
