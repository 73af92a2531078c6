"""Six cuts of one supernet: six runs of `amoeba export` against one `amoeba build`, in turns.

    python benchmarks/build.py --strategy strategy.safetensors [--rounds 2]

Both write and verify the same artifacts (the weights files are compared). An export that is not timed comes first: who
came first in the first round would read the libraries and the model from a cold disk. `--jobs` goes to the build.
Prints JSON: seconds of both per round, their ratio, and how often each tensor of the supernet was read for cutting.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from amoeba_export.artifact import read_manifest

SHAPES = ("28x1", "26x0.9", "24x0.8", "22x0.75", "20x0.7", "20x0.6")
AMOEBA = [sys.executable, "-c", "from amoeba_export.cli.app import entry; entry()"]
COUNTED = """
import json, sys
from collections import Counter
from pathlib import Path
from amoeba_export.builds.run import BuildOptions, build
from amoeba_export.materialize import stream
reads = Counter()
make = stream.Maker.make
def counted(self, module):
    reads.update(f"{module.name}.{part}" for part in module.axes)
    return make(self, module)
stream.Maker.make = counted
report = build(Path(sys.argv[1]), BuildOptions(jobs=int(sys.argv[2])))
assert report.exit_code == 0, report.failed
print(json.dumps(sorted(set(reads.values()))))
"""


def config(strategy: Path, formats: str) -> str:
    entries = "".join(f'[[build]]\nname = "{shape}"\nshape = "{shape}"\n' for shape in SHAPES)
    named = ", ".join(json.dumps(name) for name in formats.split(","))
    return f'[model]\nid = "demo"\n[defaults]\nstrategy = "{strategy}"\nformats = [{named}]\n{entries}'


def weights(folder: Path) -> dict[str, str]:
    return {file.path: file.sha256 for file in read_manifest(folder).files}


def export(shape: str, strategy: Path, formats: str, out: Path) -> None:
    call = [*AMOEBA, "export", "demo", "--strategy", str(strategy), "--shape", shape, "--format", formats]
    subprocess.run([*call, "--out", str(out)], check=True, capture_output=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategy", type=Path, required=True)
    parser.add_argument("--formats", default="safetensors")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    strategy = args.strategy.resolve()
    rounds = []
    with tempfile.TemporaryDirectory() as scratch:
        export(SHAPES[0], strategy, args.formats, Path(scratch) / "warm")
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            (folder / "amoeba.toml").write_text(config(strategy, args.formats), encoding="utf-8")
            start = time.perf_counter()
            call = [sys.executable, "-c", COUNTED, str(folder / "amoeba.toml"), str(args.jobs)]
            reads = subprocess.run(call, check=True, capture_output=True, text=True).stdout
            build_seconds = time.perf_counter() - start
            start = time.perf_counter()
            for shape in SHAPES:
                export(shape, strategy, args.formats, folder / "alone" / shape)
            exports_seconds = time.perf_counter() - start
            same = all(weights(folder / "dist" / shape) == weights(folder / "alone" / shape) for shape in SHAPES)
            rounds.append(
                {
                    "build_seconds": round(build_seconds, 2),
                    "exports_seconds": round(exports_seconds, 2),
                    "ratio": round(exports_seconds / build_seconds, 3),
                    "reads_per_tensor": json.loads(reads),
                    "same_files": same,
                }
            )
    print(json.dumps({"formats": args.formats, "jobs": args.jobs, "rounds": rounds}, indent=1))


if __name__ == "__main__":
    main()
