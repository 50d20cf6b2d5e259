"""KSM pages and swap."""

from __future__ import annotations

from ksmtrace.claims.claim import (
    Case,
    Claim,
    Evidence,
    Exercised,
    File,
    Finding,
    Kinds,
    holds,
    unknown,
    violated,
)
from ksmtrace.claims.told import (
    counter,
    during,
    frames,
    judge_changes,
    judge_steps,
    program,
    tell,
)

_GUIDE = "Documentation/admin-guide/mm/ksm.rst"
_SWAPPED = (Exercised("swapped"),)
_NOTHING_OUT = unknown("nothing was swapped out")


def _check_unswappable(case: Case) -> Finding:
    reading = case.trials["swapped"].at("swapped out")
    number = reading.notes["swapped"]
    if not number:
        return _NOTHING_OUT
    observed = f"{number} of 91 merged pages are swapped out"
    return violated(observed, program(reading, "swapped"))


def _check_broken(case: Case) -> Finding:
    trial = case.trials["swapped"]
    before, after = trial.at("merged"), trial.at("swapped in")
    if not trial.at("swapped out").notes["swapped"]:
        return _NOTHING_OUT
    if before.frames is None or after.frames is None:
        return unknown("the page frames cannot be seen")
    observed = f"{before.places} pages in {before.frames} frames, after swap-in in {after.frames}"
    finding = judge_changes(trial, "merged again", {"pages_shared": 7, "pages_sharing": 84})
    if finding.verdict.value != "holds":
        return finding
    evidence = (frames(before), frames(after), *finding.evidence)
    if after.frames <= before.frames:
        return violated(observed, *evidence)
    return holds(f"{observed}; merged again later", *evidence)


def _check_noticed(case: Case) -> Finding:
    trial = case.trials["swapped"]
    if not trial.at("swapped out").notes["swapped"]:
        return _NOTHING_OUT
    steps = {
        "swapped out": {"pages_shared": 7, "pages_sharing": 84},
        "scanned": {"pages_shared": 0, "pages_sharing": 0},
    }
    return judge_steps(trial, steps, "7, 84 while out; 0, 0 after the next pass")


def _check_copies(case: Case) -> Finding:
    trial = case.trials["swapped"]
    if not trial.at("swapped out").notes["swapped"]:
        return _NOTHING_OUT
    copies = trial.change("swapped in", "ksm_swpin_copy", since="scanned")
    if not case.recorded.can_see("ksm_might_need_to_copy"):
        return unknown("ksm_might_need_to_copy was not observed")
    times = during(case, "swapped", "ksm_might_need_to_copy", since="scanned")
    times = times[(times["ts_ns"] < trial.at("swapped in").begin_ns) & (times["err"] == 0)]
    evidence = (
        counter(trial.at("scanned"), "ksm_swpin_copy"),
        counter(trial.at("swapped in"), "ksm_swpin_copy"),
        Evidence("events", f"ksm_might_need_to_copy returned another page {len(times)} times"),
    )
    observed = f"ksm_swpin_copy {copies:+d}, {len(times)} copies"
    return tell(copies == len(times), observed, *evidence)


def _check_cross_anon_vma(case: Case) -> Finding:
    trial = case.trials["swapped"]
    if not trial.at("swapped out").notes["swapped"]:
        return _NOTHING_OUT
    copies = trial.change("swapped in", "ksm_swpin_copy", since="scanned")
    evidence = (
        counter(trial.at("scanned"), "ksm_swpin_copy"),
        counter(trial.at("swapped in"), "ksm_swpin_copy"),
    )
    observed = f"{copies} copies within one area of one process, which has one anon_vma"
    return violated(observed, *evidence) if copies else holds(observed, *evidence)


def _check_copied_with_run_2(case: Case) -> Finding:
    trial = case.trials["swapped"]
    reading = trial.at("swapped in with run 2")
    swapped = trial.at("unmerged").notes["swapped"]
    if not swapped:
        return _NOTHING_OUT
    if reading.frames is None:
        return unknown("the page frames cannot be seen")
    evidence = (program(trial.at("unmerged"), "swapped"), frames(reading))
    observed = f"{swapped} swapped out, then {reading.places} pages in {reading.frames} frames"
    alone = reading.frames == reading.places
    return tell(alone, observed, *evidence)


def _check_content(case: Case) -> Finding:
    trial = case.trials["swapped"]
    if not trial.at("swapped out").notes["swapped"]:
        return _NOTHING_OUT
    wrong = [
        program(trial.at(label), "digests")
        for label in ("swapped in", "swapped in with run 2")
        if len(set(trial.at(label).notes["digests"])) != 1
    ]
    if wrong:
        return violated("another content after swap-in", *wrong)
    return holds("91 pages read back twice as they were")


CLAIMS = (
    Claim(
        ("C45", "C06"),
        "Merged pages cannot be swapped: pages_shared counts unswappable kernel pages",
        "002 P11 (Documentation/vm/ksm.txt of 2009)",
        _check_unswappable,
        needs=_SWAPPED,
        refuted="KSM pages can be swapped out since 2.6.33, as the guide says now",
    ),
    Claim(
        ("C125", "DOC23"),
        "Sharing is broken when merged pages are swapped back in: ksmd must rediscover their "
        "identity and merge again",
        _GUIDE,
        _check_broken,
        needs=_SWAPPED,
        defined="a KSM page that is still in the swap cache is mapped again as it is",
    ),
    Claim(
        ("DOC23.code",),
        "The counters leave out what is swapped out from ksmd's next pass on, before any swap-in",
        "mm/ksm.c:scan_get_next_rmap_item, remove_rmap_item_from_tree",
        _check_noticed,
        needs=_SWAPPED,
    ),
    Claim(
        ("C123",),
        "ksm_swpin_copy counts the calls of ksm_might_need_to_copy that return another page",
        "004; mm/ksm.c:ksm_might_need_to_copy",
        _check_copies,
        applies=(File("ksm_swpin_copy"),),
        needs=(*_SWAPPED, Kinds(("ksm_might_need_to_copy",))),
    ),
    Claim(
        ("DOC17",),
        "ksm_swpin_copy: KSM pages are copied when swapping in because a cross-anon_vma KSM page "
        "cannot be reconstituted",
        _GUIDE,
        _check_cross_anon_vma,
        applies=(File("ksm_swpin_copy"),),
        needs=_SWAPPED,
        defined="another place in the same anon_vma takes a copy as well",
        refuted="pages at several places of one anon_vma are copied, too "
        "(mm/ksm.c:ksm_might_need_to_copy compares anon_vma and index)",
    ),
    Claim(
        ("C126",),
        "While run is 2, KSM pages are copied at swap-in: none comes back shared",
        "mm/ksm.c:ksm_might_need_to_copy, KSM_RUN_UNMERGE",
        _check_copied_with_run_2,
        needs=_SWAPPED,
    ),
    Claim(
        ("C121", "R18"),
        "A KSM page that is swapped out and in again has the content that it had",
        "004; mm/memory.c:do_swap_page",
        _check_content,
        needs=_SWAPPED,
    ),
    Claim(
        ("C120",),
        "A page found in the swap cache may have left it before it is locked",
        "004; mm/memory.c:do_swap_page",
        not_testable="mended in 2010: the page is checked again under its lock; the race was "
        "thought to hit one in a thousand systems that swap heavily",
    ),
    Claim(
        ("C122", "C124", "C127"),
        "The race happens near empty swap as well; alternatively FAULT_FLAG_WRITE could make the "
        "copy",
        "004",
        not_testable="of alternatives that were not taken",
    ),
)
"""The claims of this topic."""
