"""Compiles, loads, attaches and detaches the BPF programs: the only importer of bcc."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import importlib.resources
import mmap
import os
import re
import resource
import struct
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ksmtrace.capture.hooks import (
    COUNTS,
    FUNCTIONS,
    HISTOGRAM_SLOTS,
    HISTOGRAMS,
    LOCK_HISTOGRAMS,
    LOCK_TALLIES,
    WATCHPOINT,
    Attachment,
)
from ksmtrace.errors import BackendUnavailable, CannotRun
from ksmtrace.events import KINDS, NR_KINDS
from ksmtrace.kernel.bpf_calls import PERF_IOC_ENABLE, Calls

_RECURSION_MISSES = 208  # offset in struct bpf_prog_info (include/uapi/linux/bpf.h)
# In this order: a text names what stands before it.
_ON_TRACEPOINTS = ("ksm.c", "outcomes.c")
_ON_FUNCTIONS = (
    *("functions.c", "visits.c", "merging.c", "leaving.c"),
    *("migration.c", "passes.c", "costs.c"),
)
_KFUNC = {"fentry": "kfunc", "fexit": "kretfunc"}  # bcc's words

RING_PAGE_BYTES = 4096
"""Unit in which bcc's BPF_RINGBUF_OUTPUT counts (PAGE_SIZE of our prologue)."""


