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
from ksmtrace.analysis.sharers import Sharers, find_sharers
from ksmtrace.events import KIND_BY_NAME, KINDS, EventFlag, Events, concatenate, of_kind
from ksmtrace.stream import CounterSample

_ENTER = KIND_BY_NAME["ksm_enter"].number
_EXIT = KIND_BY_NAME["ksm_exit"].number
_WITH_MM = np.array([kind.number for kind in KINDS if "mm" in kind.body])
_COUNTS = ("ksm_merging_pages", "ksm_rmap_items", "ksm_zero_pages")


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
        removed_pages: sharers removed together with their node, by the events; a node's last
            sharer has no event of its own, and is among them where its join was caught.
        left_singly_pages: sharers that left a node which stayed (COW, unmap, unmerge, exit), as
            ksmd or an unmerge found out; None where that was not caught.
        visited_pages: pages of it that ksmd looked at; None where there is no event per page.
        zero_merged_pages: pages replaced by the zero page.
        first_merging_pages: mm->ksm_merging_pages in the first sample of it, or as it entered
            during the recording: 0, but for a forked mm on kernels whose ksm_fork does not reset
            its copy of the parent's count. None where unknown.
        ksm_merging_pages, ksm_rmap_items, ksm_zero_pages: the kernel's own counts at
            ``counted_ns``: as the mm left, or in the last sample of it. None where unknown.
        counted_by: ``ksm_exit`` or ``sample``, None where unknown.
        difference: ksm_merging_pages minus what the events say it should be. -N means that N of
            its pages left without an event: singly or as their node's last sharer where that is
            not caught. None where either is unknown or events were lost.
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
    left_singly_pages: int | None = None
    visited_pages: int | None = None
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
    sharers = find_sharers(recorded)
    zero, zero_ok = find_zero_merges(recorded)
    tallied = {
        "merged_pages": merges.events[merges.appended],
        "failed_attempts": merges.events[merges.failed | merges.undone],
        "removed_pages": sharers.left_with_node,
        "zero_merged_pages": zero[zero_ok],
    }
    if recorded.can_see("remove_rmap_item_from_tree"):
        tallied["left_singly_pages"] = sharers.left_singly
    if recorded.count("cmp_and_merge_page"):
        tallied["visited_pages"] = of_kind(recorded.events, "cmp_and_merge_page")
    for attribute, events in tallied.items():
        counts = np.bincount(lives.of(_with_mm(events)), minlength=len(processes))
        for process, count in zip(processes, counts, strict=False):
            setattr(process, attribute, int(count))
    _add_samples(recorded, processes)
    _add_exits(recorded, lives)
    if not sum(recorded.lost().values()):
        _compare(recorded, lives, sharers)
    _share(lives, sharers)
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
        with_mm = _with_mm(events[np.isin(events["kind"], _WITH_MM)])
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


def _with_mm(events: Events) -> Events:
    """Leave out the events whose mm could not be read."""
    known: Events = events[events["mm"] != 0]
    return known


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
        counted = events["flags"][0] & EventFlag.HAS_COUNTS
        process.first_merging_pages = int(events["ksm_merging_pages"][0]) if counted else 0
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
            if not any(isinstance(stat.get(name), int) for name in _COUNTS):
                continue  # a kernel that does not count by process
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
    counts_zero_pages = recorded.has_field("ksm_exit", "ksm_zero_pages")
    exits = of_kind(recorded.events, "ksm_exit")
    for event, row in zip(exits, lives.of(exits), strict=True):
        if event["flags"] & EventFlag.HAS_COUNTS:
            process = lives.processes[row]
            process.ksm_merging_pages = int(event["ksm_merging_pages"])
            process.ksm_rmap_items = int(event["ksm_rmap_items"])
            if counts_zero_pages:
                process.ksm_zero_pages = int(event["ksm_zero_pages"])
            process.counted_by = "ksm_exit"
            process.counted_ns = int(event["ts_ns"])


def _compare(recorded: Recorded, lives: _Lives, sharers: Sharers) -> None:
    appended = _with_mm(sharers.joined)
    removed = _with_mm(concatenate([sharers.left_singly, sharers.left_with_node]))
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


def _share(lives: _Lives, sharers: Sharers) -> None:
    """Find out which processes have merged into the same stable nodes."""
    known = sharers.joined["mm"] != 0
    if not known.any():
        return
    rows = lives.of(sharers.joined[known])
    pairs, counts = np.unique(np.c_[sharers.nodes[known], rows], axis=0, return_counts=True)
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
