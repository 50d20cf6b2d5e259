"""The report's analyses in a form that takes events as they come, in bounded memory.

What a tally says after the last event of a recording is what the report says of it; where it keeps
less than the report does, its docstring says so.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ksmtrace.analysis.books import (
    ONE_BY_ONE,
    SKEW_NS,
    Entry,
    Moves,
    Rule,
    Said,
    enter,
    iter_said,
    make_rule,
)
from ksmtrace.analysis.merges import Merges, nr_settled, tell_outcomes
from ksmtrace.analysis.recorded import Recorded, has_flag
from ksmtrace.events import (
    KIND_BY_NAME,
    EventFlag,
    Events,
    concatenate,
    of_kind,
    select,
)
from ksmtrace.stream import CounterSample, Header, Losses

_START = KIND_BY_NAME["ksm_start_scan"].number
_BREAK = KIND_BY_NAME["break_ksm"].number
_UNFINISHED = (
    *("ksm_merge_with_ksm_page", "stable_tree_append"),
    *("break_ksm", "cmp_and_merge_page", "ksm_merge_one_page", "ksm_start_scan", "ksm_stop_scan"),
)

_NONE = np.empty(0, np.uint64)
_NO_MOVES = np.empty(0, np.int64)

KEPT_PASSES = 512
_MARKS_KEPT = 256


@dataclass(frozen=True)
class MergeFigures:
    """What became of the attempts so far (see :class:`ksmtrace.analysis.merges.Merges`)."""

    attempts: int
    succeeded: int
    failed: Mapping[str, int]
    new_stable_nodes: int


class MergeTally:
    """Counts outcomes; the last attempt is held back until nothing can change its outcome."""

    def __init__(self) -> None:
        self._attempts = self._succeeded = self._pairs = 0
        self._failed: Counter[str] = Counter()
        self._held = concatenate([])

    def take(self, events: Events, by_appends: bool) -> Merges:
        """Take in the next events; returns the attempts whose outcome is now settled."""
        told = of_kind(events, *_UNFINISHED)
        # Other tasks' breaks say nothing of ksmd's attempt.
        told = select(told, has_flag(told, EventFlag.IN_KSMD) | (told["kind"] != _BREAK))
        events = concatenate([self._held, told]) if len(self._held) else told
        merges = tell_outcomes(events, by_appends)
        count = nr_settled(events, merges, by_appends)
        self._held = concatenate([])
        if count < len(merges.events):
            self._held = events[int(merges.places[count]) :].copy()
        settled = Merges(
            merges.events[:count],
            merges.places[:count],
            *(mask[:count] for mask in (merges.appended, merges.pairs, merges.undone, merges.open)),
        )
        self._count(settled)
        return settled

    def _count(self, merges: Merges) -> None:
        self._attempts += len(merges.events)
        self._succeeded += int(merges.appended.sum())
        self._pairs += int(merges.pairs.sum())
        self._failed.update(merges.by_reason())

    def rest(self, by_appends: bool) -> Merges:
        """Return the attempts that are held back, as far as their outcome is known."""
        return tell_outcomes(self._held, by_appends)

    def figures(self, by_appends: bool) -> MergeFigures:
        """Count all attempts, with those that are held back."""
        rest = self.rest(by_appends)
        return MergeFigures(
            self._attempts + len(rest.events),
            self._succeeded + int(rest.appended.sum()),
            dict(self._failed + Counter(rest.by_reason())),
            self._pairs + int(rest.pairs.sum()),
        )


@dataclass
class Pass:
    """One pass, as in :func:`ksmtrace.analysis.passes.df_passes`; None where that has NA."""

    seq: int
    begin_ns: int | None = None
    end_ns: int | None = None
    rmap_entries: int | None = None
    cpu_ns: int | None = None
    run_delay_ns: int | None = None
    merged: int = 0

    @property
    def duration_ns(self) -> int | None:
        """How long it took, None where it was not seen whole."""
        if self.begin_ns is None or self.end_ns is None:
            return None
        return self.end_ns - self.begin_ns


class PassTally:
    """Follows the passes; keeps the last :data:`KEPT_PASSES`, and counts all."""

    def __init__(self) -> None:
        self.completed = 0
        self.cpu_ns = 0
        self.rmap_entries = 0
        self.longest_ns: int | None = None
        self._passes: deque[Pass] = deque(maxlen=KEPT_PASSES)
        self._begun: np.void | None = None
        self._unassigned = 0

    def take(self, events: Events) -> None:
        """Take in the next events."""
        for mark in of_kind(events, "ksm_start_scan", "ksm_stop_scan"):
            if mark["kind"] == _START:
                self._begin(mark)
            else:
                self._end(mark)

    def _begin(self, mark: np.void) -> None:
        self._passes.append(Pass(int(mark["seq"]), begin_ns=int(mark["ts_ns"])))
        self._begun = mark
        self._unassigned = 0

    def _end(self, mark: np.void) -> None:
        begun = self._begun
        self._begun = None
        if begun is None or begun["seq"] != mark["seq"]:
            self._passes.append(Pass(int(mark["seq"]), merged=self._unassigned))
        self._unassigned = 0
        one = self._passes[-1]
        one.end_ns = int(mark["ts_ns"])
        one.rmap_entries = int(mark["rmap_entries"])
        if one.begin_ns is None or begun is None:
            return
        self.completed += 1
        self.longest_ns = max(self.longest_ns or 0, one.end_ns - one.begin_ns)
        self.rmap_entries += one.rmap_entries
        if begun["flags"] & mark["flags"] & EventFlag.HAS_COUNTS:
            one.cpu_ns = int(mark["ksmd_cpu_ns"]) - int(begun["ksmd_cpu_ns"])
            one.run_delay_ns = int(mark["ksmd_run_delay_ns"]) - int(begun["ksmd_run_delay_ns"])
            self.cpu_ns += one.cpu_ns

    def add_merged(self, ts_ns: npt.NDArray[np.uint64]) -> None:
        """Count merged pages to the passes in which they merged; after the events until then."""
        left = len(ts_ns)
        until_ns: int | None = None
        for number, one in enumerate(reversed(self._passes)):
            if not left:
                return
            end_ns = until_ns if one.end_ns is None else one.end_ns
            begin_ns = one.begin_ns
            if begin_ns is None:
                before = self._passes[-number - 2].end_ns if number + 1 < len(self._passes) else 0
                begin_ns = before or 0
            within = ts_ns >= begin_ns
            if number == 0 and end_ns is not None:
                self._unassigned += int(np.count_nonzero(ts_ns >= end_ns))
            if end_ns is not None:
                within &= ts_ns < end_ns
            one.merged += int(np.count_nonzero(within))
            ts_ns = ts_ns[ts_ns < begin_ns]
            left = len(ts_ns)
            until_ns = begin_ns
        if not self._passes:
            self._unassigned += left

    def last(self, most: int = KEPT_PASSES) -> tuple[Pass, ...]:
        """Return the last passes, oldest first; the last one may be under way."""
        passes = list(self._passes)[-most:]
        return tuple(replace(one) for one in passes)

    def durations(self) -> npt.NDArray[np.int64]:
        """Return how long the kept passes took that were seen whole, shape (n,)."""
        known = [ns for one in self._passes if (ns := one.duration_ns) is not None]
        return np.array(known, np.int64)


@dataclass
class _Account:
    # What the events say of one counter: the sum up to a time, and the moves since.
    said: Said
    say: int = 0
    near_first: int = 0
    pending: tuple[Moves, ...] = ()


class BooksTally:
    """The counters beside what the events say, as :func:`ksmtrace.analysis.books.balance`."""

    def __init__(self, header: Header) -> None:
        self._header = header
        nothing = Recorded(header, concatenate([]))
        self._accounts = {
            said.counter: _Account(said)
            for said in iter_said(nothing, tell_outcomes(nothing.events, False))
        }
        self._told_ns: list[npt.NDArray[np.uint64]] = []
        self._last_told_ns = 0
        self._first: CounterSample | None = None
        self._samples: list[CounterSample] = []
        self._losses: list[Losses] = []
        self._first_marks: Events = concatenate([])
        self._marks: Events = concatenate([])
        self._from_ns = 0
        self.entries: tuple[Entry, ...] = ()
        self.skipped = 0
        """Events that were not taken in: with any, what the events say is unknown."""

    def take(self, recorded: Recorded, said: Iterator[Said]) -> None:
        """Take in what the next events say.

        Args:
            recorded: the events.
            said: what :func:`ksmtrace.analysis.books.iter_said` makes of them.
        """
        for one in said:
            if len(one.moves.ts_ns):
                self._accounts[one.counter].pending += (one.moves,)
        told = of_kind(recorded.events, *ONE_BY_ONE)["ts_ns"]
        if len(told):
            self._told_ns.append(told)
        marks = of_kind(recorded.events, "ksm_start_scan", "ksm_stop_scan")
        if len(marks):
            if len(self._losses) < 2:
                self._first_marks = concatenate([self._first_marks, marks])[:_MARKS_KEPT]
            self._marks = concatenate([self._marks, marks])[-_MARKS_KEPT:]

    def take_losses(self, losses: Losses) -> None:
        """Take in a reading of the kernel-side tallies."""
        # The first two and the last two are asked for.
        self._losses = [*self._losses[:2], *self._losses[2:][-2:], losses]

    def settle(self, sample: CounterSample) -> None:
        """Compare with a sample, once the events until a moment after it have been taken in."""
        if self._first is None:
            self._first = sample
        # The first two and the last two are asked for.
        self._samples = [*self._samples[:2], *self._samples[2:][-1:], sample]
        window = self._unsure_window(sample)
        first = sample is self._first
        from_ns = sample.end_ns if first else self._from_ns
        rules: list[Rule] = []
        for account in self._accounts.values():
            ts_ns = np.concatenate([moves.ts_ns for moves in account.pending] or [_NONE])
            by = np.concatenate([moves.by for moves in account.pending] or [_NO_MOVES])
            since_ns = np.concatenate([moves.since_ns for moves in account.pending] or [_NONE])
            near = int(np.abs(by[(ts_ns >= window[0]) & (since_ns <= window[1])]).sum())
            if first:
                account.near_first = near
            else:
                account.say += int(by[(ts_ns >= from_ns) & (ts_ns <= sample.begin_ns)].sum())
                rules.append(
                    make_rule(account.said, sample, account.say, account.near_first + near)
                )
            keep = ts_ns >= min(window[0], sample.begin_ns)
            account.pending = (Moves(ts_ns[keep], by[keep], since_ns[keep]),)
        self._from_ns = sample.end_ns if first else sample.begin_ns + 1
        if not first:
            self.entries = tuple(enter(self._shown(), rules))

    def _unsure_window(self, sample: CounterSample) -> tuple[int, int]:
        begin_ns = sample.begin_ns - SKEW_NS
        told = np.concatenate(self._told_ns or [_NONE])
        before = told[told < sample.begin_ns]
        if len(before):
            self._last_told_ns = max(self._last_told_ns, int(before.max()))
        self._told_ns = [told[told >= sample.begin_ns]]
        if self._last_told_ns:
            begin_ns = min(begin_ns, self._last_told_ns)
        return begin_ns, sample.end_ns + SKEW_NS

    def _shown(self) -> Recorded:
        marks = self._marks
        if len(self._first_marks) and len(marks):
            older = self._first_marks[self._first_marks["ts_ns"] < marks["ts_ns"][0]]
            marks = concatenate([older, marks])
        losses = list(self._losses)
        if self.skipped and losses:
            dropped = {**losses[-1].dropped, "": self.skipped}
            losses[-1] = replace(losses[-1], dropped=dropped)
        return Recorded(self._header, marks, samples=self._samples, losses=losses)
