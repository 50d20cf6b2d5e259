"""The one declaration of the events: kinds, fields, and the 56-byte payload.

The numpy dtype, the C header ``bpf/events.h`` and ``docs/events.md`` come from the tables here
(``scripts/generate`` writes the two files; a test fails where they are stale).

Every event is one payload of 56 bytes; with the ring buffer's 8-byte record header it fills a
slot of 64 bytes. A field has one offset whatever the kind, so the payload is a struct with a
union per word, and a kind is the set of fields that it fills.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

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


_DTYPES = {"u64": "<u8", "s64": "<i8", "u32": "<u4", "s32": "<i4", "s16": "<i2", "u8": "u1"}

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
    Field("run", 16, "u32", "what was written to /sys/kernel/mm/ksm/run"),
    Field("nid", 20, "s32", "stable_node.nid: NUMA node of the tree that it is in"),
    Field("kpfn_before", 16, "u64", "stable_node.kpfn when the function was called"),
    Field("rmap_item", 24, "u64", "address of the rmap_item; 0: unknown"),
    Field("kpfn_after", 24, "u64", "stable_node.kpfn when the function returned"),
    Field(
        "chain",
        24,
        "u64",
        "address of the chain's stable_node; 0: in no chain, or not found behind 16 other dups",
    ),
    Field("task_pid", 24, "u32", "tgid of the task in whose context the event happened"),
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
    Field("pfn", 40, "u64", "page frame number: of the KSM page (kpfn), or of the page looked at"),
    Field("end_address", 40, "u64", "end of the range; 0 where the kernel goes page by page"),
    Field("ksm_merging_pages", 40, "u64", "mm_struct.ksm_merging_pages at the event"),
    Field("ksm_page", 48, "u64", "struct page of the stable page to merge with; 0: none yet"),
    Field("ksm_rmap_items", 48, "u64", "mm_struct.ksm_rmap_items at the event"),
    Field("stable_node", 48, "u64", "address of the stable_node; 0: none yet"),
    Field("duration_ns", 48, "u64", "from the function's entry to its exit; 0: unknown"),
    Field("outcome", 48, "u32", "SearchOutcome"),
    Field("flags_before", 48, "u32", "the low 12 bits of rmap_item.address when the visit began"),
    Field("checksum_changed", 52, "u32", "1: rmap_item.oldchecksum is another than at the begin"),
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


def concatenate(batches: Sequence[Events]) -> Events:
    """Join batches to one array, shape (n,), of :data:`EVENT_DTYPE`.

    numpy's own concatenate would lay the overlapping fields out anew, one behind the other.
    """
    raw = f"V{PAYLOAD_BYTES}"
    if not batches:
        return no_events()
    joined: Events = np.concatenate([batch.view(raw) for batch in batches]).view(EVENT_DTYPE)
    return joined


def of_kind(events: Events, *names: str) -> Events:
    """Select the events of the named kinds, in order; a copy of shape (m,)."""
    numbers = [KIND_BY_NAME[name].number for name in names]
    selected: Events = events[np.isin(events["kind"], numbers)]
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
        f"#define COMM_BYTES {COMM_BYTES}",
        "",
        "struct ksm_event {",
        *(f"\t{field.c_type} {field.name};" for field in HEAD),
        "\tunion {",
        "\t\tu64 body[5];",
    ]
    for field in BODY:
        pad = (field.offset - BODY_OFFSET) // 4
        member = (
            f"char {field.name}[COMM_BYTES]"
            if field.c_type == "comm"
            else (f"{field.c_type} {field.name}")
        )
        # Padded in u32 and not packed: a packed member would be stored byte by byte.
        lines.append(
            f"\t\tstruct {{ {f'u32 pad_{field.name}[{pad}]; ' if pad else ''}{member}; }};"
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
        "`cmp_and_merge_page` and `stable_tree_search` happen for every page that ksmd looks at: "
        "the kernel side counts them, and `record --every-page` streams them as well.",
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
        "## Fields of the body",
        "",
        "| offset | field | type | meaning |",
        "|---|---|---|---|",
        *(f"| {f.offset} | `{f.name}` | {f.c_type} | {f.meaning} |" for f in BODY),
    ]
    return "\n".join(lines) + "\n"


def _code_list(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "–"
