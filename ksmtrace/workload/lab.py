"""Where trials are carried out: processes with known pages, ksmd pass by pass, and readings."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from ksmtrace.errors import CannotRun, KsmtraceError, PrivilegeMissing, WorkloadFailed
from ksmtrace.kernel.pages import PM_SWAP, frame_numbers, read_pagemap
from ksmtrace.kernel.procfs import read_ksm_stat, read_ksmd_schedstat, read_smaps_ksm
from ksmtrace.kernel.sysfs import DIRECTORY, read_ksm
from ksmtrace.kernel.vmstat import read_vmstat
from ksmtrace.stream import Scalar
from ksmtrace.workload.children import PAGE_BYTES, Child, Children, Layout
from ksmtrace.workload.knobs import SavedKnobs
from ksmtrace.workload.ksmd import Ksmd
from ksmtrace.workload.registered import nr_rmap_items, registered_processes
from ksmtrace.workload.signals import Interrupted, Stop
from ksmtrace.workload.trial import Reading, Trial

_AGAIN_SECONDS = 0.05
# A page that a passing reference keeps from merging has long merged by then.
_ENOUGH_PASSES = 101


class Lab:
    """KSM for one trial after the other; ksmd rests except while passes are made.

    Args:
        knobs: saved already.
        stop: ends waits when a signal comes.
        report: takes a line of progress.
        timeout_seconds: bound of each wait.
        ksmd_pid: None where it cannot be seen.
        witness: is called at readings that ask for kernel memory.
    """

    def __init__(
        self,
        knobs: SavedKnobs,
        stop: Stop,
        report: Callable[[str], None],
        timeout_seconds: float,
        ksmd_pid: int | None = None,
        witness: Callable[[], None] = lambda: None,
    ) -> None:
        self.knobs = knobs
        self.ksmd = Ksmd(knobs, stop)
        self.stop = stop
        self._report = report
        self._timeout_seconds = timeout_seconds
        self.ksmd_pid = ksmd_pid
        self._witness = witness
        self._children: Children | None = None
        self._starts: dict[int, int] = {}
        self._readings: list[Reading] = []
        self._others: set[str] = set()
        self._adopted: set[int] = set()

    def carry_out(
        self, name: str, script: Callable[[Lab], None], parameters: Mapping[str, int]
    ) -> Trial:
        """Carry out one trial, and leave KSM empty and the knobs as they are between trials.

        Args:
            name: the trial's.
            script: what is done; it raises CannotRun where this kernel lacks what it takes.
            parameters: its numbers, for the outcome.

        Raises:
            Interrupted: by a signal.
        """
        begin_ns = time.monotonic_ns()
        self._readings, self._others, self._starts = [], set(), {}
        why_not = None
        self._report(f"{name}: begins")
        try:
            with Children(self.stop, self._timeout_seconds) as self._children:
                self._make_room()
                self.read("start")
                script(self)
        except Interrupted:
            raise
        except KsmtraceError as error:
            why_not = str(error)
            self._report(f"{name}: {error}")
        self._children = None
        return Trial(
            name,
            dict(parameters),
            begin_ns,
            time.monotonic_ns(),
            tuple(self._readings),
            tuple(sorted(self._others)),
            why_not,
        )

    def start(self, *layouts: Layout, heirs: tuple[Layout, ...] = ()) -> list[Child]:
        """Start processes and register their areas, in this order."""
        return self._start(layouts, heirs, register=True)

    def start_unregistered(self, *layouts: Layout, heirs: tuple[Layout, ...] = ()) -> list[Child]:
        """Start processes whose areas are not registered."""
        return self._start(layouts, heirs, register=False)

    @contextlib.contextmanager
    def program(self, source: str, *arguments: str) -> Iterator[tuple[int, str]]:
        """Run a Python program of its own, which shares no page with ours, and end it again.

        Args:
            source: it prints one line, and then waits for the end of its input.
            arguments: its arguments.

        Yields:
            Its pid, and that line.
        """
        command = [sys.executable, "-I", "-S", "-c", source, *arguments]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
            assert process.stdout is not None
            self._adopted.add(process.pid)
            try:
                if not self.stop.wait_readable(process.stdout.fileno(), self._timeout_seconds):
                    raise WorkloadFailed("a program said nothing")
                yield process.pid, process.stdout.readline().strip()
            finally:
                process.kill()

    def run_program(self, source: str, *arguments: str) -> tuple[int, str]:
        """Run a Python program of its own to its end; returns its exit status and what it said."""
        command = [sys.executable, "-I", "-S", "-c", source, *arguments]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            self._adopted.add(process.pid)
            try:
                said, _ = process.communicate(timeout=self._timeout_seconds)
            except subprocess.TimeoutExpired as error:
                process.kill()
                raise WorkloadFailed(
                    f"waited {self._timeout_seconds:g} s for a program, in vain"
                ) from error
        return process.returncode, said.strip()

    def wait(self, met: Callable[[], bool], what: str) -> None:
        """Wait until a condition holds.

        Raises:
            WorkloadFailed: it did not hold within the bound.
        """
        deadline = time.monotonic() + self._timeout_seconds
        while not met():
            if time.monotonic() > deadline:
                raise WorkloadFailed(f"waited {self._timeout_seconds:g} s for {what}, in vain")
            self.stop.pause(_AGAIN_SECONDS)

    def _start(
        self, layouts: tuple[Layout, ...], heirs: tuple[Layout, ...], register: bool
    ) -> list[Child]:
        assert self._children is not None
        started = self._children.start(layouts, heirs, register)
        pages = sum(child.layout.pages for child in self._children.all)
        pages += sum(heir.pages for heir in heirs)
        self.ksmd.budget(pages + nr_rmap_items(read_ksm()))
        return started

    @property
    def children(self) -> list[Child]:
        """The living processes of this trial."""
        assert self._children is not None
        return self._children.all

    def begin_order(self, child: Child, words: str) -> None:
        """Let a child do something, and do not wait: :meth:`end_order` does."""
        child.tell(words)

    def end_order(self, child: Child, words: str) -> str:
        """Wait for what :meth:`begin_order` began; returns the answer."""
        return child.wait_done(self.stop, self._timeout_seconds, words)

    def order(self, child: Child, words: str) -> str:
        """Let a child do something; see ksmtrace.workload.children."""
        assert self._children is not None
        return self._children.order(child, words, words)

    def fork(self) -> None:
        """Let the first process fork its heirs."""
        assert self._children is not None
        self._children.fork_heirs()

    def rewrite(self, generation: int) -> None:
        """Give every page of every process a content that no page ever had."""
        assert self._children is not None
        self._children.rewrite(generation)

    def need_own_guest(self, because: str) -> None:
        """Go on only where nobody else can be harmed.

        Args:
            because: what is done, in words.

        Raises:
            CannotRun: this is not a guest that ksmtrace has made.
        """
        if os.uname().nodename != "ksmtrace-vm":
            raise CannotRun(f"{because} only in a guest of ksmtrace's own")

    def end(self) -> None:
        """End all processes of this trial, and let ksmd forget them."""
        assert self._children is not None
        self._children.end()
        self._forget()

    def kill(self, child: Child) -> None:
        """End a process."""
        assert self._children is not None
        self._children.end_one(child)

    def passes(self, number: int = 1) -> None:
        """Let ksmd make so many passes, and rest.

        Raises:
            WorkloadFailed: a pass took longer than the bound.
        """
        for done in range(number):
            if not self.ksmd.run_pass(self._timeout_seconds):
                raise WorkloadFailed(
                    f"waited {self._timeout_seconds:g} s for pass {done + 1} of {number}, in vain"
                )

    def passes_until(self, met: Callable[[], bool], least: int, what: str) -> int:
        """Let ksmd make passes until a condition holds.

        What keeps a page from merging, such as a reference to it, may take its time to go.

        Args:
            met: the condition.
            least: passes to make at least.
            what: the condition in words.

        Returns:
            How many passes were made. Where so many changed nothing any more that it is the
            kernel's doing, the trial goes on all the same: claims are judged on what is.

        Raises:
            WorkloadFailed: it did not hold within the bound.
        """
        deadline = time.monotonic() + self._timeout_seconds
        self.passes(least)
        made = least
        while not met():
            if made >= _ENOUGH_PASSES:
                self._report(f"after {made} passes still not {what}")
                return made
            if time.monotonic() > deadline:
                raise WorkloadFailed(f"waited {self._timeout_seconds:g} s for {what}, in vain")
            self.stop.pause(_AGAIN_SECONDS)
            self.passes(1)
            made += 1
        return made

    def merged(self, shared: int, sharing: int, least: int = 2) -> int:
        """Let ksmd make passes until so many pages are shared; returns how many."""

        def met() -> bool:
            return (self.gained("pages_shared"), self.gained("pages_sharing")) == (shared, sharing)

        return self.passes_until(met, least, f"pages_shared {shared} and pages_sharing {sharing}")

    def gained(self, name: str) -> int:
        """Return how much a counter of KSM has changed since this trial's begin."""
        return int(read_ksm()[name] or 0) - self._readings[0].number(name)

    def unmerge(self) -> None:
        """Write 2 to run."""
        self.knobs.set(run=0)
        self.knobs.set(run=2)

    def refused(self, knob: str, value: str) -> str | None:
        """Write a knob, and put it back; returns the errno's name, None where it is taken."""
        before = str(read_ksm()[knob])
        refusal = write_knob(knob, value)
        if refusal is None:
            self.knobs.set(**{knob: before})
        return refusal

    def let_run(self, seconds: float) -> None:
        """Let ksmd scan for a time, and rest."""
        self.knobs.set(run=1)
        self.stop.pause(seconds)
        self.knobs.set(run=0)

    def read(self, label: str, witness: bool = False, **notes: Any) -> Reading:
        """Read everything at one step.

        Args:
            label: the step's name.
            witness: also read kernel memory and all mapped pages.
            notes: what the trial itself saw.
        """
        assert self._children is not None
        children = self._children.all
        begin_ns = time.monotonic_ns()
        counters: dict[str, Scalar] = {**read_ksm(), **read_vmstat()}
        processes = {}
        for child in children:
            stat = read_ksm_stat(child.pid)
            if stat is not None:
                processes[child.comm] = stat
        others = registered_processes(but={child.pid for child in children} | self._adopted)
        self._others |= {f"{comm} (pid {pid})" for pid, comm in others.items()}
        frames = self._frames()
        notes.setdefault("everybody", True)
        if self.ksmd_pid is not None:
            notes["ksmd"] = read_ksmd_schedstat(self.ksmd_pid)
        if witness:
            self._witness()
        reading = Reading(
            label,
            begin_ns,
            time.monotonic_ns(),
            counters,
            processes,
            None if frames is None else len(frames),
            None if frames is None else len(np.unique(frames)),
            notes,
        )
        self._readings.append(reading)
        return reading

    def nr_swapped(self, child: Child) -> int:
        """Count the pages of a child that are swapped out."""
        start = self._start_of(child)
        entries = read_pagemap(child.pid, start, start + child.layout.pages * PAGE_BYTES)
        return 0 if entries is None else int(np.count_nonzero(entries & np.uint64(PM_SWAP)))

    def frame_of(self, child: Child, index: int) -> int:
        """Return the page frame of one page of a child, 0 where it is not present."""
        start = self._start_of(child) + index * PAGE_BYTES
        entries = read_pagemap(child.pid, start, start + PAGE_BYTES)
        return 0 if entries is None else int(frame_numbers(entries)[0])

    def frames_of(self, child: Child, first: int, pages: int) -> list[int]:
        """Return the frames of the pages of a child that are present."""
        return frames_at(child.pid, self._start_of(child) + first * PAGE_BYTES, pages)

    def _start_of(self, child: Child) -> int:
        if child.pid not in self._starts:
            self._starts[child.pid] = int(self.order(child, "start"))
        return self._starts[child.pid]

    def _frames(self) -> np.ndarray | None:
        assert self._children is not None
        found = []
        for child in self._children.all:
            start = self._start_of(child)
            entries = read_pagemap(child.pid, start, start + child.layout.pages * PAGE_BYTES)
            if entries is None:
                continue
            try:
                frames = frame_numbers(entries)
            except PrivilegeMissing:
                return None
            found.append(frames[frames != 0])
        return np.concatenate([np.zeros(0, np.uint64), *found])

    def _make_room(self) -> None:
        others = registered_processes()
        if others:
            self._others |= {f"{comm} (pid {pid})" for pid, comm in others.items()}
            raise CannotRun("other processes use KSM")
        self.ksmd.rest()
        knobs: dict[str, int | str] = {"advisor_mode": "none", "smart_scan": 0}
        knobs["use_zero_pages"] = 0
        self.knobs.set(**{name: value for name, value in knobs.items() if name in self.knobs})
        self._forget()
        again = {"merge_across_nodes": 1, "max_page_sharing": 256}
        self.knobs.set(**{name: value for name, value in again.items() if name in self.knobs})

    def _forget(self) -> None:
        left = nr_rmap_items(read_ksm()) - self.ksmd.nr_kept
        if left > 0:
            self._report(f"waiting for ksmd to forget {left} pages of processes that are gone")
        self.ksmd.budget(max(left, 0))
        unmet = self.ksmd.forget(self._timeout_seconds)
        # Where it is the kernel's doing, what trials show all the same is what there is to judge.
        if unmet is not None and unmet.is_stuck:
            self._report(f"waited in vain for {unmet.waited_for}")
        elif unmet is not None:
            raise CannotRun(f"waited {self._timeout_seconds:g} s for {unmet.waited_for}, in vain")


def frames_at(pid: int, start: int, pages: int) -> list[int]:
    """Return the frames of the pages from an address on that are present."""
    entries = read_pagemap(pid, start, start + pages * PAGE_BYTES)
    found = [] if entries is None else frame_numbers(entries).tolist()
    return [frame for frame in found if frame]


def is_mergeable(child: Child, address: int) -> bool:
    """Tell whether the mapping of a child at an address is mergeable."""
    mappings = read_smaps_ksm(child.pid) or []
    return any(m.start <= address < m.end and m.mergeable for m in mappings)


def write_knob(name: str, value: str) -> str | None:
    """Write a file of /sys/kernel/mm/ksm; returns the errno's name, None where it is taken."""
    try:
        with open(f"/{DIRECTORY}/{name}", "w") as file:  # noqa: PTH123
            file.write(value)
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error.errno))
    return None
