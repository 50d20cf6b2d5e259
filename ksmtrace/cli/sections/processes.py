"""What KSM did for each process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ksmtrace.cli.charts import Absent, Bars, Chart, Series
from ksmtrace.cli.sections.words import MOST_ROWS, exact, name_of
from ksmtrace.cli.table import indent, render_table


def lines(content: dict[str, Any], everything: bool) -> Iterator[str]:
    """Yield the section's lines; ``everything`` leaves no row out."""
    processes = sorted(
        content["processes"],
        key=lambda p: (-(p["ksm_merging_pages"] or 0), -p["merged_pages"], p["pid"] or 0),
    )
    yield f"PROCESSES: {len(processes)}"
    if not processes:
        return
    if content["lost"]:
        yield "  by the events that are left: merged, failed, removed, zero and shared may be more"
    shown = processes if everything else processes[:MOST_ROWS]
    if len(shown) < len(processes):
        yield f"  the first {len(shown)} (--all shows all):"
    unread = not content["counters"]
    rows = [
        [
            "–" if p["pid"] is None else str(p["pid"]),
            name_of(p),
            f"{p['merged_pages']:,}",
            f"{p['failed_attempts']:,}",
            f"{p['removed_pages'] + (p['left_singly_pages'] or 0):,}",
            f"{p['zero_merged_pages']:,}",
            # Where nobody read it, it is not known whether the kernel counts it.
            "–" if unread and p["counted_by"] is None else exact(p["ksm_merging_pages"]),
            {"ksm_exit": "at exit", "sample": "last sample"}.get(p["counted_by"] or "", "–"),
            _difference(p["difference"]),
            f"{p['shared_with_others_pages']:,}",
            p["cgroup"] or "–",
        ]
        for p in shown
    ]
    heads = [
        "pid", "who", "merged", "failed", "removed", "zero", "ksm_merging_pages", "read",
        "against events", "shared with others", "cgroup",
    ]  # fmt: skip
    yield from indent(render_table(heads, rows, left=(1, 7, 10)))
    if any((p["difference"] or 0) < 0 for p in shown):
        yield (
            "  against events: -N of a process's pages left singly or as their node's last sharer, "
            "without an event"
        )


def _difference(difference: int | None) -> str:
    if difference is None:
        return "unknown"
    return "exact" if difference == 0 else f"{difference:+,}"


def charts(content: dict[str, Any]) -> Iterator[Chart]:
    """Yield what is saved for each process, and what became of its pages."""
    processes = sorted(content["processes"], key=lambda p: -(p["ksm_merging_pages"] or 0))
    title = "Merged pages of each process, by the kernel's own count"
    known = [p for p in processes if p["ksm_merging_pages"] is not None]
    counted = [p for p in known if p["ksm_merging_pages"] or p["ksm_zero_pages"]][:MOST_ROWS]
    if not processes:
        yield Absent(title, "KSM dealt with no process")
        return
    if counted:
        series = [Series("ksm_merging_pages", [p["ksm_merging_pages"] for p in counted])]
        if any(p["ksm_zero_pages"] for p in counted):
            series.append(Series("ksm_zero_pages", [p["ksm_zero_pages"] for p in counted]))
        yield Bars(title, "pages", [_label(p) for p in counted], tuple(series))
    else:
        yield Absent(title, "none has any" if known else "this kernel does not count by process")
    processes.sort(key=lambda p: -(p["merged_pages"] + p["failed_attempts"]))
    shown = [p for p in processes if p["merged_pages"] or p["failed_attempts"]][:MOST_ROWS]
    title = "Attempts on the pages of each process"
    if not shown:
        yield Absent(title, "there was none")
        return
    yield Bars(
        title,
        "attempts",
        [_label(p) for p in shown],
        (
            Series("merged", [p["merged_pages"] for p in shown]),
            Series("failed", [p["failed_attempts"] for p in shown]),
        ),
    )


def _label(process: dict[str, Any]) -> str:
    return f"{name_of(process)} ({process['pid']})"
