"""Stage 1 as one list: samples, importances, layers, quality."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from amoeba_export.calibrate.data import Drawn, draw
from amoeba_export.calibrate.depth import Challenge, Choice, Judge, fill_table
from amoeba_export.calibrate.evaluator import KeptLayers, LocalScorer, Scorer, Widths
from amoeba_export.calibrate.exact import ExactJudge, check_number
from amoeba_export.calibrate.fleet import RayFleet, Scoring
from amoeba_export.calibrate.ledger import Ledger, all_at_once, doubling, one_by_one
from amoeba_export.calibrate.racing import RacingJudge
from amoeba_export.calibrate.recipe import Recipe
from amoeba_export.calibrate.shapes import grid_depths, measure_quality, width_plans
from amoeba_export.calibrate.width import measure_importance
from amoeba_export.ir import SILENT, Importance, Progress, Shape, Strategy, Supernet
from amoeba_export.model.head import Objective
from amoeba_export.model.host import Host
from amoeba_export.model.layers import LayerStack
from amoeba_export.model.samples import Samples
from amoeba_export.model.states import StateStore
from amoeba_export.model.workplace import Workplace, open_workplace

MEGABYTE = 10**6


def calibrate(
    supernet: Supernet,
    recipe: Recipe,
    *,
    seed: int = 0,
    cache_dir: Path | None = None,
    fleet: RayFleet | None = None,
    progress: Progress = SILENT,
) -> Strategy:
    """Stage 1: which layers to keep at each depth, how much each head and neuron matters, how good each shape is.

    The same supernet, recipe, data and seed give the same strategy. Adapters of the supernet are not applied.

    Args:
        supernet: The model.
        recipe: What to measure, from `load_recipe`.
        seed: Of the draw of samples.
        cache_dir: Where finished work is kept, so that a run that was killed goes on where it stopped. None keeps
            nothing.
        fleet: Who scores candidates and shapes, joined already; None for this process. The strategy is the same.
        progress: Told of everything that takes time.

    Raises:
        InputError: The data cannot be used, or a metric is NaN.
        UsageError: The recipe asks for what this model does not have, such as more layers to remove.
        TargetError: The fleet cannot be used.
    """
    supernet = supernet.without_adapters()
    drawn = draw(recipe, supernet.folder, seed=seed)
    progress.note(f"Calibrating {supernet.name} with {drawn.summary}")
    with open_workplace(supernet.identity, Host(cache_dir=cache_dir, progress=progress)) as workplace:
        stack = LayerStack(supernet, memory_bytes=recipe.memory_mb * MEGABYTE)
        if fleet is not None:
            num_workers = fleet.start(supernet.identity, memory_bytes=stack.memory_bytes)
            progress.note(f"Scoring on {num_workers} workers")
        run = _Run(stack, recipe, workplace, fleet, progress)
        importance, depth = run.importance(drawn.width), run.depth(drawn.search)
        strategy = _without_quality(supernet, drawn, importance, depth)
        strategy = replace(strategy, quality=run.quality(drawn.heldout, strategy, importance))
        for used in (drawn.search, drawn.width):
            workplace.clear_states(used)
    return strategy


def _without_quality(supernet: Supernet, drawn: Drawn, importance: Importance, depth: Mapping[int, Choice]) -> Strategy:
    """The strategy before any shape was scored."""
    arch, recipe = supernet.architecture, drawn.recipe
    return Strategy(
        model_id=supernet.identity,
        num_layers=arch.num_layers,
        num_heads=arch.num_heads,
        num_kv_heads=arch.num_kv_heads,
        head_dim=arch.head_dim,
        ffn_size=arch.ffn_size,
        depth={removed: tuple(map(int, choice.active)) for removed, choice in depth.items()},
        depth_metric={removed: choice.metric for removed, choice in depth.items()},
        metric=recipe.depth.metric,
        importance=importance,
        quality_metric=recipe.quality.metric,
        policy=recipe.quality.policy,
        provenance=drawn.provenance,
    )


@dataclass(frozen=True, slots=True)
class _Run:
    """The steps, each of which finds what an earlier run has left in the workplace."""

    stack: LayerStack
    recipe: Recipe
    workplace: Workplace
    fleet: RayFleet | None
    progress: Progress

    def _states(self, samples: Samples) -> StateStore:
        limit_bytes = self.recipe.states_mb * MEGABYTE
        return StateStore(
            self.stack, samples, self.workplace.states(samples), limit_bytes=limit_bytes, progress=self.progress
        )

    def importance(self, samples: Samples) -> Importance:
        metric = self.recipe.width.metric
        return measure_importance(
            self._states(samples),
            metric=metric,
            folder=self.workplace.folder(samples) / f"channels-{metric}",
            progress=self.progress,
        )

    def depth(self, samples: Samples) -> dict[int, Choice]:
        """Number of removed layers -> choice, with the full model at 0."""
        recipe, num_layers = self.recipe.depth, self.stack.architecture.num_layers
        objective = Objective(recipe.metric, samples)
        scorer: Scorer
        if self.fleet is not None:
            states_bytes = self.recipe.states_mb * MEGABYTE
            scorer = self.fleet.scorer(Scoring(samples=samples, objective=recipe.metric, states_bytes=states_bytes))
        else:
            scorer = LocalScorer(self.stack, samples, recipe.metric, states=self._states(samples))
        chunks = all_at_once(samples)
        if recipe.mode == "racing":
            chunks = doubling(samples)
        elif self.stack.is_resident:
            chunks = one_by_one(samples)
        with Ledger(
            scorer, chunks, self.workplace.folder(samples) / f"depth-{recipe.metric}.jsonl", progress=self.progress
        ) as ledger:
            full = (True,) * num_layers
            found = {0: Choice(full, _in_full(ledger, objective, full))}
            judge = ExactJudge(ledger, objective).judge
            if recipe.mode == "racing":
                judge = RacingJudge(ledger, objective, confidence=recipe.confidence).judge
            with self._shown(judge, recipe.removed_of(num_layers)) as shown:
                found |= fill_table(
                    shown,
                    num_layers=num_layers,
                    max_removed=recipe.removed_of(num_layers),
                    keep_last=recipe.keep_last,
                    mode=objective.mode,
                    beam=recipe.beam,
                )
            return {
                m: replace(choice, metric=_in_full(ledger, objective, choice.active)) for m, choice in found.items()
            }

    @contextmanager
    def _shown(self, judge: Judge, max_removed: int) -> Iterator[Judge]:
        """`judge`, with progress in units of work: later rows have more layers above their boundary."""
        num_layers, num_rows = (
            self.stack.architecture.num_layers,
            self.stack.architecture.num_layers - self.recipe.depth.keep_last,
        )
        head = 0 if self.recipe.depth.metric == "accuracy" else self.stack.head_layers

        def work(row: int) -> int:
            first = num_rows - row
            return sum(num_layers - first - m + head for m in range(1, min(row, max_removed) + 1))

        rows = iter(range(1, num_rows + 1))
        with self.progress.track("Searching layers", sum(map(work, range(1, num_rows + 1)))) as advance:

            def judged(challenges: Sequence[Challenge]) -> Sequence[float | None]:
                metrics = judge(challenges)
                advance(work(next(rows)))
                return metrics

            yield judged

    def quality(self, heldout: Samples, strategy: Strategy, importance: Importance) -> dict[Shape, float]:
        recipe = self.recipe.quality
        plans = width_plans(strategy, self.stack.architecture, recipe)
        widths = Widths(importance=importance, plans=plans)
        scorer: Scorer = LocalScorer(self.stack, heldout, recipe.metric, widths=widths)
        if self.fleet is not None:
            scorer = self.fleet.scorer(Scoring(samples=heldout, objective=recipe.metric, widths=widths))
        path = self.workplace.folder(heldout) / f"quality-{recipe.metric}-{widths.digest}.jsonl"
        with Ledger(scorer, all_at_once(heldout), path, progress=self.progress) as ledger:
            return measure_quality(
                ledger,
                Objective(recipe.metric, heldout),
                strategy.depth,
                widths=recipe.widths,
                removed=grid_depths(max(strategy.depth), recipe.depth_step),
                progress=self.progress,
            )


def _in_full(ledger: Ledger, objective: Objective, active: tuple[bool, ...]) -> float:
    """The metric over all samples."""
    cut = KeptLayers(active)
    scores = ledger.all([cut])[0].tolist()
    check_number(scores, cut, objective)
    return objective.value(scores)
