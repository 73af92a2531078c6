"""What a cut loses, and what refit and heal bring back: losses of artifacts on two texts that nothing was fitted on.

    python -m benchmarks.refit --data DIR --work DIR [--shape S ...] [--heal 5m ...] [--strategy F] [--row R ...]
        [--own-text] [--prompt TEXT ...]

The folder of `--data` holds dolly.jsonl and wikitext2/valid.txt; of both, windows of 512 tokens are read. Each row is
an artifact of `amoeba export --shape S --dtype fp32` in `--work`; those that are there are not made again. `left` is
the share of the rise of FLAP's loss over the full model's that a row keeps. Prints a table, and what each row writes.

`--own-text` is what a user with texts of their own would do: half of the tokens come from text of the same kind as the
two that are measured, wikitext2/train.txt and other records of dolly.jsonl (`--calibration-data`).
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from amoeba_export.api import EvaluateRequest, ExportRequest, evaluate, export
from amoeba_export.cli.console import Talk

PROMPTS = (
    "The capital of France is",
    "To make a good cup of coffee, first",
    "Instruction: Explain in two sentences why the sky is blue.\nResponse:",
)
ROWS: dict[str, tuple[str, str | None]] = {
    "refit fast": ("fast", None),
    "refit full, heal off": ("full", "off"),
    "refit full": ("full", None),
}
"""Name -> `--refit` and `--heal`."""

DOLLY = slice(10_000, 11_500)
"""Records of the second text. The texts that are shipped for refits are of others."""


def texts(data: Path, work: Path) -> dict[str, Path]:
    """Text -> file."""
    dolly = work / "dolly.txt"
    dolly.write_text(_documents((data / "dolly.jsonl").read_text().split("\n")[DOLLY]))
    return {"WikiText-2 valid": data / "wikitext2" / "valid.txt", "Dolly": dolly}


def own_texts(data: Path, work: Path) -> tuple[Path, ...]:
    """Text of the same kind as `texts`, and none of it."""
    lines = (data / "dolly.jsonl").read_text().rstrip("\n").split("\n")
    dolly = work / "dolly-own.txt"
    dolly.write_text(_documents(lines[: DOLLY.start] + lines[DOLLY.stop :]))
    return data / "wikitext2" / "train.txt", dolly


def _documents(lines: Sequence[str]) -> str:
    records = map(json.loads, lines)
    return "\n".join("\n".join(filter(None, (r["instruction"], r["input"], r["output"]))) for r in records)


def losses(model: str, files: dict[str, Path], windows: int) -> dict[str, float]:
    """Text -> nats a token."""
    found = {}
    for name, file in files.items():
        (quality,) = evaluate(EvaluateRequest(model=model, text=file, windows=windows)).shapes
        assert quality.loss is not None, "a text was measured"
        found[name] = quality.loss
    return found


def rows(options: argparse.Namespace, shape: str) -> Iterator[tuple[str, Path, float]]:
    """Name, folder and seconds of each artifact; 0 where it was there."""
    made = {"FLAP's bias": ("off", None), **{name: ROWS[name] for name in options.row}}
    made |= {f"refit full, heal {budget}": ("full", budget) for budget in options.heal}
    own = own_texts(options.data, options.work) if options.own_text else ()
    for name, (refit, heal) in made.items():
        texts_used = own if refit != "off" else ()
        name += ", own text" * bool(texts_used)
        out = options.work / f"{shape}-{re.sub('[^a-z0-9]+', '-', name.lower())}"
        seconds = 0.0
        if not (out / "amoeba.json").is_file():
            started = time.monotonic()
            asked = ExportRequest(
                model=options.model,
                shape=shape,
                strategy=options.strategy,
                dtype="fp32",
                formats=("safetensors",),
                out=out,
                refit=refit,
                heal=heal,
                calibration_data=texts_used,
            )
            export(asked, progress=Talk())
            seconds = time.monotonic() - started
        yield name, out, seconds


def written(folder: Path, prompts: list[str]) -> list[str]:
    """What a model writes after each prompt: 40 tokens, greedy."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    found = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        out = model.generate(ids, max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        found.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--shape", nargs="+", default=["23x0.875"])
    parser.add_argument("--heal", nargs="*", default=[], help="such as 5m 20m")
    parser.add_argument("--row", nargs="*", choices=tuple(ROWS), default=list(ROWS), help="beside those of --heal")
    parser.add_argument("--own-text", action="store_true")
    parser.add_argument("--strategy", type=Path)
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--prompt", nargs="*", default=list(PROMPTS))
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    files = texts(options.data, options.work)
    full = losses(options.model, files, options.windows)
    print(f"| | {' | '.join(f'{name} | left' for name in files)} | seconds |")
    print(f"|---|{'---|---|' * len(files)}---|")
    print(f"| full model | {' | '.join(f'{full[name]:.3f} | ' for name in files)} | |", flush=True)
    said: dict[str, list[str]] = {}
    for shape in options.shape:
        flap: dict[str, float] = {}
        for name, folder, seconds in rows(options, shape):
            found = losses(str(folder), files, options.windows)
            flap = flap or found
            left = {text: (found[text] - full[text]) / (flap[text] - full[text]) for text in files}
            cells = " | ".join(f"{found[text]:.3f} | {left[text]:.2f}" for text in files)
            print(f"| {shape}, {name} | {cells} | {seconds:.0f} |", flush=True)
            said[f"{shape}, {name}"] = written(folder / "safetensors", options.prompt)
    for i, prompt in enumerate(options.prompt):
        print(f"\n{prompt!r}")
        for name, answers in said.items():
            print(f"  {name}: {answers[i]!r}")


if __name__ == "__main__":
    main()
