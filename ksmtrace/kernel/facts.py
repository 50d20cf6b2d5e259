"""Everything known about one kernel, gathered once; what could not be known says why.

Facts only: which events can be captured with them is decided in capture.plan.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ksmtrace.errors import CannotRun, KernelInterfaceError
from ksmtrace.kernel import kallsyms, loading, numa, privileges, procfs, sysfs, tracefs, vmstat
from ksmtrace.kernel.btf import Btf
from ksmtrace.kernel.files import ROOT, parse_int, read_file, read_text
from ksmtrace.kernel.probes import KpfProbe, LoadProbe

OFFSETS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "ksm_rmap_item.address": (("ksm_rmap_item", "rmap_item"), "address"),
    "ksm_rmap_item.oldchecksum": (("ksm_rmap_item", "rmap_item"), "oldchecksum"),
    "ksm_rmap_item.age": (("ksm_rmap_item",), "age"),
    "ksm_rmap_item.remaining_skips": (("ksm_rmap_item",), "remaining_skips"),
    "ksm_rmap_item.mm": (("ksm_rmap_item", "rmap_item"), "mm"),
    "ksm_rmap_item.head": (("ksm_rmap_item", "rmap_item"), "head"),
    "ksm_rmap_item.hlist": (("ksm_rmap_item", "rmap_item"), "hlist"),
    "ksm_stable_node.hlist": (("ksm_stable_node", "stable_node"), "hlist"),
    "ksm_stable_node.hlist_dup": (("ksm_stable_node", "stable_node"), "hlist_dup"),
    "ksm_stable_node.kpfn": (("ksm_stable_node", "stable_node"), "kpfn"),
    "ksm_stable_node.rmap_hlist_len": (("ksm_stable_node", "stable_node"), "rmap_hlist_len"),
    "ksm_stable_node.nid": (("ksm_stable_node", "stable_node"), "nid"),
    "ksm_stable_node.head": (("ksm_stable_node", "stable_node"), "head"),
    "ksm_rmap_item.rmap_list": (("ksm_rmap_item",), "rmap_list"),
    "ksm_scan.seqnr": (("ksm_scan",), "seqnr"),
    "ksm_scan.mm_slot": (("ksm_scan",), "mm_slot"),
    "ksm_scan.rmap_list": (("ksm_scan",), "rmap_list"),
    "ksm_mm_slot.slot.mm": (("ksm_mm_slot",), "slot.mm"),
    "ksm_mm_slot.rmap_list": (("ksm_mm_slot",), "rmap_list"),
    "vm_area_struct.vm_mm": (("vm_area_struct",), "vm_mm"),
    # At the same place in both (include/linux/mm_types.h:FOLIO_MATCH); page is to lose it.
    "page.mapping": (("page", "folio"), "mapping"),
    # Its lowest bit says that the page is not the first of a compound one: it lies over
    # compound_head (include/linux/mm_types.h), which was renamed in 7.x.
    "page.lru": (("page", "folio"), "lru"),
    "vm_fault.vma": (("vm_fault",), "vma"),
    "vm_fault.address": (("vm_fault",), "address"),
    "vm_fault.flags": (("vm_fault",), "flags"),
    "vm_fault.orig_pte": (("vm_fault",), "orig_pte"),
    # Read by ksmtrace.kernel.process_events: pyroute2 knows the struct up to an older version.
    "taskstats.wpcopy_count": (("taskstats",), "wpcopy_count"),
    "taskstats.wpcopy_delay_total": (("taskstats",), "wpcopy_delay_total"),
    "page.flags": (("page",), "flags"),
    "page._refcount": (("page",), "_refcount"),
    "page._mapcount": (("page",), "_mapcount"),
    "page.compound_order": (("page",), "compound_order"),
    "folio._folio_order": (("folio",), "_folio_order"),
    "folio._flags_1": (("folio",), "_flags_1"),
    "folio._large_mapcount": (("folio",), "_large_mapcount"),
    "mm_struct.mm_users": (("mm_struct",), "mm_users"),
    "mm_struct.pgd": (("mm_struct",), "pgd"),
    "mm_walk.mm": (("mm_walk",), "mm"),
    "mm_walk.private": (("mm_walk",), "private"),
    "ksm_next_page_arg.page": (("ksm_next_page_arg",), "page"),
    "ksm_next_page_arg.addr": (("ksm_next_page_arg",), "addr"),
    "mm_struct.owner": (("mm_struct",), "owner"),
    "mm_struct.ksm_merging_pages": (("mm_struct",), "ksm_merging_pages"),
    "mm_struct.ksm_rmap_items": (("mm_struct",), "ksm_rmap_items"),
    "mm_struct.ksm_zero_pages": (("mm_struct",), "ksm_zero_pages"),
    "mm_struct.mmap_lock": (("mm_struct",), "mmap_lock"),
    "mutex.owner": (("mutex",), "owner"),
    "rw_semaphore.owner": (("rw_semaphore",), "owner"),
    "task_struct.flags": (("task_struct",), "flags"),
    "task_struct.tgid": (("task_struct",), "tgid"),
    "task_struct.se.sum_exec_runtime": (("task_struct",), "se.sum_exec_runtime"),
    "task_struct.sched_info.run_delay": (("task_struct",), "sched_info.run_delay"),
}
"""Members that ksmtrace's programs read: the struct's names over time, and the member's path."""

