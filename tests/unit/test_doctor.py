import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from ksmtrace.capture.hooks import DERIVED, FENTRY, HOOKS, KPROBE, RUNGS, TRACEPOINT
from ksmtrace.capture.plan import make_plan
from ksmtrace.capture.sites import shipped_recipes
from ksmtrace.cli.doctor import doctor, doctor_json, doctor_text
from ksmtrace.events import KINDS
from ksmtrace.kernel import sysfs
from ksmtrace.kernel.facts import read_facts
from ksmtrace.kernel.probes import KpfProbe, LoadProbe

TREES = Path(__file__).parents[1] / "golden/trees"
MEMORY = LoadProbe(True, "by a BPF program, with addresses from the code of mm/ksm.c")


def text(facts, without=(), recipe=None) -> str:
    return doctor_text(facts, make_plan(facts, recipe, without=without), MEMORY)


def section(output: str, title: str) -> list[str]:
    """Return the lines of one section, without its title."""
    (found,) = [part for part in output.split("\n\n") if part.startswith(title)]
    return found.splitlines()[1:]


@pytest.fixture(scope="module")
def capable():
    return replace(read_facts(TREES / "6.18h"), bcc_installed=True)


@pytest.fixture(scope="module")
def guest():
    """A kernel without tracepoints of KSM, and with all that functions need."""
    works = dict.fromkeys(
        ("raw_tracepoint", "kernel_read", "fentry", "kprobe"), LoadProbe(True, "loaded")
    )
    return replace(read_facts(TREES / "6.1"), bcc_installed=True, loading=works)


RECIPE = next(recipe for recipe in shipped_recipes() if recipe.release.startswith("6.1."))


def test_a_capable_kernel_in_text(capable):
    lines = text(capable).splitlines()
    caught = sum(event.rung != "absent" for event in make_plan(capable).events)

    assert lines[:2] == ["Can record?", f"  yes: {caught} of {len(KINDS)} kinds of event"]
    assert caught > 9
    assert "  release         6.18.44-fc-v595  x86_64" in lines
    assert "  CPUs            2 (0-1)" in lines
    assert any(line.split()[:2] == ["pages_sharing", "96"] for line in lines)
    assert any(line.split()[-2:] == ["bytes", "gauge"] for line in lines)


@pytest.mark.parametrize("without", [(), (FENTRY,), (DERIVED,), (FENTRY, KPROBE)])
def test_the_plan_is_one_aligned_row_per_event(guest, without):
    plan = make_plan(guest, without=without)
    head, *lines = section(text(guest, without), "Plan")
    rung, on = head.index("rung"), head.index("on")

    rows = [line for line in lines if line[2:].strip() and not line[:on].isspace()]
    assert [row[:rung].strip() for row in rows] == [kind.name for kind in KINDS]
    for row, event in zip(rows, plan.events, strict=True):
        assert row[rung:on].strip() == event.rung
        assert row[on - 1] == " "
        target = row[on:].strip()
        assert f":{target}" in (event.target or "absent:-")
    for line in lines:
        assert line in rows or line[on:].startswith("without ")


def test_what_is_derived_or_inlined_is_explained_and_nothing_else(guest):
    plan = make_plan(guest, RECIPE)
    lines = section(text(guest, recipe=RECIPE), "How the derived and the inlined are told")

    told = [line.strip().partition(":")[0] for line in lines if not line.startswith("    ")]
    assert told == [
        event.event for event in plan.events if event.rung in ("derived", "inlined site")
    ]
    assert "stable_tree_search" in told
    assert "How the derived" not in text(guest, without=(FENTRY, KPROBE))


@pytest.mark.parametrize("recipe", [None, RECIPE])
def test_every_program_is_listed_once(guest, recipe):
    plan = make_plan(guest, recipe)
    listed = " ".join(section(text(guest, recipe=recipe), "Programs"))

    found = []
    for match in re.finditer(
        r"((?:(?:fentry|fexit|kprobe|raw_tracepoint)(?:, )?)+): ([^:]*)(?=  |$)", listed
    ):
        hows, targets = match[1].split(", "), match[2].split(", ")
        found += [(how, target.strip()) for how in hows for target in targets]
    wanted = [
        (made.how, made.target + (f"+{made.offset:#x}" if made.offset else ""))
        for made in plan.attachments
    ]
    assert sorted(found) == sorted(wanted)


