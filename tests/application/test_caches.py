"""What one export keeps and the next one finds: damage is noticed and mended, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from amoeba_export.application import pipeline, rounding, selection
from amoeba_export.application.pipeline import export
from amoeba_export.application.request import ExportRequest
from amoeba_export.cache.kinds import COST_TABLES, REFINED_TABLES, ROUNDING, STRATEGIES, Kind
from amoeba_export.ir import Supernet
from tests.application.test_pipeline import model, target, write_target
from tests.listener import Listener, flip_bit
from tests.search.strategies import graded_strategy

__all__ = ["model", "target"]  # fixtures


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AMOEBA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def calibrated(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Calibration, replaced by a strategy that is made at once; which models it was made for."""
    models: list[str] = []

    def calibrate(supernet: Supernet, recipe: object, **settings: object) -> object:
        models.append(supernet.name)
        return graded_strategy(supernet)

    monkeypatch.setattr(selection, "calibrate", calibrate)
    return models


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that were compared to measure what rounding costs."""
    folders: list[Path] = []
    check: Callable[..., object] = rounding.check_numbers

    def counting(opened: object, folder: Path, *args: object) -> object:
        folders.append(folder)
        return check(opened, folder, *args)

    monkeypatch.setattr(rounding, "check_numbers", counting)
    return folders


@pytest.mark.parametrize("kind", [STRATEGIES, ROUNDING, COST_TABLES, REFINED_TABLES], ids=lambda kind: kind.name)
def test_a_flipped_bit_is_noticed_and_mended(
    model: Path, target: Path, cache: Path, calibrated: list[str], compared: list[Path], tmp_path: Path, kind: Kind
) -> None:
    write_target(tmp_path, dtypes={"fp32": 1.0, "int8": 0.95})
    request = ExportRequest(
        model=str(model), target=str(target), latency="80%", dtype="auto", out=tmp_path / "out", force=True
    )
    export(request)
    made, num_compared = len(calibrated), len(compared)
    assert (made, num_compared > 0) == (1, True)
    listener = Listener()
    first = pipeline.search(request, progress=listener)
    assert (len(calibrated), len(compared)) == (made, num_compared)
    assert listener.told_of_damage() == []
    entries = [path for path in (cache / kind.name).iterdir() if path.is_dir()]
    assert entries
    for entry in entries:
        (content,) = (path for path in entry.iterdir() if path.name not in ("key.json", "seal.json"))
        flip_bit(content)
    again = pipeline.search(request, progress=listener)
    assert len(listener.told_of_damage()) == len(entries)
    assert len(calibrated) == made + (kind is STRATEGIES)
    assert len(compared) == (2 if kind is ROUNDING else 1) * num_compared
    if kind is REFINED_TABLES:  # what was learnt is lost; the table as it was recorded is taken
        assert again.settings.dtype == first.settings.dtype
        return
    assert again.plan == first.plan
    assert pipeline.search(request, progress=listener).plan == first.plan
    assert listener.told_of_damage() == []


def test_a_table_that_is_recorded_again_forgets_what_was_learnt_of_the_old_one(
    model: Path, target: Path, cache: Path, calibrated: list[str], tmp_path: Path
) -> None:
    request = ExportRequest(model=str(model), target=str(target), latency="70%", out=tmp_path / "out")
    export(request)
    (table,) = (cache / COST_TABLES.name).glob("*/table.json")
    (refined,) = (cache / REFINED_TABLES.name).glob("*/table.json")
    assert refined.read_bytes() != table.read_bytes()
    flip_bit(table)
    listener = Listener()
    pipeline.search(request, progress=listener)
    assert len(listener.told_of_damage()) == 1
    assert table.is_file()
