"""What all tests share: which can run here, the goldens, and KSM for one test at a time."""

import fcntl
import functools
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ksmtrace.analysis.recorded import Recorded, gather
from ksmtrace.capture.plan import make_plan
from ksmtrace.kernel.facts import read_facts
from ksmtrace.recording.reader import RecordingReader
from ksmtrace.workload.knobs import read_knobs
from ksmtrace.workload.registered import registered_processes

REQUIRED = os.environ.get("KSMTRACE_RUN_KERNEL_TESTS") == "1"
RECORDINGS = Path(__file__).parent / "golden" / "recordings"
LOCK = Path("/tmp/ksm.lock")
LEAVING_S = 60


@functools.cache
def missing_for_live() -> str:
    """Name what a live test lacks here; empty where nothing."""
    return "; ".join(f"{what}: {hint}" for what, hint in make_plan(read_facts()).blockers)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("live") and missing_for_live():
        pytest.skip(missing_for_live())


# What takes longest begins first.
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("vm") is None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    report = yield
    if REQUIRED and report.skipped and item.get_closest_marker("live"):
        report.outcome = "failed"
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.longrepr = f"KSMTRACE_RUN_KERNEL_TESTS=1 allows no skip: {reason}"
    return report


@pytest.fixture(scope="session")
def recordings() -> Path:
    return RECORDINGS


@pytest.fixture
def golden():
    """Gather a golden recording by its name; see scripts/make_goldens."""

    def read(name: str) -> Recorded:
        return gather(RecordingReader(RECORDINGS / f"{name}.ksmt"))

    return read


def holds_lock_already() -> bool:
    # flock(1) hands its descriptor, and so its lock, to the command that it runs.
    return any(os.path.realpath(entry) == str(LOCK) for entry in Path("/proc/self/fd").iterdir())


# No longer than a file takes, so that workers (pytest-xdist) which each run files take turns.
@pytest.fixture(scope="module")
def kernel_lock() -> Iterator[None]:
    if holds_lock_already():
        yield
        return
    with LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture
def ksm(kernel_lock: None) -> Iterator[None]:
    """KSM for this test alone, and the same knobs afterwards."""
    deadline = time.monotonic() + LEAVING_S
    # Those of the test before may still be on their way out.
    while (others := registered_processes()) and time.monotonic() < deadline:
        time.sleep(0.05)
    if others:
        pytest.skip(f"KSM is in use by {', '.join(others.values())}")
    knobs = read_knobs()
    yield
    assert read_knobs() == knobs
