"""Copies of KSM pages on write (COW breaks): whose, made by whom, how long they took, how soon."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from ksmtrace.analysis.calls import Durations, count_results, durations_of
from ksmtrace.analysis.lives import find_lives, has_mm
from ksmtrace.analysis.recorded import Recorded, has_flag
from ksmtrace.analysis.sharers import find_sharers
from ksmtrace.analysis.visits import Histogram, find_histogram
from ksmtrace.events import CowCause, EventFlag, Events, of_kind, select

REGRET_NS = 10_000_000_000
"""A page that is written to so soon after its merge was not worth merging, says the report. Each
row of :func:`df_cows` has the time itself."""

_PAGE_MASK = np.uint64(0xFFFF_FFFF_FFFF_F000)
_CAUSES = {cause.value: cause.name.lower() for cause in CowCause}


@dataclass(frozen=True)
class Writer:
    """The copies of one process's KSM pages that no unmerge made.

    Attributes:
        pid: None where unknown.
        comm: None where unknown.
        copies: how many.
        by_cause: how many by :class:`ksmtrace.events.CowCause` in small letters.
        latency: how long the faults took; None where there was none.
        total_ns: how long all of them took together.
        regretted: copies within :data:`REGRET_NS` of the page's merge.
    """

    pid: int | None
    comm: str | None
    copies: int
    by_cause: dict[str, int]
    latency: Durations | None
    total_ns: int
    regretted: int


@dataclass(frozen=True)
class Regret:
    """Pages that were merged, and written to soon after.

    Attributes:
        within_ns: how soon.
        copies: copies, by no unmerge, of pages whose merge is in the recording.
        regretted: those within that time of the merge.
        merged: pages merged, of which they are a part.
        median_kept_ns: the median time from a merge to the copy; None where there is no copy.
    """

    within_ns: int
    copies: int
    regretted: int
    merged: int
    median_kept_ns: int | None


@dataclass(frozen=True)
class Cows:
    """The calls of mm/memory.c:do_wp_page for KSM pages.

    Attributes:
        copies: how many copied the page, whatever for.
        failed: calls that did not, by errno name (:data:`ksmtrace.events.KINDS`, do_wp_page).
        by_cause: the copies by :class:`ksmtrace.events.CowCause` in small letters.
        latency: how long the copies took that no unmerge made; None where there was none.
        latency_histogram: of all calls, as the kernel side counted them, so that lost events
            are in it; None where there was none.
        zero_page_writes: writes to a zero page that KSM had put in place, which cow_ksm leaves
            out; None where they were not counted.
        regret: None where the merges are not visible.
        by_process: by whose memory it was, most copies first; copies by an unmerge left out.
    """

    copies: int
    failed: dict[str, int]
    by_cause: dict[str, int]
    latency: Durations | None
    latency_histogram: Histogram | None
    zero_page_writes: int | None
    regret: Regret | None
    by_process: list[Writer]


@dataclass(frozen=True)
class Delayed:
    """One process's delay by copies on write, of KSM pages and others.

    Attributes:
        pid: the process.
        comm: None where unknown.
        copies: by the kernel's own count between the first and the last sample that has it; of a
            process that began during the recording all of them.
        delay_ns: how long these took it.
    """

    pid: int
    comm: str | None
    copies: int
    delay_ns: int


def find_delays(recorded: Recorded) -> list[Delayed] | None:
    """Read the kernel's delay accounting from the samples; None where it was not on.

    Returns the longest delay first (:class:`ksmtrace.kernel.process_events.CopyDelays`).
    """
    if not recorded.header.facts.get("task_delayacct"):
        return None
    samples = recorded.samples
    delayed = []
    for pid in sorted({pid for sample in samples for pid in sample.processes}):
        told = [
            (sample.begin_ns, count, delay_ns)
            for sample in samples
            if isinstance(count := sample.processes.get(pid, {}).get("wpcopy_count"), int)
            and isinstance(delay_ns := sample.processes[pid].get("wpcopy_delay_ns"), int)
        ]
        if not told:
            continue
        ts_ns, count, delay_ns = told[-1]
        identity = recorded.identity(pid, ts_ns)
        began = identity is not None and identity.ts_ns >= recorded.begin_ns()
        _, count_before, delay_before_ns = (0, 0, 0) if began else told[0]
        delayed.append(
            Delayed(
                pid,
                recorded.name_of(pid, ts_ns),
                count - count_before,
                delay_ns - delay_before_ns,
            )
        )
    return sorted(delayed, key=lambda one: -one.delay_ns)


def df_cows(recorded: Recorded) -> pd.DataFrame:
    """List the faults on KSM pages that copy them, by time."""
    events = of_kind(recorded.events, "do_wp_page")
    owned = has_flag(events, EventFlag.PID_IS_OWNER)
    table = _places(recorded, events)
    table["pid"] = pd.array(events["pid"].astype(np.int64), "Int64")
    table.loc[~owned, "pid"] = pd.NA
    for column, field in (("task_pid", "task_pid"), ("err", "err"), ("duration_ns", "duration_ns")):
        table[column] = events[field].astype(np.int64)
    table["mm"], table["kpfn"] = events["mm"], events["pfn"]
    causes = [_CAUSES.get(cause, str(cause)) for cause in events["cause"].tolist()]
    table["cause"] = pd.array(causes, "string")
    table = table.sort_values("ts_ns", kind="stable", ignore_index=True)
    joined = find_sharers(recorded.whole()).joined
    joins = _places(recorded, select(joined, has_flag(joined, EventFlag.HAS_ADDRESS)))
    joins["merged_ns"] = joins["ts_ns"]
    table = pd.merge_asof(
        table, joins.sort_values("ts_ns", kind="stable"), on="ts_ns", by=["life", "address"]
    )
    table["kept_ns"] = table["ts_ns"] - table["merged_ns"].astype("Int64")
    columns = ["ts_ns", "pid", "task_pid", "mm", "address", "kpfn", "cause", "err"]
    return table[[*columns, "duration_ns", "kept_ns"]]


def _places(recorded: Recorded, events: Events) -> pd.DataFrame:
    """Tell per event the time, the mm's life (-1: unknown), and the page's address."""
    known = has_mm(events)
    life = np.full(len(events), -1, np.int64)
    life[known] = find_lives(recorded.whole()).of(select(events, known))
    return pd.DataFrame(
        {
            "ts_ns": events["ts_ns"].astype(np.int64),
            "life": life,
            "address": events["address"] & _PAGE_MASK,
        }
    )


def find_cows(recorded: Recorded) -> Cows | None:
    """Gather the copies; None where they were not caught."""
    if not recorded.can_see("do_wp_page"):
        return None
    events = of_kind(recorded.events, "do_wp_page")
    copied = events[events["err"] == 0]
    own = copied[copied["cause"] != CowCause.UNMERGE]
    tallies = recorded.of_all().losses[-1:]
    counted = tallies[0].counted if tallies else {}
    slots = tallies[0].histograms.get("cow_ns") if tallies else None
    table = df_cows(recorded)
    table = table[(table["err"] == 0) & (table["cause"] != "unmerge")]
    return Cows(
        copies=len(copied),
        failed={name: n for name, n in count_results(events).items() if name != "0"},
        by_cause=_by_cause(copied["cause"]),
        latency=durations_of(own),
        latency_histogram=find_histogram(slots),
        zero_page_writes=counted.get("do_wp_page.zero_page"),
        regret=_regret(recorded, table),
        by_process=_by_process(recorded, own, table),
    )


def _by_cause(causes: np.ndarray) -> dict[str, int]:
    return {name: int(np.count_nonzero(causes == value)) for value, name in _CAUSES.items()}


def _regret(recorded: Recorded, own: pd.DataFrame) -> Regret | None:
    if not recorded.can_see("ksm_merge_with_ksm_page"):
        return None
    kept = own["kept_ns"].dropna()
    return Regret(
        within_ns=REGRET_NS,
        copies=len(kept),
        regretted=int((kept <= REGRET_NS).sum()),
        merged=len(find_sharers(recorded).joined),
        median_kept_ns=int(kept.median()) if len(kept) else None,
    )


def _by_process(recorded: Recorded, own: Events, table: pd.DataFrame) -> list[Writer]:
    owned = has_flag(own, EventFlag.PID_IS_OWNER)
    pids = np.where(owned, own["pid"], 0)
    soon = table[table["kept_ns"] <= REGRET_NS]["pid"].value_counts()
    writers = []
    for pid in np.unique(pids).tolist():
        events = own[pids == pid]
        writers.append(
            Writer(
                pid=pid or None,
                comm=recorded.name_of(pid, int(events["ts_ns"][-1])),
                copies=len(events),
                by_cause=_by_cause(events["cause"]),
                latency=durations_of(events),
                total_ns=int(events["duration_ns"].sum()),
                regretted=int(soon.get(pid, 0)),
            )
        )
    return sorted(writers, key=lambda writer: -writer.copies)
