"""What KSM did for each process, and which processes share pages with each other."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pandas as pd

from ksmtrace.analysis.books import unsure_window
from ksmtrace.analysis.merges import find_merges, find_zero_merges
from ksmtrace.analysis.recorded import Recorded, has_flag
from ksmtrace.events import KIND_BY_NAME, KINDS, EventFlag, Events, of_kind
from ksmtrace.stream import CounterSample

_ENTER = KIND_BY_NAME["ksm_enter"].number
_EXIT = KIND_BY_NAME["ksm_exit"].number
_WITH_MM = np.array([kind.number for kind in KINDS if "mm" in kind.fields])


@dataclass
class Process:
    """One mm, from its first event or sample to its last: what KSM counts by.

    Attributes:
        pid: its owner's tgid, None where no event and no sample tells.
        comm, cgroup, guest: who that was, None where unknown.
        mm: address of the mm_struct, None for a process known from samples only.
        entered_ns, exited_ns: when it came on ksmd's list and left it, None where before or
            after the recording, or not visible.
        merged_pages: pages that became sharers of a stable node, by the events.
        failed_attempts: attempts on its pages that failed or were undone.
        removed_pages: sharers removed together with their node, by the events; the last sharer
            of a node and single removals have no event.
        zero_merged_pages: pages replaced by the zero page.
        first_merging_pages: mm->ksm_merging_pages in the first sample of it, 0 if it entered
            during the recording, None where unknown.
        ksm_merging_pages, ksm_rmap_items, ksm_zero_pages: the kernel's own counts at
            ``counted_ns``: as the mm left, or in the last sample of it. None where unknown.
        counted_by: ``ksm_exit`` or ``sample``, None where unknown.
        difference: ksm_merging_pages minus what the events say it should be; -N means that N of
            its pages left singly or as their node's last sharer, which has no event. None where
            either is unknown or events were lost.
        shared_with_others_pages: merged pages whose KSM page another process shares as well.
        shared_with: the same by the other process's index in the list.
    """

    pid: int | None
    mm: int | None = None
    comm: str | None = None
    cgroup: str | None = None
    guest: str | None = None
    entered_ns: int | None = None
    exited_ns: int | None = None
    merged_pages: int = 0
    failed_attempts: int = 0
    removed_pages: int = 0
    zero_merged_pages: int = 0
    first_merging_pages: int | None = None
    ksm_merging_pages: int | None = None
    ksm_rmap_items: int | None = None
    ksm_zero_pages: int | None = None
    counted_by: str | None = None
    counted_ns: int | None = None
    difference: int | None = None
    shared_with_others_pages: int = 0
    shared_with: dict[int, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What people call it: the guest's name, else comm, else its pid."""
        if self.guest:
            return f"guest {self.guest}"
        return self.comm or (f"pid {self.pid}" if self.pid else "unknown")


def find_processes(recorded: Recorded) -> list[Process]:
    """List every mm that KSM dealt with during the recording."""
    lives = _Lives(recorded.events)
    processes = lives.processes
    merges = find_merges(recorded)
    zero, zero_ok = find_zero_merges(recorded)
    removed = of_kind(recorded.events, "ksm_remove_rmap_item")
    tallied = {
        "merged_pages": merges.events[merges.appended],
        "failed_attempts": merges.events[merges.failed | merges.undone],
        "removed_pages": removed,
        "zero_merged_pages": zero[zero_ok],
    }
    for attribute, events in tallied.items():
        counts = np.bincount(lives.of(events), minlength=len(processes))
        for process, count in zip(processes, counts, strict=False):
            setattr(process, attribute, int(count))
    _add_samples(recorded, processes)
    _add_exits(recorded, lives)
    if not sum(recorded.lost().values()):
        _compare(recorded, lives, merges.events[merges.appended], removed)
    _share(lives, merges.events[merges.appended], of_kind(recorded.events, "ksm_remove_ksm_page"))
    for process in processes:
        moment = process.counted_ns or process.entered_ns or recorded.end_ns()
        identity = recorded.identity(process.pid, moment) if process.pid else None
        if identity is not None:
            process.comm = identity.comm
            process.cgroup = identity.cgroup
            process.guest = identity.guest
    return processes


