"""How quantities read, the same on a screen, on a page and in a picture."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """`8.2 s`, `42 s`, `3 min 05 s`, `2 h 10 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, whole = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {whole:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def size(size_bytes: float) -> str:
    """`812 B`, `4.1 kB`, `538.1 MB`: decimal units, as disks and downloads are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 1000 or unit == "GB":
            break
        size_bytes /= 1000
    return f"{size_bytes:.0f} B" if unit == "B" else f"{size_bytes:.1f} {unit}"


def milliseconds(value_ms: float | None) -> str:
    """`18.61 ms`: four digits, so that a value and the limit that it misses do not look alike. A dash for None."""
    if value_ms is None:
        return "-"
    return f"{value_ms:#.4g} ms" if value_ms < 1000 else f"{value_ms:.0f} ms"


def percent(share: float) -> str:
    """`4 %`, and `0.4 %` where a whole number would hide it."""
    return f"{100 * share:.0f} %" if share >= 0.0095 else f"{100 * share:.1g} %"
