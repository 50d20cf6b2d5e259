"""Runs in a guest with two NUMA nodes: merges pages, moves them, and unmerges them.

``moved_pages.py CONTENTS COPIES MOVED UNMERGED`` maps CONTENTS contents COPIES times each on node
0 and lets ksmd merge them; moves the KSM pages of the first MOVED contents to node 1, and the
first of them back and forth once more; makes the last UNMERGED pages unmergeable; and unmerges
all the others with run=2.
"""

import ctypes
import json
import mmap
import os
import sys
import time
from pathlib import Path

PAGE = mmap.PAGESIZE
MADV_UNMERGEABLE = 13
MPOL_DEFAULT, MPOL_BIND, MPOL_MF_MOVE_ALL = 0, 2, 4
SYS_MOVE_PAGES, SYS_SET_MEMPOLICY = 279, 238
KSM = Path("/sys/kernel/mm/ksm")
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def set_policy(policy: int, nodes: int) -> None:
    mask = ctypes.c_ulong(nodes)
    assert libc.syscall(SYS_SET_MEMPOLICY, policy, ctypes.byref(mask), 64) == 0


def move(start: int, pages: int, node: int) -> None:
    addresses = (ctypes.c_void_p * pages)(*(start + page * PAGE for page in range(pages)))
    nodes = (ctypes.c_int * pages)(*[node] * pages)
    status = (ctypes.c_int * pages)()
    assert (
        libc.syscall(
            SYS_MOVE_PAGES, 0, ctypes.c_ulong(pages), addresses, nodes, status, MPOL_MF_MOVE_ALL
        )
        == 0
    )
    assert list(status) == [node] * pages, list(status)


def main() -> None:
    contents, copies, moved, unmerged = map(int, sys.argv[1:])
    pages = contents * copies
    set_policy(MPOL_BIND, 1)
    memory = mmap.mmap(-1, pages * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    for page in range(pages):
        memory[page * PAGE : page * PAGE + 8] = (page % contents + 1).to_bytes(8, "little")
    set_policy(MPOL_DEFAULT, 0)
    memory.madvise(mmap.MADV_MERGEABLE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    (KSM / "pages_to_scan").write_text(str(pages))
    (KSM / "run").write_text("1")
    deadline = time.monotonic() + 300
    while (sharing := int((KSM / "pages_sharing").read_text())) < pages - contents:
        assert time.monotonic() < deadline, f"in 300 s pages_sharing is {sharing}"
        time.sleep(0.05)
    (KSM / "run").write_text("0")
    move(start, moved, 1)
    move(start, 1, 0)
    move(start, 1, 1)
    at = start + (pages - unmerged) * PAGE
    assert libc.madvise(at, unmerged * PAGE, MADV_UNMERGEABLE) == 0
    (KSM / "run").write_text("2")
    print(json.dumps({"pid": os.getpid()}), flush=True)


main()
