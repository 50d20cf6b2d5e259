"""Runs in a guest: a known workload, and what the two witnesses say of it, phase by phase, as JSON.

Three processes map 13 contents 101 times each and 17 pages that are like no other.
``ksm_witnesses.py [numa]``: with ``numa``, two nodes and merge_across_nodes=0.
"""

import ctypes
import json
import mmap
import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np

from ksmtrace.kernel.bpf_memory import BpfMemory
from ksmtrace.kernel.btf import Btf
from ksmtrace.kernel.ksm_check import check_ksm_memory
from ksmtrace.kernel.ksm_code import find_variables
from ksmtrace.kernel.ksm_layout import read_layout
from ksmtrace.kernel.ksm_memory import ItemState, KsmMemoryReader, NodeKind
from ksmtrace.kernel.page_truth import read_page_truth
from ksmtrace.kernel.pages import probe_kpf_ksm
from ksmtrace.kernel.sysfs import read_ksm
from ksmtrace.kernel.witnesses import Cause, compare_witnesses

CONTENTS, COPIES, UNIQUE = 13, 101, 17
PAGES = CONTENTS * COPIES + UNIQUE
PAGE = mmap.PAGESIZE
MADV_UNMERGEABLE, MADV_DONTNEED = 13, 4
MPOL_BIND, MPOL_MF_MOVE_ALL = 2, 4
SYS_MOVE_PAGES, SYS_SET_MEMPOLICY = 279, 238
# For each wait; the host bounds the whole.
PATIENCE_S = 400
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def knob(name: str, value: object) -> None:
    path = Path("/sys/kernel/mm/ksm", name)
    if path.exists():
        path.write_text(str(value))


def content(number: int) -> bytes:
    return (b"content %03d\n" % number * PAGE)[:PAGE]


