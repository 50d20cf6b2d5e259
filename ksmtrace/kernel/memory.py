"""Kernel virtual memory, page by page, whichever way the pages are read.

Addresses are all that is known here: no structures.
"""

from __future__ import annotations

import mmap
import sys
from abc import ABC, abstractmethod
from typing import Self

import numpy as np
import numpy.typing as npt

from ksmtrace.errors import KernelInterfaceError

WORD_BYTES = 8
PAGE_BYTES = mmap.PAGESIZE

Words = npt.NDArray[np.uint64]

_PAGE_WORDS = PAGE_BYTES // WORD_BYTES

# A read copies page by page through a buffer in the kernel; longer ones save nothing more.
_RUN_PAGES = 256


class UnmappedAddress(KernelInterfaceError):
    """An address that the kernel has not mapped: no kernel pointer, or no longer one.

    Attributes:
        address: the address.
    """

    def __init__(self, address: int, source: str) -> None:
        super().__init__(f"{source} has no address {address:#x}")
        self.address = address


class KernelMemory(ABC):
    """The running kernel's memory.

    Every page is read once and kept until :meth:`forget`, so that pointers are followed at the
    price of a dict lookup. Kernel memory is read without any lock: pages read one after another
    need not fit together.
    """

    source = ""
    """Where the pages come from, as errors name it."""

    how = ""
    """How they are read, for people."""

    def __init__(self) -> None:
        self._pages: dict[int, memoryview] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Close what the pages are read from; what was read stays readable."""

    @abstractmethod
    def load(self, number: int, count: int) -> None:
        """Read a run of pages and :meth:`keep` them.

        Args:
            number: of the first: its address by the size of a page.
            count: of pages.

        Raises:
            UnmappedAddress: the kernel has not mapped one of them.
            KernelInterfaceError: reading failed.
        """

    def keep(self, number: int, content: bytes) -> None:
        """Keep a page's content until :meth:`forget`."""
        self._pages[number] = memoryview(content).cast("Q")

    def forget(self) -> None:
        """Drop every page, so that the next read sees the memory as it is then.

        Raises:
            CannotRun: the kernel's memory cannot be read any more.
        """
        self._pages.clear()

    @property
    def nr_pages(self) -> int:
        """Count the pages that were read since the last :meth:`forget`."""
        return len(self._pages)

    def word(self, address: int) -> int:
        """Read one unsigned 64-bit word.

        Args:
            address: a multiple of 8.

        Raises:
            UnmappedAddress: the kernel has not mapped it, or it is not aligned (and so no pointer
                to a word).
            KernelInterfaceError: reading failed.
        """
        page = self._pages.get(address // PAGE_BYTES)
        if page is None:
            self.load(address // PAGE_BYTES, 1)
            page = self._pages[address // PAGE_BYTES]
        if address % WORD_BYTES:
            raise UnmappedAddress(address, self.source)
        word: int = page[address % PAGE_BYTES // WORD_BYTES]
        return word

    def content(self, address: int, nr_bytes: int) -> bytes:
        """Read bytes at any address.

        Raises:
            UnmappedAddress: the kernel has not mapped one of them.
            KernelInterfaceError: reading failed.
        """
        at = address % WORD_BYTES
        words = [
            self.word(position).to_bytes(WORD_BYTES, sys.byteorder)
            for position in range(address - at, address + nr_bytes, WORD_BYTES)
        ]
        return b"".join(words)[at : at + nr_bytes]

    def integer(self, address: int, nr_bytes: int, signed: bool = False) -> int:
        """Read an integer in the machine's byte order.

        Raises:
            UnmappedAddress: the kernel has not mapped it.
            KernelInterfaceError: reading failed.
        """
        return int.from_bytes(self.content(address, nr_bytes), sys.byteorder, signed=signed)

    def words(self, addresses: Words, nr_words: int) -> Words:
        """Read structures at many addresses.

        Args:
            addresses: multiples of 8, shape (n,), in any order.
            nr_words: length of each, in words of 8 bytes.

        Returns:
            Shape (n, nr_words): row i has the words from ``addresses[i]`` on.

        Raises:
            UnmappedAddress: the kernel has not mapped one of them.
            KernelInterfaceError: reading failed.
        """
        if len(addresses) == 0:
            return np.zeros((0, nr_words), np.uint64)
        if (addresses % np.uint64(WORD_BYTES)).any():
            odd = addresses[addresses % np.uint64(WORD_BYTES) != 0][0]
            raise UnmappedAddress(int(odd), self.source)
        steps = np.arange(nr_words, dtype=np.uint64)
        wanted = addresses[:, None] // np.uint64(WORD_BYTES) + steps
        numbers, positions = np.unique(wanted // np.uint64(_PAGE_WORDS), return_inverse=True)
        self._load_missing(numbers)
        content = b"".join([self._pages[number] for number in numbers.tolist()])
        within = (wanted % np.uint64(_PAGE_WORDS)).astype(np.intp)
        places = positions.reshape(wanted.shape) * _PAGE_WORDS + within
        found: Words = np.frombuffer(content, np.uint64)[places]
        return found

    def _load_missing(self, numbers: Words) -> None:
        missing = [number for number in numbers.tolist() if number not in self._pages]
        first = 0
        for index in range(1, len(missing) + 1):
            if (
                index == len(missing)
                or missing[index] != missing[index - 1] + 1
                or index - first == _RUN_PAGES
            ):
                self.load(missing[first], index - first)
                first = index
