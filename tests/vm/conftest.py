"""Kernels for guests, one rule for all tests of what happens where one cannot be had."""

import functools
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from ksmtrace.capture.sites import shipped_recipes
from ksmtrace.errors import CannotRun, LostVM, UsageError
from ksmtrace.vm import Kernel, Outcome, VmOptions, VmResult, find_kernel, run_in_vm
from ksmtrace.vm.packages import is_of_series
from ksmtrace.vm.selftests import fetch_selftests

REQUIRED = os.environ.get("KSMTRACE_RUN_KERNEL_TESTS") == "1"
PROGRAMS = ("qemu-system-x86_64", "busybox")
# A guest that hangs is to be told of before pytest ends the whole test (pyproject.toml).
LONGEST_S = 1100


# Newest first. What a build inlines only a recipe tells, and Debian's next build has none yet: the
# tests are of what this checkout knows, whatever has come into the archive since.
def known_builds(series: str) -> list[str]:
    releases = [recipe.release for recipe in reversed(shipped_recipes())]
    versions = {release: re.match(r"[0-9]+\.[0-9]+", release) for release in releases}
    return [name for name, found in versions.items() if found and is_of_series(found[0], series)]


# A kernel that cannot be had is asked for once only: without a network that takes its time.
@functools.cache
def available(series: str) -> Kernel | str:
    for program in PROGRAMS:
        if shutil.which(program) is None:
            return f"{program} is not installed"
    why_not = []
    for what in (*known_builds(series), series):
        try:
            return find_kernel(what)
        except (CannotRun, UsageError) as error:
            why_not.append(f"{what}: {error}")
    return "; ".join(why_not)


def find_or_skip(series: str) -> Kernel:
    kernel = available(series)
    if isinstance(kernel, str):
        if REQUIRED:
            pytest.fail(f"KSMTRACE_RUN_KERNEL_TESTS=1 allows no skip: {kernel}")
        pytest.skip(kernel)
    return kernel


def assert_well_ended(result: VmResult) -> None:
    """Fail where the command in a guest has failed, with what it said of that."""
    said = f"{(result.stderr or b'').decode(errors='replace')}\nthe console:\n{result.console}"
    assert result.outcome is Outcome.EXITED, f"{result.outcome.value}:\n{said}"
    assert result.exit_status == 0, f"status {result.exit_status}:\n{said}"


@pytest.fixture
def well_ended() -> Callable[[VmResult], None]:
    return assert_well_ended


@pytest.fixture
def selftests() -> Path:
    """Find the kernel's own KSM tests, those of 6.12."""
    try:
        return fetch_selftests("6.12")
    except CannotRun as error:
        if REQUIRED:
            pytest.fail(f"KSMTRACE_RUN_KERNEL_TESTS=1 allows no skip: {error}")
        pytest.skip(str(error))


@pytest.fixture
def kernel_of() -> Callable[[str], Kernel]:
    """Find the kernel of a series; skip the test where there is none, or fail it if required."""
    return find_or_skip


@pytest.fixture(scope="session")
def in_guest(tmp_path_factory) -> Callable[..., Path]:
    """Run a program in a guest, once per arguments for all tests; returns the folder it wrote to.

    The program gets the folder's name, and further arguments after it.
    """
    ended: dict[tuple[object, ...], tuple[Path, VmResult | LostVM]] = {}

    def run(series: str, program: Path, options: VmOptions, *arguments: str) -> Path:
        known = (series, program, arguments)
        if known not in ended:
            kernel = find_or_skip(series)
            out = tmp_path_factory.mktemp(series)
            command = [sys.executable, str(program), str(out), *arguments]
            result: VmResult | LostVM
            try:
                writable = replace(options, writable=[out])
                result = run_in_vm(command, kernel, writable, capture=True, timeout_s=LONGEST_S)
            except LostVM as error:
                result = error
            ended[known] = out, result
        out, result = ended[known]
        if isinstance(result, LostVM):
            raise result
        assert_well_ended(result)
        return out

    return run
