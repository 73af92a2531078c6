"""Who does the work of a build. An engine gets the units and says where and when each of them runs.

Every unit is a frozen dataclass that pickles, and is idempotent: a calibration or cost table that is in the cache is
taken from there, and an artifact appears in one rename. A unit that was killed is run again as it is.

What runs a unit is in `work`: `run_calibration`, `run_cost_table` (both return a `Product`, which `install` puts into
the cache of another machine) and `run_entries`, which does not raise for an entry that fails: its outcome says so. An
artifact is written to `entry.out`, which must be a place that the machine with the result can read.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Protocol, cast

from amoeba_export.builds.entry import BuildWork, EntryResult
from amoeba_export.errors import UnknownName
from amoeba_export.ir import Progress

ENGINES = {"local": "amoeba_export.builds.local_engine", "ray": "amoeba_export.builds.ray_engine"}
"""Each is a module with `make_engine(jobs: int) -> Engine`, imported when it is chosen."""

Done = Callable[[EntryResult], None]


class Engine(Protocol):
    """Runs the units of one build."""

    def run(self, work: BuildWork, *, done: Done, progress: Progress) -> Sequence[EntryResult]:
        """Do all of `work`, and return a result for every entry of it, in its order.

        Shared work that fails fails the entries that need it (`after`), and no others. `done` is called in the calling
        thread or process as soon as an entry has its result, so that an interrupted build keeps what it finished.

        Raises:
            TargetError: The engine itself cannot be used. Nothing was done.
            KeyboardInterrupt: After everything that was running has been cancelled.
        """


def find_engine(name: str, *, jobs: int) -> Engine:
    """The engine called `name`. Raises `UnknownName`, and what its module raises where its extra is missing."""
    if name not in ENGINES:
        raise UnknownName("engine", name, ENGINES)
    return cast(Engine, importlib.import_module(ENGINES[name]).make_engine(jobs))
