"""Where a calibration or a refit keeps what it has finished, so that a run that was killed goes on where it stopped."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from amoeba_export import locations
from amoeba_export.cache.kinds import CALIBRATION
from amoeba_export.model.host import Host
from amoeba_export.model.samples import Samples


class Workplace:
    """Folders by content: one per model and samples. Scores and statistics stay there; states go when a run is done."""

    def __init__(self, root: Path, model_id: str) -> None:
        self._root = root
        self._model_id = model_id

    def folder(self, samples: Samples) -> Path:
        """For everything that depends on the model and these samples alone."""
        return self.folder_of({"samples": samples.digest})

    def folder_of(self, facts: Mapping[str, Any]) -> Path:
        """For everything that depends on the model and these facts alone."""
        own = {"made_by": CALIBRATION.versions, "model": self._model_id, "torch": torch.__version__}
        folder = self._root / digest({**own, **facts})
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def states(self, samples: Samples) -> Path:
        """For hidden states: large, and worth nothing once the run is done."""
        return self.folder(samples) / "states"

    def clear_states(self, samples: Samples) -> None:
        """Remove them."""
        shutil.rmtree(self.states(samples), ignore_errors=True)


@contextmanager
def open_workplace(model_id: str, host: Host) -> Iterator[Workplace]:
    """The workplace of a model below the host's `cache_dir`, for this process alone; a temporary one without it.

    A second process that calibrates the same model waits, and then finds what the first one has finished.
    """
    cache_dir = host.cache_dir
    if cache_dir is None:
        with tempfile.TemporaryDirectory(prefix="amoeba-calibrate-") as folder:
            yield Workplace(Path(folder), model_id)
        return
    root = cache_dir / CALIBRATION.name
    with contextlib.ExitStack() as stack:
        stack.enter_context(locations.writing_cache(cache_dir))
        root.mkdir(parents=True, exist_ok=True)
        occupied = stack.enter_context((root / locations.OCCUPIED).open("a"))
        fcntl.flock(occupied, fcntl.LOCK_SH)  # any number may work here; who prunes wants to be alone
        lock = stack.enter_context((root / f"{digest({'model': model_id})}.lock").open("w"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            host.progress.note("Another process works on this model; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield Workplace(root, model_id)


def digest(facts: Mapping[str, Any]) -> str:
    """A folder name for facts that JSON can hold."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
