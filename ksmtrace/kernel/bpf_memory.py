"""Kernel virtual memory, through a BPF program that copies a page of it into a map.

For kernels without /proc/kcore: who may load tracing programs may read kernel memory with
bpf_probe_read_kernel, which answers a wrong address with an error
(kernel/trace/bpf_trace.c:bpf_probe_read_kernel_common). The program is attached to nothing, and
runs when BPF_PROG_TEST_RUN says so.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from typing import Self

from ksmtrace.errors import KernelFeatureMissing, PrivilegeMissing
from ksmtrace.kernel.bpf_calls import (
    HELPER_PROBE_READ_KERNEL,
    INSN,
    PROG_TYPE_RAW_TRACEPOINT,
    Calls,
    Refused,
)
from ksmtrace.kernel.memory import PAGE_BYTES, KernelMemory, UnmappedAddress

_PSEUDO_MAP_VALUE = 2
_REFUSED_ERRNOS = ("EPERM", "EACCES")


def _copy_page(map_fd: int) -> bytes:
    return b"".join(
        (
            INSN.pack(0x79, 0x16, 0, 0),  # r6 = the argument
            INSN.pack(0x18, 0x01 | _PSEUDO_MAP_VALUE << 4, 0, map_fd),  # r1 = the map's value
            INSN.pack(0, 0, 0, 0),
            INSN.pack(0xB7, 0x02, 0, PAGE_BYTES),  # r2 = its size
            INSN.pack(0xBF, 0x63, 0, 0),  # r3 = r6
            INSN.pack(0x85, 0, 0, HELPER_PROBE_READ_KERNEL),
            INSN.pack(0x95, 0, 0, 0),
        )
    )


class BpfMemory(KernelMemory):
    """Kernel memory as a BPF program reads it. Costs a system call per page."""

    source = "the kernel's memory, read by a BPF program,"
    how = "by a BPF program"

    def __init__(self, calls: Calls) -> None:
        super().__init__()
        self._calls = calls
        self._held = contextlib.ExitStack()
        with contextlib.ExitStack() as held:
            array = held.enter_context(calls.create_array("creating a map", PAGE_BYTES))
            self._page = mmap.mmap(array, PAGE_BYTES, mmap.MAP_SHARED, mmap.PROT_READ)
            held.callback(self._page.close)
            self._program = held.enter_context(
                calls.load("loading a program", PROG_TYPE_RAW_TRACEPOINT, _copy_page(array))
            )
            self._calls.run("running a program", self._program, 0)
            self._held = held.pop_all()

    @classmethod
    def open(cls) -> Self:
        """Load the program, and run it once.

        Raises:
            PrivilegeMissing: this user may not load such programs (CAP_BPF, CAP_PERFMON), or nobody
                may read kernel memory (lockdown).
            KernelFeatureMissing: the kernel cannot run them on demand (before 5.10).
        """
        try:
            return cls(Calls(os.uname().machine))
        except Refused as error:
            message = f"no BPF program can read kernel memory: {error}"
            if str(error).endswith(_REFUSED_ERRNOS):
                hint = "run as root (CAP_BPF, CAP_PERFMON), on a kernel that is not locked down"
                raise PrivilegeMissing(message, hint) from error
            # Under lockdown=confidentiality there is no such helper, and the verifier says EINVAL
            # (kernel/trace/bpf_trace.c:bpf_tracing_func_proto).
            hint = "it takes a kernel of 5.10 or later that is not locked down for confidentiality"
            raise KernelFeatureMissing(message, hint) from error

    def close(self) -> None:
        """Unload the program."""
        self._held.close()

    def load(self, number: int, count: int) -> None:
        """Read a run of pages, one after the other."""
        for at in range(number, number + count):
            if self._calls.run("running a program", self._program, at * PAGE_BYTES):
                raise UnmappedAddress(at * PAGE_BYTES, self.source)
            self.keep(at, self._page[:])
