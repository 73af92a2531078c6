"""Depth search against the published algorithm, on the same model, samples, dtype and threads.

    python -m benchmarks.calibrate search [MODEL] [--metric loss|accuracy] [--samples 16 --window 256 --max-removed 10]
    python -m benchmarks.calibrate memory [--folder DIR]

`search` runs the published loop (each cell: every remaining layer from the embedding on, logits of every token), the
exact search, racing, and a beam of 4, and prints work, time, and how far the metrics are apart. Work is counted, not
timed: a token through a layer is 1, the head as many as it has times the weights of a layer. The published loop takes
most of the time; `--plain-every 10` runs every tenth of its cells and scales, and what the exact search found answers
the others.

`--folder DIR` compares work alone: every score is computed once for all searches and stays in DIR, so that a run that
was stopped goes on; what each search would have had to compute by itself is counted from what it asked for.

`memory` writes a random model with 8 GB of weights, calibrates it, and prints the peak memory of the process.
"""
# Long on purpose: one script, read from top to bottom.

from __future__ import annotations

import argparse
import gc
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from amoeba_export.calibrate.depth import DepthStrategy, fill_table, search_depth
from amoeba_export.calibrate.evaluator import KeptLayers, LocalScorer, Scorer
from amoeba_export.calibrate.exact import ExactJudge
from amoeba_export.calibrate.ledger import Ledger, all_at_once, doubling, one_by_one
from amoeba_export.calibrate.racing import RacingJudge
from amoeba_export.calibrate.recipe import Recipe, load_recipe
from amoeba_export.calibrate.stage import calibrate
from amoeba_export.ir import Supernet
from amoeba_export.ir.metric import better
from amoeba_export.load import load_supernet
from amoeba_export.locations import data_dir
from amoeba_export.model.data import DataRecipe
from amoeba_export.model.head import Objective
from amoeba_export.model.layers import LayerStack, Work
from amoeba_export.model.samples import Samples, read_samples
from amoeba_export.model.states import StateStore
from benchmarks.process import own_peak_mb


