"""The files of /sys/kernel/mm/ksm as knobs, ksmd's life, and what madvise answers."""

from __future__ import annotations

import errno

import numpy as np

from ksmtrace.claims.claim import (
    Case,
    Claim,
    Evidence,
    Exercised,
    File,
    Finding,
    Kinds,
    StatKey,
    holds,
    not_applicable,
    unknown,
    violated,
)
from ksmtrace.claims.told import both, counter, frames, judge_changes, noted, program, tell
from ksmtrace.events import of_kind

_GUIDE = "Documentation/admin-guide/mm/ksm.rst"
_MADVISE = "madvise(2); Documentation/admin-guide/mm/ksm.rst"


def _check_kept(case: Case) -> Finding:
    trial = case.trials["copies"]
    merged, resting = trial.at("merged"), trial.at("resting")
    if merged.frames is None:
        return unknown("the page frames cannot be seen")
    scanned = trial.change("resting", "full_scans", since="merged")
    evidence = (frames(merged), frames(resting), counter(resting, "run", "full_scans"))
    observed = f"{resting.places} pages in {resting.frames} frame, {scanned} passes in 0.1 s"
    kept = resting.frames == merged.frames and not scanned
    return tell(kept, observed, *evidence)


def _check_unmerged(case: Case) -> Finding:
    trial = case.trials["unmerge"]
    reading = trial.at("unmerged")
    names = ("pages_shared", "pages_sharing", "pages_unshared", "pages_volatile")
    left = {name: reading.number(name) for name in names if reading.number(name)}
    evidence = (counter(reading, *names, "run"), frames(reading))
    if left or reading.counters.get("run") != 2 or reading.frames != reading.places:
        return violated(
            f"left {left or 'nothing'}; {reading.places} pages in {reading.frames} frames",
            *evidence,
        )
    finding = judge_changes(trial, "merged again", {"pages_shared": 7, "pages_sharing": 84})
    if finding.verdict.value != "holds":
        return finding
    return holds("all unmerged, and merged again with run=1 without another madvise", *evidence)


def _check_reset(case: Case) -> Finding:
    trial = case.trials["unmerge"]
    before, after = trial.at("merged"), trial.at("unmerged")
    evidence = (counter(before, "full_scans", "pages_scanned"), counter(after, "full_scans"))
    scans = after.number("full_scans")
    if scans:
        return violated(f"full_scans {scans} after run=2", *evidence)
    if isinstance(before.counters.get("pages_scanned"), int):
        lost = trial.change("unmerged", "pages_scanned", since="merged")
        if lost < 0:
            return violated(f"pages_scanned fell by {-lost}", *evidence)
    return holds("full_scans 0 after run=2; pages_scanned did not fall", *evidence)


def _check_zero_profit(case: Case) -> Finding:
    reading = case.trials["unmerge"].at("unmerged")
    wrong = [
        Evidence("process", f"{comm}: {key} {stat[key]}", reading.begin_ns)
        for comm, stat in reading.processes.items()
        for key in ("ksm_merging_pages", "ksm_rmap_items")
        if stat.get(key)
    ]
    if wrong:
        return violated(f"{len(wrong)} figures are not 0", *wrong)
    return holds("0 for every process")


def _check_idle(case: Case) -> Finding:
    trial = case.trials["idle"]
    begin, end = trial.at("begin"), trial.at("end")
    names = [n for n in ("full_scans", "pages_scanned") if n in begin.counters]
    known = [n for n in names if isinstance(begin.counters[n], int)]
    moved = {n: trial.change("end", n, since="begin") for n in known}
    slices = [(reading.notes.get("ksmd") or {}).get("timeslices") for reading in (begin, end)]
    evidence = (counter(begin, *known), counter(end, *known), program(end, "ksmd"))
    if any(moved.values()):
        return violated(f"moved in 0.5 s with nobody registered: {moved}", *evidence)
    if slices[0] is None or slices[1] is None:
        return holds("no pass in 0.5 s with run=1 and nobody registered", *evidence)
    # 25 sleeps of 20 ms would be 25 runs; a knob's write wakes it once.
    if slices[1] - slices[0] > 5:
        return violated(f"ksmd ran {slices[1] - slices[0]} times in 0.5 s", *evidence)
    return holds(f"no pass, and ksmd ran {slices[1] - slices[0]} times in 0.5 s", *evidence)


