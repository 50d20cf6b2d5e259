"""What KSM costs, provoked in real guests: each figure of the report beside one not of ours."""

import functools
import json
import runpy
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ksmtrace.analysis import between, df_cows, df_moves, make_report
from ksmtrace.analysis.recorded import Recorded, gather
from ksmtrace.recording.reader import RecordingReader
from ksmtrace.vm import VmOptions

pytestmark = pytest.mark.vm

PROGRAM = Path(__file__).with_name("guest_costs.py")
guest = SimpleNamespace(**runpy.run_path(str(PROGRAM)))
# Under emulation each takes one to two minutes: one before the ksm tracepoints, one of today's.
SERIES = ("6.1", "7.x")
HUGE_PAGES = guest.HUGE // guest.PAGE


@dataclass(eq=False)
class Run:
    """What one guest brought: the recording, and per scenario the witness."""

    recorded: Recorded
    witness: dict[str, Any]

    def report(self, scenario: str) -> dict[str, Any]:
        """The report of the time that a scenario took."""
        witness = self.witness[scenario]
        return make_report(between(self.recorded, witness["begin_ns"], witness["end_ns"]))


OPTIONS = VmOptions(numa_nodes=2, memory_bytes=1 << 30, swap_bytes=256 << 20)


@pytest.fixture(params=SERIES)
def run(request, in_guest) -> Run:
    return load(in_guest(request.param, PROGRAM, OPTIONS))


@functools.cache
def load(out: Path) -> Run:
    witness = json.loads((out / "witness.json").read_text())
    return Run(gather(RecordingReader(out / "costs.ksmt")), witness)


def test_the_recording_is_whole_and_agrees_with_the_kernels_counters(run):
    # A task may fault while another, preempted on the same CPU, is in the same program.
    skipped = "the kernel left out the program on"
    assert [why for why in run.recorded.why_incomplete() if not why.startswith(skipped)] == []
    counters = {entry["counter"]: entry for entry in make_report(run.recorded)["counters"]}
    for name in ("cow_ksm", "ksm_swpin_copy", "thp_split_page"):
        assert counters[name]["delta"] > 0, name
        assert counters[name]["verdict"] == "exact", counters[name]


def test_copies_on_write_are_as_many_as_the_kernel_counts_by_each_cause(run):
    cow = run.report("cow")["cow"]
    counts = np.diff(run.witness["cow"]["counts"]).tolist()

    assert counts == [guest.WRITTEN, guest.READ_INTO, guest.WRITTEN_BY_OTHER, guest.UNMERGED]
    assert list(cow["by_cause"].values()) == counts
    assert list(cow["by_cause"]) == ["write", "kernel", "remote", "unmerge"]
    assert cow["copies"] == run.witness["cow"]["counters"]["cow_ksm"] == sum(counts)
    assert cow["failed"] == {}
    (writer,) = cow["by_process"]
    assert writer["copies"] == sum(counts[:3])
    assert 0 < writer["latency"]["median_ns"] <= writer["latency"]["p99_ns"]
    assert writer["latency"]["p99_ns"] <= writer["latency"]["max_ns"] <= writer["total_ns"]


def test_who_caused_a_copy_and_since_when_the_page_was_merged(run):
    witness = run.witness["cow"]
    cows = df_cows(between(run.recorded, witness["begin_ns"], witness["end_ns"]))

    own = cows[cows["cause"].isin(["write", "kernel"])]
    assert (own["pid"] == own["task_pid"]).all()
    others = cows[cows["cause"] == "remote"]
    assert (others["pid"] == own["pid"].iloc[0]).all()
    assert (others["pid"] != others["task_pid"]).all()
    assert (cows["kept_ns"] > 0).all()
    assert (cows["kept_ns"] < witness["end_ns"] - witness["begin_ns"]).all()
    assert cows["address"].is_unique
    # Every page but those of the unmerge, which were merged 331 times in all.
    regret = run.report("cow")["cow"]["regret"]
    soon = (cows["cause"] != "unmerge") & (cows["kept_ns"] <= regret["within_ns"])
    assert (regret["copies"], regret["merged"]) == (len(cows) - guest.UNMERGED, guest.MERGED)
    assert regret["regretted"] == soon.sum()


def test_delays_are_the_kernels_own_for_a_process_that_began_with_accounting_on(run):
    witness = run.witness["delays"]
    delays = make_report(run.recorded)["cow_delays"]

    assert witness["accounted"]
    before, after = witness["before"], witness["after"]
    # Besides the KSM pages, a page or two of the program's own.
    assert after["wpcopy_count"] - before["wpcopy_count"] >= guest.DELAYED
    (mine,) = (row for row in delays if row["pid"] == witness["pid"])
    # It has been quiet since, but for what it did to say so.
    assert mine["copies"] >= after["wpcopy_count"]
    assert mine["delay_ns"] >= after["wpcopy_delay_ns"] > 0
    cows = df_cows(run.recorded)
    assert ((cows["pid"] == witness["pid"]) & (cows["cause"] == "write")).sum() == guest.DELAYED
    assert witness["counters"]["cow_ksm"] == guest.DELAYED


