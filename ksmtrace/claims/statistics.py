"""What the counters mean: by the documents, by the code, as observed."""

from __future__ import annotations

from ksmtrace.claims.claim import (
    Case,
    Claim,
    Evidence,
    Exercised,
    File,
    Finding,
    StatKey,
    holds,
    unknown,
    violated,
)
from ksmtrace.claims.rest import counters_at_rest
from ksmtrace.claims.told import changed, counter, frames, judge_changes, tell
from ksmtrace.workload.registered import nr_rmap_items
from ksmtrace.workload.trial import Trial

_GUIDE = "Documentation/admin-guide/mm/ksm.rst"
_LAST_VISIT = "the counters are as of ksmd's last visit to each page"
# Passes after which static unique pages are volatile, of 32 with smart scan: predicted from
# mm/ksm.c:should_skip_rmap_item and measured on 6.18.
_UNSHARED_PASSES = frozenset({2, 3, 4, 6, 9, 14, 23, 32})


def _saved(trial: Trial, label: str) -> tuple[int, int] | None:
    """Return pages_sharing's change, and pages of memory saved by what is mapped."""
    reading = trial.at(label)
    if reading.places is None or reading.frames is None:
        return None
    return trial.change(label, "pages_sharing"), reading.places - reading.frames


def _check_saved(case: Case) -> Finding:
    wrong, said = [], []
    for name, labels in (("copies", ("merged", "written", "exited")), ("fork", ("forked",))):
        trial = case.trials[name]
        for label in labels:
            figures = _saved(trial, label)
            if figures is None:
                return unknown("the page frames cannot be seen")
            said.append(f"{name}, {label}: pages_sharing {figures[0]}, saved {figures[1]}")
            if figures[0] != figures[1]:
                reading = trial.at(label)
                wrong += [counter(reading, "pages_sharing"), frames(reading)]
    return violated("; ".join(said), *wrong) if wrong else holds("; ".join(said))


def _check_saved_when_visited(case: Case) -> Finding:
    wrong, said = [], []
    for name, labels in (
        ("copies", ("merged", "rescanned", "reaped")),
        ("limit", ("merged",)),
        ("singleton", ("alone", "joined")),
    ):
        trial = case.trials[name]
        for label in labels:
            figures = _saved(trial, label)
            if figures is None:
                return unknown("the page frames cannot be seen")
            said.append(f"{name}, {label}: {figures[0]}")
            if figures[0] != figures[1]:
                reading = trial.at(label)
                wrong += [counter(reading, "pages_sharing"), frames(reading)]
    return violated("; ".join(said), *wrong) if wrong else holds("; ".join(said))


_UNMOVED = ("pages_shared", "pages_sharing", "pages_unshared", "pages_volatile")


def _check_unmoved(case: Case) -> Finding:
    trial = case.trials["copies"]
    still = dict.fromkeys(_UNMOVED, 0)
    found = [
        judge_changes(trial, "written", still, since="resting"),
        judge_changes(trial, "exited", still, since="rescanned"),
        judge_changes(case.trials["unmergeable"], "unmergeable", still, since="merged"),
        judge_changes(case.trials["fork"], "forked", still, since="merged"),
    ]
    for finding in found:
        if finding.verdict.value != "holds":
            return finding
    return holds("unmoved by a write, an exit, MADV_UNMERGEABLE and a fork")


def _check_volatile_is_changing(case: Case) -> Finding:
    trial = case.trials["static"]
    wrong = [
        reading
        for reading in trial.readings
        if reading.label.startswith("pass ")
        and reading.label != "pass 1"
        and trial.change(reading.label, "pages_volatile") > 0
    ]
    if wrong:
        return violated(
            f"{trial.change(wrong[0].label, 'pages_volatile')} of 101 pages that never changed, "
            f"after {len(wrong)} of 31 passes",
            *(counter(reading, "pages_unshared", "pages_volatile") for reading in wrong[:3]),
        )
    return holds("none of 101 pages that never changed, from the second pass on")


