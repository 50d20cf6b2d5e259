"""Claims on a selftest of a real kernel (6.18, tracepoints only): as it was, and tampered with.

The files come from scripts/make_goldens.
"""

import json
import lzma
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from ksmtrace.claims.claim import Case, Exercised, Verdict, judge
from ksmtrace.claims.judgement import judge_all
from ksmtrace.claims.selftest import folder_for, read_performed, trials_for
from ksmtrace.claims.table import CLAIMS, choose
from ksmtrace.cli import ksmtrace
from ksmtrace.errors import LostVM, RecordingError, UsageError
from ksmtrace.events import (
    EVENT_DTYPE,
    KIND_BY_NAME,
    EventFlag,
    MergeStep,
    SearchOutcome,
    concatenate,
)
from ksmtrace.workload.trial import Trial
from ksmtrace.workload.trials import TRIALS

FOLDER = Path(__file__).parents[1] / "golden" / "selftest"
VISIT = "cmp_and_merge_page"
BY_ID = {claim.id: claim for claim in CLAIMS}


def unpacked(name, folder):
    """What ``selftest --save`` leaves."""
    shutil.copy(FOLDER / f"{name}.ksmt", folder / "selftest.ksmt")
    trials = lzma.decompress((FOLDER / f"{name}-trials.jsonl.xz").read_bytes())
    (folder / "trials.jsonl").write_bytes(trials)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return unpacked("selftest", tmp_path_factory.mktemp("selftest"))


@pytest.fixture(scope="module")
def case(folder):
    return read_performed(folder)


@pytest.fixture(scope="module")
def guest_case(tmp_path_factory):
    """What takes swap, cgroups, NUMA nodes and memory to offline: a guest of 6.12."""
    return read_performed(unpacked("guest-6.12", tmp_path_factory.mktemp("guest")))


def changed(case, trial_name, label, **changes):
    """Change a reading: ``counters``, ``processes`` and ``notes`` are updated, others replaced."""
    trial = case.trials[trial_name]
    readings = []
    for reading in trial.readings:
        if reading.label == label:
            for name, value in changes.items():
                if name in ("counters", "notes"):
                    value = {**getattr(reading, name), **value}
                reading = replace(reading, **{name: value})
        readings.append(reading)
    trials = {**case.trials, trial_name: replace(trial, readings=tuple(readings))}
    return Case(case.recorded, trials)


def moved(trial, label, **by):
    """Let counters be more or less than they were at a step."""

    def tamper(case):
        counters = case.trials[trial].at(label).counters
        values = {name: counters[name] + more for name, more in by.items()}
        return changed(case, trial, label, counters=values)

    return tamper


def noted(trial, label, **notes):
    return lambda case: changed(case, trial, label, notes=notes)


def process_says(trial, label, comm, **stat):
    def tamper(case):
        processes = dict(case.trials[trial].at(label).processes)
        processes[comm] = {**processes[comm], **stat}
        return changed(case, trial, label, processes=processes)

    return tamper


def witnessed_at(case, trial, label, change):
    """Change what kernel memory was read to hold at a step."""
    reading = case.trials[trial].at(label)
    witnessed = []
    for read in case.recorded.witnessed:
        if read.memory is not None and reading.begin_ns <= read.begin_ns <= reading.end_ns:
            nodes = read.memory.stable_nodes.copy()
            change(nodes)
            read = replace(read, memory=replace(read.memory, stable_nodes=nodes))
        witnessed.append(read)
    return Case(replace(case.recorded, witnessed=witnessed), case.trials)


def left_in_tree(case):
    """C109: ksmd has been by, and 3 stable_nodes are in the other node's tree still."""

    def change(nodes):
        own = np.flatnonzero(nodes["rmap_hlist_len"] > 0)[:3]
        nodes["nid"][own] = 1 - nodes["nid"][own]

    return witnessed_at(case, "nodes", "rescanned", change)


def stayed_offline(case):
    """C108: a stable_node has a frame in memory that is gone."""
    notes = case.trials["offline"].at("offline").notes

    def change(nodes):
        nodes["kpfn"][nodes["rmap_hlist_len"] > 0] = notes["blocks"][0] * notes["block_pages"] + 7

    return witnessed_at(case, "offline", "offline", change)