class Process:
    """A process that does what it is told: fork, munmap, write, fill, dontneed, unmergeable."""

    def __init__(self, node: int | None = None) -> None:
        order, self.orders = os.pipe()
        self.answers, answer = os.pipe()
        self.pid = os.fork()
        if self.pid:
            assert os.read(self.answers, 1)
            return
        try:
            if node is not None:
                mask = ctypes.c_ulong(1 << node)
                assert libc.syscall(SYS_SET_MEMPOLICY, MPOL_BIND, ctypes.byref(mask), 64) == 0
            memory = mmap.mmap(-1, PAGES * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            memory.madvise(mmap.MADV_NOHUGEPAGE)
            for index in range(CONTENTS * COPIES):
                memory[index * PAGE : (index + 1) * PAGE] = content(index // COPIES)
            for index in range(CONTENTS * COPIES, PAGES):
                memory[index * PAGE : index * PAGE + 16] = os.urandom(16)
            memory.madvise(mmap.MADV_MERGEABLE)
            start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
            os.write(answer, b"x")
            while words := os.read(order, 100).split():
                name, first, count = words[0].decode(), int(words[1]), int(words[2])
                at, size = start + first * PAGE, count * PAGE
                if name == "munmap":
                    assert libc.munmap(at, size) == 0
                elif name == "dontneed":
                    assert libc.madvise(at, size, MADV_DONTNEED) == 0
                elif name == "unmergeable":
                    assert libc.madvise(at, size, MADV_UNMERGEABLE) == 0
                elif name == "write":
                    for index in range(first, first + count):
                        memory[index * PAGE : index * PAGE + 16] = os.urandom(16)
                elif name == "fill":
                    for index in range(first, first + count):
                        memory[index * PAGE : (index + 1) * PAGE] = content(index % CONTENTS)
                elif name == "fork" and os.fork() == 0:
                    signal.pause()
                os.write(answer, b"x")
        finally:
            os._exit(1)

    def do(self, name: str, first: int = 0, count: int = 0) -> None:
        os.write(self.orders, f"{name} {first} {count}".encode())
        assert os.read(self.answers, 1)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def counts() -> tuple[object, ...]:
    values = read_ksm()
    names = ("pages_shared", "pages_sharing", "pages_unshared", "pages_volatile")
    return tuple(values[name] for name in names)


def scan_until_quiescent() -> None:
    knob("run", 1)
    same, last = 0, None
    deadline = time.monotonic() + PATIENCE_S
    while same < 3:
        passes = read_ksm()["full_scans"]
        while read_ksm()["full_scans"] == passes:
            assert time.monotonic() < deadline, f"KSM is not at rest in {PATIENCE_S} s: {last}"
            time.sleep(0.01)
        now = counts()
        same, last = (same + 1 if now == last else 0), now
    knob("run", 0)


def compare(reader: KsmMemoryReader) -> dict[str, object]:
    started = time.monotonic()
    memory = reader.read()
    nr_ranges = len(reader.memory.segments)
    read = time.monotonic()
    pages = read_page_truth(kpf_ksm=KPF)
    paged = time.monotonic()
    differences = compare_witnesses(memory, pages)
    shown = {name: value for name, value in read_ksm().items() if value is not None}
    computed = memory.sysfs_values(PAGE)
    nodes, items = memory.stable_nodes, memory.rmap_items
    with_sharers = nodes[(nodes["kind"] != NodeKind.CHAIN) & (nodes["rmap_hlist_len"] > 0)]
    merged = pages.merged_frames()
    is_of_a_node = np.isin(pages.pages["pfn"], with_sharers["kpfn"])
    told = pages.pages["is_ksm"] >= 0
    return {
        "nr_ranges": nr_ranges,
        "consistent": memory.consistent,
        "at_head": memory.cursor.at_head,
        "torn": memory.torn,
        "changed": memory.changed,
        "violations": check_ksm_memory(memory),
        "sysfs": {
            name: [value, shown[name]]
            for name, value in computed.items()
            if shown.get(name, value) != value
        },
        "sysfs_compared": sum(name in shown for name in computed),
        "differences": {
            Cause(c).name: n for c, n in Counter(differences["cause"].tolist()).items()
        },
        "kpf_ksm": pages.kpf_ksm.truthful,
        "nr_processes": pages.nr_processes,
        "nr_ksm_pages": int((pages.pages["is_ksm"] == 1).sum()),
        "nr_not_told": int((~told & is_of_a_node).sum()),
        "nr_told_wrongly": int((told & (is_of_a_node != (pages.pages["is_ksm"] == 1))).sum()),
        "states": {ItemState(s).name: n for s, n in Counter(items["state"].tolist()).items()},
        "kinds": {NodeKind(k).name: n for k, n in Counter(nodes["kind"].tolist()).items()},
        "roots": {r: n for r, n in sorted(Counter(nodes["root"].tolist()).items())},
        "longest": int(nodes["rmap_hlist_len"].max(initial=0)),
        "stale": int((nodes["is_current"] == 0).sum()),
        "owners": sorted(set(memory.mm_slots["pid"].tolist())),
        "exited": int((memory.mm_slots["mm_users"] == 0).sum()),
        # A frame for each node, mapped as often as it has sharers: what is left without KPF_KSM
        # are the frames mapped more than once.
        "frames": sorted(zip(merged["pfn"].tolist(), merged["nr_pages"].tolist(), strict=True))
        == sorted(
            (kpfn, length)
            for kpfn, length in zip(
                with_sharers["kpfn"].tolist(), with_sharers["rmap_hlist_len"].tolist(), strict=True
            )
            if length > 1 or pages.kpf_ksm.truthful
        ),
        "mapcounts": bool((merged["mapcount"] == merged["nr_pages"]).all()),
        "seconds": [round(read - started, 3), round(paged - read, 3)],
    }


def read_out_of_the_code(reader: KsmMemoryReader) -> dict[str, object]:
    """Find mm/ksm.c's variables without the kernel's list of them, and read by a BPF program."""
    with BpfMemory.open() as memory:
        layout = read_layout(Btf.read())
        found = find_variables(memory, layout)
        ours = KsmMemoryReader(memory, found, layout).read()
    theirs = reader.read()
    listed = {name: address for name, address in reader.addresses.items() if name in found}
    return {
        "found": sorted(found),
        "differ": sorted(name for name in listed if listed[name] != found[name]),
        "not_listed": sorted(found.keys() - listed.keys()),
        "not_found": sorted(reader.addresses.keys() - found.keys()),
        "arrays_differ": [
            name
            for name in ("stable_nodes", "sharers", "rmap_items", "unstable_nodes", "mm_slots")
            if not np.array_equal(getattr(ours, name), getattr(theirs, name))
        ],
        "nr_sharers": len(ours.sharers),
        "cursors_agree": ours.cursor == theirs.cursor,
    }


def read_while_scanning(reader: KsmMemoryReader) -> dict[str, object]:
    knob("run", 1)
    readings = []
    for _ in range(7):
        memory = reader.read()
        readings.append((memory.consistent, memory.attempts))
    knob("run", 0)
    return {
        "consistent": sum(consistent for consistent, _ in readings),
        "attempts": [attempts for _, attempts in readings],
    }


def move_pages(process: Process, node: int) -> int:
    pages = read_page_truth([process.pid], KPF).pages
    addresses = np.ascontiguousarray(pages["address"])
    nodes = np.full(len(pages), node, np.int32)
    status = np.zeros(len(pages), np.int32)
    failed = libc.syscall(
        SYS_MOVE_PAGES,
        process.pid,
        ctypes.c_ulong(len(pages)),
        ctypes.c_void_p(addresses.ctypes.data),
        ctypes.c_void_p(nodes.ctypes.data),
        ctypes.c_void_p(status.ctypes.data),
        MPOL_MF_MOVE_ALL,
    )
    assert failed >= 0, os.strerror(ctypes.get_errno())
    return int((status == node).sum())


def set_up(across_nodes: int) -> None:
    for name, value in (
        ("run", 2),
        ("run", 0),
        ("max_page_sharing", 7),
        ("merge_across_nodes", across_nodes),
        ("sleep_millisecs", 0),
        ("pages_to_scan", 5000),
        ("smart_scan", 0),
    ):
        knob(name, value)


def times_rested() -> int:
    """Count how often ksmd has gone to sleep by itself: after each batch."""
    ksmd = next(p.parent for p in Path("/proc").glob("[0-9]*/comm") if p.read_text() == "ksmd\n")
    status = (ksmd / "status").read_text()
    return int(status.partition("\nvoluntary_ctxt_switches:")[2].split()[0])


def steps(reader: KsmMemoryReader, count: int, nr_pages: int) -> list[dict[str, object]]:
    """Look at what is there in the midst of a pass, after a batch or a few each."""
    knob("pages_to_scan", nr_pages)
    knob("sleep_millisecs", 1)
    phases = []
    for _ in range(count):
        rested = times_rested()
        knob("run", 1)
        deadline = time.monotonic() + PATIENCE_S
        while times_rested() == rested:
            assert time.monotonic() < deadline, f"ksmd made no batch in {PATIENCE_S} s"
            time.sleep(0.001)
        knob("run", 0)
        phases.append(compare(reader))
    knob("pages_to_scan", 5000)
    knob("sleep_millisecs", 0)
    return phases


def set_movable_blocks(state: str) -> int:
    blocks = [
        zones.parent
        for zones in Path("/sys/devices/system/memory").glob("memory*/valid_zones")
        if "Movable" in zones.read_text()
    ]
    for block in blocks:
        (block / "state").write_text(state)
    return len(blocks)


def plain(reader: KsmMemoryReader) -> dict[str, object]:
    phases: dict[str, object] = {}
    set_up(1)
    first, second, third = Process(), Process(), Process()
    scan_until_quiescent()
    phases["merged"] = compare(reader)
    phases["code"] = read_out_of_the_code(reader)
    phases["nr_offline"] = set_movable_blocks("offline")
    phases["offline"] = compare(reader)
    set_movable_blocks("online")
    first.do("fork")
    third.kill()
    second.do("munmap", 0, 211)
    second.do("dontneed", 211, 107)
    second.do("write", 318, 103)
    second.do("unmergeable", 421, 97)
    phases["changed"] = compare(reader)
    phases["steps"] = steps(reader, 5, 211)
    scan_until_quiescent()
    phases["scanned"] = compare(reader)
    phases["scanning"] = read_while_scanning(reader)
    phases["stopped"] = compare(reader)
    knob("run", 2)
    phases["unmerged"] = compare(reader)
    knob("run", 0)
    return phases


def numa(reader: KsmMemoryReader) -> dict[str, object]:
    phases: dict[str, object] = {}
    set_up(0)
    earliest, first, second = Process(1), Process(1), Process(0)
    earliest.do("munmap", UNIQUE, PAGES - UNIQUE)
    earliest.do("write", 0, UNIQUE)
    scan_until_quiescent()
    phases["merged"] = compare(reader)
    phases["code"] = read_out_of_the_code(reader)
    phases["nr_moved"] = [move_pages(first, 0), move_pages(second, 1)]
    phases["moved"] = compare(reader)
    # Found from an ordinary page, a node whose page has left for another NUMA node is displaced
    # from its tree, and waits on migrate_nodes until ksmd comes to that page.
    earliest.do("fill", 0, CONTENTS)
    phases["steps"] = steps(reader, 5, 19)
    scan_until_quiescent()
    phases["scanned"] = compare(reader)
    return phases


KPF = probe_kpf_ksm()
with KsmMemoryReader.open() as opened:
    print(json.dumps((numa if sys.argv[1:] == ["numa"] else plain)(opened)))
sys.stdout.flush()
