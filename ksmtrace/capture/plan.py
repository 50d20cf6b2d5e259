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
    DERIVED,
    FENTRY,
    FUNCTION_BY_BODY,
    FUNCTIONS,
    HISTOGRAMS,
    HOOKS,
    KPROBE,
    SITE_ARGUMENTS,
    TRACEPOINT,
    Attachment,
    Function,
    Hook,
)
from ksmtrace.capture.sites import Location, Recipe, Site
from ksmtrace.events import KIND_BY_NAME, KINDS, Kind
from ksmtrace.kernel.facts import Facts
from ksmtrace.kernel.probes import LoadProbe

OFFSET_DEFINES = {
    "RMAP_ITEM_ADDRESS": "ksm_rmap_item.address",
    "RMAP_ITEM_MM": "ksm_rmap_item.mm",
    "RMAP_ITEM_OLDCHECKSUM": "ksm_rmap_item.oldchecksum",
    "RMAP_ITEM_HEAD": "ksm_rmap_item.head",
    "RMAP_ITEM_HLIST": "ksm_rmap_item.hlist",
    "STABLE_NODE_HLIST": "ksm_stable_node.hlist",
    "STABLE_NODE_KPFN": "ksm_stable_node.kpfn",
    "STABLE_NODE_HLIST_DUP": "ksm_stable_node.hlist_dup",
    "STABLE_NODE_HEAD": "ksm_stable_node.head",
    "STABLE_NODE_LENGTH": "ksm_stable_node.rmap_hlist_len",
    "STABLE_NODE_NID": "ksm_stable_node.nid",
    "KSM_SCAN_SEQNR": "ksm_scan.seqnr",
    "VMA_MM": "vm_area_struct.vm_mm",
    "PAGE_MAPPING": "page.mapping",
    "MM_WALK_MM": "mm_walk.mm",
    "MM_WALK_PRIVATE": "mm_walk.private",
    "NEXT_PAGE_PAGE": "ksm_next_page_arg.page",
    "NEXT_PAGE_ADDR": "ksm_next_page_arg.addr",
    "MM_OWNER": "mm_struct.owner",
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
    "MIGRATE_NODES_ADDRESS": "migrate_nodes",
    "KSM_SCAN_ADDRESS": "ksm_scan",
    "KSM_RMAP_ITEMS_ADDRESS": "ksm_rmap_items",
    "KSM_PAGES_SKIPPED_ADDRESS": "ksm_pages_skipped",
}
"""The C define for bpf/functions.c, and the variable whose address it is."""

PAGE_DEFINES = ("STRUCT_PAGE_BYTES", "VMEMMAP_BASE_ADDRESS")
"""What it takes to tell a page frame number by a struct page."""

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


@dataclass(frozen=True)
class Gap:
    """Something that KSM does and no tracepoint of it shows.

    Attributes:
        what: the event that goes unseen.
        why: why the tracepoints do not show it.
        still_known: what the samples of counters say about it nevertheless.
        functions: probes on these would show it; one of them, by the name it has here.
        shown_by: kinds of event that show it; where one of them is caught, there is no gap.
        counters: files of sysfs and lines of vmstat that ``still_known`` relies on.
    """

    what: str
    why: str
    still_known: str
    functions: tuple[str, ...]
    counters: tuple[str, ...] = ()
    shown_by: tuple[str, ...] = ()


