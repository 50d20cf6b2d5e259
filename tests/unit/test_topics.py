"""What a stream tells of causes and outcomes part by part is what the report says of the whole."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ksmtrace.analysis import topics
from ksmtrace.analysis.outcomes import df_failures, find_page_outcomes
from ksmtrace.analysis.recorded import Recorded, gather
from ksmtrace.analysis.topics import CauseTally, PageTally
from ksmtrace.events import EVENT_DTYPE, KIND_BY_NAME, MergeStep
from ksmtrace.recording.reader import RecordingReader

RECORDINGS = Path(__file__).parents[1] / "golden/recordings"
S = MergeStep
SEEN = S.IN_VMA | S.PAGE_KNOWN | S.MAPCOUNT_KNOWN


def random_events(seed: int) -> np.ndarray:
    """Make attempts with their evidence, tries and splits, as ksmd makes them, in any order."""
    random = np.random.default_rng(seed)
    told = []
    for _ in range(97):
        kind = random.choice(
            [
                *("ksm_merge_with_ksm_page", "merge_failure"),
                *("split_huge_page_to_list", "try_to_merge_one_page"),
            ]
        )
        one = np.zeros(1, EVENT_DTYPE)
        one["kind"] = KIND_BY_NAME[kind].number
        one["pid"], one["rmap_item"] = 41, 7
        if kind == "ksm_merge_with_ksm_page":
            one["err"] = random.choice([0, -14])
        elif kind == "merge_failure":
            one["err"] = -14
            one["steps"] = SEEN | int(random.choice([0, S.SPLIT, S.WRITE_PROTECT, S.ZERO_PAGE]))
            one["refcount"], one["mapcount"] = random.integers(1, 4), random.integers(0, 2)
        elif kind == "split_huge_page_to_list":
            one["err"] = random.choice([0, -11])
        if kind in ("try_to_merge_one_page", "split_huge_page_to_list"):
            one["duration_ns"] = random.integers(0, 300)
        told.append(one)
    joined = np.concatenate([one.view("V56") for one in told]).view(EVENT_DTYPE)
    joined["ts_ns"] = 100 * (1 + np.arange(len(joined)))
    return joined


def nothing() -> Recorded:
    bare = gather(RecordingReader(RECORDINGS / "pinned.ksmt"))
    plan = [
        {"event": kind, "rung": "fentry", "target": "", "reason": "", "missing_fields": {}}
        for kind in topics._CAUSE_KINDS
    ]
    flags = {"locked": 0, "lru": 5, "head": 6, "swapcache": 10}
    facts = {**bare.header.facts, "page_flags": flags}
    header = replace(bare.header, started_ns=0, plan=plan, facts=facts)
    return Recorded(header, bare.events[:0])


@pytest.mark.parametrize("seed", [2, 3, 5, 7, 11])
@pytest.mark.parametrize("part", [1, 2, 7, 1000])
def test_causes_part_by_part_are_those_of_the_whole(seed, part):
    events = random_events(seed)
    recorded = nothing()
    tally = CauseTally(recorded.header)
    for begin in range(0, len(events), part):
        tally.take(events[begin : begin + part])
    told = tally.figures(int(events["ts_ns"][-1]))
    table = df_failures(replace(recorded, events=events))
    assert told.failures == Counter(table["cause"]) and len(told.failures) > 1
    for how in ("seen", "inferred"):
        counts = Counter(table["cause"][table["certainty"] == how])
        assert +Counter(getattr(told, how)) == counts


@pytest.mark.parametrize("part", [1, 53, 10_000])
def test_pages_part_by_part_are_those_of_the_whole(part):
    recorded = gather(RecordingReader(RECORDINGS / "guest-6.12-visits.ksmt"))
    tally = PageTally(recorded.header)
    for begin in range(0, len(recorded.events), part):
        tally.take(recorded.events[begin : begin + part])
    told, whole = tally.figures(), find_page_outcomes(recorded)
    assert whole is not None and told.total == whole.total and sum(told.total.values()) > 0
    passes = [row for row in whole.passes if row["seq"] is not None and row["outcomes"]]
    last = dict(told.passes)
    for row in passes[-len(last) + 1 :]:
        assert last[row["seq"]] == row["outcomes"]
