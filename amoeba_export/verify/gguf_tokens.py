"""The tokens of a GGUF file, by llama.cpp, against those of the tokenizer that the file was written from."""

from __future__ import annotations

from pathlib import Path

import gguf

from amoeba_export import llama_cpp
from amoeba_export.errors import TokensDiffer
from amoeba_export.gguf_file import open_gguf
from amoeba_export.ir import SILENT, Progress
from amoeba_export.llama_cpp.tokens import differences, hard_texts, questions
from amoeba_export.model.loading import ONE_AT_A_TIME
from amoeba_export.model.tokenizer import open_tokenizer


def check_tokens(folder: Path, tokenizer_folder: Path, *, progress: Progress = SILENT) -> None:
    """Compare `model.gguf` in `folder` with the tokenizer, on texts that tokenizers disagree about.

    Without llama.cpp, or without a tokenizer in the file, there is nothing to compare. A chat template that llama.cpp
    cannot parse is told: the model is none the worse, and its server does not start with it.

    Raises:
        TokensDiffer: A text has other tokens.
        DamagedFile: llama.cpp does not open the file.
    """
    path = folder / "model.gguf"
    fields = open_gguf(path).fields
    if fields.get("tokenizer.ggml.model", "none") == "none" or not llama_cpp.is_installed():
        return
    with ONE_AT_A_TIME:
        tokenizer = open_tokenizer(tokenizer_folder)

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, verbose=False).input_ids)

    kinds = dict(zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"], strict=True))
    special = [token for token in tokenizer.all_special_tokens if kinds.get(token) == int(gguf.TokenType.CONTROL)]
    texts = hard_texts(special)
    findings = differences(texts, llama_cpp.ask(path, questions(texts), context_tokens=64), encode)
    if findings:
        raise TokensDiffer(path, findings)
    if "tokenizer.chat_template" in fields and not llama_cpp.takes_chat_template(path):
        progress.warn(
            "llama.cpp cannot parse this model's chat template: its server starts with --chat-template NAME, such as "
            "chatml, or --no-jinja. All else of the GGUF file was checked."
        )
