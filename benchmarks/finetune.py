"""What a training step costs: a 50 % shape against the full one, four subnets against their sum, SMoL against peft.

    python benchmarks/finetune.py [--model demo] [--rows 4] [--length 256] [--rank 8] [--rounds 5] [--json FILE]

Everything runs in turns, round after round, in one process with the same threads, dtype (fp32) and tokens. Ratios are
medians of the ratios within a round, so that a drifting machine cancels out. Tokens are random (times do not depend on
them) and all of them are labels: every position's logits are needed, which is the least favourable case for us, because
we compute the vocabulary only where there is a label and peft computes it everywhere.

- *step ratio*: forward and backward of a shape that keeps half of the prunable weights, by width, by depth, and by
  both, over forward and backward of the full shape. Multiplying by masks would give 1.
- *sandwich over parts*: one step of four subnets, with its optimizer, over the sum of the four alone, without.
- *tokens/s*: rows x length / time of a step with its optimizer. `peft` is plain LoRA training of the same model in
  transformers.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from amoeba_export.finetune.model import SlicedSupernet
from amoeba_export.finetune.packing import PackedBatch
from amoeba_export.finetune.settings import TARGETS, LowRankSettings, ObjectiveSettings
from amoeba_export.finetune.smol import TrainedLowRank
from amoeba_export.finetune.step import SandwichStep
from amoeba_export.ir import Architecture, Importance, Shape, Strategy, Supernet
from amoeba_export.ir.derive import CutRules, derive_plan
from amoeba_export.load import load_supernet

WIDTHS = (1.0, 0.875, 0.75, 0.625, 0.5)


def any_strategy(architecture: Architecture) -> Strategy:
    """Random importances, layers dropped evenly: what is kept does not change what a step costs."""
    rng = np.random.default_rng(0)
    layers, query = architecture.num_layers, architecture.num_heads * architecture.head_dim
    importance = Importance(
        heads_LN=rng.normal(size=(layers, architecture.num_heads)),
        ffn_LF=rng.normal(size=(layers, architecture.ffn_size)),
        o_mean_LQ=np.zeros((layers, query), dtype=np.float32),
        down_mean_LF=np.zeros((layers, architecture.ffn_size), dtype=np.float32),
        metric="WIFV",
    )
    kept = {n: {round(i) for i in np.linspace(0, layers - 1, n)} for n in range(1, layers + 1)}
    return Strategy(
        model_id=None,
        num_layers=layers,
        num_heads=architecture.num_heads,
        num_kv_heads=architecture.num_kv_heads,
        head_dim=architecture.head_dim,
        ffn_size=architecture.ffn_size,
        depth={layers - n: tuple(int(i in kept[n]) for i in range(layers)) for n in range(1, layers + 1)},
        importance=importance,
    )


def half_shapes(architecture: Architecture) -> dict[str, Shape]:
    layers = architecture.num_layers
    return {"width": Shape(layers, 0.5), "depth": Shape(layers // 2, 1.0), "both": Shape(round(layers * 2 / 3), 0.75)}


def jobs(supernet: Supernet, rows: int, length: int, rank: int) -> tuple[dict[str, Callable[[], None]], list[str]]:
    """What is timed, by name, and the names of the four parts."""
    architecture = supernet.architecture
    assert supernet.strategy is not None
    torch.manual_seed(0)
    input_ids_BT = torch.randint(0, architecture.vocab_size, (rows, length))
    batch = PackedBatch(input_ids_BT, input_ids_BT, torch.ones_like(input_ids_BT))
    settings = LowRankSettings(rank=rank)
    low_rank = TrainedLowRank(
        supernet.family, architecture, settings, WIDTHS, generator=torch.Generator().manual_seed(0)
    )
    optimizer = torch.optim.AdamW(low_rank.parameters(), lr=1e-5)
    full, halves = Shape(architecture.num_layers, 1.0), half_shapes(architecture)
    sandwich = [full, Shape(architecture.num_layers, 0.75), Shape(round(architecture.num_layers * 0.8), 0.875)]
    sandwich.append(Shape(round(architecture.num_layers * 2 / 3), 0.625))
    plans = {
        shape: derive_plan(supernet.strategy, architecture, shape, CutRules(gate_widths=WIDTHS))
        for shape in {*sandwich, *halves.values()}
    }
    step = SandwichStep(SlicedSupernet(supernet), low_rank, plans, ObjectiveSettings())

    def alone(shape: Shape) -> Callable[[], None]:
        def run() -> None:
            step.run(batch, [shape])
            low_rank.zero_grad()

        return run

    def trained(shapes: list[Shape]) -> Callable[[], None]:
        def run() -> None:
            step.run(batch, shapes)
            optimizer.step()
            optimizer.zero_grad()

        return run

    theirs = get_peft_model(
        AutoModelForCausalLM.from_pretrained(supernet.folder, dtype=torch.float32),
        LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(TARGETS), task_type="CAUSAL_LM"),
    )
    their_optimizer = torch.optim.AdamW((p for p in theirs.parameters() if p.requires_grad), lr=1e-5)

    def peft() -> None:
        theirs(input_ids=input_ids_BT, labels=input_ids_BT, use_cache=False).loss.backward()
        their_optimizer.step()
        their_optimizer.zero_grad()

    parts = {f"part {i + 1} {shape}": alone(shape) for i, shape in enumerate(sandwich)}
    half_jobs = {f"half by {how} {shape}": alone(shape) for how, shape in halves.items()}
    timed = {**parts, **half_jobs, "sandwich": trained(sandwich), "smol full": trained([full]), "peft": peft}
    return timed, list(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    supernet = load_supernet(options.model)
    supernet = dataclasses.replace(supernet, strategy=any_strategy(supernet.architecture))
    timed, parts = jobs(supernet, options.rows, options.length, options.rank)
    for run in timed.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(options.rounds):
        for name, run in timed.items():
            begun = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begun)

    def ratio(over: Callable[[int], float], under: Callable[[int], float]) -> float:
        return statistics.median(over(i) / under(i) for i in range(options.rounds))

    tokens = options.rows * options.length
    halves = [name for name in timed if name.startswith("half")]
    report = {
        "model": supernet.name,
        "tokens": tokens,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "rounds": options.rounds,
        "rank": options.rank,
        "seconds_median": {name: statistics.median(values) for name, values in seconds.items()},
        "step_ratio": {name: ratio(lambda i, n=name: seconds[n][i], lambda i: seconds[parts[0]][i]) for name in halves},
        "sandwich_over_parts": ratio(
            lambda i: seconds["sandwich"][i], lambda i: sum(seconds[part][i] for part in parts)
        ),
        "tokens_per_s": {name: tokens / statistics.median(seconds[name]) for name in ("sandwich", "smol full", "peft")},
        "smol_full_over_peft": ratio(lambda i: seconds["smol full"][i], lambda i: seconds["peft"][i]),
    }
    print(json.dumps(report, indent=2))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
