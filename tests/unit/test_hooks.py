"""The ladder's tables, the C that they speak of, and the plan's defines fit together."""

import re
from pathlib import Path

import pytest

from ksmtrace.capture import plan as planning
from ksmtrace.capture.hooks import (
    ABSENT,
    COUNTS,
    DERIVED,
    FENTRY,
    FUNCTION_BY_BODY,
    FUNCTIONS,
    HISTOGRAM_SLOTS,
    HISTOGRAMS,
    HOOKS,
    LOCK_HISTOGRAMS,
    LOCK_SIDES,
    LOCK_TALLIES,
    RUNGS,
    SITE,
    SITE_ARGUMENTS,
    TRACEPOINT,
    WATCHPOINT,
)
from ksmtrace.cli.options import without_option
from ksmtrace.events import KIND_BY_NAME, KINDS
from ksmtrace.kernel import facts

BPF = Path(__file__).parents[2] / "bpf"
KSM_C = (BPF / "ksm.c").read_text()
FUNCTIONS_C = (BPF / "functions.c").read_text()
HOOKS_C = "".join(path.read_text() for path in sorted(BPF.glob("*.c")) if path.name != "ksm.c")
CODE = re.sub(r"/\*.*?\*/", "", KSM_C + HOOKS_C, flags=re.S)
ALL_HOOKS = [(name, hook) for name, hooks in HOOKS.items() for hook in hooks]

OFFERED = {
    *(*planning.OFFSET_DEFINES, *planning.SYMBOL_DEFINES, *planning.PAGE_DEFINES),
    *("KSMD_PID", "EVERY_PAGE", "NR_FUNCTIONS", "PG_HEAD"),
    *(f"{text}_{side}" for text in planning.TEXT_DEFINES for side in ("BEGIN", "END")),
    *(define for defines in planning.PTE_DEFINES.values() for define in defines),
    *(switch for _, hook in ALL_HOOKS for switch in hook.switches),
    *(f"WITH_{body.upper()}" for _, hook in ALL_HOOKS for body in hook.optional),
    *(f"EMIT_{name.upper()}" for name, hooks in HOOKS.items() if hooks),
}
"""Every define that a plan may have, but for those that a function brings with it."""


def test_every_kind_has_its_hooks():
    assert list(HOOKS) == [kind.name for kind in KINDS]
    for kind in KINDS:
        assert HOOKS[kind.name] or kind.has_tracepoint, kind.name


@pytest.mark.parametrize(("name", "hook"), ALL_HOOKS)
def test_a_hook_names_only_what_there_is(name, hook):
    numbers = {kind.name: kind.number for kind in KINDS}
    fields = KIND_BY_NAME[name].body

    assert hook.rung in (TRACEPOINT, FENTRY, SITE, WATCHPOINT, DERIVED)
    assert hook.functions or hook.sites or hook.tracepoints or hook.watches
    assert bool(hook.watches) is (hook.rung == WATCHPOINT)
    assert not hook.watches or (hook.every_page and hook.watches in planning.WATCHED)
    assert {*hook.builds_on} <= OFFERED
    assert not (hook.functions or hook.sites) or hook.rung != TRACEPOINT
    assert bool(hook.sites) is (hook.rung == SITE)
    assert {*hook.functions, *hook.page_functions, *hook.optional} <= set(FUNCTION_BY_BODY)
    assert set(hook.sites) <= set(SITE_ARGUMENTS)
    assert {*hook.page_fields, *(hook.lacks or {})} <= set(fields)
    assert all(numbers[before] < numbers[name] for before in hook.kinds)
    assert {*hook.defines, *hook.switches} <= OFFERED
    assert all(f"ON_TRACEPOINT({tracepoint})" in CODE for tracepoint in hook.tracepoints)
    assert set(hook.tracepoints) <= {*facts.NEIGHBOUR_TRACEPOINTS, *hook.kinds}
    assert hook.how


@pytest.mark.parametrize(("name", "hook"), [pair for pair in ALL_HOOKS if pair[1].rung == FENTRY])
def test_an_event_by_fentry_is_about_the_hooks_first_function(name, hook):
    if not KIND_BY_NAME[name].has_tracepoint and name != "merge_failure":
        assert hook.functions[0] == name


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.body)
def test_a_function_has_the_bodies_that_it_declares(function):
    defined = {
        way: f"{way}_{function.body}(u64 *args" in CODE.replace("\n", " ")
        for way in ("enter", "leave")
    }

    assert defined == {"enter": function.enters, "leave": function.leaves}
    assert function.enters or function.leaves
    assert set(function.names) <= set(facts.FUNCTIONS)
    assert set(function.defines) <= OFFERED
    assert function.keeps in ("", "noted", "call")
    assert function.leaves or not function.keeps
    assert function.enters or function.keeps != "noted"
    uses = [
        hook
        for _, hook in ALL_HOOKS
        if function.body in (*hook.functions, *hook.page_functions, *hook.optional)
    ]
    assert uses, "no hook takes it"


