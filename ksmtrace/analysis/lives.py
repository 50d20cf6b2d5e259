"""Which life of which mm an event belongs to: an mm_struct's address is used again."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ksmtrace.analysis.recorded import Recorded, has_flag
from ksmtrace.events import KIND_BY_NAME, KINDS, EventFlag, Events

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
        events = with_mm(events)
        known = has_flag(events, EventFlag.PID_IS_OWNER)
        self.lives: list[Life] = []
        self._starts: dict[int, tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]] = {}
        for chosen in _by_mm(events):
            self._split(events[chosen], known[chosen])

    def _split(self, events: Events, known: npt.NDArray[np.bool_]) -> None:
        mm = int(events["mm"][0])
        marks = np.flatnonzero(np.isin(events["kind"], (_ENTER, _EXIT)))
        starts = [0]
        exited, owner = False, None
        for index in marks.tolist():
            pid = int(events["pid"][index]) if known[index] else None
            if events["kind"][index] == _ENTER:
                if index and (exited or (owner is not None and pid not in (None, owner))):
                    starts.append(index)
                exited = False
                owner = pid or owner
            else:
                exited = True
        first_row = len(self.lives)
        for begin, end in zip(starts, [*starts[1:], len(events)], strict=True):
            self.lives.append(_life(mm, events[begin:end], known[begin:end]))
        self._starts[mm] = (events["ts_ns"][starts], np.arange(first_row, len(self.lives)))

    def of(self, events: Events) -> npt.NDArray[np.int64]:
        """Return per event, each of them :func:`with_mm`, the index of its life; shape (n,)."""
        rows = np.empty(len(events), np.int64)
        for chosen in _by_mm(events):
            times, indexes = self._starts[int(events["mm"][chosen[0]])]
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
    known: Events = events[has_mm(events)]
    return known


def _by_mm(events: Events) -> Iterator[npt.NDArray[np.int64]]:
    """Yield per mm the indexes of its events, in order."""
    order = np.argsort(events["mm"], kind="stable")
    mms = events["mm"][order]
    yield from (part for part in np.split(order, np.flatnonzero(np.diff(mms)) + 1) if len(part))


def _life(mm: int, events: Events, known: npt.NDArray[np.bool_]) -> Life:
    # A fork registers the child's mm before the child has its pid: the owner that ksm_enter then
    # names is the parent (kernel/fork.c:copy_process).
    by_owner = known & (events["kind"] != _ENTER)
    pids = events["pid"][by_owner if by_owner.any() else known]
    if not len(pids):
        # All that is left of a process known by its exit alone: the task that ended its mm.
        pids = events["pid"][events["kind"] == _EXIT]
    entered = len(events) > 0 and events["kind"][0] == _ENTER
    counted = entered and events["flags"][0] & EventFlag.HAS_COUNTS
    exits = events["ts_ns"][events["kind"] == _EXIT]
    return Life(
        mm=mm,
        pid=int(pids[0]) if len(pids) else None,
        entered_ns=int(events["ts_ns"][0]) if entered else None,
        exited_ns=int(exits[0]) if len(exits) else None,
        entered_merging_pages=(
            (int(events["ksm_merging_pages"][0]) if counted else 0) if entered else None
        ),
    )