FALSE = (
    ("C02", moved("copies", "merged", pages_sharing=1), "pages_sharing 31"),
    ("C02.limit", moved("limit", "merged", pages_shared=-1), "pages_shared 14"),
    ("C05.code", moved("limit", "merged", pages_sharing=-1), "pages_sharing 77"),
    ("C19", moved("copies", "rescanned", pages_shared=-1), "pages_shared 0"),
    ("Q11", moved("copies", "written", pages_sharing=-1), "pages_sharing 29"),
    ("Q11", moved("fork", "forked", pages_sharing=91), "pages_sharing 175"),
    ("D1", moved("static", "pass 5", pages_unshared=101), "pass 5: pages_unshared 101"),
    ("D1", moved("static", "pass 2", pages_unshared=-1), "pass 2: pages_unshared 100"),
    ("C08.code", moved("static", "without smart scan, pass 4", pages_volatile=3), "volatile 3"),
    ("I2.passes", moved("static", "pass 7", pages_skipped=1), "pass 7: pages_scanned"),
    ("C52", moved("volatile", "changed 3", pages_unshared=1), "changed 3: pages_volatile"),
    ("C52", moved("volatile", "unchanged", pages_unshared=-53), "unchanged: pages_volatile"),
    ("C04", process_says("copies", "merged", "ksm-two", ksm_rmap_items=12), "processes 32"),
    ("Q5", process_says("fork", "counted", "ksm-heir-1", ksm_merging_pages=0), "processes 182"),
    ("C64", process_says("fork", "forked", "ksm-heir-0", ksm_rmap_items=91), "ksm-heir-0"),
    ("Q10", process_says("copies", "merged", "ksm-one", ksm_process_profit=0), "processes "),
    ("Q2.items", moved("copies", "merged", general_profit=64), "general_profit "),
    ("DOC11", moved("zero", "written", ksm_zero_pages=3), "ksm_zero_pages"),
    ("DOC13", moved("limit", "merged", general_profit=64), "workload limit, merged"),
    ("C11.rest", moved("latecomer", "pass 2", full_scans=1), "latecomer, pass 2"),
    ("C20", moved("copies", "resting", full_scans=1), "resting: run 0"),
    ("C20", lambda case: changed(case, "copies", "resting", frames=31), "31 pages in 31 frames"),
    ("C21.counters", moved("batches", "later", pages_scanned=97), "later: pages_scanned"),
    ("C22", moved("unmerge", "unmerged", pages_shared=3), "pages_shared 3"),
    ("C22", lambda case: changed(case, "unmerge", "unmerged", frames=7), "91 pages in 7 frames"),
    ("C22", moved("unmerge", "merged again", pages_sharing=-84), "pages_sharing 0"),
    ("C12", moved("unmerge", "unmerged", full_scans=5), "full_scans 5"),
    (
        "6C.processes",
        process_says("unmerge", "unmerged", "ksm-unmerge", ksm_rmap_items=91),
        "ksm_rmap_items 91",
    ),
    ("C26", moved("idle", "end", full_scans=1), "end: full_scans"),
    ("C27", noted("idle", "registered", woken=False), "woken False"),
    ("C29", noted("files", "read", nice=0), "nice 0"),
    ("C32.advisor", noted("files", "read", pages_to_scan_errno=None), "answered None"),
    ("C34", noted("files", "read", modes={"run": "0o666"}), "run has mode 0o666"),
    ("C36", noted("unmergeable", "advised", never_mergeable_errno=22), "never_mergeable_errno 22"),
    ("C37", noted("unmergeable", "advised", gap_errno=0), "gap_errno 0"),
    ("C37", noted("unmergeable", "advised", around_gap_mergeable=[True, False]), "False"),
    ("C38", noted("unmergeable", "advised", shared_mapping_mergeable=True), "True"),
    ("DOC24", noted("limit", "merged", max_page_sharing_errno=None), "answered None"),
    ("D2", moved("latecomer", "pass 3", pages_sharing=-4), "pass 1: pages_sharing"),
    ("D6", moved("singleton", "alone", pages_shared=-11), "pages_shared 0"),
    ("C63", moved("fork", "counted", pages_sharing=-182), "pages_sharing 84"),
    ("D3", moved("fork_unique", "pass 3", pages_volatile=-53), "pass 3: pages_unshared"),
    ("DOC22", moved("zero", "placed", pages_sharing=52, pages_shared=1), "pages_sharing 52"),
    ("C44", noted("copies", "written", frame=[7, 7]), "frame [7, 7]"),
    ("C44", noted("copies", "written", others_content=["1", "2"]), "['1', '2']"),
    ("C44", moved("copies", "written", cow_ksm=1), "cow_ksm"),
    ("C39", noted("unmergeable", "unmergeable", shared_in_range=3), "shared_in_range 3"),
    ("C40.code", moved("unmergeable", "unmergeable", pages_sharing=-17), "pages_sharing 14"),
    ("C46", noted("unmergeable", "unmergeable", mappings=[20, 20]), "mappings [20, 20]"),
    ("C87", moved("copies", "exited", pages_sharing=-11), "exited: pages_sharing 18"),
    ("DOC11.never", moved("limit", "merged", ksm_zero_pages=7), "ksm_zero_pages"),
    ("DOC22.any", noted("limit", "merged", use_zero_pages_errno="EBUSY"), "EBUSY"),
    ("DOC24.least", noted("files", "read", max_page_sharing_errnos={"1": None}), "None"),
    ("Q9", moved("zero", "written", ksm_zero_pages=3), "written: ksm_zero_pages"),
    ("C68.counters", moved("pinned", "pass 3", pages_unshared=5), "pass 3: pages_sharing"),
    ("C70", noted("huge", "pass 2", frames=3), "pass 2: frames 3"),
    ("C70", moved("huge", "merged", thp_split_page=-1), "merged: thp_split_page_failed"),
    ("C71", noted("huge", "pass 2", frames=3), "pass 2: frames 3"),
    ("C71", noted("huge", "merged", frames=4), "merged: frames 4"),
    ("C74", moved("dropped", "asleep", full_scans=7), "asleep: full_scans"),
    ("C23", lambda case: changed(case, "interrupted", "killed", counters={"run": 2}), "run 2"),
    ("C23", noted("interrupted", "interrupted", errno=0), "errno 0"),
    ("C12.failed", moved("interrupted", "killed", full_scans=-2), "killed: full_scans"),
)


