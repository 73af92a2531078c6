"""Adapters that bring more than LoRA of linear layers: whole weights, embeddings, biases, another vocabulary."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from amoeba_export import load
from amoeba_export.errors import DamagedFile, NonFiniteWeights, UnsupportedAdapter, WrongModel
from amoeba_export.finetune.model import RunningSubnet, SlicedSupernet
from amoeba_export.finetune.smol import adapters_at
from amoeba_export.formats.write import write_formats
from amoeba_export.ir import SILENT, SubnetPlan, Supernet
from amoeba_export.materialize import materialize_subnet
from amoeba_export.verify.masked import masked_logits
from tests.load.test_lora import WEIGHTS, drop, edit, peft_model, train, whole

pytestmark = pytest.mark.filterwarnings("ignore")

IDS = torch.arange(3, 25)[None]


def load_with(base: Path, *adapters: Path) -> Supernet:
    return load.load_supernet(str(base), adapters=adapters)


def logits_of(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return logits(model)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(IDS).logits
    return found


def written(supernet: Supernet, folder: Path) -> Path:
    folder.mkdir()
    subnet = materialize_subnet(supernet, SubnetPlan.full(supernet.architecture))
    write_formats(subnet, folder, {"safetensors": "fp32"})
    return folder / "safetensors"


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("base", "options"),
    [
        ("llama-mha", {"modules_to_save": ["lm_head", "embed_tokens", "norm"]}),
        ("llama-mha", {"modules_to_save": ["lm_head"], "target_modules": ["embed_tokens", "q_proj"]}),
        ("llama-mha", {"modules_to_save": ["o_proj"], "target_modules": "all-linear"}),
        ("qwen3", {"modules_to_save": ["q_norm", "input_layernorm"], "target_modules": ["k_proj"]}),
        ("qwen2", {"bias": "all"}),
        ("qwen2", {"bias": "lora_only", "use_dora": True}),
        ("llama", {"bias": "all"}),
        ("llama-mha", {"words": 140}),
        ("llama-mha", {"words": 120, "modules_to_save": ["embed_tokens"]}),
        ("llama-mha", {"words": 140, "modules_to_save": ["embed_tokens", "lm_head"]}),
        ("llama-mha", {"words": 140, "target_modules": ["embed_tokens", "lm_head", "v_proj"]}),
        ("llama", {"words": 140}),
    ],
)
def test_all_weights_are_those_that_peft_merges(
    tiny_dirs: dict[str, Path], tmp_path: Path, base: str, options: dict[str, Any]
):
    expected = train(tmp_path, base, **options)
    supernet = load_with(tiny_dirs[base], tmp_path)
    found = whole(supernet)
    if supernet.architecture.tied_embeddings:
        assert torch.equal(expected.pop("lm_head.weight"), expected["model.embed_tokens.weight"])
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, atol=1e-6, rtol=1e-6)
    assert supernet.architecture.vocab_size == len(expected["model.embed_tokens.weight"])


@pytest.mark.parametrize(
    ("options", "is_tied"),
    [
        ({"modules_to_save": ["lm_head"]}, False),
        ({"modules_to_save": ["embed_tokens"]}, False),
        ({"modules_to_save": ["embed_tokens", "lm_head"]}, False),
        ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
        ({"target_modules": ["lm_head", "q_proj"]}, False),
        ({"target_modules": ["embed_tokens", "q_proj"]}, False),
        ({"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}, False),
        ({"words": 140}, True),
        ({"words": 140, "modules_to_save": ["lm_head"]}, False),
        ({"words": 140, "modules_to_save": ["embed_tokens"]}, False),
        ({"words": 140, "target_modules": ["embed_tokens", "lm_head"]}, False),
        ({"words": 140, "target_modules": ["embed_tokens"]}, False),
    ],
)
def test_a_tied_model_computes_what_was_trained(
    tiny_dirs: dict[str, Path], tmp_path: Path, options: dict[str, Any], is_tied: bool
):
    """Against the model with its adapter *unmerged*: merging LoRA of one of two tied weights, peft changes both."""
    expected = logits(peft_model(tmp_path / "adapter", "llama", **options).eval())
    supernet = load_with(tiny_dirs["llama"], tmp_path / "adapter")
    folder = written(supernet, tmp_path / "out")
    assert_same(logits_of(folder), expected)
    assert_same(masked_logits(supernet, SubnetPlan.full(supernet.architecture), IDS), expected)
    config = json.loads((folder / "config.json").read_text())
    assert config["tie_word_embeddings"] == supernet.architecture.tied_embeddings == is_tied
    assert config["vocab_size"] == supernet.architecture.vocab_size == options.get("words", 128)
    assert config["vocab_size"] == expected.shape[-1]


@pytest.mark.parametrize("base", ["llama", "llama-mha"])
@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head", "gate_proj"]])
def test_the_running_supernet_has_the_adapters_of_embedding_and_head(
    tiny_dirs: dict[str, Path], tmp_path: Path, base: str, targets: list[str]
):
    expected = logits(peft_model(tmp_path, base, target_modules=targets).eval())
    supernet = load_with(tiny_dirs[base], tmp_path)
    plan = SubnetPlan.full(supernet.architecture)
    model = SlicedSupernet(supernet)
    running = RunningSubnet(model, model.cut(plan), adapters_at(supernet.adapters, plan))
    assert_same(running.logits(IDS, torch.ones_like(IDS, dtype=torch.bool)), expected[0])


def test_the_base_stays_what_its_identity_names(tiny_dirs: dict[str, Path], tmp_path: Path):
    """Strategies are cached by the identity of the model, and are made of it without adapters."""
    train(tmp_path / "one", "llama-mha", words=140)
    train(tmp_path / "two", "llama-mha", modules_to_save=["norm"])
    plain = load_with(tiny_dirs["llama-mha"])
    supernet = load_with(tiny_dirs["llama-mha"], tmp_path / "two", tmp_path / "one")
    assert [item.id for item in supernet.inputs] == ["llama-mha", "two", "one"]
    assert supernet.identity == plain.identity
    bare = supernet.without_adapters()
    assert bare.adapters == () and bare.architecture == plain.architecture
    for name in ("model.norm.weight", "lm_head.weight"):
        assert torch.equal(bare.tensors.read(name), plain.tensors.read(name))
        assert not torch.equal(supernet.tensors.read(name), plain.tensors.read(name))


def test_the_dtype_stays_the_models(tiny_dirs: dict[str, Path], tmp_path: Path):
    """Adapters are trained in fp32, on models in bf16: the artifact is bf16, rounded once."""
    folder = Path(shutil.copytree(tiny_dirs["llama-mha"], tmp_path / "half"))
    weights = load_file(folder / "model.safetensors")
    save_file({name: weight.to(torch.bfloat16) for name, weight in weights.items()}, folder / "model.safetensors")
    expected = train(tmp_path / "adapter", "llama-mha", modules_to_save=["embed_tokens", "norm"])
    supernet = load_with(folder, tmp_path / "adapter")
    assert materialize_subnet(supernet, SubnetPlan.full(supernet.architecture)).source_dtype == torch.bfloat16
    assert torch.equal(supernet.tensors.read("model.norm.weight"), expected["model.norm.weight"])


# --- names ------------------------------------------------------------------------------------------------------------


def rename(folder: Path, change: Any) -> None:
    weights = load_file(folder / WEIGHTS)
    save_file({change(name): weight for name, weight in weights.items()}, folder / WEIGHTS)


@pytest.mark.parametrize(
    "change",
    [
        lambda name: "_orig_mod." + name,
        lambda name: "module." + name,
        lambda name: name.replace("base_model.model.", "base_model.model._orig_mod.module."),
        lambda name: name.replace("q_proj.", "q_proj._fsdp_wrapped_module."),
        lambda name: name.replace("base_model.model.model.", "base_model.model."),
        lambda name: name.replace("base_model.model.", ""),
        lambda name: name.replace("base_model.model.model.", ""),
        lambda name: name.replace("base_model.model.model.", "base_model.model.language_model.model."),
        lambda name: name.replace("base_model.model.model.", "base_model.model.model.language_model."),
        lambda name: name.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default."),
    ],
)
def test_a_name_may_say_how_the_model_was_run(tiny_dirs: dict[str, Path], tmp_path: Path, change: Any):
    expected = train(tmp_path, "llama-mha", modules_to_save=["norm"])
    rename(tmp_path, change)
    found = whole(load_with(tiny_dirs["llama-mha"], tmp_path))
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "kind", "says"),
    [
        (
            lambda name: name.replace("model.layers.0.mlp", "model.vision_tower.layers.0.mlp"),
            WrongModel,
            "it changes model.vision_tower.layers.0.mlp.down_proj, which this model does not have (the weight "
            "base_model.model.model.vision_tower.layers.0.mlp.down_proj.lora_A.weight)",
        ),
        (
            lambda name: name.replace("model.norm.weight", "model.norm.bias"),
            WrongModel,
            "it has model.norm.bias, which this model does not have",
        ),
        (lambda name: name.replace("lora_A", "lora_C"), UnsupportedAdapter, "lora_C.weight"),
        (lambda name: name.replace("lora_B.weight", "lora_B.bias"), UnsupportedAdapter, "lora_B.bias"),
    ],
)
def test_a_name_that_is_none_of_the_models_is_said(
    tiny_dirs: dict[str, Path], tmp_path: Path, change: Any, kind: type[Exception], says: str
):
    train(tmp_path, "llama-mha", modules_to_save=["norm"])
    rename(tmp_path, change)
    with pytest.raises(kind) as caught:
        load_with(tiny_dirs["llama-mha"], tmp_path)
    assert says in str(caught.value)


def test_two_names_of_one_weight_are_refused(tiny_dirs: dict[str, Path], tmp_path: Path):
    train(tmp_path, "llama-mha", modules_to_save=["norm"])
    weights = load_file(tmp_path / WEIGHTS)
    for name in ("base_model.model.model.norm.weight", next(name for name in weights if "lora_A" in name)):
        save_file(weights | {f"module.{name}": weights[name].clone()}, tmp_path / WEIGHTS)
        with pytest.raises(DamagedFile, match="are the same weight"):
            load_with(tiny_dirs["llama-mha"], tmp_path)


# --- what does not fit ------------------------------------------------------------------------------------------------


def test_what_the_config_names_must_be_there(tiny_dirs: dict[str, Path], tmp_path: Path):
    train(tmp_path / "a", "qwen2", bias="lora_only", modules_to_save=["norm"])
    drop(tmp_path / "a", "base_model.model.model.norm.weight")
    drop(tmp_path / "a", *(name for name in load_file(tmp_path / "a" / WEIGHTS) if name.endswith("norm.weight")))
    with pytest.raises(DamagedFile, match="its config saves norm, for which it has no weights"):
        load_with(tiny_dirs["qwen2"], tmp_path / "a")
    edit(tmp_path / "a", modules_to_save=None)
    drop(tmp_path / "a", "base_model.model.model.layers.2.self_attn.q_proj.base_layer.bias")
    with pytest.raises(DamagedFile, match=r"'lora_only', and it has no model\.layers\.2\.self_attn\.q_proj\.bias"):
        load_with(tiny_dirs["qwen2"], tmp_path / "a")
    edit(tmp_path / "a", bias="some")
    with pytest.raises(DamagedFile, match="its bias is 'some', and can be none, all, lora_only"):
        load_with(tiny_dirs["qwen2"], tmp_path / "a")


def test_layers_to_transform_says_which_layers_must_be_there(tiny_dirs: dict[str, Path], tmp_path: Path):
    train(tmp_path, "llama", layers_to_transform=0)
    drop(tmp_path, *(f"base_model.model.model.layers.0.self_attn.q_proj.lora_{part}.weight" for part in "AB"))
    with pytest.raises(DamagedFile, match=r"its config names model\.layers\.0\.self_attn\.q_proj, for which"):
        load_with(tiny_dirs["llama"], tmp_path)


def test_a_vocabulary_must_be_whole(tiny_dirs: dict[str, Path], tmp_path: Path):
    train(tmp_path, "llama-mha", words=140)
    drop(tmp_path, "base_model.model.lm_head.weight")
    with pytest.raises(WrongModel, match=r"lm_head\.weight of the model has shape \[128, 64\], .* needs \[140, 64\]"):
        load_with(tiny_dirs["llama-mha"], tmp_path)


def test_one_of_two_names_of_a_tied_vocabulary_is_enough(tiny_dirs: dict[str, Path], tmp_path: Path):
    expected = train(tmp_path, "llama", words=140)
    drop(tmp_path, "base_model.model.model.embed_tokens.weight")
    supernet = load_with(tiny_dirs["llama"], tmp_path)
    assert supernet.architecture.tied_embeddings
    assert torch.equal(whole(supernet)["model.embed_tokens.weight"], expected["model.embed_tokens.weight"])


def test_a_whole_weight_of_another_shape_is_refused(tiny_dirs: dict[str, Path], tmp_path: Path):
    train(tmp_path, "llama-mha", modules_to_save=["norm"], target_modules=["lm_head"])
    with pytest.raises(WrongModel, match=r"has shape \[64\], this model needs \[96\]"):
        load_with(tiny_dirs["llama"], tmp_path)


def test_a_whole_weight_does_not_replace_what_an_earlier_adapter_changed(tiny_dirs: dict[str, Path], tmp_path: Path):
    train(tmp_path / "one", "llama-mha")
    train(tmp_path / "two", "llama-mha", modules_to_save=["o_proj"], target_modules=["q_proj"])
    load_with(tiny_dirs["llama-mha"], tmp_path / "two", tmp_path / "one")
    with pytest.raises(UnsupportedAdapter, match=r"a whole weight of model\.layers\.0\.self_attn\.o_proj, which one"):
        load_with(tiny_dirs["llama-mha"], tmp_path / "one", tmp_path / "two")


def test_dora_on_an_embedding_is_refused(tiny_dirs: dict[str, Path], tmp_path: Path):
    train(tmp_path, "llama-mha", target_modules=["embed_tokens"], use_dora=True)
    with pytest.raises(UnsupportedAdapter, match=r"DoRA on the embedding model\.embed_tokens"):
        load_with(tiny_dirs["llama-mha"], tmp_path)


def test_a_bad_number_in_a_whole_weight_is_found(tiny_dirs: dict[str, Path], tmp_path: Path):
    train(tmp_path, "llama-mha", modules_to_save=["norm"])
    weights = load_file(tmp_path / WEIGHTS)
    weights["base_model.model.model.norm.weight"][3] = float("nan")
    save_file(weights, tmp_path / WEIGHTS)
    with pytest.raises(NonFiniteWeights, match=r"model\.norm\.weight is not finite"):
        whole(load_with(tiny_dirs["llama-mha"], tmp_path))


# --- the tokenizer ----------------------------------------------------------------------------------------------------


class Notes:
    """Keeps what a user would be told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    track = SILENT.track


