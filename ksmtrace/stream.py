"""The one stream: what a live capture and a recording's replay both yield.

Everything behind the capture sees only these types and cannot tell a live kernel from a file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from ksmtrace.events import Events
from ksmtrace.kernel.ksm_memory import KsmMemory
from ksmtrace.kernel.page_truth import PageTruth

Scalar = int | str | None


@dataclass(frozen=True)
class Header:
    """What was true before the first event.

    Attributes:
        version: ksmtrace's version.
        command_line: argv of the recording command.
        started_ns: CLOCK_MONOTONIC, the clock of every ``ts_ns``, when the capture began.
        started_realtime_ns: CLOCK_REALTIME at the same moment.
        facts: the kernel's facts as JSON (:func:`ksmtrace.kernel.facts.Facts.as_json`).
        plan: one entry per event kind as JSON (``event``, ``rung``, ``target``, ``reason``, ...).
        unseen: what cannot be seen on this kernel: (what, why and what is still known, what would
            change that).
        settings: ring size, sample interval, header tree and the like.
    """

    version: str
    command_line: list[str]
    started_ns: int
    started_realtime_ns: int
    facts: dict[str, Any]
    plan: list[dict[str, Any]]
    unseen: list[list[str]]
    settings: dict[str, Any]


@dataclass(frozen=True)
class Batch:
    """Events in the order in which the ring held them."""

    events: Events


@dataclass(frozen=True)
class CounterSample:
    """One reading of the kernel's own counters; absent ones are None.

    The kernel offers no atomic reading: what is said is true of some moment between
    ``begin_ns`` and ``end_ns``.

    Attributes:
        begin_ns: CLOCK_MONOTONIC before the first file was read.
        end_ns: CLOCK_MONOTONIC after the last.
        ksm: every file of /sys/kernel/mm/ksm by name.
        vmstat: the lines of /proc/vmstat that concern KSM, by name.
        ksmd: scheduler figures of ksmd (``cpu_ns``, ``run_delay_ns``, taskstats fields).
        processes: per pid the values of /proc/PID/ksm_stat, for processes KSM deals with, and
            where the kernel accounts delays ``wpcopy_count`` and ``wpcopy_delay_ns``
            (:class:`ksmtrace.kernel.process_events.CopyDelays`).
    """

    begin_ns: int
    end_ns: int
    ksm: Mapping[str, Scalar]
    vmstat: Mapping[str, int | None]
    ksmd: Mapping[str, int | None]
    processes: Mapping[int, Mapping[str, Scalar]]


@dataclass(frozen=True)
class ProcessSeen:
    """Who a pid was, from ``ts_ns`` on.

    Attributes:
        ts_ns: CLOCK_MONOTONIC from which this holds.
        pid: tgid in the initial pid namespace as this process sees it.
        start_ns: start of the process on CLOCK_BOOTTIME, None where it had gone before we looked.
        ppid: parent, None where unknown.
        comm: name, None where unknown.
        cgroup: path in the unified hierarchy (else of the memory controller), None where unknown.
        guest: name of the guest a QEMU process runs, None for any other process.
        source: how this is known: ``proc`` (read from /proc), ``connector`` (kernel process
            events), ``event`` (the comm in a ksm_enter event), ``memory`` (the kernel's memory).
    """

    ts_ns: int
    pid: int
    start_ns: int | None
    ppid: int | None
    comm: str | None
    cgroup: str | None
    guest: str | None
    source: str


@dataclass(frozen=True)
class StackSeen:
    """One of the kernel stacks that events name by number (field ``stack``).

    Attributes:
        ts_ns: CLOCK_MONOTONIC when it was read.
        number: its number in this recording.
        frames: ``function+0xoffset`` of each return address, the innermost first; a bare address
            where its function was unknown. Without the frames of our own program.
    """

    ts_ns: int
    number: int
    frames: list[str]


@dataclass(frozen=True)
class Losses:
    """The kernel-side tallies since the capture began, by kind's name.

    Attributes:
        ts_ns: CLOCK_MONOTONIC when they were read.
        produced: events that happened.
        dropped: those of them that found the ring full.
        counted: what is only counted (:data:`ksmtrace.capture.hooks.COUNTS`), and what waits for
            locks and holds of them come to (LOCK_TALLIES); a count that this kernel does not offer
            is missing.
        histograms: per name (:data:`ksmtrace.capture.hooks.HISTOGRAMS`, LOCK_HISTOGRAMS) the
            count in each slot: slot 0 is the value 0, slot n is from 2^(n-1) to below 2^n.
        calls: per function with programs on it, how often it was entered and how often it
            returned; None where there is no program on that side.
        missed: how often the kernel did not run a program, by what it is attached to; only
            kernels that count it, and only programs that were missed.
    """

    ts_ns: int
    produced: Mapping[str, int]
    dropped: Mapping[str, int]
    counted: Mapping[str, int] = field(default_factory=dict)
    histograms: Mapping[str, list[int]] = field(default_factory=dict)
    calls: Mapping[str, list[int | None]] = field(default_factory=dict)
    missed: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Witnessed:
    """What the kernel held, read from outside while the capture ran.

    Attributes:
        moment: ``first``, when the programs had just been attached; ``last``, before they were
            detached; ``asked`` for in between.
        begin_ns: CLOCK_MONOTONIC before the reading.
        end_ns: CLOCK_MONOTONIC after it.
        memory: what mm/ksm.c holds (:mod:`ksmtrace.kernel.ksm_memory`), None where unread.
        pages: what mergeable memory maps (:mod:`ksmtrace.kernel.page_truth`), None where unread.
        why_not: why ``memory`` or ``pages`` is None, by that name; nothing where nobody asked.
    """

    moment: str
    begin_ns: int
    end_ns: int
    memory: KsmMemory | None
    pages: PageTruth | None
    why_not: Mapping[str, str]


@dataclass(frozen=True)
class Trailer:
    """The capture ended in order; a recording without one was cut off.

    Attributes:
        ts_ns: CLOCK_MONOTONIC when the programs had been detached and the ring was empty.
        recorded: events in the stream, per kind's name.
        reason: why it ended: ``command ended``, ``duration``, ``interrupted``, or an error's text.
        command_exit_status: the recorded command's status, -N for signal N, None without one.
        notices: what went less than perfectly, one line each.
    """

    ts_ns: int
    recorded: Mapping[str, int]
    reason: str
    command_exit_status: int | None = None
    notices: list[str] = field(default_factory=list)


Item = Batch | CounterSample | ProcessSeen | StackSeen | Losses | Witnessed | Trailer


def time_of(item: Item) -> int:
    """Return when an item was: for a batch, when its last event happened, 0 without any."""
    if isinstance(item, Batch):
        return int(item.events["ts_ns"].max()) if len(item.events) else 0
    return item.end_ns if isinstance(item, CounterSample | Witnessed) else item.ts_ns


class Stream(Protocol):
    """A header, and the items in order of time."""

    header: Header

    def __iter__(self) -> Iterator[Item]:
        """Yield the items once."""
        ...
