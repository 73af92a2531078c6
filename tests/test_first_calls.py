from __future__ import annotations

import subprocess
import sys

import pytest

_FIRST_CALLS = """
{imports}
torch.set_num_threads(2)
x = torch.arange(1, 4097) / 4200  # two threads share an operation from 2,048 values on
print([name for name in FUNCTIONS if not torch.equal(getattr(torch, name)(x), getattr(torch, name)(x))])
"""


@pytest.mark.parametrize("order", ["import torch", "import amoeba_export; import torch"])
def test_a_first_call_by_two_threads_is_as_accurate_as_the_second(order: str) -> None:
    """Without the remedy a function fails in every fourth process or so."""
    script = _FIRST_CALLS.format(imports=f"{order}\nfrom amoeba_export.first_calls import FUNCTIONS")
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_torch_is_imported_as_ever() -> None:
    script = "import amoeba_export, sys, torch; print(torch.__spec__.loader.__class__.__name__, len(sys.meta_path))"
    plain = "import sys, torch; print(torch.__spec__.loader.__class__.__name__, len(sys.meta_path))"
    shown = [
        subprocess.run([sys.executable, "-c", it], capture_output=True, check=True).stdout for it in (script, plain)
    ]
    assert shown[0] == shown[1]


def test_functions_are_called_when_torch_is_imported() -> None:
    script = (
        "import amoeba_export.first_calls as it\n"
        "called = []\nit._call_all = lambda torch: called.append(torch.__name__)\nimport torch, torch.nn\nprint(called)"
    )
    assert (
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
        == "['torch']\n"
    )
