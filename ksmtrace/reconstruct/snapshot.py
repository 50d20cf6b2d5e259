"""Puts the tables of a fold together: what mm/ksm.c holds at this moment."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ksmtrace.kernel.ksm_memory import FLAG_MASK, SEQNR_MASK
from ksmtrace.reconstruct.columns import Array, Rows
from ksmtrace.reconstruct.fold import SPAN_DTYPE, Fold, can_see, nid_of
from ksmtrace.reconstruct.state import (
    CHAIN_DTYPE,
    MM_SLOT_DTYPE,
    RMAP_ITEM_DTYPE,
    STABLE_NODE_DTYPE,
    ItemState,
    Older,
    Scan,
    Totals,
    TreeState,
    World,
)
from ksmtrace.stream import ProcessSeen

_FOREVER_NS = np.iinfo(np.uint64).max

_UNSEEN_BY_TRACEPOINTS = (
    "sharers that left singly (COW, unmap, unmerge, exit): a sharer is one as of its merge",
    "pages that moved to other frames: a node is at its frame as of its last merge",
    "chains, and the unstable tree",
)


def take_snapshot(fold: Fold) -> TreeState:
    """Say what the kernel holds after all that the fold has taken in.

    Takes time by what there is and not by what has happened, and leaves the fold as it is.
    """
    fold.settle()
    joined = _Joined(fold)
    nodes, node_of_row = _stable_nodes(fold, joined)
    items = _rmap_items(fold, joined, node_of_row, len(nodes))
    chains = _chains(fold, nodes)
    mm_slots = _mm_slots(fold)
    older = _older(fold, nodes, items)
    return TreeState(
        at_ns=fold.last_ns,
        world=fold.world,
        stable_nodes=nodes,
        rmap_items=items,
        mm_slots=mm_slots,
        chains=chains,
        scan=Scan(fold.passes.seqnr, fold.passes.running, fold.passes.complete),
        totals=_totals(fold, nodes, items, chains, mm_slots, older),
        older=older,
        incomplete=tuple(fold.incomplete),
        known_from_memory=fold.known_from_memory,
        not_visible=_not_visible(fold),
        sample=fold.sample,
        first_sample=fold.first_sample,
        processes={
            pid: identity_at(known, fold.last_ns) for pid, known in fold.seen.items() if known
        },
    )


def identity_at(known: Sequence[ProcessSeen], ts_ns: int) -> ProcessSeen:
    """Return the last identity until then; one read a moment later is still the same process's."""
    before = [seen for seen in known if seen.ts_ns <= ts_ns]
    return before[-1] if before else known[0]


class _Joined:
    # Which rmap_items share which node.
    #
    # rows: the rmap_items that may still be there. node_row: the row of the node that each of
    # them shares, -1 none. frame: where that node has no row, the frame that it is at, else 0.
    # seen: whether it was seen to join.

    def __init__(self, fold: Fold) -> None:
        items, nodes = fold.items, fold.nodes
        order = np.maximum(items["order"], items["hint_order"])
        mm_rows = items["mm_row"]
        # An mm that comes on ksmd's list has no rmap_item yet (mm/ksm.c:__ksm_enter).
        there = (order > fold.reset_order) & (order >= 0) & (mm_rows >= 0)
        there &= fold.mms["generation"][mm_rows] == items["mm_generation"] if len(items) else True
        self.rows = np.flatnonzero(there)
        node_row = np.where(items["state"] == ItemState.STABLE, items["node_row"], np.int64(-1))[
            self.rows
        ]
        at = np.maximum(node_row, 0)
        known = node_row >= 0
        still = known.copy()
        if len(nodes):
            still &= open_nodes(fold)[at]
            still &= nodes["generation"][at] == items["node_generation"][self.rows]
            still &= items["order"][self.rows] >= nodes["emptied_order"][at]
            gone_order = np.where(
                nodes["generation"][at] == items["node_generation"][self.rows],
                np.maximum(nodes["closed_order"][at], nodes["emptied_order"][at]),
                np.iinfo(np.int64).max,
            )
        else:
            gone_order = np.zeros(len(self.rows), np.int64)
        self.seen = still.copy()
        self.node_row = np.where(still, node_row, -1)
        self.frame = np.zeros(len(self.rows), np.uint64)
        # ksmd found it in place after all that is known of it.
        hinted = items["hint_order"][self.rows]
        found = ~still & (hinted > items["order"][self.rows]) & (hinted > fold.reset_order)
        found &= ~known | (hinted > gone_order)
        if found.any():
            self._find_by_frame(fold, np.flatnonzero(found))

    def _find_by_frame(self, fold: Fold, found: Rows) -> None:
        # The node whose page was at the frame that ksmd looked at, then.
        items, nodes = fold.items, fold.nodes
        rows = self.rows[found]
        spans = _spans(fold)
        kpfn, when_ns = items["hint_kpfn"][rows], items["hint_ns"][rows]
        self.frame[found] = kpfn
        if not len(spans):
            return
        by = np.lexsort((spans["from_ns"], spans["kpfn"]))
        spans = spans[by]
        # The last span of that frame that has begun by then.
        low = np.searchsorted(spans["kpfn"], kpfn, side="left")
        high = np.searchsorted(spans["kpfn"], kpfn, side="right")
        at = np.full(len(found), -1, np.int64)
        for back in range(1, int((high - low).max(initial=0)) + 1):
            candidate = high - back
            fits = (at < 0) & (candidate >= low)
            picked = spans[np.maximum(candidate, 0)]
            fits &= (picked["from_ns"] <= when_ns) & (when_ns < picked["until_ns"])
            at[fits] = candidate[fits]
        has = at >= 0
        self.frame[found[has]] = 0
        span = spans[at[has]]
        to = span["node_row"]
        still = open_nodes(fold)[to] & (nodes["generation"][to] == span["node_generation"])
        still &= items["hint_order"][rows[has]] >= nodes["emptied_order"][to]
        self.node_row[found[has]] = np.where(still, to, -1)