def _check_batches(case: Case) -> Finding:
    trial = case.trials["batches"]
    limit = int(trial.at("stopped").notes["pages_to_scan"])
    visits = of_kind(case.recorded.events, "cmp_and_merge_page")
    times = visits["ts_ns"]
    times = times[(times >= trial.begin_ns) & (times <= trial.end_ns)]
    # ksmd sleeps 29 ms between two batches; what lasts less is part of one.
    begins = np.flatnonzero(np.r_[True, np.diff(times.astype(np.int64)) > 20_000_000])
    if len(begins) < 3:
        return unknown(f"{len(begins)} batches seen")
    sizes = np.diff(np.r_[begins, len(times)])
    if sizes.max() > limit:
        at = int(np.argmax(sizes))
        return violated(
            f"{sizes.max()} pages in one of {len(sizes)} batches",
            Evidence(
                "events",
                f"{sizes[at]} visits without a sleep, pages_to_scan {limit}",
                int(times[begins[at]]),
            ),
        )
    return holds(f"{len(sizes)} batches of at most {sizes.max()} pages, pages_to_scan {limit}")


def _check_stopped(case: Case) -> Finding:
    trial = case.trials["batches"]
    moved = trial.change("later", "pages_scanned", since="stopped")
    evidence = (
        counter(trial.at("stopped"), "pages_scanned", "full_scans"),
        counter(trial.at("later"), "pages_scanned", "full_scans"),
    )
    observed = f"pages_scanned {moved:+d} in the 0.2 s after the write returned"
    return violated(observed, *evidence) if moved else holds(observed, *evidence)


_NEVER_WRITABLE = frozenset(
    {
        *("full_scans", "pages_shared", "pages_sharing", "pages_unshared", "pages_volatile"),
        *("stable_node_chains", "stable_node_dups", "ksm_zero_pages", "general_profit"),
        *("pages_scanned", "pages_skipped"),
    }
)


def _check_modes(case: Case) -> Finding:
    reading = case.trials["files"].at("read")
    modes = reading.notes["modes"]
    wrong = [
        Evidence("program", f"{name} has mode {mode}")
        for name, mode in modes.items()
        if mode != ("0o444" if name in _NEVER_WRITABLE else "0o644")
    ]
    if wrong:
        return violated(f"{len(wrong)} files have another mode", *wrong)
    return holds(f"{len(modes)} files, all readable by all, knobs writable by root only")


def _check_nice(case: Case) -> Finding:
    nice = case.trials["files"].at("read").notes["nice"]
    if nice is None:
        return unknown("ksmd cannot be seen")
    evidence = Evidence("process", f"ksmd has nice {nice}")
    return tell(nice == 5, f"nice {nice}", evidence)


def _check_pages_limit(case: Case) -> Finding:
    modes = case.trials["files"].at("read").notes["modes"]
    if "max_kernel_pages" in modes:
        return holds("the file exists")
    return violated("the file does not exist", Evidence("program", "no max_kernel_pages in sysfs"))


def _check_busy_knob(case: Case) -> Finding:
    reading = case.trials["limit"].at("merged")
    got = reading.notes["max_page_sharing_errno"]
    evidence = (
        counter(reading, "pages_shared"),
        Evidence("program", f"writing max_page_sharing answered {got}", reading.begin_ns),
    )
    return tell(got == "EBUSY", str(got), *evidence)


def _check_advisor_least(case: Case) -> Finding:
    trial = case.trials["advisor"]
    reading = trial.at("raised")
    # A pass at least, in which the advisor chooses anew.
    if not trial.change("raised", "full_scans", since="advised"):
        return unknown("the advisor chose nothing")
    least, chosen = reading.number("advisor_min_pages_to_scan"), reading.number("pages_to_scan")
    evidence = counter(reading, "advisor_min_pages_to_scan", "pages_to_scan", "full_scans")
    observed = f"pages_to_scan {chosen} after a pass with a least of {least}"
    return tell(chosen >= least, observed, evidence)


def _check_advisor_first(case: Case) -> Finding:
    reading = case.trials["advisor"].at("advised")
    least, chosen = reading.number("advisor_min_pages_to_scan"), reading.number("pages_to_scan")
    evidence = counter(reading, "advisor_mode", "advisor_min_pages_to_scan", "pages_to_scan")
    return tell(chosen == least, f"pages_to_scan {chosen}, the least being {least}", evidence)


