"""Which page frames the mergeable memory of all processes maps: KSM's work as user space has it.

The "page truth": from /proc/PID/smaps, pagemap, kpageflags and kpagecount, without any knowledge
of mm/ksm.c.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from mmap import PAGESIZE
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ksmtrace.kernel.files import ROOT
from ksmtrace.kernel.pages import (
    PM_PRESENT,
    PM_SWAP,
    frame_numbers,
    has_flag,
    probe_kpf_ksm,
    read_kpagecount,
    read_kpageflags,
    read_pagemap,
)
from ksmtrace.kernel.probes import KpfProbe
from ksmtrace.kernel.procfs import MappingKsm, iter_pids, read_ksm_stat, read_smaps_ksm

RANGE_DTYPE = np.dtype([("pid", "i4"), ("start", "u8"), ("end", "u8")])
"""One mergeable mapping: its process, first address, first address after it."""

PAGE_DTYPE = np.dtype(
    [
        ("pid", "i4"),
        ("address", "u8"),
        ("pfn", "u8"),
        ("is_ksm", "i1"),
        ("mapcount", "u4"),
        ("kpageflags", "u8"),
    ]
)
"""One page that is present in a mergeable mapping.

``pid``, ``address``: where it is mapped. ``pfn``: its frame. ``is_ksm``: 1 a KSM page, 0 none, -1
not to be told (see :attr:`PageTruth.kpf_ksm`); a zero page placed by KSM is none (KPF_ZERO_PAGE).
``mapcount``: how often the frame is mapped, by any process anywhere (/proc/kpagecount).
``kpageflags``: as :data:`ksmtrace.kernel.pages.KPF_BITS` names them.
"""

FRAME_DTYPE = np.dtype(
    [("pfn", "u8"), ("is_ksm", "i1"), ("mapcount", "u4"), ("nr_pages", "u4"), ("first", "u4")]
)
"""One frame: ``pfn``, ``is_ksm``, ``mapcount`` as in :data:`PAGE_DTYPE`. ``nr_pages``: at how many
places of mergeable mappings it is mapped; less than ``mapcount`` where others map it too.
``first``: index of the first of these places in the pages ordered by frame."""

Array = npt.NDArray[Any]
Bools = npt.NDArray[np.bool_]
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PageTruth:
    """What mergeable memory maps.

    Processes that share one mm (CLONE_VM without CLONE_THREAD) each show all of its pages.

    Attributes:
        ranges: the mergeable mappings, by pid and address; :data:`RANGE_DTYPE`.
        pages: their present pages, by pid and address; :data:`PAGE_DTYPE`.
        kpf_ksm: whether KPF_KSM tells KSM pages from other anonymous ones on this kernel. Where it
            does not, ``is_ksm`` is 0 where the flag is clear or the page is part of a huge one, 1
            where one mm maps the page twice, which nothing else brings about, and 0 or 1 where the
            count of KSM pages in smaps (6.6 and later) settles it; otherwise -1:
            :meth:`merged_frames` is what is left.
        nr_processes: processes with mergeable mappings, those that vanished not counted.
        nr_vanished: processes that ended before all of theirs was read; none of it is here.
        nr_swapped: pages of these mappings that are swapped out, or being moved.
        nr_moved: pages left out because their place mapped another frame at the end of the
            reading.
    """

    ranges: Array
    pages: Array
    kpf_ksm: KpfProbe
    nr_processes: int
    nr_vanished: int
    nr_swapped: int
    nr_moved: int

    def pages_by_frame(self) -> Array:
        """Return the pages ordered by frame, then pid and address."""
        return self.pages[np.argsort(self.pages["pfn"], kind="stable")]

    def frames(self) -> Array:
        """Group the pages by frame.

        Returns:
            By pfn; :data:`FRAME_DTYPE`. The places of frame f are
            ``pages_by_frame()[f["first"] : f["first"] + f["nr_pages"]]``.
        """
        ordered = self.pages_by_frame()
        pfns, first, counts = np.unique(ordered["pfn"], return_index=True, return_counts=True)
        found = np.zeros(len(pfns), FRAME_DTYPE)
        found["pfn"], found["first"], found["nr_pages"] = pfns, first, counts
        for member in ("is_ksm", "mapcount"):
            found[member] = ordered[member][first]
        return found

    def merged_frames(self) -> Array:
        """Select the frames that KSM may have merged.

        Returns:
            Some of :meth:`frames`. Where KPF_KSM can be trusted, those that have it. Where not,
            those at several places that are not certainly something else: pages that fork shares
            are among them, KSM pages that only one place is left of are not.
        """
        frames = self.frames()
        is_candidate = (frames["is_ksm"] < 0) & (frames["nr_pages"] > 1)
        chosen: Array = frames[(frames["is_ksm"] == 1) | is_candidate]
        return chosen


def read_page_truth(
    pids: Iterable[int] | None = None, kpf_ksm: KpfProbe | None = None, root: Path = ROOT
) -> PageTruth:
    """Read which frames mergeable memory maps; exact only where no process and ksmd change that.

    Takes the mmap lock of every process for reading, page table by page table (smaps, pagemap).

    Args:
        pids: the processes to look at; None for all.
        kpf_ksm: the outcome of :func:`ksmtrace.kernel.pages.probe_kpf_ksm`; None to find out.
        root: the tree that has ``proc``.

    Raises:
        KernelFeatureMissing: no CONFIG_PROC_PAGE_MONITOR.
        PrivilegeMissing: not root.
        KernelInterfaceError: reading failed.
    """
    probe = probe_kpf_ksm() if kpf_ksm is None else kpf_ksm
    nr_vanished = nr_swapped = 0
    ranges: list[tuple[int, int, int]] = []
    counted: list[int] = []
    pages: list[Array] = []
    for pid in iter_pids(root) if pids is None else sorted(pids):
        mappings = _mergeable_mappings(pid, root)
        if not mappings:
            continue
        mergeable = [(pid, mapping.start, mapping.end) for mapping in mappings]
        entries = _read_ranges(mergeable, root)
        if entries is None:
            nr_vanished += 1
            continue
        ranges.extend(mergeable)
        counted += [-1 if (size := m.ksm_bytes) is None else size // PAGESIZE for m in mappings]
        nr_swapped += int((entries["entry"] & np.uint64(PM_SWAP) != 0).sum())
        pages.append(_present(entries))

    found = np.concatenate([np.zeros(0, PAGE_DTYPE), *pages])
    found["kpageflags"] = read_kpageflags(found["pfn"], root)
    found["mapcount"] = read_kpagecount(found["pfn"], root)
    found["is_ksm"] = _is_ksm(found["kpageflags"], probe)
    if not probe.truthful:
        _settle(found, ranges, np.array(counted, np.int64))

    # A frame may have been freed and used again before its flags were read.
    kept, left, nr_moved = [np.zeros(0, PAGE_DTYPE)], [], 0
    for pid, chosen in _by_pid(ranges):
        before = found[found["pid"] == pid]
        entries = _read_ranges(chosen, root)
        if entries is None:
            nr_vanished += 1
            continue
        after = _present(entries)
        same = _rows_in(before, after)
        nr_moved += int((~same).sum())
        kept.append(before[same])
        left.extend(chosen)
    return PageTruth(
        ranges=np.array(left, RANGE_DTYPE),
        pages=np.concatenate(kept),
        kpf_ksm=probe,
        nr_processes=len({pid for pid, _, _ in left}),
        nr_vanished=nr_vanished,
        nr_swapped=nr_swapped,
        nr_moved=nr_moved,
    )


# The mergeable mappings of a process: none where it is gone too.
def _mergeable_mappings(pid: int, root: Path) -> list[MappingKsm]:
    stat = read_ksm_stat(pid, root)
    # Where the kernel tells (6.16 and later) smaps, which walks page tables, is read of few only.
    if stat is None or stat["ksm_mergeable"] == "no":
        return []
    return [mapping for mapping in read_smaps_ksm(pid, root) or [] if mapping.mergeable]


def _by_pid(
    ranges: list[tuple[int, int, int]],
) -> Iterable[tuple[int, list[tuple[int, int, int]]]]:
    grouped: dict[int, list[tuple[int, int, int]]] = {}
    for chosen in ranges:
        grouped.setdefault(chosen[0], []).append(chosen)
    return grouped.items()


_ENTRY_DTYPE = np.dtype([("pid", "i4"), ("address", "u8"), ("entry", "u8")])


# The pagemap of some ranges of one process, without the places that have nothing; None where it
# is gone.
def _read_ranges(ranges: list[tuple[int, int, int]], root: Path) -> Array | None:
    parts = []
    for pid, start, end in ranges:
        entries = read_pagemap(pid, start, end, root)
        if entries is None:
            return None
        places = np.flatnonzero(entries & np.uint64(PM_PRESENT | PM_SWAP))
        part = np.zeros(len(places), _ENTRY_DTYPE)
        page_bytes = (end - start) // len(entries)
        part["pid"] = pid
        part["address"] = np.uint64(start) + places.astype(np.uint64) * np.uint64(page_bytes)
        part["entry"] = entries[places]
        parts.append(part)
    return np.concatenate(parts)


def _present(entries: Array) -> Array:
    pfns = frame_numbers(entries["entry"])
    found = np.zeros(int((pfns != 0).sum()), PAGE_DTYPE)
    found["pid"] = entries["pid"][pfns != 0]
    found["address"] = entries["address"][pfns != 0]
    found["pfn"] = pfns[pfns != 0]
    return found


def _is_ksm(flags: Array, probe: KpfProbe) -> Array:
    flagged = has_flag(flags, "KSM")
    if probe.truthful:
        return flagged.astype(np.int8)
    # mm/ksm.c:try_to_merge_one_page splits huge pages first.
    is_part = has_flag(flags, "COMPOUND_HEAD") | has_flag(flags, "COMPOUND_TAIL")
    return np.where(flagged & ~is_part, -1, 0).astype(np.int8)


# Tells what follows where the flag does not tell. Both pages and ranges are by pid and address;
# counted is the number of KSM pages in each range, -1 unknown.
def _settle(pages: Array, ranges: list[tuple[int, int, int]], counted: Counts) -> None:
    frames, frame = np.unique(pages["pfn"], return_inverse=True)
    pids, who = np.unique(pages["pid"], return_inverse=True)
    range_of = np.zeros(len(pages), np.intp)
    chosen = np.array(ranges, RANGE_DTYPE)
    for pid in pids:
        mine, first = pages["pid"] == pid, int(np.searchsorted(chosen["pid"], pid))
        starts = chosen["start"][chosen["pid"] == pid]
        range_of[mine] = first + np.searchsorted(starts, pages["address"][mine], side="right") - 1

    # Fork maps a page in one more mm; that one mm maps it twice, nothing but KSM brings about.
    places, times = np.unique(frame * len(pids) + who, return_counts=True)
    settled = np.full(len(frames), -1, np.int8)
    settled[frame[pages["is_ksm"] == 0]] = 0
    settled[(places // len(pids))[times > 1]] = 1
    # What one range's count settles may settle what is left in another.
    before = -1
    while (settled >= 0).sum() > before:
        before = int((settled >= 0).sum())
        known = settled[frame]
        left = counted - np.bincount(range_of[known == 1], minlength=len(chosen))
        open_ones = np.bincount(range_of[known < 0], minlength=len(chosen))
        for value, is_so in ((0, left == 0), (1, left == open_ones)):
            is_so &= (counted >= 0) & (open_ones > 0)
            settled[frame[(known < 0) & is_so[range_of]]] = value
    pages["is_ksm"] = settled[frame]


# Which of one process's pages are the same in another reading.
def _rows_in(pages: Array, others: Array) -> Bools:
    if len(others) == 0:
        return np.zeros(len(pages), np.bool_)
    at = np.minimum(np.searchsorted(others["address"], pages["address"]), len(others) - 1)
    same: Bools = (others["address"][at] == pages["address"]) & (others["pfn"][at] == pages["pfn"])
    return same
