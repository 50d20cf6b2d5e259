"""The table of races; its detectors over real recordings, some with a fault added."""

import json

import numpy as np
import pytest

from ksmtrace.analysis.contention import df_waits
from ksmtrace.analysis.races import RACES, df_walks, find_races, walks_by_sharers
from ksmtrace.analysis.recorded import Recorded
from ksmtrace.analysis.report import make_report
from ksmtrace.cli.sections.locks import lines as lock_lines
from ksmtrace.cli.sections.races import lines
from ksmtrace.events import EVENT_DTYPE, KIND_BY_NAME, Lock, LockFlag, concatenate

UNSTABLE_FLAG = 0x100


def race(recorded: Recorded, name: str):
    (found,) = [one for one in find_races(recorded) if one.id == name]
    return found


def of(recorded: Recorded, kind: str) -> np.ndarray:
    return np.flatnonzero(recorded.events["kind"] == KIND_BY_NAME[kind].number)


def add(recorded: Recorded, kind: str, **fields: int) -> None:
    """Add an event as the kernel would send it, and the plan's word that it can be seen."""
    event = np.zeros(1, EVENT_DTYPE)
    event["kind"] = KIND_BY_NAME[kind].number
    event["ts_ns"] = recorded.events["ts_ns"].max() + 1
    for name, value in fields.items():
        event[name] = value
    recorded.events = concatenate([recorded.events, event])
    recorded.header.plan[:] = [e for e in recorded.header.plan if e["event"] != kind]
    recorded.header.plan.append({"event": kind, "rung": "fentry"})


def test_the_table_is_the_catalogue():
    assert [one.id for one in RACES] == [f"R{number}" for number in range(1, 26)]
    for one in RACES:
        assert bool(one.blind) is (one.detect is None), one.id
        assert set(one.needs) <= set(KIND_BY_NAME)
        assert one.source
        assert not one.fault or one.detect


@pytest.mark.parametrize("name", ["contended-storm", "guest-7.x-fork-every-page", "guest-5.10-cow"])
def test_every_race_has_a_verdict_and_its_reason(golden, name):
    found = find_races(golden(name))
    for one in found:
        assert (one.times is None) is (one.verdict == "cannot be seen") is bool(one.why_not)
        assert bool(one.times) is (one.verdict == "seen")
    # No fault was seen on any kernel.
    assert not [one.id for one in found if one.fault and one.times]
    content = json.loads(json.dumps(make_report(golden(name)), allow_nan=False))
    assert len(content["races"]) == 25
    text = "\n".join(lines(content, True))
    assert all(f"  {one.id} " in text for one in RACES)
    assert "A FAULT" not in text


def test_r8_r11_and_not_r9_and_r10(golden):
    knobs, storm = golden("contended-knobs"), golden("contended-storm")
    assert race(knobs, "R8").times == len(of(knobs, "lock_wait"))
    assert race(knobs, "R11").times == race(knobs, "R9").times == race(knobs, "R10").times == 0
    ksmd = storm.header.facts["ksmd_pid"]
    waits = storm.events[of(storm, "lock_wait")]
    by_storm = (waits["pid"] != ksmd) & (waits["lock"] == 1)
    assert race(storm, "R11").times == by_storm.sum() > 0
    assert "python" in race(storm, "R11").evidence[0]


@pytest.mark.parametrize(("name", "lock"), [("R9", "contended-knobs"), ("R10", "contended-storm")])
def test_an_exiting_task_that_waits(golden, name, lock):
    recorded = golden(lock)
    ksmd = recorded.header.facts["ksmd_pid"]
    (first, *_) = [
        at
        for at in of(recorded, "lock_wait")
        if recorded.events["pid"][at] != ksmd
        and recorded.events["lock"][at] == (0 if name == "R9" else 1)
    ]
    recorded.events["lock_flags"][first] |= LockFlag.EXITING
    assert (race(recorded, name).verdict, race(recorded, name).times) == ("seen", 1)