def _check_adivsor(case: Case) -> Finding:
    modes = case.trials["files"].at("read").notes["modes"]
    found = sorted(name for name in modes if name.startswith("ad"))
    named = {"adivsor_max_cpu", "adivsor_max_pages_to_scan"}
    evidence = Evidence("program", f"the files are {', '.join(found)}")
    return tell(named <= set(found), f"{len(named & set(found))} of 2", evidence)


def _check_advisor_owns(case: Case) -> Finding:
    reading = case.trials["files"].at("read")
    got = reading.notes["pages_to_scan_errno"]
    evidence = Evidence("program", f"writing pages_to_scan with the advisor on answered {got}")
    return tell(got == "EINVAL", str(got), evidence)


def _check_merge_any(case: Case) -> Finding:
    trial = case.trials.get("merge_any")
    if trial is None:
        return unknown("takes the workload merge_any: ksmtrace selftest")
    if trial.why_not is not None:
        return not_applicable(trial.why_not)
    reading = trial.at("scanned")
    places, distinct = reading.notes["places"], reading.notes["frames"]
    observed = f"{places} pages never advised are in {distinct} frames after prctl"
    evidence = program(reading, "places", "frames")
    return violated(observed, evidence) if distinct < places else holds(observed, evidence)


def _check_outside(case: Case) -> Finding:
    reading = case.trials["outside"].at("merged")
    parent, child = reading.notes["parent_frames"], reading.notes["child_frames"]
    evidence = program(reading, "parent_frames", "child_frames", "parent_mergeable")
    if len(set(child)) != 1:
        return unknown("the child's pages did not merge")
    outside = parent.count(child[0])
    observed = f"{outside} of the parent's pages, not mergeable, map the child's KSM page"
    return violated(observed, evidence) if outside else holds(observed, evidence)


def _check_knows(case: Case) -> Finding:
    reading = case.trials["copies"].at("merged")
    values = [stat.get("ksm_merging_pages") for stat in reading.processes.values()]
    if None in values:
        return holds("no file of /proc/PID tells")
    return violated(
        "each process reads it in /proc/self/ksm_stat",
        Evidence("process", f"ksm_merging_pages of the three processes: {values}"),
    )


def _check_dropped(case: Case) -> Finding:
    trial = case.trials["dropped"]
    passes = trial.change("asleep", "full_scans", since="asleep begins")
    again = trial.change("registered again", "full_scans", since="asleep")
    evidence = [
        counter(trial.at("asleep begins"), "full_scans"),
        counter(trial.at("asleep"), "full_scans"),
        counter(trial.at("registered again"), "full_scans"),
    ]
    observed = f"{passes} passes in 0.3 s with run 1, {again} once it is registered again"
    if passes or not again:
        return violated(observed, *evidence)
    if case.recorded.can_see("ksm_enter", "ksm_exit"):
        # Every mm that comes during the trial is its process's.
        begin = trial.at("scanned").end_ns
        end = trial.at("registered again").begin_ns
        counts = []
        for kind in ("ksm_enter", "ksm_exit"):
            times = of_kind(case.recorded.events, kind)["ts_ns"]
            counts.append(int(((times > begin) & (times < end)).sum()))
        evidence.append(Evidence("events", f"ksm_enter {counts[0]}, ksm_exit {counts[1]} times"))
        if counts != [1, 0]:
            return violated(f"entered {counts[0]} times, left {counts[1]} times", *evidence)
        observed += "; no ksm_exit, and ksm_enter again"
    return holds(observed, *evidence)


