"""An engine that misbehaves as its subject says, and a backend that runs it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from amoeba_export.backends import Subject
from amoeba_export.backends.runtime import RuntimeBackend
from amoeba_export.backends.targets import Strict


def describe(options: Mapping[str, Any]) -> dict[str, str]:
    return {"runtime": "faulty 1"}


def in_main_memory(options: Mapping[str, Any]) -> bool:
    return True


class open_model:  # noqa: N801 - an engine's function
    def __init__(self, subject: Mapping[str, Any], workload: Mapping[str, int], options: Mapping[str, Any]) -> None:
        self._behaviour = subject["behaviour"]
        if self._behaviour == "memory":
            import resource

            import numpy as np

            resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
            np.ones(1 << 30)
        if self._behaviour == "tell":
            folder = Path(subject["folder"])
            raise RuntimeError(f"{folder} has {sorted((file.name, file.read_text()) for file in folder.iterdir())}")
        if self._behaviour == "noise on stdout":
            os.write(1, b"loading model... {not json}\n")
        self._folder = Path(subject.get("folder", ""))
        if self._behaviour in ("open", "log"):
            self._mark = self._folder / f"{os.getpid()}.open"
            self._mark.touch()
        self._name = str(subject.get("id"))

    def decode(self) -> float | None:
        if self._behaviour == "hang":
            time.sleep(1000)
        if self._behaviour == "crash":
            os.abort()
        if self._behaviour == "killed":
            os.kill(os.getpid(), 9)
        if self._behaviour == "exit":
            os._exit(3)
        if self._behaviour == "raise":
            raise RuntimeError("no kernel for this node")
        if self._behaviour == "solitary" and any(self._folder.iterdir()):
            raise MemoryError
        if self._behaviour == "log":
            self._log("decode")
        if self._behaviour == "spin":
            self._note("works")
            self._spin()
        return {"nan": float("nan"), "negative": -1.0, "zero": 0.0}.get(self._behaviour, 2.0)

    def prefill(self) -> float:
        if self._behaviour == "log":
            self._log("prefill")
        return 10.0

    def close(self) -> None:
        if self._behaviour in ("open", "log"):
            self._mark.unlink()

    def _spin(self) -> None:
        """Look for work for a while yet, as the threads of a runtime do."""
        self._spins_until = time.perf_counter() + 0.1
        if threading.active_count() == 2:  # this one, and the one that reads requests
            threading.Thread(target=self._wait_busily, daemon=True).start()

    def _wait_busily(self) -> None:
        while time.perf_counter() < self._spins_until:
            pass
        self._note("sleeps")

    def _note(self, what: str) -> None:
        with (self._folder / "log").open("a") as log:
            log.write(f"{self._name} {what}\n")

    def _log(self, phase: str) -> None:
        """Append who does what beside how many others, once for calls in a row."""
        line = f"{self._name} {phase} of {len(list(self._folder.glob('*.open')))}"
        log = self._folder / "log"
        lines = log.read_text().splitlines() if log.exists() else []
        if lines[-1:] != [line]:
            log.write_text("\n".join([*lines, line]))


class Options(Strict):
    pass


def prepare(subject: Subject, folder: Path, options: Any) -> dict[str, Any]:
    return {"folder": str(folder), "behaviour": subject.label}


BACKEND = RuntimeBackend(engine="tests.backends.faulty", containers=(), options_model=Options, prepare=prepare)
