"""Counters beside the events that move them, and beside each other while KSM rests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from ksmtrace.analysis.addresses import places_of
from ksmtrace.analysis.books import (
    CONTRADICTION,
    EXACT,
    balance,
    joins_and_leaves,
    unsure_window,
)
from ksmtrace.capture.hooks import DERIVED
from ksmtrace.claims.claim import (
    Case,
    Claim,
    Evidence,
    File,
    Finding,
    Kinds,
    Samples,
    holds,
    unknown,
    violated,
)
from ksmtrace.claims.rest import FOUR, arithmetic, counters_at_rest
from ksmtrace.claims.told import JOINS, SHOWN
from ksmtrace.events import KIND_BY_NAME, of_kind


def _books(*names: str) -> Callable[[Case], Finding]:
    def check(case: Case) -> Finding:
        entries = [entry for entry in balance(case.recorded) if entry.counter in names]
        judged = [entry for entry in entries if entry.events_say is not None]
        wrong = [entry for entry in judged if entry.verdict == CONTRADICTION]
        if wrong:
            return violated(
                "; ".join(
                    f"{e.counter} {e.delta:+d}, by the events {e.events_say:+d}" for e in wrong
                ),
                *(
                    Evidence(
                        "counters",
                        f"{e.counter} went from {e.first} to {e.last}; {e.why}",
                        case.recorded.samples[-1].begin_ns,
                    )
                    for e in wrong
                ),
            )
        # What no event tells of explains a difference, and proves nothing.
        unsure = [entry for entry in judged if entry.verdict != EXACT]
        if not judged:
            return unknown(f"no event tells of {' or '.join(names)} here")
        if len(unsure) == len(judged):
            return unknown(unsure[0].why)
        said = [e for e in judged if e.verdict == EXACT]
        return holds("; ".join(f"{e.counter} {e.delta:+d}: {e.verdict}" for e in said))

    return check


def _check_passes(case: Case) -> Finding:
    stops = of_kind(case.recorded.events, "ksm_stop_scan")["ts_ns"].astype(np.int64)
    wrong, judged, passes = [], 0, 0
    for first, last in pairwise(case.recorded.settled_samples()):
        before, after = first.ksm.get("full_scans"), last.ksm.get("full_scans")
        if not isinstance(before, int) or not isinstance(after, int):
            continue
        begin, _ = unsure_window(case.recorded, first)
        _, end = unsure_window(case.recorded, last)
        inside = stops[(stops > first.end_ns) & (stops < last.begin_ns)]
        unsure = int(((stops >= begin) & (stops <= end)).sum()) - len(inside)
        reset = _unmerged_between(case, begin, end)
        # Where writes of run are not seen, a reset shows in a value below what is due.
        if unsure or reset or (reset is None and after < before + len(inside)):
            continue
        judged += 1
        passes += len(inside)
        if after - before != len(inside):
            says = f"full_scans went from {before} to {after}, with {len(inside)} ksm_stop_scan"
            wrong.append(Evidence("counters", says, last.begin_ns))
    if wrong:
        return violated(f"{len(wrong)} of {judged} spans differ", *wrong[:SHOWN])
    if not passes:
        return unknown("no pass ended between two samples that can be compared")
    return holds(f"{passes} passes in {judged} spans between samples")


def _check_passes_between(case: Case) -> Finding:
    stops = of_kind(case.recorded.events, "ksm_stop_scan")["ts_ns"]
    return _between(case, {"full_scans": (stops, np.ones(len(stops), np.int64))})


def _check_joins_between(case: Case) -> Finding:
    shared, sharing = joins_and_leaves(case.recorded)
    return _between(
        case,
        {
            "pages_shared": (shared.ts_ns, shared.by),
            "pages_sharing": (sharing.ts_ns, sharing.by),
        },
    )


def _between(
    case: Case,
    moves: Mapping[str, tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]],
) -> Finding:
    """Judge what counters moved by between readings at rest, beside what the events say.

    At rest no event is under way, so that each is wholly before a reading or after it. Where
    run=2 came between, full_scans was set to 0.
    """
    rests = counters_at_rest(case)
    wrong, judged = [], 0
    for before, after in pairwise(rests):
        if before.at_ns < case.recorded.header.started_ns:
            continue
        for name, (ts_ns, by) in moves.items():
            values = [rest.counters.get(name) for rest in (before, after)]
            if not isinstance(values[0], int) or not isinstance(values[1], int):
                continue
            due = int(by[(ts_ns > before.at_ns) & (ts_ns <= after.at_ns)].sum())
            if name == "full_scans":
                reset = _unmerged_between(case, before.at_ns, after.at_ns)
                # Where writes of run are not seen, a reset shows in a value below what is due.
                if reset or (reset is None and values[1] <= due and values[1] != values[0] + due):
                    continue
            judged += 1
            if values[1] - values[0] != due:
                says = f"{name} went from {values[0]} to {values[1]}, by the events {due:+d}"
                wrong.append(
                    Evidence(
                        "counters", f"from {before.where} to {after.where}: {says}", after.at_ns
                    )
                )
    if wrong:
        return violated(f"{len(wrong)} of {judged} differ", *wrong[:SHOWN])
    if not judged:
        return unknown("the counters were not read twice while KSM rested (run 0 or 2)")
    return holds(f"equal over {judged} spans between readings at rest")


def _unmerged_between(case: Case, begin_ns: int, end_ns: int) -> bool | None:
    # None: it cannot be seen.
    if not case.recorded.can_see("run_store"):
        return None
    stores = of_kind(case.recorded.events, "run_store")
    # What its writer does before it is through counts.
    inside = (stores["ts_ns"] > begin_ns) & (stores["ts_ns"] - stores["duration_ns"] <= end_ns)
    return bool((inside & (stores["run"] == 2)).any())


def _check_freed(case: Case) -> Finding:
    names = ("remove_node_from_stable_tree", "ksm_remove_ksm_page")
    events = case.recorded.events
    places = places_of(events, *names)
    # The function is told of when it is entered, so that one tracepoint may come before the first
    # that is known, and that of the last one after the end.
    entered = events["kind"][places] == KIND_BY_NAME[names[0]].number
    if not entered.any():
        return unknown("no stable_node was freed")
    entered = entered[int(np.argmax(entered)) :]
    counts = int(entered.sum()) - int(entered[-1]), int((~entered).sum())
    if counts[0] != counts[1]:
        return violated(
            f"{counts[0]} and {counts[1]}",
            *(
                Evidence("events", f"{count} of {name}")
                for name, count in zip(names, counts, strict=True)
            ),
        )
    return holds(f"{counts[0]} of each")


# Between the tracepoint and the return of its function, where ksmd loses its CPU there.
_RETURN_NS = 300_000_000


def _check_merge_calls(case: Case) -> Finding:
    name = "ksm_merge_with_ksm_page"
    settled_ns = case.recorded.settled_ns()
    readings = [
        (one.ts_ns, one.produced.get(name, 0), returned)
        for one in case.recorded.losses
        if one.ts_ns <= settled_ns
        and (returned := one.calls.get("try_to_merge_with_ksm_page", (None, None))[1]) is not None
    ]
    if not readings:
        return unknown("no program was on the exit of try_to_merge_with_ksm_page")
    # The last is of after the programs ended, and a call may have been under way then.
    if len(readings) > 1 and readings[-1][1] != readings[-2][1]:
        readings = readings[:-1]
    times = of_kind(case.recorded.events, name)["ts_ns"].astype(np.int64)
    quiet = [one for one in readings if not (np.abs(times - one[0]) < _RETURN_NS).any()]
    if len(quiet) < 2:
        return unknown("ksmd was merging whenever the calls were counted")
    (_, first_events, first_returned), (at_ns, last_events, last_returned) = quiet[0], quiet[-1]
    events, returned = last_events - first_events, last_returned - first_returned
    observed = f"{events} events, {returned} returns"
    if events != returned:
        return violated(
            observed,
            Evidence("events", f"{events} of {name}", at_ns),
            Evidence("events", f"try_to_merge_with_ksm_page returned {returned} times", at_ns),
        )
    return holds(observed) if events else unknown("ksmd tried to merge nothing")


def _check_removed_with_node(case: Case) -> Finding:
    names = ("remove_node_from_stable_tree", "ksm_remove_rmap_item")
    events = case.recorded.events
    places = places_of(events, *names)
    entered = np.flatnonzero(events["kind"][places] == KIND_BY_NAME[names[0]].number)
    if not len(entered):
        return unknown("no stable_node was freed")
    if case.recorded.rung(names[1]) != DERIVED:
        # The function is told of when it is entered: sharers of the first may have come before,
        # and those of the last one after the end.
        last = int(entered[-1])
        whole = len(places) - last - 1 >= int(events["sharers"][places[last]]) - 1
        places = places[entered[0] : len(places) if whole else last]
    freed = of_kind(events[places], names[0])
    removed = len(places) - len(freed)
    told = int(np.maximum(freed["sharers"].astype(np.int64) - 1, 0).sum())
    if told != removed:
        return violated(
            f"{removed}, and {told} by the nodes",
            Evidence("events", f"{len(freed)} nodes freed with {told} sharers beyond the first"),
            Evidence("events", f"{removed} events of ksm_remove_rmap_item"),
        )
    if not len(freed):
        return unknown("no stable_node was freed")
    return holds(f"{removed} sharers beyond the first of {len(freed)} nodes")


def _check_nothing_shared(case: Case) -> Finding:
    wrong, count = [], 0
    for rest in counters_at_rest(case):
        values = rest.numbers(*FOUR[:2])
        if values is None:
            continue
        count += 1
        if values[0] == 0 and values[1] > 0:
            wrong.append((rest.at_ns, rest.where, f"pages_shared 0, pages_sharing {values[1]}"))
    return arithmetic(wrong, count, "never pages_sharing without pages_shared")


def _check_profit(case: Case) -> Finding:
    item_bytes = case.facts.get("rmap_item_bytes")
    page_bytes = case.facts.get("page_size_bytes")
    if not item_bytes or not page_bytes:
        return unknown("the size of struct rmap_item is not known")
    wrong, count = [], 0
    rests = counters_at_rest(case)
    for index, rest in enumerate(rests):
        values = rest.numbers(*FOUR, "ksm_zero_pages", "general_profit")
        if values is None:
            continue
        *four, zero, profit = values
        due = (four[1] + zero) * page_bytes - sum(four) * item_bytes
        # Writes, forks and exits move ksm_zero_pages while KSM rests, between two files' readings.
        near = [one.counters.get("ksm_zero_pages") for one in rests[max(index - 1, 0) : index + 2]]
        if due != profit and (due - profit) % page_bytes == 0 and any(near):
            continue
        count += 1
        if due != profit:
            wrong.append((rest.at_ns, rest.where, f"general_profit {profit}, and {due} is due"))
    return arithmetic(wrong, count, "equal")


def _check_chains(case: Case) -> Finding:
    wrong, count = [], 0
    for rest in counters_at_rest(case):
        values = rest.numbers("stable_node_chains", "stable_node_dups")
        if values is None:
            continue
        count += 1
        if values[0] == 0 and values[1] > 0:
            wrong.append((rest.at_ns, rest.where, f"no chain, and {values[1]} dups"))
    return arithmetic(wrong, count, "never dups without a chain")


def _check_ratio(case: Case) -> Finding:
    wrong, count = [], 0
    rests = counters_at_rest(case)
    for rest in rests:
        values = rest.numbers(*FOUR[:2], "max_page_sharing")
        if values is None or not values[0]:
            continue
        count += 1
        if values[1] > values[0] * (values[2] - 1):
            says = f"pages_sharing {values[1]} / pages_shared {values[0]}, limit {values[2]}"
            wrong.append((rest.at_ns, rest.where, says))
    if rests and not count:
        return unknown("nothing was shared when the counters were read")
    return arithmetic(wrong, count, "never above max_page_sharing - 1")


CLAIMS = (
    Claim(
        ("C11.code", "I1"),
        "full_scans rises by one with each ksm_stop_scan",
        "mm/ksm.c:scan_get_next_rmap_item",
        _check_passes,
        needs=(Kinds(("ksm_stop_scan",)), Samples(2)),
    ),
    Claim(
        ("C11.rest",),
        "Between any two moments at rest full_scans rises by the number of ksm_stop_scan",
        "mm/ksm.c:scan_get_next_rmap_item",
        _check_passes_between,
        needs=(Kinds(("ksm_stop_scan",)), Samples(1)),
    ),
    Claim(
        ("C03.rest",),
        "Between any two moments at rest pages_shared and pages_sharing move by the joins and "
        "leaves of sharers",
        "mm/ksm.c:stable_tree_append, remove_rmap_item_from_tree, remove_node_from_stable_tree",
        _check_joins_between,
        needs=(JOINS, Samples(1)),
    ),
    Claim(
        ("C03", "I5", "C19.code"),
        "pages_shared and pages_sharing change only where a sharer joins or leaves a stable_node: "
        "the first and the last move pages_shared, every other pages_sharing",
        "002 P2; mm/ksm.c:stable_tree_append, remove_rmap_item_from_tree, "
        "remove_node_from_stable_tree",
        _books("pages_shared", "pages_sharing"),
        needs=(Kinds(("ksm_merge_with_ksm_page", "ksm_remove_ksm_page")), Samples(2)),
    ),
    Claim(
        ("DOC9", "I2", "I3"),
        "pages_scanned counts the calls of cmp_and_merge_page",
        "admin guide pages_scanned; mm/ksm.c:ksm_do_scan",
        _books("pages_scanned"),
        applies=(File("pages_scanned"),),
        needs=(Samples(2),),
    ),
    Claim(
        ("DOC10",),
        'pages_skipped: "how many pages did the smart page scanning algorithm skip"',
        "admin guide; mm/ksm.c:should_skip_rmap_item",
        _books("pages_skipped"),
        applies=(File("pages_skipped"),),
        needs=(Samples(2),),
    ),
    Claim(
        ("I6",),
        "ksm_remove_ksm_page fires once per remove_node_from_stable_tree",
        "mm/ksm.c:remove_node_from_stable_tree",
        _check_freed,
        needs=(Kinds(("ksm_remove_ksm_page", "remove_node_from_stable_tree")),),
    ),
    Claim(
        ("I8",),
        "ksm_merge_with_ksm_page fires once per return of try_to_merge_with_ksm_page",
        "mm/ksm.c:try_to_merge_with_ksm_page",
        _check_merge_calls,
        needs=(Kinds(("ksm_merge_with_ksm_page",)),),
    ),
    Claim(
        ("I7",),
        "ksm_remove_rmap_item fires for every sharer of a freed stable_node but one",
        "mm/ksm.c:remove_node_from_stable_tree",
        _check_removed_with_node,
        needs=(Kinds(("ksm_remove_rmap_item", "remove_node_from_stable_tree")),),
    ),
    Claim(
        ("Q8",),
        "Where pages_shared is 0, pages_sharing is 0",
        "mm/ksm.c:stable_tree_append",
        _check_nothing_shared,
        needs=(Samples(1),),
    ),
    Claim(
        ("DOC13", "Q2"),
        "general_profit =~ ksm_saved_pages * sizeof(page) - all_rmap_items * sizeof(rmap_item), "
        "all_rmap_items being the sum of shared, sharing, unshared and volatile",
        "admin guide; mm/ksm.c:general_profit_show",
        _check_profit,
        applies=(File("general_profit"),),
        needs=(Samples(1),),
        defined="equal at rest; uses ksm_rmap_items itself",
    ),
    Claim(
        ("Q7",),
        "Where stable_node_chains is 0, stable_node_dups is 0",
        "mm/ksm.c:stable_node_chain_add_dup",
        _check_chains,
        needs=(Samples(1),),
    ),
    Claim(
        ("DOC8",),
        'The maximum possible "pages_sharing/pages_shared" ratio is limited by max_page_sharing',
        "admin guide; mm/ksm.c:stable_tree_append",
        _check_ratio,
        needs=(Samples(1),),
        defined="a fork of a merged process takes it beyond (max_page_sharing_bypass)",
        refuted="a fork shares KSM pages past the limit, and ksmd counts that (bypass)",
    ),
    Claim(
        ("I13",),
        "cow_ksm rises by one with each fault that copies a KSM page: writes of users, and every "
        "page that break_ksm unmerges",
        "mm/memory.c:do_wp_page",
        _books("cow_ksm"),
        applies=(File("cow_ksm"),),
        needs=(Kinds(("do_wp_page",)), Samples(2)),
    ),
    Claim(
        ("C123.books",),
        "ksm_swpin_copy rises by one with each page that ksm_might_need_to_copy copies",
        "004; mm/ksm.c:ksm_might_need_to_copy",
        _books("ksm_swpin_copy"),
        applies=(File("ksm_swpin_copy"),),
        needs=(Kinds(("ksm_might_need_to_copy",)), Samples(2)),
    ),
)
"""The claims of this topic."""
