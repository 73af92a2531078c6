from __future__ import annotations

import functools
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from amoeba_export.calibrate import calibrate
from amoeba_export.calibrate.fleet import RayFleet
from amoeba_export.errors import TargetError
from amoeba_export.ir import Supernet
from amoeba_export.load import load_supernet
from tests import clusters
from tests.calibrate.test_stage import assert_same, recipe
from tests.stopping import COMMANDS, make_scene

ray = pytest.importorskip("ray", reason="needs the extra 'ray'")


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[None]:
    """A cluster of two nodes with one processor each."""
    with clusters.cluster(num_cpus=1) as cluster:
        cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        yield


def test_the_strategy_is_that_of_one_machine(
    two_nodes: None, supernet: Supernet, text_file: Path, tmp_path: Path
) -> None:
    """Two workers on two nodes; the ledger of the driver then answers a run without them."""
    made = recipe(text_file, quality={"widths": [1.0, 0.5]})
    expected = calibrate(supernet, made)
    with RayFleet(functools.partial(load_supernet, str(supernet.folder))) as fleet:
        assert_same(calibrate(supernet, made, cache_dir=tmp_path / "cache", fleet=fleet), expected)
        found = ray.get([worker.__ray_call__.remote(_node_and_folder) for worker in fleet._workers])
        assert len(found) == len({node for node, _ in found}) == 2
    for _, folder in found:  # workers are killed, and take their folders with them
        while folder.exists():
            time.sleep(0.01)
    assert_same(calibrate(supernet, made, cache_dir=tmp_path / "cache"), expected)


def _node_and_folder(worker: Any) -> tuple[str, Path]:
    assert worker._folder.is_dir()
    return str(ray.get_runtime_context().get_node_id()), worker._folder


def test_a_cluster_of_this_machine_alone_leaves_nothing(tmp_path: Path) -> None:
    """Neither what Ray writes for it nor what its workers write, which are killed."""
    make_scene(tmp_path)
    program = "from amoeba_export.cli.entry import entry; entry()"
    environment = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_TMPDIR")}
    with clusters.short_folder() as folder:
        environment |= {"TMPDIR": str(folder), "PYTHONPATH": str(Path(__file__).parents[2])}
        run = subprocess.run(
            [sys.executable, "-c", program, *COMMANDS["calibrate"], "--engine", "ray"],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=environment,
            check=False,
        )
        assert run.returncode == 0, run.stderr
        assert list(folder.iterdir()) == []


def test_a_node_without_the_model(two_nodes: None, supernet: Supernet, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    with RayFleet(functools.partial(load_supernet, str(gone))) as fleet, pytest.raises(TargetError) as caught:
        fleet.start(supernet.identity, memory_bytes=10**8)
    assert caught.value.what.startswith("A worker cannot use the model: ")
    assert caught.value.next_step == "Put the model at the same path on every node, or name it by its hub id."
