"""Gathers a whole stream in memory: where every analysis begins."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ksmtrace.capture.hooks import ABSENT
from ksmtrace.events import (
    KIND_BY_NAME,
    KINDS,
    NR_KINDS,
    EventFlag,
    Events,
    check_sorting,
    no_events,
    put,
)
from ksmtrace.stream import (
    Batch,
    CounterSample,
    Header,
    Losses,
    ProcessSeen,
    StackSeen,
    Stream,
    Trailer,
    Witnessed,
)

PARTS = 3
"""How many an analysis is asked about for one report: the whole, a span, some processes of it."""

EVER_NS = np.iinfo(np.int64).max
"""A time after all others."""


@dataclass(frozen=True, eq=False)
class Selection:
    """What a :class:`Recorded` is restricted to; :mod:`ksmtrace.analysis.selection` makes it.

    Attributes:
        of: what it was taken of: the whole recording, or the span of which some processes were
            chosen.
        begin_ns, end_ns: the span, CLOCK_MONOTONIC.
        low_ns, high_ns: what is in it happened from the one to before the other; 0 and
            :data:`EVER_NS` where it reaches to the recording's own begin and end.
        pids: the processes, None where all.
        tallies_begin_ns: when the tally was read that the span's tallies count from.
        lost: per kind, at most how many events of the span are lost.
        why_incomplete: why it does not hold everything that happened in the span.
        chooses: says per event, shape (n,), whether it belongs to the selection.
    """

    of: Recorded
    begin_ns: int
    end_ns: int
    low_ns: int
    high_ns: int
    pids: frozenset[int] | None
    tallies_begin_ns: int
    lost: Mapping[str, int]
    why_incomplete: list[str]
    chooses: Callable[[Events], npt.NDArray[np.bool_]]

    def holds(self, ts_ns: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Say per time whether it is in the span."""
        times = np.asarray(ts_ns)
        held: npt.NDArray[np.bool_] = (self.low_ns <= times) & (times < self.high_ns)
        return held


