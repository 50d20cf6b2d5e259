"""The trees of the running kernel, now: without a stream, and without a program in the kernel.

Where the kernel's memory can be read, that is what mm/ksm.c holds. Elsewhere it is what user space
is shown: the KSM pages that mergeable memory maps, and where.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from mmap import PAGESIZE
from pathlib import Path

import numpy as np

from ksmtrace import __version__
from ksmtrace.capture.processes import ProcessTable
from ksmtrace.errors import CannotRun, KernelFeatureMissing, PrivilegeMissing
from ksmtrace.kernel import numa, sysfs
from ksmtrace.kernel.files import ROOT
from ksmtrace.kernel.ksm_memory import KsmMemory, KsmMemoryReader
from ksmtrace.kernel.page_truth import PageTruth, read_page_truth
from ksmtrace.reconstruct.columns import Array
from ksmtrace.reconstruct.fold import Fold, nid_of
from ksmtrace.reconstruct.snapshot import take_snapshot
from ksmtrace.reconstruct.state import (
    CHAIN_DTYPE,
    MM_SLOT_DTYPE,
    RMAP_ITEM_DTYPE,
    STABLE_NODE_DTYPE,
    Incomplete,
    ItemState,
    Scan,
    Totals,
    TreeState,
    World,
)
from ksmtrace.stream import CounterSample, Header, ProcessSeen

ATTEMPTS = 23
"""Readings of the kernel's memory, where ksmd is at work during each."""

PAUSE_S = 0.007
"""Between two of them."""

_NOT_MAPPED = (
    "stable_nodes, rmap_items, chains and the unstable tree: the kernel's memory cannot be read "
    "({why})",
    "KSM pages that no mergeable mapping has any more, and stable_nodes whose page is gone",
)
_LYING = (
    "which pages are KSM pages, for certain: {reason}. Shown is what is mapped at several places "
    "and is not known to be something else: pages that a fork shares can be among it, KSM pages "
    "with one place left can be missing"
)


def read_live_tree(notify: Callable[[str], None], root: Path = ROOT) -> tuple[Header, TreeState]:
    """Read what KSM shares at this moment.

    Args:
        notify: is told what takes time.
        root: the tree to read from.

    Returns:
        A header of the kernel's facts, without a plan; and the state, of :attr:`World.MEMORY`
        where the kernel's memory can be read, else of :attr:`World.MAPPED`.

    Raises:
        PrivilegeMissing: this user may read neither of the two.
        KernelFeatureMissing: this kernel offers neither.
    """
    header = _header(root)
    begin_ns = time.monotonic_ns()
    try:
        notify("reading what mm/ksm.c holds")
        with KsmMemoryReader.open(root) as reader:
            memory = reader.read(ATTEMPTS, PAUSE_S)
        return header, state_of_memory(header, memory, begin_ns, root)
    except CannotRun as error:
        why = error
    try:
        notify("reading what mergeable memory maps")
        return header, state_of_pages(header, read_page_truth(root=root), str(why), root)
    except CannotRun as error:
        missing = PrivilegeMissing in (type(why), type(error))
        kind = PrivilegeMissing if missing else KernelFeatureMissing
        hints = dict.fromkeys(hint for hint in (error.hint, why.hint) if hint)
        raise kind(f"{error}; and {why}", "; or ".join(hints) or None) from error


def _header(root: Path) -> Header:
    facts: dict[str, object] = {"kernel": {"release": os.uname().release}, "node_pages": None}
    try:
        nodes = numa.read_node_pages(PAGESIZE, root)
        facts["node_pages"] = {str(node): ranges for node, ranges in nodes.items()}
    except CannotRun:
        pass  # then no page's NUMA node is known
    return Header(__version__, sys.argv, time.monotonic_ns(), time.time_ns(), facts, [], [], {})


def _sample(root: Path) -> CounterSample:
    begin_ns, ksm = time.monotonic_ns(), sysfs.read_ksm(root)
    return CounterSample(begin_ns, time.monotonic_ns(), ksm, {}, {}, {})


# ---- the kernel's memory ----


