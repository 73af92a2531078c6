"""Signals at moments spread over whole commands: they end with 130 or are done, and leave nothing half-written.

A moment is a number of calls of Python functions, not a time: the same on every machine, however busy. How long an end
takes is for `benchmarks/signals.py`, which draws moments from the clock.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.stopping import COMMANDS, Scene, make_scene

MOMENTS = 2

_RUN = """
import json, os, shutil, signal, sys, tempfile
from pathlib import Path
import accelerate, gguf, onnx, onnxruntime, peft  # once, not in every fork
from transformers.models.llama import modeling_llama
import amoeba_export.api, amoeba_export.builds.run, amoeba_export.cli.app, amoeba_export.finetune.trainer
from amoeba_export.cli.entry import entry
from tests.stopping import Scene

scene, root, commands, num_moments = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]), int(sys.argv[4])

def start(words, place, moment, number):
    shutil.copytree(scene, place)
    (place / "tmp").mkdir()
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.chdir(place)
    os.environ.update(AMOEBA_CACHE=str(place / "cache"), TMPDIR=str(place / "tmp"))
    tempfile.tempdir = None
    said = os.open("said", os.O_WRONLY | os.O_CREAT)
    os.dup2(said, 1)
    os.dup2(said, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        if event == "call":
            calls += 1
            if calls == moment:
                os.kill(os.getpid(), number)

    code = 70
    try:
        sys.argv = ["amoeba", *words]
        sys.setprofile(count)
        entry()
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        sys.setprofile(None)
        sys.stdout.flush()
        Path("calls").write_text(str(calls))
        os._exit(code)

seen = {}
for name, words in commands.items():
    whole = root / name / "whole"
    assert start(words, whole, -1, 0) == 0, (whole / "said").read_text()
    calls = int((whole / "calls").read_text())
    seen[name] = []
    for idx, number in zip(range(num_moments), 10 * (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)):
        place = root / name / str(idx)
        code = start(words, place, calls * (2 * idx + 1) // (2 * num_moments), number)
        hidden = [str(path.relative_to(place)) for path in (place / "cache").glob("*/.*") if path.name != ".occupied"]
        left = [path.name for path in (place / "tmp").iterdir()] + Scene(place).left_behind() + hidden
        seen[name].append([code, left, (place / "said").read_text()])
print(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return make_scene(tmp_path_factory.mktemp("scene"))


NAMES = ("export onnx", "export safetensors", "export gguf", "build", "calibrate", "finetune")
"""One process runs all of them: its imports take as long as three of them."""


def test_a_signal_leaves_nothing(scene: Scene, tmp_path: Path) -> None:
    commands = json.dumps({name: COMMANDS[name] for name in NAMES})
    finished = subprocess.run(
        [sys.executable, "-c", _RUN, scene.root, tmp_path, commands, str(MOMENTS)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        env=os.environ | {"PYTHONPATH": ".", "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    seen = json.loads(finished.stdout.splitlines()[-1])
    assert seen.keys() == set(NAMES)
    for name, ends in seen.items():
        assert len(ends) == MOMENTS
        for code, left, said in ends:
            assert (code, left) == (130, []), f"{name}: {said}"
            assert said.endswith("Interrupted. Nothing half-written is left.\n"), name
