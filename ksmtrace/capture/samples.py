"""Reads the kernel's own counters as samples for the stream."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
from pathlib import Path

from ksmtrace.errors import CannotRun
from ksmtrace.kernel import procfs, sysfs, vmstat
from ksmtrace.kernel.files import ROOT
from ksmtrace.kernel.process_events import CopyDelays, read_taskstats
from ksmtrace.stream import CounterSample, Scalar


class CounterSampler:
    """Takes counter samples, with the figures of the processes that KSM deals with.

    Reading ksm_stat takes a process's mmap_lock and walks its mappings on newer kernels
    (fs/proc/base.c:proc_pid_ksm_stat since 6.16), so only watched processes are read.

    Args:
        ksmd_pid: ksmd's pid, None where it is not visible.
        root: the tree to read from.
        copy_delays: asks for the processes' delays by copies on write; None where the kernel
            does not account them.
    """

    def __init__(
        self, ksmd_pid: int | None, root: Path = ROOT, copy_delays: CopyDelays | None = None
    ) -> None:
        self._ksmd_pid = ksmd_pid
        self._copy_delays = copy_delays
        self._root = root
        self._watched: set[int] = set()

    def watch(self, pids: Iterable[int]) -> None:
        """Include these processes in the samples until they are gone."""
        self._watched.update(pids)

    def watch_mergeable(self) -> None:
        """Include every process that has rmap_items or says that it is mergeable."""
        for pid in procfs.iter_pids(self._root):
            stat = self._read_process(pid)
            if stat and (
                stat["ksm_rmap_items"]
                or stat["ksm_zero_pages"]
                or "yes" in (stat["ksm_mergeable"], stat["ksm_merge_any"])
            ):
                self._watched.add(pid)

    def sample(self) -> CounterSample:
        """Read everything once.

        Raises:
            CannotRun: a file of the kernel is there but cannot be read.
        """
        begin_ns = time.monotonic_ns()
        ksm = sysfs.read_ksm(self._root)
        counters = vmstat.read_vmstat(self._root)
        processes: dict[int, dict[str, Scalar]] = {}
        for pid in sorted(self._watched):
            stat = self._read_process(pid)
            if stat is None:
                self._watched.discard(pid)
            else:
                delays = self._copy_delays.read(pid) if self._copy_delays else None
                processes[pid] = {**stat, **(delays or {})}
        return CounterSample(
            begin_ns, time.monotonic_ns(), ksm, counters, self._read_ksmd(), processes
        )

    def _read_process(self, pid: int) -> dict[str, Scalar] | None:
        # Another user's process is no reason to stop: what may be read is what is known.
        with contextlib.suppress(CannotRun):
            return procfs.read_ksm_stat(pid, self._root)
        return None

    def _read_ksmd(self) -> dict[str, int | None]:
        figures: dict[str, int | None] = {}
        if self._ksmd_pid is not None:
            figures.update(procfs.read_ksmd_schedstat(self._ksmd_pid, self._root) or {})
            if self._root == ROOT:
                figures.update(read_taskstats(self._ksmd_pid) or {})
        return figures
