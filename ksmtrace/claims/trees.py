"""How pages get into the trees, and what stays there."""

from __future__ import annotations

import errno

import numpy as np

from ksmtrace.analysis.addresses import places_of
from ksmtrace.analysis.merges import find_merges
from ksmtrace.analysis.outcomes import df_failures
from ksmtrace.analysis.recorded import has_flag
from ksmtrace.capture.hooks import DERIVED
from ksmtrace.claims.claim import (
    Case,
    Claim,
    Evidence,
    Exercised,
    Fields,
    File,
    Finding,
    Kinds,
    holds,
    unknown,
    violated,
)
from ksmtrace.claims.told import (
    changed,
    counter,
    during,
    judge_changes,
    judge_steps,
    program,
    show,
    tell,
)
from ksmtrace.events import EventFlag, SearchOutcome, of_kind
from ksmtrace.kernel.ksm_memory import STABLE_FLAG, UNSTABLE_FLAG

# Pages of a huge page.
_PARTS = 512
_INLINED = "not visible from outside, and no event tells of it"


def _first_pass_merges(case: Case) -> int:
    return case.trials["latecomer"].change("pass 1", "pages_sharing", since="merged")


def _check_latecomer_first(case: Case) -> Finding:
    merged = _first_pass_merges(case)
    trial = case.trials["latecomer"]
    evidence = counter(trial.at("pass 1"), "pages_sharing")
    observed = f"{merged} of 11 merged in their first pass"
    return tell(merged == 11, observed, evidence)


def _check_latecomer(case: Case) -> Finding:
    trial = case.trials["latecomer"]
    counts = [
        trial.change(f"pass {number}", "pages_sharing", since="merged") for number in (1, 2, 3)
    ]
    evidence = tuple(counter(trial.at(f"pass {number}"), "pages_sharing") for number in (1, 2))
    # A merge that a passing reference to the page prevents comes one pass later.
    due = "first" if counts[0] else "second"
    observed = f"{counts[0]}, {counts[1]}, {counts[2]} of 11 merged after 1, 2, 3 passes: {due}"
    if counts[-1] != 11:
        return violated(observed, *evidence)
    return holds(observed, *evidence)


def _check_singleton(case: Case) -> Finding:
    trial = case.trials["singleton"]
    shared = trial.change("alone", "pages_shared")
    evidence = (
        counter(trial.at("merged"), "pages_shared", "pages_sharing"),
        counter(trial.at("alone"), "pages_shared", "pages_sharing"),
    )
    observed = f"{shared} of 11 KSM pages with one sharer are still there 3 passes later"
    return violated(observed, *evidence) if shared else holds(observed, *evidence)


def _check_singleton_stays(case: Case) -> Finding:
    trial = case.trials["singleton"]
    steps = {
        label: {"pages_shared": 11, "pages_sharing": sharing}
        for label, sharing in (("alone", 0), ("joined", 11))
    }
    return judge_steps(trial, steps, "11 stay with one sharer, and each takes another later")


def _check_fork_unique(case: Case) -> Finding:
    trial = case.trials["fork_unique"]
    expected = {"pages_unshared": 53, "pages_volatile": 53}
    return judge_steps(
        trial,
        {f"pass {number}": expected for number in range(1, 5)},
        "53 of the parent unshared, 53 of the child volatile, after each of 4 passes",
    )


def _check_fork_counted(case: Case) -> Finding:
    finding = judge_changes(
        case.trials["fork"], "counted", {"pages_shared": 7, "pages_sharing": 84 + 2 * 91}
    )
    if finding.verdict.value != "holds" or not case.recorded.can_see("stable_tree_append"):
        return finding
    trial = case.trials["fork"]
    appends = of_kind(case.recorded.events, "stable_tree_append")
    appends = appends[(appends["ts_ns"] > trial.at("forked").end_ns)]
    appends = appends[appends["ts_ns"] < trial.end_ns]
    bypassed = int(has_flag(appends, EventFlag.BYPASS).sum())
    tried = of_kind(case.recorded.events, "ksm_merge_with_ksm_page")
    tried = tried[(tried["ts_ns"] > trial.at("forked").end_ns) & (tried["ts_ns"] < trial.end_ns)]
    more = Evidence("events", f"{len(appends)} appends, {bypassed} past max_page_sharing")
    return holds(f"{finding.observed}; {bypassed} of 182 past the limit", *finding.evidence, more)