def test_r10_takes_the_holds_of_mmap_locks_or_a_program_on_the_exit(golden):
    recorded = golden("contended-storm")
    plan = {entry["event"]: entry for entry in recorded.header.plan}
    assert race(recorded, "R10").times == 0
    plan["lock_hold"]["missing_fields"] = {"lock_address": "too dear here"}
    assert "itself been the last to read" in race(recorded, "R10").why_not
    plan["lock_wait"]["target"] += ", fentry/fexit:__ksm_exit"
    assert race(recorded, "R10").times == 0


def test_r1_is_counted_with_and_without_events(golden):
    recorded = golden("guest-7.x-fork-every-page")
    assert race(recorded, "R1").times == 0
    recorded.losses[-1].counted["stable_tree_search.busy"] = 3
    assert race(recorded, "R1").times == 3
    assert "takes stable_tree_search" in race(golden("cow"), "R1").why_not


def test_r3_an_item_two_passes_old(golden):
    recorded = golden("guest-6.12-witnessed")
    assert race(recorded, "R3").times == 0
    unstable = [
        at for at in of(recorded, "cmp_and_merge_page")
        if recorded.events["flags_before"][at] & UNSTABLE_FLAG
    ]  # fmt: skip
    before = int(recorded.events["flags_before"][unstable[-1]])
    recorded.events["flags_before"][unstable[-1]] = before & ~0xFF | (before - 3) & 0xFF
    assert race(recorded, "R3").times == 1


def test_r3_and_r23_take_every_page(golden):
    counted = golden("guest-6.12-pinned-derived")
    for name in ("R3", "R23"):
        assert "record --every-page" in race(counted, name).why_not


def test_r4_a_stable_node_left_behind(golden):
    recorded = golden("guest-7.x-moves")
    moved = of(recorded, "ksm_migrate_page")
    assert race(recorded, "R4").times == 0 < len(moved)
    recorded.events["kpfn_after"][moved[0]] += 1
    assert race(recorded, "R4").times == 1


def test_r12_a_merge_after_the_exit(golden):
    recorded = golden("guest-6.1-lifetime")
    assert race(recorded, "R12").times == 0
    last = recorded.events[of(recorded, "ksm_exit")[-1]]
    add(recorded, "try_to_merge_one_page", mm=last["mm"])
    assert race(recorded, "R12").times == 1


def test_r12_a_merge_that_is_told_of_when_the_lock_is_released(golden):
    recorded = golden("guest-6.1-lifetime")
    last = recorded.events[of(recorded, "ksm_exit")[-1]]
    add(recorded, "ksm_merge_with_ksm_page", mm=last["mm"])
    assert race(recorded, "R12").times == 0


def test_r23_a_place_in_memory_that_another_item_has_is_not_the_same_item(golden):
    recorded = golden("guest-7.x-fork-every-page")
    first = recorded.events[of(recorded, "cmp_and_merge_page")[0]].copy()
    for passes, more, times in (
        (300, {"mm": 7, "flags_before": UNSTABLE_FLAG}, 0),
        (300, {"flags_before": 0}, 0),  # allocated anew: in no tree yet
        (600, {"flags_before": UNSTABLE_FLAG}, 1),
    ):
        add(recorded, "ksm_start_scan", seq=int(of_seq(recorded)[-1]) + passes)
        add(recorded, "cmp_and_merge_page", **item(first) | more)
        assert race(recorded, "R23").times == times


def of_seq(recorded: Recorded) -> np.ndarray:
    return recorded.events["seq"][of(recorded, "ksm_start_scan")]


def item(visit: np.void) -> dict[str, int]:
    return {name: int(visit[name]) for name in ("rmap_item", "mm", "address")}


