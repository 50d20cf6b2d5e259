"""The structures of mm/ksm.c as they are in the kernel's memory: trees, rmap_items, mm slots.

The "kernel truth": read through /proc/kcore, else by a BPF program; with addresses from
/proc/kallsyms, else from the code of mm/ksm.c itself; with offsets from BTF; without any lock. What
is found is told as it stands; :mod:`ksmtrace.kernel.ksm_check` says where it contradicts itself.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from ksmtrace.errors import CannotRun, KernelFeatureMissing, KernelInterfaceError, PrivilegeMissing
from ksmtrace.kernel.bpf_memory import BpfMemory
from ksmtrace.kernel.btf import Btf
from ksmtrace.kernel.files import ROOT
from ksmtrace.kernel.kallsyms import read_symbols
from ksmtrace.kernel.kcore import Kcore
from ksmtrace.kernel.ksm_code import find_variables
from ksmtrace.kernel.ksm_layout import COUNTERS, SYMBOLS, Layout, missing_symbols, read_layout
from ksmtrace.kernel.memory import WORD_BYTES, KernelMemory, UnmappedAddress
from ksmtrace.kernel.probes import LoadProbe

SEQNR_MASK = 0x0FF
UNSTABLE_FLAG = 0x100
STABLE_FLAG = 0x200
FLAG_MASK = 0xFFF
"""Bits of rmap_item->address (mm/ksm.c); the kernel masks them off with PAGE_MASK."""

STABLE_NODE_CHAIN = -1024
"""stable_node->rmap_hlist_len of a chain (mm/ksm.c)."""

PAGE_MAPPING_KSM = 3
"""Low bits of page->mapping of a KSM page (include/linux/page-flags.h)."""


class NodeKind(IntEnum):
    """Where a stable_node is linked."""

    PLAIN = 0
    """In a stable tree, with sharers of its own."""
    CHAIN = 1
    """In a stable tree, in place of several nodes of equal content; has no page."""
    DUP = 2
    """Below a chain."""
    MIGRATING = 3
    """On migrate_nodes: its page has moved to another NUMA node."""


class ItemState(IntEnum):
    """Where an rmap_item is, by its flags."""

    NONE = 0
    UNSTABLE = 1
    STABLE = 2


STABLE_NODE_DTYPE = np.dtype(
    [
        ("stable_node", "u8"),
        ("kind", "u1"),
        ("chain", "u8"),
        ("root", "i4"),
        ("kpfn", "u8"),
        ("nid", "i4"),
        ("rmap_hlist_len", "i4"),
        ("head", "u8"),
        ("is_current", "i1"),
    ]
)
"""One stable_node.

``stable_node``: its address. ``kind``: a :class:`NodeKind`. ``chain``: address of the chain above a
dup, else 0. ``root``: index in root_stable_tree of the tree that has it, -1 on migrate_nodes.
``kpfn``: frame number, 0 for a chain. ``nid``: as stored, -1 for a chain and without CONFIG_NUMA.
``rmap_hlist_len``: as stored. ``head``: as stored; in a union with the rb_node. ``is_current``: 1
where page->mapping at kpfn points back here, 0 where not: the page was freed or moved since, and
the node is stale until ksmd comes by (mm/ksm.c:ksm_get_folio); -1 for a chain, or unknown.
"""

SHARER_DTYPE = np.dtype([("stable_node", "u8"), ("rmap_item", "u8")])
"""One link of one stable_node's hlist, in the list's order: addresses of node and rmap_item."""

RMAP_ITEM_DTYPE = np.dtype(
    [
        ("rmap_item", "u8"),
        ("mm_slot", "u8"),
        ("mm", "u8"),
        ("address", "u8"),
        ("state", "u1"),
        ("flags", "u2"),
        ("seqnr", "u1"),
        ("stable_node", "u8"),
        ("nid", "i4"),
        ("oldchecksum", "i8"),
        ("age", "i2"),
        ("remaining_skips", "i2"),
    ]
)
"""One rmap_item, by slots in list order, within a slot in the order of its rmap_list.

