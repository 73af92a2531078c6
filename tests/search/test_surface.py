from __future__ import annotations

import numpy as np
import pytest

from amoeba_export.ir import Shape
from amoeba_export.search import QualitySurface, quality_surface
from tests.search.strategies import DEPTHS, WIDTHS, imported_strategy, loss, own_strategy


def test_measured_shapes_keep_their_values() -> None:
    surface = quality_surface(own_strategy())
    for depth in DEPTHS:
        for width in WIDTHS:
            quality = surface.at(depth, width)
            assert quality is not None
            assert quality == (loss(Shape(depth, width)), "measured")


def test_between_widths_it_is_monotone_and_close_to_the_truth() -> None:
    surface = quality_surface(own_strategy())
    widths = np.arange(50, 101) / 100
    qualities = [surface.at(24, float(width)) for width in widths]
    values = [quality.value for quality in qualities if quality is not None]
    assert len(values) == len(widths)
    assert (np.diff(values) < 0).all()
    truth = [loss(Shape(24, float(width))) for width in widths]
    assert np.abs(np.array(values) - truth).max() < 0.03


def test_it_never_overshoots_where_the_measured_values_turn() -> None:
    rows = {4: [(0.25, 5.0), (0.5, 3.0), (0.75, 3.2), (1.0, 2.0)]}
    surface = QualitySurface(metric="loss", rows=rows)
    for low, high in ((0.25, 0.5), (0.5, 0.75), (0.75, 1.0)):
        ends = [dict(rows[4])[low], dict(rows[4])[high]]
        for width in np.linspace(low, high, 20):
            quality = surface.at(4, float(width))
            assert quality is not None
            assert min(ends) - 1e-12 <= quality.value <= max(ends) + 1e-12


def test_two_points_are_joined_by_a_line() -> None:
    surface = QualitySurface(metric="loss", rows={4: [(0.5, 4.0), (1.0, 2.0)]})
    assert surface.at(4, 0.75) == (pytest.approx(3.0), "interpolated")


def test_between_depths_the_depth_metric_says_how_far() -> None:
    rows = {20: [(1.0, 4.0)], 24: [(1.0, 2.0)]}
    plain = QualitySurface(metric="loss", rows=rows)
    assert plain.at(23, 1.0) == (pytest.approx(2.5), "interpolated")
    steep = QualitySurface(metric="loss", rows=rows, depth_metric={24: 1.0, 23: 1.1, 20: 2.0})
    assert steep.at(23, 1.0) == (pytest.approx(2.2), "interpolated")
    contradicting = QualitySurface(metric="loss", rows=rows, depth_metric={24: 1.0, 23: 0.9, 20: 2.0})
    assert contradicting.at(23, 1.0) == (pytest.approx(2.5), "interpolated")


@pytest.mark.parametrize(("depth", "width"), [(19, 1.0), (31, 1.0), (24, 0.49), (23, 0.4)])
def test_nothing_is_extrapolated(depth: int, width: float) -> None:
    assert quality_surface(own_strategy()).at(depth, width) is None


def test_without_measured_quality_the_kept_weights_stand_in() -> None:
    surface = quality_surface(imported_strategy())
    assert surface.mode == "max"
    assert surface.metric == "kept_weights"
    assert surface.at(15, 0.5) is None
    assert surface.at(24, 0.5) == (pytest.approx(0.4), "proxy")
    assert surface.at(30, 1.0) == (pytest.approx(1.0), "proxy")


def test_accuracy_is_better_when_higher() -> None:
    assert QualitySurface(metric="accuracy", rows={}).mode == "max"
    assert QualitySurface(metric="perplexity", rows={}).mode == "min"
