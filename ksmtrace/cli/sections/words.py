"""How the sections write what several of them show."""

from __future__ import annotations

from typing import Any

from ksmtrace.cli.table import printable

MOST_ROWS = 20
MOST_NAMES = 5


def name_of(process: dict[str, Any]) -> str:
    """Return what people call a process: its guest's name, or its comm."""
    if process["guest"]:
        return f"guest {printable(process['guest'])}"
    if process["pid"] is None:
        return "gone before the recording"
    return printable(process["comm"] or "unknown")


def seconds(content: dict[str, Any], ts_ns: int) -> float:
    """Return the seconds from the recording's begin to a CLOCK_MONOTONIC."""
    since_s: float = (ts_ns - content["started_ns"]) / 1e9
    return since_s


def exact(value: Any) -> str:
    """Write a counter's value; None is ``absent``."""
    if value is None:
        return "absent"
    return f"{value:,}" if isinstance(value, int) else str(value)


def signed(value: int | None) -> str:
    """Write a change with its sign; None is a dash."""
    if value is None:
        return "–"
    return f"{value:+,}" if value else "0"


def not_counted(content: dict[str, Any]) -> str:
    """Say why what the kernel side counts is not known."""
    selection = content["selection"]
    if selection and selection["tallies_end_ns"] is None:
        return "unknown: the kernel side's counts were not read in this span"
    return "not visible on this kernel"


def slots_of(histogram: dict[str, Any]) -> list[tuple[int, int, int]]:
    """Return a histogram's slots as a chart takes them."""
    return [(slot["from"], slot["below"], slot["count"]) for slot in histogram["slots"]]