@dataclass(eq=False)
class Recorded:
    """One stream, gathered; or a part of it.

    Attributes:
        header: what was true before the first event.
        events: all events in the ring's order, shape (n,) of EVENT_DTYPE.
        samples: counter samples in order of time.
        seen: process identities by pid, each list in order of time.
        stacks: by number, the frames of the kernel stacks that events name.
        losses: kernel-side tallies in order of time.
        witnessed: readings of the kernel's own state in order of time.
        trailer: how it ended; None where it was cut off.
        cut_off: why it is believed to be cut off; None where it is not.
        selection: what it is restricted to; None where it is the whole stream.
    """

    header: Header
    events: Events
    samples: list[CounterSample] = field(default_factory=list)
    seen: dict[int, list[ProcessSeen]] = field(default_factory=dict)
    stacks: dict[int, list[str]] = field(default_factory=dict)
    losses: list[Losses] = field(default_factory=list)
    witnessed: list[Witnessed] = field(default_factory=list)
    trailer: Trailer | None = None
    cut_off: str | None = None
    selection: Selection | None = None

    def whole(self) -> Recorded:
        """Return the whole stream, of which this may be a part."""
        return self.selection.of.whole() if self.selection else self

    def of_all(self) -> Recorded:
        """Return the same span with all processes."""
        chosen = self.selection is not None and self.selection.pids is not None
        return self.selection.of if self.selection and chosen else self

    def count(self, name: str) -> int:
        """Count the events of one kind."""
        return int(np.count_nonzero(self.events["kind"] == KIND_BY_NAME[name].number))

    def counts(self) -> dict[str, int]:
        """Count the events of every kind that the recording's plan knows.

        A kind that is younger than the recording is left out.
        """
        counts = np.bincount(self.events["kind"], minlength=NR_KINDS)
        known = {entry["event"] for entry in self.header.plan}
        return {kind.name: int(counts[kind.number]) for kind in KINDS if kind.name in known}

    def lost(self) -> dict[str, int]:
        """Count per kind the events that found the ring full, as far as the stream tells.

        Of a span at most so many: a loss is dated by the tallies before and after it.
        """
        if self.selection is not None:
            return dict(self.selection.lost)
        return dict(self.losses[-1].dropped) if self.losses else {}

    def left_out(self, name: str) -> int:
        """Count how often the kernel left out a program that a kind is caught with."""
        entry = next((e for e in self.header.plan if e["event"] == name), None)
        if entry is None or not self.losses:
            return 0
        functions = {_function(target) for target in (entry["target"] or "").split(", ")}
        missed = self.whole().losses[-1].missed
        return sum(times for where, times in missed.items() if _function(where) in functions)

    def rung(self, name: str) -> str:
        """Return how a kind was caught (:data:`ksmtrace.capture.hooks.RUNGS`).

        A kind that is younger than the recording is absent from it.
        """
        return next((e["rung"] for e in self.header.plan if e["event"] == name), ABSENT)

    def can_see(self, *names: str) -> bool:
        """Say whether the plan caught all the named kinds on that kernel."""
        return all(self.rung(name) != ABSENT for name in names)

    def has_field(self, name: str, field_name: str) -> bool:
        """Say whether the events of a kind were given that field on that kernel."""
        entry = next((e for e in self.header.plan if e["event"] == name), None)
        return entry is not None and field_name not in entry.get("missing_fields", {})

    def only_counted(self, name: str) -> bool:
        """Say whether a kind was counted and its events were not asked for (--every-page)."""
        if not KIND_BY_NAME[name].every_page or self.rung(name) == ABSENT:
            return False
        return not self.header.settings.get("every_page") and not self.count(name)

    def tallies_after(self, sample: CounterSample) -> Losses | None:
        """Return the first reading of the kernel-side tallies after a sample, None without one."""
        return next((losses for losses in self.losses if losses.ts_ns >= sample.end_ns), None)

    def why_incomplete(self) -> list[str]:
        """List why not everything that happened, then, is here; empty if it is."""
        if self.selection is not None:
            return self.selection.why_incomplete
        reasons = []
        if self.cut_off:
            reasons.append(self.cut_off)
        lost = {name: count for name, count in self.lost().items() if count}
        if lost:
            kinds = ", ".join(f"{count} {name}" for name, count in lost.items())
            total = sum(lost.values())
            reasons.append(f"{total} events found the ring full and are lost ({kinds})")
        return reasons + self.why_not_all()

    def why_not_all(self) -> list[str]:
        """List what else, at no known time, kept a whole stream from holding everything."""
        reasons: list[str] = []
        if self.trailer is not None:
            produced = self.losses[-1].produced if self.losses else {}
            missing = sum(produced.values()) - sum(self.lost().values()) - len(self.events)
            if produced and missing:
                reasons.append(f"{missing} events are unaccounted for")
            if self.trailer.recorded != self.counts():
                reasons.append("the events in the file are not those the trailer counts")
            reasons += self.trailer.notices
        return reasons

    def begin_ns(self) -> int:
        """Return when the stream, or the span, begins, CLOCK_MONOTONIC."""
        return self.selection.begin_ns if self.selection else self.header.started_ns

    def end_ns(self) -> int:
        """Return the last time that the stream tells of, or the span's end, CLOCK_MONOTONIC."""
        if self.selection is not None:
            return self.selection.end_ns
        last = [self.header.started_ns]
        if len(self.events):
            last.append(int(self.events["ts_ns"].max()))
        last += [sample.end_ns for sample in self.samples[-1:]]
        last += [losses.ts_ns for losses in self.losses[-1:]]
        if self.trailer is not None:
            last.append(self.trailer.ts_ns)
        return max(last)

    def ends_at_rest(self) -> bool:
        """Say whether the stream goes on until nothing was observed any more.

        One that was cut off does not, nor one that was taken out of another
        (:mod:`ksmtrace.recording.excerpt`).
        """
        whole = self.whole()
        return whole.trailer is not None and "excerpt_after_ns" not in whole.header.settings

    def settled_ns(self) -> int:
        """Return until when all events that happened are in the stream, CLOCK_MONOTONIC.

        A counter sample comes before events that happened before it and were still in the ring.
        Where the stream ends in between, that is only so for samples before those tallies of
        which all events are there.
        """
        whole = self.whole()
        if self.ends_at_rest():
            return EVER_NS
        # The last tallies of an excerpt were made to fit its events.
        read = whole.losses if whole.trailer is None else whole.losses[:-1]
        return max(
            (
                one.ts_ns
                for one in read
                if sum(one.produced.values()) - sum(one.dropped.values()) <= len(whole.events)
            ),
            default=whole.header.started_ns,
        )

    def settled_samples(self) -> list[CounterSample]:
        """Return the samples before which no event is missing: see :meth:`settled_ns`."""
        settled_ns = self.settled_ns()
        return [sample for sample in self.samples if sample.end_ns <= settled_ns]

    def identity(self, pid: int, ts_ns: int) -> ProcessSeen | None:
        """Return who a pid was at a time; None where nobody knows."""
        known = self.seen.get(pid, [])
        before = [seen for seen in known if seen.ts_ns <= ts_ns]
        # An identity read a moment after the event is still the same process's.
        return before[-1] if before else known[0] if known else None

    def name_of(self, pid: int, ts_ns: int) -> str | None:
        """Return the comm that a pid had at a time; None where nobody knows."""
        if pid and pid == self.header.facts.get("ksmd_pid"):
            return "ksmd"
        seen = self.identity(pid, ts_ns)
        return seen.comm if seen else None


def _function(target: str) -> str:
    # Of "fentry/fexit:do_wp_page" or "kprobe:ksm_scan_thread+0x374".
    return target.partition(":")[2].partition("+")[0]


def gather(stream: Stream) -> Recorded:
    """Read a stream to its end.

    Raises:
        CannotRun: this CPU does not sort.
    """
    check_sorting()
    recorded = Recorded(stream.header, no_events())
    events, taken = no_events(), 0
    for item in stream:
        if isinstance(item, Batch):
            # Grown in place: batches that are joined at the end are in memory twice.
            end = taken + len(item.events)
            if end > len(events):
                events.resize(max(end, len(events) * 9 // 8), refcheck=False)
            put(events, taken, item.events)
            taken = end
        elif isinstance(item, CounterSample):
            recorded.samples.append(item)
        elif isinstance(item, ProcessSeen):
            recorded.seen.setdefault(item.pid, []).append(item)
        elif isinstance(item, StackSeen):
            recorded.stacks[item.number] = item.frames
        elif isinstance(item, Losses):
            recorded.losses.append(item)
        elif isinstance(item, Witnessed):
            recorded.witnessed.append(item)
        else:
            recorded.trailer = item
    events.resize(taken, refcheck=False)
    recorded.events = events
    if recorded.trailer is None:
        recorded.cut_off = getattr(stream, "cut_off", None) or "the stream has no trailer"
    return recorded


def has_flag(events: Events, flag: EventFlag) -> npt.NDArray[np.bool_]:
    """Say per event whether it has the flag."""
    marked: npt.NDArray[np.bool_] = (events["flags"] & flag) != 0
    return marked
