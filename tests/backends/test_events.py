from __future__ import annotations

import json

import pytest

from amoeba_export.backends.events import read_event, read_folder

GOOD = [
    {"event": "device", "device": {"runtime": "onnxruntime 1", "cores": "4"}},
    {"event": "unavailable", "reason": "no runtime", "next_step": ""},
    {"event": "failure", "id": 3, "round": 1, "reason": "it hung"},
    {"event": "result", "id": 3, "round": 0, "decode_ms": [1.5, 2], "prefill_ms": [9.0], "memory_mb": None},
    {"event": "result", "id": 7, "round": 0, "decode_ms": [], "prefill_ms": [], "memory_mb": 12.5},
    {"event": "done", "temperature_c": [None, 41.5], "speed": [{}, {"governor": "performance"}]},
]
RESULT = GOOD[3]


@pytest.mark.parametrize("event", GOOD, ids=lambda event: event["event"])
def test_what_a_runner_says(event: dict[str, object]) -> None:
    assert read_event(json.dumps(event), subjects={3, 7}, rounds=2) == event


@pytest.mark.parametrize(
    "line",
    [
        "Welcome to the board",
        "",
        "\ufffd\ufffd",
        "[]",
        "7",
        "{}",
        '{"event": ["device"]}',
        '{"event": "surprise"}',
        '{"event": "device"}',
        '{"event": "device", "device": {"cores": 4}}',
        '{"event": "unavailable", "reason": "x"}',
        '{"event": "failure", "id": 3, "round": 0, "reason": null}',
        '{"event": "done", "temperature_c": [1], "speed": [{}, {}]}',
        '{"event": "done", "temperature_c": ["hot", 1], "speed": [{}, {}]}',
        '{"event": "done", "temperature_c": [1, 1]}',
        '{"event": "done", "temperature_c": [1, 1], "speed": [{}]}',
        '{"event": "done", "temperature_c": [1, 1], "speed": [{}, {"governor": 1}]}',
        *(
            json.dumps({**RESULT, **change})
            for change in (
                {"id": 4},
                {"id": None},
                {"round": 2},
                {"round": -1},
                {"decode_ms": "fast"},
                {"decode_ms": ["1"]},
                {"prefill_ms": None},
                {"decode_ms": [True]},
                {"memory_mb": "12"},
            )
        ),
        json.dumps({name: value for name, value in RESULT.items() if name != "memory_mb"}),
    ],
)
def test_garbage(line: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - JSON's own error is one, too
        read_event(line, subjects={3, 7}, rounds=2)


def test_folders() -> None:
    assert read_folder("/tmp/amoeba-a_b3\n") == "/tmp/amoeba-a_b3"
    for line in ("Last login: today", "/tmp/other", "/tmp/amoeba-x; rm", "amoeba-x", "/tmp/a\x1bb/amoeba-x"):
        with pytest.raises(ValueError, match=r".*"):
            read_folder(line)
