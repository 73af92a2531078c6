"""Supernets with strategies, built without the calibration stage: seeded importances and any layers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from amoeba_export.ir import Architecture, Importance, Strategy, Supernet
from amoeba_export.load import load_supernet


def random_strategy(architecture: Architecture, *, seed: int = 0, model_id: str | None = None) -> Strategy:
    """Every depth from 1 on: removing takes the middle layers first. Means are large enough to matter."""
    rng = np.random.default_rng(seed)
    num_layers, query = architecture.num_layers, architecture.num_heads * architecture.head_dim
    order = sorted(range(num_layers), key=lambda layer: (abs(layer - num_layers // 2), layer))
    return Strategy(
        model_id=model_id,
        num_layers=num_layers,
        num_heads=architecture.num_heads,
        num_kv_heads=architecture.num_kv_heads,
        head_dim=architecture.head_dim,
        ffn_size=architecture.ffn_size,
        depth={
            removed: tuple(int(layer not in order[:removed]) for layer in range(num_layers))
            for removed in range(num_layers)
        },
        importance=Importance(
            heads_LN=rng.normal(size=(num_layers, architecture.num_heads)),
            ffn_LF=rng.normal(size=(num_layers, architecture.ffn_size)),
            o_mean_LQ=rng.normal(size=(num_layers, query)).astype(np.float32) * 0.1,
            down_mean_LF=rng.normal(size=(num_layers, architecture.ffn_size)).astype(np.float32) * 0.1,
            metric="WIFV",
        ),
        identity="0" * 64,
    )


def tiny_supernet(folder: Path, *, seed: int = 0) -> Supernet:
    """A saved tiny model, with a random strategy."""
    supernet = load_supernet(str(folder))
    strategy = random_strategy(supernet.architecture, seed=seed, model_id=supernet.identity)
    return dataclasses.replace(supernet, strategy=strategy)


def char_tokenizer(folder: Path, *, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """One token per printable character, saved into a model folder. 0 pad, 1 bos (put first), 2 eos, 3 unknown."""
    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    vocab = {token: i for i, token in enumerate([*special, *characters])}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = Fuse()
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
    fast.chat_template = chat_template
    fast.save_pretrained(folder)
    return fast
