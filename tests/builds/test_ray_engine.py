from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from amoeba_export.artifact import verify_checksums
from amoeba_export.builds import ray_engine, work
from amoeba_export.builds.outcome import BuildReport
from amoeba_export.builds.run import BuildOptions, build
from amoeba_export.errors import TargetUnavailable
from tests import clusters
from tests.builds.conftest import HEAD, statuses

ray = pytest.importorskip("ray", reason="needs the extra 'ray'")

ENTRIES = "".join(f'[[build]]\nname = "e{i}"\nshape = "{depth}x0.5"\n' for i, depth in enumerate((4, 3, 2, 4, 3, 2)))


@pytest.fixture
def cluster() -> Iterator[object]:
    """A head that runs nothing; nodes with one processor each are added."""
    with clusters.cluster(num_cpus=0) as made:
        yield made


def test_a_node_is_killed_and_everything_is_built_once(
    cluster, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The unit that was on the node is begun again on the other one; what was finished is not."""
    (project / "amoeba.toml").write_text(HEAD + ENTRIES)
    doomed = cluster.add_node(num_cpus=1)
    doomed_id = doomed.node_id
    cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    begun, finished = tmp_path / "begun", tmp_path / "finished"
    for folder in (begun, finished):
        folder.mkdir()
    run_unit = ray_engine._run_unit

    def counted(unit, products):
        """Says where it begins; holds one unit on the doomed node until that is killed."""
        node = ray.get_runtime_context().get_node_id()
        (begun / f"{unit.entry.name}.{node}.{time.monotonic_ns()}").touch()
        if node == doomed_id:
            time.sleep(600)
        made = run_unit(unit, products)
        (finished / f"{unit.entry.name}.{time.monotonic_ns()}").touch()
        return made

    monkeypatch.setattr(ray_engine, "_run_unit", counted)

    def kill() -> None:
        while not list(begun.glob(f"*.{doomed_id}.*")):
            time.sleep(0.1)
        cluster.remove_node(doomed, allow_graceful=False)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    report: BuildReport = build(project / "amoeba.toml", BuildOptions(engine="ray"))
    killer.join()
    assert statuses(report) == {f"e{i}": "built" for i in range(6)}
    for i in range(6):
        verify_checksums(project / "dist" / f"e{i}")
        assert "shape" in (project / "dist" / "logs" / f"e{i}.log").read_text()
    lost = {path.name.split(".")[0] for path in begun.glob(f"*.{doomed_id}.*")}
    assert len(lost) == 1
    assert Counter(path.name.split(".")[0] for path in finished.iterdir()) == {f"e{i}": 1 for i in range(6)}
    assert Counter(path.name.split(".")[0] for path in begun.iterdir()) == {
        f"e{i}": 2 if f"e{i}" in lost else 1 for i in range(6)
    }
    assert build(project / "amoeba.toml", BuildOptions(engine="ray")).entries[0].status == "up-to-date"


def test_a_target_that_no_node_has() -> None:
    request = object()
    unit = work.CostTableTask(key="table", target="jetson", request=request)  # type: ignore[arg-type]
    with pytest.raises(TargetUnavailable) as caught:
        ray_engine._check_resources([unit], {"CPU": 4.0, "target:cpu": 1.0})
    assert str(caught.value) == (
        "No node of the Ray cluster has the target jetson.\n"
        "  next:  On the node with the device: ray start --address=HEAD --resources '{\"target:jetson\": 1}'"
    )


def test_results_of_shared_work_reach_only_those_that_need_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A measurement begins after its calibration, and fails with it; the calibration needs no device."""
    calibration = work.CalibrationTask(key="calibration", request=object())  # type: ignore[arg-type]
    table = work.CostTableTask(key="table", target="cpu", request=object(), after="calibration")  # type: ignore[arg-type]
    assert ray_engine._after(calibration) == ()
    assert ray_engine._after(table) == ("calibration",)
    assert ray_engine._target(calibration) is None
    problem = ray_engine.ErrorRecord(kind="InputError", message="No data.", exit_code=3)
    submitted: list[object] = []
    monkeypatch.setattr(ray_engine, "_submit", lambda unit, products: submitted.append(unit))
    run = ray_engine._Run([table], lambda result: None, work.SILENT, made={"calibration": problem})
    run._begin()
    assert submitted == []
    assert run.made["table"] is problem
