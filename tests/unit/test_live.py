"""What `top` counts event by event is what `report` says of the whole recording."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ksmtrace.analysis import live as live_module
from ksmtrace.analysis import process_tally, tallies, topics
from ksmtrace.analysis.books import balance
from ksmtrace.analysis.contention import find_contention
from ksmtrace.analysis.cows import find_cows
from ksmtrace.analysis.live import Live, Picture
from ksmtrace.analysis.merges import df_rates, find_merges
from ksmtrace.analysis.processes import find_processes
from ksmtrace.analysis.rates import BUCKET_NS
from ksmtrace.analysis.recorded import Recorded, gather
from ksmtrace.analysis.report import make_report
from ksmtrace.analysis.sharers import find_sharers
from ksmtrace.events import KIND_BY_NAME, NR_KINDS, CowCause, concatenate
from ksmtrace.reconstruct.replay import Replay
from ksmtrace.recording.reader import RecordingReader
from ksmtrace.stream import Batch

RECORDINGS = Path(__file__).parent.parent / "golden" / "recordings"
NAMES = sorted(path.stem for path in RECORDINGS.glob("*.ksmt"))


def opened(name: str) -> RecordingReader:
    return RecordingReader(RECORDINGS / f"{name}.ksmt")


@functools.cache
def final(name: str, part: int | None = None) -> Picture:
    """Take a recording in, its batches in parts of so many events, drawing now and then."""
    reader = opened(name)
    live = Live(reader.header)
    for item in reader:
        if isinstance(item, Batch) and part is not None:
            for begin in range(0, len(item.events), part):
                live.take(Batch(item.events[begin : begin + part]))
                if begin % (17 * part) == 0:
                    live.picture()
        else:
            live.take(item)
    return live.picture(all_of_it=True)


@functools.cache
def whole(name: str) -> Recorded:
    return gather(opened(name))


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


SMALL = [path.stem for path in RECORDINGS.glob("*.ksmt") if path.stat().st_size < 30_000]
PARTS = pytest.mark.parametrize(
    ("name", "part"),
    [(name, part) for part in (None, 61) for name in NAMES] + [(name, 1) for name in sorted(SMALL)],
)


@PARTS
def test_merges_and_events_are_the_reports(name, part):
    picture = final(name, part)
    report = make_report(whole(name))
    merges = report["merges"]
    if merges is None:
        assert picture.merges is None
    else:
        assert picture.merges is not None
        assert picture.merges.attempts == merges["attempts"]
        assert picture.merges.new_stable_nodes == merges["new_stable_nodes"]
        assert picture.merges.succeeded == merges["succeeded"]
        assert dict(picture.merges.failed) == merges["failed"]
    counted = {kind: n for kind, n in report["events"].items() if n is not None}
    assert {kind: n for kind, n in picture.by_kind.items() if kind in counted} == counted
    assert picture.nr_lost == report["lost"]
    if report["zero_pages"] is not None:
        assert picture.zero_merged == report["zero_pages"]["succeeded"]


@PARTS
def test_passes_are_the_reports(name, part):
    picture = final(name, part)
    scans = make_report(whole(name))["scans"]
    if scans is None:
        assert picture.passes is None
        return
    assert picture.passes is not None
    assert picture.passes.completed == scans["completed"]
    assert picture.passes.median_ns == scans["median_duration_ns"]
    assert picture.passes.longest_ns == scans["longest_duration_ns"]
    assert picture.passes.pages_per_cpu_second == pytest.approx(scans["pages_per_cpu_second"])
    keys = ("seq", "begin_ns", "end_ns", "duration_ns", "rmap_entries", "cpu_ns", "merged")
    assert [[getattr(one, key) for key in keys] for one in picture.passes.last] == [
        [one[key] for key in keys] for one in scans["passes"][-64:]
    ]


def test_the_longest_pass_is_the_reports_however_long_ago(monkeypatch):
    monkeypatch.setattr(tallies, "KEPT_PASSES", 2)
    reader = opened("guest-6.12-witnessed")
    live = Live(reader.header)
    for item in reader:
        live.take(item)
    picture = live.picture(all_of_it=True)
    assert picture.passes is not None and len(live._passes._passes) == 2
    scans = make_report(whole("guest-6.12-witnessed"))["scans"]
    assert picture.passes.longest_ns == scans["longest_duration_ns"] == 56301549


@PARTS
def test_processes_are_the_reports(name, part):
    picture = final(name, part)
    found = find_processes(whole(name))
    keys = (
        *("pid", "mm", "comm", "cgroup", "guest", "entered_ns", "exited_ns", "merged_pages"),
        *("failed_attempts", "zero_merged_pages", "ksm_merging_pages", "ksm_rmap_items"),
        *("ksm_zero_pages", "counted_by"),
    )

    def rows(processes):
        return sorted(
            ([getattr(one, key) for key in keys] for one in processes), key=lambda row: str(row)
        )

    assert rows(picture.processes) == rows(found)
    assert sum(one.left_singly_pages for one in picture.processes) == sum(
        one.left_singly_pages or 0 for one in found
    )
    if not whole(name).can_see(
        "stable_tree_append"
    ):  # else the report also knows each node's last sharer
        assert sum(one.removed_pages for one in picture.processes) == sum(
            one.removed_pages for one in found
        )


@pytest.mark.parametrize("part", [None, 61, 1])
@pytest.mark.parametrize(
    ("name", "by_appends"), [("guest-6.12-visits", True), ("guest-6.12-visits", False)]
)
def test_copies_and_regret_are_the_reports(name, part, by_appends):
    recorded = with_copies(whole(name), by_appends)
    report = find_cows(recorded).by_process
    assert [writer.copies for writer in report] == [22, 11]
    assert sum(writer.regretted for writer in report) == 22
    live = Live(recorded.header)
    part = part or len(recorded.events)
    for begin in range(0, len(recorded.events), part):
        live.take(Batch(recorded.events[begin : begin + part]))
        live.settle()
    told = [one for one in live.picture(all_of_it=True).processes if one.copies]
    assert sorted(
        (one.pid, one.copies, one.copies_took_ns, one.longest_copy_ns, one.regretted_pages)
        for one in told
    ) == sorted(
        (one.pid, one.copies, one.total_ns, one.latency.max_ns, one.regretted) for one in report
    )


def with_copies(recorded: Recorded, by_appends: bool) -> Recorded:
    """Let every other page that merged be written to soon, and every other one after 11 s."""
    merged = find_sharers(recorded).joined
    copies = []
    for number, after_ns in enumerate((1_000_000, 11_000_000_000, 2_000_000)):
        some = merged[number::2].copy()
        if number == 1:
            some = some[some["pid"] == 206]  # the other one has gone by then
        some["kind"] = KIND_BY_NAME["do_wp_page"].number
        some["ts_ns"] += np.uint64(after_ns)
        some["err"], some["pfn"] = 0, 1
        some["cause"] = CowCause.UNMERGE if number == 2 else CowCause.WRITE
        some["duration_ns"] = 1_000 * np.arange(1, len(some) + 1)
        copies.append(some)
    events = concatenate([recorded.events, *copies])
    events = events[np.argsort(events["ts_ns"], kind="stable")]
    kept = np.ones(len(events), bool)
    header = recorded.header
    if not by_appends:
        kept = events["kind"] != KIND_BY_NAME["stable_tree_append"].number
        plan = [
            {**one, "rung": "absent"} if one["event"] == "stable_tree_append" else one
            for one in header.plan
        ]
        header = replace(header, plan=plan)
    return Recorded(header, concatenate([events[kept]]))


@PARTS
def test_books_are_the_reports(name, part):
    assert list(final(name, part).books) == balance(whole(name))


@pytest.mark.parametrize("name", ["guest-5.10-chains", "guest-7.x-churn", "guest-7.x-moves"])
def test_no_moment_at_which_one_looks_contradicts_a_counter(name):
    live, judged = Live(opened(name).header), 0
    for item in opened(name):
        live.take(item)
        # As where a recording was cut off there, and where a replay is paused and goes on.
        books = live.picture(all_of_it=True).books
        judged += any(entry.verdict == "exact" for entry in books)
        assert not [entry.counter for entry in books if entry.verdict == "contradiction"]
    assert judged
    assert list(books) == balance(whole(name))


def test_rates_are_the_reports(name):
    recorded = whole(name)
    rates = final(name, 61).rates
    frame = df_rates(recorded)
    for column in ("attempts", "merged", "zero_merged", "nodes_freed", "left_singly", "migrated"):
        counts = rates.counts[column]
        if counts is None:
            assert frame[column].isna().all() or not len(frame)
        elif column not in ("attempts", "merged"):
            assert counts.sum() == frame[column].sum()
    merges = find_merges(recorded)
    counts = rates.counts["attempts"]
    if counts is not None and len(merges.events):
        # The last attempt may be held back.
        assert len(merges.events) - 2 <= counts.sum() <= len(merges.events)
        begun = (merges.events["ts_ns"][0] - np.uint64(rates.begin_ns)) // np.uint64(BUCKET_NS)
        assert np.flatnonzero(counts)[0] == begun


def test_trees_are_the_replays(name):
    trees = final(name, 61).trees
    assert trees is not None
    replayed = Replay(lambda: opened(name)).state_at()
    assert trees.state.totals == replayed.totals
    nodes = [
        np.sort(state.stable_nodes[["kpfn", "sharers", "chain", "born_ns"]])
        for state in (trees.state, replayed)
    ]
    assert np.array_equal(*nodes)


def test_skipped_events_are_counted_and_told():
    reader = opened("duplicates")
    live = Live(reader.header)
    for item in reader:
        if isinstance(item, Batch):
            live.skip(np.bincount(item.events["kind"], minlength=NR_KINDS))
        else:
            live.take(item)
    picture = live.picture(all_of_it=True)
    assert (picture.skipped, picture.nr_events) == (310, 0)
    assert picture.by_kind["ksm_merge_with_ksm_page"] == 303
    assert picture.trees is not None
    assert "310 events were not taken in" in picture.trees.state.incomplete[0].why
    verdicts = {entry.counter: entry.verdict for entry in picture.books}
    assert verdicts["pages_shared"] == verdicts["pages_sharing"] == "unknown"


def test_memory_stays_bounded_when_a_recording_is_taken_in_again_and_again(monkeypatch):
    monkeypatch.setattr(process_tally, "KEPT_PROCESSES", 64)
    monkeypatch.setattr(live_module, "KEPT_EVENTS", 1000)
    reader = opened("lifetime")
    items = [item for item in reader if isinstance(item, Batch)]
    first = min(int(item.events["ts_ns"].min()) for item in items)
    last = max(int(item.events["ts_ns"].max()) for item in items)
    live = Live(reader.header)
    lives = 3  # processes, in this recording
    rounds = 101
    entered: dict[int, int | None] = {}
    for number in range(rounds):
        for item in items:
            events = item.events.copy()
            events["ts_ns"] += np.uint64(number * (last - first + 1000))
            live.take(Batch(events))
        picture = live.picture()
        assert len(picture.processes) <= 64 + lives
        assert sum(map(len, picture.tail)) < 2000
        for one in picture.processes:  # a key is one process's for good
            assert entered.setdefault(one.key, one.entered_ns) == one.entered_ns
    assert picture.processes_forgotten + len(picture.processes) == rounds * lives
    assert len({one.key for one in picture.processes}) == len(picture.processes)
    assert picture.merges is not None and picture.merges.succeeded == rounds * 303


def test_a_process_that_a_sample_tells_of_before_its_events_is_listed_once():
    reader = opened("guest-6.1-midlife")
    live = Live(reader.header)
    for item in reader:
        live.take(item)
        live.picture(all_of_it=True)  # settles the sample
    told = live.picture(all_of_it=True).processes
    assert len(told) == len(find_processes(whole("guest-6.1-midlife"))) == 3
    assert all(one.stat for one in told)


@pytest.mark.parametrize("part", [None, 101])
@pytest.mark.parametrize("name", ["contended-storm", "contended-knobs"])
def test_waits_are_the_reports(name, part):
    told = final(name, part).waits
    for lock, found in find_contention(whole(name)).items():
        assert told[lock] == found
    assert any(lock.waits for lock in told.values())


def test_the_worst_waits_outlive_the_events_that_told_of_them(monkeypatch):
    monkeypatch.setattr(topics, "KEPT_WAITS", 100)
    reader = opened("contended-storm")
    live = Live(reader.header)
    for item in reader:
        if isinstance(item, Batch):
            for begin in range(0, len(item.events), 53):
                live.take(Batch(item.events[begin : begin + 53]))
                live.settle()
        else:
            live.take(item)
    told = live.picture(all_of_it=True).waits
    for lock, found in find_contention(whole("contended-storm")).items():
        assert [wait.duration_ns for wait in told[lock].worst] == [
            wait.duration_ns for wait in found.worst
        ]
        assert told[lock].waits == found.waits
    waiters = sum(party.waits for lock in told.values() for party in lock.waiters)
    assert 0 < waiters < 200
