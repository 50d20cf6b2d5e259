"""The reconstruction beside the kernel's memory: what differs, and why it may.

The other two comparisons are in :mod:`ksmtrace.kernel.witnesses` (memory beside what is mapped) and
:mod:`ksmtrace.kernel.ksm_check` (memory beside itself).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from ksmtrace.kernel.ksm_memory import (
    MM_SLOT_DTYPE,
    RMAP_ITEM_DTYPE,
    SHARER_DTYPE,
    STABLE_FLAG,
    STABLE_NODE_DTYPE,
    UNSTABLE_NODE_DTYPE,
    KsmMemory,
    NodeKind,
    ScanCursor,
    index_of,
)
from ksmtrace.kernel.ksm_memory import ItemState as MemoryState
from ksmtrace.reconstruct.state import ItemState, TreeState, World

Array = npt.NDArray[Any]
Bools = npt.NDArray[np.bool_]


class Cause(IntEnum):
    """Why the reconstruction differs from the kernel's memory."""

    BEFORE = 1
    """It was there before the recording, and no event has told of it since."""
    LOST = 2
    """Events were lost."""
    NO_EVENT = 3
    """Nothing that was caught tells of it: with tracepoints alone that is a sharer that left
    singly, a page that migrated, and a chain."""
    EMPTY = 4
    """A stable_node without sharers, or a chain without dups, of which no event tells when it is
    freed (mm/ksm.c:remove_stable_node_chain, ksm_check_stable_tree)."""
    CONTRADICTION = 5
    """None of these: the reconstruction or the kernel is wrong."""


class What(IntEnum):
    """What differs."""

    NODE_MISSING = 1
    """A stable_node of the kernel's that the reconstruction does not have."""
    NODE_TOO_MANY = 2
    """A stable_node of the reconstruction that the kernel does not have."""
    KPFN = 3
    """The two have another page frame for a stable_node."""
    CHAIN = 4
    """The two have a stable_node in another chain."""
    SHARER_MISSING = 5
    """A sharer of the kernel's that the reconstruction does not have."""
    SHARER_TOO_MANY = 6
    """A sharer of the reconstruction that the kernel does not have."""
    SHARER_ELSEWHERE = 7
    """The two have a sharer on another node, in another mm or at another address."""
    UNSTABLE_MISSING = 8
    """An rmap_item in the kernel's unstable tree, and not in that of the reconstruction."""
    UNSTABLE_TOO_MANY = 9
    """An rmap_item in the unstable tree of the reconstruction, and not in the kernel's."""
    CHAIN_MISSING = 10
    """A chain of the kernel's that the reconstruction does not have."""
    CHAIN_TOO_MANY = 11
    """A chain of the reconstruction that the kernel does not have."""


DIFFERENCE_DTYPE = np.dtype(
    [("what", "u1"), ("cause", "u1"), ("key", "u8"), ("kernel", "u8"), ("reconstructed", "u8")]
)
"""One difference.

``what``: a :class:`What`. ``cause``: a :class:`Cause`. ``key``: address of the stable_node or of
the rmap_item; with tracepoints alone a node's frame. ``kernel``, ``reconstructed``: the two values
that differ: frame, chain or node; 0 where one side has none.
"""


@dataclass(frozen=True)
class Comparison:
    """The outcome.

    Attributes:
        differences: :data:`DIFFERENCE_DTYPE`.
        compared: how many stable_nodes, sharers, chains and unstable rmap_items the kernel has;
            chains and an unstable tree that the stream does not tell of are missing.
    """

    differences: Array
    compared: Mapping[str, int]

    @property
    def contradictions(self) -> Array:
        """The differences that nothing explains."""
        found: Array = self.differences[self.differences["cause"] == Cause.CONTRADICTION]
        return found