GAPS = (
    Gap(
        "a single sharer leaving the stable tree (COW, unmap, unmerge, exit)",
        "mm/ksm.c:remove_rmap_item_from_tree has no tracepoint; ksm_remove_rmap_item fires only "
        "where the whole node goes",
        "pages_sharing falls, when ksmd next visits the page",
        ("remove_rmap_item_from_tree",),
        ("pages_sharing",),
        shown_by=("remove_rmap_item_from_tree",),
    ),
    Gap(
        "the last sharer of a stable node",
        "mm/ksm.c:remove_node_from_stable_tree fires ksm_remove_rmap_item for every sharer but "
        "the last",
        "ksm_remove_ksm_page fires for the node, and pages_shared falls",
        ("remove_node_from_stable_tree", "remove_rmap_item_from_tree"),
        ("pages_shared",),
        shown_by=("remove_rmap_item_from_tree",),
    ),
    Gap(
        "a page becoming a sharer (stable_tree_append)",
        "ksm_merge_with_ksm_page fires before it, and for the first page of a new pair even "
        "where break_cow then undoes the merge",
        "a pair's second event tells how the first ended; pages_shared and pages_sharing rise",
        ("stable_tree_append",),
        ("pages_shared", "pages_sharing"),
        shown_by=("stable_tree_append",),
    ),
    Gap(
        "inserts into and removals from the unstable tree",
        "mm/ksm.c:unstable_tree_search_insert has no tracepoint and is inlined",
        "pages_unshared is its size",
        ("remove_rmap_item_from_tree",),
        ("pages_unshared",),
    ),
    Gap(
        "pages not merged because their checksum changed",
        "mm/ksm.c:cmp_and_merge_page compares it inline",
        "pages_volatile, which also holds first visits, skipped pages and failed merges",
        ("cmp_and_merge_page",),
        ("pages_volatile",),
    ),
    Gap(
        "which pages smart scan skipped",
        "mm/ksm.c:should_skip_rmap_item is inlined",
        "pages_skipped is their exact number",
        ("should_skip_rmap_item", "ksm_next_page_pmd_entry"),
        ("pages_skipped",),
    ),
    Gap(
        "why a merge failed (page locked, pinned, changed, no longer there)",
        "ksm_merge_with_ksm_page says -EFAULT for all of them, and ksm_merge_one_page fires only "
        "for merges with the zero page",
        "that it failed, and for whom",
        ("write_protect_page",),
    ),
    Gap(
        "a write to a KSM page that copies it (COW break), and what the copy cost",
        "mm/memory.c:do_wp_page has no tracepoint",
        "cow_ksm counts them, unmerges by the kernel itself included",
        ("wp_page_copy", "do_wp_page"),
        ("cow_ksm",),
    ),
    Gap(
        "unmerging (run=2, MADV_UNMERGEABLE, prctl)",
        "mm/ksm.c:break_ksm has no tracepoint",
        "cow_ksm rises by one per page; pages_sharing falls later",
        ("break_ksm",),
        ("cow_ksm",),
        shown_by=("break_ksm",),
    ),
    Gap(
        "migration of a KSM page",
        "mm/ksm.c:folio_migrate_ksm has no tracepoint; migrate:mm_migrate_pages counts all pages "
        "alike",
        "pgmigrate_success, of all pages",
        ("folio_migrate_ksm", "ksm_migrate_page"),
        ("pgmigrate_success",),
        shown_by=("ksm_migrate_page",),
    ),
    Gap(
        "chains of stable nodes being made, pruned and collapsed",
        "mm/ksm.c:alloc_stable_node_chain and stable_node_dup have no tracepoint",
        "stable_node_chains and stable_node_dups",
        ("alloc_stable_node_chain", "stable_node_dup", "__stable_node_chain"),
        ("stable_node_chains", "stable_node_dups"),
        shown_by=("alloc_stable_node_chain",),
    ),
    Gap(
        "zero pages placed by KSM being unmapped",
        "include/linux/ksm.h:ksm_might_unmap_zero_page has no tracepoint",
        "ksm_zero_pages falls; forks make it too high",
        (),
        ("ksm_zero_pages",),
    ),
    Gap(
        "a KSM page copied at swap-in",
        "mm/ksm.c:ksm_might_need_to_copy has no tracepoint",
        "ksm_swpin_copy counts them",
        ("ksm_might_need_to_copy",),
        ("ksm_swpin_copy",),
    ),
    Gap(
        "ksmd dropping an mm that has no mergeable area left",
        "ksm_exit fires only in __ksm_exit",
        "/proc/PID/ksm_stat shows no rmap_items any more",
        ("scan_get_next_rmap_item",),
    ),
    Gap(
        "waits for ksm_thread_mutex, mmap_lock and page locks, and failed trylocks",
        "no ksm tracepoint concerns locks; folio locks have no tracepoint at all",
        "ksmd's run delay, which is waiting for a CPU and not for locks",
        ("__folio_lock", "__lock_page"),
    ),
)
"""What the tracepoints of group ksm leave out (include/trace/events/ksm.h and its callers)."""


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
        unseen=_unseen(facts, events, known),
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
    if facts.page_struct_bytes is not None:
        known["STRUCT_PAGE_BYTES"] = facts.page_struct_bytes
    if facts.ksmd_pid is not None:
        known["KSMD_PID"] = facts.ksmd_pid
    return known


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
        if HOOKS[kind.name] and None not in refusals:
            # No hook but needs one of the two: nothing else would explain more.
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
        if self._functions or self._sites:
            self.switches["NR_FUNCTIONS"] = len(FUNCTIONS)
            for number, function in enumerate(FUNCTIONS):
                self.switches[f"FUNCTION_{function.body}"] = number

    def _by_tracepoint(self, kind: Kind) -> EventPlan:
        if TRACEPOINT in self._without:
            raise _Obstacle("tracepoints are left out on request")
        obstacle = _obstacle(kind, self._facts)
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
        lacking = [define for define in hook.defines if define not in self._defines]
        if lacking:
            raise _Obstacle(_why_undefined(lacking, self._facts))
        uncaught = [name for name in hook.kinds if name not in self._caught]
        if uncaught:
            raise _Obstacle(f"it builds on {' and '.join(uncaught)}, which is absent")
        refusal = _refused(self._facts) if hook.tracepoints else None
        if refusal is not None:
            raise _Obstacle(f"raw tracepoint programs do not work here: {refusal.reason}")
        if "VISITS_DERIVED" in hook.switches and _cannot_tell_skips(self._facts, self._defines):
            raise _Obstacle(
                "pages that smart scan skips cannot be told from others: the address of "
                "ksm_pages_skipped is unknown"
            )
        reached = {body: self._reach(FUNCTION_BY_BODY[body]) for body in hook.functions}
        missing = dict(hook.lacks or {})
        sites = {}
        for body in hook.sites:
            site, locations = self._site(body)
            sites[body] = (site, locations)
            if self._every_page and "pfn" in kind.body and locations[0] is None:
                try:
                    for page_body in hook.page_functions:
                        reached[page_body] = self._reach(FUNCTION_BY_BODY[page_body])
                except _Obstacle as obstacle:
                    missing["pfn"] = str(obstacle)
        # Nothing was noted before this point, because any step may have failed.
        self._functions |= reached
        self._sites |= sites
        self._tracepoints |= dict.fromkeys(hook.tracepoints)
        self.switches |= dict.fromkeys((*hook.switches, f"EMIT_{kind.name.upper()}"), 1)
        targets = [f"kprobe:{site.symbol}+{site.offset:#x}" for site, _ in sites.values()]
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

    def _refusal(self, rung: str) -> str | None:
        if rung in self._without:
            return f"{rung} programs are left out on request"
        if rung == KPROBE and self._facts.kernel.machine != "x86_64":
            machine = self._facts.kernel.machine
            return f"kprobe programs know only x86_64's registers, not {machine}'s"
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
            if lacking:
                missing[field] = _why_undefined(lacking, self._facts)
        return missing


