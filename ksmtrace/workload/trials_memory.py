"""The trials that take swap, cgroups, huge pages, NUMA nodes, or memory to take offline."""

from __future__ import annotations

import ctypes
import errno
import functools
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ksmtrace.errors import CannotRun
from ksmtrace.kernel.files import read_text
from ksmtrace.kernel.procfs import read_smaps_ksm
from ksmtrace.kernel.sysfs import DIRECTORY
from ksmtrace.workload.children import PAGE_BYTES, Child, Layout
from ksmtrace.workload.group import Group, make_group
from ksmtrace.workload.lab import Lab, frames_at, is_mergeable, write_knob

_MADV_UNMERGEABLE = 13
_MPOL_MF_MOVE_ALL = 4
_SYS_MOVE_PAGES = 279  # arch/x86/entry/syscalls/syscall_64.tbl
_HUGE_PAGES = (2 << 20) // PAGE_BYTES
_SPARE_PAGES = 67
_NODES = Path("/sys/devices/system/node")
_BLOCKS = Path("/sys/devices/system/memory")


def _swapped(lab: Lab) -> None:
    """91 pages of 7 contents are swapped out, scanned, read, merged; again, and read with run 2."""
    if "\n" not in (read_text("/proc/swaps") or ""):
        raise CannotRun("there is no swap")
    with make_group("swapped") as group:
        with group.births():
            child = lab.start(Layout("ksm-swapped", 91, 0, 7))[0]
        lab.merged(7, 84)
        before = lab.order(child, "digest_all")
        lab.read("merged", witness=True)
        _swap_out(lab, group, child)
        lab.read("swapped out", swapped=lab.nr_swapped(child))
        lab.passes(1)
        lab.read("scanned", swapped=lab.nr_swapped(child), witness=True)
        after = lab.order(child, "digest_all")
        lab.read("swapped in", digests=[before, after])
        lab.merged(7, 84)
        lab.read("merged again", witness=True)
        _swap_out(lab, group, child)
        swapped = lab.nr_swapped(child)
        lab.unmerge()
        lab.read("unmerged", swapped=swapped)
        last = lab.order(child, "digest_all")
        lab.read("swapped in with run 2", digests=[before, last])
        lab.knobs.set(run=0)
        lab.kill(child)


def _swap_out(lab: Lab, group: Group, child: Child) -> None:
    def is_out() -> bool:
        # What was used of late takes more than one attempt.
        group.swap_out()
        return lab.nr_swapped(child) == child.layout.pages

    lab.wait(is_out, f"{child.layout.pages} pages to be swapped out")


def _short(lab: Lab) -> None:
    """503 pages are to be unmerged with memory for 67: by madvise, by run=2, by a killed writer."""
    with make_group("short") as group:
        with group.births():
            child = lab.start(Layout("ksm-short", 503, 0, 7))[0]
        try:
            _unmerge_short(lab, group, child)
        finally:
            group.leave_pages(None)
        lab.kill(child)


def _unmerge_short(lab: Lab, group: Group, child: Child) -> None:
    oom_score = Path(f"/proc/{child.pid}/oom_score_adj")
    oom_score.write_text("-1000")
    start = int(lab.order(child, "start"))
    lab.merged(7, 496)
    lab.read("merged")
    order = f"advise {_MADV_UNMERGEABLE} 0 503"
    group.leave_pages(_SPARE_PAGES)
    lab.begin_order(child, order)
    # Where it fails, its process cannot go on either before there is memory again.
    lab.wait(lambda: group.event("oom") > 0, "the cgroup to be short of memory")
    lab.stop.pause(0.5)
    group.leave_pages(None)
    result = int(lab.end_order(child, order))
    lab.read("madvise", errno=result, mergeable=is_mergeable(child, start), ooms=group.event("oom"))
    lab.passes(1)
    lab.read("recovered", witness=True)
    lab.merged(7, 496)
    lab.read("merged again")
    group.leave_pages(_SPARE_PAGES)
    refused = write_knob("run", "2")
    group.leave_pages(None)
    lab.read("run=2", errno=refused)
    lab.knobs.set(run=0)
    lab.merged(7, 496)
    lab.read("merged at last")
    oom_score.write_text("0")
    kills = group.event("oom_kill")
    with group.births():
        # It waits for its order until memory is short.
        command = ["sh", "-c", f"read -r go; echo 2 >/{DIRECTORY}/run"]
        writer = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        group.leave_pages(_SPARE_PAGES)
        writer.communicate(b"go\n", timeout=60)
        group.leave_pages(None)
    finally:
        writer.kill()
        writer.wait()
    lab.read(
        "killed",
        writer_status=writer.returncode,
        owner_lives=bool(read_smaps_ksm(child.pid)),
        kills=group.event("oom_kill") - kills,
    )
    lab.knobs.set(run=0)