def _check_smart_scan(case: Case) -> Finding:
    trial = case.trials["static"]
    unshared = set()
    for number in range(1, 33):
        count = trial.change(f"pass {number}", "pages_unshared")
        if count not in (0, 101):
            return violated(
                f"{count} of 101 unshared after pass {number}",
                counter(trial.at(f"pass {number}"), "pages_unshared", "pages_volatile"),
            )
        if count:
            unshared.add(number)
    observed = f"unshared after passes {', '.join(map(str, sorted(unshared)))} of 32"
    if unshared != _UNSHARED_PASSES:
        first = min(unshared ^ _UNSHARED_PASSES)
        return violated(
            observed, counter(trial.at(f"pass {first}"), "pages_unshared", "pages_volatile")
        )
    return holds(observed)


def _check_no_smart_scan(case: Case) -> Finding:
    trial = case.trials["static"]
    prefix = "without smart scan, " if "smart_scan" in _knobs(trial) else ""
    # With smart scan switched off only now, the first pass may begin with skipped pages.
    numbers = range(3, 6) if prefix else range(2, 33)
    for number in numbers:
        finding = judge_changes(
            trial, f"{prefix}pass {number}", {"pages_unshared": 101, "pages_volatile": 0}
        )
        if finding.verdict.value != "holds":
            return finding
    return holds("101 unshared and none volatile after each pass")


def _check_scanned_or_skipped(case: Case) -> Finding:
    trial = case.trials["static"]
    skipped = 0
    for number in range(2, 33):
        label, since = f"pass {number}", f"pass {number - 1}"
        scanned = trial.change(label, "pages_scanned", since)
        skips = trial.change(label, "pages_skipped", since)
        skipped += skips
        if scanned + skips != 101:
            return violated(
                f"{scanned} scanned and {skips} skipped of 101 pages in pass {number}",
                counter(trial.at(since), "pages_scanned", "pages_skipped"),
                counter(trial.at(label), "pages_scanned", "pages_skipped"),
            )
    return holds(f"101 in each of 31 passes; {skipped} skipped in all")


def _knobs(trial: Trial) -> set[str]:
    return {name for name, value in trial.readings[0].counters.items() if value is not None}


def _check_changing(case: Case) -> Finding:
    trial = case.trials["volatile"]
    for number in range(1, 5):
        finding = judge_changes(
            trial, f"changed {number}", {"pages_volatile": 53, "pages_unshared": 0}
        )
        if finding.verdict.value != "holds":
            return finding
    return judge_changes(trial, "unchanged", {"pages_volatile": 0, "pages_unshared": 53})


def _check_exclusive(case: Case) -> Finding:
    wrong, count = [], 0
    for rest in counters_at_rest(case):
        four = rest.numbers(*_UNMOVED)
        if four is None or not rest.everybody or not rest.processes:
            continue
        items = [process.get("ksm_rmap_items") for process in rest.processes]
        if not all(isinstance(item, int) for item in items):
            continue
        count += 1
        total = sum(int(item or 0) for item in items)
        if sum(four) != total:
            says = f"the four are {sum(four)}, ksm_rmap_items of all processes {total}"
            wrong.append(Evidence("counters", f"{rest.where}: {says}", rest.at_ns))
    if wrong:
        return violated(f"{len(wrong)} of {count} readings differ", *wrong[:5])
    if not count:
        return unknown("ksm_rmap_items of all processes were never read at rest")
    return holds(f"equal at {count} readings at rest")


