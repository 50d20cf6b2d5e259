"""Runs in a guest as root: provokes KSM's races and waits for locks, and counts them from outside.

``guest_races.py OUT_DIRECTORY`` records its own ``work``, one process per scenario, beside the
kernel's own count of what they do (kprobe events and lock:contention_end, most of them as tracefs
histograms), and writes ``races.ksmt`` and ``witness.json``. Needs two NUMA nodes and memory that
can be taken offline.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from guest_outcomes import MADV_NOHUGEPAGE, Area, pipe_of_a_megabyte

from ksmtrace.kernel.btf import Btf
from ksmtrace.kernel.facts import OFFSETS

KSM = Path("/sys/kernel/mm/ksm")
TRACING = Path("/sys/kernel/tracing")
TRACE = TRACING / "instances/races"
MEMORY = Path("/sys/devices/system/memory")
CGROUP = Path("/sys/fs/cgroup")
PAGE = mmap.PAGESIZE
PR_SET_NAME, MPOL_MF_MOVE_ALL, MOVE_PAGES, MADV_UNMERGEABLE = 15, 4, 279, 13
MADV_POPULATE_READ = 22
# For each scenario; a guest ends after conftest.py:LONGEST_S whatever happens.
PATIENCE_S = 300
# Our own events of some may be missing, so that once is not enough.
ENOUGH = 5

SHARERS, FEW, MOVES = 1009, 13, 23
UNIQUE, PASSED_BY = 503, 20011
WRITES, MAPPINGS, EXITS = 31, 307, 7
BROKEN, SLOW_S, HOG_NS, HOG_PAUSE_S = 67, 0.01, 29_000_000, 0.003
FAILED_PAIRS = 7
WRAPPING_PASSES, IDLE_S = 307, 3.1
EBUSY, ENOMEM = -16, -12

libc = ctypes.CDLL(None, use_errno=True)
KEPT: list[object] = []


def main(out: Path) -> None:
    btf = Btf.read()
    mapping, mmap_lock = (
        btf.offset(*OFFSETS[name]) for name in ("page.mapping", "mm_struct.mmap_lock")
    )
    anon_vma, root, rwsem = (
        btf.offset(*path)
        for path in (("vm_area_struct", "anon_vma"), ("anon_vma", "root"), ("anon_vma", "rwsem"))
    )
    assert mmap_lock is not None
    assert rwsem is not None
    symbols = read_symbols("ksm_get_folio", "folio_migrate_ksm", "ksm_thread_mutex")
    lookup = "ksm_get_folio" if "ksm_get_folio" in symbols else "get_ksm_page"
    migrate = "folio_migrate_ksm" if "folio_migrate_ksm" in symbols else "ksm_migrate_page"
    events = {
        "looked_up": f"r:{{}} {lookup} result=$retval:s64",
        "migrated": f"p:{{}} {migrate} mapping=+{mapping}(%si):u64",
        "walked": "p:{} rmap_walk_ksm",
        "waited_for_page": f"p:{{}} __folio_lock mapping=+{mapping}(%di):u64",
        "told_of_memory": "p:{} ksm_memory_callback",
        "stored_run": "p:{} run_store",
        "breaks": "p:{} break_ksm",
        "broke": "r:{} break_ksm result=$retval:s32",
        # The root of what the second area belongs to: its lock is that of the whole tree.
        "forked": f"p:{{}} anon_vma_fork root=+{root}(+{anon_vma}(%si)):u64",
        "exits": "p:{} __ksm_exit mm=%di:u64",
        "exited": "r:{} __ksm_exit",
        "unmaps": "p:{} exit_mmap mm=%di:u64",
        "unmapped": "r:{} exit_mmap",
    }
    with (TRACING / "kprobe_events").open("w") as file:
        for name, text in events.items():
            print(text.format(f"races/{name}"), file=file, flush=True)
    TRACE.mkdir()
    (TRACE / "trace_clock").write_text("mono")
    (TRACE / "buffer_size_kb").write_text("32768")
    (TRACE / "options/hash-ptr").write_text("0")
    histogram("races/looked_up", f"hist:keys=result if result == {EBUSY}")
    for name in ("migrated", "waited_for_page"):
        histogram(f"races/{name}", "hist:keys=common_pid if mapping & 2")  # PAGE_MAPPING_KSM's own
    for name in ("walked", "told_of_memory", "stored_run"):
        histogram(f"races/{name}", "hist:keys=common_pid")
    histogram("races/forked", "hist:keys=common_pid,root if root != 0")
    histogram("lock/contention_end", "hist:keys=common_pid,lock_addr:size=8192")
    for name in ("breaks", "broke"):
        trace(f"races/{name}", 'comm ~ "races-*" || comm == "ksmd"')
    for name in ("races/exits", "races/exited", "races/unmaps", "races/unmapped"):
        trace(name, 'comm ~ "races-*"')
    trace("lock/contention_end", 'comm ~ "races-*"')
    record = [str(Path(sys.executable).with_name("ksmtrace")), "record", "--every-page"]
    # While this guest's one CPU runs ksmd, nobody empties the ring.
    command = [*record, "--ring", "64M", "-o", str(out / "races.ksmt"), "--"]
    command += [sys.executable, __file__, "work", str(out)]
    command += [str(mmap_lock), str(symbols["ksm_thread_mutex"]), str(rwsem)]
    before = read_kernel_counts(mmap_lock)
    status = subprocess.run(command).returncode
    # `ksmtrace record` ends with 0 whatever its command did.
    if not (out / "work.json").exists():
        sys.exit(status or "what was recorded has failed, as it says above")
    witness = json.loads((out / "work.json").read_text())
    witness["kernel"] = read_kernel_counts(mmap_lock)
    witness["before"] = before
    witness["ksm_thread_mutex"] = symbols["ksm_thread_mutex"]
    (out / "witness.json").write_text(json.dumps(witness))
    sys.exit(status)


# --- the kernel's own counts


def read_symbols(*names: str) -> dict[str, int]:
    found = re.findall(
        rf"^(\w+) \w ({'|'.join(names)})$", Path("/proc/kallsyms").read_text(), re.MULTILINE
    )
    return {name: int(address, 16) for address, name in found}


def histogram(event: str, text: str) -> None:
    """Count an event in the kernel, by its keys."""
    (TRACE / "events" / event / "trigger").write_text(text)


def trace(event: str, filter_text: str) -> None:
    """Write an event into the instance's buffer."""
    (TRACE / "events" / event / "filter").write_text(filter_text)
    (TRACE / "events" / event / "enable").write_text("1")


