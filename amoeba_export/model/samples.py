"""Samples: what the model is run on. Tokens in fixed batches, and the positions whose logits are looked at."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from amoeba_export.errors import InputError, TooFewSamples
from amoeba_export.ir import Architecture
from amoeba_export.model.data import DataRecipe, read_documents, read_questions, source_name
from amoeba_export.model.tokenizer import open_tokenizer
from amoeba_export.reading.questions import ANSWER, LETTERS, MultipleChoice

SEGMENT = 16
"""Tokens of text that make one score."""

WINDOW, MOST_WINDOWS = 256, 8
LOGIT_BYTES = 512 * 2**20
"""Of all logits of a few windows, in memory at once: a large vocabulary gets fewer windows."""


class Tokenizer(Protocol):
    """What we need of a transformers tokenizer."""

    eos_token_id: int | None
    unk_token_id: int | None

    def encode(self, text: str, *, add_special_tokens: bool, verbose: bool = True) -> list[int]:
        """Token ids; `verbose` warns of texts that are longer than the model takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Samples that are run together, padded at the end: causal attention never sees the padding.

    Attributes:
        tokens_BT: Token ids. int64 [B, T].
        lengths_B: Real tokens of each sample.
        rows_S: Sample of each scored position. int64 [S].
        positions_S: Where it is: the logits there predict the next token.
        targets_S: The token that is right there.
        segments_S: Which segment of the batch it belongs to: a score is a sum over a segment. A question is one.
        choices_SC: Tokens that answer a multiple-choice question, -1 where a question has fewer; None for text.
    """

    tokens_BT: torch.Tensor
    lengths_B: torch.Tensor
    rows_S: torch.Tensor
    positions_S: torch.Tensor
    targets_S: torch.Tensor
    segments_S: torch.Tensor
    choices_SC: torch.Tensor | None = None

    @property
    def num_samples(self) -> int:
        """B."""
        return self.tokens_BT.shape[0]

    @property
    def num_segments(self) -> int:
        """Scores that the batch gives."""
        return int(self.segments_S[-1]) + 1


@dataclass(frozen=True, slots=True)
class Samples:
    """Batches in a fixed order. The order of samples is random for a seed, so that a prefix is a fair sample."""

    batches: tuple[Batch, ...]

    @property
    def num_samples(self) -> int:
        """Samples in all batches."""
        return sum(batch.num_samples for batch in self.batches)

    @property
    def num_segments(self) -> int:
        """Scores that all batches give."""
        return sum(batch.num_segments for batch in self.batches)

    @property
    def num_tokens(self) -> int:
        """Tokens that go through the model, padding included."""
        return sum(batch.tokens_BT.numel() for batch in self.batches)

    @property
    def num_scored(self) -> int:
        """Positions that a loss is averaged over."""
        return sum(len(batch.targets_S) for batch in self.batches)

    @property
    def digest(self) -> str:
        """sha256 of everything in it."""
        digest = hashlib.sha256()
        for batch in self.batches:
            for tensor in (batch.tokens_BT, batch.lengths_B, batch.positions_S, batch.targets_S, batch.choices_SC):
                if tensor is not None:
                    digest.update(repr(tuple(tensor.shape)).encode() + tensor.numpy().tobytes())
        return digest.hexdigest()


def read_samples(recipe: DataRecipe, folder: Path, *, seed: int) -> tuple[Samples, Samples]:
    """The search samples and the held-out samples of `recipe`: disjoint, drawn at random for `seed`.

    Args:
        recipe: Says what to read.
        folder: The model's folder, for its tokenizer.
        seed: Of the draw.

    Raises:
        InputError: The data cannot be used, or the model has no tokenizer.
    """
    tokenizer = open_tokenizer(folder)
    rng = random.Random(seed)
    if recipe.kind == "choices":
        return choice_samples(read_questions(recipe), tokenizer, recipe, rng)
    return text_samples(read_documents(recipe), tokenizer, recipe, rng)


def text_samples(
    documents: Sequence[str], tokenizer: Tokenizer, recipe: DataRecipe, rng: random.Random
) -> tuple[Samples, Samples]:
    """Windows of `recipe.window` tokens that do not overlap, cut from all documents in a row."""
    ids = in_a_row(documents, tokenizer)
    everything = windows_of(ids, recipe.window, opening_of(tokenizer))
    wanted = recipe.samples + recipe.heldout
    if len(everything) < wanted:
        raise TooFewSamples(
            source_name(recipe),
            f"{len(ids)} tokens",
            f"{wanted} windows of {recipe.window} tokens, {wanted * recipe.window} in all",
        )
    windows = rng.sample(everything, wanted)
    return (
        Samples(tuple(text_batches(windows[: recipe.samples], recipe.batch, scored=recipe.scored))),
        Samples(tuple(text_batches(windows[recipe.samples :], recipe.batch, scored=recipe.scored))),
    )


def in_a_row(documents: Sequence[str], tokenizer: Tokenizer) -> list[int]:
    """Tokens of all documents, with the end-of-text token between two of them."""
    ids: list[int] = []
    for i, document in enumerate(documents):
        if i and tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
        ids.extend(tokenizer.encode(document, add_special_tokens=False, verbose=False))
    return ids


def opening_of(tokenizer: Tokenizer) -> list[int]:
    """What the tokenizer puts before a text, such as Gemma's <bos>. A model that learned with it is lost without."""
    bare, whole = (tokenizer.encode("A text.", add_special_tokens=special, verbose=False) for special in (False, True))
    starts = range(len(whole) - len(bare) + 1) if bare else ()
    return next((list(whole[:start]) for start in starts if whole[start : start + len(bare)] == bare), [])


