"""Several subnets from one stream."""

from __future__ import annotations

import dataclasses
import re
import threading
from pathlib import Path

import pytest

from amoeba_export.errors import NotRepresentable, WeightsMismatch
from amoeba_export.formats import FORMATS
from amoeba_export.formats.shards import SafetensorsWriter
from amoeba_export.formats.write import WriteJob, format_dtypes, write_cuts, write_formats
from amoeba_export.ir import SubnetPlan, Supernet
from amoeba_export.materialize import materialize_subnet, stream_subnets
from tests.materialize.subnets import open_supernet, plan_for

SHAPES = ("4x1", "3x0.6", "3x0.5")
DTYPES = {"safetensors": "fp32", "onnx": "int8", "gguf": "fp16"}


@pytest.fixture
def supernet(tiny_dirs: dict[str, Path]) -> Supernet:
    return open_supernet(tiny_dirs["llama"])


def cuts(supernet: Supernet, folder: Path) -> list[WriteJob]:
    made = []
    for shape in SHAPES:
        (folder / shape).mkdir(parents=True)
        subnet = materialize_subnet(supernet, plan_for(supernet, shape))
        made.append(WriteJob(subnet=subnet, folder=folder / shape, dtypes=DTYPES))
    return made


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_together_they_are_what_each_is_alone(supernet: Supernet, tmp_path: Path) -> None:
    together = cuts(supernet, tmp_path / "together")
    write_cuts(together, stream_subnets(supernet, [cut.subnet.plan for cut in together]))
    for cut in cuts(supernet, tmp_path / "alone"):
        write_formats(cut.subnet, cut.folder, cut.dtypes)
    assert content(tmp_path / "together") == content(tmp_path / "alone")


def test_what_a_writer_raises_reaches_the_caller_and_no_thread_is_left(
    supernet: Supernet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: SafetensorsWriter, name: str, weight: object) -> None:
        raise WeightsMismatch([f"{name} is not wanted"], where=tmp_path)

    monkeypatch.setattr(SafetensorsWriter, "accept", refuse)
    before = threading.active_count()
    wanted = cuts(supernet, tmp_path)
    with pytest.raises(WeightsMismatch, match="is not wanted"):
        write_cuts(wanted, stream_subnets(supernet, [cut.subnet.plan for cut in wanted]))
    assert threading.active_count() == before


@pytest.mark.parametrize("rope", ["dynamic"])
@pytest.mark.parametrize("name", ["onnx", "gguf"])
def test_advice_names_formats_that_can_hold_it(supernet: Supernet, name: str, rope: str) -> None:
    """ONNX said 'use GGUF', and GGUF 'use ONNX'."""
    architecture = dataclasses.replace(supernet.architecture, rope_scaling={"rope_type": rope, "factor": 2.0})
    dense = SubnetPlan.full(architecture).dense(architecture)
    with pytest.raises(NotRepresentable) as caught:
        format_dtypes(dense, [name], None, explicit=False)
    assert caught.value.next_step == "Use one of: --format safetensors."
    for advised in re.findall(r"--format (\w+)", str(caught.value)):
        FORMATS[advised].check(dense, dtype=FORMATS[advised].default_dtype)
