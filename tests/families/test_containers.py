"""What each container makes of every family: weights, logits, decode steps, RoPE, and the tokens of llama.cpp."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from amoeba_export.errors import NotRepresentable
from amoeba_export.formats import FORMATS
from amoeba_export.ir import DenseArchitecture, Shape, SubnetPlan, Supernet
from amoeba_export.ir.derive import CutRules, derive_plan
from amoeba_export.load import load_supernet
from amoeba_export.materialize import materialize_subnet
from amoeba_export.verify import masked_logits, verify_artifact
from tests.families.configs import FAMILIES, save_families, save_family
from tests.families.test_matrix import IDS, NAMES, assert_same, cuts
from tests.formats.bpe import save_bpe
from tests.materialize.subnets import open_supernet, write

PLANS = ("full", "depth", "uniform", "uniform, no bias", "adaptive", "bare")

ALIKE = {"full", "depth", "uniform", "uniform, no bias"}
UNBIASED = {"full", "depth", "uniform, no bias"}
HELD: dict[str, set[str]] = {
    "gemma3": UNBIASED,
    "gemma2": UNBIASED,
    "smollm3": {"full"},
    "granite": ALIKE,
    "granite, biases": ALIKE,
    "ministral3": ALIKE,
    "olmo2": UNBIASED,
    "olmo3": UNBIASED,
    "olmo3, scaled": UNBIASED,
    "exaone4": {"full", "depth"},
    "exaone4, scaled": {"full", "depth"},
    "qwen3_moe": UNBIASED,
    "phi3": set(PLANS),
    "phi3, part of a head": {"full", "depth"},
    "phi3, longrope": {"full", "depth"},
}
"""Plans that llama.cpp computes. Of a family that is in neither list, those that the format takes."""

REFUSED = {
    *("ministral", "qwen2, windows above", "qwen3, windows listed", "smollm3, windows and biases"),
    *("smollm3, layers listed", "phi3, window", "gemma3, scaled", "gemma2, no caps", "olmo2, biases"),
    *("exaone4, windows", "qwen3_moe, window and biases", "ministral3, window"),
}
"""Of these none."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every family with a tokenizer beside it, which llama.cpp wants."""
    return save_families(tmp_path_factory.mktemp("families"), NAMES, save_bpe)


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture
def supernet(name: str, folders: dict[str, Path]) -> Supernet:
    return open_supernet(folders[name])


def takes(dense: DenseArchitecture) -> bool:
    """Whether the format says that it can hold it."""
    try:
        FORMATS["gguf"].check(dense, dtype="fp32")
    except NotRepresentable:
        return False
    return True


def plan_named(supernet: Supernet, name: str) -> SubnetPlan:
    return supernet.full_plan() if name == "full" else cuts(supernet)[name]


@pytest.mark.parametrize("dialect", ["ort", "standard"])
@pytest.mark.parametrize("plan_name", ["full", "depth", "uniform", "bare"])
def test_a_graph_is_the_masked_model(supernet: Supernet, plan_name: str, dialect: str, tmp_path: Path) -> None:
    plan = plan_named(supernet, plan_name)
    write(materialize_subnet(supernet, plan), tmp_path / "onnx", "onnx", "fp32", dialect=dialect)
    report = verify_artifact(tmp_path, supernet, plan)
    assert report.greedy_tokens_equal
    assert report.max_rel_diff < 1e-4


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_a_graph_of_integers_computes_with_its_weights(supernet: Supernet, dtype: str, tmp_path: Path) -> None:
    """Norms of 1 + w are scaled with channels; part of a head does without onnxruntime's attention
    and integers, and experts without integers."""
    plan = cuts(supernet)["uniform"]
    subnet = materialize_subnet(supernet, plan)
    partial = any(kind.rope is not None and kind.rope.dims % 16 for kind in supernet.architecture.layer_kinds)
    if partial or supernet.architecture.expert_size:
        with pytest.raises(NotRepresentable, match=r"turns multiples of 16 dims of a head|weights of experts are not"):
            write(subnet, tmp_path / "onnx", "onnx", dtype)
        return
    write(subnet, tmp_path / "onnx", "onnx", dtype)
    assert verify_artifact(tmp_path, supernet, plan).formats[0].dtype == dtype


