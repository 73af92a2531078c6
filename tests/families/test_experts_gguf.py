"""Experts in GGUF: what llama.cpp's `qwen3moe` holds, what it does not, and what is read from its files.

That its logits and tokens are those of the masked model: `test_containers.py`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import gguf
import numpy as np
import pytest

from amoeba_export.errors import DamagedFile, NotRepresentable, UnsupportedError
from amoeba_export.formats import FORMATS
from amoeba_export.formats.sizes import weight_bytes
from amoeba_export.gguf_file import open_gguf
from amoeba_export.ir import Policy, Shape, SubnetPlan, Supernet
from amoeba_export.load.gguf.metadata import read_metadata
from amoeba_export.load.gguf.tensors import read_model
from amoeba_export.materialize import materialize_subnet
from amoeba_export.verify import verify_artifact
from tests.families.configs import save_family
from tests.formats.bpe import save_bpe
from tests.materialize.subnets import open_supernet, write

WIDE = {"hidden_size": 64, "moe_intermediate_size": 32, "num_experts": 6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts of whole blocks."""
    made = save_family(tmp_path_factory.mktemp("experts"), "qwen3_moe", **WIDE)
    save_bpe(made)
    return made


@pytest.fixture
def supernet(folder: Path) -> Supernet:
    return open_supernet(folder)


def keeping(supernet: Supernet, *counts: int) -> SubnetPlan:
    """All layers and heads, and the first so many experts of each layer."""
    full = supernet.full_plan()
    layers = tuple(
        dataclasses.replace(layer, ffn=tuple(range(count))) for layer, count in zip(full.layers, counts, strict=True)
    )
    policy: Policy = "uniform" if len(set(counts)) == 1 else "adaptive"
    return dataclasses.replace(full, shape=Shape(4, 0.5), policy=policy, layers=layers)


@pytest.mark.parametrize("dtype", ["int8", "int4", "q4_k_m"])
def test_integers_of_experts(supernet: Supernet, dtype: str, tmp_path: Path) -> None:
    """Rows of an expert of its own; a router is never rounded."""
    plan = keeping(supernet, 4, 4, 4, 4)
    subnet = materialize_subnet(supernet, plan)
    write(subnet, tmp_path / "gguf", "gguf", dtype)
    assert verify_artifact(tmp_path, supernet, plan).formats[0].dtype == dtype
    file = open_gguf(tmp_path / "gguf" / "model.gguf")
    kinds = {name: tensor.kind.name for name, tensor in file.tensors.items()}
    assert kinds["blk.1.ffn_gate_inp.weight"] == "F32"
    wanted = {"int8": "Q8_0", "int4": "Q4_0", "q4_k_m": "Q5_0"}[dtype]
    assert {kinds[f"blk.{i}.ffn_gate_exps.weight"] for i in range(4)} == {wanted}
    assert file.tensors["blk.1.ffn_down_exps.weight"].shape == (4, 64, 32)
    stored = sum(tensor.size_bytes for tensor in file.tensors.values())
    assert weight_bytes(subnet.architecture, ("gguf",), dtype).total == stored


def test_what_the_header_says(supernet: Supernet, tmp_path: Path) -> None:
    """A token goes through no more experts than there are."""
    write(materialize_subnet(supernet, keeping(supernet, 1, 1, 1, 1)), tmp_path / "gguf", "gguf", "fp32")
    fields = open_gguf(tmp_path / "gguf" / "model.gguf").fields
    said = {key.removeprefix("qwen3moe."): value for key, value in fields.items() if key.startswith("qwen3moe.")}
    assert (said["expert_count"], said["expert_used_count"], said["expert_feed_forward_length"]) == (1, 1, 32)
    assert said["feed_forward_length"] == 32
    metadata = read_metadata(open_gguf(tmp_path / "gguf" / "model.gguf"))
    assert metadata.facts["experts_per_token"] == 1
    assert {layer.ffn_size for layer in metadata.layers} == {1}


@pytest.mark.parametrize(
    ("counts", "reason"),
    [((4, 4, 3, 4), "one number of experts for all layers"), ((0, 0, 0, 0), "one number of experts for all layers")],
)
def test_layers_with_other_numbers_of_experts_are_refused(
    supernet: Supernet, counts: tuple[int, ...], reason: str
) -> None:
    dense = keeping(supernet, *counts).dense(supernet.architecture)
    with pytest.raises(NotRepresentable, match=f"(?s){reason}.*--format safetensors.*--policy uniform"):
        FORMATS["gguf"].check(dense, dtype="fp32")


def test_shares_that_do_not_sum_to_one_are_refused(tmp_path: Path) -> None:
    other = open_supernet(save_family(tmp_path, "qwen3_moe", norm_topk_prob=False))
    with pytest.raises(NotRepresentable, match="scales the shares of a token's experts to a sum of 1"):
        FORMATS["gguf"].check(other.architecture.uncut, dtype="fp32")


def minimal(path: Path, **keys: int | bool) -> Path:
    """The header of a `qwen3moe`, and no tensors but an embedding."""
    header = gguf.GGUFWriter(path, "qwen3moe")
    for add, value in (
        (header.add_block_count, 1),
        (header.add_embedding_length, 8),
        (header.add_head_count, 2),
        (header.add_key_length, 4),
        (header.add_value_length, 4),
        (header.add_context_length, 16),
    ):
        add(value)
    header.add_layer_norm_rms_eps(1e-6)
    for name, value in ({"expert_count": 4, "expert_used_count": 2, "feed_forward_length": 12} | keys).items():
        add = header.add_bool if isinstance(value, bool) else header.add_uint32
        add(f"qwen3moe.{name}", value)
    header.add_tensor("token_embd.weight", np.ones((5, 8), dtype=np.float32))
    header.write_header_to_file()
    header.write_kv_data_to_file()
    header.write_tensors_to_file()
    header.close()
    return path


def test_an_older_file_divides_the_ffn_by_the_experts_of_a_token(tmp_path: Path) -> None:
    """As llama.cpp does where `expert_feed_forward_length` is not said."""
    found = read_metadata(open_gguf(minimal(tmp_path / "old.gguf")))
    assert found.facts == {"expert_size": 6, "experts_per_token": 2, "shares_sum_to_one": True}


def test_what_is_wrong_with_a_file_of_experts(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"qwen3moe\.expert_weights_norm = False"):
        read_metadata(open_gguf(minimal(tmp_path / "a.gguf", expert_weights_norm=False)))
    with pytest.raises(UnsupportedError, match=r"qwen3moe\.expert_group_count = 2"):
        read_metadata(open_gguf(minimal(tmp_path / "b.gguf", expert_group_count=2)))
    with pytest.raises(DamagedFile, match=r"qwen3moe\.expert_count is 0, which is no size"):
        read_metadata(open_gguf(minimal(tmp_path / "c.gguf", expert_count=0)))
    file = open_gguf(minimal(tmp_path / "d.gguf"))
    with pytest.raises(DamagedFile, match=r"output_norm\.weight is not in it"):
        read_model(file, read_metadata(file))
