"""Tiny GGUF files written through the `gguf` package, tensor by tensor, as a converter writes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers.pre_tokenizers import ByteLevel

from tests.tiny import tiny_model

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
MERGES = ["Ġ Ġ", "t h", "th e", "1 9"]
TOKENS = [*SPECIAL, *sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES)]

Edit = Callable[[gguf.GGUFWriter], None]


def byte_level(writer: gguf.GGUFWriter, *, pre: str | None = "smollm") -> None:
    """A byte-level tokenizer whose text begins with nothing, by default."""
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    kinds = [gguf.TokenType.CONTROL] * len(SPECIAL) + [gguf.TokenType.NORMAL] * (len(TOKENS) - len(SPECIAL))
    writer.add_token_types(kinds)
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)


def write_gguf(
    path: Path,
    family: str = "llama",
    *,
    arch: str | None = None,
    model: Any = None,
    without: Iterable[str] = (),
    more: Mapping[str, torch.Tensor] = {},
    edit: Edit | None = None,
    tokenizer: Edit = byte_level,
    context: int = 256,
    **options: Any,
) -> Any:
    """Write a tiny model of `family` and return it. `without` and `more` change the tensors, `edit` adds keys."""
    arch = arch or family
    model = model or tiny_model(family, vocab_size=len(TOKENS))
    config = model.config
    writer = gguf.GGUFWriter(path, arch, **options)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim if hasattr(config, "head_dim") else config.hidden_size // 4)
    writer.add_value_length(config.head_dim if hasattr(config, "head_dim") else config.hidden_size // 4)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    tokenizer(writer)
    if edit is not None:
        edit(writer)
    kinds = {"qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3}
    names = gguf.get_tensor_name_map(kinds.get(arch, gguf.MODEL_ARCH.LLAMA), config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        target = names.get_name(name, (".weight", ".bias"))
        if (name == "lm_head.weight" and config.tie_word_embeddings) or target in without:
            continue
        stored = weight
        for kind, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if kind in name and arch in ("llama", "deci", "granite"):  # neighbouring pairs, not the halves of a head
                stored = weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
        writer.add_tensor(target, np.ascontiguousarray(stored.numpy()))
    for name, weight in more.items():
        writer.add_tensor(name, weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model
