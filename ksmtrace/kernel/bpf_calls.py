"""bpf(2) and perf_event_open(2) for programs of a few instructions, which need no compiler."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Iterator

from ksmtrace.errors import KernelFeatureMissing

INSN = struct.Struct("=BBhi")
"""struct bpf_insn: opcode, registers, offset, immediate (include/uapi/linux/bpf.h)."""

PROG_TYPE_KPROBE, PROG_TYPE_PERF_EVENT = 2, 7
PROG_TYPE_RAW_TRACEPOINT, PROG_TYPE_TRACING = 17, 26
TRACE_FENTRY = 24
HELPER_PROBE_READ_KERNEL = 113
PERF_IOC_ENABLE, PERF_IOC_SET_BPF = 0x2400, 0x4004_2408
"""From include/uapi/linux/bpf.h and perf_event.h."""

# bpf(2) and perf_event_open(2) by machine; the last line is the kernel's common table.
_SYSCALLS = {
    "x86_64": (321, 298),
    "s390x": (351, 331),
    "ppc64le": (361, 319),
    "aarch64": (280, 241),
    "riscv64": (280, 241),
    "loongarch64": (280, 241),
}

# include/uapi/linux/bpf.h
_MAP_CREATE, _PROG_LOAD, _PROG_TEST_RUN, _RAW_TRACEPOINT_OPEN = 0, 5, 10, 17
_MAP_TYPE_ARRAY, _F_MMAPABLE = 2, 1 << 10
_MAP_ATTR = struct.Struct("=IIIII")
_PROG_ATTR = struct.Struct("=IIQQIIQII16sIIIIQIIQIIII")
# prog_fd, retval, two sizes and two addresses of packets, repeat, duration, sizes and addresses of
# the context in and out, flags, CPU, batch_size
_TEST_RUN_ATTR = struct.Struct("=IIIIQQIIIIQQIII")
_RETVAL_OFFSET = 4
# include/uapi/linux/perf_event.h
_PERF_ATTR = struct.Struct("=IIQQQQQIIQQ")
_PERF_FLAG_FD_CLOEXEC = 8
_PERF_ATTR_DISABLED = 1
_PERF_TYPE_BREAKPOINT = 5
_HW_BREAKPOINT_W = 2  # include/uapi/linux/hw_breakpoint.h
_WATCHED_BYTES = 8


class Refused(Exception):
    """A step that the kernel refused: the message says which, and the errno."""


class Calls:
    """The system calls; each returns a context that closes the descriptor in the end.

    Args:
        machine: as ``uname -m`` says.

    Raises:
        KernelFeatureMissing: the calls' numbers on this machine are not known.
    """

    def __init__(self, machine: str) -> None:
        numbers = _SYSCALLS.get(machine)
        if numbers is None:
            raise KernelFeatureMissing(f"bpf(2)'s number on {machine} is not known")
        self._numbers = dict(zip(("bpf", "perf_event_open"), numbers, strict=True))
        self._syscall = ctypes.CDLL(None, use_errno=True).syscall
        self._syscall.restype = ctypes.c_long

    @contextlib.contextmanager
    def _fd(self, step: str, name: str, *arguments: object) -> Iterator[int]:
        fd = self._syscall(ctypes.c_long(self._numbers[name]), *arguments)
        if fd < 0:
            raise Refused(f"{step}: {errno_name(ctypes.get_errno())}")
        try:
            yield fd
        finally:
            os.close(fd)

    def create_array(self, step: str, value_bytes: int) -> contextlib.AbstractContextManager[int]:
        """Create an array map of one value, which can be mapped."""
        attr = ctypes.create_string_buffer(
            _MAP_ATTR.pack(_MAP_TYPE_ARRAY, 4, value_bytes, 1, _F_MMAPABLE), 64
        )
        return self._bpf(step, _MAP_CREATE, attr)

    def run(self, step: str, program: int, argument: int) -> int:
        """Run a raw tracepoint program once, with one argument; returns what it returns.

        Raises:
            Refused: the kernel does not run it: before 5.10.
        """
        context = ctypes.create_string_buffer(struct.pack("=Q", argument), 8)
        attr = ctypes.create_string_buffer(
            _TEST_RUN_ATTR.pack(
                *(program, 0, 0, 0, 0, 0, 0, 0),
                *(len(context), 0, ctypes.addressof(context), 0, 0, 0, 0),
            ),
            80,
        )
        done = self._syscall(
            ctypes.c_long(self._numbers["bpf"]),
            ctypes.c_int(_PROG_TEST_RUN),
            ctypes.byref(attr),
            ctypes.c_uint(len(attr)),
        )
        if done < 0:
            raise Refused(f"{step}: {errno_name(ctypes.get_errno())}")
        value: int = struct.unpack_from("=i", attr, _RETVAL_OFFSET)[0]
        return value

    def load(
        self, step: str, kind: int, instructions: bytes, attach_type: int = 0, btf_id: int = 0
    ) -> contextlib.AbstractContextManager[int]:
        """Load a program."""
        code = ctypes.create_string_buffer(instructions, len(instructions))
        license_ = ctypes.create_string_buffer(b"GPL")
        attr = ctypes.create_string_buffer(
            _PROG_ATTR.pack(
                *(kind, len(instructions) // INSN.size),
                *(ctypes.addressof(code), ctypes.addressof(license_)),
                *(0, 0, 0, 0, 0),  # no log, no version, no flags
                b"ksmtrace_probe",
                *(0, attach_type),
                *(0, 0, 0, 0, 0, 0, 0),  # no BTF of our own
                *(btf_id, 0, 0),
            ),
            _PROG_ATTR.size,
        )
        attr.referents = (code, license_)  # type: ignore[attr-defined]
        return self._bpf(step, _PROG_LOAD, attr)

    def open_raw_tracepoint(
        self, step: str, program: int, name: bytes | None
    ) -> contextlib.AbstractContextManager[int]:
        """Attach to a raw tracepoint, or for fentry to the function that it was loaded for."""
        text = ctypes.create_string_buffer(name) if name is not None else None
        attr = ctypes.create_string_buffer(
            struct.pack("=QII", ctypes.addressof(text) if text is not None else 0, program, 0), 16
        )
        attr.referents = text  # type: ignore[attr-defined]
        return self._bpf(step, _RAW_TRACEPOINT_OPEN, attr)

    def _bpf(
        self, step: str, command: int, attr: ctypes.Array[ctypes.c_char]
    ) -> contextlib.AbstractContextManager[int]:
        return self._fd(
            step, "bpf", ctypes.c_int(command), ctypes.byref(attr), ctypes.c_uint(len(attr))
        )

    def open_kprobe(
        self, step: str, pmu: int, function: str
    ) -> contextlib.AbstractContextManager[int]:
        """Open a kprobe on a function's entry, not enabled."""
        name = ctypes.create_string_buffer(function.encode())
        attr = ctypes.create_string_buffer(
            # type, size, config, period, sample_type, read_format, flags, wakeup, bp_type,
            # config1: the function's name, config2: the offset in it
            _PERF_ATTR.pack(
                *(pmu, _PERF_ATTR.size, 0, 0, 0, 0, _PERF_ATTR_DISABLED),
                *(0, 0, ctypes.addressof(name), 0),
            ),
            _PERF_ATTR.size,
        )
        attr.referents = name  # type: ignore[attr-defined]
        return self._fd(
            step,
            "perf_event_open",
            ctypes.byref(attr),
            *(ctypes.c_int(-1), ctypes.c_int(0), ctypes.c_int(-1)),  # any task, CPU 0, no group
            ctypes.c_ulong(_PERF_FLAG_FD_CLOEXEC),
        )

    def open_watchpoint(
        self, step: str, address: int, pid: int
    ) -> contextlib.AbstractContextManager[int]:
        """Open a watchpoint on 8 bytes that a task writes to, not enabled; pid 0: this task.

        A read of it tells how often they were written.
        """
        attr = ctypes.create_string_buffer(
            _PERF_ATTR.pack(
                *(_PERF_TYPE_BREAKPOINT, _PERF_ATTR.size, 0, 1, 0, 0, _PERF_ATTR_DISABLED),
                *(0, _HW_BREAKPOINT_W, address, _WATCHED_BYTES),
            ),
            _PERF_ATTR.size,
        )
        return self._fd(
            step,
            "perf_event_open",
            ctypes.byref(attr),
            *(ctypes.c_int(pid), ctypes.c_int(-1), ctypes.c_int(-1)),  # any CPU, no group
            ctypes.c_ulong(_PERF_FLAG_FD_CLOEXEC),
        )

    def attach(self, step: str, event: int, program: int) -> None:
        """Attach a program to an open probe or watchpoint."""
        try:
            fcntl.ioctl(event, PERF_IOC_SET_BPF, program)
        except OSError as error:
            raise Refused(f"{step}: {errno_name(error.errno or 0)}") from error


def errno_name(number: int) -> str:
    """Return the name of an errno, or its number."""
    return errno.errorcode.get(number, str(number))
