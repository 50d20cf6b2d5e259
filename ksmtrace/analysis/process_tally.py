"""What processes have merged, broken and copied so far, taken in as events come, in bounded memory.

After the last event of a recording it is what :mod:`ksmtrace.analysis.processes` says; where it
keeps less, its docstring says so.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ksmtrace.analysis.cows import PAGE_MASK, REGRET_NS
from ksmtrace.analysis.merges import Merges
from ksmtrace.analysis.recorded import Recorded, has_flag
from ksmtrace.analysis.sharers import JOINS_AND_LEAVES
from ksmtrace.events import (
    KIND_BY_NAME,
    KINDS,
    CowCause,
    EventFlag,
    Events,
    concatenate,
    select,
)
from ksmtrace.stream import CounterSample, Header, ProcessSeen

Mask = npt.NDArray[np.bool_]
Keys = npt.NDArray[np.uint64]
Times = npt.NDArray[np.uint64]

_ENTER = KIND_BY_NAME["ksm_enter"].number
_EXIT = KIND_BY_NAME["ksm_exit"].number
_APPEND = KIND_BY_NAME["stable_tree_append"].number
_COPY = KIND_BY_NAME["do_wp_page"].number
_WITH_MM = np.array([kind.number for kind in KINDS if "mm" in kind.body])

_NO_MOVES = np.empty(0, np.int64)

KEPT_PROCESSES = 4096
_RATE_NS = 2_000_000_000
_JOINS_NS = 1_000_000_000
_SCATTER = np.uint64(0x9E37_79B9_7F4A_7C15)


@dataclass(frozen=True)
class LiveProcess:
    """One mm that KSM deals with, as :class:`ksmtrace.analysis.processes.Process` has it.

    Attributes:
        key: tells it from every other one of the stream.
        left_pages: sharers that left, as far as events tell: with their node, and singly. A
            node's last sharer has no event and is not among them.
        copies: copies of its KSM pages on write that no unmerge made; None: not observable.
        copies_took_ns, longest_copy_ns: how long these took together, and the longest.
        regretted_pages: those within :data:`ksmtrace.analysis.cows.REGRET_NS` of the page's
            merge; None: not observable.
        merged_per_s, left_per_s: since a sample of the counters two seconds ago or so.
        stat: all values of /proc/PID/ksm_stat in the last sample of it.
    """

    key: int
    pid: int | None
    mm: int | None
    comm: str | None
    cgroup: str | None
    guest: str | None
    entered_ns: int | None
    exited_ns: int | None
    merged_pages: int
    failed_attempts: int
    removed_pages: int
    left_singly_pages: int
    zero_merged_pages: int
    visited_pages: int
    copies: int | None
    copies_took_ns: int | None
    longest_copy_ns: int | None
    regretted_pages: int | None
    ksm_merging_pages: int | None
    ksm_rmap_items: int | None
    ksm_zero_pages: int | None
    counted_by: str | None
    merged_per_s: float
    left_per_s: float
    stat: Mapping[str, int | str | None]

    def __deepcopy__(self, memo: dict[int, object]) -> LiveProcess:
        """Return itself: it never changes."""
        return self

    @property
    def left_pages(self) -> int:
        """Sharers that left, as far as events tell."""
        return self.removed_pages + self.left_singly_pages

    @property
    def name(self) -> str:
        """What people call it: the guest's name, else comm, else its pid."""
        if self.guest:
            return f"guest {self.guest}"
        return self.comm or (f"pid {self.pid}" if self.pid else "unknown")


@dataclass
class _Life:
    key: int
    pid: int | None = None
    pid_is_sure: bool = False
    mm: int | None = None
    entered_ns: int | None = None
    exited_ns: int | None = None
    began: bool = False
    counts: tuple[int | None, int | None, int | None] = (None, None, None)
    counted_by: str | None = None
    counted_ns: int | None = None
    stat: Mapping[str, int | str | None] = field(default_factory=dict)
    is_told_twice: bool = False
    longest_copy_ns: int = 0
    shown: LiveProcess | None = None
    shown_of: tuple[object, ...] = ()


_TALLIED = (
    *("merged", "failed", "removed", "left", "zero", "visited"),
    *("copies", "copies_took_ns", "regretted"),
)
_MOVING = [_TALLIED.index(name) for name in ("merged", "zero", "removed", "left")]


