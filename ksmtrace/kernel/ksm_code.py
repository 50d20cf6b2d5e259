"""Where mm/ksm.c keeps its variables, read out of its own code.

/proc/kallsyms names functions on every kernel, data only with CONFIG_KALLSYMS_ALL. But a function
that shows a variable loads it from an address that stands in its instructions; which of the
addresses in a function is which variable follows from what the source does with it
(mm/ksm.c, 5.10 to 7.x). x86-64 only.

Nothing is taken on trust: a variable is found only where exactly one address fits, and
:func:`find_variables` compares what it has found with the files that show them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ksmtrace.errors import KernelFeatureMissing
from ksmtrace.kernel import sysfs
from ksmtrace.kernel.files import ROOT
from ksmtrace.kernel.kallsyms import read_extents
from ksmtrace.kernel.ksm_layout import COUNTERS, Layout
from ksmtrace.kernel.memory import KernelMemory, UnmappedAddress

ANCHOR = "ksm_scan_thread"
"""A function of mm/ksm.c whose name no other file uses. Others share theirs, such as
full_scans_show with mm/khugepaged.c: of these the one nearest to it is meant."""

SHOWN = tuple(counter for counter in COUNTERS if counter.file is not None)
"""Variables that a function FILE_show loads."""

LISTS = ("remove_all_stable_nodes", "ksm_memory_callback", "merge_across_nodes_store", "run_store")
"""Functions that go over migrate_nodes, themselves or by another that was inlined into them."""

LOOKUPS = ("ksm_get_folio", "get_ksm_page")
"""A function that makes a struct page of a frame number: what it is called, newest first."""

FUNCTIONS = (
    ANCHOR,
    *(f"{counter.file}_show" for counter in SHOWN),
    *("pages_volatile_show", "full_scans_show"),
    *LISTS,
    *LOOKUPS,
)
"""All functions whose code is read, where the kernel has them."""

_ATTEMPTS = 3
_VMEMMAP_ALIGNMENT = 1 << 30
# Where the kernel's half of the addresses begins with five levels of page tables.
_KERNEL_HALF = 0xFF00_0000_0000_0000
_MOST_MM_SLOTS = 1 << 20


@dataclass(frozen=True, order=True)
class Reference:
    """An address in an instruction.

    Attributes:
        address: of what the instruction works on.
        nr_bytes: how much it loads or stores there; 0: the address itself is the operand.
        loads: whether it reads what is there.
        stores: whether it writes there.
    """

    address: int
    nr_bytes: int
    loads: bool
    stores: bool


class _Unknown(Exception):
    """A variable that does not show in the code as it should."""


def find_variables(memory: KernelMemory, layout: Layout, root: Path = ROOT) -> dict[str, int]:
    """Find what a walk of KSM's structures needs, and more.

    Args:
        memory: the running kernel's.
        layout: of its structures.
        root: where kallsyms and the counters are read.

    Returns:
        Addresses by name: all of :data:`ksmtrace.kernel.ksm_layout.NEEDED_SYMBOLS`, counters that
        have a file, and vmemmap_base where it shows.

    Raises:
        KernelFeatureMissing: another machine, or code that ksmtrace does not know.
        KernelInterfaceError: kallsyms or the kernel's memory cannot be read.
    """
    if os.uname().machine != "x86_64":
        raise KernelFeatureMissing(
            "addresses in the kernel's code are understood on x86-64 only",
            "boot a kernel with CONFIG_KALLSYMS_ALL=y",
        )
    try:
        found = _Code(memory, root).variables(layout)
        _compare(memory, found, root)
    except (_Unknown, UnmappedAddress) as error:
        raise KernelFeatureMissing(
            f"mm/ksm.c's variables do not show in its code: {error}",
            "boot a kernel with CONFIG_KALLSYMS_ALL=y",
        ) from error
    return found


# ksmd may be at work: a file that shows two values around a reading says nothing of that.
def _compare(memory: KernelMemory, found: Mapping[str, int], root: Path) -> None:
    pending = [counter for counter in SHOWN if counter.symbol in found]
    wrong: dict[str, str] = {}
    for _ in range(_ATTEMPTS):
        memory.forget()
        before = sysfs.read_ksm(root)
        values = {
            counter.symbol: memory.integer(found[counter.symbol], counter.nr_bytes, counter.signed)
            for counter in pending
        }
        after = sysfs.read_ksm(root)
        wrong = {
            counter.symbol: f"{counter.file} shows {shown}, {values[counter.symbol]} is there"
            for counter in pending
            if (shown := before[str(counter.file)]) == after[str(counter.file)]
            and shown != values[counter.symbol]
        }
        if not wrong:
            return
        pending = [counter for counter in pending if counter.symbol in wrong]
    raise _Unknown("; ".join(wrong.values()))


class _Code:
    def __init__(self, memory: KernelMemory, root: Path) -> None:
        self._memory = memory
        self._extents = read_extents(FUNCTIONS, root)
        anchors = self._extents[ANCHOR]
        if len(anchors) != 1:
            raise _Unknown(f"/proc/kallsyms has {len(anchors)} functions {ANCHOR}")
        self._anchor = anchors[0].start

    def variables(self, layout: Layout) -> dict[str, int]:
        found = {}
        for counter in SHOWN:
            if references := self.references((f"{counter.file}_show",)):
                loads = {r.address for r in references if r.loads and r.nr_bytes}
                found[counter.symbol] = _only(loads, counter.symbol)
        # pages_volatile_show: ksm_rmap_items less all pages in trees.
        loads = {r.address for r in self.references(("pages_volatile_show",)) if r.nr_bytes}
        found["ksm_rmap_items"] = _only(loads - set(found.values()), "ksm_rmap_items")
        loads = {r.address for r in self.references(("full_scans_show",)) if r.nr_bytes}
        found["ksm_scan"] = _only(loads, "ksm_scan") - layout["ksm_scan.seqnr"]
        found["ksm_mm_head"] = self._mm_head(found["ksm_scan"], layout)
        # merge_across_nodes_store is the only one to write these: the pointers to the roots, of
        # which it first looks at the stable one, and the number of nodes.
        stored = self.references(("merge_across_nodes_store",))
        roots = {r.address for r in stored if r.stores and r.nr_bytes == 8}
        stable = roots & {r.address for r in stored if r.loads and r.nr_bytes == 8}
        found["root_stable_tree"] = _only(stable, "root_stable_tree")
        found["root_unstable_tree"] = _only(roots - stable, "root_unstable_tree")
        numbers = {r.address for r in stored if r.stores and r.nr_bytes == 4}
        numbers.discard(found.get("ksm_merge_across_nodes", 0))
        found["ksm_nr_node_ids"] = _only(numbers, "ksm_nr_node_ids")
        found["migrate_nodes"] = self._migrate_nodes(found["ksm_mm_head"], layout)
        if (base := self._vmemmap_base()) is not None:
            found["vmemmap_base"] = base
        return found

    # The only slot without an mm: it is static, and no mm's. The list may change meanwhile.
    def _mm_head(self, ksm_scan: int, layout: Layout) -> int:
        for _ in range(_ATTEMPTS - 1):
            with contextlib.suppress(UnmappedAddress):
                return self._slot_without_mm(ksm_scan, layout)
            self._memory.forget()
        return self._slot_without_mm(ksm_scan, layout)

    def _slot_without_mm(self, ksm_scan: int, layout: Layout) -> int:
        slot = self._memory.word(ksm_scan + layout["ksm_scan.mm_slot"])
        link = layout["mm_slot.mm_list"] + layout["list_head.next"]
        for _ in range(_MOST_MM_SLOTS):
            if self._memory.word(slot + layout["mm_slot.mm"]) == 0:
                return slot
            slot = self._memory.word(slot + link) - layout["mm_slot.mm_list"]
        raise _Unknown("ksm_mm_head: no slot without an mm")

    # The head of a list: its first link is loaded, and compared with the head's own address.
    def _migrate_nodes(self, mm_head: int, layout: Layout) -> int:
        references = [r for name in LISTS for r in self.references((name,))]
        loaded = {r.address for r in references if r.loads and r.nr_bytes == 8}
        heads = {
            address
            for address in loaded & {r.address for r in references if not r.nr_bytes}
            if address != mm_head + layout["mm_slot.mm_list"] and self._is_list(address, layout)
        }
        return _only(heads, "migrate_nodes")

    def _is_list(self, head: int, layout: Layout) -> bool:
        following, before = layout["list_head.next"], layout["list_head.prev"]
        try:
            return head == self._memory.word(self._memory.word(head + following) + before)
        except UnmappedAddress:
            return False

    # KASLR puts it at a multiple of what one entry of the second-highest page table maps
    # (arch/x86/mm/kaslr.c:kernel_randomize_memory).
    def _vmemmap_base(self) -> int | None:
        fitting = set()
        for reference in self.references(LOOKUPS):
            if reference.loads and reference.nr_bytes == 8:
                value = self._memory.word(reference.address)
                if value >= _KERNEL_HALF and value % _VMEMMAP_ALIGNMENT == 0:
                    fitting.add(reference.address)
        return fitting.pop() if len(fitting) == 1 else None

    # Those of the first of these functions that there is; none where there is none.
    def references(self, names: Iterable[str]) -> list[Reference]:
        for name in names:
            if extents := self._extents[name]:
                code = min(extents, key=lambda extent: abs(extent.start - self._anchor))
                return list(
                    iter_references(self._memory.content(code.start, len(code)), code.start)
                )
        return []


def _only(addresses: set[int], name: str) -> int:
    if len(addresses) != 1:
        raise _Unknown(f"{name}: {len(addresses)} addresses could be it")
    return next(iter(addresses))


def iter_references(code: bytes, address: int) -> Iterator[Reference]:
    """Yield the addresses of the kernel's variables in a function's code.

    Args:
        code: its instructions.
        address: of the first.
    """
    # Only where it is needed: it takes a tenth of a second to import.
    import capstone

    decoder = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
    decoder.detail = True
    for instruction in decoder.disasm(code, address):
        goes = instruction.group(capstone.CS_GRP_JUMP) or instruction.group(capstone.CS_GRP_CALL)
        for operand in instruction.operands:
            if operand.type == capstone.x86.X86_OP_IMM and not goes:
                value = operand.imm & 0xFFFF_FFFF_FFFF_FFFF
                # Where the kernel's image is mapped, and no small negative number.
                if 0xFFFF_FFFF_8000_0000 <= value < 0xFFFF_FFFF_FFFF_0000:
                    yield Reference(value, 0, False, False)
            if operand.type != capstone.x86.X86_OP_MEM or operand.mem.segment:
                continue
            if operand.mem.base == capstone.x86.X86_REG_RIP:
                at = instruction.address + instruction.size + operand.mem.disp
            elif not operand.mem.base and not operand.mem.index:
                at = operand.mem.disp
            else:
                continue
            at &= 0xFFFF_FFFF_FFFF_FFFF
            if instruction.id == capstone.x86.X86_INS_LEA:
                yield Reference(at, 0, False, False)
            else:
                stores = bool(operand.access & capstone.CS_AC_WRITE)
                loads = bool(operand.access & capstone.CS_AC_READ)
                yield Reference(at, operand.size, loads, stores)
