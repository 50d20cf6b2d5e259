"""The files of /sys/kernel/mm/ksm: what each one is, and their values."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from ksmtrace.errors import KernelFeatureMissing
from ksmtrace.kernel.files import ROOT, parse_int, parse_selected, read_file

DIRECTORY = "sys/kernel/mm/ksm"


class FileType(enum.StrEnum):
    """What may be computed from a file's value.

    A rate exists only for a counter; a knob changes only when someone writes it.
    """

    COUNTER = "counter"
    GAUGE = "gauge"
    KNOB = "knob"
    TEXT = "text"


@dataclass(frozen=True)
class KsmFile:
    """One file of /sys/kernel/mm/ksm.

    Attributes:
        name: the file's name.
        type: what may be computed from it.
        unit: ``pages``, ``bytes``, ``ms``, ...; empty for a pure number or a word.
        meaning: in the code's terms, which are not always the documentation's.
        source: the function in mm/ksm.c that the meaning was read from.
    """

    name: str
    type: FileType
    unit: str
    meaning: str
    source: str


_C, _G, _K, _T = FileType.COUNTER, FileType.GAUGE, FileType.KNOB, FileType.TEXT

FILES = (
    KsmFile(
        "full_scans",
        _C,
        "passes",
        "ksm_scan.seqnr: passes that reached the end of the list of mms; a successful run=2 sets "
        "it to 0, an interrupted pass is not counted",
        "mm/ksm.c:scan_get_next_rmap_item",
    ),
    KsmFile(
        "pages_scanned",
        _C,
        "pages",
        "calls of cmp_and_merge_page: KSM pages included, smart-skipped ones not; never reset",
        "mm/ksm.c:ksm_do_scan",
    ),
    KsmFile(
        "pages_skipped",
        _C,
        "pages",
        "visits that smart scan skipped; never reset",
        "mm/ksm.c:should_skip_rmap_item",
    ),
    KsmFile(
        "pages_shared",
        _G,
        "pages",
        "nodes in the stable tree that have sharers, as of each slot's last visit by ksmd",
        "mm/ksm.c:stable_tree_append",
    ),
    KsmFile(
        "pages_sharing",
        _G,
        "pages",
        "page slots additionally sharing those nodes, as of each slot's last visit by ksmd",
        "mm/ksm.c:stable_tree_append",
    ),
    KsmFile(
        "pages_unshared",
        _G,
        "pages",
        "rmap_items in the unstable tree, leftovers of the previous pass included",
        "mm/ksm.c:unstable_tree_search_insert",
    ),
    KsmFile(
        "pages_volatile",
        _G,
        "pages",
        "the rest: ksm_rmap_items less shared, sharing and unshared, clipped at 0: first visits, "
        "changed checksums, smart-skipped pages, failed merges",
        "mm/ksm.c:pages_volatile_show",
    ),
    KsmFile(
        "ksm_zero_pages",
        _G,
        "pages",
        "zero-page mappings placed by KSM; leaks upward after fork of MADV_DONTFORK areas and "
        "UFFDIO_MOVE",
        "mm/ksm.c:ksm_zero_pages_show",
    ),
    KsmFile(
        "general_profit",
        _G,
        "bytes",
        "(pages_sharing + ksm_zero_pages) * PAGE_SIZE - ksm_rmap_items * sizeof(rmap_item); "
        "signed, and negative while metadata costs more than merging saves",
        "mm/ksm.c:general_profit_show",
    ),
    KsmFile(
        "stable_node_chains",
        _G,
        "chains",
        "distinct contents that ever needed a second stable node and still have a chain",
        "mm/ksm.c:alloc_stable_node_chain",
    ),
    KsmFile(
        "stable_node_dups",
        _G,
        "nodes",
        "stable nodes that hang below a chain, the original included",
        "mm/ksm.c:stable_node_chain_add_dup",
    ),
    KsmFile(
        "run",
        _K,
        "",
        "0 ksmd rests, 1 ksmd scans, 2 everything is unmerged; bit 4 while memory goes offline",
        "mm/ksm.c:run_store",
    ),
    KsmFile(
        "sleep_millisecs",
        _K,
        "ms",
        "pause between two batches",
        "mm/ksm.c:ksm_scan_thread",
    ),
    KsmFile(
        "pages_to_scan",
        _K,
        "pages",
        "calls of cmp_and_merge_page per batch; written by the advisor in mode scan-time",
        "mm/ksm.c:ksm_do_scan",
    ),
    KsmFile(
        "merge_across_nodes",
        _K,
        "",
        "1 one stable tree, 0 one per NUMA node; changes only while nothing is shared",
        "mm/ksm.c:merge_across_nodes_store",
    ),
    KsmFile(
        "max_page_sharing",
        _K,
        "pages",
        "sharers after which a stable node takes no new ones and a chain begins; forks bypass it",
        "mm/ksm.c:is_page_sharing_candidate",
    ),
    KsmFile(
        "stable_node_chains_prune_millisecs",
        _K,
        "ms",
        "least time between two prunings of one chain",
        "mm/ksm.c:stable_node_dup",
    ),
    KsmFile(
        "use_zero_pages",
        _K,
        "",
        "1 empty pages become the kernel's zero page, 0 they merge with each other",
        "mm/ksm.c:cmp_and_merge_page",
    ),
    KsmFile(
        "smart_scan",
        _K,
        "",
        "1 pages that did not merge are skipped for up to 8 passes",
        "mm/ksm.c:should_skip_rmap_item",
    ),
    KsmFile(
        "advisor_mode",
        _T,
        "",
        "none, or scan-time: pages_to_scan follows the target scan time",
        "mm/ksm.c:advisor_mode_show",
    ),
    KsmFile(
        "advisor_max_cpu",
        _K,
        "per cent",
        "upper limit of ksmd's CPU use that the advisor plans with",
        "mm/ksm.c:scan_time_advisor",
    ),
    KsmFile(
        "advisor_min_pages_to_scan",
        _K,
        "pages",
        "pages_to_scan when the advisor is switched on; no lower limit later",
        "mm/ksm.c:set_advisor_defaults",
    ),
    KsmFile(
        "advisor_max_pages_to_scan",
        _K,
        "pages",
        "upper limit of the pages_to_scan that the advisor sets",
        "mm/ksm.c:scan_time_advisor",
    ),
    KsmFile(
        "advisor_target_scan_time",
        _K,
        "s",
        "how long the advisor wants a pass to last",
        "mm/ksm.c:scan_time_advisor",
    ),
)
"""Every file that a kernel up to 7.3 has; what an older one lacks reads as None."""

FILE_BY_NAME: Mapping[str, KsmFile] = MappingProxyType({file.name: file for file in FILES})


def read_ksm(root: Path = ROOT) -> dict[str, int | str | None]:
    """Read every file of :data:`FILES`.

    The kernel takes no lock for these files, so the values are of slightly different moments.

    Returns:
        Value by file name: int, the selected word for a text, None for a file that this kernel
        does not have.

    Raises:
        KernelFeatureMissing: the kernel has no KSM at all.
        KernelInterfaceError: a file is there but unreadable, or holds no value.
    """
    directory = f"{root}/{DIRECTORY}/"
    values: dict[str, int | str | None] = {}
    for file in FILES:
        path = directory + file.name
        content = read_file(path)
        if content is None:
            values[file.name] = None
        elif file.type is FileType.TEXT:
            values[file.name] = parse_selected(content.decode(errors="replace"), path)
        else:
            values[file.name] = parse_int(content, path)
    if all(value is None for value in values.values()) and not Path(directory).is_dir():
        raise KernelFeatureMissing(
            f"there is no /{DIRECTORY}: this kernel is built without KSM",
            "boot a kernel with CONFIG_KSM=y",
        )
    return values


def undocumented(root: Path = ROOT) -> tuple[str, ...]:
    """List files in the directory that :data:`FILES` does not know; empty where it is absent."""
    try:
        names = [path.name for path in (root / DIRECTORY).iterdir()]
    except OSError:
        return ()
    return tuple(sorted(name for name in names if name not in FILE_BY_NAME))
