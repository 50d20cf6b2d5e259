"""Runs in a guest as root: scenarios, and after each a reading of both witnesses.

``guest_tree.py OUT_FILE SCENARIO...`` records every page; inside the recording each scenario makes
or changes pages, lets ksmd make its passes, and stops it. Then the recorder reads what mm/ksm.c
holds and what mergeable memory maps. Nothing is taken back between the scenarios. A SCENARIO with a
``/`` in it is a program with its arguments, beside which readings are made as well; the kernel's
own tests count all of KSM's pages, so they come first.

What each scenario counted itself goes to OUT_FILE.json: a list of objects, one per scenario.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import random
import shlex
import signal
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

KSM = Path("/sys/kernel/mm/ksm")
PAGE = mmap.PAGESIZE
SEED = 20261121
BLOCK_S = 200
# For each other wait; the host bounds the whole.
PATIENCE_S = 400
CHURN_S = float(os.environ.get("CHURN_S", "20"))

CGROUP = Path("/sys/fs/cgroup/tree")
MADV_UNMERGEABLE, MADV_PAGEOUT = 13, 21
PRESENT, SWAPPED, FRAME = 1 << 63, 1 << 62, (1 << 55) - 1
KPF_SWAPCACHE, KPF_KSM = 1 << 13, 1 << 21
READ = "what the kernel holds was read"  # as the recorder says when it was asked to
# When a program that runs is stopped for a reading, in seconds since it went on.
PAUSES_S = (0.17, 0.53, 1.3)
MOST_TRIES = 20

children: list[int] = []
areas: dict[str, mmap.mmap] = {}
counted: dict[str, Any] = {}


def main(out: Path, scenarios: list[str]) -> None:
    set_knobs()
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
    said = out.with_suffix(".err")
    with said.open("w") as stderr:
        status = subprocess.run([*record, "--", *work], stderr=stderr).returncode
    sys.stderr.write(said.read_text())
    sys.exit(status)


def work(out: Path, scenarios: list[str]) -> None:
    if "swap" in scenarios:
        join_cgroup()
    told = []
    for name in scenarios:
        counted.clear()
        begin = time.monotonic()
        if "/" in name:
            run_program(out, shlex.split(name))
        else:
            SCENARIOS[name]()
        set_knob("run", 0)
        if name == "live":
            show_live_tree(out)
        read_witnesses(out)
        took_s = round(time.monotonic() - begin, 1)
        told.append({"scenario": name, "took_s": took_s, **counted})
        out.with_suffix(".json").write_text(json.dumps(told))
    for child in children:
        os.kill(child, signal.SIGKILL)


def read_witnesses(out: Path) -> None:
    """Ask the recorder, and wait until it says that what it has read is in the file."""
    said = out.with_suffix(".err")
    before = said.read_text().count(READ)
    os.kill(os.getppid(), signal.SIGUSR1)
    deadline = time.monotonic() + PATIENCE_S
    while said.read_text().count(READ) == before:
        assert time.monotonic() < deadline, said.read_text()
        time.sleep(0.1)


def run_program(out: Path, words: list[str]) -> None:
    """Run a program that steers ksmd itself; stop both now and then, and read.

    The claims are judged as the kernel stands then, beside ksm_functional_tests.
    """
    readings = 0
    judged = []
    with subprocess.Popen(words, process_group=0) as process:
        for pause_s in PAUSES_S:
            try:
                process.wait(pause_s)
                break
            except subprocess.TimeoutExpired:
                pass
            os.killpg(process.pid, signal.SIGSTOP)
            running = (KSM / "run").read_text().strip() == "1"
            if running:
                set_knob("run", 0)
            read_witnesses(out)
            readings += 1
            if words[0].endswith("ksm_functional_tests"):
                judged.append(output_of("check"))
            if running:
                set_knob("run", 1)
            os.killpg(process.pid, signal.SIGCONT)
    status, tries = process.returncode, 1
    # ksm_tests gives ksmd two passes, and a page that something refers to meanwhile stays out: of
    # -N on an emulated 6.12 four of ten tries failed, beside readings and without.
    while status and tries < MOST_TRIES:
        status = subprocess.run(words).returncode
        tries += 1
    counted.update(status=status, tries=tries, readings=readings, judged=judged)


def show_live_tree(out: Path) -> None:
    counted.update(tree=output_of("tree"))


def output_of(command: str) -> object:
    """Let ksmtrace look at the kernel as it stands."""
    ksmtrace = str(Path(sys.executable).with_name("ksmtrace"))
    shown = subprocess.run([ksmtrace, command, "--json"], stdout=subprocess.PIPE)
    assert shown.returncode in (0, 1), command
    return json.loads(shown.stdout)


def set_knobs() -> None:
    set_knob("run", 2)
    for name, value in (
        *(("max_page_sharing", 7), ("merge_across_nodes", 1)),
        *(("sleep_millisecs", 10), ("pages_to_scan", 1000)),
        *(("stable_node_chains_prune_millisecs", 0), ("run", 0)),
    ):
        set_knob(name, value)


def set_knob(name: str, value: int) -> None:
    (KSM / name).write_text(str(value))


def passes(number: int) -> None:
    set_knob("run", 1)
    wanted = int((KSM / "full_scans").read_text()) + number
    deadline = time.monotonic() + PATIENCE_S
    while (done := int((KSM / "full_scans").read_text())) < wanted:
        assert time.monotonic() < deadline, f"in {PATIENCE_S} s full_scans is {done} of {wanted}"
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
    set_knobs()
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
    before, after = (child_process() for _ in range(2))
    end(before)
    pages_to_scan = int((KSM / "pages_to_scan").read_text())
    # So few that a pass takes its time.
    counts = ("pages_shared", "pages_sharing", "pages_unshared", "pages_volatile")
    set_knob("pages_to_scan", sum(int((KSM / name).read_text()) for name in counts) // 29 + 1)
    deadline = time.monotonic() + PATIENCE_S
    meanwhile = 1
    while meanwhile:
        assert time.monotonic() < deadline, f"no child exited during a pass, in {PATIENCE_S} s"
        during = child_process()
        passes(1)
        at = int((KSM / "full_scans").read_text())
        end(during)
        meanwhile = int((KSM / "full_scans").read_text()) - at
    set_knob("pages_to_scan", pages_to_scan)
    passes(2)
    end(after)


def end(child: int) -> None:
    children.remove(child)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def unmerge() -> None:
    """MADV_UNMERGEABLE of a half, and munmap of another area."""
    areas["equal"].madvise(MADV_UNMERGEABLE, 200 * PAGE, 97 * PAGE)
    areas.pop("unique").close()
    passes(1)


def migrate() -> None:
    """Pages moved to the other node and back, and compaction."""
    move_most(101, 1)
    passes(1)
    move_most(59, 0)
    Path("/proc/sys/vm/compact_memory").write_text("1")
    passes(2)


def numa() -> None:
    """From here on a tree for each node, between which pages move."""
    set_knob("run", 2)
    set_knob("merge_across_nodes", 0)
    passes(3)
    migrate()


def big() -> None:
    """Three processes with 10,007 pages each, of 211 contents."""
    for _ in range(3):
        filled, fill_done = os.pipe()
        child = os.fork()
        if child == 0:
            area = make_area("big", 10_007, lambda page: 5000 + page % 211)
            os.write(fill_done, b"x")
            signal.pause()
            os._exit(int(area[0]))
        children.append(child)
        os.read(filled, 1)
    set_knob("pages_to_scan", 20_000)
    passes(4)


def join_cgroup() -> None:
    """Into a cgroup of its own, that memory is charged to from now on."""
    CGROUP.parent.joinpath("cgroup.subtree_control").write_text("+memory")
    CGROUP.mkdir()
    CGROUP.joinpath("cgroup.procs").write_text(str(os.getpid()))


def swap() -> None:
    """KSM pages that are pushed out to swap, and come back: some read, some written to."""
    passes(3)
    set_knob("run", 0)
    area = areas["equal"]
    before = vmstat()
    shared = [frame for frame, places in Counter(frames(area)).items() if frame and places > 1]
    ksm_pages = {frame for frame in shared if flags(frame) & KPF_KSM}
    sharers = [page for page, frame in enumerate(frames(area)) if frame in ksm_pages]
    # Reclaim passes a page over that has been referenced since it last came by.
    deadline = time.monotonic() + PATIENCE_S
    out: list[int] = []
    while len(out) <= len(sharers) // 2 and time.monotonic() < deadline:
        # To nothing: what was mapped before the cgroup was joined is not charged to it, and what
        # is left of the merged pages may be less than any limit worth its name.
        CGROUP.joinpath("memory.high").write_text("0")
        CGROUP.joinpath("memory.high").write_text("max")
        entries = pagemap(area)
        out = [entries[page] for page in sharers if entries[page] & SWAPPED]
    # So ksmd meets them where they are.
    passes(1)
    set_knob("run", 0)
    half = len(area) // PAGE // 2
    assert sum(area[: half * PAGE : PAGE]) >= 0
    for page in range(half, half + 59):
        fill(area, page, page % 13)
    after = vmstat()
    counted.update(
        ksm_pages=len(ksm_pages),
        ksm_sharers=len(sharers),
        ksm_sharers_out=len(out),
        # Sharers of one page that is out have one swap entry.
        ksm_pages_out=len({entry & FRAME for entry in out}),
        in_swap_cache=sum(
            bool(flags(frame) & KPF_SWAPCACHE) for frame in set(frames(area)) if frame > 0
        ),
        **{
            name: after[name] - before[name]
            for name in ("pswpout", "pswpin", "ksm_swpin_copy", "cow_ksm")
            if name in after
        },
    )
    passes(2)


def pagemap(area: mmap.mmap) -> tuple[int, ...]:
    """The entry of each page in /proc/self/pagemap."""
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    number = len(area) // PAGE
    with Path("/proc/self/pagemap").open("rb") as file:
        return struct.unpack(f"{number}Q", os.pread(file.fileno(), 8 * number, start // PAGE * 8))


def frames(area: mmap.mmap) -> list[int]:
    """The frame of each page, 0 where there is none."""
    return [entry & FRAME if entry & PRESENT else 0 for entry in pagemap(area)]


def flags(frame: int) -> int:
    """Of /proc/kpageflags."""
    with Path("/proc/kpageflags").open("rb") as kpageflags:
        return int.from_bytes(os.pread(kpageflags.fileno(), 8, frame * 8), "little")


def vmstat() -> dict[str, int]:
    lines = Path("/proc/vmstat").read_text().splitlines()
    return {name: int(value) for name, value in map(str.split, lines)}


def offline() -> None:
    """Blocks of memory that go, with KSM pages in them, and come back."""
    sum(areas["equal"][::PAGE])
    passes(2)
    move_most(101, 1)  # there is memory that can go
    set_knob("run", 0)
    directory = Path("/sys/devices/system/memory")
    block_pages = int((directory / "block_size_bytes").read_text(), 16) // PAGE
    before = {frame for area in areas.values() for frame in frames(area) if frame}
    blocks = [
        zones.parent
        for zones in sorted(directory.glob("memory*/valid_zones"))
        if "Movable" in zones.read_text()
    ]
    gone: set[int] = set()
    deadline = time.monotonic() + PATIENCE_S
    while len(gone) < len(blocks):
        for block in blocks:
            number = int(block.name.removeprefix("memory"))
            if number not in gone and set_block(block / "state", "offline"):
                gone.add(number)
        if len(gone) == len(blocks) or time.monotonic() > deadline:
            break
        # A 6.1 was seen to fail with one KSM page, again and again, while ksmd was stopped.
        passes(2)
        set_knob("run", 0)
    moved = {frame for frame in before if frame // block_pages in gone}
    after = {frame for area in areas.values() for frame in frames(area)}
    assert not moved & after
    passes(1)
    back = sum(
        set_block(state, "online_movable") for state in sorted(directory.glob("memory*/state"))
    )
    counted.update(blocks_gone=len(gone), blocks_back=back, frames_moved=len(moved))
    passes(2)


def set_block(state: Path, wanted: str) -> bool:
    """Ask for a state of a block of memory, and say what it was that was waited for in vain."""
    if state.read_text().strip() == wanted.partition("_")[0]:
        return False
    # Another program, because the kernel tries for as long as nobody interrupts it
    # (mm/memory_hotplug.c:offline_pages).
    with subprocess.Popen(["tee", state], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as tee:
        assert tee.stdin is not None
        tee.stdin.write(wanted.encode())
        tee.stdin.close()
        try:
            if tee.wait(BLOCK_S) == 0:
                return True
        except subprocess.TimeoutExpired:
            counted["waits_in"] = Path(f"/proc/{tee.pid}/stack").read_text().splitlines()
            tee.terminate()
    # It holds something that cannot be moved: the kernel's log says what.
    log = subprocess.run(["dmesg"], capture_output=True, text=True).stdout
    counted["log"] = log.splitlines()[-13:]
    return False


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
        area.madvise(MADV_UNMERGEABLE, first * PAGE, count * PAGE)
        area.madvise(mmap.MADV_MERGEABLE)
    elif choice < 75:
        area.madvise(mmap.MADV_DONTNEED, first * PAGE, count * PAGE)
    elif choice < 80:
        areas.pop(name).close()
    elif choice < 88 and len(children) < 5:
        child_process()
    elif choice < 93 and children:
        end(at_random.choice(children))
    elif choice < 96:
        Path("/proc/sys/vm/compact_memory").write_text("1")
    elif choice < 98:
        set_knob("run", at_random.choice([0, 2]))
        set_knob("run", 1)
    elif choice < 99:
        area.madvise(MADV_PAGEOUT, first * PAGE, count * PAGE)
    else:
        move_pages(area, count, at_random.randrange(2))


def again() -> None:
    """Run 1, 2, 1."""
    passes(1)
    set_knob("run", 2)
    passes(3)


def live() -> None:
    """What `ksmtrace tree` shows of the running kernel."""
    passes(1)


SCENARIOS: dict[str, Callable[[], None]] = {
    "live": live,
    "chains": chains,
    "writes": writes,
    "forks": forks,
    "unmerge": unmerge,
    "migrate": migrate,
    "numa": numa,
    "big": big,
    "swap": swap,
    "offline": offline,
    "churn": churn,
    "again": again,
}


def move_most(number: int, node: int) -> None:
    """Move pages to a NUMA node, again where some were in use and the others left alone."""
    deadline = time.monotonic() + PATIENCE_S
    while move_pages(areas["equal"], number, node) <= number // 2:
        assert time.monotonic() < deadline, counted
        time.sleep(0.1)


def move_pages(area: mmap.mmap, number: int, node: int) -> int:
    """Move the first pages to a NUMA node; returns how many are there now."""
    libc = ctypes.CDLL(None, use_errno=True)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    pages = (ctypes.c_void_p * number)(*(start + page * PAGE for page in range(number)))
    status = (ctypes.c_int * number)()
    move_all, syscall_number = 4, 279
    # Without targets it tells where the pages are.
    for targets in ((ctypes.c_int * number)(*([node] * number)), None):
        result = libc.syscall(syscall_number, 0, number, pages, targets, status, move_all)
        assert result >= 0, f"move_pages: errno {ctypes.get_errno()}"
    there = Counter(status)
    if there[node] < number:
        counted.setdefault("not_moved", []).append(dict(there))
    return there[node]


if __name__ == "__main__":
    if sys.argv[1] == "work":
        work(Path(sys.argv[2]), sys.argv[3:])
    else:
        main(Path(sys.argv[1]), sys.argv[2:])