_COUNTED = re.compile(r"^\{ (.*) \} hitcount:\s+(\d+)", re.MULTILINE)


def counted(event: str) -> dict[tuple[int, ...], int]:
    """Return how often an event happened, by the values of its keys."""
    text = (TRACE / "events" / event / "hist").read_text()
    return {
        tuple(int(key.rpartition(":")[2], 0) for key in keys.split(",")): int(times)
        for keys, times in _COUNTED.findall(text)
    }


_TRACED = re.compile(r"^.{16}-(\d+)\s.*?\s(\d+\.\d+): (\w+): (.*)$", re.MULTILINE)


def traced() -> list[tuple[int, float, str, str]]:
    """Return pid, seconds, name and text of what is in the buffer."""
    return [
        (int(pid), float(at_s), name, text)
        for pid, at_s, name, text in _TRACED.findall((TRACE / "trace").read_text())
    ]


def read_kernel_counts(mmap_lock: int) -> dict[str, Any]:
    counts: dict[str, Any] = {
        name: sum(counted(f"races/{name}").values())
        for name in (
            "looked_up", "migrated", "walked", "waited_for_page", "told_of_memory", "stored_run"
        )
    }  # fmt: skip
    (lookups,) = (
        line
        for line in (TRACING / "kprobe_profile").read_text().splitlines()
        if line.split()[0] == "looked_up"
    )
    counts["lookups"], counts["missed"] = map(int, lookups.split()[1:])
    counts["waits"] = [[*key, times] for key, times in counted("lock/contention_end").items()]
    counts["breaks"] = breaks_of(traced())
    counts["exit_waits"] = waits_in_exit(traced(), mmap_lock)
    return counts


