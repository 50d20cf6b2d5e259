"""The kernel's counters beside what the events say."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ksmtrace.cli.charts import Absent, Chart, Panel, Series, Timeline
from ksmtrace.cli.sections.words import exact, seconds, signed
from ksmtrace.cli.table import indent, render_table
from ksmtrace.kernel.sysfs import FILES, FileType

_FILES = {file.name: file for file in FILES}


def lines(content: dict[str, Any], everything: bool) -> Iterator[str]:
    """Yield the section's lines; ``everything`` leaves no row out."""
    yield "COUNTERS, AND WHAT THE EVENTS SAY THEY SHOULD BE"
    if not content["counters"]:
        yield "  unknown: there are no two samples"
        return
    rows = [
        [
            entry["counter"],
            exact(entry["first"]),
            exact(entry["last"]),
            signed(entry["delta"]),
            signed(entry["events_say"]),
            signed(entry["difference"]),
            entry["verdict"],
            entry["why"],
        ]
        for entry in content["counters"]
        if everything or entry["events_say"] is not None or entry["delta"]
    ]
    heads = ["counter", "first", "last", "change", "events say", "difference", "", ""]
    yield from indent(render_table(heads, rows, left=(0, 6, 7)))


def charts(content: dict[str, Any]) -> Iterator[Chart]:
    """Yield the counters over time, those that events tell of with the gap to these."""
    title = "Counters over time, and by the events"
    history = content["history"]
    if len(history["ts_ns"]) < 2:
        yield Absent(title, "there are no two samples of the kernel's counters")
        return
    times_s = [seconds(content, ts_ns) for ts_ns in history["ts_ns"]]
    told = {name: say for name, say in history["events_say"].items() if _moves(history, name)}
    if told:
        panels = []
        for name, say in told.items():
            values = history["values"][name]
            gap = [None if v is None else v - s for v, s in zip(values, say, strict=True)]
            lines_of = (Series("the kernel", values), Series("by the events", say, dashed=True))
            panels.append(Panel(name, lines_of))
            if any(gap):
                panels.append(Panel(f"{name}: the kernel's count less that", (Series("gap", gap),)))
        yield Timeline(title, times_s, tuple(panels))
    else:
        lost = "events were lost" if content["lost"] else "none of them moved"
        yield Absent(title, lost)
    others = [n for n in history["values"] if n not in told and _moves(history, n)]
    if others:
        panels = [_panel(name, history["values"][name]) for name in others]
        yield Timeline("Other counters over time (sampled)", times_s, tuple(panels))


def _panel(name: str, values: list[int | None]) -> Panel:
    """Show a counter that only rises by how much it rose."""
    file = _FILES.get(name)
    # What is not a file of /sys/kernel/mm/ksm is a counter of events in /proc/vmstat.
    if (file is None or file.type is FileType.COUNTER) and values[0] is not None:
        first = values[0]
        values = [None if value is None else value - first for value in values]
        return Panel(f"{name}, since the first sample", (Series(name, values),))
    unit = f" ({file.unit})" if file and file.unit else ""
    return Panel(f"{name}{unit}", (Series(name, values),))


def _moves(history: dict[str, Any], name: str) -> bool:
    return len({value for value in history["values"][name] if value is not None}) > 1
