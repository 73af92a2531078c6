"""`amoeba bench` as a regression check. The machine of these tests follows a rule and has no noise."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Run

Amoeba = Callable[..., Run]


@pytest.fixture
def pair(amoeba: Amoeba, model: Path, strategy: Path, target: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Two artifacts, the second one faster."""
    for name, latency in (("old", "90%"), ("new", "70%")):
        words = ("export", model, "--strategy", strategy, "--target", target, "--latency", latency)
        assert amoeba(*words, "--out", tmp_path / name).code == 0
    return tmp_path / "old", tmp_path / "new"


def test_what_is_faster_passes(amoeba: Amoeba, pair: tuple[Path, Path], target: Path) -> None:
    old, new = pair
    run = amoeba("bench", old, new, "--target", target, "--fail-if-slower", "3%", "--json")
    assert run.code == 0
    first, second = json.loads(run.out)
    assert first["comparison"]["ratio"] == 1.0
    ratio = second["decode_ms"]["p50"] / first["decode_ms"]["p50"]
    assert second["comparison"] == {
        "metric": "decode",
        "ratio": pytest.approx(ratio),
        "interval": [pytest.approx(ratio), pytest.approx(ratio)],
        "confidence": 0.9,
        "rounds": 5,
        "verdict": "not slower",
    }


def test_what_is_slower_fails_and_says_by_how_much(amoeba: Amoeba, pair: tuple[Path, Path], target: Path) -> None:
    old, new = pair
    words = ("bench", old, "--baseline", new, "--target", target, "--metric", "e2e", "--fail-if-slower", "3%")
    run = amoeba(*words)
    assert run.code == 4
    assert [line.split()[0] for line in run.out.splitlines()[1:]] == [str(new), str(old)]
    ratio = run.out.splitlines()[2].split()[-3].strip("(")
    message = run.err[run.err.index("error: ") :]
    assert message == (
        f"error: E2e of '{old}' takes {ratio} ({ratio} to {ratio}) times as long as of '{new}'. "
        "The limit is 3 % more.\n"
        "  next:  Compare the two manifests and plans, or allow more with --fail-if-slower.\n"
    )
    assert amoeba(*words[:-1], "900%").code == 0


def test_too_few_rounds_decide_nothing(amoeba: Amoeba, pair: tuple[Path, Path], target: Path) -> None:
    old, new = pair
    run = amoeba("bench", new, old, "--target", target, "--rounds", "2", "--fail-if-slower", "3%")
    assert run.code == 0
    assert f"warning: Undecided: decode of '{old}' takes" in run.err
    assert run.err.endswith("and 3 % more is allowed. More rounds would tell (--rounds).\n")


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_plot(amoeba: Amoeba, pair: tuple[Path, Path], target: Path, tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"ratios.{suffix}"
    assert amoeba("bench", *pair, "--target", target, "--plot", path, "--fail-if-slower", "3%").code == 0
    assert path.stat().st_size > 1000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--fail-if-slower", "3"),
            "error: --fail-if-slower cannot be '3'.\n  next:  Give a percentage, such as 3%.\n",
        ),
        (
            ("--metric", "speed"),
            "error: --metric cannot be 'speed'.\n  next:  Give one of: decode, prefill, e2e.\n",
        ),
    ],
)
def test_bad_values(amoeba: Amoeba, tmp_path: Path, words: tuple[str, str], message: str) -> None:
    run = amoeba("bench", tmp_path, *words)
    assert (run.code, run.err) == (2, message)