@dataclass
class Outcome:
    """One way to search."""

    name: str
    seconds: float
    cpu_seconds: float
    layer_tokens: int
    head_logits: int
    active: dict[int, tuple[bool, ...]]
    metric: dict[int, float]

    def cost(self, supernet: Supernet) -> float:
        """Layer-token forwards, the head counted at its cost."""
        arch = supernet.architecture
        return self.layer_tokens + self.head_logits * arch.hidden_size / arch.prunable_params()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    search = commands.add_parser("search")
    search.add_argument("model", nargs="?", default="demo")
    search.add_argument("--metric", choices=("loss", "accuracy"), default="loss")
    search.add_argument("--samples", type=int, default=16)
    search.add_argument("--window", type=int, default=256)
    search.add_argument("--batch", type=int, default=2)
    search.add_argument("--max-removed", type=int, default=10)
    search.add_argument("--keep-last", type=int, default=1)
    search.add_argument("--seed", type=int, default=0)
    search.add_argument("--threads", type=int, default=torch.get_num_threads())
    search.add_argument("--plain-every", type=int, default=1)
    search.add_argument("--only", nargs="*", choices=("plain", "exact", "racing", "beam"))
    search.add_argument("--folder", type=Path)
    search.add_argument("--json", type=Path)
    memory = commands.add_parser("memory")
    memory.add_argument("--folder", type=Path)
    memory.add_argument("--calibrate-only", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.command == "search":
        compare(args)
    else:
        measure_memory(args)


def compare(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    supernet = load_supernet(args.model)
    choices = args.metric == "accuracy"
    data = DataRecipe(
        file=str(data_dir("calibration") / ("mmlu/mmlu.jsonl" if choices else "wikitext2/wikitext2.txt")),
        kind="choices" if choices else "text",
        window=args.window,
        samples=args.samples,
        heldout=2 * args.samples,
        batch=args.batch,
    )
    samples, heldout = read_samples(data, supernet.folder, seed=args.seed)
    ways = {"exact": exact, "racing": racing, "beam": beam, "plain": plain}
    outcomes = {}
    with tempfile.TemporaryDirectory() as temporary:
        args.scores = Path(temporary) / "scores.jsonl"
        for name in args.only or ways:
            outcomes[name] = outcome = ways[name](supernet, samples, args)
            times = "" if args.folder else f"{outcome.seconds:8.1f} s {outcome.cpu_seconds:8.1f} s of CPU"
            print(f"{name:8} {times} work {outcome.cost(supernet):.4g}", flush=True)
            gc.collect()
    report(supernet, outcomes, heldout, args)
    if args.json:
        args.json.write_text(json.dumps({name: vars(outcome) for name, outcome in outcomes.items()}, indent=1))


@torch.no_grad()
def plain(supernet: Supernet, samples: Samples, args: argparse.Namespace) -> Outcome:
    """The published loop. With `--plain-every`, the cells that are not timed are answered by the exact search."""
    model: Any = AutoModelForCausalLM.from_pretrained(supernet.folder, dtype=torch.float32).eval()
    layers, vocab = list(model.model.layers), supernet.architecture.vocab_size
    objective = Objective(args.metric, samples)
    work, timed, seen = [0, 0], [0.0, 0.0, 0], 0
    with searching(supernet, samples, args) as (_, scorer), Ledger(scorer, one_by_one(samples), args.scores) as ledger:
        judge = ExactJudge(ledger, objective)

        def evaluate(active: np.ndarray, bound: float | None = None) -> float:
            nonlocal seen
            work[0] += int(active.sum()) * samples.num_tokens
            work[1] += samples.num_tokens * vocab
            seen += 1
            if (seen - 1) % args.plain_every:
                return judge(active, bound)
            start, cpu_start = time.perf_counter(), time.process_time()
            model.model.layers = torch.nn.ModuleList(
                [layer for layer, keep in zip(layers, active, strict=True) if keep]
            )
            model.config.num_hidden_layers = len(model.model.layers)
            scores: list[float] = []
            for batch in samples.batches:
                logits = model(batch.tokens_BT, use_cache=False).logits[batch.rows_S, batch.positions_S]
                if args.metric == "accuracy":
                    allowed = logits.gather(1, batch.choices_SC.clamp_min(0)).masked_fill(
                        batch.choices_SC < 0, -torch.inf
                    )
                    chosen = batch.choices_SC.gather(1, allowed.argmax(dim=1, keepdim=True)).squeeze(1)
                    scores.extend((chosen == batch.targets_S).double().tolist())
                else:
                    scores.extend(
                        torch.nn.functional.cross_entropy(logits, batch.targets_S, reduction="none").double().tolist()
                    )
            timed[0] += time.perf_counter() - start
            timed[1] += time.process_time() - cpu_start
            timed[2] += 1
            return objective.value(scores)

        found = search_depth(
            evaluate,
            num_layers=len(layers),
            max_removed=args.max_removed,
            keep_last=args.keep_last,
            mode=objective.mode,
        )
    scale = seen / timed[2]
    return Outcome("plain", timed[0] * scale, timed[1] * scale, work[0], work[1], _actives(found), found.metric)


def _actives(found: DepthStrategy) -> dict[int, tuple[bool, ...]]:
    return {removed: tuple(map(bool, active)) for removed, active in found.active.items()}


def exact(supernet: Supernet, samples: Samples, args: argparse.Namespace, *, beam_size: int = 1) -> Outcome:
    return _ours("exact" if beam_size == 1 else f"beam {beam_size}", supernet, samples, args, beam_size=beam_size)


def beam(supernet: Supernet, samples: Samples, args: argparse.Namespace) -> Outcome:
    return exact(supernet, samples, args, beam_size=4)


def racing(supernet: Supernet, samples: Samples, args: argparse.Namespace) -> Outcome:
    return _ours("racing", supernet, samples, args)


def _ours(name: str, supernet: Supernet, samples: Samples, args: argparse.Namespace, *, beam_size: int = 1) -> Outcome:
    objective = Objective(args.metric, samples)
    chunks = doubling(samples) if name == "racing" else one_by_one(samples)
    with searching(supernet, samples, args) as (work, scorer):
        start, cpu_start = time.perf_counter(), time.process_time()
        with Ledger(scorer, chunks, args.scores if name == "exact" else None) as ledger:
            judge = ExactJudge(ledger, objective).judge
            if name == "racing":
                judge = RacingJudge(ledger, objective, confidence=0.95).judge
            found = fill_table(
                judge,
                num_layers=supernet.architecture.num_layers,
                max_removed=args.max_removed,
                keep_last=args.keep_last,
                mode=objective.mode,
                beam=beam_size,
            )
            active = {removed: choice.active for removed, choice in found.items()}
            scores = ledger.all([KeptLayers(kept) for kept in active.values()])
            metric = {m: objective.value(part.tolist()) for m, part in zip(active, scores, strict=True)}
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    return Outcome(name, seconds, cpu_seconds, work.layer_tokens, work.head_logits, active, metric)


@contextmanager
def searching(supernet: Supernet, samples: Samples, args: argparse.Namespace) -> Iterator[tuple[Work, Scorer]]:
    """A scorer, and the work that one search gives it."""
    stack = LayerStack(supernet, memory_bytes=8 * 10**9)
    for layer_idx in range(supernet.architecture.num_layers):
        stack.layer(layer_idx)  # reading weights is not what is compared
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if args.folder:
            folder = args.folder / f"{args.metric}-{samples.digest[:16]}"
        states = StateStore(stack, samples, folder, limit_bytes=10**12)
        scorer = LocalScorer(stack, samples, args.metric, states=states)
        if args.folder is None:
            yield stack.work, scorer
            return
        with Ledger(scorer, one_by_one(samples), folder / "scores.jsonl") as ledger:
            counted = CountedScorer(ledger, samples, supernet, args.metric)
            yield counted.work, counted


class CountedScorer:
    """Scores from a ledger that searches share, and the work that a `LocalScorer` would have had without it."""

    def __init__(self, shared: Ledger, samples: Samples, supernet: Supernet, metric: str) -> None:
        self.work = Work()
        self._shared = shared
        self._samples = samples
        self._vocab_size = supernet.architecture.vocab_size
        self._accuracy = metric == "accuracy"
        self._num_stored = 0

    def scores(self, cuts: Sequence[KeptLayers], batches: range) -> list[np.ndarray]:
        """See `Scorer`."""
        lowest = [cut.first_removed for cut in cuts]
        if max(lowest) > self._num_stored:  # inputs of the full model's layers, stored for all samples
            self.work.layer_tokens += (max(lowest) - self._num_stored) * self._samples.num_tokens
            self._num_stored = max(lowest)
        runs = {(first, cut.active[: i + 1]) for first, cut in zip(lowest, cuts, strict=True)
                for i in range(first, len(cut.active)) if cut.active[i]}  # fmt: skip
        part = [self._samples.batches[i] for i in batches]
        self.work.layer_tokens += len(runs) * sum(batch.tokens_BT.numel() for batch in part)
        for batch in part:
            rows = batch.choices_SC.numel() if self._accuracy else len(batch.targets_S) * self._vocab_size
            self.work.head_logits += len({cut.active for cut in cuts}) * rows
        parts = [self._shared.chunk(cuts, i) for i in batches]
        return [np.concatenate([found[cut] for found in parts]) for cut in cuts]


def report(supernet: Supernet, outcomes: dict[str, Outcome], heldout: Samples, args: argparse.Namespace) -> None:
    objective = Objective(args.metric, heldout)
    scorer = LocalScorer(LayerStack(supernet, memory_bytes=8 * 10**9), heldout, args.metric)
    with Ledger(scorer, all_at_once(heldout)) as ledger:
        unseen = {
            name: {m: objective.value(ledger.all([KeptLayers(kept)])[0].tolist()) for m, kept in outcome.active.items()}
            for name, outcome in outcomes.items()
        }
    names = list(outcomes)
    print(f"\n{args.metric} by number of removed layers: search set (held-out set)")
    print("removed " + "".join(f"{name:>22}" for name in names))
    for m in range(1, args.max_removed + 1):
        cells = (f"{outcomes[name].metric[m]:.4f} ({unseen[name][m]:.4f})" for name in names)
        print(f"{m:7} " + "".join(f"{cell:>22}" for cell in cells))
    if "plain" in outcomes:
        reference = outcomes["plain"]
        for name in names:
            outcome = outcomes[name]
            line = f"{name}: {outcome.cost(supernet) / reference.cost(supernet):.3f} of the published work"
            if args.folder is None:
                line += f", {reference.seconds / outcome.seconds:.2f} times as fast"
                line += f" ({reference.cpu_seconds / outcome.cpu_seconds:.2f} in CPU time)"
            print(line)
    if "exact" in outcomes:
        for name in set(names) & {"plain", "racing", "beam"}:
            other, ours = outcomes[name], outcomes["exact"]
            same = sum(other.active[m] == ours.active[m] for m in ours.active)
            worst = max((other.metric[m] - value) / value for m, value in ours.metric.items())
            no_worse = not any(better(value, other.metric[m], objective.mode) for m, value in ours.metric.items())
            print(
                f"{name} against exact: {same} of {len(ours.active)} depths the same, largest relative difference of"
                f" the metric {worst:+.2%}, nowhere worse: {no_worse}"
            )


def measure_memory(args: argparse.Namespace) -> None:
    if args.calibrate_only:
        supernet = load_supernet(str(args.calibrate_only), cache_dir=args.calibrate_only / "cache")
        loaded_mb = own_peak_mb()
        quick = load_recipe("quick")
        recipe = Recipe.model_validate(
            quick.model_dump()
            | {
                "memory_mb": 1024,
                "data": quick.data.model_dump() | {"samples": 2, "heldout": 1},
                "depth": {"max_removed": 1, "keep_last": 1},
                "quality": {"widths": [1.0, 0.5]},
            }
        )
        start = time.perf_counter()
        calibrate(supernet, recipe)
        peak_mb = own_peak_mb()
        print(f"peak {peak_mb:.0f} MB ({loaded_mb:.0f} MB once opened), {time.perf_counter() - start:.0f} s")
        return
    folder = args.folder or Path(tempfile.mkdtemp(prefix="amoeba-random-"))
    try:
        write_random_model(folder)
        total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        print(f"{total / 1e9:.2f} GB of weights in {folder}", flush=True)
        subprocess.run(
            [sys.executable, "-m", "benchmarks.calibrate", "memory", "--calibrate-only", str(folder)], check=True
        )
    finally:
        if args.folder is None:
            shutil.rmtree(folder)


def write_random_model(folder: Path) -> None:
    """Llama-3-like, 32 layers, 8 GB in bf16, one shard per layer; tokenizer of the demo model."""
    from safetensors.torch import save_file

    config = LlamaConfig(
        hidden_size=3072,
        intermediate_size=9216,
        num_hidden_layers=32,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=128256,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    for path in load_supernet("demo").folder.glob("*token*"):
        shutil.copy(path, folder)
    dims = {"q": 3072, "k": 1024, "v": 1024}
    weight_map: dict[str, str] = {}

    def write(name: str, shapes: dict[str, tuple[int, ...]]) -> None:
        tensors = {
            key: torch.ones(shape, dtype=torch.bfloat16)
            if len(shape) == 1
            else torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.5 / math.sqrt(shape[-1]))
            for key, shape in shapes.items()
        }
        save_file(tensors, folder / name)
        weight_map.update(dict.fromkeys(shapes, name))

    for i in range(config.num_hidden_layers):
        prefix = f"model.layers.{i}"
        write(
            f"layer-{i:02d}.safetensors",
            {f"{prefix}.self_attn.{p}_proj.weight": (size, 3072) for p, size in dims.items()}
            | {f"{prefix}.self_attn.o_proj.weight": (3072, 3072), f"{prefix}.mlp.down_proj.weight": (3072, 9216)}
            | {f"{prefix}.mlp.{p}_proj.weight": (9216, 3072) for p in ("gate", "up")}
            | {f"{prefix}.{norm}_layernorm.weight": (3072,) for norm in ("input", "post_attention")},
        )
    write(
        "rest.safetensors",
        {
            "model.embed_tokens.weight": (128256, 3072),
            "lm_head.weight": (128256, 3072),
            "model.norm.weight": (3072,),
        },
    )
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


if __name__ == "__main__":
    main()
