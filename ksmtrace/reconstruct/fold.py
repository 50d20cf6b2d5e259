"""Folds the stream's events into tables: the last that was told of every node, rmap_item and mm.

Nothing is propagated from one table to another while events are folded. A sharer keeps the row
and the generation of the node that it joined, and the order of that join: it is one as long as
that generation is open and has not been empty since. So an event costs the same whatever it does,
and a batch is folded by columns; :mod:`ksmtrace.reconstruct.snapshot` puts the tables together.

Order is the events' order in the ring, which is that of the kernel's acts: all of them happen
under ksm_thread_mutex, but for the moves of pages, which happen under the page's lock.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ksmtrace.events import (
    KIND_BY_NAME,
    KINDS,
    NR_KINDS,
    EventFlag,
    Events,
    check_sorting,
    concatenate,
    select,
)
from ksmtrace.kernel.ksm_memory import (
    FLAG_MASK,
    SEQNR_MASK,
    STABLE_FLAG,
    UNSTABLE_FLAG,
    KsmMemory,
    NodeKind,
    index_of,
)
from ksmtrace.kernel.ksm_memory import (
    ItemState as MemoryState,
)
from ksmtrace.reconstruct.columns import Array, Groups, Rows, Table
from ksmtrace.reconstruct.state import Incomplete, ItemState, World
from ksmtrace.stream import (
    Batch,
    CounterSample,
    Header,
    Item,
    Losses,
    ProcessSeen,
    Trailer,
    Witnessed,
)

Mask = npt.NDArray[np.bool_]

FOLD_EVENTS = 1 << 18
"""Events that are folded at a time: more take more memory, fewer more time each."""

_START, _STOP, _ENTER, _EXIT, _ZERO, _MERGE, _NODE_REMOVED, _SHARER_REMOVED = range(1, 9)
_MIGRATE, _VISIT, _APPEND, _LEAVE, _FREE_NODE, _INSERT, _NEW_CHAIN, _FREE_CHAIN, _RUN = (
    KIND_BY_NAME[name].number
    for name in (
        *("ksm_migrate_page", "cmp_and_merge_page", "stable_tree_append"),
        *("remove_rmap_item_from_tree", "remove_node_from_stable_tree", "stable_tree_insert"),
        *("alloc_stable_node_chain", "free_stable_node_chain", "run_store"),
    )
)

_DISTURBED = (
    "something happened while the kernel's memory was read: what was there before is unsure"
)

FUNCTIONS = ("stable_tree_append", "remove_rmap_item_from_tree", "remove_node_from_stable_tree")
"""The kinds that together show every sharer's coming and going (mm/ksm.c: pages_shared and
pages_sharing change nowhere else)."""

TRACEPOINTS = ("ksm_merge_with_ksm_page", "ksm_remove_ksm_page", "ksm_remove_rmap_item")
"""The kinds that tell of merges and of nodes' ends."""


def _kinds(*numbers: int) -> Mask:
    table = np.zeros(max(NR_KINDS, 256), bool)
    table[list(numbers)] = True
    return table


_NODE_KINDS = _kinds(_MIGRATE, _APPEND, _LEAVE, _FREE_NODE, _INSERT, _NEW_CHAIN, _FREE_CHAIN)
_ITEM_KINDS = _kinds(_ZERO, _MERGE, _SHARER_REMOVED, _VISIT, _APPEND, _LEAVE)
_MM_KINDS = _ITEM_KINDS | _kinds(_ENTER, _EXIT)
_FOLDED = _NODE_KINDS | _MM_KINDS | _kinds(_START, _STOP, _NODE_REMOVED, _RUN)
_KNOWN_KINDS = _kinds(*(kind.number for kind in KINDS))

_NODE_COLUMNS = {
    "generation": ("u4", 0),
    "open": ("?", False),
    "unseen_birth": ("?", False),
    "born_ns": ("u8", 0),
    "closed_ns": ("u8", 0),
    "opened_order": ("i8", -1),
    "closed_order": ("i8", -1),
    "seen_order": ("i8", -1),
    "emptied_order": ("i8", -1),  # no sharer that joined before this one is left
    "kpfn": ("u8", 0),
    "kpfn_since_ns": ("u8", 0),
    "tree_nid": ("i4", -1),
    "chain": ("u8", 0),
    "crossed": ("?", False),  # moved to another NUMA node since tree_nid and chain were told
    "moved": ("u4", 0),
    "moved_ns": ("u8", 0),
}
_ITEM_COLUMNS = {
    "generation": ("u4", 0),
    "mm_row": ("i4", -1),
    "mm_generation": ("u4", 0),
    "address": ("u8", 0),
    "state": ("u1", int(ItemState.UNKNOWN)),
    "node_row": ("i8", -1),
    "node_generation": ("u4", 0),
    "order": ("i8", -1),
    "since_ns": ("u8", 0),
    "seqnr": ("u1", 0),
    # ksmd found it a sharer, of the node whose page was at this frame
    "hint_order": ("i8", -1),
    "hint_ns": ("u8", 0),
    "hint_kpfn": ("u8", 0),
}
_MM_COLUMNS = {
    "generation": ("u4", 0),
    "pid": ("u4", 0),
    "enter_pid": ("u4", 0),
    "comm": ("S16", b""),
    "entered_ns": ("u8", 0),
    "exited_ns": ("u8", 0),
    "before_recording": ("?", True),
    "zero_pages": ("u8", 0),
    "cursor_ns": ("u8", 0),
    "cursor_address": ("u8", 0),
}
_CHAIN_COLUMNS = {
    "generation": ("u4", 0),
    "open": ("?", False),
    "unseen_birth": ("?", False),
    "born_ns": ("u8", 0),
    "told_ns": ("u8", 0),
    "order": ("i8", -1),
    "nid": ("i4", -1),
}

