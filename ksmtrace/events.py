"""The one declaration of the events: kinds, fields, and the 56-byte payload.

The numpy dtype, the C header ``bpf/events.h`` and ``docs/events.md`` come from the tables here
(``scripts/generate`` writes the two files; a test fails where they are stale).

Every event is one payload of 56 bytes; with the ring buffer's 8-byte record header it fills a
slot of 64 bytes. A field has one offset whatever the kind, so the payload is a struct with a
union per word, and a kind is the set of fields that it fills.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ksmtrace.errors import CannotRun

PAYLOAD_BYTES = 56
BODY_OFFSET = 16
SLOT_BYTES = 64
COMM_BYTES = 16


class EventFlag(enum.IntFlag):
    """What is true of one event, beyond its kind (field ``flags``)."""

    IN_KSMD = 1
    HAS_ADDRESS = 2
    PID_IS_OWNER = 4
    HAS_COUNTS = 8
    BYPASS = 16
    NODE_FREED = 32
    FIRST_SHARER = 64
    LAST_SHARER = 128


FLAG_MEANING = {
    EventFlag.IN_KSMD: "the event happened in ksmd's own context",
    EventFlag.HAS_ADDRESS: "`address` was read; without the flag it is absent, not 0",
    EventFlag.PID_IS_OWNER: "`pid` is the tgid of the mm's owner",
    EventFlag.HAS_COUNTS: "the counts read in place were read; without the flag they are absent",
    EventFlag.BYPASS: "max_page_sharing was bypassed, for a KSM page that a fork has shared "
    "(mm/ksm.c:stable_tree_append)",
    EventFlag.NODE_FREED: "the stable_node turned out stale and was freed with all its sharers: "
    "its own events, which come before, count this sharer too",
    EventFlag.FIRST_SHARER: "the stable_node had no sharer yet: pages_shared is about to rise, "
    "and not pages_sharing",
    EventFlag.LAST_SHARER: "the stable_node has no sharer any more: pages_shared has fallen, and "
    "not pages_sharing",
}


class SearchOutcome(enum.IntEnum):
    """What mm/ksm.c:stable_tree_search came to (field ``outcome``)."""

    NONE = 0
    FOUND = 1
    SAME_PAGE = 2
    BUSY = 3


SEARCH_OUTCOME_MEANING = {
    SearchOutcome.NONE: "no equal page that can take one more sharer",
    SearchOutcome.FOUND: "an equal KSM page",
    SearchOutcome.SAME_PAGE: "the page itself: a KSM page that a fork has shared",
    SearchOutcome.BUSY: "-EBUSY: the equal KSM page is locked",
}


class Lock(enum.IntEnum):
    """What was waited for, or held (field ``lock``)."""

    KSM_THREAD_MUTEX = 0
    MMAP_LOCK = 1
    ANON_VMA = 2
    OTHER = 3
    FOLIO = 4
    REFCOUNT = 5


LOCK_MEANING = {
    Lock.KSM_THREAD_MUTEX: "mm/ksm.c's own mutex: ksmd holds it for a whole batch",
    Lock.MMAP_LOCK: "the mmap_lock of an mm that ksmd scans or merges: ksmd waits for it, or "
    "others wait while ksmd holds it",
    Lock.ANON_VMA: "an anon_vma's lock: ksmd waits for it (to split a huge page), or somebody in "
    "rmap_walk_ksm",
    Lock.OTHER: "another mutex that ksmd waits for, such as that of lru_add_drain_all",
    Lock.FOLIO: "a page's or folio's lock: ksmd waits for it, or anybody for a KSM page's",
    Lock.REFCOUNT: "no lock: a KSM page's reference count, which is frozen at 0 while the page is "
    "migrated or reclaimed; get_ksm_page spins until then",
}


class LockFlag(enum.IntFlag):
    """How a lock was waited for or held (field ``lock_flags``)."""

    EXCLUSIVE = 1
    EXITING = 2
    HOLDER_OWNS = 4
    HOLDER_READ_LAST = 8
    KSMD_HELD = 16


LOCK_FLAG_MEANING = {
    LockFlag.EXCLUSIVE: "to write, or a mutex; without it to read",
    LockFlag.EXITING: "the waiting task was exiting (PF_EXITING)",
    LockFlag.HOLDER_OWNS: "`holder_pid` is that of the task that the lock named as its exclusive "
    "owner when the wait began (struct mutex.owner, struct rw_semaphore.owner)",
    LockFlag.HOLDER_READ_LAST: "`holder_pid` is that of the task that had been the last to take "
    "the lock to read: it may have left, and others may have held it too "
    "(kernel/locking/rwsem.c:rwsem_set_reader_owned)",
    LockFlag.KSMD_HELD: "ksmd was seen to take it, and not to leave it, before the wait began",
}


class CowCause(enum.IntEnum):
    """Who made the kernel copy a KSM page (field ``cause``)."""

    WRITE = 0
    KERNEL = 1
    REMOTE = 2
    UNMERGE = 3


COW_CAUSE_MEANING = {
    CowCause.WRITE: "the process wrote to it (FAULT_FLAG_USER)",
    CowCause.KERNEL: "the kernel did in the process's own context: a system call's copy to user "
    "space, or get_user_pages",
    CowCause.REMOTE: "another task did (FAULT_FLAG_REMOTE): ptrace, process_vm_writev, a device",
    CowCause.UNMERGE: "mm/ksm.c:break_ksm: an unmerge, or with IN_KSMD ksmd undoing a merge",
}


class PageOutcome(enum.IntEnum):
    """What became of a page as ksmd came by (fields ``..._pages``)."""

    UNKNOWN = 0
    FIRST_VISIT = 1
    CHANGED = 2
    UNIQUE = 3
    MERGED = 4
    MERGED_PAIR = 5
    FORKED = 6
    IN_PLACE = 7
    ZERO_PAGE = 8
    FAILED = 9
    BUSY = 10
    SAME_PAGE = 11
    OTHER_NODE = 12
    SKIPPED = 13
    GONE = 14
    MM_EXITS = 15


PAGE_OUTCOME_MEANING = {
    PageOutcome.UNKNOWN: "in no tree afterwards, for none of the reasons below: an equal page of "
    "the unstable tree was just gone (mm/ksm.c:get_mergeable_page), or its rmap_item was freed "
    "before we looked",
    PageOutcome.FIRST_VISIT: "a first visit: its checksum was stored (rmap_item.oldchecksum had "
    "been 0)",
    PageOutcome.CHANGED: "volatile: the checksum is another than at the last visit",
    PageOutcome.UNIQUE: "no equal page: it went into the unstable tree",
    PageOutcome.MERGED: "merged with a KSM page",
    PageOutcome.MERGED_PAIR: "merged with a page of the unstable tree, which merged with it",
    PageOutcome.FORKED: "a KSM page that a fork has shared became a counted sharer",
    PageOutcome.IN_PLACE: "a sharer already",
    PageOutcome.ZERO_PAGE: "replaced by the zero page",
    PageOutcome.FAILED: "a merge was tried and failed: see merge_failure",
    PageOutcome.BUSY: "the equal KSM page was locked (mm/ksm.c:stable_tree_search: -EBUSY)",
    PageOutcome.SAME_PAGE: "the unstable tree held the page itself, which a fork has shared "
    "(mm/ksm.c:unstable_tree_search_insert); inferred: in no tree afterwards, checksum unchanged, "
    "and mapped more than once",
    PageOutcome.OTHER_NODE: "the equal page of the unstable tree was on another NUMA node "
    "(mm/ksm.c:unstable_tree_search_insert), or just gone; inferred: as above, mapped once, and "
    "merge_across_nodes is 0",
    PageOutcome.SKIPPED: "skipped by smart scan (mm/ksm.c:should_skip_rmap_item)",
    PageOutcome.GONE: "not there any more: unmapped, swapped out, replaced by the zero page, or "
    "no longer mergeable (mm/ksm.c:get_next_rmap_item, remove_trailing_rmap_items)",
    PageOutcome.MM_EXITS: "the same, and the process is exiting (mm_struct.mm_users is 0)",
}

NOT_VISITED = (PageOutcome.SKIPPED, PageOutcome.GONE, PageOutcome.MM_EXITS)
"""Outcomes of pages that ksmd only came by: cmp_and_merge_page was not called for them."""


class MergeStep(enum.IntFlag):
    """How far a merge that failed came, and what its evidence is worth (field ``steps``)."""

    IN_VMA = 1
    SPLIT = 2
    WRITE_PROTECT = 4
    WRITE_PROTECTED = 8
    IDENTICAL = 16
    ZERO_PAGE = 32
    MM_EXITS = 64
    PAGE_KNOWN = 128
    AT_ENTRY = 256
    MAPCOUNT_KNOWN = 512
    AFTER_THE_FACT = 1024
    DIFFERENT = 2048
    NOT_MAPPED = 4096
    NOT_ANONYMOUS = 8192


MERGE_STEP_MEANING = {
    MergeStep.IN_VMA: "try_to_merge_one_page was called: the address is in a mergeable vma",
    MergeStep.SPLIT: "it tried to split a large folio; `split_err` is the result",
    MergeStep.WRITE_PROTECT: "write_protect_page was called: it had the folio's lock",
    MergeStep.WRITE_PROTECTED: "write_protect_page succeeded",
    MergeStep.IDENTICAL: "the pages' contents were equal: replace_page was called",
    MergeStep.ZERO_PAGE: "the page was to be replaced by the zero page",
    MergeStep.MM_EXITS: "mm_struct.mm_users was 0",
    MergeStep.PAGE_KNOWN: "`page_flags`, `refcount` and `order` were read",
    MergeStep.AT_ENTRY: "they were read as try_to_merge_one_page was entered; without it right "
    "after the step that failed",
    MergeStep.MAPCOUNT_KNOWN: "`mapcount` was read",
    MergeStep.AFTER_THE_FACT: "no step was seen, and what was read was read when all was over",
    MergeStep.DIFFERENT: "the pages' contents were not equal: replace_page was not called",
    MergeStep.NOT_MAPPED: "the address mapped no page when all was over",
    MergeStep.NOT_ANONYMOUS: "page.mapping did not say that the folio is anonymous",
}


@dataclass(frozen=True)
class Field:
    """One field of the payload: its place, C type, and meaning."""

    name: str
    offset: int
    c_type: str
    meaning: str

    @property
    def word(self) -> int:
        """Index of the 8-byte word that holds the field."""
        return self.offset // 8


_DTYPES = {
    "u64": "<u8",
    "s64": "<i8",
    "u32": "<u4",
    "s32": "<i4",
    "s16": "<i2",
    "u16": "<u2",
    "u8": "u1",
    "s8": "i1",
}

HEAD = (
    Field("ts_ns", 0, "u64", "CLOCK_MONOTONIC when the event happened"),
    Field("kind", 8, "u8", "number of the kind"),
    Field("flags", 9, "u8", "EventFlag bits"),
    Field("err", 10, "s16", "the kernel's result: 0 or a negative errno"),
    Field(
        "pid",
        12,
        "u32",
        "with PID_IS_OWNER the tgid of the mm's owner (mm_struct.owner; while a fork registers a "
        "child's mm still the parent), else that of the task in whose context the event happened: "
        "an mm whose last thread has gone has no owner, which is so at nearly every ksm_exit",
    ),
)

BODY = (
    Field("mm", 16, "u64", "address of the mm_struct"),
    Field("seq", 16, "s32", "ksm_scan.seqnr of the pass (before it is incremented)"),
    Field("rmap_entries", 20, "u32", "ksm_rmap_items: rmap_items that exist, in all mms"),
    Field("cpu_percent", 16, "u32", "ksmd's CPU use in the last pass, per cent of one CPU"),
    Field("sharers", 16, "s32", "stable_node.rmap_hlist_len"),
    Field("lock_address", 16, "u64", "address of the lock"),
    Field("action", 16, "u32", "MEM_GOING_OFFLINE, MEM_OFFLINE, ...: the facts' `memory_actions`"),
    Field("page_flags", 16, "u32", "the low 32 bits of page.flags of the folio's first page"),
    Field("run", 16, "u32", "what was written to /sys/kernel/mm/ksm/run"),
    Field("nid", 20, "s32", "stable_node.nid: NUMA node of the tree that it is in"),
    Field("refcount", 20, "s32", "page._refcount of the folio's first page"),
    Field("kpfn_before", 16, "u64", "stable_node.kpfn when the function was called"),
    Field("rmap_item", 24, "u64", "address of the rmap_item; 0: unknown"),
    Field("kpfn_after", 24, "u64", "stable_node.kpfn when the function returned"),
    Field(
        "chain",
        24,
        "u64",
        "address of the chain's stable_node; 0: in no chain, or not found behind 16 other dups",
    ),
    Field("waiters", 24, "u32", "waits for the lock that began while it was held"),
    Field("task_pid", 24, "u32", "tgid of the task in whose context the event happened"),
    Field("cause", 28, "u32", "CowCause"),
    Field("ksmd_cpu_ns", 24, "u64", "task_struct.se.sum_exec_runtime of ksmd; behind by a tick"),
    Field("scan_time", 24, "s64", "seconds the advisor took the last pass to last"),
    Field("comm", 24, "comm", "name of the task in whose context the event happened"),
    Field("ksm_zero_pages", 24, "u64", "mm_struct.ksm_zero_pages at the event"),
    Field(
        "address",
        32,
        "u64",
        "the page's virtual address; with an rmap_item it is rmap_item.address, whose low 12 bits "
        "hold the kernel's own flags (seqnr 0x0ff, UNSTABLE_FLAG 0x100, STABLE_FLAG 0x200); see "
        "HAS_ADDRESS",
    ),
    Field("new_pfn", 32, "u64", "page frame number that the page moves to"),
    Field("ksmd_run_delay_ns", 32, "u64", "task_struct.sched_info.run_delay of ksmd"),
    Field("pages_to_scan", 32, "u64", "the batch size that the advisor chose"),
    *(
        Field(
            f"{outcome.name.lower()}_pages",
            24 + 2 * outcome,
            "u16",
            f"pages with the outcome {outcome.name.lower()}",
        )
        for outcome in PageOutcome
    ),
    Field("pfn", 40, "u64", "page frame number: of the KSM page (kpfn), or of the page looked at"),
    Field("holder_pid", 40, "u32", "tgid of a task that held the lock; 0: unknown; see LockFlag"),
    Field("stack", 44, "s16", "number of the task's stack in the recording; below 0: not kept"),
    Field("lock", 46, "u8", "Lock"),
    Field("lock_flags", 47, "u8", "LockFlag bits"),
    Field("end_address", 40, "u64", "end of the range; 0 where the kernel goes page by page"),
    Field("ksm_merging_pages", 40, "u64", "mm_struct.ksm_merging_pages at the event"),
    Field("ksm_page", 48, "u64", "struct page of the stable page to merge with; 0: none yet"),
    Field("ksm_rmap_items", 48, "u64", "mm_struct.ksm_rmap_items at the event"),
    Field("stable_node", 48, "u64", "address of the stable_node; 0: none yet"),
    Field("duration_ns", 48, "u64", "from the function's entry to its exit; 0: unknown"),
    Field("age", 48, "u32", "rmap_item.age: passes that came by, at most 255"),
    Field("outcome", 48, "u32", "SearchOutcome"),
    Field("mapcount", 48, "s32", "how often the folio is mapped"),
    Field("flags_before", 48, "u32", "the low 12 bits of rmap_item.address when the visit began"),
    Field("checksum_changed", 52, "u32", "1: rmap_item.oldchecksum is another than at the begin"),
    Field("remaining_skips", 52, "u32", "rmap_item.remaining_skips, less this one"),
    Field("steps", 52, "u16", "MergeStep bits"),
    Field("order", 54, "u8", "log2 of the folio's number of pages"),
    Field("split_err", 55, "s8", "result of splitting the large folio"),
    Field("nodes", 52, "u32", "stable_nodes whose page was looked up in the search"),
)


@dataclass(frozen=True)
class Kind:
    """One kind of event.

    Attributes:
        number: value of the payload's ``kind``; never reused for another meaning.
        name: the tracepoint's name in group ``ksm``, or the function's in mm/ksm.c.
        fields: names of the fields that the tracepoint or the function itself hands over.
        in_place: names of the fields that our program reads from kernel memory at the event.
        meaning: when the kernel fires it, with the source.
        has_tracepoint: whether some kernels have a tracepoint of that name.
        every_page: it happens once per page that ksmd looks at, so that by default the kernel
            side only counts it.
    """

    number: int
    name: str
    fields: tuple[str, ...]
    in_place: tuple[str, ...]
    meaning: str
    has_tracepoint: bool = True
    every_page: bool = False

    @property
    def body(self) -> tuple[str, ...]:
        """Names of all fields beyond the head."""
        return self.fields + self.in_place


_OWNER = ("pid",)
_COUNTS = ("ksm_merging_pages", "ksm_rmap_items")

KINDS = (
    Kind(
        1,
        "ksm_start_scan",
        ("seq", "rmap_entries"),
        ("ksmd_cpu_ns", "ksmd_run_delay_ns"),
        "A pass begins (mm/ksm.c:scan_get_next_rmap_item, cursor at the list's head). A pass that "
        "run=2 interrupts has no ksm_stop_scan.",
    ),
    Kind(
        2,
        "ksm_stop_scan",
        ("seq", "rmap_entries"),
        ("ksmd_cpu_ns", "ksmd_run_delay_ns"),
        "A pass is complete, just before ksm_scan.seqnr is incremented "
        "(mm/ksm.c:scan_get_next_rmap_item).",
    ),
    Kind(
        3,
        "ksm_enter",
        ("mm",),
        (*_OWNER, "comm", *_COUNTS),
        "An mm was put on ksmd's list (mm/ksm.c:__ksm_enter): madvise, prctl, fork, exec.",
    ),
    Kind(
        4,
        "ksm_exit",
        ("mm",),
        (*_OWNER, *_COUNTS, "ksm_zero_pages"),
        "An mm leaves (mm/ksm.c:__ksm_exit): its last user is gone, or prctl. Not fired when ksmd "
        "itself drops an mm that has no mergeable area left.",
    ),
    Kind(
        5,
        "ksm_merge_one_page",
        ("pfn", "rmap_item", "mm", "err"),
        (*_OWNER, "address"),
        "ksmd tried to replace a page by the zero page (mm/ksm.c:try_to_merge_with_zero_page); "
        "fired on failure too, and for no other merge. pfn is the zero page's.",
    ),
    Kind(
        6,
        "ksm_merge_with_ksm_page",
        ("ksm_page", "pfn", "rmap_item", "mm", "err"),
        (*_OWNER, "address"),
        "ksmd tried to merge a page (mm/ksm.c:try_to_merge_with_ksm_page). ksm_page 0: the first "
        "page of a new pair, which becomes the KSM page and is undone without an event if the "
        "second fails. Fired before the counters move.",
    ),
    Kind(
        7,
        "ksm_remove_ksm_page",
        ("pfn",),
        (),
        "A stable_node is freed (mm/ksm.c:remove_node_from_stable_tree). pid is the task in whose "
        "context that was found out.",
    ),
    Kind(
        8,
        "ksm_remove_rmap_item",
        ("pfn", "rmap_item", "mm"),
        (*_OWNER, "address"),
        "A sharer is removed together with its stable_node, for every sharer but the node's last "
        "(mm/ksm.c:remove_node_from_stable_tree). Single removals have no event.",
    ),
    Kind(
        9,
        "ksm_advisor",
        ("scan_time", "pages_to_scan", "cpu_percent"),
        (),
        "The scan-time advisor set pages_to_scan for the next pass (mm/ksm.c:scan_time_advisor).",
    ),
    Kind(
        10,
        "try_to_merge_one_page",
        ("pfn", "err"),
        ("mm", *_OWNER, "rmap_item", "address", "duration_ns"),
        "ksmd tried to make a page a sharer, or a KSM page. pfn is the page's own; what it is to "
        "be merged with is in the ksm_merge_with_ksm_page or ksm_merge_one_page that follows it.",
        has_tracepoint=False,
    ),
    Kind(
        11,
        "break_ksm",
        ("address", "end_address", "err"),
        ("mm", *_OWNER, "task_pid", "duration_ns"),
        "An address, from 6.19 on a range, was unmerged: run=2, MADV_UNMERGEABLE, prctl, or ksmd "
        "undoing a merge (break_cow). Fires for addresses without a KSM page too.",
        has_tracepoint=False,
    ),
    Kind(
        12,
        "ksm_migrate_page",
        ("pfn", "new_pfn"),
        ("stable_node", "kpfn_before", "kpfn_after"),
        "A KSM page moved to another frame (ksm_migrate_page, since 5.17 folio_migrate_ksm). pfn "
        "is the old one. kpfn_after differs from new_pfn where the stable_node is not moved along.",
        has_tracepoint=False,
    ),
    Kind(
        13,
        "cmp_and_merge_page",
        ("rmap_item", "pfn"),
        ("mm", *_OWNER, "address", "flags_before", "checksum_changed"),
        "ksmd looked at a page, which smart scan has not skipped. ts_ns is when it began; known "
        "when ksmd goes on, so that the last page may be missing at the end of a recording. "
        "address is that after the visit: its flags say in which tree the page ended.",
        has_tracepoint=False,
        every_page=True,
    ),
    Kind(
        14,
        "stable_tree_search",
        ("pfn", "outcome"),
        ("rmap_item", "mm", *_OWNER, "address", "nodes"),
        "ksmd searched the stable tree for an equal page. Known when ksmd goes on, so that the "
        "last search may be missing at the end of a recording.",
        has_tracepoint=False,
        every_page=True,
    ),
    Kind(
        15,
        "stable_tree_append",
        ("rmap_item", "stable_node"),
        ("mm", *_OWNER, "address", "pfn"),
        "A page becomes a sharer of a stable_node. Fired before the counters move.",
        has_tracepoint=False,
    ),
    Kind(
        16,
        "remove_rmap_item_from_tree",
        ("rmap_item",),
        ("mm", *_OWNER, "address", "stable_node", "pfn"),
        "A sharer has left its stable_node (COW, unmap, unmerge, exit), as ksmd or an unmerge "
        "found out. Calls for an rmap_item that is not in the stable tree have no event. address "
        "is that before the call.",
        has_tracepoint=False,
    ),
    Kind(
        17,
        "remove_node_from_stable_tree",
        ("stable_node",),
        ("sharers", "nid", "pfn"),
        "A stable_node is freed: as ksm_remove_ksm_page, and with it. All its sharers go, which "
        "takes one from pages_shared if there are any, and the others from pages_sharing.",
        has_tracepoint=False,
    ),
    Kind(
        18,
        "stable_tree_insert",
        ("stable_node",),
        ("pfn", "sharers", "nid", "chain"),
        "A stable_node gets its first sharer: it is new in the stable tree, or had lost them all. "
        "Comes with the stable_tree_append of that sharer, before it.",
        has_tracepoint=False,
    ),
    Kind(
        19,
        "alloc_stable_node_chain",
        ("stable_node", "chain"),
        ("pfn", "sharers", "nid"),
        "A stable_node becomes the first dup of a new chain, which takes its place in the tree.",
        has_tracepoint=False,
    ),
    Kind(
        20,
        "free_stable_node_chain",
        ("chain", "stable_node"),
        ("pfn", "sharers", "nid"),
        "A chain is freed while the tree is walked: it had no dup any more, or only one, "
        "stable_node, which takes its place in the tree. run=2 and memory offline free chains too, "
        "without this event.",
        has_tracepoint=False,
    ),
    Kind(
        21,
        "run_store",
        ("run", "err"),
        ("duration_ns",),
        "Somebody wrote to /sys/kernel/mm/ksm/run, and is through: run=2 has then unmerged all.",
        has_tracepoint=False,
    ),
    Kind(
        22,
        "merge_failure",
        ("rmap_item", "err", "steps"),
        (*_OWNER, "address", "pfn", "page_flags", "refcount", "mapcount", "order", "split_err"),
        "A try_to_merge_with_ksm_page that failed, with what its cause can be told by. Comes "
        "right after its ksm_merge_with_ksm_page; with ZERO_PAGE beside a ksm_merge_one_page. "
        "pfn is that of the page that did not merge.",
        has_tracepoint=False,
    ),
    Kind(
        23,
        "page_outcomes",
        ("mm", *(f"{outcome.name.lower()}_pages" for outcome in PageOutcome)),
        _OWNER,
        "What became of an mm's pages, counted by outcome since the last such event, or since "
        "ksmd came to it. Told when ksmd goes on to another mm, at the end of a pass, a second "
        "after the first of them, after 65535 pages, and when somebody has written to run.",
        has_tracepoint=False,
    ),
    Kind(
        24,
        "should_skip_rmap_item",
        ("rmap_item",),
        ("mm", *_OWNER, "address", "age", "remaining_skips"),
        "Smart scan skipped a page (mm/ksm.c:should_skip_rmap_item), and will skip it in the next "
        "remaining_skips passes, too.",
        has_tracepoint=False,
        every_page=True,
    ),
    Kind(
        26,
        "lock_wait",
        ("lock_address", "err"),
        ("comm", "holder_pid", "stack", "lock", "lock_flags", "duration_ns"),
        "A wait for a lock is over, in which ksmd waited, or ksmd held what others waited for, or "
        "which was for ksm_thread_mutex (lock:contention_begin and contention_end: the slow paths "
        "of kernel/locking only). Nearly every one that was among the longest so far has a stack.",
        has_tracepoint=False,
    ),
    Kind(
        27,
        "lock_hold",
        ("lock_address",),
        ("waiters", "stack", "lock", "lock_flags", "duration_ns"),
        "ksmd has released a lock, and somebody waited meanwhile, or the hold was among the "
        "longest so far; all holds are in the kernel side's histogram. Of ksm_thread_mutex it is "
        "derived: from ksmd's getting the CPU after its sleep to its sleeping again, which is one "
        "batch (mm/ksm.c:ksm_scan_thread).",
        has_tracepoint=False,
    ),
    Kind(
        28,
        "__folio_lock",
        ("lock_address",),
        ("comm", "stack", "lock", "lock_flags", "duration_ns"),
        "A wait for a page's lock is over, as lock_wait: ksmd waited, or it was for a KSM page "
        "(__folio_lock, before 5.16 __lock_page). Who holds such a lock, nobody knows.",
        has_tracepoint=False,
    ),
    Kind(
        29,
        "rmap_walk_ksm",
        ("pfn",),
        ("sharers", "comm", "duration_ns"),
        "Somebody (reclaim, migration) went through all that map a KSM page, whose lock is held "
        "meanwhile. sharers as the walk began; -1: the page had no stable_node.",
        has_tracepoint=False,
    ),
    Kind(
        30,
        "ksm_memory_callback",
        ("action",),
        ("comm", "duration_ns"),
        "KSM was told of memory going offline or online. From MEM_GOING_OFFLINE, for which it "
        "waits for ksm_thread_mutex, to MEM_OFFLINE or MEM_CANCEL_OFFLINE ksmd does nothing.",
        has_tracepoint=False,
    ),
    Kind(
        31,
        "get_ksm_page",
        ("lock_address", "err"),
        ("comm", "stack", "lock", "lock_flags", "duration_ns"),
        "A look-up of a stable_node's page took 20 µs or more by itself: it looked again, or spun "
        "while the page's reference count was frozen (mm/ksm.c:get_ksm_page, later ksm_get_folio). "
        "duration_ns is without a wait for the page's lock, which is a __folio_lock, and without "
        "the removal of a stale stable_node; a look-up in which the task lost its CPU has no "
        "event. Shorter ones are only counted. lock_address is the stable_node's; who froze the "
        "count, nobody knows.",
        has_tracepoint=False,
    ),
    Kind(
        32,
        "do_wp_page",
        ("address", "err"),
        ("mm", *_OWNER, "task_pid", "cause", "pfn", "duration_ns"),
        "A fault on a write-protected KSM page copied it, so that it is shared no more "
        "(mm/memory.c:do_wp_page; 5.10 to 7.3 copy a KSM page in every case). err: -ENOMEM there "
        "was no memory for the copy, -EAGAIN the fault is tried again, -EFAULT another error. "
        "Faults on other pages have no event.",
        has_tracepoint=False,
    ),
    Kind(
        33,
        "ksm_might_need_to_copy",
        ("address", "err"),
        ("mm", *_OWNER, "task_pid", "pfn"),
        "A swapped-in page was copied, because it belongs to another anon_vma or another place in "
        "it (mm/ksm.c:ksm_might_need_to_copy returned another page). pfn is that of the page in "
        "the swap cache; err -ENOMEM or -EHWPOISON: it could not be copied.",
        has_tracepoint=False,
    ),
    Kind(
        34,
        "break_cow",
        ("rmap_item",),
        ("mm", *_OWNER, "address", "duration_ns"),
        "ksmd undid a merge whose second half failed (mm/ksm.c:break_cow), with a break_ksm in it.",
        has_tracepoint=False,
    ),
    Kind(
        35,
        "remove_migration_ptes",
        ("pfn", "new_pfn"),
        ("sharers", "task_pid", "duration_ns"),
        "All mappings of a KSM page that moved point to a page again "
        "(mm/migrate.c:remove_migration_ptes). duration_ns is since they were taken away "
        "(mm/rmap.c:try_to_migrate, before 5.14 try_to_unmap): so long every access to it waited. "
        "A page that did not move in the end has none.",
        has_tracepoint=False,
    ),
    Kind(
        36,
        "split_huge_page_to_list",
        ("pfn", "err"),
        ("mm", *_OWNER, "rmap_item", "address", "duration_ns"),
        "ksmd split a huge page to merge a part of it (mm/huge_memory.c:split_huge_page_to_list, "
        "later split_huge_page_to_list_to_order). pfn is that of the part.",
        has_tracepoint=False,
    ),
)

KIND_BY_NAME = {kind.name: kind for kind in KINDS}
KIND_BY_NUMBER = {kind.number: kind for kind in KINDS}
NR_KINDS = max(kind.number for kind in KINDS) + 1
"""Size of an array indexed by a kind's number."""