FUNCTIONS = (
    "cmp_and_merge_page",
    "try_to_merge_one_page",
    "try_to_merge_with_ksm_page",
    "break_ksm",
    "break_cow",
    "stable_tree_search",
    "stable_tree_append",
    "stable_node_dup",
    "__stable_node_chain",
    "alloc_stable_node_chain",
    "remove_rmap_item_from_tree",
    "remove_node_from_stable_tree",
    "ksm_get_folio",
    "get_ksm_page",
    "ksm_next_page_pmd_entry",
    "scan_get_next_rmap_item",
    "should_skip_rmap_item",
    "folio_migrate_ksm",
    "ksm_migrate_page",
    "ksm_might_need_to_copy",
    "unmerge_ksm_pages",
    "ksm_madvise",
    "run_store",
    "do_wp_page",
    "wp_page_copy",
    "__folio_lock",
    "__lock_page",
    "wait_while_offlining",
    "lru_add_drain_all",
    "__ksm_enter",
    "__ksm_exit",
    "calc_checksum",
    "follow_page",
    "unstable_tree_search_insert",
    "break_ksm_pmd_entry",
    "ksm_scan_thread",
    "memcmp_pages",
    "write_protect_page",
    "remove_stable_node",
    "stable_tree_insert",
    "rmap_walk_ksm",
    "ksm_memory_callback",
    "__mutex_lock_slowpath",
    "rwsem_down_read_slowpath",
    "rwsem_down_write_slowpath",
    "__split_huge_page_to_list_to_order",
    "split_huge_page_to_list_to_order",
    "split_huge_page_to_list",
    "try_to_migrate",
    "try_to_unmap",
    "mm_find_pmd",
)
"""Functions, most of mm/ksm.c, whose visibility matters; an inlined one has no BTF."""

PAGE_FLAGS = ("locked", "head", "swapcache", "lru")
"""Bits of page.flags that ksmtrace asks about (include/linux/page-flags.h: enum pageflags)."""

MEMORY_ACTIONS = {
    "MEM_ONLINE": 1, "MEM_GOING_OFFLINE": 2, "MEM_OFFLINE": 4, "MEM_GOING_ONLINE": 8,
    "MEM_CANCEL_ONLINE": 16, "MEM_CANCEL_OFFLINE": 32,
}  # fmt: skip
"""The macros of include/linux/memory.h, which no BTF has."""

NEIGHBOUR_TRACEPOINTS = (
    *("contention_begin", "contention_end", "mm_migrate_pages", "sched_switch"),
    *("mmap_lock_acquire_returned", "mmap_lock_released"),
)
"""Tracepoints of other groups that touch on KSM's work."""

_NOTE = struct.Struct("=III")
_NT_GNU_BUILD_ID = 3
_AT_PAGESZ = 6

T = TypeVar("T")


