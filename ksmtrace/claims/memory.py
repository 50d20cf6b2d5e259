"""What mm/ksm.c holds in kernel memory, and what is mapped, beside each other and the counters."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from ksmtrace.claims.claim import (
    Case,
    Claim,
    Evidence,
    Finding,
    Memory,
    Pages,
    holds,
    memories_at_rest,
    unknown,
    violated,
)
from ksmtrace.claims.rest import FOUR, arithmetic
from ksmtrace.claims.told import SHOWN, Check, tell
from ksmtrace.events import KIND_BY_NAME, of_kind
from ksmtrace.kernel.ksm_check import check_ksm_memory
from ksmtrace.kernel.ksm_memory import NodeKind
from ksmtrace.kernel.pages import KPF_BITS
from ksmtrace.kernel.witnesses import Cause, compare_witnesses
from ksmtrace.stream import Witnessed

# What ksm_check says where an rmap_item is marked for another unstable tree than it is in.
_OF_TREES = ("of this pass are in no tree", "of another pass are in a tree", "unstable trees lead")


def _was_stopped(case: Case, reading: Witnessed) -> bool | None:
    # A run=2 that fails leaves seqnr and the flags, and the next pass begins with empty trees
    # (mm/ksm.c:unmerge_and_remove_all_rmap_items, scan_get_next_rmap_item), until a pass ends.
    # None: it cannot be seen.
    if not case.recorded.can_see("run_store", "ksm_stop_scan"):
        return None
    marks = of_kind(case.recorded.events, "run_store", "ksm_stop_scan")
    marks = marks[marks["ts_ns"] <= reading.begin_ns]
    unmerges = (marks["kind"] == KIND_BY_NAME["run_store"].number) & (marks["run"] == 2)
    stopped = unmerges & (marks["err"] != 0)
    ends = (marks["kind"] == KIND_BY_NAME["ksm_stop_scan"].number) | (unmerges & ~stopped)
    last = np.flatnonzero(ends)[-1:]
    if stopped[last[0] if len(last) else 0 :].any():
        return True
    return False if len(last) else None


def _held(phrase: str | None, observed: str) -> Check:
    # Contradictions in kernel memory, of those that ksm_check looks for; phrase: only those.
    def check(case: Case) -> Finding:
        readings = memories_at_rest(case)
        wrong: list[Evidence] = []
        unsure: list[str] = []
        explained = items = nodes = 0
        for reading in readings:
            assert reading.memory is not None
            items = max(items, len(reading.memory.rmap_items))
            nodes = max(nodes, len(reading.memory.stable_nodes))
            for line in check_ksm_memory(reading.memory):
                if phrase is not None and phrase not in line:
                    continue
                stopped = any(one in line for one in _OF_TREES) and _was_stopped(case, reading)
                if stopped is None:
                    unsure.append(line)
                elif stopped:
                    explained += 1
                else:
                    wrong.append(Evidence("kernel memory", line, reading.begin_ns))
        if wrong:
            return violated(f"{len(wrong)} contradictions", *wrong[:SHOWN])
        if unsure:
            return unknown(f"{unsure[0]}: so it is after a run=2 that was stopped in a pass (D7)")
        if not items:
            return unknown("KSM held nothing at any reading of its memory")
        size = f"{len(readings)} readings, at most {items} rmap_items and {nodes} stable_nodes"
        of_stopped = (
            f"; {explained} of a run=2 that was stopped in a pass (D7)" if explained else ""
        )
        return holds(f"{observed}; {size}{of_stopped}")

    return check


def _check_mapped(case: Case) -> Finding:
    compared = 0
    for reading in memories_at_rest(case):
        if reading.pages is None or reading.memory is None:
            continue
        found = compare_witnesses(reading.memory, reading.pages)
        wrong = found[found["cause"] == Cause.CONTRADICTION]
        if len(wrong):
            return violated(
                f"{len(wrong)} places contradict",
                *(
                    Evidence(
                        "mapped pages",
                        f"pid {row['pid']} maps frame {row['pfn']} at {int(row['address']):#x}, "
                        f"and the stable_node of rmap_item {int(row['rmap_item']):#x} has kpfn "
                        f"{row['kpfn']}",
                        reading.begin_ns,
                    )
                    for row in wrong[:SHOWN]
                ),
            )
        compared += len(reading.memory.sharers)
    if not compared:
        return unknown("no sharer was there when kernel memory and mapped pages were both read")
    return holds(f"{compared} sharers beside what is mapped: every difference has its cause")


def _ksm_pages(case: Case) -> Iterator[tuple[Witnessed, npt.NDArray[np.void]]]:
    """Yield the mapped KSM pages of each reading.

    By KPF_KSM where it is truthful, else by the frames of the stable_nodes whose page is theirs,
    read while KSM rested.
    """
    at_rest = [id(reading) for reading in memories_at_rest(case)]
    for reading in case.recorded.witnessed:
        if reading.pages is None:
            continue
        pages = reading.pages.pages
        if reading.pages.kpf_ksm.truthful:
            yield reading, pages[pages["is_ksm"] == 1]
        elif reading.memory is not None and id(reading) in at_rest:
            nodes = reading.memory.stable_nodes
            yield reading, pages[np.isin(pages["pfn"], nodes["kpfn"][nodes["is_current"] == 1])]


_NO_KSM_PAGE = "no KSM page was seen, or neither KPF_KSM nor kernel memory tells them here"


def _check_anonymous(case: Case) -> Finding:
    wrong, seen = [], 0
    for reading, ksm in _ksm_pages(case):
        seen += len(ksm)
        other = ksm[ksm["kpageflags"] & np.uint64(1 << KPF_BITS["ANON"]) == 0]
        wrong += [
            Evidence(
                "mapped pages",
                f"pid {page['pid']} maps KSM frame {page['pfn']} at {int(page['address']):#x}, "
                "which is not anonymous",
                reading.begin_ns,
            )
            for page in other[:SHOWN]
        ]
    if wrong:
        return violated(f"{len(wrong)} KSM pages are not anonymous", *wrong)
    if not seen:
        return unknown(_NO_KSM_PAGE)
    return holds(f"{seen} mapped KSM pages, all anonymous")


def _check_swap_cache(case: Case) -> Finding:
    seen = cached = 0
    for _, ksm in _ksm_pages(case):
        seen += len(ksm)
        cached += int((ksm["kpageflags"] & np.uint64(1 << KPF_BITS["SWAPCACHE"]) != 0).sum())
    if not seen:
        return unknown(_NO_KSM_PAGE)
    observed = f"{cached} of {seen} mapped KSM pages"
    if not case.trials and 2 * cached >= seen:
        return unknown(f"{observed} are: what is common takes more than one machine's memory")
    evidence = Evidence("mapped pages", f"{observed} are in the swap cache")
    return tell(2 * cached < seen, observed, evidence)


def _check_remainder(case: Case) -> Finding:
    wrong, count = [], 0
    for reading in memories_at_rest(case):
        assert reading.memory is not None
        counters = reading.memory.counters
        values = [counters[f"ksm_{name}"] for name in (*FOUR[:3], "rmap_items")]
        shared, sharing, unshared, items = (int(value or 0) for value in values)
        count += 1
        if shared + sharing + unshared > items:
            says = f"{shared} + {sharing} + {unshared} in trees, {items} rmap_items"
            wrong.append((reading.begin_ns, "kernel memory", says))
    return arithmetic(wrong, count, "shared, sharing and unshared never more than ksm_rmap_items")


def _check_pinned_nodes(case: Case) -> Finding:
    singles = sharers = 0
    for reading in memories_at_rest(case)[-1:]:
        assert reading.memory is not None
        nodes = reading.memory.stable_nodes
        lengths = nodes["rmap_hlist_len"][nodes["kind"] != NodeKind.CHAIN]
        singles, sharers = int((lengths == 1).sum()), int((lengths > 0).sum())
    if not sharers:
        return unknown("no stable_node had sharers")
    return holds(f"{singles} of {sharers} stable_nodes have one sharer ({singles / sharers:.0%})")


CLAIMS = (
    Claim(
        ("Q4", "C54", "C55"),
        "Every rmap_item marked unstable carries the seqnr of this pass or of the last one; of "
        "this pass it is linked in an unstable tree",
        "000; mm/ksm.c:remove_rmap_item_from_tree",
        _held("older than the last pass", "no UNSTABLE rmap_item of age > 1"),
        needs=(Memory(),),
    ),
    Claim(
        ("Q3.flags", "Q3"),
        "No rmap_item in kernel memory is marked both stable and unstable",
        "mm/ksm.c:STABLE_FLAG, UNSTABLE_FLAG",
        _held("both STABLE and UNSTABLE", "none is both"),
        needs=(Memory(),),
    ),
    Claim(
        ("C01.code", "Q3.nodes"),
        "pages_shared is the number of stable_nodes, dups included, that have sharers",
        "mm/ksm.c:stable_tree_append, remove_rmap_item_from_tree",
        _held("ksm_pages_shared is", "equal at every reading"),
        needs=(Memory(),),
    ),
    Claim(
        ("C02.code", "Q3.items"),
        "pages_sharing is the number of rmap_items marked stable, less pages_shared",
        "mm/ksm.c:stable_tree_append",
        _held("ksm_pages_sharing is", "equal at every reading"),
        needs=(Memory(),),
    ),
    Claim(
        ("C07.code", "Q4.unshared", "C18"),
        "pages_unshared is the number of rmap_items marked unstable, those of the last pass "
        "included",
        "mm/ksm.c:unstable_tree_search_insert, remove_rmap_item_from_tree",
        _held("ksm_pages_unshared is", "equal at every reading"),
        needs=(Memory(),),
    ),
    Claim(
        ("C09", "Q1", "C04.code"),
        "pages_volatile is ksm_rmap_items less shared, sharing and unshared, which are never more",
        "002 P3; mm/ksm.c:pages_volatile_show",
        _check_remainder,
        needs=(Memory(),),
    ),
    Claim(
        ("Q3.hlist",),
        "stable_node->rmap_hlist_len is the length of the node's hlist",
        "mm/ksm.c:stable_tree_append, remove_rmap_item_from_tree",
        _held("rmap_hlist_len", "equal for every stable_node"),
        needs=(Memory(),),
    ),
    Claim(
        ("6D",),
        "The structures of mm/ksm.c in kernel memory contradict neither each other nor counters",
        "mm/ksm.c:all; see ksmtrace/kernel/ksm_check.py",
        _held(None, "no contradiction in kernel memory"),
        needs=(Memory(),),
    ),
    Claim(
        ("D5", "R5"),
        "Whatever differs between what KSM holds and what is mapped has a cause: exit, write, "
        "unmap, fork, a merge that was undone",
        "derived",
        _check_mapped,
        needs=(Memory(), Pages()),
    ),
    Claim(
        ("C43",),
        "KSM merges anonymous pages only, never page cache",
        "admin guide; mm/ksm.c:cmp_and_merge_page, folio_test_anon",
        _check_anonymous,
        needs=(Pages(),),
    ),
    Claim(
        ("C106",),
        "That a KSM page is in the swap cache is the less common case",
        "003",
        _check_swap_cache,
        needs=(Pages(),),
    ),
    Claim(
        ("C66",),
        "Stable nodes with a single sharer are not a significant proportion",
        "002 P4",
        _check_pinned_nodes,
        needs=(Memory(),),
        defined="a number to read, not a limit: they stay until ksmd finds them stale (C65)",
    ),
)
"""The claims of this topic."""
