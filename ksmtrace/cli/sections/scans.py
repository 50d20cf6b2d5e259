"""The passes of ksmd."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ksmtrace.cli.charts import Absent, Bars, Chart, Series
from ksmtrace.cli.table import indent, render_table
from ksmtrace.units import text_count, text_duration

_MOST_PASSES = 8
_MOST_COLUMNS = 120


def lines(content: dict[str, Any], everything: bool) -> Iterator[str]:
    """Yield the section's lines; ``everything`` leaves no row out."""
    scans = content["scans"]
    if scans is None:
        yield "SCAN PASSES: not visible on this kernel"
        return
    passes = scans["passes"]
    yield f"SCAN PASSES: {scans['completed']} complete"
    if not passes:
        return
    if scans["completed"]:
        speed = scans["pages_per_cpu_second"]
        yield (
            f"  median {text_duration(scans['median_duration_ns'])}, longest "
            f"{text_duration(scans['longest_duration_ns'])}"
            + (f", {text_count(speed)} pages per second of ksmd CPU" if speed else "")
        )
    shown = passes if everything else passes[-_MOST_PASSES:]
    if len(shown) < len(passes):
        yield f"  the last {len(shown)} of {len(passes)} (--all shows all):"
    rows = []
    for one in shown:
        open_end = one["end_ns"] is None or one["begin_ns"] is None
        rows.append(
            [
                str(one["seq"]),
                "not seen whole" if open_end else text_duration(one["duration_ns"]),
                "–" if one["rmap_entries"] is None else f"{one['rmap_entries']:,}",
                "–" if one["cpu_ns"] is None else text_duration(one["cpu_ns"]),
                "–" if one["run_delay_ns"] is None else text_duration(one["run_delay_ns"]),
                f"{one['merged']:,}",
                "cut by the span" if one["cut"] else "",
            ]
        )
    heads = [
        "seqnr", "duration", "rmap_items", "ksmd CPU (±1 tick)", "waited for CPU", "merged", "",
    ]  # fmt: skip
    yield from indent(render_table(heads, rows, left=(6,)))


def charts(content: dict[str, Any]) -> Iterator[Chart]:
    """Yield what the passes spent their time with."""
    title = "Passes, and how ksmd spent them"
    scans = content["scans"]
    if scans is None:
        yield Absent(title, "passes are not visible on this kernel")
        return
    passes = [one for one in scans["passes"] if one["duration_ns"] is not None]
    if not passes:
        yield Absent(title, "no pass was seen from its begin to its end")
        return
    shown = passes[-_MOST_COLUMNS:]
    if len(shown) < len(passes):
        title += f" (the last {len(shown)} of {len(passes)})"
    unit = "ms" if max(one["duration_ns"] for one in shown) < 10e9 else "s"
    scale = {"ms": 1e6, "s": 1e9}[unit]

    def values(of: Callable[[dict[str, int]], int]) -> list[float | None]:
        return [None if one["cpu_ns"] is None else max(of(one), 0) / scale for one in shown]

    series: tuple[Series, ...] = (
        Series("on a CPU", values(lambda one: one["cpu_ns"])),
        Series("waiting for one", values(lambda one: one["run_delay_ns"])),
        Series("asleep", values(lambda p: p["duration_ns"] - p["cpu_ns"] - p["run_delay_ns"])),
    )
    if all(one["cpu_ns"] is None for one in shown):
        series = (Series("duration", [one["duration_ns"] / scale for one in shown]),)
    yield Bars(title, f"{unit}, by seqnr", [str(one["seq"]) for one in shown], series, True)
    yield Bars(
        "Pages merged, by pass",
        "pages, by seqnr",
        [str(one["seq"]) for one in shown],
        (Series("merged", [one["merged"] for one in shown]),),
        True,
    )
