"""Where figures are: every unit, every way to name one, and what is said where there is none."""

from __future__ import annotations

import json
from random import Random

import pytest
from pydantic import ValidationError

from amoeba_export.backends.command import figures
from amoeba_export.backends.command.figures import Figure, NoFigure

REPORT = json.dumps(
    {"runs": [{"ms": 4}, {"ms": 5}], "tg": {"avg.ts": 80.5, "samples": [1, 2, 3]}, "who": "me", "off": None}
)


@pytest.mark.parametrize(
    ("unit", "value", "expected"),
    [
        ("ms", "12.5", 12.5),
        ("us", "12500", 12.5),
        ("s", "0.0125", 12.5),
        ("tok/s", "80", 12.5),
        ("ms", "1,250.5", 1250.5),
    ],
)
def test_units(unit: str, value: str, expected: float) -> None:
    figure = Figure(regex=r"Decode: (\S+)", unit=unit)  # type: ignore[arg-type]
    assert figure.samples_ms(f"Decode: {value}", tokens=1) == pytest.approx([expected])


def test_a_rate_is_of_all_tokens() -> None:
    assert Figure(regex="at (.+) t/s", unit="tok/s").samples_ms("at 1000 t/s", tokens=4 * 128) == [512]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("runs[0].ms", [4]),
        ("$.runs[-1].ms", [5]),
        ("runs[*].ms", [4, 5]),
        ('tg["avg.ts"]', [80.5]),
        ("tg.samples", [1, 2, 3]),
    ],
)
def test_paths(path: str, expected: list[float]) -> None:
    assert Figure(json_path=path, unit="ms").samples_ms(REPORT, tokens=1) == expected


def test_json_that_is_a_list_and_json_below_a_log() -> None:
    assert Figure(json_path="[1].ts", unit="ms").samples_ms('[{"ts": 1},\n {"ts": 2}]', tokens=1) == [2]
    log = 'INFO [ok]\n{"ms": 3}\n[done]\n'
    with pytest.raises(NoFigure, match=r"it is not JSON, nor is a line of it"):
        Figure(json_path="ms", unit="ms").samples_ms("INFO [ok]", tokens=1)
    assert Figure(json_path="ms", unit="ms").samples_ms(log, tokens=1) == [3]


@pytest.mark.parametrize(("take", "expected"), [("all", [1, 2, 3]), ("first", [1]), ("last", [3])])
def test_several_numbers(take: str, expected: list[float]) -> None:
    figure = Figure(regex=r"t=(\d+) ms", unit="ms", take=take)  # type: ignore[arg-type]
    assert figure.samples_ms("t=1 ms, t=2 ms\nt=3 ms", tokens=1) == expected


def test_the_unit_that_is_printed() -> None:
    figure = Figure(regex=r"took (?P<value>\S+) (?P<unit>\S+)")
    assert figure.samples_ms("took 3 ms\ntook 0.004 sec\ntook 5000 µs", tokens=1) == [3, 4, 5]
    with pytest.raises(NoFigure, match=r"^its unit is 'furlongs', which is none of us, ms, s and tok/s$"):
        figure.samples_ms("took 3 furlongs", tokens=1)
    sure = Figure(regex=r"took (?P<value>\S+) (?P<unit>\S+)", unit="ms")
    with pytest.raises(NoFigure, match=r"^it is in s, and the target says ms$"):
        sure.samples_ms("took 3 s", tokens=1)


