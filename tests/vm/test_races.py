"""Races and waits for locks, provoked in real guests: each figure beside the kernel's own count."""

import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from ksmtrace.analysis.contention import df_waits, find_contention
from ksmtrace.analysis.races import RACES, Verdict, df_walks, find_races
from ksmtrace.analysis.recorded import Recorded, gather
from ksmtrace.analysis.report import make_report
from ksmtrace.events import Events, of_kind
from ksmtrace.recording.reader import RecordingReader
from ksmtrace.vm import VmOptions

pytestmark = pytest.mark.vm

PROGRAM = Path(__file__).with_name("guest_races.py")
KERNELS = ("6.1", "7.x")

PROVOKED = ("R1", "R8", "R10", "R11", "R14", "R15", "R17", "R19", "R20", "R25")
ENOMEM, ERESTARTSYS = -12, -512
# As in guest_races.py.
ENOUGH, PATIENCE_S = 5, 300


@dataclass(eq=False)
class Run:
    """What one guest brought: the recording, its races, and what the kernel counted itself."""

    recorded: Recorded
    witness: dict[str, Any]

    def __post_init__(self) -> None:
        self.races: dict[str, Verdict] = {race.id: race for race in find_races(self.recorded)}
        self.waits: pd.DataFrame = df_waits(self.recorded)
        self.ksmd = int(self.recorded.header.facts["ksmd_pid"])

    def kernel(self, name: str) -> int:
        """Return how often something happened while the recorder ran, by the kernel's count."""
        return int(self.witness["kernel"][name] - self.witness["before"][name])

    def kernel_waits(self, lock: int, *pids: int) -> int:
        """Return how often threads waited for a lock, by the kernel's count."""
        return sum(
            times for pid, address, times in self.witness["kernel"]["waits"]
            if address == lock and (not pids or pid in pids)
        )  # fmt: skip

    def left_out(self, *programs: str) -> int:
        """Return how many events our programs may have missed, as the recording itself says."""
        reasons = " ".join(self.recorded.why_incomplete())
        names = "|".join(programs or ("contention_",))
        found = re.findall(rf"raw_tracepoint:(?:{names})\w* (?:(\d+) times|once)", reasons)
        return sum(int(times or 1) for times in found)

    def waits_in_calls(self, scenario: str, lock: str) -> pd.DataFrame:
        """Return the waits of a scenario's process that it has timed itself."""
        spent = self.witness[scenario]
        waits = self.waits
        return waits[
            (waits["pid"] == spent["pid"])
            & (waits["lock"] == lock)
            & (waits["begin_ns"] >= spent["calls_begin_ns"])
            & (waits["end_ns"] <= spent["calls_end_ns"])
        ]

    def of(self, scenario: str, kind: str) -> Events:
        spent = self.witness[scenario]
        events = of_kind(self.recorded.events, kind)
        return events[(spent["begin_ns"] <= events["ts_ns"]) & (events["ts_ns"] < spent["end_ns"])]


# With preemption anybody may come in between, though there is one CPU only.
OPTIONS = VmOptions(numa_nodes=2, hotplug_bytes=256 << 20, append=["preempt=full"])


@pytest.fixture(params=KERNELS)
def run(request, in_guest) -> Run:
    return load(in_guest(request.param, PROGRAM, OPTIONS))


@functools.cache
def load(out: Path) -> Run:
    recorded = gather(RecordingReader(out / "races.ksmt"))
    return Run(recorded, json.loads((out / "witness.json").read_text()))


def test_each_scenario_happened_by_the_kernels_own_count(run):
    too_few = {
        name: spent["provoked"]
        for name, spent in run.witness.items()
        if isinstance(spent, dict) and spent.get("provoked", ENOUGH) < ENOUGH
    }
    assert not too_few, f"tried for {PATIENCE_S} s each, happened by the kernel's count: {too_few}"


def test_every_call_is_seen_and_every_race_has_a_verdict(run):
    reasons = run.recorded.why_incomplete()
    assert all("left out the program" in reason for reason in reasons), reasons
    assert run.recorded.count("rmap_walk_ksm") == run.kernel("walked") > 0
    assert run.recorded.count("ksm_memory_callback") == run.kernel("told_of_memory") > 0
    assert run.recorded.count("run_store") == run.kernel("stored_run") > 0
    assert list(run.races) == [race.id for race in RACES]
    assert [name for name in PROVOKED if run.races[name].verdict != "seen"] == []
    assert [race.id for race in run.races.values() if race.fault and race.times] == []