``rmap_item``: its address. ``mm_slot``: the slot on whose list it is. ``mm``: as stored.
``address``: the virtual address, page-aligned. ``state``: an :class:`ItemState`. ``flags``:
UNSTABLE_FLAG and STABLE_FLAG as stored. ``seqnr``: low 8 bits of ksm_scan.seqnr when it was put
into the unstable tree; 0 where it is not UNSTABLE. ``stable_node``: ``head`` while STABLE, else 0:
mm/ksm.c does not clear it on every way out. ``nid``: index of its unstable tree while UNSTABLE,
else -1. ``oldchecksum``, ``age``, ``remaining_skips``: -1 where this kernel does not have it, or
has something else in its place while the item is STABLE (a union with linear_page_index).
"""

UNSTABLE_NODE_DTYPE = np.dtype([("rmap_item", "u8"), ("root", "i4")])
"""One node of an unstable tree: address of the rmap_item, index in root_unstable_tree."""

MM_SLOT_DTYPE = np.dtype(
    [
        ("mm_slot", "u8"),
        ("mm", "u8"),
        ("pid", "i4"),
        ("comm", "S16"),
        ("mm_users", "i4"),
        ("nr_rmap_items", "u4"),
        ("ksm_merging_pages", "i8"),
        ("ksm_rmap_items", "i8"),
    ]
)
"""One mm on ksm_mm_head, in list order.