def _joined(reasons: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(reasons))


_COUNTED_WITH = {
    "visit_interval_ns": "cmp_and_merge_page",
    "search_nodes": "stable_tree_search",
}


def _counted(
    events: tuple[EventPlan, ...], switches: Mapping[str, int], defines: Mapping[str, int]
) -> tuple[str, ...]:
    caught = {event.event for event in events if event.rung != ABSENT}
    tells_skips = "VISITS_DERIVED" in switches and "KSM_PAGES_SKIPPED_ADDRESS" in defines
    return tuple(
        name
        for name in (*COUNTS, *HISTOGRAMS)
        if (_COUNTED_WITH.get(name) or name.partition(".")[0]) in caught
        or (name == "smart_scan_skips" and tells_skips)
    )


def _cannot_tell_skips(facts: Facts, defines: Mapping[str, int]) -> bool:
    has_smart_scan = (facts.ksm or {}).get("smart_scan") is not None
    return has_smart_scan and "KSM_PAGES_SKIPPED_ADDRESS" not in defines


def _target(function: Function, rung: str, name: str) -> str:
    how = {FENTRY: ("fentry", "fexit"), KPROBE: ("kprobe", "kretprobe")}[rung]
    enters = function.enters or bool(function.keeps) or (rung == KPROBE and function.leaves)
    parts = [part for part, used in zip(how, (enters, function.leaves), strict=True) if used]
    return f"{'/'.join(parts)}:{name}"


