"""The two witnesses side by side: what mm/ksm.c holds, and what mergeable memory maps.

mm/ksm.c learns of most changes only when ksmd next visits a page, so the two may differ by right;
every difference gets its cause here, or is a contradiction.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from ksmtrace.kernel.ksm_memory import ItemState, KsmMemory, index_of
from ksmtrace.kernel.page_truth import PageTruth


class Cause(IntEnum):
    """Why a place differs: the first that applies, in this order."""

    EXITED = 1
    """STABLE rmap_item of an mm without users: ksmd has not come by since
    (mm/ksm.c:__ksm_exit leaves the slot to it)."""
    NOT_READ = 2
    """STABLE rmap_item of an mm whose process the page truth does not have: it vanished, is in
    another pid namespace, was not asked for, or the owner is unknown."""
    UNMERGED = 3
    """STABLE rmap_item at an address that is no longer in a mergeable mapping: munmap, mremap,
    exec, MADV_UNMERGEABLE."""
    DROPPED = 4
    """STABLE rmap_item at an address of a mergeable mapping where no page is present: swapped out,
    MADV_DONTNEED, being moved."""
    WRITTEN = 5
    """STABLE rmap_item at an address that maps a page which is no KSM page, or cannot be told from
    one and is no node's: copied on write, or mapped anew. The frame can be the node's own, now
    stale: on some kernels the last sharer's write makes it an ordinary page again
    (mm/ksm.c:reuse_ksm_page)."""
    OTHER_NODE = 6
    """STABLE rmap_item at an address that maps the KSM page of another node; only mremap onto that
    address brings that about by right."""
    NOT_SCANNED = 7
    """A KSM page of a node, at a place without an rmap_item: fork and mremap copy mappings, and
    ksmd adds the rmap_items when it comes by (mm/ksm.c, comment at remove_trailing_rmap_items).
    Also every merged page of a process that shares the mm of another, its owner."""
    DETACHED = 8
    """A KSM page of a node, at a place whose rmap_item is not STABLE until a later pass: ksmd met
    the page on another NUMA node while its node was full, or a page locked (mm/ksm.c:
    cmp_and_merge_page takes the rmap_item off where stable_tree_search gives no page)."""
    NO_NODE = 9
    """A KSM page that no node has: the node was freed while the page was still mapped
    (mm/ksm.c:remove_stable_node), or a merge failed halfway and the copy that undoes it
    (break_cow) failed too."""
    CONTRADICTION = 10
    """STABLE rmap_item whose place maps its current node's page, flagged as no KSM page; or a KSM
    page that no node has."""


DIFFERENCE_DTYPE = np.dtype(
    [
        ("pid", "i4"),
        ("address", "u8"),
        ("kpfn", "u8"),
        ("pfn", "u8"),
        ("rmap_item", "u8"),
        ("cause", "u1"),
    ]
)
"""One place at which the witnesses differ.

