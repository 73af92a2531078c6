from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

from amoeba_export.calibrate import calibrate
from amoeba_export.calibrate.fleet import RayFleet
from amoeba_export.errors import TargetError
from amoeba_export.ir import Supernet
from amoeba_export.load import load_supernet
from amoeba_export.ray_cluster import termination_handler_kept
from tests.calibrate.test_stage import assert_same, recipe

ray = pytest.importorskip("ray", reason="needs the extra 'ray'")


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[None]:
    """A cluster of two nodes with one processor each."""
    from ray.cluster_utils import Cluster

    with termination_handler_kept():
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        try:
            cluster.add_node(num_cpus=1)
            ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
            yield
        finally:
            ray.shutdown()
            cluster.shutdown()


def test_the_strategy_is_that_of_one_machine(
    two_nodes: None, supernet: Supernet, text_file: Path, tmp_path: Path
) -> None:
    """Two workers on two nodes; the ledger of the driver then answers a run without them."""
    made = recipe(text_file, quality={"widths": [1.0, 0.5]})
    expected = calibrate(supernet, made)
    with RayFleet(functools.partial(load_supernet, str(supernet.folder))) as fleet:
        assert_same(calibrate(supernet, made, cache_dir=tmp_path / "cache", fleet=fleet), expected)
        nodes = ray.get([worker.__ray_call__.remote(_node) for worker in fleet._workers])
        assert len(nodes) == len(set(nodes)) == 2
    assert_same(calibrate(supernet, made, cache_dir=tmp_path / "cache"), expected)


def _node(worker: object) -> str:
    return str(ray.get_runtime_context().get_node_id())


def test_a_node_without_the_model(two_nodes: None, supernet: Supernet, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    with RayFleet(functools.partial(load_supernet, str(gone))) as fleet, pytest.raises(TargetError) as caught:
        fleet.start(supernet.identity, memory_bytes=10**8)
    assert caught.value.what.startswith("A worker cannot use the model: ")
    assert caught.value.next_step == "Put the model at the same path on every node, or name it by its hub id."
