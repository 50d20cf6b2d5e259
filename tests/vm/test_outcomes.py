"""Merges made to fail in real guests, each cause against the kernel's own events and counters."""

import functools
import json
import runpy
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from ksmtrace.analysis.outcomes import (
    SEEN,
    VISITED,
    df_failures,
    df_page_outcomes,
    find_page_outcomes,
    find_skips,
)
from ksmtrace.analysis.recorded import Recorded, gather
from ksmtrace.analysis.report import make_report
from ksmtrace.events import of_kind
from ksmtrace.recording.reader import RecordingReader
from ksmtrace.vm import VmOptions

pytestmark = pytest.mark.vm

PROGRAM = Path(__file__).with_name("guest_outcomes.py")
guest = SimpleNamespace(**runpy.run_path(str(PROGRAM)))

KERNELS = ("6.1", "7.x")

# What each step leaves as the cause: of the last one that ksmd took.
CAUSES = {
    "left": {"mm_exits"},
    "merged": {"not_mergeable"},
    "tried": {"locked"},
    "split": {"large_folio", "large_folio_twins"},
    "protected-14": {"pinned", "extra_reference", "off_lru", "unmapped"},
    "protected0": {"changed"},
    "replacing": {"remapped"},
}


class Run:
    """What one guest brought: the recording, its failures, and per scenario the witness."""

    def __init__(self, out: Path) -> None:
        self.recorded: Recorded = gather(RecordingReader(out / "outcomes.ksmt"))
        self.witness: dict[str, Any] = json.loads((out / "witness.json").read_text())
        self.failures: pd.DataFrame = df_failures(self.recorded)

    def of(self, scenario: str) -> pd.DataFrame:
        spent = self.witness[scenario]
        at = self.failures["ts_ns"]
        return self.failures[(spent["begin_ns"] <= at) & (at < spent["end_ns"])]


# With preemption others come in between two steps of ksmd's.
OPTIONS = VmOptions(numa_nodes=2, memory_bytes=1 << 30, append=["preempt=full"])


@pytest.fixture(params=KERNELS)
def run(request, in_guest) -> Run:
    return load(in_guest(request.param, PROGRAM, OPTIONS))


@functools.cache
def load(out: Path) -> Run:
    return Run(out)


def last_step(path: str) -> str | None:
    """Return the step at which a merge failed, by the kernel's own events; None: it did not."""
    *steps, end = path.split()
    if end != "merged-14":
        return None
    if any(step.startswith("split-") for step in steps):
        return "split"
    return next((step for step in reversed(steps) if step in CAUSES), "merged")


def test_what_became_of_pages_is_what_the_program_did_with_them(run):
    witness = run.witness[guest.VISITING]
    pages = df_page_outcomes(run.recorded)
    own = pages[pages["pid"] == witness["pid"]]
    found = own.groupby("outcome")["pages"].sum().to_dict()
    passes = guest.VISITING_PASSES
    whole, left = passes + guest.SKIPPING_PASSES, guest.UNIQUE - guest.UNMAPPED

    assert witness["passes"] == whole + 2
    assert found["first_visit"] == guest.UNIQUE + guest.CHANGING + 2 * guest.EQUAL + guest.ZERO
    assert found["changed"] == guest.CHANGING * (passes - 1)
    assert found["merged_pair"] == guest.EQUAL
    assert found["in_place"] == 2 * guest.EQUAL * (whole + 2 - 2)
    assert found["zero_page"] == guest.ZERO
    # What the zero page has replaced, and what was unmapped.
    assert found["gone"] == guest.ZERO + guest.UNMAPPED
    assert found.get("skipped", 0) == witness["counters"].get("pages_skipped", 0)
    assert ("skipped" in found) is ("pages_skipped" in witness["counters"])
    unchanged = guest.UNIQUE * (whole - 1) + guest.CHANGING * guest.SKIPPING_PASSES
    unchanged += 2 * (left + guest.CHANGING)
    assert found["unique"] + found.get("skipped", 0) == guest.EQUAL + unchanged
    # A child that had the parent's mergeable pages, too.
    exits = pages[pages["outcome"] == "mm_exits"].groupby("pid")["pages"].sum()
    assert guest.EXITING + left + guest.CHANGING + 2 * guest.EQUAL in set(exits)


