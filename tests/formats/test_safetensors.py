from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DynamicCache

from amoeba_export.errors import DiskFull, NotRepresentable, WeightsMismatch
from amoeba_export.formats import safetensors, shards
from amoeba_export.formats.safetensors import open_writer
from amoeba_export.ir import Subnet, SubnetPlan, Supernet
from amoeba_export.materialize import materialize_subnet
from amoeba_export.model.opening import register_amoeba
from amoeba_export.verify import masked_logits
from tests.materialize.subnets import bare_plan, open_supernet, plan_for, write
from tests.tiny import FAMILIES, VOCAB, save_tiny

IDS = torch.randint(0, VOCAB, (2, 12), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def llama(tiny_dirs: dict[str, Path]) -> Supernet:
    return open_supernet(tiny_dirs["llama"])


@pytest.fixture
def subnet(llama: Supernet) -> Subnet:
    return materialize_subnet(llama, plan_for(llama, "3x0.6"))


def _greedy_without_cache(model: torch.nn.Module, prompt: torch.Tensor, count: int) -> torch.Tensor:
    for _ in range(count):
        logits = model(prompt, use_cache=False).logits[:, -1:]
        prompt = torch.cat([prompt, logits.argmax(-1)], dim=1)
    return prompt


@torch.no_grad()
def _check_folder(folder: Path, supernet: Supernet, plan: SubnetPlan) -> None:
    """It loads as a user would load it, computes what the masked supernet computes, and generates with a cache."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.testing.assert_close(model(IDS).logits, masked_logits(supernet, plan, IDS), rtol=1e-5, atol=1e-5)
    generated = model.generate(IDS[:1, :5], max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(generated, _greedy_without_cache(model, IDS[:1, :5], 8))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("shape", "policy"), [("3x1", "uniform"), ("4x0.6", "uniform"), ("3x0.5", "adaptive")])
def test_a_written_folder_loads_and_generates(
    tiny_dirs: dict[str, Path], tmp_path: Path, family: str, shape: str, policy: str
) -> None:
    register_amoeba()
    supernet = open_supernet(tiny_dirs[family])
    plan = plan_for(supernet, shape, policy)
    _check_folder(write(materialize_subnet(supernet, plan), tmp_path / "out"), supernet, plan)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_without_attention_or_ffn_load_and_generate(
    tiny_dirs: dict[str, Path], tmp_path: Path, family: str
) -> None:
    """The first layer too: a cache asks it for its length in stock models."""
    register_amoeba()
    supernet = open_supernet(tiny_dirs[family])
    plan = bare_plan(supernet)
    without_first = dataclasses.replace(
        plan, layers=plan.layers[1:], shape=dataclasses.replace(plan.shape, depth=len(plan.layers) - 1)
    )
    for i, bare in enumerate((plan, without_first)):
        _check_folder(write(materialize_subnet(supernet, bare), tmp_path / f"out{i}"), supernet, bare)


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("mistral", {"sliding_window": 5}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 5e5,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                }
            },
        ),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
    ],
)
@pytest.mark.parametrize(("shape", "policy"), [("3x1", "uniform"), ("4x0.6", "uniform"), ("3x0.5", "adaptive")])
def test_windows_rope_scaling_and_biases_of_the_source_are_kept(
    tmp_path: Path, family: str, overrides: dict[str, object], shape: str, policy: str
) -> None:
    register_amoeba()
    supernet = open_supernet(save_tiny(tmp_path / "source", family, **overrides))
    plan = plan_for(supernet, shape, policy)
    _check_folder(write(materialize_subnet(supernet, plan), tmp_path / "out"), supernet, plan)


def test_files_are_what_the_safetensors_library_reads(subnet: Subnet, tmp_path: Path) -> None:
    folder = write(subnet, tmp_path / "out")
    read = load_file(folder / "model.safetensors")
    for name, weight in subnet.stream():
        assert torch.equal(read.pop(name), weight), name
    assert all(not weight.any() and name.endswith(".bias") for name, weight in read.items())
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_shards_hold_the_same_weights_and_the_index_names_them(subnet: Subnet, tmp_path: Path) -> None:
    whole = load_file(write(subnet, tmp_path / "one") / "model.safetensors")
    folder = write(subnet, tmp_path / "many", max_shard_bytes=100_000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(shards) > 1
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    read = {}
    for shard in shards:
        part = load_file(folder / shard)
        assert all(index["weight_map"][name] == shard for name in part)
        assert sum(weight.nbytes for weight in part.values()) <= 100_000
        read |= part
    assert read.keys() == whole.keys() == index["weight_map"].keys()
    assert all(torch.equal(read[name], whole[name]) for name in whole)
    assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in whole.values())


def test_the_same_inputs_give_the_same_bytes(subnet: Subnet, tmp_path: Path) -> None:
    first, second = write(subnet, tmp_path / "a"), write(subnet, tmp_path / "b")
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


def test_weights_may_come_in_any_order(subnet: Subnet, tmp_path: Path) -> None:
    expected = write(subnet, tmp_path / "a") / "model.safetensors"
    (tmp_path / "b").mkdir()
    writer = open_writer(subnet, tmp_path / "b")
    for name, weight in reversed(list(subnet.stream())):
        writer.accept(name, weight)
    writer.close()
    assert (tmp_path / "b" / "model.safetensors").read_bytes() == expected.read_bytes()


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_dtypes_are_converted_in_pieces_and_declared(
    subnet: Subnet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, torch_dtype: torch.dtype
) -> None:
    monkeypatch.setattr(shards, "_CHUNK_BYTES", 1000)
    folder = write(subnet, tmp_path / "out", dtype=dtype)
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == str(torch_dtype).removeprefix("torch.")
    read = load_file(folder / "model.safetensors")
    assert all(torch.equal(read[name], weight.to(torch_dtype)) for name, weight in subnet.stream())


def test_a_value_beyond_fp16_is_refused_and_named(subnet: Subnet, tmp_path: Path) -> None:
    writer = open_writer(subnet, tmp_path, dtype="fp16")
    with pytest.raises(NotRepresentable) as caught:
        writer.accept("model.norm.weight", torch.full((96,), 70000.0))
    assert str(caught.value) == (
        "fp16 cannot hold this plan: values of model.norm.weight exceed its range.\n"
        "  next:  Use one of: --dtype bf16, --dtype fp32."
    )


def test_small_integers_are_refused_with_the_formats_that_have_them(subnet: Subnet) -> None:
    with pytest.raises(NotRepresentable) as caught:
        safetensors.check(subnet.architecture, dtype="int4")
    assert str(caught.value) == (
        "safetensors cannot hold this plan: int4 is not one of its precisions.\n"
        "  next:  Use one of: --dtype bf16, --dtype w4a16, --format onnx --dtype int4, --format gguf --dtype int4."
    )


def test_wrong_weights_are_refused(subnet: Subnet, tmp_path: Path) -> None:
    writer = open_writer(subnet, tmp_path)
    norm = torch.ones(96)
    writer.accept("model.norm.weight", norm)
    for name, weight, problem in (
        ("model.norm.weight", norm, "model.norm.weight was given twice"),
        ("model.nrom.weight", norm, "model.nrom.weight is not part of this model"),
        ("model.embed_tokens.weight", norm, "model.embed_tokens.weight is [96], not [128, 96]"),
    ):
        with pytest.raises(WeightsMismatch) as caught:
            writer.accept(name, weight)
        assert caught.value.problems == (problem,)
    with pytest.raises(WeightsMismatch, match=r"model\.embed_tokens\.weight is missing"):
        writer.close()


def test_a_disk_without_room_is_found_before_any_weight(
    subnet: Subnet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(DiskFull) as caught:
        open_writer(subnet, tmp_path)
    size = sum(4 * torch.Size(spec.shape).numel() for spec in subnet.specs)
    needed = int(str(caught.value).split()[5].replace(",", ""))
    assert size < needed < size + 20_000
    assert str(caught.value) == (
        f"The disk is too full: {needed:,} bytes are needed and 1,000 are free.\n"
        f"  where: {tmp_path}\n"
        "  next:  Free some space, or choose an --out on another disk."
    )


def test_a_quota_reached_while_reserving_is_a_full_disk(
    subnet: Subnet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.EDQUOT, "quota")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(DiskFull):
        open_writer(subnet, tmp_path)


def test_tokenizer_generation_config_and_licence_travel_along(tiny_dirs: dict[str, Path], tmp_path: Path) -> None:
    source = shutil.copytree(tiny_dirs["llama"], tmp_path / "source")
    carried = {
        "tokenizer.json": "{}",
        "tokenizer_config.json": "{}",
        "chat_template.jinja": "{{ messages }}",
        "LICENSE.txt": "ours",
    }
    for name, text in carried.items():
        (source / name).write_text(text)
    supernet = open_supernet(source)
    folder = write(materialize_subnet(supernet, plan_for(supernet, "3x0.6")), tmp_path / "out")
    assert {name: (folder / name).read_text() for name in carried} == carried
    assert (folder / "generation_config.json").read_bytes() == (source / "generation_config.json").read_bytes()


def test_the_model_card_says_what_is_in_the_folder(llama: Supernet, tmp_path: Path) -> None:
    plan = plan_for(llama, "3x0.5", "adaptive")
    card = (write(materialize_subnet(llama, plan), tmp_path / "out") / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "# llama, cut to 3x0.5" in card
    assert 'from_pretrained(".", trust_remote_code=True)' in card
    layer = plan.layers[1]
    assert f"| 1 | 2 | {len(layer.query_heads)} | {len(layer.kv_heads)} | {len(layer.ffn)} |" in card
    stock = (write(materialize_subnet(llama, plan_for(llama, "3x0.5")), tmp_path / "b") / "README.md").read_text()
    assert "trust_remote_code" not in stock


@torch.no_grad()
@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_the_model_takes_its_cache_under_both_names(tiny_dirs: dict[str, Path], tmp_path: Path, name: str) -> None:
    """transformers 5.24 renamed the argument; folders have to run in either version."""
    register_amoeba()
    supernet = open_supernet(tiny_dirs["llama"])
    folder = write(materialize_subnet(supernet, bare_plan(supernet)), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    cache = DynamicCache(config=model.config)
    model(IDS[:, :-1], use_cache=True, **{name: cache})
    last = model(IDS[:, -1:], use_cache=True, **{name: cache}).logits
    assert cache.get_seq_length() == IDS.shape[1]
    torch.testing.assert_close(last, model(IDS, use_cache=False).logits[:, -1:], rtol=1e-5, atol=1e-5)
