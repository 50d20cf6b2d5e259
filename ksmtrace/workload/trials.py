"""The trials: what is done to KSM so that claims about it show. One function each."""

from __future__ import annotations

import errno
import mmap
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from ksmtrace.errors import KernelFeatureMissing
from ksmtrace.kernel.sysfs import DIRECTORY, read_ksm
from ksmtrace.workload import trials_memory
from ksmtrace.workload.children import PAGE_BYTES, Child, Layout
from ksmtrace.workload.lab import Lab, frames_at, is_mergeable
from ksmtrace.workload.registered import nr_rmap_items

MADV_UNMERGEABLE = 13
MADV_WIPEONFORK = 18
# Until what ksmd did not do counts as what it does not do.
_PATIENCE_S = 60


def _copies(lab: Lab) -> None:
    """31 copies of one page in three processes: merged, one written to, one process ended."""
    first, second, third = lab.start(
        Layout("ksm-one", 13, 0, 1), Layout("ksm-two", 11, 0, 1), Layout("ksm-three", 7, 0, 1)
    )
    lab.read("registered")
    lab.merged(1, 30)
    lab.read("merged", witness=True)
    lab.stop.pause(0.1)
    lab.read("resting")
    before = lab.frame_of(first, 0), lab.order(third, "digest 0")
    # A page that merged first: the head of the stable_node's list.
    lab.order(first, "write 1 1")
    after = lab.frame_of(first, 0), lab.order(third, "digest 0")
    lab.read("written", frame=[before[0], after[0]], others_content=[before[1], after[1]])
    lab.merged(1, 29)
    lab.read("rescanned", witness=True)
    lab.kill(second)
    lab.read("exited", everybody=False)
    lab.passes(1)
    lab.read("reaped", witness=True)


def _limit(lab: Lab) -> None:
    """31 copies each of 3 contents with max_page_sharing 7; the knob while pages are shared."""
    lab.knobs.set(max_page_sharing=7)
    lab.start(Layout("ksm-limit", 93, 0, 3))
    lab.merged(15, 78)
    refused = lab.refused("max_page_sharing", "11")
    zero = lab.refused("use_zero_pages", "1") if "use_zero_pages" in lab.knobs else None
    lab.read("merged", witness=True, max_page_sharing_errno=refused, use_zero_pages_errno=zero)


def _static(lab: Lab) -> None:
    """101 pages that never change and have no equal: pass by pass with and without smart scan."""
    if "smart_scan" in lab.knobs:
        lab.knobs.set(smart_scan=1)
    lab.start(Layout("ksm-static", 101, 0, 101))
    for number in range(1, 33):
        lab.passes(1)
        lab.read(f"pass {number}")
    if "smart_scan" in lab.knobs:
        lab.knobs.set(smart_scan=0)
        for number in range(1, 6):
            lab.passes(1)
            lab.read(f"without smart scan, pass {number}")


def _volatile(lab: Lab) -> None:
    """53 pages that change before each of 4 passes, and then no more."""
    lab.start(Layout("ksm-volatile", 53, 0, 53))
    for number in range(1, 5):
        lab.rewrite(number)
        lab.passes(1)
        lab.read(f"changed {number}")
    lab.passes(1)
    lab.read("unchanged", witness=True)


def _unmerge(lab: Lab) -> None:
    """Pages are merged, run is set to 2, then to 1 again."""
    lab.start(Layout("ksm-unmerge", 91, 0, 7))
    lab.merged(7, 84)
    lab.read("merged")
    lab.unmerge()
    lab.read("unmerged", witness=True)
    lab.merged(7, 84)
    lab.read("merged again", witness=True)


