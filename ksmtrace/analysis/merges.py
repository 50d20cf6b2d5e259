"""What became of each attempt to merge a page, as far as the events tell."""

from __future__ import annotations

import errno
import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from ksmtrace.analysis.addresses import Places, next_place, places_of
from ksmtrace.analysis.recorded import PARTS, Recorded
from ksmtrace.events import KIND_BY_NAME, EventFlag, Events, of_kind, select

Mask = npt.NDArray[np.bool_]

# What ksmd does when it is through with a page: break_cow, the next page, the pass's end.
_GOES_ON = (
    *("break_ksm", "cmp_and_merge_page", "ksm_merge_one_page"),
    *("ksm_start_scan", "ksm_stop_scan"),
)


@dataclass(frozen=True)
class Merges:
    """The ksm_merge_with_ksm_page events, each with its outcome.

    Two pages that are equal and not yet in the stable tree merge in two steps, each with an
    event (mm/ksm.c:try_to_merge_two_pages): first the page that ksmd has just reached becomes a
    KSM page (``ksm_page`` 0), then the one that waited in the unstable tree merges with it. If
    the second step fails, break_cow undoes the first without an event.

    Attributes:
        events: the events in order, shape (n,).
        places: where they are among the recording's events, shape (n,).
        appended: the page became a sharer of a stable node (mm/ksm.c:stable_tree_append).
        pairs: second steps that succeeded: each made one new stable node.
        undone: steps that succeeded and that break_cow undid: a first step whose second failed,
            or both where mm/ksm.c:stable_tree_insert had no memory.
        open: steps that succeeded, and the recording does not tell what followed.
    """

    events: Events
    places: Places
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

        Reasons are errno names, ``undone`` and ``open``.
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
@functools.lru_cache(maxsize=PARTS)
def find_merges(recorded: Recorded) -> Merges:
    """Tell the outcome of every attempt: by stable_tree_append's events, where there are any."""
    if recorded.selection is not None:
        return _choose(find_merges(recorded.selection.of), recorded)
    lost = recorded.lost()
    by_appends = recorded.can_see("stable_tree_append") and not any(
        lost.get(name) for name in ("ksm_merge_with_ksm_page", "stable_tree_append")
    )
    return tell_outcomes(recorded.events, by_appends)


def tell_outcomes(events: Events, by_appends: bool) -> Merges:
    """Tell the outcome of every attempt among events, shape (n,), in the ring's order.

    Args:
        events: all that is known, or a part of it.
        by_appends: whether every stable_tree_append is among them.
    """
    places = places_of(events, "ksm_merge_with_ksm_page")
    merges = infer_outcomes(select(events, places), places)
    return _by_appends(events, merges) if by_appends else merges


def nr_settled(events: Events, merges: Merges, by_appends: bool) -> int:
    """Count the attempts, from the first on, whose outcome no later event can change.

    Args:
        events: those that the outcomes were told from.
        merges: their outcomes.
        by_appends: as it was told to :func:`tell_outcomes`.
    """
    count = len(merges.events)
    if not count:
        return 0
    last = merges.events[-1]
    open_pair = bool(last["err"] == 0 and last["ksm_page"] == 0)
    if not open_pair and not (by_appends and not _has_gone_on(events, merges.places)):
        return count
    return count - 1 - int(_ends_pair(merges.events)[-1])


def _choose(merges: Merges, part: Recorded) -> Merges:
    assert part.selection is not None
    chosen = part.selection.chooses(merges.events)
    return Merges(
        events=select(merges.events, chosen),
        places=places_of(part.events, "ksm_merge_with_ksm_page"),
        appended=merges.appended[chosen],
        pairs=merges.pairs[chosen],
        undone=merges.undone[chosen],
        open=merges.open[chosen],
    )


def infer_outcomes(events: Events, places: Places) -> Merges:
    """Tell the outcome of every attempt by the attempts alone.

    The two steps of a pair follow each other. An allocation failure in stable_tree_insert, which
    undoes both pages, cannot be seen: such pages count as merged.
    """
    ok = events["err"] == 0
    first_step = events["ksm_page"] == 0
    begun = first_step & ok
    pairs = _ends_pair(events) & ok
    followed = _before(_ends_pair(events))
    kept = _before(pairs)
    return Merges(
        events=events,
        places=places,
        appended=(~first_step & ok) | (begun & kept),
        pairs=pairs,
        undone=begun & followed & ~kept,
        open=begun & ~followed,
    )


