"""The workloads on the running kernel: KSM's work by independent witnesses, and every way out."""

import contextlib
import json
import mmap
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest

from ksmtrace.kernel.files import read_text
from ksmtrace.kernel.pages import (
    frame_numbers,
    has_flag,
    probe_kpf_ksm,
    read_kpageflags,
    read_pagemap,
)
from ksmtrace.kernel.procfs import iter_pids, read_smaps_ksm
from ksmtrace.kernel.sysfs import read_ksm
from ksmtrace.workload.kinds import KINDS
from ksmtrace.workload.knobs import SavedKnobs, read_knobs, restore
from ksmtrace.workload.ownership import lock_path

REQUIRED = os.environ.get("KSMTRACE_RUN_KERNEL_TESTS") == "1"
RUNNABLE = os.geteuid() == 0 and Path("/sys/kernel/mm/ksm/run").exists()

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(not RUNNABLE and not REQUIRED, reason="needs root and KSM"),
]

COMMAND = [sys.executable, "-c", "from ksmtrace.cli import main; main()", "workload"]
COUNTS = ("pages_shared", "pages_sharing", "pages_unshared", "pages_volatile", "ksm_zero_pages")


@pytest.fixture(autouse=True)
def unchanged_machine(kernel_lock: None) -> Iterator[None]:
    knobs = read_knobs()
    yield
    assert read_knobs() == knobs
    assert living_children() == []


def living_children() -> list[str]:
    found = []
    for pid in iter_pids():
        comm = read_text(f"/proc/{pid}/comm")
        status = read_text(f"/proc/{pid}/stat")
        # A zombie whose new parent has not looked yet has no memory any more.
        alive = status is not None and status.rpartition(")")[2].split()[0] != "Z"
        if alive and comm and re.match(r"ksm-(dup|uniq|vola|zero|fork|heir|cow)-", comm):
            found.append(comm)
    return found


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=300)


@contextlib.contextmanager
def running(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
        process.communicate(timeout=300)


def read_until(stream: IO[str] | None, text: str) -> str:
    assert stream is not None
    for line in stream:
        if text in line:
            return line
    raise AssertionError(f"the command ended without saying {text!r}")


def mapped(pid: int) -> tuple[int, int, set[int]]:
    """Count a process's mergeable pages that are KSM pages and zero pages; list the former."""
    ksm = zero = 0
    pfns_seen: set[int] = set()
    for mapping in read_smaps_ksm(pid) or ():
        if not mapping.mergeable:
            continue
        entries = read_pagemap(pid, mapping.start, mapping.end)
        assert entries is not None
        pfns = frame_numbers(entries)
        flags = read_kpageflags(pfns)
        is_ksm = has_flag(flags, "KSM")
        ksm += int(np.count_nonzero(is_ksm))
        zero += int(np.count_nonzero(has_flag(flags, "ZERO_PAGE")))
        pfns_seen |= set(pfns[is_ksm].tolist())
    return ksm, zero, pfns_seen


@pytest.mark.parametrize("name", KINDS)
def test_page_tables_confirm_the_counters(name: str) -> None:
    if probe_kpf_ksm().truthful is not True:
        pytest.skip("KPF_KSM is no witness on this kernel")
    with running(name, "--json", "--hold", "500") as process:
        assert process.stdout is not None
        outcome: dict[str, Any] = json.loads(process.stdout.readline())
        assert outcome["ok"] is True, outcome
        frames: set[int] = set()
        slots = zero_pages = 0
        for entry in outcome["processes"]:
            ksm, zero, pfns = mapped(entry["pid"])
            assert ksm == entry["ksm_merging_pages"] == entry["expected_merging_pages"]
            assert zero == entry["ksm_zero_pages"]
            assert read_text(f"/proc/{entry['pid']}/comm") == entry["comm"]
            slots += ksm
            zero_pages += zero
            frames |= pfns
        assert len(frames) == outcome["expected"]["pages_shared"]
        assert slots - len(frames) == outcome["expected"]["pages_sharing"]
        assert zero_pages == outcome["expected"]["ksm_zero_pages"]
        # ksmd rests, so the kernel's own files still say what the outcome says.
        values = read_ksm()
        assert {name: values[name] for name in COUNTS} == {
            name: outcome["expected"][name] for name in COUNTS
        }


@pytest.mark.parametrize("name", KINDS)
def test_every_workload_is_exact_and_leaves_nothing(name: str) -> None:
    done = run(name)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, f"{name}: OK"), done
    assert "Expected (" in done.stdout
    assert "waiting for" in done.stderr
    values = read_ksm()
    assert [values[count] for count in COUNTS] == [0] * len(COUNTS)
    assert values["stable_node_chains"] == values["stable_node_dups"] == 0