def test_r14_r15_r17_and_r20_by_their_events(golden):
    recorded = golden("guest-7.x-moves")
    ksmd = recorded.header.facts["ksmd_pid"]
    before = {name: race(recorded, name).times for name in ("R14", "R15", "R17")}
    add(recorded, "break_ksm", duration_ns=99_000_000, task_pid=ksmd, err=-12)
    add(recorded, "run_store", run=2, err=-512, duration_ns=5)
    after = {name: race(recorded, name).times for name in before}
    assert after == {name: times + 1 for name, times in before.items()}

    assert "absent" in race(recorded, "R20").why_not
    add(recorded, "ksm_memory_callback", action=2)
    add(recorded, "ksm_memory_callback", action=4)
    found = race(recorded, "R20")
    assert found.times == 1
    assert "then offline" in found.evidence[0]


def test_r20_by_the_numbers_that_this_kernel_gives_to_actions(golden):
    recorded = golden("guest-7.x-moves")
    recorded.header.facts["memory_actions"] = {
        "MEM_GOING_OFFLINE": 1, "MEM_OFFLINE": 2, "MEM_CANCEL_OFFLINE": 5
    }  # fmt: skip
    add(recorded, "ksm_memory_callback", action=1)
    add(recorded, "ksm_memory_callback", action=5)
    found = race(recorded, "R20")
    assert found.times == 1
    assert "then called off" in found.evidence[0]


def test_r16_and_r24_need_a_ksmd_that_does_not_do_what_it_should(golden):
    recorded = golden("contended-knobs")
    assert (race(recorded, "R16").times, race(recorded, "R24").times) == (0, 0)
    first, last = recorded.samples[0], recorded.samples[-1]
    for sample in recorded.samples:
        sample.ksm["run"] = 1
        sample.ksm["pages_scanned"] = first.ksm["pages_scanned"]
        sample.processes.clear()
        sample.processes[4711] = {"ksm_mergeable": "yes"}
    object.__setattr__(last, "begin_ns", first.end_ns + 9_000_000_000)
    assert race(recorded, "R16").times == 1

    for sample in recorded.samples:
        sample.processes.clear()
        for name in ("pages_shared", "pages_unshared", "pages_volatile"):
            sample.ksm[name] = 0
    last.ksmd["cpu_ns"] = first.ksmd["cpu_ns"] + 4_000_000_000
    found = {name: race(recorded, name).times for name in ("R16", "R24")}
    assert found == {"R16": 0, "R24": 1}


def test_r19_pages_that_change_their_node(golden):
    recorded = golden("guest-7.x-moves")
    assert race(recorded, "R19").times == 0
    for sample in recorded.samples:
        sample.ksm["merge_across_nodes"] = 0
    assert race(recorded, "R19").times == 7


def test_r25_walks_by_the_number_of_sharers(golden):
    recorded = golden("guest-7.x-moves")
    for sharers, duration_ns in ((1, 900), (300, 70_000), (5000, 1_300_000)):
        add(recorded, "rmap_walk_ksm", sharers=sharers, duration_ns=duration_ns, pfn=7)
    found = race(recorded, "R25")
    assert found.times == 1
    assert len(found.evidence) == 3
    assert df_walks(recorded)["sharers"].tolist() == [1, 300, 5000]


def test_walks_are_told_by_powers_of_two_of_sharers(golden):
    recorded = golden("contended-storm")
    for sharers, duration_ns in ((-1, 5), (0, 7), (1, 11), (2, 13), (3, 17), (4, 19)):
        add(recorded, "rmap_walk_ksm", sharers=sharers, duration_ns=duration_ns, pfn=7)
    table = walks_by_sharers(recorded)
    assert table[["from", "below", "walks", "longest_ns", "total_ns"]].to_numpy().tolist() == [
        [0, 1, 1, 7, 7], [1, 2, 1, 11, 11], [2, 4, 2, 17, 30], [4, 8, 1, 19, 19]
    ]  # fmt: skip
    content = json.loads(json.dumps(make_report(recorded), allow_nan=False))
    text = "\n".join(lock_lines(content, False))
    assert "2 to 3      2     30 ns   15 ns  16 ns    17 ns" in text


