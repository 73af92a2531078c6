"""An `amoeba export` that says `written` and its process when its files are, and waits to be stopped."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import NoReturn

from amoeba_export.application import pipeline
from amoeba_export.cli.app import main


def _wait(*_: object, **__: object) -> NoReturn:
    print("written", os.getpid(), flush=True)
    while True:
        threading.Event().wait()


def entry() -> None:
    """As a console script."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by a shell's job in the background
    pipeline.verify_artifact = _wait
    sys.exit(main())
