"""How ksmd looks at pages and searches the stable tree: by the counts of the kernel side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ksmtrace.analysis.recorded import Recorded
from ksmtrace.capture.hooks import ABSENT
from ksmtrace.events import SearchOutcome

Bounds = tuple[int, int]
"""From the first number to below the second."""


@dataclass(frozen=True)
class Histogram:
    """Counts by powers of two.

    Attributes:
        slots: what was counted, as (from, below, count), from the least to the greatest slot
            that is not empty.
        median, p99: the slot in which half, and 99 of 100, of the counted values are reached.
    """

    slots: list[tuple[int, int, int]]
    median: Bounds
    p99: Bounds


@dataclass(frozen=True)
class Visits:
    """What ksmd did page by page, over the whole recording; None: not observable.

    Attributes:
        rungs: by which hook (:data:`ksmtrace.capture.hooks.RUNGS`) cmp_and_merge_page and
            stable_tree_search were caught; a derived view is one from other functions.
        pages: pages looked at: calls of mm/ksm.c:cmp_and_merge_page.
        smart_scan_skips: pages that mm/ksm.c:should_skip_rmap_item let pass.
        searches: searches of the stable tree by :class:`ksmtrace.events.SearchOutcome` in small
            letters. With the derived hook a search of an empty tree is not seen.
        interval_ns: from one look at a page to the next one; holds ksmd's sleep, once a batch.
        search_nodes: stable_nodes whose page was looked up, per search.
    """

    rungs: Mapping[str, str | None]
    pages: int | None
    smart_scan_skips: int | None
    searches: Mapping[str, int] | None
    interval_ns: Histogram | None
    search_nodes: Histogram | None


def find_visits(recorded: Recorded) -> Visits | None:
    """Read the last tallies; None where nothing that happens per page was caught."""
    rungs = {name: recorded.rung(name) for name in ("cmp_and_merge_page", "stable_tree_search")}
    if not recorded.losses or set(rungs.values()) == {ABSENT}:
        return None
    tallies = recorded.losses[-1]
    searches = {
        outcome.name.lower(): tallies.counted.get(f"stable_tree_search.{outcome.name.lower()}")
        for outcome in SearchOutcome
    }
    known = {name: count for name, count in searches.items() if count is not None}
    return Visits(
        rungs={name: None if rung == ABSENT else rung for name, rung in rungs.items()},
        pages=tallies.counted.get("cmp_and_merge_page"),
        smart_scan_skips=tallies.counted.get("smart_scan_skips"),
        searches=known or None,
        interval_ns=find_histogram(tallies.histograms.get("visit_interval_ns")),
        search_nodes=find_histogram(tallies.histograms.get("search_nodes")),
    )


def slot_bounds(slot: int) -> Bounds:
    """Return the values that a slot counts.

    It is bcc's bpf_log2l, the number of bits of the value: slot 0 is 0 alone, and slot n from
    2^(n-1) to below 2^n. (The kernel side gives 0 to slot 0 itself.)
    """
    return (1 << slot >> 1, 1 << slot)


def find_histogram(counts: Sequence[int] | None) -> Histogram | None:
    """Return what slots hold; None where nothing was counted: then there is no median."""
    if counts is None or not any(counts):
        return None
    total = np.cumsum(counts)
    used = np.flatnonzero(counts)
    median, p99 = (
        slot_bounds(int(np.searchsorted(total, share * total[-1]))) for share in (0.5, 0.99)
    )
    return Histogram(
        [(*slot_bounds(slot), int(counts[slot])) for slot in range(used[0], used[-1] + 1)],
        median,
        p99,
    )
