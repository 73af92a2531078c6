from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import product

import numpy as np
import pytest

from amoeba_export.errors import NothingFits
from amoeba_export.ir import Budget, DenseArchitecture, Latency, LayerDims, Shape, Strategy, SubnetPlan, validate
from amoeba_export.profile import CostTable, design_graphs, fit_cost_table, predict_memory_mb
from amoeba_export.search import Candidate, SearchResult, Space
from amoeba_export.search.importance import Retained
from amoeba_export.search.layers import LayerCounts
from amoeba_export.search.predict import Corrected
from tests.profile.machines import SMOL, Machine, dense
from tests.search.strategies import WIDTHS, imported_strategy, loss, own_strategy, searched

FULL = SubnetPlan.full(SMOL).dense(SMOL)
TINY = replace(SMOL, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=16, hidden_size=64, ffn_size=32, vocab_size=64)


@cache
def _table() -> CostTable:
    graphs = design_graphs(SMOL)
    return fit_cost_table([(graph, Machine().measure(graph)) for graph in graphs], target="cpu", dtype="fp32")


def _search(limit: str = "75%", **settings: object) -> SearchResult:
    budget = Budget.parse(limit)
    return searched(own_strategy(), SMOL, _table(), [budget], **settings)  # type: ignore[arg-type]


# --- grid -------------------------------------------------------------------------------------------------------------


def test_the_choice_is_the_best_quality_under_the_budget() -> None:
    result = _search()
    limit_ms = result.limits[0][1]
    assert limit_ms == pytest.approx(0.75 * Machine().decode_ms(FULL, 128))
    best = result.best
    assert best.predicted_ms <= limit_ms
    assert best.predicted_ms == pytest.approx(Machine().decode_ms(best.dense, 128))
    others = [one for one in result.candidates if Machine().decode_ms(one.dense, 128) <= limit_ms]
    assert best.quality.value == min(one.quality.value for one in others)
    assert best.make_plan().dense(SMOL) == best.dense


def test_candidates_are_ranked_by_quality_and_then_those_over_the_budget_by_latency() -> None:
    candidates = _search().candidates
    num_fitting = sum(one.fits for one in candidates)
    assert 0 < num_fitting < len(candidates)
    assert all(one.fits for one in candidates[:num_fitting])
    qualities = [one.quality.value for one in candidates[:num_fitting]]
    assert qualities == sorted(qualities)
    over = [one.predicted_ms for one in candidates[num_fitting:]]
    assert over == sorted(over)


def test_of_equal_qualities_the_faster_one_wins() -> None:
    quality = {Shape(depth, width): 1.0 for depth in (30, 24) for width in WIDTHS}
    result = searched(own_strategy(depths=(30, 24), quality=quality), SMOL, _table(), [Budget.parse("100%")])
    assert result.best.shape == Shape(24, 0.5)


def test_widths_are_hundredths_and_every_shape_reads_back() -> None:
    shapes = [one.shape for one in _search().candidates]
    assert len(set(shapes)) == len(shapes)
    assert all(Shape.parse(str(shape)) == shape for shape in shapes)
    assert {shape.depth for shape in shapes} == set(range(20, 31))
    assert {0.5, 0.51, 0.875, 1.0} <= {shape.width for shape in shapes}


def test_widths_that_come_to_the_same_counts_are_listed_once_under_the_measured_name() -> None:
    candidates = _search(align=256).candidates
    assert all(layer.ffn_size % 256 == 0 for one in candidates for layer in one.dense.layers)
    counts = [one.dense for one in candidates]
    assert len(set(counts)) == len(counts)
    assert set(WIDTHS) <= {one.shape.width for one in candidates}


