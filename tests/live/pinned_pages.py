"""A program that lets ksmd meet pinned pages: python pinned_pages.py PAIRS TREE_PINNED PINNED.

Maps two runs of PAIRS pages with pairwise equal contents, and pins the first TREE_PINNED pages
of the first run and the next PINNED pages of the second one: a pipe holds a reference to each.
Lets ksmd do two passes, prints a line of JSON, and ends with its standard input.
"""

import contextlib
import ctypes
import json
import mmap
import os
import sys

from ksmtrace.workload.knobs import saved_knobs
from ksmtrace.workload.ksmd import Ksmd
from ksmtrace.workload.signals import Interrupted, stop_on_signals

PAGE = mmap.PAGESIZE
F_SETPIPE_SZ = 1031
MADV_NOHUGEPAGE, MADV_MERGEABLE = 15, 12


class IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def map_pages(pairs: int, tree_pinned: int, pinned: int) -> mmap.mmap:
    libc = ctypes.CDLL(None, use_errno=True)
    memory = mmap.mmap(-1, 2 * pairs * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(MADV_NOHUGEPAGE)
    for page in range(2 * pairs):
        memory[page * PAGE : page * PAGE + 8] = (page % pairs + 1).to_bytes(8, "little")
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    ends = os.pipe()
    libc.fcntl(ends[1], F_SETPIPE_SZ, ctypes.c_int(1 << 20))
    for page in [*range(tree_pinned), *range(pairs + tree_pinned, pairs + tree_pinned + pinned)]:
        vector = IoVec(address + page * PAGE, PAGE)
        taken = libc.vmsplice(ends[1], ctypes.byref(vector), ctypes.c_ulong(1), 0)
        assert taken == PAGE, os.strerror(ctypes.get_errno())
    memory.madvise(MADV_MERGEABLE)
    return memory


def main() -> None:
    pairs, tree_pinned, pinned = map(int, sys.argv[1:])
    # The knobs' guardian is forked before there are pages, and so has none of them.
    with stop_on_signals() as stop, saved_knobs(lambda line: None) as knobs:
        memory = map_pages(pairs, tree_pinned, pinned)
        ksmd = Ksmd(knobs, stop)
        ksmd.take_over(smart_scan=False)
        ksmd.budget(2 * pairs)
        for _ in range(2):
            assert ksmd.run_pass(300)
        print(json.dumps({"pid": os.getpid(), "pages": len(memory) // PAGE}), flush=True)
        with contextlib.suppress(Interrupted):
            stop.wait_readable(0, 600)


main()
