"""The engine of a fleet: every unit of a build is a Ray task, and what measures runs on the node that has the device.

A node offers a target as a resource: `ray start --address=HEAD --resources '{"target:jetson-orin-nano": 1}'`. One of
them means one measurement at a time. What is calibrated and measured for several entries travels through the driver
into the cache of the node that needs it. Files that amoeba.toml names, and the artifacts, are not sent: its folder has
to be at the same path on every node (a shared file system).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from amoeba_export import leftovers
from amoeba_export.builds.engines import Done
from amoeba_export.builds.entry import BuildWork, CalibrationTask, CostTableTask, EntryResult, EntryTask
from amoeba_export.builds.outcome import ErrorRecord
from amoeba_export.builds.work import Product, failed, install, run_calibration, run_cost_table, run_entries
from amoeba_export.errors import AmoebaError, TargetError, TargetUnavailable
from amoeba_export.ir import Progress
from amoeba_export.ray_cluster import joined, require_ray

RETRIES = 3
"""How often a unit is begun again because its node or its process died. What amoeba can explain is not tried again."""
GRACE_S = 1.5
"""How long an interrupted unit may take to clean up before its process is killed."""

Unit = CalibrationTask | CostTableTask | EntryTask
Made = Product | EntryResult | ErrorRecord


def make_engine(jobs: int) -> RayEngine:
    """See `engines.ENGINES`. `jobs` does not count here: the cluster's processors do.

    Raises:
        TargetUnavailable: Ray is not installed.
    """
    del jobs
    require_ray()
    return RayEngine()


class RayEngine:
    """See `engines.Engine`. Uses the cluster that `RAY_ADDRESS` names, else a cluster of this machine alone."""

    def run(self, work: BuildWork, *, done: Done, progress: Progress) -> Sequence[EntryResult]:
        """See `Engine`."""
        import ray

        units: list[Unit] = [*work.calibrations, *work.cost_tables, *work.entries]
        with joined(resources=_offered_here(units)):
            _check_resources(units, ray.cluster_resources())
            progress.note(f"Ray: {len(units)} units of work on {_num_nodes()} nodes")
            return _Run(units, done, progress).results(work.entries)


def _offered_here(units: Sequence[Unit]) -> dict[str, float] | None:
    """A cluster of this machine alone offers every target; None where `RAY_ADDRESS` names another."""
    if os.environ.get("RAY_ADDRESS"):
        return None
    return {_resource(target): 1.0 for unit in units if (target := _target(unit))}


@dataclass(slots=True)
class _Run:
    """One build: what waits, what runs, and what has come of the rest."""

    waiting: list[Unit]
    done: Done
    progress: Progress
    running: dict[Any, Unit] = field(default_factory=dict)
    made: dict[str, Made] = field(default_factory=dict)

    def results(self, entries: Sequence[EntryTask]) -> list[EntryResult]:
        """Do everything."""
        import ray

        try:
            while self.waiting or self.running:
                self._begin()
                if self.running:
                    ready, _ = ray.wait(list(self.running), num_returns=1)
                    unit = self.running.pop(ready[0])
                    self._finish(unit, _fetch(ready[0]))
        except BaseException:
            self._cancel()
            raise
        found = [self.made[_key(task)] for task in entries]
        return [result for result in found if isinstance(result, EntryResult)]

    def _begin(self) -> None:
        """Submit what has all it needs; fail what needs something that failed."""
        for unit in list(self.waiting):
            needed = _after(unit)
            if not all(key in self.made for key in needed):
                continue
            self.waiting.remove(unit)
            found = [self.made[key] for key in needed]
            reason = next((one for one in found if isinstance(one, ErrorRecord)), None)
            if reason is not None:
                self._finish(unit, reason)
                continue
            self.running[_submit(unit, [one for one in found if isinstance(one, Product)])] = unit

    def _finish(self, unit: Unit, made: Made) -> None:
        if isinstance(unit, EntryTask):
            if isinstance(made, ErrorRecord):
                result = failed(unit, AmoebaError(made.message))
                made = replace(result, outcome=replace(result.outcome, error=made))
            assert isinstance(made, EntryResult)
            self.progress.note(f"{unit.entry.name}: {made.outcome.status}")
            self.done(made)
        elif isinstance(made, Product):
            install(made)  # here too: another build of this machine finds it
        self.made[_key(unit)] = made

    def _cancel(self) -> None:
        """Interrupt what runs, and kill what does not stop by itself."""
        import ray

        for ref in self.running:
            ray.cancel(ref, force=False)
        _, left = (
            ray.wait(list(self.running), num_returns=len(self.running), timeout=GRACE_S) if self.running else ([], [])
        )
        for ref in left:
            ray.cancel(ref, force=True)


def _submit(unit: Unit, products: Sequence[Product]) -> Any:
    """Start a unit where its device is. Raises nothing: what goes wrong comes out of `_fetch`."""
    import ray

    name = unit.entry.name if isinstance(unit, EntryTask) else unit.key
    resources = {_resource(target): 1.0} if (target := _target(unit)) else {}
    task = ray.remote(_run_unit).options(
        name=f"amoeba {name}", num_cpus=1, resources=resources, max_retries=RETRIES, retry_exceptions=False
    )
    return task.remote(unit, products)


def _run_unit(unit: Unit, products: Sequence[Product]) -> Made:
    """On a node. Errors of ours travel as records, since not every error can be pickled."""
    with leftovers.temporary_folder():  # a unit that does not stop is killed with its process
        for product in products:
            install(product)
        try:
            if isinstance(unit, CalibrationTask):
                return run_calibration(unit)
            if isinstance(unit, CostTableTask):
                return run_cost_table(unit)
            return run_entries([unit])[0]
        except AmoebaError as error:
            return ErrorRecord.of(error)


def _fetch(ref: Any) -> Made:
    """What came of a unit, taken to the driver at once: a node that dies later takes nothing with it."""
    import ray

    try:
        made: Made = ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        return ErrorRecord.of(error.cause if error.cause is not None else error)
    except ray.exceptions.RayError as error:
        return ErrorRecord.of(
            TargetError(
                f"The node that did this was lost {RETRIES + 1} times: {str(error).splitlines()[0]}",
                next_step="Look at the nodes ('ray status') and at their memory, and run it again.",
            )
        )
    return made


def _check_resources(units: Sequence[Unit], offered: Mapping[str, float]) -> None:
    missing = sorted({target for unit in units if (target := _target(unit)) and _resource(target) not in offered})
    if missing:
        flags = ", ".join(f'"{_resource(target)}": 1' for target in missing)
        raise TargetUnavailable(
            f"no node of the Ray cluster has the target {', '.join(missing)}",
            f"On the node with the device: ray start --address=HEAD --resources '{{{flags}}}'",
        )


def _num_nodes() -> int:
    import ray

    return sum(bool(node["Alive"]) for node in ray.nodes())


def _key(unit: Unit) -> str:
    return f"entry-{unit.entry.name}" if isinstance(unit, EntryTask) else unit.key


def _after(unit: Unit) -> tuple[str, ...]:
    if isinstance(unit, EntryTask):
        return unit.after
    if isinstance(unit, CostTableTask) and unit.after is not None:
        return (unit.after,)
    return ()


def _target(unit: Unit) -> str | None:
    return None if isinstance(unit, CalibrationTask) else unit.target


def _resource(target: str) -> str:
    return f"target:{target}"
