"""Who unmerged pages, and whose: the calls of break_ksm."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from ksmtrace.analysis.calls import Durations, count_results, durations_of
from ksmtrace.analysis.recorded import Recorded, has_flag
from ksmtrace.analysis.visits import Histogram, find_histogram
from ksmtrace.events import CowCause, EventFlag, Events, of_kind


@dataclass(frozen=True)
class RunWrite:
    """One write to /sys/kernel/mm/ksm/run.

    Attributes:
        ts_ns: when it was over, CLOCK_MONOTONIC.
        run: what was written.
        result: errno's name, ``0`` for none. A write of 2 that ends otherwise has unmerged a part
            only, and has set run to 0 (mm/ksm.c:run_store).
        duration_ns: None where unknown.
        pid: who wrote.
        comm: None where unknown.
        pages_left: pages_shared and pages_sharing at the next sample; None without one.
    """

    ts_ns: int
    run: int
    result: str
    duration_ns: int | None
    pid: int
    comm: str | None
    pages_left: int | None


@dataclass(frozen=True)
class Unmerger:
    """Whose calls, or calls on whose memory.

    Attributes:
        pid: None where unknown.
        comm: None where unknown.
        calls: how many.
        pages: pages that they covered, KSM pages or not.
    """

    pid: int | None
    comm: str | None
    calls: int
    pages: int


@dataclass(frozen=True)
class Unmerges:
    """The calls of mm/ksm.c:break_ksm: run=2, MADV_UNMERGEABLE, prctl, and ksmd's break_cow.

    Attributes:
        calls: how many.
        pages: pages that they covered. Before 6.19 a call is for one address of the area,
            whether or not there is a KSM page; from then on for a range. So this is not how many
            pages were unmerged.
        ranges: whether a call is for a range; None where there was no call.
        failed: calls that failed, by errno name.
        duration: of a call; None where there was none.
        duration_histogram: the same as the kernel side counted it, lost events included.
        copied: KSM pages that these calls copied back; None where do_wp_page was not caught.
        faults: faults that this took: more than one for a page where one has to be tried again,
            or where there was no memory; None likewise.
        run_writes: the writes to run; None where they were not caught.
        by_task: who called, most pages first.
        by_owner: whose memory it was, most pages first.
    """

    calls: int
    pages: int
    ranges: bool | None
    failed: dict[str, int]
    duration: Durations | None
    duration_histogram: Histogram | None
    copied: int | None
    faults: int | None
    run_writes: list[RunWrite] | None
    by_task: list[Unmerger]
    by_owner: list[Unmerger]


def find_unmerges(recorded: Recorded) -> Unmerges | None:
    """Gather the calls; None where break_ksm was not caught."""
    if not recorded.can_see("break_ksm"):
        return None
    events = of_kind(recorded.events, "break_ksm")
    pages = _pages(events, recorded.header.facts.get("page_size_bytes") or 4096)
    owned = has_flag(events, EventFlag.PID_IS_OWNER)
    results = count_results(events)
    tallies = recorded.of_all().losses[-1:]
    faults = of_kind(recorded.events, "do_wp_page")
    faults = faults[faults["cause"] == CowCause.UNMERGE]
    sees_faults = recorded.can_see("do_wp_page")
    return Unmerges(
        calls=len(events),
        pages=int(pages.sum()),
        ranges=bool(events["end_address"].any()) if len(events) else None,
        failed={name: count for name, count in results.items() if name != "0"},
        duration=durations_of(events),
        duration_histogram=find_histogram(
            tallies[0].histograms.get("break_ksm_ns") if tallies else None
        ),
        copied=int(np.count_nonzero(faults["err"] == 0)) if sees_faults else None,
        faults=len(faults) if sees_faults else None,
        run_writes=_run_writes(recorded) if recorded.can_see("run_store") else None,
        by_task=_by_pid(recorded, events["task_pid"], events, pages),
        by_owner=_by_pid(recorded, np.where(owned, events["pid"], 0), events, pages),
    )


def _run_writes(recorded: Recorded) -> list[RunWrite]:
    writes = []
    for event in of_kind(recorded.events, "run_store"):
        ts_ns, pid = int(event["ts_ns"]), int(event["pid"])
        after = next((s.ksm for s in recorded.samples if s.begin_ns >= ts_ns), {})
        left = [after.get("pages_shared"), after.get("pages_sharing")]
        known = [pages for pages in left if isinstance(pages, int)]
        (result,) = count_results(event[np.newaxis])
        writes.append(
            RunWrite(
                ts_ns=ts_ns,
                run=int(event["run"]),
                result=result,
                duration_ns=int(event["duration_ns"]) or None,
                pid=pid,
                comm=recorded.name_of(pid, ts_ns),
                pages_left=sum(known) if len(known) == len(left) else None,
            )
        )
    return writes


def _pages(events: Events, page_bytes: int) -> np.ndarray:
    span_bytes = events["end_address"] - events["address"]
    pages: np.ndarray = np.where(events["end_address"] == 0, 1, span_bytes // page_bytes)
    return pages


def _by_pid(
    recorded: Recorded, pids: np.ndarray, events: Events, pages: np.ndarray
) -> list[Unmerger]:
    table = pd.DataFrame({"pid": pids, "ts_ns": events["ts_ns"], "pages": pages})
    groups = table.groupby("pid", as_index=False).agg(
        calls=("pages", "size"), pages=("pages", "sum"), ts_ns=("ts_ns", "max")
    )
    groups = groups.sort_values("pages", ascending=False)
    return [
        Unmerger(pid or None, recorded.name_of(pid, ts_ns), calls, pages)
        for pid, calls, pages, ts_ns in groups.astype("int64").itertuples(index=False, name=None)
    ]
