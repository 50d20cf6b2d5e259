"""The report of real recordings, against numbers that follow from the workloads' definitions."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ksmtrace.analysis.merges import find_merges
from ksmtrace.analysis.passes import df_passes
from ksmtrace.analysis.recorded import Recorded
from ksmtrace.analysis.report import make_report
from ksmtrace.events import KIND_BY_NAME, concatenate
from ksmtrace.stream import Losses

NAMES = sorted(path.stem for path in Path(__file__).parents[1].glob("golden/recordings/*.ksmt"))
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
    }
    assert report["zero_pages"] == {"attempts": zero, "succeeded": zero, "failed": 0}


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"cow", "losses"}))
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
    assert report["contention"] is None
    assert len(report["not_visible"]) >= 15


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
