"""Puts a recording's whole report together, in the form that ``--json`` prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd

from ksmtrace.analysis import findings
from ksmtrace.analysis.books import balance, find_history
from ksmtrace.analysis.calls import Calls, find_calls
from ksmtrace.analysis.contention import find_contention
from ksmtrace.analysis.costs import (
    df_page_truth,
    df_profit,
    find_happenings,
    find_yield,
    most_split_zero_pages,
)
from ksmtrace.analysis.cows import find_cows, find_delays
from ksmtrace.analysis.merges import df_rates, find_merges, find_zero_merges
from ksmtrace.analysis.migrations import find_migrations
from ksmtrace.analysis.outcomes import (
    CAUSES,
    count_causes,
    df_failures,
    find_counted_pages,
    find_page_outcomes,
    find_skips,
)
from ksmtrace.analysis.passes import df_passes, find_speed
from ksmtrace.analysis.processes import find_processes
from ksmtrace.analysis.races import find_races, walks_by_sharers
from ksmtrace.analysis.recorded import Recorded, Selection, has_flag
from ksmtrace.analysis.sharers import find_sharers
from ksmtrace.analysis.unmerges import find_unmerges
from ksmtrace.analysis.visits import Histogram, find_histogram, find_visits
from ksmtrace.events import KINDS, EventFlag, of_kind


def make_report(recorded: Recorded) -> dict[str, Any]:
    """Return the report as plain JSON types; None stands for what was not observable.

    The keys are documented in docs/report.md.
    """
    return {**_head(recorded), **{name: find(recorded) for name, find in TOPICS.items()}}


def _head(recorded: Recorded) -> dict[str, Any]:
    incomplete = recorded.why_incomplete()
    trailer = recorded.trailer
    selection = recorded.selection
    return {
        "selection": _selection(recorded, selection) if selection else None,
        "complete": not incomplete,
        "incomplete_because": incomplete,
        "cut_off": recorded.cut_off,
        "lost": sum(recorded.lost().values()),
        "lost_by_kind": recorded.lost(),
        "kernel": recorded.header.facts.get("kernel"),
        "command_line": recorded.header.command_line,
        "started_ns": recorded.header.started_ns,
        "started_realtime_ns": recorded.header.started_realtime_ns,
        "duration_ns": recorded.whole().end_ns() - recorded.header.started_ns,
        "ended_because": trailer.reason if trailer else None,
        "command_exit_status": trailer.command_exit_status if trailer else None,
    }


def _selection(recorded: Recorded, selection: Selection) -> dict[str, Any]:
    return {
        "begin_ns": selection.begin_ns,
        "end_ns": selection.end_ns,
        "pids": None if selection.pids is None else sorted(selection.pids),
        "samples_begin_ns": recorded.samples[0].begin_ns if recorded.samples else None,
        "samples_end_ns": recorded.samples[-1].end_ns if recorded.samples else None,
        "tallies_begin_ns": selection.tallies_begin_ns if recorded.losses else None,
        "tallies_end_ns": recorded.losses[-1].ts_ns if recorded.losses else None,
        "of_all_processes": {} if selection.pids is None else dict(OF_ALL_PROCESSES),
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


def _rungs(recorded: Recorded) -> dict[str, str]:
    return {kind.name: recorded.rung(kind.name) for kind in KINDS}


def _scans(recorded: Recorded) -> dict[str, Any] | None:
    if not recorded.can_see("ksm_start_scan", "ksm_stop_scan"):
        return None
    passes = df_passes(recorded)
    whole = passes.dropna(subset=["duration_ns"])
    # As full_scans counts them: a pass belongs to the span in which it ends.
    if recorded.selection is not None:
        whole = whole[recorded.selection.holds(whole["end_ns"].to_numpy(np.int64))]
    return {
        "passes": _rows(passes),
        "completed": len(whole),
        "median_duration_ns": int(whole["duration_ns"].median()) if len(whole) else None,
        "longest_duration_ns": int(whole["duration_ns"].max()) if len(whole) else None,
        "pages_per_cpu_second": find_speed(
            int(whole["rmap_entries"].sum()), int(whole["cpu_ns"].sum()), len(whole)
        ),
    }


def _merges(recorded: Recorded) -> dict[str, Any] | None:
    if not recorded.can_see("ksm_merge_with_ksm_page"):
        return None
    merges = find_merges(recorded)
    attempts, succeeded = len(merges.events), int(merges.appended.sum())
    known = attempts and not recorded.lost().get("ksm_merge_with_ksm_page")
    return {
        "attempts": attempts,
        "succeeded": succeeded,
        "failed": merges.by_reason(),
        "success_rate": succeeded / attempts if known else None,
        "new_stable_nodes": int(merges.pairs.sum()),
        "failed_by_cause": _failed_by_cause(recorded),
    }


def _failed_by_cause(recorded: Recorded) -> dict[str, int] | None:
    """Count the attempts that the kernel answered with an error, by what caused it."""
    if not recorded.can_see("merge_failure"):
        return None
    failures = df_failures(recorded)
    causes = count_causes(failures[~failures["zero_page"]])
    return {row["cause"]: row["failures"] for row in causes.to_dict("records")}


def _outcomes(recorded: Recorded) -> dict[str, Any]:
    """Tell what became of pages, and why merges failed, replacements by the zero page included."""
    return {**_page_outcomes(recorded), **_causes(recorded)}


def _page_outcomes(recorded: Recorded) -> dict[str, Any]:
    pages = find_page_outcomes(recorded)
    plan = next((e for e in recorded.header.plan if e["event"] == "page_outcomes"), None)
    return {
        "page_rungs": {
            name: recorded.rung(name) for name in ("cmp_and_merge_page", "stable_tree_search")
        },
        "pages": asdict(pages) if pages else None,
        "pages_unknown_because": (
            None if pages else plan["reason"] if plan else "the recording is from before that"
        ),
        "skips": _skips(recorded),
        "counted": find_counted_pages(recorded),
    }


def _skips(recorded: Recorded) -> list[dict[str, int]] | None:
    skips = find_skips(recorded)
    if skips is None:
        return None
    return [{"remaining_skips": passes, "pages": pages} for passes, pages in skips.items()]


def _causes(recorded: Recorded) -> dict[str, Any]:
    if not recorded.can_see("merge_failure"):
        return {"rung": None, "causes": None, "causes_by_pid": None}
    failures = df_failures(recorded)
    known = {cause.name: cause for cause in CAUSES}
    return {
        "rung": recorded.rung("merge_failure"),
        "causes": [
            {**row, "meaning": known[row["cause"]].meaning, "advice": known[row["cause"]].advice}
            for row in count_causes(failures).to_dict("records")
        ],
        "causes_by_pid": list(_by_process(recorded, failures)),
    }


def _by_process(recorded: Recorded, failures: pd.DataFrame) -> Iterator[dict[str, Any]]:
    groups = failures.groupby(["pid", "cause"])["ts_ns"].agg(["size", "max"]).reset_index()
    for row in groups.sort_values("size", ascending=False).to_dict("records"):
        yield {
            "pid": row["pid"],
            "comm": recorded.name_of(row["pid"], row["max"]),
            "cause": row["cause"],
            "failures": row["size"],
        }


def _removals(recorded: Recorded) -> dict[str, Any]:
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
        "single_removals": _single_removals(recorded),
    }


def _single_removals(recorded: Recorded) -> dict[str, Any] | None:
    """Tell of the sharers that left a node which stayed."""
    if not recorded.can_see("remove_rmap_item_from_tree"):
        return None
    left = find_sharers(recorded).left_singly
    by_pid: Counter[str] = Counter()
    for process in find_processes(recorded):
        if process.left_singly_pages:
            by_pid[str(process.pid)] += process.left_singly_pages
    return {
        "sharers": len(left),
        "last_of_their_node": int(has_flag(left, EventFlag.LAST_SHARER).sum()),
        "by_pid": dict(by_pid.most_common()),
    }


def _unmerges(recorded: Recorded) -> dict[str, Any] | None:
    unmerges = find_unmerges(recorded)
    if unmerges is None:
        return None
    return {
        **asdict(unmerges),
        "duration_histogram": _histogram(unmerges.duration_histogram),
    }


def _cow(recorded: Recorded) -> dict[str, Any] | None:
    cows = find_cows(recorded)
    if cows is None:
        return None
    return {**asdict(cows), "latency_histogram": _histogram(cows.latency_histogram)}


def _cow_delays(recorded: Recorded) -> list[dict[str, Any]] | None:
    delays = find_delays(recorded)
    return None if delays is None else [asdict(one) for one in delays]


def _happenings(kind: str) -> Callable[[Recorded], dict[str, Any] | None]:
    def find(recorded: Recorded) -> dict[str, Any] | None:
        happenings = find_happenings(recorded, kind)
        return asdict(happenings) if happenings else None

    return find


def _profit(recorded: Recorded) -> dict[str, Any]:
    truth = df_page_truth(recorded)
    earned = find_yield(recorded)
    return {
        "yield": asdict(earned) if earned else None,
        "samples": _rows(df_profit(recorded)),
        "page_truth": _rows(truth),
        "most_split_zero_pages": most_split_zero_pages(truth),
    }


def _visits(recorded: Recorded) -> dict[str, Any] | None:
    visits = find_visits(recorded)
    if visits is None:
        return None
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
        "slots": _slots(histogram.slots),
        "median": list(histogram.median),
        "p99": list(histogram.p99),
    }


def _slots(slots: Sequence[tuple[int, int, int]]) -> list[dict[str, int]]:
    return [{"from": first, "below": below, "count": count} for first, below, count in slots]


def _calls(recorded: Recorded) -> dict[str, Any] | None:
    calls = find_calls(recorded)
    return {name: _call(call) for name, call in calls.items()} if calls else None


def _call(call: Calls) -> dict[str, Any]:
    return {
        "entered": call.entered,
        "returned": call.returned,
        "missed": call.missed,
        "results": call.results,
        "duration": (
            {**asdict(call.duration), "slots": _slots(call.duration.slots)}
            if call.duration
            else None
        ),
    }


def _migrations(recorded: Recorded) -> dict[str, Any] | None:
    migrations = find_migrations(recorded)
    if migrations is None:
        return None
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


def _contention(recorded: Recorded) -> dict[str, Any]:
    return {
        name: asdict(lock)
        | {
            "wait_histogram": _histogram(lock.wait_histogram),
            "hold_histogram": _histogram(lock.hold_histogram),
        }
        for name, lock in find_contention(recorded).items()
    }


def _lookups(recorded: Recorded) -> dict[str, Any] | None:
    """Tell how long look-ups of a stable_node's page took by themselves."""
    if not recorded.losses or not recorded.can_see("get_ksm_page"):
        return None
    histogram = find_histogram(recorded.losses[-1].histograms.get("get_ksm_page_ns"))
    if histogram is None:
        return None
    return {
        "calls": sum(count for _, _, count in histogram.slots),
        "duration_ns": _histogram(histogram),
    }