def test_every_skip_says_until_when(run):
    counters = run.witness[guest.VISITING]["counters"]
    skips = of_kind(run.recorded.events, "should_skip_rmap_item")

    assert len(skips) == counters.get("pages_skipped", 0)
    if not len(skips):
        assert not run.recorded.can_see("should_skip_rmap_item")
        return
    # mm/ksm.c:skip_age gives one skip to pages of the least age that can be skipped.
    pages, first = np.unique(skips["address"] & ~np.uint64(0xFFF), return_index=True)
    assert len(pages) == guest.UNIQUE + guest.CHANGING
    assert set(skips["remaining_skips"][first]) == {0}
    assert set(skips["pid"]) == {run.witness[guest.VISITING]["pid"]}
    skipped = find_skips(run.recorded)
    assert skipped is not None and sum(skipped.values()) == len(skips)


def test_pages_that_ksmd_came_by_are_as_many_as_the_kernel_counts(run):
    pages = find_page_outcomes(run.recorded)
    assert pages is not None
    assert pages.not_told_pages == 0
    assert sum(pages.total[name] for name in pages.total if name in VISITED) == pages.visited_pages
    for rows in (pages.by_pid, pages.passes):
        summed = sum((Counter(row["outcomes"]) for row in rows), Counter())
        assert summed == Counter(pages.total)
    counted = Counter()
    for witness in run.witness.values():
        counted.update(witness["counters"])
    if "pages_scanned" in counted:
        assert pages.visited_pages == counted["pages_scanned"]
    assert pages.total.get("skipped", 0) == counted["pages_skipped"]


def test_pages_shared_by_a_fork_meet_themselves_in_the_unstable_tree(run):
    pages = df_page_outcomes(run.recorded)
    parent = run.witness["forked"]["pid"]
    same = pages[(pages["outcome"] == "same_page") & (pages["pid"] > parent)]
    assert same["pages"].sum() >= guest.FORKED


def test_every_failure_has_the_cause_that_its_path_leaves(run):
    # A program that other tasks run too may be left out while it runs on the same CPU.
    reasons = run.recorded.why_incomplete()
    assert all("left out the program" in reason for reason in reasons), reasons
    assert run.recorded.rung("merge_failure") == "fentry"
    for name, witness in run.witness.items():
        if name == guest.VISITING:  # its paths are not traced
            continue
        expected: Counter[str] = Counter()
        for path, count in witness["paths"].items():
            if step := last_step(path):
                expected[step] += count
        found = Counter(
            next(step for step, causes in CAUSES.items() if cause in causes)
            for cause in run.of(name)["cause"]
        )
        assert found == expected, name


def test_references_and_pins_are_told_apart_page_by_page(run):
    failures = run.of("pinned")
    pages = failures.groupby("cause")["pfn"].nunique()

    assert set(failures["certainty"]) == {SEEN}
    assert pages.to_dict() == {"extra_reference": guest.REFERRED, "pinned": guest.PINNED}
    assert (failures["mapcount"] == 1).all()


def test_large_folios_fail_as_often_as_the_kernel_counts(run):
    pinned, twins = run.of("large_pinned"), run.of("large_twins")

    assert set(pinned["cause"]) == {"large_folio"}
    assert set(pinned["order"]) == {9}
    for name, failures in (("large_pinned", pinned), ("large_twins", twins)):
        counters = run.witness[name]["counters"]
        assert len(failures) == counters["thp_split_page_failed"] > 0, name
    # Both pages are of one large folio: ksmd splits it after all, and then they merge.
    assert list(twins["cause"]) == ["large_folio_twins"]
    assert run.witness["large_twins"]["counters"]["thp_split_page"] == 1


@pytest.mark.parametrize(
    ("scenario", "cause"),
    [
        ("changing", "changed"),
        ("moving", "locked"),
        ("flipping", "not_mergeable"),
        ("exiting", "mm_exits"),
        ("rewriting", "remapped"),
    ],
)
def test_each_race_shows_its_cause(run, scenario, cause):
    assert cause in set(run.of(scenario)["cause"])


def test_pages_that_a_fork_shares_are_no_failures(run):
    assert run.of("forked").empty


def test_the_report_counts_every_failure_once(run):
    report = make_report(run.recorded)
    failed = report["merges"]["failed"]["EFAULT"]

    assert sum(report["merges"]["failed_by_cause"].values()) == failed == len(run.failures)
    assert sum(row["failures"] for row in report["outcomes"]["causes"]) == failed
    assert len(of_kind(run.recorded.events, "merge_failure")) == failed
