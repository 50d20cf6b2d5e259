"""What KSM did for each process, and which processes share pages with each other."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pandas as pd

from ksmtrace.analysis.books import unsure_window
from ksmtrace.analysis.lives import Lives, find_lives, with_mm
from ksmtrace.analysis.merges import find_merges, find_zero_merges
from ksmtrace.analysis.recorded import PARTS, Recorded
from ksmtrace.analysis.sharers import Sharers, find_sharers
from ksmtrace.events import EventFlag, Events, of_kind, select
from ksmtrace.stream import CounterSample

_COUNTS = ("ksm_merging_pages", "ksm_rmap_items", "ksm_zero_pages")


@dataclass(frozen=True)
class Partner:
    """Another process, and how many pages of this one are merged with pages of it."""

    pid: int | None
    comm: str | None
    guest: str | None
    pages: int


@dataclass
class Process:
    """One mm, from its first event or sample to its last: what KSM counts by.

    Attributes:
        pid: its owner's tgid, None where no event and no sample tells.
        comm, cgroup, guest: who that was, None where unknown.
        mm: address of the mm_struct, None for a process known from samples only.
        entered_ns, exited_ns: when it came on ksmd's list and left it, within the span or not;
            None where before or after the recording, or not visible.
        merged_pages: pages that became sharers of a stable node, by the events.
        failed_attempts: attempts on its pages that failed or were undone.
        removed_pages: sharers removed together with their node, by the events; a node's last
            sharer has no event of its own, and is among them where its join was caught.
        left_singly_pages: sharers that left a node which stayed (COW, unmap, unmerge, exit), as
            ksmd or an unmerge found out; None where that was not caught.
        visited_pages: pages of it that ksmd looked at; None where there is no event per page.
        zero_merged_pages: pages replaced by the zero page.
        first_merging_pages: mm->ksm_merging_pages in the first sample, or as it entered during
            the recording: 0, but for a forked mm on kernels whose ksm_fork does not reset
            its copy of the parent's count. None where unknown.
        ksm_merging_pages, ksm_rmap_items, ksm_zero_pages: the kernel's own counts at
            ``counted_ns``: as the mm left, or in the last sample of it. None where unknown.
        counted_by: ``ksm_exit`` or ``sample``, None where unknown.
        difference: ksm_merging_pages minus what the events say it should be. -N means that N of
            its pages left without an event: singly or as their node's last sharer where that is
            not caught. None where either is unknown or events were lost.
        shared_with_others_pages: merged pages whose KSM page another process shares as well.
        shared_with: the same by the other process, most pages first.
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
    shared_with: list[Partner] = field(default_factory=list)

    @property
    def name(self) -> str:
        """What people call it: the guest's name, else comm, else its pid."""
        if self.guest:
            return f"guest {self.guest}"
        return self.comm or (f"pid {self.pid}" if self.pid else "unknown")


# Several tables of one report need it.
@functools.lru_cache(maxsize=PARTS)
def find_processes(recorded: Recorded) -> list[Process]:
    """List every mm that KSM dealt with during the recording, or during the part of it."""
    selection = recorded.selection
    if selection is not None and selection.pids is not None:
        return [one for one in find_processes(selection.of) if one.pid in selection.pids]
    lives = find_lives(recorded.whole())
    processes = [
        Process(life.pid, life.mm, entered_ns=life.entered_ns, exited_ns=life.exited_ns)
        for life in lives.lives
    ]
    for process, life in zip(processes, lives.lives, strict=True):
        if _entered_here(recorded, process):
            process.first_merging_pages = life.entered_merging_pages
    merges = find_merges(recorded)
    sharers = find_sharers(recorded)
    zero, zero_ok = find_zero_merges(recorded)
    tallied = {
        "merged_pages": select(merges.events, merges.appended),
        "failed_attempts": select(merges.events, merges.failed | merges.undone),
        "removed_pages": sharers.left_with_node,
        "zero_merged_pages": select(zero, zero_ok),
    }
    if recorded.can_see("remove_rmap_item_from_tree"):
        tallied["left_singly_pages"] = sharers.left_singly
    if recorded.count("cmp_and_merge_page"):
        tallied["visited_pages"] = of_kind(recorded.events, "cmp_and_merge_page")
    for attribute, events in tallied.items():
        counts = np.bincount(lives.of(with_mm(events)), minlength=len(processes))
        for process, count in zip(processes, counts, strict=True):
            setattr(process, attribute, int(count))
    # Each has an event in the whole recording.
    told = set(range(len(processes)))
    if selection is not None:
        told = set(np.unique(lives.of(with_mm(recorded.events))).tolist())
    told |= _add_samples(recorded, processes)
    _add_exits(recorded, lives, processes)
    if not sum(recorded.lost().values()):
        _compare(recorded, lives, processes, sharers)
    for process in processes:
        moment = process.counted_ns or process.entered_ns or recorded.end_ns()
        identity = recorded.identity(process.pid, moment) if process.pid else None
        if identity is not None:
            process.comm = identity.comm
            process.cgroup = identity.cgroup
            process.guest = identity.guest
    _share(lives, processes, sharers)
    return [process for row, process in enumerate(processes) if row in told]


