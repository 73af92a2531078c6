"""The page about an artifact says what its manifest and plan say."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from amoeba_export import ExportRequest, export
from amoeba_export.application.card import artifact_page
from amoeba_export.artifact import MANIFEST_NAME, read_manifest
from amoeba_export.errors import DamagedFile, NotFound
from amoeba_export.ir import LayerPlan, Shape, SubnetPlan
from amoeba_export.pictures import plan_picture
from tests.application.test_pipeline import model, precisions, strategy, target
from tests.conftest import Run
from tests.ir.test_plan import ARCHITECTURE
from tests.pictures.test_pictures import HOSTILE, Page

__all__ = ["model", "precisions", "strategy", "target"]


@pytest.fixture
def artifact(model: Path, strategy: Path, precisions: Path, tmp_path: Path) -> Path:
    out = tmp_path / "out"
    export(
        ExportRequest(model=str(model), strategy=strategy, target=str(precisions), latency="25%", refit="off", out=out)
    )
    return out


def test_the_page_has_the_figures_of_the_manifest(artifact: Path) -> None:
    manifest = read_manifest(artifact)
    text = artifact_page(artifact)
    page = Page(text)
    assert manifest.latency is not None
    assert manifest.latency.measured_ms is not None
    assert manifest.quality is not None
    for said in (
        str(manifest.shape.shape),
        "int4",
        f"{manifest.latency.measured_ms['p50']:#.4g} ms",
        f"{manifest.latency.budget_ms:#.4g} ms",
        f"{manifest.quality['loss']:.4g}",
        "full in fp32",
        "full in int8",
        "same tokens" if manifest.verification and manifest.verification.greedy_tokens_equal else "tokens differ",
        *(item.sha256 for item in manifest.inputs),
        *(file.sha256 for file in manifest.files),
    ):
        assert said in page.text, said
    assert "script" not in page.elements
    assert not [value for name, value in page.attributes if name in ("src", "href") and value != "data:,"]


def test_the_map_shows_each_head_and_neuron() -> None:
    """Three layers of 6 heads and 96 neurons: one is dropped, one keeps four heads and a quarter of its neurons."""
    plan = SubnetPlan(
        shape=Shape(2, 0.5),
        policy="uniform",
        layers=(
            LayerPlan(source_layer=0, query_heads=(0, 1, 4, 5), kv_heads=(0, 2), ffn=tuple(range(0, 96, 4))),
            LayerPlan(source_layer=2, query_heads=tuple(range(6)), kv_heads=(0, 1, 2), ffn=tuple(range(96))),
        ),
    )
    picture = plan_picture(plan, ARCHITECTURE)
    first, gone, last = picture.rows
    assert [cell.share for cell in first.cells if cell.kind == "heads"] == [1, 1, 0, 0, 1, 1]
    assert [cell.share for cell in first.cells if cell.kind == "neurons"] == [0.25] * 24
    assert gone.cells == ()
    assert gone.title == "layer 1: dropped"
    assert {cell.share for cell in last.cells} == {1.0}
    assert first.title == "layer 0: 4 of 6 query heads on 2 of 3 KV heads, 24 of 96 neurons"
    right = max(cell.x + cell.width for cell in last.cells)
    assert right <= picture.width
    assert first.y < gone.y < last.y < picture.height


def test_a_stranger_cannot_write_the_page(artifact: Path) -> None:
    path = artifact / MANIFEST_NAME
    data = json.loads(path.read_text())
    data["model"] = HOSTILE
    data["latency"]["device"] = {HOSTILE: HOSTILE + "\x1b[31m"}
    path.write_text(json.dumps(data))
    page = Page(artifact_page(artifact))
    assert "script" not in page.elements
    assert HOSTILE in page.text
    assert "\x1b" not in page.text


def test_a_plan_of_another_model_is_refused(artifact: Path) -> None:
    path = artifact / MANIFEST_NAME
    manifest = read_manifest(artifact)
    path.write_text(dataclasses.replace(manifest, dims={**manifest.dims, "ffn_size": 8}).to_text())
    with pytest.raises(DamagedFile, match="no plan of the model"):
        artifact_page(artifact)


def test_the_command_writes_it(artifact: Path, amoeba: Callable[..., Run], tmp_path: Path) -> None:
    assert amoeba("inspect", artifact, "--html", tmp_path / "a.html").code == 0
    assert (tmp_path / "a.html").read_text() == artifact_page(artifact)
    run = amoeba("inspect", artifact / "plan.json", "--html", tmp_path / "b.html")
    assert run.code == 3
    assert run.err.startswith("error: --html makes a page about an artifact.")
    with pytest.raises(NotFound):
        artifact_page(tmp_path)
