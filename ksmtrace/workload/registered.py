"""Who uses KSM now: the processes with mergeable memory, and how many pages ksmd knows."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping

from ksmtrace.kernel.files import read_text
from ksmtrace.kernel.procfs import iter_pids, read_ksm_stat, read_smaps_ksm

RMAP_ITEM_BYTES = 64
"""sizeof(struct ksm_rmap_item) on every 64-bit kernel from 5.10 to 7.3 (BTF)."""

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def nr_rmap_items(values: Mapping[str, int | str | None]) -> int:
    """Count the pages that ksmd knows, exited processes' included.

    Args:
        values: the files of /sys/kernel/mm/ksm, read while ksmd rests.

    Returns:
        ksm_rmap_items, solved from general_profit (mm/ksm.c:general_profit_show), which unlike
        the sum of the four page counts is not clipped; that sum where the file is absent.
    """

    def number(name: str) -> int:
        value = values.get(name)
        return value if isinstance(value, int) else 0

    if isinstance(values.get("general_profit"), int):
        saved_bytes = (number("pages_sharing") + number("ksm_zero_pages")) * PAGE_BYTES
        return (saved_bytes - number("general_profit")) // RMAP_ITEM_BYTES
    counts = ("pages_shared", "pages_sharing", "pages_unshared", "pages_volatile")
    return sum(number(name) for name in counts)


def registered_processes(but: Collection[int] = ()) -> dict[int, str]:
    """Find the living processes with memory that KSM merges.

    Args:
        but: pids to leave out.

    Returns:
        comm by pid. Where ksm_stat has no ``ksm_mergeable`` (before 6.16), a process that ksmd
        has not visited yet is not seen.
    """
    return {
        pid: read_text(f"/proc/{pid}/comm") or "?"
        for pid in iter_pids()
        if pid not in but and _is_registered(pid)
    }


def _is_registered(pid: int) -> bool:
    stat = read_ksm_stat(pid)
    if stat is None:
        return False
    if stat["ksm_mergeable"] is not None:
        # ksm_rmap_items would also count areas that are unmapped but not visited since.
        return stat["ksm_mergeable"] == "yes"
    if stat["ksm_rmap_items"] is not None:
        return stat["ksm_rmap_items"] != 0
    # Before 6.1 nothing but the mappings tells.
    return any(mapping.mergeable for mapping in read_smaps_ksm(pid) or ())
