"""Logits recorded from the published code, through import, merge, biases, masks, and the dense files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from amoeba_export.formats.model_type import container_type
from amoeba_export.ir import Shape, Supernet
from amoeba_export.ir.derive import CutRules, derive_plan
from amoeba_export.load import load_supernet
from amoeba_export.load.strategy import write_strategy
from amoeba_export.load.upstream import import_upstream
from amoeba_export.materialize import materialize_subnet
from amoeba_export.model.modeling_amoeba import AmoebaForCausalLM
from amoeba_export.verify import masked_logits
from tests.materialize.subnets import write

SHAPES = [(depth, width) for depth in (6, 5, 4, 3) for width in (1.0, 0.8, 0.65, 0.5)]


def _supernet(goldens: Path, tmp_path: Path, strategy_file: str, adapter: str) -> Supernet:
    base = goldens / "C" / "base"
    strategy = import_upstream(goldens / "C" / strategy_file, load_supernet(str(base)).architecture)
    write_strategy(strategy, tmp_path / "strategy.safetensors")
    return load_supernet(str(base), adapters=[goldens / "C" / adapter], strategy=tmp_path / "strategy.safetensors")


def _compare(supernet: Supernet, recorded: Path, idx: int, tmp_path: Path) -> None:
    arrays = np.load(recorded)
    shape = Shape(int(arrays["num_layers"][idx]), float(arrays["width"][idx]))
    assert supernet.strategy is not None
    rules = CutRules(gate_widths=supernet.adapters[0].width_choices)
    plan = derive_plan(supernet.strategy, supernet.architecture, shape, rules)
    assert plan.active_layers(supernet.architecture.num_layers) == tuple(arrays["active_layers"][idx].astype(int))
    input_ids = torch.from_numpy(arrays["input_ids"])
    expected = torch.from_numpy(arrays["logits"][idx])
    torch.testing.assert_close(masked_logits(supernet, plan, input_ids), expected, rtol=0, atol=1e-4)
    folder = write(materialize_subnet(supernet, plan), tmp_path / "out")
    stock = container_type(plan.dense(supernet.architecture)) != "amoeba"
    loader = AutoModelForCausalLM if stock else AmoebaForCausalLM
    with torch.no_grad():
        dense = loader.from_pretrained(folder)(input_ids).logits
    torch.testing.assert_close(dense, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("idx", range(16), ids=[f"{depth}x{width:g}" for depth, width in SHAPES])
def test_masked_and_dense_give_the_recorded_logits(goldens: Path, tmp_path: Path, idx: int) -> None:
    supernet = _supernet(goldens, tmp_path, "dp_selection_strategy.npy", "adapter")
    _compare(supernet, goldens / "C" / "logits.npz", idx, tmp_path)


@pytest.mark.parametrize("idx", range(16))
def test_with_masks_at_width_one(goldens: Path, tmp_path: Path, idx: int) -> None:
    """The README's ratios: a mask exists at width 1 too, and drops one unit."""
    folder = Path("readme_ratios")
    supernet = _supernet(goldens, tmp_path, str(folder / "dp_selection_strategy.npy"), str(folder / "adapter"))
    _compare(supernet, goldens / "C" / folder / "logits.npz", idx, tmp_path)
