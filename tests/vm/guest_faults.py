"""Runs in a guest as root, with the host at the guest's memory: faults, and what is found.

``guest_faults.py OUT_DIRECTORY`` writes to ``asked`` what the host is to write to the guest's
kernel memory, waits for ``done``, and lets ksmtrace judge the kernel: first with a counter that is
wrong, then with a break_ksm that returns 0 and does nothing. What ksmtrace said goes to
``counter.json`` and ``code.json``, its exit statuses to ``statuses.json``.
"""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import time
from pathlib import Path

from ksmtrace.kernel.kcore import Kcore

KSMTRACE = [sys.executable, "-c", "from ksmtrace.cli import main; main()"]
TOO_MANY = 5
ENDBR64, NOP5 = bytes.fromhex("f30f1efa"), bytes.fromhex("0f1f440000")
RETURN_0 = bytes.fromhex("31c0c3")  # xor %eax,%eax; ret


def main(out: Path) -> None:
    symbols = {}
    for line in Path("/proc/kallsyms").read_text().splitlines():
        address, _, name = line.split()[:3]
        if name in ("ksm_pages_shared", "break_ksm"):
            symbols[name] = int(address, 16)
    with Kcore.open() as kcore:
        shared = kcore.content(symbols["ksm_pages_shared"], 8)
        entry = kcore.content(symbols["break_ksm"], 16)
    (number,) = struct.unpack("<Q", shared)
    wrong = struct.pack("<Q", number + TOO_MANY)
    # Behind what a tracer patches.
    begin = len(ENDBR64) if entry.startswith(ENDBR64) else 0
    assert entry[begin:].startswith(NOP5), entry.hex()
    begin += len(NOP5)
    body = entry[begin : begin + len(RETURN_0)]

    statuses = {}
    write(out, symbols["ksm_pages_shared"], shared, wrong)
    statuses["counter"] = judge(out / "counter.json", "check")
    write(out, symbols["ksm_pages_shared"], wrong, shared)

    # The kernel forbids reading its memory from now on, and so recording: it is not needed here.
    Path("/sys/kernel/security/lockdown").write_text("confidentiality")
    write(out, symbols["break_ksm"] + begin, body, RETURN_0)
    statuses["code"] = judge(out / "code.json", "selftest", "--claim", "C22", "--claim", "C39")
    (out / "statuses.json").write_text(json.dumps(statuses))


def judge(said: Path, *command: str) -> int:
    with said.open("w") as file:
        return subprocess.run([*KSMTRACE, *command, "--json"], stdout=file).returncode


def write(out: Path, address: int, before: bytes, after: bytes) -> None:
    """Have the host write to this guest's memory."""
    done = out / "done"
    done.unlink(missing_ok=True)
    content = {"address": address, "before": before.hex(), "after": after.hex()}
    (out / "asking").write_text(json.dumps(content))
    (out / "asking").rename(out / "asked")
    deadline = time.monotonic() + 300
    while not done.exists():
        assert time.monotonic() < deadline, "the host did not answer in 300 s"
        time.sleep(0.1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
