"""The masked net that was fine-tuned is the dense subnet that is exported with its adapter."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from amoeba_export.finetune.adapter import write_adapter
from amoeba_export.finetune.model import SlicedSupernet
from amoeba_export.finetune.settings import LowRankSettings
from amoeba_export.finetune.smol import TrainedLowRank
from amoeba_export.formats.write import write_formats
from amoeba_export.ir import Policy, Shape
from amoeba_export.ir.derive import CutRules, derive_plan
from amoeba_export.load import load_supernet
from amoeba_export.materialize import materialize_subnet
from amoeba_export.verify.masked import masked_logits
from amoeba_export.verify.reload import OPENERS
from tests.finetune.models import tiny_supernet
from tests.finetune.test_model import randomised, tokens

WIDTHS = (1.0, 0.75, 0.5)


@pytest.mark.parametrize(("family", "policy"), [("llama", "uniform"), ("qwen3", "uniform"), ("llama-mha", "adaptive")])
def test_fine_tuned_and_exported_agree_at_ten_random_shapes(
    tiny_dirs: dict[str, Path], tmp_path: Path, family: str, policy: Policy
) -> None:
    """Also with the masked reference of the verify stage, which multiplies by zero: three paths, one function."""
    supernet = tiny_supernet(tiny_dirs[family])
    settings = LowRankSettings(rank=3, experts=4, top_k=2)
    generator = torch.Generator().manual_seed(7)
    low_rank = randomised(TrainedLowRank(supernet.family, supernet.architecture, settings, WIDTHS, generator=generator))
    write_adapter(tmp_path, low_rank, base_model="tiny")
    adapted = dataclasses.replace(
        supernet, adapters=load_supernet(str(tiny_dirs[family]), adapters=[tmp_path]).adapters
    )
    model, rng, input_ids_BT = SlicedSupernet(supernet), np.random.default_rng(3), tokens(1, 14)
    assert supernet.strategy is not None
    for trial in range(10):
        shape = Shape(int(rng.integers(1, 5)), round(float(rng.uniform(0.3, 1.0)), 2))
        plan = derive_plan(supernet.strategy, supernet.architecture, shape, CutRules(policy=policy, gate_widths=WIDTHS))
        with torch.no_grad():
            ours_PV = model.logits(model(input_ids_BT, cut=model.cut(plan), low_rank=low_rank.at(plan)))
            masked_PV = masked_logits(adapted, plan, input_ids_BT).flatten(0, 1)
        folder = tmp_path / f"export-{trial}"
        folder.mkdir()
        write_formats(materialize_subnet(adapted, plan), folder, {"safetensors": "fp32", "onnx": "fp32"})
        for name in ("safetensors", "onnx"):
            dense_PV = OPENERS[name](folder / name).logits(input_ids_BT).flatten(0, 1)
            assert (ours_PV - dense_PV).abs().max() <= 1e-4, (name, shape)
        assert (ours_PV - masked_PV).abs().max() <= 1e-4, shape