def _entered_here(recorded: Recorded, process: Process) -> bool:
    return process.entered_ns is not None and process.entered_ns >= recorded.begin_ns()


def _add_samples(recorded: Recorded, processes: list[Process]) -> set[int]:
    """Add what the samples tell, and return the indexes of the processes that are in them."""
    by_pid: dict[int, list[int]] = {}
    for row, process in enumerate(processes):
        if process.pid is not None:
            by_pid.setdefault(process.pid, []).append(row)
    told = set()
    for sample in recorded.samples:
        for pid, stat in sample.processes.items():
            rows = by_pid.setdefault(pid, [])
            alive = next((row for row in rows if _alive(processes[row], sample)), None)
            if alive is None:
                alive = len(processes)
                rows.append(alive)
                processes.append(Process(pid=pid))
            told.add(alive)
            process = processes[alive]
            if not any(isinstance(stat.get(name), int) for name in _COUNTS):
                continue  # a kernel that does not count by process
            process.ksm_merging_pages = _number(stat.get("ksm_merging_pages"))
            process.ksm_rmap_items = _number(stat.get("ksm_rmap_items"))
            process.ksm_zero_pages = _number(stat.get("ksm_zero_pages"))
            process.counted_by = "sample"
            process.counted_ns = sample.begin_ns
            if sample is recorded.samples[0] and not _entered_here(recorded, process):
                process.first_merging_pages = process.ksm_merging_pages
    return told


def _alive(process: Process, sample: CounterSample) -> bool:
    begun = process.entered_ns is None or process.entered_ns <= sample.begin_ns
    ended = process.exited_ns is not None and process.exited_ns < sample.begin_ns
    return begun and not ended


def _add_exits(recorded: Recorded, lives: Lives, processes: list[Process]) -> None:
    counts_zero_pages = recorded.has_field("ksm_exit", "ksm_zero_pages")
    exits = of_kind(recorded.events, "ksm_exit")
    for event, row in zip(exits, lives.of(exits), strict=True):
        if event["flags"] & EventFlag.HAS_COUNTS:
            process = processes[row]
            process.ksm_merging_pages = int(event["ksm_merging_pages"])
            process.ksm_rmap_items = int(event["ksm_rmap_items"])
            if counts_zero_pages:
                process.ksm_zero_pages = int(event["ksm_zero_pages"])
            process.counted_by = "ksm_exit"
            process.counted_ns = int(event["ts_ns"])


def _compare(recorded: Recorded, lives: Lives, processes: list[Process], sharers: Sharers) -> None:
    gained_ns, gains = _when_and_whose(lives, sharers.joined)
    lost_ns, losses = map(
        np.concatenate,
        zip(
            _when_and_whose(lives, sharers.left_singly),
            _when_and_whose(lives, sharers.left_with_node),
            strict=True,
        ),
    )
    samples = {sample.begin_ns: sample for sample in recorded.samples}

    @functools.cache
    def window(sample_ns: int) -> tuple[int, int]:
        return unsure_window(recorded.whole(), samples[sample_ns])

    for row, process in enumerate(processes):
        if process.mm is None or process.ksm_merging_pages is None:
            continue
        if process.first_merging_pages is None or process.counted_ns is None:
            continue
        read_ns = [process.counted_ns] if process.counted_by == "sample" else []
        begin_ns = 0
        if not _entered_here(recorded, process):
            read_ns.append(recorded.samples[0].begin_ns)
            begin_ns = recorded.samples[0].end_ns
        gained, lost = gained_ns[gains == row], lost_ns[losses == row]
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


def _when_and_whose(
    lives: Lives, events: Events
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]:
    known = with_mm(events)
    return known["ts_ns"].copy(), lives.of(known)


def _share(lives: Lives, processes: list[Process], sharers: Sharers) -> None:
    """Find out which processes have merged into the same stable nodes."""
    known = sharers.joined["mm"] != 0
    if not known.any():
        return
    rows = lives.of(select(sharers.joined, known))
    pairs, counts = np.unique(np.c_[sharers.nodes[known], rows], axis=0, return_counts=True)
    shares = pd.DataFrame({"node": pairs[:, 0], "row": pairs[:, 1], "pages": counts})
    shares = shares[shares.duplicated("node", keep=False)]
    totals = shares.groupby("row", as_index=False)["pages"].sum()
    for row, pages in zip(totals["row"].tolist(), totals["pages"].tolist(), strict=True):
        processes[row].shared_with_others_pages = pages
    partners = shares.merge(shares[["node", "row"]], on="node", suffixes=("", "_other"))
    partners = partners[partners["row"] != partners["row_other"]]
    totals = partners.groupby(["row", "row_other"], as_index=False)["pages"].sum()
    counted = sorted(totals.itertuples(index=False, name=None), key=lambda row: -row[2])
    for row, other_row, pages in counted:
        other = processes[other_row]
        processes[row].shared_with.append(Partner(other.pid, other.comm, other.guest, pages))


def _number(value: int | str | None) -> int | None:
    return value if isinstance(value, int) else None
