"""The engine of one machine: shared work first, then the entries together, in this process."""

from __future__ import annotations

from collections.abc import Sequence

from amoeba_export.builds.engines import Done
from amoeba_export.builds.entry import BuildWork, EntryResult
from amoeba_export.builds.work import failed, run_calibration, run_cost_table, run_entries
from amoeba_export.errors import AmoebaError
from amoeba_export.ir import Progress


def make_engine(jobs: int) -> LocalEngine:
    """See `engines.ENGINES`."""
    return LocalEngine(jobs)


class LocalEngine:
    """See `engines.Engine`. `jobs` artifacts are verified at once. What measures does so alone, undisturbed."""

    def __init__(self, jobs: int) -> None:
        self._jobs = jobs

    def run(self, work: BuildWork, *, done: Done, progress: Progress) -> Sequence[EntryResult]:
        """See `Engine`."""
        broken: dict[str, AmoebaError] = {}
        for calibration in work.calibrations:
            try:
                run_calibration(calibration, progress=progress)
            except AmoebaError as error:
                broken[calibration.key] = error
        for table in work.cost_tables:
            if table.after in broken:
                broken[table.key] = broken[table.after]
                continue
            try:
                run_cost_table(table, progress=progress)
            except AmoebaError as error:
                broken[table.key] = error
        results: dict[str, EntryResult] = {}
        able = []
        for task in work.entries:
            reason = next((broken[key] for key in task.after if key in broken), None)
            if reason is None:
                able.append(task)
            else:
                results[task.entry.name] = failed(task, reason)
                done(results[task.entry.name])
        for result in run_entries(able, jobs=self._jobs, done=done, progress=progress):
            results[result.outcome.name] = result
        return [results[task.entry.name] for task in work.entries]
