"""Cut a kernel's BTF down to the types that ksmtrace asks for: ``reduce_btf.py FULL REDUCED``.

Made the ``vmlinux`` files of the trees beside it. Every struct kept has all its members at their
real offsets; a member's own type is kept only where ksmtrace follows it, and is void otherwise.
Every function and tracepoint kept has all its parameters, whose types are void.
Shares no code with ksmtrace.kernel.btf, so that the tests compare two readings of the format;
``bpftool btf dump file REDUCED`` is the third.
"""

from __future__ import annotations

import struct
import sys
from pathlib import Path

STRUCTS = {
    *("rmap_item", "ksm_rmap_item", "stable_node", "ksm_stable_node"),
    *("mm_slot", "ksm_mm_slot", "ksm_scan", "mm_struct", "task_struct"),
    *("sched_entity", "sched_info", "vm_area_struct", "page", "folio"),
    *("mm_walk", "ksm_next_page_arg", "mutex", "rw_semaphore", "vm_fault", "taskstats"),
}
ENUMS = {"pageflags"}
FUNCTIONS = {
    *("cmp_and_merge_page", "try_to_merge_one_page", "try_to_merge_with_ksm_page"),
    *("break_ksm", "break_ksm_pmd_entry", "break_cow", "calc_checksum", "write_protect_page"),
    *("stable_tree_search", "stable_tree_insert", "stable_tree_append", "stable_node_dup"),
    *("__stable_node_chain", "alloc_stable_node_chain", "unstable_tree_search_insert"),
    *("remove_rmap_item_from_tree", "remove_node_from_stable_tree", "remove_stable_node"),
    *("ksm_get_folio", "get_ksm_page", "ksm_next_page_pmd_entry", "scan_get_next_rmap_item"),
    *("should_skip_rmap_item", "folio_migrate_ksm", "ksm_migrate_page", "rmap_walk_ksm"),
    *("ksm_might_need_to_copy", "unmerge_ksm_pages", "ksm_madvise", "__ksm_enter", "__ksm_exit"),
    *("ksm_scan_thread", "wait_while_offlining", "lru_add_drain_all", "memcmp_pages"),
    *("run_store", "ksm_memory_callback", "__mutex_lock_slowpath"),
    *("rwsem_down_read_slowpath", "rwsem_down_write_slowpath"),
    *("__split_huge_page_to_list_to_order", "split_huge_page_to_list_to_order"),
    *(
        "split_huge_page_to_list",
        "mm_find_pmd",
        "try_to_migrate",
        "try_to_unmap",
        "remove_migration_ptes",
    ),
    *("follow_page", "do_wp_page", "wp_page_copy", "__folio_lock", "__lock_page"),
}
TRACEPOINTS = (
    *("btf_trace_ksm_", "btf_trace_contention_", "btf_trace_mm_migrate_pages"),
    *("btf_trace_mmap_lock_", "btf_trace_sched_switch"),
)
FIXED = {1: 1, 3: 3, 14: 1, 17: 1}
ENTRY = {4: 3, 5: 3, 6: 2, 13: 2, 15: 3, 19: 3}


def read(blob: bytes) -> tuple[list[tuple[int, ...]], bytes]:
    _, _, _, length, type_off, type_len, str_off, str_len = struct.unpack_from("=HBBIIIII", blob)
    words = struct.unpack_from(f"={type_len // 4}I", blob, length + type_off)
    types, at = [()], 0
    while at < len(words):
        kind, vlen = words[at + 1] >> 24 & 31, words[at + 1] & 0xFFFF
        size = 3 + FIXED.get(kind, 0) + ENTRY.get(kind, 0) * vlen
        types.append(words[at : at + size])
        at += size
    return types, blob[length + str_off : length + str_off + str_len]


def main(full: Path, reduced: Path) -> None:
    types, strings = read(full.read_bytes())

    def name(offset: int) -> str:
        return strings[offset : strings.index(b"\0", offset)].decode()

    def kind(words: tuple[int, ...]) -> int:
        return words[1] >> 24 & 31

    keep: dict[int, int] = {}
    order: list[int] = []

    def add(number: int) -> None:
        if number in keep or number == 0:
            return
        order.append(number)
        keep[number] = len(order)
        words = types[number]
        if kind(words) in (4, 5):
            for at in range(3, len(words), 3):
                member = types[words[at + 1]] if words[at + 1] else ()
                if member and kind(member) == 10 and words[at] == 0:
                    add(words[at + 1])
                if member and kind(member) in (4, 5):
                    inner = name(member[0])
                    if inner == "" or inner in STRUCTS:
                        add(words[at + 1])
        elif kind(words) in (2, 8, 10, 12):
            add(words[2])

    for number, words in enumerate(types[1:], 1):
        own = name(words[0])
        if (
            (kind(words) in (4, 5) and own in STRUCTS)
            or (kind(words) == 6 and own in ENUMS)
            or (kind(words) == 12 and own in FUNCTIONS)
            or (kind(words) == 8 and own.startswith(TRACEPOINTS))
        ):
            add(number)

    table, offsets = bytearray(b"\0"), {"": 0}

    def intern(text: str) -> int:
        if text not in offsets:
            offsets[text] = len(table)
            table.extend(text.encode() + b"\0")
        return offsets[text]

    out: list[int] = []
    for number in order:
        words = list(types[number])
        words[0] = intern(name(words[0]))
        if kind(types[number]) in (4, 5):
            for at in range(3, len(words), 3):
                words[at] = intern(name(words[at]))
                words[at + 1] = keep.get(words[at + 1], 0)
        elif kind(types[number]) == 6:
            for at in range(3, len(words), 2):
                words[at] = intern(name(words[at]))
        elif kind(types[number]) == 13:
            words[2] = 0
            for at in range(3, len(words), 2):
                words[at], words[at + 1] = intern(name(words[at])), 0
        else:
            words[2] = keep.get(words[2], 0)
        out += words
    body = struct.pack(f"={len(out)}I", *out)
    header = struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(body), len(body), len(table))
    reduced.write_bytes(header + body + bytes(table))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