def _unmergeable(lab: Lab) -> None:
    """MADV_UNMERGEABLE on 17 of 62 merged pages, and what madvise answers elsewhere."""
    first, second = lab.start(Layout("ksm-un-one", 31, 0, 31), Layout("ksm-un-two", 31, 0, 31))
    lab.merged(31, 31)
    areas = _nr_mappings(first)
    lab.read("merged")
    result = lab.order(first, f"advise {MADV_UNMERGEABLE} 7 17")
    frames = lab.frames_of(first, 7, 17)
    others = lab.frames_of(second, 0, 31)
    lab.read(
        "unmergeable",
        errno=int(result),
        frames_in_range=len(frames),
        shared_in_range=len(set(frames) & set(others)),
        mappings=[areas, _nr_mappings(first)],
    )
    lab.passes(1)
    lab.read("rescanned", witness=True)
    idle = lab.start_unregistered(Layout("ksm-un-three", 23, 0, 23))[0]
    never = lab.order(idle, f"advise {MADV_UNMERGEABLE} 0 23")
    crowded = lab.order(idle, f"advise_crowded {mmap.MADV_MERGEABLE} 3 2")
    shared, start = lab.order(idle, f"advise_shared {mmap.MADV_MERGEABLE} 5").split()
    flagged = is_mergeable(idle, int(start))
    lab.order(idle, "unmap 11 1")
    gap = lab.order(idle, f"advise {mmap.MADV_MERGEABLE} 0 23")
    area = lab.order(idle, "start")
    both = [
        is_mergeable(idle, int(area)),
        is_mergeable(idle, int(area) + 12 * PAGE_BYTES),
    ]
    lab.read(
        "advised",
        never_mergeable_errno=int(never),
        crowded_errno=int(crowded),
        shared_mapping_errno=int(shared),
        shared_mapping_mergeable=flagged,
        gap_errno=int(gap),
        around_gap_mergeable=both,
    )


def _idle(lab: Lab) -> None:
    """ksmd with nobody registered, and then with somebody."""
    lab.knobs.set(sleep_millisecs=20, run=1)
    lab.stop.pause(0.1)
    lab.read("begin")
    lab.stop.pause(0.5)
    lab.read("end")
    lab.start(Layout("ksm-waker", 11, 0, 11))
    deadline = time.monotonic() + _PATIENCE_S
    scans = read_ksm()["full_scans"]
    while read_ksm()["full_scans"] == scans and time.monotonic() < deadline:
        lab.stop.pause(0.02)
    woken = read_ksm()["full_scans"] != scans
    lab.knobs.set(run=0)
    lab.read("registered", woken=woken)


def _fork(lab: Lab) -> None:
    """A process forks once its 7 contents are merged 13 times each, with max_page_sharing 13."""
    lab.knobs.set(max_page_sharing=13)
    heirs = tuple(Layout(f"ksm-heir-{index}", 91, 0, 7) for index in range(2))
    lab.start(Layout("ksm-parent", 91, 0, 7), heirs=heirs)
    lab.merged(7, 84)
    lab.read("merged")
    lab.fork()
    lab.read("forked")
    lab.passes(1)
    lab.read("counted", witness=True)


def _fork_unique(lab: Lab) -> None:
    """A process with 53 different pages in the unstable tree forks."""
    lab.start(Layout("ksm-single", 53, 0, 53), heirs=(Layout("ksm-heir", 53, 0, 53),))
    lab.passes_until(lambda: read_ksm()["pages_unshared"] == 53, 2, "pages_unshared 53")
    lab.read("unshared")
    lab.fork()
    for number in range(1, 5):
        lab.passes(1)
        lab.read(f"pass {number}")


def _latecomer(lab: Lab) -> None:
    """A process registers 11 pages, each equal to one that is merged already."""
    lab.start(Layout("ksm-early-one", 11, 0, 11), Layout("ksm-early-two", 11, 0, 11))
    lab.merged(11, 11)
    lab.read("merged")
    lab.start(Layout("ksm-late", 11, 0, 11))
    for number in range(1, 4):
        lab.passes(1)
        lab.read(f"pass {number}")


