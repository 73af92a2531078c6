"""llama.cpp's mixtures: the types of their tensors, its rounding, and what verification says of other roundings."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from amoeba_export.backends import Subject, measure_latency
from amoeba_export.errors import NotRepresentable, NumbersDiffer
from amoeba_export.formats import FORMATS
from amoeba_export.formats.gguf.k_quants import K_QUANTS, k_quant_type
from amoeba_export.ir import DenseArchitecture, Latency, LayerDims, Supernet, Target
from amoeba_export.llama_cpp import quantizer
from amoeba_export.materialize import materialize_subnet
from amoeba_export.verify import verify_artifact
from amoeba_export.verify.expected import ExpectedWeights
from amoeba_export.verify.gguf_file import OpenedGguf
from amoeba_export.verify.stored import STORED
from amoeba_export.verify.weights import check_weights
from tests.backends.models import SHORT
from tests.formats.bpe import save_bpe
from tests.materialize.subnets import open_supernet, plan_for, write
from tests.tiny import save_tiny

pytest.importorskip("xllamacpp")

PROMPT = torch.arange(3, 15)[None]
ATTENTION, NONE = (
    LayerDims(num_heads=4, num_kv_heads=2, ffn_size=512),
    LayerDims(num_heads=0, num_kv_heads=0, ffn_size=512),
)
_Type = gguf.GGMLQuantizationType


@pytest.fixture(scope="module")
def supernets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Supernet]:
    """Rows of whole super-blocks, and rows of none; heads of q and k in pairs in both."""
    root = tmp_path_factory.mktemp("k-quants")
    wide = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    save_tiny(root / "whole", "llama", **wide, head_dim=64, tie_word_embeddings=False)
    save_tiny(root / "short", "llama")
    for name in ("whole", "short"):
        save_bpe(root / name)
    return {name: open_supernet(root / name) for name in ("whole", "short")}


@pytest.mark.parametrize(
    ("dtype", "name", "columns", "kind"),
    [
        ("q4_k_m", "blk.0.attn_q.weight", 512, _Type.Q4_K),
        ("q4_k_m", "blk.0.attn_q.weight", 576, _Type.Q5_0),
        ("q4_k_m", "blk.0.attn_q.weight", 100, _Type.F16),
        ("q4_k_m", "blk.0.ffn_down.weight", 512, _Type.Q6_K),
        ("q4_k_m", "blk.0.ffn_down.weight", 96, _Type.Q8_0),
        ("q4_k_m", "blk.2.ffn_down.weight", 512, _Type.Q4_K),
        ("q4_k_m", "blk.3.ffn_down.weight", 512, _Type.Q6_K),
        ("q4_k_m", "token_embd.weight", 512, _Type.Q4_K),
        ("q4_k_m", "output.weight", 512, _Type.Q6_K),
        ("q4_k_m", "output.weight", 576, _Type.Q8_0),
        ("q5_k_m", "blk.1.attn_q.weight", 512, _Type.Q5_K),
        ("q5_k_m", "blk.1.attn_q.weight", 576, _Type.Q5_1),
        ("q5_k_m", "blk.7.ffn_down.weight", 512, _Type.Q6_K),
        ("q6_k", "blk.1.attn_q.weight", 512, _Type.Q6_K),
        ("q6_k", "blk.1.attn_q.weight", 576, _Type.Q8_0),
    ],
)
def test_types_are_those_of_llama_cpps_mixtures(
    dtype: str, name: str, columns: int, kind: gguf.GGMLQuantizationType
) -> None:
    assert k_quant_type(dtype, name, columns, [ATTENTION] * 8, tied=False) is kind


def test_a_tied_embedding_is_stored_as_a_head() -> None:
    for columns, kind in ((512, _Type.Q6_K), (576, _Type.Q8_0)):
        assert k_quant_type("q4_k_m", "token_embd.weight", columns, [ATTENTION] * 8, tied=True) is kind


def test_v_is_counted_among_layers_with_attention() -> None:
    """Of eight, the first has 6 bits; a layer without attention ahead of it changes nothing."""
    layers = [NONE, *[ATTENTION] * 8]
    kinds = [k_quant_type("q4_k_m", f"blk.{idx}.attn_v.weight", 512, layers, tied=False) for idx in range(1, 9)]
    better = [idx for idx, kind in enumerate(kinds) if kind is _Type.Q6_K]
    assert better == [0, 3, 6, 7]


@pytest.mark.parametrize("dtype", K_QUANTS)
@pytest.mark.parametrize("name", ["whole", "short"])
@pytest.mark.parametrize("shape", ["full", "3x0.7"])
def test_a_file_is_verified_and_llama_cpp_decodes_what_its_weights_say(
    dtype: str, name: str, shape: str, supernets: dict[str, Supernet], tmp_path: Path
) -> None:
    supernet = supernets[name]
    plan = supernet.full_plan() if shape == "full" else plan_for(supernet, shape, "adaptive")
    folder = write(materialize_subnet(supernet, plan), tmp_path / "gguf", "gguf", dtype)
    expected = ExpectedWeights(supernet, plan)
    check_weights(folder, STORED["gguf"](folder, expected.wanted), expected)
    opened = OpenedGguf(folder)
    assert opened.dtype == dtype
    tokens = opened.continued(PROMPT, 6).tokens
    after = opened.logits(torch.cat([PROMPT, torch.tensor([tokens])], dim=1))[0, PROMPT.shape[1] - 1 : -1]
    for token, logits_V in zip(tokens, after, strict=True):  # llama.cpp rounds activations, too
        assert logits_V[token] >= logits_V.max() - 0.05 * logits_V.abs().max()


def test_the_finest_mixture_passes_verify(supernets: dict[str, Supernet], tmp_path: Path) -> None:
    supernet = supernets["whole"]
    plan = plan_for(supernet, "3x0.7", "uniform")
    write(materialize_subnet(supernet, plan), tmp_path / "gguf", "gguf", "q6_k")
    report = verify_artifact(tmp_path, supernet, plan)
    assert report.formats[0].dtype == "q6_k"
    assert 0 < report.formats[0].distance.mean_kl < 0.1


@pytest.mark.parametrize("dtype", K_QUANTS)
@pytest.mark.parametrize("name", ["whole", "short"])
@pytest.mark.parametrize("part", ["scale", "integers"])
def test_another_rounding_is_found(
    dtype: str, name: str, part: str, supernets: dict[str, Supernet], tmp_path: Path
) -> None:
    """A scale that is half as large again; integers whose highest bits are turned round."""
    supernet = supernets[name]
    plan = supernet.full_plan()
    folder = write(materialize_subnet(supernet, plan), tmp_path / "gguf", "gguf", dtype)
    expected = ExpectedWeights(supernet, plan)
    reader = gguf.GGUFReader(folder / "model.gguf", "r+")
    tensor = next(one for one in reader.tensors if one.name == "blk.1.ffn_up.weight")
    size = gguf.GGML_QUANT_SIZES[tensor.tensor_type][1]
    blocks = tensor.data.reshape(-1).view(np.uint8).reshape(-1, size)
    at = 208 if tensor.tensor_type == _Type.Q6_K else 0
    if part == "scale":
        blocks[0, at : at + 2] = (blocks[0, at : at + 2].copy().view("<f2") * np.float16(1.5)).view(np.uint8)
    else:
        blocks[0, 150 if at else size - 1] ^= 0xAA
    tensor.data.flush()
    with pytest.raises(NumbersDiffer, match=r"layers\.1\.mlp\.up_proj\.weight (has|differs)"):
        check_weights(folder, STORED["gguf"](folder, expected.wanted), expected)


def test_rounding_with_importance_is_nearer_where_it_matters() -> None:
    rng = np.random.default_rng(0)
    rows, importance = rng.standard_normal((128, 256), np.float32), rng.random(256, np.float32) ** 4
    errors = []
    for weights in (None, importance):
        packed = quantizer.quantize_rows(rows, int(_Type.Q4_K), gguf.GGML_QUANT_SIZES[_Type.Q4_K], importance_I=weights)
        errors.append(float(((gguf.dequantize(packed, _Type.Q4_K) - rows) ** 2 * importance).mean()))
    assert errors[1] < 0.9 * errors[0]


def test_threads_do_not_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(0).standard_normal((500, 256), np.float32)
    packed = []
    for count in (1, 3):
        monkeypatch.setattr("os.cpu_count", lambda count=count: count)
        packed.append(quantizer.quantize_rows(rows, int(_Type.Q5_K), gguf.GGML_QUANT_SIZES[_Type.Q5_K]))
    np.testing.assert_array_equal(*packed)


def test_without_the_package_they_are_refused_with_the_way_to_get_it(
    supernets: dict[str, Supernet], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("amoeba_export.formats.gguf.has_quantizer", lambda: False)
    with pytest.raises(NotRepresentable) as caught:
        FORMATS["gguf"].check(supernets["whole"].architecture.uncut, dtype="q4_k_m")
    assert "rounded by llama.cpp's own quantizer, and the package that carries it is not installed" in str(caught.value)
    assert "pip install 'amoeba-export[llamacpp]'" in str(caught.value.next_step)


def test_dims_alone_are_timed(supernets: dict[str, Supernet]) -> None:
    dense = supernets["whole"].architecture.uncut
    cut = DenseArchitecture(
        base=dense.base, layers=(*dense.layers[:1], dataclasses.replace(dense.layers[0], ffn_size=96))
    )
    target = Target(name="here", description="", backend="llamacpp", options={"threads": 1})
    subjects = [Subject(dense=one, dtype=dtype) for one, dtype in ((dense, "q4_k_m"), (cut, "q5_k_m"))]
    for result in measure_latency(subjects, SHORT, target=target, rounds=1):
        assert isinstance(result, Latency), result
