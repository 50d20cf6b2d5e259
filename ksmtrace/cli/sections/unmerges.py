"""Who unmerged, and whose pages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ksmtrace.cli.sections.words import MOST_NAMES
from ksmtrace.cli.table import printable


def lines(content: dict[str, Any], everything: bool) -> Iterator[str]:
    """Yield the section's lines; ``everything`` leaves no row out."""
    unmerges = content["unmerges"]
    if unmerges is None:
        yield "UNMERGING: not visible on this kernel"
        return
    if not unmerges["calls"]:
        yield "UNMERGING: none (no call of break_ksm)"
        return
    yield (
        f"UNMERGING: {unmerges['calls']:,} calls of break_ksm for {unmerges['pages']:,} pages, KSM "
        "pages or not"
    )
    for reason, count in unmerges["failed"].items():
        yield f"  {count:,} failed with {reason}"
    if not unmerges["ranges"]:
        yield (
            "  this kernel calls it for every address of an area: cow_ksm tells how many pages "
            "were copied"
        )
    for label, rows in (("by", unmerges["by_task"]), ("of", unmerges["by_owner"])):
        shown = rows if everything else rows[:MOST_NAMES]
        names = ", ".join(
            f"{printable(row['comm'] or 'unknown')} ({row['pid'] or '–'}) {row['pages']:,}"
            for row in shown
        )
        yield f"  {label} {names}{' ...' if len(shown) < len(rows) else ''}"