class _Lives:
    """Which life of which mm each event belongs to: an mm_struct's address is used again.

    A life ends with ksm_exit, and ksmd still removes its rmap_items after that; the next
    ksm_enter at the address begins another. An mm that ksmd dropped by itself has no ksm_exit,
    so an enter for another owner begins a life as well.
    """

    def __init__(self, events: Events) -> None:
        with_mm = events[np.isin(events["kind"], _WITH_MM)]
        known = has_flag(with_mm, EventFlag.PID_IS_OWNER)
        self.processes: list[Process] = []
        self._starts: dict[int, tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]] = {}
        for chosen in _by_mm(with_mm):
            self._split(with_mm[chosen], known[chosen])

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
        first_row = len(self.processes)
        for begin, end in zip(starts, [*starts[1:], len(events)], strict=True):
            self.processes.append(_life(mm, events[begin:end], known[begin:end]))
        self._starts[mm] = (
            events["ts_ns"][starts],
            np.arange(first_row, len(self.processes)),
        )

    def of(self, events: Events) -> npt.NDArray[np.int64]:
        """Return per event the index of its life in :attr:`processes`."""
        rows = np.empty(len(events), np.int64)
        for chosen in _by_mm(events):
            times, indexes = self._starts[int(events["mm"][chosen[0]])]
            at = np.searchsorted(times, events["ts_ns"][chosen], side="right") - 1
            rows[chosen] = indexes[np.maximum(at, 0)]
        return rows


def _by_mm(events: Events) -> Iterator[npt.NDArray[np.int64]]:
    """Yield per mm the indexes of its events, in order."""
    order = np.argsort(events["mm"], kind="stable")
    mms = events["mm"][order]
    yield from (part for part in np.split(order, np.flatnonzero(np.diff(mms)) + 1) if len(part))


def _life(mm: int, events: Events, known: npt.NDArray[np.bool_]) -> Process:
    # A fork registers the child's mm before the child has its pid: the owner that ksm_enter then
    # names is the parent (kernel/fork.c:copy_process).
    by_owner = known & (events["kind"] != _ENTER)
    pids = events["pid"][by_owner if by_owner.any() else known]
    if not len(pids):
        # All that is left of a process known by its exit alone: the task that ended its mm.
        pids = events["pid"][events["kind"] == _EXIT]
    enters = events["ts_ns"][events["kind"] == _ENTER]
    exits = events["ts_ns"][events["kind"] == _EXIT]
    process = Process(pid=int(pids[0]) if len(pids) else None, mm=mm)
    if len(enters) and events["kind"][0] == _ENTER:
        process.entered_ns = int(enters[0])
        process.first_merging_pages = 0
    if len(exits):
        process.exited_ns = int(exits[0])
    return process


def _add_samples(recorded: Recorded, processes: list[Process]) -> None:
    by_pid: dict[int, list[Process]] = {}
    for process in processes:
        if process.pid is not None:
            by_pid.setdefault(process.pid, []).append(process)
    for sample in recorded.samples:
        for pid, stat in sample.processes.items():
            alive = _alive(by_pid.setdefault(pid, []), sample)
            process = alive or Process(pid=pid)
            if alive is None:
                by_pid[pid].append(process)
                processes.append(process)
            process.ksm_merging_pages = _number(stat.get("ksm_merging_pages"))
            process.ksm_rmap_items = _number(stat.get("ksm_rmap_items"))
            process.ksm_zero_pages = _number(stat.get("ksm_zero_pages"))
            process.counted_by = "sample"
            process.counted_ns = sample.begin_ns
            if sample is recorded.samples[0] and process.entered_ns is None:
                process.first_merging_pages = process.ksm_merging_pages


