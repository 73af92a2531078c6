"""`examples/tutorial.sh`, from top to bottom: on a tiny model, with fewer steps and other shapes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from amoeba_export.artifact import read_manifest
from tests.finetune.models import char_tokenizer
from tests.tiny import save_tiny
from tests.warm import warm_command

ROOT = Path(__file__).parents[2]
SCRIPT = (ROOT / "examples/tutorial.sh").read_text(encoding="utf-8")
PAGE = (ROOT / "docs/tutorial.md").read_text(encoding="utf-8")

TINY = {
    " demo ": " model ",
    "--recipe quick": "--recipe tiny.toml",
    "--max-steps 60": "--max-steps 2",
    "--depths 30,27,24": "--depths 4,3",
    "--shape 30x1": "--shape 4x1",
    "--window 256": "--window 32",
    "-n 500": "-n 20",
    "-c 60000": "-c 600",
    "--refit fast": "--refit off",
}
"""What is other than on the page, so that it takes seconds."""


def test_the_page_shows_every_command_of_the_script() -> None:
    parts = re.findall(r"\[start:([\w-]+)\]\n(.*?)^# \[end:\1\]", SCRIPT, re.MULTILINE | re.DOTALL)
    blocks = re.findall(
        r"<!-- from examples/tutorial\.sh:([\w-]+) -->\n```bash\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL
    )
    assert blocks == parts
    outside = SCRIPT
    for _, part in parts:
        outside = outside.replace(part, "")
    assert "\namoeba" not in outside


def test_the_script_ends_with_a_verified_artifact_that_writes_text(tmp_path: Path) -> None:
    script = SCRIPT
    for said, tiny in TINY.items():
        assert said in script, f"the script has no '{said}' any more"
        script = script.replace(said, tiny)
    _project(tmp_path)
    path = os.pathsep.join([str(tmp_path / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    with warm_command(tmp_path / "bin", "tests.docs.cpu:entry"):
        done = subprocess.run(
            ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=3000
        )
    assert done.returncode == 0, done.stderr[-3000:]
    small, whole = (read_manifest(tmp_path / "dist" / name) for name in ("small", "whole"))
    assert small.latency is not None
    assert small.latency.measured_ms is not None
    assert small.latency.budget_ms is not None
    assert small.latency.measured_ms["p50"] <= small.latency.budget_ms
    assert whole.shape.depth == 4
    assert {one.role for one in small.inputs} >= {"model", "strategy", "adapter"}
    assert all((tmp_path / "dist" / name).stat().st_size > 1000 for name in ("quality.png", "bench.png"))
    assert done.stdout.splitlines()[-1].strip()


def _project(folder: Path) -> None:
    """What the clone of a reader has: the data and a model."""
    char_tokenizer(save_tiny(folder / "model"))
    (folder / "bin").mkdir()
    (folder / "dist").mkdir()
    (folder / "calibration").symlink_to(ROOT / "calibration")
    data = '[data]\nfile = "calibration/wikitext2/wikitext2.txt"\nwindow = 32\nsamples = 4\nheldout = 4\nbatch = 4\n'
    (folder / "tiny.toml").write_text(f"{data}[depth]\nmax_removed = 0.25\n")
