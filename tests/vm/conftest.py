"""Kernels for guests, one rule for all tests of what happens where one cannot be had."""

import functools
import os
import shutil
from collections.abc import Callable

import pytest

from ksmtrace.errors import CannotRun
from ksmtrace.vm import Kernel, find_kernel

REQUIRED = os.environ.get("KSMTRACE_RUN_KERNEL_TESTS") == "1"
PROGRAMS = ("qemu-system-x86_64", "busybox")


# A kernel that cannot be had is asked for once only: without a network that takes its time.
@functools.cache
def available(series: str) -> Kernel | str:
    for program in PROGRAMS:
        if shutil.which(program) is None:
            return f"{program} is not installed"
    try:
        return find_kernel(series)
    except CannotRun as error:
        return str(error)


def find_or_skip(series: str) -> Kernel:
    kernel = available(series)
    if isinstance(kernel, str):
        if REQUIRED:
            pytest.fail(f"KSMTRACE_RUN_KERNEL_TESTS=1 allows no skip: {kernel}")
        pytest.skip(kernel)
    return kernel


@pytest.fixture
def kernel_of() -> Callable[[str], Kernel]:
    """Find the kernel of a series; skip the test where there is none, or fail it if required."""
    return find_or_skip
