"""The example package, installed the way a user installs it, found by its entry point."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "backend-plugin"

USE = """
import sys
sys.path.insert(0, sys.argv[1])
from amoeba_export.backends import Subject, list_backends, measure_latency
from amoeba_export.backends.targets import read_target
from amoeba_export.errors import AmoebaError
from tests.backends.models import FULL, SHORT

assert "board" in list_backends(), list_backends()
target = read_target(sys.argv[2])
(latency,) = measure_latency([FULL], SHORT, target=target)
print(latency.source, round(latency.decode.p50_ms, 6), dict(latency.device))
try:
    read_target(sys.argv[3])
except AmoebaError as error:
    print(error.what)
"""


def test_the_example_package_brings_a_backend(tmp_path: Path) -> None:
    site = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--target", str(site), str(EXAMPLE)], check=True, cwd=tmp_path)
    good = tmp_path / "board.toml"
    good.write_text('description = "mine"\nbackend = "board"\n[options]\nclock_mhz = 1000\n')
    bad = tmp_path / "bad.toml"
    bad.write_text('description = "mine"\nbackend = "board"\n[options]\nclock_mhz = 0\nclock_mzh = 1\n')
    run = subprocess.run(
        [sys.executable, "-c", USE, str(site), str(good), str(bad)],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    from tests.backends.models import FULL

    lines = run.stdout.splitlines()
    assert lines[0] == f"analytic {FULL.dense.num_params / 1e6} {{'device': 'board', 'clock_mhz': '1000'}}"
    assert lines[1:] == [
        "The target has 2 mistakes:",
        "  - options.clock_mhz: input should be greater than 0, not 0",
        "  - options.clock_mzh: there is no such key. Did you mean 'clock_mhz'?",
    ]