def open_nodes(fold: Fold) -> npt.NDArray[np.bool_]:
    """Say per row of the fold's nodes whether the node is there."""
    there: npt.NDArray[np.bool_] = fold.nodes["open"] & (
        fold.nodes["seen_order"] > fold.lost_nodes_order
    )
    return there


def _spans(fold: Fold) -> Array:
    # All frames at which nodes have been whose beginning was not seen, with the present ones.
    nodes = fold.nodes
    now = np.flatnonzero(open_nodes(fold) & nodes["unseen_birth"])
    present = np.zeros(len(now), SPAN_DTYPE)
    present["kpfn"] = nodes["kpfn"][now]
    present["from_ns"] = nodes["kpfn_since_ns"][now]
    present["until_ns"] = _FOREVER_NS
    present["node_row"] = now
    present["node_generation"] = nodes["generation"][now]
    return np.concatenate([*fold.spans, present])


def _stable_nodes(fold: Fold, joined: _Joined) -> tuple[Array, Rows]:
    # Returns the nodes that are there, and per row of the fold's its place among them, -1 none.
    # Behind them those that are known by their frame alone, by rising frames.
    nodes = fold.nodes
    rows = np.flatnonzero(open_nodes(fold))
    place = np.full(len(nodes), -1, np.int64)
    place[rows] = np.arange(len(rows))
    frames = np.unique(joined.frame[joined.frame != 0])
    found = np.zeros(len(rows) + len(frames), STABLE_NODE_DTYPE)
    told, untold = found[: len(rows)], found[len(rows) :]
    if fold.world.has_nodes:
        told["stable_node"] = nodes.keys[rows]
    for name in ("generation", "kpfn", "tree_nid", "chain", "born_ns", "moved", "moved_ns"):
        told[name] = nodes[name][rows]
    told["before_recording"] = nodes["unseen_birth"][rows]
    told["unseen_sharers"] = nodes["unseen_birth"][rows] & (nodes["emptied_order"][rows] < 0)
    told["placed"] = (nodes["tree_nid"][rows] >= 0) & (~nodes["crossed"][rows] | _is_one_tree(fold))
    untold["generation"] = 1
    untold["kpfn"] = frames
    untold["tree_nid"] = -1
    untold["before_recording"] = untold["unseen_sharers"] = True
    found["nid"] = nid_of(fold.header, found["kpfn"])
    has = joined.node_row >= 0
    found["sharers"][: len(rows)] = np.bincount(place[joined.node_row[has]], minlength=len(rows))
    by_frame = joined.frame != 0
    found["sharers"][len(rows) :] = np.bincount(
        np.searchsorted(frames, joined.frame[by_frame]), minlength=len(frames)
    )
    return found, place


def _is_one_tree(fold: Fold) -> bool:
    # Whether all NUMA nodes are known to share a tree: by what was told last. A kernel without the
    # knob has one tree. The knob can change only while nothing is merged (mm/ksm.c:
    # merge_across_nodes_store), so what was told before that is no longer known.
    told_ns, one_tree = fold.one_tree or (0, True)
    if fold.sample is not None and fold.sample.begin_ns > told_ns:
        told_ns = fold.sample.begin_ns
        one_tree = fold.sample.ksm.get("merge_across_nodes") != 0
    return one_tree and fold.unmerged_ns <= told_ns


