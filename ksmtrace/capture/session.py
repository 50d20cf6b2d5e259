"""A live capture: loads and attaches by the plan, drains, samples, and yields the stream."""

from __future__ import annotations

import contextlib
import re
import sys
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from ksmtrace import __version__
from ksmtrace.capture.bcc_backend import RING_PAGE_BYTES, Programs
from ksmtrace.capture.plan import Plan
from ksmtrace.capture.processes import ProcessTable
from ksmtrace.capture.ring import Ring
from ksmtrace.capture.samples import CounterSampler
from ksmtrace.errors import CannotRun, KernelInterfaceError, KsmtraceError, UsageError
from ksmtrace.events import KINDS, NR_KINDS, SLOT_BYTES, Events, of_kind
from ksmtrace.kernel import sysfs
from ksmtrace.kernel.facts import Facts
from ksmtrace.kernel.kallsyms import Symbolizer
from ksmtrace.kernel.ksm_memory import KsmMemory, KsmMemoryReader
from ksmtrace.kernel.page_truth import read_page_truth
from ksmtrace.kernel.process_events import CopyDelays, ProcessEvents
from ksmtrace.stream import Batch, Header, Item, Losses, StackSeen, Trailer, Witnessed
from ksmtrace.units import text_bytes

DEFAULT_RING_BYTES = 16 << 20
MOST_SNAPSHOT_PAGES = 200_000
"""Half as many took 0.4 to 0.5 s to read from a core file on a quiet CPU.

Nothing takes events from the ring meanwhile, so that a much longer reading could lose some.
"""

MEMORY_PATIENCE_NS = 1_000_000_000
"""How long the kernel's memory is read anew where ksmd was at work during the reading."""

_MEMORY_PAUSE_S = 0.007  # for ksmd to finish its batch
_LARGEST_RING_SHARE = 4  # of MemAvailable: more would push out what is being observed

_SHORTEST_WAIT_S = 0.005
_LONGEST_WAIT_S = 0.05  # an idle ring of the default size then bears a burst of 5 million events/s
_SETTLE_S = 2.0

_KINDS_WITH_STACK = tuple(kind.name for kind in KINDS if "stack" in kind.body)
_OURS = re.compile(r"(bpf_|__bpf_|trace_call_bpf|__traceiter_|0x|ftrace_|kprobe_|fprobe_)")

T = TypeVar("T")


@dataclass(frozen=True)
class CaptureSettings:
    """How to capture.

    Attributes:
        ring_bytes: size of the ring; a power of two, at least a page.
        interval_ns: time between counter samples.
        snapshot: read what mm/ksm.c holds when the programs have been attached, where kernel
            memory can be read and holds at most :data:`MOST_SNAPSHOT_PAGES` rmap_items.
        witnesses: read both witnesses, of whatever size, then and at the end.
    """

    ring_bytes: int = DEFAULT_RING_BYTES
    interval_ns: int = 1_000_000_000
    snapshot: bool = True
    witnesses: bool = False


@dataclass
class Progress:
    """How a capture stands.

    Attributes:
        events: taken from the ring so far.
        dropped: events that found the ring full, as of the last sample.
        fullest: the highest fill of the ring that was seen, 0 to 1.
        failure: the error that ended the capture, None while there is none.
    """

    events: int = 0
    dropped: int = 0
    fullest: float = 0.0
    failure: KsmtraceError | None = None


