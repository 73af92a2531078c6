"""W4A16: what `compressed-tensors` and transformers make of the files, and what verification says of other ones."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from amoeba_export.errors import DamagedFile, NotRepresentable, NumbersDiffer, WeightsMismatch
from amoeba_export.formats import FORMATS
from amoeba_export.formats.packed import SCHEMES, Rounded, Scheme, round_to_nearest
from amoeba_export.formats.safetensors import open_writer
from amoeba_export.formats.sizes import weight_bytes
from amoeba_export.ir import SubnetPlan, Supernet
from amoeba_export.materialize import materialize_subnet
from amoeba_export.verify import verify_artifact
from amoeba_export.verify.expected import ExpectedWeights
from amoeba_export.verify.reload import OpenedSafetensors
from amoeba_export.verify.stored import STORED
from amoeba_export.verify.stored.safetensors import SafetensorsWeights
from amoeba_export.verify.weights import check_weights
from tests.materialize.subnets import open_supernet, plan_for, write
from tests.tiny import save_tiny

PROMPT = torch.arange(3, 15)[None]
WIDE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}


@pytest.fixture(scope="module")
def supernets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Supernet]:
    """Groups of 128 with a head of its own, and of 32 with the embedding as head."""
    root = tmp_path_factory.mktemp("packed")
    save_tiny(root / "wide", "llama", **{**WIDE, "tie_word_embeddings": False})
    save_tiny(root / "narrow", "llama")
    return {name: open_supernet(root / name) for name in ("wide", "narrow")}


def cut_of(supernet: Supernet, shape: str) -> SubnetPlan:
    """`full`; one width with biases for what is gone; or layers that differ."""
    if shape == "full":
        return supernet.full_plan()
    plan = plan_for(supernet, "3x0.5", shape)
    layers = tuple(dataclasses.replace(one, ffn=tuple(range(len(one.ffn) // 32 * 32 or 32))) for one in plan.layers)
    return dataclasses.replace(plan, layers=layers)


@pytest.mark.parametrize("dtype", SCHEMES)
@pytest.mark.parametrize(
    ("name", "shape", "group"), [("wide", "full", 128), ("narrow", "full", 32), ("narrow", "adaptive", 32)]
)
def test_compressed_tensors_and_transformers_compute_what_the_files_say(
    dtype: str, name: str, shape: str, group: int, supernets: dict[str, Supernet], tmp_path: Path
) -> None:
    """By the package: its own config class, its own unpacking, the logits of transformers with it."""
    compressed_tensors = pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationConfig
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    supernet = supernets[name]
    folder = write(materialize_subnet(supernet, cut_of(supernet, shape)), tmp_path / "safetensors", dtype=dtype)
    said = json.loads((folder / "config.json").read_text())["quantization_config"]
    scheme = QuantizationConfig.model_validate(said).config_groups["group_0"]
    assert not isinstance(scheme, list)
    assert (scheme.weights.num_bits, scheme.weights.group_size) == (4, group)
    parts = load_file(folder / "model.safetensors")
    module = "model.layers.1.mlp.down_proj"
    state = {key.rpartition(".")[2]: tensor for key, tensor in parts.items() if key.startswith(f"{module}.weight_")}
    compressor = compressed_tensors.BaseCompressor.get_value_from_registry("pack-quantized")
    theirs = compressor.decompress(state, scheme)["weight"]
    ours = SafetensorsWeights(folder, None).read(f"{module}.weight").values
    torch.testing.assert_close(theirs.float(), ours, atol=0, rtol=2**-8)  # theirs is in bf16
    if shape != "adaptive":
        # 0.20 expects zero points that are not packed where a model is opened packed, unlike what it writes itself.
        unpacked = {} if SCHEMES[dtype].symmetric else {"quantization_config": CompressedTensorsConfig(dequantize=True)}
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **unpacked).eval()
        with torch.no_grad():
            logits = model(PROMPT).logits
        expected = OpenedSafetensors(folder).logits(PROMPT)
        torch.testing.assert_close(logits, expected, atol=0.02 * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize("dtype", SCHEMES)
@pytest.mark.parametrize(("name", "shape"), [("wide", "full"), ("narrow", "uniform"), ("narrow", "adaptive")])
def test_an_artifact_is_verified(
    dtype: str, name: str, shape: str, supernets: dict[str, Supernet], tmp_path: Path
) -> None:
    supernet = supernets[name]
    plan = cut_of(supernet, shape)
    write(materialize_subnet(supernet, plan), tmp_path / "safetensors", dtype=dtype)
    expected = ExpectedWeights(supernet, plan)
    dtypes = check_weights(
        tmp_path / "safetensors", STORED["safetensors"](tmp_path / "safetensors", expected.wanted), expected
    )
    assert {dtypes[one] for one in dtypes if one.endswith("_proj.weight")} == {dtype}
    assert dtypes["model.embed_tokens.weight"] == "bf16"
    assert OpenedSafetensors(tmp_path / "safetensors").dtype == dtype


def test_verify_compares_what_the_graph_computes_with_the_weights_that_it_has(
    supernets: dict[str, Supernet], tmp_path: Path
) -> None:
    supernet = supernets["wide"]
    write(materialize_subnet(supernet, supernet.full_plan()), tmp_path / "safetensors", dtype="w4a16-asym")
    report = verify_artifact(tmp_path, supernet, supernet.full_plan())
    assert report.formats[0].dtype == "w4a16-asym"
    assert 0 < report.formats[0].distance.mean_kl < 1


def test_a_cut_keeps_its_biases(supernets: dict[str, Supernet], tmp_path: Path) -> None:
    """Those of what is gone, beside packed weights, and the zeros that a Llama with biases has."""
    supernet = supernets["narrow"]
    plan = cut_of(supernet, "uniform")
    parts = load_file(write(materialize_subnet(supernet, plan), tmp_path / "new", dtype="w4a16") / "model.safetensors")
    plain = load_file(write(materialize_subnet(supernet, plan), tmp_path / "old", dtype="bf16") / "model.safetensors")
    biases = {name for name in plain if name.endswith(".bias")}
    assert "model.layers.0.mlp.down_proj.bias" in biases
    assert bool(plain["model.layers.0.mlp.down_proj.bias"].any())
    untouched = {name for name in biases if not name.endswith("up_proj.bias")}  # channels are made alike
    for name in untouched:
        assert torch.equal(parts[name], plain[name]), name
    assert {name for name in parts if name.endswith(".bias")} == biases


@pytest.mark.parametrize("dtype", SCHEMES)
def test_sizes_are_known_beforehand(dtype: str, supernets: dict[str, Supernet], tmp_path: Path) -> None:
    for name, supernet in supernets.items():
        folder = write(materialize_subnet(supernet, supernet.full_plan()), tmp_path / name, dtype=dtype)
        written = sum(one.numel() * one.itemsize for one in load_file(folder / "model.safetensors").values())
        assert weight_bytes(supernet.architecture.uncut, ("safetensors",), dtype).total == written


def test_rows_that_are_no_whole_groups_are_refused(supernets: dict[str, Supernet]) -> None:
    supernet = supernets["narrow"]
    dense = plan_for(supernet, "3x0.6", "adaptive").dense(supernet.architecture)
    with pytest.raises(NotRepresentable, match="W4A16 packs rows of whole groups of 32, and some are of"):
        FORMATS["safetensors"].check(dense, dtype="w4a16")


def test_another_rounding_takes_the_place_of_ours(supernets: dict[str, Supernet], tmp_path: Path) -> None:
    subnet = materialize_subnet(supernets["wide"], supernets["wide"].full_plan())
    asked = []

    def up(name: str, w_OI: torch.Tensor, group: int, scheme: Scheme) -> Rounded:
        asked.append(name)
        rounded = round_to_nearest(name, w_OI, group, scheme)
        return Rounded((rounded.integers_OI + 1).clamp(-8, 7), rounded.scales_OB, rounded.zeros_OB)

    (tmp_path / "safetensors").mkdir()
    writer = open_writer(subnet, tmp_path / "safetensors", dtype="w4a16", round_weight=up)
    for name, weight in subnet.stream():
        writer.accept(name, weight)
    writer.close()
    assert len(asked) == 4 * 7
    expected = ExpectedWeights(supernets["wide"], supernets["wide"].full_plan())
    with pytest.raises(NumbersDiffer):
        check_weights(tmp_path, STORED["safetensors"](tmp_path / "safetensors", expected.wanted), expected)


def _zero_points(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["symmetric"] = True
    (folder / "config.json").write_text(json.dumps(config))


def _group(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] = 64
    (folder / "config.json").write_text(json.dumps(config))


def _head(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["ignore"] = []
    (folder / "config.json").write_text(json.dumps(config))


def _words(folder: Path) -> None:
    parts = load_file(folder / "model.safetensors")
    parts["model.layers.1.mlp.up_proj.weight_packed"] = parts["model.layers.1.mlp.up_proj.weight_packed"][
        :, :-1
    ].clone()
    save_file(parts, folder / "model.safetensors", metadata={"format": "pt"})


def _scale(folder: Path) -> None:
    parts = load_file(folder / "model.safetensors")
    del parts["model.layers.1.mlp.up_proj.weight_scale"]
    save_file(parts, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("damage", [_zero_points, _group, _head, _words, _scale])
def test_files_that_do_not_fit_what_the_config_says_are_damaged(
    damage: Callable[[Path], None], supernets: dict[str, Supernet], tmp_path: Path
) -> None:
    supernet = supernets["wide"]
    folder = write(materialize_subnet(supernet, supernet.full_plan()), tmp_path / "safetensors", dtype="w4a16-asym")
    damage(folder)
    with pytest.raises(DamagedFile):
        OpenedSafetensors(folder)


@pytest.mark.parametrize("change", ["integers", "zeros", "scale"])
def test_other_integers_are_found(change: str, supernets: dict[str, Supernet], tmp_path: Path) -> None:
    supernet = supernets["wide"]
    plan = supernet.full_plan()
    folder = write(materialize_subnet(supernet, plan), tmp_path / "safetensors", dtype="w4a16-asym")
    parts: dict[str, Any] = load_file(folder / "model.safetensors")
    module = "model.layers.1.mlp.up_proj"
    if change == "integers":
        parts[f"{module}.weight_packed"][0, 0] ^= 0x00000004
    elif change == "zeros":
        parts[f"{module}.weight_zero_point"][0, 0] ^= 0x00000002
    else:
        parts[f"{module}.weight_scale"][0, 0] *= 1.5
    save_file(parts, folder / "model.safetensors", metadata={"format": "pt"})
    expected = ExpectedWeights(supernet, plan)
    with pytest.raises(NumbersDiffer, match=r"layers\.1\.mlp\.up_proj\.weight"):
        check_weights(folder, STORED["safetensors"](folder, expected.wanted), expected)


def test_a_weight_of_another_shape_is_named(supernets: dict[str, Supernet], tmp_path: Path) -> None:
    subnet = materialize_subnet(supernets["wide"], supernets["wide"].full_plan())
    writer = open_writer(subnet, tmp_path, dtype="w4a16")
    with pytest.raises(WeightsMismatch, match=r"up_proj\.weight is \[2, 2\], not \[256, 128\]"):
        writer.accept("model.layers.0.mlp.up_proj.weight", torch.zeros(2, 2))


def test_what_is_missing_is_named_and_not_the_parts_that_wait_for_it(
    supernets: dict[str, Supernet], tmp_path: Path
) -> None:
    """The norm, k and v are scaled with q, and written with it."""
    subnet, lacking = materialize_subnet(supernets["wide"], supernets["wide"].full_plan()), "layers.1.self_attn.q_proj"
    writer = open_writer(subnet, tmp_path, dtype="w4a16")
    for name, weight in subnet.stream():
        if lacking not in name:
            writer.accept(name, weight)
    with pytest.raises(WeightsMismatch) as caught:
        writer.close()
    assert caught.value.what.endswith(f": model.{lacking}.weight is missing.")
