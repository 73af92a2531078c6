"""A tiny GGUF file, written here, unpacked as the demo model is."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from amoeba_export.errors import DamagedFile
from amoeba_export.load import load_supernet
from tests.tiny import tiny_model

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXTS = ["a  1 b", "x = 12345\n\n 7", "<|im_start|>user\nélan<|im_end|>", "  lead\ttab"]


def byte_letters() -> list[str]:
    """The 256 letters that byte-level BPE writes bytes with."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    return [chr(byte) if byte in plain else chr(256 + rest.index(byte)) for byte in range(256)]


def write_gguf(path: Path, *, without: str | None = None) -> dict[str, torch.Tensor]:
    """A tied tiny llama with a byte-level tokenizer. Returns its weights by their usual names."""
    tokens = [*SPECIAL, *byte_letters(), "ĠĠ"]
    model = tiny_model("llama", vocab_size=len(tokens))
    config = model.config
    weights = model.state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(256)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    kinds = [gguf.TokenType.CONTROL] * len(SPECIAL) + [gguf.TokenType.NORMAL] * (len(tokens) - len(SPECIAL))
    writer.add_token_types(kinds)
    writer.add_token_merges(["Ġ Ġ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in weights.items():
        if name in ("lm_head.weight", without):
            continue
        stored = weight
        for kind, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if f"{kind}.weight" in name:  # llama.cpp rotates neighbouring pairs, transformers the two halves of a head
                stored = weight.reshape(heads, 2, config.head_dim // 2, -1).swapaxes(1, 2).reshape(weight.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), stored.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor], Path]:
    folder = tmp_path_factory.mktemp("gguf")
    weights = write_gguf(folder / "tiny.gguf")
    supernet = load_supernet(str(folder / "tiny.gguf"), cache_dir=folder / "cache")
    return supernet.folder, weights, folder


def test_weights_and_dims(unpacked: tuple[Path, dict[str, torch.Tensor], Path]):
    folder, weights, _ = unpacked
    supernet = load_supernet(str(folder))
    architecture = supernet.architecture
    assert (architecture.rope_theta, architecture.norm_eps, architecture.tied_embeddings) == (100000.0, 1e-5, True)
    assert (architecture.num_heads, architecture.num_kv_heads, architecture.head_dim) == (6, 3, 32)
    assert set(supernet.tensors.names()) == set(weights) - {"lm_head.weight"}
    for name in supernet.tensors.names():
        assert torch.equal(supernet.tensors.read(name), weights[name]), name


def test_the_folder_is_an_ordinary_model(unpacked: tuple[Path, dict[str, torch.Tensor], Path]):
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


def test_digits_are_split_off_before_spaces_are_merged(unpacked: tuple[Path, dict[str, torch.Tensor], Path]):
    """As llama.cpp's `smollm` does it, and the tokenizer that the model was trained with."""
    tokenizer = AutoTokenizer.from_pretrained(unpacked[0])
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]


def test_it_is_unpacked_once(unpacked: tuple[Path, dict[str, torch.Tensor], Path], monkeypatch: pytest.MonkeyPatch):
    folder, _, root = unpacked
    monkeypatch.setattr("amoeba_export.load.demo._convert", None)
    supernet = load_supernet(str(root / "tiny.gguf"), cache_dir=root / "cache")
    assert (supernet.folder, supernet.name) == (folder, "tiny")
    assert [path.name for path in (root / "cache" / "models").iterdir()] == [folder.name]


def test_a_missing_weight_is_not_made_up(tmp_path: Path):
    """transformers would fill it with random numbers and warn."""
    write_gguf(tmp_path / "tiny.gguf", without="model.norm.weight")
    with pytest.raises(DamagedFile) as caught:
        load_supernet(str(tmp_path / "tiny.gguf"), cache_dir=tmp_path / "cache")
    assert caught.value.what == "This file is damaged or not what its name says: model.norm.weight is not in it"