def test_an_import_has_its_own_widths_and_a_stand_in_for_quality() -> None:
    result = searched(imported_strategy(), SMOL, _table(), [Budget.parse("75%")])
    assert {one.shape.width for one in result.candidates} == {1.0, 0.75, 0.5}
    assert result.quality_metric == "kept_weights"
    assert result.best.quality.source == "proxy"
    assert result.best.make_plan().dense(SMOL) == result.best.dense
    again = searched(imported_strategy(), SMOL, _table(), [Budget.parse("75%")], space="layers")
    assert again.best == result.best


def test_the_measured_full_model_sets_a_relative_budget_and_corrects_the_predictions() -> None:
    """The machine became 20 % slower since the table was recorded."""
    latency = Machine().measure(FULL)
    slower = replace(latency, decode=replace(latency.decode, p50_ms=1.2 * latency.decode.p50_ms))
    result = _search(full=slower)
    assert result.limits[0][1] == pytest.approx(0.9 * latency.decode.p50_ms)
    assert result.best.shape == _search().best.shape
    assert result.best.predicted_ms == pytest.approx(1.2 * _search().best.predicted_ms)


def test_an_artifact_of_the_uncut_model_does_not_move_the_limit() -> None:
    """It was built for a budget of all, and ran 8 % slower than the full model that the budget is a share of."""
    latency = Machine().measure(FULL)
    result = _search("100%", full=latency, measured=[slower(FULL, 1.08)])
    assert result.limits[0][1] == pytest.approx(latency.decode.p50_ms)
    assert [one.fits for one in result.candidates if one.dense == FULL] == [False]


def test_what_is_refused_is_listed_but_not_chosen() -> None:
    first = _search().best
    result = _search(refused=[first.dense])
    assert result.best.dense != first.dense
    assert [one.fits for one in result.candidates if one.dense == first.dense] == [False]
    with pytest.raises(NothingFits):
        _search(refused=[one.dense for one in result.candidates])


def test_several_budgets_hold_together() -> None:
    budgets = [Budget.parse("80%"), Budget.parse("60%", metric="prefill"), Budget.parse("2.4s", metric="e2e")]
    for space in ("grid", "layers"):
        best = searched(own_strategy(), SMOL, _table(), budgets, space=space).best  # type: ignore[arg-type]
        whole = Machine().measure(FULL)
        assert best.decode_ms <= 0.8 * whole.of("decode") * (1 + 1e-9)
        assert best.prefill_ms <= 0.6 * whole.of("prefill") * (1 + 1e-9)
        assert best.e2e_ms <= 2400


@pytest.mark.parametrize("space", ["grid", "layers"])
def test_memory_is_a_limit_too(space: Space) -> None:
    def memory_mb(model: DenseArchitecture) -> float:
        return predict_memory_mb(model, weight_bytes=4 * model.num_params, dtype="fp32", workload=_table().workload)

    free = _search("95%", space=space, memory_mb=memory_mb).best
    assert free.memory_mb is not None
    tight = _search("95%", space=space, memory_mb=memory_mb, memory_limit_mb=0.8 * free.memory_mb).best
    assert tight.memory_mb is not None
    assert tight.memory_mb <= 0.8 * free.memory_mb
    assert tight.quality.value > free.quality.value


def test_the_pareto_front_trades_latency_for_quality() -> None:
    front = _search().pareto
    latencies = [one.predicted_ms for one in front]
    qualities = [one.quality.value for one in front]
    assert len(front) > 20
    assert latencies == sorted(latencies)
    assert qualities == sorted(qualities, reverse=True)
    assert _search().best in front


def test_nothing_fits_names_the_best_reachable_figure() -> None:
    with pytest.raises(NothingFits) as error:
        _search("5ms")
    assert error.value.exit_code == 4
    assert str(error.value) == (
        "No shape that the strategy knows meets decode p50 <= 5 ms; the closest, 20x0.5, reaches 10.48 ms, "
        "give or take 0 %.\n"
        "  next:  Allow 10.49 ms or more, or calibrate with more removed layers or smaller widths."
    )
    budgets = [Budget.parse("15ms"), Budget.parse("1ms", metric="prefill", percentile=90)]
    with pytest.raises(NothingFits) as error:
        searched(own_strategy(), SMOL, _table(), budgets)
    assert error.value.what == (
        "No shape that the strategy knows meets decode p50 <= 15 ms and prefill p90 <= 1 ms; the closest, 20x0.5, "
        "reaches 10.48 ms and 304.8 ms."
    )
    assert error.value.next_step == "Relax the limits, or calibrate with more removed layers or smaller widths."