@dataclass(frozen=True)
class KernelIdentity:
    """Which kernel this is.

    Attributes:
        release: as ``uname -r``.
        version: as ``uname -v``.
        machine: as ``uname -m``.
        build_id: GNU build-id of vmlinux in hex, None where /sys/kernel/notes has none.
    """

    release: str
    version: str
    machine: str
    build_id: str | None


@dataclass(frozen=True)
class Tracepoint:
    """A tracepoint that this kernel has.

    Attributes:
        arguments: number of its TP_PROTO arguments.
        source: ``btf`` or ``tracefs``: which interface says so.
    """

    arguments: int
    source: str


@dataclass(frozen=True)
class Facts:
    """What is known about one kernel.

    A mapping's None value means that this kernel does not have it; None instead of the mapping
    that it could not be found out, and :attr:`unknown` says why under the field's name.

    Attributes:
        kernel: which kernel.
        page_size_bytes: size of a page.
        online_cpus: CPU numbers, None where unknown.
        numa_nodes: node numbers, None where the kernel has no NUMA.
        node_pages: per node, the ranges of its page frame numbers
            (:func:`ksmtrace.kernel.numa.read_node_pages`).
        ksm: files of /sys/kernel/mm/ksm (:func:`ksmtrace.kernel.sysfs.read_ksm`); None where
            the kernel has no KSM, or they were unreadable.
        ksm_others: files there that ksmtrace does not know.
        vmstat: lines of /proc/vmstat (:func:`ksmtrace.kernel.vmstat.read_vmstat`).
        ksm_stat: per key of /proc/PID/ksm_stat, whether this kernel prints it.
        btf: whether the kernel has readable BTF.
        offsets: bytes, per key of :data:`OFFSETS`.
        rmap_item_bytes: sizeof(struct ksm_rmap_item), None where unknown.
        page_struct_bytes: sizeof(struct page), None where unknown.
        page_flags: per name of :data:`PAGE_FLAGS` the bit's number in page.flags.
        memory_actions: what memory hotplug tells notifiers, by name: enum memory_block_state,
            before which (7.0) the names were macros, those of :data:`MEMORY_ACTIONS`.
        functions: per name of :data:`FUNCTIONS`, the number of arguments of a function of its own
            (BTF FUNC): 0 for ``(void)``, None where it is inlined or absent.
        tracepoints: every ``ksm_*`` tracepoint that this kernel has, and those of
            :data:`NEIGHBOUR_TRACEPOINTS` that it has, by name.
        tracefs_mounted: None where that is closed to this user.
        symbols: of :data:`FUNCTIONS`, :data:`ksmtrace.kernel.kallsyms.KSM_OBJECTS` and
            :data:`ksmtrace.kernel.kallsyms.MEMORY_OBJECTS`.
        privileges: what this process may do.
        loading: per kind of program, whether it works here (:mod:`ksmtrace.kernel.loading`);
            None where it was not tried.
        kpf_ksm: whether KPF_KSM tells the truth; None where it was not tried.
        headers: trees of kernel headers, those of the running kernel first.
        bcc_installed: whether Python finds the module bcc.
        ksmd_pid: None where there is no ksmd to be seen.
        task_delayacct: kernel.task_delayacct: 1 where the kernel accounts the delays of tasks that
            begin while it is so; None where there is no such setting (before 5.14).
        unknown: reason by field's name.
    """

    kernel: KernelIdentity
    page_size_bytes: int
    online_cpus: tuple[int, ...] | None
    numa_nodes: tuple[int, ...] | None
    node_pages: Mapping[int, tuple[tuple[int, int], ...]] | None
    ksm: Mapping[str, int | str | None] | None
    ksm_others: tuple[str, ...]
    vmstat: Mapping[str, int | None] | None
    ksm_stat: Mapping[str, bool] | None
    btf: bool
    offsets: Mapping[str, int | None] | None
    rmap_item_bytes: int | None
    page_struct_bytes: int | None
    page_flags: Mapping[str, int | None] | None
    memory_actions: Mapping[str, int]
    functions: Mapping[str, int | None] | None
    tracepoints: Mapping[str, Tracepoint] | None
    tracefs_mounted: bool | None
    symbols: kallsyms.Symbols | None
    privileges: privileges.Privileges | None
    loading: Mapping[str, LoadProbe] | None
    kpf_ksm: KpfProbe | None
    headers: tuple[str, ...]
    bcc_installed: bool
    ksmd_pid: int | None
    task_delayacct: int | None
    unknown: Mapping[str, str]

    @property
    def copy_delay_offsets(self) -> tuple[int, int] | None:
        """Where struct taskstats has a process's copies on write and their delay; None: nowhere."""
        offsets = self.offsets or {}
        count, delay = (
            offsets.get(f"taskstats.{member}") for member in ("wpcopy_count", "wpcopy_delay_total")
        )
        return None if count is None or delay is None else (count, delay)

    def as_json(self) -> dict[str, Any]:
        """Return the facts as plain JSON types; keys are the attributes' names.

        JSON's keys are strings: the nodes of :attr:`node_pages` are ``"0"``, ``"1"``, ...
        """
        plain: dict[str, Any] = _plain(self)
        return plain


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


