"""GGUF files: what llama.cpp makes of them, and what they say about themselves."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from amoeba_export.errors import DamagedFile, NotRepresentable, WeightsMismatch
from amoeba_export.formats import FORMATS
from amoeba_export.ir import DenseArchitecture, SubnetPlan, Supernet
from amoeba_export.llama_cpp.architectures import ARCHITECTURES
from amoeba_export.load import load_supernet
from amoeba_export.materialize import materialize_subnet
from amoeba_export.verify.gguf_file import OpenedGguf
from amoeba_export.verify.masked import masked_logits
from tests.formats.bpe import CHAT_TEMPLATE, save_bpe
from tests.formats.test_equalize import equalized
from tests.materialize.subnets import bare_plan, noise_adapter, open_supernet, plan_for, write
from tests.tiny import FAMILIES, save_tiny

PROMPT = torch.arange(3, 15)[None]
END = 2


@pytest.fixture(scope="module")
def supernets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Supernet]:
    """Every family with a tokenizer beside it."""
    root = tmp_path_factory.mktemp("gguf")
    for family in FAMILIES:
        save_tiny(root / family, family)
        save_bpe(root / family)
    return {family: open_supernet(root / family) for family in FAMILIES}


def plan_named(supernet: Supernet, name: str) -> SubnetPlan:
    if name == "full":
        return SubnetPlan.full(supernet.architecture)
    if name == "bare":
        return bare_plan(supernet)
    return plan_for(supernet, "3x0.5", "adaptive" if name == "adaptive" else "uniform")


CASES = [
    ("llama", "full", "llama"),
    ("llama", "uniform", "llama"),
    ("llama", "adaptive", "deci"),
    ("llama", "bare", "deci"),
    ("llama-mha", "uniform", "llama"),
    ("mistral", "bare", "deci"),
    ("qwen2", "full", "qwen2"),
    ("qwen2", "uniform", "llama"),
    ("qwen2", "bare", "deci"),
    ("qwen3", "full", "qwen3"),
]


@pytest.fixture(scope="module")
def written(supernets: dict[str, Supernet], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    root = tmp_path_factory.mktemp("written")
    folders = {}
    for family, name, _ in CASES:
        subnet = materialize_subnet(supernets[family], plan_named(supernets[family], name))
        folders[family, name] = write(subnet, root / f"{family}-{name}", "gguf", "fp32")
    return folders


def fields_of(folder: Path) -> dict[str, object]:
    return {name: field.contents() for name, field in gguf.GGUFReader(folder / "model.gguf").fields.items()}


def masked_greedy(supernet: Supernet, plan: SubnetPlan, num_tokens: int) -> list[int]:
    tokens: list[int] = []
    for _ in range(num_tokens):
        sequence = torch.cat([PROMPT, torch.tensor([tokens], dtype=torch.long)], dim=1)
        tokens.append(int(masked_logits(supernet, plan, sequence)[0, -1].argmax()))
    return tokens


@pytest.mark.parametrize(("family", "name", "architecture"), CASES)
def test_a_file_computes_what_the_masked_model_computes(
    family: str,
    name: str,
    architecture: str,
    supernets: dict[str, Supernet],
    written: dict[tuple[str, str], Path],
) -> None:
    opened = OpenedGguf(written[family, name])
    expected = masked_logits(supernets[family], plan_named(supernets[family], name), PROMPT)
    assert fields_of(written[family, name])["general.architecture"] == architecture
    torch.testing.assert_close(opened.logits(PROMPT), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "name"),
    [("llama", "uniform"), ("llama", "bare"), ("qwen2", "full"), ("qwen2", "bare"), ("qwen3", "full")],
)
def test_llama_cpp_decodes_what_the_masked_model_decodes(
    family: str, name: str, supernets: dict[str, Supernet], written: dict[tuple[str, str], Path]
) -> None:
    """Biases of removed weights, blocks without heads and blocks without neurons included, by llama.cpp itself."""
    pytest.importorskip("xllamacpp")
    expected = masked_greedy(supernets[family], plan_named(supernets[family], name), 8)
    if END in expected:
        expected = expected[: expected.index(END) + 1]
    assert OpenedGguf(written[family, name]).continued(PROMPT, 8).tokens == tuple(expected)


def test_a_merged_adapter_is_in_the_file(supernets: dict[str, Supernet], tmp_path: Path) -> None:
    supernet = dataclasses.replace(supernets["llama"], adapters=(noise_adapter(supernets["llama"]),))
    plan = plan_named(supernet, "adaptive")
    opened = OpenedGguf(write(materialize_subnet(supernet, plan), tmp_path / "merged", "gguf", "fp32"))
    torch.testing.assert_close(opened.logits(PROMPT), masked_logits(supernet, plan, PROMPT), atol=2e-5, rtol=1e-4)


def test_widths_are_written_per_layer_where_they_differ(
    supernets: dict[str, Supernet], written: dict[tuple[str, str], Path]
) -> None:
    """Layer 1 has no attention; layer 2 has no FFN, for which 32 neurons of zeros stand: `deci` would skip it whole."""
    fields = fields_of(written["llama", "bare"])
    assert fields["deci.attention.head_count"] == [6, 0, 6, 4]
    assert fields["deci.attention.head_count_kv"] == [3, 0, 3, 2]
    assert fields["deci.feed_forward_length"] == [96, 32, 32, 48]
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(written["llama", "bare"] / "model.gguf").tensors}
    assert not any(name.startswith("blk.1.attn") for name in tensors)
    assert not gguf.dequantize(
        tensors["blk.2.ffn_down.weight"].data, tensors["blk.2.ffn_down.weight"].tensor_type
    ).any()


def test_widths_are_one_number_where_they_agree(written: dict[tuple[str, str], Path]) -> None:
    fields = fields_of(written["llama", "uniform"])
    assert isinstance(fields["llama.attention.head_count"], int)
    assert isinstance(fields["llama.feed_forward_length"], int)


def test_tokens_and_chat_template_are_carried(written: dict[tuple[str, str], Path]) -> None:
    fields = fields_of(written["llama", "adaptive"])
    assert fields["tokenizer.ggml.model"] == "gpt2"
    assert fields["tokenizer.ggml.tokens"][:5] == ["<pad>", "<s>", "</s>", "Ċ", "Ġ"]  # type: ignore[index]
    assert fields["tokenizer.ggml.merges"] == ["h e"]
    assert fields["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]  # type: ignore[index]
    assert fields["tokenizer.ggml.bos_token_id"] == 1
    assert fields["tokenizer.ggml.eos_token_id"] == 2
    assert fields["tokenizer.chat_template"] == CHAT_TEMPLATE


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [("fp16", "F16"), ("bf16", "BF16"), ("int8", "Q8_0"), ("int4", "Q4_0")],
)
def test_matrices_are_stored_as_the_gguf_package_quantizes_them(
    dtype: str, stored: str, supernets: dict[str, Supernet], tmp_path: Path
) -> None:
    """Norms and biases stay fp32, embeddings at 8 bits or more."""
    kind = gguf.GGMLQuantizationType[stored]
    subnet = materialize_subnet(supernets["llama"], plan_named(supernets["llama"], "uniform"))
    weights = dict(subnet.stream())
    weights = equalized(weights) if dtype == "int4" else weights
    reader = gguf.GGUFReader(write(subnet, tmp_path / dtype, "gguf", dtype) / "model.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    up = tensors["blk.0.ffn_up.weight"]
    assert up.tensor_type == kind
    source = weights["model.layers.0.mlp.up_proj.weight"].float().numpy()
    np.testing.assert_array_equal(
        gguf.dequantize(up.data, kind)[: source.shape[0]],
        gguf.dequantize(gguf.quantize(source, kind), kind),
    )
    assert tensors["token_embd.weight"].tensor_type.name == ("Q8_0" if dtype == "int4" else stored)
    assert tensors["blk.0.attn_norm.weight"].tensor_type.name == "F32"
    assert tensors["blk.0.ffn_down.bias"].tensor_type.name == "F32"


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_llama_cpp_opens_quantized_files(dtype: str, supernets: dict[str, Supernet], tmp_path: Path) -> None:
    """Rows of quantized matrices are padded to blocks of 32: FFN widths here are not multiples."""
    pytest.importorskip("xllamacpp")
    subnet = materialize_subnet(supernets["llama"], plan_named(supernets["llama"], "adaptive"))
    assert OpenedGguf(write(subnet, tmp_path / dtype, "gguf", dtype)).continued(PROMPT, 4).tokens


def test_same_plan_same_bytes(supernets: dict[str, Supernet], tmp_path: Path) -> None:
    subnet = materialize_subnet(supernets["qwen2"], plan_named(supernets["qwen2"], "bare"))
    first, second = (write(subnet, tmp_path / name, "gguf", "int4") / "model.gguf" for name in ("one", "two"))
    assert first.read_bytes() == second.read_bytes()


def refusal(dense: DenseArchitecture, dtype: str = "fp16") -> str:
    with pytest.raises(NotRepresentable) as caught:
        FORMATS["gguf"].check(dense, dtype=dtype)
    assert caught.value.exit_code == 7
    return str(caught.value)


def dense_of(supernet: Supernet, plan: str, **changes: object) -> DenseArchitecture:
    dense = plan_named(supernet, plan).dense(supernet.architecture)
    return dataclasses.replace(dense, base=dataclasses.replace(dense.base, **changes))  # type: ignore[arg-type]


def test_widths_per_layer_with_qk_norms_are_refused(supernets: dict[str, Supernet]) -> None:
    assert refusal(dense_of(supernets["qwen3"], "adaptive")) == (
        "GGUF cannot hold this plan: llama.cpp has no per-layer widths together with QK norms.\n"
        "  next:  Use one of: --format safetensors, --format onnx."
    )


def test_constants_with_qk_norms_are_refused(supernets: dict[str, Supernet]) -> None:
    assert refusal(dense_of(supernets["qwen3"], "uniform")) == (
        "GGUF cannot hold this plan: llama.cpp has no biases together with QK norms.\n"
        "  next:  Use one of: --format safetensors, --format onnx, a shape of width 1."
    )


def test_an_unknown_rope_is_refused(supernets: dict[str, Supernet]) -> None:
    assert refusal(dense_of(supernets["llama"], "full", rope_scaling={"rope_type": "dynamic", "factor": 2.0})) == (
        "GGUF cannot hold this plan: RoPE of type dynamic is not written there.\n"
        "  next:  Use one of: --format safetensors, --format onnx."
    )


def test_a_window_shorter_than_the_context_is_refused(supernets: dict[str, Supernet]) -> None:
    assert refusal(dense_of(supernets["mistral"], "full", sliding_window=16)) == (
        "GGUF cannot hold this plan: llama.cpp has no attention window here, and this model one of 16 tokens.\n"
        "  next:  Use one of: --format safetensors, --format onnx, max_position_embeddings = 16 in its config.json, "
        "for texts that the window spans."
    )


def test_a_window_as_long_as_the_context_is_none(supernets: dict[str, Supernet], tmp_path: Path) -> None:
    dense = dense_of(supernets["mistral"], "full", sliding_window=256)
    FORMATS["gguf"].check(dense, dtype="fp16")
    subnet = materialize_subnet(supernets["mistral"], plan_named(supernets["mistral"], "full"))
    folder = write(dataclasses.replace(subnet, architecture=dense), tmp_path / "out", "gguf", "fp16")
    assert fields_of(folder)["llama.context_length"] == 256


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize("more", [{"beta_fast": 16.0}, {"beta_slow": 2}, {"truncate": False}, {"future": 1}])
def test_yarn_that_llama_cpp_does_not_read_is_refused(more: dict[str, object], supernets: dict[str, Supernet]) -> None:
    assert refusal(dense_of(supernets["llama"], "full", rope_scaling=YARN | more)) == (
        f"GGUF cannot hold this plan: llama.cpp's YaRN does not read {next(iter(more))}.\n"
        "  next:  Use one of: --format safetensors, --format onnx."
    )


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        YARN,
        {**YARN, "beta_fast": 32, "beta_slow": 1.0, "mscale": None, "truncate": True},
        {**YARN, "attention_factor": 1.3},
        {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
    ids=["linear", "yarn", "yarn defaults", "yarn attention factor", "yarn mscale", "llama3"],
)
def test_scaled_rope_goes_into_the_file_and_comes_back(
    rope: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(tmp_path / "model", rope_parameters={"rope_theta": 10000.0, **rope})
    save_bpe(tmp_path / "model")
    supernet = open_supernet(tmp_path / "model")
    plan = SubnetPlan.full(supernet.architecture)
    folder = write(materialize_subnet(supernet, plan), tmp_path / "written", "gguf", "fp32")
    prompt = torch.arange(3, 103)[None]
    expected = masked_logits(supernet, plan, prompt)
    torch.testing.assert_close(OpenedGguf(folder).logits(prompt), expected, atol=1e-4, rtol=1e-4)
    monkeypatch.setattr("amoeba_export.llama_cpp.is_installed", lambda: False)
    again = load_supernet(str(folder / "model.gguf"), cache_dir=tmp_path / "cache")
    found = masked_logits(again, SubnetPlan.full(again.architecture), prompt)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_an_unknown_dtype_is_refused(supernets: dict[str, Supernet]) -> None:
    assert refusal(dense_of(supernets["llama"], "full"), dtype="int2").startswith("GGUF cannot hold this plan: int2")


def test_values_beyond_fp16_are_refused(supernets: dict[str, Supernet], tmp_path: Path) -> None:
    subnet = materialize_subnet(supernets["llama"], plan_named(supernets["llama"], "full"))
    loud = ((name, weight * 1e6 if weight.dim() == 2 else weight) for name, weight in subnet.stream())
    with pytest.raises(NotRepresentable, match="exceed its range"):
        write(dataclasses.replace(subnet, stream=lambda: loud), tmp_path / "loud", "gguf", "fp16")


def test_an_unknown_splitting_rule_is_refused(supernets: dict[str, Supernet], tmp_path: Path) -> None:
    supernet = supernets["llama"]
    folder = tmp_path / "odd"
    save_tiny(folder)
    save_bpe(folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["pre_tokenizer"] = {"type": "Whitespace"}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    subnet = dataclasses.replace(materialize_subnet(supernet, plan_named(supernet, "full")), source_folder=folder)
    with pytest.raises(NotRepresentable, match=r"splits text by a rule that has no name in llama\.cpp"):
        write(subnet, tmp_path / "out", "gguf", "fp16")


def test_every_weight_is_wanted_once(supernets: dict[str, Supernet], tmp_path: Path) -> None:
    subnet = materialize_subnet(supernets["llama"], plan_named(supernets["llama"], "uniform"))
    (tmp_path / "out").mkdir()
    writer = FORMATS["gguf"].open_writer(subnet, tmp_path / "out", dtype="fp16")
    name, weight = next(iter(subnet.stream()))
    writer.accept(name, weight)
    with pytest.raises(WeightsMismatch, match="was given twice"):
        writer.accept(name, weight)
    with pytest.raises(WeightsMismatch, match="is missing"):
        writer.close()


def test_a_bias_that_llama_cpp_would_not_read_is_found(
    written: dict[tuple[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader takes of a file what llama.cpp's architecture takes, and complains about the rest."""
    fewer = dataclasses.replace(ARCHITECTURES["llama"], biases=frozenset(("q", "k", "v")))
    monkeypatch.setattr("amoeba_export.verify.gguf_file.ARCHITECTURES", {"llama": fewer})
    opened = OpenedGguf(written["llama", "uniform"])
    with pytest.raises(DamagedFile, match=r"llama\.cpp does not read blk\.0\.attn_output\.bias"):
        opened.logits(PROMPT)
