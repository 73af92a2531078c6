"""The accuracy table: one-for-all fine-tuning against one adapter per shape, and against none.

    python benchmarks/accuracy.py --data DIR --work DIR [--recipe small|full] [--strategy F] [--only METHOD,...]
                                  [--markdown FILE] [--list] [--finished]

The folder of `--data` holds dolly.jsonl, wikitext2/{train_raw_head,valid}.txt and the multiple-choice files of `TASKS`.
At 80, 65 and 50 % of the prunable weights (AmoebaLLM's table 2):

    smol        (a) one run for all shapes: SMoL, sandwich, in-place distillation, balancing; depth by DP, width by FLAP
    width       (b) FLAP alone, one plain LoRA per shape, on labels
    depth       (c) whole layers alone, first those whose removal alone raises perplexity least (Shortened LLaMA), one
                    plain LoRA per shape, on labels
    untrained   (d) the shapes of (a), not fine-tuned
    one-lora, no-balance, even-layers: (a) without SMoL, without balancing, with layers dropped evenly instead of by DP

(b) and (c) train as many steps per shape as (a) trains for all shapes together; a step of (a) runs four subnets.
Everything lies in `--work` and is done once: a run that was stopped, however, goes on where it was. Processes that are
given different methods with `--only` can share the work.
"""
# Long on purpose: one script, read from top to bottom.

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import platform
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer

from amoeba_export.calibrate import calibrate, load_recipe
from amoeba_export.cli.console import Talk
from amoeba_export.evaluate import (
    EvaluatedModel,
    Evaluation,
    ShapeQuality,
    measure_perplexity,
    measure_quality,
    read_quality,
    read_tasks,
    read_windows,
)
from amoeba_export.finetune import LowRankSettings, ObjectiveSettings, Settings, finetune_adapter
from amoeba_export.finetune.model import RunningSubnet, SlicedSupernet
from amoeba_export.finetune.smol import adapters_at
from amoeba_export.ir import Shape, Strategy, SubnetPlan, Supernet
from amoeba_export.ir.derive import CutRules, derive_plan
from amoeba_export.ir.dtype import DTYPES
from amoeba_export.load import load_supernet, read_strategy, write_strategy
from amoeba_export.search import quality_surface

RATIOS = (0.8, 0.65, 0.5)
WIDTHS = (1.0, 0.875, 0.75, 0.625)
ABLATIONS = ("one-lora", "no-balance", "even-layers")
TASKS: Mapping[str, Mapping[str, str]] = {
    "mmlu": {"file": "mmlu_val.jsonl"},
    "arc_easy": {
        "file": "arc_easy_val.jsonl",
        "prompt": "Question: {context}\nAnswer:",
        "metric": "accuracy_norm",
    },
    "arc_challenge": {
        "file": "arc_challenge_val.jsonl",
        "prompt": "Question: {context}\nAnswer:",
        "metric": "accuracy_norm",
    },
    "hellaswag": {"file": "hellaswag_val.jsonl", "metric": "accuracy_norm"},
    "piqa": {"file": "piqa_val.jsonl", "prompt": "Question: {context}\nAnswer:", "metric": "accuracy_norm"},
    "boolq": {"file": "boolq_val.jsonl", "prompt": "{context}\nAnswer:"},
    "winogrande": {"file": "winogrande_val.jsonl"},
}


@dataclass(frozen=True)
class Recipe:
    """How much of it.

    Attributes:
        items: Of each task; None for all.
        windows: Of 512 tokens of WikiText-2; None for all.
    """

    description: str
    settings: Settings
    items: int | None
    windows: int | None


RECIPES = {
    "small": Recipe(
        "a recipe for two CPU cores",
        Settings(
            low_rank=LowRankSettings(rank=8, alpha=16.0),
            widths=WIDTHS,
            max_steps=64,
            batch_size=2,
            max_length=256,
            learning_rate=1e-3,
            max_grad_norm=1.0,
            dtype="bf16",
            save_every=16,
        ),
        items=80,
        windows=40,
    ),
    "full": Recipe(
        "a recipe for one accelerator",
        Settings(
            low_rank=LowRankSettings(rank=64, alpha=16.0),
            widths=WIDTHS,
            max_steps=10_000,
            batch_size=8,
            max_length=512,
            learning_rate=2e-4,
            dtype="bf16",
            save_every=500,
        ),
        items=None,
        windows=None,
    ),
}