class _Gathering:
    def __init__(self) -> None:
        self.unknown: dict[str, str] = {}

    def attempt(self, field: str, read: Callable[[], T]) -> T | None:
        try:
            return read()
        except CannotRun as error:
            self.unknown[field] = str(error)
            return None


def read_facts(root: Path = ROOT, probe: bool = True) -> Facts:
    """Gather everything known about a kernel.

    Never fails for lack of privilege or of a feature: what could not be read is None, with the
    reason in :attr:`Facts.unknown`.

    Args:
        root: the running kernel's tree, or a copy of one.
        probe: whether to try out loading programs and KPF_KSM; done only on the running kernel
            and only where this user may.

    Raises:
        KernelInterfaceError: there is no /proc/sys/kernel/osrelease to say which kernel it is.
    """
    gathering = _Gathering()
    attempt = gathering.attempt
    kernel = _read_kernel(root, gathering)
    held = attempt("privileges", lambda: privileges.read_privileges(root))
    btf = attempt("btf", lambda: Btf.read(root))
    formats = attempt("tracefs_mounted", lambda: tracefs.read_formats("ksm", root))
    ksm_stat = attempt("ksm_stat", lambda: _read_ksm_stat_keys(root))
    tracepoints = attempt("tracepoints", lambda: _read_tracepoints(btf, formats, gathering))
    probing = probe and root == ROOT
    if not probing:
        skipped: str | None = "not tried"
    elif held is None or not held.may_trace:
        skipped = "not tried: it takes CAP_BPF and CAP_PERFMON, or root"
    else:
        skipped = None
    if skipped is not None:
        gathering.unknown["loading"] = gathering.unknown["kpf_ksm"] = skipped
    without_btf = gathering.unknown.get("btf")
    for field in ("offsets", "functions", "rmap_item_bytes", "page_struct_bytes", "page_flags"):
        if without_btf is not None:
            gathering.unknown[field] = without_btf
    page_size_bytes = _read_page_size(root)
    symbols = attempt("symbols", lambda: _read_symbols(root))
    return Facts(
        kernel=kernel,
        page_size_bytes=page_size_bytes,
        online_cpus=attempt(
            "online_cpus", lambda: _read_list(f"{root}/sys/devices/system/cpu/online")
        ),
        numa_nodes=attempt(
            "numa_nodes", lambda: _read_list(f"{root}/sys/devices/system/node/online")
        ),
        node_pages=attempt("node_pages", lambda: numa.read_node_pages(page_size_bytes, root)),
        ksm=attempt("ksm", lambda: sysfs.read_ksm(root)),
        ksm_others=sysfs.undocumented(root),
        vmstat=attempt("vmstat", lambda: vmstat.read_vmstat(root)),
        ksm_stat=ksm_stat,
        btf=btf is not None,
        offsets=None if btf is None else attempt("offsets", lambda: _read_offsets(btf)),
        rmap_item_bytes=None if btf is None else _read_rmap_item_bytes(btf, gathering),
        page_struct_bytes=None
        if btf is None
        else attempt("page_struct_bytes", lambda: _read_page_struct_bytes(btf)),
        page_flags=None if btf is None else attempt("page_flags", lambda: _read_page_flags(btf)),
        memory_actions=(btf and btf.enumerators("memory_block_state")) or MEMORY_ACTIONS,
        functions=None
        if btf is None
        else attempt("functions", lambda: {n: btf.function_arguments(n) for n in FUNCTIONS}),
        tracepoints=tracepoints,
        tracefs_mounted=None if "tracefs_mounted" in gathering.unknown else formats is not None,
        symbols=symbols,
        privileges=held,
        loading=None
        if skipped is not None
        else attempt("loading", lambda: _probe_loading(btf, kernel.machine, tracepoints, symbols)),
        kpf_ksm=None if skipped is not None else _probe_kpf_ksm(),
        headers=_find_headers(root, kernel.release),
        bcc_installed=importlib.util.find_spec("bcc") is not None,
        ksmd_pid=attempt("ksmd_pid", lambda: procfs.find_ksmd(root)),
        task_delayacct=attempt("task_delayacct", lambda: _read_task_delayacct(root)),
        unknown=gathering.unknown,
    )