def test_r1_searches_end_in_ebusy_as_often_as_lookups_do(run):
    assert run.races["R1"].times == run.kernel("looked_up") > 0
    # Who holds that lock: a migration, of which many wait for the page.
    folio = find_contention(run.recorded)["folio"]
    assert folio.waits == run.recorded.count("__folio_lock") > 0
    assert {run.ksmd, run.witness["moves"]["pid"]} & {party.pid for party in folio.waiters}


def test_r4_and_r19_by_moving_a_page_that_many_share(run):
    moved = run.of("moves", "ksm_migrate_page")
    assert run.recorded.count("ksm_migrate_page") == run.kernel("migrated")
    assert len(moved) == run.witness["moves"]["moved"] > 0
    # Each went to the other node. So may those have that were where memory went offline.
    assert len(moved) <= run.races["R19"].times <= run.kernel("migrated")
    assert run.races["R4"].verdict == "not seen"
    assert f"in {run.kernel('migrated'):,} migrations" in run.races["R4"].evidence[0]


def test_look_ups_are_all_timed_and_few_are_long(run):
    lookups = make_report(run.recorded)["lookups"]
    # A kretprobe misses calls now and then; ours has them all.
    missed = run.kernel("missed")
    assert 0 <= lookups["calls"] - run.kernel("lookups") <= missed
    refcount = find_contention(run.recorded)["refcount"]
    assert refcount.waits == run.recorded.count("get_ksm_page")
    long = sum(slot["count"] for slot in lookups["duration_ns"]["slots"] if slot["from"] >= 1 << 15)
    # Longer than 32 µs: those but where the CPU was lost.
    waits = run.waits[run.waits["lock"] == "refcount"]
    assert (waits["duration_ns"] >= 20_000).all()
    assert (waits["duration_ns"] >= 1 << 15).sum() <= long


def test_r25_walks_last_the_longer_the_more_share(run):
    walks = df_walks(run.recorded)
    assert walks["sharers"].max() > 500
    few = walks[walks["sharers"].between(1, 32)]["duration_ns"]
    assert len(few) > 0
    assert walks[walks["sharers"] >= 256]["duration_ns"].median() > few.median()
    assert run.races["R25"].times == (walks["duration_ns"] > 1_000_000).sum()


def test_walks_wait_for_an_anon_vma_as_often_as_the_kernel_counts(run):
    spent = run.witness["walks"]
    waits = run.waits[(run.waits["pid"] == spent["pid"]) & (run.waits["lock"] == "anon_vma")]
    assert 0 < len(waits) <= sum(spent["waits"].values()) <= len(waits) + run.left_out()
    # The kernel told the address when that process forked.
    assert set(waits["lock_address"]) <= {int(lock) for lock in spent["waits"]}
    # To read, what whoever splits and joins an area of the page holds to write.
    assert not waits["exclusive"].any()
    assert {spent["child"]} <= set(waits["holder_pid"]) <= {spent["child"], 0}
    assert set(waits[waits["holder_pid"] == spent["child"]]["holder_by"]) == {"owner"}
    anon_vma = make_report(run.recorded)["contention"]["anon_vma"]
    assert anon_vma["waits"] >= len(waits)
    assert spent["pid"] in {party["pid"] for party in anon_vma["waiters"]}
    assert spent["child"] in {party["pid"] for party in anon_vma["holders"]}


def test_r8_and_r20_wait_for_ksm_thread_mutex_as_often_as_the_kernel_counts(run):
    mutex = run.witness["ksm_thread_mutex"]
    waits = run.waits[run.waits["lock"] == "ksm_thread_mutex"]
    assert set(waits["lock_address"]) == {mutex}
    assert 0 <= run.kernel_waits(mutex) - len(waits) <= run.left_out()
    for scenario in ("knobs", "offline"):
        spent = run.witness[scenario]
        own = waits[(waits["pid"] == spent["pid"])]
        expected = run.kernel_waits(mutex, spent["pid"])
        assert 0 < len(own) <= expected <= len(own) + run.left_out(), scenario
        # It may have let go already, with others still in the queue.
        assert {run.ksmd} <= set(own["holder_pid"]) <= {run.ksmd, 0}
    knobs = run.witness["knobs"]
    own = run.waits_in_calls("knobs", "ksm_thread_mutex")
    assert len(own) > 0
    assert own["duration_ns"].max() <= knobs["worst_ns"]
    assert run.races["R8"].times == (waits["holder_pid"] == run.ksmd).sum()
    assert run.races["R20"].times >= run.witness["offline"]["gone"] > 0
    gone = "KSM_RUN_OFFLINE was set for .*, then offline"
    evidence = run.races["R20"].evidence
    assert sum(bool(re.match(gone, sentence)) for sentence in evidence) > 0
    assert "it waited for ksm_thread_mutex" in run.races["R20"].evidence[-1]


