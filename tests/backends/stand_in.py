"""Programs that stand in for a user's: a benchmark that misbehaves as told, and an `adb` whose device is a folder.

    stand_in.py bench STYLE MODEL PROMPT GENERATE BATCH [FILE]
    stand_in.py adb DEVICE push|pull|shell ...

A step of the benchmark takes a nanosecond for every byte of the model, its prompt as much for each token.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path


def times_ms(num_bytes: int, prompt: int, batch: int) -> tuple[float, float]:
    """What the benchmark says of decode and prefill."""
    return num_bytes / 1e6, prompt * batch * num_bytes / 1e6


def bytes_of(model: Path) -> int:
    files = [model] if model.is_file() else [path for path in model.rglob("*") if path.is_file()]
    return sum(path.stat().st_size for path in files)


def bench(style: str, model: str, prompt: int, generate: int, batch: int, file: str = "") -> None:
    decode_ms, prefill_ms = times_ms(bytes_of(Path(model)), prompt, batch)
    if style == "text":
        print("loading ...\nwarm-up: 99 ms")
        print(f"Prefill time: {prefill_ms} ms\nDecode: {1000 * batch / decode_ms} tokens/s")
    elif style == "json":
        report = {"decode": {"samples_us": [1000 * decode_ms * factor for factor in (1, 1.1, 0.9)]}}
        report["prefill"] = {"s": prefill_ms / 1000}
        Path(file).write_text(json.dumps(report)) if file else print("a log line\n" + json.dumps(report))
    elif style == "e2e":
        print(json.dumps({"latencies": [(prefill_ms + (generate - 1) * decode_ms) / 1000] * 3}))
    elif style == "log":
        with Path(file).open("a") as log:
            log.write(f"{model} {prompt} {generate} {batch}\n")
        print(f"Prefill time: {prefill_ms} ms\nDecode: {1000 * batch / decode_ms} tokens/s")
    elif style == "hang":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        Path(file).write_text(f"{os.getpid()} {child.pid}")
        print("waiting for the device", flush=True)
        time.sleep(600)
    elif style == "endless":
        while True:
            print("x" * 65536)
    elif style == "garbage":
        sys.stdout.buffer.write(b"\xff\x00\x1b[31m{[[ no figures \xe2\x80\xae here")
    elif style == "deep":
        print("[" * 100_000)
    elif style == "seconds":
        print(f"Prefill time: {prefill_ms} s\nDecode: {decode_ms} s")
    elif style == "wrong":
        print(f"Prefill time: {prefill_ms} ms\nDecode: 0 tokens/s")
    elif style == "fail":
        print("Prefill time: 1 ms\nDecode: 1 tokens/s")
        sys.exit("error: no space left\nerror: cannot open the model")
    elif style == "abort":
        os.abort()
    elif style == "silent":
        pass
    else:
        raise SystemExit(f"no style {style}")


def adb(device: str, action: str, *arguments: str) -> None:
    """As Android's: `shell` gives its words, joined, to a shell on the device, whose code is its own."""
    there = Path(device)
    if action == "shell":
        environment = {**os.environ, "PATH": f"{there}{os.pathsep}{os.environ['PATH']}"}
        sys.exit(subprocess.run(["sh", "-c", " ".join(arguments)], cwd=there, env=environment).returncode)
    source, target = arguments
    source, target = (source, there / target) if action == "push" else (there / source, target)
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    (shutil.copytree if Path(source).is_dir() else shutil.copyfile)(source, target)


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what == "adb":
        adb(*rest)
    else:
        bench(rest[0], rest[1], *map(int, rest[2:5]), *rest[5:])
