from __future__ import annotations

import pytest

from amoeba_export.ir import Latency, Timing, Workload
from amoeba_export.profile import pool_rounds


def latency(*decode_ms: float, tail: float = 1.1) -> Latency:
    middle = sorted(decode_ms)[len(decode_ms) // 2]
    return Latency(
        decode=Timing(p50_ms=middle, p90_ms=tail * middle, num_samples=10),
        prefill=Timing(p50_ms=10 * middle, p90_ms=11 * middle, num_samples=5),
        source="measured",
        workload=Workload(),
        memory_mb=100 * tail,
        rounds=tuple((ms, 10 * ms) for ms in decode_ms),
    )


def test_runs_count_as_one_with_all_their_rounds() -> None:
    """The machine was at half its speed in the second run: what it says of the ratio counts, its times do not."""
    full, half = pool_rounds(
        [
            (latency(10.0, 10.0, 10.0), latency(5.0, 5.0, 5.1)),
            (latency(20.0, 20.0), latency(10.4, 10.4, tail=1.3)),
        ]
    )
    assert half.decode.p50_ms / full.decode.p50_ms == pytest.approx(0.51)
    assert full.decode.p50_ms == pytest.approx(10.0, rel=0.05)
    assert half.decode.p90_ms / half.decode.p50_ms == pytest.approx(1.2)
    assert (half.decode.num_samples, half.prefill.num_samples) == (20, 10)
    assert half.memory_mb == pytest.approx(130)
    assert [ms for ms, _ in half.rounds] == [5.0, 5.0, 5.1, 10.4, 10.4]


def test_one_run_stays_as_it_is() -> None:
    run = (latency(10.0, 11.0), latency(5.0, 6.0))
    assert pool_rounds([run]) == list(run)
