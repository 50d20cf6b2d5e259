"""The tables behind the report as pandas frames, with documented columns.

:data:`FRAMES` declares each frame's columns; ``docs/analysis.md`` is written from it. A column's
unit is its suffix: ``_ns`` is nanoseconds, and of a moment CLOCK_MONOTONIC; ``_pages`` is pages of
the page size of the recorded kernel; a name without one is a plain count. NA is *absent* or *not
observable*, never zero.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ksmtrace.analysis.books import balance
from ksmtrace.analysis.calls import find_calls
from ksmtrace.analysis.contention import df_holds, df_waits
from ksmtrace.analysis.costs import df_page_truth, df_profit
from ksmtrace.analysis.cows import df_cows, find_cows
from ksmtrace.analysis.lives import find_lives, has_mm
from ksmtrace.analysis.merges import df_rates, find_merges
from ksmtrace.analysis.migrations import df_moves, find_migrations
from ksmtrace.analysis.outcomes import df_failures, df_page_outcomes
from ksmtrace.analysis.passes import df_passes
from ksmtrace.analysis.processes import find_processes
from ksmtrace.analysis.races import df_walks
from ksmtrace.analysis.recorded import Recorded, gather
from ksmtrace.analysis.unmerges import find_unmerges
from ksmtrace.analysis.visits import find_visits
from ksmtrace.events import HEAD, KIND_BY_NAME, of_kind, select
from ksmtrace.recording.reader import RecordingReader


def open_recording(path: str | os.PathLike[str]) -> Recorded:
    """Read a recording into memory.

    Raises:
        RecordingError: it is no recording, or damaged.
    """
    return gather(RecordingReader(Path(path)))


@dataclass(frozen=True)
class Frame:
    """One function that returns a frame.

    Attributes:
        make: the function, of the whole recording or a part of it.
        what: what a row is.
        columns: name, dtype, and meaning of each column, in order.
    """

    make: Callable[[Recorded], pd.DataFrame]
    what: str
    columns: tuple[tuple[str, str, str], ...]


def df_events(recorded: Recorded, kind: str) -> pd.DataFrame:
    """Return the events of one kind with the fields that this kind fills (docs/events.md).

    Columns: ``ts_ns``, ``flags``, ``err``, ``pid``, then the kind's own fields; dtypes those of
    :data:`ksmtrace.events.EVENT_DTYPE`, and ``comm`` is text.

    Raises:
        KeyError: there is no such kind.
    """
    own = [name for name in KIND_BY_NAME[kind].body if name != "pid"]
    names = [field.name for field in HEAD if field.name != "kind"]
    names += [name for name in own if name not in names]
    events = of_kind(recorded.events, kind)
    frame = pd.DataFrame({name: events[name] for name in names})
    if "comm" in names:
        frame["comm"] = [comm.decode(errors="replace") for comm in frame["comm"]]
        frame["comm"] = frame["comm"].astype("string")
    return frame


def df_attempts(recorded: Recorded) -> pd.DataFrame:
    """List the attempts to merge a page, each with what became of it."""
    merges = find_merges(recorded)
    events = merges.events
    outcomes = np.select(
        [merges.failed, merges.undone, merges.open, merges.appended],
        ["failed", "undone", "open", "merged"],
        "",
    )
    known = has_mm(events)
    lives = find_lives(recorded.whole())
    owners = pd.array([life.pid for life in lives.lives], dtype="Int64")
    pids = pd.array([None] * len(events), dtype="Int64")
    pids[known] = owners[lives.of(select(events, known))]
    return _frame(
        df_attempts,
        {
            "ts_ns": events["ts_ns"],
            "pid": pids,
            "mm": events["mm"],
            "address": events["address"],
            "pfn": events["pfn"],
            "err": events["err"],
            "outcome": outcomes,
            "new_stable_node": merges.pairs,
        },
    )


def df_processes(recorded: Recorded) -> pd.DataFrame:
    """List the mms that KSM dealt with."""
    names = [name for name, _, _ in FRAMES["df_processes"].columns]
    rows = [{name: getattr(one, name) for name in names} for one in find_processes(recorded)]
    return _of_rows(df_processes, rows)


def df_sharing(recorded: Recorded) -> pd.DataFrame:
    """List which processes have merged pages in common."""
    rows = [
        {
            "pid": one.pid,
            "comm": one.comm,
            "other_pid": other.pid,
            "other_comm": other.comm,
            "pages": other.pages,
        }
        for one in find_processes(recorded)
        for other in one.shared_with
    ]
    return _of_rows(df_sharing, rows)


def df_counters(recorded: Recorded) -> pd.DataFrame:
    """Put the kernel's counters beside what the events say of them."""
    return _of_rows(df_counters, [vars(entry) for entry in balance(recorded)])


