"""Which hook carries which event, and why: pure rules over the facts, no I/O.

No rule tests a kernel version: distributions backport. Each tests presence.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ksmtrace.capture.hooks import (
    ABSENT,
    COUNTS,
    FENTRY,
    FUNCTION_BY_BODY,
    FUNCTIONS,
    HISTOGRAMS,
    HOOKS,
    KPROBE,
    LOCK_TALLIES,
    SITE_ARGUMENTS,
    TRACEPOINT,
    WAITED_BY,
    WATCHPOINT,
    Attachment,
    Function,
    Hook,
)
from ksmtrace.capture.sites import Location, Recipe, Site
from ksmtrace.capture.unseen import find_unseen
from ksmtrace.events import KIND_BY_NAME, KINDS, Kind, Lock
from ksmtrace.kernel.facts import Facts
from ksmtrace.kernel.kallsyms import MUTEX_FUNCTIONS
from ksmtrace.kernel.probes import LoadProbe

OFFSET_DEFINES = {
    "RMAP_ITEM_ADDRESS": "ksm_rmap_item.address",
    "RMAP_ITEM_MM": "ksm_rmap_item.mm",
    "RMAP_ITEM_OLDCHECKSUM": "ksm_rmap_item.oldchecksum",
    "RMAP_ITEM_AGE": "ksm_rmap_item.age",
    "RMAP_ITEM_REMAINING_SKIPS": "ksm_rmap_item.remaining_skips",
    "RMAP_ITEM_HEAD": "ksm_rmap_item.head",
    "RMAP_ITEM_HLIST": "ksm_rmap_item.hlist",
    "STABLE_NODE_HLIST": "ksm_stable_node.hlist",
    "STABLE_NODE_KPFN": "ksm_stable_node.kpfn",
    "STABLE_NODE_HLIST_DUP": "ksm_stable_node.hlist_dup",
    "STABLE_NODE_HEAD": "ksm_stable_node.head",
    "STABLE_NODE_LENGTH": "ksm_stable_node.rmap_hlist_len",
    "STABLE_NODE_NID": "ksm_stable_node.nid",
    "RMAP_ITEM_RMAP_LIST": "ksm_rmap_item.rmap_list",
    "KSM_SCAN_SEQNR": "ksm_scan.seqnr",
    "KSM_SCAN_MM_SLOT": "ksm_scan.mm_slot",
    "KSM_SCAN_RMAP_LIST": "ksm_scan.rmap_list",
    "MM_SLOT_MM": "ksm_mm_slot.slot.mm",
    "MM_SLOT_RMAP_LIST": "ksm_mm_slot.rmap_list",
    "VMA_MM": "vm_area_struct.vm_mm",
    "PAGE_MAPPING": "page.mapping",
    "PAGE_LRU": "page.lru",
    "FAULT_VMA": "vm_fault.vma",
    "FAULT_ADDRESS": "vm_fault.address",
    "FAULT_FLAGS": "vm_fault.flags",
    "FAULT_PTE": "vm_fault.orig_pte",
    "PAGE_FLAGS": "page.flags",
    "PAGE_REFCOUNT": "page._refcount",
    "PAGE_MAPCOUNT": "page._mapcount",
    "PAGE_COMPOUND_ORDER": "page.compound_order",
    "FOLIO_ORDER": "folio._folio_order",
    "FOLIO_FLAGS_1": "folio._flags_1",
    "FOLIO_LARGE_MAPCOUNT": "folio._large_mapcount",
    "MM_USERS": "mm_struct.mm_users",
    "MM_PGD": "mm_struct.pgd",
    "MM_WALK_MM": "mm_walk.mm",
    "MM_WALK_PRIVATE": "mm_walk.private",
    "NEXT_PAGE_PAGE": "ksm_next_page_arg.page",
    "NEXT_PAGE_ADDR": "ksm_next_page_arg.addr",
    "MM_OWNER": "mm_struct.owner",
    "MM_MMAP_LOCK": "mm_struct.mmap_lock",
    "MUTEX_OWNER": "mutex.owner",
    "RWSEM_OWNER": "rw_semaphore.owner",
    "TASK_FLAGS": "task_struct.flags",
    "TASK_TGID": "task_struct.tgid",
    "MM_KSM_MERGING_PAGES": "mm_struct.ksm_merging_pages",
    "MM_KSM_RMAP_ITEMS": "mm_struct.ksm_rmap_items",
    "MM_KSM_ZERO_PAGES": "mm_struct.ksm_zero_pages",
    "TASK_SUM_EXEC_RUNTIME": "task_struct.se.sum_exec_runtime",
    "TASK_RUN_DELAY": "task_struct.sched_info.run_delay",
}
"""The C define for bpf/*.c, and the member (:data:`ksmtrace.kernel.facts.OFFSETS`) it locates."""

SYMBOL_DEFINES = {
    "VMEMMAP_BASE_ADDRESS": "vmemmap_base",
    "PHYSICAL_MASK_ADDRESS": "physical_mask",
    "MIGRATE_NODES_ADDRESS": "migrate_nodes",
    "KSM_SCAN_ADDRESS": "ksm_scan",
    "KSM_RMAP_ITEMS_ADDRESS": "ksm_rmap_items",
    "KSM_MERGE_ACROSS_NODES_ADDRESS": "ksm_merge_across_nodes",
    "KSM_PAGES_SKIPPED_ADDRESS": "ksm_pages_skipped",
    "KSM_THREAD_MUTEX_ADDRESS": "ksm_thread_mutex",
}
"""The C define for bpf/*.c, and the variable whose address it is."""

WATCHED = {"ksm_scan.rmap_list": ("KSM_SCAN_ADDRESS", "KSM_SCAN_RMAP_LIST", "cmp_and_merge_page")}
"""Variables that are watched: the defines that make the address, and the function of mm/ksm.c that
the program stands for (:data:`ksmtrace.capture.hooks.FUNCTIONS`)."""

TEXT_DEFINES: Mapping[str, tuple[str, ...]] = {
    "KSM_TEXT": (
        *("ksm_scan_thread", "run_store", "ksm_memory_callback", "wait_while_offlining"),
        *("ksm_madvise", "__ksm_enter", "__ksm_exit", "rmap_walk_ksm", "break_ksm"),
        *("stable_tree_append", "ksm_might_need_to_copy", "folio_migrate_ksm", "ksm_migrate_page"),
    ),
    "MUTEX_TEXT": MUTEX_FUNCTIONS,
}
"""Two C defines each, NAME_BEGIN and NAME_END: the part of the kernel's text that these functions
span. A source file's text is one piece, and none of these that takes a mutex is the last in it.
Where there is no NAME_BEGIN, ksm_thread_mutex is known by its address, or not at all."""

_LAST_FUNCTION_BYTES = 0x80  # of mutex_lock, which does little more than call another

PAGE_DEFINES = ("STRUCT_PAGE_BYTES", "VMEMMAP_BASE_ADDRESS")
"""What it takes to tell a page frame number by a struct page."""

PTE_DEFINES: Mapping[str, Mapping[str, int]] = {
    "x86_64": {
        "PTE_PFN_MASK": 0x000F_FFFF_FFFF_F000,
        "PTE_PRESENT": 1 << 0,
        "PTE_DIRTY": 1 << 6 | 1 << 58,
    },
}
"""Per machine, where a page table entry of a page has its frame's address, the bit without which
that is inverted (PROT_NONE; arch/x86/include/asm/pgtable-invert.h), and the bits of which one at
least is set in a dirty one (arch/x86/include/asm/pgtable_types.h: PTE_PFN_MASK, _PAGE_PRESENT,
_PAGE_DIRTY_BITS; bit 58 is of no meaning to kernels without _PAGE_SAVED_DIRTY)."""

_OWNER = ("MM_OWNER", "TASK_TGID")
_MM_COUNTS = ("MM_KSM_MERGING_PAGES", "MM_KSM_RMAP_ITEMS")
_CPU = ("TASK_SUM_EXEC_RUNTIME", "TASK_RUN_DELAY")

# What the programs need for each field that they read in place. They read pairs together, under
# one flag, so that the lack of one costs both. What a hook cannot do without is not here.
_NEEDED_DEFINES: Mapping[str, tuple[str, ...]] = {
    "pid": _OWNER,
    "comm": (),
    "address": ("RMAP_ITEM_ADDRESS",),
    "flags_before": ("RMAP_ITEM_ADDRESS",),
    "checksum_changed": ("RMAP_ITEM_OLDCHECKSUM",),
    "ksm_merging_pages": _MM_COUNTS,
    "ksm_rmap_items": _MM_COUNTS,
    "ksm_zero_pages": ("MM_KSM_ZERO_PAGES",),
    "ksmd_cpu_ns": _CPU,
    "ksmd_run_delay_ns": _CPU,
    "holder_pid": ("TASK_TGID", "MUTEX_OWNER", "RWSEM_OWNER"),
    "lock": ("KSM_TEXT_BEGIN", "MUTEX_TEXT_BEGIN"),
}


@dataclass(frozen=True)
class EventPlan:
    """How one event is caught.

    Attributes:
        event: the kind's name (:data:`ksmtrace.events.KINDS`).
        rung: one of :data:`ksmtrace.capture.hooks.RUNGS`.
        target: what is attached to, such as ``raw_tracepoint:ksm_enter``; None where absent.
        reason: why this rung.
        missing_fields: fields that this event will lack, each with the reason.
    """

    event: str
    rung: str
    target: str | None
    reason: str
    missing_fields: Mapping[str, str]


@dataclass(frozen=True)
class Plan:
    """How everything is caught on one kernel.

    Attributes:
        events: one entry per kind, in the order of their numbers.
        attachments: the programs, and where each goes.
        defines: C defines for bpf/*.c; one that is not known here is left out.
        counted: which of :data:`ksmtrace.capture.hooks.COUNTS` and HISTOGRAMS are kept here.
        can_record: whether a recording can be made, as things stand.
        blockers: why not: (what is missing, what to do).
        unseen: (what cannot be seen here, why and what is still known, what would change that).
    """

    events: tuple[EventPlan, ...]
    attachments: tuple[Attachment, ...]
    defines: Mapping[str, int]
    counted: tuple[str, ...]
    can_record: bool
    blockers: tuple[tuple[str, str], ...]
    unseen: tuple[tuple[str, str, str], ...]

    def as_json(self) -> list[dict[str, Any]]:
        """Return the events' entries as plain JSON types."""
        return [
            {
                "event": event.event,
                "rung": event.rung,
                "target": event.target,
                "reason": event.reason,
                "missing_fields": dict(event.missing_fields),
            }
            for event in self.events
        ]


def make_plan(
    facts: Facts,
    recipe: Recipe | None = None,
    every_page: bool = False,
    without: Collection[str] = (),
) -> Plan:
    """Decide how each event is caught on the kernel that the facts describe.

    Args:
        facts: the kernel's facts.
        recipe: where that build of the kernel has inlined functions; None where nobody knows.
        every_page: whether what happens once per page is wanted as events, and not only counted.
        without: rungs not to take, as if this kernel did not offer them.
    """
    known = _defines(facts)
    ladder = _Ladder(facts, recipe, known, every_page, frozenset(without))
    events = tuple(ladder.plan_event(kind) for kind in KINDS)
    blockers = _blockers(facts, events)
    return Plan(
        events=events,
        attachments=tuple(ladder.attachments()),
        defines=known | ladder.switches,
        counted=_counted(events, ladder.switches, known),
        can_record=not blockers,
        blockers=blockers,
        unseen=find_unseen(facts, events, known),
    )


def _defines(facts: Facts) -> dict[str, int]:
    offsets = facts.offsets or {}
    known = {
        define: offset
        for define, member in OFFSET_DEFINES.items()
        if (offset := offsets.get(member)) is not None
    }
    if facts.symbols is not None:
        for define, symbol in SYMBOL_DEFINES.items():
            address = facts.symbols.address(symbol)
            if address is not None:
                known[define] = address
        for define, functions in TEXT_DEFINES.items():
            found = [a for name in functions if (a := facts.symbols.address(name)) is not None]
            if found:
                known[f"{define}_BEGIN"] = min(found)
                known[f"{define}_END"] = max(found) + _LAST_FUNCTION_BYTES
    if facts.page_struct_bytes is not None:
        known["STRUCT_PAGE_BYTES"] = facts.page_struct_bytes
    if facts.ksmd_pid is not None:
        known["KSMD_PID"] = facts.ksmd_pid
    if (head := (facts.page_flags or {}).get("head")) is not None:
        known["PG_HEAD"] = head
    return {**known, **PTE_DEFINES.get(facts.kernel.machine, {})}


class _Obstacle(Exception):
    """Why a rung cannot be taken."""


class _Ladder:
    """Takes the first rung that this kernel offers for each event, and gathers the programs."""

    def __init__(
        self,
        facts: Facts,
        recipe: Recipe | None,
        defines: Mapping[str, int],
        every_page: bool,
        without: frozenset[str],
    ) -> None:
        self._facts = facts
        self._recipe = recipe
        self._defines = defines
        self._every_page = every_page
        self._without = without
        self._functions: dict[str, tuple[str, str]] = {}
        self._sites: dict[str, tuple[Site, tuple[Location | None, ...]]] = {}
        self._tracepoints: dict[str, None] = {}
        self._watches: dict[str, None] = {}
        self._caught: set[str] = set()
        self.switches: dict[str, int] = {"EVERY_PAGE": 1} if every_page else {}

    def plan_event(self, kind: Kind) -> EventPlan:
        """Decide on one event, and note what it takes."""
        event = self._first_rung(kind)
        if event.rung != ABSENT:
            self._caught.add(kind.name)
        return event

    def _first_rung(self, kind: Kind) -> EventPlan:
        obstacles = []
        if kind.has_tracepoint:
            try:
                return self._by_tracepoint(kind)
            except _Obstacle as obstacle:
                obstacles.append(str(obstacle))
        refusals = [self._refusal(rung) for rung in (FENTRY, KPROBE)]
        hooks = HOOKS[kind.name]
        if any(hook.functions or hook.sites for hook in hooks) and None not in refusals:
            for hook in hooks:
                if not hook.functions and not hook.sites:
                    try:
                        return self._by_hook(kind, hook)
                    except _Obstacle as obstacle:
                        # What a hook builds on is absent for the reasons that follow.
                        if not hook.kinds or hook.every_page:
                            obstacles.append(str(obstacle))
            # Every other hook needs one of the two: nothing else would explain more.
            return EventPlan(
                kind.name, ABSENT, None, _joined([*obstacles, *filter(None, refusals)]), {}
            )
        for hook in HOOKS[kind.name]:
            try:
                return self._by_hook(kind, hook)
            except _Obstacle as obstacle:
                obstacles.append(str(obstacle))
        return EventPlan(kind.name, ABSENT, None, _joined(obstacles), {})

    def attachments(self) -> Iterable[Attachment]:
        """Yield the programs that the events planned so far take."""
        for name in self._tracepoints:
            yield Attachment("raw_tracepoint", name, 0, f"on_{name}")
        for body, (rung, name) in self._functions.items():
            function = FUNCTION_BY_BODY[body]
            self.switches[f"NARGS_{body}"] = self._arguments(name) or 0
            yield from _programs(function, rung, name, self._arguments(name) or 0)
        for body, (site, locations) in self._sites.items():
            first, second = (_c_expression(location) for location in locations)
            text = f"SITE({body}, {first}, {second})"
            yield Attachment("kprobe", site.symbol, site.offset, f"site_{body}", body, text)
        for variable in self._watches:
            base, offset, body = WATCHED[variable]
            address = self._defines[base] + self._defines[offset]
            name = f"on_{variable.replace('.', '_')}"
            yield Attachment(WATCHPOINT, variable, 0, name, body, address=address)
        if self._functions or self._sites or self._watches:
            self.switches["NR_FUNCTIONS"] = len(FUNCTIONS)
            for number, function in enumerate(FUNCTIONS):
                self.switches[f"FUNCTION_{function.body}"] = number

    def _by_tracepoint(self, kind: Kind) -> EventPlan:
        if TRACEPOINT in self._without:
            raise _Obstacle("tracepoints are left out on request")
        arguments = (len(kind.fields),)
        obstacle = _obstacle("of this name", kind.name, arguments, self._facts)
        if obstacle is not None:
            raise _Obstacle(obstacle)
        assert self._facts.tracepoints is not None
        tracepoint = self._facts.tracepoints[kind.name]
        plural = "s" if tracepoint.arguments != 1 else ""
        source = {"btf": "BTF"}.get(tracepoint.source, tracepoint.source)
        self._tracepoints[kind.name] = None
        return EventPlan(
            kind.name,
            TRACEPOINT,
            f"raw_tracepoint:{kind.name}",
            f"{source} describes it, with {tracepoint.arguments} argument{plural}",
            self._missing(kind.in_place),
        )

    def _by_hook(self, kind: Kind, hook: Hook) -> EventPlan:
        if hook.rung in self._without and hook.rung != FENTRY:
            raise _Obstacle(f"the rung {hook.rung!r} is left out on request")
        if hook.watches and (refusal := self._refusal(WATCHPOINT)) is not None:
            raise _Obstacle(refusal)
        if hook.every_page and not self._every_page:
            raise _Obstacle(hook.every_page)
        lacking = [define for define in hook.defines if define not in self._defines]
        if lacking:
            raise _Obstacle(_why_undefined(lacking, self._facts))
        uncaught = [name for name in hook.kinds if name not in self._caught]
        if uncaught:
            raise _Obstacle(f"it builds on {' and '.join(uncaught)}, which is absent")
        if not set(hook.builds_on) <= set(self.switches):
            raise _Obstacle("it builds on a watchpoint that is not taken")
        for name, arguments in hook.tracepoints.items():
            obstacle = _obstacle(name, name, arguments, self._facts)
            if obstacle is not None:
                raise _Obstacle(obstacle)
            if name in KIND_BY_NAME and name not in self._tracepoints:
                raise _Obstacle(f"it builds on the tracepoint {name}, which is not taken")
        if hook.tells_skips and self._has_smart_scan():
            telling = "RMAP_ITEM_REMAINING_SKIPS" if hook.watches else "KSM_PAGES_SKIPPED_ADDRESS"
            if telling not in self._defines:
                raise _Obstacle(
                    "pages that smart scan skips cannot be told from others: "
                    + _why_undefined([telling], self._facts)
                )
        reached = {body: self._reach(FUNCTION_BY_BODY[body]) for body in hook.functions}
        missing = dict(hook.lacks or {})
        optional = {}
        for body, fields in hook.optional.items():
            try:
                optional[body] = self._reach(FUNCTION_BY_BODY[body])
            except _Obstacle as obstacle:
                missing |= dict.fromkeys(fields, str(obstacle))
        reached |= optional
        sites = {}
        for body in hook.sites:
            site, locations = self._site(body)
            sites[body] = (site, locations)
        if hook.page_functions and self._every_page and not any(at[0] for _, at in sites.values()):
            try:
                for page_body in hook.page_functions:
                    reached[page_body] = self._reach(FUNCTION_BY_BODY[page_body])
            except _Obstacle as obstacle:
                missing["pfn"] = str(obstacle)
        # Nothing was noted before this point, because any step may have failed.
        self._functions |= reached
        self._sites |= sites
        self._tracepoints |= dict.fromkeys(hook.tracepoints)
        self._watches |= dict.fromkeys(filter(None, [hook.watches]))
        self.switches |= dict.fromkeys((*hook.switches, f"EMIT_{kind.name.upper()}"), 1)
        self.switches |= dict.fromkeys((f"WITH_{body.upper()}" for body in optional), 1)
        targets = [f"{WATCHPOINT}:{hook.watches}"] if hook.watches else []
        targets += [f"kprobe:{site.symbol}+{site.offset:#x}" for site, _ in sites.values()]
        targets += [_target(FUNCTION_BY_BODY[body], *found) for body, found in reached.items()]
        targets += [f"raw_tracepoint:{name}" for name in hook.tracepoints]
        rung = hook.rung
        if rung == FENTRY:
            rung = reached[hook.functions[0]][0]
        if hook.page_fields and any(define not in self._defines for define in PAGE_DEFINES):
            why = _why_undefined([d for d in PAGE_DEFINES if d not in self._defines], self._facts)
            missing |= dict.fromkeys(hook.page_fields, why)
        return EventPlan(
            kind.name,
            rung,
            ", ".join(targets),
            hook.how,
            self._missing(kind.in_place) | missing,
        )

    def _reach(self, function: Function) -> tuple[str, str]:
        """Return the rung on which a function can be reached, and its name here."""
        if self._facts.functions is None:
            raise _Obstacle(
                f"which functions of its own this kernel has is unknown: "
                f"{self._facts.unknown.get('functions')}"
            )
        here = [name for name in function.names if self._arguments(name) is not None]
        if not here:
            raise _Obstacle(f"{' or '.join(function.names)} is inlined here, or absent")
        name = here[0]
        lacking = [define for define in function.defines if define not in self._defines]
        if lacking:
            raise _Obstacle(_why_undefined(lacking, self._facts))
        if self._arguments(name) not in function.arguments:
            known = " or ".join(map(str, function.arguments))
            raise _Obstacle(
                f"{name} has {self._arguments(name)} arguments here, and our program knows {known}"
            )
        refusals = []
        for rung in (FENTRY, KPROBE):
            refusal = self._refusal(rung)
            if refusal is None:
                return rung, name
            refusals.append(refusal)
        raise _Obstacle("; ".join(refusals))

    def _has_smart_scan(self) -> bool:
        return (self._facts.ksm or {}).get("smart_scan") is not None

    def _refusal(self, rung: str) -> str | None:
        if rung in self._without:
            return f"{rung} programs are left out on request"
        if rung in (KPROBE, WATCHPOINT) and self._facts.kernel.machine != "x86_64":
            machine = self._facts.kernel.machine
            return f"{rung} programs know only x86_64's registers, not {machine}'s"
        loading = self._facts.loading or {}
        reading = loading.get("kernel_read")
        if reading is not None and reading.works is False:
            return f"programs that read kernel memory do not work here: {reading.reason}"
        probe = loading.get(rung)
        if probe is None or probe.works:
            return None
        if probe.works is None:
            return f"whether {rung} programs work here is unknown: {probe.reason}"
        return f"{rung} programs do not work here: {probe.reason}"

    def _arguments(self, name: str) -> int | None:
        return (self._facts.functions or {}).get(name)

    def _site(self, body: str) -> tuple[Site, tuple[Location | None, ...]]:
        if self._recipe is None:
            build = self._facts.kernel.build_id or "its build-id is unknown"
            raise _Obstacle(f"there is no recipe for this build ({build})")
        refusal = self._refusal(KPROBE)
        if refusal is not None:
            raise _Obstacle(refusal)
        sites = self._recipe.sites_of(body)
        if len(sites) != 1:
            raise _Obstacle(f"the recipe has {len(sites)} sites of {body}, and our program knows 1")
        first, second = (
            sites[0].location(*names) if names else None for names in SITE_ARGUMENTS[body]
        )
        if SITE_ARGUMENTS[body][1] and second is None:
            raise _Obstacle(f"the recipe does not know {body}'s {SITE_ARGUMENTS[body][1][0]}")
        return sites[0], (first, second)

    def _missing(self, fields: Iterable[str]) -> dict[str, str]:
        missing = {}
        for field in fields:
            lacking = [d for d in _NEEDED_DEFINES.get(field, ()) if d not in self._defines]
            if field == "lock" and "KSM_THREAD_MUTEX_ADDRESS" in self._defines:
                continue  # then it need not be recognised
            if lacking:
                missing[field] = _why_undefined(lacking, self._facts)
        return missing


def _joined(reasons: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(reasons))


_COUNTED_WITH = {
    "visit_interval_ns": "cmp_and_merge_page",
    "search_nodes": "stable_tree_search",
    "cow_ns": "do_wp_page",
    "break_ksm_ns": "break_ksm",
    "get_ksm_page_ns": "get_ksm_page",
}


def _counted(
    events: tuple[EventPlan, ...], switches: Mapping[str, int], defines: Mapping[str, int]
) -> tuple[str, ...]:
    caught = {event.event for event in events if event.rung != ABSENT}
    tells_skips = "should_skip_rmap_item" in caught or (
        "KSM_PAGES_SKIPPED_ADDRESS" in defines
        and ("VISITS_DERIVED" in switches or "page_outcomes" in caught)
    )
    return tuple(
        name
        for name in (*COUNTS, *HISTOGRAMS)
        if (_COUNTED_WITH.get(name) or name.partition(".")[0]) in caught
        or (name == "smart_scan_skips" and tells_skips)
    ) + _counted_of_locks(caught, switches)


def _counted_of_locks(caught: Collection[str], switches: Mapping[str, int]) -> tuple[str, ...]:
    held = {Lock.KSM_THREAD_MUTEX}
    if "HOLDS_OF_MMAP_LOCK" in switches:
        held.add(Lock.MMAP_LOCK)
    names = [
        f"wait_ns.{lock.name.lower()}"
        for lock in Lock
        if WAITED_BY.get(lock, "lock_wait") in caught
    ]
    names += [f"hold_ns.{lock.name.lower()}" for lock in held if "lock_hold" in caught]
    return (*names, *(f"{name}.{tally}" for name in names for tally in LOCK_TALLIES))


def _target(function: Function, rung: str, name: str) -> str:
    how = {FENTRY: ("fentry", "fexit"), KPROBE: ("kprobe", "kretprobe")}[rung]
    enters = function.enters or bool(function.keeps) or (rung == KPROBE and function.leaves)
    parts = [part for part, used in zip(how, (enters, function.leaves), strict=True) if used]
    return f"{'/'.join(parts)}:{name}"


def _programs(function: Function, rung: str, name: str, arguments: int) -> Iterable[Attachment]:
    """Yield a function's programs: which macro of bpf/functions.c makes each."""
    body = function.body
    enter = f"enter_{body}(args)" if function.enters else "0"
    if function.filtered:
        yield from _filtered_programs(function, rung, name, arguments)
        return
    if rung == FENTRY:
        keep = {"call": "keep_call", "noted": "keep_noted", "": ""}[function.keeps]
    else:
        # Only its own entry tells a kretprobe what the arguments were.
        keep = ("keep_noted" if function.keeps == "noted" else "keep_call") * function.leaves
    if keep:
        enter = f"{keep}(FUNCTION_{body}, args, {enter})"
    take = f"take_call(FUNCTION_{body}, &call)" if keep else "(void)0"
    if rung == FENTRY:
        if enter != "0":
            macro = "FENTRY_DIRECT" if function.direct else "FENTRY"
            text = f"{macro}({name}, {body}, {arguments}, {enter})"
            yield Attachment("fentry", name, 0, name, body, text)
        if function.leaves:
            text = f"FEXIT({name}, {body}, {arguments}, {take})"
            if function.direct:
                text = f"FEXIT_DIRECT({name}, {body}, {arguments})"
            yield Attachment("fexit", name, 0, name, body, text)
        return
    yield Attachment("kprobe", name, 0, f"kentry_{body}", body, f"KENTRY({body}, {enter})")
    if function.leaves:
        yield Attachment("kretprobe", name, 0, f"kexit_{body}", body, f"KEXIT({body})")


def _filtered_programs(
    function: Function, rung: str, name: str, arguments: int
) -> Iterable[Attachment]:
    """Yield the programs of a function most of whose calls are none of KSM's."""
    body = function.body
    keep = "keep_filtered" if function.leaves else "count_filtered"
    enter = f"{keep}(FUNCTION_{body}, args, enter_{body}(args))"
    how, leave_how = ("fentry", "fexit") if rung == FENTRY else ("kprobe", "kretprobe")
    direct = f"{name}, {body}, {arguments}"
    text = (
        f"FENTRY_FILTERED({direct}, {enter})"
        if rung == FENTRY
        else f"KENTRY_FILTERED({body}, {enter})"
    )
    program = name if rung == FENTRY else f"kentry_{body}"
    yield Attachment(how, name, 0, program, body, text)
    if function.leaves:
        text = f"FEXIT_FILTERED({direct})" if rung == FENTRY else f"KEXIT_FILTERED({body})"
        program = name if rung == FENTRY else f"kexit_{body}"
        yield Attachment(leave_how, name, 0, program, body, text)


def _c_expression(location: Location | None) -> str:
    if location is None:
        return "0"
    at = f"ctx->{location.register} + ({location.offset})"
    return f"read_u64({at})" if location.in_memory else at


def _obstacle(called: str, name: str, arguments: tuple[int, ...], facts: Facts) -> str | None:
    if facts.tracepoints is None:
        return f"unknown whether there is a tracepoint: {facts.unknown.get('tracepoints')}"
    tracepoint = facts.tracepoints.get(name)
    if tracepoint is None:
        return f"this kernel has no tracepoint {called}"
    if tracepoint.arguments not in arguments:
        return (
            f"the tracepoint {called} has {tracepoint.arguments} arguments here, and our program "
            f"reads {' or '.join(map(str, arguments))}"
        )
    refusal = _refused(facts)
    if refusal is not None:
        return f"raw tracepoint programs do not work here: {refusal.reason}"
    return None


# The kind of program that ours are, where it was tried and refused.
def _refused(facts: Facts) -> LoadProbe | None:
    for kind in ("raw_tracepoint", "kernel_read"):
        probe = (facts.loading or {}).get(kind)
        if probe is not None and probe.works is False:
            return probe
    return None


def _why_undefined(lacking: list[str], facts: Facts) -> str:
    members = [OFFSET_DEFINES[define] for define in lacking if define in OFFSET_DEFINES]
    symbols = [SYMBOL_DEFINES[define] for define in lacking if define in SYMBOL_DEFINES]
    reasons = []
    if members and facts.offsets is None:
        reasons.append(
            f"the offset of {' and '.join(members)} is unknown: {facts.unknown.get('offsets')}"
        )
    elif members:
        reasons.append(f"this kernel has no {' and '.join(members)}")
    if symbols:
        reasons.append(f"the address of {' and '.join(symbols)} is unknown")
    if "KSM_TEXT_BEGIN" in lacking or "MUTEX_TEXT_BEGIN" in lacking:
        reasons.append("the addresses of the kernel's functions are unknown")
    if any(lacked.startswith("PTE_") for lacked in lacking):
        machines = " and ".join(PTE_DEFINES)
        reasons.append(f"what a page table entry holds is unknown, but for {machines}")
    if "STRUCT_PAGE_BYTES" in lacking:
        reasons.append("the size of struct page is unknown")
    if "KSMD_PID" in lacking:
        reasons.append(f"ksmd's pid is unknown: {facts.unknown.get('ksmd_pid', 'no ksmd is seen')}")
    return "; ".join(reasons)


def _is_of_ksm(event: str) -> bool:
    return KIND_BY_NAME[event].has_tracepoint or HOOKS[event][0].rung != TRACEPOINT


def _blockers(facts: Facts, events: tuple[EventPlan, ...]) -> tuple[tuple[str, str], ...]:
    found = []
    if facts.ksm is None:
        found.append(
            (
                facts.unknown.get("ksm", "this kernel is built without KSM"),
                "boot a kernel with CONFIG_KSM=y",
            )
        )
    held = facts.privileges
    if held is None or not held.may_trace:
        found.append(
            (
                "this user may not load tracing programs",
                "run as root, or with CAP_BPF and CAP_PERFMON",
            )
        )
    refusal = _refused(facts)
    locked = held is not None and held.lockdown == "confidentiality"
    if locked:
        found.append(
            (
                "lockdown=confidentiality: no program may read kernel memory",
                "boot with lockdown=integrity or without lockdown",
            )
        )
    # That somebody waits for a lock is nothing to record by itself.
    caught = any(event.rung != ABSENT for event in events if _is_of_ksm(event.event))
    if refusal is not None and not locked and not caught:
        found.append(
            (
                f"raw tracepoint programs do not work here: {refusal.reason}",
                "boot a kernel with CONFIG_BPF_SYSCALL and CONFIG_BPF_EVENTS, or leave the "
                "container or policy that forbids bpf(2)",
            )
        )
    if refusal is None and not caught:
        found.append(
            (
                "no event can be caught: " + events[0].reason,
                "boot a kernel with CONFIG_KSM, CONFIG_DEBUG_INFO_BTF=y, and the ksm tracepoints "
                "(6.4 and later, CONFIG_TRACEPOINTS), fentry (CONFIG_FUNCTION_TRACER, "
                "CONFIG_DYNAMIC_FTRACE_WITH_DIRECT_CALLS) or kprobes (CONFIG_KPROBE_EVENTS)",
            )
        )
    if not facts.bcc_installed:
        found.append(("the Python module bcc is not installed", "apt install python3-bpfcc"))
    return tuple(found)