def breaks_of(events: list[tuple[int, float, str, str]]) -> list[tuple[int, float, int]]:
    """Pair calls of break_ksm: by whom, how many seconds, with which result."""
    begun: dict[int, float] = {}
    calls = []
    for pid, at_s, name, text in events:
        if name == "breaks":
            begun[pid] = at_s
        elif name == "broke" and pid in begun:
            calls.append((pid, at_s - begun.pop(pid), int(text.rpartition("=")[2])))
    return calls


def waits_in_exit(
    events: list[tuple[int, float, str, str]], mmap_lock: int
) -> list[tuple[int, int, bool]]:
    """Return per wait for an mm's mmap_lock as it goes: pid, lock, and whether in __ksm_exit.

    The others are in exit_mmap.
    """
    leaving: dict[int, tuple[int, bool]] = {}
    waits = []
    for pid, _, name, text in events:
        if name in ("exits", "unmaps"):
            leaving[pid] = (int(text.rpartition("=")[2], 0) + mmap_lock, name == "exits")
        elif name in ("exited", "unmapped"):
            leaving.pop(pid, None)
        elif name == "contention_end":
            lock, in_ksm_exit = leaving.get(pid, (0, False))
            if lock == int(text.split()[0], 16):
                waits.append((pid, lock, in_ksm_exit))
    return waits


def waited(pid: int, lock: int | None = None) -> int:
    """Return how often a thread waited for that lock, or for the one it waited for most."""
    found = counted("lock/contention_end")
    return max(
        (
            times
            for (waiter, address), times in found.items()
            if waiter == pid and lock in (None, address)
        ),
        default=0,
    )


