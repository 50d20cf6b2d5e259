"""Runs in a guest as root: makes merges fail for one cause after the other, under a recorder.

``guest_outcomes.py OUT_DIRECTORY SCENARIO...`` counts what the kernel does in a merge with its own
kprobe events, starts the recorder and, inside it, one process per scenario, while which ksmd makes
its passes. Writes ``outcomes.ksmt`` and ``witness.json``: per scenario the process, and the counts.
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
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from ksmtrace.kernel.btf import Btf
from ksmtrace.kernel.facts import OFFSETS

KSM = Path("/sys/kernel/mm/ksm")
TRACING = Path("/sys/kernel/tracing")
TRACE = TRACING / "instances/outcomes"
HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
PAGE = mmap.PAGESIZE
HUGE_PAGES = 512
MADV_HUGEPAGE, MADV_NOHUGEPAGE, MADV_UNMERGEABLE = 14, 15, 13
F_SETPIPE_SZ = 1031
# A guest ends after conftest.py:LONGEST_S whatever happens.
PATIENCE_S = 400

PAIRS, REFERRED, PINNED = 31, 7, 5
SMALL_TWINS, LARGE = 13, 2
FLIPPED = 61
FORKED = 37
REWRITTEN = 61
DROPPED = 5
CONTENDED = 8191
UNIQUE, CHANGING, EQUAL, ZERO, UNMAPPED, EXITING = 43, 17, 11, 19, 13, 23
LONG_MS = 100_000
VISITING_PASSES, SKIPPING_PASSES = 5, 7

_SPLITS = (
    *("__split_huge_page_to_list_to_order", "split_huge_page_to_list_to_order"),
    "split_huge_page_to_list",
)
libc = ctypes.CDLL(None, use_errno=True)


class IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class Area:
    """Anonymous memory of whole pages."""

    def __init__(self, pages: int, huge: bool = False) -> None:
        self.pages = pages
        length = pages * PAGE + (HUGE_PAGES * PAGE if huge else 0)
        self.map = mmap.mmap(-1, length, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        self.offset = -start % (HUGE_PAGES * PAGE) if huge else 0
        self.start = start + self.offset
        self.map.madvise(MADV_HUGEPAGE if huge else MADV_NOHUGEPAGE)

    def fill(self, page: int, content: int) -> None:
        at = self.offset + page * PAGE
        self.map[at : at + 8] = content.to_bytes(8, "little")

    def advise(self, advice: int) -> None:
        assert (
            libc.madvise(ctypes.c_void_p(self.start), ctypes.c_size_t(self.pages * PAGE), advice)
            == 0
        )

    def mergeable(self) -> None:
        self.advise(mmap.MADV_MERGEABLE)

    def refer(self, page: int, pipe: int) -> None:
        """Let a pipe hold a reference to a page."""
        vector = IoVec(self.start + page * PAGE, PAGE)
        assert libc.vmsplice(pipe, ctypes.byref(vector), ctypes.c_ulong(1), 0) == PAGE

    def pin(self, page: int, pages: int) -> None:
        """Register pages as an io_uring's buffer, which pins them."""
        ring = libc.syscall(425, ctypes.c_uint(1), ctypes.create_string_buffer(120))
        vector = IoVec(self.start + page * PAGE, pages * PAGE)
        assert ring >= 0, os.strerror(ctypes.get_errno())
        assert libc.syscall(427, ring, 0, ctypes.byref(vector), 1) == 0


def pipe_of_a_megabyte() -> int:
    end = os.pipe()[1]
    libc.fcntl(end, F_SETPIPE_SZ, ctypes.c_int(1 << 20))
    return end


def always(step: Callable[[int], None]) -> None:
    def run() -> None:
        for number in range(1 << 60):
            step(number)

    threading.Thread(target=run, daemon=True).start()


KEPT: list[object] = []
LEFT: set[str] = set()


def equal_pair(content: int) -> None:
    """Map two equal pages, so that there is a KSM page to merge with."""
    area = Area(2)
    area.fill(0, content)
    area.fill(1, content)
    area.mergeable()
    KEPT.append(area)


def put_together() -> None:
    """Have free memory in large pieces: from small ones the kernel makes no huge pages."""
    for name in ("drop_caches", "compact_memory"):
        Path("/proc/sys/vm", name).write_text("1")


def pinned() -> None:
    area, pipe = Area(2 * PAIRS), pipe_of_a_megabyte()
    for page in range(2 * PAIRS):
        area.fill(page, page % PAIRS + 1)
    for page in range(REFERRED):
        area.refer(page, pipe)
    area.pin(PAIRS + REFERRED, PINNED)
    area.mergeable()
    KEPT.append(area)