``pid``, ``address``: the place; pid -1 where the owner is unknown. ``kpfn``: the frame of the
rmap_item's node, 0 where the place has no STABLE rmap_item. ``pfn``: the frame mapped, 0 for none.
``rmap_item``: address of the place's, STABLE or not, 0 for none. ``cause``: a :class:`Cause`.
"""

Array = npt.NDArray[Any]
Bools = npt.NDArray[np.bool_]


def compare_witnesses(memory: KsmMemory, pages: PageTruth) -> Array:
    """Find every place at which the two witnesses differ.

    Where KPF_KSM cannot be trusted, a KSM page is one whose frame a current node has, so that
    :attr:`Cause.NO_NODE` cannot be seen.

    Args:
        memory: a consistent reading.
        pages: read while nothing changed since.

    Returns:
        :data:`DIFFERENCE_DTYPE`, first the STABLE rmap_items in their order, then the pages in
        theirs; empty where both say the same of every place.
    """
    return np.concatenate([_from_items(memory, pages), _from_pages(memory, pages)])


class _Places:
    # Numbers places so that two arrays of them can be looked up in each other: 45 bits for the page
    # of an address, with five levels of page tables, and what is left for the process.

    def __init__(self, pids: Array) -> None:
        self.pids = np.unique(pids)

    def keys(self, pids: Array, addresses: Array) -> Array:
        number = np.searchsorted(self.pids, pids).astype(np.uint64)
        return (addresses >> np.uint64(12)) | (number << np.uint64(45))


# The place and the node's frame of each STABLE rmap_item; whether its mm has exited, and whether
# its node is stale.
def _stable(memory: KsmMemory) -> tuple[Array, Bools, Bools]:
    items = memory.rmap_items[memory.rmap_items["state"] == ItemState.STABLE]
    owners = memory.mm_slots[index_of(memory.mm_slots["mm_slot"], items["mm_slot"])]
    at = index_of(memory.stable_nodes["stable_node"], items["stable_node"])
    # An rmap_item whose node is nowhere gets a row of zeros.
    nodes = np.append(memory.stable_nodes, np.zeros(1, memory.stable_nodes.dtype))[at]
    found = np.zeros(len(items), DIFFERENCE_DTYPE)
    found["pid"] = owners["pid"]
    found["address"], found["rmap_item"] = items["address"], items["rmap_item"]
    found["kpfn"] = nodes["kpfn"]
    return found, owners["mm_users"] == 0, nodes["is_current"] == 0


def _from_items(memory: KsmMemory, pages: PageTruth) -> Array:
    found, exited, stale = _stable(memory)
    places = _Places(np.concatenate([found["pid"], pages.pages["pid"]]))
    where = index_of(
        places.keys(pages.pages["pid"], pages.pages["address"]),
        places.keys(found["pid"], found["address"]),
    )
    present = where >= 0
    found["pfn"][present] = pages.pages["pfn"][where[present]]
    is_ksm = np.zeros(len(found), np.int8)
    is_ksm[present] = pages.pages["is_ksm"][where[present]]
    nodes = memory.stable_nodes
    of_a_node = np.isin(found["pfn"], nodes["kpfn"][nodes["is_current"] != 0])
    same = present & (found["pfn"] == found["kpfn"])
    cause = np.select(
        [
            exited,
            ~np.isin(found["pid"], pages.ranges["pid"]),
            ~_in_ranges(found, pages.ranges),
            ~present,
            same & ~stale & (is_ksm != 0),
            same & ~stale,
            of_a_node,
            is_ksm != 1,
        ],
        [
            Cause.EXITED,
            Cause.NOT_READ,
            Cause.UNMERGED,
            Cause.DROPPED,
            0,
            Cause.CONTRADICTION,
            Cause.OTHER_NODE,
            Cause.WRITTEN,
        ],
        Cause.CONTRADICTION,
    )
    found["cause"] = cause
    differing: Array = found[cause != 0]
    return differing


def _from_pages(memory: KsmMemory, pages: PageTruth) -> Array:
    stable, _, _ = _stable(memory)
    nodes = memory.stable_nodes
    of_a_node = np.isin(pages.pages["pfn"], nodes["kpfn"][nodes["is_current"] != 0])
    chosen = (pages.pages["is_ksm"] == 1) | (pages.pages["is_ksm"] == -1) & of_a_node
    others = memory.rmap_items[memory.rmap_items["state"] != ItemState.STABLE]
    owners = memory.mm_slots[index_of(memory.mm_slots["mm_slot"], others["mm_slot"])]
    places = _Places(np.concatenate([stable["pid"], pages.pages["pid"], owners["pid"]]))
    keys = places.keys(pages.pages["pid"], pages.pages["address"])
    chosen &= index_of(places.keys(stable["pid"], stable["address"]), keys) < 0

    found = np.zeros(int(chosen.sum()), DIFFERENCE_DTYPE)
    for member in ("pid", "address", "pfn"):
        found[member] = pages.pages[member][chosen]
    at = index_of(places.keys(owners["pid"], others["address"]), keys[chosen])
    found["rmap_item"][at >= 0] = others["rmap_item"][at[at >= 0]]
    found["cause"] = np.select(
        [~of_a_node[chosen], found["rmap_item"] != 0],
        [Cause.NO_NODE, Cause.DETACHED],
        Cause.NOT_SCANNED,
    )
    return found


# Which places lie in mergeable mappings of their process.
def _in_ranges(places: Array, ranges: Array) -> Bools:
    inside = np.zeros(len(places), np.bool_)
    for pid in np.unique(ranges["pid"]):
        mine = places["pid"] == pid
        chosen = ranges[ranges["pid"] == pid]
        at = np.searchsorted(chosen["start"], places["address"][mine], side="right") - 1
        inside[mine] = (at >= 0) & (places["address"][mine] < chosen["end"][np.maximum(at, 0)])
    return inside