SPAN_DTYPE = np.dtype(
    [
        ("kpfn", "u8"),
        ("from_ns", "u8"),
        ("until_ns", "u8"),
        ("node_row", "i8"),
        ("node_generation", "u4"),
    ]
)
"""A frame at which a stable_node was, whose beginning was not seen."""


@dataclass
class Passes:
    """ksmd's passes as far as told.

    Attributes:
        seqnr: ksm_scan.seqnr, None unknown.
        running: whether a pass is under way, None unknown.
        begin_ns: when the last pass began, 0 unknown.
        end_ns: when the last complete one ended, 0 unknown.
        complete: passes seen from beginning to end.
        began_empty: no rmap_item was there when the first pass of the recording began.
    """

    seqnr: int | None = None
    running: bool | None = None
    begin_ns: int = 0
    end_ns: int = 0
    complete: int = 0
    began_empty: bool | None = None


@dataclass(frozen=True)
class _Lives:
    # Events in groups by key, each with the row and the generation that it belongs to; all in the
    # groups' order.
    groups: Groups
    rows: Rows
    generations: Array
    current: Mask  # of the last generation of its key
    opens: Mask  # the first of a new generation

    @property
    def order(self) -> Rows:
        return self.groups.order

    def renewed(self) -> tuple[Rows, Array]:
        # The rows that have a new generation now, and which.
        last = self.groups.last()
        begun = np.logical_or.reduceat(self.opens, np.flatnonzero(self.groups.first))
        return self.rows[last][begun], self.generations[last][begun]