@pytest.mark.parametrize(
    ("claim_id", "tamper", "said"), FALSE, ids=[f"{c[0]}-{i}" for i, c in enumerate(FALSE)]
)
def test_what_is_false_is_violated_with_its_evidence(case, claim_id, tamper, said):
    assert judge(BY_ID[claim_id], case).verdict is Verdict.HOLDS
    finding = judge(BY_ID[claim_id], tamper(case))
    assert finding.verdict is Verdict.VIOLATED
    assert any(said in evidence.says for evidence in finding.evidence), finding.evidence


IN_GUEST = (
    ("C125", lambda case: changed(case, "swapped", "swapped in", frames=7), "91 pages in 7"),
    ("C125", moved("swapped", "merged again", pages_sharing=-84), "pages_sharing 0"),
    ("DOC23.code", moved("swapped", "scanned", pages_sharing=84), "scanned: pages_shared 0"),
    ("C123", moved("swapped", "swapped in", ksm_swpin_copy=1), "swapped in: ksm_swpin_copy"),
    ("C126", lambda case: changed(case, "swapped", "swapped in with run 2", frames=7), "in 7"),
    ("C121", noted("swapped", "swapped in", digests=["1", "2"]), "['1', '2']"),
    ("C42", noted("short", "madvise", errno=0), "errno 0"),
    ("C41", noted("short", "madvise", mergeable=False), "mergeable False"),
    ("C23.memory", noted("short", "run=2", errno=None), "errno None"),
    ("C23.memory", lambda case: changed(case, "short", "run=2", counters={"run": 2}), "run 2"),
    ("C85", moved("short", "recovered", pages_sharing=-3), "pages_sharing 493"),
    ("C95", noted("short", "killed", owner_lives=False), "owner_lives False"),
    ("C100", noted("moved", "moved", first=[0] * 7, moved_frames=0), "moved_frames 0"),
    ("C100.shared", noted("moved", "moved", distinct=[7, 91]), "[7, 91]"),
    ("C109.apart", moved("nodes", "merged", pages_shared=-7), "pages_shared 7"),
    ("C109", left_in_tree, "[0, 7, 3]"),
    ("C109.collision", moved("nodes", "rescanned", stable_node_dups=-7), "stable_node_dups 7"),
    ("DOC24.nodes", noted("nodes", "merged", errno=None), "errno None"),
    ("C108", noted("offline", "offline", inside=3), "inside 3"),
    ("C108", stayed_offline, "has kpfn"),
    ("C101.shared", noted("offline", "offline", digests=["1", "2"]), "['1', '2']"),
    ("C101.shared", moved("offline", "rescanned", pages_sharing=-13), "pages_sharing 71"),
)


