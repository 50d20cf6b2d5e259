"""Probes on functions in real guests, against the kernel's own count of the same calls."""

import functools
import json
import runpy
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ksmtrace.analysis.outcomes import find_page_outcomes
from ksmtrace.analysis.recorded import Recorded, gather, has_flag
from ksmtrace.events import EventFlag, Events, SearchOutcome, of_kind
from ksmtrace.recording.reader import RecordingReader
from ksmtrace.vm import VmOptions

pytestmark = pytest.mark.vm

PROGRAM = Path(__file__).with_name("guest_functions.py")
guest = SimpleNamespace(**runpy.run_path(str(PROGRAM)))

# A tuple is a guest: three recorders in one took it 12 minutes on a busy machine. Each comparison
# is made on the kernels that have both sides of it.
RECORDERS = {
    "5.10": [("best",)],
    "6.1": [("best", "fentry")],
    "6.12": [("best", "watchpoint")],
    "7.x": [("best", "fentry"), ("best", "kprobe")],
}
WATCHPOINT = "watchpoint"  # tells of visits, and of nothing else
NO_RECIPE = "no recipe"  # has one too, beside programs on functions
PAIRS = [
    (series, name)
    for series, guests in RECORDERS.items()
    for name in dict.fromkeys(name for names in guests for name in names)
    if name != WATCHPOINT
]
WATCHED = [
    series for series, guests in RECORDERS.items() if any(WATCHPOINT in names for names in guests)
]
DERIVED_PAIRS = [(series, name) for series, name in PAIRS if name == "fentry"]

STABLE_FLAG, UNSTABLE_FLAG = 0x200, 0x100  # mm/ksm.c, in rmap_item->address

# By this kernel's name for it, the kind that has an event for each of its calls.
ONE_EVENT_PER_CALL = {
    "try_to_merge_one_page": "try_to_merge_one_page",
    "try_to_merge_with_ksm_page": "ksm_merge_with_ksm_page",
    "break_ksm": "break_ksm",
    "stable_tree_append": "stable_tree_append",
    "remove_node_from_stable_tree": "remove_node_from_stable_tree",
    "__ksm_enter": "ksm_enter",
    "__ksm_exit": "ksm_exit",
}
BODY_OF = {"folio_migrate_ksm": "ksm_migrate_page", "ksm_get_folio": "get_ksm_page"}


@dataclass(eq=False)
class Run:
    """What one guest brought: a recording per recorder, and the witness."""

    recorded: dict[str, Recorded]
    witness: dict[str, Any]


@pytest.fixture
def run(series: str, request, in_guest) -> Run:
    name = request.node.callspec.params.get("name", "best")
    names = next(names for names in RECORDERS[series] if name in names)
    return load(in_guest(series, PROGRAM, VmOptions(numa_nodes=2), *names), names)


@functools.cache
def load(out: Path, names: tuple[str, ...]) -> Run:
    witness = json.loads((out / "witness.json").read_text())
    return Run({name: gather(RecordingReader(out / f"{name}.ksmt")) for name in names}, witness)


def rungs(recorded: Recorded) -> dict[str, str]:
    return {entry["event"]: entry["rung"] for entry in recorded.header.plan}


def last(recorded: Recorded) -> Any:
    return recorded.losses[-1]


@pytest.mark.parametrize(("series", "name"), PAIRS)
def test_every_call_is_seen(series: str, name: str, run: Run) -> None:
    recorded, calls = run.recorded[name], run.witness["calls"]

    # A program that other tasks run too may be left out while it runs on the same CPU; whether one
    # of KSM's was, the counts below say.
    reasons = recorded.why_incomplete()
    assert all("left out the program" in reason for reason in reasons), reasons
    assert recorded.trailer is not None
    assert recorded.trailer.command_exit_status == 0
    for function, kind in ONE_EVENT_PER_CALL.items():
        assert recorded.count(kind) == calls[function] > 0, function
    for function, count in calls.items():
        body = BODY_OF.get(function, function)
        for passed in last(recorded).calls.get(body, [None]):
            assert passed in (count, None), function
    assert sum(1 for f in calls if BODY_OF.get(f, f) in last(recorded).calls) >= 7


