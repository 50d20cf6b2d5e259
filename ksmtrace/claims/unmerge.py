"""Copy on write, MADV_UNMERGEABLE, exit, and running out of memory."""

from __future__ import annotations

import errno

from ksmtrace.analysis.calls import find_calls
from ksmtrace.analysis.recorded import has_flag
from ksmtrace.claims.claim import (
    Case,
    Claim,
    Evidence,
    Exercised,
    Finding,
    Kinds,
    holds,
    unknown,
    violated,
)
from ksmtrace.claims.told import counter, during, frames, noted, program, race, tell
from ksmtrace.events import EventFlag, of_kind
from ksmtrace.units import text_duration

_GUIDE = "Documentation/admin-guide/mm/ksm.rst"
_HISTORICAL = "said of code that is gone"
# A fault that has to wait for memory is over by then.
_FOR_EVER_NS = 10_000_000_000


def _check_cow(case: Case) -> Finding:
    trial = case.trials["copies"]
    reading = trial.at("written")
    before, after = reading.notes["frame"]
    content = reading.notes["others_content"]
    evidence = [program(reading, "frame", "others_content"), frames(reading)]
    wrong = []
    if not before:
        return unknown("the page frames cannot be seen")
    if before == after:
        wrong.append("the frame stayed")
    if content[0] != content[1]:
        wrong.append("another process's content changed")
    copies = None
    if isinstance(reading.counters.get("cow_ksm"), int):
        copies = trial.change("written", "cow_ksm", since="resting")
        evidence.append(counter(reading, "cow_ksm"))
        if copies != 1:
            wrong.append(f"cow_ksm moved by {copies}")
    if wrong:
        return violated("; ".join(wrong), *evidence)
    seen = "" if copies is None else f", cow_ksm +{copies}"
    return holds(f"a new frame, the other content untouched{seen}", *evidence)


def _check_unmergeable(case: Case) -> Finding:
    reading = case.trials["unmergeable"].at("unmergeable")
    evidence = program(reading, "errno", "frames_in_range", "shared_in_range")
    shared, number = reading.notes["shared_in_range"], reading.notes["frames_in_range"]
    observed = f"{shared} of {number} pages still share a frame when madvise returns"
    done = not shared and number == 17 and not reading.notes["errno"]
    return tell(done, observed, evidence)


def _check_left_to_ksmd(case: Case) -> Finding:
    trial = case.trials["unmergeable"]
    at_once = trial.change("unmergeable", "pages_sharing", since="merged")
    later = trial.change("rescanned", "pages_sharing", since="merged")
    evidence = (
        counter(trial.at("merged"), "pages_sharing"),
        counter(trial.at("unmergeable"), "pages_sharing"),
        counter(trial.at("rescanned"), "pages_sharing"),
    )
    observed = f"pages_sharing {at_once:+d} at once, {later:+d} after the next pass"
    return tell((at_once, later) == (0, -17), observed, *evidence)


def _check_mappings(case: Case) -> Finding:
    reading = case.trials["unmergeable"].at("unmergeable")
    before, after = reading.notes["mappings"]
    evidence = program(reading, "mappings")
    # The middle of an area, with another flag than both of its sides.
    observed = f"{after - before:+d} mappings"
    return tell(after - before == 2, observed, evidence)


def _check_exit(case: Case) -> Finding:
    trial = case.trials["copies"]
    at_exit = trial.change("exited", "pages_sharing", since="rescanned")
    reaped = trial.change("reaped", "pages_sharing", since="rescanned")
    evidence = (
        counter(trial.at("rescanned"), "pages_sharing"),
        counter(trial.at("exited"), "pages_sharing"),
        counter(trial.at("reaped"), "pages_sharing"),
        Evidence("program", "a process with 11 of the pages ended while run was 0"),
    )
    observed = f"pages_sharing {at_exit:+d} at exit, {reaped:+d} after the next pass"
    return tell((at_exit, reaped) == (0, -11), observed, *evidence)