@pytest.mark.parametrize("columns", [80, 110])
@pytest.mark.parametrize("without", [(), (FENTRY,), (FENTRY, KPROBE), ("tracepoint",)])
@pytest.mark.parametrize("tree", ["5.10", "6.1", "6.12", "6.18h"])
def test_no_line_is_longer_than_the_terminal(monkeypatch, guest, tree, without, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    facts = replace(read_facts(TREES / tree), loading=guest.loading)

    lines = text(facts, without, RECIPE).splitlines()
    assert [line for line in lines if len(line) > columns] == []


def test_a_reason_shared_by_many_events_is_said_once(guest):
    refused = LoadProbe(False, "loading a program: EPERM")
    facts = replace(guest, loading={"fentry": refused, "kprobe": refused})
    output = " ".join(text(facts).split())

    hint = "fentry programs do not work here: loading a program: EPERM"
    # Once where there is a tracepoint's absence beside it, once where a watchpoint would do, and
    # once where neither; and the verdict.
    assert output.count(hint) == 4
    last = " ".join(" ".join(section(text(facts), "What cannot be seen")).split())
    for kind in KINDS:
        if HOOKS[kind.name] and HOOKS[kind.name][0].rung == TRACEPOINT:
            continue  # tracepoints of other groups are there
        assert kind.name in last.partition(" - a single sharer")[0]


def test_it_ends_with_what_cannot_be_seen_and_what_would_change_that(capable):
    sections = text(capable).split("\n\n")

    assert sections[-1].startswith("What cannot be seen here, and what would change that")
    assert len(make_plan(capable).unseen) == sections[-1].count("    why:    ")
    assert len(make_plan(capable).unseen) == sections[-1].count("    change: ")


def test_a_kernel_that_cannot_be_recorded_says_first_why_and_what_to_do():
    facts = replace(read_facts(TREES / "6.1"), bcc_installed=False)
    lines = text(facts, without=(FENTRY, KPROBE)).splitlines()

    assert lines[1] == "  no:"
    assert lines[2].startswith("  - no event can be caught: this kernel has no tracepoint")
    assert "    do: apt install python3-bpfcc" in lines
    assert any("ksm_zero_pages" in line and "absent" in line for line in lines)


def test_fields_that_will_be_missing_are_named_below_their_event(capable):
    facts = replace(capable, offsets={**(capable.offsets or {}), "mm_struct.owner": None})
    lines = text(facts).splitlines()

    enter = next(i for i, line in enumerate(lines) if line.split()[:1] == ["ksm_enter"])
    assert lines[enter + 1].split() == ["without", "pid"]
    unseen = " ".join(" ".join(section(text(facts), "What cannot be seen")).split())
    assert "- pid of ksm_enter, " in unseen
    assert "why: this kernel has no mm_struct.owner" in unseen


def test_what_was_tried_and_what_could_not_be_read_are_shown(capable):
    facts = replace(
        capable,
        loading={"fentry": LoadProbe(False, "loading a program: EPERM")},
        kpf_ksm=KpfProbe(False, "set for every page"),
        ksm=None,
        unknown={"ksm": "closed"},
    )
    output = text(facts)

    assert "  fentry programs  does not work: loading a program: EPERM" in output
    assert "  KPF_KSM          not to be trusted: set for every page" in output
    assert "  kernel memory    readable: by a BPF program" in output
    assert "Not readable\n  ksm  closed" in output


def test_files_of_a_future_kernel_are_shown(capable):
    assert "  pages_dreamt_of" in text(replace(capable, ksm_others=("pages_dreamt_of",)))


@pytest.mark.parametrize("kernel", ["5.10", "6.1", "6.12", "6.18h"])
def test_json_has_the_promised_keys(kernel):
    facts = read_facts(TREES / kernel)
    plan = make_plan(facts)
    plain = json.loads(doctor_json(facts, plan, MEMORY))

    assert plain["can_record"] is plan.can_record
    assert plain["kernel"]["release"] == facts.kernel.release
    assert [event["event"] for event in plain["plan"]] == [kind.name for kind in KINDS]
    assert {"event", "rung", "target", "reason"} <= set(plain["plan"][0])
    assert {event["rung"] for event in plain["plan"]} <= set(RUNGS)
    assert len(plain["unseen"]) == len(plan.unseen)
    assert {"what", "why", "change"} == set(plain["unseen"][0])
    assert set(plain["facts"]["ksm"]) == {file.name for file in sysfs.FILES}
    assert plain["defines"] == plan.defines
    assert plain["kernel_memory"] == {"readable": True, "reason": MEMORY.reason}


def test_the_command_prints_json_of_the_running_kernel():
    result = CliRunner().invoke(doctor, ["--json"])
    plain = json.loads(result.stdout)

    assert plain["kernel"]["release"] == os.uname().release
    assert result.exit_code == (0 if plain["can_record"] else 3)


def test_rungs_can_be_left_out():
    result = CliRunner().invoke(
        doctor, ["--json", "--without", "tracepoint", "--without", "fentry"]
    )
    rungs = {event["rung"] for event in json.loads(result.stdout)["plan"]}

    assert not rungs & {"tracepoint", "fentry"}
    assert CliRunner().invoke(doctor, ["--without", "absent"]).exit_code == 2


def test_the_command_is_useful_without_root():
    code = "from ksmtrace.cli.doctor import doctor; doctor()"
    other = {"user": 65534, "group": 65534, "extra_groups": []} if os.geteuid() == 0 else {}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **other)

    assert run.returncode == 3, run.stderr
    assert run.stderr == ""
    assert "do: run as root, or with CAP_BPF and CAP_PERFMON" in run.stdout
    assert f"release         {os.uname().release}" in run.stdout
    assert re.search(r"loading +not tried", run.stdout)
    assert "pages_sharing" in run.stdout
    assert "What cannot be seen here" in run.stdout


def test_help_has_an_example():
    result = CliRunner().invoke(doctor, ["--help"])

    assert result.exit_code == 0
    assert "Example: ksmtrace doctor --json" in result.stdout