@pytest.mark.parametrize(("series", "name"), PAIRS)
def test_every_page_looked_at_is_counted_and_streamed(series: str, name: str, run: Run) -> None:
    recorded, sysfs = run.recorded[name], run.witness["sysfs"]
    counted = last(recorded).counted
    looked_at = run.witness["pages_found"] - sysfs.get("pages_skipped", 0)

    assert counted["cmp_and_merge_page"] == looked_at > 1000
    if "pages_scanned" in sysfs:
        assert sysfs["pages_scanned"] == looked_at
        assert sysfs["pages_skipped"] > 0
    if "smart_scan_skips" in counted:
        assert counted["smart_scan_skips"] == sysfs.get("pages_skipped", 0)
    # The last visit may not be over, as far as is seen, when ksmd stops.
    visits = of_kind(recorded.events, "cmp_and_merge_page")
    assert len(visits) in (looked_at - 1, looked_at)
    assert sum(last(recorded).histograms["visit_interval_ns"]) == len(visits) - 1
    searches = of_kind(recorded.events, "stable_tree_search")
    for outcome in SearchOutcome:
        streamed = np.count_nonzero(searches["outcome"] == outcome)
        assert streamed == counted[f"stable_tree_search.{outcome.name.lower()}"], outcome
    assert counted["stable_tree_search.found"] > 0
    assert counted["stable_tree_search.same_page"] > 0
    assert sum(last(recorded).histograms["search_nodes"]) == len(searches)


@pytest.mark.parametrize("series", list(RECORDERS))
def test_visits_say_what_became_of_the_page(series: str, run: Run) -> None:
    visits = of_kind(run.recorded["best"].events, "cmp_and_merge_page")
    before = visits["flags_before"]
    after = visits["address"] & np.uint64(0xFFF)
    first_pass = visits[: guest.MERGEABLE + guest.UNIQUE]

    # The first visit stores the checksum, and puts the page into no tree.
    assert (first_pass["flags_before"] == 0).all()
    assert (first_pass["checksum_changed"] == 1).all()
    assert ((first_pass["address"] & np.uint64(STABLE_FLAG | UNSTABLE_FLAG)) == 0).all()
    # Unique pages are put into the unstable tree anew in every pass.
    again = (before & UNSTABLE_FLAG != 0) & (after & np.uint64(UNSTABLE_FLAG) != 0)
    assert np.count_nonzero(again) >= guest.UNIQUE
    # As many pages have gone into the stable tree as were appended by their own visit; the other
    # page of a pair is appended by its partner's.
    gone_in = (before & STABLE_FLAG == 0) & (after & np.uint64(STABLE_FLAG) != 0)
    appended = of_kind(run.recorded["best"].events, "stable_tree_append")
    pairs = np.count_nonzero(has_flag(appended, EventFlag.FIRST_SHARER))
    assert np.count_nonzero(gone_in) == len(appended) - pairs


@pytest.mark.parametrize(("series", "name"), PAIRS)
def test_migrated_pages(series: str, name: str, run: Run) -> None:
    moved = of_kind(run.recorded[name].events, "ksm_migrate_page")

    assert len(moved) >= guest.MOVED
    assert np.array_equal(moved["kpfn_before"], moved["pfn"])
    assert np.array_equal(moved["kpfn_after"], moved["new_pfn"])
    assert not (moved["pfn"] == moved["new_pfn"]).any()
    assert len(np.unique(moved["stable_node"])) >= guest.MOVED
    nodes = run.recorded[name].header.facts["node_pages"]
    assert set(nodes) == {"0", "1"}
    to_other = sum(node_of(nodes, a) != node_of(nodes, b) for a, b in zip_pfns(moved))
    assert to_other >= guest.MOVED


def zip_pfns(moved: Events) -> list[tuple[int, int]]:
    return list(zip(moved["pfn"].tolist(), moved["new_pfn"].tolist(), strict=True))


def node_of(nodes: dict[str, list[list[int]]], pfn: int) -> str:
    (node,) = [n for n, ranges in nodes.items() if any(a <= pfn < b for a, b in ranges)]
    return node


@pytest.mark.parametrize(("series", "name"), PAIRS)
def test_the_stable_tree_ends_empty_and_the_counters_follow(
    series: str, name: str, run: Run
) -> None:
    events = run.recorded[name].events
    appended = of_kind(events, "stable_tree_append")
    removed = of_kind(events, "remove_rmap_item_from_tree")
    freed = of_kind(events, "remove_node_from_stable_tree")
    singly = removed[~has_flag(removed, EventFlag.NODE_FREED)]

    # run=2 has unmerged all, so that what became a sharer has left again.
    assert len(appended) == len(singly) + freed["sharers"].sum()
    first = has_flag(appended, EventFlag.FIRST_SHARER)
    gone_last = has_flag(singly, EventFlag.LAST_SHARER)
    assert first.sum() == gone_last.sum() + np.count_nonzero(freed["sharers"])
    assert first.sum() >= guest.CONTENTS
    with_node = of_kind(events, "ksm_remove_rmap_item")
    assert len(with_node) == np.maximum(freed["sharers"] - 1, 0).sum() > 0
    assert np.array_equal(of_kind(events, "ksm_remove_ksm_page")["pfn"], freed["pfn"])