@pytest.mark.parametrize(
    ("claim_id", "tamper", "said"), IN_GUEST, ids=[f"{c[0]}-{i}" for i, c in enumerate(IN_GUEST)]
)
def test_what_takes_a_guest_is_violated_too(guest_case, claim_id, tamper, said):
    test_what_is_false_is_violated_with_its_evidence(guest_case, claim_id, tamper, said)


def test_a_guest_is_no_false_alarm(guest_case):
    found = judge_all(CLAIMS, guest_case)
    assert [one.claim.id for one in found if one.is_fault] == []
    refuted = {one.claim.id for one in found if one.word == "refuted"}
    assert refuted >= {"C45", "DOC17"}


@pytest.mark.parametrize("claim_id", ["C109", "C108"])
def test_without_kernel_memory_nodes_and_offline_memory_are_unknown(guest_case, claim_id):
    unread = [replace(reading, memory=None) for reading in guest_case.recorded.witnessed]
    recorded = replace(guest_case.recorded, witnessed=unread)
    finding = judge(BY_ID[claim_id], Case(recorded, guest_case.trials))
    assert finding.verdict is Verdict.UNKNOWN
    assert "kernel memory was not read" in finding.reason


def test_without_the_frames_of_numa_nodes_whose_tree_is_right_is_unknown(guest_case):
    header = guest_case.recorded.header
    header = replace(header, facts={**header.facts, "node_pages": None})
    finding = judge(
        BY_ID["C109"], Case(replace(guest_case.recorded, header=header), guest_case.trials)
    )
    assert finding.verdict is Verdict.UNKNOWN


@pytest.mark.parametrize("claim_id", ["C45", "C125", "DOC23.code", "C123", "DOC17", "C121"])
def test_where_nothing_was_swapped_out_nothing_is_said_of_it(guest_case, claim_id):
    finding = judge(BY_ID[claim_id], noted("swapped", "swapped out", swapped=0)(guest_case))
    assert (finding.verdict, finding.reason) == (Verdict.UNKNOWN, "nothing was swapped out")


def test_copies_at_swap_in_that_were_lost_or_not_seen_leave_their_claim_unknown(guest_case):
    def finding(**changes):
        return judge(
            BY_ID["C123"], Case(replace(guest_case.recorded, **changes), guest_case.trials)
        )

    recorded, kind = guest_case.recorded, "ksm_might_need_to_copy"
    assert finding().verdict is Verdict.HOLDS
    lost = finding(losses=[replace(recorded.losses[-1], dropped={kind: 3})])
    assert (lost.verdict, lost.reason) == (Verdict.UNKNOWN, f"3 events of {kind} were lost")
    kept = recorded.events["kind"] != KIND_BY_NAME[kind].number
    removed = finding(events=concatenate([recorded.events[kept]]))
    assert removed.verdict is Verdict.UNKNOWN
    assert f"events of {kind} are unaccounted for" in removed.reason


def seen(case, kind, events):
    """Let events of a kind be seen that the recording lacks."""
    events["kind"] = KIND_BY_NAME[kind].number
    recorded = case.recorded
    plan = [
        {**entry, "rung": "fentry"} if entry["event"] == kind else entry
        for entry in recorded.header.plan
    ]
    produced = {**recorded.losses[-1].produced, kind: len(events)}
    recorded = replace(
        recorded,
        header=replace(recorded.header, plan=plan),
        events=concatenate([recorded.events, events]),
        losses=[*recorded.losses[:-1], replace(recorded.losses[-1], produced=produced)],
    )
    return Case(recorded, case.trials)


def with_stores(case, *errors):
    """Let the writes of 2 to run be seen that the last step of the trial made."""
    stores = np.zeros(len(errors), EVENT_DTYPE)
    stores["run"], stores["err"] = 2, errors
    at_ns = case.trials["interrupted"].at("interrupted").end_ns
    stores["ts_ns"] = at_ns + 7 * (1 + np.arange(len(errors)))
    return seen(case, "run_store", stores)


