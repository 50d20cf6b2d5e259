"""The history of one page: every event that touched it, in order, wherever its node moved."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ksmtrace.events import KIND_BY_NAME, KINDS, NR_KINDS, EventFlag, Events, concatenate
from ksmtrace.kernel.ksm_memory import FLAG_MASK
from ksmtrace.reconstruct.columns import Array, Groups, Rows
from ksmtrace.reconstruct.fold import world_of
from ksmtrace.reconstruct.state import World
from ksmtrace.stream import Header

Mask = npt.NDArray[np.bool_]


def _kinds(*names: str) -> Mask:
    table = np.zeros(max(NR_KINDS, 256), bool)
    table[[KIND_BY_NAME[name].number for name in names]] = True
    return table


def _kinds_with(*fields: str) -> Mask:
    return _kinds(*(kind.name for kind in KINDS if set(fields) <= set(kind.body)))


_EVERY_PAGE = _kinds(*(kind.name for kind in KINDS if kind.every_page))
_WITH_PLACE = _kinds_with("mm", "address")
_WITH_PFN = _kinds_with("pfn")
_WITH_NODE = _kinds_with("stable_node")
_WITH_ITEM = _kinds_with("rmap_item")
_OF_FRAME = _kinds("ksm_merge_with_ksm_page", "ksm_remove_ksm_page", "ksm_remove_rmap_item")
# What happens to a node as a whole, and so to each of its sharers.
_OF_NODE = _kinds(
    *("ksm_migrate_page", "remove_node_from_stable_tree"),
    *("alloc_stable_node_chain", "free_stable_node_chain"),
)
_BREAK = KIND_BY_NAME["break_ksm"].number
_MIGRATE = KIND_BY_NAME["ksm_migrate_page"].number
_APPEND = KIND_BY_NAME["stable_tree_append"].number
_LEAVE = KIND_BY_NAME["remove_rmap_item_from_tree"].number
_FREE_NODE = KIND_BY_NAME["remove_node_from_stable_tree"].number
_MERGE = KIND_BY_NAME["ksm_merge_with_ksm_page"].number
_FREE_FRAME = KIND_BY_NAME["ksm_remove_ksm_page"].number
_SHARER_REMOVED = KIND_BY_NAME["ksm_remove_rmap_item"].number


@dataclass(frozen=True)
class PageHistory:
    """The events that touched one page.

    Attributes:
        events: in the ring's order, shape (n,).
        orders: their numbers among all events of the stream, from 0, shape (n,).
        rmap_items: addresses of the rmap_items that stood for it.
        stable_nodes: addresses of the stable_nodes that it shared, or that were at the frame.
    """

    events: Events
    orders: Rows
    rmap_items: tuple[int, ...]
    stable_nodes: tuple[int, ...]


def page_history(header: Header, batches: Iterable[Events], pid: int, address: int) -> PageHistory:
    """Gather what happened to one page of a process.

    Of the stable_nodes that it shares, what happens to the node as a whole counts as well: moves,
    chains, its end. Who else joins and leaves does not.

    Args:
        header: the stream's.
        batches: its events, in order.
        pid: tgid of the owner.
        address: virtual address of the page; its low 12 bits do not count.
    """
    page = np.uint64(address & ~FLAG_MASK)

    def touches(events: Events) -> Mask:
        told = events["address"] & np.uint64(~FLAG_MASK & 0xFFFF_FFFF_FFFF_FFFF)
        ranged = (events["kind"] == _BREAK) & (told < page) & (events["end_address"] > page)
        has_place = _WITH_PLACE[events["kind"]] & ((events["flags"] & EventFlag.HAS_ADDRESS) != 0)
        touched: Mask = ((told == page) | ranged) & has_place
        return touched

    events, orders = _gather(batches, touches)
    chosen = touches(events)
    chosen[chosen] = _owned_by(events[chosen], pid)
    own = np.flatnonzero(chosen)
    lives = _Lives(events, world_of(header))
    for life, begin, end in _shares(events, own, lives):
        of_life = lives.places[lives.life[lives.places] == life]
        about = _OF_NODE[events["kind"][of_life]]
        if lives.world == World.TRACEPOINTS:
            about = events["kind"][of_life] == _FREE_FRAME
        chosen[of_life[about & (of_life > begin) & (of_life <= end)]] = True
    items = events["rmap_item"][own[_WITH_ITEM[events["kind"][own]]]]
    shared = lives.key[own[lives.life[own] > 0]]
    return _history(events, orders, chosen, items, shared, lives.world)


def frame_history(header: Header, batches: Iterable[Events], pfn: int) -> PageHistory:
    """Gather what happened at one page frame, and to every stable_node that was ever there.

    Such a node is followed from its beginning to its end, wherever its page was, with everybody
    who joined and left it.

    Args:
        header: the stream's.
        batches: its events, in order.
        pfn: the page frame's number.
    """
    frame = np.uint64(pfn)

    def touches(events: Events) -> Mask:
        kinds = events["kind"]
        moved = (events["new_pfn"] == frame) | (events["kpfn_after"] == frame)
        # 0 is unknown, and no frame of a page that ksmd comes to.
        at_frame = _WITH_PFN[kinds] & (events["pfn"] == frame) & (events["pfn"] != 0)
        touched: Mask = at_frame | ((kinds == _MIGRATE) & moved)
        return touched

    events, orders = _gather(batches, touches)
    chosen = touches(events)
    lives = _Lives(events, world_of(header))
    numbers = lives.life[lives.places]
    places = lives.places[np.isin(numbers, numbers[chosen[lives.places]])]
    chosen[places] = True
    items = events["rmap_item"][places[_WITH_ITEM[events["kind"][places]]]]
    return _history(events, orders, chosen, items, lives.key[places], lives.world)


class _Lives:
    # The lives of the stable_nodes (by tracepoints: of the frames) that events name.
    #
    # places: the events that name one, by node and in order. life: per event the number of the
    # life that it belongs to, from 1; 0 none. key: per event the node's address or its frame.

    def __init__(self, events: Events, world: World) -> None:
        self.world = world
        kinds = events["kind"]
        if world == World.TRACEPOINTS:
            self.key, names = events["pfn"], _OF_FRAME[kinds]
        else:
            self.key = events["stable_node"]
            names = _WITH_NODE[kinds] & (self.key != 0)
        named = np.flatnonzero(names)
        groups = Groups(self.key[named])
        self.places = named[groups.order]
        kinds = kinds[self.places]
        ends = (kinds == _FREE_NODE) | (kinds == _FREE_FRAME)
        # The removal that found the node stale is told of right after the node's end.
        stale = (kinds == _LEAVE) & ((events["flags"][self.places] & EventFlag.NODE_FREED) != 0)
        begins = groups.first.copy()
        begins[1:] |= (ends[:-1] & ~stale[1:]) | stale[:-1]
        self.life = np.zeros(len(events), np.int64)
        self.life[self.places] = np.cumsum(begins)


def _shares(events: Events, own: Rows, lives: _Lives) -> Iterator[tuple[int, int, int]]:
    # Which life of a node the page shared, from which place to which.
    joined: int | None = None
    before, end = -1, len(events)
    for place in own.tolist():
        kind = events["kind"][place]
        joins = kind == _APPEND
        if lives.world == World.TRACEPOINTS:
            joins = kind == _MERGE and not events["err"][place] and lives.life[place] > 0
        if joins:
            if joined is not None:
                yield int(lives.life[joined]), joined, place
            joined = place
        elif kind == _LEAVE:
            # One that was not seen to join has shared it since what was told before.
            begin = before if joined is None else joined
            yield int(lives.life[place]), begin, place
            joined = None
        elif kind == _SHARER_REMOVED and joined is not None:
            # It goes with its node, whose end is told of a moment later.
            yield int(lives.life[joined]), joined, end
            joined = None
        before = place if joins or kind in (_LEAVE, _SHARER_REMOVED) else before
    if joined is not None:
        yield int(lives.life[joined]), joined, end


def _history(
    events: Events, orders: Rows, chosen: Mask, items: Array, nodes: Array, world: World
) -> PageHistory:
    places = np.flatnonzero(chosen)
    return PageHistory(
        events[places],
        orders[places],
        tuple(dict.fromkeys(items[items != 0].tolist())),
        tuple(dict.fromkeys(nodes.tolist())) if world == World.FUNCTIONS else (),
    )


def _gather(batches: Iterable[Events], touches: Callable[[Events], Mask]) -> tuple[Events, Rows]:
    # Of what happens for every page that ksmd looks at, only what touches the page.
    kept, orders, before = [], [np.empty(0, np.int64)], 0
    for events in batches:
        places = np.flatnonzero(~_EVERY_PAGE[events["kind"]] | touches(events))
        kept.append(events[places])
        orders.append(places + before)
        before += len(events)
    return concatenate(kept), np.concatenate(orders)


def _owned_by(events: Events, pid: int) -> Mask:
    # An mm that exits has no owner any more: then it is whose it was last.
    owner: dict[int, int] = {}
    owned = np.zeros(len(events), bool)
    flags = (events["flags"] & EventFlag.PID_IS_OWNER) != 0
    for at, (mm, told, is_owner) in enumerate(
        zip(events["mm"].tolist(), events["pid"].tolist(), flags.tolist(), strict=True)
    ):
        if is_owner:
            owner[mm] = told
        owned[at] = owner.get(mm) == pid
    return owned