def test_percentile_90_asks_for_more() -> None:
    median = searched(own_strategy(), SMOL, _table(), [Budget.parse("18ms")]).best
    tail = searched(own_strategy(), SMOL, _table(), [Budget.parse("18ms", percentile=90)]).best
    assert tail.decode_ms < median.decode_ms
    assert tail.predicted_ms == pytest.approx(1.05 * tail.decode_ms)


# --- layers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", ["95%", "85%", "72%", "60%", "50%"])
def test_layers_is_never_worse_than_the_grid(limit: str) -> None:
    grid, layers = _search(limit), _search(limit, space="layers")
    assert layers.best.quality.value <= grid.best.quality.value
    assert layers.best.predicted_ms <= layers.limits[0][1]
    plan = layers.best.make_plan()
    validate(plan, SMOL)
    assert plan.dense(SMOL) == layers.best.dense
    assert plan.shape == layers.best.shape
    active = own_strategy().depth[30 - plan.shape.depth]
    assert plan.kept_layers == tuple(i for i, keep in enumerate(active) if keep)


def test_the_adaptive_policy_means_layers_unless_a_space_is_named() -> None:
    assert _search(policy="adaptive") == _search(space="layers")
    named = _search(policy="adaptive", space="grid")
    assert {one.policy for one in named.candidates if one.shape.width < 1} == {"adaptive"}


def test_layers_with_align_and_gate() -> None:
    best = _search("70%", space="layers", align=64, gate_widths=(1.0, 0.75, 0.5)).best
    assert all(layer.ffn_size % 64 == 0 for layer in best.dense.layers)
    assert best.make_plan().gate_width in (0.75, 0.5)


def test_a_measured_uniform_plan_has_its_measured_quality_on_the_scale_of_layers() -> None:
    """The estimate of a heterogeneous plan is anchored at the grid: same plan, same figure."""
    strategy = own_strategy()
    assert strategy.importance is not None
    retained = Retained.of(strategy.importance, SMOL)
    shares = [retained.share(one.make_plan()) for one in _search("100%").candidates if one.shape.width in WIDTHS]
    assert min(shares) > 0
    assert max(shares) == pytest.approx(1)


def _sum_ms(layers: Sequence[LayerDims | LayerCounts]) -> float:
    return 10.0 + sum(3 * one.num_heads + 2 * one.num_kv_heads + one.ffn_size for one in layers)


class Additive:
    """A sum over layers."""

    def predict(self, model: DenseArchitecture, metric: str = "decode", percentile: int = 50) -> tuple[float, float]:
        return _sum_ms(model.layers), 0.0


class Bent:
    """A sum over layers, and as much again for half of the weights beyond fifty."""

    def pieces(self, model: DenseArchitecture, metric: str = "decode", percentile: int = 50) -> tuple[float, ...]:
        weights = sum(one.num_heads + one.num_kv_heads + 1.5 * one.ffn_size for one in model.layers)
        return _sum_ms(model.layers), _sum_ms(model.layers) + 0.8 * (weights - 50)

    def predict(self, model: DenseArchitecture, metric: str = "decode", percentile: int = 50) -> tuple[float, float]:
        return max(self.pieces(model)), 0.0


