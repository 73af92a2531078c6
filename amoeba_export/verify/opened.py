"""What verification asks of a container that was opened again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import torch

LARGE_BYTES = 4 << 30
"""Weights of more bytes than this keep their dtype in memory: an fp32 copy may not fit. Arithmetic is then theirs."""

Past = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""Keys (rotated) and values of each kept layer that has attention, [1, kept KV heads, P, H] each."""


Rope = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines of all positions of a context, with their magnitude [P, R / 2].

Those of several layer types are side by side, by name. With longrope, rows for texts within the first training's length
come before those of all positions."""


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

    def exact(self, rope: Rope) -> Self | None:
        """The same files in fp32 arithmetic: itself if it is that already. None where memory may not do.

        Args:
            rope: Cosines and sines before a file rounded them.
        """

    def logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[1, T] -> [1, T, V], without a cache."""

    def continued(self, prompt: torch.Tensor, num_tokens: int) -> Continuation:
        """The greedy continuation of a prompt [1, T] by so many tokens, at least one."""

    def with_past(self, past: Past, input_ids: torch.Tensor) -> torch.Tensor | None:
        """Logits [1, T, V] of tokens that follow a given cache; None where the runtime takes none from outside."""

    def padded(self, input_ids: torch.Tensor) -> torch.Tensor | None:
        """As `logits`, in a row that begins with padding; None where the runtime has no such rows."""

    def rope(self, num_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of all positions of the context, with their magnitude [P, H / 2]."""


def greedy(step: Callable[[torch.Tensor], torch.Tensor], prompt: torch.Tensor, num_tokens: int) -> Continuation:
    """Decode through `step`, which takes the next ids [1, T], gives their logits [1, T, V] and remembers them."""
    logits = step(prompt)
    tokens, steps = [int(logits[0, -1].argmax())], []
    while len(tokens) < num_tokens:
        steps.append(step(torch.tensor([tokens[-1:]])))
        tokens.append(int(steps[-1][0, -1].argmax()))
    return Continuation(logits=logits, tokens=tuple(tokens), steps=torch.cat([logits[:, :0], *steps], dim=1))
