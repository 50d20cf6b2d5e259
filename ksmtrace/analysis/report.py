"""Puts a recording's whole report together, in the form that ``--json`` prints."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd

from ksmtrace.analysis import findings
from ksmtrace.analysis.books import balance
from ksmtrace.analysis.calls import Calls, find_calls
from ksmtrace.analysis.merges import df_rates, find_merges, find_zero_merges
from ksmtrace.analysis.migrations import Migrations, find_migrations
from ksmtrace.analysis.passes import df_passes
from ksmtrace.analysis.processes import Process, find_processes
from ksmtrace.analysis.recorded import Recorded, has_flag
from ksmtrace.analysis.sharers import find_sharers
from ksmtrace.analysis.unmerges import find_unmerges
from ksmtrace.analysis.visits import Histogram, Visits, find_visits
from ksmtrace.events import KINDS, EventFlag, of_kind


def make_report(recorded: Recorded) -> dict[str, Any]:
    """Return the report as plain JSON types; None stands for what was not observable.

    The keys are documented in docs/report.md.
    """
    merges = find_merges(recorded)
    passes = df_passes(recorded)
    books = balance(recorded)
    processes = find_processes(recorded)
    visits = find_visits(recorded)
    calls = find_calls(recorded)
    unmerges = find_unmerges(recorded)
    migrations = find_migrations(recorded)
    incomplete = recorded.why_incomplete()
    trailer = recorded.trailer
    sees_merges = recorded.can_see("ksm_merge_with_ksm_page")
    return {
        "complete": not incomplete,
        "incomplete_because": incomplete,
        "lost": sum(recorded.lost().values()),
        "lost_by_kind": recorded.lost(),
        "kernel": recorded.header.facts.get("kernel"),
        "command_line": recorded.header.command_line,
        "started_realtime_ns": recorded.header.started_realtime_ns,
        "duration_ns": recorded.end_ns() - recorded.header.started_ns,
        "ended_because": trailer.reason if trailer else None,
        "command_exit_status": trailer.command_exit_status if trailer else None,
        "findings": findings.find(recorded, merges, passes, books, calls, migrations),
        "events": _events(recorded),
        "rungs": {kind.name: recorded.rung(kind.name) for kind in KINDS},
        "scans": _scans(recorded, passes),
        "visits": _visits(visits) if visits else None,
        "merges": _merges(recorded) if sees_merges else None,
        "removals": _removals(recorded, processes),
        "unmerges": asdict(unmerges) if unmerges else None,
        "migrations": _migrations(migrations) if migrations else None,
        "zero_pages": _zero_pages(recorded),
        "trees": _trees(recorded),
        "contention": None,
        "rates": df_rates(recorded).to_dict("records"),
        "processes": [_process(process, processes) for process in processes],
        "counters": [asdict(entry) for entry in books],
        "calls": {name: _call(call) for name, call in calls.items()} if calls else None,
        "ksmd": _ksmd(recorded),
        "not_visible": [
            {"what": what, "why": why, "would_change": change}
            for what, why, change in recorded.header.unseen
        ],
    }


def _events(recorded: Recorded) -> dict[str, int | None]:
    """Count per kind; None where it was not caught, or only counted, or is younger."""
    counts = recorded.counts()
    return {
        kind.name: counts.get(kind.name)
        if recorded.can_see(kind.name) and not recorded.only_counted(kind.name)
        else None
        for kind in KINDS
    }


def _scans(recorded: Recorded, passes: pd.DataFrame) -> dict[str, Any] | None:
    if not recorded.can_see("ksm_start_scan", "ksm_stop_scan"):
        return None
    whole = passes.dropna(subset=["duration_ns"])
    cpu_s = whole["cpu_ns"].sum() / 1e9
    return {
        "passes": [
            {key: None if pd.isna(value) else int(value) for key, value in row.items()}
            for row in passes.to_dict("records")
        ],
        "completed": len(whole),
        "median_duration_ns": int(whole["duration_ns"].median()) if len(whole) else None,
        "longest_duration_ns": int(whole["duration_ns"].max()) if len(whole) else None,
        "pages_per_cpu_second": (
            float(whole["rmap_entries"].sum() / cpu_s) if cpu_s and len(whole) else None
        ),
    }


def _merges(recorded: Recorded) -> dict[str, Any]:
    merges = find_merges(recorded)
    attempts, succeeded = len(merges.events), int(merges.appended.sum())
    known = attempts and not recorded.lost().get("ksm_merge_with_ksm_page")
    return {
        "attempts": attempts,
        "succeeded": succeeded,
        "failed": merges.by_reason(),
        "success_rate": succeeded / attempts if known else None,
        "new_stable_nodes": int(merges.pairs.sum()),
    }


def _removals(recorded: Recorded, processes: list[Process]) -> dict[str, Any]:
    freed = of_kind(recorded.events, "ksm_remove_ksm_page")
    pids, counts = np.unique(freed["pid"], return_counts=True)
    return {
        "stable_nodes_freed": len(freed) if recorded.can_see("ksm_remove_ksm_page") else None,
        "sharers_removed_with_node": (
            recorded.count("ksm_remove_rmap_item")
            if recorded.can_see("ksm_remove_rmap_item")
            else None
        ),
        "freed_by_pid": {str(pid): int(n) for pid, n in zip(pids, counts, strict=True)},
        "single_removals": _single_removals(recorded, processes),
    }


def _single_removals(recorded: Recorded, processes: list[Process]) -> dict[str, Any] | None:
    """Tell of the sharers that left a node which stayed."""
    if not recorded.can_see("remove_rmap_item_from_tree"):
        return None
    left = find_sharers(recorded).left_singly
    by_pid: Counter[str] = Counter()
    for process in processes:
        if process.left_singly_pages:
            by_pid[str(process.pid)] += process.left_singly_pages
    return {
        "sharers": len(left),
        "last_of_their_node": int(has_flag(left, EventFlag.LAST_SHARER).sum()),
        "by_pid": dict(by_pid.most_common()),
    }


def _visits(visits: Visits) -> dict[str, Any]:
    return {
        "rungs": dict(visits.rungs),
        "pages": visits.pages,
        "smart_scan_skips": visits.smart_scan_skips,
        "searches": visits.searches,
        "visit_interval_ns": _histogram(visits.interval_ns),
        "search_nodes": _histogram(visits.search_nodes),
    }


def _histogram(histogram: Histogram | None) -> dict[str, Any] | None:
    if histogram is None:
        return None
    return {
        "slots": [
            {"from": first, "below": below, "count": count}
            for first, below, count in histogram.slots
        ],
        "median": list(histogram.median),
        "p99": list(histogram.p99),
    }


def _call(call: Calls) -> dict[str, Any]:
    return {
        "entered": call.entered,
        "returned": call.returned,
        "missed": call.missed,
        "results": call.results,
        "duration": asdict(call.duration) if call.duration else None,
    }


def _migrations(migrations: Migrations) -> dict[str, Any]:
    content = asdict(migrations)
    for mover in content["busiest"]:
        mover["stable_node"] = f"{mover['stable_node']:#x}"
    return content


def _zero_pages(recorded: Recorded) -> dict[str, Any] | None:
    if not recorded.can_see("ksm_merge_one_page"):
        return None
    events, succeeded = find_zero_merges(recorded)
    return {
        "attempts": len(events),
        "succeeded": int(succeeded.sum()),
        "failed": int((~succeeded).sum()),
    }


def _trees(recorded: Recorded) -> dict[str, Any]:
    """State of the trees at the last sample: by the counters, as no event shows the whole."""
    ksm = recorded.samples[-1].ksm if recorded.samples else {}
    shared, sharing = ksm.get("pages_shared"), ksm.get("pages_sharing")
    known = isinstance(shared, int) and isinstance(sharing, int)
    return {
        "source": "sampled",
        "stable_nodes": shared,
        "stable_rmap_items": int(shared or 0) + int(sharing or 0) if known else None,
        "unstable_rmap_items": ksm.get("pages_unshared"),
        "chains": ksm.get("stable_node_chains"),
        "dups": ksm.get("stable_node_dups"),
    }


def _process(process: Process, processes: list[Process]) -> dict[str, Any]:
    row = asdict(process)
    row["mm"] = None if process.mm is None else f"{process.mm:#x}"
    row["shared_with"] = [
        {
            "pid": processes[other].pid,
            "comm": processes[other].comm,
            "guest": processes[other].guest,
            "pages": pages,
        }
        for other, pages in sorted(process.shared_with.items(), key=lambda item: -item[1])
    ]
    return row


def _ksmd(recorded: Recorded) -> dict[str, Any] | None:
    """What ksmd spent between the first and the last sample."""
    if len(recorded.samples) < 2:
        return None
    first, last = recorded.samples[0], recorded.samples[-1]
    spent = {
        key: after - before
        for key, before in first.ksmd.items()
        if isinstance(before, int) and isinstance(after := last.ksmd.get(key), int)
    }
    spent["elapsed_ns"] = last.begin_ns - first.begin_ns
    return spent
