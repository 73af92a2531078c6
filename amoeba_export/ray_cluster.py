"""Joining a Ray cluster, the same for every command that offers `--engine ray`."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

from amoeba_export import leftovers
from amoeba_export.errors import TargetUnavailable


def require_ray() -> None:
    """Raises TargetUnavailable when the extra is not installed."""
    try:
        import ray  # noqa: F401 - the question is whether it is there
    except ImportError as error:
        raise TargetUnavailable("ray is not installed", "Run: pip install 'amoeba-export[ray]'") from error


@contextlib.contextmanager
def joined(address: str | None = None, *, resources: Mapping[str, float] | None = None) -> Iterator[None]:
    """Connected to a cluster while the context lasts; a connection that is there already is used, and left.

    Args:
        address: Of the cluster; None for the one that `RAY_ADDRESS` names, else one of this machine alone.
        resources: What a cluster of this machine alone offers beside its processors.

    Raises:
        TargetUnavailable: Ray is not installed, or the cluster cannot be joined.
    """
    require_ray()
    import ray

    if ray.is_initialized():
        yield
        return
    with contextlib.ExitStack() as stack:
        is_ours = address is None and not os.environ.get("RAY_ADDRESS")
        folder = stack.enter_context(_folder_of_a_cluster()) if is_ours else None
        with termination_handler_kept():
            try:
                ray.init(
                    address=address,
                    resources=None if resources is None else dict(resources),
                    include_dashboard=False if resources is not None else None,
                    log_to_driver=False,
                    logging_level="ERROR",
                    _temp_dir=folder,
                )
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise TargetUnavailable(
                    f"the Ray cluster cannot be joined: {str(error).splitlines()[0]}",
                    "Check the address (RAY_ADDRESS), and that 'ray status' works from here.",
                ) from error
        try:
            yield
        finally:
            ray.shutdown()


_LONGEST = 39
"""Bytes of a folder's name: those of Ray's sockets are 64 longer, and none may have more than 107 (103 on macOS)."""


@contextlib.contextmanager
def _folder_of_a_cluster() -> Iterator[str]:
    """For what Ray writes for a cluster of this machine alone: logs and sockets, which it leaves when it ends."""
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir=os.environ.get("RAY_TMPDIR")))
    if len(os.fsencode(folder)) > _LONGEST:
        folder.rmdir()
        folder = Path(tempfile.mkdtemp(prefix="amoeba-", dir="/tmp"))
    noted = leftovers.note(lambda: leftovers.remove_folder(folder))
    try:
        yield str(folder)
    finally:
        leftovers.remove_folder(folder)
        leftovers.forget(noted)


@contextlib.contextmanager
def termination_handler_kept() -> Iterator[None]:
    """What SIGTERM does is the same afterwards: Ray puts a handler of its own there, and never takes it back."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
