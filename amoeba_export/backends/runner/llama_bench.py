"""llama.cpp's own benchmark program, as people build it for a board with a GPU: its JSON is read.

It opens the model in every run, so a run times several samples, and they are handed out one by one. It times the graph
alone: tokens are not sampled.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Mapping
from typing import Any

from .device import physical_cores
from .engines import Unavailable

DECODE_TOKENS = 8
"""Tokens of one decode sample. The cache grows meanwhile, so a sample starts half of them before the KV length."""

SAMPLES = 5
"""Of one run, after a warm-up of its own."""

MOST_BYTES = 1 << 20
"""Of its answer: it prints a page."""


def describe(options: Mapping[str, Any]) -> dict[str, str]:
    """The program by its digest, its devices, and threads. Raises `Unavailable` when it does not start."""
    program = options["binary"]
    path = shutil.which(os.path.expanduser(program))  # noqa: PTH111 - runs where startup counts
    if path is None:
        raise Unavailable(
            f"there is no program '{program}'",
            "Build llama.cpp there (cmake --build build --target llama-bench), and give its path in options.binary.",
        )
    ran = subprocess.run([path, "--help"], capture_output=True, text=True, errors="replace", timeout=30, check=False)
    if ran.returncode or "--n-prompt" not in ran.stdout + ran.stderr:
        said = (ran.stderr or ran.stdout).strip().splitlines()
        raise Unavailable(
            f"'{program}' does not answer as llama-bench does ({said[-1][:200] if said else f'code {ran.returncode}'})",
            "Give the path of llama-bench in options.binary.",
        )
    with open(path, "rb") as file:  # noqa: PTH123 - as above
        digest = hashlib.sha256(file.read()).hexdigest()[:12]
    return {
        "runtime": f"llama-bench {digest}",
        "provider": "GPU" if options["gpu_layers"] else "CPU",
        "threads": str(options["threads"] or physical_cores()),
        **_devices(path),
    }


def _devices(path: str) -> dict[str, str]:
    """What it can run on besides the CPU, where it is new enough to tell."""
    ran = subprocess.run(
        [path, "--list-devices"], capture_output=True, text=True, errors="replace", timeout=30, check=False
    )
    lines = [line.strip() for line in ran.stdout.splitlines() if line.startswith("  ")]
    return {"devices": "; ".join(lines)[:200]} if lines and not ran.returncode else {}


class Model:
    """A GGUF file, timed by the program."""

    def __init__(self, subject: Mapping[str, Any], workload: Mapping[str, int], options: Mapping[str, Any]) -> None:
        self._command = [
            os.path.expanduser(options["binary"]),  # noqa: PTH111 - as above
            *("-m", os.path.join(subject["folder"], subject["model"])),  # noqa: PTH118 - as above
            *("-t", str(options["threads"] or physical_cores())),
            *("-ngl", str(options["gpu_layers"])),
            *("-r", str(SAMPLES), "-o", "json"),
        ]
        self._prompt = workload["prompt_tokens"]
        self._left: dict[str, deque[float]] = {"decode": deque(), "prefill": deque()}

    def decode(self) -> float:
        """Milliseconds per token around the KV length."""
        depth = max(0, self._prompt - DECODE_TOKENS // 2)
        return self._next("decode", {"n_prompt": 0, "n_gen": DECODE_TOKENS, "n_depth": depth}) / DECODE_TOKENS

    def prefill(self) -> float:
        """Milliseconds of the whole prompt."""
        return self._next("prefill", {"n_prompt": self._prompt, "n_gen": 0, "n_depth": 0})

    def peak_memory_mb(self) -> float:
        """Of the largest run so far."""
        used = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        return used / (2**20 if sys.platform == "darwin" else 2**10)

    def close(self) -> None:
        """Nothing stays open."""

    def _next(self, phase: str, test: Mapping[str, int]) -> float:
        if not self._left[phase]:
            self._left[phase].extend(self._run(test))
        return self._left[phase].popleft()

    def _run(self, test: Mapping[str, int]) -> list[float]:
        """Milliseconds of each sample of a test."""
        words = {"n_prompt": "-p", "n_gen": "-n", "n_depth": "-d"}
        # Without a depth nothing is said of it: programs before 2025 do not know the word.
        asked = [
            text for key, number in test.items() if key != "n_depth" or number for text in (words[key], str(number))
        ]
        ran = subprocess.run(
            [*self._command, *asked],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            preexec_fn=_end_with_us,
        )
        if ran.returncode:
            said = ran.stderr.decode(errors="replace").strip().splitlines()
            how = (
                f"ended with code {ran.returncode}" if ran.returncode > 0 else f"crashed with signal {-ran.returncode}"
            )
            raise RuntimeError(f"llama-bench {how}" + (f": {said[-1][:300]}" if said else ""))
        return _samples_ms(ran.stdout[:MOST_BYTES], test)


def _samples_ms(answer: bytes, test: Mapping[str, int]) -> list[float]:
    """The samples of the one test that was asked for."""
    try:
        tests = json.loads(answer)
        (found,) = [one for one in tests if all(one.get(key, 0) == number for key, number in test.items())]
        samples = [float(number) / 1e6 for number in found["samples_ns"]]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        shown = answer[:80].decode(errors="replace")
        raise RuntimeError(f"llama-bench printed no figures of {dict(test)}: {shown!r}") from None
    if not samples or not all(math.isfinite(one) and one > 0 for one in samples):
        raise RuntimeError(f"llama-bench says that {dict(test)} took {samples[:3]} ms, which cannot be")
    return samples


def _end_with_us() -> None:
    """Linux kills the program with the process that started it."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