def _programs(function: Function, rung: str, name: str, arguments: int) -> Iterable[Attachment]:
    """Yield a function's programs: which macro of bpf/functions.c makes each."""
    body = function.body
    enter = f"enter_{body}(args)" if function.enters else "0"
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


def _c_expression(location: Location | None) -> str:
    if location is None:
        return "0"
    at = f"ctx->{location.register} + ({location.offset})"
    return f"read_u64({at})" if location.in_memory else at


def _obstacle(kind: Kind, facts: Facts) -> str | None:
    if facts.tracepoints is None:
        return f"unknown whether there is a tracepoint: {facts.unknown.get('tracepoints')}"
    tracepoint = facts.tracepoints.get(kind.name)
    if tracepoint is None:
        return "this kernel has no tracepoint of this name"
    if tracepoint.arguments != len(kind.fields):
        return (
            f"the tracepoint has {tracepoint.arguments} arguments here, and our program reads "
            f"{len(kind.fields)}: {', '.join(kind.fields)}"
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
    if "STRUCT_PAGE_BYTES" in lacking:
        reasons.append("the size of struct page is unknown")
    if "KSMD_PID" in lacking:
        reasons.append(f"ksmd's pid is unknown: {facts.unknown.get('ksmd_pid', 'no ksmd is seen')}")
    return "; ".join(reasons)


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
    caught = any(event.rung != ABSENT for event in events)
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


def _unseen(
    facts: Facts, events: tuple[EventPlan, ...], defines: Mapping[str, int]
) -> tuple[tuple[str, str, str], ...]:
    return (
        *_unseen_events(events),
        *_unseen_fields(facts, events, defines),
        *(
            (gap.what, _why_gap(gap, facts), _what_changes(gap, facts))
            for gap in GAPS
            if not _is_shown(gap, events)
        ),
        *_unseen_counters(facts),
    )


_CHANGE_FOR_TRACEPOINT = "a kernel that has this tracepoint in the form that ksmtrace knows"
_CHANGE_FOR_FUNCTION = (
    "a kernel with fentry or kprobes, BTF and CONFIG_KALLSYMS_ALL=y; for an inlined function also "
    "a recipe for this build (`ksmtrace sites resolve VMLINUX`)"
)


def _is_shown(gap: Gap, events: tuple[EventPlan, ...]) -> bool:
    return any(event.event in gap.shown_by for event in events if event.rung != ABSENT)


def _unseen_events(events: tuple[EventPlan, ...]) -> list[tuple[str, str, str]]:
    by_reason: dict[tuple[str, str], list[str]] = {}
    for event in events:
        if event.rung == ABSENT:
            changes = []
            if KIND_BY_NAME[event.event].has_tracepoint:
                changes.append(_CHANGE_FOR_TRACEPOINT)
            if HOOKS[event.event]:
                changes.append(_CHANGE_FOR_FUNCTION)
            by_reason.setdefault((event.reason, ", or ".join(changes)), []).append(event.event)
    return [
        (f"event{'s' * (len(names) > 1)} {', '.join(names)}", reason, change)
        for (reason, change), names in by_reason.items()
    ]


def _unseen_fields(
    facts: Facts, events: tuple[EventPlan, ...], defines: Mapping[str, int]
) -> list[tuple[str, str, str]]:
    by_field: dict[tuple[str, str], list[str]] = {}
    for event in events:
        for field, reason in event.missing_fields.items():
            by_field.setdefault((field, reason), []).append(event.event)
    found = [
        (
            f"{field} of {', '.join(names)}",
            reason,
            _change_for_field(field, names, events, defines),
        )
        for (field, reason), names in by_field.items()
    ]
    if "KSMD_PID" not in defines:
        reason = facts.unknown.get("ksmd_pid", "no ksmd is visible in /proc")
        found.append(
            (
                "whether an event happened in ksmd, and ksmd's CPU time",
                reason,
                "run in the initial pid namespace",
            )
        )
    return found


def _change_for_field(
    field: str, names: list[str], events: tuple[EventPlan, ...], defines: Mapping[str, int]
) -> str:
    derived = {event.event for event in events if event.rung == DERIVED}
    if any(
        field in (hook.lacks or {})
        for name in derived.intersection(names)
        for hook in HOOKS[name]
        if hook.rung == DERIVED
    ):
        return "a recipe for this build (`ksmtrace sites resolve VMLINUX`)"
    if field in ("pfn", "new_pfn") and "VMEMMAP_BASE_ADDRESS" not in defines:
        return "root (CAP_SYSLOG), on a kernel with CONFIG_KALLSYMS_ALL=y"
    return "a kernel with BTF (CONFIG_DEBUG_INFO_BTF=y) that has these members"


def _why_gap(gap: Gap, facts: Facts) -> str:
    known = {**(facts.ksm or {}), **(facts.vmstat or {})}
    absent = [name for name in gap.counters if known.get(name) is None]
    if absent:
        return f"{gap.why}; and this kernel has no {', '.join(absent)}"
    return f"{gap.why}; still known: {gap.still_known}"


def _what_changes(gap: Gap, facts: Facts) -> str:
    if not gap.functions:
        return "a tracepoint in the kernel"
    functions = facts.functions or {}
    visible = [name for name in gap.functions if functions.get(name)]
    target = " or ".join(visible or gap.functions)
    if not visible and facts.functions is not None:
        target += ", which this kernel's compiler inlined"
    return f"a probe on {target}: {_probes_here(facts)}"


def _probes_here(facts: Facts) -> str:
    if facts.loading is None:
        return "a kernel with fentry or kprobes; not tried here"
    outcomes = {kind: facts.loading.get(kind) for kind in ("fentry", "kprobe")}
    working = [kind for kind, probe in outcomes.items() if probe is not None and probe.works]
    if working:
        return f"{' and '.join(working)} work here; ksmtrace does not tell this yet"
    return "a kernel with kprobes or fentry; here neither works"


def _unseen_counters(facts: Facts) -> list[tuple[str, str, str]]:
    found = []
    change = "a kernel that has it"
    for directory, values in (("/sys/kernel/mm/ksm/", facts.ksm), ("/proc/vmstat ", facts.vmstat)):
        absent = [name for name, value in (values or {}).items() if value is None]
        if absent:
            found.append(
                (
                    directory + ", ".join(absent),
                    "this kernel does not have it: absent, not 0",
                    change,
                )
            )
    missing_keys = [key for key, present in (facts.ksm_stat or {}).items() if not present]
    if missing_keys:
        found.append(
            (
                "/proc/PID/ksm_stat " + ", ".join(missing_keys),
                "this kernel does not print it: absent, not 0",
                change,
            )
        )
    if facts.symbols is not None and not facts.symbols.objects_listed:
        found.append(
            (
                "the kernel's own variables at an event (ksm_rmap_items, ksm_scan.seqnr, ...)",
                "/proc/kallsyms lists no data objects; still known: rmap_entries in the events "
                "of a pass, and the files of sysfs once a sample",
                "a kernel with CONFIG_KALLSYMS_ALL=y",
            )
        )
    elif facts.symbols is not None and facts.symbols.hidden:
        found.append(
            (
                "addresses of the kernel's functions and variables",
                "/proc/kallsyms shows them as 0 to this user",
                "run as root (CAP_SYSLOG)",
            )
        )
    if facts.kpf_ksm is not None and facts.kpf_ksm.truthful is False:
        found.append(
            (
                "which page frames are KSM pages, from /proc/kpageflags",
                facts.kpf_ksm.reason,
                "a kernel in which stable_page_flags() compares the whole mapping flag",
            )
        )
    elif facts.kpf_ksm is None or facts.kpf_ksm.truthful is None:
        reason = facts.kpf_ksm.reason if facts.kpf_ksm else facts.unknown.get("kpf_ksm", "")
        found.append(
            (
                "whether /proc/kpageflags tells the truth about KSM pages",
                reason,
                "run as root, on a kernel with CONFIG_PROC_PAGE_MONITOR=y",
            )
        )
    return found