def moved_while_found(case, merged):
    """A trial as busy is, of which no recording is small: so many pages merged at last."""
    start, then, last = case.trials["nodes"].readings[:3]
    own = start.counters
    counters = {**own, "pages_shared": own["pages_shared"] + 1}
    counters["pages_sharing"] = own["pages_sharing"] + merged
    readings = (start, replace(then, label="merged"))
    readings += (replace(last, label="merged again", counters=counters),)
    trial = replace(case.trials["nodes"], name="busy", readings=readings)
    return Case(case.recorded, {**case.trials, "busy": trial})


def with_searches(case, *outcomes):
    """Let searches of the stable tree be seen while the KSM page was moved."""
    searches = np.zeros(len(outcomes), EVENT_DTYPE)
    searches["outcome"] = outcomes
    at_ns = case.trials["busy"].at("merged").end_ns
    searches["ts_ns"] = at_ns + 7 * (1 + np.arange(len(outcomes)))
    return seen(case, "stable_tree_search", searches)


def test_pages_that_were_on_the_other_node_already_have_not_been_moved_there(guest_case):
    # As on 7.3, in a guest whose first node was short of memory.
    finding = judge(BY_ID["C100"], noted("moved", "moved", moved_frames=0)(guest_case))
    assert finding.verdict is Verdict.UNKNOWN
    elsewhere = noted("moved", "moved", first=[1] * 7, moved_frames=0)(guest_case)
    assert judge(BY_ID["C100"], elsewhere).verdict is Verdict.UNKNOWN


def test_profits_add_up_where_a_fork_has_made_ksm_zero_pages_too_high_for_good(case):
    """As on 7.3, after a fork that left 10 zero pages out."""
    leaked = case
    for trial in case.trials.values():
        for reading in trial.readings:
            counters = {
                "ksm_zero_pages": reading.counters["ksm_zero_pages"] + 10,
                "general_profit": reading.counters["general_profit"] + 10 * 4096,
            }
            leaked = changed(leaked, trial.name, reading.label, counters=counters)
    assert judge(BY_ID["Q10"], case).verdict is Verdict.HOLDS
    assert judge(BY_ID["Q10"], leaked).verdict is Verdict.HOLDS
    start = leaked.trials["copies"].readings[0].label
    unleaked = changed(leaked, "copies", start, counters={"ksm_zero_pages": 0})
    assert judge(BY_ID["Q10"], unleaked).verdict is Verdict.VIOLATED


def test_a_page_that_found_its_equal_locked_merges_later_or_the_claim_is_violated(guest_case):
    busy, found = SearchOutcome.BUSY, SearchOutcome.FOUND
    case = moved_while_found(guest_case, 555)
    assert judge(BY_ID["C59"], with_searches(case, busy, found)).verdict is Verdict.HOLDS
    assert judge(BY_ID["C59"], with_searches(case, found)).verdict is Verdict.UNKNOWN
    assert judge(BY_ID["C59"], case).verdict is Verdict.UNKNOWN
    left = moved_while_found(guest_case, 548)
    finding = judge(BY_ID["C59"], with_searches(left, busy))
    assert finding.verdict is Verdict.VIOLATED
    assert any("pages_sharing 548" in evidence.says for evidence in finding.evidence)


def test_an_unmerge_that_a_signal_stops_begins_again_or_the_claim_is_violated(case):
    begun_again = judge(BY_ID["C24"], with_stores(case, -512, 0))
    assert begun_again.verdict is Verdict.HOLDS
    assert "1 times" in begun_again.observed
    assert judge(BY_ID["C24"], with_stores(case, 0)).verdict is Verdict.UNKNOWN
    failed = changed(case, "interrupted", "restarted", notes={"errno": 4})
    finding = judge(BY_ID["C24"], with_stores(failed, -512))
    assert finding.verdict is Verdict.VIOLATED
    assert any("errno 4" in evidence.says for evidence in finding.evidence)
    assert judge(BY_ID["C24"], case).verdict is Verdict.UNKNOWN


def performed(case, name, **steps):
    """A trial of which no recording is small; per step its counters and notes."""
    at_ns = case.trials["copies"].at("merged").begin_ns
    whole = case.trials["copies"].readings[0]
    readings = [
        replace(
            whole,
            label=label.replace("_", " "),
            begin_ns=at_ns + 1000 * number,
            end_ns=at_ns + 1000 * number + 500,
            counters={**whole.counters, **{k: v for k, v in told.items() if k[0] != "+"}},
            notes={k[1:]: v for k, v in told.items() if k[0] == "+"},
        )
        for number, (label, told) in enumerate(steps.items())
    ]
    trial = replace(case.trials["copies"], name=name, readings=tuple(readings), end_ns=at_ns + 9000)
    return Case(case.recorded, {**case.trials, name: trial})