def rounds(provoked: Callable[[], int]) -> Iterator[None]:
    """Yield rounds until it has happened often enough by the kernel's own count, or too long."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        yield
        if provoked() >= ENOUGH or time.monotonic() >= deadline:
            return


# --- the scenarios, each in a process of its own


def set_knob(name: str, value: int) -> None:
    (KSM / name).write_text(str(value))


def knob(name: str) -> int:
    return int((KSM / name).read_text())


def passes(number: int) -> None:
    wanted = knob("full_scans") + number
    deadline = time.monotonic() + PATIENCE_S
    while (done := knob("full_scans")) < wanted:
        assert time.monotonic() < deadline, f"in {PATIENCE_S} s full_scans is {done} of {wanted}"
        time.sleep(0.02)


def merging(pages: int, contents: int) -> Area:
    area = Area(pages)
    for page in range(pages):
        area.fill(page, page % contents + 1)
    area.mergeable()
    return area


def passed_by(pages: int) -> mmap.mmap:
    """Map pages that are only read: the zero page, past which ksmd walks without a pause."""
    area = mmap.mmap(-1, pages * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for advice in (MADV_NOHUGEPAGE, MADV_POPULATE_READ, mmap.MADV_MERGEABLE):
        area.madvise(advice)
    return area


def apart(name: str) -> int:
    """Fork a process that is called so; 0 in the child."""
    child = os.fork()
    if child == 0:
        libc.prctl(PR_SET_NAME, f"races-{name}".encode(), 0, 0, 0)
    return child


def run_apart(name: str, scenario: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    told, tell = os.pipe()
    begin_ns = time.monotonic_ns()
    child = apart(name)
    if child == 0:
        status = 1
        try:
            os.write(tell, json.dumps(scenario()).encode())
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(tell)
    with os.fdopen(told) as answer:
        text = answer.read()
    assert os.waitpid(child, 0)[1] == 0, f"{name} has failed, as it says above"
    said = json.loads(text)
    found = {"pid": child, "begin_ns": begin_ns, "end_ns": time.monotonic_ns(), **said}
    seconds = (found["end_ns"] - begin_ns) / 1e9
    print(f"{name}: {seconds:.1f} s, {said}", file=sys.stderr, flush=True)
    return found


def timed(call: Callable[[], None], times: int, provoked: Callable[[], int]) -> dict[str, int]:
    """Call so many times, round after round: each lap begins where the last one ended."""
    begin_ns = lap_ns = time.monotonic_ns()
    calls = worst_ns = 0
    for _ in rounds(provoked):
        for _ in range(times):
            call()
            calls += 1
            now_ns = time.monotonic_ns()
            lap_ns, worst_ns = now_ns, max(worst_ns, now_ns - lap_ns)
    return {
        "calls": calls, "calls_begin_ns": begin_ns, "calls_end_ns": lap_ns,
        "worst_ns": worst_ns, "provoked": provoked(),
    }  # fmt: skip


def move_page(start: int, pid: int = 0) -> bool:
    """Move a page of that process, or of this one, to the other node, whoever else shares it."""
    status, target, one = (ctypes.c_int * 1)(), (ctypes.c_int * 1)(), ctypes.c_ulong(1)
    address = (ctypes.c_void_p * 1)(start)
    assert libc.syscall(MOVE_PAGES, pid, one, address, None, status, 0) == 0
    target[0] = 1 - status[0]
    libc.syscall(MOVE_PAGES, pid, one, address, target, status, MPOL_MF_MOVE_ALL)
    return bool(status[0] == target[0])


def moves() -> dict[str, Any]:
    """Move the page that all share to and fro, while ksmd finds fresh copies of it."""
    area, few = merging(SHARERS, 1), Area(FEW)
    for page in range(FEW):
        few.fill(page, 2)
    few.mergeable()
    passes(3)
    stop = threading.Event()

    def rewrite() -> None:
        # The same content again: a page of its own, which ksmd will find equal.
        while not stop.is_set():
            for page in range(SHARERS // 2, SHARERS):
                area.fill(page, 1)
            stop.wait(0.02)

    moved = int(move_page(area.start))
    writer = threading.Thread(target=rewrite)
    writer.start()

    def provoked() -> int:
        waits = counted("races/waited_for_page")
        own = sum(waits.get((tid,), 0) for tid in (os.getpid(), writer.native_id))
        return min(sum(counted("races/looked_up").values()), own)

    for _ in rounds(provoked):
        moved += sum(move_page(start) for start in MOVES * [area.start, few.start])
    stop.set()
    writer.join()
    return {"moved": moved, "provoked": provoked()}


def walk_and_split(rwsem: int) -> dict[str, Any]:
    """Move a page of another process to and fro while that splits and joins the page's area."""
    told, tell = os.pipe()
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        area = merging(SHARERS, 1)
        passes(3)
        if os.fork() == 0:  # so that the kernel says which anon_vma is the area's
            os._exit(0)
        os.wait()
        os.write(tell, area.start.to_bytes(8, "little"))
        last, size = ctypes.c_void_p(area.start + (SHARERS - 1) * PAGE), ctypes.c_size_t(PAGE)
        while os.getppid() == parent:
            for protection in (mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_WRITE):
                libc.mprotect(last, size, protection)
    start = int.from_bytes(os.read(told, 8), "little")
    locks = {root + rwsem for pid, root in counted("races/forked") if pid == child}

    def waits() -> dict[int, int]:
        return {lock: times for lock in locks if (times := waited(os.getpid(), lock))}

    moved = 0
    for _ in rounds(lambda: sum(waits().values())):
        moved += sum(move_page(start, child) for _ in range(MOVES))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return {"child": child, "moved": moved, "waits": waits(), "provoked": sum(waits().values())}


def write_knobs() -> dict[str, Any]:
    """Write to a knob while ksmd's batch keeps this waiting."""
    return timed(lambda: set_knob("run", 1), WRITES, lambda: waited(os.getpid()))