``mm_slot``, ``mm``: addresses. ``pid``: tgid of mm->owner in the first pid namespace, -1 where it
has none: exited, or a kernel without CONFIG_MEMCG. ``comm``: of the owner. ``mm_users``: 0 once
the mm's processes have exited (mm/ksm.c:ksm_test_exit). ``nr_rmap_items``: length of rmap_list.
``ksm_merging_pages``, ``ksm_rmap_items``: counters in mm_struct, -1 where this kernel has none.
"""

Array = npt.NDArray[Any]


ATTEMPTS = 3
"""How often a reading that the kernel disturbed is begun anew."""

# Longer than any list can be that has not been led astray.
_SPARE_LINKS = 65536


@dataclass(frozen=True)
class ScanCursor:
    """struct ksm_scan: where ksmd is.

    Attributes:
        mm_slot: address of the slot that it scans next.
        address: virtual address that it scans next there.
        rmap_list: address of the pointer to the next rmap_item.
        seqnr: passes that have ended.
        at_head: whether no pass is under way: mm_slot is ksm_mm_head.
    """

    mm_slot: int
    address: int
    rmap_list: int
    seqnr: int
    at_head: bool


@dataclass(frozen=True)
class KsmMemory:
    """What mm/ksm.c holds.

    Exact only where ksmd rests: write 0 to /sys/kernel/mm/ksm/run first, which returns when the
    batch under way has ended (mm/ksm.c:run_store takes ksm_thread_mutex).

    Attributes:
        counters: by the names of :data:`ksmtrace.kernel.ksm_layout.COUNTERS`; None for a variable
            that this kernel does not have.
        cursor: ksm_scan.
        stable_nodes: of every tree, then of migrate_nodes; :data:`STABLE_NODE_DTYPE`.
        sharers: of all stable_nodes in their order; :data:`SHARER_DTYPE`.
        rmap_items: :data:`RMAP_ITEM_DTYPE`.
        unstable_nodes: what the unstable trees hold; :data:`UNSTABLE_NODE_DTYPE`. After a pass
            has ended it is left over from that pass until the next begins, and after run=2 until
            then the roots lead to freed memory: only rmap_items known to be UNSTABLE are followed.
        nr_unknown_unstable: links of unstable trees that were not followed for that reason.
        mm_slots: :data:`MM_SLOT_DTYPE`.
        migrate_nodes: address of the list of that name.
        rmap_item_bytes: sizeof(struct rmap_item).
        changed: what changed in the kernel between beginning and end of the reading.
        torn: lists and trees that led nowhere or in circles, as far as they led.
        attempts: how many readings were made; this is the last.
    """

    counters: Mapping[str, int | None]
    cursor: ScanCursor
    stable_nodes: Array
    sharers: Array
    rmap_items: Array
    unstable_nodes: Array
    nr_unknown_unstable: int
    mm_slots: Array
    migrate_nodes: int
    rmap_item_bytes: int
    changed: tuple[str, ...]
    torn: tuple[str, ...]
    attempts: int

    @property
    def consistent(self) -> bool:
        """Whether all of this was true at one and the same time, as far as can be told."""
        return not self.changed and not self.torn

    def sysfs_values(self, page_bytes: int) -> dict[str, int]:
        """Compute what the files of /sys/kernel/mm/ksm have to show.

        Args:
            page_bytes: size of a page.

        Returns:
            Values by file, of the files whose variables this kernel has; some kernels have the
            variable and no file. ``pages_volatile`` is clipped at 0 (mm/ksm.c:pages_volatile_show),
            ``general_profit`` as in mm/ksm.c:general_profit_show.
        """
        known = {name: value for name, value in self.counters.items() if value is not None}
        values = {
            counter.file: known[counter.symbol]
            for counter in COUNTERS
            if counter.file is not None and counter.symbol in known
        }
        in_trees = sum(known[f"ksm_pages_{name}"] for name in ("shared", "sharing", "unshared"))
        values["pages_volatile"] = max(known["ksm_rmap_items"] - in_trees, 0)
        values["full_scans"] = self.cursor.seqnr
        if "ksm_zero_pages" in known:
            saved_pages = known["ksm_pages_sharing"] + known["ksm_zero_pages"]
            values["general_profit"] = (
                saved_pages * page_bytes - known["ksm_rmap_items"] * self.rmap_item_bytes
            )
        return values


class KsmMemoryReader:
    """Reads the structures of mm/ksm.c, again and again: symbols and offsets are looked up once.

    Attributes:
        memory: the kernel's.
        addresses: of mm/ksm.c's variables, by name.
        are_listed: whether /proc/kallsyms has them; else they were found in the code.
    """

    def __init__(
        self,
        memory: KernelMemory,
        addresses: Mapping[str, int],
        layout: Layout,
        are_listed: bool = True,
    ) -> None:
        self.memory = memory
        self.addresses = addresses
        self.are_listed = are_listed
        self._layout = layout

    @classmethod
    def open(cls, root: Path = ROOT) -> KsmMemoryReader:
        """Open the running kernel's memory.

        Raises:
            KernelFeatureMissing: it cannot be read on this kernel; one line says all of why.
            PrivilegeMissing: this user may not.
            KernelInterfaceError: an interface is malformed.
        """
        symbols = read_symbols(SYMBOLS, root)
        missing = missing_symbols(symbols)
        try:
            memory = _open_memory(root)
        except (KernelFeatureMissing, PrivilegeMissing) as error:
            # Both have to be mended, unless the code would do: said in one go.
            if missing is not None and (symbols.hidden or symbols.objects_listed):
                raise _both(missing, error) from error
            raise
        try:
            if missing is not None and symbols.hidden:
                raise missing
            layout = read_layout(Btf.read(root))
            if missing is not None:
                return cls(memory, _find_in_code(missing, memory, layout, root), layout, False)
            known = ((name, symbols.address(name)) for name in SYMBOLS)
            addresses = {name: address for name, address in known if address is not None}
            return cls(memory, addresses, layout)
        except BaseException:
            memory.close()
            raise

    def __enter__(self) -> KsmMemoryReader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the kernel's memory."""
        self.memory.close()

    def read(self, attempts: int = ATTEMPTS, pause_s: float = 0.0) -> KsmMemory:
        """Read everything, anew where the kernel changed meanwhile.

        Args:
            attempts: the most readings to make.
            pause_s: how long to wait between two of them.

        Returns:
            The first consistent reading; the last one where none was: see
            :attr:`KsmMemory.consistent`.

        Raises:
            KernelInterfaceError: reading failed, or every reading led to addresses that are none.
        """
        memory: KsmMemory | None = None
        lost: UnmappedAddress | None = None
        for attempt in range(1, attempts + 1):
            if attempt > 1:
                time.sleep(pause_s)
            self.memory.forget()
            try:
                memory = _Walk(self.memory, self._layout, self.addresses).run(attempt)
            except UnmappedAddress as error:
                lost = error
                continue
            if memory.consistent:
                break
        if memory is None:
            raise KernelInterfaceError(
                f"KSM's structures changed during each of {attempts} readings: {lost}",
                "stop ksmd first: echo 0 >/sys/kernel/mm/ksm/run",
            )
        return memory


