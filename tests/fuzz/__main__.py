"""The long run: `python -m tests.fuzz [READER ...] [--cases N]`.

Each reader in a child process, with bounds on time and memory. What a reader does wrong is kept below build/fuzz, the
smallest file of each kind of fault; add it to `cases/` when it is mended.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzz.bounded import limit_memory, violation
from tests.fuzz.mutations import files
from tests.fuzz.readers import READERS
from tests.fuzz.valid import make_valid

PART = 2500
"""Cases of one child: a process whose memory is bounded must not answer for what thousands of cases leave in it."""


def child(reader: str, cases: int, start: int, found: Path) -> None:
    """Feed one reader. The file at hand lies in `found`, for the parent to see should this process die of it."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        os.environ["AMOEBA_CACHE"] = str(root / "cache")
        make_valid(root)
        valid = (root / READERS[reader].file).read_bytes()
        if wrong := violation(reader, root, valid):
            raise AssertionError(f"the valid file is not read: {wrong}")
        limit_memory()
        kinds: dict[str, bytes] = {}
        done = 0
        at_hand = found / f"{reader}-at-hand"

        @seed(start)
        @settings(
            max_examples=cases,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(files(READERS[reader].form, root / READERS[reader].file))
        def feed(content: bytes) -> None:
            nonlocal done
            done += 1
            at_hand.write_bytes(content)
            if wrong := violation(reader, root, content):
                kind = wrong.partition(":")[0]
                if kind not in kinds or len(content) < len(kinds[kind]):
                    kinds[kind] = content
                    name = f"{reader}-{abs(hash(kind)) % 16**8:08x}"
                    (found / name).write_bytes(content)
                    (found / f"{name}.txt").write_text(wrong)

        feed()
        at_hand.unlink(missing_ok=True)
        print(json.dumps({"reader": reader, "cases": done, "faults": sorted(kinds)}))


def main() -> int:
    """Run all readers, or those named. Returns 1 when any of them did something wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("readers", nargs="*", metavar="READER", help=", ".join(READERS))
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("build/fuzz"))
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.child:
        child(options.readers[0], options.cases, options.seed, options.out)
        return 0
    wrong = [reader for reader in options.readers or READERS if not _is_sound(reader, options)]
    return 1 if wrong else 0


def _is_sound(reader: str, options: argparse.Namespace) -> bool:
    """Feed one reader, a part of the cases in each child; print what was found."""
    cases, faults = 0, set[str]()
    while cases < options.cases:
        part = min(PART, options.cases - cases)
        command = [sys.executable, "-m", "tests.fuzz", reader, "--child", f"--cases={part}"]
        command += [f"--seed={options.seed + cases // PART}", f"--out={options.out}"]
        ended = subprocess.run(
            command, env={**os.environ, "PYTHONHASHSEED": "0"}, capture_output=True, text=True, check=False
        )
        if ended.returncode:
            print(f"{reader}: ended with {ended.returncode}: {ended.stderr[-2000:]}", flush=True)
            return False
        said = json.loads(ended.stdout)
        cases += part
        faults.update(said["faults"])
    print(json.dumps({"reader": reader, "cases": cases, "faults": sorted(faults)}), flush=True)
    return not faults


if __name__ == "__main__":
    sys.exit(main())