def df_samples(recorded: Recorded) -> pd.DataFrame:
    """List every reading of every counter of the kernel."""
    rows = [
        {
            "begin_ns": sample.begin_ns,
            "end_ns": sample.end_ns,
            "source": source,
            "pid": pid,
            "name": name,
            "value": value if isinstance(value, int) else None,
            "text": value if isinstance(value, str) else None,
        }
        for sample in recorded.samples
        for source, pid, values in (
            ("ksm", None, sample.ksm),
            ("vmstat", None, sample.vmstat),
            ("ksmd", None, sample.ksmd),
            *(("process", pid, values) for pid, values in sample.processes.items()),
        )
        for name, value in values.items()
    ]
    return _of_rows(df_samples, rows)


def df_tallies(recorded: Recorded) -> pd.DataFrame:
    """List every reading of what the kernel side counts."""
    rows = [
        {"ts_ns": losses.ts_ns, "what": what, "name": name, "count": count}
        for losses in recorded.losses
        for what in ("produced", "dropped", "counted", "missed")
        for name, count in getattr(losses, what).items()
    ]
    return _of_rows(df_tallies, rows)


def df_histograms(recorded: Recorded) -> pd.DataFrame:
    """List the slots of the kernel side's histograms, at the end of the recording or span."""
    visits, cows, unmerges = find_visits(recorded), find_cows(recorded), find_unmerges(recorded)
    found = {
        "visit_interval_ns": visits and visits.interval_ns,
        "search_nodes": visits and visits.search_nodes,
        "cow_ns": cows and cows.latency_histogram,
        "break_ksm_ns": unmerges and unmerges.duration_histogram,
    }
    rows = [
        {"name": name, "from": first, "below": below, "count": count}
        for name, histogram in found.items()
        for first, below, count in (histogram.slots if histogram else ())
    ]
    return _of_rows(df_histograms, rows)


def df_calls(recorded: Recorded) -> pd.DataFrame:
    """List the functions with programs."""
    rows = [
        {
            "function": name,
            "entered": call.entered,
            "returned": call.returned,
            "missed": call.missed,
            **({} if call.duration is None else vars(call.duration)),
        }
        for name, call in (find_calls(recorded) or {}).items()
    ]
    return _of_rows(df_calls, rows)


def df_routes(recorded: Recorded) -> pd.DataFrame:
    """List between which NUMA nodes KSM pages moved."""
    migrations = find_migrations(recorded)
    rows = [vars(route) for route in migrations.routes] if migrations else []
    return _of_rows(df_routes, rows)


def _of_rows(make: Callable[[Recorded], pd.DataFrame], rows: list[dict[str, Any]]) -> pd.DataFrame:
    names = [name for name, _, _ in FRAMES[make.__name__].columns]
    return _frame(make, {name: [row.get(name) for row in rows] for name in names})


def _frame(make: Callable[[Recorded], pd.DataFrame], columns: dict[str, Any]) -> pd.DataFrame:
    """Make a frame with the documented dtypes."""
    dtypes = {name: dtype for name, dtype, _ in FRAMES[make.__name__].columns}
    return pd.DataFrame(
        {name: pd.Series(values, dtype=dtypes[name]) for name, values in columns.items()}
    )


