"""How far weights and logits may be off, and how far two sets of logits are apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from amoeba_export.ir.dtype import FLOATS, SOURCE

NEVER = -65504.0
"""The lowest number of fp16: a token whose logit is as low is never chosen."""

EXACT_DTYPES = (SOURCE, *FLOATS)
"""Dtypes whose artifact computes the reference's function up to rounding. The others change it, within a limit."""

HALF_ULP = {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}
"""Rounding to nearest, as a share of a value. bf16 and fp16 keep 8 and 11 bits of it."""

MAX_REL_DIFF = {"fp32": 1e-4}
"""Largest difference of a logit, as a share of the largest reference logit. Only for fp32: a half-precision weight is
rounded by 2^-12 or 2^-9, and a model with a few huge activations turns that into 3 % of a single logit (SmolLM2-135M in
fp16) while the distributions agree."""

MAX_ROUNDING = {"fp32": (1e-2, 1e-6)}
"""What rounding alone may do: such a share of the largest logit, as long as the mean KL divergence is no more than
this. With activations of 22,500 (SmolLM2-135M, from layer 9 on) the last bit of fp32 is 0.002: some cuts turn it into
0.1 % of a single logit, at a KL divergence of 1e-8."""

MAX_KL = {
    "fp16": 0.01,
    "bf16": 0.1,
    "int8": 0.05,
    "q6_k": 0.1,
    "q5_k_m": 0.3,
    "int4-mixed": 0.5,
    "q4_k_m": 1.0,
    "int4": 1.0,
    "w4a16-asym": 1.0,
    "w4a16": 1.0,
}
"""Mean KL divergence to the unrounded subnet, in nats per token."""

MAX_PERPLEXITY_RATIO = {
    "fp16": 1.02,
    "bf16": 1.1,
    "int8": 1.1,
    "q6_k": 1.2,
    "q5_k_m": 1.4,
    "int4-mixed": 1.5,
    "q4_k_m": 2.0,
    "int4": 2.0,
    "w4a16-asym": 2.0,
    "w4a16": 2.0,
}
"""Perplexity on the text, relative to the unrounded subnet's."""


BLOCK_LOGITS = 1 << 18
"""Logits that are compared at once: in fp64 they stay in a processor's cache. Texts as a whole took 2.7 times as long,
because every step wrote to fresh memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Distance:
    """How an artifact's logits differ from the reference's, over all prompts.

    Attributes:
        max_abs_diff: Largest difference of any logit.
        max_rel_diff: The same, divided by the largest absolute reference logit.
        mean_kl: KL(reference || artifact), nats per token.
        perplexity_ratio: exp of the difference in mean cross-entropy of the last prompt's own next tokens.
    """

    max_abs_diff: float
    max_rel_diff: float
    mean_kl: float
    perplexity_ratio: float


def logits_distance(
    prompts: Sequence[torch.Tensor], reference: Sequence[torch.Tensor], found: Sequence[torch.Tensor]
) -> Distance:
    """Compare logits [1, T, V] prompt by prompt. A NaN or infinity in either makes every figure infinite.

    The last prompt is the one that may be text: of random tokens, a perplexity says nothing. Where the reference has
    minus infinity, a token is not computed: `found` must be as good as that, and the others alone are compared.
    """
    computed = computed_tokens(reference)
    if computed is not None:
        if chosen_problem(reference, found) is not None:
            inf = float("inf")
            return Distance(max_abs_diff=inf, max_rel_diff=inf, mean_kl=inf, perplexity_ratio=inf)
        place_V = torch.full((reference[0].shape[-1],), -1).index_copy(0, computed, torch.arange(len(computed)))
        prompts = [place_V[prompt] for prompt in prompts]
        reference, found = ([logits[..., computed] for logits in either] for either in (reference, found))
    if not all(torch.isfinite(logits).all() for logits in (*reference, *found)):
        inf = float("inf")
        return Distance(max_abs_diff=inf, max_rel_diff=inf, mean_kl=inf, perplexity_ratio=inf)
    max_abs = max(float((r - f).abs().max()) for r, f in zip(reference, found, strict=True))
    largest = max(float(r.abs().max()) for r in reference)
    kl_sum, tokens = 0.0, 0
    loss_difference = 0.0
    for prompt, r, f in zip(prompts, reference, found, strict=True):
        loss_difference = 0.0  # that of the last prompt is what remains
        num_rows = max(1, BLOCK_LOGITS // r.shape[-1])
        for start in range(0, r.shape[1], num_rows):
            rows = slice(start, start + num_rows)
            log_p, log_q = r[0, rows].double().log_softmax(-1), f[0, rows].double().log_softmax(-1)
            kl_sum += float((log_p.exp() * (log_p - log_q)).sum())
            next_ids = prompt[0, start + 1 : start + 1 + num_rows, None]  # nothing follows the last token
            with_next, is_computed = slice(len(next_ids)), next_ids >= 0
            next_ids = next_ids.clamp(min=0)
            of_next = log_p[with_next].gather(-1, next_ids) - log_q[with_next].gather(-1, next_ids)
            loss_difference += float(of_next[is_computed].sum())
        tokens += r.shape[1]
    ratio = torch.tensor(loss_difference / max(prompts[-1].shape[1] - 1, 1)).exp()
    return Distance(
        max_abs_diff=max_abs,
        max_rel_diff=max_abs / largest if largest else max_abs,
        mean_kl=kl_sum / tokens,
        perplexity_ratio=float(ratio),
    )


def computed_tokens(reference: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Tokens that a reference computes logits of: those without minus infinity. None for all."""
    dropped_V = torch.isneginf(reference[0][0, 0]) if reference and reference[0].numel() else torch.zeros(1)
    return (~dropped_V).nonzero()[:, 0] if dropped_V.any() else None


def chosen_problem(reference: Sequence[torch.Tensor], found: Sequence[torch.Tensor]) -> str | None:
    """In words, where a token that is not computed could be chosen nevertheless."""
    computed = computed_tokens(reference)
    if computed is None:
        return None
    dropped_V = torch.ones(reference[0].shape[-1], dtype=torch.bool).index_fill(0, computed, False)
    largest = max(float(logits[..., dropped_V].max()) for logits in found)
    if largest <= NEVER:  # NaN is not
        return None
    return f"tokens that the plan does not keep have logits of up to {largest:.3g}"


def broken_limits(distance: Distance, dtype: str, *, rounding_kl: float | None = None) -> list[str]:
    """Every limit of `dtype` that `distance` exceeds, in words. Empty: good."""
    if dtype in MAX_REL_DIFF:
        limit = MAX_REL_DIFF[dtype]
        share, kl = MAX_ROUNDING[dtype]
        kl = rounding_kl or kl
        if distance.max_rel_diff <= limit or (distance.max_rel_diff <= share and distance.mean_kl <= kl):
            return []
        return [
            f"logits differ by up to {distance.max_abs_diff:.3g}, {distance.max_rel_diff:.2%} of the largest logit "
            f"(limit {limit:.2%}), and the KL divergence is {distance.mean_kl:.2g} nats per token"
        ]
    broken = []
    if not distance.mean_kl <= MAX_KL[dtype]:
        broken.append(f"the KL divergence is {distance.mean_kl:.3g} nats per token (limit {MAX_KL[dtype]:g})")
    if not distance.perplexity_ratio <= MAX_PERPLEXITY_RATIO[dtype]:
        broken.append(
            f"the perplexity is {distance.perplexity_ratio:.3g} times the unrounded one "
            f"(limit {MAX_PERPLEXITY_RATIO[dtype]:g})"
        )
    return broken
