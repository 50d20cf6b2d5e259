"""Runs in a guest as root: what KSM costs others, provoked, each with a count that is not ours.

``guest_costs.py OUT_DIRECTORY`` records the scenarios below with both witnesses, and writes
``costs.ksmt`` and ``witness.json``: per scenario what the kernel's counters moved by, and what the
program itself did. Needs two NUMA nodes and swap.
"""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

KSM = Path("/sys/kernel/mm/ksm")
THP = Path("/sys/kernel/mm/transparent_hugepage")
CGROUP = Path("/sys/fs/cgroup")
DELAYACCT = Path("/proc/sys/kernel/task_delayacct")
PAGE = mmap.PAGESIZE
HUGE = 2 << 20
MADV_UNMERGEABLE = 13
READ = "what the kernel holds was read"  # as the recorder says when it was asked to
# For each wait; a guest ends after conftest.py:LONGEST_S whatever happens.
PATIENCE_S = 400
SYS_MOVE_PAGES, MPOL_MF_MOVE_ALL = 279, 4

MERGED, CONTENTS = 331, 7
WRITTEN, READ_INTO, WRITTEN_BY_OTHER, UNMERGED = 101, 37, 13, 29
DELAYED = 23
ZEROS, ZEROS_WRITTEN = 43, 17
LIMITED, SPARE = 1009, 64
MOVED = 5
SWAPPED = 499
STOPPED = 8009

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def main(out: Path) -> None:
    if DELAYACCT.exists():
        DELAYACCT.write_text("1")
    ksmtrace = str(Path(sys.executable).with_name("ksmtrace"))
    recording = str(out / "costs.ksmt")
    record = [ksmtrace, "record", "--force", "--witnesses", "--interval", "3600", "-o", recording]
    command = [*record, "--", sys.executable, __file__, "work", str(out)]
    said = out / "costs.err"
    with said.open("w") as stderr:
        status = subprocess.run(command, stderr=stderr).returncode
    sys.stderr.write(said.read_text())
    # `ksmtrace record` ends with 0 whatever its command did.
    if not status and not (out / "witness.json").exists():
        sys.exit("what was recorded has failed, as it says above")
    sys.exit(status)


def work(out: Path) -> None:
    for name, value in (("run", 2), ("sleep_millisecs", 10), ("pages_to_scan", 20_000)):
        set_knob(name, value)
    witness: dict[str, Any] = {}
    keeps_ksmd_going = make_area(1, lambda page: 4000)
    chosen = os.environ.get("SCENARIOS", "").split() or list(SCENARIOS)
    for name in chosen:
        before = read_counters()
        begin_ns = time.monotonic_ns()
        said = SCENARIOS[name](out) or {}
        after = read_counters()
        moved = {key: after[key] - before[key] for key in before if key in after}
        witness[name] = {
            "counters": moved,
            "begin_ns": begin_ns,
            "end_ns": time.monotonic_ns(),
            **said,
        }
        print(name, moved, said, flush=True)
    keeps_ksmd_going.close()
    (out / "witness.json").write_text(json.dumps(witness))