# A program reads the running kernel's memory only, and no copy of files.
def _open_memory(root: Path) -> KernelMemory:
    try:
        return Kcore.open(root)
    except (KernelFeatureMissing, PrivilegeMissing) as error:
        if root != ROOT:
            raise
        try:
            return BpfMemory.open()
        except CannotRun as other:
            raise _both(error, other) from other


def _find_in_code(
    missing: CannotRun, memory: KernelMemory, layout: Layout, root: Path
) -> Mapping[str, int]:
    try:
        return find_variables(memory, layout, root)
    except KernelFeatureMissing as error:
        raise _both(missing, error) from error


def _both(one: CannotRun, other: CannotRun) -> CannotRun:
    kind = type(one) if type(one) is type(other) else KernelFeatureMissing
    hints = dict.fromkeys(hint for hint in (one.hint, other.hint) if hint)
    return kind(f"{one}; and {other}", "; and ".join(hints))


def probe_ksm_memory(root: Path = ROOT) -> LoadProbe:
    """Try to read the structures of mm/ksm.c, and say how that is done or what prevents it."""
    try:
        with KsmMemoryReader.open(root) as reader:
            reader.read(attempts=1)
            listed = "/proc/kallsyms" if reader.are_listed else "the code of mm/ksm.c"
            return LoadProbe(True, f"{reader.memory.how}, with addresses from {listed}")
    except CannotRun as error:
        return LoadProbe(False, str(error))


def read_ksm_memory(root: Path = ROOT) -> KsmMemory:
    """Read the structures of mm/ksm.c once; see :class:`KsmMemoryReader` for what it raises."""
    with KsmMemoryReader.open(root) as reader:
        return reader.read()


def index_of(keys: Array, wanted: Array) -> npt.NDArray[np.intp]:
    """Find values among others.

    Args:
        keys: shape (n,), in any order; of equal ones any is found.
        wanted: shape (m,).

    Returns:
        Shape (m,): where in ``keys`` each one is, -1 for one that is not there.
    """
    if len(keys) == 0:
        return np.full(len(wanted), -1, np.intp)
    order = np.argsort(keys, kind="stable")
    at = order[np.minimum(np.searchsorted(keys, wanted, sorter=order), len(keys) - 1)]
    found: npt.NDArray[np.intp] = np.where(keys[at] == wanted, at, -1)
    return found


# What moves whenever ksmd does anything, by the names to tell it by.
def _state(
    counters: Mapping[str, int | None], cursor: ScanCursor, slots: list[int]
) -> dict[str, object]:
    fields = {f"ksm_scan.{name}": value for name, value in vars(cursor).items()}
    return {**counters, **fields, "ksm_mm_head": slots}


