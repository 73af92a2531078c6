"""What integers chosen with data are worth: mean KL divergence from fp32 with layers and head in 4 bits.

    python -m benchmarks.rounding --text FILE [--model demo] [--tokens 16384] [--windows 6] [--length 192]

Three ways to the same grid, ONNX `int4` (symmetric, blocks of 32): to nearest, as builders do it; equalized, then to
nearest; equalized, then with data from the recipe of an export. The files have the same size and speed. The head is
rounded in all three, and with it the embedding where both are one; weights are computed with in fp32, and `--text`
should be none that recipes draw from. A second line of each is about the layers alone, with a head in fp32.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from amoeba_export.application.rounded import RECIPE, TOKENS
from amoeba_export.cli.console import Talk
from amoeba_export.formats.onnx.rounding import grid_of, head_grid, scaled_layers
from amoeba_export.ir import Subnet, Supernet
from amoeba_export.load import load_supernet
from amoeba_export.materialize import materialize_subnet
from amoeba_export.model.host import Host
from amoeba_export.model.samples import in_a_row, opening_of, windows_of
from amoeba_export.model.tokenizer import open_tokenizer
from amoeba_export.refit import load_refit_recipe
from amoeba_export.refit.recipe import Draw
from amoeba_export.refit.rounded_layer import RoundedLayer
from amoeba_export.refit.rounding import round_with_data
from amoeba_export.refit.scaled_cut import ScaledCut
from benchmarks.equalize import rounded

DTYPE = "int4"


def head_of(subnet: Subnet) -> str:
    """The weight that logits come from."""
    return subnet.family.weight(subnet.architecture.base.logits_role)


def to_nearest(subnet: Subnet, *, equalized: bool) -> dict[str, torch.Tensor]:
    """The weights of the layers and of the head, rounded one by one."""
    plain = dict(subnet.stream())
    head = plain[head_of(subnet)].float()
    grid = head_grid(head, DTYPE)
    weights = {} if grid is None else {head_of(subnet): rounded(head, grid.block_size)}
    for name, scaled in scaled_layers(subnet, DTYPE):
        weight = scaled if equalized else plain[name].float()
        grid = grid_of(name, scaled, subnet, DTYPE) if weight.dim() == 2 else None
        weights[name] = weight if grid is None else rounded(weight, grid.block_size)
    return weights


def with_data(supernet: Supernet, subnet: Subnet, tokens: int) -> dict[str, torch.Tensor]:
    """The weights of the layers and of the head, as an export chooses them."""
    weights: dict[str, torch.Tensor] = {}

    def take(layers: Iterator[RoundedLayer]) -> None:
        for layer in layers:
            weights.update(layer.others)
            weights.update({name: matrix.values() for name, matrix in layer.matrices.items()})

    round_with_data(
        supernet,
        supernet.full_plan(),
        ScaledCut(
            weights=lambda: scaled_layers(subnet, DTYPE),
            grid_of=lambda name, weight: grid_of(name, weight, subnet, DTYPE),
            head_grid=lambda weight: head_grid(weight, DTYPE),
        ),
        Draw(recipe=load_refit_recipe(RECIPE).model_copy(update={"tokens": tokens})),
        take=take,
        identity={},
        host=Host(progress=Talk()),
    )
    return weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--length", type=int, default=192)
    arguments = parser.parse_args()
    supernet = load_supernet(arguments.model)
    subnet = materialize_subnet(supernet, supernet.full_plan())
    tokenizer = open_tokenizer(supernet.folder)
    text = arguments.text.read_text(encoding="utf-8")[: 10 * arguments.windows * arguments.length]
    ids = in_a_row([text], tokenizer)
    windows = windows_of(ids, arguments.length, opening_of(tokenizer))[: arguments.windows]
    model = AutoModelForCausalLM.from_pretrained(supernet.folder, dtype=torch.float32).eval()
    plain = {name: value.clone() for name, value in model.state_dict().items()}
    if subnet.architecture.base.tied_embeddings:  # the same values a second time
        del plain[supernet.family.weight("head")]

    @torch.no_grad()
    def log_probabilities(weights: Mapping[str, torch.Tensor]) -> Iterator[torch.Tensor]:
        left_out = model.load_state_dict({**plain, **weights}, strict=False)
        assert not left_out.unexpected_keys, left_out
        for window in windows:
            yield torch.log_softmax(model(torch.tensor([window])).logits[0], -1)

    full = list(log_probabilities({}))

    def divergence(weights: Mapping[str, torch.Tensor]) -> float:
        pairs = zip(full, log_probabilities(weights), strict=True)
        return sum(float((p.exp() * (p - q)).sum(-1).mean()) for p, q in pairs) / len(full)

    nearest: tuple[float, float] | None = None
    for name, choose in (
        ("to nearest", partial(to_nearest, subnet, equalized=False)),
        ("equalized, to nearest", partial(to_nearest, subnet, equalized=True)),
        (f"equalized, with data ({arguments.tokens} tokens)", partial(with_data, supernet, subnet, arguments.tokens)),
    ):
        weights = choose()
        layers = {key: weight for key, weight in weights.items() if key != head_of(subnet)}
        found = divergence(weights), divergence(layers)
        nearest = nearest or found
        for what, own, first in zip(("layers and head", "layers"), found, nearest, strict=True):
            print(f"| {name:36} | {what:15} | {own:.4f} | {own / first:.2f} |", flush=True)


if __name__ == "__main__":
    main()
