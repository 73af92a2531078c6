from __future__ import annotations

import math

import pytest
import torch

from amoeba_export.verify import numerics
from amoeba_export.verify.numerics import Distance, broken_limits, logits_distance

PROMPT = torch.tensor([[0, 1]])


def test_identical_logits_have_no_distance() -> None:
    logits = torch.randn(1, 2, 3)
    found = logits_distance([PROMPT], [logits], [logits])
    assert found == Distance(max_abs_diff=0.0, max_rel_diff=0.0, mean_kl=0.0, perplexity_ratio=1.0)


def test_every_figure_is_what_it_says() -> None:
    """Two tokens, two words: p = (1/2, 1/2), q = (1/4, 3/4) at both positions; the next token is word 1."""
    reference = torch.zeros(1, 2, 2)
    reference[0, 0, 0] = reference[0, 0, 1] = 2.0
    found = reference.clone()
    found[..., 1] += math.log(3)
    distance = logits_distance([PROMPT], [reference], [found])
    assert distance.max_abs_diff == pytest.approx(math.log(3))
    assert distance.max_rel_diff == pytest.approx(math.log(3) / 2)
    assert distance.mean_kl == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert distance.perplexity_ratio == pytest.approx(0.5 / 0.75)


def test_blocks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that do not fill the last block, and a last token that nothing follows, alone in its block."""
    prompts = [torch.tensor([[3, 1, 4, 1, 0]]), torch.tensor([[2, 2]])]
    reference = [torch.randn(1, 5, 6), torch.randn(1, 2, 6)]
    found = [logits + 0.1 * torch.randn_like(logits) for logits in reference]
    whole = logits_distance(prompts, reference, found)
    for num_rows in (1, 2, 3, 4):
        monkeypatch.setattr(numerics, "BLOCK_LOGITS", 6 * num_rows)
        blocks = logits_distance(prompts, reference, found)
        assert blocks.mean_kl == pytest.approx(whole.mean_kl)
        assert blocks.perplexity_ratio == pytest.approx(whole.perplexity_ratio)


def test_the_perplexity_is_that_of_the_last_prompt() -> None:
    noise, text = torch.tensor([[3, 1, 4, 1, 0]]), torch.tensor([[2, 2]])
    reference = [torch.randn(1, 5, 6), torch.randn(1, 2, 6)]
    found = [logits + torch.randn_like(logits) for logits in reference]
    both = logits_distance([noise, text], reference, found)
    alone = logits_distance([text], reference[1:], found[1:])
    assert both.perplexity_ratio == pytest.approx(alone.perplexity_ratio)
    assert both.mean_kl != pytest.approx(alone.mean_kl)


def test_nan_is_infinitely_far() -> None:
    good, bad = torch.zeros(1, 2, 3), torch.full((1, 2, 3), torch.nan)
    distance = logits_distance([PROMPT], [good], [bad])
    for dtype in ("fp32", "fp16", "bf16", "int8", "int4"):
        assert broken_limits(distance, dtype)


@pytest.mark.parametrize(
    ("dtype", "distance", "expected"),
    [
        ("fp32", Distance(max_abs_diff=1e-5, max_rel_diff=1e-6, mean_kl=0.0, perplexity_ratio=1.0), []),
        (
            "fp32",
            Distance(max_abs_diff=0.5, max_rel_diff=0.025, mean_kl=0.0, perplexity_ratio=1.0),
            [
                "logits differ by up to 0.5, 2.50% of the largest logit (limit 0.01%), "
                "and the KL divergence is 0 nats per token"
            ],
        ),
        ("fp32", Distance(max_abs_diff=0.04, max_rel_diff=1.2e-3, mean_kl=1e-8, perplexity_ratio=1.0), []),
        (
            "fp32",
            Distance(max_abs_diff=0.04, max_rel_diff=1.2e-3, mean_kl=1e-5, perplexity_ratio=1.0),
            [
                "logits differ by up to 0.04, 0.12% of the largest logit (limit 0.01%), "
                "and the KL divergence is 1e-05 nats per token"
            ],
        ),
        ("bf16", Distance(max_abs_diff=0.5, max_rel_diff=0.025, mean_kl=0.0, perplexity_ratio=1.0), []),
        ("int8", Distance(max_abs_diff=9.0, max_rel_diff=0.9, mean_kl=0.01, perplexity_ratio=1.01), []),
        (
            "int8",
            Distance(max_abs_diff=9.0, max_rel_diff=0.9, mean_kl=0.3, perplexity_ratio=1.5),
            [
                "the KL divergence is 0.3 nats per token (limit 0.05)",
                "the perplexity is 1.5 times the unrounded one (limit 1.1)",
            ],
        ),
    ],
)
def test_limits(dtype: str, distance: Distance, expected: list[str]) -> None:
    assert broken_limits(distance, dtype) == expected