def map_and_unmap() -> dict[str, Any]:
    area = passed_by(PASSED_BY)
    passes(1)

    def call() -> None:
        mmap.mmap(-1, 16 * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()

    found = timed(call, MAPPINGS, lambda: waited(os.getpid()))
    area.close()
    return found


def leave(mmap_lock: int) -> dict[str, Any]:
    """Let processes end in which ksmd is: with no pause, and nothing else to scan."""
    children: list[int] = []

    def provoked() -> int:
        return sum(in_ksm_exit for *_, in_ksm_exit in waits_in_exit(traced(), mmap_lock))

    for _ in rounds(provoked):
        for _ in range(EXITS):
            child = apart("exit")
            if child == 0:
                KEPT.extend((passed_by(2 * PASSED_BY), merging(3, 3)))
                passes(2)
                # ksmd runs meanwhile, and loses its CPU to this one wherever it is.
                time.sleep(0.03)
                os._exit(0)
            children.append(child)
            assert os.waitpid(child, 0)[1] == 0
    return {"children": children, "provoked": provoked()}


def take_memory_offline(mutex: int) -> dict[str, Any]:
    """Take blocks offline and back online, until batches have kept this waiting."""
    gone = tried = 0

    def provoked() -> int:
        return waited(os.getpid(), mutex) if gone else 0

    for _ in rounds(provoked):
        for block in sorted(MEMORY.glob("memory[0-9]*")):
            if (block / "valid_zones").read_text().split()[:1] != ["Movable"]:
                continue
            tried += 1
            try:
                (block / "state").write_text("offline")
            except OSError:
                continue
            gone += 1
            # Only "online" makes a kernel zone of it, which never goes again.
            (block / "state").write_text("online_movable")
    return {"tried": tried, "gone": gone, "provoked": provoked()}


def break_slowly() -> dict[str, Any]:
    """Unmerge page by page beside a task that takes the CPU for longer than a break may last."""
    area = merging(BROKEN, 7)

    def provoked() -> int:
        return sum(pid == os.getpid() and s > SLOW_S for pid, s, _ in breaks_of(traced()))

    for _ in rounds(provoked):
        area.mergeable()
        passes(3)
        hog = os.fork()
        if hog == 0:
            take_the_cpu()
        for page in range(BROKEN):
            at = ctypes.c_void_p(area.start + page * PAGE)
            assert libc.madvise(at, ctypes.c_size_t(PAGE), MADV_UNMERGEABLE) == 0
        os.kill(hog, signal.SIGKILL)
        os.waitpid(hog, 0)
    return {"provoked": provoked()}


def take_the_cpu() -> None:
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    while True:
        time.sleep(HOG_PAUSE_S)
        end_ns = time.monotonic_ns() + HOG_NS
        while time.monotonic_ns() < end_ns:
            pass


def interrupt_unmerge() -> dict[str, Any]:
    """Send a signal to a writer of 2, until one was still unmerging: then run reads 0.

    Returns whether one was, and what was left then.
    """
    KEPT.append(merging(SHARERS, 7))
    deadline = time.monotonic() + PATIENCE_S
    interrupted = False
    while not interrupted and time.monotonic() < deadline:
        set_knob("run", 1)
        passes(3)
        child = os.fork()
        if child == 0:
            os.nice(19)
            set_knob("run", 2)
            os._exit(0)
        while knob("run") != 2:  # it says so as soon as it has begun (mm/ksm.c:run_store)
            assert time.monotonic() < deadline, "nobody unmerges"
        os.kill(child, signal.SIGTERM)
        os.waitpid(child, 0)
        interrupted = knob("run") == 0
    shared = knob("pages_sharing")
    set_knob("run", 1)
    return {"interrupted": interrupted, "shared": shared}


def fail_to_break() -> dict[str, Any]:
    """Let ksmd merge the second page of pairs whose first has a reference, and a full memcg."""
    (CGROUP / "cgroup.subtree_control").write_text("+memory")
    group = CGROUP / "races"
    group.mkdir()
    (group / "memory.swap.max").write_text("0")
    # Not before the memcg is full.
    set_knob("run", 0)
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        Path("/proc/self/oom_score_adj").write_text("-1000")
        (group / "cgroup.procs").write_text(str(os.getpid()))
        area, pipe = Area(2 * FAILED_PAIRS), pipe_of_a_megabyte()
        for page in range(2 * FAILED_PAIRS):
            area.fill(page, 900 + page % FAILED_PAIRS)
        for page in range(FAILED_PAIRS):
            area.refer(page, pipe)
        area.mergeable()
        os.write(tell, b"!")
        signal.pause()
    os.read(told, 1)
    (group / "memory.max").write_text("0")
    set_knob("run", 1)

    def provoked() -> int:
        return sum(err == ENOMEM for _, _, err in breaks_of(traced()))

    for _ in rounds(provoked):
        passes(4)
    events = dict(line.split() for line in (group / "memory.events").read_text().splitlines())
    said = {"max": int(events["max"]), "shared": knob("pages_shared")}
    said["provoked"] = provoked()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return said


def wrap() -> dict[str, Any]:
    """Let the 8 bits of seqnr come round over pages that stay."""
    KEPT.append(merging(11, 11))
    set_knob("sleep_millisecs", 0)
    before = knob("full_scans")
    passes(WRAPPING_PASSES)
    set_knob("sleep_millisecs", 10)
    return {"passes": knob("full_scans") - before}


def idle() -> dict[str, Any]:
    ksmd = next(
        p.parent for p in Path("/proc").glob("[0-9]*/comm") if p.read_text() == "ksmd\n"
    )  # fmt: skip
    before_ns = -1
    deadline = time.monotonic() + PATIENCE_S
    # What has just ended may be scanned until its slot is gone.
    while before_ns != (before_ns := int((ksmd / "schedstat").read_text().split()[0])):
        assert time.monotonic() < deadline, f"ksmd is at work for {PATIENCE_S} s"
        time.sleep(1)
    passes_before = knob("full_scans")
    time.sleep(IDLE_S)
    spent_ns = int((ksmd / "schedstat").read_text().split()[0]) - before_ns
    return {"ksmd_cpu_ns": spent_ns, "passes": knob("full_scans") - passes_before}


def work(out: Path, mmap_lock: int, mutex: int, rwsem: int) -> None:
    for name, value in (
        ("run", 2), ("max_page_sharing", 100_003), ("merge_across_nodes", 0),
        ("sleep_millisecs", 10), ("pages_to_scan", 5000), ("run", 1),
    ):  # fmt: skip
        set_knob(name, value)
    found = {"moves": run_apart("moves", moves)}
    found["walks"] = run_apart("walks", lambda: walk_and_split(rwsem))
    # A batch after the other: whoever runs instead has interrupted one.
    set_knob("sleep_millisecs", 0)
    load = apart("load")
    if load == 0:
        KEPT.extend((merging(UNIQUE, UNIQUE), passed_by(PASSED_BY)))
        signal.pause()
    passes(2)
    found["knobs"] = run_apart("knobs", write_knobs)
    found["offline"] = run_apart("offline", lambda: take_memory_offline(mutex))
    os.kill(load, signal.SIGKILL)
    os.waitpid(load, 0)
    found["storm"] = run_apart("storm", map_and_unmap)
    found["exits"] = run_apart("exits", lambda: leave(mmap_lock))
    set_knob("sleep_millisecs", 10)
    found["breaks"] = run_apart("break", break_slowly)
    found["interrupted"] = run_apart("signal", interrupt_unmerge)
    found["failed"] = run_apart("failed", fail_to_break)
    found["wrap"] = run_apart("wrap", wrap)
    found["idle"] = run_apart("idle", idle)
    set_knob("run", 2)
    set_knob("run", 0)
    (out / "work.json").write_text(json.dumps(found))


if __name__ == "__main__":
    if sys.argv[1] == "work":
        work(Path(sys.argv[2]), *map(int, sys.argv[3:]))
    else:
        main(Path(sys.argv[1]))
