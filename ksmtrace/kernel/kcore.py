"""Kernel virtual memory, through /proc/kcore: an ELF core file with one PT_LOAD per mapped range.

The ranges are the direct map of each block of RAM, vmemmap (the array of struct page) for it, the
vmalloc area, the modules, and the kernel's text and data (fs/proc/kcore.c:proc_kcore_init,
kclist_add_private). Addresses are all that is known here: no structures.
"""

from __future__ import annotations

import bisect
import errno
import os
import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from ksmtrace.errors import KernelFeatureMissing, KernelInterfaceError, PrivilegeMissing
from ksmtrace.kernel.files import ROOT
from ksmtrace.kernel.memory import PAGE_BYTES, KernelMemory, UnmappedAddress

PATH = "proc/kcore"

_ELF_HEADER = struct.Struct("=16sHHIQQQIHHHHHH")
_PROGRAM_HEADER = struct.Struct("=IIQQQQQQ")
_IDENT = b"\x7fELF\x02" + (b"\x01" if sys.byteorder == "little" else b"\x02")
_ET_CORE, _PT_LOAD = 4, 1


@dataclass(frozen=True, order=True)
class Segment:
    """One range of kernel virtual memory.

    Attributes:
        start: first address.
        end: first address after it.
        file_offset: where the range begins in the file, in bytes.
    """

    start: int
    end: int
    file_offset: int


def parse_segments(header: bytes, program_headers: bytes, path: str) -> tuple[Segment, ...]:
    """Parse the loadable segments of an ELF64 core file of this machine's byte order.

    Args:
        header: the ELF header, 64 bytes.
        program_headers: the table that the header points to.
        path: names the file in errors.

    Returns:
        The segments by address; empty ones are left out.

    Raises:
        KernelInterfaceError: the bytes are no such file.
    """
    _, entry_bytes, count = _parse_header(header, path)
    if len(program_headers) < entry_bytes * count:
        raise KernelInterfaceError(f"{path} ends within its program headers")
    segments = []
    for at in range(0, entry_bytes * count, entry_bytes):
        kind, _, offset, start, _, file_bytes, _, _ = _PROGRAM_HEADER.unpack_from(
            program_headers, at
        )
        if kind == _PT_LOAD and file_bytes:
            segments.append(Segment(start, start + file_bytes, offset))
    return tuple(sorted(segments))


# Returns where the program headers are, the size of one, and their number.
def _parse_header(header: bytes, path: str) -> tuple[int, int, int]:
    if len(header) < _ELF_HEADER.size or not header.startswith(_IDENT):
        raise KernelInterfaceError(f"{path} is no ELF64 file of this machine's byte order")
    fields = _ELF_HEADER.unpack_from(header)
    kind, offset, entry_bytes, count = fields[1], fields[5], fields[9], fields[10]
    if kind != _ET_CORE or entry_bytes < _PROGRAM_HEADER.size:
        raise KernelInterfaceError(f"{path} is no core file")
    return offset, entry_bytes, count


class Kcore(KernelMemory):
    """An open /proc/kcore.

    Of a range's pages that are not mapped or not RAM (offline, poisoned) the kernel makes zeros
    (fs/proc/kcore.c:read_kcore, read_kcore_iter).

    Attributes:
        segments: the mapped ranges, by address.
    """

    how = f"through /{PATH}"

    def __init__(self, path: str) -> None:
        super().__init__()
        self.source = path
        self.segments: tuple[Segment, ...] = ()
        self._fd = -1
        self._starts: list[int] = []
        self._attach()

    @classmethod
    def open(cls, root: Path = ROOT) -> Self:
        """Open the running kernel's memory.

        Raises:
            KernelFeatureMissing: this kernel has no /proc/kcore.
            PrivilegeMissing: it refuses this user (CAP_SYS_RAWIO), or everyone (lockdown).
            KernelInterfaceError: it is no core file, or reading failed.
        """
        return cls(str(root / PATH))

    # Which ranges there are is settled at the opening (fs/proc/kcore.c:open_kcore).
    def _attach(self) -> None:
        self.close()
        path = self.source
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            header = os.pread(self._fd, _ELF_HEADER.size, 0)
            offset, entry_bytes, count = _parse_header(header, path)
            table = _read_fully(self._fd, entry_bytes * count, offset)
            self.segments = parse_segments(header, table, path)
        except OSError as error:
            self.close()
            raise _refusal(path, error) from error
        except BaseException:
            self.close()
            raise
        self._starts = [segment.start for segment in self.segments]

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def forget(self) -> None:
        """As in :class:`KernelMemory`; memory that came or went meanwhile changes the ranges, too.

        Raises:
            CannotRun: as :meth:`open`.
        """
        super().forget()
        self._attach()

    def load(self, number: int, count: int) -> None:
        """Read a run of pages, each of the range that has it."""
        start = number * PAGE_BYTES
        end = start + count * PAGE_BYTES
        at = start
        while at < end:
            segment = self._segment(at)
            # A range may begin or end within a page; what is outside of it reads as zeros.
            low, high = max(at, segment.start), min(end, segment.end)
            content = self._read(low, high - low, segment)
            padded = bytes(low - at) + content + bytes(-high % PAGE_BYTES)
            for offset in range(0, len(padded), PAGE_BYTES):
                self.keep((at + offset) // PAGE_BYTES, padded[offset : offset + PAGE_BYTES])
            at += len(padded)

    # The range that has a part of the page at this address.
    def _segment(self, page_address: int) -> Segment:
        index = bisect.bisect_left(self._starts, page_address + PAGE_BYTES) - 1
        if index < 0 or self.segments[index].end <= page_address:
            raise UnmappedAddress(page_address, self.source)
        return self.segments[index]

    def _read(self, address: int, nr_bytes: int, segment: Segment) -> bytes:
        try:
            content = _read_fully(self._fd, nr_bytes, segment.file_offset + address - segment.start)
        except OSError as error:
            if error.errno == errno.EFAULT:
                raise UnmappedAddress(address, self.source) from error
            raise _refusal(self.source, error) from error
        if len(content) != nr_bytes:
            raise KernelInterfaceError(f"{self.source} ends before address {address + nr_bytes:#x}")
        return content


def _read_fully(fd: int, nr_bytes: int, offset: int) -> bytes:
    chunks = []
    while nr_bytes and (chunk := os.pread(fd, nr_bytes, offset)):
        chunks.append(chunk)
        offset, nr_bytes = offset + len(chunk), nr_bytes - len(chunk)
    return b"".join(chunks)


def _refusal(
    path: str, error: OSError
) -> KernelFeatureMissing | PrivilegeMissing | KernelInterfaceError:
    name = errno.errorcode.get(error.errno or 0, str(error.errno))
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return KernelFeatureMissing(f"there is no {path}", "boot a kernel with CONFIG_PROC_KCORE=y")
    if error.errno in (errno.EACCES, errno.EPERM):
        # fs/proc/kcore.c:open_kcore: CAP_SYS_RAWIO, then security_locked_down(LOCKDOWN_KCORE).
        return PrivilegeMissing(
            f"{path} cannot be read: {name}",
            "run as root, on a kernel that is not locked down for confidentiality "
            "(/sys/kernel/security/lockdown)",
        )
    return KernelInterfaceError(f"{path} cannot be read: {name}")
