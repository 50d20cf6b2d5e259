"""Which pages became sharers of a stable_node, and which left it.

Where programs on mm/ksm.c's own functions caught that, every join and every departure is an
event; else the tracepoints tell of the merges, and of the sharers that went with their node.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from ksmtrace.analysis.addresses import Places, next_place, number_lives, places_of
from ksmtrace.analysis.merges import find_merges
from ksmtrace.analysis.recorded import PARTS, Recorded, has_flag
from ksmtrace.events import KIND_BY_NAME, EventFlag, Events, concatenate, of_kind, select

JOINS_AND_LEAVES = (
    "stable_tree_append",
    "remove_rmap_item_from_tree",
    "remove_node_from_stable_tree",
)
"""The kinds that together show every change of pages_shared and pages_sharing: their only
changes are in these functions (mm/ksm.c)."""


@dataclass(frozen=True)
class Sharers:
    """The pages that joined and left stable_nodes.

    Attributes:
        joined: an event per page that became a sharer, shape (n,): stable_tree_append, or
            without that the ksm_merge_with_ksm_page that led to it.
        nodes: the number of the stable_node that each of them joined, int64 of shape (n,). One
            number is one node, even where its address is used again.
        left_singly: an event per page that left a node which stayed
            (remove_rmap_item_from_tree); empty where that was not caught.
        left_with_node: an event per page that left because its node was freed
            (ksm_remove_rmap_item). Where all joins and leaves were caught, also the nodes' last
            sharers, for which mm/ksm.c:remove_node_from_stable_tree has no event: their
            stable_tree_append, with the time of the node's end.
    """

    joined: Events
    nodes: Places
    left_singly: Events
    left_with_node: Events


# Several tables of one report need it.
@functools.lru_cache(maxsize=PARTS)
def find_sharers(recorded: Recorded) -> Sharers:
    """Gather the joins and leaves, as exactly as the recording tells them."""
    if recorded.selection is not None:
        whole, chooses = find_sharers(recorded.selection.of), recorded.selection.chooses
        joined_here = chooses(whole.joined)
        return Sharers(
            select(whole.joined, joined_here),
            whole.nodes[joined_here],
            select(whole.left_singly, chooses(whole.left_singly)),
            select(whole.left_with_node, chooses(whole.left_with_node)),
        )
    events = recorded.events
    removed = of_kind(events, "remove_rmap_item_from_tree")
    singly = select(removed, ~has_flag(removed, EventFlag.NODE_FREED))
    with_node = of_kind(events, "ksm_remove_rmap_item")
    if recorded.can_see(*JOINS_AND_LEAVES):
        joined = places_of(events, "stable_tree_append")
        freed = places_of(events, "remove_node_from_stable_tree")
        nodes = number_lives(events, "stable_node", joined, freed)
        with_node = concatenate([with_node, _last_sharers(events, joined, freed)])
    else:
        merges = find_merges(recorded)
        joined = merges.places[merges.appended]
        # A node is a page frame until that is freed; one that migrated meanwhile counts as two,
        # as no tracepoint tells of the move.
        nodes = number_lives(events, "pfn", joined, places_of(events, "ksm_remove_ksm_page"))
    return Sharers(select(events, joined), nodes, singly, with_node)


def _last_sharers(events: Events, joined: Places, freed: Places) -> Events:
    """Return the joins of the pages that were their node's last sharer as it was freed.

    They are those whose node ends, and of which no removal is told: every other sharer has its
    remove_rmap_item_from_tree before that, or its ksm_remove_rmap_item beside it.
    """
    ends = next_place(events, "stable_node", joined, freed)
    told = next_place(
        events,
        "rmap_item",
        joined,
        places_of(
            events, "stable_tree_append", "remove_rmap_item_from_tree", "ksm_remove_rmap_item"
        ),
    )
    with_node = events["kind"] == KIND_BY_NAME["ksm_remove_rmap_item"].number
    # What is told later than the node's end is the rmap_item's next join, or the return of the
    # remove_rmap_item_from_tree that found the node stale.
    last = (ends < len(events)) & (told > ends) & ~np.r_[with_node, False][told]
    sharers = select(events, joined[last])
    sharers["ts_ns"] = events["ts_ns"][ends[last]]
    return sharers