@pytest.mark.parametrize(
    ("path", "text", "reason"),
    [
        ("tg.avg", REPORT, "tg has no key 'avg'. Did you mean 'avg.ts'? It has: avg.ts, samples"),
        ("run[0]", REPORT, "the JSON has no key 'run'. Did you mean 'runs'? It has: off, runs, tg, who"),
        ("ms", json.dumps({"m" * 9999: 1, "mx": 2}), "the JSON has no key 'ms'. It has: mx"),
        ("runs.ms", REPORT, "runs is [{'ms': 4}, {'ms': 5}], which has no key 'ms'"),
        ("runs[7].ms", REPORT, "runs has 2 items, and no [7]"),
        ("tg[0]", REPORT, "tg is {'avg.ts': 80.5, 'samples': [1, 2, 3]}, not a list"),
        ("who", REPORT, "who is 'me', not a number"),
        ("off", REPORT, "off is None, not a number"),
        ("ms", '{"ms": []}', "ms is an empty list"),
        ("ms", '{"ms": true}', "ms is True, not a number"),
        ("ms", '{"ms": -3}', "it is -3 ms, which cannot be"),
        ("ms", '{"ms": 0}', "it is 0 ms, which cannot be"),
        ("ms", '{"ms": NaN}', "it has the number NaN, which JSON does not know"),
        ("ms", '{"ms": 1}, "x": {}', "it is not JSON, nor is a line of it"),
        ("ms", "", "it is not JSON, nor is a line of it"),
        ("ms", "[" * 100_000, "its lists and tables are nested more than 64 deep"),
    ],
)
def test_json_without_the_figure(path: str, text: str, reason: str) -> None:
    with pytest.raises(NoFigure) as caught:
        Figure(json_path=path, unit="ms").samples_ms(text, tokens=1)
    assert str(caught.value) == reason


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("nothing", "no line has 'Decode: (\\\\S+)'"),
        ("Decode: fast", "'fast' is not a number"),
        ("Decode: 12,5", "'12,5' is not a number"),
        ("Decode: nan", "'nan' is not a number"),
        ("Decode: 1e999", "it is inf ms, which cannot be"),
        ("Decode: e2", "'e2' is not a number"),
        ("Decode: 1,2", "'1,2' is not a number"),
        ("Decode: .", "'.' is not a number"),
    ],
)
def test_text_without_the_figure(text: str, reason: str) -> None:
    with pytest.raises(NoFigure) as caught:
        Figure(regex=r"Decode: (\S+)", unit="ms").samples_ms(text, tokens=1)
    assert str(caught.value) == reason


def test_matching_has_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pattern that takes the third power of a line's length meets a megabyte in a line, and in many."""
    slow = Figure(regex=r"(\d+).*? ms", unit="ms")
    with pytest.raises(NoFigure, match="no line has"):
        slow.samples_ms("1" * 2**20, tokens=1)
    monkeypatch.setattr(figures, "MOST_MATCHING_S", 0.0)
    with pytest.raises(NoFigure, match="takes longer than 0 s on it"):
        slow.samples_ms("1\n" * 2**19, tokens=1)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"unit": "ms"}, "give either json_path or regex"),
        ({"unit": "ms", "regex": "(x)", "json_path": "x"}, "give either json_path or regex"),
        ({"regex": "(x)"}, "it needs a unit: us, ms, s or tok/s"),
        ({"regex": "(x", "unit": "ms"}, "it is no regular expression"),
        ({"regex": "x", "unit": "ms"}, "it has no group around the number"),
        ({"json_path": "a..b", "unit": "ms"}, "'a..b' is no path"),
        ({"json_path": "a[x]", "unit": "ms"}, "'a[x]' is no path"),
        ({"json_path": "$", "unit": "ms"}, "it is empty"),
        ({"json_path": "a", "unit": "furlong"}, "Input should be 'us', 'ms', 's' or 'tok/s'"),
    ],
)
def test_a_figure_that_cannot_be_looked_for(settings: dict[str, str], reason: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Figure.model_validate(settings)
    assert reason in str(caught.value)


def test_whatever_is_printed_has_samples_or_a_reason() -> None:
    """Output that is almost right, damaged in every way: no other error, no long message."""
    paths = {"a[0].b": "ms", "[*].ts": "tok/s", "a[*].b": "s", 'a["x.y"]': "us", "a": "ms"}
    figures = [Figure.model_validate({"json_path": path, "unit": unit}) for path, unit in paths.items()]
    figures += [Figure(regex=r"D: (?P<value>\S+)(?: (?P<unit>\S+))?"), Figure(regex=r"(\d*)x|(\d+) ms", unit="ms")]
    texts = ['{"a": [{"b": 1}, {"b": 2}]}', '[{"ts": 3}]', '{"a": {"x.y": 1e5}}', "D: 12 ms\nD: 5 s", 'log\n{"a": 4}']
    pieces = [*'"{}[]:,-.e', "1e999", "NaN", "9" * 5000, "\x00", "\u202e", "\r", "\n", "D: ", "true", '"":']
    random = Random(0)
    found = longest = 0
    for _ in range(4000):
        text = random.choice(texts)
        for _ in range(random.randrange(4)):
            position = random.randrange(len(text) + 1)
            text = text[:position] + random.choice(pieces) + text[position + random.randrange(3) :]
        try:
            samples = random.choice(figures).samples_ms(text, tokens=8)
        except NoFigure as error:
            longest = max(longest, len(str(error)))
        else:
            assert samples and all(sample >= 0 for sample in samples)
            found += 1
    assert found > 50
    assert 0 < longest < 700