def _walks(recorded: Recorded) -> list[dict[Hashable, Any]] | None:
    if not recorded.can_see("rmap_walk_ksm"):
        return None
    return _rows(walks_by_sharers(recorded))


def _races(recorded: Recorded) -> list[dict[str, Any]]:
    return [asdict(race) for race in find_races(recorded)]


def _rates(recorded: Recorded) -> list[dict[Hashable, Any]]:
    return _rows(df_rates(recorded))


def _rows(frame: pd.DataFrame) -> list[dict[Hashable, Any]]:
    """Return a frame's rows as JSON has them."""
    return [
        {name: None if pd.isna(value) else value for name, value in row.items()}
        for row in frame.to_dict("records")
    ]


def _processes(recorded: Recorded) -> list[dict[str, Any]]:
    return [
        {**asdict(process), "mm": None if process.mm is None else f"{process.mm:#x}"}
        for process in find_processes(recorded)
    ]


def _counters(recorded: Recorded) -> list[dict[str, Any]]:
    return [asdict(entry) for entry in balance(recorded)]


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


def _not_visible(recorded: Recorded) -> list[dict[str, Any]]:
    return [
        {"what": what, "why": why, "would_change": change}
        for what, why, change in recorded.header.unseen
    ]


TOPICS: Mapping[str, Callable[[Recorded], Any]] = {
    "findings": findings.find,
    "events": _events,
    "rungs": _rungs,
    "scans": _scans,
    "visits": _visits,
    "merges": _merges,
    "outcomes": _outcomes,
    "removals": _removals,
    "unmerges": _unmerges,
    "migrations": _migrations,
    "cow": _cow,
    "cow_delays": _cow_delays,
    "swap_ins": _happenings("ksm_might_need_to_copy"),
    "undone_merges": _happenings("break_cow"),
    "splits": _happenings("split_huge_page_to_list"),
    "profit": _profit,
    "zero_pages": _zero_pages,
    "trees": _trees,
    "contention": _contention,
    "lookups": _lookups,
    "walks": _walks,
    "races": _races,
    "rates": _rates,
    "processes": _processes,
    "counters": _counters,
    "history": lambda recorded: asdict(find_history(recorded)),
    "calls": _calls,
    "ksmd": _ksmd,
    "not_visible": _not_visible,
}
"""Per key of the report that is about KSM, what finds it: plain JSON types, None where it was not
observable."""

OF_ALL_PROCESSES: Mapping[str, str] = {
    "events": "kinds of event that tell of no mm",
    "scans": "a pass goes through all processes; merged is of the chosen ones",
    "visits": "counted in the kernel, not by process",
    "removals": "stable_nodes_freed and freed_by_pid: a stable_node is no process's",
    "migrations": "a stable_node is no process's",
    "profit": "not by process",
    "cow": "zero_page_writes and latency_histogram: counted in the kernel, not by process",
    "rates": "nodes_freed and migrated: a stable_node is no process's",
    "trees": "the kernel's counters, not by process",
    "counters": "the kernel's counters, not by process",
    "history": "the kernel's counters, not by process",
    "calls": "counted in the kernel, not by process",
    "races": "most are no process's; who had to wait is named",
    "contention": "a lock is no process's; waiters and holders are named",
    "lookups": "counted in the kernel, not by process",
    "walks": "a KSM page is no process's",
    "ksmd": "not by process",
}
"""Per topic that a choice of processes does not restrict, or not all of it, why."""
