"""Waits for locks and ksmd's holds, from recordings of the running kernel."""

import json

import numpy as np
import pytest

from ksmtrace.analysis.contention import df_holds, df_waits, find_contention
from ksmtrace.analysis.report import make_report
from ksmtrace.cli.sections.locks import lines
from ksmtrace.events import KIND_BY_NAME, Lock


def test_the_tallies_are_those_of_the_events(golden):
    for name in ("contended-knobs", "contended-storm"):
        recorded = golden(name)
        waits = df_waits(recorded)
        assert len(waits) == recorded.count("lock_wait") > 0
        for lock, found in find_contention(recorded).items():
            rows = waits[waits["lock"] == lock]
            if lock in ("folio", "refcount"):
                assert found.waits is None  # functions', of which there were no programs
                continue
            assert found.waits == len(rows)
            assert found.total_wait_ns == rows["duration_ns"].sum()
            assert found.worst_wait_ns == (rows["duration_ns"].max() if len(rows) else 0)
            if len(rows):
                assert sum(count for _, _, count in found.wait_histogram.slots) == len(rows)
                assert sum(party.waits for party in found.waiters) == len(rows)
            else:
                assert found.wait_histogram is None


def test_a_knobs_writer_waits_for_ksmd(golden):
    found = find_contention(golden("contended-knobs"))["ksm_thread_mutex"]

    (waiter,), (holder,) = found.waiters, found.holders
    assert (waiter.comm, holder.comm) == ("python", "ksmd")
    assert waiter.waits == holder.waits == found.waits
    assert waiter.total_ns == found.total_wait_ns
    worst = found.worst[0]
    assert (worst.holder_by, worst.exclusive, worst.exiting) == ("owner", True, False)
    assert worst.stack[0].startswith("__mutex_lock")
    assert worst.stack[1].startswith("run_store+")
    assert not any(frame.startswith("bpf_") for frame in worst.stack)
    # ksmd held it at least as long as the longest wait for it.
    assert found.worst_hold_ns >= found.worst_wait_ns - 1_000_000
    assert [hold.waiters for hold in found.worst_holds[:3]] == [1, 1, 1]


def test_ksmd_and_a_storm_of_mmap_wait_for_each_other(golden):
    recorded = golden("contended-storm")
    waits = df_waits(recorded)
    waits = waits[waits["lock"] == "mmap_lock"]
    ksmd = recorded.header.facts["ksmd_pid"]

    of_ksmd, of_storm = waits[waits["pid"] == ksmd], waits[waits["pid"] != ksmd]
    assert len(of_ksmd) > 0 < len(of_storm)
    assert not of_ksmd["exclusive"].any()
    assert of_storm["exclusive"].all()
    assert (of_storm["holder_pid"] == ksmd).all()
    assert (of_storm["holder_by"] == "seen").all()
    assert set(of_ksmd["comm"]) == {"ksmd"}
    # One mm: the lock is at its place in it.
    assert waits["lock_address"].nunique() == 1
    holds = df_holds(recorded)
    assert set(holds["lock"]) == {"mmap_lock", "ksm_thread_mutex"}
    assert holds[holds["lock"] == "mmap_lock"]["waiters"].sum() <= len(of_storm)
    found = find_contention(recorded)["mmap_lock"]
    assert found.holds > len(holds)
    assert found.total_hold_ns >= holds[holds["lock"] == "mmap_lock"]["duration_ns"].sum()


def test_what_is_not_observable_is_none_and_says_why(golden):
    found = find_contention(golden("contended-knobs"))
    assert (found["anon_vma"].waits, found["anon_vma"].holds) == (0, None)
    assert "no tracepoint" in found["anon_vma"].why_not["holds"]

    old = find_contention(golden("cow"))
    for lock in old.values():
        assert (lock.waits, lock.holds, lock.worst) == (None, None, [])
        assert set(lock.why_not) == {"waits", "holds"}
    report = make_report(golden("cow"))
    assert report["contention"]["mmap_lock"]["waits"] is None
    assert list(lines(report, False)) == [
        "LOCKS: not visible here: the recording is older than this"
    ]


def test_holds_that_the_plan_left_out_have_its_reason(golden):
    recorded = golden("contended-knobs")
    (entry,) = [e for e in recorded.header.plan if e["event"] == "lock_hold"]
    entry["missing_fields"] = {"lock_address": "too dear here"}
    last = recorded.losses[-1]
    for name in [name for name in last.counted if name.startswith("hold_ns.mmap_lock")]:
        del last.counted[name]

    found = find_contention(recorded)
    assert found["mmap_lock"].holds is None
    assert found["mmap_lock"].why_not["holds"] == "too dear here"
    assert found["ksm_thread_mutex"].holds is not None


def test_an_exiting_waiter_is_told(golden):
    recorded = golden("contended-knobs")
    waits = recorded.events[recorded.events["kind"] == KIND_BY_NAME["lock_wait"].number]
    assert not (waits["lock_flags"] & 2).any()
    is_wait = np.flatnonzero(recorded.events["kind"] == KIND_BY_NAME["lock_wait"].number)
    recorded.events["lock_flags"][is_wait[0]] |= 2

    assert df_waits(recorded)["exiting"].tolist() == [True] + [False] * (len(waits) - 1)


@pytest.mark.parametrize("everything", [False, True])
def test_the_section_names_waiters_holders_and_places(golden, everything):
    content = json.loads(json.dumps(make_report(golden("contended-storm")), allow_nan=False))
    text = "\n".join(lines(content, everything))

    assert set(content["contention"]) == {lock.name.lower() for lock in Lock}
    assert "mmap_lock: waited: ksmd (" in text
    assert "mmap_lock: were waited for: python (" in text
    assert "to read, owned by python" in text
    assert "run_store" in text
    assert ("holds not visible" in text) is everything
