"""Standard PEFT adapters, compared with what peft itself merges."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from amoeba_export.errors import DamagedFile, NonFiniteWeights, NotFound, UnsafePickle, UnsupportedAdapter, WrongModel
from amoeba_export.ir import SubnetPlan, Supernet
from amoeba_export.load import load_supernet
from amoeba_export.materialize import materialize_subnet
from tests.load.adapters import train_at_random
from tests.tiny import tiny_model

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def train(folder: Path, base: str = "llama", *, words: int | None = None, **options: Any) -> dict[str, torch.Tensor]:
    """Save a random adapter, as if it had been trained. Returns the weights of the model with it merged."""
    return dict(peft_model(folder, base, words=words, **options).merge_and_unload().state_dict())


def peft_model(folder: Path, base: str = "llama", *, words: int | None = None, **options: Any) -> Any:
    """Save a random adapter, as if it had been trained, and return the model that it was trained on, unmerged."""
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "o_proj", "down_proj"]}
    plain = tiny_model(base)
    if words:
        plain.resize_token_embeddings(words)
    model = peft.get_peft_model(plain, peft.LoraConfig(task_type="CAUSAL_LM", **(settings | options)))
    train_at_random(model)
    # "auto" asks the folder of the base model whether its vocabulary was another, and these models have none.
    model.save_pretrained(folder, save_embedding_layers=True if words else "auto")
    return model


def whole(supernet: Supernet) -> dict[str, torch.Tensor]:
    """Every weight of the uncut model with its adapters merged, as an artifact would have it."""
    return dict(materialize_subnet(supernet, SubnetPlan.full(supernet.architecture)).stream())


def merged(supernet: Supernet, module: str) -> torch.Tensor:
    """W' of one module, by the definition in `AdapterDelta`."""
    weight = supernet.tensors.read(f"{module}.weight").clone()
    for adapter in supernet.adapters:
        delta = adapter.delta(module, SubnetPlan.full(supernet.architecture))
        if delta is not None:
            weight += delta.scale * delta.b_OR @ delta.a_RI
            if delta.magnitude_O is not None:
                weight *= (delta.magnitude_O / weight.norm(dim=1)).unsqueeze(1)
    return weight


