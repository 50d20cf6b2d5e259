"""A program whose calls wait for ksmd: python contended.py knobs|storm SECONDS|told.

``knobs`` lets ksmd scan large batches, in which it holds ksm_thread_mutex, and writes what it
already holds to a knob that takes the same mutex. ``storm`` maps and unmaps memory, for which it
needs its mmap_lock to write, while ksmd walks over a large mapping of the same process.
Measures each of its calls from outside, for so long or until it gets a line, prints one of JSON,
and ends with its standard input.
"""

import contextlib
import json
import math
import mmap
import os
import select
import sys
import time
from pathlib import Path

from ksmtrace.workload.knobs import saved_knobs
from ksmtrace.workload.ksmd import Ksmd
from ksmtrace.workload.signals import Interrupted, stop_on_signals

PAGE = mmap.PAGESIZE
MADV_NOHUGEPAGE, MADV_MERGEABLE = 15, 12
RUN = Path("/sys/kernel/mm/ksm/run")
UNIQUE_PAGES, READ_PAGES = 7001, 60013
CALLS_PER_LOOK = 101


def map_pages(unique: int, read: int) -> list[mmap.mmap]:
    """Map pages for ksmd to look at, and pages that it passes by: the zero page, only read."""
    areas = []
    for pages, written in ((unique, True), (read, False)):
        area = mmap.mmap(-1, max(pages, 1) * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        area.madvise(MADV_NOHUGEPAGE)
        for at in range(0, pages * PAGE, PAGE):
            if written:
                area[at : at + 8] = (at + 1).to_bytes(8, "little")
            else:
                area[at]
        area.madvise(MADV_MERGEABLE)
        areas.append(area)
    return areas


def write_knob() -> None:
    with RUN.open("wb", buffering=0) as knob:
        knob.write(b"1")


def map_and_unmap() -> None:
    mmap.mmap(-1, 16 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()


def was_told() -> bool:
    ready, _, _ = select.select([0], [], [], 0)
    return bool(ready) and bool(os.read(0, 1))


def main() -> None:
    what, how_long = sys.argv[1:]
    seconds = math.inf if how_long == "told" else float(how_long)
    with stop_on_signals() as stop, saved_knobs(lambda line: None) as knobs:
        call = {"knobs": write_knob, "storm": map_and_unmap}[what]
        areas = map_pages(UNIQUE_PAGES, READ_PAGES if what == "storm" else 0)
        ksmd = Ksmd(knobs, stop)
        ksmd.take_over(smart_scan=False)
        knobs.set(sleep_millisecs=1, pages_to_scan=UNIQUE_PAGES, run=1)
        end = time.monotonic() + seconds
        # Sums, and no list: that would take memory of its own, and mmap_lock for it.
        calls = total_ns = worst_ns = 0
        last = False
        while not last:
            last = time.monotonic() >= end or (calls % CALLS_PER_LOOK == 0 and was_told())
            begin_ns = time.monotonic_ns()
            if last:
                knobs.set(run=0)
            else:
                call()
            duration_ns = time.monotonic_ns() - begin_ns
            calls += 1
            total_ns += duration_ns
            worst_ns = max(worst_ns, duration_ns)
            if what == "knobs":
                time.sleep(0.001)
        found = {"pid": os.getpid(), "areas": len(areas), "calls": calls}
        print(json.dumps(found | {"total_ns": total_ns, "worst_ns": worst_ns}), flush=True)
        with contextlib.suppress(Interrupted):
            stop.wait_readable(0, 600)


main()