def _check_stopped_early(case: Case) -> Finding:
    trial = case.trials["interrupted"]
    evidence: list[Evidence] = []
    for label in ("killed", "interrupted"):
        reading = trial.at(label)
        evidence += [program(reading, "status", "errno"), frames(reading), counter(reading, "run")]
        if reading.frames is None:
            return unknown("the page frames cannot be seen")
        if not reading.notes["frames_before"] < reading.frames < (reading.places or 0):
            return unknown(f"{label}: no signal came in the midst of the unmerge")
        if reading.counters.get("run") != 0:
            return violated(f"{label}: run reads {reading.counters.get('run')}", *evidence)
    got = trial.at("interrupted").notes["errno"]
    if got != errno.EINTR:
        return violated(f"the writer got errno {got}", *evidence)
    return holds("run reads 0 after each; a writer that lives on gets EINTR", *evidence)


def _check_keeps_count(case: Case) -> Finding:
    trial = case.trials["interrupted"]
    before, after = trial.at("merged"), trial.at("killed")
    if not (before.frames or 0) < (after.frames or 0) < (after.places or 0):
        return unknown("no signal came in the midst of the unmerge")
    moved = trial.change("killed", "full_scans", since="merged")
    left = trial.change("killed", "pages_sharing", since="merged")
    evidence = (counter(before, "full_scans", "pages_sharing"), counter(after, "full_scans"))
    observed = f"full_scans {moved:+d}, pages_sharing {left:+d}, {after.frames} frames"
    return violated(observed, *evidence) if moved else holds(observed, *evidence)


def _check_restarts(case: Case) -> Finding:
    trial = case.trials["interrupted"]
    reading = trial.at("restarted")
    stores = during(case, "interrupted", "run_store", since="interrupted")
    stores = stores[stores["run"] == 2]
    again = int((stores["err"] < 0).sum())
    evidence = [
        program(reading, "status", "errno"),
        frames(reading),
        Evidence("events", f"{len(stores)} calls of run_store with 2, {again} stopped by a signal"),
    ]
    if not again:
        return unknown("no signal came in the midst of the unmerge")
    whole = reading.notes["errno"] == 0 and reading.frames == reading.places
    observed = f"the call was begun again {again} times, and unmerged all" if whole else "it failed"
    return tell(whole, observed, *evidence)


def _check_short(case: Case) -> Finding:
    reading = case.trials["short"].at("madvise")
    got, ooms = reading.notes["errno"], reading.notes["ooms"]
    evidence = (program(reading, "errno", "ooms"), frames(reading))
    observed = f"{errno.errorcode.get(got, got)}, and the OOM killer was called {ooms} times"
    return tell(got == errno.EAGAIN and ooms, observed, *evidence)


def _check_no_memory(case: Case) -> Finding:
    reading = case.trials["short"].at("run=2")
    got, run = reading.notes["errno"], reading.counters.get("run")
    evidence = (program(reading, "errno"), counter(reading, "run"), frames(reading))
    observed = f"writing 2 answered {got}, run reads {run}"
    return tell((got, run) == ("ENOMEM", 0), observed, *evidence)


def _check_recovered(case: Case) -> Finding:
    trial = case.trials["short"]
    reading = trial.at("recovered")
    if reading.frames is None or reading.places is None:
        return unknown("the page frames cannot be seen")
    sharing = trial.change("recovered", "pages_sharing")
    saved = reading.places - reading.frames
    evidence = (counter(reading, "pages_sharing"), frames(reading))
    observed = f"pages_sharing {sharing}, saved {saved}, one pass after the unmerge had failed"
    return tell(sharing == saved, observed, *evidence)


def _check_writer_first(case: Case) -> Finding:
    reading = case.trials["short"].at("killed")
    notes = reading.notes
    evidence = program(reading, "writer_status", "owner_lives", "kills")
    if not notes["kills"]:
        return unknown("nobody was killed: there was memory enough")
    observed = f"{notes['kills']} killed: writer's status {notes['writer_status']}, "
    observed += "the owner of the pages lives" if notes["owner_lives"] else "the owner died"
    first = notes["owner_lives"] and notes["writer_status"] == -9 and notes["kills"] == 1
    return tell(first, observed, evidence)


def _check_ends(case: Case) -> Finding:
    calls = of_kind(case.recorded.events, "break_ksm")
    tally = (find_calls(case.recorded) or {}).get("break_ksm")
    if not len(calls):
        return unknown("break_ksm was not called")
    worst = text_duration(int(calls["duration_ns"].max()))
    if tally is not None and tally.left_inside > 0:
        # One may be under way whenever a recording ends.
        stuck_ns = _stuck_ns(case, tally.returned)
        if stuck_ns < _FOR_EVER_NS:
            return unknown(f"{tally.left_inside} calls were under way at the end")
        return violated(
            f"{tally.left_inside} did not return",
            Evidence("events", f"entered {tally.entered} times, returned {tally.returned} times"),
            Evidence("events", f"none has returned for {text_duration(stuck_ns)}"),
        )
    return holds(f"{len(calls)} calls ended, the longest after {worst}")