def read_counters() -> dict[str, int]:
    wanted = (
        *("cow_ksm", "ksm_swpin_copy", "thp_split_page", "thp_split_page_failed"),
        *("pgmigrate_success", "pgmigrate_fail"),
    )
    lines = (line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    counters = {name: int(count) for name, count in lines if name in wanted}
    for name in ("ksm_zero_pages", "pages_shared", "pages_sharing"):
        if (KSM / name).exists():
            counters[name] = int((KSM / name).read_text())
    return counters


def set_knob(name: str, value: int) -> None:
    (KSM / name).write_text(str(value))


def passes(number: int) -> None:
    """Let ksmd make so many passes, and stop it."""
    set_knob("run", 1)
    wanted = int((KSM / "full_scans").read_text()) + number
    deadline = time.monotonic() + PATIENCE_S
    while (done := int((KSM / "full_scans").read_text())) < wanted:
        assert time.monotonic() < deadline, f"in {PATIENCE_S} s full_scans is {done} of {wanted}"
        time.sleep(0.02)
    set_knob("run", 0)


def merge(pages: int) -> None:
    """Let ksmd pass until so many pages are merged, all processes together.

    A page that something refers to for a moment stays out of a pass, and what others have left is
    in the counters until ksmd has come by.
    """
    deadline = time.monotonic() + PATIENCE_S
    while True:
        passes(3)
        merged = sum(int((KSM / name).read_text()) for name in ("pages_shared", "pages_sharing"))
        if merged == pages:
            return
        assert time.monotonic() < deadline, f"in {PATIENCE_S} s {merged} of {pages} pages merged"


def make_area(pages: int, content: Callable[[int], int], first: int = 0) -> mmap.mmap:
    area = mmap.mmap(-1, pages * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area.madvise(mmap.MADV_NOHUGEPAGE)
    area.madvise(mmap.MADV_MERGEABLE)
    for page in range(first, pages):
        fill(area, page, content(page))
    return area


def fill(area: mmap.mmap, page: int, content: int) -> None:
    area[page * PAGE : page * PAGE + 8] = (content + 1).to_bytes(8, "little")


def address_of(area: mmap.mmap, page: int = 0) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(area)) + page * PAGE


def cow(out: Path) -> dict[str, Any]:
    """Each way to copy a KSM page: a write, a read(2) into it, another process, an unmerge."""
    area = make_area(MERGED, lambda page: page % CONTENTS)
    merge(MERGED)
    counts = [read_counters().get("cow_ksm")]

    def count() -> None:
        counts.append(read_counters().get("cow_ksm"))

    for page in range(WRITTEN):
        fill(area, page, 5000 + page)
    count()
    with Path("/dev/zero").open("rb", buffering=0) as zeros:
        for page in range(WRITTEN, WRITTEN + READ_INTO):
            zeros.readinto(memoryview(area)[page * PAGE : page * PAGE + 5])
    count()
    at = address_of(area, WRITTEN + READ_INTO)
    if os.fork() == 0:
        for page in range(WRITTEN_BY_OTHER):
            poke(os.getppid(), at + page * PAGE)
        os._exit(0)
    assert os.wait()[1] == 0
    count()
    unmerge(area, MERGED - UNMERGED, UNMERGED)
    count()
    area.close()
    passes(1)
    return {"counts": counts}


def poke(pid: int, address: int) -> None:
    """Write one byte into another process's memory, through /proc/PID/mem."""
    descriptor = os.open(f"/proc/{pid}/mem", os.O_WRONLY)
    assert os.pwrite(descriptor, b"x", address) == 1
    os.close(descriptor)


def unmerge(area: mmap.mmap, first: int, pages: int) -> int:
    """Make pages unmergeable; 0 or the errno."""
    if libc.madvise(address_of(area, first), pages * PAGE, MADV_UNMERGEABLE) == 0:
        return 0
    return ctypes.get_errno()


def delays(out: Path) -> dict[str, Any]:
    """A process that began with delay accounting on, and is there when the recording ends."""
    from ksmtrace.kernel.btf import Btf
    from ksmtrace.kernel.facts import OFFSETS
    from ksmtrace.kernel.process_events import CopyDelays

    btf = Btf.read()
    count_offset = btf.offset(*OFFSETS["taskstats.wpcopy_count"])
    delay_offset = btf.offset(*OFFSETS["taskstats.wpcopy_delay_total"])
    if count_offset is None or delay_offset is None or not DELAYACCT.exists():
        return {"accounted": False}
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        area = make_area(MERGED, lambda page: 12_000 + page % CONTENTS)
        merge(MERGED)
        taskstats = CopyDelays(count_offset, delay_offset)
        taskstats.read(os.getpid())
        before = taskstats.read(os.getpid())
        for page in range(DELAYED):
            area[page * PAGE] = 255
        after = taskstats.read(os.getpid())
        area.close()
        os.write(tell, json.dumps({"before": before, "after": after}).encode())
        os.close(tell)
        signal.pause()
    os.close(tell)
    with os.fdopen(told) as answer:
        said = json.loads(answer.read())
    passes(1)
    return {"accounted": True, "pid": child, **said}


def zero_pages(out: Path) -> dict[str, Any]:
    set_knob("use_zero_pages", 1)
    area = mmap.mmap(-1, ZEROS * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area.madvise(mmap.MADV_NOHUGEPAGE)
    area.madvise(mmap.MADV_MERGEABLE)
    for page in range(ZEROS):
        area[page * PAGE] = 1
        area[page * PAGE] = 0
    passes(3)
    deadline = time.monotonic() + PATIENCE_S
    while (before := read_counters().get("ksm_zero_pages")) not in (None, ZEROS):
        assert time.monotonic() < deadline, f"in {PATIENCE_S} s {before} of {ZEROS} zero pages"
        passes(1)
    for page in range(ZEROS_WRITTEN):
        fill(area, page, 6000 + page)
    after = read_counters().get("ksm_zero_pages")
    set_knob("use_zero_pages", 0)
    area.close()
    return {"placed": before, "fell": None if before is None else before - (after or 0)}


def limit(out: Path) -> dict[str, Any]:
    """Unmerge with too little memory, and then with enough, in a cgroup nobody is killed in.

    Its own process can do nothing there either while memory is short, so that another one, this,
    gives it more when the kernel says that there was too little.
    """
    group = make_group("limited")
    (group / "memory.swap.max").write_text("0")
    # Written to before the memory is short, so that a word in it takes none.
    over = mmap.mmap(-1, PAGE)
    over[0] = 0
    asked, ask = os.pipe()
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        over[1] = 0
        Path("/proc/self/oom_score_adj").write_text("-1000")
        (group / "cgroup.procs").write_text(str(os.getpid()))
        area = make_area(LIMITED, lambda page: 7000 + page % CONTENTS)
        merge(LIMITED)
        before = read_counters().get("cow_ksm", 0)
        used = int((group / "memory.current").read_text())
        os.write(ask, b"!")
        (group / "memory.max").write_text(str(used + SPARE * PAGE))
        failed = unmerge(area, 0, LIMITED)
        over[0] = 1
        between = read_when_memory_allows().get("cow_ksm", 0)
        worked = unmerge(area, 0, LIMITED)
        after = read_counters().get("cow_ksm", 0)
        said = {
            "failed_with": errno.errorcode.get(failed, str(failed)), "worked": worked,
            "cows": [between - before, after - between],
        }  # fmt: skip
        os.write(tell, json.dumps(said).encode())
        os._exit(0)
    os.close(tell)
    os.close(ask)
    assert os.read(asked, 1) == b"!"
    deadline = time.monotonic() + PATIENCE_S
    # Before it says so it may itself be short of memory, for the second time.
    while not over[0] and (times := times_short(group)) < 2:
        assert time.monotonic() < deadline, f"short of memory {times} times in {PATIENCE_S} s"
        time.sleep(0.05)
    (group / "memory.max").write_text("max")
    with os.fdopen(told) as answer:
        said = json.loads(answer.read())
    assert os.waitpid(child, 0)[1] == 0
    passes(1)
    return {"pid": child, **said}


def times_short(group: Path) -> int:
    events = dict(line.split() for line in (group / "memory.events").read_text().splitlines())
    return int(events["oom"])


def read_when_memory_allows() -> dict[str, int]:
    """Read the counters, for which the kernel needs memory: until the limit is raised."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return read_counters()
        except (OSError, MemoryError):
            assert time.monotonic() < deadline, "the limit was not raised"
            time.sleep(0.05)


def make_group(name: str) -> Path:
    (CGROUP / "cgroup.subtree_control").write_text("+memory")
    group = CGROUP / name
    group.mkdir()
    return group


def migrate(out: Path) -> dict[str, Any]:
    area = make_area(MERGED, lambda page: 8000 + page % CONTENTS)
    merge(MERGED)
    before = read_counters()["pgmigrate_success"]
    pages = (ctypes.c_void_p * MOVED)(*(address_of(area, page) for page in range(MOVED)))
    status = (ctypes.c_int * MOVED)()
    number = ctypes.c_ulong(MOVED)
    assert libc.syscall(SYS_MOVE_PAGES, 0, number, pages, None, status, 0) == 0
    targets = (ctypes.c_int * MOVED)(*(1 - node for node in status))
    assert libc.syscall(SYS_MOVE_PAGES, 0, number, pages, targets, status, MPOL_MF_MOVE_ALL) == 0
    assert list(status) == list(targets), list(status)
    moved = read_counters()["pgmigrate_success"] - before
    sharers = [sum(1 for page in range(MERGED) if page % CONTENTS == c) for c in range(MOVED)]
    area.close()
    passes(1)
    return {"moved": moved, "sharers": sorted(sharers)}


def swap(out: Path) -> dict[str, Any]:
    """KSM pages that are swapped out and read back: each sharer but the first gets a copy."""
    group = make_group("swapped")
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        (group / "cgroup.procs").write_text(str(os.getpid()))
        area = make_area(SWAPPED, lambda page: 9000 + page % CONTENTS)
        merge(SWAPPED)
        deadline = time.monotonic() + PATIENCE_S
        # Reclaim passes a page over that has been referenced since it last came by.
        while left := SWAPPED - swapped_out(area):
            assert time.monotonic() < deadline, f"{left} pages are still there in {PATIENCE_S} s"
            (group / "memory.high").write_text("0")
            (group / "memory.high").write_text("max")
        before = read_counters().get("ksm_swpin_copy", 0)
        for page in range(SWAPPED):
            assert area[page * PAGE + PAGE - 1] == 0
        copies = read_counters().get("ksm_swpin_copy", 0) - before
        os.write(tell, json.dumps({"copies": copies}).encode())
        os._exit(0)
    os.close(tell)
    with os.fdopen(told) as answer:
        said = json.loads(answer.read())
    assert os.waitpid(child, 0)[1] == 0
    passes(1)
    return {"pid": child, **said}


def swapped_out(area: mmap.mmap) -> int:
    """Count the pages that are in swap (bit 62 of their entries in /proc/self/pagemap)."""
    number = len(area) // PAGE
    with Path("/proc/self/pagemap").open("rb") as file:
        entries = os.pread(file.fileno(), 8 * number, address_of(area) // PAGE * 8)
    return sum(entry >> 62 & 1 for entry in struct.unpack(f"{number}Q", entries))


def split(out: Path) -> dict[str, Any]:
    """Huge pages, one of them zero-filled but for its first page, of which ksmd wants parts."""
    (THP / "enabled").write_text("madvise")
    # khugepaged would put them together again, KSM pages and all, which KSM only notices later.
    for name in ("max_ptes_shared", "max_ptes_none"):
        if (THP / "khugepaged" / name).exists():
            (THP / "khugepaged" / name).write_text("0")
    area, start = map_huge(3)
    for huge in range(3):
        for page in range(HUGE // PAGE):
            at = start + huge * HUGE + page * PAGE
            if huge < 2:
                area[at : at + 8] = (10_000 + page + huge * (page > 5) * 1000).to_bytes(8, "little")
    area[start + 2 * HUGE] = 1
    area.madvise(mmap.MADV_MERGEABLE)
    read_witnesses(out)
    before = read_counters()
    passes(3)
    after = read_counters()
    read_witnesses(out)
    area.close()
    passes(1)
    return {
        "splits": after["thp_split_page"] - before["thp_split_page"],
        "sharing": after["pages_sharing"] - before["pages_sharing"],
    }


def map_huge(number: int) -> tuple[mmap.mmap, int]:
    """Map an area with so many huge pages; returns it, and where in it the first begins.

    Where memory is in pieces the kernel gives small pages: then it is put together, and once more.
    """
    wanted = f"AnonHugePages: {number * HUGE // 1024:9} kB"
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        for knob_name in ("drop_caches", "compact_memory"):
            Path("/proc/sys/vm", knob_name).write_text("1")
        area = mmap.mmap(-1, (number + 1) * HUGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        start = -(-address_of(area) // HUGE) * HUGE - address_of(area)
        area.madvise(mmap.MADV_HUGEPAGE)
        for huge in range(number):
            area[start + huge * HUGE] = 1
        if wanted in Path("/proc/self/smaps").read_text():
            return area, start
        area.close()
    raise AssertionError(f"the kernel gave no {number} huge pages, in {PATIENCE_S} s")


def read_witnesses(out: Path) -> None:
    """Ask the recorder, and wait until it says that what it has read is in the file."""
    said = out / "costs.err"
    before = said.read_text().count(READ)
    os.kill(os.getppid(), signal.SIGUSR1)
    deadline = time.monotonic() + PATIENCE_S
    while said.read_text().count(READ) == before:
        assert time.monotonic() < deadline, f"nothing was read in {PATIENCE_S} s"
        time.sleep(0.1)


def stop(out: Path) -> dict[str, Any]:
    """Write 2 to run, and interrupt the writer when some pages have been unmerged."""
    area = make_area(STOPPED, lambda page: 11_000 + page % CONTENTS)
    merge(STOPPED)
    before = unmerged_so_far(area)
    # So that this process always comes in between.
    writer = subprocess.Popen(["nice", "-n", "19", "sh", "-c", f"echo 2 >{KSM}/run"])
    while unmerged_so_far(area) < before + 100 and writer.poll() is None:
        time.sleep(0.001)
    writer.send_signal(signal.SIGINT)
    writer.wait()
    middle = unmerged_so_far(area)
    run = (KSM / "run").read_text().strip()
    set_knob("run", 2)
    return {"unmerged": [middle - before, unmerged_so_far(area) - before], "run": int(run)}


def unmerged_so_far(area: mmap.mmap) -> int:
    return read_counters().get("cow_ksm", 0)


SCENARIOS: dict[str, Callable[[Path], dict[str, Any] | None]] = {
    "cow": cow,
    "delays": delays,
    "zero_pages": zero_pages,
    "limit": limit,
    "migrate": migrate,
    "swap": swap,
    "split": split,
    "stop": stop,
}

if __name__ == "__main__":
    if sys.argv[1] == "work":
        work(Path(sys.argv[2]))
    else:
        main(Path(sys.argv[1]))