@pytest.mark.parametrize(("series", "name"), PAIRS)
def test_where_and_who(series: str, name: str, run: Run) -> None:
    events = run.recorded[name].events
    entered = of_kind(events, "ksm_enter")
    for kind in ("try_to_merge_one_page", "stable_tree_append", "remove_rmap_item_from_tree"):
        found = of_kind(events, kind)
        assert np.isin(found["mm"], entered["mm"]).all(), kind
        assert has_flag(found, EventFlag.HAS_ADDRESS).all(), kind
        assert found["rmap_item"].all(), kind
        assert found["pfn"].all(), kind
    merged = of_kind(events, "try_to_merge_one_page")
    assert (merged["duration_ns"] > 0).all()
    assert has_flag(merged, EventFlag.IN_KSMD).all()
    broken = of_kind(events, "break_ksm")
    worker = entered["pid"][0]
    by_worker = broken[broken["task_pid"] == worker]
    assert (by_worker["pid"] == worker).all()
    if (broken["end_address"] > 0).any():
        assert (by_worker["end_address"] - by_worker["address"]).max() >= guest.UNMERGED * 4096
    else:
        assert len(np.unique(by_worker["address"])) >= guest.UNMERGED


@pytest.mark.parametrize(("series", "name"), DERIVED_PAIRS)
def test_derived_and_site_agree(series: str, name: str, run: Run) -> None:
    best, derived = run.recorded["best"], run.recorded[name]
    assert rungs(best)["cmp_and_merge_page"] == rungs(best)["stable_tree_search"] == "inlined site"
    assert rungs(derived)["cmp_and_merge_page"] == "derived"
    assert rungs(derived)["stable_tree_search"] == "derived"

    pages = [places(of_kind(r.events, "cmp_and_merge_page")) for r in (best, derived)]
    assert abs(len(pages[0]) - len(pages[1])) <= 1
    nr_pages = min(map(len, pages)) - 1  # of the last, run=2 has freed the rmap_item meanwhile
    assert pages[0][:nr_pages] == pages[1][:nr_pages]
    # Of a KSM page that is in place already, nothing is seen from which to tell the rmap_item.
    visits, seen = (of_kind(r.events, "cmp_and_merge_page")[:nr_pages] for r in (best, derived))
    known = seen["rmap_item"] != 0
    assert 0 < known.sum() < nr_pages
    assert ((visits["flags_before"] & STABLE_FLAG) != 0)[~known].all()
    for field in ("rmap_item", "address", "flags_before", "checksum_changed"):
        assert np.array_equal(visits[field][known], seen[field][known]), field

    # A search that looks up no stable_node, because the tree is empty, shows nothing.
    searches = of_kind(best.events, "stable_tree_search")
    empty = (searches["nodes"] == 0) & (searches["outcome"] == SearchOutcome.NONE)
    assert 0 < empty.sum() < len(searches) / 2
    found = of_kind(derived.events, "stable_tree_search")
    both = [searched(searches[~empty]), searched(found)]
    assert abs(len(both[0]) - len(both[1])) <= 1
    nr_searches = min(map(len, both))
    assert both[0][:nr_searches] == both[1][:nr_searches]


