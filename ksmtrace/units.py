"""How quantities are written for people; JSON always has the exact number."""

from __future__ import annotations

import math
import signal
from collections.abc import Sequence

_BARS = "▁▂▃▄▅▆▇█"


def text_bytes(size_bytes: float) -> str:
    """Write a size with a binary unit: 1536 -> ``1.5 KiB``."""
    sign = "-" if size_bytes < 0 else ""
    size = abs(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{sign}{size:.0f} {unit}" if unit == "B" else f"{sign}{size:.1f} {unit}"
        size /= 1024
    return f"{sign}{size:.1f} TiB"


def text_duration(duration_ns: float) -> str:
    """Write a duration in the unit that suits it: 1_500_000 -> ``1.50 ms``."""
    if abs(duration_ns) < 1_000:
        return f"{duration_ns:.0f} ns"
    if abs(duration_ns) < 1_000_000:
        return f"{duration_ns / 1_000:.2f} µs"
    if abs(duration_ns) < 1_000_000_000:
        return f"{duration_ns / 1_000_000:.2f} ms"
    if abs(duration_ns) < 600_000_000_000:
        return f"{duration_ns / 1_000_000_000:.2f} s"
    return f"{duration_ns / 60_000_000_000:.1f} min"


def text_count(count: float) -> str:
    """Write a count or rate with a decimal unit: 1_234_567 -> ``1.23 M``; below 10,000 exactly."""
    if abs(count) < 10_000:
        return f"{count:,.0f}" if abs(count) >= 100 or count == int(count) else f"{count:.1f}"
    for unit, scale in (("k", 1e3), ("M", 1e6), ("G", 1e9)):
        if abs(count) < scale * 1000:
            return f"{count / scale:.1f} {unit}" if unit == "k" else f"{count / scale:.2f} {unit}"
    return f"{count:.3g}"


def text_share(share: float) -> str:
    """Write a share: 0.5 -> ``50.0%``; nothing and all are said of nothing and all only."""
    if 0 < share < 0.0005:
        return "<0.1%"
    return ">99.9%" if 0.9995 <= share < 1 else f"{share:.1%}"


def text_bars(counts: Sequence[float]) -> str:
    """Draw counts as bars, a character each; the highest is full, and only 0 is blank."""
    peak = max(counts, default=0)
    return "".join(
        " " if count <= 0 else _BARS[max(0, math.ceil(count * len(_BARS) / peak) - 1)]
        for count in counts
    )


def text_signal(number: int) -> str:
    """Name a signal: 11 -> ``SIGSEGV``; a real-time signal has no name of its own."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
