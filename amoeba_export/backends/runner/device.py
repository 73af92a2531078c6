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
        "governor": _text("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "max_clock_khz": _text("/sys/devices/system/cpu/cpu0/cpufreq/scaling_max_freq"),
        "power_mode": _power_mode(),
        "huge_pages": _huge_pages(),
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
    """The power mode of an NVIDIA Jetson, such as `25W`."""
    if not shutil.which("nvpmodel"):
        return ""
    asked = subprocess.run(["nvpmodel", "-q"], capture_output=True, text=True, timeout=10, check=False)
    for line in asked.stdout.splitlines():
        if "Power Mode" in line:
            return line.split(":", 1)[1].strip()
    return ""


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