def _singleton(lab: Lab) -> None:
    """Pairs of which one page is written to; later a process joins those left alone."""
    first, _ = lab.start(Layout("ksm-pair-one", 11, 0, 11), Layout("ksm-pair-two", 11, 0, 11))
    lab.merged(11, 11)
    lab.read("merged")
    lab.order(first, "write 11 1")
    lab.passes(3)
    lab.read("alone", witness=True)
    lab.start(Layout("ksm-joins", 11, 0, 11))
    lab.passes_until(lambda: read_ksm()["pages_sharing"] == 11, 1, "pages_sharing 11")
    lab.read("joined")


def _zero(lab: Lab) -> None:
    """53 empty pages with use_zero_pages; 3 of them are written to again."""
    lab.knobs.set(use_zero_pages=1)
    child = lab.start(Layout("ksm-empty", 53, 0, 0))[0]
    lab.passes(4)
    lab.read("placed")
    lab.order(child, "write 3 1")
    lab.read("written")


def _batches(lab: Lab) -> None:
    """503 pages in batches of 97; run is set to 0 in the midst of a pass."""
    lab.start(Layout("ksm-batches", 503, 0, 503))
    lab.knobs.set(pages_to_scan=97, sleep_millisecs=29)
    scans = read_ksm()["full_scans"]
    assert isinstance(scans, int)
    lab.knobs.set(run=1)
    deadline = time.monotonic() + _PATIENCE_S
    while int(read_ksm()["full_scans"] or 0) < scans + 2 and time.monotonic() < deadline:
        lab.stop.pause(0.005)
    begin_ns = time.monotonic_ns()
    lab.knobs.set(run=0)
    took_ns = time.monotonic_ns() - begin_ns
    lab.read("stopped", write_ns=took_ns, pages_to_scan=97)
    lab.stop.pause(0.2)
    lab.read("later")


def _pinned(lab: Lab) -> None:
    """10 pairs of which a pipe holds a page: of 5 the one that is in the tree, of 5 the other."""
    first, second = lab.start_unregistered(
        Layout("ksm-held-one", 10, 0, 10), Layout("ksm-held-two", 10, 0, 10)
    )
    held = int(lab.order(first, "pin 0 5")) + int(lab.order(second, "pin 5 5"))
    lab.order(first, "register")
    lab.order(second, "register")
    lab.read("registered", held=held)
    for number in range(1, 5):
        lab.passes(1)
        lab.read(f"pass {number}")
    lab.order(first, "unpin")
    lab.order(second, "unpin")
    made = lab.merged(10, 10, least=1)
    lab.read("merged", passes=made, witness=True)


def _dropped(lab: Lab) -> None:
    """A process takes its only mergeable area out of KSM, and later gives it back."""
    child = lab.start(Layout("ksm-dropped", 11, 0, 11))[0]
    lab.passes(2)
    lab.read("scanned")
    lab.order(child, f"advise {MADV_UNMERGEABLE} 0 11")
    lab.read("unmergeable")
    # Once ksmd knows nobody any more it counts no pass.
    lab.ksmd.run_pass(10, ends_early=lambda: nr_rmap_items(read_ksm()) == 0)
    lab.knobs.set(sleep_millisecs=23, run=1)
    lab.stop.pause(0.3)
    lab.read("asleep begins")
    lab.stop.pause(0.3)
    lab.knobs.set(run=0)
    lab.read("asleep")
    lab.order(child, "register")
    lab.passes(2)
    lab.read("registered again")


# Writes 2 to run, and is disturbed meanwhile: by a signal that ends it ("fatal"), by one whose
# handler lets the call fail ("fail"), by one whose handler lets it begin again ("restart").
_WRITE_2 = """
import ctypes, os, signal, sys
how, seconds, path = sys.argv[1], float(sys.argv[2]), sys.argv[3]
libc = ctypes.CDLL(None, use_errno=True)
run = os.open(path, os.O_WRONLY)
if how != "fatal":
    signal.signal(signal.SIGALRM, lambda *unused: None)
    signal.siginterrupt(signal.SIGALRM, how == "fail")
libc.write(os.open("/dev/null", os.O_WRONLY), b"2", 1)
signal.setitimer(signal.ITIMER_REAL, seconds, seconds if how == "fail" else 0)
done = libc.write(run, b"2", 1)
number = ctypes.get_errno()
signal.setitimer(signal.ITIMER_REAL, 0)
print(0 if done == 1 else number)
"""


