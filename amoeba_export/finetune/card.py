"""The model card of an adapter, and the facts of its run for programs."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from amoeba_export.finetune.sampling import ShapeSampler
from amoeba_export.finetune.settings import Settings
from amoeba_export.ir import Supernet
from amoeba_export.shown import for_markdown, for_terminal

FACTS = "amoeba_adapter.json"

_CARD = """\
---
base_model: {base_yaml}
library_name: peft
tags:
- amoeba
- lora
---

# {title}

{what}

| | |
|---|---|
| base model | {base} (sha256 {model}) |
| strategy | sha256 {strategy} |
| data | sha256 {data} |
| shapes | {shapes} |
| adapter | {adapter} |
| recipe | {recipe} |

## Use

    amoeba export {base_word} --strategy strategy.safetensors --adapter DIR --shape {example}
    amoeba evaluate {base_word} --strategy strategy.safetensors --adapter DIR --shape {example}

Give the strategy that it was trained with: it decides which weights a shape keeps. {note}

## Files

`training.jsonl` has one line per step; `loss.png` shows it; `{facts}` has every setting of the run.

## Method

AmoebaLLM (Fu et al., NeurIPS 2024, arXiv 2411.10606).
"""


def write_card(
    folder: Path, supernet: Supernet, settings: Settings, sampler: ShapeSampler, facts: Mapping[str, Any]
) -> None:
    """Write `README.md` and `amoeba_adapter.json`."""
    low_rank, shapes = settings.low_rank, sampler.shapes()
    smol, many = low_rank.mode == "smol", len(shapes) > 1
    experts = f", {low_rank.experts} experts, top {low_rank.top_k}" if smol else ""
    text = _CARD.format(
        base=for_markdown(supernet.name),
        base_yaml=json.dumps(supernet.name) if re.search(r"[^\w./-]", supernet.name) else supernet.name,
        base_word=shlex.quote(" ".join(for_terminal(supernet.name).split())),
        title=f"{'One-for-all adapter' if many else f'Adapter for {shapes[0]}'} of {for_markdown(supernet.name)}",
        what=(
            "Trained once for every shape below; pick one, and its dense model follows without further training."
            if many
            else f"Trained for the one shape {shapes[0]}."
        ),
        model=supernet.identity,
        strategy=facts["strategy"] or "unknown",
        data=facts["data"],
        shapes=(
            f"depths {', '.join(map(str, sampler.depths))}; widths {', '.join(f'{w:g}' for w in sampler.widths)}"
            if many
            else str(shapes[0])
        ),
        adapter=f"{low_rank.mode}, rank {low_rank.rank}{experts}, alpha {low_rank.alpha:g}, on "
        + ", ".join(low_rank.targets),
        recipe=f"{settings.max_steps} steps of {len(sampler.sample(0))} subnets, {facts['processes']} x "
        f"{settings.batch_size} x {settings.gradient_accumulation} rows of {settings.max_length} tokens, learning rate "
        f"{settings.learning_rate:g} ({settings.schedule}), {settings.dtype}, seed {settings.seed}",
        example=shapes[-1],
        note=(
            "A SMoL adapter is a mixture: AmoebaLLM's own code and amoeba read it, stock peft does not."
            if smol
            else "It is a standard PEFT LoRA as well."
        ),
        facts=FACTS,
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
    (folder / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