@pytest.mark.parametrize(
    "arguments",
    [
        # One left over of each content: its nodes are full, and it has no partner.
        ("duplicates", "--pages", "11", "--contents", "3", "--max-page-sharing", "2"),
        ("duplicates", "--processes", "1", "--pages", "257", "--contents", "1"),
        # Forks exceed max_page_sharing, and share a page that did not merge.
        ("fork", "--pages", "257", "--contents", "2", "--forks", "3", "--max-page-sharing", "5"),
        ("fork", "--pages", "7", "--contents", "7"),
        ("cow", "--processes", "5"),
        ("unique", "--smart-scan"),
        ("volatile", "--smart-scan", "--passes", "11"),
    ],
    ids=" ".join,
)
def test_edges_are_exact(arguments: tuple[str, ...]) -> None:
    done = run(*arguments)
    assert done.returncode == 0, done


def test_passes_are_counted_exactly() -> None:
    outcome = json.loads(run("cow", "--json").stdout)
    assert [step["passes"] for step in outcome["steps"]] == [2, 2, 4]


def test_unusual_knobs_come_back() -> None:
    unusual = {
        "sleep_millisecs": 37,
        "max_page_sharing": 31,
        "stable_node_chains_prune_millisecs": 1999,
        "use_zero_pages": 1,
        "smart_scan": 0,
        "pages_to_scan": 101,
        "run": 1,
    }
    # Not saved_knobs(): that would own the lock, which the command needs.
    own = SavedKnobs(read_knobs(), alone=True)
    try:
        own.set(**unusual)
        before = read_knobs()
        assert run("duplicates", "--max-page-sharing", "5").returncode == 0
        assert read_knobs() == before
    finally:
        assert restore(own) == []


def test_the_advisor_comes_back() -> None:
    own = SavedKnobs(read_knobs(), alone=True)
    try:
        own.set(advisor_mode="scan-time")
        before = read_knobs()
        assert run("unique").returncode == 0
        assert read_knobs() == before
    finally:
        assert restore(own) == []


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize(
    ("name", "moment"),
    [
        ("fork", "1 process maps"),  # nothing has been started
        ("duplicates", "merged: waiting for"),  # ksmd works
        ("zero", "zero: waiting for"),
        ("volatile", "volatile: waiting for"),  # the children work in between
        ("fork", "counted: waiting for"),
        ("cow", "holding this state"),
    ],
)
def test_a_signal_leaves_nothing_behind(signum: signal.Signals, name: str, moment: str) -> None:
    knobs = read_knobs()
    more = ("--max-page-sharing", "17") if name == "duplicates" else ()
    with running(name, "--json", "--pages", "5003", "--hold", "500", *more) as process:
        read_until(process.stderr, moment)
        process.send_signal(signum)
        # The guardian holds stderr open until it has restored the knobs.
        _, errors = process.communicate(timeout=300)
    expected = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -signal.SIGKILL}
    assert process.returncode == expected[signum]
    assert "Traceback" not in errors
    if signum != signal.SIGKILL:
        assert errors.splitlines()[-1] == f"ksmtrace: stopped by {signum.name}"
    assert read_knobs() == knobs
    values = read_ksm()
    assert [values[count] for count in COUNTS] == [0] * len(COUNTS)
    assert lock_path().read_text() == ""


