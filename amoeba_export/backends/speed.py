"""Speed that a device leaves lying, told before anybody believes its times: power mode, clocks, governor."""

from __future__ import annotations

import re
from collections.abc import Mapping

from amoeba_export.shown import for_terminal

_NUMBER = re.compile(r"nvpmodel -m (\d+)")
_FASTEST = "MAXN"
"""How NVIDIA calls the mode without a limit."""


def speed_warnings(before: Mapping[str, str], after: Mapping[str, str], *, power_mode: str = "") -> list[str]:
    """Why a run says less of the device than it could, each with what to do.

    Args:
        before: What the runner said of the device's settings before the run.
        after: And after it.
        power_mode: In which the target's figures hold; empty where its file names none.
    """
    found = [
        f"'{name}' of the device went from '{before[name]}' to '{value}' while it was measured: measure again."
        for name, value in after.items()
        if name in before and before[name] != value
    ]
    found += _of_power_mode(before.get("power_mode", ""), power_mode)
    if before.get("clocks") == "not fixed":
        found.append(
            "The device's clocks are not fixed: short steps run at a lower one. 'sudo jetson_clocks' keeps the highest "
            "of the power mode."
        )
    governor = before.get("governor", "performance")
    # Where the processor chooses its clock itself, `powersave` reaches the highest one.
    is_own = "pstate" in before.get("clock_driver", "")
    if governor != "performance" and not is_own and before.get("clocks") != "fixed":
        found.append(
            f"The CPU's governor is '{governor}', which may hold the clock down: "
            "'echo performance | sudo tee /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor' keeps the highest."
        )
    return [for_terminal(warning) for warning in found]


def _of_power_mode(mode: str, wanted: str) -> list[str]:
    """Another mode than the one the target's figures are of, or, where it names none, one that has a limit."""
    number = _NUMBER.search(wanted)
    if not mode or _is_same(mode, wanted):
        return []
    if wanted:
        sets = f"'sudo nvpmodel -m {number[1]}' sets it." if number else "'sudo nvpmodel -m NUMBER' sets another one."
        return [f"The device is in power mode {mode}, and the target's figures are of {wanted}: {sets}"]
    if _FASTEST in mode:
        return []
    return [
        f"The device is in power mode {mode}, which may leave speed behind: 'nvpmodel -p --verbose' lists the others, "
        "'sudo nvpmodel -m NUMBER' sets one."
    ]


def _is_same(mode: str, wanted: str) -> bool:
    ours, theirs = _NUMBER.search(mode), _NUMBER.search(wanted)
    if ours and theirs:
        return ours[1] == theirs[1]
    return bool(wanted) and _name(mode) == _name(wanted)


def _name(mode: str) -> str:
    return re.sub(r"[\s_]", "", mode.partition("(")[0]).upper()
