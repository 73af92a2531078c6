"""A source whose weights have several types: nothing is narrowed without being asked."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from amoeba_export.ir import SILENT, Supernet
from amoeba_export.ir.dtype import float_name
from amoeba_export.load import load_supernet
from amoeba_export.materialize import materialize_subnet
from amoeba_export.verify import verify_artifact
from tests.listener import Listener
from tests.materialize.subnets import noise_adapter, noise_strategy, plan_for, write
from tests.tiny import save_tiny


def _save(folder: Path, kinds: Mapping[str, torch.dtype], family: str = "llama") -> Path:
    """A tiny model whose weights have the type of the first key that is in their name, fp32 else."""
    save_tiny(folder, family)
    path = folder / "model.safetensors"
    weights = load_file(path)
    for name, weight in weights.items():
        kind = next((kind for part, kind in kinds.items() if part in name), torch.float32)
        weights[name] = weight.to(kind)
    save_file(weights, path, metadata={"format": "pt"})
    return folder


def _open(folder: Path, progress: Listener | None = None) -> Supernet:
    supernet = load_supernet(str(folder), progress=progress or SILENT)
    return dataclasses.replace(supernet, strategy=noise_strategy(supernet.architecture))


BF16, FP16, FP64 = torch.bfloat16, torch.float16, torch.float64


@pytest.mark.parametrize(
    ("kinds", "named"),
    [
        ({"embed_tokens": BF16}, "float32"),
        ({"norm": torch.float32, "": BF16}, "bfloat16"),
        ({"embed_tokens": BF16, "": FP16}, "float32"),
        ({"embed_tokens": FP64, "": BF16}, "float32"),
    ],
    ids=["bf16 embedding", "fp32 norms", "bf16 and fp16", "fp64 embedding"],
)
def test_each_weight_keeps_its_type(tmp_path: Path, kinds: Mapping[str, torch.dtype], named: str) -> None:
    listener = Listener()
    supernet = _open(_save(tmp_path / "source", kinds), listener)
    subnet = materialize_subnet(supernet, plan_for(supernet, "4x1"))
    folder = write(subnet, tmp_path / "out" / "safetensors")
    written, source = load_file(folder / "model.safetensors"), load_file(tmp_path / "source" / "model.safetensors")
    for name, weight in source.items():
        expected = weight if weight.dtype != FP64 else weight.float()
        assert written[name].dtype == expected.dtype, name
        assert torch.equal(written[name], expected), name
    assert json.loads((folder / "config.json").read_text())["dtype"] == named
    assert float_name(supernet.dtype) == float_name(named)
    (note,) = (note for note in listener.notes if "several types" in note)
    for kind in {weight.dtype for weight in source.values()}:
        count = sum(weight.dtype is kind for weight in source.values())
        assert f"{count} in {str(kind).removeprefix('torch.')}" in note


def test_biases_that_a_cut_adds_have_the_type_of_their_weight_and_others_their_own(tmp_path: Path) -> None:
    kinds = {"q_proj.bias": torch.float32, "o_proj": BF16, "q_proj": BF16}
    supernet = _open(_save(tmp_path / "source", kinds, "qwen2"))
    subnet = materialize_subnet(supernet, plan_for(supernet, "3x0.5"))
    made = {name: weight.dtype for name, weight in subnet.stream()}
    assert made == {spec.name: spec.dtype for spec in subnet.specs}
    attention = "model.layers.0.self_attn"
    assert made[f"{attention}.q_proj.weight"] is BF16
    assert made[f"{attention}.q_proj.bias"] is torch.float32
    assert made[f"{attention}.o_proj.bias"] is BF16
    assert made["model.layers.0.mlp.down_proj.bias"] is torch.float32


def test_what_is_merged_into_coarse_weights_is_verified_as_such(tmp_path: Path) -> None:
    supernet = _open(_save(tmp_path / "source", {"down_proj": BF16}))
    supernet = dataclasses.replace(supernet, adapters=(noise_adapter(supernet),))
    plan = plan_for(supernet, "3x0.5")
    write(materialize_subnet(supernet, plan), tmp_path / "out" / "safetensors")
    (report,) = verify_artifact(tmp_path / "out", supernet, plan).formats
    assert report.dtype == "bf16"
    assert 0 < report.distance.max_rel_diff < 0.05


def test_a_source_of_one_type_says_nothing(tmp_path: Path) -> None:
    listener = Listener()
    assert _open(_save(tmp_path / "source", {"": BF16}), listener).dtype is BF16
    assert not any("types" in note for note in listener.notes)
    _open(_save(tmp_path / "wide", {"": FP64}), listener)
    assert any("float64; they are written as float32" in note for note in listener.notes)