@dataclass(frozen=True)
class Row:
    """One line of the table: a shape of a strategy, with the adapter that was trained for it, if any."""

    method: str
    ratio: float
    shape: Shape
    strategy: str
    adapter: str | None

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.method}-{100 * self.ratio:.0f}"


class Bench:
    """Everything that is made, each thing once, under `work`."""

    def __init__(self, data: Path, work: Path, recipe: Recipe, strategy: Path | None) -> None:
        self.data, self.work, self.recipe = data, work, recipe
        self.talk = Talk()
        work.mkdir(parents=True, exist_ok=True)
        self.plain = load_supernet("demo")
        self.layers = self.plain.architecture.num_layers
        self._held: SlicedSupernet | None = None
        self.strategies = self._strategies(strategy)
        self.rows = list(self._rows())

    def supernet(self, strategy: str) -> Supernet:
        """The model under one of the strategies."""
        return dataclasses.replace(self.plain, strategy=self.strategies[strategy])

    def model(self) -> SlicedSupernet:
        """One for all strategies: they share importances, and so compensation."""
        if self._held is None:
            self._held = SlicedSupernet(self.supernet("dp"), dtype=DTYPES[self.recipe.settings.dtype])
        return self._held

    def _strategies(self, given: Path | None) -> dict[str, Strategy]:
        path = given or self.work / "dp.safetensors"
        if not path.is_file():
            write_strategy(calibrate(self.plain, load_recipe("quick"), progress=self.talk), path)
        found = {"dp": read_strategy(path)}
        self.strategies = found
        found["even"] = self._ordered("even", found["dp"], self._even())
        found["single"] = self._ordered("single", found["dp"], self._one_shot(found["dp"]))
        return found

    def _ordered(self, name: str, base: Strategy, depth: Mapping[int, tuple[int, ...]]) -> Strategy:
        """`base` with other layers, through a file so that it has an identity of its own."""
        path = self.work / f"{name}.safetensors"
        if not path.is_file():
            other = dataclasses.replace(base, depth=depth, depth_metric={}, quality={})
            write_strategy(other, path)
        return read_strategy(path)

    def _even(self) -> dict[int, tuple[int, ...]]:
        """Kept layers evenly spread, the first and the last among them."""
        kept = {n: {round(i) for i in np.linspace(0, self.layers - 1, n)} for n in range(2, self.layers + 1)}
        return {self.layers - n: tuple(int(i in kept[n]) for i in range(self.layers)) for n in kept}

    def _one_shot(self, base: Strategy) -> dict[int, tuple[int, ...]]:
        """Layers in the order in which their removal alone raises the loss least."""
        path = self.work / "single.json"
        if path.is_file():
            losses = json.loads(path.read_text())
        else:
            windows = self._windows("train_raw_head.txt", window=256, limit=4)
            full = SubnetPlan.full(self.plain.architecture)
            losses = []
            for layer in range(self.layers):
                kept = tuple(one for one in full.layers if one.source_layer != layer)
                plan = dataclasses.replace(full, shape=Shape(len(kept), 1.0), layers=kept)
                model = RunningSubnet(self.model(), self.model().cut(plan))
                losses.append(measure_perplexity(model, windows).loss)
            path.write_text(json.dumps(losses))
        order = np.argsort(losses)
        return {n: tuple(int(i not in order[:n]) for i in range(self.layers)) for n in range(self.layers)}

    def _windows(self, name: str, *, window: int, limit: int | None) -> list[list[int]]:
        tokenizer = AutoTokenizer.from_pretrained(self.plain.folder)
        return read_windows(self.data / "wikitext2" / name, tokenizer, window=window, limit=limit)

    def _rows(self) -> Iterator[Row]:
        for ratio in RATIOS:
            best = self._best_shape(ratio)
            whole = round(self.layers * ratio)
            yield Row("untrained", ratio, best, "dp", None)
            yield Row("smol", ratio, best, "dp", "smol")
            yield Row("width", ratio, Shape(self.layers, ratio), "dp", f"width-{100 * ratio:.0f}")
            yield Row("depth", ratio, Shape(whole, 1.0), "single", f"depth-{100 * ratio:.0f}")
            for ablation in ABLATIONS:
                yield Row(ablation, ratio, best, "even" if ablation == "even-layers" else "dp", ablation)

    def _best_shape(self, ratio: float) -> Shape:
        """Of the depths that can have it, the shape of this share that calibration found best."""
        strategy = self.strategies["dp"]
        surface = quality_surface(strategy)
        found = []
        for removed in strategy.depth:
            depth = self.layers - removed
            width = round(ratio * self.layers / depth, 4)
            quality = surface.at(depth, width) if min(WIDTHS) <= width <= 1 else None
            if quality:
                found.append((quality.value, -depth, Shape(depth, width)))
        return min(found)[2]

    def train(self, row: Row) -> None:
        """The adapter of a row, unless it is there."""
        if row.adapter is None or (self.work / row.adapter).is_dir():
            return
        settings = self.recipe.settings
        one_lora = dataclasses.replace(settings.low_rank, mode="lora")
        alone = row.shape if row.method in ("width", "depth") else None
        if alone or row.method == "one-lora":
            settings = dataclasses.replace(settings, low_rank=one_lora)
        if row.method == "no-balance":
            settings = dataclasses.replace(settings, objective=ObjectiveSettings(balance=False))
        if not alone:
            # The depths of the DP strategy, so that every one-for-all run draws the same shapes
            depths = tuple(self.layers - removed for removed in self.strategies["dp"].depth)
            settings = dataclasses.replace(settings, depths=depths)
        begun = time.perf_counter()
        self.talk.note(f"Training {row.adapter}")
        finetune_adapter(
            self.supernet(row.strategy),
            data=self.data / "dolly.jsonl",
            out=self.work / row.adapter,
            settings=settings,
            shape=alone,
            resume=True,
            progress=self.talk,
        )
        self.talk.note(f"{row.adapter}: {time.perf_counter() - begun:.0f} s")

    def measure(self, row: Row) -> ShapeQuality:
        """The figures of a row, measured unless they are there."""
        out = self.work / f"{row.name}.json"
        if out.is_file():
            return read_quality(out).shapes[0]
        adapters = () if row.adapter is None else (self.work / row.adapter,)
        supernet = load_supernet("demo", adapters=adapters)
        architecture = self.plain.architecture
        rules = CutRules(gate_widths=supernet.gate_widths)
        plan = derive_plan(self.strategies[row.strategy], architecture, row.shape, rules)
        dense = plan.dense(architecture)
        kept = sum(architecture.prunable_params(layer) for layer in dense.layers)
        size = ShapeQuality(
            shape=row.shape,
            num_params=dense.num_params,
            prunable=kept / (self.layers * architecture.prunable_params()),
        )
        subject = EvaluatedModel(
            facts={"row": dataclasses.asdict(row) | {"shape": str(row.shape)}},
            tokenizer=self.plain.folder,
            max_length=1024,
            shapes=(size,),
            open=lambda shape: RunningSubnet(
                self.model(), self.model().cut(plan), adapters_at(supernet.adapters, plan)
            ),
        )
        measurement = Evaluation(
            facts={"items": self.recipe.items, "windows": self.recipe.windows},
            text=self.data / "wikitext2" / "valid.txt",
            windows=self.recipe.windows,
            tasks=() if row.method in ABLATIONS and self.recipe.items else tuple(self._tasks()),
        )
        self.talk.note(f"Measuring {row.name}")
        return measure_quality(subject, measurement, out=out, progress=self.talk).shapes[0]

    def _tasks(self) -> list:
        path = self.work / "tasks.toml"
        lines = []
        for name, task in TASKS.items():
            entry = {"name": name, **task, "file": str((self.data / task["file"]).resolve())}
            lines += ["[[task]]", *(f"{key} = {json.dumps(value)}" for key, value in entry.items())]
        path.write_text("\n".join(lines) + "\n")
        return read_tasks(path, limit=self.recipe.items)


