"""Which hook carries which event, and why: pure rules over the facts, no I/O.

No rule tests a kernel version: distributions backport. Each tests presence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ksmtrace.events import KINDS, Kind
from ksmtrace.kernel.facts import Facts
from ksmtrace.kernel.probes import LoadProbe

TRACEPOINT = "tracepoint"
ABSENT = "absent"

OFFSET_DEFINES = {
    "RMAP_ITEM_ADDRESS": "ksm_rmap_item.address",
    "MM_OWNER": "mm_struct.owner",
    "TASK_TGID": "task_struct.tgid",
    "MM_KSM_MERGING_PAGES": "mm_struct.ksm_merging_pages",
    "MM_KSM_RMAP_ITEMS": "mm_struct.ksm_rmap_items",
    "MM_KSM_ZERO_PAGES": "mm_struct.ksm_zero_pages",
    "TASK_SUM_EXEC_RUNTIME": "task_struct.se.sum_exec_runtime",
    "TASK_RUN_DELAY": "task_struct.sched_info.run_delay",
}
"""The C define for bpf/ksm.c, and the member (:data:`ksmtrace.kernel.facts.OFFSETS`) it locates."""

_OWNER = ("MM_OWNER", "TASK_TGID")
_MM_COUNTS = ("MM_KSM_MERGING_PAGES", "MM_KSM_RMAP_ITEMS")
_CPU = ("TASK_SUM_EXEC_RUNTIME", "TASK_RUN_DELAY")

# What bpf/ksm.c needs for each field that it reads in place. It reads pairs together, under one
# flag, so that the lack of one costs both.
_NEEDED_DEFINES: Mapping[str, tuple[str, ...]] = {
    "pid": _OWNER,
    "comm": (),
    "address": ("RMAP_ITEM_ADDRESS",),
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
        rung: ``tracepoint`` or ``absent``.
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
        defines: C defines for bpf/ksm.c; one that is not known here is left out.
        can_record: whether a recording can be made, as things stand.
        blockers: why not: (what is missing, what to do).
        unseen: (what cannot be seen here, why and what is still known, what would change that).
    """

    events: tuple[EventPlan, ...]
    defines: Mapping[str, int]
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
        counters: files of sysfs and lines of vmstat that ``still_known`` relies on.
    """

    what: str
    why: str
    still_known: str
    functions: tuple[str, ...]
    counters: tuple[str, ...] = ()


GAPS = (
    Gap(
        "a single sharer leaving the stable tree (COW, unmap, unmerge, exit)",
        "mm/ksm.c:remove_rmap_item_from_tree has no tracepoint; ksm_remove_rmap_item fires only "
        "where the whole node goes",
        "pages_sharing falls, when ksmd next visits the page",
        ("remove_rmap_item_from_tree",),
        ("pages_sharing",),
    ),
    Gap(
        "the last sharer of a stable node",
        "mm/ksm.c:remove_node_from_stable_tree fires ksm_remove_rmap_item for every sharer but "
        "the last",
        "ksm_remove_ksm_page fires for the node, and pages_shared falls",
        ("remove_node_from_stable_tree", "remove_rmap_item_from_tree"),
        ("pages_shared",),
    ),
    Gap(
        "a page becoming a sharer (stable_tree_append)",
        "ksm_merge_with_ksm_page fires before it, and for the first page of a new pair even "
        "where break_cow then undoes the merge",
        "a pair's second event tells how the first ended; pages_shared and pages_sharing rise",
        ("stable_tree_append",),
        ("pages_shared", "pages_sharing"),
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
        ("try_to_merge_one_page",),
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
    ),
    Gap(
        "migration of a KSM page",
        "mm/ksm.c:folio_migrate_ksm has no tracepoint; migrate:mm_migrate_pages counts all pages "
        "alike",
        "pgmigrate_success, of all pages",
        ("folio_migrate_ksm", "ksm_migrate_page"),
        ("pgmigrate_success",),
    ),
    Gap(
        "chains of stable nodes being made, pruned and collapsed",
        "mm/ksm.c:alloc_stable_node_chain and stable_node_dup have no tracepoint",
        "stable_node_chains and stable_node_dups",
        ("alloc_stable_node_chain", "stable_node_dup", "__stable_node_chain"),
        ("stable_node_chains", "stable_node_dups"),
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


def make_plan(facts: Facts) -> Plan:
    """Decide how each event is caught on the kernel that the facts describe."""
    defines = _defines(facts)
    events = tuple(_plan_event(kind, facts, defines) for kind in KINDS)
    blockers = _blockers(facts, events)
    return Plan(
        events=events,
        defines=defines,
        can_record=not blockers,
        blockers=blockers,
        unseen=_unseen(facts, events, defines),
    )


def _defines(facts: Facts) -> dict[str, int]:
    offsets = facts.offsets or {}
    known = {
        define: offset
        for define, member in OFFSET_DEFINES.items()
        if (offset := offsets.get(member)) is not None
    }
    if facts.ksmd_pid is not None:
        known["KSMD_PID"] = facts.ksmd_pid
    return known


def _plan_event(kind: Kind, facts: Facts, defines: Mapping[str, int]) -> EventPlan:
    obstacle = _obstacle(kind, facts)
    if obstacle is not None:
        return EventPlan(kind.name, ABSENT, None, obstacle, {})
    assert facts.tracepoints is not None
    tracepoint = facts.tracepoints[kind.name]
    plural = "s" if tracepoint.arguments != 1 else ""
    source = {"btf": "BTF"}.get(tracepoint.source, tracepoint.source)
    reason = f"{source} describes it, with {tracepoint.arguments} argument{plural}"
    missing = {}
    for field in kind.in_place:
        lacking = [define for define in _NEEDED_DEFINES[field] if define not in defines]
        if lacking:
            missing[field] = _why_undefined(lacking, facts)
    return EventPlan(kind.name, TRACEPOINT, f"raw_tracepoint:{kind.name}", reason, missing)


def _obstacle(kind: Kind, facts: Facts) -> str | None:
    if facts.tracepoints is None:
        return f"unknown whether there is a tracepoint: {facts.unknown.get('tracepoints')}"
    tracepoint = facts.tracepoints.get(kind.name)
    if tracepoint is None:
        return f"this kernel has no tracepoint {kind.name}"
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
    members = " and ".join(OFFSET_DEFINES[define] for define in lacking)
    if facts.offsets is None:
        return f"the offset of {members} is unknown: {facts.unknown.get('offsets')}"
    return f"this kernel has no {members}"


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
    if refusal is not None and not locked:
        found.append(
            (
                f"raw tracepoint programs do not work here: {refusal.reason}",
                "boot a kernel with CONFIG_BPF_SYSCALL and CONFIG_BPF_EVENTS, or leave the "
                "container or policy that forbids bpf(2)",
            )
        )
    if refusal is None and all(event.rung == ABSENT for event in events):
        found.append(
            (
                "no event can be caught: " + events[0].reason,
                "boot a kernel with the ksm tracepoints (CONFIG_KSM, CONFIG_TRACEPOINTS) and "
                "CONFIG_DEBUG_INFO_BTF=y",
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
        *((gap.what, _why_gap(gap, facts), _what_changes(gap, facts)) for gap in GAPS),
        *_unseen_counters(facts),
    )


def _unseen_events(events: tuple[EventPlan, ...]) -> list[tuple[str, str, str]]:
    return [
        (
            f"event {event.event}",
            event.reason,
            "a kernel that has this tracepoint in the form that ksmtrace knows",
        )
        for event in events
        if event.rung == ABSENT
    ]


def _unseen_fields(
    facts: Facts, events: tuple[EventPlan, ...], defines: Mapping[str, int]
) -> list[tuple[str, str, str]]:
    by_field: dict[tuple[str, str], list[str]] = {}
    for event in events:
        for field, reason in event.missing_fields.items():
            by_field.setdefault((field, reason), []).append(event.event)
    change = "a kernel with BTF (CONFIG_DEBUG_INFO_BTF=y) that has these members"
    found = [
        (f"{field} of {', '.join(names)}", reason, change)
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
        return f"{' and '.join(working)} programs work here, and ksmtrace does not use them yet"
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