@cache
def _every_choice() -> tuple[Strategy, list[tuple[DenseArchitecture, float]]]:
    """A strategy that keeps two of four layers, and all that they may be, each with what it retains."""
    strategy = own_strategy(TINY, depths=(4, 2), widths=(1.0, 0.1), quality=None)
    strategy = replace(strategy, depth={0: (1, 1, 1, 1), 2: (1, 0, 0, 1)},
                       quality={Shape(2, 1.0): 1.0, Shape(2, 0.1): 3.0})  # fmt: skip
    assert strategy.importance is not None
    retained = Retained.of(strategy.importance, TINY)
    attention, neurons = [(0, 0), (1, 1), (2, 1), (2, 2), (4, 2)], list(range(0, 33, 4))
    of_layer = [
        [
            (TINY.cut_layer(*heads, ffn), retained.attention_values(i, [heads])[0] + retained.ffn_values(i, [ffn])[0])
            for heads, ffn in product(attention, neurons)
        ]
        for i in (0, 3)
    ]
    return strategy, [
        (DenseArchitecture(base=TINY, layers=(first, last)), (one + other) / 4)
        for (first, one), (last, other) in product(*of_layer)
    ]


@pytest.mark.parametrize("predictor", [Additive(), Bent()], ids=["sum", "knee"])
@pytest.mark.parametrize("limit", [30.2, 50.2, 58.2, 62.2, 66.2, 74.2, 90.2, 110.2])
def test_layers_is_the_optimum_of_all_choices_on_a_tiny_model(predictor: Additive | Bent, limit: float) -> None:
    """Two of four layers, every attention and FFN option tried: below a knee, at it, and above it.

    Costs are whole numbers and limits are not, so that rounding a cost up to a step excludes nothing.
    """
    strategy, choices = _every_choice()
    assert strategy.importance is not None
    retained = Retained.of(strategy.importance, TINY)
    result = searched(strategy, TINY, predictor, [Budget(limit_ms=limit)], space="layers", align=4)
    own = [one for one in result.candidates if one.policy == "adaptive" and one.fits]
    assert all(predictor.predict(one.dense)[0] <= limit for one in own)
    best = max(value for dense, value in choices if predictor.predict(dense)[0] <= limit)
    assert max(retained.share(one.make_plan()) for one in own) == pytest.approx(best)