@pytest.mark.parametrize(("chosen", "verdict"), [(170, "violated"), (20_011, "holds")])
def test_the_advisor_goes_below_its_least_or_it_does_not(case, chosen, verdict):
    told = {"advisor_min_pages_to_scan": 17, "pages_to_scan": 17, "full_scans": 3}
    later = {"advisor_min_pages_to_scan": 20_011, "pages_to_scan": chosen, "full_scans": 4}
    advised = performed(case, "advisor", advised=told, raised=later)
    finding = judge(BY_ID["DOC20"], advised)
    assert finding.verdict.value == verdict
    assert finding.observed == f"pages_to_scan {chosen} after a pass with a least of 20011"
    assert judge(BY_ID["DOC20.code"], advised).verdict is Verdict.HOLDS
    other = performed(case, "advisor", advised={**told, "pages_to_scan": 500}, raised=later)
    assert judge(BY_ID["DOC20.code"], other).verdict is Verdict.VIOLATED
    no_pass = performed(case, "advisor", advised=told, raised={**later, "full_scans": 3})
    assert judge(BY_ID["DOC20"], no_pass).verdict is Verdict.UNKNOWN


@pytest.mark.parametrize(("left", "verdict"), [(53, "violated"), (0, "holds")])
def test_zero_pages_that_a_fork_left_out_stay_counted_or_they_do_not(case, left, verdict):
    def leaked(**forked):
        return performed(
            case,
            "leak",
            start={"ksm_zero_pages": 7},
            placed={"ksm_zero_pages": 60},
            forked={"ksm_zero_pages": 60 + left, "+errno": 0, "+heir_places": 0, **forked},
            ended={"ksm_zero_pages": 7 + left, "pages_sharing": 0},
            unmerged={"ksm_zero_pages": 7 + left, "run": 2},
        )

    finding = judge(BY_ID["DOC11.fork"], leaked())
    assert finding.verdict.value == verdict
    assert f"unmerged: ksm_zero_pages {7 + left}" in finding.evidence[-1].says
    taken_along = leaked(**{"+heir_places": 53})
    assert judge(BY_ID["DOC11.fork"], taken_along).verdict is Verdict.UNKNOWN


@pytest.mark.parametrize(("flags", "verdict"), [(0x108, "holds"), (0x107, "violated")])
def test_what_the_stopped_pass_put_into_a_tree_has_age_0_or_it_has_not(case, flags, verdict):
    steps = {"half_done": {}, "stopped": {"+status": -14}, "begun_again": {}}
    aborted = performed(case, "aborted", **steps)
    half, stopped, _ = aborted.trials["aborted"].readings
    starts = np.zeros(2, EVENT_DTYPE)
    starts["kind"], starts["seq"] = KIND_BY_NAME["ksm_start_scan"].number, 8
    starts["ts_ns"] = (half.begin_ns, stopped.end_ns + 7)
    visits = np.zeros(2, EVENT_DTYPE)
    visits["rmap_item"] = 0x5000
    visits["flags"] = EventFlag.HAS_ADDRESS | EventFlag.IN_KSMD
    visits["ts_ns"] = (half.begin_ns + 7, stopped.end_ns + 11)
    visits["address"], visits["flags_before"] = 0x108, (0, flags)
    recorded = replace(
        aborted.recorded,
        events=concatenate([starts]),
        losses=[replace(case.recorded.losses[-1], produced={}, dropped={})],
        trailer=None,
    )
    case_of = seen(Case(recorded, aborted.trials), VISIT, visits)
    order = np.argsort(case_of.recorded.events["ts_ns"], kind="stable")
    in_order = concatenate([case_of.recorded.events[order]])
    finding = judge(BY_ID["D7"], Case(replace(case_of.recorded, events=in_order), aborted.trials))
    assert finding.verdict.value == verdict, finding
    assert finding.evidence[0].says == "1 rmap_items put into a tree by the stopped pass"


