"""Models that also see: their text model is taken, and computes what the whole does on text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from amoeba_export.errors import DamagedFile, MixtureOfExperts, UnsupportedModel, WeightsMismatch
from amoeba_export.ir import SILENT
from amoeba_export.ir.family import LayerKind, Rope
from amoeba_export.load import load_supernet
from amoeba_export.load.families import read_architecture
from amoeba_export.load.wrappers import text_config
from amoeba_export.materialize import materialize_subnet
from amoeba_export.verify import masked_logits, verify_artifact
from tests.families.configs import SIZES
from tests.families.test_matrix import IDS, assert_same, cuts, stock
from tests.materialize.subnets import open_supernet, write
from tests.tiny import filled

_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_DEEP: dict[str, Any] = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 64}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
_NARROW = {key: value for key, value in SIZES.items() if key != "head_dim"}

WRAPPERS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "gemma3": (
        "gemma3",
        "gemma3_text",
        {**SIZES, "model_type": "gemma3_text", "sliding_window": 4, "query_pre_attn_scalar": 24},
        {**_VISION, "model_type": "siglip_vision_model"},
        {"mm_tokens_per_image": 4},
    ),
    "mistral3": ("mistral3", "mistral", {**SIZES, "model_type": "mistral"}, {**_VISION, "model_type": "pixtral"}, {}),
    "ministral3": (
        "mistral3",
        "ministral3",
        {**SIZES, "model_type": "ministral3"},
        {**_VISION, "model_type": "pixtral"},
        {"tie_word_embeddings": False},
    ),
    "llava": (
        "llava",
        "llama",
        {**SIZES, "model_type": "llama"},
        {**_VISION, "model_type": "clip_vision_model", "projection_dim": 32},
        {},
    ),
    "internvl": (
        "internvl",
        "qwen2",
        {**_NARROW, "model_type": "qwen2"},
        {**_VISION, "image_size": [28, 28], "patch_size": [14, 14]},
        {},
    ),
    "smolvlm": ("smolvlm", "llama", {**SIZES, "model_type": "llama"}, _VISION, {}),
    "idefics3": ("idefics3", "llama", {**SIZES, "model_type": "llama"}, _VISION, {}),
    "qwen2_vl": (
        "qwen2_vl",
        "qwen2",
        {**_NARROW, **_MROPE},
        {"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 64},
        {},
    ),
    "qwen2_5_vl": ("qwen2_5_vl", "qwen2", {**_NARROW, **_MROPE}, _DEEP, {}),
    "qwen2_5_vl, tied": ("qwen2_5_vl", "qwen2", {**_NARROW, **_MROPE}, _DEEP, {"tie_word_embeddings": True}),
    "qwen3_vl": ("qwen3_vl", "qwen3", {**SIZES, **_MROPE}, {**_DEEP, "deepstack_visual_indexes": [0]}, {}),
}
"""Name -> type of the whole, the family that its text model is, and what its config says of text, vision and both."""


class Notes:
    """Keeps what a user would be told."""

    warn, track = SILENT.warn, SILENT.track

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


@torch.no_grad()
def save_wrapper(folder: Path, name: str) -> torch.Tensor:
    """Save a tiny seeded model, and give its logits of `IDS`."""
    model_type, _, text, vision, settings = WRAPPERS[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, text_config=text, vision_config=vision, **settings)
    model = filled(AutoModelForImageTextToText.from_config(config, dtype=torch.float32)).eval()
    model.save_pretrained(folder)
    logits: torch.Tensor = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    return logits


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_text_model_is_the_whole_on_text(name: str, tmp_path: Path) -> None:
    expected = save_wrapper(tmp_path, name)
    supernet = load_supernet(str(tmp_path), cache_dir=tmp_path / "cache")
    assert supernet.family.model_type == WRAPPERS[name][1]
    assert_same(masked_logits(supernet, supernet.full_plan(), IDS), expected)


@pytest.mark.parametrize("name", ["gemma3", "ministral3", "qwen2_5_vl, tied", "qwen3_vl"])
def test_cuts_are_written_as_the_text_models_family(name: str, tmp_path: Path) -> None:
    expected = save_wrapper(tmp_path / "whole", name)
    supernet = open_supernet(tmp_path / "whole")
    full, cut = supernet.full_plan(), cuts(supernet)["uniform"]
    folder = write(materialize_subnet(supernet, full), tmp_path / "full")
    assert json.loads((folder / "config.json").read_text())["model_type"] == WRAPPERS[name][1]
    assert_same(stock(folder), expected)
    assert_same(stock(write(materialize_subnet(supernet, cut), tmp_path / "cut")), masked_logits(supernet, cut, IDS))
    write(materialize_subnet(supernet, cut), tmp_path / "artifact" / "onnx", "onnx", "fp32")
    report = verify_artifact(tmp_path / "artifact", supernet, cut)
    assert report.greedy_tokens_equal
    assert report.max_rel_diff < 1e-4


def test_it_is_said_what_is_taken(tmp_path: Path) -> None:
    save_wrapper(tmp_path / "seer", "gemma3")
    heard = Notes()
    load_supernet(str(tmp_path / "seer"), cache_dir=tmp_path / "cache", progress=heard)
    assert "seer is a gemma3: its text model, a gemma3_text, is taken. What sees or hears is left out." in heard.notes


@pytest.mark.parametrize("prefix", ["model.language_model.", "model."])
def test_names_of_other_versions_are_the_same_weights(prefix: str, tmp_path: Path) -> None:
    """Gemma 3 as transformers has it in memory; text models whose names have no step of their own."""
    expected = save_wrapper(tmp_path, "gemma3")
    _renamed(tmp_path, lambda name: name.replace("language_model.model.", prefix))
    supernet = load_supernet(str(tmp_path), cache_dir=tmp_path / "cache")
    assert_same(masked_logits(supernet, supernet.full_plan(), IDS), expected)


_GEMMA_3_4B: dict[str, Any] = {
    "model_type": "gemma3",
    "text_config": {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {"model_type": "siglip_vision_model"},
}
_QWEN_2_5_VL_3B: dict[str, Any] = {
    "model_type": "qwen2_5_vl",
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "max_position_embeddings": 128000,
    "max_window_layers": 70,
    "num_attention_heads": 16,
    "num_hidden_layers": 36,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "sliding_window": 32768,
    "use_sliding_window": False,
    "vocab_size": 151936,
    "vision_config": {"depth": 32, "hidden_size": 1280, "out_hidden_size": 2048},
}


def test_configs_as_they_were_published_are_read() -> None:
    """Gemma 3's leave most to transformers' defaults, Qwen2.5-VL's have no table for the text model."""
    where = Path("config.json")
    gemma, _ = read_architecture(text_config(_GEMMA_3_4B, where=where), where=where)
    assert (gemma.num_heads, gemma.num_kv_heads, gemma.head_dim, gemma.vocab_size) == (8, 4, 256, 262208)
    assert gemma.score_scale == 256**-0.5
    linear = Rope(theta=1e6, scaling={"rope_type": "linear", "factor": 8.0}, dims=256)
    assert gemma.kind(5) == LayerKind(rope=linear)
    assert gemma.kind(6) == LayerKind(name="sliding_attention", window=1024, rope=Rope(theta=1e4, dims=256))
    qwen, _ = read_architecture(text_config(_QWEN_2_5_VL_3B, where=where), where=where)
    assert (qwen.family, qwen.num_layers, qwen.head_dim, qwen.qkv_bias) == ("qwen2", 36, 128, True)
    assert qwen.layer_kinds == (LayerKind(rope=Rope(theta=1e6, dims=128)),)