def _check_merging(case: Case) -> Finding:
    wrong, count = [], 0
    for rest in counters_at_rest(case):
        shared = rest.numbers("pages_shared", "pages_sharing")
        if shared is None or not rest.everybody or not rest.processes:
            continue
        merging = [process.get("ksm_merging_pages") for process in rest.processes]
        if not all(isinstance(pages, int) for pages in merging):
            continue
        count += 1
        total = sum(int(pages or 0) for pages in merging)
        if sum(shared) != total:
            says = f"shared and sharing {sum(shared)}, ksm_merging_pages of all processes {total}"
            wrong.append(Evidence("counters", f"{rest.where}: {says}", rest.at_ns))
    if wrong:
        return violated(f"{len(wrong)} of {count} readings differ", *wrong[:5])
    if not count:
        return unknown("ksm_merging_pages of all processes were never read at rest")
    return holds(f"equal at {count} readings at rest")


def _check_process_profits(case: Case) -> Finding:
    page_bytes = case.facts.get("page_size_bytes") or 4096
    wrong, count = [], 0
    for rest in counters_at_rest(case):
        values = rest.numbers("pages_shared", "general_profit")
        profits = [process.get("ksm_process_profit") for process in rest.processes]
        if values is None or not rest.everybody or not profits or None in profits:
            continue
        count += 1
        total = sum(int(profit or 0) for profit in profits)
        if total != values[1] + (values[0] - rest.leaked_pages) * page_bytes:
            says = f"processes {total}, general_profit {values[1]}, pages_shared {values[0]}"
            wrong.append(Evidence("counters", f"{rest.where}: {says}", rest.at_ns))
    if wrong:
        return violated(f"{len(wrong)} of {count} readings differ", *wrong[:5])
    if not count:
        return unknown("ksm_process_profit of all processes was never read at rest")
    return holds(f"equal at {count} readings at rest")


def _check_born_empty(case: Case) -> Finding:
    reading = case.trials["fork"].at("forked")
    wrong, seen = [], 0
    for comm, stat in reading.processes.items():
        if not comm.startswith("ksm-heir"):
            continue
        for key in ("ksm_merging_pages", "ksm_rmap_items"):
            value = stat.get(key)
            if not isinstance(value, int):
                continue
            seen += 1
            if value:
                wrong.append(Evidence("process", f"{comm}: {key} {value}", reading.begin_ns))
    if wrong:
        return violated(f"{len(wrong)} figures of children are not 0 before any pass", *wrong)
    if not seen:
        return unknown("this kernel's /proc/PID/ksm_stat has neither of the two")
    return holds("0 in both children before any pass")


def _check_full_scans(case: Case) -> Finding:
    trial = case.trials["unmerge"]
    before, after = trial.at("merged"), trial.at("unmerged")
    evidence = (counter(before, "full_scans"), counter(after, "full_scans"))
    if after.number("full_scans") < before.number("full_scans"):
        return violated(
            f"fell from {before.number('full_scans')} to {after.number('full_scans')} by run=2",
            *evidence,
        )
    return holds("never fell", *evidence)


def _check_limit_chains(case: Case) -> Finding:
    # 31 copies of each of 3 contents with a limit of 7: 4 full nodes and one of 3 per content.
    trial = case.trials["limit"]
    chains = trial.change("merged", "stable_node_chains")
    evidence = counter(trial.at("merged"), "stable_node_chains", "stable_node_dups", "pages_shared")
    observed = f"stable_node_chains {chains}; 12 KSM pages are at the limit"
    return tell(chains == 12, observed, evidence)


def _check_limit_dups(case: Case) -> Finding:
    trial = case.trials["limit"]
    dups = trial.change("merged", "stable_node_dups")
    evidence = counter(trial.at("merged"), "stable_node_chains", "stable_node_dups", "pages_shared")
    observed = f"stable_node_dups {dups}; 12 of 15 KSM pages double another's content"
    return tell(dups == 12, observed, evidence)


