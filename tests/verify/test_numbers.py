"""Files that are measured and thrown away: the numbers of the runtime alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from amoeba_export import ExportRequest, export
from amoeba_export.errors import NumbersDiffer
from amoeba_export.load import load_supernet
from amoeba_export.verify import check_numbers, verify_artifact
from amoeba_export.verify.reload import OPENERS
from tests.tiny import save_tiny


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_the_distance_is_that_of_the_verification(tiny_dirs: dict[str, Path], tmp_path: Path, dtype: str) -> None:
    out = tmp_path / "out"
    export(ExportRequest(model=str(tiny_dirs["llama"]), shape="4x1", dtype=dtype, formats=("onnx",), out=out))
    supernet = load_supernet(str(tiny_dirs["llama"]))
    plan = supernet.full_plan()
    (report,) = verify_artifact(out, supernet, plan).formats
    found = check_numbers(OPENERS["onnx"](out / "onnx"), out / "onnx", supernet, plan)
    assert found.mean_kl == pytest.approx(report.distance.mean_kl, rel=1e-3, abs=1e-9)
    assert found.max_rel_diff == pytest.approx(report.distance.max_rel_diff, rel=1e-3, abs=1e-6)
    assert (found.mean_kl > 1e-6) == (dtype == "int8")


def test_another_model_differs(tiny_dirs: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(ExportRequest(model=str(tiny_dirs["llama"]), shape="4x1", formats=("onnx",), out=out))
    other = load_supernet(str(save_tiny(tmp_path / "other", "llama", seed=1)))
    with pytest.raises(NumbersDiffer):
        check_numbers(OPENERS["onnx"](out / "onnx"), out / "onnx", other, other.full_plan())