def _rmap_items(fold: Fold, joined: _Joined, place: Rows, nr_nodes: int) -> Array:
    items, mms, rows = fold.items, fold.mms, joined.rows
    found = np.zeros(len(rows), RMAP_ITEM_DTYPE)
    if not len(rows):
        return found
    mm_rows = items["mm_row"][rows]
    found["rmap_item"] = items.keys[rows]
    found["generation"] = items["generation"][rows]
    found["mm"] = mms.keys[mm_rows]
    pids = _pids(fold)
    found["pid"] = pids[mm_rows]
    found["address"] = items["address"][rows]
    state = items["state"][rows].copy()
    shares = (joined.node_row >= 0) | (joined.frame != 0)
    was_sharer = (state == ItemState.STABLE) & ~shares
    state[was_sharer] = ItemState.NONE
    state[shares] = ItemState.STABLE
    found["stable_node"] = -1
    known = joined.node_row >= 0
    found["stable_node"][known] = place[joined.node_row[known]]
    by_frame = joined.frame != 0
    frames = np.unique(joined.frame[by_frame])
    first_frame = nr_nodes - len(frames)
    found["stable_node"][by_frame] = first_frame + np.searchsorted(frames, joined.frame[by_frame])
    found["since_ns"] = items["since_ns"][rows]
    found["since_ns"][was_sharer] = _gone_ns(fold, rows[was_sharer])
    found["since_ns"][shares & ~joined.seen] = 0
    found["before_recording"] = shares & (found["since_ns"] == 0)

    found["age"] = -1
    unstable = state == ItemState.UNSTABLE
    if unstable.any() and fold.passes.seqnr is not None:
        seqnr = items["seqnr"][rows]
        age = (fold.passes.seqnr - seqnr.astype(np.int64)) & SEQNR_MASK
        gone = unstable & _passed_by(fold, rows, age)
        state[gone] = ItemState.UNKNOWN
        unstable &= ~gone
        found["age"][unstable] = age[unstable]
        found["seqnr"][unstable] = seqnr[unstable]
    # In no tree, and not looked at in the last whole pass: skipped each time, or freed.
    begin_ns = fold.passes.begin_ns
    old = (state == ItemState.NONE) & (found["since_ns"] < begin_ns) & fold.has_visits
    if fold.passes.running is False:
        state[old] = ItemState.UNKNOWN
    found["state"] = state
    return found


def _passed_by(fold: Fold, rows: Rows, age: Array) -> npt.NDArray[np.bool_]:
    # In the unstable tree ksmd leaves nothing older than the last pass: it looks at each
    # rmap_item's page, skips it, or frees it (mm/ksm.c: get_next_rmap_item,
    # remove_trailing_rmap_items, should_skip_rmap_item), and takes it out of the tree before.
    items, mms = fold.items, fold.mms
    mm_rows = items["mm_row"][rows]
    gone: npt.NDArray[np.bool_] = age > 1
    # An mm that leaves goes to where ksmd is next (mm/ksm.c:__ksm_exit).
    exited_ns = mms["exited_ns"][mm_rows]
    gone |= (exited_ns != 0) & (exited_ns < fold.passes.end_ns)
    if fold.passes.running is False:
        return gone
    # While a pass is under way, that is so for the mms that it has been at, and in the one that
    # it is at for the addresses below.
    been_there = mms["cursor_ns"] >= max(fold.passes.begin_ns, 1)
    is_cursor = np.zeros(len(mms), bool)
    is_cursor[int(np.argmax(mms["cursor_ns"]))] = True
    address = mms["cursor_address"][mm_rows] & np.uint64(~FLAG_MASK & 0xFFFF_FFFF_FFFF_FFFF)
    behind = been_there[mm_rows] & (~is_cursor[mm_rows] | (items["address"][rows] <= address))
    gone |= (age == 1) & behind
    return gone


def _gone_ns(fold: Fold, rows: Rows) -> Array:
    # When the nodes went that these rmap_items shared; 0 where the row has another node by now.
    nodes, items = fold.nodes, fold.items
    at = np.maximum(items["node_row"][rows], 0)
    if not len(nodes):
        return np.zeros(len(rows), np.uint64)
    same = nodes["generation"][at] == items["node_generation"][rows]
    return np.where(same & ~nodes["open"][at], nodes["closed_ns"][at], 0)


def _chains(fold: Fold, nodes: Array) -> Array:
    chains = fold.chains
    keys = chains.keys
    dups = np.zeros(len(chains), np.int64)
    at = chains.find(nodes["chain"])
    inside = (at >= 0) & (nodes["chain"] != 0)
    dups += np.bincount(at[inside], minlength=len(chains))
    # A chain without dups is freed by ksmd as it comes by, by memory offline, and by who writes to
    # max_page_sharing, merge_across_nodes or run (mm/ksm.c: remove_stable_node_chain): without an
    # event. After run=2 there is none, nor was there where the kernel counted none.
    may_stay = (chains["order"] > fold.reset_order) & (chains["told_ns"] > fold.no_chains_ns)
    # Nor is it there any more where a stable_node has come to its address: they are of one cache.
    reused = fold.nodes.find(keys)
    there = reused >= 0
    may_stay[there] &= fold.nodes["opened_order"][reused[there]] < chains["order"][there]
    rows = np.flatnonzero(chains["open"] & ((dups > 0) | may_stay))
    found = np.zeros(len(rows), CHAIN_DTYPE)
    found["chain"] = keys[rows]
    found["dups"] = dups[rows]
    for name in ("generation", "nid", "born_ns"):
        found[name] = chains[name][rows]
    found["before_recording"] = chains["unseen_birth"][rows]
    return found