class Fold:
    """Takes in a stream item by item; can say at any time what the kernel holds.

    Args:
        header: the stream's.
        world: by which events the trees are known; None: by those in the header's plan.

    Attributes:
        header: the stream's.
        world: by which events the trees are known.
        nodes, items, mms, chains: what was told last, a row per address (in
            :attr:`World.TRACEPOINTS` a row of ``nodes`` per frame).
        passes: ksmd's passes.
        spans: of nodes whose beginning was not seen, the frames that they have left;
            :data:`SPAN_DTYPE`.
        reset_order: order of the last thing that took all rmap_items and all chains.
        lost_nodes_order: order of the last thing that took all nodes.
        unmerged_ns: when run=2 was last done with.
        one_tree: the last that an event told of merge_across_nodes: when, and whether the pages of
            all NUMA nodes are in one tree; None as long as none has.
        no_chains_ns: when the kernel last counted no chain.
        has_visits: whether looks at pages are in the stream.
        known_from_memory: whether the kernel's memory has been taken in.
        loaded_seqnr: ksm_scan.seqnr in it.
        last_ns: time of the last thing taken in.
        first_sample, sample: the first and the last counter sample.
        seen: process identities by pid, each list in order of time.
        incomplete: what is known to be amiss.
        nr_events: events taken in.

    Raises:
        CannotRun: this CPU does not sort.
    """

    def __init__(self, header: Header, world: World | None = None) -> None:
        check_sorting()
        self.header = header
        self.world = world_of(header) if world is None else world
        self.nodes = Table(_NODE_COLUMNS)
        self.items = Table(_ITEM_COLUMNS)
        self.mms = Table(_MM_COLUMNS)
        self.chains = Table(_CHAIN_COLUMNS)
        self.passes = Passes()
        self.spans: list[Array] = []
        self.reset_order = -1
        self.lost_nodes_order = -1
        self.unmerged_ns = 0
        self.one_tree: tuple[int, bool] | None = None
        self.no_chains_ns = 0
        self.has_visits = False
        self.known_from_memory = False
        self.loaded_seqnr: int | None = None
        self.last_ns = header.started_ns
        self.first_sample: CounterSample | None = None
        self.sample: CounterSample | None = None
        self.seen: dict[int, list[ProcessSeen]] = {}
        self.incomplete: list[Incomplete] = []
        self.nr_events = 0
        self._waiting: list[Events] = []
        self._nr_waiting = 0
        # The first step of a pair, as long as its second has not come.
        self._begun: tuple[Events, Rows] | None = None
        self._losses: Losses | None = None
        self._ignore_ns: tuple[int, int] | None = None

    def copy(self) -> Fold:
        """Return a fold of its own with the same content."""
        self.settle()
        copied = Fold.__new__(Fold)
        copied.__dict__.update(self.__dict__)
        for name in ("nodes", "items", "mms", "chains"):
            setattr(copied, name, getattr(self, name).copy())
        copied.passes = Passes(**vars(self.passes))
        copied.spans = list(self.spans)
        copied.incomplete = list(self.incomplete)
        copied.seen = {pid: list(known) for pid, known in self.seen.items()}
        copied._waiting = []
        return copied

    # ---- the stream ----

    def take(self, item: Item) -> None:
        """Take in the stream's next item."""
        if isinstance(item, Batch):
            self.take_events(item.events)
        elif isinstance(item, CounterSample):
            self.first_sample = self.first_sample or item
            self.sample = item
            if item.ksm.get("stable_node_chains") == 0:
                self.no_chains_ns = item.begin_ns
            self.last_ns = max(self.last_ns, item.end_ns)
        elif isinstance(item, ProcessSeen):
            self.seen.setdefault(item.pid, []).append(item)
        elif isinstance(item, Losses):
            self.take_losses(item)
            self.last_ns = max(self.last_ns, item.ts_ns)
        elif isinstance(item, Witnessed):
            # The later ones are there to be compared with. And what changed while it was read is
            # no state of any time: what was there before is then known by events alone.
            if item.moment == "first" and item.memory is not None and item.memory.consistent:
                self.load(item.memory, item.begin_ns, item.end_ns)
        elif isinstance(item, Trailer):
            self.last_ns = max(self.last_ns, item.ts_ns)

    def forget_names(self, most: int) -> None:
        """Forget who the pids were that were told of first, where there are more than so many.

        Args:
            most: pids that are kept.
        """
        while len(self.seen) > most:
            self.seen.pop(next(iter(self.seen)))

    @property
    def nr_taken(self) -> int:
        """Return how many events have been taken in, folded or not."""
        return self.nr_events + self._nr_waiting

    def take_events(self, events: Events) -> None:
        """Take in events, shape (n,), in the ring's order; may be a part of a batch."""
        if not len(events):
            return
        self._waiting.append(events)
        self._nr_waiting += len(events)
        if self._nr_waiting >= FOLD_EVENTS:
            self.settle()

    def take_losses(self, losses: Losses) -> None:
        """Note by kind what was lost since the last reading of the tallies."""
        before = self._losses
        since_ns = before.ts_ns if before else self.header.started_ns
        for kind, dropped in losses.dropped.items():
            lost = dropped - (before.dropped.get(kind, 0) if before else 0)
            if lost > 0:
                why = f"{lost} {kind} events found the ring full and are lost"
                self.incomplete.append(Incomplete(since_ns, why, kind, lost))
        for target, times in losses.missed.items():
            missed = times - (before.missed.get(target, 0) if before else 0)
            if missed > 0:
                why = f"the kernel did not run the program on {target}: {missed} times"
                self.incomplete.append(Incomplete(since_ns, why))
        self._losses = losses

    def settle(self) -> None:
        """Fold what has been taken in and not been folded yet."""
        if self._waiting:
            one = len(self._waiting) == 1
            events = self._waiting[0] if one else concatenate(self._waiting)
            self._waiting, self._nr_waiting = [], 0
            for begin in range(0, len(events), FOLD_EVENTS):
                self._fold(events[begin : begin + FOLD_EVENTS])

    # ---- the kernel's memory ----

    def load(self, memory: KsmMemory, begin_ns: int, end_ns: int) -> None:
        """Take in what mm/ksm.c holds in the kernel's memory, in place of what was known.

        Args:
            memory: one reading, of a kernel at rest: what it holds is believed as it stands.
            begin_ns: CLOCK_MONOTONIC before the reading.
            end_ns: CLOCK_MONOTONIC after it. Events until then, which may still come from the
                ring, are part of it; those since ``begin_ns`` may be or not, and make the state
                incomplete.
        """
        self.settle()
        order, taken_ns = self.nr_events, end_ns
        self.known_from_memory = True
        self.loaded_seqnr = memory.cursor.seqnr
        self._ignore_ns = begin_ns, end_ns
        self._begun = None
        self.last_ns = max(self.last_ns, taken_ns)
        self.passes.seqnr = memory.cursor.seqnr
        self.passes.running = not memory.cursor.at_head
        self._load_mms(memory, taken_ns)
        rows = self._load_nodes(memory, order, taken_ns)
        self._load_items(memory, rows, order, taken_ns)
        self.nr_events += 1

    def _load_mms(self, memory: KsmMemory, taken_ns: int) -> None:
        slots = memory.mm_slots[np.argsort(memory.mm_slots["mm"])]
        rows = self.mms.find_or_add(slots["mm"])
        # What was told of that address may be another mm's: its events are not all folded.
        self.mms.forget(rows)
        self.mms["generation"][rows] += 1
        known = slots["pid"] > 0
        self.mms["pid"][rows[known]] = slots["pid"][known]
        self.mms["comm"][rows[known]] = slots["comm"][known]
        # By then at the latest (mm/ksm.c:ksm_test_exit).
        self.mms["exited_ns"][rows[slots["mm_users"] == 0]] = taken_ns

    def _load_nodes(self, memory: KsmMemory, order: int, taken_ns: int) -> Rows:
        # Returns the row of each of the memory's stable_nodes, -1 for a chain.
        is_chain = memory.stable_nodes["kind"] == NodeKind.CHAIN
        by_frame = self.world == World.TRACEPOINTS
        all_rows = np.full(len(memory.stable_nodes), -1, np.int64)
        for table, chosen in ((self.chains, is_chain), (self.nodes, ~is_chain)):
            held = memory.stable_nodes[chosen]
            keys = held["kpfn" if by_frame and table is self.nodes else "stable_node"]
            keys, firsts = np.unique(keys, return_index=True)
            held = held[firsts]
            rows = table.find_or_add(keys)
            fresh = rows[~table["open"][rows]]
            table["open"][:] = False
            table.forget(fresh)
            table["generation"][fresh] += 1
            table["unseen_birth"][fresh] = True
            table["open"][rows] = True
            if table is self.chains:
                table["order"][rows] = order
                table["told_ns"][rows] = taken_ns
                table["nid"][rows] = held["root"]
                continue
            all_rows[np.flatnonzero(chosen)[firsts]] = rows
            table["kpfn"][rows] = held["kpfn"]
            table["tree_nid"][rows] = np.maximum(held["nid"], 0)
            table["chain"][rows] = held["chain"]
            table["crossed"][rows] = False
            table["emptied_order"][rows] = order
            table["seen_order"][rows] = order
        self.spans = []
        return all_rows

    def _load_items(self, memory: KsmMemory, node_rows: Rows, order: int, taken_ns: int) -> None:
        held = memory.rmap_items[np.argsort(memory.rmap_items["rmap_item"])]
        rows = self.items.find_or_add(held["rmap_item"])
        mm_rows = self.mms.find(held["mm"])
        items = self.items
        same = (items["mm_row"][rows] == mm_rows) & (items["address"][rows] == held["address"])
        at = index_of(memory.stable_nodes["stable_node"], held["stable_node"])
        nodes = np.where(at >= 0, node_rows[at], -1) if len(node_rows) else at.astype(np.int64)
        lives = np.zeros(len(rows), np.uint32)
        lives[nodes >= 0] = self.nodes["generation"][nodes[nodes >= 0]]
        seen = same & (items["state"][rows] == ItemState.STABLE)
        seen &= (items["node_row"][rows] == nodes) & (items["node_generation"][rows] == lives)
        joined_ns = np.where(seen, items["since_ns"][rows], 0)
        items["order"][:] = -1
        items["hint_order"][:] = -1
        items["state"][:] = ItemState.UNKNOWN
        items["generation"][rows] += ~same
        items["mm_row"][rows] = mm_rows
        items["mm_generation"][rows] = self.mms["generation"][mm_rows]
        items["address"][rows] = held["address"]
        items["state"][rows] = held["state"]
        items["node_row"][rows] = nodes
        items["node_generation"][rows] = lives
        items["order"][rows] = order
        items["since_ns"][rows] = np.where(held["state"] == MemoryState.STABLE, joined_ns, taken_ns)
        items["seqnr"][rows] = held["seqnr"]

    # ---- one run of events ----

    def _fold(self, events: Events) -> None:
        self.last_ns = max(self.last_ns, int(events["ts_ns"].max()))
        orders = np.arange(self.nr_events, self.nr_events + len(events))
        self.nr_events += len(events)
        chosen = _FOLDED[events["kind"]]
        if self._ignore_ns is not None:
            begin_ns, end_ns = self._ignore_ns
            ignored = chosen & (events["ts_ns"] <= end_ns)
            chosen &= ~ignored
            if (events["ts_ns"][ignored] >= begin_ns).any():
                self.incomplete.append(Incomplete(begin_ns, _DISTURBED))
        events, orders = select(events, chosen), orders[chosen]
        if self.world == World.TRACEPOINTS:
            events, orders = self._hold_first_step(events, orders)
        if not len(events):
            return
        kinds = events["kind"]
        self.has_visits = self.has_visits or bool((kinds == _VISIT).any())
        self._take_passes(events, orders, np.flatnonzero((kinds <= _STOP) | (kinds == _RUN)))
        mm_rows, mm_generations = self._take_mms(events)
        if self.world == World.FUNCTIONS:
            node_rows, node_generations = self._take_functions(events, orders)
            chosen = _ITEM_KINDS[kinds] & (events["rmap_item"] != 0)
            chosen &= (events["err"] == 0) | (kinds >= _SHARER_REMOVED)
        elif self.world == World.TRACEPOINTS:
            orders = self._order_pairs(events, orders)
            node_rows, node_generations = self._take_merges(events, orders)
            chosen = _kinds(_ZERO, _MERGE, _SHARER_REMOVED)[kinds] & (events["rmap_item"] != 0)
        else:
            return
        self._take_items(
            select(events, chosen),
            orders[chosen],
            mm_rows[chosen],
            mm_generations[chosen],
            node_rows[chosen],
            node_generations[chosen],
        )

    # Passes and runs are few: one by one.
    def _take_passes(self, events: Events, orders: Rows, places: Rows) -> None:
        passes = self.passes
        for event, order in zip(select(events, places), orders[places].tolist(), strict=True):
            if event["kind"] == _RUN:
                self._take_run(event, order)
                continue
            seq, ts_ns = int(event["seq"]), int(event["ts_ns"])
            if passes.seqnr is not None and seq < passes.seqnr:
                # Only run=2 sets ksm_scan.seqnr back (mm/ksm.c:
                # unmerge_and_remove_all_rmap_items), once it has taken everything apart.
                self.reset_order = order
                if self.world == World.TRACEPOINTS:
                    self.lost_nodes_order = order
            if event["kind"] == _START:
                if passes.began_empty is None:
                    passes.began_empty = int(event["rmap_entries"]) == 0
                passes.running, passes.seqnr, passes.begin_ns = True, seq, ts_ns
            else:
                passes.complete += passes.running is True and seq == passes.seqnr
                passes.running, passes.seqnr, passes.end_ns = False, seq + 1, ts_ns

    def _take_run(self, event: Any, order: int) -> None:
        # run=2 frees every rmap_item and every chain, where it succeeds; a stable_node whose page
        # is still mapped stays, and each that goes has its event (mm/ksm.c: run_store,
        # unmerge_and_remove_all_rmap_items, remove_all_stable_nodes).
        if event["run"] != 2:
            return
        self.passes.running = False
        if event["err"] == 0:
            self.passes.seqnr = 0
            self.reset_order = order
            self.unmerged_ns = int(event["ts_ns"])

    # ---- mms ----

    def _take_mms(self, events: Events) -> tuple[Rows, Array]:
        # Returns per event the row and the generation of its mm, -1 and 0 for an event without.
        kinds = events["kind"]
        rows = np.full(len(events), -1, np.int64)
        generations = np.zeros(len(events), np.uint32)
        chosen = np.flatnonzero(_MM_KINDS[kinds] & (events["mm"] != 0))
        if not len(chosen):
            return rows, generations
        mm, kinds = events["mm"][chosen], kinds[chosen]
        found = self.mms.find(mm)
        if (found < 0).any():
            self.mms.find_or_add(np.unique(mm[found < 0]))
            found = self.mms.find(mm)
        enters = kinds == _ENTER
        number = self.mms["generation"][found] + self._count_before(found, enters)
        # An mm that was there before its first event counts as its first entry.
        fresh = self.mms["generation"][found] == 0
        if fresh.any():
            firsts = np.unique(found[fresh], return_index=True)
            begun = fresh.copy()
            entered_first = np.zeros(len(self.mms), bool)
            entered_first[firsts[0]] = enters[fresh][firsts[1]]
            begun &= ~entered_first[found]
            number = number + begun
        last = np.zeros(len(self.mms), np.uint32)
        last[found] = number  # generations rise, so the last one stays
        self._describe_mms(select(events, chosen), found, number == last[found], last)
        rows[chosen], generations[chosen] = found, number
        return rows, generations

    def _count_before(self, rows: Rows, marked: Mask) -> Array:
        # Per event the marked ones of its row up to and with it.
        if not marked.any():
            return np.zeros(len(rows), np.uint32)
        step = len(rows) + 1
        keys = np.sort(rows[marked] * step + np.flatnonzero(marked))
        own = np.searchsorted(keys, rows * step + np.arange(len(rows)), side="right")
        return (own - np.searchsorted(keys, rows * step)).astype(np.uint32)

    def _describe_mms(self, events: Events, rows: Rows, current: Mask, last: Array) -> None:
        mms, kinds = self.mms, events["kind"]
        touched = np.unique(rows)
        renewed = touched[mms["generation"][touched] != last[touched]]
        mms.forget(renewed)
        mms["generation"][renewed] = last[renewed]
        # Of repeated rows, the last value stays.
        owned = current & ((events["flags"] & EventFlag.PID_IS_OWNER) != 0) & (kinds != _ENTER)
        mms["pid"][rows[owned]] = events["pid"][owned]
        enters = current & (kinds == _ENTER)
        mms["enter_pid"][rows[enters]] = events["pid"][enters]
        mms["comm"][rows[enters]] = events["comm"][enters]
        mms["entered_ns"][rows[enters]] = events["ts_ns"][enters]
        mms["before_recording"][rows[enters]] = False
        exits = current & (kinds == _EXIT)
        mms["exited_ns"][rows[exits]] = events["ts_ns"][exits]
        zero = rows[current & (kinds == _ZERO) & (events["err"] == 0)]
        if len(zero):
            mms["zero_pages"][:] += np.bincount(zero, minlength=len(mms)).astype(np.uint64)
        visits = current & (kinds == _VISIT)
        if visits.any():
            mms["cursor_ns"][rows[visits]] = events["ts_ns"][visits]
            mms["cursor_address"][rows[visits]] = events["address"][visits]

    # ---- stable_nodes ----

    def _take_functions(self, events: Events, orders: Rows) -> tuple[Rows, Array]:
        # Returns per event the row and generation of its stable_node, -1 and 0 without.
        kinds = events["kind"]
        # A node that has turned out stale is closed by its own event, which comes before.
        stale = (kinds == _LEAVE) & ((events["flags"] & EventFlag.NODE_FREED) != 0)
        chosen = np.flatnonzero(_NODE_KINDS[kinds] & ~stale & (events["stable_node"] != 0))
        rows = np.full(len(events), -1, np.int64)
        generations = np.zeros(len(events), np.uint32)
        self._take_chains(events, orders)
        if not len(chosen):
            return rows, generations
        acts = select(events, chosen)
        never = np.zeros(len(acts), bool)
        lives = _follow(self.nodes, acts["stable_node"], never, acts["kind"] == _FREE_NODE)
        rows[chosen[lives.order]] = lives.rows
        generations[chosen[lives.order]] = lives.generations
        self._describe_nodes(select(acts, lives.order), orders[chosen[lives.order]], lives)
        return rows, generations

    def _describe_nodes(self, acts: Events, orders: Rows, lives: _Lives) -> None:
        # acts and orders are in the groups' order.
        nodes, kinds, flags = self.nodes, acts["kind"], acts["flags"]
        first_sharer = (kinds == _APPEND) & ((flags & EventFlag.FIRST_SHARER) != 0)
        moves = kinds == _MIGRATE
        birth = lives.opens & ((kinds == _INSERT) | first_sharer)
        self._keep_spans(acts, lives, lives.opens & ~birth)
        renewed, generations = lives.renewed()
        nodes.forget(renewed)
        nodes["generation"][renewed] = generations
        nodes["open"][lives.rows[lives.groups.last()]] = True

        def note(column: str, chosen: Mask, values: Array) -> None:
            chosen = chosen & lives.current
            nodes[column][lives.rows[chosen]] = values[chosen]

        everywhere = np.ones(len(acts), bool)
        yes = everywhere
        ts_ns = acts["ts_ns"]
        note("seen_order", everywhere, orders)
        note("opened_order", lives.opens, orders)
        note("born_ns", birth, ts_ns)
        note("unseen_birth", lives.opens & ~birth, yes)
        # remove_rmap_item_from_tree tells the kpfn of its entry, which may be old by its exit.
        kpfn = np.where(moves, acts["kpfn_after"], acts["pfn"])
        note("kpfn", lives.opens | moves | (kinds == _APPEND) | (kinds == _INSERT), kpfn)
        note("kpfn_since_ns", moves, ts_ns)
        note("emptied_order", (kinds == _INSERT) | first_sharer, orders)
        note("emptied_order", (kinds == _LEAVE) & ((flags & EventFlag.LAST_SHARER) != 0), orders)
        placed = (kinds == _INSERT) | (kinds == _NEW_CHAIN) | (kinds == _FREE_CHAIN)
        note("tree_nid", placed | (kinds == _FREE_NODE), acts["nid"])
        self._note_trees(acts, orders, placed, birth)
        # A node that gets sharers anew may be so far down in its chain that the chain was not
        # found (bpf/merging.c: MOST_DUPS_BEFORE): then what was known holds.
        told = (kinds == _NEW_CHAIN) | ((kinds == _INSERT) & (acts["chain"] != 0))
        note("chain", told | (kinds == _FREE_CHAIN), np.where(told, acts["chain"], 0))
        crossing = moves & (
            nid_of(self.header, acts["kpfn_before"]) != nid_of(self.header, acts["kpfn_after"])
        )
        note("crossed", placed | crossing, crossing)
        note("moved_ns", moves, ts_ns)
        moved = lives.rows[moves & lives.current]
        if len(moved):
            nodes["moved"][:] += np.bincount(moved, minlength=len(nodes)).astype(np.uint32)
        closes = kinds == _FREE_NODE
        note("closed_ns", closes, ts_ns)
        note("closed_order", closes, orders)
        note("open", closes, ~yes)

    def _note_trees(self, acts: Events, orders: Rows, placed: Mask, birth: Mask) -> None:
        # A new node's nid is that of its page, and 0 with merge_across_nodes (mm/ksm.c:
        # stable_tree_insert, NUMA); one that is older may have moved since.
        two = placed & (acts["nid"] > 0)
        one = birth & (acts["kind"] == _INSERT) & (acts["nid"] == 0)
        one[one] = nid_of(self.header, acts["pfn"][one]) > 0
        telling = np.flatnonzero(one | two)
        if len(telling):
            last = telling[orders[telling].argmax()]
            self.one_tree = int(acts["ts_ns"][last]), bool(one[last])

    def _keep_spans(self, acts: Events, lives: _Lives, unseen_opens: Mask) -> None:
        # Before the rows change: where nodes have been whose beginning was not seen.
        nodes, kinds = self.nodes, acts["kind"]
        count = lives.groups.count_since_first(lives.opens)
        old = count == 0
        unseen = np.zeros(len(acts), bool)
        unseen[old] = nodes["unseen_birth"][lives.rows[old]]
        opened = np.maximum.accumulate(np.where(lives.opens, np.arange(len(acts)), 0))
        unseen[~old] = unseen_opens[opened[~old]]
        ends = np.flatnonzero(unseen & ((kinds == _MIGRATE) | (kinds == _FREE_NODE)))
        if not len(ends):
            return
        spans = np.zeros(len(ends), SPAN_DTYPE)
        spans["kpfn"] = np.where(
            kinds[ends] == _MIGRATE, acts["kpfn_before"][ends], acts["pfn"][ends]
        )
        spans["until_ns"] = acts["ts_ns"][ends]
        spans["node_row"] = lives.rows[ends]
        spans["node_generation"] = lives.generations[ends]
        spans["from_ns"] = np.where(old[ends], nodes["kpfn_since_ns"][lives.rows[ends]], 0)
        same = (spans["node_row"][1:] == spans["node_row"][:-1]) & (
            spans["node_generation"][1:] == spans["node_generation"][:-1]
        )
        spans["from_ns"][1:][same] = spans["until_ns"][:-1][same]
        self.spans.append(spans)

    def _take_chains(self, events: Events, orders: Rows) -> None:
        kinds = events["kind"]
        tells = (kinds == _INSERT) | (kinds == _NEW_CHAIN) | (kinds == _FREE_CHAIN)
        places = np.flatnonzero(tells & (events["chain"] != 0))
        if not len(places):
            return
        acts, kinds = select(events, places), kinds[places]
        lives = _follow(self.chains, acts["chain"], kinds == _NEW_CHAIN, kinds == _FREE_CHAIN)
        renewed, generations = lives.renewed()
        chains = self.chains
        chains.forget(renewed)
        chains["generation"][renewed] = generations
        by, now = lives.order, lives.current
        acts, orders, kinds = select(acts, by), orders[places[by]], kinds[by]
        rows = lives.rows[now]
        chains["open"][rows] = (kinds != _FREE_CHAIN)[now]
        chains["order"][rows] = orders[now]
        chains["told_ns"][rows] = acts["ts_ns"][now]
        chains["nid"][rows] = acts["nid"][now]
        births = now & (kinds == _NEW_CHAIN)
        chains["born_ns"][lives.rows[births]] = acts["ts_ns"][births]
        unseen = now & lives.opens & ~births
        chains["unseen_birth"][lives.rows[unseen]] = True

    # ---- merges, where there is nothing but tracepoints ----

    def _hold_first_step(self, events: Events, orders: Rows) -> tuple[Events, Rows]:
        # What became of the first step of a pair is told by the next attempt.
        if self._begun is not None:
            held, held_order = self._begun
            events, orders = concatenate([held, events]), np.r_[held_order, orders]
            self._begun = None
        attempts = np.flatnonzero(events["kind"] == _MERGE)
        if len(attempts) and _begun(events[attempts[-1:]])[0]:
            last = int(attempts[-1])
            self._begun = events[last : last + 1].copy(), orders[last : last + 1].copy()
            rest = np.ones(len(events), bool)
            rest[last] = False
            events, orders = select(events, rest), orders[rest]
        return events, orders

    def _order_pairs(self, events: Events, orders: Rows) -> Rows:
        # The first page of a pair becomes a sharer together with the second.
        attempts = np.flatnonzero(events["kind"] == _MERGE)
        followed = np.flatnonzero(_ends_pair(events[attempts])[1:]) if len(attempts) else attempts
        orders = orders.copy()
        orders[attempts[followed]] = orders[attempts[followed + 1]]
        return orders

    def _take_merges(self, events: Events, orders: Rows) -> tuple[Rows, Array]:
        # Returns per event the row and generation of the node that it joined, -1 and 0 without.
        rows = np.full(len(events), -1, np.int64)
        generations = np.zeros(len(events), np.uint32)
        attempts = np.flatnonzero(events["kind"] == _MERGE)
        pair = np.zeros(len(events), bool)
        pair[attempts] = _ends_pair(events[attempts]) & (events["err"][attempts] == 0)
        joins = (events["kind"] == _MERGE) & (events["err"] == 0) & (events["ksm_page"] != 0)
        ends = events["kind"] == _NODE_REMOVED
        chosen = np.flatnonzero(joins | ends)
        if len(chosen):
            lives = _follow(self.nodes, events["pfn"][chosen], pair[chosen], ends[chosen])
            rows[chosen[lives.order]] = lives.rows
            generations[chosen[lives.order]] = lives.generations
            self._describe_frames(events, orders, pair, ends, chosen[lives.order], lives)
        rows[ends], generations[ends] = -1, 0
        second = np.flatnonzero(pair[attempts])
        first, second = attempts[second - 1], attempts[second]
        rows[first], generations[first] = rows[second], generations[second]
        return rows, generations

    def _describe_frames(
        self, events: Events, orders: Rows, pair: Mask, ends: Mask, places: Rows, lives: _Lives
    ) -> None:
        nodes = self.nodes
        renewed, generations = lives.renewed()
        nodes.forget(renewed)
        nodes["generation"][renewed] = generations
        now = lives.current
        rows, places, opens = lives.rows[now], places[now], lives.opens[now]
        nodes["open"][rows] = ~ends[places]
        nodes["kpfn"][rows] = events["pfn"][places]
        nodes["seen_order"][rows] = orders[places]
        born = opens & pair[places]
        nodes["born_ns"][rows[born]] = events["ts_ns"][places[born]]
        nodes["emptied_order"][rows[born]] = orders[places[born]]
        nodes["unseen_birth"][rows[opens & ~born]] = True
        closed = ends[places]
        nodes["closed_ns"][rows[closed]] = events["ts_ns"][places[closed]]
        nodes["closed_order"][rows[closed]] = orders[places[closed]]

    # ---- rmap_items ----

    def _take_items(
        self,
        events: Events,
        orders: Rows,
        mm_rows: Rows,
        mm_generations: Array,
        node_rows: Rows,
        node_generations: Array,
    ) -> None:
        if not len(events):
            return
        items = self.items
        groups = Groups(events["rmap_item"])
        by_group = items.find_or_add(groups.keys)[groups.number]
        rows = np.empty(len(events), np.int64)
        rows[groups.order] = by_group
        kinds, told = events["kind"], events["address"].copy()
        current = self._renew_items(events, told, groups, by_group, mm_rows, mm_generations)

        visits = kinds == _VISIT
        joined = (node_rows >= 0) & ((kinds == _APPEND) | (kinds == _MERGE))
        states = np.where(joined, np.uint8(ItemState.STABLE), np.uint8(ItemState.NONE))
        states[visits & ((told & np.uint64(UNSTABLE_FLAG)) != 0)] = ItemState.UNSTABLE
        # ksmd found it in place: no change, and told by the page's frame of which node.
        found = visits & ((told & np.uint64(STABLE_FLAG)) != 0)
        writes = current & ~found
        # Of repeated rows, the last value stays.
        to = rows[writes]
        items["state"][to] = states[writes]
        items["node_row"][to] = node_rows[writes]
        items["node_generation"][to] = node_generations[writes]
        items["order"][to] = orders[writes]
        items["since_ns"][to] = events["ts_ns"][writes]
        items["seqnr"][to] = (told & np.uint64(SEQNR_MASK)).astype(np.uint8)[writes]
        found &= current
        found[found] = (events["flags_before"][found] & STABLE_FLAG) != 0
        found &= events["pfn"] != 0  # a watchpoint does not tell it
        to = rows[found]
        items["hint_order"][to] = orders[found]
        items["hint_ns"][to] = events["ts_ns"][found]
        items["hint_kpfn"][to] = events["pfn"][found]

    def _renew_items(
        self,
        events: Events,
        told: Array,
        groups: Groups,
        rows: Rows,
        mm_rows: Rows,
        mm_generations: Array,
    ) -> Mask:
        # Begins a new generation of each rmap_item that stands for another page now. rows are in
        # the groups' order. Returns per event whether it is of the last generation.
        items, by, first = self.items, groups.order, groups.first
        known = ((events["flags"] & EventFlag.HAS_ADDRESS) != 0) & (mm_rows >= 0)
        places = {
            "address": (told & np.uint64(~FLAG_MASK & 0xFFFF_FFFF_FFFF_FFFF))[by],
            "mm_row": mm_rows[by],
            "mm_generation": mm_generations[by],
        }
        if not known.all():
            # What is not told is as it was told last.
            known = known[by]
            carried = np.maximum.accumulate(np.where(known | first, np.arange(len(by)), 0))
            for name, values in places.items():
                places[name] = np.where(first & ~known, items[name][rows], values)[carried]
        new = np.zeros(len(by), bool)
        at = rows[first]
        for values in places.values():
            new[1:] |= values[1:] != values[:-1]
        new[first] = items["generation"][at] == 0
        for name, values in places.items():
            new[first] |= items[name][at] != values[first]
        last = groups.last()
        for name, values in places.items():
            items[name][at] = values[last]
        if not new.any():
            return np.ones(len(by), bool)
        since_first = groups.count_since_first(new)
        renewed = since_first[last] > 0
        items.forget(at[renewed])
        for name, values in places.items():
            items[name][at[renewed]] = values[last[renewed]]
        items["generation"][at] += since_first[last].astype(np.uint32)
        current = np.empty(len(by), bool)
        current[by] = since_first == since_first[last][groups.number]
        return current