def _check_cow(case: Case) -> Finding:
    unmergeable = case.trials["unmergeable"].change("unmergeable", "cow_ksm", since="merged")
    unmerged = case.trials["unmerge"].change("unmerged", "cow_ksm", since="merged")
    written = case.trials["copies"].change("written", "cow_ksm", since="merged")
    observed = f"1 write: {written}; MADV_UNMERGEABLE of 17 pages: {unmergeable}; run=2 of 91: "
    observed += str(unmerged)
    evidence = (
        counter(case.trials["unmergeable"].at("merged"), "cow_ksm"),
        counter(case.trials["unmergeable"].at("unmergeable"), "cow_ksm"),
    )
    if unmergeable or unmerged:
        return violated(observed, *evidence)
    return holds(observed, *evidence)


def _check_zero(case: Case) -> Finding:
    trial = case.trials["zero"]
    placed = trial.change("placed", "ksm_zero_pages")
    written = trial.change("written", "ksm_zero_pages")
    evidence = (
        counter(trial.at("placed"), "ksm_zero_pages"),
        counter(trial.at("written"), "ksm_zero_pages"),
    )
    observed = f"{placed} of 53 empty pages, {written} after 3 were written to"
    return tell((placed, written) == (53, 50), observed, *evidence)


def _check_zero_left_out(case: Case) -> Finding:
    trial = case.trials["leak"]
    placed, forked = (trial.change(label, "ksm_zero_pages") for label in ("placed", "forked"))
    reading = trial.at("forked")
    if placed != 53 or reading.notes["errno"] or reading.notes["heir_places"]:
        return unknown("there was no fork that left zero pages of KSM out")
    left = trial.change("unmerged", "ksm_zero_pages")
    evidence = (
        *(counter(trial.at(label), "ksm_zero_pages") for label in ("start", "placed", "forked")),
        counter(trial.at("ended"), "ksm_zero_pages", "pages_sharing"),
        counter(trial.at("unmerged"), "ksm_zero_pages", "run"),
    )
    observed = f"{placed:+d}, {forked:+d} after the fork, {left:+d} when all have ended and run=2"
    return tell(forked == placed and not left, observed, *evidence)


def _check_zero_in_sharing(case: Case) -> Finding:
    trial = case.trials["zero"]
    reading = trial.at("placed")
    figures = _saved(trial, "placed")
    if figures is None:
        return unknown("the page frames cannot be seen")
    observed = f"pages_sharing {figures[0]}, saved {figures[1]} of 53 empty pages"
    evidence = (counter(reading, "pages_sharing", "ksm_zero_pages"), frames(reading))
    return tell(figures[0] == figures[1], observed, *evidence)


def _check_sum(case: Case) -> Finding:
    # A test of nr_rmap_items against processes, where general_profit gives the former exactly.
    trial = case.trials["copies"]
    reading = trial.at("merged")
    items = [stat.get("ksm_rmap_items") for stat in reading.processes.values()]
    if None in items:
        return unknown("this kernel's /proc/PID/ksm_stat has no ksm_rmap_items")
    by_profit = nr_rmap_items(reading.counters)
    total = sum(int(item or 0) for item in items)
    observed = f"{by_profit}, of all processes {total}"
    evidence = counter(reading, "general_profit", "pages_sharing")
    return tell(total == by_profit, observed, evidence)


def _check_zero_mapped(case: Case) -> Finding:
    trial = case.trials["zero"]
    evidence, wrong = [], []
    for label, alone in (("placed", 0), ("written", 3)):
        reading = trial.at(label)
        if reading.places is None or reading.frames is None:
            return unknown("the page frames cannot be seen")
        # All but those written to map the one zero page.
        mapped = reading.places - alone if reading.frames == alone + 1 else -1
        counted = trial.change(label, "ksm_zero_pages")
        evidence += [counter(reading, "ksm_zero_pages"), frames(reading)]
        if mapped != counted:
            wrong.append(f"{label}: ksm_zero_pages {counted}, {mapped} places in one frame")
    if wrong:
        return violated("; ".join(wrong), *evidence)
    return holds("equal when placed, and after 3 were written to", *evidence)


