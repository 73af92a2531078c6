"""What the machine tells of itself: model, cores, clocks, power mode, temperature. Linux; elsewhere it says less."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from glob import glob


def physical_cores() -> int:
    """Physical cores that this process may use; hyper-threads of one core count once."""
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    siblings = {_text(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in allowed}
    return max(1, len(siblings))


def describe_machine() -> dict[str, str]:
    """Facts that hold for a whole run and that timings depend on. Absent where the system does not tell."""
    facts = {
        "device": _text("/proc/device-tree/model") or _text("/sys/class/dmi/id/product_name") or platform.node(),
        "cpu": _cpu_model(),
        "cores": str(physical_cores()),
        "memory_mb": str(_meminfo_mb("MemTotal")),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "max_clock_khz": _text("/sys/devices/system/cpu/cpu0/cpufreq/scaling_max_freq"),
        **speed_settings(),
        "huge_pages": _huge_pages(),
    }
    return {name: value for name, value in facts.items() if value}


def speed_settings() -> dict[str, str]:
    """What sets the speed of the machine, and may be changed or change: power mode, governor, and who drives it.

    `clocks` is of an NVIDIA Jetson: `fixed` as by `jetson_clocks`, or `not fixed`.
    """
    facts = {
        "power_mode": _power_mode(),
        "governor": _text("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "clock_driver": _text("/sys/devices/system/cpu/cpu0/cpufreq/scaling_driver"),
        "clocks": _clocks(),
    }
    return {name: value for name, value in facts.items() if value}


def temperature_c() -> float | None:
    """The hottest thermal zone in degrees Celsius, or None where there is none."""
    readings = [_text(path) for path in glob("/sys/class/thermal/thermal_zone*/temp")]  # noqa: PTH207 - startup counts
    celsius = [int(reading) / 1000 for reading in readings if reading.lstrip("-").isdigit()]
    return max(celsius) if celsius else None


def peak_memory_mb() -> float | None:
    """Most memory in MiB that this process has occupied, or None where the system does not tell."""
    for line in _text("/proc/self/status").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return None


def available_memory_mb() -> float:
    """Memory in MiB that new processes can have without swapping; 0 where the system does not tell.

    Under a limit of cgroup v2, as containers have it, it is what is left of that; files that the kernel would drop do
    not count as taken.
    """
    free_mb = float(_meminfo_mb("MemAvailable") or 0)
    root = "/sys/fs/cgroup"
    limit, used = _text(f"{root}/memory.max"), _text(f"{root}/memory.current")
    if limit.isdigit() and used.isdigit():
        droppable = [line.split()[1] for line in _text(f"{root}/memory.stat").splitlines() if "inactive_file" in line]
        left = int(limit) - int(used) + int(droppable[0] if droppable else 0)
        free_mb = min(free_mb, left / 2**20)
    return max(0.0, free_mb)


def _cpu_model() -> str:
    for line in _text("/proc/cpuinfo").splitlines():
        if line.startswith(("model name", "Model")):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def _meminfo_mb(field: str) -> int | str:
    for line in _text("/proc/meminfo").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) // 1024
    return ""


def _power_mode() -> str:
    """The power mode of an NVIDIA Jetson by name and number, such as `25W (nvpmodel -m 1)`."""
    said = _said(["nvpmodel", "-q"])
    name = next((line.split(":", 1)[1].strip() for line in said if "Power Mode" in line and ":" in line), "")
    number = next((line.strip() for line in said if line.strip().isdigit()), "")
    return f"{name} (nvpmodel -m {number})" if name and number else name


def _clocks() -> str:
    """Whether the clocks of an NVIDIA Jetson stay at their highest.

    Its own program knows; where that wants root, the lowest clock of the GPU tells.
    """
    if not shutil.which("nvpmodel"):
        return ""
    ranges = [
        dict(word.split("=", 1) for word in line.split() if "=" in word)
        for line in _said(["jetson_clocks", "--show"])
        if line.startswith(("cpu", "GPU", "EMC"))
    ]
    found = [one.get("FreqOverride") == "1" or one["MinFreq"] == one["MaxFreq"] for one in ranges if "MinFreq" in one]
    if not found:
        folders = glob("/sys/class/devfreq/*.g*/")  # noqa: PTH207 - startup counts
        pairs = [(_text(f"{folder}min_freq"), _text(f"{folder}max_freq")) for folder in folders]
        found = [low == high for low, high in pairs if low and high]
    return "" if not found else "fixed" if all(found) else "not fixed"


def _said(command: list[str]) -> list[str]:
    """Lines that a program prints; none where it is not there, does not answer or fails."""
    path = shutil.which(command[0])
    if path is None:
        return []
    try:
        ran = subprocess.run([path, *command[1:]], capture_output=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [] if ran.returncode else ran.stdout.decode(errors="replace").splitlines()


def _huge_pages() -> str:
    """Who gets huge pages of memory: `always`, `never`, or `madvise`; and what glibc is told about its own."""
    modes = _text("/sys/kernel/mm/transparent_hugepage/enabled")
    if "[" not in modes:
        return ""
    mode = modes.split("[")[1].split("]")[0]
    asked = [knob for knob in os.environ.get("GLIBC_TUNABLES", "").split(":") if knob.startswith("glibc.malloc.")]
    return " ".join([mode, *asked])


def _text(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:  # noqa: PTH123 - startup counts
            return file.read().strip("\0\n ")
    except OSError:
        return ""
