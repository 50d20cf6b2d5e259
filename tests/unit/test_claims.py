"""Claims on recordings of real kernels: as they are, tampered with, and with something missing."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from ksmtrace.analysis.merges import find_merges
from ksmtrace.analysis.recorded import Recorded, gather
from ksmtrace.claims import markdown
from ksmtrace.claims.catalogue import catalogue_ids
from ksmtrace.claims.claim import Case, Kinds, Verdict, judge
from ksmtrace.claims.guide import GUIDE, Sentence
from ksmtrace.claims.judgement import as_json, judge_all, nr_faults
from ksmtrace.claims.ktap import check_lines
from ksmtrace.claims.table import CLAIMS, choose
from ksmtrace.cli import ksmtrace
from ksmtrace.errors import UsageError
from ksmtrace.events import KIND_BY_NAME, EventFlag, SearchOutcome, concatenate
from ksmtrace.kernel.ksm_memory import UNSTABLE_FLAG
from ksmtrace.recording.excerpt import Backlog
from ksmtrace.recording.reader import RecordingReader
from ksmtrace.stream import ProcessSeen
from ksmtrace.workload.trial import Reading, Trial

NAMES = (
    *("cow", "crash", "duplicates", "fork", "killed", "lifetime", "losses", "pinned", "unique"),
    *("volatile", "zero", "guest-5.10-chains", "guest-5.10-cow", "guest-6.1-lifetime"),
    *("guest-6.1-midlife", "guest-6.12-pinned-derived", "guest-6.12-witnessed"),
    *("guest-7.x-churn", "guest-7.x-fork-every-page", "guest-7.x-moves"),
)
DOCS = Path(__file__).parents[2] / "docs"
RESULTS = DOCS / "results"
MERGE = "ksm_merge_with_ksm_page"
BY_ID = {claim.id: claim for claim in CLAIMS}


def find(recorded: Recorded, claim_id: str, trials=None):
    return judge(BY_ID[claim_id], Case(recorded, trials or {}))


def places(recorded: Recorded, name: str):
    return np.flatnonzero(recorded.events["kind"] == KIND_BY_NAME[name].number)


def without(recorded: Recorded, mask) -> Recorded:
    """Leave events out, and make the tallies agree: as if the kernel had not fired them."""
    events = concatenate([recorded.events[~mask]])
    counts = Recorded(recorded.header, events).counts()
    assert recorded.trailer is not None
    last = replace(recorded.losses[-1], produced=counts)
    return replace(
        recorded,
        events=events,
        losses=[*recorded.losses[:-1], last],
        trailer=replace(recorded.trailer, recorded=counts),
    )


def copied(recorded: Recorded) -> Recorded:
    return replace(recorded, events=recorded.events.copy())


# ---- each way of making a claim false ----


def too_old(recorded):
    """C53: an item comes out of the unstable tree that was put there three passes before."""
    events = recorded.events
    visits = places(recorded, "cmp_and_merge_page")
    at = visits[events["flags_before"][visits] & UNSTABLE_FLAG != 0][-1]
    events["flags_before"][at] = UNSTABLE_FLAG | (int(events["flags_before"][at]) - 2) & 0xFF
    return recorded, f"{int(events['rmap_item'][at]):#x}"


def busy_and_left(recorded):
    """C56: the bug of 2019, -EBUSY before remove_rmap_item_from_tree."""
    events = recorded.events
    searches = places(recorded, "stable_tree_search")
    visits = searches - 1
    unstable = events["flags_before"][visits] & UNSTABLE_FLAG != 0
    at = int(searches[unstable][0])
    events["outcome"][at] = SearchOutcome.BUSY
    events["err"][at] = -16
    flags = events["flags_before"][at - 1]
    events["address"][at - 1] = events["address"][at - 1] & ~np.uint64(0xFFF) | np.uint64(flags)
    return recorded, f"{int(events['rmap_item'][at]):#x} was not removed from the tree"


def busy_and_unnamed(recorded):
    """C56 by derived visits: of one that does not remove its rmap_item, this is not known."""
    events = recorded.events
    visits = places(recorded, "cmp_and_merge_page")
    for at in places(recorded, "stable_tree_search"):
        item = events["rmap_item"][at]
        later = visits[(visits > at) & (events["rmap_item"][visits] == item)]
        if len(later) and events["flags_before"][at - 1] & UNSTABLE_FLAG:
            break
    events["outcome"][at] = SearchOutcome.BUSY
    events["rmap_item"][at - 1 : at + 1] = 0
    events["address"][at - 1] &= ~np.uint64(0xFFF)
    events["flags_before"][later[0]] = events["flags_before"][at - 1]
    return recorded, f"rmap_item {int(item):#x} came to its next removal with flags 0x1"


def in_both_trees(recorded):
    at = places(recorded, "cmp_and_merge_page")[7]
    recorded.events["address"][at] |= np.uint64(0x300)
    return recorded, f"{int(recorded.events['rmap_item'][at]):#x}"


def left_behind(recorded):
    at = places(recorded, "ksm_migrate_page")[3]
    recorded.events["kpfn_after"][at] = recorded.events["pfn"][at]
    return recorded, f"to {int(recorded.events['new_pfn'][at])}"


def moved_from_elsewhere(recorded):
    at = places(recorded, "ksm_migrate_page")[2]
    recorded.events["kpfn_before"][at] += 1
    return recorded, f"kpfn was {int(recorded.events['kpfn_before'][at])}"


def other_frame(recorded):
    at = places(recorded, "stable_tree_append")[-1]
    recorded.events["pfn"][at] += 5
    return recorded, f"then {int(recorded.events['pfn'][at])} without a migration"


def worked_on(recorded):
    """C21: a visit half a microsecond after the write of 0 has returned."""
    events = recorded.events
    stores = places(recorded, "run_store")
    stop = stores[events["run"][stores] == 0][-1]
    ksmd = np.flatnonzero(events["flags"] & EventFlag.IN_KSMD)
    events["ts_ns"][ksmd[ksmd < stop][-1]] = events["ts_ns"][stop] + np.uint64(503)
    return recorded, "503 ns after the write of 0"


def skipped_a_pass(recorded):
    at = places(recorded, "ksm_stop_scan")[-1]
    recorded.events["seq"][at] += 3
    return recorded, f"seq {int(recorded.events['seq'][at])}"


def unmerged_and_went_on(recorded):
    """C12: a write of 2 that succeeds, and the next pass has the old number plus one."""
    stores = places(recorded, "run_store")
    starts = places(recorded, "ksm_start_scan")
    # Before the last pass, whose number is not 0.
    recorded.events["run"][stores[stores < starts[-1]][-1]] = 2
    return recorded, f"seq {int(recorded.events['seq'][starts[-1]])}"


def sample(recorded, at, **values):
    samples = list(recorded.samples)
    samples[at] = replace(samples[at], ksm={**samples[at].ksm, **values})
    return replace(recorded, samples=samples)


def one_shared_too_many(recorded):
    value = recorded.samples[-1].ksm["pages_shared"] + 1
    return sample(recorded, -1, pages_shared=value), f"to {value}"


def passes_too_many(recorded):
    value = recorded.samples[-1].ksm["full_scans"] + 7
    return sample(recorded, -1, full_scans=value), f"to {value}"


def scanned_more(recorded):
    value = recorded.samples[-1].ksm["pages_scanned"] + 1009
    return sample(recorded, -1, pages_scanned=value), f"to {value}"


def unbroken(recorded):
    """Let the last break be that of another page; returns the first half that it was of."""
    merges = find_merges(recorded)
    undone = merges.places[merges.undone & (merges.events["ksm_page"] == 0)]
    recorded.events["address"][places(recorded, "break_ksm")[-1]] += np.uint64(1 << 20)
    return int(undone[-1])


def not_broken(recorded):
    """C60: the page is seen again as the KSM page that it became."""
    place = unbroken(recorded)
    again = recorded.events[place : place + 1].copy()
    again["ts_ns"], again["err"] = recorded.events["ts_ns"][-1], -14
    events = concatenate([recorded.events, again])
    losses = replace(recorded.losses[-1], produced=Recorded(recorded.header, events).counts())
    return replace(recorded, events=events, losses=[losses]), "no break_ksm followed"


def appended_once_more(recorded):
    events = recorded.events
    extra = concatenate([events, events[places(recorded, "stable_tree_append")[-1:]]])
    counts = Recorded(recorded.header, extra).counts()
    losses = [replace(recorded.losses[-1], produced=counts)]
    return replace(recorded, events=extra, losses=losses), "of stable_tree_append"


def freed_unseen(recorded):
    at = np.zeros(len(recorded.events), bool)
    at[places(recorded, "ksm_remove_ksm_page")[0]] = True
    return without(recorded, at), f"{recorded.count('ksm_remove_ksm_page') - 1} of"


def sharer_unseen(recorded):
    at = np.zeros(len(recorded.events), bool)
    at[places(recorded, "ksm_remove_rmap_item")[0]] = True
    return without(recorded, at), f"{recorded.count('ksm_remove_rmap_item') - 1} events"


def beyond_the_limit(recorded):
    samples = [replace(s, ksm={**s.ksm, "max_page_sharing": 5}) for s in recorded.samples]
    return replace(recorded, samples=samples), "which has 5"


def joined_twice(recorded):
    at = places(recorded, "stable_tree_append")
    recorded.events["rmap_item"][at[1]] = recorded.events["rmap_item"][at[0]]
    return recorded, f"{int(recorded.events['rmap_item'][at[0]]):#x}"


def memory(recorded, change):
    """Change the last reading of kernel memory."""
    last = recorded.witnessed[-1]
    copy = replace(
        last.memory,
        rmap_items=last.memory.rmap_items.copy(),
        stable_nodes=last.memory.stable_nodes.copy(),
        counters=dict(last.memory.counters),
    )
    change(copy)
    return replace(recorded, witnessed=[*recorded.witnessed[:-1], replace(last, memory=copy)]), copy


def counter_in_memory(name):
    def tamper(recorded):
        def change(held):
            held.counters[name] += 1

        changed, held = memory(recorded, change)
        return changed, f"{name} is {held.counters[name]}"

    return tamper


def old_in_memory(recorded):
    def change(held):
        # One becomes one that was left in the unstable tree three passes ago.
        at = -1
        held.rmap_items["state"][at], held.rmap_items["flags"][at] = 1, UNSTABLE_FLAG
        held.rmap_items["seqnr"][at] = (held.cursor.seqnr - 3) & 0xFF

    return memory(recorded, change)[0], "older than the last pass"


def flags_in_memory(recorded):
    def change(held):
        held.rmap_items["flags"][3] |= 0x300

    return memory(recorded, change)[0], "both STABLE and UNSTABLE"


def hlist_in_memory(recorded):
    def change(held):
        plain = np.flatnonzero(held.stable_nodes["rmap_hlist_len"] > 0)
        held.stable_nodes["rmap_hlist_len"][plain[0]] += 1

    return memory(recorded, change)[0], "rmap_hlist_len"


def more_in_trees(recorded):
    def change(held):
        held.counters["ksm_rmap_items"] = 3

    return memory(recorded, change)[0], "3 rmap_items"


def no_ksm_page(recorded):
    """D5: the frame of a current stable_node is mapped by its sharer, and is no KSM page."""
    last = recorded.witnessed[-2]
    pages = last.pages.pages.copy()
    kpfns = last.memory.stable_nodes["kpfn"][last.memory.stable_nodes["is_current"] == 1]
    at = np.flatnonzero(np.isin(pages["pfn"], kpfns))[0]
    pages["is_ksm"][pages["pfn"] == pages["pfn"][at]] = 0
    frame = int(pages["pfn"][at])
    changed = replace(last, pages=replace(last.pages, pages=pages))
    witnessed = [*recorded.witnessed[:-2], changed, recorded.witnessed[-1]]
    return replace(recorded, witnessed=witnessed), f"frame {frame}"


def page_cache(recorded):
    """C43: a page that KPF_KSM marks, truthfully, without being anonymous."""
    last = recorded.witnessed[-2]
    pages = last.pages.pages.copy()
    pages["is_ksm"][0], pages["kpageflags"][0] = 1, 1 << 21
    probe = replace(last.pages.kpf_ksm, truthful=True)
    changed = replace(last, pages=replace(last.pages, pages=pages, kpf_ksm=probe))
    witnessed = [*recorded.witnessed[:-2], changed, recorded.witnessed[-1]]
    return replace(recorded, witnessed=witnessed), f"frame {int(pages['pfn'][0])}"


def merge_unseen(recorded):
    last = recorded.losses[-1]
    entered, returned = last.calls["try_to_merge_with_ksm_page"]
    calls = {**last.calls, "try_to_merge_with_ksm_page": [entered, returned + 3]}
    losses = [*recorded.losses[:-1], replace(last, calls=calls)]
    return replace(recorded, losses=losses), f"returned {returned + 3} times"


def in_swap_cache(recorded):
    """C106: every KSM page that is mapped, and told from others, is in the swap cache."""
    last = recorded.witnessed[-2]
    pages = last.pages.pages.copy()
    pages["is_ksm"], pages["kpageflags"] = 1, 1 << 13 | 1 << 12
    probe = replace(last.pages.kpf_ksm, truthful=True)
    changed = replace(last, pages=replace(last.pages, pages=pages, kpf_ksm=probe))
    return replace(recorded, witnessed=[changed]), f"{len(pages)} of {len(pages)}"


def sharing_alone(recorded):
    return sample(recorded, -1, pages_shared=0, pages_sharing=7), "pages_sharing 7"


def profit(recorded):
    value = recorded.samples[-1].ksm["general_profit"] + 64
    return sample(recorded, -1, general_profit=value), f"general_profit {value}"


def dups_alone(recorded):
    return sample(recorded, -1, stable_node_chains=0, stable_node_dups=3), "3 dups"


def forked_past_the_limit(recorded):
    return sample(recorded, -1, pages_shared=2, pages_sharing=54, max_page_sharing=4), "54"


def failed_and_stayed(recorded):
    """C68: a merge that failed, and the rmap_item is a sharer after its visit."""
    events = recorded.events
    merges = places(recorded, "ksm_merge_with_ksm_page")
    at = merges[events["ksm_page"][merges] != 0][-1]
    events["err"][at] = -14
    return recorded, f"{int(events['rmap_item'][at]):#x}: its merge failed"


def another_error(recorded):
    at = places(recorded, "ksm_merge_with_ksm_page")
    at = at[recorded.events["err"][at] != 0][0]
    recorded.events["err"][at] = -12
    return recorded, f"{int(recorded.events['rmap_item'][at]):#x} returned -12"


def merged_after_exit(recorded):
    """C89: a page of an mm is merged once the mm has left."""
    events = recorded.events
    last = places(recorded, "ksm_exit")[-1]
    merges = places(recorded, "try_to_merge_one_page")
    late = events[merges[-1:]].copy()
    late["err"], late["mm"], late["ts_ns"] = 0, events["mm"][last], events["ts_ns"][last] + 7
    extra = concatenate([events, late])
    counts = Recorded(recorded.header, extra).counts()
    losses = [*recorded.losses[:-1], replace(recorded.losses[-1], produced=counts)]
    return replace(recorded, events=extra, losses=losses), "merges"


def never_returned(recorded, seconds=17):
    """C80: a call is under way for so long, and none returns."""
    last = recorded.losses[-1]
    entered, returned = last.calls["break_ksm"]
    calls = {**last.calls, "break_ksm": [entered + 1, returned]}
    stuck = replace(last, calls=calls)
    later = replace(stuck, ts_ns=last.ts_ns + seconds * 1_000_000_000)
    return replace(
        recorded, losses=[*recorded.losses, stuck, later]
    ), f"entered {entered + 1} times"


def not_undone(recorded):
    """R17: break_cow found no memory for the copy."""
    breaks = places(recorded, "break_ksm")
    recorded.events["err"][breaks[-1]] = -12
    return recorded, "calls of break_ksm by ksmd"


FALSE = (
    ("C68", "guest-6.12-witnessed", failed_and_stayed),
    ("R2", "pinned", another_error),
    ("C89", "guest-6.1-lifetime", merged_after_exit),
    ("C80", "guest-6.12-witnessed", never_returned),
    ("R17", "guest-6.12-pinned-derived", not_undone),
    ("C53", "guest-6.12-witnessed", too_old),
    ("C56", "guest-6.12-witnessed", busy_and_left),
    ("C56", "guest-6.12-witnessed", busy_and_unnamed),
    ("I14", "guest-6.12-witnessed", in_both_trees),
    ("I14.order", "guest-6.1-lifetime", joined_twice),
    ("C102", "guest-7.x-churn", left_behind),
    ("C103", "guest-7.x-churn", moved_from_elsewhere),
    ("C103.kpfn", "guest-7.x-churn", other_frame),
    ("C21", "guest-5.10-chains", worked_on),
    ("I10", "lifetime", skipped_a_pass),
    ("C12.events", "guest-5.10-chains", unmerged_and_went_on),
    ("C03", "guest-6.1-lifetime", one_shared_too_many),
    ("C11.code", "duplicates", passes_too_many),
    ("DOC9", "guest-7.x-churn", scanned_more),
    ("C60", "guest-6.12-pinned-derived", not_broken),
    ("I4", "guest-6.1-lifetime", appended_once_more),
    ("I6", "guest-7.x-churn", freed_unseen),
    ("I7", "guest-7.x-churn", sharer_unseen),
    ("Q6", "guest-6.12-witnessed", beyond_the_limit),
    ("Q4", "guest-6.12-witnessed", old_in_memory),
    ("Q3.flags", "guest-6.12-witnessed", flags_in_memory),
    ("Q3.hlist", "guest-6.12-witnessed", hlist_in_memory),
    ("C01.code", "guest-6.12-witnessed", counter_in_memory("ksm_pages_shared")),
    ("C02.code", "guest-6.12-witnessed", counter_in_memory("ksm_pages_sharing")),
    ("C07.code", "guest-6.12-witnessed", counter_in_memory("ksm_pages_unshared")),
    ("6D", "guest-6.12-witnessed", counter_in_memory("ksm_stable_node_chains")),
    ("C09", "guest-6.12-witnessed", more_in_trees),
    ("D5", "guest-6.12-witnessed", no_ksm_page),
    ("C43", "guest-6.12-witnessed", page_cache),
    ("I8", "guest-7.x-churn", merge_unseen),
    ("Q8", "duplicates", sharing_alone),
    ("DOC13", "duplicates", profit),
    ("Q7", "duplicates", dups_alone),
    ("DOC8", "duplicates", forked_past_the_limit),
)


@pytest.mark.parametrize(("claim_id", "name", "tamper"), FALSE, ids=[case[0] for case in FALSE])
def test_what_is_false_is_violated_with_its_evidence(golden, claim_id, name, tamper):
    assert find(golden(name), claim_id).verdict is not Verdict.VIOLATED
    false, said = tamper(copied(golden(name)))
    finding = find(false, claim_id)
    assert finding.verdict is Verdict.VIOLATED
    assert any(said in evidence.says for evidence in finding.evidence), finding.evidence


WITH_KINDS = [
    pytest.param(claim_id, name, kind, id=f"{claim_id}-{kind}")
    for claim_id, name, _ in FALSE
    for need in BY_ID[claim_id].needs
    if isinstance(need, Kinds)
    for kind in need.names
]


@pytest.mark.parametrize(("claim_id", "name", "kind"), WITH_KINDS)
def test_what_was_not_seen_whole_is_unknown(golden, claim_id, name, kind):
    recorded = golden(name)

    plan = [
        {**entry, "rung": "absent", "reason": "switched off"} if entry["event"] == kind else entry
        for entry in recorded.header.plan
    ]
    absent = replace(recorded, header=replace(recorded.header, plan=plan))
    assert find(absent, claim_id).verdict is Verdict.UNKNOWN
    assert f"{kind} was not observed: switched off" in find(absent, claim_id).reason

    tallies = replace(recorded.losses[-1], dropped={kind: 3})
    lost = replace(recorded, losses=[*recorded.losses[:-1], tallies])
    assert find(lost, claim_id).verdict is Verdict.UNKNOWN
    assert find(lost, claim_id).reason == f"3 events of {kind} were lost"

    if recorded.count(kind):
        kept = recorded.events["kind"] != KIND_BY_NAME[kind].number
        removed = replace(recorded, events=concatenate([recorded.events[kept]]))
        assert find(removed, claim_id).verdict is Verdict.UNKNOWN
        assert f"events of {kind} are unaccounted for" in find(removed, claim_id).reason


def test_no_search_of_an_empty_tree_says_nothing_where_searches_are_derived(golden):
    recorded = golden("guest-6.12-witnessed")
    at_ns = int(recorded.events["ts_ns"][places(recorded, "cmp_and_merge_page")[0]])
    readings = (
        Reading("start", at_ns - 2, at_ns - 1, {}, {}, None, None),
        Reading("changed 4", at_ns + 1, at_ns + 2, {}, {}, None, None),
    )
    trials = {"volatile": Trial("volatile", {}, at_ns - 3, at_ns + 3, readings)}
    claim = BY_ID["C50.events"]
    assert judge(claim, Case(recorded, trials)).observed.startswith("0 searches in 1 visits")
    plan = [
        {**entry, "rung": "derived"} if entry["event"] == "stable_tree_search" else entry
        for entry in recorded.header.plan
    ]
    derived = replace(recorded, header=replace(recorded.header, plan=plan))
    assert judge(claim, Case(derived, trials)).reason == "a search of an empty tree is not seen"


def test_a_busy_visit_that_had_nothing_to_remove_is_no_fault(golden):
    false, _ = busy_and_unnamed(copied(golden("guest-6.12-witnessed")))
    false.events["flags_before"][
        false.events["kind"] == KIND_BY_NAME["cmp_and_merge_page"].number
    ] = 0
    assert find(false, "C56").verdict is Verdict.HOLDS
    visits = places(false, "cmp_and_merge_page")
    false.events["rmap_item"][visits] = 0
    assert find(false, "C56").reason == "1 of 1 visits with -EBUSY have no known end"


@pytest.mark.parametrize("claim_id", ["Q4", "C01.code", "C09", "6D", "D5"])
def test_without_kernel_memory_it_is_unknown(golden, claim_id):
    recorded = golden("guest-6.12-witnessed")
    unread = [
        replace(reading, memory=None, why_not={"memory": "no kcore"})
        for reading in recorded.witnessed
    ]
    finding = find(replace(recorded, witnessed=unread), claim_id)
    assert finding.verdict is Verdict.UNKNOWN
    assert finding.reason == "kernel memory was not read: no kcore"


def test_memory_read_while_ksmd_was_at_work_proves_nothing(golden):
    recorded, _ = counter_in_memory("ksm_pages_shared")(golden("guest-6.12-witnessed"))
    last = recorded.witnessed[-1]
    # As long as the whole recording: events happened meanwhile.
    disturbed = replace(last, begin_ns=recorded.header.started_ns)
    finding = find(replace(recorded, witnessed=[disturbed]), "C01.code")
    assert finding.verdict is Verdict.UNKNOWN
    assert "while KSM was at work" in finding.reason


@pytest.mark.parametrize("name", NAMES)
def test_no_recording_of_a_real_kernel_is_a_false_alarm(golden, name):
    recorded = golden(name)
    outcome = as_json(judge_all(CLAIMS, Case(recorded)), Case(recorded))
    wrong = [claim for claim in outcome["claims"] if claim["verdict"] == "violated"]
    assert [claim for claim in wrong if claim["expected"] is None] == []
    # Two pages become one KSM page in place, which 2009's patches did not say yet.
    assert {claim["id"] for claim in wrong} <= {"C62"}


def test_a_busy_search_that_is_followed_by_removal_holds(golden):
    recorded = copied(golden("guest-6.12-witnessed"))
    busy_and_left(recorded)
    search = places(recorded, "stable_tree_search")
    at = int(search[recorded.events["outcome"][search] == SearchOutcome.BUSY][0])
    recorded.events["address"][at - 1] &= ~np.uint64(0xFFF)
    finding = find(recorded, "C56")
    assert finding.verdict is Verdict.HOLDS
    assert finding.observed == "1 times -EBUSY, 1 with an item in a tree: removed every time"


def test_a_first_half_whose_area_is_gone_cannot_be_broken(golden):
    # break_cow finds no mergeable area there any more, and no such page is seen again.
    recorded = copied(golden("guest-6.12-pinned-derived"))
    assert find(recorded, "C60").verdict is Verdict.HOLDS
    unbroken(recorded)
    finding = find(recorded, "C60")
    assert finding.verdict is Verdict.UNKNOWN
    assert finding.reason.startswith("1 of ")


def test_of_two_writes_of_run_at_the_same_time_nobody_knows_which_came_last(golden):
    recorded, _ = worked_on(copied(golden("guest-5.10-chains")))
    assert find(recorded, "C21").verdict is Verdict.VIOLATED
    events = recorded.events
    stores = places(recorded, "run_store")
    stop = stores[events["run"][stores] == 0][-1]
    other = events[stop : stop + 1].copy()
    other["run"], other["ts_ns"] = 1, other["ts_ns"] - np.uint64(1)
    other["duration_ns"] = 1
    events["duration_ns"][stop] = 503
    both = replace(recorded, events=concatenate([events[:stop], other, events[stop:]]))
    losses = replace(both.losses[-1], produced=both.counts())
    assert find(replace(both, losses=[losses]), "C21").verdict is not Verdict.VIOLATED


def late_reset(recorded):
    """Let the writer of a 2 come back only after another one has had a pass begun."""
    events = recorded.events
    starts = places(recorded, "ksm_start_scan")
    store = places(recorded, "run_store")
    store = int(store[store < starts[-1]][-1])
    events["run"][store] = 2
    return recorded, int(events["ts_ns"][starts[-2]] - 1)


@pytest.mark.parametrize("claim_id", ["C12.events", "I10"])
def test_a_reset_while_a_pass_had_begun_already_is_of_no_known_moment(golden, claim_id):
    recorded, entered_ns = late_reset(copied(golden("guest-5.10-chains")))
    assert find(recorded, claim_id).verdict is Verdict.VIOLATED
    store = places(recorded, "run_store")
    store = store[recorded.events["run"][store] == 2][-1]
    recorded.events["duration_ns"][store] = recorded.events["ts_ns"][store] - entered_ns
    assert find(recorded, claim_id).verdict is not Verdict.VIOLATED


def test_a_limit_that_was_read_at_other_times_is_not_that_of_nodes_between(golden):
    recorded = golden("guest-7.x-churn")
    events = recorded.events
    freed = np.unique(events["stable_node"][places(recorded, "remove_node_from_stable_tree")])
    joins = events["kind"] == KIND_BY_NAME["stable_tree_append"].number
    short_lived = without(recorded, joins & ~np.isin(events["stable_node"], freed))

    def sampled(*values):
        times = (recorded.begin_ns() - 2, recorded.end_ns() + 2)
        samples = [
            replace(
                recorded.samples[0], begin_ns=at_ns, end_ns=at_ns, ksm={"max_page_sharing": value}
            )
            for at_ns, value in zip(times, values, strict=True)
        ]
        return replace(short_lived, samples=samples)

    assert find(sampled(2, 2), "Q6").verdict is Verdict.VIOLATED
    # It may have been anything meanwhile.
    assert find(sampled(3, 2), "Q6").verdict is Verdict.HOLDS


def test_a_page_that_has_no_stable_node_yet_may_move(golden):
    recorded = copied(golden("guest-7.x-churn"))
    move = places(recorded, "ksm_migrate_page")[0]
    for name in ("stable_node", "kpfn_before", "kpfn_after"):
        recorded.events[name][move] = 0
    assert find(recorded, "C102").verdict is not Verdict.VIOLATED
    assert find(recorded, "C103").verdict is not Verdict.VIOLATED


def test_where_the_kernel_left_a_program_out_nothing_is_violated(golden):
    recorded, _ = freed_unseen(copied(golden("guest-7.x-churn")))
    assert find(recorded, "I6").verdict is Verdict.VIOLATED
    target = next(
        e["target"] for e in recorded.header.plan if e["event"] == "remove_node_from_stable_tree"
    )
    function = target.split(", ")[0].partition(":")[2].partition("+")[0]
    left_out = replace(recorded.losses[-1], missed={f"kprobe:{function}": 3})
    unsure = replace(recorded, losses=[*recorded.losses[:-1], left_out])
    assert find(unsure, "I6").verdict is Verdict.UNKNOWN
    assert "left out 3 times" in find(unsure, "I6").reason
    other = replace(recorded.losses[-1], missed={"fexit:do_wp_page": 3})
    sure = replace(recorded, losses=[*recorded.losses[:-1], other])
    assert find(sure, "I6").verdict is Verdict.VIOLATED


def test_a_call_that_is_under_way_when_a_recording_ends_is_not_there_for_ever(golden):
    recorded, _ = never_returned(golden("guest-6.12-witnessed"), 7)
    finding = find(recorded, "C80")
    assert finding.verdict is Verdict.UNKNOWN
    assert finding.reason == "1 calls were under way at the end"


def test_that_most_ksm_pages_of_one_machine_are_in_the_swap_cache_proves_little(golden):
    recorded, said = in_swap_cache(golden("guest-6.12-witnessed"))
    finding = find(recorded, "C106")
    assert finding.verdict is Verdict.UNKNOWN
    assert said in finding.reason
    trial = Trial("copies", {}, recorded.begin_ns(), recorded.end_ns(), ())
    known = find(recorded, "C106", {"copies": trial})
    assert known.verdict is Verdict.VIOLATED
    assert said in known.evidence[0].says


def test_stable_nodes_read_while_ksmd_was_at_work_tell_no_ksm_page(golden):
    recorded = golden("guest-6.12-witnessed")
    reading = recorded.witnessed[1]
    assert not reading.pages.kpf_ksm.truthful
    pages = reading.pages.pages.copy()
    pages["kpageflags"] = 1 << 21
    told = replace(reading, pages=replace(reading.pages, pages=pages))
    assert find(replace(recorded, witnessed=[told]), "C43").verdict is Verdict.VIOLATED
    disturbed = replace(told, begin_ns=recorded.header.started_ns)
    assert find(replace(recorded, witnessed=[disturbed]), "C43").verdict is Verdict.UNKNOWN


def test_zero_pages_that_come_and_go_while_counters_are_read_are_no_contradiction(golden):
    recorded = golden("duplicates")
    profit = recorded.samples[-1].ksm["general_profit"] + 3 * 4096
    assert find(sample(recorded, -1, general_profit=profit), "DOC13").verdict is Verdict.VIOLATED
    between = sample(sample(recorded, -1, general_profit=profit), 0, ksm_zero_pages=3)
    assert find(between, "DOC13").verdict is not Verdict.VIOLATED


def test_programs_that_never_ran_accuse_no_kernel(golden):
    # As in a guest of 6.1 whose recorder was of another version than its programs.
    recorded = golden("guest-6.1-lifetime")
    assert find(recorded, "C11.code").verdict is Verdict.HOLDS
    empty = without(recorded, np.ones(len(recorded.events), bool))
    finding = find(empty, "C11.code")
    assert finding.verdict is Verdict.UNKNOWN
    assert "not one event was recorded" in finding.reason
    stops = recorded.events["kind"] == KIND_BY_NAME["ksm_stop_scan"].number
    assert find(without(recorded, stops), "C11.code").verdict is Verdict.VIOLATED


def test_while_run_2_unmerges_the_counters_are_not_at_rest(golden):
    recorded, _ = sharing_alone(golden("duplicates"))
    samples = [replace(s, ksm={**s.ksm, "run": 2}) for s in recorded.samples]
    assert find(recorded, "Q8").verdict is Verdict.VIOLATED
    assert find(replace(recorded, samples=samples), "Q8").verdict is Verdict.UNKNOWN


def test_ksmd_that_wakes_and_finds_run_at_0_has_done_no_work(golden):
    real = golden("guest-5.10-chains")
    recorded, _ = worked_on(copied(real))
    assert find(recorded, "C21").verdict is Verdict.VIOLATED
    late = recorded.events["ts_ns"] != real.events["ts_ns"]
    recorded.events["kind"][late] = KIND_BY_NAME["lock_hold"].number
    assert find(recorded, "C21").verdict is Verdict.HOLDS


def test_a_page_that_moved_while_a_sharer_waited_for_its_lock_is_no_false_alarm(golden):
    # As in a guest of 6.12: remove_rmap_item_from_tree began before the migration, and ended after.
    recorded = copied(golden("guest-7.x-churn"))
    moves = places(recorded, "ksm_migrate_page")
    leaves = places(recorded, "remove_rmap_item_from_tree")
    leaves = leaves[leaves > moves[0]]
    recorded.events["stable_node"][leaves[0]] = recorded.events["stable_node"][moves[0]]
    recorded.events["pfn"][leaves[0]] = recorded.events["pfn"][moves[0]]
    assert find(recorded, "C103.kpfn").verdict is Verdict.HOLDS


def test_claims_are_a_table_without_doubles():
    ids = [known for claim in CLAIMS for known in claim.ids]
    assert len(ids) == len(set(ids))
    for claim in CLAIMS:
        assert (claim.check is None) == (claim.not_testable is not None), claim.id
        assert claim.statement and claim.source


def test_every_number_of_the_catalogue_has_a_claim():
    known = {known.split(".")[0] for claim in CLAIMS for known in claim.ids}
    assert catalogue_ids() - known == set()
    # Beyond it there are workloads of the catalogue, and sections of what it was made of.
    assert {known for known in known - catalogue_ids() if not known.startswith("W")} == {
        "6C",
        "6D",
    }


def test_every_sentence_of_the_guide_is_judged_by_claims_there_are_or_says_why_not():
    known = {known for claim in CLAIMS for known in claim.ids}
    sentences = [sentence for _, section in GUIDE for sentence in section]
    assert {one for sentence in sentences for one in sentence.claims} - known == set()
    for sentence in sentences:
        assert bool(sentence.claims) != bool(sentence.why_not), sentence.begins
        assert sentence.since in (None, "6.1", "6.12"), sentence.begins


def test_a_sentence_of_the_guide_with_a_claim_there_is_not_is_found_out(monkeypatch):
    wrong = Sentence("KSM merges files", ("C999",))
    monkeypatch.setattr(markdown, "GUIDE", (("Overview", (wrong,)),))
    with pytest.raises(KeyError, match="C999"):
        markdown.claims_markdown()


def test_claims_are_chosen_by_any_id():
    assert [claim.id for claim in choose(["c53"])] == ["C53"]
    assert [claim.id for claim in choose(["R3"])] == ["C53"]
    assert {claim.id for claim in choose(["C103"])} == {"C103", "C103.kpfn"}
    with pytest.raises(UsageError):
        choose(["C999"])


def run(*arguments):
    return CliRunner().invoke(ksmtrace, ["check", *map(str, arguments)], standalone_mode=False)


def written(recorded: Recorded, path):
    """Write what is tampered with to a file, as a recording."""
    from ksmtrace.recording.writer import RecordingWriter
    from ksmtrace.stream import Batch

    with RecordingWriter(path, recorded.header) as writer:
        for item in recorded.samples[:1]:
            writer.write(item)
        writer.write(Batch(recorded.events))
        for item in (*recorded.samples[1:], recorded.losses[-1], recorded.trailer):
            writer.write(item)
    return path


def test_check_ends_with_1_where_a_claim_is_violated(golden, tmp_path):
    false, said = busy_and_left(copied(golden("guest-6.12-witnessed")))
    path = written(false, tmp_path / "false.ksmt")

    done = run("--json", path)
    assert done.return_value == 1
    outcome = json.loads(done.output)
    assert outcome["file"] == str(path)
    wrong = [claim for claim in outcome["claims"] if claim["verdict"] == "violated"]
    wrong = [claim for claim in wrong if claim["expected"] is None]
    assert [claim["id"] for claim in wrong] == ["C56"]
    assert set(wrong[0]) >= {"id", "statement", "verdict", "evidence", "reason"}
    assert any(said in evidence["says"] for evidence in wrong[0]["evidence"])
    assert nr_faults(outcome["claims"]) == 1

    lines = run(path).output.splitlines()
    assert lines[1].startswith("VIOLATED 1;")
    assert lines[3].startswith("VIOLATED C56: ")
    assert any(said in line for line in lines)


def test_check_ends_with_0_where_nothing_is_violated(recordings):
    done = run("--claim", "C102", "--claim", "I10", "--json", recordings / "guest-7.x-churn.ksmt")
    assert done.return_value == 0
    assert {c["id"]: c["verdict"] for c in json.loads(done.output)["claims"]} == {
        "C102": "holds",
        "I10": "holds",
    }


def test_ktap_has_a_plan_and_one_line_per_claim(golden):
    false, _ = busy_and_left(copied(golden("guest-6.12-witnessed")))
    outcomes = [
        as_json(judge_all(CLAIMS, Case(recorded)), Case(recorded))
        for recorded in (golden("guest-7.x-churn"), false)
    ]
    lines = list(check_lines([*outcomes, {"kernel": None, "skipped": "no guest"}]))
    assert lines[:2] == ["KTAP version 1", "1..3"]
    assert lines[2] == "    KTAP version 1"
    assert lines[3] == f"    1..{len(CLAIMS)}"
    tests = [line for line in lines if re.match(r"    (not )?ok ", line)]
    numbers = [int(re.search(r"ok (\d+) ", line)[1]) for line in tests]
    assert numbers == [*range(1, len(CLAIMS) + 1)] * 2
    assert sum(line.startswith("    not ok") for line in tests) == 1
    tops = [line for line in lines if re.match(r"(not )?ok ", line)]
    assert tops == [
        "ok 1 ksm_claims_7.3.4+deb13-amd64",
        "not ok 2 ksm_claims_6.12.117+deb13-amd64",
        "ok 3 ksm_claims_unknown # SKIP no guest",
    ]
    for line in tests:
        assert re.fullmatch(r"    (not )?ok \d+ [\w.+-]+( # (SKIP|XFAIL) [^#]+)?", line), line


def test_ktap_tells_what_was_judged_before_a_kernel_was_lost(golden):
    case = Case(golden("guest-7.x-churn"))
    judged = as_json(judge_all(CLAIMS, case), case)
    lines = list(
        check_lines([{**judged, "failed": "the guest is lost: #1"}, {"failed": "no boot"}])
    )
    assert len([line for line in lines if re.match(r"    (not )?ok ", line)]) == len(CLAIMS)
    assert lines[-4:] == [
        "# ksm_claims_7.3.4+deb13-amd64: the guest is lost: number 1",
        "not ok 1 ksm_claims_7.3.4+deb13-amd64",
        "# ksm_claims_unknown: no boot",
        "not ok 2 ksm_claims_unknown",
    ]


def test_the_generated_documents_are_current():
    notes = json.loads((RESULTS / "notes.json").read_text())
    results = {
        kernel: json.loads((RESULTS / f"{kernel}.json").read_text()) for kernel in notes["kernels"]
    }
    assert (DOCS / "claims.md").read_text() == markdown.claims_markdown()
    assert (DOCS / "matrix.md").read_text() == markdown.matrix_markdown(results, notes["notes"])


def test_no_kernel_has_a_verdict_of_a_claim_that_is_gone():
    for kernel in json.loads((RESULTS / "notes.json").read_text())["kernels"]:
        result = json.loads((RESULTS / f"{kernel}.json").read_text())
        # A claim that is younger than the run is unknown in the matrix.
        assert set(result["claims"]) <= {claim.id for claim in CLAIMS}, kernel


@pytest.mark.parametrize("claim_id", ["DOC8", "Q8"])
def test_counters_that_were_only_read_while_ksmd_ran_are_the_reason(golden, claim_id):
    recorded = golden("duplicates")
    assert any(sample.ksm["pages_sharing"] for sample in recorded.samples)
    busy = [replace(sample, ksm={**sample.ksm, "run": 1}) for sample in recorded.samples]
    finding = find(replace(recorded, samples=busy), claim_id)
    assert finding.reason == "the counters were never read while KSM rested (run 0 or 2)"


class Ended:
    """A stream that ends after some of its items."""

    def __init__(self, header, items):
        self.header, self.items = header, items

    def __iter__(self):
        return iter(self.items)


def remembered(header, items):
    backlog = Backlog(header)
    for item in items:
        backlog.take(item)
    return backlog.stream()


@pytest.mark.parametrize("ends", [Ended, remembered])
@pytest.mark.parametrize("name", ["guest-5.10-chains", "guest-7.x-churn", "guest-7.x-moves"])
def test_a_stream_that_ends_in_the_middle_contradicts_no_counter(recordings, name, ends):
    reader = RecordingReader(recordings / f"{name}.ksmt")
    *items, _ = reader
    ids = ("C11.code", "C11.rest", "C03", "C03.rest", "DOC9", "I6", "I7", "I8")
    judged = set()
    for end in range(1, len(items)):
        if isinstance(items[end], ProcessSeen):
            continue
        stream = ends(reader.header, items[:end])
        if stream is None:
            continue
        case = Case(gather(stream))
        verdicts = {one: judge(BY_ID[one], case) for one in ids}
        judged |= {one for one, finding in verdicts.items() if finding.verdict is Verdict.HOLDS}
        wrong = {one: f.observed for one, f in verdicts.items() if f.verdict is Verdict.VIOLATED}
        assert not wrong, f"after {end} items"
    assert "C03" in judged


def test_an_append_of_an_attempt_from_before_the_recording_is_not_counted(golden):
    recorded = golden("guest-6.1-lifetime")
    tries = places(recorded, "ksm_merge_with_ksm_page")
    second = int(tries[recorded.events["ksm_page"][tries] != 0][0])
    events = recorded.events[second:]
    counts = Recorded(recorded.header, events).counts()
    begun = replace(recorded, events=events, losses=[replace(recorded.losses[-1], produced=counts)])
    assert find(begun, "I4").verdict is Verdict.HOLDS
