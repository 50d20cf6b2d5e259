"""The ladder: by which hooks each event can be caught, best first. Tables, and nothing else.

A function of mm/ksm.c has one body in bpf/functions.c, whichever way it is reached; an event
comes from one or more of these bodies. What the kernel has decides which hook is taken
(:mod:`ksmtrace.capture.plan`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

TRACEPOINT = "tracepoint"
FENTRY = "fentry"
KPROBE = "kprobe"
SITE = "inlined site"
DERIVED = "derived"
ABSENT = "absent"

RUNGS: Mapping[str, str] = {
    TRACEPOINT: "a raw tracepoint program",
    FENTRY: "a program on a function's entry or exit, by BTF and trampoline",
    KPROBE: "the same by a kprobe or kretprobe",
    SITE: "a kprobe where the function was inlined, by a recipe for this very build",
    DERIVED: "from other functions that can be seen",
    ABSENT: "not at all",
}
"""The rungs, best first."""


@dataclass(frozen=True)
class Function:
    """A function that programs are put on.

    Attributes:
        body: its name in bpf/functions.c: ``enter_BODY`` and ``leave_BODY``.
        names: what it is called in kernels, newest first.
        enters: whether it has a body for its entry.
        leaves: whether it has one for its exit.
        keeps: whether the exit needs to know the entry: ``call`` the time and note of every
            call, ``noted`` only of those that the entry's body has a note for, ``""`` nothing.
        arguments: the numbers of arguments that the bodies understand.
        direct: called so often that a program of fentry or fexit reads its arguments in place;
            then the bodies must not compute with pointers among them.
        defines: C defines without which the bodies see nothing.
    """

    body: str
    names: tuple[str, ...]
    arguments: tuple[int, ...]
    enters: bool = False
    leaves: bool = False
    keeps: str = ""
    direct: bool = False
    defines: tuple[str, ...] = ()


FUNCTIONS = (
    Function("cmp_and_merge_page", ("cmp_and_merge_page",), (2,), enters=True),
    Function("stable_tree_search", ("stable_tree_search",), (1,), enters=True, leaves=True),
    Function("try_to_merge_one_page", ("try_to_merge_one_page",), (3,), leaves=True, keeps="call"),
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
    Function("get_ksm_page", ("ksm_get_folio", "get_ksm_page"), (2,), leaves=True, direct=True),
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
    Function("__ksm_exit", ("__ksm_exit",), (1,), leaves=True),
    Function("lru_add_drain_all", ("lru_add_drain_all",), (0,), enters=True),
)

FUNCTION_BY_BODY = {function.body: function for function in FUNCTIONS}


@dataclass(frozen=True)
class Hook:
    """One way to catch an event without a tracepoint of its own.

    Attributes:
        rung: FENTRY (and if that is not to be had KPROBE) for programs on the function that the
            event is about; SITE; or DERIVED.
        functions: bodies of all functions that it takes; the event is named after the first.
        sites: functions that were inlined, and at whose beginning the recipe places a program.
        defines: C defines without which it does not work, beside those of its functions.
        kinds: kinds of event before this one on whose hook it builds, so that they must be caught.
        page_fields: fields that it fills from a struct page.
        page_functions: functions that tell the page where a site does not, for every page's event.
        lacks: fields that it never fills, with the reason.
        tracepoints: raw tracepoints that it takes besides, by the name of their program.
        switches: C defines that tell the programs that this hook was taken.
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
    tracepoints: tuple[str, ...] = ()
    switches: tuple[str, ...] = ()
    how: str = ""


_MERGING = ("try_to_merge_with_ksm_page",)
_PASS = ("KSMD_PID", "KSM_SCAN_ADDRESS", "KSM_SCAN_SEQNR", "KSM_RMAP_ITEMS_ADDRESS")
_SEARCH = ("get_ksm_page", *_MERGING)
_VISIT = ("ksm_next_page_pmd_entry", "remove_rmap_item_from_tree")
_VISIT_DEFINES = ("RMAP_ITEM_MM", "RMAP_ITEM_ADDRESS")
_SEARCH_DEFINES = ("KSMD_PID", "RMAP_ITEM_MM")
_VISITED = ("cmp_and_merge_page",)

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
            tracepoints=("sched_switch",),
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
        Hook(
            DERIVED,
            _VISIT,
            defines=_VISIT_DEFINES,
            page_fields=("pfn",),
            switches=("VISITS_DERIVED",),
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
)
"""What the kernel side counts once per page looked at, in the order of its map ``counts``."""

HISTOGRAMS = ("visit_interval_ns", "search_nodes")
"""Histograms of the kernel side: slot 0 counts 0, slot n values from 2^(n-1) to below 2^n.

The slot is bcc's ``bpf_log2l``, which is the number of bits.
"""

HISTOGRAM_SLOTS = 64


@dataclass(frozen=True)
class Attachment:
    """One program and where it goes.

    Attributes:
        how: ``raw_tracepoint``, ``fentry``, ``fexit``, ``kprobe``, ``kretprobe``.
        target: the tracepoint, or the function's name on this kernel.
        offset: bytes into the function; 0 but for an inlined site.
        program: the program's name; for a fentry or fexit bcc's prefix goes before it.
        body: the function's name in bpf/functions.c; "" for a tracepoint's.
        text: the line of C that makes the program; "" for a tracepoint's, which are written out.
    """

    how: str
    target: str
    offset: int
    program: str
    body: str = ""
    text: str = ""