def test_a_config_that_says_little_has_the_defaults_of_transformers(tmp_path: Path) -> None:
    """Gemma 3's configs on the hub leave out the number of heads."""
    expected = save_wrapper(tmp_path, "gemma3")
    config = json.loads((tmp_path / "config.json").read_text())
    for key in ("rms_norm_eps", "hidden_activation", "rope_parameters", "layer_types", "attn_logit_softcapping"):
        del config["text_config"][key]
    (tmp_path / "config.json").write_text(json.dumps(config))
    supernet = load_supernet(str(tmp_path), cache_dir=tmp_path / "cache")
    assert_same(masked_logits(supernet, supernet.full_plan(), IDS), expected)


def test_a_weight_of_the_text_model_that_is_missing_or_left_over_is_named(tmp_path: Path) -> None:
    save_wrapper(tmp_path, "llava")
    _renamed(tmp_path, lambda name: name.replace("layers.1.mlp.up_proj", "layers.1.mlp.upward"))
    with pytest.raises(WeightsMismatch) as caught:
        load_supernet(str(tmp_path), cache_dir=tmp_path / "cache")
    assert "model.layers.1.mlp.up_proj.weight is missing" in str(caught.value)
    assert "model.layers.1.mlp.upward.weight is left over" in str(caught.value)


def test_a_weight_under_two_names_is_refused(tmp_path: Path) -> None:
    save_wrapper(tmp_path, "llava")
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.norm.weight"] = weights["language_model.model.norm.weight"].clone()
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(DamagedFile, match=r"model\.norm\.weight is there under two names"):
        load_supernet(str(tmp_path), cache_dir=tmp_path / "cache")


def test_wrappers_that_are_not_known_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "paligemma", "text_config": {}}))
    with pytest.raises(UnsupportedModel, match="'paligemma' are not supported"):
        load_supernet(str(tmp_path), cache_dir=tmp_path / "cache")


def test_a_mixture_of_experts_that_also_sees_is_called_one(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps(
            {"model_type": "qwen3_vl_moe", "text_config": {"model_type": "qwen3_vl_moe_text", "num_experts": 64}}
        )
    )
    with pytest.raises(MixtureOfExperts, match="A qwen3_vl_moe is a mixture of 64 experts"):
        load_supernet(str(tmp_path), cache_dir=tmp_path / "cache")


def _renamed(folder: Path, rename: Any) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({rename(name): weight for name, weight in weights.items()}, folder / "model.safetensors")
