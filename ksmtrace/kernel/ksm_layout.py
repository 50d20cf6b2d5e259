"""Where mm/ksm.c keeps what: its variables by name, its structures' members by BTF."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ksmtrace.errors import CannotRun, KernelFeatureMissing, PrivilegeMissing
from ksmtrace.kernel.btf import Btf
from ksmtrace.kernel.kallsyms import Symbols


@dataclass(frozen=True)
class Counter:
    """A variable of mm/ksm.c.

    Attributes:
        symbol: its name.
        nr_bytes: its size.
        signed: whether it is a signed integer.
        file: the file of /sys/kernel/mm/ksm that shows it as it is; None where none does.
    """

    symbol: str
    nr_bytes: int
    signed: bool
    file: str | None


COUNTERS = (
    Counter("ksm_run", 8, False, "run"),
    Counter("ksm_pages_shared", 8, False, "pages_shared"),
    Counter("ksm_pages_sharing", 8, False, "pages_sharing"),
    Counter("ksm_pages_unshared", 8, False, "pages_unshared"),
    Counter("ksm_rmap_items", 8, False, None),
    Counter("ksm_stable_node_chains", 8, False, "stable_node_chains"),
    Counter("ksm_stable_node_dups", 8, False, "stable_node_dups"),
    Counter("ksm_pages_scanned", 8, False, "pages_scanned"),
    Counter("ksm_pages_skipped", 8, False, "pages_skipped"),
    Counter("ksm_zero_pages", 8, True, "ksm_zero_pages"),
    Counter("ksm_max_page_sharing", 4, True, "max_page_sharing"),
    Counter("ksm_merge_across_nodes", 4, False, "merge_across_nodes"),
    Counter("ksm_nr_node_ids", 4, True, None),
)
"""What is read of mm/ksm.c's variables, where this kernel has them."""

NEEDED_SYMBOLS = (
    "ksm_scan",
    "ksm_mm_head",
    "migrate_nodes",
    "root_stable_tree",
    "root_unstable_tree",
    "ksm_pages_shared",
    "ksm_pages_sharing",
    "ksm_pages_unshared",
    "ksm_rmap_items",
)
"""Without any one of these there is no kernel truth."""

_ITEM, _NODE = ("ksm_rmap_item", "rmap_item"), ("ksm_stable_node", "stable_node")

MEMBERS: Mapping[str, tuple[tuple[str, str, str], ...]] = {
    "list_head.next": (("list_head", "next", "next"),),
    "list_head.prev": (("list_head", "prev", "prev"),),
    "hlist_head.first": (("hlist_head", "first", "first"),),
    "hlist_node.next": (("hlist_node", "next", "next"),),
    "rb_root.rb_node": (("rb_root", "rb_node", "rb_node"),),
    "rb_node.rb_left": (("rb_node", "rb_left", "rb_left"),),
    "rb_node.rb_right": (("rb_node", "rb_right", "rb_right"),),
    **{
        f"stable_node.{member}": tuple((name, "rmap_hlist_len", member) for name in _NODE)
        for member in ("node", "head", "hlist_dup", "list", "hlist", "kpfn", "rmap_hlist_len")
    },
    "stable_node.nid": tuple((name, "rmap_hlist_len", "nid") for name in _NODE),
    **{
        f"rmap_item.{member}": tuple((name, "oldchecksum", member) for name in _ITEM)
        for member in ("rmap_list", "mm", "address", "oldchecksum", "node", "head", "hlist")
    },
    **{
        f"rmap_item.{member}": tuple((name, "oldchecksum", member) for name in _ITEM)
        for member in ("nid", "age", "remaining_skips", "linear_page_index")
    },
    # Two kinds of slot: with a generic struct mm_slot inside, or, as on 5.10, one of its own whose
    # name mm/khugepaged.c uses too. Only those of mm/ksm.c have a rmap_list.
    "mm_slot.mm_list": (
        ("ksm_mm_slot", "rmap_list", "slot.mm_node"),
        ("mm_slot", "rmap_list", "mm_list"),
    ),
    "mm_slot.mm": (("ksm_mm_slot", "rmap_list", "slot.mm"), ("mm_slot", "rmap_list", "mm")),
    "mm_slot.rmap_list": (
        ("ksm_mm_slot", "rmap_list", "rmap_list"),
        ("mm_slot", "rmap_list", "rmap_list"),
    ),
    "ksm_scan.mm_slot": (("ksm_scan", "mm_slot", "mm_slot"),),
    "ksm_scan.address": (("ksm_scan", "address", "address"),),
    "ksm_scan.rmap_list": (("ksm_scan", "rmap_list", "rmap_list"),),
    "ksm_scan.seqnr": (("ksm_scan", "seqnr", "seqnr"),),
    "mm_struct.mm_users": (("mm_struct", "mm_users", "mm_users"),),
    "mm_struct.owner": (("mm_struct", "mm_users", "owner"),),
    "mm_struct.ksm_merging_pages": (("mm_struct", "mm_users", "ksm_merging_pages"),),
    "mm_struct.ksm_rmap_items": (("mm_struct", "mm_users", "ksm_rmap_items"),),
    "task_struct.tgid": (("task_struct", "tgid", "tgid"),),
    "task_struct.comm": (("task_struct", "comm", "comm"),),
    "page.mapping": (("page", "mapping", "mapping"), ("folio", "mapping", "mapping")),
}
"""Members that the walk needs: per name the ways in which kernels have it, each a struct, a member
by which to tell it from another struct of that name, and the member's path in it."""

