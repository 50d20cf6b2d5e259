"""What KSM costs and what it is worth: swap-in copies, undone merges, splits, ksmd, and profit.

Copies on write are in :mod:`ksmtrace.analysis.cows`, unmerges and migrations in modules of theirs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from ksmtrace.analysis.calls import Durations, count_results, durations_of
from ksmtrace.analysis.merges import find_merges, find_zero_merges
from ksmtrace.analysis.recorded import Recorded, has_flag
from ksmtrace.events import EventFlag, Events, of_kind
from ksmtrace.kernel.pages import has_flag as has_page_flag
from ksmtrace.stream import CounterSample, Witnessed

_PAGES_PER_HUGE_PAGE = 512


@dataclass(frozen=True)
class Share:
    """How many of something happened to one process's memory; None: unknown owner."""

    pid: int | None
    comm: str | None
    count: int


@dataclass(frozen=True)
class Happenings:
    """Calls of one function that cost somebody something.

    Attributes:
        count: those that did what the function is for.
        failed: those that did not, by errno name.
        duration: None where the function is not timed, or was not called.
        by_process: whose memory it was, most first.
    """

    count: int
    failed: dict[str, int]
    duration: Durations | None
    by_process: list[Share]


def find_happenings(recorded: Recorded, kind: str) -> Happenings | None:
    """Gather one kind of event: ksm_might_need_to_copy, break_cow, split_huge_page_to_list.

    Returns None where it was not caught.
    """
    if not recorded.can_see(kind):
        return None
    events = of_kind(recorded.events, kind)
    return Happenings(
        count=int(np.count_nonzero(events["err"] == 0)),
        failed={name: n for name, n in count_results(events).items() if name != "0"},
        duration=durations_of(events),
        by_process=_by_process(recorded, events[events["err"] == 0]),
    )


def _by_process(recorded: Recorded, events: Events) -> list[Share]:
    owned = has_flag(events, EventFlag.PID_IS_OWNER)
    pids, first, counts = np.unique(
        np.where(owned, events["pid"], 0), return_index=True, return_counts=True
    )
    shares = [
        Share(pid or None, recorded.name_of(pid, int(events["ts_ns"][at])) if pid else None, count)
        for pid, at, count in zip(pids.tolist(), first, counts.tolist(), strict=True)
    ]
    return sorted(shares, key=lambda share: -share.count)


@dataclass(frozen=True)
class Yield:
    """What ksmd spent between the first and the last sample, and what came of it.

    Attributes:
        elapsed_ns: between the two.
        cpu_ns: on a CPU.
        run_delay_ns: ready to run, and waiting for a CPU.
        off_cpu_ns: the rest: asleep after a batch, or waiting for a lock.
        merged_pages: pages merged meanwhile, zero pages included; None where not visible, or
            events of merges are lost.
        cpu_ns_per_merged_page: None where nothing was merged, or that is unknown.
        saved_pages: by how much pages_sharing and ksm_zero_pages rose; negative where they fell.
        saved_pages_per_cpu_second: None where ksmd did not run.
    """

    elapsed_ns: int
    cpu_ns: int
    run_delay_ns: int
    off_cpu_ns: int
    merged_pages: int | None
    cpu_ns_per_merged_page: float | None
    saved_pages: int | None
    saved_pages_per_cpu_second: float | None


def find_yield(recorded: Recorded) -> Yield | None:
    """Compare ksmd's time with what it saved; None without two samples of its CPU time."""
    recorded = recorded.of_all()
    if len(recorded.samples) < 2:
        return None
    first, last = recorded.samples[0], recorded.samples[-1]
    cpu_ns, delay_ns = (_rise(first, last, key) for key in ("cpu_ns", "run_delay_ns"))
    if cpu_ns is None or delay_ns is None:
        return None
    elapsed_ns = last.begin_ns - first.begin_ns
    merged = _merged_between(recorded, first.end_ns, last.begin_ns)
    before, after = saved_pages(first), saved_pages(last)
    saved = None if before is None or after is None else after - before
    return Yield(
        elapsed_ns=elapsed_ns,
        cpu_ns=cpu_ns,
        run_delay_ns=delay_ns,
        off_cpu_ns=max(elapsed_ns - cpu_ns - delay_ns, 0),
        merged_pages=merged,
        cpu_ns_per_merged_page=cpu_ns / merged if merged else None,
        saved_pages=saved,
        saved_pages_per_cpu_second=saved / cpu_ns * 1e9 if cpu_ns and saved is not None else None,
    )