def test_r11_a_storm_of_mmap_waits_for_ksmd(run):
    storm = run.witness["storm"]
    waits = run.waits[(run.waits["pid"] == storm["pid"]) & (run.waits["lock"] == "mmap_lock")]
    (lock,) = set(waits["lock_address"])
    expected = run.kernel_waits(int(lock), storm["pid"])
    assert 0 < len(waits) <= expected
    # Where holds are not seen, waits for ksmd are missing where somebody else read after it.
    if run.recorded.has_field("lock_hold", "lock_address"):
        assert len(waits) >= expected - run.left_out("contention_", "mmap_lock_")
    timed = run.waits_in_calls("storm", "mmap_lock")
    assert len(timed) > 0
    assert timed["duration_ns"].max() <= storm["worst_ns"]
    held = (waits["holder_pid"] == run.ksmd).sum()
    assert 0 < held <= run.races["R11"].times


def test_r9_and_r10_exits_wait_for_ksmd_to_leave_and_not_for_its_mutex(run):
    children = run.witness["exits"]["children"]
    assert run.kernel_waits(run.witness["ksm_thread_mutex"], *children) == 0
    assert run.races["R9"].verdict == "not seen"
    waits = run.waits[run.waits["exiting"] & (run.waits["lock"] == "mmap_lock")]
    found = set(zip(waits["pid"], waits["lock_address"], strict=True))
    expected = run.witness["kernel"]["exit_waits"]
    assert found <= {(pid, lock) for pid, lock, _ in expected}
    assert 0 < len(waits) == run.races["R10"].times
    in_ksm_exit = sum(where for *_, where in expected)
    assert len(waits) >= in_ksm_exit - run.left_out()
    # In exit_mmap it was itself the last to read, so that it takes the holds.
    if run.recorded.has_field("lock_hold", "lock_address"):
        assert len(waits) >= len(expected) - run.left_out("contention_", "mmap_lock_")
    exits = of_kind(run.recorded.events, "ksm_exit")
    assert len(exits) >= len(children)


def test_r14_breaks_that_another_task_made_long(run):
    slow = sum(seconds > 0.01 for _, seconds, _ in run.witness["kernel"]["breaks"])
    # The kernel's own event begins before ours: in between the CPU may be taken, too.
    assert 0 < run.races["R14"].times <= slow


def test_r15_an_unmerge_that_a_signal_ends(run):
    interrupted = run.witness["interrupted"]
    assert interrupted["interrupted"], f"no writer of 2 was still unmerging in {PATIENCE_S} s"
    assert interrupted["shared"] > 0
    assert run.races["R15"].times == 1
    assert f"ended with {ERESTARTSYS}" in run.races["R15"].evidence[0]


def test_r17_ksmd_cannot_undo_a_merge_where_a_memcg_is_full(run):
    failed = sum(
        pid == run.ksmd and err == ENOMEM for pid, _, err in run.witness["kernel"]["breaks"]
    )
    assert run.races["R17"].times == failed > 0
    assert run.witness["failed"]["max"] > 0
    assert run.witness["failed"]["shared"] == 0  # KSM pages that no counter knows


def test_r3_and_r23_the_bits_of_seqnr_come_round_and_no_item_is_old(run):
    assert run.witness["wrap"]["passes"] > 256
    for name in ("R3", "R23"):
        assert run.races[name].verdict == "not seen", name
    ages = re.search(r"the oldest of age (\d+)", run.races["R3"].evidence[0])
    assert ages
    assert int(ages[1]) <= 1


def test_r16_and_r24_ksmd_scans_what_is_there_and_sleeps_without(run):
    idle = run.witness["idle"]
    assert idle["passes"] == 0
    assert idle["ksmd_cpu_ns"] < 0.05 * (idle["end_ns"] - idle["begin_ns"])
    assert run.races["R24"].verdict == "not seen"
    absent = any(sample.ksm["pages_scanned"] is None for sample in run.recorded.samples)
    assert run.races["R16"].verdict == ("cannot be seen" if absent else "not seen")