def test_knobs_come_back_even_if_the_guardian_was_killed_too() -> None:
    knobs = read_knobs()
    with running("unique", "--json", "--hold", "500") as process:
        read_until(process.stderr, "holding this state")
        guardian = next(
            pid
            for pid in iter_pids()
            if read_text(f"/proc/{pid}/comm") == "ksm-guardian"
            and f"PPid:\t{process.pid}\n" in (read_text(f"/proc/{pid}/status") or "")
        )
        os.kill(guardian, signal.SIGKILL)
        process.kill()
        process.communicate(timeout=300)
    assert read_knobs() != knobs
    done = run("unique")
    assert done.returncode == 0, done
    assert "was killed together with its guardian" in done.stderr
    assert read_knobs() == knobs


def test_a_second_owner_is_refused_by_name() -> None:
    with running("unique", "--json", "--hold", "500") as process:
        read_until(process.stderr, "holding this state")
        second = run("cow")
    assert second.returncode == 3
    assert f"the KSM knobs are held by pid {process.pid} (" in second.stderr
    assert second.stdout == ""


def test_other_users_of_ksm_are_left_in_peace() -> None:
    with mmap.mmap(-1, 11 * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory[:] = b"\x11" * len(memory)
        memory.madvise(mmap.MADV_MERGEABLE)
        refused = run("duplicates")
        assert refused.returncode == 3
        assert f"(pid {os.getpid()})" in refused.stderr
        assert "--shared" in refused.stderr
        shared = run("duplicates", "--shared", "--json")
        assert shared.returncode == 0, shared
        outcome = json.loads(shared.stdout)
        assert (outcome["ok"], outcome["exact"]) == (True, False)
        # Ours merged too, in the same passes, and stayed so.
        assert read_ksm()["pages_sharing"] == 10
    # What this process leaves is forgotten by the next run.
    assert run("unique").returncode == 0
    assert read_ksm()["pages_sharing"] == 0


def test_a_wait_in_vain_says_what_for() -> None:
    with contextlib.ExitStack() as stack:
        process = stack.enter_context(
            running("volatile", "--json", "--pages", "101", "--passes", "307", "--timeout", "10")
        )
        read_until(process.stderr, "volatile: waiting for pages_volatile +202; full_scans +307")
        # Somebody begins to use KSM in the middle: a page that is shared now, and never was meant.
        memory = stack.enter_context(
            mmap.mmap(-1, 11 * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        )
        memory[:] = b"\x11" * len(memory)
        memory.madvise(mmap.MADV_MERGEABLE)
        output, errors = process.communicate(timeout=300)
    outcome = json.loads(output)
    assert process.returncode == 1
    assert outcome["ok"] is False
    assert re.match(r"waited 10 s for pages_shared \+0 \(now \+1\), ", outcome["waited_for"])
    assert f"ksmtrace: volatile, step volatile: {outcome['waited_for']}" in errors
    assert f"(pid {os.getpid()})" in errors
    assert run("unique").returncode == 0


def test_a_child_that_is_not_ready_in_time_is_named() -> None:
    done = run("duplicates", "--pages", "20011", "--timeout", "0.0001")
    assert done.returncode == 1
    assert re.search(r"waited 0.0001 s for ksm-dup-\d to fill its pages, in vain", done.stderr)


def test_leftovers_may_be_kept_and_are_forgotten_later() -> None:
    assert run("duplicates", "--no-drain").returncode == 0
    assert read_ksm()["pages_sharing"] == 3013
    assert run("unique").returncode == 0
    assert read_ksm()["pages_sharing"] == 0


def test_without_privileges_nothing_is_tried() -> None:
    done = subprocess.run(
        [*COMMAND, "unique"],
        capture_output=True,
        text=True,
        timeout=300,
        user=65534,
        group=65534,
        extra_groups=[],
    )
    assert done.returncode == 3
    assert "run as root" in done.stderr


def test_wrong_usage_is_status_2() -> None:
    assert run("unique", "--contents", "3").returncode == 2
    assert run("nonsense").returncode == 2