class _Walk:
    # One reading. Follows pointers within pages that are each read once, so that lists that change
    # meanwhile are finite; what leads in circles or nowhere is noted and left.

    def __init__(self, memory: KernelMemory, layout: Layout, addresses: Mapping[str, int]) -> None:
        self.memory = memory
        self.layout = layout
        self.addresses = addresses
        self.torn: list[str] = []
        self.limit = _SPARE_LINKS
        self.nr_unknown = 0

    def run(self, attempt: int) -> KsmMemory:
        counters, cursor = self.counters(), self.cursor()
        self.limit += 2 * (counters["ksm_rmap_items"] or 0)
        slots = self.slots()
        rmap_items, mm_slots = self.rmap_items(slots)
        stable_nodes, sharers = self.stable_nodes(counters["ksm_nr_node_ids"] or 1)
        unstable_nodes = self.unstable_nodes(counters["ksm_nr_node_ids"] or 1, rmap_items)

        self.memory.forget()
        before = _state(counters, cursor, slots)
        after = _state(self.counters(), self.cursor(), self.slots())
        for array in (stable_nodes, sharers, rmap_items, unstable_nodes, mm_slots):
            array.flags.writeable = False
        return KsmMemory(
            MappingProxyType(counters),
            cursor,
            stable_nodes,
            sharers,
            rmap_items,
            unstable_nodes,
            self.nr_unknown,
            mm_slots,
            self.addresses["migrate_nodes"],
            self.layout.rmap_item_bytes,
            tuple(name for name in before if before[name] != after[name]),
            tuple(self.torn),
            attempt,
        )

    def counters(self) -> dict[str, int | None]:
        return {
            counter.symbol: self.memory.integer(
                self.addresses[counter.symbol], counter.nr_bytes, counter.signed
            )
            if counter.symbol in self.addresses
            else None
            for counter in COUNTERS
        }

    def cursor(self) -> ScanCursor:
        at = self.addresses["ksm_scan"]
        mm_slot, address, rmap_list, seqnr = (
            self.memory.word(at + self.layout[f"ksm_scan.{member}"])
            for member in ("mm_slot", "address", "rmap_list", "seqnr")
        )
        at_head = mm_slot == self.addresses["ksm_mm_head"]
        return ScanCursor(mm_slot, address, rmap_list, seqnr, at_head)

    # Follows pointers from one link to the next until the end is reached.
    def chase(self, first: int, next_offset: int, end: int, what: str) -> list[int]:
        found: dict[int, None] = {}
        at = first
        word = self.memory.word
        while at != end:
            if at in found or len(found) >= self.limit:
                self.torn.append(f"{what} goes in circles at {at:#x}")
                break
            try:
                following = word(at + next_offset)
            except UnmappedAddress:
                self.torn.append(f"{what} leads to {at:#x}, which is no kernel memory")
                break
            found[at] = None
            at = following
        return list(found)

    def list_links(self, head: int, what: str) -> list[int]:
        following = self.layout["list_head.next"]
        return self.chase(self.memory.word(head + following), following, head, what)

    def hlist_links(self, head: int, what: str) -> list[int]:
        first = self.memory.word(head + self.layout["hlist_head.first"])
        return self.chase(first, self.layout["hlist_node.next"], 0, what)

    # The rb_nodes of a tree, parents first. A node that is not among the known ones is left.
    def tree_nodes(self, root: int, what: str, known: set[int] | None = None) -> list[int]:
        found: dict[int, None] = {}
        left, right = self.layout["rb_node.rb_left"], self.layout["rb_node.rb_right"]
        pending = [self.memory.word(root + self.layout["rb_root.rb_node"])]
        while pending:
            at = pending.pop()
            if at == 0:
                continue
            if known is not None and at not in known:
                self.nr_unknown += 1
                continue
            if at in found or len(found) >= self.limit:
                self.torn.append(f"{what} goes in circles at {at:#x}")
                break
            try:
                children = self.memory.word(at + right), self.memory.word(at + left)
            except UnmappedAddress:
                self.torn.append(f"{what} leads to {at:#x}, which is no kernel memory")
                continue
            found[at] = None
            pending.extend(children)
        return list(found)

    # The roots of all trees: their index and their address.
    def roots(self, symbol: str, nr_node_ids: int) -> Iterator[tuple[int, int]]:
        array = self.memory.word(self.addresses[symbol])
        for index in range(max(nr_node_ids, 1)):
            yield index, array + index * WORD_BYTES

    def slots(self) -> list[int]:
        link = self.layout["mm_slot.mm_list"]
        head = self.addresses["ksm_mm_head"] + link
        return [at - link for at in self.list_links(head, "ksm_mm_head")]

    def rmap_items(self, slots: list[int]) -> tuple[Array, Array]:
        layout = self.layout
        following = layout["rmap_item.rmap_list"]
        mm_slots = np.zeros(len(slots), MM_SLOT_DTYPE)
        addresses: list[int] = []
        for row, slot in zip(mm_slots, slots, strict=True):
            first = self.memory.word(slot + layout["mm_slot.rmap_list"])
            items = self.chase(first, following, 0, f"rmap_list of mm_slot {slot:#x}")
            addresses.extend(items)
            row["mm_slot"] = slot
            row["mm"] = self.memory.word(slot + layout["mm_slot.mm"])
            row["nr_rmap_items"] = len(items)
            self.describe_mm(row)

        rows = self.memory.words(
            np.array(addresses, np.uint64), layout.rmap_item_bytes // WORD_BYTES
        )
        found = np.zeros(len(rows), RMAP_ITEM_DTYPE)
        found["rmap_item"] = addresses
        found["mm_slot"] = np.repeat(mm_slots["mm_slot"], mm_slots["nr_rmap_items"])
        found["mm"] = self.column(rows, "rmap_item.mm", "u8")
        address = self.column(rows, "rmap_item.address", "u8")
        found["address"] = address & ~np.uint64(FLAG_MASK)
        flags = address & np.uint64(STABLE_FLAG | UNSTABLE_FLAG)
        found["flags"] = flags
        stable = (flags & np.uint64(STABLE_FLAG)) != 0
        unstable = ~stable & (flags != 0)
        found["state"] = np.select(
            [stable, unstable], [ItemState.STABLE, ItemState.UNSTABLE], ItemState.NONE
        )
        found["seqnr"] = np.where(unstable, address & np.uint64(SEQNR_MASK), np.uint64(0))
        head = self.column(rows, "rmap_item.head", "u8")
        found["stable_node"] = np.where(stable, head, np.uint64(0))
        found["nid"] = np.where(unstable, self.column(rows, "rmap_item.nid", "i4"), -1)
        overlaid = layout.offsets["rmap_item.linear_page_index"] is not None
        for member, form in (("oldchecksum", "u4"), ("age", "u1"), ("remaining_skips", "u1")):
            values = self.column(rows, f"rmap_item.{member}", form).astype(np.int64)
            found[member] = np.where(stable & overlaid, -1, values)
        return found, mm_slots

    # A member of every row; -1 where this kernel does not have it.
    def column(self, rows: Array, name: str, form: str) -> Array:
        offset = self.layout.offsets[name]
        if offset is None:
            return np.full(len(rows), -1, np.int64)
        kind = np.dtype(form)
        content = np.ascontiguousarray(rows).view(np.uint8)
        content = content.reshape(len(rows), rows.shape[1] * WORD_BYTES)
        chosen = np.ascontiguousarray(content[:, offset : offset + kind.itemsize])
        return chosen.view(kind).reshape(len(rows))

    def describe_mm(self, row: Any) -> None:
        offsets, mm = self.layout.offsets, int(row["mm"])
        row["pid"] = row["ksm_merging_pages"] = row["ksm_rmap_items"] = -1
        try:
            row["mm_users"] = self.memory.integer(mm + self.layout["mm_struct.mm_users"], 4, True)
            for member in ("ksm_merging_pages", "ksm_rmap_items"):
                offset = offsets[f"mm_struct.{member}"]
                if offset is not None:
                    row[member] = self.memory.integer(mm + offset, 8, True)
            owner_offset = offsets["mm_struct.owner"]
            owner = 0 if owner_offset is None else self.memory.word(mm + owner_offset)
            if owner:
                row["pid"] = self.memory.integer(owner + self.layout["task_struct.tgid"], 4, True)
                comm = self.memory.content(owner + self.layout["task_struct.comm"], 16)
                row["comm"] = comm.partition(b"\0")[0]
        except UnmappedAddress as error:
            self.torn.append(f"mm {mm:#x} leads to {error.address:#x}, which is no kernel memory")

    def stable_nodes(self, nr_node_ids: int) -> tuple[Array, Array]:
        layout = self.layout
        length = layout["stable_node.rmap_hlist_len"]
        linked: list[tuple[int, NodeKind, int, int]] = []
        for index, root in self.roots("root_stable_tree", nr_node_ids):
            for at in self.tree_nodes(root, f"stable tree {index}"):
                node = at - layout["stable_node.node"]
                if self.memory.integer(node + length, 4, True) != STABLE_NODE_CHAIN:
                    linked.append((node, NodeKind.PLAIN, 0, index))
                    continue
                linked.append((node, NodeKind.CHAIN, 0, index))
                dups = self.hlist_links(node + layout["stable_node.hlist"], f"chain {node:#x}")
                linked.extend(
                    (dup - layout["stable_node.hlist_dup"], NodeKind.DUP, node, index)
                    for dup in dups
                )
        for at in self.list_links(self.addresses["migrate_nodes"], "migrate_nodes"):
            linked.append((at - layout["stable_node.list"], NodeKind.MIGRATING, 0, -1))

        found = np.zeros(len(linked), STABLE_NODE_DTYPE)
        for member, values in zip(
            ("stable_node", "kind", "chain", "root"), zip(*linked, strict=True), strict=False
        ):
            found[member] = values
        rows = self.memory.words(found["stable_node"], layout.stable_node_bytes // WORD_BYTES)
        is_chain = found["kind"] == NodeKind.CHAIN
        found["kpfn"] = np.where(is_chain, 0, self.column(rows, "stable_node.kpfn", "u8"))
        found["nid"] = np.where(is_chain, -1, self.column(rows, "stable_node.nid", "i4"))
        found["rmap_hlist_len"] = self.column(rows, "stable_node.rmap_hlist_len", "i4")
        found["head"] = self.column(rows, "stable_node.head", "u8")
        found["is_current"] = self.is_current(found)

        hlist, link = layout["stable_node.hlist"], layout["rmap_item.hlist"]
        sharers = [
            (node, at - link)
            for node in found["stable_node"][~is_chain].tolist()
            for at in self.hlist_links(node + hlist, f"hlist of stable_node {node:#x}")
        ]
        return found, np.array(sharers, SHARER_DTYPE)

    def is_current(self, nodes: Array) -> Array:
        mapping = self.layout.offsets["page.mapping"]
        found = np.full(len(nodes), -1, np.int8)
        if "vmemmap_base" not in self.addresses or mapping is None:
            return found
        base = self.memory.word(self.addresses["vmemmap_base"]) + mapping
        pages = zip(nodes["stable_node"].tolist(), nodes["kpfn"].tolist(), strict=True)
        for index, (node, kpfn) in enumerate(pages):
            if nodes["kind"][index] == NodeKind.CHAIN:
                continue
            try:
                value = self.memory.word(base + kpfn * self.layout.page_bytes)
            except UnmappedAddress:  # memory that was taken out
                value = 0
            found[index] = value == node | PAGE_MAPPING_KSM
        return found

    def unstable_nodes(self, nr_node_ids: int, rmap_items: Array) -> Array:
        link = self.layout["rmap_item.node"]
        unstable = rmap_items["rmap_item"][rmap_items["state"] == ItemState.UNSTABLE]
        known = set((unstable + np.uint64(link)).tolist())
        nodes = [
            (at - link, index)
            for index, root in self.roots("root_unstable_tree", nr_node_ids)
            for at in self.tree_nodes(root, f"unstable tree {index}", known)
        ]
        return np.array(nodes, UNSTABLE_NODE_DTYPE)
