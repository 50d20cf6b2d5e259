"""Which page frames lie on which NUMA node, from sysfs."""

from __future__ import annotations

import re
from pathlib import Path

from ksmtrace.errors import KernelFeatureMissing, KernelInterfaceError
from ksmtrace.kernel.files import ROOT, read_text

MEMORY = "sys/devices/system/memory"
NODES = "sys/devices/system/node"

_NODE = re.compile(r"node([0-9]+)")
_BLOCK = re.compile(r"memory([0-9]+)")


def read_node_pages(
    page_size_bytes: int, root: Path = ROOT
) -> dict[int, tuple[tuple[int, int], ...]]:
    """List the ranges of page frame numbers on every NUMA node.

    ``memoryM`` is the block of block_size_bytes at M times that size, and a node has a link to
    each of its blocks (drivers/base/memory.c:add_memory_block, drivers/base/node.c). A block that
    two nodes divide is linked from both, so its frames are in the ranges of both; frames in holes
    within a block are in a range too.

    Args:
        page_size_bytes: size of a page.
        root: the running kernel's tree, or a copy of one.

    Returns:
        Per node, ranges ``[first, end)`` in ascending order, none adjacent to another; empty for
        a node without memory. Holes between nodes split them: 4 TB are a handful of ranges.

    Raises:
        KernelFeatureMissing: sysfs has no memory blocks or no nodes.
        KernelInterfaceError: it has them in a form that is not known.
    """
    size_path = f"{root}/{MEMORY}/block_size_bytes"
    size = read_text(size_path)
    if size is None:
        raise KernelFeatureMissing(
            f"there is no {size_path}", "boot a kernel with CONFIG_MEMORY_HOTPLUG=y"
        )
    try:
        block_pages, rest = divmod(int(size, 16), page_size_bytes)
    except ValueError:
        raise KernelInterfaceError(f"{size_path} holds {size[:40]!r}, not a number") from None
    if block_pages == 0 or rest:
        raise KernelInterfaceError(f"{size_path} holds {size}, which is no number of pages")
    nodes = _numbers(f"{root}/{NODES}", _NODE)
    if not nodes:
        raise KernelFeatureMissing(
            f"there is no node in {root}/{NODES}", "boot a kernel with CONFIG_NUMA=y"
        )
    ranges = {
        node: _merge(_numbers(f"{root}/{NODES}/node{node}", _BLOCK), block_pages) for node in nodes
    }
    if not any(ranges.values()):
        raise KernelFeatureMissing(
            f"no node in {root}/{NODES} has a link to a memory block",
            "boot a kernel with CONFIG_MEMORY_HOTPLUG=y",
        )
    return ranges


# The numbers in the names of a directory's entries, ascending; none where there is no directory.
def _numbers(directory: str, pattern: re.Pattern[str]) -> list[int]:
    try:
        names = [path.name for path in Path(directory).iterdir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise KernelInterfaceError(f"{directory} cannot be listed: {error.strerror}") from error
    return sorted(int(match[1]) for match in map(pattern.fullmatch, names) if match)


def _merge(blocks: list[int], block_pages: int) -> tuple[tuple[int, int], ...]:
    ranges: list[tuple[int, int]] = []
    for block in blocks:
        first = block * block_pages
        if ranges and ranges[-1][1] == first:
            first = ranges.pop()[0]
        ranges.append((first, (block + 1) * block_pages))
    return tuple(ranges)