def nid_of(header: Header, pfns: Array) -> Array:
    """Return the NUMA node of each page frame by the header's facts, int32, -1 where unknown."""
    ranges = header.facts.get("node_pages") or {}
    spans = sorted(
        (first, end, int(node)) for node, spans in ranges.items() for first, end in spans
    )
    if not spans:
        return np.full(len(pfns), -1, np.int32)
    firsts, ends, nodes = np.array(spans, np.int64).T
    frames = pfns.astype(np.int64)
    at = np.searchsorted(firsts, frames, side="right") - 1
    inside = (at >= 0) & (frames < ends[at]) & (pfns != 0)
    return np.where(inside, nodes[at], -1).astype(np.int32)


def fold_all(header: Header, items: Iterable[Item]) -> Fold:
    """Fold a whole stream."""
    fold = Fold(header)
    for item in items:
        fold.take(item)
    return fold


def can_see(header: Header, *names: str) -> bool:
    """Say whether the plan caught all the named kinds on that kernel."""
    caught = {entry["event"] for entry in header.plan if entry["rung"] != "absent"}
    return caught.issuperset(names)


def world_of(header: Header) -> World:
    """Say by which events the plan lets the trees be known."""
    if can_see(header, *FUNCTIONS):
        return World.FUNCTIONS
    return World.TRACEPOINTS if can_see(header, *TRACEPOINTS) else World.NONE