def test_another_vocabulary_comes_with_its_tokenizer(tiny_dirs: dict[str, Path], tmp_path: Path):
    train(tmp_path / "mine", "llama-mha", words=140)
    told: Any = Notes()
    supernet = load.load_supernet(str(tiny_dirs["llama-mha"]), adapters=[tmp_path / "mine"], progress=told)
    assert supernet.tokenizer_folder is None
    assert told.warnings == [
        "The adapter mine changes the vocabulary from 128 to 140 tokens but has no tokenizer: the model's own is "
        "written, without new tokens."
    ]
    (tmp_path / "mine" / "tokenizer.json").write_text('{"mine": 1}')
    (tmp_path / "mine" / "chat_template.jinja").write_text("mine")
    supernet = load.load_supernet(str(tiny_dirs["llama-mha"]), adapters=[tmp_path / "mine"], progress=told)
    assert supernet.tokenizer_folder == tmp_path / "mine"
    assert told.notes == ["The adapter mine changes the vocabulary from 128 to 140 tokens: its tokenizer is written."]
    folder = written(supernet, tmp_path / "out")
    assert (folder / "tokenizer.json").read_text() == '{"mine": 1}'
    assert (folder / "chat_template.jinja").read_text() == "mine"


def test_the_tokenizer_of_the_model_stays_where_its_words_do(tiny_dirs: dict[str, Path], tmp_path: Path):
    train(tmp_path, "llama-mha", modules_to_save=["norm"])
    (tmp_path / "tokenizer.json").write_text("{}")
    assert load_with(tiny_dirs["llama-mha"], tmp_path).tokenizer_folder is None


def test_untying_is_said(tiny_dirs: dict[str, Path], tmp_path: Path):
    train(tmp_path / "mine", target_modules=["lm_head"])
    told: Any = Notes()
    load.load_supernet(str(tiny_dirs["llama"]), adapters=[tmp_path / "mine"], progress=told)
    assert told.notes == ["The adapter mine parts the head of llama from its embedding, to which it was tied."]
