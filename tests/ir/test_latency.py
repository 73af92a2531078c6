from __future__ import annotations

import pytest

from amoeba_export.errors import BadValue
from amoeba_export.ir import Budget, Latency, Timing, Workload

LATENCY = Latency(
    decode=Timing(p50_ms=10.0, p90_ms=12.0, num_samples=5),
    prefill=Timing(p50_ms=100.0, p90_ms=110.0, num_samples=5),
    source="measured",
    workload=Workload(prompt_tokens=64, generate_tokens=20),
)


@pytest.mark.parametrize(("text", "limit_ms"), [("50ms", 50.0), ("0.05s", 50.0), ("50 ms", 50.0), (".5s", 500.0)])
def test_an_absolute_budget(text: str, limit_ms: float):
    assert Budget.parse(text).resolve() == pytest.approx(limit_ms)


def test_a_relative_budget_is_a_share_of_the_full_model():
    assert Budget.parse("75%").resolve(40.0) == 30.0


@pytest.mark.parametrize("text", ["banana", "50", "-5ms", "0ms", "0%", "120%", "1e3ms", ""])
def test_a_bad_budget_is_refused(text: str):
    with pytest.raises(BadValue) as caught:
        Budget.parse(text)
    assert str(caught.value) == (
        f"A latency cannot be '{text}'.\n  next:  Give a time or a share of the full model, such as 50ms, 0.05s or 75%."
    )


def test_end_to_end_is_prefill_and_every_generated_token():
    assert LATENCY.of("decode") == 10.0
    assert LATENCY.of("prefill", 90) == 110.0
    assert LATENCY.of("e2e") == 100.0 + 20 * 10.0
    assert LATENCY.of("e2e", 90) == 110.0 + 20 * 12.0
