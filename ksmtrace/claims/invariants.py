"""What must be so on every event, whatever is done."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ksmtrace.analysis.addresses import next_place, number_lives, places_of
from ksmtrace.analysis.merges import find_merges, tell_outcomes
from ksmtrace.analysis.recorded import has_flag
from ksmtrace.claims.claim import (
    Case,
    Claim,
    Evidence,
    Exercised,
    Fields,
    Finding,
    Kinds,
    Samples,
    holds,
    unknown,
    violated,
)
from ksmtrace.claims.told import JOINS, SHOWN, Check, show, tell
from ksmtrace.events import KIND_BY_NAME, EventFlag, Events, SearchOutcome, of_kind, select
from ksmtrace.kernel.ksm_check import check_ksm_memory
from ksmtrace.kernel.ksm_memory import SEQNR_MASK, STABLE_FLAG, UNSTABLE_FLAG

_FLAGS = STABLE_FLAG | UNSTABLE_FLAG
# With run 0, ksmd still wakes when its sleep is over, takes ksm_thread_mutex and lets it go.
_NO_WORK = tuple(KIND_BY_NAME[name].number for name in ("lock_wait", "lock_hold"))


def seqnr_at(events: Events, times: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """Return ksm_scan.seqnr at given times, -1 where no event has told of it yet.

    ksm_start_scan and ksm_stop_scan carry it, the latter before its increment; a successful run=2
    sets it to 0 (mm/ksm.c:unmerge_and_remove_all_rmap_items).
    """
    marks = of_kind(events, "ksm_start_scan", "ksm_stop_scan", "run_store")
    is_stop = marks["kind"] == KIND_BY_NAME["ksm_stop_scan"].number
    is_store = marks["kind"] == KIND_BY_NAME["run_store"].number
    # Any other write tells nothing; nor does an unmerge that failed.
    tells = ~is_store | ((marks["run"] == 2) & (marks["err"] == 0))
    values = np.where(is_store, 0, marks["seq"].astype(np.int64) + is_stop)[tells]
    marks = marks[tells]
    order = np.argsort(marks["ts_ns"], kind="stable")
    at = np.searchsorted(marks["ts_ns"][order], times, side="right") - 1
    known: npt.NDArray[np.int64] = np.r_[values[order], np.int64(-1)][at]
    return known


def _check_age(case: Case) -> Finding:
    visits = of_kind(case.recorded.events, "cmp_and_merge_page")
    flags = visits["flags_before"].astype(np.int64)
    seqnr = seqnr_at(case.recorded.events, visits["ts_ns"])
    judged = (flags & UNSTABLE_FLAG != 0) & (seqnr >= 0)
    ages = (seqnr - flags) & SEQNR_MASK
    wrong = judged & (ages > 1)
    if wrong.any():
        at = np.flatnonzero(wrong)
        evidence = show(
            visits, wrong, "rmap_item {rmap_item:#x} came to its visit with flags {flags_before:#x}"
        )
        first = Evidence(
            "events",
            f"ksm_scan.seqnr was {seqnr[at[0]]} then: its age is {ages[at[0]]}",
            int(visits["ts_ns"][at[0]]),
        )
        return violated(f"{len(at)} of {judged.sum()} unstable items older", first, *evidence)
    count = int(judged.sum())
    if not count:
        return unknown("no rmap_item came out of the unstable tree to a visit")
    by_age = np.bincount(ages[judged], minlength=2)
    return holds(f"{count} visits of unstable items: {by_age[0]} of age 0, {by_age[1]} of age 1")


def _check_aborted(case: Case) -> Finding:
    trial = case.trials["aborted"]
    stopped, begun = trial.at("stopped"), trial.at("begun again")
    if not stopped.notes["status"]:
        return unknown("no signal came in the midst of the unmerge")
    events = case.recorded.events
    visits = of_kind(events, "cmp_and_merge_page")
    starts = of_kind(events, "ksm_start_scan")["ts_ns"]
    # The pass that was stopped is the last one that began before the unmerge.
    first = starts[starts < trial.at("half done").end_ns][-1:]
    if not len(first):
        return unknown("the pass that was stopped did not begin in the recording")
    of_first = (visits["ts_ns"] > first[0]) & (visits["ts_ns"] < stopped.begin_ns)
    placed = of_first & (visits["address"] & np.uint64(_FLAGS) == UNSTABLE_FLAG)
    items = np.unique(visits["rmap_item"][placed & has_flag(visits, EventFlag.HAS_ADDRESS)])
    again = (visits["ts_ns"] > stopped.end_ns) & (visits["ts_ns"] < begun.begin_ns)
    again &= np.isin(visits["rmap_item"], items)
    again &= visits["flags_before"] & UNSTABLE_FLAG != 0
    if not again.any():
        return unknown("no rmap_item that the stopped pass put into a tree was visited again")
    flags = visits["flags_before"][again].astype(np.int64)
    ages = (seqnr_at(events, visits["ts_ns"][again]) - flags) & SEQNR_MASK
    evidence = [Evidence("events", f"{len(items)} rmap_items put into a tree by the stopped pass")]
    for reading in case.recorded.witnessed:
        if reading.memory is not None and begun.begin_ns <= reading.begin_ns <= begun.end_ns:
            evidence += [
                Evidence("kernel memory", line, reading.begin_ns)
                for line in check_ksm_memory(reading.memory)
            ]
    observed = f"{int((ages == 0).sum())} of {len(ages)} that came to a visit again had age 0"
    return tell(bool((ages == 0).all()), observed, *evidence)


def _check_busy(case: Case) -> Finding:
    events = case.recorded.events
    places = places_of(events, "stable_tree_search")
    busy = places[events["outcome"][places] == SearchOutcome.BUSY]
    if not len(busy):
        return unknown("no search found its page locked (-EBUSY)")
    visits = places_of(events, "cmp_and_merge_page")
    # The visit is told of just before its search (bpf/visits.c:end_visit).
    at = np.searchsorted(visits, busy) - 1
    of_visit = visits[np.maximum(at, 0)]
    known = (at >= 0) & (events["rmap_item"][of_visit] == events["rmap_item"][busy])
    known &= (events["flags"][of_visit] & EventFlag.HAS_ADDRESS) != 0
    evidence: list[Evidence] = []
    # A derived visit learns the rmap_item by its removal: without one, the next removal shows.
    unnamed = known & (events["rmap_item"][of_visit] == 0)
    nr_left_in = 0
    for place in np.flatnonzero(unnamed).tolist():
        visit = int(of_visit[place])
        later = _next_named(events, visits, visit)
        if later is None:
            known[place] = False
        elif events["flags_before"][later] & _FLAGS:
            nr_left_in += 1
            if len(evidence) < 2 * SHOWN:
                evidence += _left_in(events, visit, later)
    if nr_left_in:
        return violated(f"{nr_left_in} of {len(busy)} items still in a tree", *evidence)
    left_in = known & (events["address"][of_visit] & np.uint64(_FLAGS) != 0)
    if left_in.any():
        for search, visit in zip(busy[left_in], of_visit[left_in], strict=True):
            if len(evidence) >= 2 * SHOWN:
                break
            item = int(events["rmap_item"][search])
            flags = int(events["address"][visit]) & 0xFFF
            before = int(events["flags_before"][visit])
            evidence += [
                Evidence(
                    "events",
                    f"stable_tree_search for rmap_item {item:#x} returned -EBUSY",
                    int(events["ts_ns"][search]),
                ),
                Evidence(
                    "events",
                    f"rmap_item {item:#x} was not removed from the tree: flags {before:#x} before "
                    f"the visit, {flags:#x} after it",
                    int(events["ts_ns"][visit]),
                ),
            ]
        return violated(f"{left_in.sum()} of {len(busy)} items still in a tree", *evidence)
    if not known.all():
        return unknown(f"{(~known).sum()} of {len(busy)} visits with -EBUSY have no known end")
    was_in = int(np.count_nonzero(events["flags_before"][of_visit] & _FLAGS))
    return holds(f"{len(busy)} times -EBUSY, {was_in} with an item in a tree: removed every time")


def _next_named(events: Events, visits: npt.NDArray[np.int64], visit: int) -> int | None:
    later = visits[visits > visit]
    page = np.uint64(~0xFFF & (1 << 64) - 1)
    there = events["address"][later] & page == events["address"][visit] & page
    there &= events["pid"][later] == events["pid"][visit]
    there &= events["rmap_item"][later] != 0
    return int(later[there][0]) if there.any() else None


def _left_in(events: Events, visit: int, later: int) -> list[Evidence]:
    item, flags = int(events["rmap_item"][later]), int(events["flags_before"][later])
    return [
        Evidence(
            "events",
            f"the visit of the page at {int(events['address'][visit]):#x} of process "
            f"{int(events['pid'][visit])} ended in -EBUSY without remove_rmap_item_from_tree",
            int(events["ts_ns"][visit]),
        ),
        Evidence(
            "events",
            f"its rmap_item {item:#x} came to its next removal with flags {flags:#x}",
            int(events["ts_ns"][later]),
        ),
    ]


def _check_both_trees(case: Case) -> Finding:
    visits = of_kind(case.recorded.events, "cmp_and_merge_page")
    # Of a page in its place a derived visit does not learn the rmap_item.
    visits = visits[visits["rmap_item"] != 0]
    after = visits["address"] & np.uint64(_FLAGS)
    both = (after == _FLAGS) & has_flag(visits, EventFlag.HAS_ADDRESS)
    both |= visits["flags_before"] & _FLAGS == _FLAGS
    if both.any():
        says = (
            "rmap_item {rmap_item:#x}: flags {flags_before:#x} before, address {address:#x} after"
        )
        return violated(f"{both.sum()} items in both trees", *show(visits, both, says))
    if not len(visits):
        return unknown("ksmd looked at no page whose rmap_item is known")
    return holds(f"{len(visits)} visits, none with an item in both trees")


def _migrates(kpfn: str, frame: str, says: str, observed: str) -> Check:
    # Whether at every migration one field is as another.
    def check(case: Case) -> Finding:
        moves = of_kind(case.recorded.events, "ksm_migrate_page")
        # A page whose merge is under way or was undone has no stable_node yet, or no more.
        moves = moves[moves["stable_node"] != 0]
        wrong = moves[kpfn] != moves[frame]
        if wrong.any():
            return violated(f"{wrong.sum()} of {len(moves)} differ", *show(moves, wrong, says))
        if not len(moves):
            return unknown("no KSM page migrated")
        return holds(f"{len(moves)} migrations, {observed}")

    return check


# Without remove_rmap_item_from_tree: it tells the frame as of its begin, and while it waits for the
# page's lock the page may move (mm/ksm.c:ksm_get_folio).
_NODE_KINDS = ("stable_tree_append", "remove_node_from_stable_tree", "ksm_migrate_page")


def _check_kpfn(case: Case) -> Finding:
    events = case.recorded.events
    places = places_of(events, *_NODE_KINDS)
    places = places[events["stable_node"][places] != 0]
    # What is told with a node that turned out stale comes after the node's own end.
    stale = (events["flags"][places] & EventFlag.NODE_FREED) != 0
    places = places[~stale]
    ends = places_of(events, "remove_node_from_stable_tree")
    # An address is another node once it was freed.
    lives = number_lives(events, "stable_node", places, ends)
    order = np.lexsort((places, lives))
    ordered = select(events, places[order])
    is_move = ordered["kind"] == KIND_BY_NAME["ksm_migrate_page"].number
    begins = np.where(is_move, ordered["kpfn_before"], ordered["pfn"])
    ends_at = np.where(is_move, ordered["kpfn_after"], ordered["pfn"])
    same = lives[order][1:] == lives[order][:-1]
    # A frame of 0 was not to be read.
    known = (begins[1:] != 0) & (ends_at[:-1] != 0)
    jumps = np.flatnonzero(same & known & (begins[1:] != ends_at[:-1]))
    if len(jumps):
        evidence = [
            Evidence(
                "events",
                f"stable_node {int(ordered['stable_node'][at]):#x}: kpfn {int(ends_at[at])} until "
                f"now, then {int(begins[at + 1])} without a migration",
                int(ordered["ts_ns"][at + 1]),
            )
            for at in jumps[:SHOWN]
        ]
        return violated(f"{len(jumps)} times kpfn changed by itself", *evidence)
    if not (same & known).any():
        return unknown("no stable_node was told of twice")
    nodes = len(np.unique(events["stable_node"][places]))
    return holds(f"{nodes} stable_nodes in {len(places)} events, {is_move.sum()} migrations")


def _check_stopped(case: Case) -> Finding:
    events = case.recorded.events
    stores = of_kind(events, "run_store")
    stores = stores[stores["err"] == 0]
    entered = stores["ts_ns"] - stores["duration_ns"]
    # Of writes at the same time nobody knows which came last.
    alone = np.array(
        [
            ((entered < end) & (stores["ts_ns"] > begin)).sum() == 1
            for begin, end in zip(entered, stores["ts_ns"], strict=True)
        ],
        bool,
    )
    stopped = np.flatnonzero(alone & ((stores["run"] == 0) | (stores["run"] == 2)))
    works = has_flag(events, EventFlag.IN_KSMD) & ~np.isin(events["kind"], _NO_WORK)
    works_ns = events["ts_ns"][works]
    wrong: list[Evidence] = []
    for at in stopped:
        until = np.append(entered[at + 1 :], np.iinfo(np.uint64).max)[0]
        late = (works_ns > stores["ts_ns"][at]) & (works_ns < until)
        for event in events[np.flatnonzero(works)[late][:1]]:
            name = next(k.name for k in KIND_BY_NAME.values() if k.number == event["kind"])
            after = int(event["ts_ns"]) - int(stores["ts_ns"][at])
            wrong.append(
                Evidence(
                    "events",
                    f"{late.sum()} events of ksmd, the first a {name} {after} ns after the write "
                    f"of {int(stores['run'][at])} to run had returned",
                    int(event["ts_ns"]),
                )
            )
    if wrong:
        return violated(f"{len(wrong)} of {len(stopped)} times ksmd worked on", *wrong[:SHOWN])
    if not len(stopped):
        return unknown("nobody set run to 0 or 2")
    return holds(f"run was set to 0 or 2 {len(stopped)} times, no event of ksmd after any of them")


def _check_seqnr(case: Case) -> Finding:
    marks = of_kind(case.recorded.events, "ksm_start_scan", "ksm_stop_scan", "run_store")
    is_store = marks["kind"] == KIND_BY_NAME["run_store"].number
    resets = is_store & (marks["run"] == 2) & (marks["err"] == 0)
    is_stop = marks["kind"] == KIND_BY_NAME["ksm_stop_scan"].number
    is_start = marks["kind"] == KIND_BY_NAME["ksm_start_scan"].number
    expected: int | None = None
    wrong: list[Evidence] = []
    passes = 0
    sees_resets = case.recorded.can_see("run_store")
    entered = marks["ts_ns"] - np.where(is_store, marks["duration_ns"], 0)
    is_scan = is_start | is_stop
    for index in np.flatnonzero(is_scan | resets).tolist():
        if resets[index]:
            # Where somebody else has set run to 1 before its writer came back: 0, or more.
            during = is_scan & (marks["ts_ns"] > entered[index])
            expected = None if during[:index].any() else 0
            continue
        seq = int(marks["seq"][index])
        # Without run_store a reset of full_scans by run=2 cannot be told from a fault.
        if expected is not None and seq != expected and not (seq == 0 and not sees_resets):
            what = "ksm_start_scan" if is_start[index] else "ksm_stop_scan"
            wrong.append(
                Evidence(
                    "events",
                    f"{what} with seq {seq}, and {expected} was due",
                    int(marks["ts_ns"][index]),
                )
            )
        expected = seq + 1 if is_stop[index] else seq
        passes += int(is_stop[index])
    if wrong:
        return violated(f"{len(wrong)} times out of step", *wrong[:SHOWN])
    if passes < 2:
        return unknown(f"{passes} passes ended, and it takes 2")
    return holds(f"{passes} passes, each one more than the last; {resets.sum()} resets by run=2")


def _check_reset(case: Case) -> Finding:
    marks = of_kind(case.recorded.events, "ksm_start_scan", "run_store")
    is_start = marks["kind"] == KIND_BY_NAME["ksm_start_scan"].number
    unmerged = np.flatnonzero(~is_start & (marks["run"] == 2))
    judged = 0
    for at in unmerged.tolist():
        later = np.flatnonzero(is_start[at:])
        # Somebody else may have set run to 1 before this writer came back.
        entered = marks["ts_ns"][at] - marks["duration_ns"][at]
        if (
            not len(later)
            or (is_start[:at] & (marks["ts_ns"][:at] > entered)).any()
            or (
                ~is_start[at + 1 : at + later[0]] & (marks["run"][at + 1 : at + later[0]] == 2)
            ).any()
        ):
            continue
        start = marks[at + later[0]]
        succeeded = marks["err"][at] == 0
        judged += 1
        if succeeded and start["seq"] != 0:
            return violated(
                "full_scans went on",
                Evidence("events", "run=2 succeeded", int(marks["ts_ns"][at])),
                Evidence(
                    "events", f"the next pass has seq {int(start['seq'])}", int(start["ts_ns"])
                ),
            )
    if not judged:
        return unknown("no pass began after a run=2")
    return holds(f"{judged} times run=2, and the next pass has seq 0 where it succeeded")


def _check_undone(case: Case) -> Finding:
    events = case.recorded.events
    merges = find_merges(case.recorded)
    first_steps = merges.undone & (merges.events["ksm_page"] == 0)
    undone = merges.places[first_steps]
    if not len(undone):
        return unknown("no second half of a merge failed")
    breaks = places_of(events, "break_ksm")
    breaks = breaks[(events["flags"][breaks] & EventFlag.IN_KSMD) != 0]
    page = np.uint64(~0xFFF & (1 << 64) - 1)
    attempts = merges.places
    missing, excused = [], 0
    for place in undone.tolist():
        # ksmd undoes it before it goes on; the second half comes between.
        later = attempts[attempts > place][1:2]
        until = int(later[0]) if len(later) else len(events)
        between = breaks[(breaks > place) & (breaks < until)]
        # In a range (since 6.19) the address is the beginning of it.
        if (events["address"][between] & page == events["address"][place] & page).any():
            continue
        if _stays_merged(events, place):
            missing.append(place)
        else:
            excused += 1
    if missing:
        says = "rmap_item {rmap_item:#x} at {address:#x}: second half failed, no break_ksm followed"
        return violated(
            f"{len(missing)} of {len(undone)} not broken",
            *show(events, np.array(missing, np.int64), says),
        )
    if excused:
        return unknown(
            f"{excused} of {len(undone)} first halves were not broken: their areas may be gone"
        )
    return holds(f"{len(undone)} first halves whose second failed, each broken by ksmd")


def _stays_merged(events: Events, place: int) -> bool:
    """Say whether the page of a first half is seen again as the page that it became.

    break_cow does nothing where the area was unmapped, or its process has ended, since
    (mm/ksm.c:find_mergeable_vma): then ksmd comes to no such page there any more.
    """
    same = events["rmap_item"] == events["rmap_item"][place]
    # The visit that this half belongs to began before.
    later = events[same & (events["ts_ns"] > events["ts_ns"][place])]
    later = of_kind(later, "ksm_merge_with_ksm_page", "cmp_and_merge_page")
    return bool(len(later)) and bool(later["pfn"][0] == events["pfn"][place])


def _check_appends(case: Case) -> Finding:
    events = case.recorded.events
    told = places_of(events, "ksm_merge_with_ksm_page", "stable_tree_append")
    tries = told[events["kind"][told] == KIND_BY_NAME["ksm_merge_with_ksm_page"].number]
    # A second half may have had its first before the recording.
    begins = tries[: len(tries) and 2]
    if len(begins) and events["ksm_page"][begins[0]] != 0:
        begins = begins[1:]
    if not len(begins):
        return unknown("nothing merged")
    merges = tell_outcomes(events[int(begins[0]) :], by_appends=True)
    ok = int((merges.events["err"] == 0).sum())
    undone = int(merges.undone.sum())
    unsure = int(merges.open.sum())
    # The append of an attempt that was left out is left out, too.
    appends = events["kind"][told] == KIND_BY_NAME["stable_tree_append"].number
    appended = int((appends & (told > begins[0])).sum())
    short = ok - undone - appended
    if not 0 <= short <= unsure:
        return violated(
            f"{appended} appends, {ok} merges, {undone} undone",
            Evidence("events", f"{ok} of ksm_merge_with_ksm_page without an error"),
            Evidence("events", f"{undone} of them undone by break_cow"),
            Evidence("events", f"{appended} of stable_tree_append"),
        )
    if not ok:
        return unknown("nothing merged")
    return holds(f"{appended} appends = {ok} merges - {undone} undone")


def _check_order(case: Case) -> Finding:
    events = case.recorded.events
    appends = places_of(events, "stable_tree_append")
    ends = places_of(events, "remove_rmap_item_from_tree", "ksm_remove_rmap_item")
    again = next_place(events, "rmap_item", appends, np.sort(np.r_[appends, ends]))
    is_append = np.r_[events["kind"] == KIND_BY_NAME["stable_tree_append"].number, False]
    twice = appends[is_append[again]]
    # A node's last sharer leaves with it and has no event of its own: that is no fault.
    freed = places_of(events, "remove_node_from_stable_tree")
    ended = next_place(events, "stable_node", twice, freed) if len(twice) else twice
    wrong = twice[ended > again[is_append[again]]] if len(twice) else twice
    if len(wrong):
        says = "rmap_item {rmap_item:#x} joins stable_node {stable_node:#x}, and again a node"
        return violated(f"{len(wrong)} joined twice", *show(events, wrong, says))
    if not len(appends):
        return unknown("nothing merged")
    return holds(f"{len(appends)} appends, each of an item that was no sharer")


def _limits(case: Case) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]] | None:
    # When max_page_sharing was read, and its value.
    readings = [(sample.begin_ns, sample.ksm) for sample in case.recorded.samples]
    for trial in case.trials.values():
        readings += [(reading.begin_ns, reading.counters) for reading in trial.readings]
    known = sorted(
        (at_ns, value)
        for at_ns, counters in readings
        if isinstance(value := counters.get("max_page_sharing"), int)
    )
    if not known:
        return None
    at_ns, values = np.array(known, np.int64).T
    return at_ns, values


def _limit_of(
    limits: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]],
    begin_ns: int,
    ts_ns: int,
    end_ns: int,
) -> int | None:
    """Return max_page_sharing at a time in the life of a stable_node, None where it is not known.

    It changes only while there is no stable_node (mm/ksm.c:max_page_sharing_store), so that any
    reading in the life of one will do.
    """
    at_ns, values = limits
    after = int(np.searchsorted(at_ns, ts_ns, side="right"))
    before = max(after - 1, 0)
    after = min(after, len(at_ns) - 1)
    if begin_ns <= at_ns[before] <= end_ns or values[before] == values[after]:
        return int(values[before])
    return int(values[after]) if begin_ns <= at_ns[after] <= end_ns else None


def _check_limit(case: Case) -> Finding:
    events = case.recorded.events
    limits = _limits(case)
    if limits is None:
        return unknown("this kernel has no max_page_sharing")
    kinds = ("stable_tree_append", "remove_rmap_item_from_tree", "remove_node_from_stable_tree")
    places = places_of(events, *kinds)
    stale = (events["flags"][places] & EventFlag.NODE_FREED) != 0
    places = places[~stale]
    told = select(events, places)
    told = told[np.lexsort((places, told["stable_node"]))]
    joins = told["kind"] == KIND_BY_NAME["stable_tree_append"].number
    frees = told["kind"] == KIND_BY_NAME["remove_node_from_stable_tree"].number
    is_first = joins & has_flag(told, EventFlag.FIRST_SHARER)
    bypasses = has_flag(told, EventFlag.BYPASS)
    least = int(limits[1].min())
    wrong: list[int] = []
    limit: int | None = None
    length, begin = 0, -1
    for index in range(len(told)):
        if index == 0 or told["stable_node"][index] != told["stable_node"][index - 1]:
            length, begin = 0, -1
        if frees[index]:
            length, begin = 0, -1
        elif joins[index]:
            length, begin = (1, index) if is_first[index] else (length + 1, begin)
            if begin < 0 or length <= least or bypasses[index]:
                continue
            ends = frees[index:] | (told["stable_node"][index:] != told["stable_node"][index])
            end = index + int(np.argmax(ends)) if ends.any() else len(told)
            freed = end < len(told) and frees[end]
            end_ns = int(told["ts_ns"][end]) if freed else np.iinfo(np.int64).max
            begin_ns, ts_ns = int(told["ts_ns"][begin]), int(told["ts_ns"][index])
            found = _limit_of(limits, begin_ns, ts_ns, end_ns)
            if found is not None and length > found:
                limit = limit or found
                wrong.append(index)
        else:
            length -= 1
    if wrong:
        says = f"rmap_item {{rmap_item:#x}} joins stable_node {{stable_node:#x}}, which has {limit}"
        return violated(f"{len(wrong)} beyond the limit", *show(told, np.array(wrong), says))
    if not joins.any():
        return unknown("nothing merged")
    bypassed = int((bypasses & joins).sum())
    return holds(f"{joins.sum()} joins, none beyond the limit; {bypassed} by fork, which may")


_VISITS = Kinds(("cmp_and_merge_page", "ksm_start_scan", "ksm_stop_scan"))
_VISIT_FLAGS = Fields("cmp_and_merge_page", ("flags_before", "address"))

CLAIMS = (
    Claim(
        ("C53", "R3"),
        "When an rmap_item that is marked unstable is removed, its age, ksm_scan.seqnr less the "
        "low bits of its address, is 0 or 1",
        "000 (2cee57d1b088), 002 P8; mm/ksm.c:remove_rmap_item_from_tree BUG_ON(age > 1)",
        _check_age,
        needs=(_VISITS, _VISIT_FLAGS),
    ),
    Claim(
        ("C56", "C57", "R1"),
        "Where the search of the stable tree returns -EBUSY, the rmap_item is removed from the "
        "unstable tree all the same",
        "000 (2cee57d1b088); mm/ksm.c:cmp_and_merge_page",
        _check_busy,
        needs=(Kinds(("stable_tree_search", "cmp_and_merge_page")), _VISIT_FLAGS),
    ),
    Claim(
        ("I14",),
        "An rmap_item is never marked both stable and unstable",
        "mm/ksm.c:STABLE_FLAG, UNSTABLE_FLAG",
        _check_both_trees,
        needs=(_VISITS, _VISIT_FLAGS),
    ),
    Claim(
        ("I14.order",),
        "An rmap_item leaves its stable_node before it joins another",
        "mm/ksm.c:remove_rmap_item_from_tree, stable_tree_append",
        _check_order,
        needs=(JOINS, Kinds(("ksm_remove_rmap_item",))),
    ),
    Claim(
        ("C102", "R4"),
        "ksm_migrate_page sets stable_node->kpfn to the new frame",
        "003; mm/ksm.c:folio_migrate_ksm",
        _migrates(
            "kpfn_after",
            "new_pfn",
            "stable_node {stable_node:#x} moved from {pfn} to {new_pfn}: kpfn is {kpfn_after}",
            "kpfn the new frame after each",
        ),
        needs=(
            Kinds(("ksm_migrate_page",)),
            Fields("ksm_migrate_page", ("new_pfn", "kpfn_after", "stable_node")),
        ),
    ),
    Claim(
        ("C103",),
        "When a KSM page migrates, its stable_node->kpfn is the old frame: "
        "VM_BUG_ON(kpfn != page_to_pfn(oldpage))",
        "003; mm/ksm.c:folio_migrate_ksm",
        _migrates(
            "kpfn_before",
            "pfn",
            "stable_node {stable_node:#x} at frame {pfn}: kpfn was {kpfn_before}",
            "kpfn the old frame before each",
        ),
        needs=(
            Kinds(("ksm_migrate_page",)),
            Fields("ksm_migrate_page", ("pfn", "kpfn_before", "stable_node")),
        ),
    ),
    Claim(
        ("C103.kpfn", "C107"),
        "A stable_node's kpfn changes through migration and in no other way",
        "003; mm/ksm.c:stable_node_dup, ksm_get_folio, folio_migrate_ksm",
        _check_kpfn,
        needs=(Kinds(_NODE_KINDS), Fields("stable_tree_append", ("pfn", "stable_node"))),
    ),
    Claim(
        ("C21",),
        "No work is done after the write of 0 (or 2) to run has returned",
        "002 P5; mm/ksm.c:run_store takes ksm_thread_mutex",
        _check_stopped,
        needs=(Kinds(("run_store", "ksm_start_scan", "ksm_merge_with_ksm_page")),),
    ),
    Claim(
        ("I10", "C51"),
        "seqnr counts the passes one by one: a pass begins with the number after the last, and "
        "only a successful run=2 sets it back",
        "002 P3; mm/ksm.c:scan_get_next_rmap_item",
        _check_seqnr,
        needs=(Kinds(("ksm_start_scan", "ksm_stop_scan")),),
    ),
    Claim(
        ("C12.events",),
        "After a successful run=2 the next pass has seqnr 0",
        "002 P7; mm/ksm.c:unmerge_and_remove_all_rmap_items",
        _check_reset,
        needs=(Kinds(("run_store", "ksm_start_scan")),),
    ),
    Claim(
        ("C60", "I9"),
        "Where the second half of try_to_merge_two_pages fails, the first is broken by break_cow",
        "002 P6; mm/ksm.c:try_to_merge_two_pages",
        _check_undone,
        needs=(Kinds(("ksm_merge_with_ksm_page", "stable_tree_append", "break_ksm")),),
    ),
    Claim(
        ("I4",),
        "stable_tree_append is called once per merge that is not undone",
        "mm/ksm.c:cmp_and_merge_page",
        _check_appends,
        needs=(Kinds(("ksm_merge_with_ksm_page", "stable_tree_append")),),
    ),
    Claim(
        ("Q6", "DOC8.code"),
        "A stable_node takes a new sharer only while it has fewer than max_page_sharing, but for "
        "a KSM page that a fork has shared",
        "mm/ksm.c:is_page_sharing_candidate, stable_tree_append",
        _check_limit,
        needs=(JOINS, Samples(1)),
    ),
    Claim(
        ("R23",),
        "No rmap_item stays in the unstable tree until the 8 bits of seqnr come round",
        "002 P3; mm/ksm.c:SEQNR_MASK",
        not_testable="an item of 256 passes ago looks like one of now, and by its address it "
        "cannot be told from another that was allocated there since",
    ),
    Claim(
        ("D7",),
        "After a run=2 that was stopped in the midst of a pass, the pass that begins again has the "
        "same seqnr: rmap_items that the first put into an unstable tree count as in the new one",
        "derived; mm/ksm.c:unmerge_and_remove_all_rmap_items",
        _check_aborted,
        needs=(Exercised("aborted"), _VISITS, _VISIT_FLAGS),
        defined="they are not in the new tree, so that no search finds them, and rb_erase takes "
        "them out of it all the same",
    ),
)
"""The claims of this topic."""