def edit(folder: Path, **keys: Any) -> None:
    config = json.loads((folder / CONFIG).read_text()) | keys
    (folder / CONFIG).write_text(json.dumps(config))


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    train(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("base", "options"),
    [
        ("llama", {}),
        ("llama-mha", {"target_modules": "all-linear"}),
        ("qwen2", {"target_modules": ["q_proj", "k_proj"], "use_rslora": True}),
        ("llama", {"rank_pattern": {"down_proj": 2, "0.self_attn.q_proj": 8}, "alpha_pattern": {"q_proj": 16.5}}),
        ("llama", {"rank_pattern": {r"layers\.[12]\..*": 3}, "use_rslora": True}),
        ("llama", {"use_dora": True}),
        ("llama", {"use_dora": True, "use_rslora": True, "rank_pattern": {"o_proj": 1}}),
        ("llama", {"layers_to_transform": [1, 3]}),
        ("llama", {"layers_to_transform": 0}),
        ("llama", {"layers_to_transform": 2, "layers_pattern": "layers"}),
        ("llama", {"layers_to_transform": [0], "layers_pattern": ["layers", "blocks"]}),
        ("llama", {"exclude_modules": ["model.layers.0.self_attn.q_proj"]}),
        ("llama", {"exclude_modules": ["layers.1.mlp.down_proj", "o_proj"]}),
        ("llama", {"exclude_modules": r".*\.[02]\..*"}),
        ("llama", {"fan_in_fan_out": True}),
        ("qwen3", {"target_modules": r".*\.(gate|up)_proj", "init_lora_weights": "gaussian"}),
        ("llama-mha", {"target_modules": ["lm_head", "v_proj"]}),
        ("llama-mha", {"target_modules": ["embed_tokens", "v_proj"], "rank_pattern": {"embed_tokens": 3}}),
        ("llama-mha", {"target_modules": r".*(embed_tokens|lm_head|up_proj)", "use_rslora": True}),
        ("qwen3", {"target_modules": ["q_proj"], "use_dora": True, "modules_to_save": ["q_norm", "lm_head"]}),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_the_merged_weights_are_those_that_peft_merges(
    tiny_dirs: dict[str, Path], tmp_path: Path, base: str, options: dict[str, Any]
):
    expected = train(tmp_path, base, **options)
    supernet = load_supernet(str(tiny_dirs[base]), adapters=[tmp_path])
    (adapter,) = supernet.adapters
    base_weights = tiny_model(base).state_dict()
    changed = {
        name.removesuffix(".weight")
        for name in supernet.tensors.names()
        if not torch.equal(expected[name], base_weights[name])
    }
    own = {name for name in changed if name.endswith("_norm") or ("modules_to_save" in options and name == "lm_head")}
    assert set(adapter.modules()) == changed - own
    assert adapter.width_choices == ()
    for module in changed:
        torch.testing.assert_close(merged(supernet, module), expected[f"{module}.weight"], atol=1e-6, rtol=1e-5)


def test_a_module_that_is_not_changed_has_no_delta(tiny_dirs: dict[str, Path], adapter: Path):
    supernet = load_supernet(str(tiny_dirs["llama"]), adapters=[adapter])
    plan = SubnetPlan.full(supernet.architecture)
    assert supernet.adapters[0].delta("model.layers.0.mlp.up_proj", plan) is None


def test_pickled_and_half_precision_weights_are_read_alike(tiny_dirs: dict[str, Path], adapter: Path, tmp_path: Path):
    weights = {name: weight.to(torch.bfloat16) for name, weight in load_file(adapter / WEIGHTS).items()}
    save_file(weights, adapter / WEIGHTS)
    pickled = Path(shutil.copytree(adapter, tmp_path / "pickled"))
    (pickled / WEIGHTS).unlink()
    torch.save(weights, pickled / "adapter_model.bin")
    plan = SubnetPlan.full(load_supernet(str(tiny_dirs["llama"])).architecture)
    first, second = (load_supernet(str(tiny_dirs["llama"]), adapters=[f]).adapters[0] for f in (adapter, pickled))
    assert list(first.modules())
    for module in first.modules():
        a, b = first.delta(module, plan), second.delta(module, plan)
        assert a is not None and b is not None
        assert a.a_RI.dtype == torch.float32
        assert torch.equal(a.a_RI, b.a_RI) and torch.equal(a.b_OR, b.b_OR) and a.scale == b.scale == 1.5


def test_inputs_name_adapters_by_content(tiny_dirs: dict[str, Path], adapter: Path, tmp_path: Path):
    supernet = load_supernet(str(tiny_dirs["llama"]), adapters=[adapter])
    entry = supernet.inputs[1]
    assert (entry.role, entry.id, len(entry.sha256)) == ("adapter", "adapter", 64)
    # peft writes its set of targets in any order
    edit(adapter, target_modules=["down_proj", "q_proj", "o_proj"])
    assert load_supernet(str(tiny_dirs["llama"]), adapters=[adapter]).inputs[1] == entry
    edit(adapter, lora_alpha=7)
    assert load_supernet(str(tiny_dirs["llama"]), adapters=[adapter]).inputs[1] != entry


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "option"),
    [
        ({"peft_type": "IA3"}, "the method IA3"),
        ({"lora_bias": True}, "lora_bias = True"),
        ({"use_qalora": True}, "use_qalora = True"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices = [1]"),
        ({"layer_replication": [[0, 2]]}, "layer_replication = [[0, 2]]"),
        ({"target_parameters": ["x"]}, "target_parameters = ['x']"),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens = [5]"),
        ({"option_of_next_year": {"on": 1}}, "option_of_next_year = {'on': 1}"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa', which changes the base weights"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights = 'loftq', which changes the base weights"),
    ],
)
def test_an_option_that_cannot_be_merged_is_named(
    tiny_dirs: dict[str, Path], adapter: Path, keys: dict[str, Any], option: str
):
    edit(adapter, **keys)
    with pytest.raises(UnsupportedAdapter) as caught:
        load_supernet(str(tiny_dirs["llama"]), adapters=[adapter])
    assert caught.value.exit_code == 7
    assert str(caught.value) == (
        f"The adapter uses {option}, which is not supported.\n"
        f"  where: {adapter / CONFIG}\n"
        "  next:  Merge it with peft (merge_and_unload, save_pretrained) and give the merged model, or train a LoRA "
        "without it."
    )


def test_an_option_that_is_off_does_not_matter(tiny_dirs: dict[str, Path], adapter: Path):
    edit(adapter, option_of_next_year=None, another={}, yet_another=False, runtime={"offload": False, "at": []})
    edit(adapter, lora_dtype="float32", ensure_weight_tying=True, velora_config={"scale": 1.0})
    load_supernet(str(tiny_dirs["llama"]), adapters=[adapter])


@pytest.mark.parametrize("base", ["llama-mha", "qwen3"])
def test_an_adapter_for_another_model_is_refused(tiny_dirs: dict[str, Path], adapter: Path, base: str):
    with pytest.raises(WrongModel) as caught:
        load_supernet(str(tiny_dirs[base]), adapters=[adapter])
    assert caught.value.exit_code == 3
    assert str(caught.value).startswith(
        "The adapter was made for another model: base_model.model.model.layers.0.mlp.down_proj.lora_B.weight has shape "
        "[96, 4], this model needs [64, 4]; "
    )


def test_an_adapter_for_a_deeper_model_is_refused(tiny_dirs: dict[str, Path], tmp_path: Path):
    deeper = peft.get_peft_model(
        tiny_model("llama", num_hidden_layers=5), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    )
    deeper.save_pretrained(tmp_path)
    with pytest.raises(WrongModel, match=r"it changes model\.layers\.4\.self_attn\.q_proj, which this model does not"):
        load_supernet(str(tiny_dirs["llama"]), adapters=[tmp_path])


def test_a_missing_file_is_named(tiny_dirs: dict[str, Path], adapter: Path):
    (adapter / WEIGHTS).unlink()
    with pytest.raises(NotFound) as caught:
        load_supernet(str(tiny_dirs["llama"]), adapters=[adapter])
    assert str(caught.value) == (
        f"The adapter's weight file was not found: {adapter / WEIGHTS}\n"
        "  next:  Give a folder that peft's save_pretrained wrote."
    )
    with pytest.raises(NotFound, match="The adapter's config was not found"):
        load_supernet(str(tiny_dirs["llama"]), adapters=[adapter / "nowhere"])


def drop(folder: Path, *names: str) -> None:
    weights = load_file(folder / WEIGHTS)
    save_file({name: weight for name, weight in weights.items() if name not in names}, folder / WEIGHTS)


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


def test_weights_that_are_not_all_there(tiny_dirs: dict[str, Path], adapter: Path):
    drop(adapter, f"{Q0}.lora_B.weight")
    with pytest.raises(DamagedFile, match=r"q_proj\.lora_A\.weight is there without its lora_B"):
        load_supernet(str(tiny_dirs["llama"]), adapters=[adapter])
    drop(adapter, f"{Q0}.lora_A.weight")
    with pytest.raises(DamagedFile, match=r"its config names model\.layers\.0\.self_attn\.q_proj, for which it has no"):
        load_supernet(str(tiny_dirs["llama"]), adapters=[adapter])


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"r": "four"}, "its config has r = 'four'"),
        ({"r": 0}, "its config has r = 0"),
        ({"lora_alpha": None}, "its config has lora_alpha = None"),
        ({"rank_pattern": {"(": 1}}, "rank_pattern has a pattern that is none: '('"),
        ({"alpha_pattern": {"a{99999999999999}": 1}}, "alpha_pattern has a pattern that is none: 'a{9999"),
        ({"rank_pattern": {"(" * 5000 + ")" * 5000: 1}}, "rank_pattern has a pattern that is none: '(((("),
        ({"use_dora": True}, "use_dora and the magnitudes in the file do not agree"),
    ],
)
def test_a_config_that_makes_no_sense(tiny_dirs: dict[str, Path], adapter: Path, keys: dict[str, Any], reason: str):
    edit(adapter, **keys)
    with pytest.raises(DamagedFile) as caught:
        load_supernet(str(tiny_dirs["llama"]), adapters=[adapter])
    assert reason in caught.value.what


