"""The functions with programs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ksmtrace.cli.charts import Absent, Chart, Histogram
from ksmtrace.cli.sections.words import not_counted
from ksmtrace.cli.table import indent, render_table
from ksmtrace.units import text_duration


def lines(content: dict[str, Any], everything: bool) -> Iterator[str]:
    """Yield the section's lines; ``everything`` leaves no row out."""
    calls = content["calls"]
    if calls is None:
        selection = content["selection"]
        unread = selection and selection["tallies_end_ns"] is None
        yield f"FUNCTIONS: {not_counted(content) if unread else 'no programs on any'}"
        return
    yield "FUNCTIONS WITH PROGRAMS"
    rows = [
        [
            name,
            "–" if call["entered"] is None else f"{call['entered']:,}",
            "–" if call["returned"] is None else f"{call['returned']:,}",
            *(
                text_duration(call["duration"][key]) if call["duration"] else "–"
                for key in ("median_ns", "p99_ns", "max_ns")
            ),
            ", ".join(f"{result}: {count:,}" for result, count in (call["results"] or {}).items())
            or "–",
        ]
        for name, call in calls.items()
        if everything or call["entered"] or call["returned"]
    ]
    if not rows:
        yield "  none of them ran"
        return
    heads = ["function", "entered", "returned", "median", "99% within", "longest", "results"]
    yield from indent(render_table(heads, rows, left=(0, 6)))


def charts(content: dict[str, Any]) -> Iterator[Chart]:
    """Yield how long the calls took."""
    timed = {
        name: call["duration"]
        for name, call in (content["calls"] or {}).items()
        if call["duration"]
    }
    for name, duration in timed.items():
        slots = [(slot["from"], slot["below"], slot["count"]) for slot in duration["slots"]]
        yield Histogram(f"{name}: from entry to exit", "ns", slots)
    if not timed:
        yield Absent("How long calls took", "no call of a function with programs was timed")