@pytest.mark.parametrize(("references", "verdict"), [(3, "holds"), (2, "violated")])
def test_references_to_a_huge_page_count_beyond_its_one_mapping(case, references, verdict):
    """As on 6.1, where no field has the number of a large folio's mappings."""
    huge = performed(case, "huge", mapped={"+huge_bytes": 2 << 20})
    at_ns = huge.trials["huge"].readings[0].end_ns
    steps = MergeStep.PAGE_KNOWN | MergeStep.IN_VMA | MergeStep.SPLIT
    for number, (kind, told) in enumerate(
        (
            ("ksm_merge_with_ksm_page", {"err": -14}),
            ("merge_failure", {"err": -14, "steps": steps, "refcount": references, "order": 9}),
            ("split_huge_page_to_list", {"err": 0}),
        )
    ):
        event = np.zeros(1, EVENT_DTYPE)
        event["ts_ns"] = at_ns + 7 * number
        for name, value in told.items():
            event[name] = value
        huge = seen(huge, kind, event)
    finding = judge(BY_ID["C72"], huge)
    assert finding.verdict.value == verdict
    assert f"mappings: [{references - 1}]" in finding.evidence[0].says
    no_huge = performed(huge, "huge", mapped={"+huge_bytes": 0})
    assert judge(BY_ID["C72"], no_huge).reason == "the kernel gave no huge page"


REFUTED = {
    *("C05", "C08", "C11", "DOC6", "DOC7", "DOC16", "C05.zero", "C31", "C47", "C48"),
    *("C37.split", "C50", "C62", "C65", "D8", "DOC8", "DOC21"),
}


def test_a_real_kernel_follows_the_code_and_not_the_documents(case):
    found = judge_all(CLAIMS, case)
    assert [one.claim.id for one in found if one.is_fault] == []
    refuted = {one.claim.id for one in found if one.finding.verdict is Verdict.VIOLATED}
    assert refuted == REFUTED
    for one in found:
        if one.finding.verdict is Verdict.VIOLATED:
            assert one.finding.evidence, one.claim.id


WITH_TRIALS = [
    (claim.id, need.name) for claim in CLAIMS for need in claim.needs if isinstance(need, Exercised)
]


@pytest.mark.parametrize(("claim_id", "name"), WITH_TRIALS)
def test_without_its_workload_a_claim_is_unknown(case, claim_id, name):
    def verdict(trials):
        return judge(BY_ID[claim_id], Case(case.recorded, trials))

    missing = verdict({n: trial for n, trial in case.trials.items() if n != name})
    assert missing.verdict is Verdict.UNKNOWN
    assert missing.reason == f"takes the workload {name}: ksmtrace selftest"

    trial = replace(case.trials.get(name, case.trials["idle"]), name=name, why_not=None)
    failed = verdict({**case.trials, name: replace(trial, why_not="waited 60 s, in vain")})
    assert (failed.verdict, failed.reason) == (
        Verdict.UNKNOWN,
        f"the workload {name} was not carried out: waited 60 s, in vain",
    )
    disturbed = verdict({**case.trials, name: replace(trial, others=("qemu (pid 7)",))})
    assert (disturbed.verdict, disturbed.reason) == (
        Verdict.UNKNOWN,
        f"others used KSM during the workload {name}: qemu (pid 7)",
    )


def test_readings_at_rest_while_others_used_ksm_are_not_judged(case):
    wrong = moved("limit", "merged", general_profit=64)(case)
    trials = dict(wrong.trials)
    trials["limit"] = replace(trials["limit"], others=("qemu (pid 7)",))
    assert judge(BY_ID["DOC13"], Case(case.recorded, trials)).verdict is Verdict.HOLDS


def test_trials_come_back_from_their_file_as_they_were(case):
    for trial in case.trials.values():
        assert Trial.from_json(json.loads(json.dumps(trial.to_json()))) == trial


def test_a_damaged_file_of_trials_is_no_trial(folder, tmp_path):
    shutil.copy(folder / "selftest.ksmt", tmp_path)
    (tmp_path / "trials.jsonl").write_text('{"trial": {"name": 7}}\n')
    with pytest.raises(RecordingError, match="does not hold trials"):
        read_performed(tmp_path)


def test_a_line_that_was_being_written_when_its_kernel_died_is_left_out(folder, case, tmp_path):
    shutil.copy(folder / "selftest.ksmt", tmp_path)
    content = (folder / "trials.jsonl").read_bytes()
    (tmp_path / "trials.jsonl").write_bytes(content[:-100])
    assert list(read_performed(tmp_path).trials) == list(case.trials)[:-1]


