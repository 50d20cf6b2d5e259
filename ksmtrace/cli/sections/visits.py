"""What ksmd does page by page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ksmtrace.cli.charts import Absent, Bars, Chart, Histogram, Series
from ksmtrace.cli.sections.words import not_counted, slots_of
from ksmtrace.units import text_duration

_OUTCOMES = {
    "none": "nothing",
    "found": "an equal KSM page",
    "same_page": "the page itself, by a fork",
    "busy": "a locked one (-EBUSY)",
}


def lines(content: dict[str, Any], everything: bool) -> Iterator[str]:
    """Yield the section's lines; ``everything`` leaves no row out."""
    from ksmtrace.capture.hooks import DERIVED

    visits = content["visits"]
    if visits is None:
        yield f"PAGE BY PAGE: {not_counted(content)}"
        return
    rungs = visits["rungs"]
    if visits["pages"] is None:
        yield "PAGE BY PAGE: looks at pages are not visible on this kernel"
    else:
        yield (
            f"PAGE BY PAGE: ksmd looked at {visits['pages']:,} pages"
            f"{_by_rung(rungs['cmp_and_merge_page'])}"
        )
    if visits["smart_scan_skips"] is not None:
        yield f"  {visits['smart_scan_skips']:,} more were skipped by smart_scan"
    interval = visits["visit_interval_ns"]
    if interval:
        low, high = map(text_duration, interval["median"])
        yield (
            f"  from one to the next: median {low} to {high}, 99% below "
            f"{text_duration(interval['p99'][1])} (with ksmd's sleep after each batch)"
        )
    searches = visits["searches"]
    if searches is None:
        yield "  searches of the stable tree: not visible on this kernel"
        return
    outcomes = ", ".join(
        f"{_OUTCOMES[name]} {count:,}" for name, count in searches.items() if count
    )
    rung = rungs["stable_tree_search"]
    # A search is derived from the stable_nodes that it looks up.
    by = f"{rung}, without those of an empty tree" if rung == DERIVED else rung
    yield (
        f"  {sum(searches.values()):,} searches of the stable tree"
        f"{_by_rung(by)}{f' found: {outcomes}' if outcomes else ''}"
    )
    nodes = visits["search_nodes"]
    if nodes:
        yield (
            f"  stable_nodes looked up per search: median {_whole(*nodes['median'])}, 99% at most "
            f"{nodes['p99'][1] - 1:,}"
        )


def _by_rung(rung: str | None) -> str:
    return f" ({rung})" if rung else ""


def _whole(low: int, below: int) -> str:
    return f"{low:,}" if below == low + 1 else f"{low:,} to {below - 1:,}"


def charts(content: dict[str, Any]) -> Iterator[Chart]:
    """Yield how long it takes from page to page, and what searches come to."""
    visits = content["visits"]
    for title, key, unit in (
        ("From one page to the next", "visit_interval_ns", "ns"),
        ("Stable_nodes looked up per search", "search_nodes", "stable_nodes"),
    ):
        if visits is None:
            yield Absent(title, not_counted(content))
        elif visits[key] is None:
            yield Absent(title, "nothing was measured")
        else:
            yield Histogram(title, unit, slots_of(visits[key]))
    searches = visits and visits["searches"]
    if searches and any(searches.values()):
        yield Bars(
            "What searches of the stable tree found",
            "searches",
            [_OUTCOMES[name] for name in searches],
            (Series("searches", list(searches.values())),),
        )