def _by_appends(events: Events, inferred: Merges) -> Merges:
    """Tell the outcomes by whether stable_tree_append is the next that is told of an rmap_item."""
    attempts = inferred.events
    ok = attempts["err"] == 0
    told = places_of(events, "ksm_merge_with_ksm_page", "stable_tree_append")
    follows = next_place(events, "rmap_item", inferred.places, told)
    is_append = events["kind"] == KIND_BY_NAME["stable_tree_append"].number
    appended = ok & np.r_[is_append, False][follows]
    ends_pair = _ends_pair(attempts)
    # ksmd appends before it goes on, so that only the recording's last attempt, and the first
    # step that led to it, can still be about to be appended.
    last = np.zeros(len(attempts), bool)
    last[-1:] = not _has_gone_on(events, inferred.places)
    last |= _before(last & ends_pair & ok)
    unknown = ok & ~appended & (last | inferred.open)
    return Merges(
        events=attempts,
        places=inferred.places,
        appended=appended,
        pairs=ends_pair & appended,
        undone=ok & ~appended & ~unknown,
        open=unknown,
    )


def _has_gone_on(events: Events, attempts: Places) -> bool:
    """Say whether ksmd has turned to something else after the last attempt."""
    after = events[int(attempts[-1]) + 1 :] if len(attempts) else events
    return bool((after["flags"][places_of(after, *_GOES_ON)] & EventFlag.IN_KSMD).any())


def _ends_pair(events: Events) -> Mask:
    """Say per attempt whether it is the second step of the one before."""
    begun = (events["ksm_page"] == 0) & (events["err"] == 0)
    ends_pair = np.zeros(len(events), bool)
    ends_pair[1:] = begun[:-1] & (events["ksm_page"][1:] != 0)
    ends_pair[1:] &= events["pfn"][1:] == events["pfn"][:-1]
    return ends_pair


def _before(mask: Mask) -> Mask:
    """Say of each whether it is true of the next one."""
    before = np.zeros(len(mask), bool)
    before[:-1] = mask[1:]
    return before


def find_zero_merges(recorded: Recorded) -> tuple[Events, Mask]:
    """Return the ksm_merge_one_page events, and which of them put the zero page in place."""
    events = of_kind(recorded.events, "ksm_merge_one_page")
    return events, events["err"] == 0


def df_rates(recorded: Recorded, most_rows: int = 60) -> pd.DataFrame:
    """Count what happened per span of time.

    The spans are equally long, 1, 2 or 5 times a power of ten, and at most ``most_rows``.

    Returns:
        The columns of :data:`ksmtrace.analysis.frames.FRAMES`; those of a kind that was not
        caught are NA throughout.
    """
    begin_ns, end_ns = recorded.begin_ns(), recorded.end_ns()
    span_ns = _span(max(end_ns - begin_ns, 1) / most_rows)
    edges = np.arange(begin_ns, end_ns + span_ns, span_ns, dtype=np.uint64)
    merges = find_merges(recorded)
    zero, zero_ok = find_zero_merges(recorded)
    events, attempts_ns = recorded.events, merges.events["ts_ns"]
    left = places_of(events, "remove_rmap_item_from_tree")
    stayed = (events["flags"][left] & EventFlag.NODE_FREED) == 0

    def times_of(kind: str) -> npt.NDArray[np.uint64]:
        times: npt.NDArray[np.uint64] = events["ts_ns"][places_of(events, kind)]
        return times

    chosen = {
        "attempts": ("ksm_merge_with_ksm_page", attempts_ns),
        "merged": ("ksm_merge_with_ksm_page", attempts_ns[merges.appended]),
        "failed": ("ksm_merge_with_ksm_page", attempts_ns[merges.failed | merges.undone]),
        "zero_merged": ("ksm_merge_one_page", zero["ts_ns"][zero_ok]),
        "nodes_freed": ("ksm_remove_ksm_page", times_of("ksm_remove_ksm_page")),
        "sharers_removed": ("ksm_remove_rmap_item", times_of("ksm_remove_rmap_item")),
        "left_singly": ("remove_rmap_item_from_tree", events["ts_ns"][left[stayed]]),
        "migrated": ("ksm_migrate_page", times_of("ksm_migrate_page")),
    }
    columns = {
        name: np.histogram(times, bins=edges)[0] if recorded.can_see(kind) else None
        for name, (kind, times) in chosen.items()
    }
    counts = pd.DataFrame(columns, index=range(len(edges) - 1)).astype("Int64")
    counts.insert(0, "begin_ns", edges[:-1].astype(np.int64))
    counts.insert(1, "span_ns", span_ns)
    return counts


def _span(least_ns: float) -> int:
    scale = 10 ** int(np.floor(np.log10(max(least_ns, 1))))
    return next(int(step * scale) for step in (1, 2, 5, 10) if step * scale >= least_ns)
