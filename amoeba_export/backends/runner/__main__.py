"""`python -m <runner> --job FILE`: measure, events to stdout. `--measure` and `--describe` are its own children."""

from __future__ import annotations

import json
import sys

from .child import describe_device, measure_model, serve
from .supervise import run_job


def main(arguments: list[str]) -> int:
    """Run one of the three modes; exit code 0 unless this runner itself is broken."""
    if arguments[:1] == ["--measure"]:
        return serve(measure_model)
    if arguments[:1] == ["--describe"]:
        return serve(describe_device)
    if len(arguments) == 2 and arguments[0] == "--job":
        with open(arguments[1], encoding="utf-8") as file:  # noqa: PTH123 - one call, and pathlib is slow to import
            job = json.load(file)
        for event in run_job(job):
            print(json.dumps(event), flush=True)
        return 0
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
