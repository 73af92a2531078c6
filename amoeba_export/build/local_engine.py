"""The engine of one machine: shared work first, then the entries together, in this process."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed

from amoeba_export.build.engines import Done
from amoeba_export.build.entry import BuildWork, EntryResult, EntryTask
from amoeba_export.build.work import failed, run_calibration, run_cost_table, run_entries
from amoeba_export.errors import AmoebaError
from amoeba_export.ir import Progress


def make_engine(jobs: int) -> LocalEngine:
    """See `engines.ENGINES`."""
    return LocalEngine(jobs)


class LocalEngine:
    """See `engines.Engine`. With several `jobs`, entries that measure nothing are shared out among that many processes.

    Each process reads the supernet for its own share. What measures comes afterwards, undisturbed.
    """

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
        apart = [task for task in able if task.target is None] if self._jobs > 1 else []
        together = [task for task in able if task not in apart]
        for result in (
            *self._run_apart(apart, done=done),
            *run_entries(together, done=done, progress=progress),
        ):
            results[result.outcome.name] = result
        return [results[task.entry.name] for task in work.entries]

    def _run_apart(self, tasks: Sequence[EntryTask], *, done: Done) -> list[EntryResult]:
        """In processes; what they say is in the logs alone."""
        shares = [share for share in (tasks[start :: self._jobs] for start in range(self._jobs)) if share]
        if not shares:
            return []
        results = []
        # spawned: a fork of a process with threads of torch in it may hang
        with ProcessPoolExecutor(len(shares), mp_context=multiprocessing.get_context("spawn")) as pool:
            for future in as_completed([pool.submit(run_entries, share) for share in shares]):
                for result in future.result():
                    results.append(result)
                    done(result)
        return results
