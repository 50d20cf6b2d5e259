"""The ladder: by which hooks each event can be caught, best first. Tables, and nothing else.

A function of mm/ksm.c has one body in bpf/, whichever way it is reached; an event
comes from one or more of these bodies. What the kernel has decides which hook is taken
(:mod:`ksmtrace.capture.plan`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ksmtrace.events import Lock

TRACEPOINT = "tracepoint"
FENTRY = "fentry"
KPROBE = "kprobe"
SITE = "inlined site"
WATCHPOINT = "watchpoint"
DERIVED = "derived"
ABSENT = "absent"

RUNGS: Mapping[str, str] = {
    TRACEPOINT: "a raw tracepoint program",
    FENTRY: "a program on a function's entry or exit, by BTF and trampoline",
    KPROBE: "the same by a kprobe or kretprobe",
    SITE: "a kprobe where the function was inlined, by a recipe for this very build",
    WATCHPOINT: "by a hardware watchpoint on a variable of mm/ksm.c",
    DERIVED: "from other functions that can be seen",
    ABSENT: "not at all",
}
"""The rungs, best first."""


@dataclass(frozen=True)
class Function:
    """A function that programs are put on.

    Attributes:
        body: its name in bpf/: ``enter_BODY`` and ``leave_BODY``.
        names: what it is called in kernels, newest first.
        enters: whether it has a body for its entry.
        leaves: whether it has one for its exit.
        keeps: whether the exit needs to know the entry: ``call`` the time and note of every
            call, ``noted`` only of those that the entry's body has a note for, ``""`` nothing.
        arguments: the numbers of arguments that the bodies understand.
        direct: called so often that a program of fentry or fexit reads its arguments in place;
            then the bodies must not compute with pointers among them.
        defines: C defines without which the bodies see nothing.
        filtered: nearly all of its calls have nothing to do with KSM. Those of which the entry's
            body returns 0 are not counted, nor kept, and cost as little as can be.
    """

    body: str
    names: tuple[str, ...]
    arguments: tuple[int, ...]
    enters: bool = False
    leaves: bool = False
    keeps: str = ""
    direct: bool = False
    defines: tuple[str, ...] = ()
    filtered: bool = False


FUNCTIONS = (
    Function("cmp_and_merge_page", ("cmp_and_merge_page",), (2,), enters=True),
    Function("stable_tree_search", ("stable_tree_search",), (1,), enters=True, leaves=True),
    Function(
        "try_to_merge_one_page",
        ("try_to_merge_one_page",),
        (3,),
        enters=True,
        leaves=True,
        keeps="call",
    ),
    Function(
        "try_to_merge_with_ksm_page",
        ("try_to_merge_with_ksm_page",),
        (3,),
        enters=True,
        leaves=True,
    ),
    Function("break_ksm", ("break_ksm",), (2, 3, 4), leaves=True, keeps="call"),
    Function(
        "ksm_migrate_page",
        ("folio_migrate_ksm", "ksm_migrate_page"),
        (2,),
        enters=True,
        leaves=True,
        keeps="noted",
    ),
    Function(
        "get_ksm_page",
        ("ksm_get_folio", "get_ksm_page"),
        (2,),
        enters=True,
        leaves=True,
        direct=True,
    ),
    Function(
        "remove_rmap_item_from_tree",
        ("remove_rmap_item_from_tree",),
        (1,),
        enters=True,
        leaves=True,
        direct=True,
    ),
    Function("remove_node_from_stable_tree", ("remove_node_from_stable_tree",), (1,), enters=True),
    Function("stable_tree_append", ("stable_tree_append",), (3,), enters=True),
    Function("alloc_stable_node_chain", ("alloc_stable_node_chain",), (2,), leaves=True),
    Function(
        "stable_node_dup",
        ("stable_node_dup", "__stable_node_chain"),
        (4,),
        enters=True,
        leaves=True,
        keeps="noted",
    ),
    Function("run_store", ("run_store",), (4,), enters=True, leaves=True, keeps="call"),
    Function(
        "ksm_next_page_pmd_entry",
        ("ksm_next_page_pmd_entry",),
        (4,),
        leaves=True,
        direct=True,
        defines=("KSMD_PID", "MM_WALK_MM", "MM_WALK_PRIVATE", "NEXT_PAGE_PAGE", "NEXT_PAGE_ADDR"),
    ),
    Function("__ksm_enter", ("__ksm_enter",), (1,), leaves=True),
    Function("__ksm_exit", ("__ksm_exit",), (1,), leaves=True, keeps="call"),
    Function("lru_add_drain_all", ("lru_add_drain_all",), (0,), enters=True),
    Function("write_protect_page", ("write_protect_page",), (3,), leaves=True, direct=True),
    Function(
        "mm_find_pmd", ("mm_find_pmd",), (2,), enters=True, direct=True, defines=("KSMD_PID",)
    ),
    Function(
        "__folio_lock",
        ("__folio_lock", "__lock_page"),
        (1,),
        enters=True,
        leaves=True,
        keeps="noted",
        defines=("PAGE_MAPPING",),
    ),
    Function("rmap_walk_ksm", ("rmap_walk_ksm",), (2,), enters=True, leaves=True, keeps="call"),
    Function("ksm_memory_callback", ("ksm_memory_callback",), (3,), leaves=True, keeps="call"),
    *(
        Function(name, (name,), arguments, enters=True, leaves=True, keeps="noted")
        for name, arguments in (
            ("__mutex_lock_slowpath", (1,)),
            ("rwsem_down_read_slowpath", (2, 3)),
            ("rwsem_down_write_slowpath", (2,)),
        )
    ),
    Function(
        "do_wp_page",
        ("do_wp_page",),
        (1,),
        enters=True,
        leaves=True,
        keeps="noted",
        filtered=True,
    ),
    Function("ksm_might_need_to_copy", ("ksm_might_need_to_copy",), (3,), leaves=True),
    Function("break_cow", ("break_cow",), (1,), leaves=True, keeps="call"),
    Function(
        "try_to_migrate", ("try_to_migrate", "try_to_unmap"), (2,), enters=True, filtered=True
    ),
    Function(
        "split_huge_page_to_list",
        (
            "__split_huge_page_to_list_to_order",
            "split_huge_page_to_list_to_order",
            "split_huge_page_to_list",
        ),
        (2, 3),
        enters=True,
        leaves=True,
        keeps="noted",
    ),
)

FUNCTION_BY_BODY = {function.body: function for function in FUNCTIONS}


@dataclass(frozen=True)
class Hook:
    """One way to catch an event without a tracepoint of its own.

    Attributes:
        rung: FENTRY (and if that is not to be had KPROBE) for programs on the function that the
            event is about; TRACEPOINT for tracepoints of other groups; SITE; WATCHPOINT; or
            DERIVED.
        functions: bodies of all functions that it takes; the event is named after the first.
        sites: functions that were inlined, and at whose beginning the recipe places a program.
        defines: C defines without which it does not work, beside those of its functions.
        kinds: kinds of event before this one on whose hook it builds, so that they must be caught.
        page_fields: fields that it fills from a struct page.
        page_functions: functions that tell the page where a site or a watchpoint does not, for
            every page's event.
        lacks: fields that it never fills, with the reason.
        optional: bodies of functions without which it works as well, and the fields that it then
            does not fill; those that can be reached get a C define WITH_BODY.
        tracepoints: raw tracepoints that it takes, by name, and the numbers of arguments with
            which their program on_NAME understands them.
        switches: C defines that tell the programs that this hook was taken.
        watches: the variable whose writes it takes: a key of
            :data:`ksmtrace.capture.plan.WATCHED`.
        builds_on: switches of hooks before, without which it sees nothing.
        every_page: it costs ksmd about as much as the events of every page, and is taken only
            where these are asked for: what is said where they are not; "" for the others.
        tells_skips: it must tell the pages that smart scan skips from others.
        how: in words, for the plan's reason.
    """

    rung: str
    functions: tuple[str, ...] = ()
    sites: tuple[str, ...] = ()
    defines: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    page_fields: tuple[str, ...] = ()
    page_functions: tuple[str, ...] = ()
    lacks: Mapping[str, str] | None = None
    optional: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    tracepoints: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    switches: tuple[str, ...] = ()
    watches: str = ""
    builds_on: tuple[str, ...] = ()
    every_page: str = ""
    tells_skips: bool = False
    how: str = ""


_MERGING = ("try_to_merge_with_ksm_page",)
_PASS = ("KSMD_PID", "KSM_SCAN_ADDRESS", "KSM_SCAN_SEQNR", "KSM_RMAP_ITEMS_ADDRESS")
_SEARCH = ("get_ksm_page", *_MERGING)
_VISIT = ("ksm_next_page_pmd_entry", "remove_rmap_item_from_tree")
_VISIT_DEFINES = ("RMAP_ITEM_MM", "RMAP_ITEM_ADDRESS")
_SEARCH_DEFINES = ("KSMD_PID", "RMAP_ITEM_MM")
_VISITED = ("cmp_and_merge_page",)
_CURSOR = "ksm_scan.rmap_list"
_CURSOR_DEFINES = (
    *("KSMD_PID", "KSM_SCAN_ADDRESS", "KSM_SCAN_RMAP_LIST", "KSM_SCAN_MM_SLOT"),
    *("MM_SLOT_MM", "MM_SLOT_RMAP_LIST", "RMAP_ITEM_RMAP_LIST"),
    *("RMAP_ITEM_MM", "RMAP_ITEM_ADDRESS"),
)
_WATCHPOINT_ASKED = (
    "`record --every-page` sees it by a hardware watchpoint, which makes ksmd take about five "
    "times as long per page"
)
_PAGE_STATE = ("PAGE_FLAGS", "PAGE_REFCOUNT", "PAGE_MAPCOUNT", "PAGE_LRU")

HOOKS: Mapping[str, tuple[Hook, ...]] = {
    "ksm_start_scan": (
        Hook(
            DERIVED,
            ("lru_add_drain_all",),
            defines=_PASS,
            how="ksmd calls lru_add_drain_all where a pass begins",
        ),
    ),
    "ksm_stop_scan": (
        Hook(
            DERIVED,
            ("lru_add_drain_all",),
            defines=_PASS,
            tracepoints={"sched_switch": (3, 4)},
            how="ksm_scan.seqnr has risen when ksmd leaves its CPU",
        ),
    ),
    "ksm_enter": (Hook(FENTRY, ("__ksm_enter",), how="its exit with 0"),),
    "ksm_exit": (
        Hook(
            FENTRY,
            ("__ksm_exit",),
            how="its exit",
        ),
    ),
    "ksm_merge_one_page": (
        Hook(
            DERIVED,
            ("try_to_merge_one_page", *_MERGING, *_VISIT),
            defines=("VMA_MM", *_VISIT_DEFINES),
            page_fields=("pfn",),
            how="a call of try_to_merge_one_page that try_to_merge_with_ksm_page does not make",
        ),
    ),
    "ksm_merge_with_ksm_page": (
        Hook(FENTRY, _MERGING, defines=("RMAP_ITEM_MM",), page_fields=("pfn",), how="its exit"),
    ),
    "ksm_remove_ksm_page": (
        Hook(
            FENTRY,
            ("remove_node_from_stable_tree",),
            defines=("STABLE_NODE_KPFN",),
            how="its entry",
        ),
    ),
    "ksm_remove_rmap_item": (
        Hook(
            DERIVED,
            ("remove_node_from_stable_tree",),
            defines=("STABLE_NODE_KPFN", "STABLE_NODE_HLIST", "RMAP_ITEM_HLIST", "RMAP_ITEM_MM"),
            how="the stable_node's list of sharers when it is removed",
        ),
    ),
    "ksm_advisor": (),
    "try_to_merge_one_page": (
        Hook(
            FENTRY,
            ("try_to_merge_one_page", *_MERGING),
            defines=("VMA_MM",),
            page_fields=("pfn",),
            how="its exit",
        ),
    ),
    "break_ksm": (Hook(FENTRY, ("break_ksm",), defines=("VMA_MM",), how="its exit"),),
    "ksm_migrate_page": (
        Hook(
            FENTRY,
            ("ksm_migrate_page",),
            defines=("PAGE_MAPPING", "STABLE_NODE_KPFN"),
            page_fields=("pfn", "new_pfn"),
            how="its entry and exit",
        ),
    ),
    "cmp_and_merge_page": (
        Hook(
            FENTRY,
            ("cmp_and_merge_page",),
            defines=("RMAP_ITEM_MM",),
            page_fields=("pfn",),
            how="its entry",
        ),
        Hook(
            SITE,
            sites=("cmp_and_merge_page",),
            defines=("RMAP_ITEM_MM",),
            page_fields=("pfn",),
            page_functions=("ksm_next_page_pmd_entry",),
            how="where the compiler has inlined it",
        ),
        # Measured on 6.18 (docs/performance.md): a debug exception takes about 11 us.
        Hook(
            WATCHPOINT,
            defines=_CURSOR_DEFINES,
            page_fields=("pfn",),
            page_functions=("ksm_next_page_pmd_entry",),
            tracepoints={"sched_switch": (4,)},
            switches=("VISITS_WATCHED",),
            watches=_CURSOR,
            every_page=_WATCHPOINT_ASKED,
            tells_skips=True,
            how="ksmd has moved ksm_scan.rmap_list to the page's rmap_item, and smart scan did "
            "not skip it",
        ),
        Hook(
            DERIVED,
            _VISIT,
            defines=_VISIT_DEFINES,
            page_fields=("pfn",),
            switches=("VISITS_DERIVED",),
            tells_skips=True,
            lacks={
                "rmap_item": "unknown for a KSM page already in place, of which nothing more is "
                "seen"
            },
            how="ksmd found a page, and smart scan did not skip it",
        ),
    ),
    "stable_tree_search": (
        Hook(
            FENTRY,
            ("stable_tree_search", "get_ksm_page"),
            defines=_SEARCH_DEFINES,
            kinds=_VISITED,
            page_fields=("pfn",),
            how="its entry and exit",
        ),
        Hook(
            SITE,
            _SEARCH,
            sites=("stable_tree_search",),
            defines=_SEARCH_DEFINES,
            kinds=_VISITED,
            page_fields=("pfn",),
            how="where the compiler has inlined it; the outcome by the functions it calls",
        ),
        Hook(
            DERIVED,
            _SEARCH,
            defines=_SEARCH_DEFINES,
            kinds=_VISITED,
            page_fields=("pfn",),
            switches=("SEARCHES_DERIVED",),
            how="the stable_nodes that ksmd looks up; a search of an empty tree is not seen",
        ),
    ),
    "stable_tree_append": (
        Hook(
            FENTRY,
            ("stable_tree_append",),
            defines=("RMAP_ITEM_MM", "STABLE_NODE_KPFN", "STABLE_NODE_HLIST"),
            how="its entry",
        ),
    ),
    "remove_rmap_item_from_tree": (
        Hook(
            FENTRY,
            ("remove_rmap_item_from_tree", "remove_node_from_stable_tree"),
            defines=(
                *("RMAP_ITEM_ADDRESS", "RMAP_ITEM_HEAD", "RMAP_ITEM_MM"),
                *("STABLE_NODE_KPFN", "STABLE_NODE_HLIST"),
            ),
            how="its exit",
        ),
    ),
    "remove_node_from_stable_tree": (
        Hook(
            FENTRY,
            ("remove_node_from_stable_tree",),
            defines=("STABLE_NODE_KPFN", "STABLE_NODE_LENGTH", "STABLE_NODE_NID"),
            how="its entry",
        ),
    ),
    "stable_tree_insert": (
        Hook(
            DERIVED,
            ("stable_tree_append",),
            defines=(
                *("STABLE_NODE_KPFN", "STABLE_NODE_LENGTH", "STABLE_NODE_NID"),
                *("STABLE_NODE_HLIST", "STABLE_NODE_HLIST_DUP", "STABLE_NODE_HEAD"),
                "MIGRATE_NODES_ADDRESS",
            ),
            how="a stable_node without sharers gets one",
        ),
    ),
    "alloc_stable_node_chain": (
        Hook(
            FENTRY,
            ("alloc_stable_node_chain",),
            defines=("STABLE_NODE_KPFN", "STABLE_NODE_LENGTH", "STABLE_NODE_NID"),
            how="its exit",
        ),
    ),
    "free_stable_node_chain": (
        Hook(
            DERIVED,
            ("stable_node_dup",),
            defines=("STABLE_NODE_KPFN", "STABLE_NODE_LENGTH", "STABLE_NODE_NID"),
            how="the chain is another, or none, when the walk over its dups is done",
        ),
    ),
    "run_store": (Hook(FENTRY, ("run_store",), how="its exit"),),
    "merge_failure": (
        Hook(
            FENTRY,
            (*_MERGING, "try_to_merge_one_page", "write_protect_page"),
            defines=("RMAP_ITEM_MM", "VMA_MM", *_PAGE_STATE),
            optional={"split_huge_page_to_list": ("split_err",), "mm_find_pmd": ()},
            page_fields=("pfn",),
            how="its exit with an error, and what was called until then",
        ),
        Hook(
            DERIVED,
            defines=(*_PAGE_STATE, "MM_PGD", "PTE_PFN_MASK", "STRUCT_PAGE_BYTES"),
            kinds=("ksm_merge_with_ksm_page",),
            tracepoints={"ksm_merge_with_ksm_page": (5,)},
            switches=("FAILURES_AFTER_THE_FACT",),
            lacks={"split_err": "not all functions that a merge calls take programs here"},
            how="the page that is mapped there after a merge failed: its cause can only be "
            "inferred, and one that is over by then is not seen",
        ),
    ),
    "page_outcomes": (
        Hook(
            DERIVED,
            (
                *("remove_rmap_item_from_tree", "stable_tree_append", "try_to_merge_one_page"),
                *(*_MERGING, "run_store"),
            ),
            defines=("KSMD_PID", *_VISIT_DEFINES, "RMAP_ITEM_OLDCHECKSUM", *_PAGE_STATE),
            kinds=("cmp_and_merge_page", "stable_tree_search"),
            tells_skips=True,
            how="ksmd's visits, each judged by what was called and by what its rmap_item says "
            "afterwards",
        ),
    ),
    "should_skip_rmap_item": (
        Hook(
            WATCHPOINT,
            defines=("RMAP_ITEM_AGE", "RMAP_ITEM_REMAINING_SKIPS"),
            kinds=("cmp_and_merge_page",),
            watches=_CURSOR,
            builds_on=("VISITS_WATCHED",),
            every_page=_WATCHPOINT_ASKED,
            how="remaining_skips has become less when ksmd moves on from the page's rmap_item",
        ),
        Hook(
            DERIVED,
            ("remove_rmap_item_from_tree",),
            defines=("RMAP_ITEM_AGE", "RMAP_ITEM_REMAINING_SKIPS", "KSM_PAGES_SKIPPED_ADDRESS"),
            kinds=("cmp_and_merge_page", "stable_tree_search", "page_outcomes"),
            how="its entry in ksmd once ksm_pages_skipped has risen",
        ),
    ),
    "lock_wait": (
        Hook(
            TRACEPOINT,
            defines=("KSMD_PID",),
            optional={"__ksm_exit": ()},
            tracepoints={"contention_begin": (2,), "contention_end": (2,)},
            how="the slow paths of mutexes and rw_semaphores",
        ),
        Hook(
            DERIVED,
            (
                *("__mutex_lock_slowpath", "rwsem_down_read_slowpath"),
                "rwsem_down_write_slowpath",
            ),
            defines=("KSMD_PID", "KSM_THREAD_MUTEX_ADDRESS"),
            how="the functions of the slow paths; a mutex taken to be interrupted or killed has "
            "others",
        ),
    ),
    "lock_hold": (
        Hook(
            TRACEPOINT,
            defines=("KSMD_PID", "MM_MMAP_LOCK"),
            tracepoints={
                "mmap_lock_acquire_returned": (3,),
                "mmap_lock_released": (2,),
                "sched_switch": (4,),
            },
            switches=("HOLDS_OF_MMAP_LOCK",),
            every_page="it is taken with --every-page only",
            how="ksmd takes and releases an mmap_lock; wakes and sleeps",
        ),
        Hook(
            TRACEPOINT,
            defines=("KSMD_PID",),
            tracepoints={"sched_switch": (4,)},
            lacks={
                "lock_address": "holds of ksm_thread_mutex only: those of mmap_locks take record "
                "--every-page, and tracepoints that do not, as before 6.16, write out the path of "
                "a cgroup each time in every task of the system"
            },
            how="ksmd wakes and sleeps",
        ),
    ),
    "__folio_lock": (Hook(FENTRY, ("__folio_lock",), how="its entry and exit"),),
    "rmap_walk_ksm": (
        Hook(
            FENTRY,
            ("rmap_walk_ksm",),
            defines=("PAGE_MAPPING", "STABLE_NODE_LENGTH"),
            page_fields=("pfn",),
            how="its entry and exit",
        ),
    ),
    "ksm_memory_callback": (Hook(FENTRY, ("ksm_memory_callback",), how="its exit"),),
    "get_ksm_page": (
        Hook(
            FENTRY,
            ("get_ksm_page", "remove_node_from_stable_tree"),
            tracepoints={"sched_switch": (3, 4)},
            how="its entry and exit, while its task keeps the CPU",
        ),
    ),
    "do_wp_page": (
        Hook(
            FENTRY,
            ("do_wp_page", "break_ksm"),
            defines=(
                *("FAULT_VMA", "FAULT_ADDRESS", "FAULT_FLAGS", "FAULT_PTE", "VMA_MM"),
                *("PAGE_MAPPING", "PAGE_LRU", "PTE_PFN_MASK", "PTE_PRESENT", "PTE_DIRTY"),
                *("STRUCT_PAGE_BYTES", "VMEMMAP_BASE_ADDRESS"),
            ),
            how="its entry with the page table entry of a KSM page, and its exit",
        ),
    ),
    "ksm_might_need_to_copy": (
        Hook(
            FENTRY,
            ("ksm_might_need_to_copy",),
            defines=("VMA_MM",),
            page_fields=("pfn",),
            how="its exit with another page",
        ),
    ),
    "break_cow": (Hook(FENTRY, ("break_cow",), defines=("RMAP_ITEM_MM",), how="its exit"),),
    "remove_migration_ptes": (
        Hook(
            DERIVED,
            ("rmap_walk_ksm", "ksm_migrate_page", "try_to_migrate"),
            defines=("PAGE_MAPPING", "STABLE_NODE_LENGTH"),
            page_fields=("pfn", "new_pfn"),
            how="the first walk over all that mapped a KSM page after it has moved",
        ),
    ),
    "split_huge_page_to_list": (
        Hook(
            FENTRY,
            ("split_huge_page_to_list",),
            defines=("KSMD_PID",),
            page_fields=("pfn",),
            how="its entry and exit in ksmd",
        ),
    ),
}
"""Per kind of event the hooks, best first; the tracepoint of that name comes before them all."""

SITE_ARGUMENTS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "cmp_and_merge_page": (("page", "folio"), ("rmap_item",)),
    "stable_tree_search": (("page", "folio"), ()),
}
"""Per inlined function, the names that a recipe may give to the body's two arguments."""

