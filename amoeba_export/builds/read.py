"""Read `amoeba.toml`: every mistake at once, each with its line and what to write instead.

Long on purpose: one reader that goes through the file once and remembers all that is wrong.
"""

from __future__ import annotations

import copy
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from amoeba_export.application.request import ExportRequest
from amoeba_export.application.resolve import check_refit, check_vocabulary, is_refit_file, read_heal, read_plan
from amoeba_export.backends.targets import read_target
from amoeba_export.builds.config import BuildEntry, BuildFile, ModelTable, Shared
from amoeba_export.builds.entry import Entry
from amoeba_export.builds.explained import choices, explained, remove, sentence, table_at
from amoeba_export.builds.positions import Path as Place
from amoeba_export.builds.positions import key_lines, line_of, line_of_error
from amoeba_export.errors import AmoebaError, BadConfig, NotFound, nearest
from amoeba_export.ir import Budget, Shape
from amoeba_export.ir.latency import parse_megabytes
from amoeba_export.locations import data_dir
from amoeba_export.reading import parse_toml

SIZES = ("latency", "throughput", "shape", "plan")


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildConfig:
    """A checked amoeba.toml. Paths are absolute."""

    path: Path
    model: str
    out: Path
    entries: tuple[Entry, ...]

    @property
    def base(self) -> Path:
        """The folder that its relative paths start from."""
        return self.path.parent

    @property
    def lock(self) -> Path:
        """The lock that belongs to it: amoeba.lock beside amoeba.toml."""
        return self.path.with_suffix(".lock")


def read_config(path: Path) -> BuildConfig:
    """Read and check the file, with everything it names.

    Raises:
        NotFound: There is no such file.
        BadConfig: It has mistakes; all are listed.
    """
    path = path.resolve()
    reader = _Reader(path)
    file = reader.validated()
    model = reader.model(file.model)
    entries = [reader.entry(file, position, model) for position in range(len(file.build))]
    if not file.build and not reader.is_spoiled("build"):
        reader.add((), "there is no [[build]] entry", "Write one: a [[build]] line, and below it name, target, latency")
    reader.check_unique(entries)
    reader.finish()
    return BuildConfig(path=path, model=model, out=path.parent / file.out, entries=tuple(entries))


def read_model(path: Path) -> str:
    """The model of an amoeba.toml, for commands that build nothing: its other keys are checked for their kind alone.

    Raises `NotFound`, `BadConfig`.
    """
    reader = _Reader(path)
    model = reader.model(reader.validated().model, relative=True)
    reader.finish()
    return model


