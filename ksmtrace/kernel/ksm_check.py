"""Contradictions among the structures and counters of mm/ksm.c, as they were read from memory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ksmtrace.kernel.ksm_memory import (
    SEQNR_MASK,
    STABLE_FLAG,
    UNSTABLE_FLAG,
    Array,
    ItemState,
    KsmMemory,
    NodeKind,
    index_of,
)
from ksmtrace.kernel.memory import WORD_BYTES


def check_ksm_memory(memory: KsmMemory) -> list[str]:
    """Look for contradictions among the structures and counters of mm/ksm.c.

    Only where ksmd rests is each of these a fault of the kernel (or of ksmtrace): see
    :attr:`KsmMemory.consistent`. Not looked at, as they may legitimately differ: how current
    nodes are, whether chains have dups, sharers beyond max_page_sharing (forks bypass it).

    Returns:
        One line per kind of contradiction, with the number of cases and the first one; empty
        where there is none.
    """
    return [
        *memory.torn,
        *_check_counters(memory),
        *_check_stable_nodes(memory),
        *_check_sharers(memory),
        *_check_unstable(memory),
        *_check_slots(memory),
    ]


# One line about the cases: how many, and the first.
def _cases(wrong: Array, addresses: Array, what: str, says: str = "") -> Iterator[str]:
    first = np.flatnonzero(wrong)
    if len(first):
        yield f"{len(first)} {what}: first {int(addresses[first[0]]):#x}{says}"


# Which values have been before.
def _repeated(values: Array) -> Array:
    _, first = np.unique(values, return_index=True)
    return ~np.isin(np.arange(len(values)), first)


# How often each key is among the values.
def _count(values: Array, keys: Array) -> Array:
    at = index_of(keys, values)
    return np.bincount(at[at >= 0], minlength=len(keys))


def _check_counters(memory: KsmMemory) -> Iterator[str]:
    items, nodes = memory.rmap_items, memory.stable_nodes
    lengths = nodes["rmap_hlist_len"][nodes["kind"] != NodeKind.CHAIN]
    nr_stable = int((items["flags"] & STABLE_FLAG != 0).sum())
    nr_shared = int((lengths > 0).sum())
    counters = memory.counters
    seen = {
        # mm/ksm.c:stable_tree_append, remove_rmap_item_from_tree, remove_node_from_stable_tree
        "ksm_pages_shared": nr_shared,
        "ksm_pages_sharing": nr_stable - nr_shared,
        # mm/ksm.c:unstable_tree_search_insert, remove_rmap_item_from_tree
        "ksm_pages_unshared": int((items["flags"] & UNSTABLE_FLAG != 0).sum()),
        # mm/ksm.c:alloc_rmap_item, free_rmap_item
        "ksm_rmap_items": len(items),
        # mm/ksm.c:alloc_stable_node_chain, free_stable_node_chain, stable_node_chain_add_dup
        "ksm_stable_node_chains": int((nodes["kind"] == NodeKind.CHAIN).sum()),
        "ksm_stable_node_dups": int((nodes["kind"] == NodeKind.DUP).sum()),
    }
    for name, count in seen.items():
        if counters[name] is not None and counters[name] != count:
            yield f"{name} is {counters[name]}, and {count} are found"
    if int(lengths.sum()) != nr_stable:
        yield f"rmap_hlist_len adds up to {int(lengths.sum())}, and {nr_stable} items are STABLE"


def _check_stable_nodes(memory: KsmMemory) -> Iterator[str]:
    nodes = memory.stable_nodes
    address, kind = nodes["stable_node"], nodes["kind"]
    is_chain = kind == NodeKind.CHAIN
    yield from _cases(_repeated(address), address, "stable_nodes are linked twice")
    lengths = _count(memory.sharers["stable_node"], address)
    wrong = ~is_chain & (nodes["rmap_hlist_len"] != lengths)
    if wrong.any():
        at = int(np.flatnonzero(wrong)[0])
        yield from _cases(
            wrong,
            address,
            "stable_nodes have a rmap_hlist_len that is not their hlist's length",
            f" says {nodes['rmap_hlist_len'][at]} and has {lengths[at]}",
        )
    # mm/ksm.c: STABLE_NODE_DUP_HEAD is &migrate_nodes.prev; in a tree, head is the rb parent.
    marked_dup = nodes["head"] == memory.migrate_nodes + WORD_BYTES
    marked_migrating = nodes["head"] == memory.migrate_nodes
    yield from _cases(
        marked_dup != (kind == NodeKind.DUP), address, "stable_nodes are marked dup or linked so"
    )
    yield from _cases(
        marked_migrating != (kind == NodeKind.MIGRATING),
        address,
        "stable_nodes are marked migrating or linked so",
    )
    # mm/ksm.c:stable_tree_insert, stable_tree_search: nid is get_kpfn_nid() of the tree, which is
    # 0 while merge_across_nodes.
    in_tree = ~is_chain & (kind != NodeKind.MIGRATING) & (nodes["nid"] >= 0)
    yield from _cases(
        in_tree & (nodes["nid"] != nodes["root"]), address, "stable_nodes have another tree's nid"
    )
    current = nodes[nodes["is_current"] == 1]
    yield from _cases(
        _repeated(current["kpfn"]), current["stable_node"], "stable_nodes have another one's page"
    )


def _check_sharers(memory: KsmMemory) -> Iterator[str]:
    items, sharers = memory.rmap_items, memory.sharers
    stable = items[items["flags"] & STABLE_FLAG != 0]
    yield from _cases(items["mm"] == 0, items["rmap_item"], "rmap_items have no mm")
    both = (items["flags"] & STABLE_FLAG != 0) & (items["flags"] & UNSTABLE_FLAG != 0)
    yield from _cases(both, items["rmap_item"], "rmap_items are both STABLE and UNSTABLE")
    yield from _cases(
        _repeated(sharers["rmap_item"]), sharers["rmap_item"], "rmap_items are on a hlist twice"
    )
    # mm/ksm.c:stable_tree_append sets flag and head, and links the item.
    yield from _cases(
        ~np.isin(sharers["rmap_item"], items["rmap_item"]),
        sharers["rmap_item"],
        "rmap_items share a stable_node and are on no mm's rmap_list",
    )
    yield from _cases(
        np.isin(sharers["rmap_item"], items["rmap_item"][items["flags"] & STABLE_FLAG == 0]),
        sharers["rmap_item"],
        "rmap_items share a stable_node and are not STABLE",
    )
    at = index_of(stable["rmap_item"], sharers["rmap_item"])
    listed, linked = sharers[at >= 0], stable[at[at >= 0]]
    yield from _cases(
        listed["stable_node"] != linked["stable_node"],
        listed["rmap_item"],
        "rmap_items share a stable_node that is not their head",
    )
    yield from _cases(
        ~np.isin(stable["rmap_item"], sharers["rmap_item"]),
        stable["rmap_item"],
        "rmap_items are STABLE and on no stable_node's hlist",
    )


def _check_unstable(memory: KsmMemory) -> Iterator[str]:
    items = memory.rmap_items
    unstable = items[items["state"] == ItemState.UNSTABLE]
    # mm/ksm.c:remove_rmap_item_from_tree: BUG_ON(age > 1).
    ages = np.uint8(memory.cursor.seqnr & SEQNR_MASK) - unstable["seqnr"]
    yield from _cases(
        ages > 1, unstable["rmap_item"], "UNSTABLE rmap_items are older than the last pass"
    )
    # mm/ksm.c:scan_get_next_rmap_item: a pass begins with empty trees, and seqnr counts when it
    # ends: the trees then hold what has age 1. unmerge_and_remove_all_rmap_items frees rmap_items
    # of that age without taking them out, so between passes a tree may be broken off by right.
    at = index_of(memory.unstable_nodes["rmap_item"], unstable["rmap_item"])
    in_tree = at >= 0
    due = ages == (1 if memory.cursor.at_head else 0)
    if memory.nr_unknown_unstable and not memory.cursor.at_head:
        yield f"unstable trees lead to {memory.nr_unknown_unstable} nodes that are no rmap_items"
    elif not memory.nr_unknown_unstable:
        yield from _cases(
            due & ~in_tree, unstable["rmap_item"], "UNSTABLE rmap_items of this pass are in no tree"
        )
    yield from _cases(
        in_tree & ~due, unstable["rmap_item"], "UNSTABLE rmap_items of another pass are in a tree"
    )
    roots = memory.unstable_nodes["root"][at[in_tree]]
    nids = unstable["nid"][in_tree]
    yield from _cases(
        (nids >= 0) & (nids != roots),
        unstable["rmap_item"][in_tree],
        "UNSTABLE rmap_items have another tree's nid",
    )


def _check_slots(memory: KsmMemory) -> Iterator[str]:
    items, slots = memory.rmap_items, memory.mm_slots
    owners = slots[index_of(slots["mm_slot"], items["mm_slot"])]
    yield from _cases(
        items["mm"] != owners["mm"], items["rmap_item"], "rmap_items are on another mm's list"
    )
    # mm/ksm.c:get_next_rmap_item keeps a rmap_list in the order of addresses.
    same = items["mm_slot"][1:] == items["mm_slot"][:-1]
    falling = same & (items["address"][1:] <= items["address"][:-1])
    yield from _cases(
        falling, items["rmap_item"][1:], "rmap_items are not behind a lower address on their list"
    )
    cursor = memory.cursor.mm_slot
    if not memory.cursor.at_head and cursor not in slots["mm_slot"]:
        yield f"the cursor is at mm_slot {cursor:#x}, which is not on ksm_mm_head"
    # A child starts with its parent's figures where ksm_fork does not reset them
    # (include/linux/ksm.h), so these may be too high, and never too low.
    stable = items[items["flags"] & STABLE_FLAG != 0]
    for member, counted in (("ksm_merging_pages", stable), ("ksm_rmap_items", items)):
        actual = _count(counted["mm_slot"], slots["mm_slot"])
        yield from _cases(
            (slots[member] >= 0) & (slots[member] < actual),
            slots["mm"],
            f"mms have a {member} below what they have",
        )