def _interrupted(lab: Lab) -> None:
    """Writers of 2 to run are disturbed by signals; 2003 pages of 31 contents."""
    lab.start(Layout("ksm-disturbed", 2003, 0, 31))
    lab.merged(31, 1972)
    merged = lab.read("merged")
    for how, label in (("fatal", "killed"), ("fail", "interrupted")):
        status, number = _disturb(lab, how, label, merged.frames or 0)
        lab.read(label, status=status, errno=number, frames_before=merged.frames or 0)
        lab.knobs.set(run=0)
        lab.merged(31, 1972)
    status, said = lab.run_program(_WRITE_2, "restart", "0.002", f"/{DIRECTORY}/run")
    lab.read("restarted", status=status, errno=int(said or -1))


def _disturb(lab: Lab, how: str, label: str, frames: int) -> tuple[int, int]:
    # Returns the exit status of the writer of 2 to run, and the errno that it got.
    # As long as it takes for the unmerge to have begun, and not ended.
    for seconds in (0.0005, 0.001, 0.002, 0.003, 0.005, 0.008, 0.013):
        status, said = lab.run_program(_WRITE_2, how, str(seconds), f"/{DIRECTORY}/run")
        number = int(said or -1)
        reading = lab.read(f"{label} after {seconds} s")
        # A signal may come before the first page, too.
        if (reading.frames or 0) > frames or number == 0:
            break
    return status, number


def _aborted(lab: Lab) -> None:
    """A pass is half done when run=2 is stopped by a signal; then ksmd begins again."""
    child = lab.start(Layout("ksm-aborted", 2003, 0, 31))[0]
    lab.merged(31, 1972)
    lab.order(child, "write 503 1")
    lab.passes_until(lambda: read_ksm()["pages_unshared"] == 503, 2, "pages_unshared 503")
    # In one batch before the sleep of a second: what changed is in the tree of this pass.
    lab.knobs.set(pages_to_scan=1009, sleep_millisecs=1019)
    lab.let_run(0.4)
    halfway = lab.read("half done", witness=True)
    status, _ = _disturb(lab, "fatal", "stopped", halfway.frames or 0)
    lab.knobs.set(run=0)
    lab.read("stopped", status=status, frames_before=halfway.frames or 0)
    lab.knobs.set(pages_to_scan=101, sleep_millisecs=1021)
    lab.let_run(0.4)
    lab.read("begun again", witness=True)
    lab.ksmd.budget(child.layout.pages)
    lab.passes(2)
    lab.read("two passes later", witness=True)


def _advisor(lab: Lab) -> None:
    """advisor_min_pages_to_scan is raised while the scan time advisor works; 11 pages."""
    if "advisor_min_pages_to_scan" not in lab.knobs:
        raise KernelFeatureMissing("this kernel has no advisor")
    lab.start(Layout("ksm-advised", 11, 0, 11))
    least = lab.knobs.before["advisor_min_pages_to_scan"]
    lab.knobs.set(advisor_min_pages_to_scan=17, advisor_mode="scan-time")
    lab.read("advised")
    lab.knobs.set(advisor_min_pages_to_scan=20_011)
    lab.passes(1)
    lab.read("raised")
    lab.knobs.set(advisor_mode="none", advisor_min_pages_to_scan=least)


_MERGE_ANY = """
import ctypes, mmap, sys
pages, contents = int(sys.argv[1]), int(sys.argv[2])
area = mmap.mmap(-1, pages * mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for page in range(pages):
    area[page * mmap.PAGESIZE] = 1 + page % contents
    area[page * mmap.PAGESIZE + 2000] = 7
libc = ctypes.CDLL(None, use_errno=True)
result = libc.prctl(67, 1, 0, 0, 0)
start = ctypes.addressof(ctypes.c_char.from_buffer(area))
print(ctypes.get_errno() if result else 0, start, flush=True)
sys.stdin.read()
"""


