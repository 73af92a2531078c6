"""A program that prints what llama.cpp's `llama-bench -o json` prints. `LLAMA_BENCH` says how it misbehaves.

A token takes a nanosecond for every byte of the file, and as much for each token of depth.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

HELP = """usage: llama-bench [options]
  -m, --model <filename>
  -p, --n-prompt <n>                        (default: 512)
  -n, --n-gen <n>                           (default: 128)
"""


def token_ns(path: Path) -> int:
    """What it says of one token without depth."""
    return path.stat().st_size


def main(words: list[str]) -> None:
    behaviour = os.environ.get("LLAMA_BENCH", "")
    if behaviour == "other":
        sys.exit("error: unknown argument")
    if words == ["--help"]:
        print(HELP)
        return
    if words == ["--list-devices"]:
        print("Available devices:\n  CUDA0: Orin (62840 MiB, 50000 MiB free)")
        return
    given = dict(zip(words[::2], words[1::2], strict=True))
    assert set(given) <= {"-m", "-t", "-ngl", "-r", "-o", "-p", "-n", "-d"}, given
    prompt, generate, depth = (int(given.get(word, 0)) for word in ("-p", "-n", "-d"))
    if behaviour == "crash":
        print("CUDA error: no kernel image is available for execution on the device", file=sys.stderr)
        os.abort()
    if behaviour == "fail":
        sys.exit("main: error: failed to load model")
    if behaviour == "garbage":
        print("[{not json")
        return
    nanoseconds = token_ns(Path(given["-m"])) * (prompt + generate) + token_ns(Path(given["-m"])) * depth
    if behaviour == "zero":
        nanoseconds = 0
    samples = [nanoseconds + number for number in range(int(given["-r"]))]
    test = {
        "build_commit": "8cf427ff",
        "build_number": 5163,
        "backends": "CUDA",
        "model_filename": given["-m"],
        "n_threads": int(given["-t"]),
        "n_gpu_layers": int(given["-ngl"]),
        "n_prompt": prompt,
        "n_gen": generate,
        "n_depth": depth,
        "test_time": "2025-04-24T11:57:50Z",
        "avg_ns": nanoseconds,
        "stddev_ns": 1,
        "avg_ts": 1.0,
        "stddev_ts": 0.1,
        "samples_ns": samples,
        "samples_ts": [1.0] * len(samples),
    }
    print(json.dumps([test], indent=2))


if __name__ == "__main__":
    main(sys.argv[1:])
