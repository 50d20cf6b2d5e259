"""Page frames behind addresses: pagemap, kpageflags, kpagecount; and whether KPF_KSM is true."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import mmap
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ksmtrace.errors import KernelFeatureMissing, KernelInterfaceError, PrivilegeMissing
from ksmtrace.kernel.files import ROOT
from ksmtrace.kernel.probes import KpfProbe

KPF_BITS = {
    "LOCKED": 0,
    "ERROR": 1,
    "REFERENCED": 2,
    "UPTODATE": 3,
    "DIRTY": 4,
    "LRU": 5,
    "ACTIVE": 6,
    "SLAB": 7,
    "WRITEBACK": 8,
    "RECLAIM": 9,
    "BUDDY": 10,
    "MMAP": 11,
    "ANON": 12,
    "SWAPCACHE": 13,
    "SWAPBACKED": 14,
    "COMPOUND_HEAD": 15,
    "COMPOUND_TAIL": 16,
    "HUGE": 17,
    "UNEVICTABLE": 18,
    "HWPOISON": 19,
    "NOPAGE": 20,
    "KSM": 21,
    "THP": 22,
    "OFFLINE": 23,
    "ZERO_PAGE": 24,
    "IDLE": 25,
    "PGTABLE": 26,
}
"""Bits of /proc/kpageflags (include/uapi/linux/kernel-page-flags.h)."""

PM_PFN_MASK = (1 << 55) - 1
PM_SOFT_DIRTY = 1 << 55
PM_MMAP_EXCLUSIVE = 1 << 56
PM_UFFD_WP = 1 << 57
PM_FILE = 1 << 61
PM_SWAP = 1 << 62
PM_PRESENT = 1 << 63
"""Bits of an entry of /proc/PID/pagemap (fs/proc/task_mmu.c)."""

Words = npt.NDArray[np.uint64]

# Frames this close together are read with one pread; reading a frame not asked for costs the
# kernel some 20 ns, a system call some hundred times that.
_NEAR_FRAMES = 64


def read_pagemap(pid: int | str, start: int, end: int, root: Path = ROOT) -> Words | None:
    """Read the pagemap entries of the pages in [start, end).

    Args:
        pid: a pid, or ``"self"``.
        start: an address, page-aligned.
        end: the address behind the last page, page-aligned.
        root: the tree that has ``proc``.

    Returns:
        One entry per page, shape (n,); see the ``PM_`` bits. None where the process is gone.

    Raises:
        ValueError: an address is not page-aligned.
        PrivilegeMissing: another user's process, without CAP_SYS_PTRACE.
        KernelInterfaceError: reading failed.
    """
    page = mmap.PAGESIZE
    if start % page or end % page or end < start:
        raise ValueError(f"{start:#x}-{end:#x} is no range of pages")
    path = f"{root}/proc/{pid}/pagemap"
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESRCH):
            return None
        raise _refusal(path, error) from error
    try:
        content = _read_words(fd, path, start // page, (end - start) // page)
    except OSError as error:
        if error.errno == errno.ESRCH:
            return None
        raise _refusal(path, error) from error
    finally:
        os.close(fd)
    # A process without memory (exiting, or a kernel thread) reads as nothing.
    return content if len(content) == (end - start) // page else None


def frame_numbers(entries: Words) -> Words:
    """Extract frame numbers from pagemap entries: 0 where no page is present.

    Raises:
        PrivilegeMissing: the kernel hides frame numbers from this user, and a 0 would be a lie.
    """
    present = (entries & np.uint64(PM_PRESENT)) != 0
    pfns = np.where(present, entries & np.uint64(PM_PFN_MASK), np.uint64(0))
    if present.any() and not pfns.any():
        raise PrivilegeMissing(
            "the kernel hides frame numbers in pagemap", "run as root (CAP_SYS_ADMIN)"
        )
    return pfns


def read_kpageflags(pfns: Words, root: Path = ROOT) -> Words:
    """Read the flags of page frames; see :data:`KPF_BITS`.

    Returns:
        Shape and order of ``pfns``; 0 for a frame number of 0, which stands for no page.

    Raises:
        KernelFeatureMissing: no CONFIG_PROC_PAGE_MONITOR.
        PrivilegeMissing: only root may.
    """
    return _read_frames(f"{root}/proc/kpageflags", pfns)


def read_kpagecount(pfns: Words, root: Path = ROOT) -> Words:
    """Read how often page frames are mapped.

    Returns:
        Shape and order of ``pfns``; 0 for a frame number of 0, which stands for no page.

    Raises:
        KernelFeatureMissing: no CONFIG_PROC_PAGE_MONITOR.
        PrivilegeMissing: only root may.
    """
    return _read_frames(f"{root}/proc/kpagecount", pfns)


def has_flag(flags: Words, name: str) -> npt.NDArray[np.bool_]:
    """Tell per frame whether a flag of :data:`KPF_BITS` is set; shape of ``flags``."""
    selected: npt.NDArray[np.bool_] = (flags >> np.uint64(KPF_BITS[name])) & np.uint64(1) != 0
    return selected


def _read_frames(path: str, pfns: Words) -> Words:
    unique, inverse = np.unique(pfns, return_inverse=True)
    values = np.zeros(len(unique), np.uint64)
    first = int(np.searchsorted(unique, 1))
    if first < len(unique):
        gaps = np.flatnonzero(np.diff(unique[first:]) > _NEAR_FRAMES) + first + 1
        bounds = [first, *gaps.tolist(), len(unique)]
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise _refusal(path, error) from error
        try:
            for begin, end in itertools.pairwise(bounds):
                lowest, highest = int(unique[begin]), int(unique[end - 1])
                words = _read_words(fd, path, lowest, highest - lowest + 1)
                if len(words) != highest - lowest + 1:
                    raise KernelInterfaceError(f"{path} ends before frame {highest}")
                values[begin:end] = words[(unique[begin:end] - np.uint64(lowest)).astype(np.intp)]
        except OSError as error:
            raise _refusal(path, error) from error
        finally:
            os.close(fd)
    return values[inverse].reshape(pfns.shape)


def _read_words(fd: int, path: str, index: int, count: int) -> Words:
    chunks, at, left = [], index * 8, count * 8
    while left and (chunk := os.pread(fd, left, at)):
        chunks.append(chunk)
        at, left = at + len(chunk), left - len(chunk)
    content = b"".join(chunks)
    if len(content) % 8:
        raise KernelInterfaceError(f"{path} ends within an entry")
    return np.frombuffer(content, np.uint64)


def probe_kpf_ksm() -> KpfProbe:
    """Look whether KPF_KSM is set for a page of one's own that is certainly no KSM page.

    On kernels from about 6.12 to 7.0 every anonymous page has it: the flag was tested as
    ``mapping & FOLIO_MAPPING_KSM``, and FOLIO_MAPPING_KSM includes FOLIO_MAPPING_ANON
    (fs/proc/page.c:stable_page_flags).
    """
    size = mmap.PAGESIZE
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as page:
        # A process under PR_SET_MEMORY_MERGE has mergeable memory without having asked.
        with contextlib.suppress(OSError):
            page.madvise(mmap.MADV_UNMERGEABLE)
        page[:] = os.urandom(size)
        cell = ctypes.c_char.from_buffer(page)
        address = ctypes.addressof(cell)
        try:
            entries = read_pagemap("self", address, address + size)
            if entries is None:
                return KpfProbe(None, "pagemap has no entry for a page of our own")
            flags = read_kpageflags(frame_numbers(entries))
        except (KernelFeatureMissing, PrivilegeMissing, KernelInterfaceError) as error:
            return KpfProbe(None, str(error))
        finally:
            del cell  # an exported buffer would keep the mapping from being closed
    if not has_flag(flags, "ANON")[0]:
        return KpfProbe(None, "a page of our own was not resident")
    if has_flag(flags, "KSM")[0]:
        return KpfProbe(False, "KPF_KSM is set for an anonymous page that KSM never saw")
    return KpfProbe(True, "KPF_KSM is not set for an anonymous page that KSM never saw")


def _refusal(
    path: str, error: OSError
) -> KernelFeatureMissing | PrivilegeMissing | KernelInterfaceError:
    name = errno.errorcode.get(error.errno or 0, str(error.errno))
    if error.errno == errno.ENOENT:
        return KernelFeatureMissing(
            f"there is no {path}", "boot a kernel with CONFIG_PROC_PAGE_MONITOR=y"
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return PrivilegeMissing(f"{path} cannot be read: {name}", "run as root")
    return KernelInterfaceError(f"{path} cannot be read: {name}")