@pytest.mark.parametrize("series", WATCHED)
def test_watchpoint_and_site_agree(series: str, run: Run) -> None:
    best, watched = run.recorded["best"], run.recorded[WATCHPOINT]
    sysfs = run.witness["sysfs"]
    assert rungs(best)["cmp_and_merge_page"] == "inlined site"
    for kind in ("cmp_and_merge_page", "should_skip_rmap_item"):
        assert rungs(watched)[kind] == WATCHPOINT
    assert rungs(watched)["stable_tree_search"] == "absent"
    assert watched.why_incomplete() == []

    visits, seen = (of_kind(r.events, "cmp_and_merge_page") for r in (best, watched))
    assert len(seen) == sysfs["pages_scanned"] == last(watched).counted["cmp_and_merge_page"]
    assert len(visits) in (len(seen) - 1, len(seen))
    # The site does not learn that the last visit is over before run=2 has freed the rmap_item.
    nr_visits = len(seen) - 1
    for field in ("rmap_item", "mm", "pid", "address", "flags_before", "checksum_changed"):
        assert np.array_equal(visits[field][:nr_visits], seen[field][:nr_visits]), field
    assert {*np.unique(seen["flags_before"] & np.uint32(STABLE_FLAG))} == {0, STABLE_FLAG}
    assert {*np.unique(seen["checksum_changed"])} == {0, 1}
    assert not watched.has_field("cmp_and_merge_page", "pfn")

    skips, seen = (of_kind(r.events, "should_skip_rmap_item") for r in (best, watched))
    assert len(seen) == sysfs["pages_skipped"] == last(watched).counted["smart_scan_skips"] > 0
    for field in ("rmap_item", "mm", "pid", "age", "remaining_skips"):
        assert np.array_equal(skips[field], seen[field]), field


@pytest.mark.parametrize("series", WATCHED)
def test_what_builds_on_watched_visits_is_as_with_a_site(series: str, in_guest) -> None:
    # In a guest of their own: of two watchpoints on one address QEMU's emulation triggers one.
    names = ("best", NO_RECIPE)
    recorded = load(in_guest(series, PROGRAM, VmOptions(numa_nodes=2), *names), names).recorded
    best, watched = (recorded[name] for name in names)
    assert rungs(watched)["cmp_and_merge_page"] == WATCHPOINT
    assert rungs(watched)["should_skip_rmap_item"] == WATCHPOINT
    assert rungs(watched)["stable_tree_search"] == rungs(watched)["page_outcomes"] == "derived"

    pages = [places(of_kind(r.events, "cmp_and_merge_page")) for r in (best, watched)]
    nr_pages = len(pages[1]) - 1
    assert nr_pages > 1000
    assert pages[0][:nr_pages] == pages[1][:nr_pages]
    searches = of_kind(best.events, "stable_tree_search")
    empty = (searches["nodes"] == 0) & (searches["outcome"] == SearchOutcome.NONE)
    both = [searched(searches[~empty]), searched(of_kind(watched.events, "stable_tree_search"))]
    nr_searches = min(map(len, both))
    assert abs(len(both[0]) - len(both[1])) <= 1
    assert both[0][:nr_searches] == both[1][:nr_searches]
    outcomes = [find_page_outcomes(r) for r in (best, watched)]
    assert outcomes[0] is not None and outcomes[1] is not None
    # A last visit that the site does not see the end of.
    changed = {
        name: outcomes[1].total.get(name, 0) - count for name, count in outcomes[0].total.items()
    }
    assert sum(map(abs, changed.values())) <= 1, changed


def places(events: Events) -> list[tuple[int, ...]]:
    pages = events["address"] & ~np.uint64(0xFFF)
    return list(zip(events["mm"].tolist(), pages.tolist(), events["pfn"].tolist(), strict=True))


def searched(events: Events) -> list[tuple[int, ...]]:
    columns = (events["pfn"].tolist(), events["outcome"].tolist(), events["nodes"].tolist())
    return list(zip(*columns, strict=True))


@pytest.mark.parametrize(("series", "name"), [pair for pair in PAIRS if pair[1] != "best"])
def test_all_rungs_tell_the_same_merges(series: str, name: str, run: Run) -> None:
    best, other = run.recorded["best"], run.recorded[name]
    assert rungs(other)["ksm_merge_with_ksm_page"] == name
    if series == "7.x":
        assert rungs(best)["ksm_merge_with_ksm_page"] == "tracepoint"

    for kind, fields in {
        "ksm_start_scan": ("seq",),
        "ksm_stop_scan": ("seq", "rmap_entries"),
        "ksm_enter": ("mm", "pid"),
        "ksm_exit": ("mm",),
        "ksm_merge_with_ksm_page": ("ksm_page", "pfn", "rmap_item", "mm", "pid", "address", "err"),
        "ksm_remove_ksm_page": ("pfn", "pid"),
        "ksm_remove_rmap_item": ("pfn", "rmap_item", "mm", "pid"),
    }.items():
        ours, theirs = of_kind(best.events, kind), of_kind(other.events, kind)
        assert len(ours) > 0, kind
        for field in fields:
            assert np.array_equal(ours[field], theirs[field]), (kind, field)