def _stuck_ns(case: Case, returned: int | None) -> int:
    # For how long calls have been entered, and none has returned.
    stuck_ns = 0
    losses = case.recorded.losses
    for reading in reversed(losses):
        entered_then, returned_then = reading.calls.get("break_ksm", (None, None))
        if returned_then != returned or (entered_then or 0) <= (returned_then or 0):
            break
        stuck_ns = losses[-1].ts_ns - reading.ts_ns
    return stuck_ns


def _nr_undone(case: Case) -> int:
    return int(has_flag(of_kind(case.recorded.events, "break_ksm"), EventFlag.IN_KSMD).sum())


_INTERRUPTED = (Exercised("interrupted"),)
_SHORT = (Exercised("short"),)

CLAIMS = (
    Claim(
        ("C23", "R15"),
        "Where run=2 does not get to its end, run reads 0, and its writer gets the error",
        "002 P7; mm/ksm.c:run_store",
        _check_stopped_early,
        needs=_INTERRUPTED,
    ),
    Claim(
        ("C23.memory",),
        "Where run=2 runs out of memory, run reads 0, and its writer gets ENOMEM",
        "002 P7; mm/ksm.c:run_store, break_ksm",
        _check_no_memory,
        needs=_SHORT,
    ),
    Claim(
        ("C12.failed",),
        "A run=2 that fails leaves full_scans as it is",
        "002 P7; mm/ksm.c:unmerge_and_remove_all_rmap_items",
        _check_keeps_count,
        needs=_INTERRUPTED,
    ),
    Claim(
        ("C24",),
        "A signal in the midst of run=2 begins the unmerge again, where its handler lets calls "
        "begin again",
        "002 P7; mm/ksm.c:unmerge_ksm_pages, -ERESTARTSYS",
        _check_restarts,
        needs=(*_INTERRUPTED, Kinds(("run_store",))),
    ),
    Claim(
        ("C42", "C83"),
        "MADV_UNMERGEABLE may require more memory than is available: it fails with EAGAIN, or "
        "arouses the Out-Of-Memory killer",
        f"{_GUIDE}; 002 P7; mm/madvise.c maps -ENOMEM to EAGAIN",
        _check_short,
        needs=_SHORT,
    ),
    Claim(
        ("C41",),
        "An area whose unmerge failed stays mergeable",
        "002 P7; mm/ksm.c:ksm_madvise",
        noted("short", "madvise", "mergeable", True, "mg after madvise failed"),
        needs=_SHORT,
    ),
    Claim(
        ("C85", "C67"),
        "What a failed unmerge leaves merged the next pass of ksmd sets right",
        "002 P7; mm/ksm.c:remove_rmap_item_from_tree",
        _check_recovered,
        needs=_SHORT,
        defined="such a page keeps its stable_node; one that break_cow left has none, and is "
        "handled as any other page",
    ),
    Claim(
        ("C95", "C94"),
        "Where run=2 runs out of memory its writer is killed first, and nobody else",
        "13/12 (Hugh Dickins, Andrea Arcangeli); mm/ksm.c:run_store, set_current_oom_origin",
        _check_writer_first,
        needs=_SHORT,
    ),
    Claim(
        ("C80", "R14"),
        "break_ksm does not loop for ever",
        "002 P7; mm/ksm.c:break_ksm",
        _check_ends,
        needs=(Kinds(("break_ksm",)),),
    ),
    Claim(
        ("R17",),
        "break_cow does not fail, so that no KSM page is left that no stable_node knows",
        "002 P7; mm/ksm.c:break_cow",
        race("R17", "calls of break_ksm by ksmd", _nr_undone),
        needs=(Kinds(("break_ksm",)),),
    ),
    Claim(
        ("C86", "R9"),
        "A process that exits does not wait for ksm_thread_mutex",
        "002 P9; mm/ksm.c:__ksm_exit",
        race("R9", "mms that left", lambda case: case.recorded.count("ksm_exit")),
        needs=(Kinds(("lock_wait", "ksm_exit")),),
    ),
    Claim(
        ("C89", "R12"),
        "ksmd merges nothing in an mm that has left: ksm_test_exit is asked each time",
        "002 P9, 13/12; mm/ksm.c:ksm_test_exit",
        race("R12", "mms that left", lambda case: case.recorded.count("ksm_exit")),
        needs=(Kinds(("try_to_merge_one_page", "ksm_enter", "ksm_exit")),),
    ),
    Claim(
        ("C25",),
        "An unmerge could be lengthy if it has to spill into swap",
        "002 P7",
        not_testable="no time is said that could be exceeded; the report has the time of each",
    ),
    Claim(
        ("C81",),
        "That break_ksm loops is normal, because handle_mm_fault may back out",
        "002 P7; mm/ksm.c:break_ksm",
        not_testable="how often it faulted for one page no event tells",
    ),
    Claim(
        ("R10", "R11", "R8", "R25"),
        "Others wait for ksmd: for its batch, for its mmap_lock, in an exit, in walks of long "
        "lists of sharers",
        "002 P5, P9, 13/12; 000",
        not_testable="a wait is no fault, and no limit is said: the report shows how long, and who",
    ),
    Claim(
        ("R21",),
        "A truncation makes the fault of break_ksm fail with SIGBUS, which is benign",
        "002 P7 (comment)",
        not_testable="break_ksm returns 0 then too, and what its faults return is not recorded",
    ),
    Claim(
        ("C44",),
        "A merged page is write-protected, and copied when it is written to; others keep its "
        "content",
        "admin guide; mm/memory.c:do_wp_page",
        _check_cow,
        needs=(Exercised("copies"),),
    ),
    Claim(
        ("C39", "C82"),
        "MADV_UNMERGEABLE unmerges the range before it returns",
        "madvise(2); mm/ksm.c:unmerge_ksm_pages",
        _check_unmergeable,
        needs=(Exercised("unmergeable"),),
    ),
    Claim(
        ("C40.code",),
        "What MADV_UNMERGEABLE unmerged leaves the counters with the next pass of ksmd",
        "002 P6, comment at mm/ksm.c:remove_trailing_rmap_items",
        _check_left_to_ksmd,
        needs=(Exercised("unmergeable"),),
    ),
    Claim(
        ("C46",),
        "Mappings that differ in being mergeable are not merged: advice on the middle of one makes "
        "three",
        "002 P12; mm/vma.c:is_mergeable_vma",
        _check_mappings,
        needs=(Exercised("unmergeable"),),
    ),
    Claim(
        ("C87", "C88"),
        "The pages of a process that ends stay counted until ksmd comes by; while run is 0, for "
        "ever",
        "002 P9; mm/ksm.c:__ksm_exit",
        _check_exit,
        needs=(Exercised("copies"),),
    ),
    Claim(
        ("C90", "C92", "C93", "R13"),
        "ksm_exit is called in the middle of exit_mmap; the fault path must not bring back a page "
        "after that, nor hang munlock",
        "002 P9, 13/12",
        not_testable=f"{_HISTORICAL}: ksm_exit is called before exit_mmap (kernel/fork.c:__mmput)",
    ),
    Claim(
        ("C98",),
        "The page allocator does not notice TIF_MEMDIE of a task marked during its own allocation",
        "002 (David Rientjes)",
        not_testable=f"{_HISTORICAL} (TIF_MEMDIE)",
    ),
    Claim(
        ("C84",),
        "ksmd can hit VM_FAULT_OOM through memcg limits only, and is never the OOM victim",
        "002 P7; comment at mm/ksm.c:break_ksm",
        not_testable="that something never happens takes more than a run",
    ),
    Claim(
        ("C91",),
        "ksmd may notice that an mm has no users before __ksm_exit runs, and free the slot",
        "002 P9",
        not_testable="no event tells of a slot that __ksm_exit did not find",
    ),
    Claim(
        ("C99",),
        "The list of mms is walked under ksm_mmlist_lock",
        "002 P7",
        not_testable="who holds a spin lock is seen only where somebody waits for it",
    ),
    Claim(
        ("C96", "C97"),
        "MADV_UNMERGEABLE under memory pressure: whom the OOM killer picks",
        "13/12 (Hugh Dickins, Andrea Arcangeli)",
        not_testable="the choice is the OOM killer's (mm/oom_kill.c:oom_badness), not KSM's",
    ),
)
"""The claims of this topic."""
