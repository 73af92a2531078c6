"""What equalization before int4 is worth: mean KL divergence from fp32 with a group of matrices in 4 bits, or with all.

    python benchmarks/equalize.py [--model demo] [--tokens 1024] [--block-size 32] [--json FILE]

Weights are rounded as the ONNX writer rounds them and computed with in fp32: activations are not rounded, so that all
differs a little from what `benchmarks/onnx_runtime.py` finds for a graph. Two texts: the start of the calibration text,
on which the exponents in `formats/equalize.py` were chosen, and a later part of it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from amoeba_export.formats.equalize import Equalizer
from amoeba_export.formats.onnx.precision import Blockwise
from amoeba_export.formats.onnx.quantize import quantize_rows
from amoeba_export.ir import SubnetPlan
from amoeba_export.load import load_supernet
from amoeba_export.materialize import materialize_subnet
from amoeba_export.verify.numerics import logits_distance

TEXT = Path(__file__).parents[1] / "calibration" / "wikitext2" / "wikitext2.txt"
LATER = 200_000
"""Characters before the second text."""

GROUPS = {
    "q, k, v": ("q_proj", "k_proj", "v_proj"),
    "v": ("v_proj",),
    "o": ("o_proj",),
    "gate, up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
    "embedding, lm_head": ("embed_tokens", "lm_head"),
    "all": ("_proj", "embed_tokens", "lm_head"),
}


def rounded(w_OI: torch.Tensor, block_size: int) -> torch.Tensor:
    """The weight that a runtime computes with."""
    made = quantize_rows(w_OI, Blockwise(4, block_size))
    packed = torch.from_numpy(made.packed)
    codes = torch.stack([packed & 15, packed >> 4], -1).flatten(2).float() - 8
    return (codes * torch.from_numpy(made.scales)[..., None]).flatten(1)[:, : w_OI.shape[1]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    supernet = load_supernet(arguments.model)
    subnet = materialize_subnet(supernet, SubnetPlan.full(supernet.architecture))
    plain = {name: weight.float() for name, weight in subnet.stream()}
    equalizer = Equalizer(plain, supernet.family)
    equalized = dict(ready for name, weight in plain.items() for ready in equalizer.take(name, weight))
    model = AutoModelForCausalLM.from_pretrained(supernet.folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(supernet.folder)
    text = TEXT.read_text(encoding="utf-8")
    prompts = [
        torch.tensor([tokenizer(text[start : start + 8 * arguments.tokens])["input_ids"][: arguments.tokens]])
        for start in (0, LATER)
    ]

    @torch.no_grad()
    def logits(weights: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        left_out = model.load_state_dict(weights, strict=False)
        assert not left_out.unexpected_keys, left_out
        return [model(prompt).logits for prompt in prompts]

    reference = logits(plain)
    figures: dict[str, dict[str, list[float]]] = {}
    print(f"{'in 4 bits':20} {'as it is':>16} {'equalized':>16}")
    for group, parts in GROUPS.items():
        figures[group] = {}
        for label, weights in (("plain", plain), ("equalized", equalized)):
            mixed = {
                name: rounded(weight, arguments.block_size)
                if weight.dim() == 2 and any(part in name for part in parts)
                else weight
                for name, weight in weights.items()
            }
            found = logits(mixed)
            figures[group][label] = [
                logits_distance([prompt], [a], [b]).mean_kl
                for prompt, a, b in zip(prompts, reference, found, strict=True)
            ]
        columns = ("  ".join(f"{kl:.4f}" for kl in kls) for kls in figures[group].values())
        print(f"{group:20}", *(f"{column:>16}" for column in columns), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
