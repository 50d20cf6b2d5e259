"""Facts about the running kernel, each against an independent witness."""

import ctypes
import mmap
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ksmtrace.errors import KernelFeatureMissing, PrivilegeMissing
from ksmtrace.kernel import kallsyms, loading, pages, process_events, procfs, sysfs
from ksmtrace.kernel.btf import Btf
from ksmtrace.kernel.facts import OFFSETS, read_facts

pytestmark = pytest.mark.live

PAGE = mmap.PAGESIZE


@pytest.fixture(scope="module")
def facts():
    return read_facts()


@pytest.fixture(scope="module")
def btf():
    return Btf.read()


@pytest.fixture
def area():
    with mmap.mmap(-1, 23 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area:
        area.madvise(mmap.MADV_NOHUGEPAGE)
        yield area


def address_of(area: mmap.mmap) -> int:
    cell = ctypes.c_char.from_buffer(area)
    return ctypes.addressof(cell)


def run_unprivileged(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        user=65534,
        group=65534,
        extra_groups=[],
    )


def test_root_misses_nothing_here(facts):
    assert facts.kernel.release == os.uname().release
    assert facts.kernel.build_id is not None and len(facts.kernel.build_id) == 40
    assert facts.unknown == {}
    assert facts.online_cpus == tuple(sorted(os.sched_getaffinity(0)))


def test_offsets_are_those_of_an_independent_reader(btf):
    bpftool = shutil.which("bpftool", path=f"{os.environ['PATH']}:/usr/sbin")
    if bpftool is None:
        pytest.skip("bpftool is not installed")
    dump = subprocess.run(
        [bpftool, "btf", "dump", "file", "/sys/kernel/btf/vmlinux"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    begin = dump.index("] STRUCT 'ksm_rmap_item' ")
    block = dump[begin : dump.index("\n[", begin)]
    assert f"size={btf.struct_size('ksm_rmap_item')} " in block
    address = btf.offset("ksm_rmap_item", "address")
    assert f"'address' type_id=1 bits_offset={address * 8}\n" in block + "\n"
    typedef = dump[dump.index("TYPEDEF 'btf_trace_ksm_merge_with_ksm_page' type_id=") :]
    pointer = typedef.partition("type_id=")[2].partition("\n")[0]
    prototype = dump.partition(f"\n[{pointer}] PTR ")[2].partition("type_id=")[2].partition("\n")[0]
    head = dump.partition(f"\n[{prototype}] FUNC_PROTO ")[2].partition("\n")[0]
    assert head.endswith(f"vlen={btf.tracepoint_arguments('ksm_merge_with_ksm_page') + 1}")


# A folio's order has had three places; a kernel has one of them.
ELSEWHERE = {"compound_order", "_folio_order"}


def test_every_member_that_the_programs_read_is_inside_its_struct(btf):
    for names, path in OFFSETS.values():
        size = next(size for name in names if (size := btf.struct_size(name)) is not None)
        offset = btf.offset(names, path)
        if path in ELSEWHERE and offset is None:
            continue
        assert offset is not None and 0 <= offset <= size - 4


def test_functions_of_btf_have_symbols(btf):
    names = ("break_ksm", "try_to_merge_one_page", "ksm_madvise")
    symbols = kallsyms.read_symbols(names)

    for name in names:
        assert bool(btf.function_ids(name)) == symbols.has(name)
        address = symbols.address(name)
        assert address is not None and address >> 63


def test_a_program_attaches_to_what_is_there_and_not_to_what_is_not(btf, facts):
    machine = os.uname().machine
    there = loading.probe_loading(btf, machine, "ksm_enter")
    missing = loading.probe_loading(btf, machine, "ksm_no_such_tracepoint")

    assert there["raw_tracepoint"].works is True
    assert there["kernel_read"].works is True
    assert missing["raw_tracepoint"].works is False
    assert missing["raw_tracepoint"].reason == "attaching to ksm_no_such_tracepoint: ENOENT"
    assert facts.loading is not None and facts.loading["raw_tracepoint"].works is True


def descriptors() -> set[str]:
    # Listing opens one of its own, which is gone again by the time it would be looked at.
    return {entry.name for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()}


def test_trying_leaves_no_descriptor_behind(btf):
    before = descriptors()
    loading.probe_loading(btf, os.uname().machine)
    assert descriptors() == before


def test_the_kprobe_probe_agrees_with_sysfs(facts):
    has_pmu = Path("/sys/bus/event_source/devices/kprobe/type").exists()
    assert facts.loading is not None
    if not has_pmu:
        assert facts.loading["kprobe"].works is False
        assert "kprobe/type" in facts.loading["kprobe"].reason


def test_ksmd_is_the_one_that_ps_shows(facts):
    shown = subprocess.run(["pgrep", "-x", "ksmd"], capture_output=True, text=True, check=True)

    assert facts.ksmd_pid == int(shown.stdout.split()[0])
    identity = procfs.read_identity(facts.ksmd_pid)
    assert (identity.comm, identity.ppid) == ("ksmd", 2)


def test_the_start_of_a_process_is_on_the_boot_clock():
    before = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        identity = procfs.read_identity(process.pid)
        process.communicate(b"\n")
    after = time.clock_gettime_ns(time.CLOCK_BOOTTIME)

    # The kernel rounds down to a clock tick.
    assert before - 10_000_000 <= identity.start_ns <= after
    assert identity.ppid == os.getpid()


def test_frames_of_our_own_pages_are_anonymous_mapped_once_and_distinct(area):
    for page in range(0, 23 * PAGE, PAGE):
        area[page : page + 8] = page.to_bytes(8, "little")
    start = address_of(area)
    entries = pages.read_pagemap("self", start, start + 23 * PAGE)
    pfns = pages.frame_numbers(entries)

    assert len(np.unique(pfns)) == 23
    assert pages.has_flag(pages.read_kpageflags(pfns), "ANON").all()
    assert not pages.has_flag(pages.read_kpageflags(pfns), "ZERO_PAGE").any()
    assert pages.read_kpagecount(pfns).tolist() == [1] * 23


def test_pages_only_read_are_the_zero_page(area):
    assert area.find(b"\1") == -1
    start = address_of(area)
    pfns = pages.frame_numbers(pages.read_pagemap("self", start, start + 23 * PAGE))

    assert len(np.unique(pfns)) == 1
    assert pages.has_flag(pages.read_kpageflags(pfns), "ZERO_PAGE").all()


def test_pages_shared_by_fork_are_mapped_twice(area):
    area[:] = b"\x17" * len(area)
    start = address_of(area)
    pfns = pages.frame_numbers(pages.read_pagemap("self", start, start + 23 * PAGE))
    ready, release = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.write(ready[1], b"x")
        os.read(release[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    counts = pages.read_kpagecount(pfns)
    theirs = pages.frame_numbers(pages.read_pagemap(child, start, start + 23 * PAGE))
    os.write(release[1], b"x")
    os.waitpid(child, 0)
    for fd in (*ready, *release):
        os.close(fd)

    assert counts.tolist() == [2] * 23
    assert (theirs == pfns).all()


def test_the_truth_about_kpf_ksm_is_found_out(facts, area):
    assert facts.kpf_ksm is not None and facts.kpf_ksm.truthful is not None
    area[:] = os.urandom(len(area))
    start = address_of(area)
    flags = pages.read_kpageflags(
        pages.frame_numbers(pages.read_pagemap("self", start, start + 23 * PAGE))
    )
    assert pages.has_flag(flags, "KSM").any() == (not facts.kpf_ksm.truthful)


def test_smaps_follow_madvise(area):
    start = address_of(area)

    def mergeable() -> bool:
        mappings = procfs.read_smaps_ksm("self")
        return next(m.mergeable for m in mappings if m.start <= start < m.end)

    assert not mergeable()
    area.madvise(mmap.MADV_MERGEABLE)
    assert mergeable()
    assert procfs.read_ksm_stat("self")["ksm_mergeable"] == "yes"
    area.madvise(mmap.MADV_UNMERGEABLE)
    assert not mergeable()


def test_a_process_of_another_user_is_refused_without_privilege():
    code = (
        "from ksmtrace.errors import PrivilegeMissing\n"
        "from ksmtrace.kernel import pages, procfs\n"
        "for read in (lambda: procfs.read_ksm_stat(1), lambda: procfs.read_smaps_ksm(1)):\n"
        "    try:\n"
        "        read()\n"
        "    except PrivilegeMissing as error:\n"
        "        print('refused:', error)\n"
        "print(pages.probe_kpf_ksm().truthful)\n"
    )
    run = run_unprivileged(code)
    lines = run.stdout.splitlines()
    assert [line.startswith("refused: ") for line in lines] == [True, True, False], run.stderr
    assert lines[2] == "None"


def test_values_of_sysfs_are_those_that_cat_prints():
    values = sysfs.read_ksm()
    for name in ("max_page_sharing", "merge_across_nodes", "smart_scan"):
        shown = subprocess.run(["cat", f"/sys/kernel/mm/ksm/{name}"], capture_output=True)
        assert values[name] == int(shown.stdout)


def collect(events: process_events.ProcessEvents, done) -> list[process_events.ProcessEvent]:
    # Draining until the last awaited event is there, or a minute.
    collected: list[process_events.ProcessEvent] = []
    deadline = time.monotonic() + 60
    while not done(collected) and (left := deadline - time.monotonic()) > 0:
        select.select([events.fileno()], [], [], left)
        collected += events.drain()
    return collected


@pytest.fixture
def connector():
    events = process_events.ProcessEvents()
    events.open()
    yield events
    events.close()


def test_every_fork_and_exit_of_ours_is_reported_in_order(connector):
    before = time.monotonic_ns()
    children = []
    for _ in range(23):
        child = os.fork()
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)
        children.append(child)
    after = time.monotonic_ns()
    last = children[-1]
    seen = collect(connector, lambda got: any(e.kind == "exit" and e.pid == last for e in got))

    ours = [event for event in seen if event.pid in children]
    assert [e.pid for e in ours if e.kind == "fork"] == children
    assert [e.pid for e in ours if e.kind == "exit"] == children
    assert {e.ppid for e in ours if e.kind == "fork"} == {os.getpid()}
    assert all(before <= event.ts_ns <= after for event in ours)
    assert connector.lost == 0


def test_exec_and_new_names_are_reported(connector):
    code = "open('/proc/self/comm', 'w').write('a) b (c')"
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        process.wait()
    seen = collect(
        connector, lambda got: any(e.kind == "exit" and e.pid == process.pid for e in got)
    )

    ours = [event for event in seen if event.pid == process.pid]
    kinds = [event.kind for event in ours]
    assert kinds.index("exec") < kinds.index("comm") < kinds.index("exit")
    assert "a) b (c" in [event.comm for event in ours if event.kind == "comm"]


def test_threads_are_not_processes(connector):
    code = (
        "import threading\n"
        "threads = [threading.Thread(target=int) for _ in range(7)]\n"
        "[t.start() for t in threads]; [t.join() for t in threads]\n"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        process.wait()
    seen = collect(
        connector, lambda got: any(e.kind == "exit" and e.pid == process.pid for e in got)
    )

    assert not [e for e in seen if e.kind == "fork" and e.ppid == process.pid]
    assert [e.kind for e in seen if e.pid == process.pid].count("exit") == 1


def test_draining_nothing_returns(connector):
    # Where it blocked, it would not return while nothing happens.
    assert [] in [connector.drain() for _ in range(100)]


def test_what_the_kernel_had_to_drop_is_counted(monkeypatch):
    monkeypatch.setattr(process_events, "RECEIVE_BUFFER_BYTES", 4096)
    events = process_events.ProcessEvents()
    events.open()
    try:
        for _ in range(53):
            child = os.fork()
            if child == 0:
                os._exit(0)
            os.waitpid(child, 0)
        assert len(events.drain()) < 2 * 53
        assert events.lost > 0
    finally:
        events.close()


def test_process_events_without_privilege_are_refused_or_work():
    code = (
        "from ksmtrace.errors import CannotRun\n"
        "from ksmtrace.kernel.process_events import ProcessEvents, read_taskstats\n"
        "try:\n"
        "    ProcessEvents().open(); print('open')\n"
        "except CannotRun as error:\n"
        "    print(type(error).__name__)\n"
        "print(read_taskstats(1))\n"
    )
    run = run_unprivileged(code)
    # Kernels from 6.6 on let everyone listen to the connector.
    outcome, taskstats = run.stdout.splitlines()
    assert outcome in ("open", PrivilegeMissing.__name__, KernelFeatureMissing.__name__)
    assert taskstats == "None"


def test_taskstats_of_a_task_agree_with_its_schedstat():
    # Ourselves: we are on the CPU between the two readings, so they bracket the third.
    before = procfs.read_ksmd_schedstat(os.getpid())
    stats = process_events.read_taskstats(os.getpid())
    after = procfs.read_ksmd_schedstat(os.getpid())

    assert stats is not None
    assert before["cpu_ns"] <= stats["cpu_run_virtual_total_ns"] <= after["cpu_ns"]
    assert before["run_delay_ns"] <= stats["cpu_delay_total_ns"] <= after["run_delay_ns"]
    assert before["timeslices"] <= stats["cpu_count"] <= after["timeslices"]
    assert stats["nvcsw"] + stats["nivcsw"] > 0


def test_taskstats_of_ksmd_agree_with_its_schedstat(facts):
    before = procfs.read_ksmd_schedstat(facts.ksmd_pid)
    stats = process_events.read_taskstats(facts.ksmd_pid)
    after = procfs.read_ksmd_schedstat(facts.ksmd_pid)

    assert before["cpu_ns"] <= stats["cpu_run_virtual_total_ns"] <= after["cpu_ns"]
    assert before["run_delay_ns"] <= stats["cpu_delay_total_ns"] <= after["run_delay_ns"]


def test_taskstats_of_the_gone_are_none():
    with subprocess.Popen(["true"]) as process:
        process.wait()
    assert process_events.read_taskstats(process.pid) is None