class _Joins:
    """The pages that became sharers less than :data:`REGRET_NS` ago, in parts of about a second."""

    def __init__(self) -> None:
        self._parts: deque[tuple[Keys, Times]] = deque()  # each by key, then by time
        self._new: list[tuple[Keys, Times]] = []
        self._began_ns = 0

    def add(self, keys: Keys, ts_ns: Times) -> None:
        """Add pages, each of a key of its own, that joined at these times; shape (n,)."""
        if not len(keys):
            return
        last_ns = int(ts_ns.max())
        if self._new and last_ns > self._began_ns + _JOINS_NS:
            self._parts.append(_in_order(self._new))
            self._new = []
        if not self._new:
            self._began_ns = int(ts_ns.min())
        self._new.append((keys, ts_ns))
        while self._parts and int(self._parts[0][1].max()) + REGRET_NS < last_ns:
            self._parts.popleft()

    def recent(self, keys: Keys, ts_ns: Times) -> Mask:
        """Say per page whether it had joined at most :data:`REGRET_NS` before the time."""
        found = np.zeros(len(keys), bool)
        if self._new:
            self._new = [_in_order(self._new)]
        for known, joined_ns in (*self._parts, *self._new):
            first = np.searchsorted(known, keys, side="left")
            count = np.searchsorted(known, keys, side="right") - first
            for at in np.flatnonzero(count).tolist():
                times = joined_ns[first[at] : first[at] + count[at]]
                before = times <= ts_ns[at]
                found[at] |= bool((before & (times + np.uint64(REGRET_NS) >= ts_ns[at])).any())
        return found


def _in_order(parts: list[tuple[Keys, Times]]) -> tuple[Keys, Times]:
    keys, ts_ns = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    order = np.lexsort((ts_ns, keys))
    return keys[order], ts_ns[order]


