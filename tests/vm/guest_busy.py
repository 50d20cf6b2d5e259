"""Runs in a guest as root: a recording that begins and ends while ksmd is at work on many pages.

``guest_busy.py OUT_FILE`` records for some of ksmd's passes.
"""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

KSM = Path("/sys/kernel/mm/ksm")
PAGE = mmap.PAGESIZE
PROCESSES, PAGES, CONTENTS, PASSES = 3, 2003, 13, 31
PATIENCE_S = 400


def main(out: Path) -> None:
    for name, value in (("pages_to_scan", 1000), ("sleep_millisecs", 20), ("run", 1)):
        (KSM / name).write_text(str(value))
    children = []
    for _ in range(PROCESSES):
        child = os.fork()
        if child == 0:
            write_for_ever()
        children.append(child)
    wait_for("pages_sharing", PAGES)
    ksmtrace = str(Path(sys.executable).with_name("ksmtrace"))
    record = [ksmtrace, "record", "--every-page", "-o", str(out), "--"]
    recorded = subprocess.run([*record, sys.executable, __file__, "passes"])
    for child in children:
        os.kill(child, signal.SIGKILL)
    sys.exit(recorded.returncode)


def wait_for(name: str, least: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while (now := int((KSM / name).read_text())) < least:
        assert time.monotonic() < deadline, f"in {PATIENCE_S} s {name} is {now}, not {least}"
        time.sleep(0.1)


def write_for_ever() -> None:
    area = mmap.mmap(-1, PAGES * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area.madvise(mmap.MADV_MERGEABLE)
    for page in range(PAGES):
        area[page * PAGE : (page + 1) * PAGE] = bytes([page % CONTENTS + 1]) * PAGE
    written = 0
    while True:
        time.sleep(0.05)
        written += 7
        area[written % PAGES * PAGE] = written % 251


if __name__ == "__main__":
    if sys.argv[1] == "passes":
        wait_for("full_scans", int((KSM / "full_scans").read_text()) + PASSES)
    else:
        main(Path(sys.argv[1]))
