"""The tokens of a refit: what is fitted, what judges the strengths, and what nobody looked at."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from amoeba_export.errors import TooFewSamples
from amoeba_export.model.data import read_documents, read_questions, source_name
from amoeba_export.model.samples import Batch, Samples, Tokenizer, in_a_row, opening_of, text_batches, windows_of
from amoeba_export.model.tokenizer import open_tokenizer
from amoeba_export.refit.recipe import Draw, Share


@dataclass(frozen=True, slots=True, kw_only=True)
class RefitData:
    """Batches in one row: those that are fitted, then those that choose strengths, then those of other texts.

    Attributes:
        fit: From every text of the mix.
        judge: From the same texts, other samples.
        others: Text -> samples of a text that nothing was fitted on.
    """

    fit: Samples
    judge: Samples
    others: Mapping[str, Samples]

    @property
    def batches(self) -> tuple[Batch, ...]:
        """All of them."""
        others = [batch for samples in self.others.values() for batch in samples.batches]
        return (*self.fit.batches, *self.judge.batches, *others)

    @property
    def fitted(self) -> range:
        """Positions of the batches that are fitted."""
        return range(len(self.fit.batches))

    @property
    def judging(self) -> range:
        """Positions of the batches that choose strengths."""
        return range(len(self.fit.batches), len(self.fit.batches) + len(self.judge.batches))

    @property
    def texts(self) -> dict[str, tuple[Samples, range]]:
        """Texts that losses are reported on, with the positions of their batches: `mix` is what judges."""
        texts = {"mix": (self.judge, self.judging)}
        start = self.judging.stop
        for name, samples in self.others.items():
            texts[name] = (samples, range(start, start + len(samples.batches)))
            start += len(samples.batches)
        return texts

    @property
    def digest(self) -> str:
        """sha256 of all tokens, as one text."""
        return Samples(self.batches).digest


def read_data(draw: Draw, folder: Path) -> RefitData:
    """Draw the samples.

    Args:
        draw: Says how much of what.
        folder: Where the tokenizer is: `Supernet.text_folder`.

    Raises:
        InputError: A text cannot be used, is too short, or the model has no tokenizer.
    """
    recipe, tokenizer = draw.recipe, open_tokenizer(folder)
    rng = random.Random(draw.seed)
    total = sum(share.share for share in recipe.mix)
    fit: list[Sequence[int]] = []
    judge: list[Sequence[int]] = []
    for share in recipe.mix:
        part = share.share / total / recipe.window
        num_fit, num_judge = max(1, round(recipe.tokens * part)), max(1, round(recipe.judge_tokens * part))
        drawn = _draw(share, tokenizer, recipe.window, num_fit + num_judge, rng)
        fit += drawn[:num_fit]
        judge += drawn[num_fit:]
    rng.shuffle(fit)
    others: dict[str, Samples] = {}
    for share in recipe.other:
        drawn = _draw(share, tokenizer, recipe.window, max(1, recipe.other_tokens // recipe.window), rng)
        others[Path(source_name(share)).stem] = Samples(tuple(text_batches(drawn, recipe.batch)))
    return RefitData(
        fit=Samples(tuple(text_batches(fit, recipe.batch))),
        judge=Samples(tuple(text_batches(judge, recipe.batch))),
        others=others,
    )


def _draw(share: Share, tokenizer: Tokenizer, window: int, count: int, rng: random.Random) -> list[list[int]]:
    """`count` windows of one text that do not overlap."""
    documents = [one.answered for one in read_questions(share)] if share.kind == "choices" else read_documents(share)
    ids = in_a_row(documents, tokenizer)
    windows = windows_of(ids, window, opening_of(tokenizer))
    if len(windows) < count:
        raise TooFewSamples(source_name(share), f"{len(ids)} tokens", f"{count} windows of {window} tokens")
    return rng.sample(windows, count)
