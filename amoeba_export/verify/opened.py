"""What verification asks of a container that was opened again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, slots=True)
class Continuation:
    """A prompt and what greedy decoding through the KV cache makes of it.

    Attributes:
        logits: Of the prompt, in the pass that fills the cache. [1, T, V].
        tokens: The G tokens that follow; fewer than asked for where the runtime stops at an end token.
        steps: Logits after each of `tokens` but the last, each step on its own through the cache [1, G - 1, V]. None
            where the runtime gives tokens alone.
    """

    logits: torch.Tensor
    tokens: tuple[int, ...]
    steps: torch.Tensor | None


class Opened(Protocol):
    """One format of an artifact, ready to run.

    Attributes:
        dtype: The `--dtype` it was written in, as the files say.
    """

    dtype: str

    def logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[1, T] -> [1, T, V], without a cache."""

    def continued(self, prompt: torch.Tensor, num_tokens: int) -> Continuation:
        """The greedy continuation of a prompt [1, T] by so many tokens, at least one."""


def greedy(step: Callable[[torch.Tensor], torch.Tensor], prompt: torch.Tensor, num_tokens: int) -> Continuation:
    """Decode through `step`, which takes the next ids [1, T], gives their logits [1, T, V] and remembers them."""
    logits = step(prompt)
    tokens, steps = [int(logits[0, -1].argmax())], []
    while len(tokens) < num_tokens:
        steps.append(step(torch.tensor([tokens[-1:]])))
        tokens.append(int(steps[-1][0, -1].argmax()))
    return Continuation(logits=logits, tokens=tuple(tokens), steps=torch.cat([logits[:, :0], *steps], dim=1))