def _pids(fold: Fold) -> Array:
    mms = fold.mms
    return np.where(mms["pid"] != 0, mms["pid"], mms["enter_pid"])


def _mm_slots(fold: Fold) -> Array:
    mms = fold.mms
    found = np.zeros(len(mms), MM_SLOT_DTYPE)
    found["mm"] = mms.keys
    found["pid"] = _pids(fold)
    found["zero_pages_placed"] = mms["zero_pages"]
    for name in ("generation", "comm", "entered_ns", "exited_ns", "before_recording"):
        found[name] = mms[name]
    for row in found:
        known = fold.seen.get(int(row["pid"]))
        if known and (comm := identity_at(known, fold.last_ns).comm):
            row["comm"] = comm.encode(errors="surrogateescape")
    return found


def _older(fold: Fold, nodes: Array, items: Array) -> Older | None:
    if fold.known_from_memory or fold.first_sample is None:
        return None
    shared, sharing = (
        fold.first_sample.ksm.get(name) for name in ("pages_shared", "pages_sharing")
    )
    if not isinstance(shared, int) or not isinstance(sharing, int) or not shared:
        return None
    return Older(
        stable_nodes=shared,
        sharers=shared + sharing,
        known_stable_nodes=int(np.count_nonzero(nodes["before_recording"])),
        known_sharers=int(np.count_nonzero(items["before_recording"])),
    )


def _totals(
    fold: Fold,
    nodes: Array,
    items: Array,
    chains: Array,
    mm_slots: Array,
    older: Older | None,
) -> Totals:
    sharers = nodes["sharers"]
    shared = int(np.count_nonzero(sharers))
    knows_chains = fold.world == World.MEMORY or (
        fold.world == World.FUNCTIONS
        and can_see(
            fold.header, "stable_tree_insert", "alloc_stable_node_chain", "free_stable_node_chain"
        )
    )
    knows_chains &= older is None and bool(nodes["placed"].all())
    # The first pass of the recording finds rmap_items that older passes have left in the tree.
    passes = fold.passes
    knows_unstable = fold.has_visits and (
        fold.known_from_memory or passes.complete > 0 or bool(passes.began_empty)
    )
    # As it was read, as long as ksmd has not begun a pass since.
    knows_unstable |= passes.running is False and passes.seqnr == fold.loaded_seqnr
    knows_unstable = fold.world == World.MEMORY or (
        fold.world == World.FUNCTIONS and knows_unstable
    )
    unstable = int(np.count_nonzero(items["state"] == ItemState.UNSTABLE))
    dups = nodes["chain"] != 0
    zero = can_see(fold.header, "ksm_merge_one_page") and not fold.world.is_live
    return Totals(
        pages_shared=shared,
        pages_sharing=int(sharers.sum()) - shared,
        pages_unshared=unstable if knows_unstable else None,
        stable_node_chains=int(np.count_nonzero(chains["dups"])) if knows_chains else None,
        stable_node_dups=int(np.count_nonzero(dups)) if knows_chains else None,
        empty_chains=int(np.count_nonzero(chains["dups"] == 0)) if knows_chains else None,
        unseen_sharers_nodes=int(np.count_nonzero(nodes["unseen_sharers"])),
        zero_pages_placed=int(mm_slots["zero_pages_placed"].sum()) if zero else None,
    )


def _not_visible(fold: Fold) -> tuple[str, ...]:
    if fold.world == World.NONE:
        return ("merges, and the ends of stable_nodes: nothing is known of the trees",)
    if fold.world == World.TRACEPOINTS:
        return _UNSEEN_BY_TRACEPOINTS
    if fold.world == World.MEMORY:
        return ()
    unseen = []
    if not can_see(fold.header, "ksm_migrate_page"):
        unseen.append("pages that moved to other frames: a node's frame is as of its last event")
    if not can_see(fold.header, "stable_tree_insert"):
        unseen.append("in which chain, and in which NUMA node's tree, a stable_node is")
    if not fold.has_visits and not fold.known_from_memory:
        unseen.append("the unstable tree: every look at a page is needed (record --every-page)")
    return tuple(unseen)
