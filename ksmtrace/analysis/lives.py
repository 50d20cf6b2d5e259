"""Which life of which mm an event belongs to: an mm_struct's address is used again."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ksmtrace.analysis.addresses import Places
from ksmtrace.analysis.recorded import Recorded
from ksmtrace.events import KIND_BY_NAME, KINDS, EventFlag, Events, select

_ENTER = KIND_BY_NAME["ksm_enter"].number
_EXIT = KIND_BY_NAME["ksm_exit"].number
_WITH_MM = np.array([kind.number for kind in KINDS if "mm" in kind.body])


@dataclass(frozen=True)
class Life:
    """One mm, from its first event to its last.

    Attributes:
        mm: address of the mm_struct.
        pid: its owner's tgid, None where no event tells.
        entered_ns, exited_ns: when it came on ksmd's list and left it, None where before or
            after the recording, or not visible.
        entered_merging_pages: mm->ksm_merging_pages as it entered; None where it had before.
    """

    mm: int
    pid: int | None
    entered_ns: int | None
    exited_ns: int | None
    entered_merging_pages: int | None


class Lives:
    """All lives of a recording.

    A life ends with ksm_exit, and ksmd still removes its rmap_items after that; the next
    ksm_enter at the address begins another. An mm that ksmd dropped by itself has no ksm_exit,
    so an enter for another owner begins a life as well.

    Attributes:
        lives: by mm, and in order of time.
    """

    def __init__(self, events: Events) -> None:
        places = np.flatnonzero(has_mm(events))
        mms = events["mm"][places]
        self.lives: list[Life] = []
        self._starts: dict[int, tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]] = {}
        for chosen in _by_value(mms):
            self._split(int(mms[chosen[0]]), events, places[chosen])

    def _split(self, mm: int, events: Events, places: Places) -> None:
        kinds = events["kind"][places]
        starts = [0]
        exited, owner = False, None
        for index in np.flatnonzero((kinds == _ENTER) | (kinds == _EXIT)).tolist():
            event = events[places[index]]
            pid = int(event["pid"]) if event["flags"] & EventFlag.PID_IS_OWNER else None
            if kinds[index] == _ENTER:
                if index and (exited or (owner is not None and pid not in (None, owner))):
                    starts.append(index)
                exited = False
                owner = pid or owner
            else:
                exited = True
        first_row = len(self.lives)
        for begin, end in zip(starts, [*starts[1:], len(places)], strict=True):
            self.lives.append(_life(mm, events, places[begin:end]))
        self._starts[mm] = (
            events["ts_ns"][places[starts]],
            np.arange(first_row, len(self.lives)),
        )

    def of(self, events: Events) -> npt.NDArray[np.int64]:
        """Return per event, each of them :func:`with_mm`, the index of its life; shape (n,)."""
        rows = np.empty(len(events), np.int64)
        mms = events["mm"]
        for chosen in _by_value(mms):
            times, indexes = self._starts[int(mms[chosen[0]])]
            at = np.searchsorted(times, events["ts_ns"][chosen], side="right") - 1
            rows[chosen] = indexes[np.maximum(at, 0)]
        return rows


# Several tables of one report need it.
@functools.lru_cache(maxsize=1)
def find_lives(whole: Recorded) -> Lives:
    """Find the lives in a recording, of which nothing is left out."""
    return Lives(whole.events)


def has_mm(events: Events) -> npt.NDArray[np.bool_]:
    """Say per event whether it tells of an mm, and which one could be read."""
    known: npt.NDArray[np.bool_] = np.isin(events["kind"], _WITH_MM) & (events["mm"] != 0)
    return known


def with_mm(events: Events) -> Events:
    """Leave out the events that tell of no mm, or of one that could not be read."""
    known = has_mm(events)
    return events if known.all() else select(events, known)


def _by_value(values: npt.NDArray[np.uint64]) -> Iterator[npt.NDArray[np.int64]]:
    """Yield per value its indexes, in order."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    yield from (part for part in np.split(order, np.flatnonzero(np.diff(ordered)) + 1) if len(part))


def _life(mm: int, events: Events, places: Places) -> Life:
    kinds, pids = events["kind"][places], events["pid"][places]
    known = (events["flags"][places] & EventFlag.PID_IS_OWNER) != 0
    # A fork registers the child's mm before the child has its pid: the owner that ksm_enter then
    # names is the parent (kernel/fork.c:copy_process).
    by_owner = known & (kinds != _ENTER)
    exits = kinds == _EXIT
    # The last are all that is left of a process known by its exit alone: the task that ended its
    # mm.
    owners = next((pids[mask] for mask in (by_owner, known, exits) if mask.any()), pids[:0])
    first = events[places[0]]
    entered = first["kind"] == _ENTER
    counted = entered and first["flags"] & EventFlag.HAS_COUNTS
    exited = places[exits]
    return Life(
        mm=mm,
        pid=int(owners[0]) if len(owners) else None,
        entered_ns=int(first["ts_ns"]) if entered else None,
        exited_ns=int(events["ts_ns"][exited[0]]) if len(exited) else None,
        entered_merging_pages=(
            (int(first["ksm_merging_pages"]) if counted else 0) if entered else None
        ),
    )