class ProcessTally:
    """Follows the lives of mms, as the report does (:mod:`ksmtrace.analysis.processes`).

    Of more than :data:`KEPT_PROCESSES` those that left first are forgotten, and counted.
    """

    def __init__(self, header: Header) -> None:
        self.forgotten = 0
        seen = Recorded(header, concatenate([]))
        self._counts_zero_pages = seen.has_field("ksm_exit", "ksm_zero_pages")
        self._sees_copies = seen.can_see("do_wp_page")
        self._sees_regret = self._sees_copies and seen.can_see("ksm_merge_with_ksm_page")
        self._sees_joins = seen.can_see(*JOINS_AND_LEAVES)
        self._joins = _Joins()
        self._lives: list[_Life] = []
        self._next_key = 0
        self._counts = np.zeros((len(_TALLIED), 64), np.int64)
        self._of_mm: dict[int, int] = {}  # index in _lives of the mm's last life
        self._by_pid: dict[int, list[int]] = {}
        self._of_sample: dict[int, int] = {}  # by pid, of those that only samples tell of
        self._before: deque[tuple[int, int, npt.NDArray[np.int64]]] = deque()

    def take(self, events: Events, merges: Merges) -> None:
        """Take in the next events, and the attempts that were settled with them."""
        chosen = select(events, np.isin(events["kind"], _WITH_MM) & (events["mm"] != 0))
        if len(chosen):
            rows = self._rows_of(chosen)
            kinds = chosen["kind"]
            for name, kind in (
                ("removed", "ksm_remove_rmap_item"),
                ("visited", "cmp_and_merge_page"),
            ):
                self._add(name, rows[kinds == KIND_BY_NAME[kind].number])
            left = kinds == KIND_BY_NAME["remove_rmap_item_from_tree"].number
            self._add("left", rows[left & ~has_flag(chosen, EventFlag.NODE_FREED)])
            zero = kinds == KIND_BY_NAME["ksm_merge_one_page"].number
            self._add("zero", rows[zero & (chosen["err"] == 0)])
        self._add_merges(merges, merges.appended, merges.failed | merges.undone)
        if self._sees_copies:
            self._take_copies(chosen, rows if len(chosen) else _NO_MOVES, merges)
        if len(self._lives) > KEPT_PROCESSES:
            self._forget()

    def _add_merges(self, merges: Merges, appended: Mask, failed: Mask) -> None:
        known = merges.events["mm"] != 0
        if known.any():
            rows = self._rows_at(merges.events)
            self._add("merged", rows[known & appended])
            self._add("failed", rows[known & failed])

    def _take_copies(self, events: Events, rows: npt.NDArray[np.int64], merges: Merges) -> None:
        if self._sees_joins:
            self._take_joins(events, rows, events["kind"] == _APPEND)
        elif self._sees_regret:
            merged = select(merges.events, merges.appended & (merges.events["mm"] != 0))
            self._take_joins(merged, self._rows_at(merged), np.ones(len(merged), bool))
        chosen = (events["kind"] == _COPY) & (events["err"] == 0) & (rows >= 0)
        chosen &= events["cause"] != CowCause.UNMERGE
        if not chosen.any():
            return
        copies, rows = events[chosen], rows[chosen]
        self._add("copies", rows)
        np.add.at(
            self._counts[_TALLIED.index("copies_took_ns")],
            rows,
            copies["duration_ns"].astype(np.int64),
        )
        for row in np.unique(rows).tolist():
            life = self._lives[row]
            longest = int(copies["duration_ns"][rows == row].max())
            life.longest_copy_ns = max(life.longest_copy_ns, longest)
        recent = self._joins.recent(self._pages(copies, rows), copies["ts_ns"])
        self._add("regretted", rows[recent])

    def _take_joins(self, events: Events, rows: npt.NDArray[np.int64], joined: Mask) -> None:
        joined = joined & (rows >= 0) & has_flag(events, EventFlag.HAS_ADDRESS)
        self._joins.add(self._pages(events[joined], rows[joined]), events["ts_ns"][joined])

    def _pages(self, events: Events, rows: npt.NDArray[np.int64]) -> Keys:
        """Return per event, of a known life, a number that stands for the page."""
        lives, at = np.unique(rows, return_inverse=True)
        keys = np.array([self._lives[row].key for row in lives.tolist()], np.uint64)
        pages: Keys = (events["address"] & PAGE_MASK) + keys[at] * _SCATTER
        return pages

    def _add(self, name: str, rows: npt.NDArray[np.int64]) -> None:
        rows = rows[rows >= 0]
        if len(rows):
            counts = np.bincount(rows)
            self._counts[_TALLIED.index(name), : len(counts)] += counts

    def _rows_at(self, events: Events) -> npt.NDArray[np.int64]:
        """Return per event of the past the life that its mm had then; -1: unknown."""
        values, at = np.unique(events["mm"], return_inverse=True)
        rows = np.array([self._of_mm.get(mm, -1) for mm in values.tolist()], np.int64)
        found = rows[at]
        for index in np.flatnonzero(rows >= 0).tolist():
            since_ns = self._lives[rows[index]].entered_ns or 0
            late = (at == index) & (events["ts_ns"] < since_ns)
            if late.any():  # the address has been used again since
                lives = [n for n, life in enumerate(self._lives) if life.mm == int(values[index])]
                begins = [self._lives[row].entered_ns or 0 for row in lives]
                places = np.searchsorted(begins, events["ts_ns"][late], side="right") - 1
                found[late] = np.array(lives)[np.maximum(places, 0)]
        return found

    def _rows_of(self, events: Events) -> npt.NDArray[np.int64]:
        """Return per event the life that it belongs to; begins and ends lives on the way."""
        mms, firsts, at = np.unique(events["mm"], return_index=True, return_inverse=True)
        rows = np.array([self._of_mm.get(mm, -1) for mm in mms.tolist()], np.int64)
        for index in np.flatnonzero(rows < 0).tolist():
            rows[index] = self._begin(int(mms[index]))
        found = rows[at]
        owned = has_flag(events, EventFlag.PID_IS_OWNER)
        for place in np.flatnonzero(np.isin(events["kind"], (_ENTER, _EXIT))).tolist():
            index = int(at[place])
            before = int(rows[index])
            if events["kind"][place] == _ENTER:
                if place > firsts[index]:
                    self._find_owner(before, events, owned, at == index, found == before, place)
                row = self._enter(before, events[place], bool(owned[place]))
                if row != before:
                    rows[index] = row
                    found[place:][at[place:] == index] = row
            else:
                self._exit(before, events[place])
        self._find_owners(events, owned, found)
        return found

    def _find_owner(
        self, row: int, events: Events, owned: Mask, of_mm: Mask, of_life: Mask, until: int
    ) -> None:
        life = self._lives[row]
        sure = of_mm & of_life & owned & (events["kind"] != _ENTER)
        sure[until:] = False
        if not life.pid_is_sure and sure.any():
            self._name(row, int(events["pid"][np.argmax(sure)]), True)

    def _find_owners(self, events: Events, owned: Mask, found: npt.NDArray[np.int64]) -> None:
        rows, firsts = np.unique(
            np.where(owned & (events["kind"] != _ENTER), found, -1), return_index=True
        )
        for row, first in zip(rows.tolist(), firsts.tolist(), strict=True):
            if row >= 0 and not self._lives[row].pid_is_sure:
                self._name(row, int(events["pid"][first]), True)
        exits = np.flatnonzero(events["kind"] == _EXIT)
        for place in exits.tolist():
            row = int(found[place])
            if self._lives[row].pid is None:
                # All that is left of it: the task that ended its mm.
                self._name(row, int(events["pid"][place]), False)

    def _name(self, row: int, pid: int, sure: bool) -> None:
        life = self._lives[row]
        if life.pid is not None and row in self._by_pid.get(life.pid, []):
            self._by_pid[life.pid].remove(row)
        life.pid, life.pid_is_sure = pid, sure
        self._by_pid.setdefault(pid, []).append(row)
        if life.mm is None:
            self._of_sample[pid] = row
        elif pid in self._of_sample:
            self._join(pid, self._of_sample.pop(pid), life)

    def _join(self, pid: int, row: int, life: _Life) -> None:
        # A sample told of the process before events did, and only of its pid.
        of_sample = self._lives[row]
        if (of_sample.counted_ns or 0) < (life.entered_ns or 0):
            return
        of_sample.is_told_twice = True
        self._by_pid[pid].remove(row)
        life.stat = of_sample.stat
        if life.counted_by is None:
            life.counts = of_sample.counts
            life.counted_by, life.counted_ns = of_sample.counted_by, of_sample.counted_ns

    def _begin(self, mm: int | None, pid: int | None = None) -> int:
        row = len(self._lives)
        self._lives.append(_Life(self._next_key, mm=mm))
        self._next_key += 1
        if row >= self._counts.shape[1]:
            grown = np.zeros((len(_TALLIED), 2 * self._counts.shape[1]), np.int64)
            grown[:, :row] = self._counts[:, :row]
            self._counts = grown
        if mm is not None:
            self._of_mm[mm] = row
        if pid is not None:
            self._name(row, pid, False)
        return row

    def _enter(self, row: int, event: np.void, owned: bool) -> int:
        life = self._lives[row]
        pid = int(event["pid"]) if owned else None
        if life.began and (
            life.exited_ns is not None or (life.pid is not None and pid not in (None, life.pid))
        ):
            row = self._begin(int(event["mm"]))
            life = self._lives[row]
        if not life.began:
            life.entered_ns = int(event["ts_ns"])
        life.began = True
        life.exited_ns = None
        if life.pid is None and pid is not None:
            self._name(row, pid, False)
        return row

    def _exit(self, row: int, event: np.void) -> None:
        life = self._lives[row]
        life.began = True
        life.exited_ns = int(event["ts_ns"])
        if event["flags"] & EventFlag.HAS_COUNTS:
            zero = int(event["ksm_zero_pages"]) if self._counts_zero_pages else life.counts[2]
            life.counts = int(event["ksm_merging_pages"]), int(event["ksm_rmap_items"]), zero
            life.counted_by, life.counted_ns = "ksm_exit", life.exited_ns

    def take_sample(self, sample: CounterSample) -> None:
        """Take in the processes' own counts; after the events until then."""
        nr = len(self._lives)
        self._before.append((sample.begin_ns, nr, self._counts[_MOVING, :nr]))
        while len(self._before) > 1 and self._before[1][0] <= sample.begin_ns - _RATE_NS:
            self._before.popleft()
        for pid, stat in sample.processes.items():
            row = self._alive(pid, sample.begin_ns)
            if row is None:
                row = self._begin(None, pid)
            life = self._lives[row]
            life.stat = stat
            names = ("ksm_merging_pages", "ksm_rmap_items", "ksm_zero_pages")
            values = [value if isinstance(value := stat.get(name), int) else None for name in names]
            if any(value is not None for value in values) and life.counted_by != "ksm_exit":
                life.counts = values[0], values[1], values[2]
                life.counted_by, life.counted_ns = "sample", sample.begin_ns

    def _alive(self, pid: int, at_ns: int) -> int | None:
        for row in self._by_pid.get(pid, []):
            life = self._lives[row]
            begun = life.entered_ns is None or life.entered_ns <= at_ns
            if begun and not (life.exited_ns is not None and life.exited_ns < at_ns):
                return row
        return None

    def _forget(self) -> None:
        gone = [
            row
            for row, life in enumerate(self._lives)
            if life.exited_ns is not None or life.is_told_twice
        ]
        gone = gone[: max(len(self._lives) - KEPT_PROCESSES // 2, 0)]
        self.forgotten += sum(not self._lives[row].is_told_twice for row in gone)
        stays = np.ones(len(self._lives), bool)
        stays[gone] = False
        places = np.cumsum(stays) - 1
        self._counts = np.ascontiguousarray(self._counts[:, : len(stays)][:, stays])
        self._lives = [life for life, keep in zip(self._lives, stays, strict=True) if keep]
        self._of_mm = {mm: int(places[row]) for mm, row in self._of_mm.items() if stays[row]}
        by_pid = {
            pid: [int(places[row]) for row in rows if stays[row]]
            for pid, rows in self._by_pid.items()
        }
        self._by_pid = {pid: rows for pid, rows in by_pid.items() if rows}
        of_sample = self._of_sample.items()
        self._of_sample = {pid: int(places[row]) for pid, row in of_sample if stays[row]}
        self._before.clear()

    def processes(
        self, at_ns: int, rest: Merges, seen: Mapping[int, ProcessSeen]
    ) -> tuple[LiveProcess, ...]:
        """List them, with the attempts that are still held back.

        Args:
            at_ns: now, CLOCK_MONOTONIC.
            rest: the attempts that are held back.
            seen: who each pid is now.
        """
        nr = len(self._lives)
        counts = self._counts[:, :nr].copy()
        known = rest.events["mm"] != 0
        if known.any():
            rows = self._rows_at(rest.events)
            for name, mask in (
                ("merged", rest.appended),
                ("failed", rest.failed | rest.undone),
            ):
                chosen = rows[known & mask & (rows >= 0)]
                counts[_TALLIED.index(name)] += np.bincount(chosen, minlength=nr)
        merged_per_s, left_per_s = self._rates(at_ns, counts)
        return tuple(
            self._process(life, column, merged_per_s[row], left_per_s[row], seen)
            for row, (life, column) in enumerate(zip(self._lives, counts.T.tolist(), strict=True))
            if not life.is_told_twice
        )

    def _process(
        self,
        life: _Life,
        counts: list[int],
        merged_per_s: float,
        left_per_s: float,
        seen: Mapping[int, ProcessSeen],
    ) -> LiveProcess:
        # One that has not changed stays the same object: then nothing of it is told again.
        who = seen.get(life.pid) if life.pid else None
        times = (life.entered_ns, life.exited_ns)
        of = (life.pid, times, life.counts, counts, merged_per_s, left_per_s, who, id(life.stat))
        if life.shown is not None and life.shown_of == of:
            return life.shown
        merged, failed, removed, left, zero, visited, copies, copies_took_ns, regretted = counts
        merging, rmap_items, zero_pages = life.counts
        life.shown_of = of
        life.shown = LiveProcess(
            key=life.key,
            pid=life.pid,
            mm=life.mm,
            comm=who.comm if who else None,
            cgroup=who.cgroup if who else None,
            guest=who.guest if who else None,
            entered_ns=life.entered_ns,
            exited_ns=life.exited_ns,
            merged_pages=merged,
            failed_attempts=failed,
            removed_pages=removed,
            left_singly_pages=left,
            zero_merged_pages=zero,
            visited_pages=visited,
            copies=copies if self._sees_copies else None,
            copies_took_ns=copies_took_ns if self._sees_copies else None,
            longest_copy_ns=life.longest_copy_ns if self._sees_copies else None,
            regretted_pages=regretted if self._sees_regret else None,
            ksm_merging_pages=merging,
            ksm_rmap_items=rmap_items,
            ksm_zero_pages=zero_pages,
            counted_by=life.counted_by,
            merged_per_s=merged_per_s,
            left_per_s=left_per_s,
            stat=life.stat,
        )
        return life.shown

    def _rates(self, at_ns: int, counts: npt.NDArray[np.int64]) -> tuple[list[float], list[float]]:
        moved = counts[_MOVING]
        per_s = np.zeros(moved.shape)
        older = [one for one in self._before if one[0] <= at_ns - _RATE_NS]
        if self._before:
            then_ns, nr, before = older[-1] if older else self._before[0]
            per_s[:] = moved
            per_s[:, :nr] -= before
            per_s *= 1e9 / max(at_ns - then_ns, _RATE_NS // 2)
        return (per_s[0] + per_s[1]).tolist(), (per_s[2] + per_s[3]).tolist()