def test_writes_to_zero_pages_are_as_many_as_ksm_zero_pages_falls_by(run):
    witness = run.witness["zero_pages"]
    counted = run.recorded.losses[-1].counted["do_wp_page.zero_page"]

    if witness["fell"] is None:
        # Before 6.12 KSM's zero pages are not told from others (their entries are not dirty).
        assert counted == 0
    else:
        assert witness["placed"] == guest.ZEROS
        assert counted == witness["fell"] == guest.ZEROS_WRITTEN
    assert run.report("zero_pages")["cow"]["copies"] == 0


def test_unmerging_with_too_little_memory_and_then_with_enough(run):
    witness, report = run.witness["limit"], run.report("limit")
    unmerges, cow = report["unmerges"], report["cow"]
    first, second = witness["cows"]

    assert (witness["failed_with"], witness["worked"]) == ("EAGAIN", 0)
    assert unmerges["failed"] == cow["failed"] == {"ENOMEM": 1}
    assert unmerges["copied"] == cow["by_cause"]["unmerge"] == guest.LIMITED
    # The one that failed is counted by cow_ksm as well.
    assert unmerges["faults"] == first + second == guest.LIMITED + 1
    assert 0 < first < guest.LIMITED
    (task,) = unmerges["by_task"]
    assert task["pid"] == witness["pid"]
    assert unmerges["duration"]["max_ns"] > 0


def test_migrations_are_those_asked_for_and_everybody_who_shares_has_waited(run):
    witness, report = run.witness["migrate"], run.report("migrate")
    moves = df_moves(between(run.recorded, witness["begin_ns"], witness["end_ns"]))

    assert witness["moved"] == guest.MOVED
    assert report["migrations"]["pages"] == report["migrations"]["unmapped"]["pages"] == guest.MOVED
    assert sorted(moves["sharers"]) == witness["sharers"]
    assert (moves["from_node"] != moves["to_node"]).all()
    assert set(moves["from_node"]) | set(moves["to_node"]) == {0, 1}
    assert (moves["duration_ns"] > 0).all()


def test_copies_at_swap_in_are_as_many_as_the_kernel_counts(run):
    witness, swap_ins = run.witness["swap"], run.report("swap")["swap_ins"]

    # Each sharer of a content but the first to come back.
    assert swap_ins["count"] == witness["copies"] == guest.SWAPPED - guest.CONTENTS
    assert swap_ins["failed"] == {}
    assert [(who["pid"], who["count"]) for who in swap_ins["by_process"]] == [
        (witness["pid"], witness["copies"])
    ]


def test_huge_pages_that_ksmd_splits_and_what_that_alone_saves(run):
    witness, report = run.witness["split"], run.report("split")

    assert report["splits"]["count"] == witness["splits"] > 0
    assert report["splits"]["duration"]["max_ns"] > 0
    before, after = report["profit"]["page_truth"]
    assert before["zero_places"] == before["saved_pages"] == 0
    assert after["saved_pages"] == after["pages_sharing"] == witness["sharing"] > 0
    assert after["gap_pages"] == 0
    # The third one held zeros but for its first page. From 6.12 on a split frees such parts, and
    # no counter of KSM's tells; before, they are merged like any others.
    saved = report["profit"]["most_split_zero_pages"]
    # Without ksm_zero_pages nobody knows which zero pages are KSM's.
    assert saved == (None if after["ksm_zero_pages"] is None else after["zero_places"])
    assert after["zero_places"] + after["saved_pages"] >= HUGE_PAGES - 2


def test_an_unmerge_that_a_signal_stops_says_so_and_how_far_it_got(run):
    witness, unmerges = run.witness["stop"], run.report("stop")["unmerges"]
    stopped, whole = (write for write in unmerges["run_writes"] if write["run"] == 2)

    assert witness["run"] == 0
    assert stopped["result"] in ("ERESTARTSYS", "EINTR")
    assert whole["result"] == "0"
    part, total = witness["unmerged"]
    assert 0 < part < total == unmerges["copied"] == guest.STOPPED
    cows = df_cows(run.recorded)
    until = cows[(cows["ts_ns"] > witness["begin_ns"]) & (cows["ts_ns"] <= stopped["ts_ns"])]
    assert len(until) == part
