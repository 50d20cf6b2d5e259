"""The report of real recordings, against numbers that follow from the workloads' definitions."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ksmtrace.analysis.addresses import next_place, number_lives
from ksmtrace.analysis.books import balance
from ksmtrace.analysis.merges import find_merges, infer_outcomes
from ksmtrace.analysis.migrations import nodes_of
from ksmtrace.analysis.passes import df_passes
from ksmtrace.analysis.recorded import Recorded
from ksmtrace.analysis.report import make_report
from ksmtrace.analysis.visits import slot_bounds
from ksmtrace.events import (
    EVENT_DTYPE,
    KIND_BY_NAME,
    KINDS,
    EventFlag,
    Lock,
    concatenate,
    of_kind,
)
from ksmtrace.stream import Losses

NAMES = sorted(path.stem for path in Path(__file__).parents[1].glob("golden/recordings/*.ksmt"))
GUESTS = [name for name in NAMES if name.startswith("guest-")]
EQUAL = ("full_scans", "pages_shared", "pages_sharing", "ksm_zero_pages")


@pytest.fixture
def report_of(golden):
    return lambda name: make_report(golden(name))


def entries(report):
    return {entry["counter"]: entry for entry in report["counters"]}


def verdicts(report):
    return {name: entries(report)[name]["verdict"] for name in EQUAL}


def without(recorded: Recorded, mask) -> Recorded:
    """Leave events out, and make the tallies agree: as if the kernel had not fired them."""
    events = concatenate([recorded.events[~mask]])
    counts = Recorded(recorded.header, events).counts()
    assert recorded.trailer is not None
    return replace(
        recorded,
        events=events,
        losses=[Losses(recorded.losses[-1].ts_ns, counts, dict.fromkeys(counts, 0))],
        trailer=replace(recorded.trailer, recorded=counts),
    )


def is_kind(recorded, name):
    return recorded.events["kind"] == KIND_BY_NAME[name].number


@pytest.mark.parametrize(
    ("name", "attempts", "succeeded", "failed", "nodes", "zero"),
    [
        ("duplicates", 303, 303, {}, 7, 0),
        ("lifetime", 303, 303, {}, 7, 0),
        ("killed", 303, 303, {}, 7, 0),
        ("unique", 0, 0, {}, 0, 0),
        ("volatile", 0, 0, {}, 0, 0),
        ("zero", 0, 0, {}, 0, 202),
        ("fork", 303, 303, {}, 7, 0),
        ("cow", 106, 106, {}, 53, 0),
        # 40 pairs; of 5 the page in the unstable tree is pinned, of 3 the other one.
        ("pinned", 77, 64, {"EFAULT": 8, "undone": 5}, 32, 0),
        ("crash", 0, 0, {}, 0, 0),
        ("guest-5.10-cow", 106, 106, {}, 53, 0),
        ("guest-6.1-lifetime", 303, 303, {}, 7, 0),
        ("guest-6.12-pinned-derived", 77, 64, {"EFAULT": 8, "undone": 5}, 32, 0),
        ("guest-7.x-fork-every-page", 303, 303, {}, 7, 0),
        ("guest-7.x-moves", 217, 217, {}, 7, 0),
    ],
)
def test_merges_have_their_outcomes(report_of, name, attempts, succeeded, failed, nodes, zero):
    report = report_of(name)
    assert report["merges"] == {
        "attempts": attempts,
        "succeeded": succeeded,
        "failed": failed,
        "success_rate": succeeded / attempts if attempts else None,
        "new_stable_nodes": nodes,
        "failed_by_cause": None,  # younger than these recordings
    }
    assert report["zero_pages"] == {"attempts": zero, "succeeded": zero, "failed": 0}


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"cow", "losses", *GUESTS}))
def test_counters_agree_with_the_events_exactly(report_of, name):
    assert verdicts(report_of(name)) == dict.fromkeys(EQUAL, "exact")


def test_pages_that_left_singly_explain_the_difference(report_of):
    report = report_of("cow")
    entry = entries(report)["pages_sharing"]
    assert (entry["delta"], entry["events_say"], entry["difference"]) == (42, 53, -11)
    assert entry["verdict"] == "explained"
    assert entries(report)["cow_ksm"]["delta"] == 11
    differences = {p["comm"]: p["difference"] for p in report["processes"]}
    assert differences == {"ksm-cow-0": -11, "ksm-cow-1": 0}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("duplicates", {f"ksm-dup-{i}": (101, 101, 101, 0) for i in range(3)}),
        ("fork", {name: (101, 101, 101, 0) for name in ("ksm-fork-0", "ksm-heir-0", "ksm-heir-1")}),
        ("unique", {f"ksm-uniq-{i}": (0, 0, 101, 0) for i in range(2)}),
        ("volatile", {f"ksm-vola-{i}": (0, 0, 53, 0) for i in range(2)}),
        ("zero", {f"ksm-zero-{i}": (0, 0, 0, 101) for i in range(2)}),
        ("cow", {"ksm-cow-0": (53, 42, 53, 0), "ksm-cow-1": (53, 53, 53, 0)}),
    ],
)
def test_processes_have_their_own_names_and_numbers(report_of, name, expected):
    found = {
        p["comm"]: (
            p["merged_pages"],
            p["ksm_merging_pages"],
            p["ksm_rmap_items"],
            p["zero_merged_pages"],
        )
        for p in report_of(name)["processes"]
    }
    assert found == expected


def test_processes_that_share_all_their_pages_share_them_with_each_other(report_of):
    for process in report_of("duplicates")["processes"]:
        assert process["shared_with_others_pages"] == 101
        assert {(o["comm"][:7], o["pages"]) for o in process["shared_with"]} == {("ksm-dup", 101)}
        assert process["pid"] not in {other["pid"] for other in process["shared_with"]}


def test_passes_have_their_merges(report_of):
    def passes(name):
        return [(p["merged"], p["rmap_entries"]) for p in report_of(name)["scans"]["passes"]]

    assert passes("duplicates") == [(0, 303), (303, 303)]
    assert passes("fork") == [(0, 101), (101, 101), (202, 303)]
    assert passes("volatile") == [(0, 106)] * 3
    assert passes("lifetime") == [(0, 303), (303, 303), (0, 0)]
    assert passes("crash") == []


def test_removals_of_a_whole_lifetime(report_of):
    removals = report_of("lifetime")["removals"]
    assert removals["stable_nodes_freed"] == 7
    assert removals["sharers_removed_with_node"] == 296
    assert removals["single_removals"] is None  # not visible is not zero


def test_losses_make_every_verdict_unknown(report_of):
    report = report_of("losses")
    assert f"{report['lost']:,} events found the ring full" in report["findings"][0]
    assert report["findings"][0].endswith("record with a larger --ring than 4.0 KiB")
    assert report["complete"] is False
    assert report["lost"] == sum(report["lost_by_kind"].values()) == 247
    assert verdicts(report) == dict.fromkeys(EQUAL, "unknown")
    assert report["merges"]["success_rate"] is None
    assert {p["difference"] for p in report["processes"]} == {None}
    assert report["events"]["ksm_merge_with_ksm_page"] + 246 == 303


@pytest.mark.parametrize("name", NAMES)
def test_every_report_is_json_with_the_documented_keys(report_of, name):
    report = json.loads(json.dumps(report_of(name), allow_nan=False))
    assert {
        "complete", "lost", "events", "merges", "scans", "trees", "contention", "counters",
        "processes",
    } <= set(report)  # fmt: skip
    assert {"attempts", "succeeded", "failed", "success_rate"} <= set(report["merges"])
    assert {
        "stable_nodes", "stable_rmap_items", "unstable_rmap_items", "chains", "dups",
    } <= set(report["trees"])  # fmt: skip
    for process in report["processes"]:
        assert {"pid", "comm", "cgroup", "merged_pages"} <= set(process)
    assert set(report["contention"]) == {lock.name.lower() for lock in Lock}
    assert len(report["not_visible"]) >= (8 if name in GUESTS else 15)


# --- real events left out


def test_a_first_step_without_its_second_is_open(golden):
    recorded = golden("cow")
    second = np.zeros(len(recorded.events), bool)
    second[np.flatnonzero(is_kind(recorded, "ksm_merge_with_ksm_page"))[1]] = True
    report = make_report(without(recorded, second))
    assert report["merges"]["failed"] == {"open": 1}
    assert report["merges"]["succeeded"] == 104
    assert report["merges"]["new_stable_nodes"] == 52
    assert entries(report)["pages_shared"]["difference"] == 1


def test_a_recording_that_ends_between_the_steps_of_a_pair_leaves_it_open(golden):
    recorded = golden("cow")
    places = np.flatnonzero(is_kind(recorded, "ksm_merge_with_ksm_page"))
    events = concatenate([recorded.events[: places[0] + 1]])
    merges = find_merges(replace(recorded, events=events))
    assert (merges.by_reason(), int(merges.appended.sum())) == ({"open": 1}, 0)


def test_merges_that_the_kernel_counts_and_no_event_shows_are_a_contradiction(golden):
    recorded = golden("duplicates")
    mask = np.zeros(len(recorded.events), bool)
    mask[np.flatnonzero(is_kind(recorded, "ksm_merge_with_ksm_page"))[-5:]] = True
    report = make_report(without(recorded, mask))
    entry = entries(report)["pages_sharing"]
    assert (entry["difference"], entry["verdict"]) == (5, "contradiction")
    assert any("pages_sharing moved by 296" in finding for finding in report["findings"])


def test_removals_that_no_event_shows_are_explained(golden):
    recorded = golden("lifetime")
    report = make_report(without(recorded, is_kind(recorded, "ksm_remove_rmap_item")))
    entry = entries(report)["pages_sharing"]
    assert (entry["difference"], entry["verdict"]) == (-296, "explained")


def test_events_that_are_unaccounted_for_make_it_incomplete(golden):
    recorded = golden("lifetime")
    changed = replace(recorded, events=concatenate([recorded.events[:-3]]))
    reasons = make_report(changed)["incomplete_because"]
    assert reasons == [
        "3 events are unaccounted for",
        "the events in the file are not those the trailer counts",
    ]


@pytest.mark.parametrize(
    ("dropped", "expected"),
    [
        (("ksm_start_scan", 1), [(True, True, 0), (False, True, 303), (True, True, 0)]),
        (("ksm_stop_scan", 1), [(True, True, 0), (True, False, 303), (True, True, 0)]),
        (("ksm_start_scan", 0), [(False, True, 0), (True, True, 303), (True, True, 0)]),
        (("ksm_stop_scan", 2), [(True, True, 0), (True, True, 303), (True, False, 0)]),
    ],
)
def test_a_pass_seen_by_half_is_one_row_and_counts_no_merge_twice(golden, dropped, expected):
    recorded = golden("lifetime")
    mask = np.zeros(len(recorded.events), bool)
    mask[np.flatnonzero(is_kind(recorded, dropped[0]))[dropped[1]]] = True
    passes = df_passes(without(recorded, mask))
    rows = list(
        zip(
            passes["begin_ns"].notna().tolist(),
            passes["end_ns"].notna().tolist(),
            passes["merged"].tolist(),
            strict=True,
        )
    )
    assert rows == expected


def test_without_samples_nothing_is_judged(golden):
    report = make_report(replace(golden("lifetime"), samples=[]))
    assert report["counters"] == []
    assert report["trees"]["stable_nodes"] is None
    assert any("no sample" in finding for finding in report["findings"])


def test_kinds_that_the_kernel_does_not_have_are_absent_and_not_zero(golden):
    recorded = golden("duplicates")
    plan = [{**entry, "rung": "absent"} for entry in recorded.header.plan]
    report = make_report(replace(recorded, header=replace(recorded.header, plan=plan)))
    assert report["merges"] is None
    assert report["scans"] is None
    assert report["zero_pages"] is None
    assert all(entry["verdict"] == "sampled" for entry in report["counters"])


# --- recordings made in guests, with programs on the kernel's own functions

JOINS_AND_LEAVES = (
    "stable_tree_append",
    "remove_rmap_item_from_tree",
    "remove_node_from_stable_tree",
)


def first(recorded, name):
    mask = np.zeros(len(recorded.events), bool)
    mask[np.flatnonzero(is_kind(recorded, name))[0]] = True
    return mask


def changed(recorded, mask, **fields):
    """Give the chosen events other fields: as if the kernel had done that."""
    events = recorded.events.copy()
    for field, value in fields.items():
        events[field][mask] = value
    return replace(recorded, events=events)


@pytest.mark.parametrize(
    ("name", "release", "expected"),
    [
        ("guest-5.10-cow", "5.10.", {"pages_shared": 53, "pages_sharing": 53 - 11}),
        ("guest-6.1-lifetime", "6.1.", {"full_scans": 3, "pages_shared": 0, "pages_sharing": 0}),
        (
            "guest-6.12-pinned-derived",
            "6.12.",
            {"full_scans": 2, "pages_shared": 32, "pages_sharing": 32, "pages_scanned": 160}
            | {"pages_skipped": 0, "ksm_zero_pages": 0},
        ),
        (
            "guest-7.x-fork-every-page",
            "7.",
            {"full_scans": 3, "pages_shared": 7, "pages_sharing": 296, "pages_scanned": 505}
            | {"ksm_zero_pages": 0},
        ),
        ("guest-7.x-moves", "7.", {"pages_shared": 0, "pages_sharing": 0, "pages_scanned": 434}),
    ],
)
def test_books_of_a_guest_are_exact(report_of, name, release, expected):
    report = report_of(name)
    assert report["kernel"]["release"].startswith(release)
    assert (report["complete"], report["lost"], report["findings"]) == (True, 0, [])
    found = {
        counter: (entry["delta"], entry["events_say"], entry["verdict"])
        for counter, entry in entries(report).items()
        if counter in expected
    }
    assert found == {counter: (n, n, "exact") for counter, n in expected.items()}


@pytest.mark.parametrize("name", GUESTS)
def test_books_are_exact_or_unknown_up_to_every_sample(golden, name):
    recorded = golden(name)
    verdicts = [
        entry.verdict
        for end in range(2, len(recorded.samples) + 1)
        for entry in balance(replace(recorded, samples=recorded.samples[:end]))
        if entry.counter in ("pages_shared", "pages_sharing", "pages_scanned", "pages_skipped")
    ]
    assert set(verdicts) <= {"exact", "unknown", "sampled"}
    assert "exact" in verdicts


@pytest.mark.parametrize(
    ("name", "missing", "counter", "difference"),
    [
        ("guest-5.10-cow", "stable_tree_append", "pages_shared", 1),
        ("guest-5.10-cow", "remove_rmap_item_from_tree", "pages_sharing", -1),
        ("guest-6.1-lifetime", "remove_node_from_stable_tree", "pages_shared", -1),
    ],
)
def test_a_join_or_leave_that_no_event_shows_is_a_contradiction(
    golden, name, missing, counter, difference
):
    recorded = golden(name)
    report = make_report(without(recorded, first(recorded, missing)))
    entry = entries(report)[counter]
    assert (entry["difference"], entry["verdict"]) == (difference, "contradiction")
    assert any(counter in finding for finding in report["findings"])


def test_the_flags_of_joins_and_leaves_decide_which_counter_moves(golden):
    recorded = golden("guest-5.10-cow")
    single = is_kind(recorded, "remove_rmap_item_from_tree")
    last = changed(recorded, single, flags=EventFlag.LAST_SHARER)
    differences = {e.counter: e.difference for e in balance(last)}
    assert (differences["pages_shared"], differences["pages_sharing"]) == (11, -11)
    stale = changed(recorded, single, flags=EventFlag.NODE_FREED)
    differences = {e.counter: e.difference for e in balance(stale)}
    assert (differences["pages_shared"], differences["pages_sharing"]) == (0, -11)


def test_a_chain_that_is_freed_is_no_sharer(golden):
    recorded = golden("guest-6.1-lifetime")
    freed = first(recorded, "remove_node_from_stable_tree")
    sharers = int(recorded.events["sharers"][freed][0])
    differences = {
        e.counter: e.difference for e in balance(changed(recorded, freed, sharers=-1024))
    }
    assert (differences["pages_shared"], differences["pages_sharing"]) == (-1, 1 - sharers)


def with_counts(recorded, from_reading, more):
    """Let the kernel side have counted more looks at pages, from one reading on."""
    losses = [
        replace(
            reading,
            counted=reading.counted
            | {
                "cmp_and_merge_page": reading.counted["cmp_and_merge_page"]
                + (more if index >= from_reading else 0)
            },
        )
        for index, reading in enumerate(recorded.losses)
    ]
    return replace(recorded, losses=losses)


@pytest.mark.parametrize("samples_before_the_end", [0, 1])
def test_looks_at_pages_that_the_kernel_does_not_count_are_a_contradiction(
    golden, samples_before_the_end
):
    recorded = golden("guest-7.x-fork-every-page")
    reading = len(recorded.samples) - 1 - samples_before_the_end
    entry = {e.counter: e for e in balance(with_counts(recorded, reading, 3000))}["pages_scanned"]
    assert (entry.difference, entry.verdict) == (-3000, "contradiction")


def test_a_sample_while_ksmd_scans_leaves_looks_at_pages_unknown(golden):
    recorded = golden("guest-7.x-fork-every-page")
    stops = is_kind(recorded, "ksm_stop_scan")
    scanning = replace(without(recorded, stops), losses=recorded.losses)
    reading = len(recorded.samples) - 1
    entry = {e.counter: e for e in balance(with_counts(scanning, reading, 5))}["pages_scanned"]
    assert (entry.difference, entry.verdict) == (-5, "unknown")


@pytest.mark.parametrize("name", GUESTS)
def test_appends_and_inference_tell_the_same_of_every_attempt(golden, name):
    merges = find_merges(golden(name))
    inferred = infer_outcomes(merges.events, merges.places)
    for outcome in ("appended", "pairs", "undone", "open"):
        assert np.array_equal(getattr(merges, outcome), getattr(inferred, outcome)), outcome


def test_a_pair_that_is_never_appended_is_undone(golden):
    recorded = golden("guest-5.10-cow")
    mask = np.zeros(len(recorded.events), bool)
    mask[np.flatnonzero(is_kind(recorded, "stable_tree_append"))[:2]] = True
    merges = find_merges(without(recorded, mask))
    assert merges.by_reason() == {"undone": 2}
    assert (int(merges.appended.sum()), int(merges.pairs.sum())) == (104, 52)


@pytest.mark.parametrize(("appends", "opened"), [(0, 2), (1, 1), (2, 0)])
def test_a_recording_that_ends_before_the_append_leaves_it_open(golden, appends, opened):
    recorded = golden("guest-5.10-cow")
    second = np.flatnonzero(is_kind(recorded, "ksm_merge_with_ksm_page"))[1]
    ends = [second, *np.flatnonzero(is_kind(recorded, "stable_tree_append"))]
    events = concatenate([recorded.events[: ends[appends] + 1]])
    merges = find_merges(replace(recorded, events=events))
    assert merges.by_reason() == ({"open": opened} if opened else {})


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("guest-6.1-lifetime", {f"ksm-dup-{i}": (101, 101, 0, 101, 0) for i in range(3)}),
        ("guest-7.x-moves", {"python": (217, 217, 0, 0, 0)}),
        (
            "guest-7.x-fork-every-page",
            {name: (101, 0, 0, 101, 0) for name in ("ksm-fork-0", "ksm-heir-0", "ksm-heir-1")},
        ),
        # Linux 5.10 has no counts per process.
        (
            "guest-5.10-cow",
            {"ksm-cow-0": (53, 0, 11, None, None), "ksm-cow-1": (53, 0, 0, None, None)},
        ),
    ],
)
def test_processes_of_guests_agree_with_the_events_exactly(report_of, name, expected):
    found = {
        p["comm"]: (
            p["merged_pages"],
            p["removed_pages"],
            p["left_singly_pages"],
            p["ksm_merging_pages"],
            p["difference"],
        )
        for p in report_of(name)["processes"]
    }
    assert found == expected


def test_pages_that_the_events_do_not_explain_are_a_process_difference(golden):
    recorded = golden("guest-7.x-fork-every-page")
    report = make_report(without(recorded, first(recorded, "stable_tree_append")))
    assert sorted(p["difference"] for p in report["processes"]) == [0, 0, 1]


def test_a_sharer_that_left_singly_is_not_its_nodes_last_one(golden):
    recorded = golden("guest-6.1-lifetime")
    single = KIND_BY_NAME["remove_rmap_item_from_tree"].number
    report = make_report(changed(recorded, first(recorded, "ksm_remove_rmap_item"), kind=single))
    left = [(p["removed_pages"], p["left_singly_pages"]) for p in report["processes"]]
    assert sorted(left) == [(100, 1), (101, 0), (101, 0)]
    assert {p["difference"] for p in report["processes"]} == {0}


def test_a_process_that_inherits_its_parents_count_begins_with_it(golden):
    # Linux 6.1's ksm_fork leaves the child the parent's ksm_merging_pages.
    recorded = golden("guest-6.1-lifetime")
    enters, exits = is_kind(recorded, "ksm_enter"), is_kind(recorded, "ksm_exit")
    mm = recorded.events["mm"][enters][0]
    inherited = (enters | exits) & (recorded.events["mm"] == mm)
    counts = recorded.events["ksm_merging_pages"][inherited] + 7
    processes = make_report(changed(recorded, inherited, ksm_merging_pages=counts))["processes"]
    assert sorted(p["first_merging_pages"] for p in processes) == [0, 0, 7]
    assert {p["difference"] for p in processes} == {0}


def test_looks_at_pages_are_counted_per_process_where_they_are_events(report_of):
    processes = report_of("guest-7.x-fork-every-page")["processes"]
    # The look at the last heir's last page has no event before ksmd goes on to another.
    assert sorted((p["comm"][:8], p["visited_pages"]) for p in processes) == [
        ("ksm-fork", 303),
        ("ksm-heir", 100),
        ("ksm-heir", 101),
    ]
    assert {p["visited_pages"] for p in report_of("guest-6.1-lifetime")["processes"]} == {None}


def test_single_removals_are_known_where_they_are_caught(report_of):
    report = report_of("guest-5.10-cow")
    writer = next(p["pid"] for p in report["processes"] if p["comm"] == "ksm-cow-0")
    assert report["removals"]["single_removals"] == {
        "sharers": 11,
        "last_of_their_node": 0,
        "by_pid": {str(writer): 11},
    }
    lifetime = report_of("guest-6.1-lifetime")["removals"]
    assert (lifetime["stable_nodes_freed"], lifetime["sharers_removed_with_node"]) == (7, 296)
    assert lifetime["single_removals"] == {"sharers": 0, "last_of_their_node": 0, "by_pid": {}}


@pytest.mark.parametrize(
    ("name", "rungs", "pages", "skips", "searches"),
    [
        # 106 pages, four passes; no stable node in the first two, and none matches a changed page.
        (
            "guest-5.10-cow",
            {"inlined site"},
            424,
            None,
            None,
        ),
        # Without a tree there is no search to be seen: the first pairs' are missing.
        ("guest-6.12-pinned-derived", {"derived"}, 160, 0, None),
        # 7 contents new to the tree take two searches each; 2 heirs look 101 pages up at once,
        # and the search of the last page is not over when the recording ends.
        (
            "guest-7.x-fork-every-page",
            {"inlined site"},
            505,
            None,
            {"none": 14, "found": 87, "same_page": 201, "busy": 0},
        ),
        (
            "guest-7.x-moves",
            {"inlined site"},
            434,
            None,
            {"none": 14, "found": 202, "same_page": 0, "busy": 0},
        ),
    ],
)
def test_visits_follow_from_the_workload(report_of, name, rungs, pages, skips, searches):
    visits = report_of(name)["visits"]
    assert set(visits["rungs"].values()) == rungs
    assert (visits["pages"], visits["smart_scan_skips"]) == (pages, skips)
    if searches:
        assert visits["searches"] == searches
    slots = visits["search_nodes"]["slots"]
    assert sum(slot["count"] for slot in slots) == sum(visits["searches"].values())
    between = sum(slot["count"] for slot in visits["visit_interval_ns"]["slots"])
    assert between == pages - 1


def test_events_of_every_page_are_what_the_kernel_side_counts(golden, report_of):
    recorded, report = golden("guest-7.x-fork-every-page"), report_of("guest-7.x-fork-every-page")
    searches = of_kind(recorded.events, "stable_tree_search")
    # The last page's event comes when ksmd goes on.
    assert report["events"]["cmp_and_merge_page"] == report["visits"]["pages"] - 1
    assert np.bincount(searches["outcome"], minlength=4).tolist() == list(
        report["visits"]["searches"].values()
    )
    for slot in report["visits"]["search_nodes"]["slots"]:
        inside = (searches["nodes"] >= slot["from"]) & (searches["nodes"] < slot["below"])
        assert int(inside.sum()) == slot["count"], slot


def test_a_histogram_says_where_its_median_and_99th_percentile_are(golden):
    recorded = golden("guest-6.1-lifetime")
    counts = [0, 0, 50, 48, 1, 0, 1, *[0] * 57]
    reading = replace(recorded.losses[-1], histograms={"search_nodes": counts})
    visits = make_report(replace(recorded, losses=[reading]))["visits"]
    assert visits["visit_interval_ns"] is None
    assert (visits["search_nodes"]["median"], visits["search_nodes"]["p99"]) == ([2, 4], [8, 16])
    assert visits["search_nodes"]["slots"][0] == {"from": 2, "below": 4, "count": 50}
    assert [slot["count"] for slot in visits["search_nodes"]["slots"]] == [50, 48, 1, 0, 1]
    assert [slot_bounds(slot) for slot in (0, 1, 2, 63)] == [(0, 1), (1, 2), (2, 4), (2**62, 2**63)]


def test_calls_tell_entries_exits_results_and_durations(report_of):
    calls = report_of("guest-6.12-pinned-derived")["calls"]
    one_page = calls["try_to_merge_one_page"]
    assert (one_page["entered"], one_page["returned"], one_page["missed"]) == (77, 77, 0)
    assert one_page["results"] == {"0": 69, "EFAULT": 8}
    duration = one_page["duration"]
    assert 0 < duration["median_ns"] <= duration["p99_ns"] <= duration["max_ns"] < 10**9
    # Five first steps were undone.
    assert calls["break_ksm"]["results"] == {"0": 5}
    assert (calls["stable_tree_append"]["entered"], calls["stable_tree_append"]["returned"]) == (
        64,
        None,
    )
    assert calls["stable_tree_append"]["results"] is None


@pytest.mark.parametrize(("returned", "missed"), [(303, 0), (300, 0), (299, 4)])
def test_exits_that_a_kretprobe_missed_are_a_finding(golden, returned, missed):
    recorded = golden("guest-6.1-lifetime")
    calls = recorded.losses[-1].calls | {"try_to_merge_one_page": [303, returned]}
    losses = [*recorded.losses[:-1], replace(recorded.losses[-1], calls=calls)]
    report = make_report(replace(recorded, losses=losses))
    assert report["calls"]["try_to_merge_one_page"]["missed"] == missed
    found = [f for f in report["findings"] if "try_to_merge_one_page was entered 303" in f]
    assert len(found) == bool(missed)


def test_unmerges_are_told_by_task_and_by_owner(golden, report_of):
    report = report_of("guest-7.x-moves")
    (process,) = report["processes"]
    me = {"pid": process["pid"], "comm": "python", "calls": 2, "pages": 217}
    unmerges = report["unmerges"]
    assert (unmerges["calls"], unmerges["pages"], unmerges["ranges"]) == (2, 217, True)
    assert unmerges["failed"] == {}
    assert unmerges["by_task"] == unmerges["by_owner"] == [me]
    # Made before do_wp_page was caught.
    assert (unmerges["copied"], unmerges["faults"]) == (None, None)
    assert [(w["run"], w["result"], w["pid"]) for w in unmerges["run_writes"]] == [
        (1, "0", process["pid"]),
        (0, "0", process["pid"]),
        (2, "0", process["pid"]),
    ]
    assert unmerges["duration"]["max_ns"] >= unmerges["duration"]["median_ns"] > 0
    undone = report_of("guest-6.12-pinned-derived")["unmerges"]
    assert (undone["calls"], undone["pages"], undone["ranges"]) == (5, 5, False)
    assert [row["comm"] for row in undone["by_task"]] == ["ksmd"]
    recorded = golden("guest-7.x-moves")
    failed = changed(recorded, first(recorded, "break_ksm"), err=-12)
    assert make_report(failed)["unmerges"]["failed"] == {"ENOMEM": 1}


def test_migrations_are_told_by_node(golden, report_of):
    migrations = report_of("guest-7.x-moves")["migrations"]
    assert (migrations["pages"], migrations["left_behind"], migrations["stable_nodes"]) == (7, 0, 5)
    assert migrations["routes"] == [
        {"from_node": 0, "to_node": 1, "pages": 6},
        {"from_node": 1, "to_node": 0, "pages": 1},
    ]
    assert [mover["moves"] for mover in migrations["busiest"]] == [3, 1, 1, 1, 1]
    recorded = golden("guest-7.x-moves")
    moves = of_kind(recorded.events, "ksm_migrate_page")
    for mover in migrations["busiest"]:
        mine = moves["stable_node"] == int(mover["stable_node"], 16)
        assert mover["pfn"] == moves["new_pfn"][mine][-1]
    facts = {**recorded.header.facts, "node_pages": None}
    nowhere = replace(recorded, header=replace(recorded.header, facts=facts))
    assert make_report(nowhere)["migrations"]["routes"] == [
        {"from_node": None, "to_node": None, "pages": 7}
    ]


def test_a_stable_node_left_behind_by_a_migration_is_a_finding(golden):
    recorded = golden("guest-7.x-moves")
    report = make_report(changed(recorded, first(recorded, "ksm_migrate_page"), kpfn_after=1))
    assert report["migrations"]["left_behind"] == 1
    assert any("1 of 7 KSM pages moved without" in finding for finding in report["findings"])


def test_page_frames_are_found_in_their_nodes():
    ranges = {"1": [[100, 200], [400, 500]], "0": [[0, 100], [200, 300]]}
    pfns = np.array([0, 99, 100, 199, 200, 299, 300, 399, 400, 499, 500, 2**52], np.uint64)
    assert nodes_of(ranges, pfns).tolist() == [0, 0, 1, 1, 0, 0, -1, -1, 1, 1, -1, -1]
    assert nodes_of({}, pfns).tolist() == [-1] * 12


def test_kinds_that_a_recording_does_not_have_are_absent_and_not_zero(report_of):
    old = report_of("duplicates")
    assert old["complete"] is True
    assert old["events"]["ksm_advisor"] == 0
    younger = [kind.name for kind in KINDS if not kind.has_tracepoint]
    assert {old["events"][name] for name in younger} == {None}
    assert [old[key] for key in ("visits", "calls", "unmerges", "migrations")] == [None] * 4
    assert old["removals"]["single_removals"] is None
    assert {rate["left_singly"] for rate in old["rates"]} == {None}
    guest = report_of("guest-5.10-cow")["events"]
    assert (guest["ksm_advisor"], guest["break_ksm"]) == (None, 0)
    # They happened and were counted; events of them were not asked for.
    assert (guest["cmp_and_merge_page"], guest["stable_tree_search"]) == (None, None)


@pytest.mark.parametrize(
    ("name", "entries_and_merges"),
    [
        ("guest-5.10-cow", [(106, 0), (106, 106), (106, 0), (106, 0)]),
        ("guest-6.1-lifetime", [(303, 0), (303, 303), (0, 0)]),
    ],
)
def test_derived_passes_are_whole(golden, name, entries_and_merges):
    recorded = golden(name)
    assert recorded.rung("ksm_start_scan") == recorded.rung("ksm_stop_scan") == "derived"
    passes = df_passes(recorded)
    assert list(zip(passes["rmap_entries"], passes["merged"], strict=True)) == entries_and_merges
    assert passes["seq"].diff().dropna().eq(1).all()
    assert (passes["begin_ns"].iloc[1:].to_numpy() > passes["end_ns"].iloc[:-1].to_numpy()).all()
    # A pass over pages takes time, and ksmd uses no more of a CPU than there was, to a tick.
    assert passes["duration_ns"].gt(0).all()
    assert (passes["cpu_ns"] <= passes["duration_ns"] + 10_000_000).all()


def test_what_follows_an_event_is_found_as_by_hand():
    random = np.random.default_rng(7)
    events = np.zeros(200, EVENT_DTYPE)
    events["stable_node"] = random.integers(0, 9, 200)
    chosen = np.flatnonzero(random.random(200) < 0.5)
    later = np.flatnonzero(random.random(200) < 0.2)
    nodes = events["stable_node"]
    expected = [next((p for p in later if p > c and nodes[p] == nodes[c]), 200) for c in chosen]
    assert next_place(events, "stable_node", chosen, later).tolist() == expected
    ends = np.setdiff1d(later, chosen)
    lives = number_lives(events, "stable_node", chosen, ends)
    for one, place in zip(lives, chosen, strict=True):
        for other, other_place in zip(lives, chosen, strict=True):
            begin, end = sorted((place, other_place))
            same = nodes[begin] == nodes[end] and not any(
                nodes[p] == nodes[begin] for p in ends if begin < p < end
            )
            assert (one == other) == same