def _payload_dtype(itemsize: int, base: int) -> np.dtype[np.void]:
    fields = [*HEAD, *BODY]
    return np.dtype(
        {
            "names": [field.name for field in fields],
            "formats": [_DTYPES.get(field.c_type, f"S{COMM_BYTES}") for field in fields],
            "offsets": [base + field.offset for field in fields],
            "itemsize": itemsize,
        }
    )


EVENT_DTYPE = _payload_dtype(PAYLOAD_BYTES, 0)
"""One event: all fields of all kinds by name, overlapping as in the C union."""

WORDS_DTYPE = np.dtype([(f"word{i}", "<u8") for i in range(PAYLOAD_BYTES // 8)])
"""The same 56 bytes as seven words: the form in which they are stored."""

Events = npt.NDArray[np.void]
"""A structured array of :data:`EVENT_DTYPE`, shape (n,)."""


def no_events() -> Events:
    """Return an empty array of :data:`EVENT_DTYPE`."""
    return np.empty(0, EVENT_DTYPE)


@functools.cache
def check_sorting() -> None:
    """Make sure that this CPU sorts: all that follows an address through the events relies on it.

    QEMU 7.2 emulates AVX2 wrongly: numpy's argsort leaves 10 numbers out of order there.

    Raises:
        CannotRun: it does not.
    """
    for count in (10, 64, 1009):
        keys = np.arange(count) * 7919 % 1013
        if (keys[np.argsort(keys)] != np.sort(keys)).any():
            raise CannotRun(
                "numpy sorts wrongly on this CPU, which is emulated or broken: no figure is right",
                "start the guest without AVX2 (qemu -cpu max,-avx2), or set "
                "NPY_DISABLE_CPU_FEATURES=X86_V3",
            )


def concatenate(batches: Sequence[Events]) -> Events:
    """Join batches to one array, shape (n,), of :data:`EVENT_DTYPE`.

    numpy's own concatenate would lay the overlapping fields out anew, one behind the other.
    """
    raw = f"V{PAYLOAD_BYTES}"
    if not batches:
        return no_events()
    joined: Events = np.concatenate([batch.view(raw) for batch in batches]).view(EVENT_DTYPE)
    return joined


def put(events: Events, place: int, batch: Events) -> None:
    """Copy a batch, shape (m,), over the events from a place on; as :func:`select`, quickly."""
    raw = f"V{PAYLOAD_BYTES}"
    events.view(raw)[place : place + len(batch)] = batch.view(raw)


def of_kind(events: Events, *names: str) -> Events:
    """Select the events of the named kinds, in order; a copy of shape (m,)."""
    numbers = [KIND_BY_NAME[name].number for name in names]
    return select(events, np.isin(events["kind"], numbers))


def select(events: Events, chosen: npt.NDArray[np.bool_] | npt.NDArray[np.int64]) -> Events:
    """Select events by a mask of shape (n,) or by their places; a copy, in that order.

    numpy's own indexing copies a structured row field by field, overlapping fields and all: a
    hundred times slower.
    """
    rows = np.ascontiguousarray(events).view(f"V{PAYLOAD_BYTES}")[chosen]
    selected: Events = rows.view(EVENT_DTYPE)
    return selected


def c_header() -> str:
    """Return the text of ``bpf/events.h``: struct ksm_event, the kinds and the flags."""
    lines = [
        "/* Generated from ksmtrace/events.py by scripts/generate: do not edit. */",
        "#ifndef KSMTRACE_EVENTS_H",
        "#define KSMTRACE_EVENTS_H",
        "",
        *(f"#define {kind.name.upper()} {kind.number}" for kind in KINDS),
        f"#define NR_KINDS {NR_KINDS}",
        "",
        *(f"#define {flag.name} {flag.value}" for flag in EventFlag),
        "",
        *(f"#define SEARCH_{outcome.name} {outcome.value}" for outcome in SearchOutcome),
        "",
        *(f"#define LOCK_{lock.name} {lock.value}" for lock in Lock),
        f"#define NR_LOCKS {len(Lock)}",
        "",
        *(f"#define WAIT_{flag.name} {flag.value}" for flag in LockFlag),
        "",
        *(f"#define COW_{cause.name} {cause.value}" for cause in CowCause),
        "",
        *(f"#define PAGE_{outcome.name} {outcome.value}" for outcome in PageOutcome),
        f"#define NR_PAGE_OUTCOMES {len(PageOutcome)}",
        "",
        *(f"#define STEP_{step.name} {step.value}" for step in MergeStep),
        "",
        f"#define COMM_BYTES {COMM_BYTES}",
        "",
        "struct ksm_event {",
        *(f"\t{field.c_type} {field.name};" for field in HEAD),
        "\tunion {",
        "\t\tu64 body[5];",
    ]
    for field in BODY:
        room = field.offset - BODY_OFFSET
        unit, pads = ("u8", room) if room % 4 else ("u32", room // 4)
        member = (
            f"char {field.name}[COMM_BYTES]"
            if field.c_type == "comm"
            else (f"{field.c_type} {field.name}")
        )
        # Padded, and not packed: a packed member would be stored byte by byte.
        lines.append(
            f"\t\tstruct {{ {f'{unit} pad_{field.name}[{pads}]; ' if pads else ''}{member}; }};"
        )
    lines += [
        "\t};",
        "};",
        "",
        f"_Static_assert(sizeof(struct ksm_event) == {PAYLOAD_BYTES},",
        '\t       "an event and its ring header must fill a 64-byte slot");',
        *(
            f"_Static_assert(__builtin_offsetof(struct ksm_event, {field.name}) == {field.offset}, "
            f'"{field.name}");'
            for field in (*HEAD, *BODY)
        ),
        "",
        "#endif",
    ]
    return "\n".join(lines) + "\n"


def markdown() -> str:
    """Return the text of ``docs/events.md``."""
    lines = [
        "# Events",
        "",
        "Generated from `ksmtrace/events.py` by `scripts/generate`: do not edit.",
        "",
        f"An event is {PAYLOAD_BYTES} bytes; with the ring's record header it fills a slot of "
        f"{SLOT_BYTES}. Every event has the head; a kind fills the fields listed for it. Fields "
        "*in place* are read from kernel memory by our program at the event, with offsets from "
        "the running kernel's BTF.",
        "",
        "## Head",
        "",
        "| offset | field | type | meaning |",
        "|---|---|---|---|",
        *(f"| {f.offset} | `{f.name}` | {f.c_type} | {f.meaning} |" for f in HEAD),
        "",
        "## Flags",
        "",
        "| bit | flag | meaning |",
        "|---|---|---|",
        *(f"| {flag.value} | `{flag.name}` | {FLAG_MEANING[flag]} |" for flag in EventFlag),
        "",
        "## Kinds",
        "",
        "| number | kind | fields of the tracepoint or function | in place | fires |",
        "|---|---|---|---|---|",
        *(
            f"| {k.number} | `{k.name}` | {_code_list(k.fields)} | {_code_list(k.in_place)} "
            f"| {k.meaning} |"
            for k in KINDS
        ),
        "",
        "`cmp_and_merge_page` and `stable_tree_search` happen for every page that ksmd looks at, "
        "`should_skip_rmap_item` for those that it skips: the kernel side counts them, and `record "
        "--every-page` streams them as well.",
        "",
        "## Outcomes of stable_tree_search",
        "",
        "| number | outcome | meaning |",
        "|---|---|---|",
        *(
            f"| {outcome.value} | `{outcome.name.lower()}` | {SEARCH_OUTCOME_MEANING[outcome]} |"
            for outcome in SearchOutcome
        ),
        "",
        "## Locks",
        "",
        "| number | lock | what it is here |",
        "|---|---|---|",
        *(f"| {lock.value} | `{lock.name.lower()}` | {LOCK_MEANING[lock]} |" for lock in Lock),
        "",
        "| bit | flag of a wait or hold | meaning |",
        "|---|---|---|",
        *(f"| {flag.value} | `{flag.name}` | {LOCK_FLAG_MEANING[flag]} |" for flag in LockFlag),
        "",
        "## Causes of do_wp_page",
        "",
        "| number | cause | meaning |",
        "|---|---|---|",
        *(
            f"| {cause.value} | `{cause.name.lower()}` | {COW_CAUSE_MEANING[cause]} |"
            for cause in CowCause
        ),
        "",
        "## Outcomes of pages",
        "",
        "| number | outcome | meaning |",
        "|---|---|---|",
        *(
            f"| {outcome.value} | `{outcome.name.lower()}` | {PAGE_OUTCOME_MEANING[outcome]} |"
            for outcome in PageOutcome
        ),
        "",
        "## Steps of a merge that failed",
        "",
        "| bit | step | meaning |",
        "|---|---|---|",
        *(f"| {step.value} | `{step.name}` | {MERGE_STEP_MEANING[step]} |" for step in MergeStep),
        "",
        "## Fields of the body",
        "",
        "| offset | field | type | meaning |",
        "|---|---|---|---|",
        *(f"| {f.offset} | `{f.name}` | {f.c_type} | {f.meaning} |" for f in BODY),
    ]
    return "\n".join(lines) + "\n"


def _code_list(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "–"