CLAIMS = (
    Claim(
        ("C74",),
        "A process with no mergeable area left is dropped by ksmd at the end of its pass, and "
        "registers again with the next madvise",
        "002 P8, P9; mm/ksm.c:scan_get_next_rmap_item, MMF_VM_MERGEABLE",
        _check_dropped,
        needs=(Exercised("dropped"),),
    ),
    Claim(
        ("C20",),
        "run=0 stops ksmd and keeps merged pages",
        f"{_GUIDE}; mm/ksm.c:run_store",
        _check_kept,
        needs=(Exercised("copies"),),
    ),
    Claim(
        ("C21.counters",),
        "No page is scanned after the write of 0 to run has returned, in the midst of a pass too",
        "002 P5; mm/ksm.c:run_store",
        _check_stopped,
        applies=(File("pages_scanned"),),
        needs=(Exercised("batches"),),
    ),
    Claim(
        ("C22", "DOC18", "6C"),
        "run=2 stops ksmd and unmerges all pages currently merged, but leaves mergeable areas "
        "registered for the next run",
        f"{_GUIDE}; mm/ksm.c:unmerge_and_remove_all_rmap_items",
        _check_unmerged,
        needs=(Exercised("unmerge"),),
    ),
    Claim(
        ("C12", "DOC5.code"),
        "A successful run=2 sets full_scans to 0, and pages_scanned goes on",
        "002 P7; mm/ksm.c:unmerge_and_remove_all_rmap_items",
        _check_reset,
        needs=(Exercised("unmerge"),),
    ),
    Claim(
        ("6C.processes",),
        "After a successful run=2 ksm_merging_pages and ksm_rmap_items of every process are 0",
        "mm/ksm.c:remove_trailing_rmap_items, remove_rmap_item_from_tree",
        _check_zero_profit,
        applies=(StatKey("ksm_merging_pages"),),
        needs=(Exercised("unmerge"),),
    ),
    Claim(
        ("C26", "C28", "R24"),
        "While nobody is registered ksmd sleeps: no pass, no page scanned, no waking",
        "002 P5; mm/ksm.c:ksmd_should_run",
        _check_idle,
        needs=(Exercised("idle"),),
    ),
    Claim(
        ("C27", "R16"),
        "Registering the first process wakes ksmd",
        "002 P5; mm/ksm.c:__ksm_enter",
        noted("idle", "registered", "woken", True, "ksmd went on within 10 s"),
        needs=(Exercised("idle"),),
    ),
    Claim(
        ("C29",),
        "ksmd runs at nice 5",
        "002 P5; mm/ksm.c:ksm_scan_thread",
        _check_nice,
        needs=(Exercised("files"),),
    ),
    Claim(
        ("C31",),
        "max_kernel_pages caps pages_shared, 0 for no limit",
        "002 P1, P10",
        _check_pages_limit,
        needs=(Exercised("files"),),
        defined="there is no such file: KSM pages can be swapped out since 2.6.33",
        refuted="the file was removed when KSM pages became swappable",
    ),
    Claim(
        ("C32", "DOC19"),
        'pages_to_scan: "how many pages to scan before ksmd goes to sleep"',
        f"{_GUIDE}; mm/ksm.c:ksm_do_scan",
        _check_batches,
        needs=(
            Exercised("batches"),
            Kinds(("cmp_and_merge_page",)),
        ),
        defined="a batch ends earlier where a pass ends; pages that smart scan skips are free",
    ),
    Claim(
        ("C32.advisor",),
        "pages_to_scan cannot be written while the advisor is on",
        "mm/ksm.c:pages_to_scan_store",
        _check_advisor_owns,
        applies=(File("advisor_mode"),),
        needs=(Exercised("files"),),
    ),
    Claim(
        ("C34",),
        "The files are readable by all, and writable only by root",
        _GUIDE,
        _check_modes,
        needs=(Exercised("files"),),
    ),
    Claim(
        ("C35",),
        "KSM only operates on those areas of address space which an application has advised to be "
        "likely candidates for merging, by madvise(MADV_MERGEABLE)",
        f"{_GUIDE}; 002 P11",
        _check_merge_any,
        refuted="prctl(PR_SET_MEMORY_MERGE), since 6.4, makes a whole process mergeable",
    ),
    Claim(
        ("C36",),
        "MADV_UNMERGEABLE succeeds on a range that was never mergeable, and while ksmd is stopped",
        _MADVISE,
        noted("unmergeable", "advised", "never_mergeable_errno", 0, "errno"),
        needs=(Exercised("unmergeable"),),
    ),
    Claim(
        ("C37",),
        "madvise fails with ENOMEM if the range has gaps, and the mapped parts are processed",
        _MADVISE,
        both(
            noted("unmergeable", "advised", "gap_errno", errno.ENOMEM, "errno"),
            noted(
                "unmergeable", "advised", "around_gap_mergeable", [True, True], "mg on both sides"
            ),
        ),
        needs=(Exercised("unmergeable"),),
    ),
    Claim(
        ("C37.split",),
        "If a region must be split and the process will exceed vm.max_map_count, madvise may "
        "return ENOMEM",
        _MADVISE,
        noted("unmergeable", "advised", "crowded_errno", errno.ENOMEM, "errno"),
        needs=(Exercised("unmergeable"),),
        refuted="where mm/madvise.c turns what a split answers into EAGAIN, it is EAGAIN",
    ),
    Claim(
        ("C38",),
        "MADV_MERGEABLE on a shared mapping returns 0, and the mapping does not become mergeable",
        "002 P7; mm/ksm.c:ksm_madvise",
        both(
            noted("unmergeable", "advised", "shared_mapping_errno", 0, "errno"),
            noted("unmergeable", "advised", "shared_mapping_mergeable", False, "mg"),
        ),
        needs=(Exercised("unmergeable"),),
    ),
    Claim(
        ("C48",),
        "An application cannot know when its pages were merged",
        "002 (Izik Eidus, Andrea Arcangeli)",
        _check_knows,
        applies=(StatKey("ksm_merging_pages"),),
        needs=(Exercised("copies"),),
        defined="/proc/PID/ksm_merging_pages since 5.19, /proc/PID/ksm_stat since 6.1",
        refuted="the kernel tells per process since 5.19",
    ),
    Claim(
        ("DOC24",),
        "max_page_sharing cannot be changed while there are shared pages",
        f"{_GUIDE}; mm/ksm.c:max_page_sharing_store",
        _check_busy_knob,
        needs=(Exercised("limit"),),
    ),
    Claim(
        ("DOC24.least",),
        "The minimum value of max_page_sharing is 2",
        f"{_GUIDE}; mm/ksm.c:max_page_sharing_store",
        noted(
            "files",
            "read",
            "max_page_sharing_errnos",
            {"1": "EINVAL", "2": None},
            "writing it answered",
        ),
        applies=(File("max_page_sharing"),),
        needs=(Exercised("files"),),
    ),
    Claim(
        ("DOC22.any",),
        "use_zero_pages can be changed at any time, while pages are shared too",
        _GUIDE,
        noted("limit", "merged", "use_zero_pages_errno", None, "writing it answered"),
        applies=(File("use_zero_pages"),),
        needs=(Exercised("limit"),),
    ),
    Claim(
        ("C30",),
        "Defaults: run 1, pages_to_scan 200, sleep_millisecs 20, max_kernel_pages 2000",
        "002 P10",
        not_testable="said of 2.6.31-rc5 and changed before 2.6.32 was out (c73602ad31cd): run 0, "
        "pages_to_scan 100; what a machine has now its owner may have set",
    ),
    Claim(
        ("C47", "C49"),
        "ksmd only ever scans mergeable areas: no KSM page that it made is mapped anywhere else",
        "002 (Hugh Dickins); comment at mm/ksm.c:break_ksm",
        _check_outside,
        needs=(Exercised("outside"),),
        defined="a page that fork shares becomes a KSM page in place, for all that map it",
        refuted="where one of two processes that share a page since fork is mergeable, the other "
        "maps the KSM page too, and has no rmap_item for it",
    ),
    Claim(
        ("C33",),
        "sleep_millisecs is the pause between two batches",
        f"{_GUIDE}; mm/ksm.c:ksm_scan_thread",
        not_testable="ksmd sleeps by the tick, and late ticks come together: pauses "
        "from 27.0 ms on were measured in a guest with sleep_millisecs 29, which is no fault",
    ),
    Claim(
        ("DOC20",),
        'advisor_min_pages_to_scan "specifies the lower limit of the pages_to_scan parameter of '
        'the scan time advisor"',
        _GUIDE,
        _check_advisor_least,
        applies=(File("advisor_min_pages_to_scan"),),
        needs=(Exercised("advisor"),),
        defined="pages_to_scan is set to it when the advisor is switched on, and never compared "
        "with it again",
        refuted="mm/ksm.c:scan_time_advisor has another lower limit, by the CPU time of ksmd",
    ),
    Claim(
        ("DOC20.code",),
        "When the advisor is switched on pages_to_scan becomes advisor_min_pages_to_scan",
        "admin guide (the initial value); mm/ksm.c:set_advisor_defaults",
        _check_advisor_first,
        applies=(File("advisor_min_pages_to_scan"),),
        needs=(Exercised("advisor"),),
    ),
    Claim(
        ("DOC21",),
        "There are files adivsor_max_cpu and adivsor_max_pages_to_scan",
        _GUIDE,
        _check_adivsor,
        applies=(File("advisor_mode"),),
        needs=(Exercised("files"),),
        refuted="a slip of the pen: advisor_max_cpu, advisor_max_pages_to_scan",
    ),
)
"""The claims of this topic."""