def test_retained_is_one_for_everything_and_the_best_choice_for_counts() -> None:
    strategy = own_strategy(TINY, depths=(4,))
    assert strategy.importance is not None
    retained = Retained.of(strategy.importance, TINY)
    assert retained.share(SubnetPlan.full(TINY)) == pytest.approx(1)
    layer = retained.layer_plan(1, 2, 2, 7)
    assert len(layer.query_heads) == 2
    assert layer.kv_heads == (0, 1)
    assert {head // 2 for head in layer.query_heads} == {0, 1}
    kept = retained.heads_LN[1, list(layer.query_heads)].sum()
    assert kept == pytest.approx(retained.attention_values(1, [(2, 2)])[0])
    assert retained.ffn_LF[1, list(layer.ffn)].sum() == pytest.approx(retained.ffn_values(1, [7])[0])
    assert retained.layer_plan(1, 0, 0, 0).query_heads == ()


# --- closed loop ------------------------------------------------------------------------------------------------------


def _bent(machine: Machine) -> Callable[[DenseArchitecture], Latency]:
    """A machine that the additive model misses by several percent, differently for each model."""

    def measure(model: DenseArchitecture) -> Latency:
        latency = machine.measure(model)
        heads = np.mean([layer.num_heads for layer in model.layers]) / 9
        bend = 1 + 0.06 * np.sin(3 * len(model.layers) / 30 + 2 * heads)
        return replace(latency, decode=replace(latency.decode, p50_ms=float(latency.decode.p50_ms * bend)))

    return measure


@pytest.mark.parametrize(("space", "least_use"), [("grid", 0.93), ("layers", 0.97)])
def test_a_closed_loop_keeps_its_budget_and_uses_it(space: Space, least_use: float) -> None:
    measure = _bent(Machine())
    full = measure(FULL)
    uses = []
    for fraction in np.random.default_rng(0).uniform(0.5, 0.95, 4):
        measured: list[tuple[DenseArchitecture, Latency]] = []
        for _ in range(6):
            result = searched(own_strategy(), SMOL, _table(), [Budget(fraction=float(fraction))], space=space,
                                 full=full, measured=measured)  # fmt: skip
            if result.best.dense in [known for known, _ in measured]:
                break
            measured.append((result.best.dense, measure(result.best.dense)))
        final = max((latency.decode.p50_ms for _, latency in measured if latency.decode.p50_ms <= result.limits[0][1]))
        uses.append(final / result.limits[0][1])
    assert np.median(uses) >= least_use


def test_models_of_one_size_correct_together() -> None:
    """One was measured 4 % too slow, the other 2 % too fast: what they say of a third is in between."""
    first, second, third = (dense(*[(6, 2, size)] * 20) for size in (800, 816, 808))
    corrected = Corrected(_table(), [slower(first, 1.04), slower(second, 0.98)])
    assert corrected.predict(third)[0] == pytest.approx(1.01 * _table().predict(third)[0], rel=2e-3)
    assert corrected.predict(first)[0] == pytest.approx(1.04 * Machine().decode_ms(first, 128))


def slower(model: DenseArchitecture, factor: float) -> tuple[DenseArchitecture, Latency]:
    latency = Machine().measure(model)
    return model, replace(latency, decode=replace(latency.decode, p50_ms=factor * latency.decode.p50_ms))


def test_corrected_predictions_agree_with_what_was_measured() -> None:
    small, large = dense(*[(6, 2, 800)] * 20), dense(*[(9, 3, 1500)] * 28)
    corrected = Corrected(_table(), [slower(small, 1.1), slower(large, 1.3)])
    assert corrected.predict(small) == (pytest.approx(1.1 * Machine().decode_ms(small, 128)), 0.0)
    between = dense(*[(9, 3, 1200)] * 24)
    raw_ms = _table().predict(between)[0]
    ratio = corrected.predict(between)[0] / raw_ms
    assert 1.1 < ratio < 1.3
    assert corrected.ratio(1.0, "decode", 50) == pytest.approx(1.1)
    assert corrected.ratio(1e3, "decode", 50) == pytest.approx(1.3)
    assert corrected.raw_limit(ratio * raw_ms, "decode", 50) == pytest.approx(raw_ms)
    assert corrected.predict(small, "prefill")[0] == pytest.approx(Machine().measure(small).prefill.p50_ms)


def test_biases_do_not_make_another_model() -> None:
    plain = dense(*[(6, 2, 800)] * 20)
    biased = DenseArchitecture(base=SMOL, layers=tuple(replace(one, o_bias=True) for one in plain.layers))
    assert isinstance(plain.layers[0], LayerDims)
    corrected = Corrected(_table(), [(biased, Machine(base_ms=9).measure(biased))])
    assert corrected.predict(plain)[0] == pytest.approx(Machine(base_ms=9).decode_ms(plain, 128))


def test_loss_of_the_made_up_strategy_is_what_the_search_reads() -> None:
    best: Candidate = _search("100%").best
    assert best.shape == Shape(30, 1.0)
    assert best.quality == (loss(Shape(30, 1.0)), "measured")


@pytest.mark.parametrize("space", ["grid", "layers"])
def test_importances_without_means_give_plans_without_biases(space: Space) -> None:
    """`wanda` knows no input means: whatever space a plan comes from, it and the dims that were costed agree."""
    known = own_strategy()
    assert known.importance is not None
    wanda = replace(known, importance=replace(known.importance, metric="wanda"))
    best = searched(wanda, SMOL, _table(), [Budget.parse("70%")], space=space).best
    plan = best.make_plan()
    assert not plan.compensate
    assert not plan.is_compensated(SMOL)
    assert plan.dense(SMOL) == best.dense
    assert not any(dims.o_bias or dims.down_bias for dims in best.dense.layers)
