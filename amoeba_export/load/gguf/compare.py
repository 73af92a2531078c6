"""A GGUF source against llama.cpp: what we read of the file must be what llama.cpp computes from it.

Subnets are verified against what we read, so a mistake in reading would never show. llama.cpp is asked for the
logits after two prompts and for the tokens of texts that tokenizers disagree about.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from amoeba_export import llama_cpp
from amoeba_export.errors import SourceDisagrees
from amoeba_export.ir import Progress, Supernet
from amoeba_export.llama_cpp.tokens import differences, hard_texts, questions
from amoeba_export.load.gguf.tensors import Model
from amoeba_export.load.gguf.tokenizer import Vocabulary
from amoeba_export.load.stored import open_tensors

PROMPT_TOKENS = (7, 96)
"""The longer one turns slow RoPE frequencies far enough to tell scalings apart."""

_SMALLEST_CONTEXT = 256
"""llama.cpp makes a shorter context so long."""

TOP = 512
"""Log probabilities that are compared: those that llama.cpp holds highest."""

LIMITS = {"F32": 1e-3, "F16": 0.05, "BF16": 0.1}
TABLE_LIMIT = 5e-3
"""Where GELU is: llama.cpp looks it up in a table of half floats on a CPU. 1.5e-3 was seen."""

QUANTIZED_LIMIT = 0.5
"""Root mean square of the differences, as a share of the spread of what is compared, by the coarsest type of a matrix.

llama.cpp rounds activations to 8 bits where weights are quantized: 0.11 was seen with Q4_1. Plain RoPE in
the place of scaled gives about 1."""


def compare_with_llama_cpp(
    path: Path, folder: Path, model: Model, vocabulary: Vocabulary | None, *, progress: Progress
) -> None:
    """Compare the model in `folder` with what llama.cpp makes of `path`, which it was read from.

    Raises:
        SourceDisagrees: Other logits, or other tokens of a text.
        DamagedFile: llama.cpp does not open the file.
    """
    if vocabulary is None:
        progress.note(f"{path.name} has no tokenizer: it was not compared with llama.cpp, which needs one")
        return
    if not llama_cpp.is_installed():
        progress.note(f"{path.name} was not compared with llama.cpp: pip install 'amoeba-export[llamacpp]'")
        return
    from tokenizers import Tokenizer

    special = [vocabulary.tokens[idx] for idx in dict.fromkeys(vocabulary.special.values())]
    texts = hard_texts(special)
    prompts = _prompts(model)
    asked = [_question(prompt, vocabulary) for prompt in prompts]
    progress.note(f"Comparing {path.name} with llama.cpp, once")
    answers = llama_cpp.ask(path, [*asked, *questions(texts)], context_tokens=max(PROMPT_TOKENS) + 8)
    findings = _logit_differences(model, folder, prompts, answers[: len(prompts)])
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    findings += differences(texts, answers[len(prompts) :], lambda text: tokenizer.encode(text).ids)
    if findings:
        raise SourceDisagrees(path, findings)


def _question(prompt: Sequence[int], vocabulary: Vocabulary) -> tuple[str, Mapping[str, Any]]:
    body = {"prompt": prompt, "n_predict": 1, "n_probs": TOP, "temperature": -1.0, "cache_prompt": False}
    # The server holds a token back, probabilities and all, until it is whole text: it is made to take one that is.
    # The probabilities are those before that.
    whole = next((idx for idx, token in enumerate(vocabulary.tokens) if token.isascii() and token.isalnum()), None)
    return "completion", body if whole is None else body | {"logit_bias": [[whole, 1000.0]]}


def _prompts(model: Model) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    room = model.metadata.max_positions - 2
    lengths = [min(length, room) for length in PROMPT_TOKENS if room > 0]
    rope = model.metadata.rope
    if rope["rope_type"] == "longrope" and rope["original_max_position_embeddings"] < _SMALLEST_CONTEXT:
        # llama.cpp turns every text as a long one then.
        lengths = [length for length in lengths if length > rope["original_max_position_embeddings"]]
    return [torch.randint(model.architecture.vocab_size, (length,), generator=generator).tolist() for length in lengths]


def _logit_differences(
    model: Model, folder: Path, prompts: Sequence[Sequence[int]], answers: Sequence[Any]
) -> list[str]:
    kinds = {tensor.kind.name for tensor in model.file.tensors.values() if len(tensor.shape) > 1}
    limit = max(LIMITS.get(kind, QUANTIZED_LIMIT) for kind in kinds)
    if "activation" in model.metadata.arch.always:
        limit = max(limit, TABLE_LIMIT)
    findings = []
    for prompt, answer in zip(prompts, answers, strict=True):
        told = answer.get("completion_probabilities")
        if not told:  # NaN, or logits so large that the token which it was to take did not win
            findings.append(f"llama.cpp gives no probabilities after {len(prompt)} tokens")
            continue
        theirs = {int(top["id"]): top["logprob"] for top in told[0]["top_logprobs"]}
        if None in theirs.values():  # JSON has no NaN
            findings.append(f"llama.cpp computes no number (NaN) after {len(prompt)} tokens")
            continue
        ids = torch.tensor(list(theirs))
        expected = torch.tensor(list(theirs.values()))
        ours = _log_probabilities(model, folder, prompt)[ids]
        distance = float((ours - expected).square().mean().sqrt())
        spread = max(float(expected.std()), 1e-3)
        if not distance <= limit * spread:
            findings.append(
                f"its log probabilities after {len(prompt)} tokens are {distance:.3g} from llama.cpp's, "
                f"which spread by {spread:.3g}"
            )
    return findings


@torch.no_grad()
def _log_probabilities(model: Model, folder: Path, prompt: Sequence[int]) -> torch.Tensor:
    """Of the token after `prompt`, from the unpacked folder, with one layer in memory at a time. [V]."""
    from amoeba_export.model.layers import LayerStack

    _, tensors = open_tensors(folder, model.family, model.architecture)
    supernet = Supernet(
        name=folder.name,
        folder=folder,
        architecture=model.architecture,
        family=model.family.family,
        tensors=tensors,
        identity="",
    )
    stack = LayerStack(supernet, memory_bytes=0)
    hidden_BTD = stack.embed(torch.tensor([list(prompt)]))
    for layer_idx in range(model.architecture.num_layers):
        hidden_BTD = stack.run(stack.layer(layer_idx), hidden_BTD)
    products_V = tensors.read(stack.head_name()) @ stack.norm(hidden_BTD[0, -1])
    logits_V: torch.Tensor = stack.logits(products_V)
    return logits_V.log_softmax(-1)