def large_area(number: int) -> Area:
    """Map so many huge pages, of pages that all differ, as soon as there are that many."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        put_together()
        area = Area(number * HUGE_PAGES, huge=True)
        for page in range(area.pages):
            area.fill(page, page + 1)
        found = re.findall(r"AnonHugePages: +(\d+) kB", Path("/proc/self/smaps").read_text())
        if f"{number * HUGE_PAGES * PAGE >> 10}" in found:
            return area
        assert time.monotonic() < deadline, found
        libc.munmap(ctypes.c_void_p(area.start), ctypes.c_size_t(area.pages * PAGE))
        KEPT.append(area)  # its map is not unmapped once more
        time.sleep(0.2)


def large_pinned() -> None:
    area, pipe, small = large_area(LARGE), pipe_of_a_megabyte(), Area(SMALL_TWINS)
    for number in range(LARGE):
        area.refer(number * HUGE_PAGES + 211, pipe)
    for page in range(SMALL_TWINS):
        small.fill(page, page * 71 + 1)
    area.mergeable()
    small.mergeable()
    KEPT.extend((area, small))


def large_twins() -> None:
    area = large_area(1)
    area.fill(5, 4)  # as page 3
    area.mergeable()
    KEPT.append(area)


def changing() -> None:
    equal_pair(1)
    area = Area(1)
    area.fill(0, 1)
    area.mergeable()
    contend()

    def change(number: int) -> None:
        area.fill(0, 1)
        time.sleep(0.0001 * (number % 17))
        area.fill(0, 2)
        time.sleep(0.0001 * (number % 13))

    always(change)


def contend() -> None:
    """Let ksmd wait for the mmap_lock, so that much can happen between two of its steps."""
    area = Area(CONTENDED)
    for page in range(CONTENDED):
        area.fill(page, 1)
    allowed = ctypes.c_size_t(CONTENDED * PAGE)

    def protect(number: int) -> None:
        libc.mprotect(ctypes.c_void_p(area.start), allowed, mmap.PROT_READ | 2 * (number % 2))

    always(protect)


def dropping() -> None:
    equal_pair(1)
    area = Area(DROPPED)
    area.mergeable()
    contend()

    def drop(number: int) -> None:
        for page in range(DROPPED):
            area.fill(page, 1)
        area.advise(mmap.MADV_DONTNEED)

    always(drop)


def moving() -> None:
    equal_pair(1)
    area = Area(1)
    area.fill(0, 1)
    area.mergeable()
    page, node, status = ctypes.c_void_p(area.start), ctypes.c_int(0), ctypes.c_int(0)

    def move(number: int) -> None:
        node.value = number % 2
        libc.syscall(
            279, 0, ctypes.c_ulong(1), ctypes.byref(page), ctypes.byref(node),
            ctypes.byref(status), 2,
        )  # fmt: skip
        area.fill(0, 1)

    always(move)


def flipping() -> None:
    equal_pair(1)
    area = Area(FLIPPED)
    for page in range(FLIPPED):
        area.fill(page, 1)
    contend()

    def flip(number: int) -> None:
        area.mergeable()
        time.sleep(0.001 * (number % 13))
        area.advise(MADV_UNMERGEABLE)
        time.sleep(0.001)

    always(flip)


def exiting() -> None:
    """Kill one process after the other in which ksmd waits for the mmap_lock, or is about to."""
    equal_pair(1)

    def live_and_die(number: int) -> None:
        told, tell = os.pipe()
        child = os.fork()
        if child == 0:
            area = Area(FLIPPED)
            for page in range(FLIPPED):
                area.fill(page, 1)
            contend()
            area.mergeable()
            os.write(tell, b"!")
            signal.pause()
        assert os.read(told, 1) == b"!"
        time.sleep(0.03 + 0.001 * (number % 13))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(told)
        os.close(tell)

    always(live_and_die)


def rewriting() -> None:
    """Write again what is there, before any other task, so that ksmd finds another page there."""
    equal_pair(1)
    area = Area(REWRITTEN)
    for page in range(REWRITTEN):
        area.fill(page, 1)
    area.mergeable()

    def rewrite(number: int) -> None:
        if not number:
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
        begin_s = time.monotonic()
        for page in range(REWRITTEN):
            area.fill(page, 1)
        # However slow this machine is: ksmd has some of the CPU, too.
        took_s = time.monotonic() - begin_s
        time.sleep(max(0.0005, took_s / 4) + 0.0001 * (number % 11))

    always(rewrite)


def forked() -> None:
    area = Area(FORKED)
    for page in range(FORKED):
        area.fill(page, page + 1)
    area.mergeable()
    KEPT.append(area)
    parent = os.getpid()
    if os.fork() == 0:
        while os.getppid() == parent:
            time.sleep(0.05)
        os._exit(0)


VISITING = "visiting"
# Per scenario: passes at a time, and the path that a merge must have taken before it is over.
SCENARIOS: dict[str, tuple[Callable[[], None], int, str]] = {
    "pinned": (pinned, 3, "tried protected-14 merged-14"),
    "large_pinned": (large_pinned, 3, "tried split-11 merged-14|tried split-16 merged-14"),
    "large_twins": (large_twins, 4, "split0|replacing split0"),
    "changing": (changing, 20, "tried protected0 merged-14"),
    "moving": (moving, 20, "tried merged-14"),
    "dropping": (dropping, 20, "tried protected-14 merged-14"),
    "flipping": (flipping, 20, "merged-14"),
    "exiting": (exiting, 20, "left merged-14"),
    "rewriting": (rewriting, 20, "tried protected0 replacing merged-14"),
    "forked": (forked, 4, ""),
}


def main(out: Path, names: list[str]) -> None:
    HUGE.write_text("madvise")
    known = {line.split()[2] for line in Path("/proc/kallsyms").read_text().splitlines()}
    split = next(name for name in _SPLITS if name in known)
    ksmd = next(
        p.parent.name for p in Path("/proc").glob("[0-9]*/comm") if p.read_text() == "ksmd\n"
    )
    item_mm = Btf.read().offset(*OFFSETS["ksm_rmap_item.mm"])
    events = {
        "merging": f"p:{{}} try_to_merge_with_ksm_page mm=+{item_mm}(%di):u64",
        "left": "p:{} __ksm_exit mm=%di:u64",
        "entered": "p:{} __ksm_enter mm=%di:u64",
        "tried": "p:{} try_to_merge_one_page",
        "merged": "r:{} try_to_merge_with_ksm_page ret=$retval:s32",
        "protected": "r:{} write_protect_page ret=$retval:s32",
        "split": f"r:{{}} {split} ret=$retval:s32",
        "replacing": "p:{} mm_find_pmd",
    }
    with (TRACING / "kprobe_events").open("w") as file:
        for name, text in events.items():
            print(text.format(f"outcomes/{name}"), file=file, flush=True)
    TRACE.mkdir()
    (TRACE / "buffer_size_kb").write_text("32768")
    for name in events:
        if name not in ("left", "entered"):
            (TRACE / "events/outcomes" / name / "filter").write_text(f"common_pid == {ksmd}")
        (TRACE / "events/outcomes" / name / "enable").write_text("1")
    record = [str(Path(sys.executable).with_name("ksmtrace")), "record", "--every-page"]
    command = [*record, "-o", str(out / "outcomes.ksmt"), "--"]
    command += [sys.executable, __file__, "work", str(out), *names]
    status = subprocess.run(command).returncode
    # `ksmtrace record` ends with 0 whatever its command did.
    if not status and not (out / "witness.json").exists():
        sys.exit("what was recorded has failed, as it says above")
    sys.exit(status)


def set_knob(name: str, value: int) -> None:
    if (KSM / name).exists():
        (KSM / name).write_text(str(value))


def read_counters() -> dict[str, int]:
    lines = (line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    wanted = ("thp_split_page", "thp_split_page_failed", "cow_ksm")
    counters = {name: int(value) for name, value in lines if name in wanted}
    for name in ("pages_scanned", "pages_skipped"):
        if (KSM / name).exists():
            counters[name] = int((KSM / name).read_text())
    return counters


def passes(number: int) -> None:
    """Let ksmd make that many passes, and stop."""
    wanted = int((KSM / "full_scans").read_text()) + number
    set_knob("run", 1)
    deadline = time.monotonic() + PATIENCE_S
    while (done := int((KSM / "full_scans").read_text())) < wanted:
        assert time.monotonic() < deadline, f"in {PATIENCE_S} s full_scans is {done} of {wanted}"
        time.sleep(0.01)
    set_knob("run", 0)


def one_pass() -> None:
    """Let ksmd make exactly one pass: run=0 comes long before another.

    A new pause wakes ksmd from the one before (mm/ksm.c:sleep_millisecs_store), with run at 0.
    """
    pause = int((KSM / "sleep_millisecs").read_text())
    set_knob("sleep_millisecs", LONG_MS + (pause == LONG_MS))
    passes(1)


_TRACED = re.compile(r": (\w+): \([^)]*\)(?: ret=(-?\d+)| mm=(\d+))?$")


def traced() -> Counter[str]:
    """Count what ksmd's merges went through since the last time, by the kernel's own events.

    A path begins with try_to_merge_one_page and ends with try_to_merge_with_ksm_page; what is
    between two of them is one of its own. One that begins with ``left`` is of an mm that has left.
    """
    paths: Counter[str] = Counter()
    path: list[str] = []
    merging = ""
    if not TRACE.exists():  # nobody asks
        return paths
    for line in (TRACE / "trace").read_text().splitlines():
        if found := _TRACED.search(line):
            if found[3]:
                if found[1] == "left":
                    LEFT.add(found[3])
                elif found[1] == "entered":
                    LEFT.discard(found[3])
                else:
                    merging = found[3]
                continue
            if found[1] == "tried" and path:  # before it, outside of a merge
                paths[" ".join(path)] += 1
                path = []
            path.append(found[1] + (found[2] or ""))
            if found[1] == "merged":
                # Of the first of these that failed, as it was when all was over.
                if path[0] == "merged-14" and merging in LEFT:
                    path.insert(0, "left")
                paths[" ".join(path)] += 1
                path = []
    if path:
        paths[" ".join(path)] += 1
    (TRACE / "trace").write_text("")
    return paths


def visit() -> dict[str, object]:
    """Let ksmd come by pages of every sort, pass by pass; their process is this one."""
    set_knob("use_zero_pages", 1)
    before = read_counters()
    scans = int((KSM / "full_scans").read_text())
    unique, others = Area(UNIQUE), Area(CHANGING + 2 * EQUAL + ZERO)
    for page in range(UNIQUE):
        unique.fill(page, 1000 + page)
    for page in range(CHANGING, CHANGING + 2 * EQUAL):
        others.fill(page, 2000 + (page - CHANGING) % EQUAL)
    for page in range(CHANGING + 2 * EQUAL, others.pages):
        others.fill(page, 0)
    unique.mergeable()
    others.mergeable()
    for number in range(VISITING_PASSES):
        for page in range(CHANGING):
            others.fill(page, 3000 + number * CHANGING + page)
        one_pass()
    set_knob("smart_scan", 1)
    for _ in range(SKIPPING_PASSES):
        one_pass()
    set_knob("smart_scan", 0)
    libc.munmap(ctypes.c_void_p(unique.start), ctypes.c_size_t(UNMAPPED * PAGE))
    child = in_a_child(exiting)
    one_pass()
    end(child)
    one_pass()
    done = int((KSM / "full_scans").read_text()) - scans
    counters = {key: value - before[key] for key, value in read_counters().items()}
    for area in (unique, others):
        libc.munmap(ctypes.c_void_p(area.start), ctypes.c_size_t(area.pages * PAGE))
    for name in ("sleep_millisecs", "use_zero_pages"):
        set_knob(name, 0)
    KEPT.extend((unique, others))
    set_knob("run", 2)
    set_knob("run", 0)
    return {"pid": os.getpid(), "counters": counters, "paths": {}, "passes": done}


def exiting() -> None:
    area = Area(EXITING)
    for page in range(EXITING):
        area.fill(page, 4000 + page)
    area.mergeable()
    KEPT.append(area)


def in_a_child(setup: Callable[[], None]) -> int:
    """Start a process, and return its pid once it has set up."""
    ready, done = os.pipe()
    child = os.fork()
    if child == 0:
        setup()
        os.write(done, b"r")
        signal.pause()
    os.close(done)
    assert os.read(ready, 1) == b"r", f"{setup.__name__} has failed, as it says above"
    os.close(ready)
    return child


def end(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def work(out: Path, names: list[str]) -> None:
    witness = {}
    for name, value in {"sleep_millisecs": 0, "pages_to_scan": 2000, "smart_scan": 0}.items():
        set_knob(name, value)
    if VISITING in names:
        witness[VISITING] = visit()
        print(witness, file=sys.stderr)
    for name in names:
        if name == VISITING:
            continue
        setup, number, wanted = SCENARIOS[name]
        before = read_counters()
        traced()
        begun = time.monotonic()
        begin_ns = time.monotonic_ns()
        child = in_a_child(setup)
        paths: Counter[str] = Counter()
        deadline = time.monotonic() + PATIENCE_S
        while True:
            passes(number)
            paths += traced()
            if not wanted or any(paths[path] for path in wanted.split("|")):
                break
            assert time.monotonic() < deadline, f"{name}: no {wanted!r} in {PATIENCE_S} s: {paths}"
        counters = {key: value - before[key] for key, value in read_counters().items()}
        end(child)
        set_knob("run", 2)  # forgets what the process has left
        set_knob("run", 0)
        witness[name] = {"pid": child, "counters": counters, "paths": paths}
        witness[name] |= {"begin_ns": begin_ns, "end_ns": time.monotonic_ns()}
        seconds = time.monotonic() - begun
        print(f"{name}: {seconds:.1f} s, {counters}, {dict(paths)}", file=sys.stderr)
    (out / "witness.json").write_text(json.dumps(witness))


if __name__ == "__main__":
    if sys.argv[1] == "work":
        work(Path(sys.argv[2]), sys.argv[3:])
    else:
        main(Path(sys.argv[1]), sys.argv[2:] or [VISITING, *SCENARIOS])
