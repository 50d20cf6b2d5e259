"""The lines of /proc/vmstat that concern KSM."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from ksmtrace.errors import KernelInterfaceError
from ksmtrace.kernel.files import ROOT, parse_int, read_file

NAMES: Mapping[str, str] = MappingProxyType(
    {
        "cow_ksm": "copies of a KSM page on a write fault; run=2, MADV_UNMERGEABLE and ksmd's own "
        "break_cow count too, KSM zero pages do not (mm/memory.c:do_wp_page)",
        "ksm_swpin_copy": "copies made at swap-in because a folio fits another anon_vma or index "
        "(mm/ksm.c:ksm_might_need_to_copy)",
        "thp_split_page": "huge pages split, by whomever (mm/huge_memory.c)",
        "thp_split_page_failed": "splits of a huge page that failed (mm/huge_memory.c)",
        "thp_deferred_split_page": "huge pages queued to be split (mm/huge_memory.c)",
        "thp_split_pmd": "huge mappings split into page mappings (mm/huge_memory.c)",
        "thp_split_pud": "the same one level up (mm/huge_memory.c)",
        "pgmigrate_success": "pages migrated, KSM or not (mm/migrate.c:migrate_pages)",
        "pgmigrate_fail": "pages that could not be migrated (mm/migrate.c:migrate_pages)",
    }
)
"""Each name with its meaning; all are counters since boot, in events or pages."""


def read_vmstat(root: Path = ROOT) -> dict[str, int | None]:
    """Read the lines named in :data:`NAMES`.

    Returns:
        Count since boot by name; None for a line that this kernel does not have.

    Raises:
        KernelInterfaceError: the file is absent, unreadable or malformed.
    """
    path = f"{root}/proc/vmstat"
    content = read_file(path)
    if content is None:
        raise KernelInterfaceError(f"there is no {path}", "mount proc on /proc")
    if len(content.partition(b"\n")[0].split()) != 2:
        raise KernelInterfaceError(f"{path} begins with {content[:40]!r}")
    lines = b"\n" + content
    return {name: _count(lines, name, path) for name in NAMES}


def _count(lines: bytes, name: str, path: str) -> int | None:
    key = f"\n{name} ".encode()
    at = lines.find(key)
    if at < 0:
        return None
    end = lines.find(b"\n", at + len(key))
    return parse_int(lines[at + len(key) : end if end >= 0 else len(lines)], f"{path} {name}")
