"""Parts of a recording: what their reports say adds up to what the whole one says."""

import itertools
import json
import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ksmtrace.analysis.books import balance
from ksmtrace.analysis.merges import find_merges
from ksmtrace.analysis.passes import df_passes
from ksmtrace.analysis.processes import find_processes
from ksmtrace.analysis.recorded import Recorded
from ksmtrace.analysis.report import make_report
from ksmtrace.analysis.selection import between, of_pids
from ksmtrace.analysis.sharers import find_sharers
from ksmtrace.cli import main
from ksmtrace.events import KIND_BY_NAME

RECORDINGS = Path(__file__).parents[1] / "golden" / "recordings"
NAMES = sorted(path.stem for path in RECORDINGS.glob("*.ksmt"))
SUMS = (
    ("events",),
    ("scans", "completed"),
    ("visits", "pages"),
    ("visits", "smart_scan_skips"),
    ("visits", "searches"),
    ("merges", "attempts"),
    ("merges", "succeeded"),
    ("merges", "failed"),
    ("merges", "new_stable_nodes"),
    ("outcomes", "pages", "total"),
    ("outcomes", "pages", "visited_pages"),
    ("removals", "stable_nodes_freed"),
    ("removals", "sharers_removed_with_node"),
    ("removals", "freed_by_pid"),
    ("removals", "single_removals", "sharers"),
    ("removals", "single_removals", "last_of_their_node"),
    ("removals", "single_removals", "by_pid"),
    ("unmerges", "calls"),
    ("unmerges", "pages"),
    ("unmerges", "failed"),
    ("migrations", "pages"),
    ("zero_pages",),
)
OF_PROCESSES = {"merges", "zero_pages", "outcomes", "unmerges", "single_removals"}


@pytest.fixture
def report(monkeypatch, capsys):
    """Run the command in this process."""

    def run(file, *options):
        monkeypatch.setattr(sys, "argv", ["ksmtrace", "report", str(file), *options])
        with pytest.raises(SystemExit) as leaving:
            main()
        return leaving.value.code, *capsys.readouterr()

    return run


def numbers(content, path):
    """Return what is at a path, as a Counter; nothing where it is not known."""
    for key in path:
        content = (content or {}).get(key)
    if isinstance(content, dict):
        return Counter({key: value for key, value in content.items() if value})
    return Counter({"": content or 0})


def add(contents, path):
    total = Counter()
    for content in contents:
        total.update(numbers(content, path))
    return +total


def slots(content, name):
    histogram = (content["visits"] or {}).get(name) or {"slots": []}
    return Counter({slot["from"]: slot["count"] for slot in histogram["slots"]})


def calls(content):
    return Counter(
        {
            (name, side): call[side] or 0
            for name, call in (content["calls"] or {}).items()
            for side in ("entered", "returned")
        }
    )


def by_process(content, key):
    return Counter({(p["pid"], p["mm"]): p[key] or 0 for p in content["processes"]})


