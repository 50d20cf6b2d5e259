"""Whether BPF programs of each kind load and attach here, found out by trying one.

A kernel can list a function in its BTF and still refuse every fentry program, so presence says
nothing. The programs tried do nothing, are attached for some microseconds, and leave no trace.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Callable, Iterator

from ksmtrace.errors import KernelInterfaceError
from ksmtrace.kernel.btf import Btf
from ksmtrace.kernel.files import ROOT, read_int
from ksmtrace.kernel.probes import LoadProbe

KINDS = ("raw_tracepoint", "kernel_read", "fentry", "kprobe")
"""Kinds tried; ``kernel_read`` is a raw tracepoint program that reads kernel memory."""

PROBED_FUNCTIONS = ("ksm_madvise", "break_ksm", "try_to_merge_with_ksm_page", "__ksm_enter")
"""Functions of mm/ksm.c to attach to, best first: visible on all kernels, seldom called."""

KPROBE_PMU = "sys/bus/event_source/devices/kprobe/type"

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
_BPF_PROG_LOAD, _BPF_RAW_TRACEPOINT_OPEN = 5, 17
_PROG_TYPE_KPROBE, _PROG_TYPE_RAW_TRACEPOINT, _PROG_TYPE_TRACING = 2, 17, 26
_TRACE_FENTRY = 24
_HELPER_PROBE_READ_KERNEL = 113
_PROG_ATTR = struct.Struct("=IIQQIIQII16sIIIIQIIQIIII")
_INSN = struct.Struct("=BBhi")
# include/uapi/linux/perf_event.h
_PERF_ATTR = struct.Struct("=IIQQQQQIIQQ")
_PERF_FLAG_FD_CLOEXEC = 8
_PERF_IOC_SET_BPF = 0x4004_2408
_PERF_ATTR_DISABLED = 1

_EXIT = _INSN.pack(0xB7, 0, 0, 0) + _INSN.pack(0x95, 0, 0, 0)
_READ_KERNEL_AND_EXIT = (
    _INSN.pack(0xBF, 0xA1, 0, 0)  # r1 = r10
    + _INSN.pack(0x07, 0x01, 0, -8)  # r1 += -8
    + _INSN.pack(0xB7, 0x02, 0, 8)  # r2 = 8
    + _INSN.pack(0xB7, 0x03, 0, 0)  # r3 = 0: the read faults, and that is all right
    + _INSN.pack(0x85, 0, 0, _HELPER_PROBE_READ_KERNEL)
    + _EXIT
)


class _Refused(Exception):
    """A step that the kernel refused: the message says which, and the errno."""


class _CannotTry(Exception):
    """Something that the attempt needs is not there."""


def probe_loading(
    btf: Btf | None, machine: str, tracepoint: str = "ksm_enter"
) -> dict[str, LoadProbe]:
    """Try to load and attach one program of each kind of :data:`KINDS`.

    Args:
        btf: the running kernel's, which fentry needs; None where it has none.
        machine: as ``uname -m`` says.
        tracepoint: the one that the raw tracepoint programs attach to.

    Returns:
        The outcome by kind; never raises.
    """
    numbers = _SYSCALLS.get(machine)
    if numbers is None:
        return dict.fromkeys(KINDS, LoadProbe(None, f"bpf(2)'s number on {machine} is not known"))
    calls = _Calls(*numbers)
    attempts: dict[str, Callable[[], str]] = {
        "raw_tracepoint": lambda: _try_raw_tracepoint(calls, _EXIT, tracepoint),
        "kernel_read": lambda: _try_raw_tracepoint(calls, _READ_KERNEL_AND_EXIT, tracepoint),
        "fentry": lambda: _try_fentry(calls, btf),
        "kprobe": lambda: _try_kprobe(calls, btf),
    }
    return {kind: _outcome(attempts[kind]) for kind in KINDS}


def _outcome(attempt: Callable[[], str]) -> LoadProbe:
    try:
        return LoadProbe(True, attempt())
    except _Refused as refusal:
        return LoadProbe(False, str(refusal))
    except (_CannotTry, KernelInterfaceError) as obstacle:
        return LoadProbe(None, str(obstacle))


class _Calls:
    def __init__(self, bpf: int, perf_event_open: int) -> None:
        self._numbers = {"bpf": bpf, "perf_event_open": perf_event_open}
        self._syscall = ctypes.CDLL(None, use_errno=True).syscall
        self._syscall.restype = ctypes.c_long

    @contextlib.contextmanager
    def _fd(self, step: str, name: str, *arguments: object) -> Iterator[int]:
        fd = self._syscall(ctypes.c_long(self._numbers[name]), *arguments)
        if fd < 0:
            raise _Refused(f"{step}: {_errno_name(ctypes.get_errno())}")
        try:
            yield fd
        finally:
            os.close(fd)

    def load(
        self, step: str, kind: int, instructions: bytes, attach_type: int = 0, btf_id: int = 0
    ) -> contextlib.AbstractContextManager[int]:
        code = ctypes.create_string_buffer(instructions, len(instructions))
        license_ = ctypes.create_string_buffer(b"GPL")
        attr = ctypes.create_string_buffer(
            _PROG_ATTR.pack(
                *(kind, len(instructions) // _INSN.size),
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
        return self._bpf(step, _BPF_PROG_LOAD, attr)

    def open_raw_tracepoint(
        self, step: str, program: int, name: bytes | None
    ) -> contextlib.AbstractContextManager[int]:
        text = ctypes.create_string_buffer(name) if name is not None else None
        attr = ctypes.create_string_buffer(
            struct.pack("=QII", ctypes.addressof(text) if text is not None else 0, program, 0), 16
        )
        attr.referents = text  # type: ignore[attr-defined]
        return self._bpf(step, _BPF_RAW_TRACEPOINT_OPEN, attr)

    def _bpf(
        self, step: str, command: int, attr: ctypes.Array[ctypes.c_char]
    ) -> contextlib.AbstractContextManager[int]:
        return self._fd(
            step, "bpf", ctypes.c_int(command), ctypes.byref(attr), ctypes.c_uint(len(attr))
        )

    def open_kprobe(
        self, step: str, pmu: int, function: str
    ) -> contextlib.AbstractContextManager[int]:
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


def _try_raw_tracepoint(calls: _Calls, instructions: bytes, tracepoint: str) -> str:
    with (
        calls.load("loading a program", _PROG_TYPE_RAW_TRACEPOINT, instructions) as program,
        calls.open_raw_tracepoint(f"attaching to {tracepoint}", program, tracepoint.encode()),
    ):
        return f"loaded, and attached to {tracepoint}"


def _try_fentry(calls: _Calls, btf: Btf | None) -> str:
    if btf is None:
        raise _CannotTry("the kernel has no readable BTF")
    for function in PROBED_FUNCTIONS:
        ids = btf.function_ids(function)
        if len(ids) != 1:
            continue
        with (
            calls.load(
                f"loading a program for {function}",
                _PROG_TYPE_TRACING,
                _EXIT,
                _TRACE_FENTRY,
                ids[0],
            ) as program,
            calls.open_raw_tracepoint(f"attaching to {function}", program, None),
        ):
            return f"loaded, and attached to {function}"
    raise _CannotTry(f"BTF has none of the functions {', '.join(PROBED_FUNCTIONS)}")


def _try_kprobe(calls: _Calls, btf: Btf | None) -> str:
    pmu = read_int(f"{ROOT}{KPROBE_PMU}")
    if pmu is None:
        raise _Refused(f"there is no /{KPROBE_PMU}: no CONFIG_KPROBE_EVENTS")
    present = [name for name in PROBED_FUNCTIONS if btf is None or btf.function_ids(name)]
    function = (present or PROBED_FUNCTIONS)[0]
    with (
        calls.load("loading a program", _PROG_TYPE_KPROBE, _EXIT) as program,
        calls.open_kprobe(f"opening a probe on {function}", pmu, function) as probe,
    ):
        try:
            fcntl.ioctl(probe, _PERF_IOC_SET_BPF, program)
        except OSError as error:
            raise _Refused(f"attaching to {function}: {_errno_name(error.errno or 0)}") from error
        return f"loaded, and attached to {function}"


def _errno_name(number: int) -> str:
    return errno.errorcode.get(number, str(number))
