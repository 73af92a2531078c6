from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = {"torch", "transformers", "onnx", "onnxruntime", "peft", "datasets", "ray"}

_LOADED = """
import sys
{code}
print(*sorted({heavy} & set(sys.modules)), file=sys.stderr)
"""


def test_writing_a_graph_needs_no_onnx_before_the_last_weight() -> None:
    """onnx, and sympy behind onnx-ir, would lie in memory beside the largest weight, where an export peaks."""
    heavy = {"onnx", "onnx_ir", "onnxruntime", "sympy", "transformers"}
    script = _LOADED.format(code="import amoeba_export.formats.onnx.writer", heavy=heavy)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == "\n"


@pytest.mark.parametrize(
    "code",
    [
        "import amoeba_export",
        "import amoeba_export.api; amoeba_export.api.ExportRequest, amoeba_export.api.BuildOptions",
        "import amoeba_export.ir, amoeba_export.artifact, amoeba_export.formats, amoeba_export.backends.targets",
        "from amoeba_export.cli.app import main; main(['--help'])",
        "from amoeba_export.cli.app import main; main(['targets', 'list'])",
        "from amoeba_export.cli.app import main; [main([name, '--help']) for name in {commands}]",
        "from amoeba_export.cli.completion import *; complete_targets(''); complete_formats(''); complete_recipes('')",
    ],
)
def test_light_things_stay_light(code: str) -> None:
    from amoeba_export.cli.app import app

    names = [str(command.name or command.callback.__name__) for command in app.registered_commands if command.callback]
    script = _LOADED.format(code=code.format(commands=names), heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == "\n"
