"""KSM pages that move to other frames."""

from __future__ import annotations

import numpy as np

from ksmtrace.analysis.migrations import nodes_of
from ksmtrace.claims.claim import (
    Case,
    Claim,
    Evidence,
    Exercised,
    File,
    Finding,
    holds,
    unknown,
    violated,
)
from ksmtrace.claims.told import (
    changed,
    during,
    frames,
    judge_changes,
    judge_steps,
    noted,
    program,
    tell,
)
from ksmtrace.workload.trial import Trial


def _check_moved(case: Case) -> Finding:
    trial = case.trials["moved"]
    reading = trial.at("moved")
    there, back = reading.notes["status"]
    if set(reading.notes.get("first", [None])) != {0} and not reading.notes["moved_frames"]:
        return unknown("the pages were not on the first NUMA node before")
    evidence = [program(reading, "status", "moved_frames", "distinct"), frames(reading)]
    observed = f"{reading.notes['moved_frames']} of 7 KSM pages have another frame"
    if case.recorded.can_see("ksm_migrate_page"):
        moves = during(case, "moved", "ksm_migrate_page")
        evidence.append(Evidence("events", f"{len(moves)} of ksm_migrate_page"))
    # A shared page is moved once, for all that map it.
    moved = set(there) == {1} and set(back) == {0} and reading.notes["moved_frames"] == 7
    return tell(moved, observed, *evidence)


def _check_still_shared(case: Case) -> Finding:
    trial = case.trials["moved"]
    distinct = trial.at("moved").notes["distinct"]
    shared = trial.change("rescanned", "pages_shared"), trial.change("rescanned", "pages_sharing")
    evidence = (program(trial.at("moved"), "distinct"), frames(trial.at("rescanned")))
    observed = f"{distinct[0]} frames before, {distinct[1]} after; shared {shared[0]}, {shared[1]}"
    kept = distinct[0] == distinct[1] == 7 and shared == (7, 84)
    return tell(kept, observed, *evidence)


def _check_nodes_apart(case: Case) -> Finding:
    trial = case.trials["nodes"]
    reading = trial.at("merged")
    if reading.notes["nodes"] != [[0], [1]]:
        return unknown("the pages of the two processes are not on a NUMA node each")
    return judge_changes(trial, "merged", {"pages_shared": 14, "pages_sharing": 168})


def _check_wrong_tree(case: Case) -> Finding:
    trial = case.trials["nodes"]
    if set(trial.at("moved").notes["status"]) != {1}:
        return unknown("the pages were not moved to the other node")
    counts = []
    for label in ("merged", "moved", "rescanned"):
        number = _nr_in_wrong_tree(case, trial, label)
        if number is None:
            return unknown("kernel memory was not read, or not which frames a NUMA node has")
        counts.append(number)
    evidence = Evidence(
        "kernel memory", f"stable_nodes on another node than their tree: {counts}", trial.end_ns
    )
    observed = f"{counts[0]} before, {counts[1]} after the move, {counts[2]} once ksmd has been by"
    return tell(counts == [0, 7, 0], observed, evidence)


def _nr_in_wrong_tree(case: Case, trial: Trial, label: str) -> int | None:
    end_ns = trial.at(label).end_ns
    for reading in case.recorded.witnessed:
        if reading.memory is None or not trial.at(label).begin_ns <= reading.begin_ns <= end_ns:
            continue
        nodes = reading.memory.stable_nodes
        nodes = nodes[(nodes["is_current"] == 1) & (nodes["rmap_hlist_len"] > 0)]
        where = nodes_of(case.facts.get("node_pages") or {}, nodes["kpfn"])
        return None if (where < 0).any() else int((where != nodes["nid"]).sum())
    return None