def _follow(table: Table, keys: Array, births: Mask, closes: Mask) -> _Lives:
    # Tells which events belong to one life of what is known by an address. A life ends with a
    # close, or where another begins.
    groups = Groups(keys)
    rows = table.find_or_add(groups.keys)[groups.number]
    births, closes = births[groups.order], closes[groups.order]
    opens = births.copy()
    opens[1:] |= closes[:-1]
    first = groups.first
    opens[first] = births[first] | ~table["open"][rows[first]]
    generations = table["generation"][rows] + groups.count_since_first(opens).astype(np.uint32)
    last = generations[groups.last()]
    return _Lives(groups, rows, generations, generations == last[groups.number], opens)


def _begun(attempts: Events) -> Mask:
    # First steps of a pair that succeeded (mm/ksm.c:try_to_merge_two_pages).
    begun: Mask = (attempts["ksm_page"] == 0) & (attempts["err"] == 0)
    return begun


def _ends_pair(attempts: Events) -> Mask:
    # Second steps of the attempt before.
    ends = np.zeros(len(attempts), bool)
    ends[1:] = _begun(attempts)[:-1] & (attempts["ksm_page"][1:] != 0)
    ends[1:] &= attempts["pfn"][1:] == attempts["pfn"][:-1]
    return ends