COUNTS = (
    "cmp_and_merge_page",
    "smart_scan_skips",
    "stable_tree_search.none",
    "stable_tree_search.found",
    "stable_tree_search.same_page",
    "stable_tree_search.busy",
    "do_wp_page.zero_page",
)
"""What the kernel side only counts, in the order of its map ``counts``: what happens once per page
looked at, and writes to a zero page that KSM had put in place (which are no event, and which
cow_ksm leaves out)."""

HISTOGRAMS = ("visit_interval_ns", "search_nodes", "cow_ns", "break_ksm_ns", "get_ksm_page_ns")
"""Histograms of the kernel side: slot 0 counts 0, slot n values from 2^(n-1) to below 2^n.

The slot is bcc's ``bpf_log2l``, which is the number of bits.
"""

HISTOGRAM_SLOTS = 64

WAITED_BY: Mapping[Lock, str] = {Lock.FOLIO: "__folio_lock", Lock.REFCOUNT: "get_ksm_page"}
"""The kind of event that tells of waits for a lock; of the others lock_wait does."""

LOCK_SIDES = ("wait_ns", "hold_ns")
LOCK_TALLIES = ("times", "total", "worst")
LOCK_HISTOGRAMS = tuple(f"{side}.{lock.name.lower()}" for lock in Lock for side in LOCK_SIDES)
"""Of each lock the waits and the holds, in the order of the maps ``lock_histograms`` and, with one
of LOCK_TALLIES behind it, ``lock_tallies``."""


@dataclass(frozen=True)
class Attachment:
    """One program and where it goes.

    Attributes:
        how: ``raw_tracepoint``, ``fentry``, ``fexit``, ``kprobe``, ``kretprobe``, ``watchpoint``.
        target: the tracepoint, the function's name on this kernel, or the variable.
        offset: bytes into the function; 0 but for an inlined site.
        program: the program's name; for a fentry or fexit bcc's prefix goes before it.
        body: the function's name in bpf/; "" for a tracepoint's.
        text: the line of C that makes the program; "" for those that are written out.
        address: of the variable that is watched.
    """

    how: str
    target: str
    offset: int
    program: str
    body: str = ""
    text: str = ""
    address: int = 0
