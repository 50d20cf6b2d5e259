"""Compiles, loads, attaches and detaches the BPF programs: the only importer of bcc."""

from __future__ import annotations

import contextlib
import importlib.resources
import os
import re
import resource
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ksmtrace.errors import BackendUnavailable, CannotRun
from ksmtrace.events import KINDS

RING_PAGE_BYTES = 4096
"""Unit in which bcc's BPF_RINGBUF_OUTPUT counts (PAGE_SIZE of our prologue)."""


class Programs:
    """The loaded programs: everything is attached once the constructor returns, or it raises.

    Args:
        tracepoints: names of the raw tracepoints to attach to; for each ``NAME`` the source has
            a program ``on_NAME``.
        defines: C defines for the source.
        ring_bytes: size of the ring, a power of two of at least 4096.
        source: the C program; its directory and the package's own are searched for includes.

    Raises:
        BackendUnavailable: bcc is missing, or the kernel or compiler refused; nothing stays loaded.
    """

    def __init__(
        self,
        tracepoints: Iterable[str],
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
        source = source or package / "ksm.c"
        self.headers = os.environ.get("BCC_KERNEL_SOURCE") or str(package / "prologue")
        flags = [f"-I{package}", f"-DRING_PAGES={ring_bytes // RING_PAGE_BYTES}"]
        flags += [f"-D{name}={number}" for name, number in defines.items()]
        self._attached: list[bytes] = []
        self._bpf: Any = None
        try:
            with _environment("BCC_KERNEL_SOURCE", self.headers), _stderr_held() as said:
                self._bpf = bcc.BPF(src_file=os.fsencode(source), cflags=flags)
                for tracepoint in tracepoints:
                    self._bpf.attach_raw_tracepoint(
                        tp=tracepoint.encode(), fn_name=f"on_{tracepoint}".encode()
                    )
                    self._attached.append(tracepoint.encode())
        except Exception as error:
            # bcc raises bare Exception for whatever failed, and its reason goes to stderr.
            self.close()
            raise _refusal(str(error), said(), ring_bytes) from error
        self.ring_fd: int = self._bpf[b"ring"].map_fd

    def tallies(self) -> dict[str, tuple[int, int]]:
        """Read the kernel-side counts: kind's name -> (produced, dropped), summed over CPUs."""
        table = self._bpf[b"tallies"]
        tallies = {}
        for kind in KINDS:
            per_cpu = table[table.Key(kind.number)]
            tallies[kind.name] = (
                sum(tally.produced for tally in per_cpu),
                sum(tally.dropped for tally in per_cpu),
            )
        return tallies

    def detach(self) -> None:
        """Detach all programs; the ring and the tallies stay readable."""
        while self._attached:
            self._bpf.detach_raw_tracepoint(self._attached.pop())

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
        "`ksmtrace doctor` shows what this kernel offers",
    )