def _huge(lab: Lab) -> None:
    """A huge page with 3 contents by turns, and one that is empty but for its first byte."""
    if read_text("/sys/kernel/mm/transparent_hugepage/enabled") in (None, "always madvise [never]"):
        raise CannotRun("there are no transparent huge pages, or they are switched off")
    child = lab.start_unregistered(Layout("ksm-huge", 1, 0, 0))[0]
    lab.ksmd.budget(3 * _HUGE_PAGES)
    begin = _map_huge(child, lab, 3)
    lab.read("mapped", huge_bytes=_huge_bytes(child, begin))
    for number in range(1, 5):
        lab.passes(1)
        lab.read(f"pass {number}", **_shared(child, begin))
    # Whatever keeps a page from merging for the moment.
    lab.merged(3, _HUGE_PAGES - 3, least=0)
    lab.read("merged", witness=True, **_shared(child, begin))
    empty = _map_huge(child, lab, 0)
    lab.read("empty mapped", huge_bytes=_huge_bytes(child, empty))
    lab.passes(4)
    lab.read("empty scanned", witness=True, **_shared(child, empty))


def _map_huge(child: Child, lab: Lab, contents: int) -> int:
    return int(lab.order(child, f"map_huge {contents}"))


def _shared(child: Child, start: int) -> dict[str, Any]:
    frames = frames_at(child.pid, start, _HUGE_PAGES)
    return {"places": len(frames), "frames": len(set(frames))}


def _huge_bytes(child: Child, start: int) -> int:
    # AnonHugePages of the mapping, in bytes.
    found = False
    for line in Path(f"/proc/{child.pid}/smaps").read_text().splitlines():
        word, *rest = line.split()
        if "-" in word and not word.endswith(":"):
            begin, end = (int(part, 16) for part in word.split("-"))
            found = begin <= start < end
        elif found and word == "AnonHugePages:":
            return int(rest[0]) * 1024
    return 0


def _moved(lab: Lab) -> None:
    """KSM pages are moved to another NUMA node and back."""
    _need_two_nodes()
    child = lab.start(Layout("ksm-moved", 91, 0, 7))[0]
    lab.merged(7, 84)
    lab.read("merged")
    start = int(lab.order(child, "start"))
    # Where node 0 is short of memory they are on the other one already.
    first = _move(child, start, 7, 0)
    before = lab.frames_of(child, 0, 91)
    there = _move(child, start, 7, 1)
    after = lab.frames_of(child, 0, 91)
    back = _move(child, start, 7, 0)
    lab.read(
        "moved",
        witness=True,
        first=first,
        status=[there, back],
        moved_frames=len(set(after) - set(before)),
        distinct=[len(set(before)), len(set(after))],
    )
    lab.passes(2)
    lab.read("rescanned", witness=True)


def _nodes(lab: Lab) -> None:
    """Equal pages on two NUMA nodes with merge_across_nodes 0; then one node's KSM pages move."""
    _need_two_nodes()
    if "merge_across_nodes" not in lab.knobs:
        raise CannotRun("this kernel has no merge_across_nodes")
    lab.knobs.set(merge_across_nodes=0)
    here, there = lab.start_unregistered(
        Layout("ksm-node-0", 91, 0, 7), Layout("ksm-node-1", 91, 0, 7)
    )
    starts = [int(lab.order(child, "start")) for child in (here, there)]
    status = [_move(here, starts[0], 91, 0), _move(there, starts[1], 91, 1)]
    lab.order(here, "register")
    lab.order(there, "register")
    lab.merged(14, 168)
    refused = lab.refused("merge_across_nodes", "1")
    lab.read("merged", witness=True, nodes=[sorted(set(one)) for one in status], errno=refused)
    moved = _move(here, starts[0], 7, 1)
    lab.read("moved", witness=True, status=moved)
    lab.passes(3)
    lab.read("rescanned", witness=True)


_MOVER = """
import ctypes, os, select, sys
pid, address = int(sys.argv[1]), int(sys.argv[2])
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
page, status = (ctypes.c_void_p * 1)(address), (ctypes.c_int * 1)()
nodes = [(ctypes.c_int * 1)(node) for node in (1, 0)]
print("ready", flush=True)
moves = 0
while not select.select([0], [], [], 0)[0]:
    libc.syscall(ctypes.c_long(279), pid, ctypes.c_ulong(1), page, nodes[moves % 2], status, 4)
    moves += 1
"""


