"""Attempts to merge, and when they were."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ksmtrace.cli.charts import Absent, Bars, Chart, Panel, Series, Timeline
from ksmtrace.cli.sections.words import seconds
from ksmtrace.units import text_bars, text_count, text_duration, text_share
from ksmtrace.words import REASONS

_RATES = (
    ("merged", "merged"),
    ("failed", "failed"),
    ("zero_merged", "zero pages"),
    ("nodes_freed", "nodes freed"),
    ("sharers_removed", "sharers removed"),
    ("left_singly", "left singly"),
    ("migrated", "moved"),
)


def lines(content: dict[str, Any], everything: bool) -> Iterator[str]:
    """Yield the section's lines; ``everything`` leaves no row out."""
    merges = content["merges"]
    if merges is None:
        yield "MERGES: not visible on this kernel"
        return
    rate = merges["success_rate"]
    # Of what is lost at least this much happened.
    least = "at least " if content["lost_by_kind"].get("ksm_merge_with_ksm_page") else ""
    yield (
        f"MERGES: {least}{merges['attempts']:,} attempts, {merges['succeeded']:,} pages merged"
        + (f" ({text_share(rate)})" if rate is not None else "")
        + f", {merges['new_stable_nodes']:,} new stable nodes"
    )
    for reason, count in merges["failed"].items():
        yield f"  {count:,} {REASONS.get(reason, f'failed with {reason}')}"
    if merges["failed_by_cause"]:
        yield "  why: see OUTCOMES (--section outcomes)"
    zero = content["zero_pages"]
    if zero is None:
        yield "  zero pages: not visible on this kernel"
    elif zero["attempts"]:
        yield f"  zero pages: {zero['attempts']:,} attempts, {zero['succeeded']:,} replaced"
    rates = content["rates"]
    if rates and merges["attempts"] + (zero or {"attempts": 0})["attempts"]:
        span_s = rates[0]["span_ns"] / 1e9
        for name, label in _RATES:
            counts = [row[name] for row in rates]
            if any(counts):
                peak = text_count(max(counts) / span_s)
                yield f"  {label:<17} {text_bars(counts)}  at most {peak}/s"
        yield f"  {'':<17} one bar is {text_duration(rates[0]['span_ns'])}"


def charts(content: dict[str, Any]) -> Iterator[Chart]:
    """Yield the rates over time, and what became of the attempts."""
    title = "Rates over time"
    rates = content["rates"]
    if content["merges"] is None:
        yield Absent(title, "merges are not visible on this kernel")
        return
    panels = tuple(
        Panel(f"{label} per second", (Series(label, [_rate(row, name) for row in rates]),))
        for name, label in _RATES
        if any(row[name] for row in rates)
    )
    if panels:
        times_s = [seconds(content, row["begin_ns"]) for row in rates]
        yield Timeline(title, times_s, panels, rates[0]["span_ns"] / 1e9)
    else:
        yield Absent(title, "nothing merged, failed, left or moved")
    title = "What became of the attempts to merge"
    merges = content["merges"]
    if not merges["attempts"]:
        yield Absent(title, "there was none")
        return
    outcomes = {"merged": merges["succeeded"], **merges["failed"]}
    yield Bars(title, "attempts", list(outcomes), (Series("attempts", list(outcomes.values())),))


def _rate(row: dict[str, Any], name: str) -> float | None:
    return None if row[name] is None else row[name] / (row["span_ns"] / 1e9)
