"""Runs in a guest as root: a known workload under three recorders, and the kernel's own counts.

``guest_functions.py OUT_DIRECTORY RECORDER...`` counts calls with the kernel's own kprobe events
(its kprobe_profile: not every kernel has the function profiler), starts the recorders one inside
the other, each with other rungs, and the workload inside them all. Writes one recording each and
``witness.json``. Every recorder is there before ksmd runs and until it has stopped.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

KSM = Path("/sys/kernel/mm/ksm")
TRACING = Path("/sys/kernel/tracing")
PAGE = mmap.PAGESIZE
# For each wait; a guest ends after conftest.py:LONGEST_S whatever happens.
PATIENCE_S = 400

RECORDERS = {
    "best": [],
    "fentry": [
        *("--without", "tracepoint", "--without", "inlined site", "--without", "watchpoint"),
    ],
    "kprobe": ["--without", "tracepoint", "--without", "fentry"],
    "no recipe": ["--without", "inlined site"],
    "watchpoint": [
        *("--without", "fentry", "--without", "kprobe"),
        *("--without", "inlined site", "--without", "derived"),
    ],
}

WITNESSED = (
    *("try_to_merge_one_page", "try_to_merge_with_ksm_page", "break_ksm", "stable_tree_append"),
    *("remove_rmap_item_from_tree", "remove_node_from_stable_tree"),
    *("ksm_migrate_page", "folio_migrate_ksm", "get_ksm_page", "ksm_get_folio"),
    *("__ksm_enter", "__ksm_exit"),
)

CONTENTS, COPIES, UNIQUE, MOVED, WRITTEN, UNMAPPED, UNMERGED = 103, 3, 101, 53, 47, 43, 109
MERGEABLE = CONTENTS * COPIES


def main(out: Path, recorders: list[str]) -> None:
    names = set(line.split()[2] for line in Path("/proc/kallsyms").read_text().splitlines())
    witnessed = [name for name in WITNESSED if name in names]
    with (TRACING / "kprobe_events").open("w") as events:
        for name in witnessed:
            print(f"p:ksm_witness/{name} {name}", file=events, flush=True)
        if "ksm_next_page_pmd_entry" in names:
            print(
                "r:ksm_witness/found ksm_next_page_pmd_entry ret=$retval", file=events, flush=True
            )
    instance = TRACING / "instances/ksm_witness"
    instance.mkdir()
    found = instance / "events/ksm_witness/found"
    if found.exists():
        (instance / "buffer_size_kb").write_text("16384")
        (found / "filter").write_text("ret == 1")
    for name in witnessed:
        (TRACING / "events/ksm_witness" / name / "enable").write_text("1")
    if found.exists():
        (found / "enable").write_text("1")

    command = [sys.executable, __file__, "work", str(out)]
    for name in recorders:
        record = [str(Path(sys.executable).with_name("ksmtrace")), "record", "--every-page"]
        command = [*record, *RECORDERS[name], "-o", str(out / f"{name}.ksmt"), "--", *command]
    before = {name: hits(name) for name in witnessed}
    sysfs_before = read_sysfs()
    subprocess.run(command, check=True)
    # `ksmtrace record` ends with 0 whatever its command did.
    if not (out / "worked").exists():
        sys.exit("what was recorded has failed, as it says above")
    witness = {
        "calls": {name: hits(name) - before[name] for name in witnessed},
        "pages_found": entries(instance) if found.exists() else None,
        "sysfs": {name: read_sysfs()[name] - sysfs_before[name] for name in sysfs_before},
    }
    (out / "witness.json").write_text(json.dumps(witness))


def hits(name: str) -> int:
    for line in (TRACING / "kprobe_profile").read_text().splitlines():
        if line.split()[0] == name:
            return int(line.split()[1])
    raise LookupError(name)


def entries(instance: Path) -> int:
    total = 0
    for stats in instance.glob("per_cpu/cpu*/stats"):
        counts = dict(line.split(": ") for line in stats.read_text().splitlines())
        assert int(counts["overrun"]) == int(counts["dropped events"]) == 0
        total += int(counts["entries"])
    return total


def read_sysfs() -> dict[str, int]:
    wanted = ("pages_scanned", "pages_skipped", "pages_shared", "pages_sharing")
    return {name: int((KSM / name).read_text()) for name in wanted if (KSM / name).exists()}


def set_knob(name: str, value: int) -> None:
    (KSM / name).write_text(str(value))


def passes(number: int) -> None:
    wanted = int((KSM / "full_scans").read_text()) + number
    deadline = time.monotonic() + PATIENCE_S
    while (done := int((KSM / "full_scans").read_text())) < wanted:
        assert time.monotonic() < deadline, f"in {PATIENCE_S} s full_scans is {done} of {wanted}"
        time.sleep(0.05)


def fill(area: mmap.mmap, page: int, content: int) -> None:
    area[page * PAGE : page * PAGE + 8] = (content + 1).to_bytes(8, "little")


def work(out: Path) -> None:
    area = mmap.mmap(-1, MERGEABLE * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area.madvise(mmap.MADV_MERGEABLE)
    for page in range(MERGEABLE):
        fill(area, page, page % CONTENTS)
    unique = mmap.mmap(-1, UNIQUE * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    unique.madvise(mmap.MADV_MERGEABLE)
    for page in range(UNIQUE):
        fill(unique, page, 1000 + page)

    set_knob("sleep_millisecs", 10)
    set_knob("pages_to_scan", 1000)
    set_knob("run", 1)
    passes(3)
    move_pages(area, MOVED)
    (Path("/proc/sys/vm/compact_memory")).write_text("1")
    passes(1)
    child = os.fork()
    if child == 0:
        signal.pause()
    passes(2)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    for page in range(WRITTEN):
        fill(area, page, 5000 + page)
    passes(2)
    late = mmap.mmap(-1, UNMAPPED * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    late.madvise(mmap.MADV_MERGEABLE)
    for page in range(UNMAPPED):
        fill(late, page, CONTENTS - 1 - page)
    passes(3)
    late.close()
    passes(2)
    area.madvise(13, (MERGEABLE - UNMERGED) * PAGE, UNMERGED * PAGE)  # MADV_UNMERGEABLE
    passes(2)
    set_knob("run", 2)
    set_knob("run", 0)
    (out / "worked").touch()


def move_pages(area: mmap.mmap, number: int) -> None:
    """Move each content's page to the other node, whoever shares it."""
    if not Path("/sys/devices/system/node/node1").exists():
        return
    libc = ctypes.CDLL(None, use_errno=True)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    pages = (ctypes.c_void_p * number)(*(start + page * PAGE for page in range(number)))
    status = (ctypes.c_int * number)()
    move_all, syscall_number = 4, 279
    assert libc.syscall(syscall_number, 0, number, pages, None, status, 0) == 0
    targets = (ctypes.c_int * number)(*(1 - node for node in status))
    deadline = time.monotonic() + PATIENCE_S
    while True:
        result = libc.syscall(syscall_number, 0, number, pages, targets, status, move_all)
        if result == 0 and list(status) == list(targets):
            return
        # ksmd may hold a page for a moment.
        why = f"in {PATIENCE_S} s move_pages: {result}, errno {ctypes.get_errno()}, {list(status)}"
        assert time.monotonic() < deadline, why
        time.sleep(0.1)


if __name__ == "__main__":
    if sys.argv[1] == "work":
        work(Path(sys.argv[2]))
    else:
        main(Path(sys.argv[1]), sys.argv[2:])
