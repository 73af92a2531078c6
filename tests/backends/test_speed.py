"""Power mode, clocks and governor: read from stand-ins of NVIDIA's programs, and told where they leave speed."""

from __future__ import annotations

from pathlib import Path

import pytest

from amoeba_export.backends.runner import device
from amoeba_export.backends.runner.device import speed_settings
from amoeba_export.backends.runtime import Job, read_events
from amoeba_export.backends.speed import speed_warnings
from amoeba_export.backends.targets import list_targets
from amoeba_export.ir import Latency, Target
from tests.backends.models import FULL, SHORT
from tests.listener import Listener

SHOWN = """SOC family:tegra234  Machine:NVIDIA Jetson Orin Nano Developer Kit
Online CPUs: 0-5
cpu0: Online=1 Governor=schedutil MinFreq={cpu} MaxFreq=1510400 CurrentFreq=1510400 IdleStates: WFI=1 c7=1
GPU MinFreq={gpu} MaxFreq=624750000 CurrentFreq=306000000
EMC MinFreq=204000000 MaxFreq=2133000000 CurrentFreq=2133000000 FreqOverride={emc}
NV Power Mode: 25W
"""
FREE = SHOWN.format(cpu=729600, gpu=306000000, emc=0)
FIXED = SHOWN.format(cpu=1510400, gpu=624750000, emc=1)


def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **outputs: str) -> None:
    """Programs on the PATH that print a text; those with an empty one fail, as without root."""
    for name, text in outputs.items():
        path = tmp_path / name
        (tmp_path / f"{name}.txt").write_text(text)
        path.write_text(
            "#!/bin/sh\n" + (f'while IFS= read -r line; do echo "$line"; done < {path}.txt\n' if text else "exit 1\n")
        )
        path.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.mark.parametrize(("shown", "clocks"), [(FREE, "not fixed"), (FIXED, "fixed")])
def test_a_jetson_tells_its_mode_and_clocks(
    shown: str, clocks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs(tmp_path, monkeypatch, nvpmodel="NV Fan Mode:quiet\nNV Power Mode: 25W\n1\n", jetson_clocks=shown)
    settings = {"/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "schedutil"}
    monkeypatch.setattr(device, "_text", lambda path: settings.get(path, ""))
    assert speed_settings() == {
        "power_mode": "25W (nvpmodel -m 1)", "governor": "schedutil", "clocks": clocks
    }  # fmt: skip
    assert device.describe_machine()["power_mode"] == "25W (nvpmodel -m 1)"


@pytest.mark.parametrize(("lowest", "clocks"), [("306000000", "not fixed"), ("624750000", "fixed")])
def test_without_root_the_gpu_tells(lowest: str, clocks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs(tmp_path, monkeypatch, nvpmodel="NV Power Mode: MAXN\n0\n", jetson_clocks="")
    monkeypatch.setattr(device, "glob", lambda pattern: ["/sys/class/devfreq/17000000.gpu/"])
    values = {
        "/sys/class/devfreq/17000000.gpu/min_freq": lowest,
        "/sys/class/devfreq/17000000.gpu/max_freq": "624750000",
    }
    monkeypatch.setattr(device, "_text", lambda path: values.get(path, ""))
    assert speed_settings() == {"power_mode": "MAXN (nvpmodel -m 0)", "clocks": clocks}


def test_other_machines_say_nothing_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(device, "_text", lambda path: "")
    assert speed_settings() == {}


MAXN = {"power_mode": "MAXN (nvpmodel -m 0)", "clocks": "fixed", "governor": "schedutil"}


@pytest.mark.parametrize(
    ("settings", "wanted", "said"),
    [
        ({}, "", []),
        ({}, "25 W (nvpmodel -m 1)", []),
        (MAXN, "", []),
        ({"power_mode": "25W (nvpmodel -m 1)"}, "25 W (nvpmodel -m 1)", []),
        ({"power_mode": "25W"}, "25 W (nvpmodel -m 1)", []),
        ({"power_mode": "MAXN_SUPER (nvpmodel -m 2)"}, "MAXN SUPER", []),
        ({"power_mode": "15W (nvpmodel -m 0)"}, "25 W (nvpmodel -m 1)", ["'sudo nvpmodel -m 1' sets it"]),
        ({"power_mode": "15W (nvpmodel -m 0)"}, "25 W", ["power mode 15W (nvpmodel -m 0), and the target's"]),
        ({"power_mode": "15W (nvpmodel -m 0)"}, "", ["may leave speed behind"]),
        ({**MAXN, "clocks": "not fixed"}, "", ["sudo jetson_clocks", "governor is 'schedutil'"]),
        ({"governor": "ondemand", "clock_driver": "cpufreq-dt"}, "", ["governor is 'ondemand'"]),
        ({"governor": "powersave", "clock_driver": "intel_pstate"}, "", []),
        ({"governor": "performance", "clock_driver": "cpufreq-dt"}, "", []),
    ],
)
def test_speed_that_is_left_is_told(settings: dict[str, str], wanted: str, said: list[str]) -> None:
    warnings = speed_warnings(settings, settings, power_mode=wanted)
    assert len(warnings) == len(said)
    for warning, words in zip(warnings, said, strict=True):
        assert words in warning


def test_a_setting_that_changed_meanwhile_is_told() -> None:
    (warning,) = speed_warnings(MAXN, {**MAXN, "clocks": "not fixed"})
    assert warning == "'clocks' of the device went from 'fixed' to 'not fixed' while it was measured: measure again."


def test_the_shipped_targets_name_modes_that_a_board_would_say() -> None:
    for target in list_targets().values():
        if target.power_mode:
            assert speed_warnings({"power_mode": target.power_mode}, {}, power_mode=target.power_mode) == []


def test_a_run_warns_and_keeps_what_changed() -> None:
    target = Target(name="board", description="", backend="llamacpp", power_mode="25 W (nvpmodel -m 1)")
    content = {"rounds": 1, "subjects": []}
    job = Job(subjects=[FULL], workload=SHORT, target=target, content=content, errors={}, folder=Path())
    mode = {"power_mode": "15W (nvpmodel -m 0)"}
    result = {"event": "result", "id": 0, "round": 0, "decode_ms": [1.0], "prefill_ms": [2.0], "memory_mb": None}
    done = {"event": "done", "temperature_c": [None, None], "speed": [mode, {"power_mode": "MAXN (nvpmodel -m 2)"}]}
    listener = Listener()
    (latency,) = read_events([{"event": "device", "device": mode}, result, done], job, progress=listener)
    assert isinstance(latency, Latency)
    assert latency.device == {**mode, "power_mode_after": "MAXN (nvpmodel -m 2)"}
    assert len(listener.notes) == 2
    assert "went from '15W (nvpmodel -m 0)' to 'MAXN (nvpmodel -m 2)'" in listener.notes[0]
    assert "'sudo nvpmodel -m 1' sets it" in listener.notes[1]
