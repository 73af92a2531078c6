"""Tiny supernets with tokenizers, and the plain way to compute what calibration computes cleverly."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from amoeba_export.ir import Supernet
from amoeba_export.load import load_supernet
from amoeba_export.model.samples import Samples, text_batches
from tests.tiny import VOCAB, save_tiny

WORDS = ["<pad>", "<s>", "</s>", "Answer:", "A", "B", "C", "D", ".", *(f"w{i}" for i in range(VOCAB - 9))]


def save_tokenizer(folder: Path) -> None:
    """A tokenizer with one token per word."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="w0")
    wrapped.save_pretrained(folder)


def tiny_supernet(folder: Path, family: str = "llama", **overrides: Any) -> Supernet:
    """A saved tiny model with a tokenizer, opened."""
    save_tiny(folder, family, **overrides)
    save_tokenizer(folder)
    return load_supernet(str(folder))


def random_samples(count: int = 6, length: int = 12, *, batch: int = 2, seed: int = 0, vocab: int = VOCAB) -> Samples:
    """Windows of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocab, (count, length), generator=generator)
    return Samples(tuple(text_batches(tokens.tolist(), batch)))


def random_text(num_words: int, seed: int = 0) -> str:
    """Words that the tokenizer knows."""
    rng = random.Random(seed)
    return " ".join(rng.choices(WORDS[8:], k=num_words))


def whole_model(supernet: Supernet) -> Any:
    """The model as transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(supernet.folder, dtype=torch.float32).eval()


@torch.no_grad()
def plain_loss(model: Any, active: Sequence[bool], samples: Samples) -> float:
    """Mean negative log-likelihood of a transformers model with some of its layers, the published way."""
    layers = model.model.layers
    kept = torch.nn.ModuleList([layer for layer, keep in zip(layers, active, strict=True) if keep])
    config = model.config
    model.model.layers, model.config.num_hidden_layers = kept, len(kept)
    try:
        losses = []
        for batch in samples.batches:
            logits = model(batch.tokens_BT, use_cache=False).logits[batch.rows_S, batch.positions_S]
            losses.append(torch.nn.functional.cross_entropy(logits, batch.targets_S, reduction="none"))
    finally:
        model.model.layers, config.num_hidden_layers = layers, len(layers)
    return float(torch.cat(losses).double().mean())


def with_tensors(supernet: Supernet, tensors: Any) -> Supernet:
    """The same model over another source of weights."""
    return dataclasses.replace(supernet, tensors=tensors)
