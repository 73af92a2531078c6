"""What an entry is made from, by content, without torch: a build with nothing to do is over before torch is loaded."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from amoeba_export.application.request import ExportRequest
from amoeba_export.application.resolve import DEFAULT_REFIT, heal_of, is_refit_file, refit_of
from amoeba_export.artifact import MANIFEST_NAME, read_manifest, tool_versions
from amoeba_export.backends.targets import read_target
from amoeba_export.builds.entry import Entry, LockedEntry
from amoeba_export.cache import Cache, canonical_key
from amoeba_export.cache.kinds import ARTIFACT
from amoeba_export.calibrate.recipe import load_recipe
from amoeba_export.errors import InputError
from amoeba_export.ir import InputId, Target
from amoeba_export.load.demo import demo_gguf
from amoeba_export.load.identity import file_sha256
from amoeba_export.load.locate import locate_model
from amoeba_export.reading import as_json
from amoeba_export.refit import HEAL_RECIPE, OFF, SHORTLIST_RECIPE, load_refit_recipe

FORMAT = 1
"""Raise it when the same inputs give another artifact than before, and no algorithm of `ARTIFACT` is another."""

_NOT_CONTENT = (
    "model",
    "target",
    "strategy",
    "recipe",
    "refit",
    "calibration_data",
    "adapters",
    "vocab_keep",
    "plan",
    "out",
    "force",
    "dry_run",
)
"""Settings that name files: their content counts, not what they are called. And where the result goes."""


def entry_inputs(entry: Entry, cache: Cache) -> tuple[InputId, ...]:
    """Model, adapters, strategy or recipe, refit, texts, vocabulary, plan, target and settings of an entry.

    Raises:
        InputError: One of them is not there.
    """
    request = entry.request
    found = [InputId(role="model", id=Path(request.model).name, sha256=_model_digest(request.model, cache))]
    for adapter in request.adapters:
        found.append(InputId(role="adapter", id=adapter.name, sha256=_files_digest(_files_in(adapter), cache)))
    if request.strategy is not None:
        sha256 = file_sha256(request.strategy, cache_dir=cache.root)
        found.append(InputId(role="strategy", id=request.strategy.name, sha256=sha256))
    else:
        sha256 = load_recipe(request.recipe).identity
        found.append(InputId(role="recipe", id=f"{Path(request.recipe).stem}, seed {request.seed}", sha256=sha256))
    found += _recovery_inputs(request, cache)
    for text in request.calibration_data:  # of refits, of integers, of a vocabulary
        found.append(InputId(role="text", id=text.name, sha256=file_sha256(text, cache_dir=cache.root)))
    if request.vocab_keep is not None:
        found.append(_vocabulary_input(request, cache))
    if request.plan is not None:
        plan = request.plan / "plan.json" if request.plan.is_dir() else request.plan
        found.append(InputId(role="plan", id=plan.name, sha256=file_sha256(plan, cache_dir=cache.root)))
    if request.target is not None:
        target = read_target(request.target)
        found.append(InputId(role="target", id=target.name, sha256=_target_digest(target, cache)))
    settings = {key: value for key, value in _plain(request).items() if key not in _NOT_CONTENT}
    settings["quality_floor"] = entry.quality_floor
    found.append(InputId(role="settings", id=entry.name, sha256=_digest(settings)))
    return tuple(found)


def _vocabulary_input(request: ExportRequest, cache: Cache) -> InputId:
    """The file, or the number of tokens and the recipe in whose texts they are counted."""
    text = request.vocab_keep or ""
    if not text.isdecimal():
        return InputId(role="vocabulary", id=Path(text).name, sha256=file_sha256(Path(text), cache_dir=cache.root))
    recipe = load_refit_recipe(DEFAULT_REFIT).identity
    return InputId(role="vocabulary", id=f"{text} tokens", sha256=_digest({"tokens": int(text), "texts": recipe}))


def _recovery_inputs(request: ExportRequest, cache: Cache) -> list[InputId]:
    """The recipes of refit and healing, or the refit file."""
    refit = refit_of(request)
    if refit == OFF:
        return []
    if is_refit_file(refit):
        return [InputId(role="refit", id=Path(refit).name, sha256=file_sha256(Path(refit), cache_dir=cache.root))]
    is_search = request.shape is None and request.plan is None
    heals = heal_of(request) is not None
    names = dict.fromkeys([refit, *([SHORTLIST_RECIPE] if is_search else []), *([HEAL_RECIPE] if heals else [])])
    return [InputId(role="refit", id=name, sha256=load_refit_recipe(name).identity) for name in names]


def fingerprint(inputs: Iterable[InputId]) -> str:
    """Content address of an artifact: its inputs, and the versions of what computes it."""
    by_content = [[one.role, one.sha256] for one in inputs]
    made_by = {algorithm.name: algorithm.version for algorithm in ARTIFACT}
    return _digest({"format": FORMAT, "made_by": made_by, "inputs": by_content, "tool": tool_versions()})


def changed_inputs(locked: LockedEntry, inputs: Iterable[InputId]) -> list[str]:
    """Which inputs are not what they were, in words."""
    before, now = _by_role(locked.inputs), _by_role(inputs)
    changes = []
    for role in dict.fromkeys((*before, *now)):
        if before.get(role) == now.get(role):
            continue
        if role not in now:
            changes.append(f"the {role} is gone")
        elif role not in before:
            changes.append(f"a {role} was added")
        elif [sha256 for _, sha256 in before[role]] != [sha256 for _, sha256 in now[role]]:
            names = ", ".join(dict.fromkeys(name for name, _ in now[role]))
            what = f"the {role}s are" if len(now[role]) > 1 else f"the {role} '{names}' is"
            changes.append("the settings in amoeba.toml are others" if role == "settings" else f"{what} another one")
    return changes


def is_up_to_date(entry: Entry, locked: LockedEntry | None, key: str, cache: Cache) -> bool:
    """Whether the artifact that the lock tells of is there, made from the same things, with every byte of it.

    Digests are remembered for as long as a file stays as it is, so that gigabytes are hashed once.
    """
    if locked is None or locked.fingerprint != key:
        return False
    try:
        listed = {file.path: file.sha256 for file in read_manifest(entry.out).files}
    except InputError:  # not there, or spoiled: both mean that it must be built
        return False
    present = {path.relative_to(entry.out).as_posix(): path for path in entry.out.rglob("*") if path.is_file()}
    present.pop(MANIFEST_NAME)
    return (
        listed.items() >= locked.files.items()
        and present.keys() == listed.keys()
        and all(file_sha256(path, cache_dir=cache.root) == listed[name] for name, path in present.items())
    )


def _by_role(inputs: Iterable[InputId]) -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {}
    for one in inputs:
        found.setdefault(one.role, []).append((one.id, one.sha256))
    return found


def _model_digest(model: str, cache: Cache) -> str:
    if model == "demo":
        return file_sha256(demo_gguf(), cache_dir=cache.root)
    if Path(model).is_file():
        return file_sha256(Path(model), cache_dir=cache.root)
    _, folder = locate_model(model, cache_dir=cache.root)
    return _files_digest(_files_in(folder), cache)


def _target_digest(target: Target, cache: Cache) -> str:
    """A target is what its file says; a recorded one, what its table says too."""
    facts = _plain(target)
    table = Path(str(target.options.get("table", "")))
    if target.backend == "recorded" and table.is_file():
        facts["options"] = {**target.options, "table": file_sha256(table, cache_dir=cache.root)}
    return _digest(facts)


def _files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))


def _files_digest(files: Iterable[Path], cache: Cache) -> str:
    return _digest({path.name: file_sha256(path, cache_dir=cache.root) for path in files})


def _plain(record: Any) -> dict[str, Any]:
    """A dataclass as what JSON can hold."""
    return dict(as_json(dataclasses.asdict(record), default=str))


def _digest(facts: dict[str, Any]) -> str:
    return hashlib.sha256(canonical_key(facts).encode()).hexdigest()
