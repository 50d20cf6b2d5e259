"""Every page that ksmd comes to, one by one, on the running kernel."""

import contextlib
import fcntl
import os
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from ksmtrace.analysis.recorded import gather
from ksmtrace.capture.bcc_backend import Programs
from ksmtrace.capture.hooks import WATCHPOINT
from ksmtrace.capture.plan import make_plan
from ksmtrace.capture.sites import find_recipe
from ksmtrace.events import of_kind
from ksmtrace.kernel.bpf_calls import PERF_IOC_ENABLE, Calls
from ksmtrace.kernel.facts import add_variables, read_facts
from ksmtrace.kernel.sysfs import read_ksm
from ksmtrace.recording.reader import RecordingReader

pytestmark = [pytest.mark.live, pytest.mark.usefixtures("clean")]

PAGES = 101
KINDS = ("cmp_and_merge_page", "should_skip_rmap_item")
CASES = {
    "merged": ("duplicates", "--contents", "5"),
    "unique": ("unique",),
    "changing": ("volatile", "--passes", "4"),
    "skipped": ("volatile", "--passes", "14", "--smart-scan"),
    "written": ("cow", "--writes", "23"),
}


@pytest.fixture(scope="module")
def rungs() -> dict[str, str]:
    facts = add_variables(read_facts())
    plan = make_plan(facts, find_recipe(facts.kernel.build_id), every_page=True)
    found = {event.event: event.rung for event in plan.events if event.event in KINDS}
    if "absent" in found.values():
        why = f"ksmd cannot be followed here page by page: {found}"
        if os.environ.get("KSMTRACE_RUN_KERNEL_TESTS") == "1":
            pytest.fail(f"KSMTRACE_RUN_KERNEL_TESTS=1 allows no skip: {why}")
        pytest.skip(why)
    return found


def mergeable(pid: int) -> set[int]:
    """Return the addresses of all pages that are registered, as the kernel lists them."""
    found: set[int] = set()
    begin = end = 0
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if area := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            begin, end = (int(number, 16) for number in area.groups())
        elif line.startswith("VmFlags:") and " mg" in line:
            found.update(range(begin, end, 4096))
    return found


@pytest.mark.parametrize("case", CASES)
def test_every_page_is_told_of_once(live, tmp_path, rungs, case):
    name, *options = CASES[case]
    path = tmp_path / "f.ksmt"
    with live.recording(path, "--every-page") as recorder:
        before = read_ksm()
        arguments = ("--processes", "2", "--pages", str(PAGES), *options)
        with live.holding(*live.workload(name, *arguments)) as outcome:
            assert outcome["ok"] is True, outcome
            after = read_ksm()
            assert after["run"] == 0
            areas = {process["pid"]: mergeable(process["pid"]) for process in outcome["processes"]}
            ended = recorder.end()
    assert (ended.status, ended.summary["lost"]) == (0, 0)
    recorded = gather(RecordingReader(path))
    assert recorded.why_incomplete() == []
    assert {kind: recorded.rung(kind) for kind in KINDS} == rungs

    visits, skips = (of_kind(recorded.events, kind) for kind in KINDS)
    assert len(visits) == after["pages_scanned"] - before["pages_scanned"] > 0
    nr_skipped = (after.get("pages_skipped") or 0) - (before.get("pages_skipped") or 0)
    assert len(skips) == nr_skipped
    assert (nr_skipped > 0) is ("--smart-scan" in options)
    # In every pass each page once, in the order of the addresses: looked at or skipped.
    assert {pid: len(area) for pid, area in areas.items()} == dict.fromkeys(areas, PAGES)
    both = np.concatenate([visits, skips])
    both = both[np.argsort(both["ts_ns"], kind="stable")]
    assert set(both["pid"].tolist()) == set(areas)
    for pid, area in areas.items():
        came_by = (both["address"][both["pid"] == pid] & ~np.uint64(0xFFF)).tolist()
        assert Counter(came_by) == dict.fromkeys(area, outcome["passes"])
        assert came_by == sorted(area) * outcome["passes"]

    content = live.report(path)
    counters = {entry["counter"]: entry for entry in content["counters"]}
    for counter in ("pages_scanned", "pages_skipped"):
        if counter in counters:
            assert (counters[counter]["difference"], counters[counter]["verdict"]) == (0, "exact")
    done = live.run("check", str(path))
    assert (done.returncode, "nothing violated" in done.stdout) == (0, True), done.stdout


def test_writes_at_which_the_kernel_left_out_the_program_are_counted(live, monkeypatch, rungs):
    if WATCHPOINT not in rungs.values():
        pytest.skip("no watchpoint is taken here")
    facts = add_variables(read_facts())
    plan = make_plan(facts, every_page=True)

    def scan() -> int:
        before = read_ksm()
        done = live.run("workload", "unique", "--processes", "1", "--pages", str(PAGES))
        assert done.returncode == 0, done.stderr
        return read_ksm()["pages_scanned"] - before["pages_scanned"]

    unseen = []
    attach = Calls.attach

    # As if the kernel had left it out each time: the writes are counted, and no program is run.
    def attach_late(calls: Calls, step: str, event: int, program: int) -> None:
        fcntl.ioctl(event, PERF_IOC_ENABLE, 0)
        unseen.append(scan())
        attach(calls, step, event, program)

    monkeypatch.setattr(Calls, "attach", attach_late)
    with contextlib.closing(Programs(plan.attachments, plan.defines, 1 << 20)) as programs:
        programs.begin()
        missed = programs.missed()["watchpoint:ksm_scan.rmap_list"]
        assert missed > unseen[0] > PAGES
        seen = scan()
        assert programs.missed()["watchpoint:ksm_scan.rmap_list"] == missed
        assert programs.counted()["cmp_and_merge_page"] == seen > PAGES
