"""What became of pages that ksmd came by, and why merges failed."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from ksmtrace.analysis.addresses import Places, places_of
from ksmtrace.analysis.lives import find_lives, has_mm
from ksmtrace.analysis.recorded import PARTS, Recorded
from ksmtrace.events import (
    KIND_BY_NAME,
    NOT_VISITED,
    Events,
    MergeStep,
    PageOutcome,
    of_kind,
    select,
)

Mask = npt.NDArray[np.bool_]

SEEN, INFERRED, UNKNOWN = "seen", "inferred", "unknown"

_PIN_BIAS = 1024  # GUP_PIN_COUNTING_BIAS (include/linux/mm.h): what each FOLL_PIN adds to a folio


@dataclass(frozen=True)
class Cause:
    """Why try_to_merge_with_ksm_page failed.

    Attributes:
        name: as in the frames and in JSON.
        meaning: what the kernel found, with the place in mm/ksm.c.
        advice: what an operator can do about it.
    """

    name: str
    meaning: str
    advice: str


CAUSES = (
    Cause(
        "mm_exits",
        "the process is exiting (find_mergeable_vma: ksm_test_exit)",
        "nothing: it is over with the process",
    ),
    Cause(
        "not_mergeable",
        "there is no mergeable area at the address any more (find_mergeable_vma)",
        "nothing, unless it goes on: then a program maps and unmaps, or gives MADV_UNMERGEABLE, "
        "as fast as ksmd scans; let it advise only memory that stays",
    ),
    Cause(
        "locked",
        "somebody held the folio's lock (try_to_merge_one_page: folio_trylock)",
        "nothing, as ksmd tries again in the next pass; if the same pages stay locked, look for "
        "migration (compaction, NUMA balancing), reclaim and swap, which lock folios",
    ),
    Cause(
        "not_anonymous",
        "the page was not anonymous any more (try_to_merge_one_page: PageAnon); no kernel was made "
        "to show it: ksmd holds a reference since it found the page anonymous, and page.mapping "
        "stays until the page is freed (mm/page_alloc.c:free_pages_prepare)",
        "nothing: the mapping has changed",
    ),
    Cause(
        "large_folio_twins",
        "two pages of one large folio are equal: ksmd itself holds a reference to each, so that "
        "the split failed, and was made good afterwards (cmp_and_merge_page)",
        "nothing: the pages merge in the next pass",
    ),
    Cause(
        "large_folio",
        "a large folio could not be split (try_to_merge_one_page: split_huge_page)",
        "look for who holds a reference to a page of it (see extra_reference): one is enough to "
        "keep all its pages from merging; with device assignment or registered buffers take such "
        "memory out of huge pages, or out of KSM",
    ),
    Cause(
        "pinned",
        "the page is pinned for DMA (write_protect_page: more references than mappings, by 1024 "
        "or more)",
        "device assignment (VFIO), RDMA and io_uring's registered buffers pin for good: such "
        "memory never merges, so take it out of KSM with MADV_UNMERGEABLE and save the scans; "
        "O_DIRECT pins for the time of the I/O",
    ),
    Cause(
        "off_lru",
        "somebody else held a reference, and the page was on no LRU list: it waited in a CPU's "
        "batch, or was isolated for migration or reclaim (write_protect_page)",
        "nothing: ksmd drains the batches before each pass, and the page merges in the next one",
    ),
    Cause(
        "extra_reference",
        "somebody else held a reference (write_protect_page: more references than mappings)",
        "pipes (vmsplice, splice), O_DIRECT and vhost hold references as long as their I/O lasts; "
        "if the same pages stay so, find the process that does it",
    ),
    Cause(
        "unmapped",
        "the page was not mapped there any more: written to after a fork, swapped out, or dropped "
        "(write_protect_page)",
        "nothing: ksmd looks at what is there now in the next pass",
    ),
    Cause(
        "changed",
        "the contents differed at last: somebody had written to the page since ksmd searched "
        "(try_to_merge_one_page: pages_identical)",
        "nothing, if few; many say that memory is merged that its owner keeps writing to: less "
        "sleep between batches does not help, taking that memory out of KSM does",
    ),
    Cause(
        "remapped",
        "the page table had changed between the last comparison and the replacement (replace_page)",
        "nothing: ksmd tries again in the next pass",
    ),
    Cause(
        "unknown",
        "what was seen fits no cause, or nothing was seen of this attempt",
        "nothing can be said; a kernel with fentry or kprobes shows more",
    ),
)
"""In the order in which ksmd meets them."""


def df_failures(recorded: Recorded) -> pd.DataFrame:
    """List the merges that failed, one row each, in order.

    Those are the ksm_merge_with_ksm_page with an error, each joined with the merge_failure that
    follows it; and the merge_failure of replacements by the zero page
    (mm/ksm.c:try_to_merge_with_zero_page), where these are caught.

    Returns:
        No row where attempts are not visible. Columns: ``ts_ns`` (CLOCK_MONOTONIC); ``pid``,
        ``rmap_item``, ``address`` (uint64, 0: unknown); ``ksm_page`` (0: the first step of a new
        pair, or the zero page); ``pfn`` of the page that did not merge (0: unknown);
        ``zero_page`` (bool); ``cause`` (one of :data:`CAUSES`); ``certainty``: ``seen`` (the path
        that the kernel took leaves no other), ``inferred`` (the likeliest by what was read) or
        ``unknown``; and the evidence, Int64, NA where unread: ``page_flags``, ``refcount``,
        ``mapcount``, ``order``, ``split_err``, ``steps`` (:class:`ksmtrace.events.MergeStep`).
    """
    return _failures(recorded).drop(columns="place")


# Several tables of one report need it. ``place`` is a row's event among the whole recording's.
@functools.lru_cache(maxsize=PARTS)
def _failures(recorded: Recorded) -> pd.DataFrame:
    if recorded.selection is not None:
        whole = _failures(recorded.selection.of)
        chosen = recorded.selection.chooses(recorded.whole().events[whole["place"].to_numpy()])
        return whole[chosen].reset_index(drop=True)
    events = recorded.events
    places, evidence = _join(events)
    rows, read = select(events, places), select(events, evidence)
    told = read["kind"] == KIND_BY_NAME["merge_failure"].number
    steps = np.where(told, read["steps"], 0).astype(np.int64)
    cause, certainty = _judge(recorded, read, steps, told, _split_later(events, evidence))
    zero_page = _has(steps, MergeStep.ZERO_PAGE)
    page_known = _has(steps, MergeStep.PAGE_KNOWN)
    evidence_columns = {
        "page_flags": page_known,
        "refcount": page_known,
        "mapcount": _has(steps, MergeStep.MAPCOUNT_KNOWN),
        "order": page_known,
        "split_err": _has(steps, MergeStep.SPLIT),
    }
    return pd.DataFrame(
        {
            **{name: rows[name] for name in ("ts_ns", "pid", "rmap_item", "address")},
            "ksm_page": np.where(zero_page, 0, rows["ksm_page"]),
            "pfn": np.where(told, read["pfn"], 0),
            "zero_page": zero_page,
            "cause": pd.Series(cause, dtype="str"),
            "certainty": pd.Series(certainty, dtype="str"),
            **{name: _nullable(read[name], known) for name, known in evidence_columns.items()},
            "steps": _nullable(steps, told),
            "place": places,
        }
    )


def _has(steps: npt.NDArray[np.int64], step: MergeStep) -> Mask:
    taken: Mask = (steps & int(step)) != 0
    return taken


def _nullable(values: npt.NDArray[Any], known: Mask) -> pd.Series:
    return pd.Series(values.astype(np.int64), dtype="Int64").where(known)


def _join(events: Events) -> tuple[Places, Places]:
    """Return the places of the failures, and of the evidence of each, or again of the failure."""
    attempts = places_of(events, "ksm_merge_with_ksm_page")
    evidence = places_of(events, "merge_failure")
    of_zero_page = _has(events["steps"][evidence].astype(np.int64), MergeStep.ZERO_PAGE)
    zero_pages, evidence = evidence[of_zero_page], evidence[~of_zero_page]
    end = len(events)
    failed = np.flatnonzero(events["err"][attempts] != 0)
    following = np.r_[evidence, end][np.searchsorted(evidence, attempts[failed])]
    before_next = following < np.r_[attempts, end][failed + 1]
    places = attempts[failed]
    found = np.where(before_next, following, places)
    order = np.argsort(np.r_[places, zero_pages], kind="stable")
    return np.r_[places, zero_pages][order], np.r_[found, zero_pages][order]


def _split_later(events: Events, evidence: Places) -> Mask:
    """Say per failure whether ksmd, before its next attempt, has split the large folio after all.

    It does so where both pages are of one large folio (mm/ksm.c:cmp_and_merge_page).
    """
    steps = places_of(events, "ksm_merge_with_ksm_page", "merge_failure")
    split = places_of(events, "split_huge_page_to_list")
    split = split[events["err"][split] == 0]
    # An attempt's own split is over before it is, and began after it did.
    tries = places_of(events, "try_to_merge_one_page")
    begun = (events["ts_ns"] - events["duration_ns"])[tries]
    next_begun = np.r_[begun, np.iinfo(np.uint64).max][np.searchsorted(tries, split)]
    split = split[next_begun > events["ts_ns"][split]]
    later: Mask = np.isin(evidence, np.r_[-1, steps][np.searchsorted(steps, split)])
    return later


def _judge(
    recorded: Recorded, read: Events, steps: npt.NDArray[np.int64], told: Mask, split_later: Mask
) -> tuple[npt.NDArray[np.object_], npt.NDArray[np.object_]]:
    """Tell the cause of each failure, and how certain that is: the first rule that fits."""
    bits = recorded.header.facts.get("page_flags") or {}
    page_known = _has(steps, MergeStep.PAGE_KNOWN)
    flags = np.where(page_known, read["page_flags"], 0).astype(np.int64)

    def flag(name: str) -> Mask:
        number = bits.get(name)
        return np.zeros(len(flags), bool) if number is None else (flags >> number & 1) != 0

    counted = page_known & _has(steps, MergeStep.MAPCOUNT_KNOWN)
    # ksmd holds one reference, each mapping one, and the swap cache one for each page.
    expected = 1 + read["mapcount"].astype(np.int64) + (flag("swapcache") << read["order"])
    excess = np.where(counted, read["refcount"].astype(np.int64) - expected, 0)
    unmapped = counted & (read["mapcount"] == 0)
    off_lru = ~flag("lru") if bits.get("lru") is not None else np.zeros(len(flags), bool)

    after = _has(steps, MergeStep.AFTER_THE_FACT)
    in_vma = _has(steps, MergeStep.IN_VMA)
    split = _has(steps, MergeStep.SPLIT)
    protect, protected = (
        _has(steps, step) for step in (MergeStep.WRITE_PROTECT, MergeStep.WRITE_PROTECTED)
    )
    sees_splits = recorded.has_field("merge_failure", "split_err")
    refused = told & ~after & protect & ~protected
    untried = told & ~after & in_vma & ~protect & ~split
    chosen = [
        (~told, "unknown", UNKNOWN),
        (~in_vma & ~after & _has(steps, MergeStep.MM_EXITS), "mm_exits", SEEN),
        (~in_vma & ~after, "not_mergeable", SEEN),
        (untried & _has(steps, MergeStep.NOT_ANONYMOUS), "not_anonymous", SEEN),
        (untried & ~flag("locked") & flag("head") & (not sees_splits), "large_folio", INFERRED),
        (untried, "locked", SEEN),
        (~after & split & ~protect & split_later, "large_folio_twins", SEEN),
        (~after & split & ~protect, "large_folio", SEEN),
        (refused & (excess >= _PIN_BIAS), "pinned", SEEN),
        (refused & (excess > 0) & off_lru, "off_lru", INFERRED),
        (refused & (excess > 0), "extra_reference", SEEN),
        (refused & unmapped, "unmapped", SEEN),
        (refused & counted, "unmapped", INFERRED),
        (~after & _has(steps, MergeStep.DIFFERENT), "changed", SEEN),
        (~after & _has(steps, MergeStep.IDENTICAL), "remapped", SEEN),
        (~after & protected, "changed", INFERRED),
        (after & _has(steps, MergeStep.MM_EXITS), "mm_exits", INFERRED),
        (after & _has(steps, MergeStep.NOT_MAPPED), "unmapped", INFERRED),
        (after & flag("head"), "large_folio", INFERRED),
        (after & flag("locked"), "locked", INFERRED),
        (after & (excess >= _PIN_BIAS), "pinned", INFERRED),
        (after & (excess > 0) & off_lru, "off_lru", INFERRED),
        (after & (excess > 0), "extra_reference", INFERRED),
    ]
    fits = [mask for mask, _, _ in chosen]
    return (
        np.select(fits, [np.array(cause, object) for _, cause, _ in chosen], "unknown"),
        np.select(fits, [np.array(how, object) for _, _, how in chosen], UNKNOWN),
    )


def count_causes(failures: pd.DataFrame) -> pd.DataFrame:
    """Count failures by cause.

    Returns:
        One row per cause that occurs, in the order of :data:`CAUSES`. Columns: ``cause``,
        ``failures``, and of these ``seen`` and ``inferred`` (int64).
    """
    counts = pd.crosstab(failures["cause"], failures["certainty"]).reindex(
        columns=[SEEN, INFERRED, UNKNOWN], fill_value=0
    )
    counts = counts.reindex([cause.name for cause in CAUSES if cause.name in counts.index])
    return pd.DataFrame(
        {
            "cause": counts.index.to_numpy(object),
            "failures": counts.sum(axis=1).to_numpy(np.int64),
            SEEN: counts[SEEN].to_numpy(np.int64),
            INFERRED: counts[INFERRED].to_numpy(np.int64),
        }
    )


def df_page_outcomes(recorded: Recorded) -> pd.DataFrame:
    """Tell what became of the pages that ksmd came by, per process, as it went on.

    Returns:
        One row per outcome that there was in each page_outcomes event: of one mm, in one pass,
        and within about a second. No row where they were not caught. Columns: ``ts_ns`` (uint64,
        CLOCK_MONOTONIC at the end of that time); ``pass_number`` (Int64, of the passes whose
        begin is in the recording, from 1; NA before the first); ``seq`` (Int64, ksm_scan.seqnr);
        ``pid`` (Int64, of the mm's owner; NA: unknown), ``mm``; ``outcome`` (str, of
        :class:`ksmtrace.events.PageOutcome` in small letters), ``pages`` (int64).
    """
    events = of_kind(recorded.events, "page_outcomes")
    # (n, 16): per event the pages of each outcome.
    pages = np.array(
        [events[f"{outcome.name.lower()}_pages"] for outcome in PageOutcome], np.int64
    ).T
    row, outcome = np.nonzero(pages)
    names = np.array([outcome.name.lower() for outcome in PageOutcome], object)
    begins = of_kind(recorded.whole().events, "ksm_start_scan")
    number = np.searchsorted(begins["ts_ns"], events["ts_ns"], side="right")
    seqs = np.r_[0, begins["seq"]][number]
    lives = find_lives(recorded.whole())
    known = has_mm(events)
    pids = pd.array([None] * len(events), "Int64")
    pids[known] = pd.array([life.pid for life in lives.lives], "Int64")[
        lives.of(select(events, known))
    ]
    return pd.DataFrame(
        {
            "ts_ns": events["ts_ns"][row],
            "pass_number": pd.Series(number[row], dtype="Int64").where(number[row] > 0),
            "seq": pd.Series(seqs[row], dtype="Int64").where(number[row] > 0),
            "pid": pids[row],
            "mm": events["mm"][row],
            "outcome": pd.Series(names[outcome], dtype="str"),
            "pages": pages[row, outcome],
        }
    )


VISITED = tuple(o.name.lower() for o in PageOutcome if o not in NOT_VISITED)
"""Outcomes of pages for which mm/ksm.c:cmp_and_merge_page was called."""


@dataclass(frozen=True)
class PageOutcomes:
    """What became of the pages that ksmd came by, by outcome.

    Attributes:
        total: pages per outcome; those that there were.
        visited_pages: of these the pages of :data:`VISITED`.
        not_told_pages: pages looked at by the kernel side's own count, and in no event: ksmd had
            not gone on when the recording ended, or events are lost. None of a part of a
            recording, whose tallies are not read where it begins and ends.
        by_pid: one row per process, the one with most pages first: ``pid`` (None: unknown),
            ``comm``, ``outcomes``.
        passes: one row per pass, in order: ``seq`` (None: begun before the recording),
            ``begin_ns`` (the same), ``outcomes``.
    """

    total: dict[str, int]
    visited_pages: int
    not_told_pages: int | None
    by_pid: list[dict[str, Any]]
    passes: list[dict[str, Any]]


def find_page_outcomes(recorded: Recorded) -> PageOutcomes | None:
    """Sum up :func:`df_page_outcomes`; None where that was not caught."""
    if not recorded.can_see("page_outcomes"):
        return None
    pages = df_page_outcomes(recorded)
    visited = int(pages["pages"][pages["outcome"].isin(VISITED)].sum())
    counted = recorded.losses[-1].counted.get("cmp_and_merge_page") if recorded.losses else None
    known = recorded.selection is None
    begins = of_kind(recorded.whole().events, "ksm_start_scan")
    passes: list[dict[str, Any]] = []
    for number, outcomes in _by_outcome(pages, "pass_number").items():
        begin = begins[number - 1] if number else None
        passes.append(
            {
                "seq": None if begin is None else int(begin["seq"]),
                "begin_ns": None if begin is None else int(begin["ts_ns"]),
                "outcomes": outcomes,
            }
        )
    last_ns = pages["ts_ns"].groupby(pages["pid"].fillna(0).to_numpy(np.int64)).max()
    by_pid: list[dict[str, Any]] = [
        {
            "pid": pid or None,
            "comm": recorded.name_of(pid, int(last_ns[pid])),
            "outcomes": outcomes,
        }
        for pid, outcomes in _by_outcome(pages, "pid").items()
    ]
    by_pid.sort(key=lambda row: -sum(row["outcomes"].values()))
    return PageOutcomes(
        total=_by_outcome(pages.assign(all=0), "all").get(0, {}),
        visited_pages=visited,
        not_told_pages=counted - visited if known and counted is not None else None,
        by_pid=by_pid,
        passes=passes,
    )


def _by_outcome(pages: pd.DataFrame, column: str) -> dict[int, dict[str, int]]:
    """Sum up the pages per value of a column, rising, 0 for NA, and per outcome that there was."""
    values, row = np.unique(pages[column].fillna(0).to_numpy(np.int64), return_inverse=True)
    names = [outcome.name.lower() for outcome in PageOutcome]
    counts = np.zeros((len(values), len(names)), np.int64)
    at = pd.Index(names).get_indexer(pd.Index(pages["outcome"]))
    np.add.at(counts, (row, at), pages["pages"].to_numpy(np.int64))
    return {
        value: {name: count for name, count in zip(names, own, strict=True) if count}
        for value, own in zip(values.tolist(), counts.tolist(), strict=True)
    }


def find_skips(recorded: Recorded) -> dict[int, int] | None:
    """Count the pages that smart scan skipped by the passes in which it will skip them, too.

    Returns:
        rmap_item.remaining_skips after the skip -> pages, rising; None where there is no event of
        each skip (``record --every-page``).
    """
    kind = "should_skip_rmap_item"
    if not recorded.can_see(kind) or recorded.only_counted(kind):
        return None
    remaining = of_kind(recorded.events, kind)["remaining_skips"]
    passes, pages = np.unique(remaining, return_counts=True)
    return dict(zip(passes.tolist(), pages.tolist(), strict=True))


def find_counted_pages(recorded: Recorded) -> dict[str, int | None] | None:
    """Tell what the kernel's own counters say of pages that ksmd came by.

    Returns:
        ``scanned_pages`` and ``skipped_pages``: the rise of pages_scanned and pages_skipped
        between the first sample and the last one, None where the kernel has no such file. None
        without two samples, and of some processes: these counters are not by process.
    """
    chosen = recorded.selection is not None and recorded.selection.pids is not None
    if chosen or len(recorded.samples) < 2:
        return None
    first, last = recorded.samples[0].ksm, recorded.samples[-1].ksm

    def rise(name: str) -> int | None:
        before, after = first.get(name), last.get(name)
        return after - before if isinstance(before, int) and isinstance(after, int) else None

    return {"scanned_pages": rise("pages_scanned"), "skipped_pages": rise("pages_skipped")}