def _busy(lab: Lab) -> None:
    """A KSM page with 503 sharers moves to and fro, while 53 like it come up again and again."""
    _need_two_nodes()
    if "max_page_sharing" in lab.knobs:
        lab.knobs.set(max_page_sharing=1009)
    many, again = lab.start(Layout("ksm-sharers", 503, 0, 1), Layout("ksm-comers", 53, 0, 1))
    lab.merged(1, 555)
    lab.read("merged")
    with lab.program(_MOVER, str(many.pid), lab.order(many, "start")):
        lab.knobs.set(sleep_millisecs=31, run=1)
        for _ in range(17):
            lab.order(again, "copy 53")
            lab.stop.pause(0.1)
        lab.knobs.set(run=0)
    lab.passes(1)
    lab.merged(1, 555)
    lab.read("merged again", witness=True)


def _offline(lab: Lab) -> None:
    """Memory with 7 KSM pages of 91 places in it is taken offline, and brought back."""
    lab.need_own_guest("memory is taken offline")
    blocks = list(_movable_blocks())
    if not blocks:
        raise CannotRun("there is no memory that can be taken offline")
    child = lab.start(Layout("ksm-offline", 91, 0, 7))[0]
    lab.merged(7, 84)
    start = int(lab.order(child, "start"))
    before = lab.order(child, "digest_all")
    block_pages = int(read_text(f"{_BLOCKS}/block_size_bytes") or "0", 16) // PAGE_BYTES

    def in_blocks() -> set[int]:
        frames = set(lab.frames_of(child, 0, 91))
        return {f for f in frames if f // block_pages in blocks}

    if len(in_blocks()) < 7:
        # The node's memory of that kind is what it gives first to pages that can move.
        _move(child, start, 7, max(_node_numbers()))
    inside = len(in_blocks())
    if not inside:
        raise CannotRun("no KSM page is in memory that can be taken offline")
    lab.read("merged", inside=inside)
    taken = []
    try:
        for block in blocks:
            # Whoever uses a page of it for the moment makes it fail.
            lab.wait(functools.partial(_set_state, block, "offline"), "a memory block to go")
            taken.append(block)
        lab.read(
            "offline", witness=True, inside=len(in_blocks()), blocks=taken, block_pages=block_pages,
            digests=[before, lab.order(child, "digest_all")],
        )  # fmt: skip
        lab.passes(2)
        lab.read("rescanned", witness=True)
    finally:
        for block in taken:
            _set_state(block, "online_movable")


def _movable_blocks() -> Iterator[int]:
    for folder in sorted(_BLOCKS.glob("memory[0-9]*")):
        online = read_text(f"{folder}/state") == "online"
        if online and (read_text(f"{folder}/valid_zones") or "").split() == ["Movable"]:
            yield int(folder.name.removeprefix("memory"))


def _set_state(block: int, state: str) -> bool:
    try:
        (_BLOCKS / f"memory{block}" / "state").write_text(state)
    except OSError as error:
        if error.errno in (errno.EBUSY, errno.EAGAIN):
            return False
        raise CannotRun(f"memory block {block} cannot be set {state}: {error.strerror}") from error
    return True


def _node_numbers() -> list[int]:
    return [int(path.name.removeprefix("node")) for path in _NODES.glob("node[0-9]*")]


def _need_two_nodes() -> None:
    if len(_node_numbers()) < 2:
        raise CannotRun("there is one NUMA node only")


def _move(child: Child, start: int, pages: int, node: int) -> list[int]:
    # The status of each page: the node that it is on, or a negative errno.
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    addresses = (ctypes.c_void_p * pages)(*(start + page * PAGE_BYTES for page in range(pages)))
    status = (ctypes.c_int * pages)()
    result = libc.syscall(
        ctypes.c_long(_SYS_MOVE_PAGES),
        child.pid,
        ctypes.c_ulong(pages),
        addresses,
        (ctypes.c_int * pages)(*[node] * pages),
        status,
        _MPOL_MF_MOVE_ALL,
    )
    if result < 0:
        raise CannotRun(f"move_pages: {errno.errorcode.get(ctypes.get_errno(), '?')}")
    return list(status)


SCRIPTS: tuple[Callable[[Lab], None], ...] = (
    _huge,
    _moved,
    _nodes,
    _busy,
    _swapped,
    _short,
    _offline,
)
"""These trials, in the order in which they are carried out."""