class Programs:
    """The loaded programs: everything is attached once the constructor returns, or it raises.

    They begin (:meth:`begin`) and end their work all at once, however long it takes to attach and
    detach them.

    Args:
        attachments: the programs, and where each goes.
        defines: C defines for the source.
        ring_bytes: size of the ring, a power of two of at least 4096.
        source: the C program with the maps; by default the package's ksm.c and locks.c, and with
            them the others where an attachment needs them.

    Raises:
        BackendUnavailable: bcc is missing, or the kernel or compiler refused; nothing stays loaded.
    """

    def __init__(
        self,
        attachments: Iterable[Attachment],
        defines: Mapping[str, int],
        ring_bytes: int,
        source: Path | None = None,
    ) -> None:
        bcc = _import_bcc()
        self._stack = contextlib.ExitStack()
        # Before 5.11 maps count against RLIMIT_MEMLOCK, whose default a ring exceeds.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(
                resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
            )
        package = self._stack.enter_context(
            importlib.resources.as_file(importlib.resources.files("ksmtrace.bpf"))
        )
        attachments = tuple(attachments)
        self._made = [attachment for attachment in attachments if attachment.body]
        self._has_locks = source is None
        sources = [source] if source else [package / name for name in _ON_TRACEPOINTS]
        if self._made:
            sources += [package / name for name in _ON_FUNCTIONS]
        if self._has_locks:
            sources.append(package / "locks.c")
        # One text, because bcc makes maps known within one file only.
        lines = [path.read_text() for path in sources] + [made.text for made in self._made]
        text = "\n".join([*lines, ""])
        self.headers = os.environ.get("BCC_KERNEL_SOURCE") or str(package / "prologue")
        flags = [f"-I{package}", f"-DRING_PAGES={ring_bytes // RING_PAGE_BYTES}"]
        flags += [f"-D{name}={number}ULL" for name, number in defines.items()]
        self._prefixes = {how: f"{kfunc}{_infix(bcc)}" for how, kfunc in _KFUNC.items()}
        flags += [f"-DKFUNC_PREFIX={self._prefixes['fentry']}"]
        flags += [f"-DKRETFUNC_PREFIX={self._prefixes['fexit']}"]
        self._attached: list[Attachment] = []
        self._ksmd = int(defines.get("KSMD_PID", 0))
        self._watchpoints: dict[str, tuple[int, contextlib.ExitStack]] = {}
        self._switch = np.zeros(1, np.uint64)
        self._bpf: Any = None
        try:
            with _environment("BCC_KERNEL_SOURCE", self.headers), _stderr_held() as said:
                # bcc attaches a program for a function's entry or exit by itself, by its name.
                self._bpf = bcc.BPF(text=text.encode(), cflags=flags)
                for attachment in attachments:
                    self._attach(attachment)
                    self._attached.append(attachment)
        except Exception as error:
            # bcc raises bare Exception for whatever failed, and its reason goes to stderr.
            self.close()
            raise _refusal(str(error), said(), ring_bytes) from error
        self.ring_fd: int = self._bpf[b"ring"].map_fd
        self._tallies = self._mapped(b"tallies", NR_KINDS * 2).reshape(NR_KINDS, 2)
        if self._made:
            self._counts = self._mapped(b"counts", len(COUNTS))
            slots = self._mapped(b"histograms", len(HISTOGRAMS) * HISTOGRAM_SLOTS)
            self._histograms = slots.reshape(len(HISTOGRAMS), HISTOGRAM_SLOTS)
            self._passages = self._mapped(b"passages", len(FUNCTIONS) * 2).reshape(-1, 2)
        if self._watchpoints:
            self._watched = self._mapped(b"watched", 1)
        if self._has_locks:
            nr_tallies = len(LOCK_HISTOGRAMS) * len(LOCK_TALLIES)
            self._lock_tallies = self._mapped(b"lock_tallies", nr_tallies)
            slots = self._mapped(b"lock_histograms", len(LOCK_HISTOGRAMS) * HISTOGRAM_SLOTS)
            self._lock_histograms = slots.reshape(-1, HISTOGRAM_SLOTS)
        self._switch = self._mapped(b"all_attached", 1, mmap.PROT_READ | mmap.PROT_WRITE)

    def begin(self) -> None:
        """Let the programs do their work from now on."""
        self._switch[0] = 1

    def tallies(self) -> dict[str, tuple[int, int]]:
        """Read the kernel-side counts: kind's name -> (produced, dropped)."""
        rows = self._tallies.tolist()
        return {kind.name: (rows[kind.number][0], rows[kind.number][1]) for kind in KINDS}

    def counted(self) -> dict[str, int]:
        """Read what is counted per page and per lock; empty where no program counts."""
        counted: dict[str, int] = {}
        if self._made:
            counted |= zip(COUNTS, self._counts.tolist(), strict=True)
        if self._has_locks:
            names = [f"{name}.{tally}" for name in LOCK_HISTOGRAMS for tally in LOCK_TALLIES]
            counted |= zip(names, self._lock_tallies.tolist(), strict=True)
        return counted

    def histograms(self) -> dict[str, list[int]]:
        """Read the histograms; empty where no program counts."""
        histograms: dict[str, list[int]] = {}
        if self._made:
            histograms |= zip(HISTOGRAMS, self._histograms.tolist(), strict=True)
        if self._has_locks:
            histograms |= zip(LOCK_HISTOGRAMS, self._lock_histograms.tolist(), strict=True)
        return histograms

    def stack(self, number: int) -> list[int]:
        """Read one stack that an event names: return addresses, the innermost first."""
        with _before_all_others():
            try:
                return list(self._bpf[b"stacks"].walk(number))
            except KeyError:
                return []

    def calls(self) -> dict[str, list[int | None]]:
        """Read how often each function with programs was entered, and how often it returned."""
        numbers = {function.body: number for number, function in enumerate(FUNCTIONS)}
        calls: dict[str, list[int | None]] = {}
        for attachment in self._made:
            way = int(attachment.how in ("fexit", "kretprobe"))
            passed = calls.setdefault(attachment.body, [None, None])
            passed[way] = int(self._passages[numbers[attachment.body], way])
        return calls

    def missed(self) -> dict[str, int]:
        """Read how often a program was not run, because its CPU was in the middle of another.

        Only what the kernel counts (bpf_prog_info.recursion_misses): older ones count it for no
        program, or for none of a kprobe, and then there is nothing here. A watchpoint counts
        itself how often it was reached.
        """
        missed = {}
        for variable, (fd, _) in self._watchpoints.items():
            # In this order: ksmd may be at work.
            (reached,) = struct.unpack("=Q", os.read(fd, 8))
            if (times := reached - int(self._watched[0])) > 0:
                missed[f"{WATCHPOINT}:{variable}"] = times
        for attachment in self._attached:
            name = self._program_name(attachment)
            information = _read_program_information(self._bpf.funcs[name].fd)
            if len(information) >= _RECURSION_MISSES + 8:
                (times,) = struct.unpack_from("=Q", information, _RECURSION_MISSES)
                if times:
                    place = f"+{attachment.offset:#x}" if attachment.offset else ""
                    missed[f"{attachment.how}:{attachment.target}{place}"] = times
        return missed

    def _mapped(
        self, name: bytes, numbers: int, access: int = mmap.PROT_READ
    ) -> npt.NDArray[np.uint64]:
        """Map an array of unsigned 64-bit numbers, so that its use calls no bpf(2)."""
        whole_pages = -(-numbers * 8 // mmap.PAGESIZE) * mmap.PAGESIZE
        try:
            mapping = mmap.mmap(self._bpf[name].map_fd, whole_pages, mmap.MAP_SHARED, access)
        except (OSError, ValueError) as error:
            self.close()
            raise BackendUnavailable(f"{name.decode()} cannot be mapped: {error}") from error
        return np.frombuffer(mapping, np.uint64, numbers)

    def _program_name(self, attachment: Attachment) -> bytes:
        return f"{self._prefixes.get(attachment.how, '')}{attachment.program}".encode()

    def detach(self) -> None:
        """Detach all programs; the ring and the tallies stay readable."""
        self._switch[0] = 0
        while self._attached:
            self._detach(self._attached.pop())

    def _attach(self, attachment: Attachment) -> None:
        name, target = attachment.program.encode(), attachment.target.encode()
        if attachment.how == "raw_tracepoint":
            self._bpf.attach_raw_tracepoint(tp=target, fn_name=name)
        elif attachment.how == "kprobe":
            self._bpf.attach_kprobe(event=target, event_off=attachment.offset, fn_name=name)
        elif attachment.how == "kretprobe":
            self._bpf.attach_kretprobe(event=target, fn_name=name)
        elif attachment.how == WATCHPOINT:
            self._watch(attachment)

    # bcc would open one per CPU.
    def _watch(self, attachment: Attachment) -> None:
        program = self._bpf.load_func(attachment.program.encode(), self._bpf.PERF_EVENT)
        calls = Calls(os.uname().machine)
        with contextlib.ExitStack() as opening:
            watchpoint = opening.enter_context(
                calls.open_watchpoint("opening a watchpoint", attachment.address, self._ksmd)
            )
            calls.attach("attaching to a watchpoint", watchpoint, program.fd)
            fcntl.ioctl(watchpoint, PERF_IOC_ENABLE, 0)
            self._watchpoints[attachment.target] = watchpoint, opening.pop_all()

    def _detach(self, attachment: Attachment) -> None:
        target = attachment.target.encode()
        if attachment.how == "raw_tracepoint":
            self._bpf.detach_raw_tracepoint(target)
        elif attachment.how in ("kprobe", "kretprobe"):
            detach = getattr(self._bpf, f"detach_{attachment.how}")
            detach(target, attachment.program.encode())
        elif attachment.how == WATCHPOINT:
            self._watchpoints.pop(attachment.target)[1].close()
        else:
            detach = getattr(self._bpf, f"detach_{_KFUNC[attachment.how]}")
            detach(self._program_name(attachment))

    def close(self) -> None:
        """Detach and unload everything."""
        if self._bpf is not None:
            self.detach()
            self._bpf.cleanup()
            self._bpf = None
        self._stack.close()


def _import_bcc() -> Any:
    try:
        import bcc
    except ImportError as error:
        raise BackendUnavailable(
            "bcc's Python module is missing",
            "install the distribution's python3-bpfcc, and make the virtual environment from the "
            "system Python with --system-site-packages (scripts/setup does both)",
        ) from error
    return bcc


@contextlib.contextmanager
def _before_all_others() -> Iterator[None]:
    """Let no other task have this thread's CPU, as far as that is allowed.

    While bpf(2) looks into a map, the kernel leaves out all programs on kprobes on that CPU
    (kernel/bpf/syscall.c: bpf_disable_instrumentation): also those of ksmd, if it came in between.
    """
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    except OSError:
        yield
        return
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameters)


