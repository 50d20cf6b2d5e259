"""A kernel with a fault, made by writing to a guest's memory: ksmtrace says what is wrong with it.

QEMU's gdb stub does the writing (Documentation of QEMU, "GDB usage"): a counter's value, and code.
"""

import contextlib
import json
import shutil
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ksmtrace.vm import VmOptions, run_in_vm

pytestmark = pytest.mark.vm

PROGRAM = Path(__file__).with_name("guest_faults.py")


def test_a_faulty_kernel_is_told_with_its_evidence(kernel_of, well_ended, tmp_path, monkeypatch):
    kernel = kernel_of("6.12")
    stub, out, programs = tmp_path / "gdb", tmp_path / "out", tmp_path / "bin"
    out.mkdir()
    programs.mkdir()
    qemu = programs / "qemu-system-x86_64"
    qemu.write_text(
        f'#!/bin/sh\nexec {shutil.which(qemu.name)} "$@" -gdb unix:{stub},server=on,wait=off\n'
    )
    qemu.chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=":")

    ended = threading.Event()
    with ThreadPoolExecutor(1) as beside:
        writing = beside.submit(write_what_is_asked, out, stub, ended)
        try:
            result = run_in_vm(
                [sys.executable, str(PROGRAM), str(out)],
                kernel,
                VmOptions(memory_bytes=1 << 30, writable=[out]),
                capture=True,
                timeout_s=1100,
            )
        finally:
            ended.set()
    writing.result()
    well_ended(result)
    assert json.loads((out / "statuses.json").read_text()) == {"counter": 1, "code": 1}

    # Nothing is shared, and the counter says 5.
    counter = violated(json.loads((out / "counter.json").read_text()))
    assert {"C01.code", "6D"} <= set(counter)
    assert any("ksm_pages_shared is 5" in says for says in counter["C01.code"])

    # break_ksm does nothing: the counters are as they should be, and the pages still shared.
    (outcome,) = json.loads((out / "code.json").read_text())["kernels"]
    code = violated(outcome)
    assert set(code) == {"C22", "C39"}
    assert any("91 pages in 7 frames" in says for says in code["C22"])
    assert any("shared_in_range 17" in says for says in code["C39"])


def violated(outcome: dict) -> dict[str, list[str]]:
    """Return the evidence of each claim that is violated and not known to be."""
    return {
        claim["id"]: [evidence["says"] for evidence in claim["evidence"]]
        for claim in outcome["claims"]
        if claim["verdict"] == "violated" and not claim["expected"]
    }


def write_what_is_asked(out: Path, stub: Path, ended: threading.Event) -> None:
    """Write to the guest's memory what it asks for, until it has ended."""
    asked = out / "asked"
    while not ended.wait(0.2):
        if not asked.exists():
            continue
        wanted = json.loads(asked.read_text())
        asked.unlink()
        before, after = wanted["before"], wanted["after"]
        place = f"{wanted['address']:x},{len(after) // 2:x}"
        with Stub(stub) as guest:
            # Whatever the CPU is at now, the kernel's mappings are there: no page-table isolation.
            assert guest.ask(f"m{place}") == before
            assert guest.ask(f"M{place}:{after}") == "OK"
        (out / "done").touch()


class Stub(contextlib.AbstractContextManager):
    """QEMU's gdb stub; the guest stands still for as long as the context lasts."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(300)
        self._socket.connect(str(path))
        self._received = b""

    def __exit__(self, *error: object) -> None:
        # Detaching lets the guest go on.
        self.ask("D")
        self._socket.close()

    def ask(self, command: str) -> str:
        """Send a packet of the remote serial protocol; returns what is answered."""
        packet = command.encode()
        self._socket.sendall(b"$%s#%02x" % (packet, sum(packet) % 256))
        deadline = time.monotonic() + 300
        while True:
            begin = self._received.find(b"$")
            end = self._received.find(b"#", begin)
            if 0 <= begin < end and len(self._received) >= end + 3:
                answer = self._received[begin + 1 : end].decode()
                self._received = self._received[end + 3 :]
                self._socket.sendall(b"+")
                # That the guest stands still is told unasked.
                if not answer.startswith("T"):
                    return answer
                continue
            assert time.monotonic() < deadline, "the stub does not answer in 300 s"
            self._received += self._socket.recv(4096)