OPTIONAL_MEMBERS = frozenset(
    {
        "stable_node.nid",
        "rmap_item.nid",
        "rmap_item.age",
        "rmap_item.remaining_skips",
        "rmap_item.linear_page_index",
        "mm_struct.owner",
        "mm_struct.ksm_merging_pages",
        "mm_struct.ksm_rmap_items",
        "page.mapping",
    }
)
"""Members that some kernels have and others not."""

SYMBOLS = (*NEEDED_SYMBOLS, *(counter.symbol for counter in COUNTERS), "vmemmap_base")
"""What to look up in /proc/kallsyms; vmemmap_base is x86's address of the first struct page."""


@dataclass(frozen=True)
class Layout:
    """Where the members are.

    Attributes:
        offsets: in bytes, by the names of :data:`MEMBERS`; None for one that this kernel lacks.
        rmap_item_bytes: sizeof(struct rmap_item).
        stable_node_bytes: sizeof(struct stable_node).
        page_bytes: sizeof(struct page).
    """

    offsets: Mapping[str, int | None]
    rmap_item_bytes: int
    stable_node_bytes: int
    page_bytes: int

    def __getitem__(self, name: str) -> int:
        """Return the offset of a member that every kernel has."""
        offset = self.offsets[name]
        assert offset is not None
        return offset


def read_layout(btf: Btf) -> Layout:
    """Look up every member of :data:`MEMBERS`.

    Raises:
        KernelFeatureMissing: a member that is needed is not there.
        KernelInterfaceError: the BTF is malformed.
    """
    offsets = {name: _offset(btf, ways) for name, ways in MEMBERS.items()}
    absent = sorted(
        name for name, at in offsets.items() if at is None and name not in OPTIONAL_MEMBERS
    )
    sizes = [_size(btf, names) for names in (_ITEM, _NODE, ("page",))]
    if absent or None in sizes:
        what = ", ".join(absent) or "the size of a struct"
        raise KernelFeatureMissing(
            f"this kernel's BTF lacks {what}: its mm/ksm.c is not one that ksmtrace knows"
        )
    item_bytes, node_bytes, page_bytes = (size or 0 for size in sizes)
    return Layout(MappingProxyType(offsets), item_bytes, node_bytes, page_bytes)


def _offset(btf: Btf, ways: Iterable[tuple[str, str, str]]) -> int | None:
    for name, told_by, path in ways:
        if "." in path:
            offset = btf.offset(name, path)
            if offset is not None:
                return offset
            continue
        member = (btf.members(name, (told_by,)) or {}).get(path)
        if member is not None:
            return member.offset_bits // 8
    return None


def _size(btf: Btf, names: Iterable[str]) -> int | None:
    sizes = (btf.struct_size(name) for name in names)
    return next((size for size in sizes if size is not None), None)


def missing_symbols(symbols: Symbols) -> CannotRun | None:
    """Say why symbols do not suffice for a walk; None where they do."""
    absent = [name for name in NEEDED_SYMBOLS if symbols.address(name) is None]
    if not absent:
        return None
    if symbols.hidden:
        return PrivilegeMissing(
            "the kernel hides addresses in /proc/kallsyms",
            "run as root (CAP_SYSLOG), with kernel.kptr_restrict at most 1",
        )
    if not symbols.objects_listed:
        return KernelFeatureMissing(
            "/proc/kallsyms lists no data objects of mm/ksm.c",
            "boot a kernel with CONFIG_KALLSYMS_ALL=y",
        )
    return KernelFeatureMissing(
        f"/proc/kallsyms does not list {', '.join(absent)}", "boot a kernel with CONFIG_KSM=y"
    )