def _read_program_information(fd: int) -> bytes:
    """Read struct bpf_prog_info, as much of it as the kernel has; empty where it refuses."""
    from bcc.libbcc import lib

    room = ctypes.create_string_buffer(_RECURSION_MISSES + 8)
    length = ctypes.c_uint(len(room))
    if lib.bpf_obj_get_info(fd, room, ctypes.byref(length)):
        return b""
    return room.raw[: length.value]


def _infix(bcc: Any) -> str:
    """Return what bcc wants between its word and a function's name: from 0.27 on the module."""
    version = tuple(int(part) for part in re.findall(r"\d+", bcc.__version__)[:2])
    return "__vmlinux__" if version >= (0, 27) else "__"


@contextlib.contextmanager
def _environment(name: str, setting: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = setting
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextlib.contextmanager
def _stderr_held() -> Iterator[Any]:
    """Hold back what libbcc and clang write to file descriptor 2; yields a function to read it."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        held_bytes = b""

        def said() -> str:
            if not held.closed:
                held.seek(0)
                return held.read().decode(errors="replace")
            return held_bytes.decode(errors="replace")

        try:
            yield said
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            held.seek(0)
            held_bytes = held.read()


def _refusal(error: str, said: str, ring_bytes: int) -> CannotRun:
    """Turn bcc's bare exception and its words on stderr into one line with a hint."""
    reason = " ".join(error.split())
    if "ring" in error and re.search("memory|large|E2BIG|ENOMEM", error + said):
        return BackendUnavailable(
            f"the kernel gave no memory for a ring of {ring_bytes} bytes",
            "choose a smaller one with --ring",
        )
    if re.search("[Oo]peration not permitted|EPERM", error + said):
        return BackendUnavailable(
            f"the kernel refused to load the programs ({reason})",
            "run as root (CAP_BPF and CAP_PERFMON); `ksmtrace doctor` shows what is allowed here",
        )
    lines = [line for line in said.splitlines() if "error" in line] or said.splitlines()[-1:]
    return BackendUnavailable(
        f"bcc could not load the programs: {'; '.join([reason, *lines[:2]])}",
        "`ksmtrace doctor` shows what this kernel offers; `--without RUNG` leaves out what fails",
    )