def test_a_pages_lock_is_held_by_who_walks_over_its_mappings_or_merges_it(golden):
    recorded = golden("guest-7.x-moves")
    merged = recorded.events[of(recorded, "ksm_merge_with_ksm_page")]
    (page, pfn, *_) = next(
        (int(one["ksm_page"]), int(one["pfn"])) for one in merged if one["ksm_page"] and one["pfn"]
    )
    end_ns = int(recorded.events["ts_ns"].max())
    size, ksmd = (recorded.header.facts[name] for name in ("page_struct_bytes", "ksmd_pid"))
    add(recorded, "rmap_walk_ksm", ts_ns=end_ns + 900, duration_ns=700, pfn=pfn, pid=77)
    add(recorded, "try_to_merge_one_page", ts_ns=end_ns + 900, duration_ns=700, pfn=pfn + 3)
    for address, begun_ns in (
        (page, 300),
        (page, 1000),
        (page + 3 * size, 300),
        (page + size, 300),
    ):
        add(
            recorded, "__folio_lock", ts_ns=end_ns + begun_ns + 5000, duration_ns=5000,
            lock_address=address, lock=Lock.FOLIO,
        )  # fmt: skip
    waits = df_waits(recorded)
    assert waits["holder_pid"].tolist() == [77, 0, ksmd, 0]
    assert waits["holder_by"].fillna("").tolist() == ["walk", "", "merge", ""]


def test_look_ups_that_were_long_are_waits_for_a_reference_count(golden):
    recorded = golden("guest-7.x-moves")
    add(
        recorded, "get_ksm_page", lock=Lock.REFCOUNT, lock_address=7, duration_ns=31_000,
        pid=recorded.header.facts["ksmd_pid"],
    )  # fmt: skip
    slots = [0] * 64
    slots[9], slots[15] = 1013, 1
    recorded.losses[-1].histograms["get_ksm_page_ns"] = slots
    recorded.losses[-1].counted.update(
        {"wait_ns.refcount.times": 1, "wait_ns.refcount.total": 31_000,
         "wait_ns.refcount.worst": 31_000}
    )  # fmt: skip
    content = json.loads(json.dumps(make_report(recorded), allow_nan=False))
    refcount = content["contention"]["refcount"]
    assert (refcount["waits"], refcount["worst"][0]["duration_ns"]) == (1, 31_000)
    assert content["lookups"]["calls"] == 1014
    text = "\n".join(lock_lines(content, False))
    assert "1,014 look-ups of a stable_node's page (get_ksm_page): median < 512 ns" in text


def test_r24_leaves_out_what_comes_and_goes_between_two_samples(golden):
    recorded = golden("contended-knobs")
    first, last = recorded.samples[0], recorded.samples[-1]
    for sample in recorded.samples:
        sample.processes.clear()
        sample.ksm.update(run=1, pages_shared=0, pages_unshared=0, pages_volatile=0)
        sample.ksmd["cpu_ns"] = sample.begin_ns
    recorded.events = recorded.events[:0]
    assert last.begin_ns - first.end_ns > 1_000_000_000
    assert race(recorded, "R24").times == 1
    for sample in recorded.samples[1:]:
        event = np.zeros(1, EVENT_DTYPE)
        event["kind"], event["ts_ns"] = KIND_BY_NAME["ksm_exit"].number, sample.begin_ns - 1
        recorded.events = concatenate([recorded.events, event])
    assert race(recorded, "R24").times == 0


def test_losses_make_a_not_seen_unknown(golden):
    recorded = golden("contended-knobs")
    recorded.losses[-1].dropped["lock_wait"] = 1
    assert race(recorded, "R9").verdict == "cannot be seen"
    assert race(recorded, "R8").verdict == "seen"
