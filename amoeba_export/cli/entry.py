"""The console script. It can be stopped from its first moment on: what takes long to import is imported here inside."""

from __future__ import annotations

import sys

from amoeba_export.cli.stop import INTERRUPTED, SAYS, leave, stoppable


def entry() -> None:
    """Run the command that is on the command line, and end the process with its exit code."""
    code = INTERRUPTED
    try:
        with stoppable():
            try:
                from amoeba_export.cli.app import main

                code = main()
            except KeyboardInterrupt:
                print(SAYS, file=sys.stderr)
    except KeyboardInterrupt:  # it came while we were on our way out
        pass
    if code == INTERRUPTED:
        leave()
    sys.exit(code)
