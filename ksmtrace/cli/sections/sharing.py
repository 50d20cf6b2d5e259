"""Who shares with whom."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ksmtrace.cli.charts import Absent, Chart, Matrix
from ksmtrace.cli.sections.words import MOST_ROWS, name_of
from ksmtrace.cli.table import indent, render_table

_MOST_CELLS = 12
_TOLD_BY = ("ksm_merge_with_ksm_page", "stable_tree_append")


def lines(content: dict[str, Any], everything: bool) -> Iterator[str]:
    """Yield the section's lines; ``everything`` leaves no row out."""
    yield "WHO SHARES WITH WHOM  (pages as they merged during the recording)"
    pairs: dict[tuple[str, str], dict[str, tuple[int, int]]] = {}
    for process in content["processes"]:
        one = f"{name_of(process)} ({process['pid']})"
        for other in process["shared_with"]:
            names = sorted((one, f"{name_of(other)} ({other['pid']})"))
            pair = pairs.setdefault((names[0], names[1]), {})
            pair[one] = other["pages"], process["merged_pages"]
    lost = sum(content["lost_by_kind"].get(kind, 0) for kind in _TOLD_BY)
    if lost:
        yield (
            "  at least these: events of merges are lost"
            if pairs
            else ("  unknown: events of merges are lost, and those left tell of no two processes")
        )
    if not pairs:
        if not lost:
            during = "span" if content["selection"] else "recording"
            yield f"  no two processes merged into the same KSM page during the {during}"
        return
    most = sorted(pairs.items(), key=lambda pair: -max(pages for pages, _ in pair[1].values()))
    shown = most if everything else most[:MOST_ROWS]
    rows = [
        [cell for name in names for cell in (name, _part(*counts[name]) if name in counts else "–")]
        for names, counts in shown
    ]
    heads = ["who", "merged pages that the other has too", "and whom", "of these"]
    yield from indent(render_table(heads, rows, left=(0, 2)))
    if len(shown) < len(pairs):
        yield f"  ... and {len(pairs) - len(shown)} pairs more (--all shows all)"


def _part(pages: int, merged: int) -> str:
    return f"{pages:,} of {merged:,} ({pages / max(merged, 1):.0%})"


def charts(content: dict[str, Any]) -> Iterator[Chart]:
    """Yield who shares how much with whom."""
    title = "Pages that a process (row) has on stable_nodes of another one (column)"
    sharing = sorted(
        (p for p in content["processes"] if p["shared_with"]),
        key=lambda p: -p["shared_with_others_pages"],
    )[:_MOST_CELLS]
    if not sharing:
        yield Absent(title, "no two processes merged into the same KSM page")
        return
    names = [f"{name_of(p)} ({p['pid']})" for p in sharing]
    rows = [
        [
            None
            if one is other
            else sum(s["pages"] for s in one["shared_with"] if s["pid"] == other["pid"])
            for other in sharing
        ]
        for one in sharing
    ]
    yield Matrix(title, "pages, as they merged", names, rows)