def _check_new_frame(case: Case) -> Finding:
    merges = find_merges(case.recorded)
    pairs = int(merges.pairs.sum())
    if not pairs:
        return unknown("no two pages merged to a new KSM page")
    # A pair is told by this: the KSM page of the second step is the page of the first.
    return violated(
        f"{pairs} new KSM pages, each the frame of one of the two",
        Evidence(
            "events",
            f"{pairs} times ksm_merge_with_ksm_page without a KSM page, then one with the same "
            "frame as its KSM page",
        ),
    )


def _check_search_order(case: Case) -> Finding:
    # A page that changes before every pass is searched for only where the search comes first.
    trial = case.trials["volatile"]
    inside = (trial.at("start").end_ns, trial.at("changed 4").begin_ns)
    counts = []
    for kind in ("stable_tree_search", "cmp_and_merge_page"):
        events = of_kind(case.recorded.events, kind)
        times = events["ts_ns"]
        counts.append(int(((times > inside[0]) & (times < inside[1])).sum()))
    evidence = Evidence("events", f"{counts[1]} visits of changing pages, {counts[0]} searches")
    if not counts[1]:
        return unknown("no visit was seen")
    if not counts[0] and case.recorded.rung("stable_tree_search") == DERIVED:
        # Nothing is merged meanwhile, and a search is derived from the nodes that it looks up.
        return unknown("a search of an empty tree is not seen")
    observed = f"{counts[0]} searches in {counts[1]} visits of pages that had changed"
    return tell(counts[0] > 0, observed, evidence)


def _check_same_page(case: Case) -> Finding:
    searches = of_kind(case.recorded.events, "stable_tree_search")
    trial = case.trials["fork"]
    times = searches["ts_ns"]
    after = searches[(times > trial.at("forked").end_ns) & (times < trial.end_ns)]
    same = int((after["outcome"] == SearchOutcome.SAME_PAGE).sum())
    evidence = Evidence("events", f"{same} of {len(after)} searches found the page itself")
    observed = f"{same} of 182 pages of the children"
    return tell(same == 182, observed, evidence)


def _check_held(case: Case) -> Finding:
    trial = case.trials["pinned"]
    if trial.at("registered").notes["held"] != 10:
        return unknown("the pipes did not take 10 pages")
    held = {"pages_sharing": 0, "pages_unshared": 10, "pages_volatile": 10}
    steps = {f"pass {number}": held for number in range(2, 5)}
    steps["merged"] = {"pages_shared": 10, "pages_sharing": 10}
    return judge_steps(
        trial,
        steps,
        "10 unshared and 10 volatile while a page of each pair is held; then all merge",
    )


def _check_failed_items(case: Case) -> Finding:
    # What a visit whose merge failed has made of its rmap_item.
    events = case.recorded.events
    visits = places_of(events, "cmp_and_merge_page")
    failed = places_of(events, "ksm_merge_with_ksm_page")
    failed = failed[events["err"][failed] != 0]
    items = events["rmap_item"][failed]
    # A visit is told of once it is over, with the time at which it began.
    begins = events["ts_ns"][visits]
    order = np.argsort(begins, kind="stable")
    at = np.searchsorted(begins[order], events["ts_ns"][failed], side="right") - 1
    known = at >= 0
    visit = visits[order][np.maximum(at, 0)]
    # In the second half of a pair the item is the tree's.
    known &= events["rmap_item"][visit] == items
    known &= (events["flags"][visit] & EventFlag.HAS_ADDRESS) != 0
    # That of the last merge may be missing.
    known &= visit > failed
    if not known.any():
        return unknown("no merge failed in a visit that is known")
    left = events["address"][visit] & np.uint64(STABLE_FLAG | UNSTABLE_FLAG) != 0
    wrong = known & left
    if wrong.any():
        says = "rmap_item {rmap_item:#x}: its merge failed, and its address is {address:#x} then"
        return violated(f"{wrong.sum()} in a tree", *show(events, visit[wrong], says))
    return holds(f"{known.sum()} visits whose merge failed, none of their items in a tree")


