"""Every kind of cache entry, and the versions of what makes it.

`Cache` takes a `Kind` and nothing else, so no entry can be kept without a version. Raise the version of an algorithm in
the commit that makes equal inputs give another result: whatever was made by it is then not found any more.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Algorithm:
    """Something whose results are kept."""

    name: str
    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One kind of entry.

    Attributes:
        name: Its folder in the cache.
        made_by: What decides the content besides the facts that an entry is looked up by.
        is_large: Its files are hashed again only when size, times or inode of a file are not those of the last time.
    """

    name: str
    made_by: tuple[Algorithm, ...]
    is_large: bool = False

    @property
    def versions(self) -> dict[str, int]:
        """What a key says of them."""
        return {algorithm.name: algorithm.version for algorithm in self.made_by}


_HASHING = Algorithm(name="hashing", version=1)
_UNPACKING = Algorithm(name="unpacking", version=3)
_CALIBRATION = Algorithm(name="calibration", version=3)
_WRITING = Algorithm(name="writing", version=3)
"""The format writers: graphs, quantization, equalization."""
_COMPARING = Algorithm(name="comparing", version=5)
REFITTING = Algorithm(name="refitting", version=4)
HEALING = Algorithm(name="healing", version=4)
CHOOSING_INTEGERS = Algorithm(name="choosing integers", version=7)
_MEASURING = Algorithm(name="measuring", version=2)
_WEIGHING = Algorithm(name="weighing", version=1)
"""What cuts are worth once they are refitted and healed."""
_FITTING = Algorithm(name="fitting", version=1)
_REFINING = Algorithm(name="refining", version=1)

DIGESTS = Kind(name="sha256", made_by=(_HASHING,))
"""sha256 of a file, by its path, size, times and inode."""

MODELS = Kind(name="models", made_by=(_UNPACKING,), is_large=True)
"""GGUF files as model folders."""

CALIBRATION = Kind(name="calibration", made_by=(_CALIBRATION,), is_large=True)
"""Work in progress of a calibration; each of its files is sealed by itself."""

STRATEGIES = Kind(name="strategies", made_by=(_CALIBRATION,))
"""Strategies of a model, by recipe and seed."""

ROUNDING = Kind(name="rounding", made_by=(_WRITING, _COMPARING))
"""What a dtype costs a model in quality."""

COST_TABLES = Kind(name="cost-tables", made_by=(_WRITING, _MEASURING, _FITTING))
"""What was measured of a model on a device."""

REFINED_TABLES = Kind(name="refined-tables", made_by=(_WRITING, _MEASURING, _FITTING, _REFINING))
"""Cost tables with what was measured since."""

FULL_MODELS = Kind(name="full-models", made_by=(_WRITING, _MEASURING))
"""Latencies of an uncut model on a device in each precision, of one run."""

FRONTIERS = Kind(
    name="frontiers",
    made_by=(_CALIBRATION, REFITTING, _WEIGHING, CHOOSING_INTEGERS, _WRITING, _COMPARING, _MEASURING, _FITTING),
)
"""What can be had of a model on a device, and the plan of every numbered choice."""

REFITS = Kind(name="refits", made_by=(REFITTING, HEALING), is_large=True)
"""Refits and healed weights, by the sha256 of the file."""

RECOVERIES = Kind(name="recoveries", made_by=(REFITTING, HEALING))
"""Which refit came of a model, a plan, a recipe and a seed."""

PACES = Kind(name="paces", made_by=(Algorithm(name="pacing", version=1),))
"""How long some work took the last time."""

ROUNDED = Kind(name="rounded", made_by=(CHOOSING_INTEGERS, _WRITING), is_large=True)
"""Integers chosen with data, by the sha256 of the file."""

ROUNDINGS = Kind(name="roundings", made_by=(CHOOSING_INTEGERS, _WRITING))
"""Which integers came of a model, a plan, a dtype, a recipe and a seed."""

ARTIFACT = (_UNPACKING, _CALIBRATION, REFITTING, HEALING, CHOOSING_INTEGERS, _WRITING)
"""What decides the files of an artifact besides its inputs and what was measured: a build makes an older one again."""

KINDS = (
    DIGESTS,
    MODELS,
    CALIBRATION,
    STRATEGIES,
    ROUNDING,
    FULL_MODELS,
    COST_TABLES,
    REFINED_TABLES,
    FRONTIERS,
    REFITS,
    RECOVERIES,
    PACES,
    ROUNDED,
    ROUNDINGS,
)
