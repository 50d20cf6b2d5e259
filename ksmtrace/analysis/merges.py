"""What became of each attempt to merge a page, as far as the tracepoints tell."""

from __future__ import annotations

import errno
import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from ksmtrace.analysis.recorded import Recorded
from ksmtrace.events import Events, of_kind

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Merges:
    """The ksm_merge_with_ksm_page events, each with its outcome.

    Two pages that are equal and not yet in the stable tree merge in two steps, each with an
    event (mm/ksm.c:try_to_merge_two_pages): first the page that ksmd has just reached becomes a
    KSM page (``ksm_page`` 0), then the one that waited in the unstable tree merges with it. If
    the second step fails, break_cow undoes the first without an event.

    Attributes:
        events: the events in order, shape (n,).
        appended: the page became a sharer of a stable node (mm/ksm.c:stable_tree_append). An
            allocation failure in stable_tree_insert, which undoes both pages, has no event.
        pairs: second steps that succeeded: each made one new stable node.
        undone: first steps whose second failed.
        open: first steps that nothing follows: their outcome is unknown.
    """

    events: Events
    appended: Mask
    pairs: Mask
    undone: Mask
    open: Mask

    @property
    def failed(self) -> Mask:
        """Attempts that the kernel answered with an error."""
        failed: Mask = self.events["err"] != 0
        return failed

    def by_reason(self) -> dict[str, int]:
        """Count the attempts that did not end in a merged page, per reason.

        Reasons are errno names, ``undone`` (first step of a pair whose second failed) and
        ``open`` (first step whose second is not in the recording).
        """
        numbers, counts = np.unique(self.events["err"][self.failed], return_counts=True)
        reasons = {
            errno.errorcode.get(-int(number), str(number)): int(count)
            for number, count in zip(numbers, counts, strict=True)
        }
        for name, mask in (("undone", self.undone), ("open", self.open)):
            if mask.any():
                reasons[name] = int(mask.sum())
        return reasons


# Several tables of one report need it.
@functools.lru_cache(maxsize=1)
def find_merges(recorded: Recorded) -> Merges:
    """Tell the outcome of every attempt."""
    events = of_kind(recorded.events, "ksm_merge_with_ksm_page")
    ok = events["err"] == 0
    first_step = events["ksm_page"] == 0
    begun = first_step & ok
    ends_pair = np.zeros(len(events), bool)  # this event is the second step of the one before
    ends_pair[1:] = begun[:-1] & ~first_step[1:] & (events["pfn"][1:] == events["pfn"][:-1])
    followed = np.zeros(len(events), bool)
    followed[:-1] = ends_pair[1:]
    pairs = ends_pair & ok
    kept = np.zeros(len(events), bool)
    kept[:-1] = pairs[1:]
    return Merges(
        events=events,
        appended=(~first_step & ok) | (begun & kept),
        pairs=pairs,
        undone=begun & followed & ~kept,
        open=begun & ~followed,
    )


def find_zero_merges(recorded: Recorded) -> tuple[Events, Mask]:
    """Return the ksm_merge_one_page events, and which of them put the zero page in place."""
    events = of_kind(recorded.events, "ksm_merge_one_page")
    return events, events["err"] == 0


def df_rates(recorded: Recorded, most_rows: int = 60) -> pd.DataFrame:
    """Count what happened per span of time.

    Returns:
        One row per span; the spans are equally long, 1, 2 or 5 times a power of ten, and at most
        ``most_rows``. Columns: ``begin_ns`` (CLOCK_MONOTONIC), ``span_ns``, and the counts
        ``attempts``, ``merged``, ``failed``, ``zero_merged``, ``nodes_freed``,
        ``sharers_removed`` (with their node), all int64.
    """
    begin_ns, end_ns = recorded.header.started_ns, recorded.end_ns()
    span_ns = _span(max(end_ns - begin_ns, 1) / most_rows)
    edges = np.arange(begin_ns, end_ns + span_ns, span_ns, dtype=np.uint64)
    merges = find_merges(recorded)
    zero, zero_ok = find_zero_merges(recorded)
    chosen = {
        "attempts": merges.events,
        "merged": merges.events[merges.appended],
        "failed": merges.events[merges.failed | merges.undone],
        "zero_merged": zero[zero_ok],
        "nodes_freed": of_kind(recorded.events, "ksm_remove_ksm_page"),
        "sharers_removed": of_kind(recorded.events, "ksm_remove_rmap_item"),
    }
    columns = {
        name: np.histogram(events["ts_ns"], bins=edges)[0] for name, events in chosen.items()
    }
    return pd.DataFrame({"begin_ns": edges[:-1], "span_ns": span_ns, **columns})


def _span(least_ns: float) -> int:
    scale = 10 ** int(np.floor(np.log10(max(least_ns, 1))))
    return next(int(step * scale) for step in (1, 2, 5, 10) if step * scale >= least_ns)