def add_variables(facts: Facts) -> Facts:
    """Add the addresses of mm/ksm.c's variables where kallsyms lists none; takes about a second.

    Returns:
        The same facts where the kernel lists them, or they cannot be found; then
        :attr:`Facts.unknown` says why, under ``variables``.
    """
    # Here and not above: it takes a decoder of instructions, which nothing else here does.
    from ksmtrace.kernel.ksm_memory import KsmMemoryReader

    if facts.symbols is None or facts.symbols.objects_listed or facts.symbols.hidden:
        return facts
    try:
        with KsmMemoryReader.open() as reader:
            found = {name: (address,) for name, address in reader.addresses.items()}
    except CannotRun as error:
        return dataclasses.replace(facts, unknown={**facts.unknown, "variables": str(error)})
    addresses = {**found, **{n: at for n, at in facts.symbols.addresses.items() if at}}
    return dataclasses.replace(
        facts, symbols=dataclasses.replace(facts.symbols, addresses=addresses)
    )


def _read_symbols(root: Path) -> kallsyms.Symbols:
    functions = (*FUNCTIONS, *kallsyms.MUTEX_FUNCTIONS)
    return kallsyms.read_symbols(
        (*functions, *kallsyms.KSM_OBJECTS, *kallsyms.MEMORY_OBJECTS), root
    )


def _read_kernel(root: Path, gathering: _Gathering) -> KernelIdentity:
    settings = f"{root}/proc/sys/kernel"
    release = read_text(f"{settings}/osrelease")
    if release is None:
        raise KernelInterfaceError(f"there is no {settings}/osrelease", "mount proc on /proc")
    return KernelIdentity(
        release=release,
        version=read_text(f"{settings}/version") or "",
        machine=_read_machine(root),
        build_id=gathering.attempt("kernel.build_id", lambda: _read_build_id(root)),
    )


def _read_machine(root: Path) -> str:
    # /proc/sys/kernel/arch is there from 6.1 on; before it, only the system call tells.
    machine = read_text(f"{root}/proc/sys/kernel/arch")
    if machine is None:
        import platform

        machine = platform.machine()
    return machine


def _read_build_id(root: Path) -> str | None:
    path = f"{root}/sys/kernel/notes"
    notes = read_file(path) or b""
    at = 0
    while at + _NOTE.size <= len(notes):
        name_bytes, value_bytes, kind = _NOTE.unpack_from(notes, at)
        name_at = at + _NOTE.size
        value_at = name_at + (name_bytes + 3 & ~3)
        at = value_at + (value_bytes + 3 & ~3)
        if at > len(notes):
            raise KernelInterfaceError(f"{path} ends within a note")
        if kind == _NT_GNU_BUILD_ID and notes[name_at : name_at + name_bytes] == b"GNU\0":
            return notes[value_at : value_at + value_bytes].hex()
    return None