def _check_errors(case: Case) -> Finding:
    attempts = of_kind(case.recorded.events, "ksm_merge_with_ksm_page")
    wrong = ~np.isin(attempts["err"], (0, -errno.EFAULT))
    if wrong.any():
        says = "the merge of rmap_item {rmap_item:#x} returned {err}"
        return violated(f"{wrong.sum()} with another error", *show(attempts, wrong, says))
    failed = int((attempts["err"] != 0).sum())
    if not failed:
        return unknown("no merge failed")
    return holds(f"{failed} of {len(attempts)} failed, all with -EFAULT")


def _check_twins(case: Case) -> Finding:
    trial = case.trials["huge"]
    if not trial.at("mapped").notes["huge_bytes"]:
        return unknown("the kernel gave no huge page")
    # Somebody else's reference may keep it from being split for a pass.
    failed = trial.change("merged", "thp_split_page_failed", since="mapped")
    split = trial.change("merged", "thp_split_page", since="mapped")
    left = trial.at("pass 2").notes["frames"] - 3
    names = ("thp_split_page_failed", "thp_split_page")
    evidence = (
        counter(trial.at("mapped"), *names),
        counter(trial.at("merged"), *names),
        program(trial.at("pass 2"), "frames"),
    )
    if left and not failed:
        return unknown("somebody else has split the huge page")
    observed = f"thp_split_page_failed {failed:+d}, thp_split_page {split:+d}; {left} pages left"
    return tell(failed > 0 and split > 0 and left > 0, observed, *evidence)


def _check_twins_later(case: Case) -> Finding:
    trial = case.trials["huge"]
    if not trial.at("mapped").notes["huge_bytes"]:
        return unknown("the kernel gave no huge page")
    left = [trial.at(f"pass {n}").notes["frames"] - 3 for n in (2, 3)]
    last = trial.at("merged").notes["frames"] - 3
    evidence = tuple(program(trial.at(label), "frames") for label in ("pass 2", "pass 3", "merged"))
    observed = f"{left[0]} of 512 pages not merged in the pass of the split, {last} in the end"
    later = left[0] > 0 and last == 0
    return tell(later, observed, *evidence)


def _check_references(case: Case) -> Finding:
    trial = case.trials["huge"]
    failures = df_failures(case.recorded)
    failures = failures[(failures["ts_ns"] > trial.begin_ns) & (failures["ts_ns"] < trial.end_ns)]
    twins = failures[(failures["cause"] == "large_folio_twins") & failures["refcount"].notna()]
    if not trial.at("mapped").notes["huge_bytes"]:
        return unknown("the kernel gave no huge page")
    # Where no field counts the mappings of a large folio (folio._large_mapcount): the trial's is
    # mapped once, by one huge entry, with one reference, until it is split.
    twins = twins[twins["mapcount"].notna() | (twins["refcount"] < _PARTS)]
    if not len(twins):
        return unknown("no merge of two parts of one huge page was seen with its references")
    beyond = (twins["refcount"] - twins["mapcount"].fillna(1)).astype(int).tolist()
    evidence = (
        Evidence("events", f"references beyond the mappings: {beyond}"),
        program(trial.at("mapped"), "huge_bytes"),
    )
    observed = f"{min(beyond)} references beyond the mappings"
    return tell(min(beyond) >= 2, observed, *evidence)


def _check_freed_by_split(case: Case) -> Finding:
    trial = case.trials["huge"]
    if not trial.at("empty mapped").notes["huge_bytes"]:
        return unknown("the kernel gave no huge page")
    reading = trial.at("empty scanned")
    saved = reading.notes["places"] - reading.notes["frames"]
    counted = trial.change("empty scanned", "pages_sharing", since="empty mapped")
    if reading.counters.get("ksm_zero_pages") is not None:
        counted += trial.change("empty scanned", "ksm_zero_pages", since="empty mapped")
    evidence = (program(reading, "places", "frames"), counter(reading, "pages_sharing"))
    observed = f"{saved} pages saved, {counted} of them in pages_sharing and ksm_zero_pages"
    return tell(saved == counted, observed, *evidence)


