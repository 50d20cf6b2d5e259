"""What a reconstruction says: the tables of mm/ksm.c's structures at one moment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from ksmtrace.stream import CounterSample, ProcessSeen

Array = npt.NDArray[Any]


class World(IntEnum):
    """By which events the trees are known."""

    NONE = 0
    """Neither of the others: nothing is known."""
    TRACEPOINTS = 1
    """Merges and freed stable_nodes: who joined, and when its node went; nothing between."""
    FUNCTIONS = 2
    """Every join, every departure and every move."""
    MEMORY = 3
    """No events: what the kernel's memory holds at one moment."""
    MAPPED = 4
    """No events: the KSM pages that mergeable memory maps at one moment, and where. A frame stands
    for its stable_node, a place for its rmap_item, a pid for its mm."""

    @property
    def is_live(self) -> bool:
        """Whether it is the running kernel's own state, and no recording's."""
        return self in (World.MEMORY, World.MAPPED)

    @property
    def has_nodes(self) -> bool:
        """Whether stable_nodes are known by themselves, and not by their frames alone."""
        return self in (World.FUNCTIONS, World.MEMORY)


class ItemState(IntEnum):
    """Where an rmap_item is."""

    NONE = 0
    """In no tree, as ksmd last left it."""
    UNSTABLE = 1
    STABLE = 2
    """A sharer of a stable_node; in :attr:`World.TRACEPOINTS` as of its merge."""
    UNKNOWN = 3
    """Not told: it was in the unstable tree or in none, and ksmd has passed it by since, so that
    it is in none now, and may have been freed (smart scan, unmap, exit)."""


STABLE_NODE_DTYPE = np.dtype(
    [
        ("stable_node", "u8"),
        ("generation", "u4"),
        ("kpfn", "u8"),
        ("nid", "i4"),
        ("tree_nid", "i4"),
        ("chain", "u8"),
        ("placed", "?"),
        ("sharers", "u4"),
        ("born_ns", "u8"),
        ("before_recording", "?"),
        ("unseen_sharers", "?"),
        ("moved", "u4"),
        ("moved_ns", "u8"),
    ]
)
"""One stable_node that is there; chains have a table of their own.

``stable_node``: its address, 0 where no event has told it. ``generation``: counts the lives of
that address (in :attr:`World.TRACEPOINTS` of the frame), from 1. ``kpfn``: its page's frame; in
:attr:`World.TRACEPOINTS` as of its last merge. ``nid``: NUMA node of that frame, -1 unknown.
``tree_nid``: stable_node.nid as last told, the tree that it is in; -1 unknown. ``chain``: address
of the chain that it is a dup of, 0 in none. ``placed``: False where ``tree_nid`` and ``chain`` may
be others: no event has told them yet, or it has moved to another NUMA node since and
merge_across_nodes is not known to be 1: with 0 ksmd puts it elsewhere without an event.
``sharers``: rows of ``rmap_items`` that share it. ``born_ns``: when it got its first sharer,
CLOCK_MONOTONIC; 0 where that was not seen. ``before_recording``: its beginning was not seen (in
:attr:`World.TRACEPOINTS` it may also be a node that moved here). ``unseen_sharers``: it may have
sharers that no event has named: ``sharers`` is then at least. ``moved``, ``moved_ns``: how often
its page moved to another frame, and when last; 0 never.
"""

RMAP_ITEM_DTYPE = np.dtype(
    [
        ("rmap_item", "u8"),
        ("generation", "u4"),
        ("mm", "u8"),
        ("pid", "u4"),
        ("address", "u8"),
        ("state", "u1"),
        ("stable_node", "i8"),
        ("since_ns", "u8"),
        ("before_recording", "?"),
        ("seqnr", "u1"),
        ("age", "i2"),
    ]
)
"""One rmap_item that has been told of and may still be there.

``rmap_item``: its address. ``generation``: counts the pages that it has stood for, from 1.
``mm``: address of the mm_struct. ``pid``: tgid of the mm's owner, 0 unknown. ``address``: the
page's virtual address, page-aligned. ``state``: an :class:`ItemState`. ``stable_node``: the row in
``stable_nodes`` of the node that it shares, -1 none. ``since_ns``: CLOCK_MONOTONIC when it became
a sharer, or when ksmd last left it as it is; 0 unknown. ``before_recording``: its becoming a
sharer was not seen. ``seqnr``, ``age``: while UNSTABLE, the low 8 bits of ksm_scan.seqnr of the
pass that put it there, and how many passes ago that was (0 or 1; mm/ksm.c:
remove_rmap_item_from_tree); else 0 and -1.
"""

MM_SLOT_DTYPE = np.dtype(
    [
        ("mm", "u8"),
        ("generation", "u4"),
        ("pid", "u4"),
        ("comm", "S16"),
        ("entered_ns", "u8"),
        ("exited_ns", "u8"),
        ("before_recording", "?"),
        ("zero_pages_placed", "u8"),
    ]
)
"""One mm that events have told of.

``mm``: its address. ``generation``: counts its entries on ksmd's list, from 1. ``pid``: tgid of
its owner, 0 unknown; for an mm of which no event but its ksm_enter tells, that of the task in it,
which is the parent's while a fork registers its child. ``comm``: name of that process, as last
known; empty unknown. ``entered_ns``: of ksm_enter, 0 where not seen. ``exited_ns``: of ksm_exit,
0 where it has not left: its rmap_items stay until ksmd comes by. ``before_recording``: seen first
by something other than its ksm_enter. ``zero_pages_placed``: pages replaced by the zero page;
what became of them since, no event tells.
"""

