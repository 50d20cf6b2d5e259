"""Causes of failed merges: every rule, by hand-made evidence."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ksmtrace.analysis.outcomes import (
    CAUSES,
    INFERRED,
    SEEN,
    UNKNOWN,
    VISITED,
    count_causes,
    df_failures,
    df_page_outcomes,
    find_counted_pages,
    find_page_outcomes,
)
from ksmtrace.analysis.recorded import Recorded, gather
from ksmtrace.analysis.selection import between, of_pids
from ksmtrace.events import EVENT_DTYPE, KIND_BY_NAME, MergeStep
from ksmtrace.recording.reader import RecordingReader

RECORDING = Path(__file__).parents[1] / "golden/recordings/pinned.ksmt"
LOCKED, LRU, HEAD, SWAPCACHE = 1 << 0, 1 << 5, 1 << 6, 1 << 10
EFAULT, EAGAIN = 14, 11
S = MergeStep
ENTERED = S.IN_VMA | S.PAGE_KNOWN | S.MAPCOUNT_KNOWN | S.AT_ENTRY
REFUSED = S.IN_VMA | S.PAGE_KNOWN | S.MAPCOUNT_KNOWN | S.WRITE_PROTECT
SPLIT = S.IN_VMA | S.PAGE_KNOWN | S.MAPCOUNT_KNOWN | S.SPLIT
PROTECTED = ENTERED | S.WRITE_PROTECT | S.WRITE_PROTECTED
AFTER = S.AFTER_THE_FACT | S.PAGE_KNOWN | S.MAPCOUNT_KNOWN


def event(kind: str, **fields: int) -> np.ndarray:
    one = np.zeros(1, EVENT_DTYPE)
    one["kind"] = KIND_BY_NAME[kind].number
    for name, value in fields.items():
        one[name] = value
    return one


def attempt(err: int = -EFAULT, ksm_page: int = 0x1000, rmap_item: int = 7) -> np.ndarray:
    return event("ksm_merge_with_ksm_page", err=err, ksm_page=ksm_page, pid=41, rmap_item=rmap_item)


def evidence(steps: int, **fields: int) -> np.ndarray:
    return event("merge_failure", err=-EFAULT, pid=41, rmap_item=7, pfn=23, steps=steps, **fields)


def split(err: int) -> np.ndarray:
    return event("split_huge_page_to_list", err=err, pid=41)


@pytest.fixture(scope="module")
def recorded() -> Recorded:
    """A recording of a kernel with programs on functions, without any event."""
    bare = gather(RecordingReader(RECORDING))
    plan = [
        {"event": kind, "rung": "fentry", "target": "", "reason": "", "missing_fields": {}}
        for kind in ("ksm_merge_with_ksm_page", "merge_failure", "split_huge_page_to_list")
    ]
    flags = {"locked": 0, "lru": 5, "head": 6, "swapcache": 10}
    header = replace(bare.header, plan=plan, facts={**bare.header.facts, "page_flags": flags})
    return replace(bare, header=header, events=bare.events[:0])


def holding(recorded: Recorded, *events: np.ndarray) -> Recorded:
    joined = np.concatenate([one.view("V56") for one in events]).view(EVENT_DTYPE)
    joined["ts_ns"] = recorded.header.started_ns + 1 + np.arange(len(joined))
    return replace(recorded, events=joined)


@pytest.mark.parametrize(
    ("steps", "fields", "cause", "certainty"),
    [
        (0, {}, "not_mergeable", SEEN),
        (S.MM_EXITS, {}, "mm_exits", SEEN),
        (ENTERED, {"page_flags": LOCKED | LRU, "refcount": 2, "mapcount": 1}, "locked", SEEN),
        # Locked between our look and the kernel's.
        (ENTERED, {"page_flags": LRU, "refcount": 2, "mapcount": 1}, "locked", SEEN),
        (ENTERED | S.NOT_ANONYMOUS, {"refcount": 2}, "not_anonymous", SEEN),
        (SPLIT, {"page_flags": HEAD, "order": 9, "split_err": -EAGAIN}, "large_folio", SEEN),
        (REFUSED, {"page_flags": LRU, "refcount": 3, "mapcount": 1}, "extra_reference", SEEN),
        (REFUSED, {"page_flags": LRU, "refcount": 1026, "mapcount": 1}, "pinned", SEEN),
        (REFUSED, {"page_flags": 0, "refcount": 3, "mapcount": 1}, "off_lru", INFERRED),
        (REFUSED, {"page_flags": LRU, "refcount": 1, "mapcount": 0}, "unmapped", SEEN),
        # Mapped, but somewhere else, or the reference was given back meanwhile.
        (REFUSED, {"page_flags": LRU, "refcount": 2, "mapcount": 1}, "unmapped", INFERRED),
        # The swap cache holds one too.
        (
            REFUSED,
            {"page_flags": LRU | SWAPCACHE, "refcount": 3, "mapcount": 1},
            "unmapped",
            INFERRED,
        ),
        (PROTECTED | S.DIFFERENT, {"refcount": 2, "mapcount": 1}, "changed", SEEN),
        (PROTECTED | S.IDENTICAL, {"refcount": 2, "mapcount": 1}, "remapped", SEEN),
        (PROTECTED, {"refcount": 2, "mapcount": 1}, "changed", INFERRED),
        (AFTER, {"page_flags": LRU, "refcount": 3, "mapcount": 1}, "extra_reference", INFERRED),
        (AFTER, {"page_flags": LRU | LOCKED, "refcount": 2, "mapcount": 1}, "locked", INFERRED),
        (AFTER, {"page_flags": HEAD, "order": 9, "refcount": 3}, "large_folio", INFERRED),
        (AFTER, {"page_flags": LRU, "refcount": 2, "mapcount": 1}, "unknown", UNKNOWN),
        (S.AFTER_THE_FACT | S.NOT_MAPPED, {}, "unmapped", INFERRED),
        (S.AFTER_THE_FACT | S.MM_EXITS, {}, "mm_exits", INFERRED),
        (S.AFTER_THE_FACT, {}, "unknown", UNKNOWN),
    ],
)
def test_a_cause_by_what_was_seen(recorded, steps, fields, cause, certainty):
    failures = df_failures(holding(recorded, attempt(), evidence(int(steps), **fields)))

    assert failures[["cause", "certainty"]].values.tolist() == [[cause, certainty]]
    assert failures["pfn"].tolist() == [23]
    known = bool(steps & S.PAGE_KNOWN)
    assert failures["refcount"].notna().tolist() == [known]
    assert failures["split_err"].notna().tolist() == [bool(steps & S.SPLIT)]


def test_two_pages_of_one_large_folio_are_known_by_the_split_that_follows(recorded):
    large = evidence(int(SPLIT), page_flags=HEAD, order=9, split_err=-EAGAIN)
    steps = [split(-EAGAIN), attempt(ksm_page=0), large]
    twins = df_failures(holding(recorded, *steps, split(0), attempt(0)))
    others = df_failures(holding(recorded, *steps, attempt(0), split(0)))

    assert twins["cause"].tolist() == ["large_folio_twins"]
    assert others["cause"].tolist() == ["large_folio"]


def test_evidence_belongs_to_the_attempt_before_it_and_to_no_other(recorded):
    locked = evidence(int(ENTERED), page_flags=LOCKED, refcount=2, mapcount=1)
    gone = evidence(0)
    failures = df_failures(
        holding(recorded, attempt(), attempt(0), attempt(), gone, attempt(), locked, attempt())
    )

    assert failures["cause"].tolist() == ["unknown", "not_mergeable", "locked", "unknown"]
    assert failures["ksm_page"].tolist() == [0x1000, 0x1000, 0x1000, 0x1000]
    counts = count_causes(failures)
    assert counts["cause"].tolist() == ["not_mergeable", "locked", "unknown"]
    assert counts["failures"].tolist() == [1, 1, 2]
    assert counts["seen"].tolist() == [1, 1, 0]


def test_replacements_by_the_zero_page_are_rows_of_their_own(recorded):
    zero = evidence(int(REFUSED | S.ZERO_PAGE), page_flags=LRU, refcount=3, mapcount=1)
    failures = df_failures(holding(recorded, zero, attempt(), evidence(0)))

    assert failures["zero_page"].tolist() == [True, False]
    assert failures["cause"].tolist() == ["extra_reference", "not_mergeable"]


def test_a_span_holds_the_failures_of_its_attempts(recorded):
    whole = holding(recorded, attempt(), evidence(0), attempt(), evidence(int(S.MM_EXITS)))
    later = df_failures(between(whole, recorded.header.started_ns + 3, None))

    assert later["cause"].tolist() == ["mm_exits"]


def test_every_cause_says_what_to_do():
    assert len({cause.name for cause in CAUSES}) == len(CAUSES)
    assert all(cause.meaning and cause.advice for cause in CAUSES)


def test_pages_by_outcome_are_those_that_the_guests_program_made(golden):
    """As in tests/vm/test_outcomes.py, in a recording of tests/vm/guest_outcomes.py."""
    recorded = golden("guest-6.12-visits")
    pages = find_page_outcomes(recorded)

    assert pages is not None
    own = next(row for row in pages.by_pid if row["outcomes"].get("zero_page"))
    assert own["outcomes"] == {
        **{"first_visit": 101, "changed": 68, "unique": 577, "merged_pair": 11, "in_place": 264},
        **{"zero_page": 19, "skipped": 120, "gone": 32},
    }
    # The child that exited, and its copy of what was mergeable.
    assert pages.total["mm_exits"] == 92
    assert pages.not_told_pages == 0
    assert pages.passes[0]["outcomes"] == {"first_visit": 101}
    assert pages.passes[1]["outcomes"] == {
        **{"changed": 17, "unique": 54, "merged_pair": 11, "zero_page": 19}
    }
    assert sum(sum(row["outcomes"].values()) for row in pages.passes[:14]) == 1132 + 120 + 32 + 92
    assert recorded.losses[-1].counted["smart_scan_skips"] == pages.total["skipped"]
    assert find_counted_pages(recorded) == {
        **{"scanned_pages": pages.visited_pages, "skipped_pages": 120}
    }
    assert pages.visited_pages == sum(pages.total.get(name, 0) for name in VISITED)
    assert find_counted_pages(of_pids(recorded, [own["pid"]])) is None


def test_what_ksmd_had_not_told_when_the_recording_ended_is_counted(golden):
    recorded = golden("guest-6.12-visits")
    told = KIND_BY_NAME["page_outcomes"].number
    chosen = np.flatnonzero(recorded.events["kind"] == told)[0]
    lacking = find_page_outcomes(replace(recorded, events=np.delete(recorded.events, chosen)))
    whole = find_page_outcomes(recorded)

    assert whole is not None and lacking is not None
    assert lacking.not_told_pages == 101
    assert lacking.visited_pages == whole.visited_pages - 101


def test_pages_of_an_unknown_mm_and_before_the_first_pass_are_counted(golden):
    recorded = golden("guest-6.12-visits")
    one = event("page_outcomes", unique_pages=5, skipped_pages=7, mm=0)
    one["ts_ns"] = recorded.header.started_ns + 1
    whole = replace(recorded, events=one)
    pages = find_page_outcomes(whole)

    assert pages is not None
    assert pages.total == {"unique": 5, "skipped": 7}
    assert [row["pid"] for row in pages.by_pid] == [None]
    assert pages.passes == [{"seq": None, "begin_ns": None, "outcomes": pages.total}]
    assert df_page_outcomes(whole)["pass_number"].isna().all()


def test_a_recording_without_these_events_does_not_say_0(golden):
    assert find_page_outcomes(golden("pinned")) is None
