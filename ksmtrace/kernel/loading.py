"""Whether BPF programs of each kind load and attach here, found out by trying one.

A kernel can list a function in its BTF and still refuse every fentry program, so presence says
nothing. The programs tried do nothing, are attached for some microseconds, and leave no trace.
"""

from __future__ import annotations

from collections.abc import Callable

from ksmtrace.errors import KernelFeatureMissing, KernelInterfaceError
from ksmtrace.kernel.bpf_calls import (
    HELPER_PROBE_READ_KERNEL,
    INSN,
    PROG_TYPE_KPROBE,
    PROG_TYPE_PERF_EVENT,
    PROG_TYPE_RAW_TRACEPOINT,
    PROG_TYPE_TRACING,
    TRACE_FENTRY,
    Calls,
    Refused,
)
from ksmtrace.kernel.btf import Btf
from ksmtrace.kernel.files import ROOT, read_int
from ksmtrace.kernel.probes import LoadProbe

KINDS = ("raw_tracepoint", "kernel_read", "fentry", "kprobe", "watchpoint")
"""Kinds tried; ``kernel_read`` is a raw tracepoint program that reads kernel memory, and
``watchpoint`` one for writes to a variable, by a debug register."""

PROBED_FUNCTIONS = ("ksm_madvise", "break_ksm", "try_to_merge_with_ksm_page", "__ksm_enter")
"""Functions of mm/ksm.c to attach to, best first: visible on all kernels, seldom called."""

KPROBE_PMU = "sys/bus/event_source/devices/kprobe/type"

_EXIT = INSN.pack(0xB7, 0, 0, 0) + INSN.pack(0x95, 0, 0, 0)
_READ_KERNEL_AND_EXIT = (
    INSN.pack(0xBF, 0xA1, 0, 0)  # r1 = r10
    + INSN.pack(0x07, 0x01, 0, -8)  # r1 += -8
    + INSN.pack(0xB7, 0x02, 0, 8)  # r2 = 8
    + INSN.pack(0xB7, 0x03, 0, 0)  # r3 = 0: the read faults, and that is all right
    + INSN.pack(0x85, 0, 0, HELPER_PROBE_READ_KERNEL)
    + _EXIT
)


class _CannotTry(Exception):
    """Something that the attempt needs is not there."""


def probe_loading(
    btf: Btf | None, machine: str, tracepoint: str = "ksm_enter", watched: int | None = None
) -> dict[str, LoadProbe]:
    """Try to load and attach one program of each kind of :data:`KINDS`.

    Args:
        btf: the running kernel's, which fentry needs; None where it has none.
        machine: as ``uname -m`` says.
        tracepoint: the one that the raw tracepoint programs attach to.
        watched: an address of the kernel's, which a watchpoint needs; None where none is known.

    Returns:
        The outcome by kind; never raises.
    """
    try:
        calls = Calls(machine)
    except KernelFeatureMissing as error:
        return dict.fromkeys(KINDS, LoadProbe(None, str(error)))
    attempts: dict[str, Callable[[], str]] = {
        "raw_tracepoint": lambda: _try_raw_tracepoint(calls, _EXIT, tracepoint),
        "kernel_read": lambda: _try_raw_tracepoint(calls, _READ_KERNEL_AND_EXIT, tracepoint),
        "fentry": lambda: _try_fentry(calls, btf),
        "kprobe": lambda: _try_kprobe(calls, btf),
        "watchpoint": lambda: _try_watchpoint(calls, watched),
    }
    return {kind: _outcome(attempts[kind]) for kind in KINDS}


def _outcome(attempt: Callable[[], str]) -> LoadProbe:
    try:
        return LoadProbe(True, attempt())
    except Refused as refusal:
        return LoadProbe(False, str(refusal))
    except (_CannotTry, KernelInterfaceError) as obstacle:
        return LoadProbe(None, str(obstacle))


def _try_raw_tracepoint(calls: Calls, instructions: bytes, tracepoint: str) -> str:
    with (
        calls.load("loading a program", PROG_TYPE_RAW_TRACEPOINT, instructions) as program,
        calls.open_raw_tracepoint(f"attaching to {tracepoint}", program, tracepoint.encode()),
    ):
        return f"loaded, and attached to {tracepoint}"


def _try_fentry(calls: Calls, btf: Btf | None) -> str:
    if btf is None:
        raise _CannotTry("the kernel has no readable BTF")
    for function in PROBED_FUNCTIONS:
        ids = btf.function_ids(function)
        if len(ids) != 1:
            continue
        with (
            calls.load(
                f"loading a program for {function}",
                PROG_TYPE_TRACING,
                _EXIT,
                TRACE_FENTRY,
                ids[0],
            ) as program,
            calls.open_raw_tracepoint(f"attaching to {function}", program, None),
        ):
            return f"loaded, and attached to {function}"
    raise _CannotTry(f"BTF has none of the functions {', '.join(PROBED_FUNCTIONS)}")


def _try_kprobe(calls: Calls, btf: Btf | None) -> str:
    pmu = read_int(f"{ROOT}{KPROBE_PMU}")
    if pmu is None:
        raise Refused(f"there is no /{KPROBE_PMU}: no CONFIG_KPROBE_EVENTS")
    present = [name for name in PROBED_FUNCTIONS if btf is None or btf.function_ids(name)]
    function = (present or PROBED_FUNCTIONS)[0]
    with (
        calls.load("loading a program", PROG_TYPE_KPROBE, _EXIT) as program,
        calls.open_kprobe(f"opening a probe on {function}", pmu, function) as probe,
    ):
        calls.attach(f"attaching to {function}", probe, program)
        return f"loaded, and attached to {function}"


def _try_watchpoint(calls: Calls, watched: int | None) -> str:
    if watched is None:
        raise _CannotTry("no address of the kernel's is known")
    # Of this task only, so that no other is slowed down.
    with (
        calls.load("loading a program", PROG_TYPE_PERF_EVENT, _EXIT) as program,
        calls.open_watchpoint("opening a watchpoint", watched, 0) as watchpoint,
    ):
        calls.attach("attaching to it", watchpoint, program)
        return "loaded, and attached to a watchpoint on kernel memory"