def windows_of(ids: Sequence[int], window: int, opening: Sequence[int] = ()) -> list[list[int]]:
    """Windows of `window` tokens, `opening` among them, of text that does not overlap; what is left is dropped."""
    opening = opening[: window - 1]
    text = window - len(opening)
    return [[*opening, *ids[start : start + text]] for start in range(0, len(ids) - text + 1, text)]


def few_windows(architecture: Architecture) -> tuple[int, int]:
    """Tokens of a window, and how many windows, whose logits are looked at all at once."""
    window = min(WINDOW, architecture.max_positions)
    return window, max(1, min(MOST_WINDOWS, LOGIT_BYTES // (4 * window * architecture.vocab_size)))


def text_batches(windows: Sequence[Sequence[int]], size: int, *, scored: int | None = None) -> list[Batch]:
    """Windows of one length, of which the last `scored` tokens are predicted; None for all but the first."""
    batches = []
    for start in range(0, len(windows), size):
        tokens_BT = torch.tensor(windows[start : start + size], dtype=torch.int64)
        num_rows, length = tokens_BT.shape
        num_scored = min(scored or length, length - 1)
        first, per_row = length - num_scored, math.ceil(num_scored / SEGMENT)
        segments_BS = torch.arange(num_rows)[:, None] * per_row + torch.arange(num_scored) // SEGMENT
        batches.append(
            Batch(
                tokens_BT=tokens_BT,
                lengths_B=torch.full((num_rows,), length),
                rows_S=torch.arange(num_rows).repeat_interleave(num_scored),
                positions_S=torch.arange(first - 1, length - 1).repeat(num_rows),
                targets_S=tokens_BT[:, first:].reshape(-1),
                segments_S=segments_BS.reshape(-1),
            )
        )
    return batches


def choice_samples(
    questions: Sequence[MultipleChoice], tokenizer: Tokenizer, recipe: DataRecipe, rng: random.Random
) -> tuple[Samples, Samples]:
    """One prompt per question; prompts longer than `recipe.window` are left out."""
    letters = _letter_tokens(tokenizer, max(len(question.choices) for question in questions))
    shuffled = rng.sample(questions, len(questions))
    wanted = recipe.samples + recipe.heldout
    chosen: list[tuple[list[int], MultipleChoice]] = []
    for question in shuffled:
        if len(chosen) == wanted:
            break
        ids = tokenizer.encode(question.prompt, add_special_tokens=True, verbose=False)
        if len(ids) <= recipe.window:
            chosen.append((ids, question))
    if len(chosen) < wanted:
        raise TooFewSamples(
            source_name(recipe),
            f"{len(chosen)} questions of at most {recipe.window} tokens ({len(questions)} in all)",
            f"{wanted}",
        )
    return (
        Samples(tuple(_choice_batches(chosen[: recipe.samples], letters, recipe.batch))),
        Samples(tuple(_choice_batches(chosen[recipe.samples :], letters, recipe.batch))),
    )


def _letter_tokens(tokenizer: Tokenizer, count: int) -> list[int]:
    """The token that each letter is after `ANSWER`."""
    plain = tokenizer.encode(ANSWER, add_special_tokens=False)
    letters: list[int] = []
    for letter in LETTERS[:count]:
        ids = tokenizer.encode(f"{ANSWER} {letter}", add_special_tokens=False)
        if len(ids) != len(plain) + 1 or ids[:-1] != plain or ids[-1] in (*letters, tokenizer.unk_token_id):
            raise InputError(
                f"This model's tokenizer has no token of its own for the answer '{letter}'.",
                next_step="Calibrate on text instead: data.kind = 'text' and metric = 'loss'.",
            )
        letters.append(ids[-1])
    return letters


def _choice_batches(
    chosen: Sequence[tuple[list[int], MultipleChoice]], letters: Sequence[int], size: int
) -> list[Batch]:
    batches = []
    for start in range(0, len(chosen), size):
        group = chosen[start : start + size]
        lengths_B = torch.tensor([len(ids) for ids, _ in group])
        tokens_BT = torch.zeros((len(group), int(lengths_B.max())), dtype=torch.int64)
        choices_SC = torch.full((len(group), len(letters)), -1)
        for row, (ids, question) in enumerate(group):
            tokens_BT[row, : len(ids)] = torch.tensor(ids)
            choices_SC[row, : len(question.choices)] = torch.tensor(letters[: len(question.choices)])
        batches.append(
            Batch(
                tokens_BT=tokens_BT,
                lengths_B=lengths_B,
                rows_S=torch.arange(len(group)),
                positions_S=lengths_B - 1,
                targets_S=torch.tensor([letters[question.answer] for _, question in group]),
                segments_S=torch.arange(len(group)),
                choices_SC=choices_SC,
            )
        )
    return batches