class _Reader:
    """One file being read, and its problems so far."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise NotFound("The build file", path, next_step="'amoeba init' writes one.")
        self._path = path
        self._problems: list[tuple[int, str, str]] = []
        self._spoiled: set[Place] = set()
        self._targets: set[str] = set()
        try:
            text = path.read_text(encoding="utf-8")
            self._data = parse_toml(text)
        except UnicodeDecodeError as error:
            line = path.read_bytes()[: error.start].count(b"\n") + 1
            raise BadConfig(path, [(line, "this is not UTF-8 text", "Save the file as UTF-8")]) from error
        except tomllib.TOMLDecodeError as error:
            line = line_of_error(error, text)
            reason = str(error).partition(" (at ")[0]
            raise BadConfig(path, [(line, f"this is not TOML: {reason}", "Correct the line")]) from error
        except ValueError as error:
            raise BadConfig(path, [(1, f"this file cannot be read: {error}", "Correct the value")]) from error
        self._lines = key_lines(text)

    def add(self, place: Place, what: str, fix: str) -> None:
        """Remember a problem."""
        self._problems.append((line_of(place, self._lines), what, fix))

    def is_spoiled(self, table: str) -> bool:
        """Whether a problem was found in it."""
        return any(place[:1] == (table,) for place in self._spoiled)

    def finish(self) -> None:
        """Raise `BadConfig` when there was a problem."""
        if self._problems:
            raise BadConfig(self._path, sorted(set(self._problems)))

    def validated(self) -> BuildFile:
        """The file as its model. What has the wrong kind is remembered and left out, so that the rest is checked too.

        Raises:
            BadConfig: Nothing can be made of it.
        """
        data = copy.deepcopy(self._data)
        while True:
            try:
                return BuildFile.model_validate(data)
            except ValidationError as error:
                for detail in error.errors():
                    place = detail["loc"]
                    self.add(place, *explained(detail, place))
                    self._spoiled.add(place[:2])
                    if len(place) > 1 and detail["type"] == "missing":
                        table_at(data, place[:-1])[place[-1]] = f"build-{place[1]}"
                    elif not place or table_at(data, ()).get(place[0]) is None:
                        self.finish()
                    else:
                        remove(data, place)

    def model(self, table: ModelTable | None, *, relative: bool = False) -> str:
        """What `load_supernet` takes; `relative` leaves a path as it is, to be looked for by who loads it."""
        if table is None:
            return "demo"
        if (table.path is None) == (table.id is None):
            if self.is_spoiled("model"):
                return "demo"
            self.add(("model",), "[model] must name one model", 'Write either path = "folder" or id = "org/name"')
            return "demo"
        if table.id is not None:
            return table.id
        assert table.path is not None
        if relative:
            return table.path
        self._exists(("model", "path"), table.path)
        return str(self._at(table.path))

    def entry(self, file: BuildFile, position: int, model: str) -> Entry:
        """The entry with what it inherits, checked."""
        own = file.build[position]
        place: Place = ("build", position)

        def where(key: str) -> Place:
            return (*place, key) if key in own.model_fields_set else ("defaults", key)

        values = {
            key: getattr(own if key in own.model_fields_set else file.defaults, key) for key in Shared.model_fields
        }
        self._check_sizes(own, place)
        target, workload = values["target"], values["workload"] or file.workload
        if target is not None:
            if target.endswith(".toml"):
                target = str(self._at(target))
            self._attempt(where("target"), lambda: self._target(target))
        elif (own.latency or own.throughput or values["memory"]) and place not in self._spoiled:
            self.add(place, f"build '{own.name}' limits a latency and has no target", 'Add target = "NAME"')
        self._check_inherited(values, where)
        if own.plan is not None and self._exists((*place, "plan"), own.plan):
            self._attempt((*place, "plan"), lambda: read_plan(self._at(own.plan or "")))
        recipe, refit = values["recipe"], values["refit"]
        request = ExportRequest(
            model=model,
            target=target,
            latency=own.latency,
            throughput=own.throughput,
            memory=values["memory"],
            metric=values["metric"],
            percentile=values["percentile"],
            prompt_tokens=workload.prompt_tokens,
            generate_tokens=workload.generate_tokens,
            batch=workload.batch,
            strategy=self._at(values["strategy"]) if values["strategy"] else None,
            recipe=str(self._at(recipe)) if recipe.endswith(".toml") else recipe,
            seed=values["seed"],
            refit=str(self._at(refit)) if refit and is_refit_file(refit) else refit,
            heal=values["heal"],
            calibration_data=tuple(map(self._at, values["calibration_data"])),
            vocab_keep=self._vocabulary(values["vocab_keep"]),
            adapters=tuple(map(self._at, values["adapters"])),
            shape=own.shape,
            plan=self._at(own.plan) if own.plan else None,
            policy=values["policy"],
            formats=values["formats"],
            dtype=values["dtype"],
            require_measured=values["require_measured"],
            out=self._at(own.out or f"{file.out}/{own.name}"),
            force=True,
        )
        return Entry(
            name=own.name,
            request=request,
            quality_floor=values["quality_floor"],
            line=line_of(place, self._lines),
        )

    def check_unique(self, entries: list[Entry]) -> None:
        """Refuse two entries with one name, or one inside the folder of another."""
        names: dict[str, Entry] = {}
        folders: dict[Path, Entry] = {}
        above: dict[Path, Entry] = {}  # folders that hold one
        for position, entry in enumerate(entries):
            inside = [folders[folder] for folder in (entry.out, *entry.out.parents) if folder in folders]
            holding = [above[entry.out]] if entry.out in above else []
            if same := names.get(entry.name):
                fix = f"Give one of them another name; the first is on line {same.line}"
                self.add(("build", position, "name"), f"there are two builds named '{entry.name}'", fix)
            elif found := inside + holding:
                what = f"build '{entry.name}' would be written into the folder of '{found[0].name}'"
                self.add(("build", position, "out"), what, 'Give it a folder of its own: out = "FOLDER"')
            names.setdefault(entry.name, entry)
            folders.setdefault(entry.out, entry)
            for folder in entry.out.parents:
                above.setdefault(folder, entry)

    def _check_inherited(self, values: Mapping[str, Any], where: Callable[[str], Place]) -> None:
        """Check what an entry may have from `[defaults]`; `where` says where a key stands."""
        for key in ("strategy", "recipe"):
            if values[key] is not None and (key == "strategy" or values[key].endswith(".toml")):
                self._exists(where(key), values[key])
        recipes = _shipped_recipes()
        if not values["recipe"].endswith(".toml") and values["recipe"] not in recipes:
            hint = nearest(values["recipe"], recipes)
            self.add(where("recipe"), f"there is no recipe named '{values['recipe']}'.{hint}", choices(recipes))
        for key in ("adapters", "calibration_data"):
            for path in values[key]:
                self._exists(where(key), path)
        checks: dict[str, Callable[[str], object]] = {
            "vocab_keep": lambda text: check_vocabulary(self._vocabulary(text) or text),
            "heal": read_heal,
            "refit": check_refit,
            "memory": parse_megabytes,
        }
        for key, check in checks.items():
            if (given := values[key]) is not None:
                self._attempt(where(key), partial(check, given))

    def _check_sizes(self, own: BuildEntry, place: Place) -> None:
        given = [key for key in SIZES if getattr(own, key) is not None]
        if not given and place not in self._spoiled:
            what = f"nothing says how small build '{own.name}' should be"
            self.add(place, what, 'Add latency = "80%" (or "50ms"), throughput, shape or plan')
        if len({*given} & {"shape", "plan"}) == 2:
            self.add((*place, "plan"), f"build '{own.name}' has both shape and plan", "Remove one of them")
        elif len({*given} & {"latency", "throughput"}) == 2:
            self.add(
                (*place, "throughput"), f"build '{own.name}' has both latency and throughput", "Remove one of them"
            )
        if (latency := own.latency) is not None:
            for text in latency.split(","):
                self._attempt((*place, "latency"), lambda text=text: Budget.parse(text.rpartition("=")[2]))  # type: ignore[misc]
        if (throughput := own.throughput) is not None:
            self._attempt((*place, "throughput"), lambda: Budget.parse_throughput(throughput))
        if (shape := own.shape) is not None:
            self._attempt((*place, "shape"), lambda: Shape.parse(shape))

    def _vocabulary(self, given: str | None) -> str | None:
        return given if given is None or given.isdecimal() else str(self._at(given))

    def _target(self, name: str) -> None:
        """Read a target once, however many entries name it. Raises as `read_target`."""
        if name not in self._targets:
            read_target(name)
            self._targets.add(name)

    def _attempt(self, place: Place, read: Callable[[], Any]) -> None:
        try:
            read()
        except AmoebaError as error:
            self.add(place, sentence(error.what), (error.next_step or "Correct it").rstrip("."))

    def _exists(self, place: Place, text: str) -> bool:
        if self._at(text).exists():
            return True
        key = place[-1] if isinstance(place[-1], str) else place[-2]
        self.add(place, f"{key} = '{text}' is not there", "Paths start from the folder of this file; correct it")
        return False

    def _at(self, text: str) -> Path:
        """A path of the file, from the file's own folder."""
        return self._path.parent / Path(text).expanduser()


@cache
def _shipped_recipes() -> frozenset[str]:
    return frozenset(recipe.stem for recipe in data_dir("calibration").glob("*.toml"))
