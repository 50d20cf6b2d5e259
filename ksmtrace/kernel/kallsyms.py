"""Addresses of kernel symbols, from /proc/kallsyms."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ksmtrace.errors import KernelInterfaceError
from ksmtrace.kernel.files import ROOT, read_file

KSM_OBJECTS = (
    "ksm_scan",
    "ksm_run",
    "ksm_pages_shared",
    "ksm_pages_sharing",
    "ksm_pages_unshared",
    "ksm_rmap_items",
    "ksm_stable_node_chains",
    "ksm_stable_node_dups",
    "ksm_max_page_sharing",
    "ksm_thread_mutex",
    "ksm_mmlist_lock",
    "ksm_mm_head",
    "migrate_nodes",
    "one_stable_tree",
    "ksm_merge_across_nodes",
    "ksm_pages_scanned",
    "ksm_pages_skipped",
    "ksm_zero_pages",
    "ksm_smart_scan",
    "advisor_ctx",
)
"""Objects of mm/ksm.c; listed only by a kernel with CONFIG_KALLSYMS_ALL.

Their type letter says nothing: .data objects carry ``t`` on kernels from 7.2.
"""

MEMORY_OBJECTS = ("vmemmap_base", "physical_mask")
"""Objects of the memory model; listed only by a kernel with CONFIG_KALLSYMS_ALL.

``vmemmap_base`` holds the address of the ``struct page`` of frame 0 on x86_64, which KASLR moves
at boot (arch/x86/mm/kaslr.c:kernel_randomize_memory); other machines have a constant instead.
``physical_mask`` holds the bits that a physical address can have where that is found out at boot
(arch/x86/include/asm/page_types.h, CONFIG_DYNAMIC_PHYSICAL_MASK): memory encryption takes one away.
"""

MUTEX_FUNCTIONS = (
    "mutex_lock",
    "__mutex_lock_slowpath",
    "__mutex_lock",
    "__mutex_lock.constprop.0",
)
"""Functions of kernel/locking/mutex.c through which a task comes to wait."""


@dataclass(frozen=True)
class Symbols:
    """Some of the kernel's symbols.

    Attributes:
        addresses: by name, every address with that name, in the file's order: empty for a name
            that is not listed; all 0 where the kernel hides them.
        hidden: the kernel prints 0 for every address (kernel.kptr_restrict, no CAP_SYSLOG).
        objects_listed: whether data objects are listed at all (CONFIG_KALLSYMS_ALL).
    """

    addresses: Mapping[str, tuple[int, ...]]
    hidden: bool
    objects_listed: bool

    def address(self, name: str) -> int | None:
        """Look up a name's address; None where it is not listed, hidden, or not unique."""
        found = self.addresses.get(name, ())
        return found[0] if len(found) == 1 and found[0] != 0 else None

    def has(self, name: str) -> bool:
        """Tell whether a name is listed; true of a hidden address too."""
        return bool(self.addresses.get(name))


def read_symbols(names: Iterable[str], root: Path = ROOT) -> Symbols:
    """Look up names in /proc/kallsyms; reads the whole file (5 MB, 60 ms).

    Raises:
        KernelInterfaceError: the file is absent, unreadable or malformed.
    """
    path = f"{root}/proc/kallsyms"
    content = _read(path)
    addresses = {name: tuple(_find(content, name, path)) for name in names}
    # Per-CPU symbols are offsets, the first of them 0 by right: not all of the beginning can be.
    hidden = not any(
        line.partition(b" ")[0].strip(b"0") for line in content[:65536].splitlines()[:-1]
    )
    return Symbols(addresses, hidden, any(_find(content, name, path) for name in KSM_OBJECTS))


def read_extents(names: Iterable[str], root: Path = ROOT) -> Mapping[str, tuple[range, ...]]:
    """Look up where functions begin and end.

    Args:
        names: the functions'.
        root: the tree to read from.

    Returns:
        By name the addresses of every function of that name, up to the symbol behind it: the file
        is in the order of addresses (scripts/kallsyms.c:sort_symbols). Empty where the kernel hides
        addresses.

    Raises:
        KernelInterfaceError: /proc/kallsyms is absent, unreadable or malformed.
    """
    path = f"{root}/proc/kallsyms"
    content = _read(path)
    return {name: tuple(_find_extents(content, name, path)) for name in names}


def _find_extents(content: bytes, name: str, path: str) -> Iterator[range]:
    for start, at in _find_lines(content, name, path):
        while start and at < len(content):
            following = content.find(b"\n", at)
            end = int(content[at:following].partition(b" ")[0], 16)
            if end > start:
                yield range(start, end)
                break
            at = following + 1


def _read(path: str) -> bytes:
    content = read_file(path)
    if not content:
        raise KernelInterfaceError(f"there is no {path}", "boot a kernel with CONFIG_KALLSYMS=y")
    # A line is "ADDRESS type name", and a module's symbol has a tab and [module] behind it.
    if len(content.partition(b"\n")[0].split()) < 3:
        raise KernelInterfaceError(f"{path} begins with {content[:60]!r}")
    return content if content.endswith(b"\n") else content + b"\n"


def _find(content: bytes, name: str, path: str) -> list[int]:
    return [address for address, _ in _find_lines(content, name, path)]


# Searches for whole names: a loop over 120,000 lines would take longer than the kernel's printing.
# Yields the address in the line, and where the next line begins.
def _find_lines(content: bytes, name: str, path: str) -> Iterator[tuple[int, int]]:
    pattern = b" " + name.encode()
    at = content.find(pattern)
    while at >= 0:
        end = at + len(pattern)
        line = content[content.rfind(b"\n", 0, at) + 1 : at]
        address, _, kind = line.partition(b" ")
        if content[end : end + 1] in (b"\n", b"\t") and len(kind) == 1:
            try:
                yield int(address, 16), content.find(b"\n", end) + 1
            except ValueError:
                raise KernelInterfaceError(f"{path} has the line {line[:60]!r}") from None
        at = content.find(pattern, end)


class Symbolizer:
    """Names for addresses in the kernel's text, of the running kernel as it is now.

    Args:
        root: the tree to read from.

    Raises:
        KernelInterfaceError: /proc/kallsyms is absent or unreadable.
    """

    def __init__(self, root: Path = ROOT) -> None:
        lines = (line.split(None, 3) for line in _read(f"{root}/proc/kallsyms").splitlines())
        # Of data there may be any amount between two functions: only text has names for us.
        named = sorted(
            (int(line[0], 16), line[2].decode(errors="replace"))
            for line in lines
            if len(line) >= 3 and line[1] in b"tTwW"
        )
        self._addresses = [address for address, _ in named]
        self._names = [name for _, name in named]

    def name(self, address: int) -> str:
        """Return ``function+0xoffset``, or the bare address where nothing is known."""
        at = bisect.bisect_right(self._addresses, address) - 1
        if at < 0 or not self._addresses[at]:
            return f"{address:#x}"
        return f"{self._names[at]}+{address - self._addresses[at]:#x}"