def state_of_memory(
    header: Header, memory: KsmMemory, begin_ns: int, root: Path = ROOT
) -> TreeState:
    """Put a reading of the kernel's memory in the form of a reconstruction.

    Args:
        header: of the kernel's facts.
        memory: the reading, made just now.
        begin_ns: CLOCK_MONOTONIC before it.
        root: where counters and the names of processes are read.
    """
    fold = Fold(header, World.MEMORY)
    fold.load(memory if memory.consistent else _sound(memory), begin_ns, time.monotonic_ns())
    if not memory.consistent:
        why = f"ksmd was at work during each of {memory.attempts} readings of the kernel's memory"
        fold.incomplete.append(Incomplete(begin_ns, why))
    fold.take(_sample(root))
    who = ProcessTable(root)
    for slot in memory.mm_slots[memory.mm_slots["pid"] > 0]:
        pid, comm = int(slot["pid"]), bytes(slot["comm"])
        for seen in who.name(pid, begin_ns, comm):
            told = comm.decode(errors="replace")
            # In another pid namespace that pid is somebody else.
            stranger = ProcessSeen(begin_ns, pid, None, None, told, None, None, "memory")
            fold.take(seen if seen.comm == told else stranger)
    return take_snapshot(fold)


def _sound(memory: KsmMemory) -> KsmMemory:
    # Of what was read while it changed: each address once, and rmap_items of mms that were seen.
    def once(rows: Array, name: str) -> Array:
        return rows[np.unique(rows[name], return_index=True)[1]]

    slots = once(memory.mm_slots, "mm")
    items = once(memory.rmap_items, "rmap_item")
    return replace(
        memory,
        mm_slots=slots,
        rmap_items=items[np.isin(items["mm"], slots["mm"])],
        stable_nodes=once(memory.stable_nodes, "stable_node"),
    )


# ---- what is mapped ----


def state_of_pages(header: Header, pages: PageTruth, why: str, root: Path = ROOT) -> TreeState:
    """Put what mergeable memory maps in the form of a reconstruction.

    Args:
        header: of the kernel's facts.
        pages: what is mapped, read just now.
        why: the reason that the kernel's memory was not read.
        root: where counters and the names of processes are read.
    """
    at_ns = time.monotonic_ns()
    frames = pages.merged_frames()
    places = pages.pages_by_frame()
    places = places[np.isin(places["pfn"], frames["pfn"])]

    nodes = np.zeros(len(frames), STABLE_NODE_DTYPE)
    nodes["generation"] = 1
    nodes["kpfn"], nodes["sharers"] = frames["pfn"], frames["nr_pages"]
    nodes["nid"], nodes["tree_nid"] = nid_of(header, frames["pfn"]), -1
    nodes["before_recording"] = True
    nodes["unseen_sharers"] = frames["mapcount"] > frames["nr_pages"]

    items = np.zeros(len(places), RMAP_ITEM_DTYPE)
    # No two processes have one: what stands for the mm here is the pid.
    items["mm"] = items["pid"] = places["pid"]
    items["address"] = places["address"]
    items["state"], items["age"] = ItemState.STABLE, -1
    items["stable_node"] = np.searchsorted(frames["pfn"], places["pfn"])
    items["before_recording"] = True

    slots = np.zeros(pages.nr_processes, MM_SLOT_DTYPE)
    slots["mm"] = slots["pid"] = np.unique(pages.ranges["pid"])
    slots["before_recording"] = True
    who = ProcessTable(root)
    processes = {
        pid: seen for pid in slots["pid"].tolist() for seen in who.name(pid, at_ns) if seen.comm
    }
    not_visible = [text.format(why=why) for text in _NOT_MAPPED]
    if not pages.kpf_ksm.truthful and (pages.pages["is_ksm"] < 0).any():
        not_visible.insert(0, _LYING.format(reason=pages.kpf_ksm.reason))
    sample = _sample(root)
    return TreeState(
        at_ns=at_ns,
        world=World.MAPPED,
        stable_nodes=nodes,
        rmap_items=items,
        mm_slots=slots,
        chains=np.zeros(0, CHAIN_DTYPE),
        scan=Scan(None, None, 0),
        totals=Totals(
            pages_shared=len(nodes),
            pages_sharing=len(items) - len(nodes),
            pages_unshared=None,
            stable_node_chains=None,
            stable_node_dups=None,
            empty_chains=None,
            unseen_sharers_nodes=int(np.count_nonzero(nodes["unseen_sharers"])),
            zero_pages_placed=None,
        ),
        older=None,
        incomplete=(),
        known_from_memory=False,
        not_visible=tuple(not_visible),
        sample=sample,
        first_sample=sample,
        processes=processes,
    )