def _check_offlined(case: Case) -> Finding:
    trial = case.trials["offline"]
    reading = trial.at("offline")
    blocks, block_pages = reading.notes["blocks"], reading.notes["block_pages"]
    evidence = [program(trial.at("merged"), "inside"), program(reading, "inside", "blocks")]
    wrong = []
    if reading.notes["inside"]:
        wrong.append(f"{reading.notes['inside']} KSM pages are in memory that is offline")
    seen = 0
    for read in case.recorded.witnessed:
        if read.memory is None or not reading.begin_ns <= read.begin_ns <= reading.end_ns:
            continue
        nodes = read.memory.stable_nodes
        seen += len(nodes)
        inside = np.isin(nodes["kpfn"] // np.uint64(block_pages), np.array(blocks, np.uint64))
        inside &= nodes["kpfn"] != 0
        if inside.any():
            wrong.append(f"{inside.sum()} stable_nodes have a kpfn in memory that is offline")
            evidence += [
                Evidence("kernel memory", f"stable_node {address:#x} has kpfn {kpfn}")
                for address, kpfn in nodes[inside][["stable_node", "kpfn"]][:5].tolist()
            ]
    if wrong:
        return violated("; ".join(wrong), *evidence)
    if not seen:
        return unknown("kernel memory was not read")
    moved = trial.at("merged").notes["inside"]
    return holds(f"{moved} KSM pages moved out; none of {seen} stable_nodes stayed", *evidence)


def _check_offline_shared(case: Case) -> Finding:
    trial = case.trials["offline"]
    reading = trial.at("offline")
    if len(set(reading.notes["digests"])) != 1:
        return violated("another content", program(reading, "digests"))
    expected = {"pages_shared": 7, "pages_sharing": 84}
    steps = {"offline": expected, "rescanned": expected}
    return judge_steps(trial, steps, "7 KSM pages with 91 places, their contents as before")


_NODES = (Exercised("nodes"),)
_OFFLINE = (Exercised("offline"),)

CLAIMS = (
    Claim(
        ("C109.apart",),
        "merge_across_nodes 0: ksm merges only pages which physically reside in the memory area "
        "of the same NUMA node",
        "Documentation/admin-guide/mm/ksm.rst; mm/ksm.c:get_kpfn_nid",
        _check_nodes_apart,
        applies=(File("merge_across_nodes"),),
        needs=_NODES,
    ),
    Claim(
        ("C109", "R19"),
        "With merge_across_nodes 0, the stable_node of a KSM page that moves to another NUMA node "
        "is in the tree of the node it was on, until ksmd comes by",
        "003; mm/ksm.c:stable_tree_search, migrate_nodes",
        _check_wrong_tree,
        applies=(File("merge_across_nodes"),),
        needs=_NODES,
    ),
    Claim(
        ("C109.collision", "DOC7.nodes"),
        "A KSM page that comes to a node that has its content already stays, as a dup beside the "
        "other: a chain, though max_page_sharing was not reached",
        "mm/ksm.c:stable_tree_search (chain_append)",
        changed(
            "nodes",
            "rescanned",
            pages_shared=14,
            pages_sharing=168,
            stable_node_chains=7,
            stable_node_dups=14,
        ),
        applies=(File("merge_across_nodes"),),
        needs=_NODES,
    ),
    Claim(
        ("DOC24.nodes",),
        "merge_across_nodes can be changed only when there are no ksm shared pages",
        "Documentation/admin-guide/mm/ksm.rst; mm/ksm.c:merge_across_nodes_store",
        noted("nodes", "merged", "errno", "EBUSY", "writing it answered"),
        applies=(File("merge_across_nodes"),),
        needs=_NODES,
    ),
    Claim(
        ("C108", "R20"),
        "Memory that goes offline leaves no stable_node with a frame in it",
        "003; mm/ksm.c:ksm_memory_callback, ksm_check_stable_tree",
        _check_offlined,
        needs=_OFFLINE,
    ),
    Claim(
        ("C101.shared",),
        "KSM pages move out of memory that goes offline, and keep sharers and content",
        "003; mm/ksm.c:folio_migrate_ksm",
        _check_offline_shared,
        needs=_OFFLINE,
    ),
    Claim(
        ("C100",),
        "KSM pages can be migrated, and so do not block compaction",
        "003; mm/migrate.c",
        _check_moved,
        needs=(Exercised("moved"),),
    ),
    Claim(
        ("C100.shared",),
        "A KSM page that migrates keeps its sharers and its stable_node",
        "003; mm/ksm.c:folio_migrate_ksm",
        _check_still_shared,
        needs=(Exercised("moved"),),
    ),
    Claim(
        ("C101",),
        "Memory hotremove holds ksm_thread_mutex across all migrations",
        "003",
        not_testable="said of code that is gone: KSM_RUN_OFFLINE and wait_while_offlining",
    ),
    Claim(
        ("C110",),
        "smp_read_barrier_depends is needed on Alpha",
        "003",
        not_testable="said of an architecture that no recording is of",
    ),
    Claim(
        ("C111",),
        "THP and compaction exercise migration within a node, not necessarily across nodes",
        "003 (Mel Gorman)",
        not_testable="of tests of that time; the report has the routes of each migration",
    ),
    Claim(
        ("C104", "C105", "C112"),
        "ksm_get_folio looks again where kpfn changed, and spins where the refcount is frozen",
        "003; mm/ksm.c:ksm_get_folio",
        not_testable="the window is a few instructions wide, and no event tells of a retry; that "
        "no live node is lost is D5",
    ),
)
"""The claims of this topic."""
