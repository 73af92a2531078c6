"""The long run: `python -m tests.fuzz [READER ...] [--cases N]`.

Each reader in child processes, with bounds on time and memory. What a reader does wrong is kept below build/fuzz, the
smallest file of each kind of fault; add it to `cases/` when it is mended.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzz.bounded import limited_memory, violation
from tests.fuzz.mutations import files
from tests.fuzz.readers import READERS
from tests.fuzz.valid import make_valid

PART = 2500
"""Cases of one child: what thousands of them leave in a process must not add up."""


def feed(reader: str, root: Path, cases: int, start: int, found: Path) -> None:
    """Feed one reader. The file at hand lies in `found`, for the parent to see should this process die of it."""
    valid = (root / READERS[reader].file).read_bytes()
    READERS[reader].read(root / READERS[reader].file)  # what is imported on the way takes longer than a reader may
    if wrong := violation(reader, root, valid):
        raise AssertionError(f"the valid file is not read: {wrong}")
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
    def one(content: bytes) -> None:
        nonlocal done
        done += 1
        at_hand.write_bytes(content)
        with limited_memory():
            wrong = violation(reader, root, content)
        if wrong:
            kind = wrong.partition(":")[0]
            if kind not in kinds or len(content) < len(kinds[kind]):
                kinds[kind] = content
                name = f"{reader}-{zlib.crc32(kind.encode()):08x}"
                (found / name).write_bytes(content)
                (found / f"{name}.txt").write_text(wrong)

    one()
    at_hand.unlink(missing_ok=True)
    print(json.dumps({"reader": reader, "cases": done, "faults": sorted(kinds)}))


def main() -> int:
    """Run all readers, or those named. Returns 1 when any of them did something wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("readers", nargs="*", metavar="READER", help=", ".join(READERS))
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("build/fuzz"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "valid"
        root.mkdir()
        os.environ["AMOEBA_CACHE"] = str(root / "cache")
        code, said = in_child(lambda: make_valid(root))
        assert code == 0, said
        wrong = [reader for reader in options.readers or READERS if not _is_sound(reader, root, options)]
    return 1 if wrong else 0


def _is_sound(reader: str, root: Path, options: argparse.Namespace) -> bool:
    """Feed one reader, a part of the cases in each child; print what was found."""
    cases, faults = 0, set[str]()
    file = root / READERS[reader].file
    valid = file.read_bytes()
    for number, first in enumerate(range(0, options.cases, PART)):
        part = min(PART, options.cases - first)
        start = options.seed + number
        code, said = in_child(lambda part=part, start=start: feed(reader, root, part, start, options.out))
        file.write_bytes(valid)
        if code:
            print(f"{reader}: ended with {code}: {said[-2000:]}", flush=True)
            return False
        result = json.loads(said.splitlines()[-1])
        cases += result["cases"]
        faults.update(result["faults"])
    print(json.dumps({"reader": reader, "cases": cases, "faults": sorted(faults)}), flush=True)
    return not faults


def in_child(work: Callable[[], object]) -> tuple[int, str]:
    """Do `work` in a fork, which has imported everything already: its exit code, and what it said.

    This process computes nothing itself: a fork has one thread, and libraries that had others would wait for them.
    """
    sys.stdout.flush()
    with tempfile.TemporaryFile("w+", errors="backslashreplace") as said:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.dup2(said.fileno(), 1)
                os.dup2(said.fileno(), 2)
                sys.stdout = sys.stderr = said
                work()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                said.flush()
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        said.seek(0)
        return code, said.read()


if __name__ == "__main__":
    sys.exit(main())
