"""Recording the running kernel from a test: started, waited for, and ended."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ksmtrace.errors import RecordingError
from ksmtrace.kernel.sysfs import read_ksm
from ksmtrace.recording.reader import RecordingReader
from ksmtrace.stream import CounterSample
from ksmtrace.workload.registered import nr_rmap_items

KSMTRACE = [sys.executable, "-c", "from ksmtrace.cli import main; main()"]
WAIT_S = 300.0


def wait_until(condition: Callable[[], Any]) -> Any:
    """Poll until a condition holds; fail where it does not in time."""
    deadline = time.monotonic() + WAIT_S
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited in vain for {WAIT_S:g} s"
        select.select([], [], [], 0.005)
    return found


def readable(path: Path) -> list[Any]:
    """Read what a growing recording holds by now."""
    try:
        return list(RecordingReader(path))
    except RecordingError:
        return []


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*KSMTRACE, *arguments], capture_output=True, text=True, timeout=WAIT_S, **options
    )


def run_python(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=WAIT_S
    )


def report(path: Path) -> dict[str, Any]:
    done = run("report", "--json", str(path))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@dataclass
class Ended:
    status: int
    stdout: str
    stderr: str

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads(self.stdout)


@dataclass
class Recorder:
    """A running ``ksmtrace record``."""

    process: subprocess.Popen[str]
    path: Path

    def end(self, number: signal.Signals = signal.SIGINT) -> Ended:
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> Ended:
        stdout, stderr = self.process.communicate(timeout=WAIT_S)
        return Ended(self.process.returncode, stdout, stderr)


@contextlib.contextmanager
def recording(path: Path, *options: str, command: tuple[str, ...] = ()) -> Iterator[Recorder]:
    """Record, from the first counter sample on."""
    with subprocess.Popen(
        [*KSMTRACE, "record", "--json", "-o", str(path), *options, "--", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            wait_until(
                lambda: (
                    process.poll() is not None
                    or any(isinstance(item, CounterSample) for item in readable(path))
                )
            )
            yield Recorder(process, path)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.terminate()
                process.communicate(timeout=WAIT_S)


@contextlib.contextmanager
def holding(*program: str) -> Iterator[dict[str, Any]]:
    """Run a program until it says in a line of JSON that it holds its end state."""
    with subprocess.Popen(
        program, stdout=subprocess.PIPE, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            assert process.stdout is not None
            yield json.loads(process.stdout.readline())
        finally:
            process.terminate()


def workload(name: str, *options: str) -> tuple[str, ...]:
    return (*KSMTRACE, "workload", name, *options, "--json", "--hold", "500")


def nr_programs() -> int:
    """Count the BPF programs that are loaded on this kernel."""
    count = 0
    for entry in Path("/proc").glob("[0-9]*/fdinfo/*"):
        with contextlib.suppress(OSError):
            count += "prog_id:" in entry.read_text()
    return count


@dataclass(frozen=True)
class Live:
    """What the live tests share, as one fixture: modules in tests cannot import each other."""

    wait_until = staticmethod(wait_until)
    readable = staticmethod(readable)
    run = staticmethod(run)
    run_python = staticmethod(run_python)
    report = staticmethod(report)
    recording = staticmethod(recording)
    holding = staticmethod(holding)
    workload = staticmethod(workload)
    nr_programs = staticmethod(nr_programs)
    ksmtrace = tuple(KSMTRACE)
    pinned = (sys.executable, str(Path(__file__).parent / "pinned_pages.py"))


@pytest.fixture
def live(ksm: None) -> Live:
    return Live()


@pytest.fixture
def clean(live: Live) -> None:
    """KSM that has forgotten what exited processes left: a workload waits for that."""
    if nr_rmap_items(read_ksm()) or read_ksm()["stable_node_chains"]:
        done = live.run("workload", "unique", "--pages", "1")
        assert done.returncode == 0, done.stderr


@pytest.fixture(autouse=True)
def default_umask(kernel_lock: None) -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)