def _check_zero_unused(case: Case) -> Finding:
    wrong, count = [], 0
    for trial in case.trials.values():
        if trial.name == "zero" or trial.others:
            continue
        for reading in trial.readings:
            if reading.counters.get("use_zero_pages") != 0:
                continue
            count += 1
            if reading.number("ksm_zero_pages") > trial.readings[0].number("ksm_zero_pages"):
                wrong.append(counter(reading, "use_zero_pages", "ksm_zero_pages"))
    if wrong:
        return violated(f"{len(wrong)} of {count} readings have more", *wrong[:5])
    if not count:
        return unknown("use_zero_pages was never 0")
    return holds(f"none more at {count} readings with use_zero_pages 0")


CLAIMS = (
    Claim(
        ("DOC11.never",),
        "Without use_zero_pages no page is counted in ksm_zero_pages",
        _GUIDE,
        _check_zero_unused,
        applies=(File("ksm_zero_pages"),),
        needs=(Exercised("copies"),),
    ),
    Claim(
        ("Q9",),
        "ksm_zero_pages is the number of places that map a zero page which KSM has put there",
        "mm/ksm.c:try_to_merge_with_zero_page; include/linux/ksm.h:ksm_might_unmap_zero_page",
        _check_zero_mapped,
        applies=(File("ksm_zero_pages"),),
        needs=(Exercised("zero"),),
        defined="not after a fork with MADV_WIPEONFORK or MADV_DONTFORK, nor after UFFDIO_MOVE: "
        "then it stays too high for ever (DOC11.fork)",
    ),
    Claim(
        ("C02",),
        "N identical pages: pages_shared 1, pages_sharing N-1",
        f"002 P2; {_GUIDE}",
        changed("copies", "merged", pages_shared=1, pages_sharing=30, pages_unshared=0),
        needs=(Exercised("copies"),),
        defined="up to max_page_sharing copies",
    ),
    Claim(
        ("C02.limit", "W19"),
        "Beyond max_page_sharing a content takes one more stable_node per so many copies",
        "mm/ksm.c:is_page_sharing_candidate",
        changed(
            "limit",
            "merged",
            pages_shared=15,
            pages_sharing=78,
            stable_node_chains=3,
            stable_node_dups=15,
        ),
        needs=(Exercised("limit"),),
    ),
    Claim(
        ("C16",),
        "The pages that a KSM page serves are (pages_sharing + pages_shared) / pages_shared",
        "002 P2 (Hugh Dickins)",
        changed("copies", "merged", pages_shared=1, pages_sharing=30),
        needs=(Exercised("copies"),),
    ),
    Claim(
        ("C19",),
        "When the first sharer leaves and others stay, pages_sharing falls and pages_shared stays",
        "002 P2; mm/ksm.c:remove_rmap_item_from_tree",
        changed("copies", "rescanned", pages_shared=1, pages_sharing=29),
        needs=(Exercised("copies"),),
    ),
    Claim(
        ("C05", "DOC1", "DOC2", "D4"),
        'pages_sharing: "how many more sites are sharing them i.e. how much saved"',
        f"{_GUIDE}; 002 P11",
        _check_saved,
        needs=(Exercised("copies"), Exercised("fork")),
        defined="rmap_items on stable_nodes less the nodes, as of ksmd's last visit to each page",
        refuted=f"{_LAST_VISIT}: too high after writes and exits, too low after forks",
    ),
    Claim(
        ("C05.code",),
        "Once ksmd has visited every page, pages_sharing is the memory saved",
        "mm/ksm.c:stable_tree_append, remove_rmap_item_from_tree",
        _check_saved_when_visited,
        needs=(Exercised("copies"), Exercised("limit"), Exercised("singleton")),
    ),
    Claim(
        ("Q11", "C40", "D4.code", "DOC1.code"),
        "Writes, exits, MADV_UNMERGEABLE and forks move none of shared, sharing, unshared and "
        "volatile before ksmd comes by",
        f"002 P6; kernels.md Q11; {_LAST_VISIT}",
        _check_unmoved,
        needs=(Exercised("copies"), Exercised("unmergeable"), Exercised("fork")),
    ),
    Claim(
        ("C08", "DOC4", "C07", "DOC3"),
        'pages_volatile: "how many pages changing too fast to be placed in a tree"; '
        'pages_unshared: "how many pages unique but repeatedly checked for merging"',
        f"{_GUIDE}; 002 P3",
        _check_volatile_is_changing,
        applies=(File("smart_scan"),),
        needs=(Exercised("static"),),
        defined="volatile is the remainder; a page that smart scan skips is off the unstable tree",
        refuted="smart scan, on by default, takes unique pages off the unstable tree as it skips "
        "them, and so they are counted as volatile",
    ),
    Claim(
        ("D1", "DOC4.code"),
        "With smart scan, pages that never change and have no equal are unshared after passes 2, "
        "3, 4, 6, 9, 14, 23, 32 and volatile after all others",
        "mm/ksm.c:should_skip_rmap_item, skip_age",
        _check_smart_scan,
        applies=(File("smart_scan"),),
        needs=(Exercised("static"),),
    ),
    Claim(
        ("C08.code", "D1.control"),
        "Without smart scan, pages that never change and have no equal are unshared from the "
        "second pass on",
        "mm/ksm.c:unstable_tree_search_insert",
        _check_no_smart_scan,
        needs=(Exercised("static"),),
    ),
    Claim(
        ("I2.passes", "DOC10.passes"),
        "In every pass pages_scanned and pages_skipped together rise by the number of pages",
        "mm/ksm.c:ksm_do_scan, should_skip_rmap_item",
        _check_scanned_or_skipped,
        applies=(File("pages_skipped"),),
        needs=(Exercised("static"),),
    ),
    Claim(
        ("C52", "C08.changing"),
        "Only a page whose checksum is that of the visit before is searched for or inserted: one "
        "that changes before every pass is volatile, and after one pass without a change is not",
        "002 P6; mm/ksm.c:cmp_and_merge_page",
        _check_changing,
        needs=(Exercised("volatile"),),
    ),
    Claim(
        ("C04", "C17"),
        "shared, sharing, unshared and volatile are mutually exclusive, and add up to the "
        "rmap_items: the sum of ksm_rmap_items of all processes",
        "002 P3; mm/ksm.c:pages_volatile_show",
        _check_exclusive,
        applies=(StatKey("ksm_rmap_items"),),
        needs=(Exercised("copies"),),
    ),
    Claim(
        ("Q5", "DOC15"),
        "ksm_merging_pages of all living processes add up to pages_shared and pages_sharing",
        f"{_GUIDE}; mm/ksm.c:stable_tree_append",
        _check_merging,
        applies=(StatKey("ksm_merging_pages"),),
        needs=(Exercised("copies"), Exercised("fork")),
        defined="where ksm_fork does not reset them, a child starts with its parent's figures",
    ),
    Claim(
        ("C64", "DOC15.born"),
        "rmap_items are not duplicated at fork: a child has none before ksmd has visited it, and "
        "its figures are 0",
        "002 P6; include/linux/ksm.h:ksm_fork",
        _check_born_empty,
        applies=(StatKey("ksm_merging_pages"),),
        needs=(Exercised("fork"),),
    ),
    Claim(
        ("Q10", "DOC14"),
        "The processes' ksm_process_profit add up to general_profit and pages_shared pages more",
        f"{_GUIDE}; mm/ksm.c:ksm_process_profit, general_profit_show",
        _check_process_profits,
        applies=(StatKey("ksm_process_profit"), File("general_profit")),
        needs=(Exercised("copies"),),
    ),
    Claim(
        ("Q2.items",),
        "ksm_rmap_items, solved from general_profit, is the sum of those of all processes",
        "mm/ksm.c:general_profit_show",
        _check_sum,
        applies=(StatKey("ksm_rmap_items"), File("general_profit")),
        needs=(Exercised("copies"),),
    ),
    Claim(
        ("C11", "DOC5"),
        'full_scans: "how many times all mergeable areas have been scanned"',
        f"{_GUIDE}; 002 P3",
        _check_full_scans,
        needs=(Exercised("unmerge"),),
        defined="ksm_scan.seqnr, which a successful run=2 sets to 0",
        refuted="run=2 sets full_scans to 0 (mm/ksm.c:unmerge_and_remove_all_rmap_items)",
    ),
    Claim(
        ("DOC6",),
        'stable_node_chains: "the number of KSM pages that hit the max_page_sharing limit"',
        _GUIDE,
        _check_limit_chains,
        needs=(Exercised("limit"),),
        defined="contents that ever needed a second stable_node and still have a chain",
        refuted="chains count contents, not pages",
    ),
    Claim(
        ("DOC7",),
        'stable_node_dups: "number of duplicated KSM pages"',
        _GUIDE,
        _check_limit_dups,
        needs=(Exercised("limit"),),
        defined="all stable_nodes below chains, the first of each content included",
        refuted="the original of each content is below the chain too, and counts",
    ),
    Claim(
        ("DOC16",),
        'cow_ksm "is incremented every time a KSM page triggers copy on write (COW) when users '
        'try to write to a KSM page"',
        _GUIDE,
        _check_cow,
        applies=(File("cow_ksm"),),
        needs=(Exercised("copies"), Exercised("unmerge"), Exercised("unmergeable")),
        defined="every copy of a KSM page on a fault, for whatever reason",
        refuted="unmerging faults each page in as a write would, and counts",
    ),
    Claim(
        ("DOC11", "I11"),
        'ksm_zero_pages: "how many zero pages that are still mapped into processes were mapped by '
        'KSM"',
        f"{_GUIDE}; mm/ksm.c:try_to_merge_with_zero_page",
        _check_zero,
        applies=(File("ksm_zero_pages"),),
        needs=(Exercised("zero"),),
    ),
    Claim(
        ("DOC11.fork",),
        "ksm_zero_pages counts only what is still mapped, also where a fork leaves such pages out "
        "(MADV_WIPEONFORK, MADV_DONTFORK)",
        f"{_GUIDE}; include/linux/ksm.h:ksm_fork",
        _check_zero_left_out,
        applies=(File("ksm_zero_pages"),),
        needs=(Exercised("leak"),),
        defined="a fork adds all that the parent has; what the child does not map is never taken "
        "off again",
        refuted="fork copies mm->ksm_zero_pages whatever it copies of the mappings",
    ),
    Claim(
        ("C05.zero", "DOC12"),
        "pages_sharing says how much memory is saved, where empty pages became the zero page",
        _GUIDE,
        _check_zero_in_sharing,
        needs=(Exercised("zero"),),
        defined="zero pages are in ksm_zero_pages, where the kernel has it, and in nothing else",
        refuted="pages replaced by the zero page are on no stable_node",
    ),
    Claim(
        ("C13", "R22", "I12"),
        "The locking for all these counts is ksm_thread_mutex; readers take no lock",
        "002 P3; mm/ksm.c:pages_shared_show",
        not_testable="it is why counters are judged at rest only: four files read under load are "
        "of four moments",
    ),
    Claim(
        ("C14",),
        "rmap_items are visible in /proc/slabinfo",
        "002 P3 (Andrew Morton, Hugh Dickins)",
        not_testable="slab caches of equal size are merged, unless the kernel was booted with "
        "slab_nomerge: /proc/PID/ksm_stat is used instead",
    ),
    Claim(
        ("C15",),
        "A high ratio of pages_sharing to pages_shared is good; a high one of pages_unshared to "
        "pages_sharing is wasted effort",
        _GUIDE,
        not_testable="a rule of thumb: the report shows the ratios",
    ),
)
"""The claims of this topic."""