def _read_page_size(root: Path) -> int:
    # The kernel tells every process in its auxiliary vector: pairs of unsigned long.
    vector = read_file(f"{root}/proc/self/auxv") or b""
    for key, value in struct.iter_unpack("@LL", vector[: len(vector) // 16 * 16]):
        if key == _AT_PAGESZ:
            return int(value)
    import mmap

    return mmap.PAGESIZE


def _read_task_delayacct(root: Path) -> int | None:
    path = f"{root}/proc/sys/kernel/task_delayacct"
    content = read_file(path)
    return None if content is None else parse_int(content, path)


def _read_list(path: str) -> tuple[int, ...] | None:
    text = read_text(path)
    if text is None:
        return None
    numbers: list[int] = []
    try:
        for part in filter(None, text.split(",")):
            first, _, last = part.partition("-")
            numbers.extend(range(int(first), int(last or first) + 1))
    except ValueError:
        raise KernelInterfaceError(f"{path} holds {text[:60]!r}, not a list") from None
    return tuple(numbers)


def _read_ksm_stat_keys(root: Path) -> dict[str, bool]:
    values = procfs.read_ksm_stat("self", root)
    if values is None:
        raise KernelInterfaceError(f"{root}/proc/self/ksm_stat is empty")
    return {key: value is not None for key, value in values.items()}


def _read_offsets(btf: Btf) -> dict[str, int | None]:
    return {key: btf.offset(names, path) for key, (names, path) in OFFSETS.items()}


def _read_rmap_item_bytes(btf: Btf, gathering: _Gathering) -> int | None:
    return gathering.attempt(
        "rmap_item_bytes",
        lambda: btf.struct_size("ksm_rmap_item") or btf.struct_size("rmap_item"),
    )


def _read_page_struct_bytes(btf: Btf) -> int:
    size = btf.struct_size("page")
    if size is None:
        raise KernelInterfaceError("BTF has no struct page")
    return size


def _read_page_flags(btf: Btf) -> dict[str, int | None]:
    numbers = btf.enumerators("pageflags")
    if numbers is None:
        raise KernelInterfaceError("BTF has no enum pageflags")
    return {name: numbers.get(f"PG_{name}") for name in PAGE_FLAGS}


def _read_tracepoints(
    btf: Btf | None,
    formats: Mapping[str, tracefs.EventFormat] | None,
    gathering: _Gathering,
) -> dict[str, Tracepoint]:
    if btf is None and formats is None:
        reason = gathering.unknown.get("tracefs_mounted", "tracefs is not mounted")
        raise KernelInterfaceError(f"{gathering.unknown['btf']}, and {reason}")
    # TP_STRUCT__entry of every ksm event has one field per argument.
    found = {
        name: Tracepoint(len(format_.fields), "tracefs")
        for name, format_ in (formats or {}).items()
    }
    if btf is not None:
        for name in (*btf.tracepoints("ksm_"), *NEIGHBOUR_TRACEPOINTS):
            arguments = btf.tracepoint_arguments(name)
            if arguments is not None:
                found[name] = Tracepoint(arguments, "btf")
    return found


def _probe_loading(
    btf: Btf | None,
    machine: str,
    tracepoints: Mapping[str, Tracepoint] | None,
    symbols: kallsyms.Symbols | None,
) -> dict[str, LoadProbe]:
    # Where there is no ksm tracepoint, any other says whether such programs work.
    name = next(iter(tracepoints or ()), "sched_process_exit")
    # Nobody writes to the function, so that either address will do.
    watched = (symbols.address(n) for n in ("ksm_scan", "ksm_scan_thread")) if symbols else ()
    return loading.probe_loading(btf, machine, name, next(filter(None, watched), None))


def _probe_kpf_ksm() -> KpfProbe:
    # Here and not above: pages needs numpy, and nothing else here does.
    from ksmtrace.kernel.pages import probe_kpf_ksm

    return probe_kpf_ksm()


def _find_headers(root: Path, release: str) -> tuple[str, ...]:
    running = root / "lib/modules" / release / "build"
    found = [str(running)] if running.is_dir() else []
    archive = root / "sys/kernel/kheaders.tar.xz"
    if archive.exists():
        found.append(str(archive))
    try:
        others = sorted(str(path) for path in (root / "usr/src").glob("linux-headers-*"))
    except OSError:
        others = []
    return (*found, *others)
