"""Channels scaled before rounding: which factors a file has, also where the gain of a norm tells none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from amoeba_export.load import load_supernet
from amoeba_export.materialize import materialize_subnet
from amoeba_export.verify.expected import ExpectedWeights
from amoeba_export.verify.stored import STORED
from amoeba_export.verify.weights import check_weights
from tests.families.configs import save_family
from tests.formats.bpe import save_bpe
from tests.materialize.subnets import write

GAINS = [0.0, 1e-8, -3e-7, 2e-6, 1e-5, -1e-4, 4e-4, -3e-3, 0.02, -0.02, 1.0, -1.0]
"""Steps of fp32 around one are 6e-8: less is left of some of these in a file that holds them less one."""


def save_with_gains(folder: Path, family: str) -> None:
    """A tiny model whose norms have these gains, before columns of very different sizes."""
    save_family(folder, family)
    save_bpe(folder)
    tensors = load_file(folder / "model.safetensors")
    gains = torch.tensor(GAINS) - (1.0 if family.startswith("gemma") else 0.0)
    sizes = torch.exp2(torch.linspace(-5, 5, len(GAINS)))
    for name in ("input_layernorm", "pre_feedforward_layernorm", "post_attention_layernorm"):
        for layer in (0, 1):
            norm = tensors.get(f"model.layers.{layer}.{name}.weight")
            if norm is not None:
                norm[: len(GAINS)] = gains
    for name, weight in tensors.items():
        if name.split(".")[-2] in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
            weight[:, : len(GAINS)] *= sizes
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("container", "dtype"),
    [("onnx", "int8"), ("onnx", "int4"), ("onnx", "int4-mixed"), ("gguf", "int4"), ("safetensors", "w4a16")],
)
@pytest.mark.parametrize("family", ["gemma3", "gemma2", "smollm3"])
def test_gains_near_zero_tell_no_factor(family: str, container: str, dtype: str, tmp_path: Path) -> None:
    save_with_gains(tmp_path / "model", family)
    supernet = load_supernet(str(tmp_path / "model"))
    plan = supernet.full_plan()
    folder = write(materialize_subnet(supernet, plan), tmp_path / "out", container, dtype)
    expected = ExpectedWeights(supernet, plan)
    check_weights(folder, STORED[container](folder, expected.wanted), expected)