def _rise(first: CounterSample, last: CounterSample, key: str) -> int | None:
    before, after = first.ksmd.get(key), last.ksmd.get(key)
    return None if before is None or after is None else after - before


def _merged_between(recorded: Recorded, begin_ns: int, end_ns: int) -> int | None:
    if not recorded.can_see("ksm_merge_with_ksm_page"):
        return None
    lost = recorded.lost()
    if lost.get("ksm_merge_with_ksm_page") or lost.get("ksm_merge_one_page"):
        return None
    merges = find_merges(recorded)
    zero, replaced = find_zero_merges(recorded)
    times = np.r_[merges.events["ts_ns"][merges.appended], zero["ts_ns"][replaced]]
    return int(np.count_nonzero((times >= begin_ns) & (times <= end_ns)))


def saved_pages(sample: CounterSample) -> int | None:
    """Return pages_sharing and ksm_zero_pages, as general_profit adds them up (mm/ksm.c).

    A kernel without ksm_zero_pages does not count these pages: they are left out.
    """
    sharing, zero = sample.ksm.get("pages_sharing"), sample.ksm.get("ksm_zero_pages")
    return sharing + (zero if isinstance(zero, int) else 0) if isinstance(sharing, int) else None


def df_profit(recorded: Recorded) -> pd.DataFrame:
    """Tell of each sample what KSM saves by the kernel's counters, minus its metadata.

    mm/ksm.c computes pages_volatile as what is left of ksm_rmap_items, so that the four counters
    together are these.
    """
    facts = recorded.header.facts
    page_bytes = facts.get("page_size_bytes") or 4096
    item_bytes = facts.get("rmap_item_bytes")
    rows = []
    for sample in recorded.samples:
        parts = [
            sample.ksm.get(name)
            for name in ("pages_shared", "pages_sharing", "pages_unshared", "pages_volatile")
        ]
        numbers = [part for part in parts if isinstance(part, int)]
        rmap_items = sum(numbers) if len(numbers) == len(parts) else None
        saved = saved_pages(sample)
        formula = None
        if saved is not None and rmap_items is not None and item_bytes:
            formula = saved * page_bytes - rmap_items * item_bytes
        rows.append(
            {
                "ts_ns": sample.begin_ns,
                "pages_sharing": sample.ksm.get("pages_sharing"),
                "ksm_zero_pages": sample.ksm.get("ksm_zero_pages"),
                "rmap_items": rmap_items,
                "formula_bytes": formula,
                "general_profit": sample.ksm.get("general_profit"),
            }
        )
    columns = ["ts_ns", "pages_sharing", "ksm_zero_pages", "rmap_items", "formula_bytes"]
    return pd.DataFrame(rows, columns=[*columns, "general_profit"]).astype("Int64")