def test_a_bad_number_is_found_when_it_is_used(tiny_dirs: dict[str, Path], adapter: Path):
    weights = load_file(adapter / WEIGHTS)
    weights[f"{Q0}.lora_A.weight"][0, 0] = float("inf")
    save_file(weights, adapter / WEIGHTS)
    supernet = load_supernet(str(tiny_dirs["llama"]), adapters=[adapter])
    with pytest.raises(NonFiniteWeights, match=r"q_proj\.lora_A\.weight is not finite"):
        supernet.adapters[0].delta("model.layers.0.self_attn.q_proj", SubnetPlan.full(supernet.architecture))


class Malice:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def test_a_pickle_that_wants_to_run_code_is_refused(tiny_dirs: dict[str, Path], adapter: Path, tmp_path: Path):
    (adapter / WEIGHTS).unlink()
    torch.save({f"{Q0}.lora_A.weight": Malice(tmp_path / "ran")}, adapter / "adapter_model.bin")
    with pytest.raises(UnsafePickle) as caught:
        load_supernet(str(tiny_dirs["llama"]), adapters=[adapter])
    assert not (tmp_path / "ran").exists()
    assert str(caught.value) == (
        "To load this file would run code: it names posix.system. Amoeba did not load it.\n"
        f"  where: {adapter / 'adapter_model.bin'}\n"
        "  next:  Do not open it with other tools either; get the file from someone you trust."
    )


@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x03\x04junk", pickle.dumps({})])
def test_a_bin_file_that_is_none(tiny_dirs: dict[str, Path], adapter: Path, content: bytes):
    (adapter / WEIGHTS).unlink()
    (adapter / "adapter_model.bin").write_bytes(content)
    with pytest.raises(DamagedFile) as caught:
        load_supernet(str(tiny_dirs["llama"]), adapters=[adapter])
    assert caught.value.where == str(adapter / "adapter_model.bin")


def test_a_bin_file_that_is_another_archive(tiny_dirs: dict[str, Path], adapter: Path):
    (adapter / WEIGHTS).unlink()
    with zipfile.ZipFile(adapter / "adapter_model.bin", "w") as archive:
        archive.writestr("adapter_model/data.pkl", b"junk")
    with pytest.raises(DamagedFile):
        load_supernet(str(tiny_dirs["llama"]), adapters=[adapter])


def test_a_bin_file_that_is_no_table(tiny_dirs: dict[str, Path], adapter: Path):
    (adapter / WEIGHTS).unlink()
    torch.save([torch.ones(2)], adapter / "adapter_model.bin")
    with pytest.raises(DamagedFile, match="not a table of weights"):
        load_supernet(str(tiny_dirs["llama"]), adapters=[adapter])