def compare_with_memory(state: TreeState, memory: KsmMemory) -> Comparison:
    """Compare a reconstruction with a consistent reading of the kernel's memory of that time."""
    nodes = memory.stable_nodes[memory.stable_nodes["kind"] != NodeKind.CHAIN]
    by_frame = state.world == World.TRACEPOINTS
    key = "kpfn" if by_frame else "stable_node"
    missing_cause = _missing_cause(state)
    gone_cause = Cause.NO_EVENT if by_frame else _lost(state, Cause.CONTRADICTION)
    found = []

    at = index_of(nodes[key], state.stable_nodes[key])
    told = index_of(state.stable_nodes[key], nodes[key])
    untold = nodes[told < 0]
    found.append(_rows(What.NODE_MISSING, missing_cause, untold[key], untold["kpfn"], 0))
    extra = state.stable_nodes[at < 0]
    cause = np.where(extra["sharers"] == 0, Cause.EMPTY, gone_cause)
    found.append(_rows(What.NODE_TOO_MANY, cause, extra[key], 0, extra["kpfn"]))

    both, theirs = state.stable_nodes[at >= 0], nodes[at[at >= 0]]
    if not by_frame:
        moved = both["kpfn"] != theirs["kpfn"]
        where = both["chain"] != theirs["chain"]
        where &= both["placed"]  # else no event says where ksmd has put it since
        for what, member, differs in ((What.KPFN, "kpfn", moved), (What.CHAIN, "chain", where)):
            ours, others = both[differs], theirs[differs]
            cause = np.where(ours["before_recording"], missing_cause, gone_cause)
            found.append(_rows(what, cause, ours[key], others[member], ours[member]))

    found += _compare_sharers(state, memory, missing_cause, gone_cause, key)
    compared = {
        "stable_nodes": len(nodes),
        "sharers": int(np.count_nonzero(memory.rmap_items["state"] == MemoryState.STABLE)),
    }
    if state.totals.stable_node_chains is not None:
        chains = memory.stable_nodes[memory.stable_nodes["kind"] == NodeKind.CHAIN]
        found += _compare_chains(state, chains["stable_node"], missing_cause, gone_cause)
        compared["chains"] = len(chains)
    if state.totals.pages_unshared is not None:
        found += _compare_unstable(state, memory, missing_cause, gone_cause)
        unstable = memory.rmap_items["state"] == MemoryState.UNSTABLE
        compared["unstable_rmap_items"] = int(np.count_nonzero(unstable))
    return Comparison(np.concatenate(found), compared)


def _missing_cause(state: TreeState) -> Cause:
    # With a first reading of the kernel's memory nothing can be from before.
    return _lost(state, Cause.CONTRADICTION if state.known_from_memory else Cause.BEFORE)


def _lost(state: TreeState, otherwise: Cause) -> Cause:
    return Cause.LOST if any(reason.lost for reason in state.incomplete) else otherwise


def _compare_sharers(
    state: TreeState, memory: KsmMemory, missing_cause: Cause, gone_cause: Cause, key: str
) -> list[Array]:
    theirs = memory.rmap_items[memory.rmap_items["state"] == MemoryState.STABLE]
    ours = state.rmap_items[state.rmap_items["state"] == ItemState.STABLE]
    node_rows = index_of(memory.stable_nodes["stable_node"], theirs["stable_node"])
    their_nodes = np.append(memory.stable_nodes[key], np.uint64(0))[node_rows]
    our_nodes = np.append(state.stable_nodes[key], np.uint64(0))[ours["stable_node"]]

    at = index_of(ours["rmap_item"], theirs["rmap_item"])
    untold, nodes = theirs[at < 0], their_nodes[at < 0]
    found = [_rows(What.SHARER_MISSING, missing_cause, untold["rmap_item"], nodes, 0)]
    held = index_of(theirs["rmap_item"], ours["rmap_item"])
    extra, nodes = ours[held < 0], our_nodes[held < 0]
    found.append(_rows(What.SHARER_TOO_MANY, gone_cause, extra["rmap_item"], 0, nodes))
    both, others = ours[held >= 0], theirs[held[held >= 0]]
    mine, other_nodes = our_nodes[held >= 0], their_nodes[held[held >= 0]]
    differs = (mine != other_nodes) | (both["address"] != others["address"])
    differs |= (both["mm"] != 0) & (both["mm"] != others["mm"])
    found.append(
        _rows(
            What.SHARER_ELSEWHERE,
            gone_cause,
            both["rmap_item"][differs],
            other_nodes[differs],
            mine[differs],
        )
    )
    return found


def _compare_chains(
    state: TreeState, theirs: Array, missing_cause: Cause, gone_cause: Cause
) -> list[Array]:
    ours = state.chains
    extra = ours[~np.isin(ours["chain"], theirs)]
    untold = np.setdiff1d(theirs, ours["chain"])
    cause = np.where(extra["dups"] == 0, Cause.EMPTY, gone_cause)
    return [
        _rows(What.CHAIN_MISSING, missing_cause, untold, 0, 0),
        _rows(What.CHAIN_TOO_MANY, cause, extra["chain"], 0, extra["dups"]),
    ]