class Capture:
    """A stream from the running kernel.

    The constructor loads and attaches everything, so whatever can go wrong with that is its
    error. Iterate it once, and close it.

    Args:
        facts: the kernel's facts.
        plan: what to attach, made from the facts.
        settings: ring size and sample interval.
        until: asked many times a second; a returned text ends the capture and is the reason.

    Attributes:
        witnesses_wanted: set it to have both witnesses read in the middle of the capture.

    Raises:
        UsageError: a ring size that no kernel takes.
        CannotRun: the plan cannot be carried out here.
    """

    def __init__(
        self, facts: Facts, plan: Plan, settings: CaptureSettings, until: Callable[[], str | None]
    ) -> None:
        if not plan.can_record:
            what, hint = plan.blockers[0]
            raise CannotRun(f"KSM cannot be recorded here: {what}", hint)
        _check_ring(settings.ring_bytes)
        self.progress = Progress()
        self.command_exit_status: int | None = None
        self.notices: list[str] = []
        self.witnesses_wanted = False
        self._settings = settings
        self._counted = plan.counted
        self._kpf_ksm = facts.kpf_ksm
        self._missed: dict[str, int] = {}
        self._memory: KsmMemoryReader | None = None
        self._stacks: set[int] = set()
        self._symbolizer: Symbolizer | None = None
        self._until = until
        self._recorded = np.zeros(NR_KINDS, np.int64)
        self._processes = ProcessTable()
        with contextlib.ExitStack() as opening:
            copy_delays = self._ask_for_delays(facts)
            if copy_delays is not None:
                opening.callback(copy_delays.close)
            self._sampler = CounterSampler(facts.ksmd_pid, copy_delays=copy_delays)
            self._process_events = self._subscribe()
            if self._process_events is not None:
                opening.callback(self._process_events.close)
            self._processes.read_all()
            opening.callback(self._close_memory)
            # Here it costs no event that symbols and offsets take long to look up.
            if settings.witnesses or settings.snapshot:
                with contextlib.suppress(CannotRun):
                    self._open_memory()
            self._programs = Programs(plan.attachments, plan.defines, settings.ring_bytes)
            opening.callback(self._programs.close)
            self._ring = Ring(self._programs.ring_fd, settings.ring_bytes)
            opening.callback(self._ring.close)
            # Only now: the programs have names as well, and are the innermost frames of each stack.
            with contextlib.suppress(KernelInterfaceError):
                self._symbolizer = Symbolizer()
            self._programs.begin()
            self._open = opening.pop_all()
        self.header = Header(
            version=__version__,
            command_line=sys.argv,
            started_ns=time.monotonic_ns(),
            started_realtime_ns=time.time_ns(),
            facts=facts.as_json(),
            plan=plan.as_json(),
            unseen=[list(gap) for gap in plan.unseen],
            settings={
                "ring_bytes": settings.ring_bytes,
                "interval_ns": settings.interval_ns,
                "headers": self._programs.headers,
                "every_page": bool(plan.defines.get("EVERY_PAGE")),
            },
        )

    def __iter__(self) -> Iterator[Item]:
        """Yield the stream; the first counter sample comes before ``until`` is first asked."""
        self._sampler.watch_mergeable()

        reason = None
        try:
            yield from self._sample()
            if self._settings.witnesses or self._is_small():
                yield from self._witness("first", both=self._settings.witnesses)
            next_sample_ns = time.monotonic_ns() + self._settings.interval_ns
            wait_s = _SHORTEST_WAIT_S
            while True:
                self.progress.fullest = max(self.progress.fullest, self._ring.fill)
                reached = yield from self._drain()
                reason = self._until()
                if reason is not None:
                    break
                if self.witnesses_wanted:
                    self.witnesses_wanted = False
                    yield from self._drain()
                    yield from self._witness("asked", both=True)
                if time.monotonic_ns() >= next_sample_ns:
                    yield from self._sample()
                    next_sample_ns += self._settings.interval_ns
                    next_sample_ns = max(next_sample_ns, time.monotonic_ns())
                wait_s = _SHORTEST_WAIT_S if reached else min(wait_s * 2, _LONGEST_WAIT_S)
                time.sleep(wait_s)
            if self._settings.witnesses:
                yield from self._witness("last", both=True)
            # Whoever had first to do with KSM since the last drain belongs in the last sample.
            yield from self._drain()
            yield from self._sample()
        except KsmtraceError as error:
            self.progress.failure = error
            reason = str(error)
        self._missed = self._programs.missed()
        self._programs.detach()
        yield from self._settle()
        for target, times in self._missed.items():
            self.notices.append(f"the kernel left out the program on {target} {times} times")
        yield Trailer(
            ts_ns=time.monotonic_ns(),
            recorded={kind.name: int(self._recorded[kind.number]) for kind in KINDS},
            reason=reason,
            command_exit_status=self.command_exit_status,
            notices=self.notices,
        )

    def close(self) -> None:
        """Detach and unload everything."""
        self._open.close()

    def __enter__(self) -> Capture:
        """Return the capture itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Detach and unload everything."""
        self.close()

    def _drain(self) -> Generator[Item, None, int]:
        """Yield what the ring holds and who the owners are; returns how many events."""
        events = self._ring.drain()
        if self._process_events is not None:
            yield from self._processes.follow(self._process_events.drain())
        if not len(events):
            return 0
        self._count(events)
        for owner in self._processes.name_owners(events):
            self._sampler.watch([owner.pid])
            yield owner
        yield from self._processes.name_waiters(events)
        yield Batch(events)
        yield from self._name_stacks(events)
        return len(events)

    def _name_stacks(self, events: Events) -> Iterator[Item]:
        """Yield the stacks that events name for the first time."""
        name = self._symbolizer.name if self._symbolizer else hex
        numbers = of_kind(events, *_KINDS_WITH_STACK)["stack"]
        for number in sorted(set(numbers[numbers >= 0].tolist()) - self._stacks):
            self._stacks.add(number)
            frames = [name(at) for at in self._programs.stack(number)]
            yield StackSeen(time.monotonic_ns(), number, _without_ours(frames))

    def _count(self, events: Events) -> None:
        self._recorded += np.bincount(events["kind"], minlength=NR_KINDS)
        self.progress.events += len(events)

    def _sample(self) -> Iterator[Item]:
        sample = self._sampler.sample()
        for pid in sample.processes:
            yield from self._processes.name(pid, sample.begin_ns)
        yield sample
        yield self._losses()

    def _losses(self) -> Losses:
        tallies = self._programs.tallies()
        produced = {name: tally[0] for name, tally in tallies.items()}
        dropped = {name: tally[1] for name, tally in tallies.items()}
        self.progress.dropped = sum(dropped.values())
        return Losses(
            time.monotonic_ns(),
            produced,
            dropped,
            counted=self._kept(self._programs.counted()),
            histograms=self._kept(self._programs.histograms()),
            calls=self._programs.calls(),
            missed=self._missed,
        )

    def _witness(self, moment: str, both: bool) -> Iterator[Item]:
        """Yield a reading of what the kernel holds."""
        begin_ns = time.monotonic_ns()
        memory, pages, why_not = None, None, {}
        try:
            begin_ns, memory = yield from self._read_memory()
        except CannotRun as error:
            why_not["memory"] = f"{error} ({error.hint})" if error.hint else str(error)
        try:
            pages = read_page_truth(kpf_ksm=self._kpf_ksm) if both else None
        except CannotRun as error:
            why_not["pages"] = f"{error} ({error.hint})" if error.hint else str(error)
        yield Witnessed(moment, begin_ns, time.monotonic_ns(), memory, pages, why_not)

    def _read_memory(self) -> Generator[Item, None, tuple[int, KsmMemory]]:
        """Read the kernel's memory, anew while ksmd is at work; returns also when that began.

        Yields the events that come meanwhile, all of them older than the reading that counts.
        """
        reader = self._open_memory()
        deadline_ns = time.monotonic_ns() + MEMORY_PATIENCE_NS
        while True:
            begin_ns = time.monotonic_ns()
            is_last = begin_ns > deadline_ns
            try:
                memory = reader.read(attempts=1)
                if memory.consistent or is_last:
                    return begin_ns, memory
            except KernelInterfaceError:
                if is_last:
                    raise
            time.sleep(_MEMORY_PAUSE_S)
            yield from self._drain()

    def _open_memory(self) -> KsmMemoryReader:
        if self._memory is None:
            self._memory = KsmMemoryReader.open()
        return self._memory

    def _close_memory(self) -> None:
        if self._memory is not None:
            self._memory.close()

    def _is_small(self) -> bool:
        if not self._settings.snapshot:
            return False
        ksm = sysfs.read_ksm() or {}
        names = ("pages_shared", "pages_sharing", "pages_unshared", "pages_volatile")
        nr_rmap_items = sum(n for name in names if isinstance(n := ksm.get(name), int))
        return nr_rmap_items <= MOST_SNAPSHOT_PAGES

    def _kept(self, counted: dict[str, T]) -> dict[str, T]:
        return {name: count for name, count in counted.items() if name in self._counted}

    def _settle(self) -> Iterator[Item]:
        """Yield what is left after detaching, until every event produced is accounted for."""
        deadline = time.monotonic() + _SETTLE_S
        while True:
            yield from self._drain()
            losses = self._losses()
            missing = (
                sum(losses.produced.values())
                - sum(losses.dropped.values())
                - int(self._recorded.sum())
            )
            if missing == 0 or time.monotonic() > deadline:
                break
            time.sleep(_SHORTEST_WAIT_S)
        if missing:
            self.notices.append(f"{missing} events were produced but never came out of the ring")
        if self._process_events is not None and self._process_events.lost:
            self.notices.append("the kernel dropped process events: some names may be old")
        yield losses

    def _ask_for_delays(self, facts: Facts) -> CopyDelays | None:
        offsets = facts.copy_delay_offsets
        if offsets is None or not facts.task_delayacct:
            return None
        try:
            return CopyDelays(*offsets)
        except CannotRun as error:
            self.notices.append(f"delays by copies on write are unknown: {error}")
            return None

    def _subscribe(self) -> ProcessEvents | None:
        subscription = ProcessEvents()
        try:
            subscription.open()
        except CannotRun as error:
            self.notices.append(f"short-lived processes may stay nameless: {error}")
            return None
        return subscription


def _without_ours(frames: list[str]) -> list[str]:
    """Leave out the innermost frames, which are those of the program that took the stack."""
    ours = 0
    while ours < len(frames) and _OURS.match(frames[ours]):
        ours += 1
    return frames[ours:]


def _check_ring(ring_bytes: int) -> None:
    if ring_bytes < RING_PAGE_BYTES or ring_bytes & (ring_bytes - 1):
        raise UsageError(
            f"a ring of {ring_bytes} bytes is not possible",
            f"choose a power of two of at least {RING_PAGE_BYTES} ({RING_PAGE_BYTES // SLOT_BYTES} "
            "events)",
        )
    available = re.search(r"^MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.M)
    available_bytes = int(available[1]) * 1024 if available else 0
    if available and ring_bytes > available_bytes // _LARGEST_RING_SHARE:
        raise CannotRun(
            f"a ring of {text_bytes(ring_bytes)} is more than a quarter of the "
            f"{text_bytes(available_bytes)} of memory available here",
            "choose a smaller one with --ring",
        )