@pytest.mark.parametrize("plan_name", PLANS)
def test_llama_cpp_computes_the_masked_model_or_is_refused(
    name: str, supernet: Supernet, plan_name: str, tmp_path: Path
) -> None:
    plan = plan_named(supernet, plan_name)
    subnet = materialize_subnet(supernet, plan)
    if name in HELD or name in REFUSED:
        is_held = plan_name in HELD.get(name, set())
    else:
        is_held = takes(plan.dense(supernet.architecture))
    if not is_held:
        with pytest.raises(NotRepresentable, match="Use one of: --format safetensors"):
            write(subnet, tmp_path / "gguf", "gguf", "fp32")
        return
    write(subnet, tmp_path / "gguf", "gguf", "fp32")
    report = verify_artifact(tmp_path, supernet, plan)
    assert report.greedy_tokens_equal
    assert report.max_rel_diff < 1e-4


@pytest.mark.parametrize("family", ["olmo2", "exaone4", "phi3, part of a head"])
def test_architectures_that_want_all_heads_hold_cuts_of_neurons(
    family: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    supernet = open_supernet(folders[family])
    assert supernet.strategy is not None
    base = supernet.architecture
    plan = derive_plan(supernet.strategy, base, Shape.parse("3x0.7"), CutRules(head_multiple=base.num_heads))
    plan = dataclasses.replace(plan, compensate=False)
    assert {(len(layer.query_heads), len(layer.ffn) < base.ffn_size) for layer in plan.layers} == {(4, True)}
    write(materialize_subnet(supernet, plan), tmp_path / "gguf", "gguf", "fp32")
    report = verify_artifact(tmp_path, supernet, plan)
    assert report.greedy_tokens_equal
    assert report.max_rel_diff < 1e-4


@pytest.mark.parametrize(
    ("name", "overrides", "reason"),
    [
        ("olmo2", {"tie_word_embeddings": True}, "wants a head that is not tied to the embedding"),
        (
            "olmo3",
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "default", "rope_theta": 5e5},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                }
            },
            "has one base of RoPE for all layers here",
        ),
        ("exaone4", {"num_hidden_layers": 64, "layer_types": ["full_attention"] * 64}, "takes a model of 64 layers"),
        ("exaone4, windows", {}, "norms after its blocks, no norms before its blocks, layers that attend in different"),
    ],
)
def test_what_llama_cpp_takes_for_granted_is_refused_by_name(
    name: str, overrides: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    supernet = open_supernet(save_family(tmp_path, name, **overrides))
    with pytest.raises(NotRepresentable, match=reason):
        FORMATS["gguf"].check(supernet.architecture.uncut, dtype="fp32")


def test_a_gguf_file_is_read_again_and_compared_with_llama_cpp(name: str, supernet: Supernet, tmp_path: Path) -> None:
    if name not in HELD:
        return
    plan = supernet.full_plan()
    write(materialize_subnet(supernet, plan), tmp_path / "gguf", "gguf", "fp32")
    again = load_supernet(str(tmp_path / "gguf" / "model.gguf"), cache_dir=tmp_path / "cache")
    assert_same(masked_logits(again, again.full_plan(), IDS), masked_logits(supernet, plan, IDS))


@pytest.mark.parametrize("family", FAMILIES)
def test_onnxruntime_genai_generates_what_the_masked_model_does(
    family: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    supernet = open_supernet(folders[family])
    plan = supernet.full_plan()
    folder = write(materialize_subnet(supernet, plan), tmp_path / "onnx", "onnx", "fp32")
    model = genai.Model(str(folder))
    settings = genai.GeneratorParams(model)
    settings.set_search_options(max_length=16)
    generator = genai.Generator(model, settings)
    tokens = [5, 9, 17, 33, 40]
    generator.append_tokens(tokens)
    for _ in range(6):
        generator.generate_next_token()
        tokens.append(int(masked_logits(supernet, plan, torch.tensor([tokens]))[0, -1].argmax()))
    assert [int(token) for token in generator.get_sequence(0)] == tokens
