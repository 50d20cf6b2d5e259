import dataclasses
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from ksmtrace.capture import plan as planning
from ksmtrace.capture.plan import make_plan
from ksmtrace.events import KIND_BY_NAME, KINDS
from ksmtrace.kernel.facts import FUNCTIONS, OFFSETS, Facts, Tracepoint, read_facts
from ksmtrace.kernel.probes import KpfProbe, LoadProbe

TREES = Path(__file__).parents[1] / "golden/trees"
BPF = Path(__file__).parents[2] / "bpf/ksm.c"
WORKS = LoadProbe(True, "loaded, and attached")
REFUSED = LoadProbe(False, "loading a program: EPERM")


@pytest.fixture(scope="module")
def capable() -> Facts:
    """A kernel where all is well; every test takes one thing away."""
    facts = read_facts(TREES / "6.18h")
    assert facts.symbols is not None
    return replace(
        facts,
        bcc_installed=True,
        loading=dict.fromkeys(("raw_tracepoint", "kernel_read", "fentry", "kprobe"), WORKS),
        kpf_ksm=KpfProbe(True, "tried"),
        symbols=replace(facts.symbols, objects_listed=True),
        unknown={},
    )


def without(facts: Facts, field: str, key: str) -> Facts:
    """Set one key of a mapping among the facts to None."""
    return replace(facts, **{field: {**getattr(facts, field), key: None}})


def held(facts: Facts, **changes: object) -> Facts:
    assert facts.privileges is not None
    return replace(facts, privileges=replace(facts.privileges, **changes))


def entry(plan, event):
    (found,) = [item for item in plan.events if item.event == event]
    return found


def whats(plan) -> str:
    return "\n".join(what for what, _, _ in plan.unseen)


def test_where_all_is_well_every_event_is_caught(capable):
    plan = make_plan(capable)

    assert plan.can_record
    assert plan.blockers == ()
    assert [event.event for event in plan.events] == [kind.name for kind in KINDS]
    for event in plan.events:
        assert event.rung == "tracepoint"
        assert event.target == f"raw_tracepoint:{event.event}"
        assert event.missing_fields == {}
        assert "argument" in event.reason
    assert plan.defines == {
        "RMAP_ITEM_ADDRESS": 24,
        "MM_OWNER": 1296,
        "TASK_TGID": 1268,
        "MM_KSM_MERGING_PAGES": 1416,
        "MM_KSM_RMAP_ITEMS": 1424,
        "MM_KSM_ZERO_PAGES": 1432,
        "TASK_SUM_EXEC_RUNTIME": 232,
        "TASK_RUN_DELAY": 1016,
        "KSMD_PID": 37,
    }


def test_defines_are_those_that_the_program_asks_about(capable):
    asked = set(re.findall(r"defined\((\w+)\)|#ifdef (\w+)", BPF.read_text()))

    assert {first or second for first, second in asked} == set(make_plan(capable).defines)


@pytest.mark.parametrize("name", [kind.name for kind in KINDS])
def test_one_missing_tracepoint_costs_one_event(capable, name):
    assert capable.tracepoints is not None
    rest = {key: value for key, value in capable.tracepoints.items() if key != name}
    plan = make_plan(replace(capable, tracepoints=rest))

    lost = entry(plan, name)
    assert (lost.rung, lost.target) == ("absent", None)
    assert lost.reason == f"this kernel has no tracepoint {name}"
    assert [event.event for event in plan.events if event.rung == "absent"] == [name]
    assert plan.can_record
    assert f"event {name}" in whats(plan)


@pytest.mark.parametrize("name", [kind.name for kind in KINDS])
@pytest.mark.parametrize("difference", [-1, 1])
def test_a_tracepoint_with_other_arguments_is_refused_and_not_misread(capable, name, difference):
    count = len(KIND_BY_NAME[name].fields) + difference
    changed = {**(capable.tracepoints or {}), name: Tracepoint(count, "btf")}
    plan = make_plan(replace(capable, tracepoints=changed))

    lost = entry(plan, name)
    assert (lost.rung, lost.target) == ("absent", None)
    assert f"has {count} arguments here" in lost.reason


def test_no_ksm_tracepoint_at_all_blocks(capable):
    plan = make_plan(replace(capable, tracepoints={}))

    assert not plan.can_record
    ((what, remedy),) = plan.blockers
    assert "no event can be caught" in what
    assert "CONFIG_KSM" in remedy


