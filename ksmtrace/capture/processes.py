"""Keeps track of who each pid is, so that a process that has ended keeps its name."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from ksmtrace.errors import CannotRun
from ksmtrace.events import KINDS, EventFlag, Events, of_kind
from ksmtrace.kernel import procfs
from ksmtrace.kernel.files import ROOT
from ksmtrace.kernel.process_events import ProcessEvent
from ksmtrace.stream import ProcessSeen

_KINDS_WITH_MM = np.zeros(256, bool)
_KINDS_WITH_MM[[kind.number for kind in KINDS if "mm" in kind.fields]] = True


_START_STEP_NS = 10_000_000  # /proc/PID/stat gives the start in clock ticks


class ProcessTable:
    """Who each pid is, from /proc and from the kernel's process events.

    Identities go into the stream only for processes that KSM deals with: when one first owns an
    event or a sample, and again when it takes another name or program.

    Args:
        root: the tree to read from.
    """

    def __init__(self, root: Path = ROOT) -> None:
        self._root = root
        self._known: dict[int, ProcessSeen] = {}
        self._told: set[int] = set()
        # /proc says when a process began on CLOCK_BOOTTIME, events are on CLOCK_MONOTONIC.
        self._suspended_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME) - time.monotonic_ns()

    def read_all(self) -> None:
        """Read the identity of every process that there is."""
        for pid in procfs.iter_pids(self._root):
            self._read(pid)

    def follow(self, events: Iterable[ProcessEvent]) -> Iterator[ProcessSeen]:
        """Take in process events; yields the new identity of processes told of before."""
        for event in events:
            if event.kind == "fork":
                if self._has_begun_since(event):
                    continue
                self._told.discard(event.pid)  # the pid may have been another process's before
                parent = self._known.get(event.ppid or 0)
                self._known[event.pid] = ProcessSeen(
                    ts_ns=event.ts_ns,
                    pid=event.pid,
                    start_ns=event.ts_ns + self._suspended_ns,
                    ppid=event.ppid,
                    comm=parent.comm if parent else None,
                    cgroup=parent.cgroup if parent else None,
                    guest=None,
                    source="connector",
                )
            elif event.kind == "exec":
                self._read(event.pid, event.ts_ns)
                yield from self._tell_again(event.pid)
            elif event.kind == "comm" and event.pid in self._known:
                self._known[event.pid] = replace(
                    self._known[event.pid], ts_ns=event.ts_ns, comm=event.comm, source="connector"
                )
                yield from self._tell_again(event.pid)

    def name_owners(self, events: Events) -> Iterator[ProcessSeen]:
        """Yield the identities of the owners in a batch that have not been told of yet."""
        is_owned = _KINDS_WITH_MM[events["kind"]] & (
            (events["flags"] & EventFlag.PID_IS_OWNER) != 0
        )
        pids = events["pid"][is_owned]
        # Neighbours mostly have one owner: only where it changes need be looked at.
        changes = np.flatnonzero(pids[1:] != pids[:-1]) + 1
        strangers = {*pids[:1].tolist(), *np.unique(pids[changes]).tolist()} - self._told
        if not strangers:
            return
        owned = events[is_owned]
        entered = of_kind(owned, "ksm_enter")
        for pid in sorted(strangers):
            first = owned[owned["pid"] == pid][:1]
            names = entered[entered["pid"] == pid]
            yield from self.name(
                pid, int(first["ts_ns"][0]), bytes(names["comm"][-1]) if len(names) else None
            )

    def name_waiters(self, events: Events) -> Iterator[ProcessSeen]:
        """Yield the identities of those who wait for locks, and of those who hold them."""
        waits = of_kind(events, "lock_wait")
        if not len(waits):
            return
        for pid, first in zip(*np.unique(waits["pid"], return_index=True), strict=True):
            wait = waits[first]
            yield from self.name(int(pid), int(wait["ts_ns"]), bytes(wait["comm"]))
        for pid, first in zip(*np.unique(waits["holder_pid"], return_index=True), strict=True):
            if pid:
                yield from self.name(int(pid), int(waits[first]["ts_ns"]))

    def name(self, pid: int, ts_ns: int, comm: bytes | None = None) -> Iterator[ProcessSeen]:
        """Yield who a pid is, unless that was told before.

        Args:
            pid: the process.
            ts_ns: a time at which it was alive, for one that nothing else is known of.
            comm: the name that an event gave it, None without one.
        """
        if pid in self._told:
            return
        self._told.add(pid)
        self._read(pid)
        seen = self._known.get(pid)
        if seen is None:
            text = comm.decode(errors="replace") if comm else None
            seen = ProcessSeen(ts_ns, pid, None, None, text, None, None, "event")
            self._known[pid] = seen
        yield seen

    def _has_begun_since(self, fork: ProcessEvent) -> bool:
        # /proc was read after this fork: what it said of the child is better than its parent's.
        known = self._known.get(fork.pid)
        began_ns = fork.ts_ns + self._suspended_ns - _START_STEP_NS
        return known is not None and (known.start_ns or 0) >= began_ns

    def _tell_again(self, pid: int) -> Iterator[ProcessSeen]:
        if pid in self._told:
            yield self._known[pid]

    def _read(self, pid: int, since_ns: int | None = None) -> None:
        try:
            identity = procfs.read_identity(pid, self._root)
        except CannotRun:
            identity = None
        if identity is None:
            return
        cgroup, guest = identity.cgroup, identity.guest
        known = self._known.get(pid)
        if known is not None and since_ns is None and cgroup == "/":
            # A process on its way out has left its cgroup and its memory (kernel/exit.c:do_exit);
            # who it was is what was known before.
            cgroup, guest = known.cgroup or cgroup, guest or known.guest
        self._known[pid] = ProcessSeen(
            ts_ns=identity.start_ns - self._suspended_ns if since_ns is None else since_ns,
            pid=pid,
            start_ns=identity.start_ns,
            ppid=identity.ppid,
            comm=identity.comm,
            cgroup=cgroup,
            guest=guest,
            source="proc",
        )
