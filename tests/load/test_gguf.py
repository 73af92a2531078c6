"""GGUF sources: every tensor and every key that changes the function is consumed, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from amoeba_export import llama_cpp
from amoeba_export.errors import AmoebaError, DamagedFile, NotFound, SourceDisagrees, UnsupportedError
from amoeba_export.ir import SILENT, SubnetPlan
from amoeba_export.load import load_supernet
from amoeba_export.load.gguf.rope import llama3_divisors, llama3_parameters
from amoeba_export.materialize import materialize_subnet
from amoeba_export.verify.masked import masked_logits
from tests.formats.bpe import save_bpe
from tests.listener import Listener, flip_bit
from tests.load.gguf_files import SPECIAL, TEMPLATE, TOKENS, byte_level, write_gguf
from tests.materialize.subnets import bare_plan, open_supernet, plan_for, write
from tests.tiny import save_tiny, tiny_model

TEXTS = ["a  1 b", "x = 12345\n\n 7", "<|im_start|>user\nélan<|im_end|>", "  lead\ttab"]
IDS = torch.arange(3, 120)[None]
BASE = {"rope_theta": 10000.0}


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """llama.cpp takes seconds to start: it is asked where a test says so."""
    if "llama_cpp_too" not in request.fixturenames:
        monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)


@pytest.fixture
def llama_cpp_too() -> None:
    pytest.importorskip("xllamacpp")


class Notes:
    """A progress that keeps its notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def track(self, what: str, total: int | None = None) -> AbstractContextManager[Callable[[int], None]]:
        return SILENT.track(what, total)


@torch.no_grad()
def unpacked_logits(path: Path, ids: torch.Tensor = IDS) -> torch.Tensor:
    folder = load_supernet(str(path), cache_dir=path.parent / "cache").folder
    logits: torch.Tensor = AutoModelForCausalLM.from_pretrained(folder).eval()(ids).logits
    return logits