def cuts(recorded: Recorded) -> list[int]:
    """Choose edges in the thick of it, at exactly the time of an event, and at tallies."""
    times = np.sort(recorded.events["ts_ns"].astype(np.int64))
    edges = {int(times[len(times) * n // 4]) for n in (1, 3) if len(times)}
    edges |= {losses.ts_ns for losses in recorded.losses[1:-1:3]}
    return sorted(edge for edge in edges if recorded.begin_ns() < edge < recorded.end_ns())


@pytest.mark.parametrize("name", NAMES)
def test_adjacent_spans_add_up_to_the_whole(golden, name):
    recorded = golden(name)
    edges = [None, *cuts(recorded), None]
    spans = [between(recorded, *edge) for edge in itertools.pairwise(edges)]
    assert len(spans) > 1
    whole, parts = make_report(recorded), [make_report(span) for span in spans]
    json.dumps(parts, allow_nan=False)
    for path in SUMS:
        assert add(parts, path) == +numbers(whole, path), path
    for histogram in ("visit_interval_ns", "search_nodes"):
        assert sum((slots(part, histogram) for part in parts), Counter()) == +slots(
            whole, histogram
        )
    assert sum(map(calls, parts), Counter()) == +calls(whole)
    for lock in whole["contention"]:
        for key in ("waits", "total_wait_ns", "holds", "total_hold_ns"):
            path = ("contention", lock, key)
            assert add(parts, path) == +numbers(whole, path), path
    for key in ("merged_pages", "failed_attempts", "removed_pages", "left_singly_pages"):
        total = sum((by_process(part, key) for part in parts), Counter())
        assert total == +by_process(whole, key), key
    for column in ("attempts", "merged", "failed", "nodes_freed", "left_singly"):
        rates = [sum(row[column] or 0 for row in part["rates"]) for part in parts]
        assert sum(rates) == sum(row[column] or 0 for row in whole["rates"])
    assert sum(sum(p["merged"] for p in part["scans"]["passes"]) for part in parts) == sum(
        p["merged"] for p in whole["scans"]["passes"]
    )


@pytest.mark.parametrize("name", NAMES)
def test_processes_add_up_to_the_whole_and_what_has_no_process_stays(golden, name):
    recorded = golden(name)
    pids = {process.pid for process in find_processes(recorded)}
    assert None not in pids
    whole = make_report(recorded)
    parts = [make_report(of_pids(recorded, [pid])) for pid in pids]
    for path in SUMS:
        if OF_PROCESSES & set(path):
            assert add(parts, path) == +numbers(whole, path), path
    assert sorted(
        (json.dumps(p) for part in parts for p in part["processes"]),
    ) == sorted(json.dumps(p) for p in whole["processes"])
    for part in parts:
        of_all = part["selection"]["of_all_processes"]
        for topic in ("visits", "migrations", "trees", "counters", "calls", "ksmd"):
            assert topic in of_all
            assert part[topic] == whole[topic], topic
        assert part["scans"]["completed"] == whole["scans"]["completed"]
    mine = make_report(of_pids(recorded, pids))
    assert all(mine[topic] == whole[topic] for topic in ("merges", "processes", "events", "rates"))


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("guest-")])
def test_books_of_every_span_between_two_samples_are_exact_or_unknown(golden, name):
    recorded = golden(name)
    verdicts = Counter()
    for first in range(len(recorded.samples)):
        for last in range(first + 1, len(recorded.samples)):
            span = between(
                recorded, recorded.samples[first].begin_ns, recorded.samples[last].end_ns + 1
            )
            assert len(span.samples) == last - first + 1
            for entry in balance(span):
                if entry.counter in ("pages_shared", "pages_sharing"):
                    verdicts[entry.verdict] += 1
            assert {p.difference for p in find_processes(span)} <= {0, None}
    assert set(verdicts) <= {"exact", "unknown"}
    assert verdicts["exact"] > verdicts["unknown"]


def test_the_outcome_of_what_a_span_cuts_is_told_by_the_whole(golden):
    recorded = golden("guest-7.x-churn")
    places = find_merges(recorded).places
    between_steps = int(recorded.events["ts_ns"][places[1]])
    first, second = (
        find_merges(between(recorded, *edges))
        for edges in ((None, between_steps), (between_steps, None))
    )
    assert (len(first.events), int(first.appended.sum()), first.by_reason()) == (1, 1, {})
    assert int(second.pairs.sum()) == int(find_merges(recorded).pairs.sum())
    # A node's sharers keep its number, whichever span they joined in.
    late, whole = find_sharers(between(recorded, between_steps, None)), find_sharers(recorded)
    assert len(late.nodes) and set(late.nodes) <= set(whole.nodes)


def test_a_pass_that_a_span_cuts_is_marked_and_keeps_its_own_figures(golden):
    recorded = golden("guest-5.10-cow")
    whole = df_passes(recorded)
    inside = int(whole["begin_ns"][1]) + 1
    spans = [between(recorded, None, inside), between(recorded, inside, None)]
    first, second = map(df_passes, spans)
    assert (first["seq"].tolist(), first["cut"].tolist()) == ([0, 1], [False, True])
    assert second["cut"].tolist() == [True, False, False]
    assert first["duration_ns"][1] == second["duration_ns"][0] == whole["duration_ns"][1]
    assert first["merged"].sum() == 0 and second["merged"].tolist() == [106, 0, 0]
    assert [make_report(span)["scans"]["completed"] for span in spans] == [1, 3]
    # One that lasts longer than the span.
    middle = df_passes(between(recorded, inside, inside + 1000))
    assert (middle["seq"].tolist(), middle["cut"].tolist()) == ([1], [True])


def test_a_process_is_counted_from_the_first_sample_of_the_span(golden):
    recorded = golden("guest-7.x-moves")
    exit_ns = recorded.events["ts_ns"][recorded.events["kind"] == KIND_BY_NAME["ksm_exit"].number]
    (whole,) = find_processes(recorded)
    # Without the sample that is the last one before it left.
    (before,) = find_processes(between(recorded, None, int(exit_ns[0])))
    assert (whole.counted_by, before.counted_by) == ("ksm_exit", "sample")
    assert before.exited_ns == whole.exited_ns
    (after,) = find_processes(between(recorded, int(exit_ns[0]), None))
    assert (after.merged_pages, after.counted_by) == (0, "ksm_exit")
    assert find_processes(between(recorded, None, recorded.begin_ns() + 1_000_000_000)) == []


def test_a_loss_elsewhere_does_not_make_a_span_incomplete(golden):
    recorded = golden("losses")
    first = recorded.losses[0].ts_ns
    early, late = between(recorded, None, first), between(recorded, first, None)
    assert (early.why_incomplete(), sum(early.lost().values())) == ([], 0)
    assert sum(late.lost().values()) == 247
    (reason,) = late.why_incomplete()
    assert reason.startswith("up to 247 events")
    # One nanosecond later the tallies cannot tell any more on which side the losses were.
    assert sum(between(recorded, None, first + 1).lost().values()) == 247
    assert make_report(early)["complete"] and not make_report(late)["complete"]
    after = between(recorded, recorded.losses[1].ts_ns, None)
    assert (after.why_incomplete(), sum(after.lost().values())) == ([], 0)


def test_a_cut_off_recording_is_whole_up_to_a_tally_whose_events_it_holds(golden):
    recorded = golden("killed")
    last = recorded.losses[-1].ts_ns
    assert recorded.why_incomplete()
    assert between(recorded, None, last).why_incomplete() == []
    assert "cut off" in between(recorded, None, last + 1).why_incomplete()[0]
    lacking = replace(recorded, events=recorded.events[:-1])
    assert "cut off" in between(lacking, None, last).why_incomplete()[0]
    assert between(lacking, None, recorded.losses[2].ts_ns).why_incomplete() == []


def test_counts_that_nobody_read_in_the_span_are_unknown_and_not_zero(golden, report):
    recorded = golden("guest-5.10-cow")
    start = recorded.header.started_ns
    content = make_report(between(recorded, start + 36_000_000_000, start + 36_500_000_000))
    assert (content["visits"], content["calls"]) == (None, None)
    assert content["selection"]["tallies_end_ns"] is None
    file = RECORDINGS / "guest-5.10-cow.ksmt"
    _, text, _ = report(file, "--since", "36", "--until", "36.5")
    assert text.count("unknown: the kernel side's counts were not read in this span") == 2


def test_what_is_empty_or_chosen_twice_is_an_error(golden):
    recorded = golden("cow")
    start, end = recorded.begin_ns(), recorded.end_ns()
    for edges in ((start + 5, start + 5), (start + 6, start + 5), (end, None), (None, start)):
        with pytest.raises(ValueError, match="empty"):
            between(recorded, *edges)
    with pytest.raises(ValueError, match="whole"):
        between(between(recorded, start + 5, None), start + 6, None)
    with pytest.raises(ValueError, match="already"):
        of_pids(of_pids(recorded, [1]), [1])


def test_the_text_says_what_was_selected_and_what_could_not_be(report):
    file = RECORDINGS / "guest-5.10-cow.ksmt"
    _, text, _ = report(file, "--since", "35.2", "--until", "-0.3", "--pid", "158")
    third, fourth, fifth = text.splitlines()[2:5]
    assert third == "SELECTED: 35.200 s to 41.840 s, and of it what concerns ksm-cow-0 (158)"
    assert fourth == (
        "  the kernel's counters: 35.869 s to 41.613 s; the kernel side's counts: 35.032 s to "
        "41.686 s"
    )
    assert fifth.startswith("COMPLETE: ")
    assert "MERGES: 53 attempts, 53 pages merged" in text
    assert "PROCESSES: 1\n" in text and re.search(
        r"53 of 53 \(100%\)  ksm-cow-1 \(159\) +–\n", text
    )
    assert "SCAN PASSES: 4 complete\n  (of all processes: a pass goes through all" in text
    assert "per merged page" not in text  # ksmd's time is not only theirs
    _, text, _ = report(file, "--since", "41.1", "--section", "scans")
    assert "cut by the span" not in text
    _, text, _ = report(RECORDINGS / "losses.ksmt", "--since", "0.3")
    assert "INCOMPLETE: 63 events, up to 247 lost" in text
    _, text, _ = report(RECORDINGS / "losses.ksmt", "--until", "0.2")
    assert "COMPLETE: 0 events, none lost" in text


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (("--since", "2", "--until", "1"), "nothing is between"),
        (("--since", "-0"), "nothing is between"),
        (("--since", "43"), "has no time 43"),
        (("--until", "-43"), "has no time -43"),
        (("--since", "nan"), "has no time nan"),
        (("--since", "soon"), "is no time"),
        (("--pid", "1"), "tells nothing of process 1"),
        (("--pid", "x"), "not a valid integer"),
    ],
)
def test_a_selection_that_cannot_be_meant_is_status_2(report, options, error):
    status, text, told = report(RECORDINGS / "guest-5.10-cow.ksmt", *options)
    assert (status, text) == (2, "")
    assert error in told