def _compare_unstable(
    state: TreeState, memory: KsmMemory, missing_cause: Cause, gone_cause: Cause
) -> list[Array]:
    theirs = memory.rmap_items[memory.rmap_items["state"] == MemoryState.UNSTABLE]["rmap_item"]
    ours = state.rmap_items[state.rmap_items["state"] == ItemState.UNSTABLE]["rmap_item"]
    untold, extra = np.setdiff1d(theirs, ours), np.setdiff1d(ours, theirs)
    return [
        _rows(What.UNSTABLE_MISSING, missing_cause, untold, 0, 0),
        _rows(What.UNSTABLE_TOO_MANY, gone_cause, extra, 0, 0),
    ]


def _rows(what: What, cause: Any, key: Array, kernel: Any, reconstructed: Any) -> Array:
    rows = np.zeros(len(key), DIFFERENCE_DTYPE)
    rows["what"], rows["cause"], rows["key"] = what, cause, key
    rows["kernel"], rows["reconstructed"] = kernel, reconstructed
    return rows


COUNTERS: Mapping[str, Callable[[TreeState], tuple[int | None, int]]] = {
    "ksm_pages_shared": lambda state: (state.totals.pages_shared, 0),
    "ksm_pages_sharing": lambda state: (state.totals.pages_sharing, 0),
    "ksm_pages_unshared": lambda state: (state.totals.pages_unshared, 0),
    "ksm_stable_node_chains": lambda state: (
        state.totals.stable_node_chains,
        state.totals.empty_chains or 0,
    ),
    "ksm_stable_node_dups": lambda state: (state.totals.stable_node_dups, 0),
}
"""The kernel's counter, and what the reconstruction says it is, None where it does not; and by how
much it may be more, as a chain without dups counts until it is freed, which has no event."""


def compare_counters(state: TreeState, memory: KsmMemory) -> dict[str, tuple[int | None, int]]:
    """Return per counter what the reconstruction says, and what the kernel has."""
    said = {}
    for name, say in COUNTERS.items():
        theirs = memory.counters.get(name)
        if theirs is not None:
            ours, spare = say(state)
            said[name] = (ours if ours is None else max(ours, min(theirs, ours + spare)), theirs)
    return said


def as_memory(state: TreeState) -> KsmMemory:
    """Put a reconstruction in the form of a reading of the kernel's memory.

    So that :func:`ksmtrace.kernel.witnesses.compare_witnesses` can compare it with what is mapped,
    where the kernel's own memory cannot be read. Addresses of stable_nodes and mm slots are made
    up: nothing may be looked up by them.
    """
    nodes = np.zeros(len(state.stable_nodes), STABLE_NODE_DTYPE)
    nodes["stable_node"] = np.arange(1, len(nodes) + 1)
    nodes["kpfn"], nodes["nid"] = state.stable_nodes["kpfn"], state.stable_nodes["nid"]
    nodes["kind"], nodes["is_current"] = NodeKind.PLAIN, -1
    slots = np.zeros(len(state.mm_slots), MM_SLOT_DTYPE)
    slots["mm_slot"] = np.arange(1, len(slots) + 1)
    slots["mm"], slots["comm"] = state.mm_slots["mm"], state.mm_slots["comm"]
    slots["pid"] = np.where(state.mm_slots["pid"], state.mm_slots["pid"].astype(np.int64), -1)
    slots["mm_users"] = state.mm_slots["exited_ns"] == 0

    ours = state.rmap_items[np.isin(state.rmap_items["mm"], slots["mm"])]
    items = np.zeros(len(ours), RMAP_ITEM_DTYPE)
    for name in ("rmap_item", "mm", "address"):
        items[name] = ours[name]
    by_mm = np.argsort(slots["mm"], kind="stable")
    last_life = np.searchsorted(slots["mm"][by_mm], ours["mm"], side="right") - 1
    items["mm_slot"] = slots["mm_slot"][by_mm][last_life]
    shares = ours["state"] == ItemState.STABLE
    items["state"] = np.where(shares, MemoryState.STABLE, MemoryState.NONE)
    items["flags"] = np.where(shares, STABLE_FLAG, 0)
    items["stable_node"] = np.where(shares, ours["stable_node"] + 1, 0)
    return KsmMemory(
        counters={},
        cursor=ScanCursor(0, 0, 0, state.scan.seqnr or 0, not state.scan.running),
        stable_nodes=nodes,
        sharers=np.zeros(0, SHARER_DTYPE),
        rmap_items=items,
        unstable_nodes=np.zeros(0, UNSTABLE_NODE_DTYPE),
        nr_unknown_unstable=0,
        mm_slots=slots,
        migrate_nodes=0,
        rmap_item_bytes=0,
        changed=(),
        torn=(),
        attempts=1,
    )