def test_every_body_belongs_to_a_function():
    bodies = set(re.findall(r"\b(enter|leave)_(\w+)\(u64 \*args", CODE))

    assert {body for _, body in bodies} == set(FUNCTION_BY_BODY)


def test_a_body_that_looks_at_its_call_is_given_one():
    for function in FUNCTIONS:
        found = re.search(rf"leave_{function.body}\(u64 \*args.*?\n}}", CODE, re.S)
        if found and "call->" in found[0]:
            assert function.keeps, function.body


def test_inlined_functions_have_an_entry_for_their_site():
    assert set(SITE_ARGUMENTS) == {body for _, hook in ALL_HOOKS for body in hook.sites}
    for body in SITE_ARGUMENTS:
        assert FUNCTION_BY_BODY[body].enters


def test_defines_are_those_that_the_programs_ask_about():
    asked = set(re.findall(r"defined\((\w+)\)", CODE)) | set(re.findall(r"#ifn?def (\w+)", CODE))
    asked -= set(re.findall(r"#define (\w+)", CODE))
    used = set(re.findall(r"\b[A-Z][A-Z0-9_]+\b", CODE))

    assert asked <= OFFERED
    assert used >= OFFERED, "a define that no program reads"
    switches = {define for define in OFFERED if define.startswith(("EMIT_", "EVERY_"))}
    assert switches <= asked


def test_functions_have_the_numbers_that_the_programs_ask_about():
    asked = re.findall(r"\b(FUNCTION|NARGS)_([a-z_]\w*)", CODE)

    assert {body for _, body in asked} <= set(FUNCTION_BY_BODY)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_what_functions_emit_has_a_switch(kind):
    emitted = f"begin({kind.name.upper()})" in HOOKS_C

    assert emitted is bool(HOOKS[kind.name])
    assert (f"EMIT_{kind.name.upper()}" in HOOKS_C) is emitted


def test_counts_and_histograms_are_in_the_order_of_their_maps():
    (counts,) = re.findall(r"enum \{\s+([^}]*),\s+NR_COUNTS,\s+\}", CODE)
    (histograms,) = re.findall(r"enum \{\s+([^}]*),\s+NR_HISTOGRAMS,\s+\}", CODE)

    assert re.split(r",\s+", counts) == [
        *("COUNT_VISITS", "COUNT_SKIPS", "COUNT_SEARCHES"),
        "COUNT_ZERO_PAGE_COWS = COUNT_SEARCHES + 4",
    ]
    assert [name.partition(".")[0] for name in COUNTS] == [
        *("cmp_and_merge_page", "smart_scan_skips"),
        *4 * ("stable_tree_search",),
        "do_wp_page",
    ]
    assert re.split(r",\s+", histograms) == [f"HISTOGRAM_{name.upper()}" for name in HISTOGRAMS]
    assert f"#define HISTOGRAM_SLOTS {HISTOGRAM_SLOTS}\n" in FUNCTIONS_C


def test_what_is_counted_of_locks_is_in_the_order_of_its_maps():
    (sides,) = re.findall(r"enum \{ ([^}]*), NR_LOCK_SIDES \}", CODE)
    (tallies,) = re.findall(r"enum \{ ([^}]*), NR_LOCK_TALLIES \}", CODE)

    assert sides.split(", ") == ["LOCK_WAITED", "LOCK_HELD"]
    assert LOCK_SIDES == ("wait_ns", "hold_ns")
    assert [name.partition("_")[2].lower() for name in tallies.split(", ")] == [
        *("times", "total_ns", "worst_ns")
    ]
    assert LOCK_TALLIES == ("times", "total", "worst")
    assert LOCK_HISTOGRAMS[:3] == (
        *("wait_ns.ksm_thread_mutex", "hold_ns.ksm_thread_mutex", "wait_ns.mmap_lock"),
    )
    assert f"#define LOCK_SLOTS {HISTOGRAM_SLOTS}\n" in CODE


def test_every_rung_but_the_last_can_be_left_out():
    option = without_option(lambda: None).__click_params__[0]

    assert list(option.type.choices) == [rung for rung in RUNGS if rung != ABSENT]
    assert (next(iter(RUNGS)), next(reversed(RUNGS))) == (TRACEPOINT, ABSENT)
