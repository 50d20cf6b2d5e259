"""What a plan leaves unseen, why, what is known nevertheless, and what would change that.

No rule tests a kernel version: distributions backport. Each tests presence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ksmtrace.capture.hooks import ABSENT, DERIVED, HOOKS, WATCHPOINT
from ksmtrace.events import KIND_BY_NAME
from ksmtrace.kernel.facts import Facts

if TYPE_CHECKING:
    from ksmtrace.capture.plan import EventPlan


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
        shown_by=("page_outcomes", "cmp_and_merge_page"),
    ),
    Gap(
        "which pages smart scan skipped",
        "mm/ksm.c:should_skip_rmap_item is inlined",
        "pages_skipped is their exact number",
        ("should_skip_rmap_item", "ksm_next_page_pmd_entry"),
        ("pages_skipped",),
        shown_by=("page_outcomes", "should_skip_rmap_item"),
    ),
    Gap(
        "why a merge failed (page locked, pinned, changed, no longer there)",
        "ksm_merge_with_ksm_page says -EFAULT for all of them, and ksm_merge_one_page fires only "
        "for merges with the zero page",
        "that it failed, and for whom",
        ("write_protect_page",),
        shown_by=("merge_failure",),
    ),
    Gap(
        "a write to a KSM page that copies it (COW break), and what the copy cost",
        "mm/memory.c:do_wp_page has no tracepoint",
        "cow_ksm counts them, unmerges by the kernel itself included",
        ("do_wp_page",),
        ("cow_ksm",),
        shown_by=("do_wp_page",),
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
        shown_by=("ksm_might_need_to_copy",),
    ),
    Gap(
        "a huge page that ksmd splits to merge a part of it",
        "mm/huge_memory.c:split_huge_page_to_list has no tracepoint",
        "thp_split_page, of all huge pages",
        (
            "split_huge_page_to_list",
            "split_huge_page_to_list_to_order",
            "__split_huge_page_to_list_to_order",
        ),
        ("thp_split_page",),
        shown_by=("split_huge_page_to_list",),
    ),
    Gap(
        "ksmd dropping an mm that has no mergeable area left",
        "ksm_exit fires only in __ksm_exit",
        "/proc/PID/ksm_stat shows no rmap_items any more",
        ("scan_get_next_rmap_item",),
    ),
    Gap(
        "waits for page locks",
        "page and folio locks have no tracepoint, neither of ksm nor of lock",
        "ksmd's run delay, which is waiting for a CPU and not for locks",
        ("__folio_lock", "__lock_page"),
        shown_by=("__folio_lock",),
    ),
)
"""What the tracepoints of group ksm leave out (include/trace/events/ksm.h and its callers)."""

_CHANGE_FOR_TRACEPOINT = "a kernel that has this tracepoint in the form that ksmtrace knows"
_CHANGE_FOR_OTHERS = "a kernel that has the tracepoints {} in the form that ksmtrace knows"
_CHANGE_FOR_FUNCTION = (
    "a kernel with fentry or kprobes, BTF and CONFIG_KALLSYMS_ALL=y; for an inlined function also "
    "a recipe for this build (`ksmtrace sites resolve VMLINUX`)"
)


def find_unseen(
    facts: Facts, events: tuple[EventPlan, ...], defines: Mapping[str, int]
) -> tuple[tuple[str, str, str], ...]:
    """List what cannot be seen here.

    Args:
        facts: the kernel's facts.
        events: how each kind of event is caught.
        defines: the C defines that are known here.

    Returns:
        Of each (what, why and what is still known, what would change that).
    """
    return (
        *_unseen_events(facts, events),
        *_unseen_fields(facts, events, defines),
        *(
            (gap.what, _why_gap(gap, facts), _what_changes(gap, facts))
            for gap in GAPS
            if not _is_shown(gap, events)
        ),
        *_unseen_delays(facts),
        *_unseen_counters(facts),
    )


def _is_shown(gap: Gap, events: tuple[EventPlan, ...]) -> bool:
    return any(event.event in gap.shown_by for event in events if event.rung != ABSENT)


def _unseen_events(facts: Facts, events: tuple[EventPlan, ...]) -> list[tuple[str, str, str]]:
    by_reason: dict[tuple[str, str], list[str]] = {}
    tried = (facts.loading or {}).get(WATCHPOINT)
    watchpoints = tried is not None and tried.works
    askable = {
        name for name, hooks in HOOKS.items() if any(h.watches for h in hooks) and watchpoints
    }
    for event in events:
        if event.rung == ABSENT:
            changes = []
            if KIND_BY_NAME[event.event].has_tracepoint:
                changes.append(_CHANGE_FOR_TRACEPOINT)
            hooks = HOOKS[event.event]
            if event.event in askable:
                changes.append("`record --every-page`")
            if any(hook.functions or hook.sites for hook in hooks):
                changes.append(_CHANGE_FOR_FUNCTION)
            elif hooks:
                changes.append(_CHANGE_FOR_OTHERS.format(" and ".join(hooks[0].tracepoints)))
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
    if field == "split_err":
        return _CHANGE_FOR_FUNCTION
    derived = {event.event for event in events if event.rung == DERIVED}
    if any(
        field in (hook.lacks or {})
        for name in derived.intersection(names)
        for hook in HOOKS[name]
        if hook.rung == DERIVED
    ):
        return "a recipe for this build (`ksmtrace sites resolve VMLINUX`)"
    if "lock_hold" in names:
        return "`record --every-page`, on a kernel whose tracepoints do not write out paths (6.16)"
    watched = {event.event for event in events if event.rung == WATCHPOINT}
    if field == "pfn" and watched.issuperset(names):
        return "a kernel with fentry or kprobes"
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


def _unseen_delays(facts: Facts) -> list[tuple[str, str, str]]:
    what = "how long each process is delayed by copies on write, KSM's and others (taskstats)"
    if facts.offsets is None:
        reason = f"the layout of struct taskstats is unknown: {facts.unknown.get('offsets')}"
        return [(what, reason, "a kernel with BTF (CONFIG_DEBUG_INFO_BTF=y)")]
    if facts.copy_delay_offsets is None:
        return [
            (what, "this kernel's struct taskstats has no wpcopy_count", "a kernel that has it")
        ]
    if facts.task_delayacct is None:
        reason = facts.unknown.get("task_delayacct", "there is no kernel.task_delayacct")
        return [(what, reason, "a kernel with CONFIG_TASK_DELAY_ACCT=y")]
    if not facts.task_delayacct:
        return [
            (
                what,
                "kernel.task_delayacct is 0, so that the kernel does not account delays",
                "`sysctl kernel.task_delayacct=1` before the processes begin, which costs every "
                "task a little; ksmtrace does not turn it on",
            )
        ]
    return []


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