CHAIN_DTYPE = np.dtype(
    [
        ("chain", "u8"),
        ("generation", "u4"),
        ("nid", "i4"),
        ("dups", "u4"),
        ("born_ns", "u8"),
        ("before_recording", "?"),
    ]
)
"""One chain of stable_nodes with equal content.

``chain``: address of its stable_node. ``generation``: counts the chains at that address, from 1.
``nid``: stable_node.nid of its last dup told of, -1 unknown. ``dups``: rows of ``stable_nodes`` in
it; one without dups may have been freed without an event. ``born_ns``: 0 where not seen.
"""


@dataclass(frozen=True)
class Incomplete:
    """Why, and from when on, the state may not be what the kernel held.

    Attributes:
        since_ns: CLOCK_MONOTONIC; what is older is not affected.
        why: in words.
        kind: name of the kind of event that was lost; "" for another reason.
        lost: how many of them were lost; 0 for another reason.
    """

    since_ns: int
    why: str
    kind: str = ""
    lost: int = 0


@dataclass(frozen=True)
class Older:
    """What was there before the recording, and has not been read from the kernel's memory.

    Attributes:
        stable_nodes, sharers: how many, by the recording's first counter sample.
        known_stable_nodes, known_sharers: those of them that events have named since, as far as
            they are still there.
    """

    stable_nodes: int
    sharers: int
    known_stable_nodes: int
    known_sharers: int


@dataclass(frozen=True)
class Totals:
    """Counts over the tables, by the names of the kernel's counters; None: not known.

    Of what is older than the recording only what has been named counts (:class:`Older`).

    Attributes:
        pages_shared: stable_nodes with at least one sharer.
        pages_sharing: sharers, minus pages_shared.
        pages_unshared: rmap_items in the unstable tree, of this pass or left from the last one.
            While a pass is under way an rmap_item that was freed ahead of ksmd still counts. None
            where not every look at a page is in the stream, or not yet for a whole pass. The page
            that ksmd looked at last is told of when it goes on: until then it may be missing.
        stable_node_chains: chains that have dups; None also where it is not known of some
            stable_node whether it is in one.
        stable_node_dups: stable_nodes in chains.
        empty_chains: chains that had lost all their dups and may have been freed since.
        unseen_sharers_nodes: stable_nodes that may have sharers which no event has named: each
            may add to pages_shared and pages_sharing.
        zero_pages_placed: pages replaced by the zero page during the recording.
    """

    pages_shared: int
    pages_sharing: int
    pages_unshared: int | None
    stable_node_chains: int | None
    stable_node_dups: int | None
    empty_chains: int | None
    unseen_sharers_nodes: int
    zero_pages_placed: int | None


@dataclass(frozen=True)
class Scan:
    """ksmd's passes.

    Attributes:
        seqnr: ksm_scan.seqnr, None unknown: passes that have ended since the last run=2.
        running: whether a pass is under way; None unknown.
        complete: passes that were seen from beginning to end.
    """

    seqnr: int | None
    running: bool | None
    complete: int


@dataclass(frozen=True)
class TreeState:
    """What mm/ksm.c held at ``at_ns``, as far as the stream tells.

    Attributes:
        at_ns: CLOCK_MONOTONIC of the last thing that was taken in.
        world: by which events the trees are known.
        stable_nodes: :data:`STABLE_NODE_DTYPE`, oldest knowledge first.
        rmap_items: :data:`RMAP_ITEM_DTYPE`, oldest knowledge first.
        mm_slots: :data:`MM_SLOT_DTYPE`, oldest knowledge first.
        chains: :data:`CHAIN_DTYPE`; empty where chains are not observable.
        scan: ksmd's passes.
        totals: counts over these tables.
        older: what was there before the recording and is known in part at most; None where there
            was nothing, or all of it is known.
        incomplete: why this may not be what the kernel held; empty where nothing is known to be
            amiss.
        known_from_memory: whether what was there before was read from the kernel's memory.
        not_visible: what the kinds that were caught cannot tell, in words.
        sample: the last counter sample before ``at_ns``: the kernel's own totals.
        first_sample: the recording's first: what was there before it.
        processes: who the pids are.
    """

    at_ns: int
    world: World
    stable_nodes: Array
    rmap_items: Array
    mm_slots: Array
    chains: Array
    scan: Scan
    totals: Totals
    older: Older | None
    incomplete: tuple[Incomplete, ...]
    known_from_memory: bool
    not_visible: tuple[str, ...]
    sample: CounterSample | None
    first_sample: CounterSample | None
    processes: Mapping[int, ProcessSeen]

    def sharers(self) -> Array:
        """Return the rmap_items that share a stable_node, by nodes, shape (n,)."""
        items = self.rmap_items[self.rmap_items["stable_node"] >= 0]
        return items[np.argsort(items["stable_node"], kind="stable")]
