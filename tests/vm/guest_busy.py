"""Runs in a guest as root: a recording that begins and ends while ksmd is at work on many pages.

``guest_busy.py OUT_FILE`` records for some seconds.
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
PROCESSES, PAGES, CONTENTS, SECONDS = 3, 2003, 13, "5"


def main(out: Path) -> None:
    for name, value in (("pages_to_scan", 1000), ("sleep_millisecs", 20), ("run", 1)):
        (KSM / name).write_text(str(value))
    children = []
    for _ in range(PROCESSES):
        child = os.fork()
        if child == 0:
            write_for_ever()
        children.append(child)
    while int((KSM / "pages_sharing").read_text()) < PAGES:
        time.sleep(0.1)
    ksmtrace = str(Path(sys.executable).with_name("ksmtrace"))
    recorded = subprocess.run([ksmtrace, "record", "--every-page", "-d", SECONDS, "-o", str(out)])
    for child in children:
        os.kill(child, signal.SIGKILL)
    sys.exit(recorded.returncode)


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
    main(Path(sys.argv[1]))
