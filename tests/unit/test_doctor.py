import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from ksmtrace.capture.plan import make_plan
from ksmtrace.cli.doctor import doctor, doctor_json, doctor_text
from ksmtrace.kernel import sysfs
from ksmtrace.kernel.facts import read_facts
from ksmtrace.kernel.probes import KpfProbe, LoadProbe

TREES = Path(__file__).parents[1] / "golden/trees"


def text(facts) -> str:
    return doctor_text(facts, make_plan(facts))


@pytest.fixture(scope="module")
def capable():
    return replace(read_facts(TREES / "6.18h"), bcc_installed=True)


def test_a_capable_kernel_in_text(capable):
    lines = text(capable).splitlines()

    assert lines[:2] == ["Can record?", "  yes: 9 of 9 kinds of event"]
    assert "  release         6.18.44-fc-v595  x86_64" in lines
    assert "  CPUs            2 (0-1)" in lines
    assert any(line.split()[:2] == ["pages_sharing", "96"] for line in lines)
    assert any(line.split()[-2:] == ["bytes", "gauge"] for line in lines)


def test_tables_are_aligned(capable):
    lines = text(capable).splitlines()
    start = next(i for i, line in enumerate(lines) if line.split()[:2] == ["event", "rung"])
    column = lines[start].index("target")

    for line in lines[start + 1 : start + 10]:
        assert line[column:].startswith("raw_tracepoint:")
        assert line[column - 1] == " "


def test_it_ends_with_what_cannot_be_seen_and_what_would_change_that(capable):
    sections = text(capable).split("\n\n")

    assert sections[-1].startswith("What cannot be seen here, and what would change that")
    assert len(make_plan(capable).unseen) == sections[-1].count("    why:    ")
    assert len(make_plan(capable).unseen) == sections[-1].count("    change: ")


def test_a_kernel_that_cannot_be_recorded_says_first_why_and_what_to_do():
    lines = text(replace(read_facts(TREES / "6.1"), bcc_installed=False)).splitlines()

    assert lines[1] == "  no:"
    assert lines[2].startswith("  - no event can be caught: this kernel has no tracepoint")
    assert "    do: apt install python3-bpfcc" in lines
    assert any("ksm_zero_pages" in line and "absent" in line for line in lines)


def test_fields_that_will_be_missing_are_named_below_their_event(capable):
    facts = replace(capable, offsets={**(capable.offsets or {}), "mm_struct.owner": None})
    lines = text(facts).splitlines()

    enter = next(i for i, line in enumerate(lines) if line.split()[:1] == ["ksm_enter"])
    assert lines[enter + 1].split() == [
        "without",
        "pid",
        "this",
        "kernel",
        "has",
        "no",
        "mm_struct.owner",
    ]


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
    assert "Not readable\n  ksm  closed" in output


def test_no_line_is_needlessly_long(capable):
    sections = text(capable).split("\n\n")

    assert max(map(len, sections[-1].splitlines())) <= 110


def test_files_of_a_future_kernel_are_shown(capable):
    assert "  pages_dreamt_of" in text(replace(capable, ksm_others=("pages_dreamt_of",)))


@pytest.mark.parametrize("kernel", ["5.10", "6.1", "6.12", "6.18h"])
def test_json_has_the_promised_keys(kernel):
    facts = read_facts(TREES / kernel)
    plan = make_plan(facts)
    plain = json.loads(doctor_json(facts, plan))

    assert plain["can_record"] is plan.can_record
    assert plain["kernel"]["release"] == facts.kernel.release
    assert len(plain["plan"]) == 9
    assert {"event", "rung", "target", "reason"} <= set(plain["plan"][0])
    assert len(plain["unseen"]) == len(plan.unseen)
    assert {"what", "why", "change"} == set(plain["unseen"][0])
    assert set(plain["facts"]["ksm"]) == {file.name for file in sysfs.FILES}
    assert plain["defines"] == plan.defines


def test_the_command_prints_json_of_the_running_kernel():
    result = CliRunner().invoke(doctor, ["--json"])
    plain = json.loads(result.stdout)

    assert plain["kernel"]["release"] == os.uname().release
    assert result.exit_code == (0 if plain["can_record"] else 3)


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