def test_tracepoints_unknown_is_not_tracepoints_absent(capable):
    facts = replace(capable, tracepoints=None, unknown={"tracepoints": "nothing was readable"})
    plan = make_plan(facts)

    assert not plan.can_record
    for event in plan.events:
        assert event.rung == "absent"
        assert "unknown whether" in event.reason
        assert "nothing was readable" in event.reason


@pytest.mark.parametrize(
    ("member", "fields"),
    [
        ("ksm_rmap_item.address", {"address"}),
        ("mm_struct.owner", {"pid"}),
        ("task_struct.tgid", {"pid"}),
        ("mm_struct.ksm_merging_pages", {"ksm_merging_pages", "ksm_rmap_items"}),
        ("mm_struct.ksm_rmap_items", {"ksm_merging_pages", "ksm_rmap_items"}),
        ("mm_struct.ksm_zero_pages", {"ksm_zero_pages"}),
        ("task_struct.se.sum_exec_runtime", {"ksmd_cpu_ns", "ksmd_run_delay_ns"}),
        ("task_struct.sched_info.run_delay", {"ksmd_cpu_ns", "ksmd_run_delay_ns"}),
    ],
)
def test_one_missing_member_costs_the_fields_read_with_it(capable, member, fields):
    plan = make_plan(without(capable, "offsets", member))

    (define,) = [d for d, m in planning.OFFSET_DEFINES.items() if m == member]
    assert define not in plan.defines
    for event in plan.events:
        lost = fields & set(KIND_BY_NAME[event.event].in_place)
        assert set(event.missing_fields) == lost
        assert all(member in reason for reason in event.missing_fields.values())
    assert plan.can_record
    assert all(f"{field} of ksm_" in whats(plan) for field in fields)


def test_without_btf_events_lack_every_field_read_from_memory(capable):
    facts = replace(capable, btf=False, offsets=None, functions=None, unknown={"offsets": "no BTF"})
    plan = make_plan(facts)

    assert plan.can_record
    assert plan.defines == {"KSMD_PID": 37}
    for event in plan.events:
        in_place = set(KIND_BY_NAME[event.event].in_place) - {"comm"}
        assert set(event.missing_fields) == in_place
        assert all("no BTF" in reason for reason in event.missing_fields.values())


def test_without_a_visible_ksmd_its_context_is_unseen(capable):
    plan = make_plan(replace(capable, ksmd_pid=None))

    assert "KSMD_PID" not in plan.defines
    assert plan.can_record
    assert "whether an event happened in ksmd" in whats(plan)


def test_without_ksm_nothing_can_be_recorded(capable):
    plan = make_plan(replace(capable, ksm=None, unknown={"ksm": "built without KSM"}))

    assert not plan.can_record
    assert plan.blockers == (("built without KSM", "boot a kernel with CONFIG_KSM=y"),)


def test_without_privileges_the_plan_stands_and_recording_does_not(capable):
    plan = make_plan(held(replace(capable, loading=None), capabilities=(), euid=1000))

    assert not plan.can_record
    ((what, remedy),) = plan.blockers
    assert "may not load" in what
    assert "root" in remedy
    assert {event.rung for event in plan.events} == {"tracepoint"}


def test_unknown_privileges_block(capable):
    assert not make_plan(replace(capable, privileges=None)).can_record


def test_lockdown_blocks_only_where_it_forbids_reading(capable):
    assert make_plan(held(capable, lockdown="none")).can_record
    assert make_plan(held(capable, lockdown="integrity")).can_record
    plan = make_plan(held(capable, lockdown="confidentiality"))
    assert not plan.can_record
    assert ["lockdown" in what for what, _ in plan.blockers] == [True]


@pytest.mark.parametrize("kind", ["raw_tracepoint", "kernel_read"])
def test_programs_that_are_refused_catch_nothing(capable, kind):
    plan = make_plan(replace(capable, loading={**(capable.loading or {}), kind: REFUSED}))

    assert not plan.can_record
    assert {event.rung for event in plan.events} == {"absent"}
    assert all("EPERM" in event.reason for event in plan.events)
    ((what, _),) = plan.blockers
    assert "EPERM" in what


@pytest.mark.parametrize("kind", ["fentry", "kprobe"])
def test_programs_of_other_kinds_are_not_needed(capable, kind):
    plan = make_plan(replace(capable, loading={**(capable.loading or {}), kind: REFUSED}))

    assert plan.can_record


