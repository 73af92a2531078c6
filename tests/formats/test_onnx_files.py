"""What is on disk: bytes, places, references, the files beside the model, and what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx.external_data_helper import ExternalDataInfo

from amoeba_export.errors import DiskFull, NotRepresentable, UnknownName, WeightsMismatch
from amoeba_export.formats import FORMATS
from amoeba_export.formats.onnx import write_random
from amoeba_export.ir import DenseArchitecture, Subnet
from tests.formats.onnx_model import OnnxDecoder, random_weights, subnet_of, write_onnx
from tests.formats.test_onnx_values import adaptive, tokens

DTYPES = ("fp32", "fp16", "bf16", "int8", "int4")


@pytest.fixture
def dense() -> DenseArchitecture:
    return adaptive(qkv_bias=True, tied_embeddings=True)


@pytest.fixture
def subnet(dense: DenseArchitecture, tmp_path: Path) -> Subnet:
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer.json").write_text("{}")
    (source / "generation_config.json").write_text('{"eos_token_id": [2, 5], "do_sample": true, "top_k": null}')
    (source / "LICENSE").write_text("as is")
    return subnet_of(dense, random_weights(dense), source)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def stored(folder: Path) -> dict[str, tuple[int, int]]:
    """Offset and length of each tensor of the data file."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    infos = {t.name: ExternalDataInfo(t) for t in model.graph.initializer if t.external_data}
    assert {info.location for info in infos.values()} == {"model.onnx.data"}
    return {name: (info.offset, info.length) for name, info in infos.items()}


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_checker_accepts_the_ort_dialect(dtype: str, subnet: Subnet, tmp_path: Path) -> None:
    onnx.checker.check_model(str(write_onnx(subnet, tmp_path / "onnx", dtype=dtype) / "model.onnx"))


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_the_standard_dialect_uses_the_standard_alone(dtype: str, subnet: Subnet, tmp_path: Path) -> None:
    path = write_onnx(subnet, tmp_path / "onnx", dtype=dtype, dialect="standard") / "model.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(path, load_external_data=False)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 18)]
    assert {node.domain for node in model.graph.node} == {""}


def test_bf16_stores_what_it_is_given(tmp_path: Path) -> None:
    """No CPU kernels run it; that its weights are those of the fp32 graph is what can be seen here."""
    dense = adaptive(qk_norm=True, family="qwen3")
    rounded = {name: weight.bfloat16() for name, weight in random_weights(dense).items()}
    half = write_onnx(subnet_of(dense, rounded, tmp_path), tmp_path / "half", dtype="bf16", dialect="standard")
    wide = write_onnx(subnet_of(dense, rounded, tmp_path), tmp_path / "wide", dialect="standard")
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(half / "model.onnx").graph.initializer}
    for tensor in onnx.load(wide / "model.onnx").graph.initializer:
        if tensor.name in rounded:
            np.testing.assert_array_equal(
                weights[tensor.name].astype(np.float32), onnx.numpy_helper.to_array(tensor), tensor.name
            )


def test_same_weights_in_any_order_are_the_same_bytes(subnet: Subnet, tmp_path: Path) -> None:
    for dtype in DTYPES:
        first = digests(write_onnx(subnet, tmp_path / f"{dtype}-1", dtype=dtype))
        (tmp_path / f"{dtype}-2").mkdir()
        writer = FORMATS["onnx"].open_writer(subnet, tmp_path / f"{dtype}-2", dtype=dtype)
        for name, weight in reversed(list(subnet.stream())):
            writer.accept(name, weight)
        writer.close()
        assert digests(tmp_path / f"{dtype}-2") == first


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_are_aligned_and_do_not_overlap(dtype: str, subnet: Subnet, tmp_path: Path) -> None:
    folder = write_onnx(subnet, tmp_path / "onnx", dtype=dtype)
    end = 0
    for offset, length in sorted(set(stored(folder).values())):
        assert offset >= end
        assert offset % (4096 if length >= 4096 else 64) == 0
        end = offset + length
    assert (folder / "model.onnx.data").stat().st_size == end


@pytest.mark.parametrize("dtype", ["fp32", "int8", "int4"])
def test_tied_embeddings_are_stored_once(dtype: str, subnet: Subnet, tmp_path: Path) -> None:
    places = stored(write_onnx(subnet, tmp_path / "onnx", dtype=dtype))
    names = [name for name in places if "embed" in name or "lm_head" in name]
    expected = {
        "fp32": ["model.embed_tokens.weight"],
        # The gather and the product want the same bytes in different shapes.
        "int8": [
            "model.embed_tokens.weight_q8_rows",
            "model.embed_tokens.weight_scales",
            "model.embed_tokens.weight_q8",
        ],
        "int4": [
            "model.embed_tokens.weight_q4_rows",
            "model.embed_tokens.weight_scales",
            "model.embed_tokens.weight_q4",
        ],
    }
    assert sorted(names) == sorted(expected[dtype])
    if dtype != "fp32":
        whole = f"model.embed_tokens.weight_q{dtype.removeprefix('int')}"
        assert places[f"{whole}_rows"] == places[whole]