@pytest.mark.parametrize("until", ["nothing", "half"])
def test_a_guest_that_dies_is_judged_until_then(folder, tmp_path, monkeypatch, until):
    tail = (
        "kernel BUG at mm/ksm.c:1005!",
        "[ 7.7] RIP: 0010:remove_rmap_item_from_tree+0x1f2/0x210",
    )

    def die(*unused, **options):
        if until == "half":
            content = (folder / "selftest.ksmt").read_bytes()
            (tmp_path / "selftest.ksmt").write_bytes(content[: len(content) // 2])
            content = (folder / "trials.jsonl").read_bytes()
            (tmp_path / "trials.jsonl").write_bytes(content[: len(content) // 2])
        raise LostVM("the guest is lost: kernel bug: mm/ksm.c:1005!", "as it is", tail)

    monkeypatch.setattr("ksmtrace.vm.find_kernel", lambda *unused: None)
    monkeypatch.setattr("ksmtrace.vm.machine.qemu_program", lambda: "qemu")
    monkeypatch.setattr("ksmtrace.vm.run_in_vm", die)
    # What an earlier run left there is not taken for this one's.
    unpacked("guest-6.12", tmp_path)
    options = ["--kernel", "bzImage", "--save", str(tmp_path), "--json"]
    done = CliRunner().invoke(ksmtrace, ["selftest", *options], standalone_mode=False)
    assert done.return_value == 1
    (outcome,) = json.loads(done.stdout)["kernels"]
    assert outcome["failed"].startswith("the guest is lost: kernel bug: mm/ksm.c:1005! (RIP: 0010:")
    if until == "nothing":
        assert "claims" not in outcome
        return
    assert "cut off" in outcome["incomplete"][0]
    verdicts = {claim["id"]: claim["verdict"] for claim in outcome["claims"]}
    assert verdicts["C02"] == "holds"
    assert verdicts["DOC11.fork"] == "unknown"
    assert not [c for c in outcome["claims"] if c["verdict"] == "violated" and not c["expected"]]


def test_a_folder_without_trials_and_one_that_cannot_be_made_are_told(tmp_path):
    with pytest.raises(RecordingError, match=r"holds no trials\.jsonl"):
        read_performed(tmp_path)
    (tmp_path / "file").touch()
    with (
        pytest.raises(UsageError, match="cannot be made: Not a directory"),
        folder_for(tmp_path / "file" / "x"),
    ):
        pass


def test_without_its_recording_a_saved_selftest_is_of_no_known_kernel(folder, tmp_path):
    shutil.copy(folder / "trials.jsonl", tmp_path)
    with pytest.raises(RecordingError):
        read_performed(tmp_path)


def test_a_counter_that_was_not_read_makes_a_claim_unknown(case):
    lacking = changed(case, "static", "pass 7", counters={"pages_scanned": None})
    finding = judge(BY_ID["I2.passes"], lacking)
    assert (finding.verdict, finding.reason) == (
        Verdict.UNKNOWN,
        "this kernel has no pages_scanned",
    )


def test_what_an_older_selftest_did_not_read_makes_a_claim_unknown(case):
    claim = BY_ID["DOC24.least"]
    assert judge(claim, case).verdict is Verdict.HOLDS
    old = Trial.from_json(case.trials["files"].to_json())
    for reading in old.readings:
        reading.notes.pop("max_page_sharing_errnos", None)
    finding = judge(claim, replace(case, trials={**case.trials, "files": old}))
    assert finding.verdict is Verdict.UNKNOWN
    assert "did not read max_page_sharing_errnos" in finding.reason


def test_a_saved_selftest_is_judged_again_by_check(folder):
    done = CliRunner().invoke(ksmtrace, ["check", "--json", str(folder)], standalone_mode=False)
    assert done.return_value == 0
    claims = json.loads(done.output)["claims"]
    assert {c["id"] for c in claims if c["verdict"] == "violated"} == REFUTED


def test_only_the_workloads_that_are_needed_are_carried_out():
    assert trials_for(choose(["C22"])) == ["unmerge"]
    assert trials_for(choose(["D3"])) == ["fork_unique"]
    # An invariant is judged on whatever happens.
    assert trials_for(choose(["C53"])) == list(TRIALS)
    used = {name for claim in CLAIMS for name in claim.trials} | {"merge_any"}
    assert used == set(TRIALS)