def markdown(bench: Bench, measured: Mapping[str, ShapeQuality]) -> str:
    """The table, what it says, and how it was made."""
    settings, recipe = bench.recipe.settings, bench.recipe
    header = ["share", "method", "shape", "weights", "WikiText-2 ppl", *TASKS, "average"]
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    for row in bench.rows:
        entry = measured.get(row.name)
        cells = [f"{100 * row.ratio:.0f} %", row.method, str(row.shape)]
        if entry is None:
            lines.append(f"| {' | '.join([*cells, 'not run', *[''] * (len(header) - 4)])} |")
            continue
        cells.append(f"{entry.num_params / 1e6:.1f} M")
        cells.append(f"{entry.perplexity or math.nan:.1f}")
        scores = [entry.tasks.get(name) for name in TASKS]
        cells += ["" if score is None else f"{100 * score.score:.1f}" for score in scores]
        average, error = _average(entry)
        cells.append("" if average is None else f"{100 * average:.1f} ± {100 * error:.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    items = "all items" if recipe.items is None else f"{recipe.items} items"
    text = "all of it" if recipe.windows is None else f"its first {recipe.windows} windows"
    notes = [
        f"Recipe: {recipe.description}. {settings.max_steps} steps of {settings.batch_size} rows of "
        f"{settings.max_length} tokens (Dolly), rank {settings.low_rank.rank}, learning rate "
        f"{settings.learning_rate:g}, {settings.dtype}; WikiText-2 valid, {text} of 512 tokens; {items} a task, the "
        f"same for every row. Accuracies in percent; after ±, one standard error of the average. {platform.machine()}, "
        f"{os.cpu_count()} CPUs, torch {torch.__version__}.",
        *_verdicts(measured),
    ]
    return "\n".join(lines) + "\n\n" + "\n".join(f"- {note}" for note in notes) + "\n"


def _average(entry: ShapeQuality) -> tuple[float | None, float]:
    variance = sum(score.stderr**2 for score in entry.tasks.values())
    return entry.task_average, math.sqrt(variance) / max(len(entry.tasks), 1)


def _verdicts(measured: Mapping[str, ShapeQuality]) -> Iterator[str]:
    """What the issue of one adapter for all shapes comes down to, ratio by ratio."""
    for ratio in RATIOS:
        ours = measured.get(f"smol-{100 * ratio:.0f}")
        for other in ("untrained", "width", "depth"):
            theirs = measured.get(f"{other}-{100 * ratio:.0f}")
            if ours is None or theirs is None:
                yield f"{100 * ratio:.0f} %: one-for-all against {other} was not run."
                continue
            (mine, my_error), (their, their_error) = _average(ours), _average(theirs)
            assert mine is not None and their is not None
            difference, noise = 100 * (mine - their), 100 * math.hypot(my_error, their_error)
            word = "above" if difference > noise else "below" if difference < -noise else "level with"
            yield (
                f"{100 * ratio:.0f} %: one-for-all is {word} {other} on the task average ({difference:+.1f} points, "
                f"noise {noise:.1f}), perplexity {ours.perplexity:.1f} against {theirs.perplexity:.1f}."
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--recipe", choices=RECIPES, default="small")
    parser.add_argument("--strategy", type=Path, help="of (a) and (d); calibrated with the recipe 'quick' if left out")
    parser.add_argument("--only", type=lambda text: text.split(","), metavar="METHOD,...", help="leave the others out")
    parser.add_argument("--markdown", type=Path, help="write the table there instead of to the screen")
    parser.add_argument("--list", action="store_true", help="show what would be trained and measured")
    parser.add_argument(
        "--finished", action="store_true", help="train and measure nothing more: the table of what is there"
    )
    options = parser.parse_args()
    bench = Bench(options.data, options.work / options.recipe, RECIPES[options.recipe], options.strategy)
    rows = [row for row in bench.rows if options.only is None or row.method in options.only]
    if options.list:
        for row in rows:
            print(row)
        return
    measured = {}
    for row in rows:
        if not options.finished:
            bench.train(row)
            measured[row.name] = bench.measure(row)
        elif (path := bench.work / f"{row.name}.json").is_file():
            measured[row.name] = read_quality(path).shapes[0]
    text = markdown(bench, measured)
    if options.markdown:
        options.markdown.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
