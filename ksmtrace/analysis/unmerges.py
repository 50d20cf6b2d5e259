"""Who unmerged pages, and whose: the calls of break_ksm."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from ksmtrace.analysis.calls import count_results
from ksmtrace.analysis.recorded import Recorded, has_flag
from ksmtrace.events import EventFlag, Events, of_kind


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
        by_task: who called, most pages first.
        by_owner: whose memory it was, most pages first.
    """

    calls: int
    pages: int
    ranges: bool | None
    failed: dict[str, int]
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
    return Unmerges(
        calls=len(events),
        pages=int(pages.sum()),
        ranges=bool(events["end_address"].any()) if len(events) else None,
        failed={name: count for name, count in results.items() if name != "0"},
        by_task=_by_pid(recorded, events["task_pid"], events, pages),
        by_owner=_by_pid(recorded, np.where(owned, events["pid"], 0), events, pages),
    )


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