def _check_tried_again(case: Case) -> Finding:
    searches = during(case, "busy", "stable_tree_search")
    busy = searches["outcome"] == SearchOutcome.BUSY
    if not busy.any():
        return unknown(f"none of {len(searches)} searches found its page locked (-EBUSY)")
    finding = judge_changes(
        case.trials["busy"], "merged again", {"pages_shared": 1, "pages_sharing": 555}
    )
    if finding.verdict.value != "holds":
        return finding
    evidence = Evidence("events", f"{busy.sum()} of {len(searches)} searches ended in -EBUSY")
    observed = f"{busy.sum()} of {len(searches)} searches ended in -EBUSY; all pages merged at last"
    return holds(observed, evidence, *finding.evidence)


_HUGE = (Exercised("huge"),)

CLAIMS = (
    Claim(
        ("C68",),
        "Where a match is found and the merge fails, the rmap_item is not put into a tree in this "
        "pass",
        "002 P3; mm/ksm.c:cmp_and_merge_page",
        _check_failed_items,
        needs=(
            Kinds(("cmp_and_merge_page", "ksm_merge_with_ksm_page")),
            Fields("cmp_and_merge_page", ("address",)),
        ),
    ),
    Claim(
        ("C68.counters", "C10.held"),
        "Of a pair of which one page is held by somebody else, the page in the unstable tree is "
        "unshared and the other volatile, until it is let go",
        "mm/ksm.c:cmp_and_merge_page, write_protect_page",
        _check_held,
        needs=(Exercised("pinned"),),
    ),
    Claim(
        ("R2",),
        "Whatever keeps a page from merging, the error is -EFAULT",
        "000, 001, 002 P6; mm/ksm.c:try_to_merge_one_page",
        _check_errors,
        needs=(Kinds(("ksm_merge_with_ksm_page",)),),
    ),
    Claim(
        ("C70", "R6"),
        "Two equal pages of one huge page do not merge: ksmd holds a reference to each, and the "
        "split fails; then the huge page is split",
        "001; mm/ksm.c:cmp_and_merge_page",
        _check_twins,
        needs=_HUGE,
    ),
    Claim(
        ("C71",),
        "Such pages merge in a later pass",
        "001; mm/ksm.c:cmp_and_merge_page",
        _check_twins_later,
        needs=_HUGE,
    ),
    Claim(
        ("C72",),
        "While two parts of one huge page are compared ksmd holds two references to it",
        "001; mm/ksm.c:unstable_tree_search_insert",
        _check_references,
        needs=(*_HUGE, Kinds(("merge_failure",)), Fields("merge_failure", ("refcount",))),
    ),
    Claim(
        ("D8",),
        "What is saved where ksmd splits an empty huge page is in pages_sharing and ksm_zero_pages",
        "derived from DOC12; mm/huge_memory.c:remap_page (b1f202060afe)",
        _check_freed_by_split,
        needs=_HUGE,
        defined="the split itself maps empty parts to the zero page, outside of KSM",
        refuted="since b1f202060afe a split maps empty parts to the shared zero page, and nothing "
        "of KSM counts them",
    ),
    Claim(
        ("C50",),
        "First the stable tree is searched; only then comes the checksum, and then the unstable "
        "tree: a page equal to a KSM page merges in its first pass",
        "002 P6; comment at mm/ksm.c:cmp_and_merge_page",
        _check_latecomer_first,
        needs=(Exercised("latecomer"),),
        defined="d58a361b0350 (6.11) put the checksum first: then it merges in the second pass",
        refuted="where the checksum comes first (6.11 and what took it over), it is the second",
    ),
    Claim(
        ("D2",),
        "A page equal to a KSM page merges in its first pass where the stable tree is searched "
        "before the checksum, and in its second where it is not",
        "mm/ksm.c:cmp_and_merge_page; d58a361b0350",
        _check_latecomer,
        needs=(Exercised("latecomer"),),
    ),
    Claim(
        ("C50.events",),
        "The stable tree is searched for pages whose checksum has changed, too",
        "002 P6; comment at mm/ksm.c:cmp_and_merge_page",
        _check_search_order,
        needs=(Exercised("volatile"), Kinds(("stable_tree_search", "cmp_and_merge_page"))),
        defined="not since d58a361b0350 (6.11)",
        refuted="where the checksum comes first (6.11 and what took it over), they are not",
    ),
    Claim(
        ("C62",),
        "Merging two pages allocates a fresh kernel page",
        "002 P1, P6",
        _check_new_frame,
        needs=(Kinds(("ksm_merge_with_ksm_page",)),),
        defined="the page that ksmd has reached becomes the KSM page in place",
        refuted="since 2.6.33 the first page is upgraded (mm/ksm.c:try_to_merge_two_pages)",
    ),
    Claim(
        ("C63", "DOC2.code"),
        "KSM pages that a fork shares are counted as sharing once ksmd has visited the child, "
        "without a merge, and past max_page_sharing",
        "002 P2; mm/ksm.c:stable_tree_append, max_page_sharing_bypass",
        _check_fork_counted,
        needs=(Exercised("fork"),),
    ),
    Claim(
        ("C63.search",),
        "The search of the stable tree for a KSM page that a fork shares returns the page itself",
        "mm/ksm.c:stable_tree_search",
        _check_same_page,
        needs=(Exercised("fork"), Kinds(("stable_tree_search",))),
    ),
    Claim(
        ("D3", "C10"),
        "After a fork, pages of the parent in the unstable tree are unshared, and the child's "
        "volatile for ever: each finds itself in the tree",
        "mm/ksm.c:unstable_tree_search_insert (page == tree_page)",
        _check_fork_unique,
        needs=(Exercised("fork_unique"),),
    ),
    Claim(
        ("C65",),
        "A KSM page left with one sharer is replaced by an ordinary page on ksmd's next pass",
        "002 P4",
        _check_singleton,
        needs=(Exercised("singleton"),),
        defined="it stays, with pages_shared 1 and pages_sharing 0",
        refuted="there is no such code any more",
    ),
    Claim(
        ("D6", "C65.code"),
        "A KSM page left with one sharer stays, and takes further sharers later",
        "mm/ksm.c:stable_tree_search",
        _check_singleton_stays,
        needs=(Exercised("singleton"),),
    ),
    Claim(
        ("DOC22",),
        'use_zero_pages: empty pages are "merged with the kernel zero page(s) instead of with each '
        'other"',
        "Documentation/admin-guide/mm/ksm.rst; mm/ksm.c:try_to_merge_with_zero_page",
        changed("zero", "placed", pages_shared=0, pages_sharing=0, ksm_zero_pages=53),
        applies=(File("use_zero_pages"),),
        needs=(Exercised("zero"),),
    ),
    Claim(
        ("C59", "D9"),
        "A page whose equal KSM page was locked when it was found is tried again in a later pass, "
        "and merges then",
        "000; mm/ksm.c:stable_tree_search, -EBUSY",
        _check_tried_again,
        needs=(Exercised("busy"), Kinds(("stable_tree_search",))),
    ),
    Claim(
        ("C58",),
        "The search of the stable tree needs the page lock, because of migration",
        "000; mm/ksm.c:stable_tree_search",
        not_testable="a reason: that a page which is locked is not merged with is C59",
    ),
    Claim(
        ("C61",),
        "Where stable_tree_insert fails, both pages are broken",
        "002 P2, P6",
        not_testable="it fails only where no memory is left for a stable_node; I4 counts such "
        "pages as undone",
    ),
    Claim(
        ("C69",),
        "Stale stable_nodes are removed when they are looked up",
        "003; mm/ksm.c:ksm_get_folio",
        not_testable=f"who looked up the node is {_INLINED}",
    ),
    Claim(
        ("C73", "R7"),
        "After split_huge_page only the page itself stays pinned",
        "001",
        not_testable="a reason against a patch that was not taken",
    ),
)
"""The claims of this topic."""
