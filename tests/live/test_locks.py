"""Waits for locks on the running kernel, against the waiting program's own clock."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ksmtrace.events import concatenate, of_kind
from ksmtrace.stream import Batch

pytestmark = [pytest.mark.live, pytest.mark.usefixtures("clean")]

PROGRAM = (sys.executable, str(Path(__file__).parent / "contended.py"))


@pytest.fixture
def contended(live, tmp_path):
    """Record what the program does until both it and ksmd have waited, or just it.

    Returns what it measured, and of the report the locks and the races.
    """

    def run(what, *options):
        path = tmp_path / "f.ksmt"
        with (
            live.recording(path, *options) as recorder,
            subprocess.Popen(
                (*PROGRAM, what, "told"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            ) as program,
        ):
            # On a busy machine it takes a while until the two meet.
            live.wait_until(
                lambda: program.poll() is not None or waited(live.readable(path), program.pid, what)
            )
            assert program.poll() is None
            program.stdin.write("\n")
            program.stdin.flush()
            measured = json.loads(program.stdout.readline())
            recorder.end()
            program.stdin.close()
        content = live.report(path)
        # A lock may be contended while a program runs: the kernel leaves that one out, and says so.
        skipped = "the kernel left out the program on raw_tracepoint:contention_"
        assert [why for why in content["incomplete_because"] if not why.startswith(skipped)] == []
        races = {race["id"]: race for race in content["races"]}
        return measured | {"recorder": recorder.process.pid}, content["contention"], races

    return run


def waited(items, pid, what):
    batches = [item.events for item in items if isinstance(item, Batch)]
    waits = of_kind(concatenate(batches), "lock_wait")
    for_ksmd = waits[waits["pid"] == pid]
    by_ksmd = waits[waits["holder_pid"] == pid]
    return len(for_ksmd) and (what == "knobs" or len(by_ksmd))


def of(parties, pid):
    (found,) = [party for party in parties if party["pid"] == pid]
    return found


def test_a_knobs_writer_waits_for_ksmds_batch(contended):
    measured, locks, races = contended("knobs")
    mutex = locks["ksm_thread_mutex"]

    waiter = of(mutex["waiters"], measured["pid"])
    assert 0 < waiter["waits"] <= measured["calls"]
    # No wait is longer than the write in which it happened.
    assert waiter["worst_ns"] <= measured["worst_ns"]
    assert waiter["total_ns"] <= measured["total_ns"]
    (holder,) = [party for party in mutex["holders"] if party["comm"] == "ksmd"]
    assert holder["waits"] == waiter["waits"]
    for_ksmd = [wait for wait in mutex["worst"] if wait["pid"] == measured["pid"]]
    assert {wait["holder_by"] for wait in for_ksmd} == {"owner"}
    # Now and then ksmd finds the writer in its short hold.
    assert {party["comm"] for party in mutex["waiters"]} <= {"python", "ksmd"}
    assert sum(party["waits"] for party in mutex["waiters"]) == mutex["waits"]
    longest = mutex["worst"][0]
    assert longest["stack"][0].startswith("__mutex_lock")
    assert any(frame.startswith("run_store+") for frame in longest["stack"])
    assert longest["comm"] == "python"
    assert mutex["worst_wait_ns"] == longest["duration_ns"] == waiter["worst_ns"]
    # The mutex is held for the batch that the writer waited for.
    assert mutex["holds"] > 0
    assert mutex["worst_hold_ns"] > 0
    batches = [hold for hold in mutex["worst_holds"] if hold["waiters"]]
    assert batches
    assert races["R8"]["times"] == waiter["waits"]
    assert races["R9"]["verdict"] == races["R11"]["verdict"] == "not seen"


@pytest.mark.parametrize(
    ("options", "how"),
    # Its release is seen a moment before it is one.
    [(("--every-page",), {"seen", "last reader"}), ((), {"last reader"})],
    ids=["seen", "told"],
)
def test_a_storm_of_mmap_waits_for_ksmd_and_ksmd_for_it(contended, options, how):
    measured, locks, races = contended("storm", *options)
    lock = locks["mmap_lock"]

    stormer = of(lock["waiters"], measured["pid"])
    assert 0 < stormer["waits"] <= 2 * measured["calls"]  # a call maps and unmaps
    assert stormer["total_ns"] <= measured["total_ns"]
    assert stormer["worst_ns"] <= measured["worst_ns"]
    # The recorder's samples take the lock as well: /proc/PID/ksm_stat looks for mergeable areas.
    known = {measured["pid"], measured["recorder"], ksmd(lock)["pid"]}
    assert {wait["pid"] for wait in lock["worst"]} <= known
    for wait in lock["worst"]:
        if wait["pid"] == measured["pid"]:
            assert (wait["holder"], wait["exclusive"]) == ("ksmd", True)
            assert wait["holder_by"] in how
        else:
            assert wait["exclusive"] is False
    assert of(lock["holders"], measured["pid"])["waits"] <= ksmd(lock)["waits"]
    assert races["R11"]["times"] == stormer["waits"]
    if options:
        assert lock["holds"] > lock["waits"]
        assert lock["worst_hold_ns"] <= lock["total_hold_ns"]
    else:
        assert lock["holds"] is None
        assert "--every-page" in lock["why_not"]["holds"]


def ksmd(lock):
    (found,) = [party for party in lock["waiters"] if party["comm"] == "ksmd"]
    return found
