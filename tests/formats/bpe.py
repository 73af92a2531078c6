"""A byte-level BPE tokenizer of 128 tokens, with a chat template: what llama.cpp wants beside tiny weights."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from tests.tiny import VOCAB

CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def save_bpe(folder: Path) -> None:
    """Three special tokens, ASCII, one merge, and names that fill the vocabulary up."""
    special = ["<pad>", "<s>", "</s>"]
    bytes_ = ["Ċ", "Ġ", *sorted(letter for letter in ByteLevel.alphabet() if ord(letter) < 127), "he"]
    names = [*special, *bytes_, *(f"<extra{idx}>" for idx in range(VOCAB))][:VOCAB]
    vocabulary = {name: idx for idx, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("h", "e")]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