@pytest.mark.parametrize("dtype", ["fp32", "int4"])
def test_nothing_is_copied_between_gate_up_and_down(dtype: str, subnet: Subnet, tmp_path: Path) -> None:
    folder = write_onnx(subnet, tmp_path / "onnx", dtype=dtype)
    nodes = onnx.load(folder / "model.onnx", load_external_data=False).graph.node
    of_a_layer = [node.name.rpartition("/")[2] for node in nodes if node.name.startswith("/model/layers/0/mlp")]
    assert of_a_layer == ["gate_proj", "up_proj", "silu", "gated", "down_proj"]


def test_untied_quantized_embeddings_leave_nothing_unused(tmp_path: Path) -> None:
    dense = adaptive(qkv_bias=True)
    folder = write_onnx(subnet_of(dense, random_weights(dense), tmp_path), tmp_path / "onnx", dtype="int4")
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    used = {name for node in graph.node for name in node.input}
    assert [t.name for t in graph.initializer if t.name not in used] == []


def test_files_beside_the_model(subnet: Subnet, tmp_path: Path) -> None:
    folder = write_onnx(subnet, tmp_path / "onnx", dtype="int4")
    assert sorted(path.name for path in folder.iterdir()) == [
        "LICENSE",
        "config.json",
        "genai_config.json",
        "generation_config.json",
        "model.onnx",
        "model.onnx.data",
        "tokenizer.json",
    ]
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "llama"  # no code of ours is needed beside a graph
    assert config["dtype"] == "float32"
    genai = json.loads((folder / "genai_config.json").read_text())
    assert genai["model"] | {"decoder": {}} == {
        "type": "llama",
        "vocab_size": 128,
        "context_length": 64,
        "bos_token_id": 2,
        "eos_token_id": [2, 5],
        "pad_token_id": 2,
        "decoder": {},
    }
    decoder = genai["model"]["decoder"]
    assert (decoder["num_hidden_layers"], decoder["num_attention_heads"], decoder["num_key_value_heads"]) == (5, 4, 2)
    assert (genai["search"]["do_sample"], genai["search"]["top_k"], genai["search"]["max_length"]) == (True, 50, 64)


def test_the_standard_dialect_has_no_genai_config(subnet: Subnet, tmp_path: Path) -> None:
    folder = write_onnx(subnet, tmp_path / "onnx", dialect="standard")
    assert not (folder / "genai_config.json").exists()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_random_model_has_the_graph_of_the_real_one(
    dtype: str, subnet: Subnet, dense: DenseArchitecture, tmp_path: Path
) -> None:
    real = write_onnx(subnet, tmp_path / "real", dtype=dtype)
    for seed in (0, 1):
        (tmp_path / f"random-{seed}").mkdir()
        write_random(dense, tmp_path / f"random-{seed}", dtype=dtype, seed=seed)
        assert (tmp_path / f"random-{seed}" / "model.onnx").read_bytes() == (real / "model.onnx").read_bytes()
    first, second = (tmp_path / f"random-{seed}" / "model.onnx.data" for seed in (0, 1))
    assert first.read_bytes() != second.read_bytes()
    if dtype != "bf16":
        logits = OnnxDecoder(tmp_path / "random-0")(tokens(1, 8))
        assert logits.isfinite().all()
        assert 0.01 < logits.std() < 100


def test_bf16_is_moved_as_fp32(subnet: Subnet, tmp_path: Path) -> None:
    """onnxruntime's CUDA provider fails on a ReverseSequence of bfloat16, but only when it runs."""
    path = write_onnx(subnet, tmp_path / "onnx", dtype="bf16") / "model.onnx"
    nodes = onnx.load(path, load_external_data=False).graph.node
    maker = {name: node for node in nodes for name in node.output}
    moves = [node for node in nodes if node.op_type == "ReverseSequence"]
    sources = [maker[node.input[0]] for node in moves]
    assert len(moves) == 4
    casts = [node for node in sources if node not in moves]
    assert [(node.op_type, node.attribute[0].i) for node in casts] == [("Cast", onnx.TensorProto.FLOAT)] * 2


