"""Gathers a whole stream in memory: where every analysis begins."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ksmtrace.capture.hooks import ABSENT
from ksmtrace.events import KIND_BY_NAME, KINDS, NR_KINDS, EventFlag, Events, concatenate
from ksmtrace.stream import (
    Batch,
    CounterSample,
    Header,
    Losses,
    ProcessSeen,
    Stream,
    Trailer,
    Witnessed,
)


@dataclass(eq=False)
class Recorded:
    """One stream, gathered.

    Attributes:
        header: what was true before the first event.
        events: all events in the ring's order, shape (n,) of EVENT_DTYPE.
        samples: counter samples in order of time.
        seen: process identities by pid, each list in order of time.
        losses: kernel-side tallies in order of time.
        witnessed: readings of the kernel's own state in order of time.
        trailer: how it ended; None where it was cut off.
        cut_off: why it is believed to be cut off; None where it is not.
    """

    header: Header
    events: Events
    samples: list[CounterSample] = field(default_factory=list)
    seen: dict[int, list[ProcessSeen]] = field(default_factory=dict)
    losses: list[Losses] = field(default_factory=list)
    witnessed: list[Witnessed] = field(default_factory=list)
    trailer: Trailer | None = None
    cut_off: str | None = None

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
        """Count per kind the events that found the ring full, as far as the stream tells."""
        return dict(self.losses[-1].dropped) if self.losses else {}

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
        """List why the recording does not hold everything that happened; empty if it does."""
        reasons = []
        if self.cut_off:
            reasons.append(f"it was cut off: {self.cut_off}")
        lost = {name: count for name, count in self.lost().items() if count}
        if lost:
            kinds = ", ".join(f"{count} {name}" for name, count in lost.items())
            total = sum(lost.values())
            reasons.append(f"{total} events found the ring full and are lost ({kinds})")
        if self.trailer is not None:
            produced = self.losses[-1].produced if self.losses else {}
            missing = sum(produced.values()) - sum(lost.values()) - len(self.events)
            if produced and missing:
                reasons.append(f"{missing} events are unaccounted for")
            if self.trailer.recorded != self.counts():
                reasons.append("the events in the file are not those the trailer counts")
            reasons += self.trailer.notices
        return reasons

    def end_ns(self) -> int:
        """Return the last time that the stream tells of, CLOCK_MONOTONIC."""
        last = [self.header.started_ns]
        if len(self.events):
            last.append(int(self.events["ts_ns"].max()))
        last += [sample.end_ns for sample in self.samples[-1:]]
        if self.trailer is not None:
            last.append(self.trailer.ts_ns)
        return max(last)

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


def gather(stream: Stream) -> Recorded:
    """Read a stream to its end.

    Raises:
        RecordingError: a block of a recording is damaged.
    """
    recorded = Recorded(stream.header, concatenate([]))
    batches = []
    for item in stream:
        if isinstance(item, Batch):
            batches.append(item.events)
        elif isinstance(item, CounterSample):
            recorded.samples.append(item)
        elif isinstance(item, ProcessSeen):
            recorded.seen.setdefault(item.pid, []).append(item)
        elif isinstance(item, Losses):
            recorded.losses.append(item)
        elif isinstance(item, Witnessed):
            recorded.witnessed.append(item)
        else:
            recorded.trailer = item
    recorded.events = concatenate(batches)
    if recorded.trailer is None:
        recorded.cut_off = getattr(stream, "cut_off", None) or "the stream has no trailer"
    return recorded


def has_flag(events: Events, flag: EventFlag) -> npt.NDArray[np.bool_]:
    """Say per event whether it has the flag."""
    marked: npt.NDArray[np.bool_] = (events["flags"] & flag) != 0
    return marked
