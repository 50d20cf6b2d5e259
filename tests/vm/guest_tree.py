"""Runs in a guest as root: scenarios, and after each a reading of both witnesses.

``guest_tree.py OUT_FILE SCENARIO...`` records every page; inside the recording each scenario makes
or changes pages, lets ksmd make its passes, and stops it. Then the recorder reads what mm/ksm.c
holds and what mergeable memory maps. Nothing is taken back between the scenarios.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

KSM = Path("/sys/kernel/mm/ksm")
PAGE = mmap.PAGESIZE
SEED = 20261121
CHURN_S = float(os.environ.get("CHURN_S", "20"))

children: list[int] = []
areas: dict[str, mmap.mmap] = {}


def main(out: Path, scenarios: list[str]) -> None:
    set_knob("run", 2)
    for name, value in (("max_page_sharing", 7), ("sleep_millisecs", 10), ("pages_to_scan", 1000)):
        set_knob(name, value)
    set_knob("stable_node_chains_prune_millisecs", 0)
    if "numa" in scenarios:
        set_knob("merge_across_nodes", 0)
    ksmtrace = str(Path(sys.executable).with_name("ksmtrace"))
    record = [
        ksmtrace,
        "record",
        "--every-page",
        "--witnesses",
        "--interval",
        "3600",
        "-o",
        str(out),
    ]
    work = [sys.executable, __file__, "work", str(out), *scenarios]
    sys.exit(subprocess.run([*record, "--", *work]).returncode)


def work(out: Path, scenarios: list[str]) -> None:
    for name in scenarios:
        SCENARIOS[name]()
        set_knob("run", 0)
        read_witnesses(out)
    for child in children:
        os.kill(child, signal.SIGKILL)


def read_witnesses(out: Path) -> None:
    """Ask the recorder, and wait until what it has read is in the file."""
    before = out.stat().st_size
    os.kill(os.getppid(), signal.SIGUSR1)
    size, since = before, time.monotonic()
    while size == before or time.monotonic() < since + 3:
        time.sleep(0.2)
        if out.stat().st_size != size:
            size, since = out.stat().st_size, time.monotonic()


def set_knob(name: str, value: int) -> None:
    (KSM / name).write_text(str(value))


def passes(number: int) -> None:
    set_knob("run", 1)
    wanted = int((KSM / "full_scans").read_text()) + number
    deadline = time.monotonic() + 180
    while int((KSM / "full_scans").read_text()) < wanted:
        assert time.monotonic() < deadline, "ksmd is too slow"
        time.sleep(0.05)


def make_area(name: str, pages: int, content: Callable[[int], int]) -> mmap.mmap:
    area = mmap.mmap(-1, pages * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area.madvise(mmap.MADV_MERGEABLE)
    areas[name] = area
    for page in range(pages):
        fill(area, page, content(page))
    return area


def fill(area: mmap.mmap, page: int, content: int) -> None:
    area[page * PAGE : page * PAGE + 8] = (content + 1).to_bytes(8, "little")


def child_process() -> int:
    child = os.fork()
    if child == 0:
        signal.pause()
        os._exit(0)
    children.append(child)
    return child


def chains() -> None:
    """Equal pages, more of each content than one stable_node takes, and pages without equal."""
    make_area("equal", 13 * 31, lambda page: page % 13)
    make_area("unique", 53, lambda page: 1000 + page)
    passes(4)


def writes() -> None:
    """Writes while ksmd scans, some of which make pages equal again."""
    set_knob("run", 1)
    at_random = random.Random(SEED)
    for _ in range(211):
        fill(areas["equal"], at_random.randrange(13 * 31), at_random.randrange(29))
        time.sleep(0.002)
    passes(1)


def forks() -> None:
    """Children that exit before, during and after a pass, and one that stays."""
    child_process()
    gone = [child_process() for _ in range(3)]
    os.kill(gone[0], signal.SIGKILL)
    os.waitpid(gone[0], 0)
    set_knob("run", 1)
    time.sleep(0.02)
    os.kill(gone[1], signal.SIGKILL)
    os.waitpid(gone[1], 0)
    passes(2)
    os.kill(gone[2], signal.SIGKILL)
    os.waitpid(gone[2], 0)
    del children[-3:]


def unmerge() -> None:
    """MADV_UNMERGEABLE of a half, and munmap of another area."""
    areas["equal"].madvise(13, 200 * PAGE, 97 * PAGE)
    areas.pop("unique").close()
    passes(1)


def migrate() -> None:
    """Pages moved to the other node and back, and compaction."""
    move_pages(areas["equal"], 101, 1)
    passes(1)
    move_pages(areas["equal"], 59, 0)
    Path("/proc/sys/vm/compact_memory").write_text("1")
    passes(2)


def big() -> None:
    """Three processes with 10,007 pages each, of 211 contents."""
    for _ in range(3):
        child = os.fork()
        if child == 0:
            area = make_area("big", 10_007, lambda page: 5000 + page % 211)
            signal.pause()
            os._exit(int(area[0]))
        children.append(child)
    time.sleep(5)
    set_knob("pages_to_scan", 20_000)
    passes(4)


def swap() -> None:
    """Memory that is pushed out to swap, in part, and comes back."""
    passes(2)
    free_bytes = 1024 * int(meminfo("MemAvailable"))
    hog = mmap.mmap(-1, free_bytes + (96 << 20), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for at in range(0, len(hog), PAGE):
        hog[at : at + 8] = at.to_bytes(8, "little")
    passes(2)
    assert int(meminfo("SwapTotal")) - int(meminfo("SwapFree")) > 0
    hog.close()
    for area in areas.values():
        sum(area[::PAGE])
    passes(2)


def meminfo(name: str) -> str:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(line.split()[1] for line in lines if line.startswith(f"{name}:"))


def offline() -> None:
    """Blocks of memory that go, and come back."""
    passes(2)
    changed = 0
    for state in ("offline", "online_movable"):
        for block in sorted(Path("/sys/devices/system/memory").glob("memory*/valid_zones")):
            if "Movable" in block.read_text() or state != "offline":
                changed += set_block(block.with_name("state"), state)
    assert changed >= 2, "no block of memory went and came back"
    passes(2)


def set_block(state: Path, wanted: str) -> bool:
    if state.read_text().strip() == wanted.partition("_")[0]:
        return False
    try:
        state.write_text(wanted)
    except OSError:
        return False  # it holds something that cannot be moved
    return True


def churn() -> None:
    """Everything at random, for CHURN_S seconds, while ksmd scans."""
    at_random = random.Random(SEED)
    set_knob("run", 1)
    ends = time.monotonic() + CHURN_S
    while time.monotonic() < ends:
        step(at_random)
        time.sleep(at_random.random() / 50)
    passes(1)


def step(at_random: random.Random) -> None:
    name = at_random.choice(["a", "b", "c"])
    area = areas.get(name)
    choice = at_random.randrange(100)
    if area is None:
        make_area(name, at_random.randrange(31, 499), lambda page: at_random.randrange(97))
        return
    pages = len(area) // PAGE
    first = at_random.randrange(pages)
    count = at_random.randrange(1, pages - first + 1)
    if choice < 60:
        for _ in range(7):
            fill(area, at_random.randrange(pages), at_random.randrange(97))
    elif choice < 68:
        area.madvise(13, first * PAGE, count * PAGE)
        area.madvise(mmap.MADV_MERGEABLE)
    elif choice < 75:
        area.madvise(mmap.MADV_DONTNEED, first * PAGE, count * PAGE)
    elif choice < 80:
        areas.pop(name).close()
    elif choice < 88 and len(children) < 5:
        child_process()
    elif choice < 93 and children:
        child = children.pop(at_random.randrange(len(children)))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    elif choice < 96:
        Path("/proc/sys/vm/compact_memory").write_text("1")
    elif choice < 98:
        set_knob("run", at_random.choice([0, 2]))
        set_knob("run", 1)


def again() -> None:
    """Run 1, 2, 1."""
    passes(1)
    set_knob("run", 2)
    passes(3)


SCENARIOS: dict[str, Callable[[], None]] = {
    "chains": chains,
    "writes": writes,
    "forks": forks,
    "unmerge": unmerge,
    "migrate": migrate,
    "numa": migrate,
    "big": big,
    "swap": swap,
    "offline": offline,
    "churn": churn,
    "again": again,
}


def move_pages(area: mmap.mmap, number: int, node: int) -> None:
    if not Path("/sys/devices/system/node/node1").exists():
        return
    libc = ctypes.CDLL(None, use_errno=True)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    pages = (ctypes.c_void_p * number)(*(start + page * PAGE for page in range(number)))
    targets = (ctypes.c_int * number)(*([node] * number))
    status = (ctypes.c_int * number)()
    move_all, syscall_number = 4, 279
    result = libc.syscall(syscall_number, 0, number, pages, targets, status, move_all)
    assert result >= 0, f"move_pages: errno {ctypes.get_errno()}"
    assert list(status).count(node) > number // 2


if __name__ == "__main__":
    if sys.argv[1] == "work":
        work(Path(sys.argv[2]), sys.argv[3:])
    else:
        main(Path(sys.argv[1]), sys.argv[2:])
