"""Ray clusters of this machine whose files are gone when they are."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@contextlib.contextmanager
def short_folder() -> Iterator[Path]:
    """Ray makes sockets in its folder, whose names must be short; a test's own folder is too deep."""
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@contextlib.contextmanager
def cluster(*, num_cpus: int) -> Iterator[Any]:
    """One whose head has so many processors; more nodes may be added."""
    import ray
    from ray.cluster_utils import Cluster

    from amoeba_export.ray_cluster import termination_handler_kept

    with short_folder() as folder, pytest.MonkeyPatch.context() as patch, termination_handler_kept():
        patch.setenv("RAY_TMPDIR", str(folder))
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": num_cpus})
        try:
            yield made
        finally:
            ray.shutdown()
            made.shutdown()