def _merge_any(lab: Lab) -> None:
    """prctl(PR_SET_MEMORY_MERGE) without any madvise, by a program that shares no page with us."""
    with lab.program(_MERGE_ANY, "62", "31") as (pid, line):
        result, start = map(int, line.split())
        if result:
            raise KernelFeatureMissing(
                f"prctl(PR_SET_MEMORY_MERGE) answers {errno.errorcode.get(result, result)}"
            )
        # All its anonymous memory counts: more than the pages that are known.
        lab.ksmd.budget(100_003)

        def merged() -> bool:
            return len(set(frames_at(pid, start, 62))) == 31

        lab.passes_until(merged, 2, "31 frames of 62 pages")
        frames = frames_at(pid, start, 62)
        lab.read("scanned", everybody=False, places=len(frames), frames=len(set(frames)))


def _outside(lab: Lab) -> None:
    """A process forks, and its child alone makes the two equal pages that they share mergeable."""
    parent = lab.start_unregistered(
        Layout("ksm-outside", 2, 0, 1), heirs=(Layout("ksm-inside", 2, 0, 1),)
    )[0]
    lab.fork()
    child = lab.children[1]
    lab.order(child, "register")
    lab.merged(1, 1)
    start = int(lab.order(parent, "start"))
    lab.read(
        "merged",
        parent_frames=lab.frames_of(parent, 0, 2),
        child_frames=lab.frames_of(child, 0, 2),
        parent_mergeable=is_mergeable(parent, start),
    )


def _leak(lab: Lab) -> None:
    """53 pages that became the zero page are left out of a fork; then everybody ends."""
    if read_ksm()["ksm_zero_pages"] is None:
        raise KernelFeatureMissing("this kernel has no ksm_zero_pages")
    lab.need_own_guest("ksm_zero_pages is made wrong for good")
    lab.knobs.set(use_zero_pages=1)
    parent = lab.start(Layout("ksm-empty", 53, 0, 0), heirs=(Layout("ksm-wiped", 53, 0, 0),))[0]
    lab.passes(4)
    lab.read("placed")
    refused = int(lab.order(parent, f"advise {MADV_WIPEONFORK} 0 53"))
    lab.fork()
    lab.read("forked", errno=refused, heir_places=len(lab.frames_of(lab.children[1], 0, 53)))
    lab.end()
    lab.read("ended")
    lab.unmerge()
    lab.read("unmerged")
    lab.knobs.set(run=0)


def _files(lab: Lab) -> None:
    """The files of /sys/kernel/mm/ksm, and who ksmd is."""
    folder = Path(f"/{DIRECTORY}")
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in folder.iterdir()}
    refused = None
    if "advisor_mode" in lab.knobs:
        lab.knobs.set(advisor_mode="scan-time")
        refused = lab.refused("pages_to_scan", "1009")
        lab.knobs.set(advisor_mode="none")
    nice = None if lab.ksmd_pid is None else os.getpriority(os.PRIO_PROCESS, lab.ksmd_pid)
    least = {value: lab.refused("max_page_sharing", value) for value in ("1", "2")}
    lab.read(
        "read", modes=modes, pages_to_scan_errno=refused, nice=nice, max_page_sharing_errnos=least
    )


def _nr_mappings(child: Child) -> int:
    return len(Path(f"/proc/{child.pid}/maps").read_text().splitlines())


TRIALS: Mapping[str, Callable[[Lab], None]] = MappingProxyType(
    {
        script.__name__.strip("_"): script
        for script in (
            _files,
            _advisor,
            _idle,
            _copies,
            _limit,
            _static,
            _volatile,
            _unmerge,
            _unmergeable,
            _fork,
            _fork_unique,
            _latecomer,
            _singleton,
            _zero,
            _batches,
            _pinned,
            _dropped,
            _interrupted,
            _aborted,
            *trials_memory.SCRIPTS,
            _outside,
            _merge_any,
            _leak,
        )
    }
)
"""The trials by name, in the order in which they are carried out."""
