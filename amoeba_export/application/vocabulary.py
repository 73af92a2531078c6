"""`--vocab-keep`: which tokens logits are computed of, and what that costs on a text that did not choose them.

Token ids stay as they are, and so does the embedding: every token can be read. Whatever chooses the tokens, those that
any text can be written with are always among them.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from pathlib import Path

import torch
from torch.nn import functional

from amoeba_export.application.request import ExportRequest
from amoeba_export.application.resolve import DEFAULT_REFIT
from amoeba_export.artifact import VocabularyRecord
from amoeba_export.errors import BadValue, InputError, UsageError
from amoeba_export.ir import InputId, Progress, SubnetPlan, Supernet
from amoeba_export.model.data import DataRecipe, read_documents, read_questions, source_name
from amoeba_export.model.samples import few_windows, in_a_row, opening_of, windows_of
from amoeba_export.model.tokenizer import has_tokenizer, open_tokenizer
from amoeba_export.model.vocabulary import named_tokens, shares_of, writable_tokens
from amoeba_export.reading import decode, parse_json_object
from amoeba_export.reading.records import read_text
from amoeba_export.refit import load_refit_recipe
from amoeba_export.verify import masked_logits


def with_vocabulary(
    supernet: Supernet, request: ExportRequest, plan: SubnetPlan | None, *, progress: Progress
) -> Supernet:
    """`supernet` with the tokens that the request or its plan names; as it is where neither names any.

    Raises:
        InputError: The file cannot be read, names no tokens of the model, or the model has no tokenizer.
        UsageError: More tokens than there are, fewer than are always kept, or others than the plan names.
    """
    named = plan.head_tokens if plan is not None else None
    tokens = named if request.vocab_keep is None else _chosen(supernet, request)
    if tokens is None:
        return supernet
    if named is not None and tokens != named:
        raise UsageError(
            f"--vocab-keep {request.vocab_keep} chooses other tokens than the plan names.",
            next_step="Leave --vocab-keep out: the plan says it.",
        )
    words = supernet.architecture.vocab_size
    progress.note(
        f"Logits of {len(tokens):,} of {words:,} tokens. The full model is taken with the same head, and shares of its "
        "latency mean that."
    )
    return supernet.with_head_tokens(tokens)


def vocabulary_input(supernet: Supernet) -> list[InputId]:
    """What a manifest says of the tokens among its inputs: nothing, where logits are computed of all."""
    if (tokens := supernet.head_tokens) is None:
        return []
    name = f"{len(tokens)} of {supernet.architecture.vocab_size} tokens"
    return [InputId(role="vocabulary", id=name, sha256=hashlib.sha256(str(tokens).encode()).hexdigest())]


def _chosen(supernet: Supernet, request: ExportRequest) -> tuple[int, ...]:
    """Sorted ids."""
    text, words = request.vocab_keep or "", supernet.architecture.vocab_size
    folder = supernet.text_folder
    needed = named_tokens(folder, supernet.architecture.config)
    if text.endswith(".json"):
        listed = _listed(Path(text), words)
        if has_tokenizer(folder):
            needed |= writable_tokens(open_tokenizer(folder))
        return _within({*listed, *needed}, words)
    tokenizer = open_tokenizer(folder)
    needed |= writable_tokens(tokenizer)
    always = _within(needed, words)
    if not text.isdecimal():
        return _within({*shares_of(read_documents(DataRecipe(file=text)), tokenizer), *always}, words)
    number = int(text)
    if not len(always) <= number < words:
        raise BadValue("--vocab-keep", text, f"at least {len(always)}, which are always kept, and less than {words}")
    recipe = request.refit_recipe(DEFAULT_REFIT)
    shares: Counter[int] = Counter()
    for one in recipe.mix:
        for token, share in shares_of(_documents(one), tokenizer).items():
            shares[token] += one.share * share  # type: ignore[assignment] # a Counter of shares
    # Tokens that the texts do not have come last, the lowest ids first: a BPE vocabulary learned those first.
    by_share = sorted(range(words), key=lambda token: (-shares[token], token))
    others = (token for token in by_share if token not in needed)
    return _within({*always, *(token for token, _ in zip(others, range(number - len(always)), strict=False))}, words)


def _within(tokens: set[int], words: int) -> tuple[int, ...]:
    """Sorted; a tokenizer may know words that the model has no row for."""
    return tuple(sorted(token for token in tokens if 0 <= token < words))


def _listed(path: Path, words: int) -> list[int]:
    text = read_text(path, what="vocabulary", next_step="Give a JSON list of token ids.")
    try:
        read = parse_json_object(f'{{"tokens": {text}}}')
        if len(read) > 1:
            raise ValueError("it is more than that")
        listed = decode(list[int], read["tokens"], "it")
    except ValueError as error:
        raise InputError(
            f"This is not a list of token ids: {error}.", where=path, next_step="Give a JSON list, such as [5, 17]."
        ) from error
    if unknown := [token for token in listed if not 0 <= token < words]:
        raise InputError(
            f"The model has no token {unknown[0]}: its ids are 0 to {words - 1}.",
            where=path,
            next_step="Take ids from this model's tokenizer.",
        )
    return listed


def _documents(one: DataRecipe) -> list[str]:
    return [item.answered for item in read_questions(one)] if one.kind == "choices" else read_documents(one)


def measure_vocabulary(supernet: Supernet, plan: SubnetPlan) -> VocabularyRecord | None:
    """What the tokens of a plan cost on the recipe's other text, by the masked supernet; None where all are kept.

    A token that is not kept has no loss (it can never be written): it is counted. The others' probabilities are shares
    of what the kept tokens have together, and so never worse than with all tokens.
    """
    tokens, words = plan.head_tokens, supernet.architecture.vocab_size
    if tokens is None:
        return None
    bare = VocabularyRecord(tokens=len(tokens), of=words)
    folder = supernet.text_folder
    if not has_tokenizer(folder):
        return bare
    tokenizer, (text, *_) = open_tokenizer(folder), load_refit_recipe(DEFAULT_REFIT).other
    length, number = few_windows(supernet.architecture)
    windows = windows_of(in_a_row(_documents(text), tokenizer), length, opening_of(tokenizer))[:number]
    if not windows or max(map(max, windows)) >= words:
        return bare
    ids_BT, kept = torch.tensor(windows), torch.tensor(tokens)
    logits_PV = masked_logits(supernet, dataclasses.replace(plan, head_tokens=None), ids_BT)[:, :-1].flatten(0, 1)
    targets_P = ids_BT[:, 1:].flatten()
    place_V = torch.full((words,), -1).index_copy(0, kept, torch.arange(len(kept)))
    is_kept_P = place_V[targets_P] >= 0
    record = dataclasses.replace(
        bare,
        text=Path(source_name(text)).stem,
        num_tokens=len(is_kept_P),
        unwritable=float((~is_kept_P).double().mean()),
    )
    if not bool(is_kept_P.any()):
        return record
    logits_PV, targets_P = logits_PV[is_kept_P], targets_P[is_kept_P]
    return dataclasses.replace(
        record,
        loss=float(functional.cross_entropy(logits_PV[:, kept], place_V[targets_P])),
        loss_of_all_tokens=float(functional.cross_entropy(logits_PV, targets_P)),
    )
