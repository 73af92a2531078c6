"""Does a graph compute with its own weights what the family computes?

The reference is the masked supernet with the file's weights in it, so that rounding plays no part: what differs is the
graph. Legend: T tokens of a prompt, G generated ones, P positions of a cache, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from amoeba_export.ir import SubnetPlan, Supernet
from amoeba_export.verify.masked import masked_logits
from amoeba_export.verify.numerics import HALF_ULP, broken_limits, logits_distance
from amoeba_export.verify.opened import Opened, Past, Rope

NUM_STEPS = 8
"""Tokens decoded where a file runs a second time, in fp32 arithmetic."""

PAST_BYTES = 256 << 20
"""Largest cache that is made up: a 7B model with a long context would need gigabytes."""

MADE_UP_KL = 1e-5
"""Accepted after a cache that is made up, whose states no text leads to and some of which amplify round-off. One cut of
SmolLM2-135M in `int4-mixed` came to 5.5e-6 where noise of 6e-8 in the cache, half a unit of fp32, moves the reference's
logits by 5e-5 of the largest, and noise of 6e-7 by 1.7e-4."""

_NEW_TOKENS = 2
_KEY_SCALE = 2.0
"""Spread of made-up keys: large enough for attention to prefer some positions to others."""

_ANGLE = 1e-6
"""Error of an angle by position: frequencies are rounded to fp32, and multiplied by it."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a format says to the prompts: logits [1, T, V] of each, and how it continues the last one.

    Attributes:
        steps: As in `Continuation`.
    """

    logits: Sequence[torch.Tensor]
    tokens: tuple[int, ...]
    steps: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Reference:
    """What the masked supernet says: logits of each prompt, and [G, V] after each prefix of each continuation."""

    logits: Sequence[torch.Tensor]
    after: Mapping[tuple[int, ...], torch.Tensor]


def ask(opened: Opened, prompts: Sequence[torch.Tensor], num_tokens: int) -> Answer:
    """Put all prompts to a format, and let it continue the last one by so many tokens."""
    *others, last = prompts
    logits = [opened.logits(prompt) for prompt in others]
    end = opened.continued(last, num_tokens)
    return Answer(logits=[*logits, end.logits], tokens=end.tokens, steps=end.steps)


def reference_of(
    supernet: Supernet, plan: SubnetPlan, prompts: Sequence[torch.Tensor], continuations: Collection[tuple[int, ...]]
) -> Reference:
    """One pass for all texts of a length. The last prompt comes with its continuations, which need not be run apart."""
    *others, last = prompts
    length = last.shape[1]
    texts = {tokens: torch.cat([last, torch.tensor([tokens])], dim=1) for tokens in continuations}
    rows = [*others, *texts.values()]
    found: dict[int, torch.Tensor] = {}
    for size in {row.shape[1] for row in rows}:
        positions = [i for i, row in enumerate(rows) if row.shape[1] == size]
        logits_BTV = masked_logits(supernet, plan, torch.cat([rows[i] for i in positions]))
        found |= {i: logits_TV[None] for i, logits_TV in zip(positions, logits_BTV, strict=True)}
    continued = [found[i] for i in range(len(others), len(rows))]
    return Reference(
        logits=[*(found[i] for i in range(len(others))), continued[0][:, :length]],
        after={tokens: logits[0, length - 1 : -1] for tokens, logits in zip(texts, continued, strict=True)},
    )


def graph_problems(
    exact: Opened,
    supernet: Supernet,
    plan: SubnetPlan,
    prompts: Sequence[torch.Tensor],
    answer: Answer | None = None,
    reference: Reference | None = None,
) -> list[str]:
    """What a graph computes otherwise, in words; the first kind that is found.

    Args:
        exact: The format in fp32 arithmetic.
        supernet: With the weights of the file.
        plan: Of those.
        prompts: Token ids [1, T] each.
        answer: What `exact` says to them, if it was asked already.
        reference: What `supernet` says, likewise.
    """
    answer = answer or ask(exact, prompts, NUM_STEPS)
    reference = reference or reference_of(supernet, plan, prompts, [answer.tokens])
    broken = broken_limits(logits_distance(prompts, reference.logits, answer.logits), "fp32")
    if broken:
        return [f"with its own weights and in fp32 arithmetic, {problem}" for problem in broken]
    padded = exact.padded(prompts[0])
    if padded is not None:
        distance = logits_distance(prompts[:1], reference.logits[:1], [padded])
        broken = [f"after padding, {problem}" for problem in broken_limits(distance, "fp32")]
    return broken or step_problems(answer, reference, "fp32") or far_problems(exact, supernet, plan)


def step_problems(answer: Answer, reference: Reference, dtype: str) -> list[str]:
    """What decode steps through the KV cache compute otherwise."""
    if answer.steps is None or not answer.steps.shape[1]:
        return []
    after = reference.after[answer.tokens][None, 1:]
    distance = logits_distance([torch.tensor([answer.tokens[:-1]])], [after], [answer.steps])
    return [f"through the KV cache, {problem}" for problem in broken_limits(distance, dtype)]


def far_problems(exact: Opened, supernet: Supernet, plan: SubnetPlan) -> list[str]:
    """What a graph computes otherwise after caches that are made up: one to the end of the context, one shorter."""
    architecture = supernet.architecture
    row_bytes = 8 * architecture.num_kv_heads * architecture.head_dim * len(plan.layers)
    longest = min(architecture.max_positions - _NEW_TOKENS, PAST_BYTES // row_bytes)
    if longest < 1 or not any(kept.kv_heads for kept in plan.layers):
        return []
    generator = torch.Generator().manual_seed(1)
    for length in (longest, int(torch.randint(1, longest + 1, (), generator=generator))):
        past: Past = [
            (
                _KEY_SCALE * torch.randn(1, len(kept.kv_heads), length, architecture.head_dim, generator=generator),
                torch.randn(1, len(kept.kv_heads), length, architecture.head_dim, generator=generator),
            )
            for kept in plan.layers
            if kept.kv_heads
        ]
        ids = torch.randint(architecture.vocab_size, (1, _NEW_TOKENS), generator=generator)
        found = exact.with_past(past, ids)
        if found is None:
            return []
        distance = logits_distance([ids], [masked_logits(supernet, plan, ids, past=past)], [found])
        if broken := broken_limits(distance, "fp32", rounding_kl=MADE_UP_KL):
            return [f"after {length} positions, {problem}" for problem in broken]
    return []


def rope_problem(opened: Opened, rope: Rope, num_positions: int) -> str | None:
    """Where a file turns queries and keys by other angles than the supernet, at any position of its context."""
    allowed_P = _ANGLE * (torch.arange(len(rope[0])) + 1)[:, None] + HALF_ULP.get(opened.dtype, 0.0)
    for wanted_PH, found_PH in zip(rope, opened.rope(num_positions), strict=True):
        if wanted_PH.shape != found_PH.shape:
            return f"its RoPE has {list(found_PH.shape)} values, not {list(wanted_PH.shape)}"
        wrong_P = ~((wanted_PH - found_PH).abs() <= allowed_P * wanted_PH.abs().clamp(min=1.0)).all(1)
        if bool(wrong_P.any()):
            positions = wrong_P.nonzero()[:, 0]
            return f"its RoPE differs at {len(positions)} positions, the first of which is {int(positions[0])}"
    return None