@torch.no_grad()
def logits_of(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    logits: torch.Tensor = model(ids).logits
    return logits


def refusal(path: Path, kind: type[AmoebaError] = UnsupportedError) -> str:
    with pytest.raises(kind) as caught:
        load_supernet(str(path), cache_dir=path.parent / "cache")
    assert caught.value.where == str(path) or caught.value.where is None
    assert not list((path.parent / "cache" / "models").iterdir())
    return caught.value.what


# --- the folder that is made ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor], Path]:
    root = tmp_path_factory.mktemp("gguf")
    model = tiny_model("llama", vocab_size=len(TOKENS), rope_parameters={"rope_theta": 100000.0})
    write_gguf(root / "tiny.gguf", model=model)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(llama_cpp, "is_installed", lambda: False)
        supernet = load_supernet(str(root / "tiny.gguf"), cache_dir=root / "cache")
    return supernet.folder, model.state_dict(), root


def test_weights_and_dims(unpacked: tuple[Path, dict[str, torch.Tensor], Path]) -> None:
    folder, weights, _ = unpacked
    supernet = load_supernet(str(folder))
    architecture = supernet.architecture
    assert (architecture.rope_theta, architecture.norm_eps, architecture.tied_embeddings) == (100000.0, 1e-6, True)
    assert (architecture.num_heads, architecture.num_kv_heads, architecture.head_dim) == (6, 3, 32)
    assert set(supernet.tensors.names()) == set(weights) - {"lm_head.weight"}
    for name in supernet.tensors.names():
        assert torch.equal(supernet.tensors.read(name), weights[name]), name


def test_the_folder_is_an_ordinary_model(unpacked: tuple[Path, dict[str, torch.Tensor], Path]) -> None:
    folder, weights, _ = unpacked
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(model.lm_head.weight, weights["model.embed_tokens.weight"])
    generation = GenerationConfig.from_pretrained(folder)
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 2, 2)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.model_max_length == 256
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (SPECIAL[1], SPECIAL[2], SPECIAL[2])
    assert '"tokenizer_class": "PreTrainedTokenizerFast"' in (folder / "tokenizer_config.json").read_text()
    for text in TEXTS:
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_file_has_the_bytes_that_safetensors_writes(
    unpacked: tuple[Path, dict[str, torch.Tensor], Path], tmp_path: Path
) -> None:
    folder, weights, _ = unpacked
    from safetensors.torch import save_file

    kept = {name: weight for name, weight in weights.items() if name != "lm_head.weight"}
    save_file(kept, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert (folder / "model.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_it_is_unpacked_once(
    unpacked: tuple[Path, dict[str, torch.Tensor], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _, root = unpacked
    monkeypatch.setattr("amoeba_export.load.gguf.convert_gguf", None)
    supernet = load_supernet(str(root / "tiny.gguf"), cache_dir=root / "cache")
    assert (supernet.folder, supernet.name) == (folder, "tiny")
    assert [path.name for path in (root / "cache" / "models").iterdir()] == [folder.name]


def test_a_damaged_copy_is_unpacked_again_with_a_note(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    first = load_supernet(str(tmp_path / "tiny.gguf"), cache_dir=tmp_path / "cache")
    weights = {name: first.tensors.read(name).clone() for name in first.tensors.names()}
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        flip_bit(first.folder / name, -20)
        listener = Listener()
        supernet = load_supernet(str(tmp_path / "tiny.gguf"), cache_dir=tmp_path / "cache", progress=listener)
        assert any("damaged" in note and first.folder.name in note for note in listener.notes)
        assert supernet.identity == first.identity
        assert all(torch.equal(supernet.tensors.read(name), weight) for name, weight in weights.items())


# --- RoPE -------------------------------------------------------------------------------------------------------------

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def linear_keys(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(4.0)


def bare_factor(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_factor(4.0)


def legacy_key(writer: gguf.GGUFWriter) -> None:
    writer.add_float32("llama.rope.scale_linear", 4.0)


def yarn_keys(writer: gguf.GGUFWriter, *, betas: bool = False, attn_factor: float | None = None) -> None:
    arch = writer.arch
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)
    writer.add_rope_scaling_orig_ctx_len(64)
    if betas:
        writer.add_float32(f"{arch}.rope.scaling.yarn_beta_fast", 16.0)
        writer.add_float32(f"{arch}.rope.scaling.yarn_beta_slow", 2.0)
    if attn_factor is not None:
        writer.add_float32(f"{arch}.rope.scaling.attn_factor", attn_factor)


ROPES: list[tuple[str, dict[str, Any], Callable[[gguf.GGUFWriter], None]]] = [
    ("linear", {"rope_type": "linear", "factor": 4.0}, linear_keys),
    ("a factor alone is linear", {"rope_type": "linear", "factor": 4.0}, bare_factor),
    ("the old key", {"rope_type": "linear", "factor": 4.0}, legacy_key),
    ("yarn", YARN, yarn_keys),
    ("yarn magnitude", {**YARN, "attention_factor": 1.7079441541679836}, lambda w: yarn_keys(w, attn_factor=1.5)),
]


@pytest.mark.parametrize(("rope", "keys"), [rope[1:] for rope in ROPES], ids=[rope[0] for rope in ROPES])
def test_scaled_rope_by_keys(rope: dict[str, Any], keys: Callable[[gguf.GGUFWriter], None], tmp_path: Path) -> None:
    model = tiny_model("llama", vocab_size=len(TOKENS), rope_parameters=BASE | rope)
    write_gguf(tmp_path / "scaled.gguf", model=model, edit=keys)
    torch.testing.assert_close(unpacked_logits(tmp_path / "scaled.gguf"), logits_of(model), atol=1e-5, rtol=1e-5)
    plain = tiny_model("llama", vocab_size=len(TOKENS), rope_parameters=BASE)
    assert (logits_of(plain) - logits_of(model)).abs().max() > 0.1  # the test can fail


def test_betas_that_llama_cpp_does_not_read_are_refused(tmp_path: Path) -> None:
    """The converter writes what the model has, and llama.cpp computes with 32 and 1."""
    write_gguf(tmp_path / "betas.gguf", edit=lambda writer: yarn_keys(writer, betas=True))
    assert refusal(tmp_path / "betas.gguf") == (
        "A GGUF file with llama.rope.scaling.yarn_beta_fast = 16.0 is not supported: llama.cpp takes it for 32 here."
    )


def test_scaled_rope_by_divisors(tmp_path: Path) -> None:
    model = tiny_model("llama", vocab_size=len(TOKENS), rope_parameters=BASE | LLAMA3)
    divisors = torch.from_numpy(llama3_divisors(LLAMA3, theta=10000.0, size=32)).float()
    write_gguf(tmp_path / "llama3.gguf", model=model, more={"rope_freqs.weight": divisors})
    supernet = load_supernet(str(tmp_path / "llama3.gguf"), cache_dir=tmp_path / "cache")
    assert supernet.architecture.rope_scaling == LLAMA3
    torch.testing.assert_close(unpacked_logits(tmp_path / "llama3.gguf"), logits_of(model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [8, 16, 32, 64, 128])
@pytest.mark.parametrize("theta", [1e4, 1e5, 5e5])
@pytest.mark.parametrize(
    ("factor", "low", "high", "original"), [(8, 1, 4, 8192), (32, 1, 4, 8192), (4, 2, 6, 1000), (3.5, 1, 1.2, 3000)]
)
def test_llama3_from_divisors(size: int, theta: float, factor: float, low: float, high: float, original: int) -> None:
    """Which parameters they were cannot always be told; what they divide by can."""
    given = {
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
    divisors = llama3_divisors(given, theta=theta, size=size)
    found = llama3_parameters(divisors.astype("float32"), theta=theta)
    assert found is not None
    torch.testing.assert_close(
        torch.from_numpy(llama3_divisors(found, theta=theta, size=size)),
        torch.from_numpy(divisors),
        rtol=4e-6,
        atol=0,
    )


def test_divisors_that_no_rope_has_are_refused(tmp_path: Path) -> None:
    odd = torch.tensor([1.0, 3.0] * 8)
    write_gguf(tmp_path / "odd.gguf", more={"rope_freqs.weight": odd})
    assert refusal(tmp_path / "odd.gguf") == (
        "The factors in rope_freqs.weight are divisors that no RoPE of transformers has."
    )


def test_divisors_of_one_are_plain(tmp_path: Path) -> None:
    model = write_gguf(tmp_path / "ones.gguf", more={"rope_freqs.weight": torch.ones(16)})
    torch.testing.assert_close(unpacked_logits(tmp_path / "ones.gguf"), logits_of(model), atol=1e-5, rtol=1e-5)


# --- tensors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("places", ["q_proj k_proj v_proj", "o_proj", "gate_proj up_proj", "down_proj", "_proj"])
@pytest.mark.parametrize("arch", ["llama", "granite", "deci"])
def test_biases(places: str, arch: str, tmp_path: Path) -> None:
    """Each alone: stock types have them all or none, and the others are zeros."""
    model = tiny_model("llama", vocab_size=len(TOKENS), attention_bias=True, mlp_bias=True)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 4)
    absent = set()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(".bias") and not any(place in name for place in places.split()):
                weight.zero_()
                absent.add(names.get_name(name, (".bias",)))
    write_gguf(tmp_path / "biased.gguf", arch=arch, model=model, without=absent, edit=neutral_granite)
    torch.testing.assert_close(unpacked_logits(tmp_path / "biased.gguf"), logits_of(model), atol=1e-5, rtol=1e-5)


def neutral_granite(writer: gguf.GGUFWriter) -> None:
    if writer.arch == "granite":
        for key, value in (("embedding_scale", 1.0), ("residual_scale", 1.0), ("logit_scale", 1.0)):
            writer.add_float32(f"granite.{key}", value)
        writer.add_float32("granite.attention.scale", 32**-0.5)


def test_qwen2_biases(tmp_path: Path) -> None:
    model = write_gguf(tmp_path / "qwen2.gguf", "qwen2")
    assert any(name.endswith("q_proj.bias") for name in model.state_dict())
    torch.testing.assert_close(unpacked_logits(tmp_path / "qwen2.gguf"), logits_of(model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_qwen3_of_any_key_length(head_dim: int, tmp_path: Path) -> None:
    model = tiny_model("qwen3", vocab_size=len(TOKENS), head_dim=head_dim)
    write_gguf(tmp_path / "qwen3.gguf", "qwen3", model=model)
    torch.testing.assert_close(unpacked_logits(tmp_path / "qwen3.gguf"), logits_of(model), atol=1e-5, rtol=1e-5)


def test_heads_that_do_not_divide_the_hidden_size(tmp_path: Path) -> None:
    """Llama's config refuses them; Mistral's computes the same."""
    model = tiny_model("mistral", vocab_size=len(TOKENS), num_attention_heads=6, num_key_value_heads=3)
    write_gguf(tmp_path / "six.gguf", "mistral", arch="llama", model=model)
    supernet = load_supernet(str(tmp_path / "six.gguf"), cache_dir=tmp_path / "cache")
    assert (supernet.architecture.family, supernet.architecture.num_heads) == ("mistral", 6)
    torch.testing.assert_close(unpacked_logits(tmp_path / "six.gguf"), logits_of(model), atol=1e-5, rtol=1e-5)


OWN = [
    ("llama", "full"),
    ("llama", "uniform"),
    ("llama", "adaptive"),
    ("llama", "bare"),
    ("llama-mha", "uniform"),
    ("mistral", "bare"),
    ("qwen2", "full"),
    ("qwen2", "uniform"),
    ("qwen2", "bare"),
    ("qwen3", "full"),
]


def own_file(root: Path, family: str, name: str) -> tuple[Path, torch.Tensor]:
    """A cut of ours as GGUF in fp32, and what it must compute."""
    save_tiny(root / "model", family)
    save_bpe(root / "model")
    supernet = open_supernet(root / "model")
    plan = {
        "full": lambda: SubnetPlan.full(supernet.architecture),
        "bare": lambda: bare_plan(supernet),
        "uniform": lambda: plan_for(supernet, "3x0.5"),
        "adaptive": lambda: plan_for(supernet, "3x0.5", "adaptive"),
    }[name]()
    folder = write(materialize_subnet(supernet, plan), root / "written", "gguf", "fp32")
    return folder / "model.gguf", masked_logits(supernet, plan, IDS)


@pytest.mark.parametrize(("family", "name"), OWN)
def test_what_we_write_is_read_again(family: str, name: str, tmp_path: Path) -> None:
    """Compensated cuts, a width per layer, blocks without heads and without neurons (`deci`)."""
    path, expected = own_file(tmp_path, family, name)
    again = load_supernet(str(path), cache_dir=tmp_path / "cache")
    found = masked_logits(again, SubnetPlan.full(again.architecture), IDS)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(unpacked_logits(path), expected, atol=2e-5, rtol=1e-4)


def test_layers_are_filled_up_and_it_says_so(tmp_path: Path) -> None:
    path, _ = own_file(tmp_path, "llama", "bare")
    heard = Notes()
    load_supernet(str(path), cache_dir=tmp_path / "cache", progress=heard)
    assert (
        "The layers of model.gguf are filled up with zeros to 6 query heads, 3 KV heads and 96 neurons each: a source "
        "has layers that are alike" in heard.notes
    )


@pytest.mark.parametrize("part", [1, 2, 3])
def test_a_split_file_is_read_as_one(part: int, tmp_path: Path) -> None:
    model = write_gguf(tmp_path / "whole.gguf", split_max_tensors=15)
    parts = sorted(path.name for path in tmp_path.glob("*.gguf"))
    assert parts == [f"whole-0000{idx}-of-00003.gguf" for idx in (1, 2, 3)]
    path = tmp_path / parts[part - 1]
    torch.testing.assert_close(unpacked_logits(path), logits_of(model), atol=1e-5, rtol=1e-5)


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    write_gguf(tmp_path / "whole.gguf", split_max_tensors=15)
    (tmp_path / "whole-00002-of-00003.gguf").unlink()
    with pytest.raises(NotFound) as caught:
        load_supernet(str(tmp_path / "whole-00001-of-00003.gguf"), cache_dir=tmp_path / "cache")
    assert caught.value.what.endswith("whole-00002-of-00003.gguf")
    assert caught.value.next_step == (
        "Put all 3 parts into one folder, or merge them: llama-gguf-split --merge FIRST OUT."
    )


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("attention.sliding_window", 16, "llama.cpp attends to everything in this architecture"),
        ("attention.scale", 0.5, "heads of 32 are scaled by 0.176777"),
        ("rope.dimension_count", 16, "heads are 32 long"),
        ("residual_scale", 0.25, "we do not know what it changes"),
        ("final_logit_softcapping", 30.0, "we do not know what it changes"),
        ("a_key_of_tomorrow", 1, "we do not know what it changes"),
        ("rope.scaling.attn_factor", 1.5, "it scales attention without YaRN"),
    ],
)
def test_a_key_that_changes_the_function_is_named(key: str, value: float, reason: str, tmp_path: Path) -> None:
    def edit(writer: gguf.GGUFWriter) -> None:
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"llama.{key}", value)

    write_gguf(tmp_path / "odd.gguf", edit=edit)
    assert refusal(tmp_path / "odd.gguf") == (
        f"A GGUF file with llama.{key} = {gguf.GGUFReader(tmp_path / 'odd.gguf').fields[f'llama.{key}'].contents()} "
        f"is not supported: {reason}."
    )


def test_keys_and_values_of_different_lengths_are_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "odd.gguf")
    content = (tmp_path / "odd.gguf").read_bytes()
    key = b"llama.attention.value_length" + (4).to_bytes(4, "little")
    start = content.index(key) + len(key)
    (tmp_path / "odd.gguf").write_bytes(content[:start] + (16).to_bytes(4, "little") + content[start + 4 :])
    assert refusal(tmp_path / "odd.gguf") == (
        "A GGUF file with llama.attention.value_length = 16 is not supported: keys are 32 long."
    )


def test_a_tensor_that_nobody_reads_is_named(tmp_path: Path) -> None:
    write_gguf(tmp_path / "more.gguf", "qwen3", more={"blk.1.attn_gate.weight": torch.ones(64)})
    assert refusal(tmp_path / "more.gguf") == (
        "This GGUF file has tensors that 'qwen3' models of ours do not have: blk.1.attn_gate.weight."
    )


def test_a_missing_weight_is_not_made_up(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", without=["output_norm.weight"])
    assert refusal(tmp_path / "tiny.gguf", DamagedFile) == (
        "This file is damaged or not what its name says: output_norm.weight is not in it"
    )


@pytest.mark.usefixtures("llama_cpp_too")
def test_a_model_without_numbers_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama", vocab_size=len(TOKENS))
    model.model.norm.weight.data.fill_(3e38)
    write_gguf(tmp_path / "nan.gguf", model=model)
    assert "llama.cpp computes no number (NaN) after" in refusal(tmp_path / "nan.gguf", SourceDisagrees)


@pytest.mark.usefixtures("llama_cpp_too")
def test_logits_so_large_that_llama_cpp_says_none_are_refused(tmp_path: Path) -> None:
    model = tiny_model("llama", vocab_size=len(TOKENS))
    model.model.norm.weight.data.fill_(1e30)
    parts_of_letters = [idx for idx, token in enumerate(TOKENS) if not token.isascii()]
    model.model.embed_tokens.weight.data[parts_of_letters] *= 10
    write_gguf(tmp_path / "large.gguf", model=model)
    assert "llama.cpp gives no probabilities after" in refusal(tmp_path / "large.gguf", SourceDisagrees)


def test_a_template_that_is_no_text_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "odd.gguf")
    content = (tmp_path / "odd.gguf").read_bytes()
    start = content.index(TEMPLATE.encode())
    (tmp_path / "odd.gguf").write_bytes(content[: start + 2] + b"\x80" + content[start + 3 :])
    assert refusal(tmp_path / "odd.gguf", DamagedFile) == (
        "This file is damaged or not what its name says: tokenizer.chat_template is no text in UTF-8 (at letter 3)"
    )


def test_another_architecture_is_named(tmp_path: Path) -> None:
    write_gguf(tmp_path / "mpt.gguf", arch="mpt")
    assert refusal(tmp_path / "mpt.gguf") == "Models of type 'mpt' are not supported."
    write_gguf(tmp_path / "moe.gguf", arch="qwen2moe", edit=lambda writer: writer.add_expert_count(8))
    assert refusal(tmp_path / "moe.gguf").startswith(
        "A qwen2moe is a mixture of 8 experts of a kind that is not supported"
    )


@pytest.mark.parametrize("length", [0, 3, 4, 15, 24, 100, 1000, 20000, -1, -40])
def test_a_truncated_file_is_damaged(length: int, tmp_path: Path) -> None:
    write_gguf(tmp_path / "whole.gguf")
    content = (tmp_path / "whole.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(content[:length])
    refusal(tmp_path / "cut.gguf", DamagedFile)


@pytest.mark.parametrize("position", [8, 16, 24])
def test_declared_counts_are_not_believed(position: int, tmp_path: Path) -> None:
    """Tensors, keys, and the letters of the first key: 10**18 of them."""
    write_gguf(tmp_path / "huge.gguf")
    content = bytearray((tmp_path / "huge.gguf").read_bytes())
    content[position : position + 8] = (10**18).to_bytes(8, "little")
    (tmp_path / "huge.gguf").write_bytes(content)
    assert "1000000000000000000" in refusal(tmp_path / "huge.gguf", DamagedFile)


# --- tokens -----------------------------------------------------------------------------------------------------------


def tokens_of(path: Path, text: str) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(load_supernet(str(path), cache_dir=path.parent / "cache").folder)
    tokens: list[str] = tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)
    return tokens


@pytest.mark.parametrize(
    ("pre", "tokens"),
    [
        ("smollm", ["a", "ĠĠ", "1", "9", "Ġ", "the"]),
        ("gpt-2", ["a", "Ġ", "Ġ", "19", "Ġ", "the"]),
        ("exaone4", ["a", "Ġ", "Ġ", "19", "Ġ", "the"]),
        ("gpt-4o", ["a", "Ġ", "Ġ", "19", "Ġ", "the"]),
        ("qwen2", ["a", "Ġ", "Ġ", "1", "9", "Ġ", "the"]),
        ("llama-bpe", ["<|im_start|>", "a", "Ġ", "Ġ", "19", "Ġ", "the"]),
        ("tekken", ["<|im_start|>", "a", "Ġ", "Ġ", "1", "9", "Ġ", "the"]),
    ],
)
def test_text_is_split_by_the_rule_that_the_file_names(pre: str, tokens: list[str], tmp_path: Path) -> None:
    """And begins as llama.cpp begins it where the file does not say."""
    write_gguf(tmp_path / "pre.gguf", tokenizer=lambda writer: byte_level(writer, pre=pre))
    assert tokens_of(tmp_path / "pre.gguf", "a  19 the") == tokens


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("adds_eos", [False, True])
def test_text_begins_and_ends_as_the_file_says(adds_bos: bool, adds_eos: bool, tmp_path: Path) -> None:
    def edit(writer: gguf.GGUFWriter) -> None:
        writer.add_add_bos_token(adds_bos)
        writer.add_add_eos_token(adds_eos)

    write_gguf(tmp_path / "ends.gguf", edit=edit)
    expected = ["<|im_start|>"] * adds_bos + ["the"] + ["<|im_end|>"] * adds_eos
    assert tokens_of(tmp_path / "ends.gguf", "the") == expected


@pytest.mark.parametrize("pre", ["deepseek-llm", "of-tomorrow", None])
def test_an_unknown_splitting_rule_is_refused(pre: str | None, tmp_path: Path) -> None:
    write_gguf(tmp_path / "pre.gguf", tokenizer=lambda writer: byte_level(writer, pre=pre))
    assert refusal(tmp_path / "pre.gguf") == (
        f"Its tokenizer's way to split text (tokenizer.ggml.pre = '{pre or 'default'}') is not known; it is not "
        "supported."
    )


SPM = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"thecasonled"]
SPM_TOKENS = [*dict.fromkeys(SPM), "\u2581\u2581", "th", "\u2581th", "the", "\u2581the", "led", "le", "<tool>"]


def sentence_piece(writer: gguf.GGUFWriter, *, adds_space: bool | None = None) -> None:
    writer.add_tokenizer_model("llama")
    writer.add_token_list(SPM_TOKENS)
    writer.add_token_scores([-float(idx) for idx in range(len(SPM_TOKENS))])
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    kinds += [gguf.TokenType.BYTE] * 256 + [gguf.TokenType.NORMAL] * (len(SPM_TOKENS) - 260)
    writer.add_token_types([*kinds, gguf.TokenType.USER_DEFINED])
    if adds_space is not None:
        writer.add_add_space_prefix(adds_space)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("the cat", ["<s>", "\u2581the", "\u2581", "c", "a", "t"]),
        ("  led", ["<s>", "\u2581\u2581", "\u2581", "led"]),
        (" ", ["<s>", "\u2581\u2581"]),
        ("", ["<s>"]),
        ("</s>the", ["<s>", "</s>", "\u2581the"]),
        ("a</s> the", ["<s>", "\u2581", "a", "</s>", "\u2581\u2581", "the"]),
        ("<tool>a", ["<s>", "<tool>", "\u2581", "a"]),
        ("é", ["<s>", "\u2581", "<0xC3>", "<0xA9>"]),
    ],
)
def test_sentence_piece(text: str, tokens: list[str], tmp_path: Path) -> None:
    """A space in front of every piece of text, also behind a special token; bytes for what has no token."""
    model = tiny_model("llama", vocab_size=len(SPM_TOKENS))
    write_gguf(tmp_path / "spm.gguf", model=model, tokenizer=sentence_piece)
    assert tokens_of(tmp_path / "spm.gguf", text) == tokens


def test_sentence_piece_without_a_space_in_front(tmp_path: Path) -> None:
    model = tiny_model("llama", vocab_size=len(SPM_TOKENS))
    write_gguf(tmp_path / "spm.gguf", model=model, tokenizer=lambda w: sentence_piece(w, adds_space=False))
    assert tokens_of(tmp_path / "spm.gguf", "the cat") == ["<s>", "the", "\u2581", "c", "a", "t"]


@pytest.mark.parametrize("kind", ["t5", "bert"])
def test_another_kind_of_tokenizer_is_refused(kind: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "kind.gguf", tokenizer=lambda writer: writer.add_tokenizer_model(kind))
    assert refusal(tmp_path / "kind.gguf") == f"Its tokenizer is of the kind '{kind}'; it is not supported."


# --- llama.cpp itself -------------------------------------------------------------------------------------------------


def test_llama_cpp_agrees_on_a_scaled_and_biased_model(llama_cpp_too: None, tmp_path: Path) -> None:
    """YaRN with every key, biases everywhere, granite's graph, a rule that adds a token in front."""
    model = tiny_model(
        "llama",
        vocab_size=len(TOKENS),
        attention_bias=True,
        mlp_bias=True,
        rope_parameters={**BASE, **YARN, "attention_factor": 1.7079441541679836},
    )

    def edit(writer: gguf.GGUFWriter) -> None:
        neutral_granite(writer)
        yarn_keys(writer, attn_factor=1.5)

    path = tmp_path / "all.gguf"
    write_gguf(path, arch="granite", model=model, edit=edit, tokenizer=lambda w: byte_level(w, pre="llama-bpe"))
    torch.testing.assert_close(unpacked_logits(path), logits_of(model), atol=1e-5, rtol=1e-5)


def test_llama_cpp_agrees_on_a_cut_of_ours(llama_cpp_too: None, tmp_path: Path) -> None:
    path, expected = own_file(tmp_path, "llama", "bare")
    torch.testing.assert_close(unpacked_logits(path), expected, atol=2e-5, rtol=1e-4)


def test_llama_cpp_agrees_on_sentence_piece_and_llama3(llama_cpp_too: None, tmp_path: Path) -> None:
    model = tiny_model("llama", vocab_size=len(SPM_TOKENS), rope_parameters=BASE | LLAMA3)
    divisors = torch.from_numpy(llama3_divisors(LLAMA3, theta=10000.0, size=32)).float()
    write_gguf(tmp_path / "spm.gguf", model=model, tokenizer=sentence_piece, more={"rope_freqs.weight": divisors})
    torch.testing.assert_close(unpacked_logits(tmp_path / "spm.gguf"), logits_of(model), atol=1e-5, rtol=1e-5)


def test_a_misread_file_is_found_by_llama_cpp(
    llama_cpp_too: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain RoPE in the place of linear, and a rule that splits otherwise."""
    from amoeba_export.load.gguf import config, tokenizer

    model = tiny_model("llama", vocab_size=len(TOKENS), rope_parameters={**BASE, "rope_type": "linear", "factor": 4.0})
    write_gguf(tmp_path / "linear.gguf", model=model, edit=linear_keys)
    monkeypatch.setattr(config, "_rope", lambda *_: {"rope_parameters": dict(BASE)})
    monkeypatch.setattr(tokenizer, "_RULES", {"smollm": tokenizer._RULES["gpt-2"]})
    what = refusal(tmp_path / "linear.gguf", SourceDisagrees)
    assert "its log probabilities after 96 tokens are" in what
    assert "to llama.cpp and" in what


def test_without_llama_cpp_it_says_that_nothing_was_compared(tmp_path: Path) -> None:
    heard = Notes()
    write_gguf(tmp_path / "tiny.gguf")
    load_supernet(str(tmp_path / "tiny.gguf"), cache_dir=tmp_path / "cache", progress=heard)
    assert heard.notes[-1] == ("tiny.gguf was not compared with llama.cpp: pip install 'amoeba-export[llamacpp]'")