def df_page_truth(recorded: Recorded) -> pd.DataFrame:
    """Tell of each reading of the witnesses what is saved in truth, beside the counters.

    A page is KSM's where a stable_node in kernel memory says so, else, where kernel memory was
    not read, where the page truth is sure of all pages (:attr:`PageTruth.kpf_ksm`). Zero pages
    that KSM does not count are reads of untouched memory, and what splits of huge pages left.
    ``profit_bytes`` is general_profit with what is mapped in place of what was counted, and with
    no more of ksm_zero_pages than there are zero pages.
    """
    readings = [one for one in recorded.of_all().witnessed if one.pages is not None]
    split = of_kind(recorded.of_all().events, "split_huge_page_to_list")
    split_ns = split["ts_ns"][split["err"] == 0]
    rows, since_ns = [], 0
    for reading in readings:
        row = _truth(recorded, reading)
        if recorded.can_see("split_huge_page_to_list"):
            within = (split_ns > since_ns) & (split_ns <= reading.begin_ns)
            row["splits"] = int(np.count_nonzero(within))
        since_ns = reading.begin_ns
        rows.append(row)
    texts = ["moment", "source"]
    numbers = [
        *("ts_ns", "places", "frames", "saved_pages", "pages_sharing", "gap_pages"),
        *("zero_places", "ksm_zero_pages", "other_zero_pages", "splits", "profit_bytes"),
    ]
    table = pd.DataFrame(rows, columns=[*numbers, *texts])
    dtypes = dict.fromkeys(numbers, "Int64") | dict.fromkeys(texts, "string")
    return table.astype(dtypes)[["ts_ns", *texts, *numbers[1:]]]


def _truth(recorded: Recorded, reading: Witnessed) -> dict[str, int | str | None]:
    pages, memory = reading.pages, reading.memory
    assert pages is not None
    nearest = min(
        recorded.samples, key=lambda one: abs(one.begin_ns - reading.begin_ns), default=None
    )
    counters = dict(nearest.ksm) if nearest else {}
    if memory is not None:
        counters |= {name.removeprefix("ksm_"): n for name, n in memory.counters.items()}
        counters["ksm_zero_pages"] = memory.counters.get("ksm_zero_pages")
    pfns = pages.pages["pfn"]
    if memory is not None:
        source: str | None = "kernel memory"
        is_ksm = np.isin(pfns, memory.stable_nodes["kpfn"])
    elif (pages.pages["is_ksm"] >= 0).all():
        source, is_ksm = "page truth", pages.pages["is_ksm"] == 1
    else:
        source, is_ksm = None, None
    zero_places = int(has_page_flag(pages.pages["kpageflags"], "ZERO_PAGE").sum())
    zero, sharing = counters.get("ksm_zero_pages"), counters.get("pages_sharing")
    row: dict[str, int | str | None] = {
        "ts_ns": reading.begin_ns,
        "moment": reading.moment,
        "source": source,
        "zero_places": zero_places,
        "ksm_zero_pages": zero if isinstance(zero, int) else None,
        "pages_sharing": sharing if isinstance(sharing, int) else None,
        "other_zero_pages": zero_places - zero if isinstance(zero, int) else None,
    }
    if is_ksm is None:
        return row
    places, frames = int(is_ksm.sum()), len(np.unique(pfns[is_ksm]))
    row |= {"places": places, "frames": frames, "saved_pages": places - frames}
    if isinstance(sharing, int):
        row["gap_pages"] = sharing - (places - frames)
    facts = recorded.header.facts
    if memory is not None and facts.get("rmap_item_bytes"):
        placed = min(zero, zero_places) if isinstance(zero, int) else 0
        saved_bytes = (places - frames + placed) * (facts.get("page_size_bytes") or 4096)
        row["profit_bytes"] = saved_bytes - len(memory.rmap_items) * int(facts["rmap_item_bytes"])
    return row


def most_split_zero_pages(truth: pd.DataFrame) -> int | None:
    """Return at most how many pages were freed by splits alone, between the readings.

    Since 6.12 a huge page's parts that hold nothing but zeros are given up when it is split, and
    the zero page is mapped in their places (mm/migrate.c:try_to_map_unused_to_zeropage); no
    counter of KSM's tells of that. None without two readings, or where splits are not caught.
    """
    rises = truth["other_zero_pages"].diff().iloc[1:]
    splits = truth["splits"].iloc[1:]
    if rises.empty or rises.isna().any() or splits.isna().any():
        return None
    return int(np.minimum(rises.clip(lower=0), splits * _PAGES_PER_HUGE_PAGE).sum())