def _alive(candidates: list[Process], sample: CounterSample) -> Process | None:
    for process in candidates:
        begun = process.entered_ns is None or process.entered_ns <= sample.begin_ns
        ended = process.exited_ns is not None and process.exited_ns < sample.begin_ns
        if begun and not ended:
            return process
    return None


def _add_exits(recorded: Recorded, lives: _Lives) -> None:
    exits = of_kind(recorded.events, "ksm_exit")
    for event, row in zip(exits, lives.of(exits), strict=True):
        if event["flags"] & EventFlag.HAS_COUNTS:
            process = lives.processes[row]
            process.ksm_merging_pages = int(event["ksm_merging_pages"])
            process.ksm_rmap_items = int(event["ksm_rmap_items"])
            process.ksm_zero_pages = int(event["ksm_zero_pages"])
            process.counted_by = "ksm_exit"
            process.counted_ns = int(event["ts_ns"])


def _compare(recorded: Recorded, lives: _Lives, appended: Events, removed: Events) -> None:
    gains, losses = lives.of(appended), lives.of(removed)
    samples = {sample.begin_ns: sample for sample in recorded.samples}

    @functools.cache
    def window(sample_ns: int) -> tuple[int, int]:
        return unsure_window(recorded, samples[sample_ns])

    for row, process in enumerate(lives.processes):
        if process.mm is None or process.ksm_merging_pages is None:
            continue
        if process.first_merging_pages is None or process.counted_ns is None:
            continue
        read_ns = [process.counted_ns] if process.counted_by == "sample" else []
        begin_ns = 0
        if process.entered_ns is None:
            read_ns.append(recorded.samples[0].begin_ns)
            begin_ns = recorded.samples[0].end_ns
        gained, lost = appended["ts_ns"][gains == row], removed["ts_ns"][losses == row]
        if any(
            np.any((begin <= times) & (times <= end))
            for times in (gained, lost)
            for begin, end in map(window, read_ns)
        ):
            continue
        say = process.first_merging_pages + sum(
            sign * int(np.count_nonzero((times >= begin_ns) & (times <= process.counted_ns)))
            for sign, times in ((1, gained), (-1, lost))
        )
        process.difference = process.ksm_merging_pages - say


def _share(lives: _Lives, appended: Events, freed: Events) -> None:
    """Find out which processes have merged into the same stable nodes.

    A node is a pfn until that is freed; one that migrated meanwhile counts as two, as the move
    has no tracepoint here.
    """
    if not len(appended):
        return
    pfn = np.r_[appended["pfn"], freed["pfn"]]
    ts_ns = np.r_[appended["ts_ns"], freed["ts_ns"]]
    is_freed = np.r_[np.zeros(len(appended), bool), np.ones(len(freed), bool)]
    order = np.lexsort((ts_ns, pfn))
    begins = np.r_[True, (pfn[order][1:] != pfn[order][:-1]) | is_freed[order][:-1]]
    node = np.empty(len(order), np.int64)
    node[order] = np.cumsum(begins)
    rows = lives.of(appended)
    pairs, counts = np.unique(np.c_[node[: len(appended)], rows], axis=0, return_counts=True)
    shares = pd.DataFrame({"node": pairs[:, 0], "row": pairs[:, 1], "pages": counts})
    shares = shares[shares.duplicated("node", keep=False)]
    totals = shares.groupby("row", as_index=False)["pages"].sum()
    for row, pages in zip(totals["row"].tolist(), totals["pages"].tolist(), strict=True):
        lives.processes[row].shared_with_others_pages = pages
    partners = shares.merge(shares[["node", "row"]], on="node", suffixes=("", "_other"))
    partners = partners[partners["row"] != partners["row_other"]]
    totals = partners.groupby(["row", "row_other"], as_index=False)["pages"].sum()
    for row, other, pages in totals.itertuples(index=False, name=None):
        lives.processes[row].shared_with[other] = pages


def _number(value: int | str | None) -> int | None:
    return value if isinstance(value, int) else None