def test_onnxruntime_infers_the_shape_of_every_product(subnet: Subnet, tmp_path: Path) -> None:
    """Values of one known shape share memory; of unknown shapes, each gets its own, and a prefill leaves the caches."""
    path = write_onnx(subnet, tmp_path / "onnx") / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    products = [node.output[0] for node in model.graph.node if node.op_type == "FusedMatMul"]
    inner = [name for name in products if name != "logits"]
    model.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in inner)
    path.write_bytes(model.SerializeToString())
    session = onnxruntime.InferenceSession(str(path))
    shapes = {value.name: value.shape for value in session.get_outputs()}
    assert len(inner) > 8
    assert [shapes[name][:2] for name in inner] == [["batch", "sequence"]] * len(inner)


def test_a_random_standard_model_runs(dense: DenseArchitecture, tmp_path: Path) -> None:
    write_random(dense, tmp_path, dialect="standard")
    assert 0.01 < OnnxDecoder(tmp_path)(tokens(1, 8)).std() < 100


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("model.norm.weight", (64,), "model.norm.weight was given twice"),
        ("model.layers.0.self_attn.q_proj.weight", (64, 64), "{name} is not part of this model"),
        ("model.layers.1.mlp.up_proj.bias", (64,), "{name} is [64], not [96]"),
    ],
)
def test_a_weight_that_does_not_belong(
    name: str, shape: tuple[int, ...], message: str, subnet: Subnet, tmp_path: Path
) -> None:
    (tmp_path / "onnx").mkdir()
    writer = FORMATS["onnx"].open_writer(subnet, tmp_path / "onnx", dtype="fp32")
    writer.accept("model.norm.weight", torch.ones(64))
    with pytest.raises(WeightsMismatch) as caught:
        writer.accept(name, torch.ones(shape))
    assert caught.value.problems == (message.format(name=name),)


def test_missing_weights_are_named(subnet: Subnet, tmp_path: Path) -> None:
    (tmp_path / "onnx").mkdir()
    writer = FORMATS["onnx"].open_writer(subnet, tmp_path / "onnx", dtype="fp32")
    for name, weight in subnet.stream():
        if not name.startswith("model.layers.2.mlp"):
            writer.accept(name, weight)
    with pytest.raises(WeightsMismatch) as caught:
        writer.close()
    assert sorted(caught.value.problems) == [
        "model.layers.2.mlp.down_proj.bias is missing",
        "model.layers.2.mlp.down_proj.weight is missing",
        "model.layers.2.mlp.gate_proj.weight is missing",
        "model.layers.2.mlp.up_proj.weight is missing",
    ]
    assert not (tmp_path / "onnx" / "model.onnx").exists()


def test_a_full_disk_is_found_before_the_work(subnet: Subnet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1))
    with pytest.raises(DiskFull, match="bytes are needed and 1 are free"):
        write_onnx(subnet, tmp_path / "onnx")
    assert list((tmp_path / "onnx").iterdir()) == []


def test_a_value_beyond_fp16_is_refused(subnet: Subnet, tmp_path: Path) -> None:
    (tmp_path / "onnx").mkdir()
    writer = FORMATS["onnx"].open_writer(subnet, tmp_path / "onnx", dtype="fp16")
    with pytest.raises(NotRepresentable) as caught:
        writer.accept("model.norm.weight", torch.full((64,), 1e5))
    assert str(caught.value) == (
        "fp16 cannot hold this plan: values of model.norm.weight exceed its range.\n"
        "  next:  Use one of: --dtype bf16, --dtype fp32."
    )


@pytest.mark.parametrize(
    ("overrides", "settings", "message"),
    [
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            {},
            "ONNX cannot hold this plan: the angles of its RoPE (dynamic) change with the length of the sequence.\n"
            "  next:  Use one of: --format safetensors.",
        ),
        (
            {},
            {"dtype": "int4", "dialect": "standard"},
            "ONNX without onnxruntime's operators cannot hold this plan: int4 weights need MatMulNBits.\n"
            "  next:  Use one of: the dialect ort, --dtype fp16, --dtype fp32.",
        ),
        (
            {},
            {"dtype": "q4_0"},
            "ONNX cannot hold this plan: q4_0 is not one of its dtypes.\n"
            "  next:  Use one of: --dtype fp32, --dtype fp16, --dtype bf16, --dtype int8, --dtype int4-mixed, "
            "--dtype int4.",
        ),
    ],
)
def test_what_is_not_representable(
    overrides: dict[str, Any], settings: dict[str, str], message: str, tmp_path: Path
) -> None:
    dense = adaptive(**overrides)
    with pytest.raises(NotRepresentable) as caught:
        write_random(dense, tmp_path, **settings)
    assert str(caught.value) == message


def test_an_unknown_dialect_is_named(dense: DenseArchitecture, tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match=r"There is no ONNX dialect named 'orr'\. Did you mean 'ort'\?"):
        write_random(dense, tmp_path, dialect="orr")