def test_without_bcc_nothing_can_be_recorded(capable):
    plan = make_plan(replace(capable, bcc_installed=False))

    assert not plan.can_record
    assert plan.blockers == (
        ("the Python module bcc is not installed", "apt install python3-bpfcc"),
    )


def test_every_gap_of_the_tracepoints_is_listed_with_cause_and_cure(capable):
    unseen = {what: (why, change) for what, why, change in make_plan(capable).unseen}

    for gap in planning.GAPS:
        why, change = unseen[gap.what]
        assert gap.why in why
        assert f"still known: {gap.still_known}" in why
        assert change


def test_gaps_name_known_functions_and_counters(capable):
    counters = {*(capable.ksm or {}), *(capable.vmstat or {})}
    for gap in planning.GAPS:
        assert set(gap.functions) <= set(FUNCTIONS)
        assert set(gap.counters) <= counters
        assert all(counter in gap.still_known for counter in gap.counters)


def cow(plan):
    (found,) = [item for item in plan.unseen if "(COW break)" in item[0]]
    return found


def test_a_counter_that_is_absent_is_not_called_known(capable):
    _, why, _ = cow(make_plan(without(capable, "vmstat", "cow_ksm")))

    assert "still known" not in why
    assert "this kernel has no cow_ksm" in why


def test_what_would_change_a_gap_depends_on_the_probes_that_work(capable):
    _, _, change = cow(make_plan(capable))
    assert "do_wp_page" in change
    assert "fentry and kprobe programs work here" in change

    neither = dict.fromkeys(("fentry", "kprobe"), REFUSED)
    _, _, change = cow(make_plan(replace(capable, loading={**(capable.loading or {}), **neither})))
    assert "here neither works" in change

    _, _, change = cow(make_plan(replace(capable, loading=None)))
    assert "not tried here" in change


def test_absent_counters_are_said_to_be_absent(capable):
    plan = make_plan(
        without(without(capable, "ksm", "general_profit"), "ksm_stat", "ksm_mergeable")
    )

    absent = [(what, why) for what, why, _ in plan.unseen if "absent, not 0" in why]
    assert [what for what, _ in absent] == [
        "/sys/kernel/mm/ksm/general_profit",
        "/proc/PID/ksm_stat ksm_mergeable",
    ]


def test_a_lying_page_flag_is_reported(capable):
    assert "kpageflags" not in whats(make_plan(capable))
    lying = make_plan(replace(capable, kpf_ksm=KpfProbe(False, "set for every page")))
    assert ("which page frames are KSM pages, from /proc/kpageflags", "set for every page") in [
        (what, why) for what, why, _ in lying.unseen
    ]
    untried = make_plan(replace(capable, kpf_ksm=None, unknown={"kpf_ksm": "not tried"}))
    assert "whether /proc/kpageflags tells the truth" in whats(untried)


def test_symbols_hidden_or_not_listed_are_reported(capable):
    assert capable.symbols is not None
    hidden = make_plan(replace(capable, symbols=replace(capable.symbols, hidden=True)))
    assert "addresses of the kernel's functions" in whats(hidden)
    unlisted = make_plan(replace(capable, symbols=replace(capable.symbols, objects_listed=False)))
    assert "variables at an event" in whats(unlisted)


def test_the_plan_as_json(capable):
    entries = make_plan(without(capable, "offsets", "mm_struct.owner")).as_json()

    assert json.loads(json.dumps(entries)) == entries
    assert {"event", "rung", "target", "reason", "missing_fields"} == set(entries[0])
    assert "pid" in entries[2]["missing_fields"]


@pytest.mark.parametrize("kernel", ["5.10", "6.1"])
def test_kernels_without_tracepoints_cannot_be_recorded_and_say_why(kernel):
    facts = replace(read_facts(TREES / kernel), bcc_installed=True)
    plan = make_plan(facts)

    assert not plan.can_record
    assert {event.reason for event in plan.events} == {
        f"this kernel has no tracepoint {kind.name}" for kind in KINDS
    }


def test_6_12_can_be_recorded_in_full():
    plan = make_plan(replace(read_facts(TREES / "6.12"), bcc_installed=True))

    assert plan.can_record
    assert all(event.missing_fields == {} for event in plan.events)


def test_every_define_has_an_offset_to_come_from():
    assert set(planning.OFFSET_DEFINES.values()) == set(OFFSETS)


def test_facts_and_plans_do_not_change(capable):
    for thing in (capable, make_plan(capable)):
        with pytest.raises(dataclasses.FrozenInstanceError):
            thing.can_record = False