_TIME = "CLOCK_MONOTONIC"
_LOCKED = (
    ("begin_ns", "int64", _TIME),
    ("end_ns", "int64", _TIME),
    ("duration_ns", "int64", "the one minus the other"),
    ("lock", "string", "which: `ksmtrace.events.Lock` in small letters"),
    ("lock_address", "uint64", "where it is"),
    ("pid", "int64", "tgid of who waited, or held it"),
    ("exclusive", "bool", "to write; a mutex always is"),
    ("exiting", "bool", "the task was exiting"),
    ("stack", "int64", "number in `recorded.stacks` of its kernel stack at the end; < 0: none"),
)
_FRAMES = (
    Frame(
        df_passes,
        "A pass of ksmd; of a span those that were under way in it",
        (
            ("seq", "Int64", "`ksm_scan.seqnr`"),
            ("begin_ns", "Int64", f"{_TIME}; NA: the recording has only its end"),
            ("end_ns", "Int64", f"{_TIME}; NA: the recording has only its begin"),
            ("duration_ns", "Int64", "NA where one of the two is"),
            ("rmap_entries", "Int64", "rmap_items at the end: pages it visited or skipped"),
            ("cpu_ns", "Int64", "CPU time of ksmd in it, to within a tick"),
            ("run_delay_ns", "Int64", "how long ksmd waited for a CPU in it"),
            ("off_cpu_ns", "Int64", "the rest: ksmd asleep after a batch, or waiting for a lock"),
            ("cut", "bool", "it began before the span, or ended after it"),
            ("merged", "int64", "pages merged in it, and in the span"),
        ),
    ),
    Frame(
        df_rates,
        "A span of time: all equally long, 1, 2 or 5 times a power of ten",
        (
            ("begin_ns", "int64", _TIME),
            ("span_ns", "int64", "how long it is"),
            ("attempts", "Int64", "attempts to merge a page"),
            ("merged", "Int64", "those that ended in a merged page"),
            ("failed", "Int64", "those that failed or were undone"),
            ("zero_merged", "Int64", "pages replaced by the zero page"),
            ("nodes_freed", "Int64", "stable_nodes freed"),
            ("sharers_removed", "Int64", "sharers removed together with their node"),
            ("left_singly", "Int64", "sharers that left a node which stayed"),
            ("migrated", "Int64", "KSM pages that moved to another page frame"),
        ),
    ),
    Frame(
        df_attempts,
        "An attempt to merge a page: an event ksm_merge_with_ksm_page",
        (
            ("ts_ns", "uint64", _TIME),
            ("pid", "Int64", "the page's process; NA where unknown"),
            ("mm", "uint64", "address of its mm_struct; 0: unknown"),
            ("address", "uint64", "the page's, with the rmap_item's flags in the low 12 bits"),
            ("pfn", "uint64", "page frame number of the KSM page"),
            ("err", "int64", "the kernel's answer: 0 or a negative errno"),
            ("outcome", "string", "`merged`, `failed`, `undone`, or `open`: not in the recording"),
            ("new_stable_node", "bool", "the second one of a pair, which made a stable_node"),
        ),
    ),
    Frame(
        df_page_outcomes,
        "What became of pages of a process that ksmd came by in about a second, by outcome "
        "(docs/events.md: Outcomes of pages)",
        (
            ("ts_ns", "uint64", f"{_TIME}, at the end of that second, pass or mm"),
            ("pass_number", "Int64", "of the recording's passes, from 1; NA: before the first"),
            ("seq", "Int64", "ksm_scan.seqnr; NA: before the first"),
            ("pid", "Int64", "the mm's owner; NA where unknown"),
            ("mm", "uint64", "address of the mm_struct"),
            ("outcome", "str", "PageOutcome in small letters"),
            ("pages", "int64", "how many pages"),
        ),
    ),
    Frame(
        df_failures,
        "A merge that the kernel answered with an error, and its cause (`ksmtrace report --section "
        "outcomes` says what each means)",
        (
            ("ts_ns", "uint64", _TIME),
            ("pid", "uint32", "the owner's, as in the event"),
            ("rmap_item", "uint64", "0: unknown"),
            ("address", "uint64", "0: unknown"),
            ("ksm_page", "uint64", "what it was to merge with; 0: the first step of a pair"),
            ("pfn", "uint64", "page that did not merge; 0: unknown"),
            ("zero_page", "bool", "it was to be replaced by the zero page"),
            ("cause", "str", "name of the cause; `unknown`"),
            ("certainty", "str", "`seen`, `inferred` or `unknown`"),
            ("page_flags", "Int64", "low 32 bits of page.flags; NA: unread, as those below"),
            ("refcount", "Int64", "references of the folio"),
            ("mapcount", "Int64", "mappings of the folio"),
            ("order", "Int64", "log2 of the folio's pages"),
            ("split_err", "Int64", "NA: no split was tried"),
            ("steps", "Int64", "MergeStep bits (docs/events.md)"),
        ),
    ),
    Frame(
        df_processes,
        "An mm that KSM dealt with: what KSM counts by",
        (
            ("pid", "Int64", "its owner's tgid; NA where no event and no sample tells"),
            ("mm", "UInt64", "address of the mm_struct; NA: known from samples only"),
            ("comm", "string", "its name"),
            ("cgroup", "string", "its control group's path"),
            ("guest", "string", "name of the guest that a QEMU process runs"),
            ("entered_ns", "Int64", f"{_TIME} as it came on ksmd's list; NA: before"),
            ("exited_ns", "Int64", f"{_TIME} as it left that; NA: after, or not visible"),
            ("merged_pages", "Int64", "pages that became sharers of a stable_node"),
            ("failed_attempts", "Int64", "attempts on its pages that failed or were undone"),
            ("removed_pages", "Int64", "sharers removed together with their node"),
            ("left_singly_pages", "Int64", "sharers that left a node which stayed; NA: not caught"),
            ("visited_pages", "Int64", "pages ksmd looked at; NA: there is no event per page"),
            ("zero_merged_pages", "Int64", "pages replaced by the zero page"),
            ("first_merging_pages", "Int64", "mm->ksm_merging_pages at first"),
            ("ksm_merging_pages", "Int64", "the kernel's own count at `counted_ns`"),
            ("ksm_rmap_items", "Int64", "the kernel's own count at `counted_ns`"),
            ("ksm_zero_pages", "Int64", "the kernel's own count at `counted_ns`"),
            ("counted_by", "string", "`ksm_exit` or `sample`; NA: it was not counted"),
            ("counted_ns", "Int64", f"{_TIME} of these counts"),
            ("difference", "Int64", "ksm_merging_pages minus what the events say"),
            ("shared_with_others_pages", "Int64", "merged pages that other processes share"),
        ),
    ),
    Frame(
        df_sharing,
        "A process, and another one with pages on the same stable_nodes",
        (
            ("pid", "Int64", "the one"),
            ("comm", "string", "its name"),
            ("other_pid", "Int64", "the other"),
            ("other_comm", "string", "its name"),
            ("pages", "Int64", "pages of the one that the other has too, as they merged"),
        ),
    ),
    Frame(
        df_counters,
        "A counter of /sys/kernel/mm/ksm or /proc/vmstat, first and last",
        (
            ("counter", "string", "its name"),
            ("first", "object", "int, text, or None: absent"),
            ("last", "object", "int, text, or None: absent"),
            ("delta", "Int64", "last minus first"),
            ("events_say", "Int64", "what that should be; NA: no event tells of it"),
            ("difference", "Int64", "delta minus events_say"),
            ("verdict", "string", "`exact`, `explained`, `contradiction`, `unknown`, `sampled`"),
            ("why", "string", "the rule, and what the difference stands for"),
        ),
    ),
    Frame(
        df_samples,
        "A counter in a sample",
        (
            ("begin_ns", "int64", f"{_TIME} before the sample's first file was read"),
            ("end_ns", "int64", f"{_TIME} after its last"),
            ("source", "string", "`ksm`, `vmstat`, `ksmd`, or `process`"),
            ("pid", "Int64", "whose it is, for `process`"),
            ("name", "string", "its name"),
            ("value", "Int64", "NA: absent, or text"),
            ("text", "string", "the value where it is text"),
        ),
    ),
    Frame(
        df_tallies,
        "A count of the kernel side, at a reading; in a span since the last one before it",
        (
            ("ts_ns", "int64", f"{_TIME} of the reading"),
            ("what", "string", "`produced` and `dropped` events, `counted`, `missed` programs"),
            ("name", "string", "kind of event, or what is counted"),
            ("count", "Int64", "since the recording, or the span, began"),
        ),
    ),
    Frame(
        df_histograms,
        "A slot of a histogram of the kernel side",
        (
            ("name", "string", "what was measured: its unit is the suffix"),
            ("from", "Int64", "least value of the slot"),
            ("below", "Int64", "least value of the next one"),
            ("count", "Int64", "how many values were in it"),
        ),
    ),
    Frame(
        df_calls,
        "A function of the kernel with programs on it",
        (
            ("function", "string", "its name"),
            ("entered", "Int64", "how often; NA: no program on its entry"),
            ("returned", "Int64", "how often; NA: no program on its exit"),
            ("missed", "Int64", "entries without an exit, or the other way round"),
            ("median_ns", "Int64", "from entry to exit; NA: unknown, or not called"),
            ("p99_ns", "Int64", "so long or shorter were 99 of 100 calls"),
            ("max_ns", "Int64", "the longest call"),
        ),
    ),
    Frame(
        df_routes,
        "A NUMA node that KSM pages moved from, and one they moved to",
        (
            ("from_node", "Int64", "NA: unknown"),
            ("to_node", "Int64", "NA: unknown"),
            ("pages", "Int64", "how many moved"),
        ),
    ),
    Frame(
        df_waits,
        "A wait for a lock: an event lock_wait, __folio_lock or get_ksm_page",
        (
            *_LOCKED,
            ("comm", "string", "name of the waiting thread"),
            ("holder_pid", "int64", "tgid of who held it when the wait began; 0: unknown"),
            (
                "holder_by",
                "string",
                "`seen`, `owner`, `last reader`, `walk`, or `merge`; NA: no holder is known",
            ),
            ("err", "int64", "0, or the negative errno with which it gave up"),
        ),
    ),
    Frame(
        df_holds,
        "A hold by ksmd that had waiters, or was one of the longest: an event lock_hold",
        (*_LOCKED, ("waiters", "int64", "waits that began during it")),
    ),
    Frame(
        df_walks,
        "A walk over all that map a KSM page: an event rmap_walk_ksm",
        (
            ("end_ns", "int64", _TIME),
            ("duration_ns", "int64", "how long"),
            ("sharers", "int64", "of its stable_node as the walk began; -1: it had none"),
            ("pfn", "int64", "page frame number"),
            ("pid", "int64", "tgid of the task that walked"),
            ("comm", "string", "its name"),
        ),
    ),
    Frame(
        df_cows,
        "A fault on a write-protected KSM page, which copies it: an event do_wp_page",
        (
            ("ts_ns", "int64", f"{_TIME}, as it was over"),
            ("pid", "Int64", "the page's process; NA where unknown"),
            ("task_pid", "int64", "who caused it"),
            ("mm", "uint64", "address of the page's mm_struct"),
            ("address", "uint64", "the page's"),
            ("kpfn", "uint64", "page frame number of the KSM page"),
            ("cause", "string", "`write`, `kernel`, `remote`, or `unmerge`"),
            ("err", "int64", "0: it was copied; else a negative errno"),
            ("duration_ns", "int64", "of the fault"),
            ("kept_ns", "Int64", "since it was merged here; NA: that is not in the recording"),
        ),
    ),
    Frame(
        df_moves,
        "A KSM page whose mappings were taken away to move it: an event remove_migration_ptes",
        (
            ("ts_ns", "int64", f"{_TIME}, as it was mapped again"),
            ("task_pid", "int64", "who moved it"),
            ("pfn", "int64", "where it was"),
            ("new_pfn", "int64", "where it is"),
            ("from_node", "int64", "NUMA node; -1: unknown"),
            ("to_node", "int64", "NUMA node; -1: unknown"),
            ("sharers", "int64", "of its stable_node"),
            ("duration_ns", "int64", "how long it had no mapping; 0: unknown"),
        ),
    ),
    Frame(
        df_profit,
        "A sample, by the kernel's formula for general_profit (mm/ksm.c:general_profit_show)",
        (
            ("ts_ns", "Int64", _TIME),
            ("pages_sharing", "Int64", "by the kernel"),
            ("ksm_zero_pages", "Int64", "by the kernel"),
            ("rmap_items", "Int64", "pages_shared, _sharing, _unshared and _volatile together"),
            ("formula_bytes", "Int64", "what the first two save minus the rmap_items' size"),
            ("general_profit", "Int64", "what the kernel says"),
        ),
    ),
    Frame(
        df_page_truth,
        "A reading of what mergeable memory maps (`record --witnesses`), beside the counters",
        (
            ("ts_ns", "Int64", _TIME),
            ("moment", "string", "`first`, `asked`, or `last`"),
            ("source", "string", "what says which pages are KSM's; NA: nothing does"),
            ("places", "Int64", "present pages that map a KSM page"),
            ("frames", "Int64", "distinct KSM pages among them"),
            ("saved_pages", "Int64", "places minus frames"),
            ("pages_sharing", "Int64", "by the kernel, at that moment"),
            ("gap_pages", "Int64", "pages_sharing minus saved_pages"),
            ("zero_places", "Int64", "places that map the zero page, whoever put it there"),
            ("ksm_zero_pages", "Int64", "by the kernel"),
            ("other_zero_pages", "Int64", "zero_places minus ksm_zero_pages"),
            ("splits", "Int64", "huge pages that ksmd split since the reading before"),
            ("profit_bytes", "Int64", "saved_pages and ksm_zero_pages, minus the rmap_items"),
        ),
    ),
)
FRAMES = {frame.make.__name__: frame for frame in _FRAMES}
"""Every frame of fixed columns, by the name of its function."""


HEADING = "## The frames\n"


def markdown() -> str:
    """Return the end of ``docs/analysis.md``, which lists the frames."""
    lines = [HEADING, "Generated from `ksmtrace/analysis/frames.py` by `scripts/generate`.", ""]
    for frame in _FRAMES:
        lines += [
            f"### `{frame.make.__name__}`",
            "",
            f"{frame.what}.",
            "",
            "| column | dtype | meaning |",
            "|---|---|---|",
            *(f"| `{name}` | {dtype} | {meaning} |" for name, dtype, meaning in frame.columns),
            "",
        ]
    return "\n".join(lines)
