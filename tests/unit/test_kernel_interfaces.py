"""kallsyms, numa, tracefs, privileges, loading, pages: readers, each against recorded files."""

import ctypes
import mmap
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ksmtrace.errors import KernelFeatureMissing, KernelInterfaceError, PrivilegeMissing
from ksmtrace.events import KINDS
from ksmtrace.kernel import kallsyms, loading, numa, pages, privileges, tracefs
from ksmtrace.kernel.files import parse_selected, read_int

TREES = Path(__file__).parents[1] / "golden/trees"
HERE = TREES / "6.18h"


@pytest.fixture
def tree(tmp_path):
    shutil.copytree(HERE, tmp_path / "tree")
    return tmp_path / "tree"


def test_symbols_are_found_by_whole_names():
    text = (HERE / "proc/kallsyms").read_text()
    symbols = kallsyms.read_symbols(["ksm_madvise", "ksm_madvis", "cmp_and_merge_page"], HERE)

    line = re.search(r"^(\w+) T ksm_madvise$", text, re.MULTILINE)
    assert symbols.address("ksm_madvise") == int(line[1], 16)
    assert symbols.has("ksm_madvise")
    assert not symbols.has("ksm_madvis")
    assert not symbols.has("cmp_and_merge_page")
    assert symbols.address("cmp_and_merge_page") is None
    assert not symbols.hidden


def test_every_address_of_a_duplicated_name_is_kept_and_none_chosen():
    # mm/ksm.c and mm/khugepaged.c both have one.
    symbols = kallsyms.read_symbols(["pages_to_scan_show"], HERE)

    assert len(symbols.addresses["pages_to_scan_show"]) == 2
    assert symbols.address("pages_to_scan_show") is None


@pytest.mark.parametrize(
    ("kernel", "listed"), [("5.10", True), ("6.1", True), ("6.12", True), ("6.18h", False)]
)
def test_whether_data_objects_are_listed(kernel, listed):
    symbols = kallsyms.read_symbols(["ksm_scan"], TREES / kernel)

    assert symbols.objects_listed is listed
    assert (symbols.address("ksm_scan") is not None) is listed
    # 5.10 begins with per-CPU symbols at 0: that is not hiding.
    assert not symbols.hidden


@pytest.mark.parametrize("kernel", ["5.10", "6.1", "6.12", "6.18h"])
def test_where_the_pages_are_described_is_listed_with_the_data_objects(kernel):
    symbols = kallsyms.read_symbols(kallsyms.MEMORY_OBJECTS, TREES / kernel)

    assert symbols.has("vmemmap_base") is symbols.objects_listed
    # __ksymtab_vmemmap_base is another symbol.
    assert len(symbols.addresses["vmemmap_base"]) == symbols.objects_listed


def test_a_data_object_is_found_whatever_its_type_letter(tree):
    path = tree / "proc/kallsyms"
    path.write_text(path.read_text() + "ffffffff82000000 t ksm_scan\n")

    symbols = kallsyms.read_symbols(["ksm_scan"], tree)
    assert symbols.address("ksm_scan") == 0xFFFFFFFF82000000
    assert symbols.objects_listed


def test_hidden_addresses_are_said_to_be_hidden(tree):
    path = tree / "proc/kallsyms"
    path.write_text(re.sub(r"(?m)^\w{16}", "0" * 16, path.read_text()))

    symbols = kallsyms.read_symbols(["ksm_madvise"], tree)
    assert symbols.hidden
    assert symbols.has("ksm_madvise")
    assert symbols.address("ksm_madvise") is None


def test_a_symbol_of_a_module_is_found(tree):
    path = tree / "proc/kallsyms"
    path.write_text(path.read_text() + "ffffffffc0000000 t zs_map\t[zsmalloc]")

    assert kallsyms.read_symbols(["zs_map"], tree).address("zs_map") == 0xFFFFFFFFC0000000


def test_kallsyms_absent_or_malformed_is_an_error(tree):
    (tree / "proc/kallsyms").write_text("nonsense t ksm_madvise\n")
    with pytest.raises(KernelInterfaceError, match="nonsense"):
        kallsyms.read_symbols(["ksm_madvise"], tree)
    (tree / "proc/kallsyms").unlink()
    with pytest.raises(KernelInterfaceError, match="there is no"):
        kallsyms.read_symbols(["ksm_madvise"], tree)


def test_every_node_has_its_pages():
    # Also a directory memory_failure, which is no block.
    assert numa.read_node_pages(4096, TREES / "6.12-numa") == {
        0: ((0, 65536),),
        1: ((65536, 131072),),
    }


def test_a_range_is_counted_in_pages():
    assert numa.read_node_pages(65536, TREES / "6.12-numa")[1] == ((4096, 8192),)


def test_holes_split_ranges_and_numbers_are_compared_as_numbers(tmp_path):
    _blocks(tmp_path, {0: [0, 1, 2, 9, 10, 11, 32], 1: [12, 31, 30], 10: []})

    assert numa.read_node_pages(4096, tmp_path) == {
        0: ((0, 98304), (294912, 393216), (1048576, 1081344)),
        1: ((393216, 425984), (983040, 1048576)),
        10: (),
    }


def _blocks(root: Path, nodes: dict[int, list[int]], size: str = "8000000") -> None:
    (root / numa.MEMORY).mkdir(parents=True)
    (root / numa.MEMORY / "block_size_bytes").write_text(f"{size}\n")
    for node, blocks in nodes.items():
        (root / numa.NODES / f"node{node}").mkdir(parents=True)
        for block in blocks:
            link = root / numa.NODES / f"node{node}/memory{block}"
            link.symlink_to(f"../../memory/memory{block}")


@pytest.mark.parametrize(
    ("nodes", "hint"), [({}, "CONFIG_NUMA"), ({0: []}, "CONFIG_MEMORY_HOTPLUG")]
)
def test_no_nodes_or_no_blocks_is_a_missing_feature(tmp_path, nodes, hint):
    _blocks(tmp_path, nodes)

    with pytest.raises(KernelFeatureMissing, match="node") as raised:
        numa.read_node_pages(4096, tmp_path)
    assert hint in str(raised.value.hint)


@pytest.mark.parametrize("size", ["", "128M", "0", "1800"])
def test_a_block_that_is_no_number_of_pages_is_an_error(tmp_path, size):
    _blocks(tmp_path, {0: [0]}, size)

    with pytest.raises(KernelInterfaceError, match="block_size_bytes"):
        numa.read_node_pages(4096, tmp_path)


@pytest.mark.parametrize("kernel", ["6.12", "6.18h-tracefs"])
def test_formats_have_the_fields_that_the_events_declare(kernel):
    formats = tracefs.read_formats("ksm", TREES / kernel)

    assert {name: tuple(field.name for field in f.fields) for name, f in formats.items()} == {
        kind.name: kind.fields for kind in KINDS if kind.has_tracepoint
    }


def test_a_format_is_read_field_by_field():
    merge = tracefs.read_formats("ksm", TREES / "6.18h-tracefs")["ksm_merge_with_ksm_page"]

    assert merge.id == 744
    assert merge.fields[0] == tracefs.FormatField("ksm_page", "void *", 8, 8, False)
    assert merge.fields[-1] == tracefs.FormatField("err", "int", 40, 4, True)


def test_an_array_field_is_read():
    text = (
        "name: sched_switch\nID: 314\nformat:\n"
        "\tfield:char prev_comm[16];\toffset:8;\tsize:16;\tsigned:0;\n"
    )

    (field,) = tracefs.parse_format(text).fields
    assert field == tracefs.FormatField("prev_comm", "char[16]", 8, 16, False)


def test_tracefs_not_mounted_is_none_and_a_group_missing_is_empty(tmp_path):
    assert tracefs.read_formats("ksm", tmp_path) is None
    (tmp_path / "sys/kernel/debug/tracing/events/sched").mkdir(parents=True)
    assert tracefs.read_formats("ksm", tmp_path) == {}


def test_a_malformed_format_is_an_error():
    with pytest.raises(KernelInterfaceError, match="no name or ID"):
        tracefs.parse_format("name: ksm_enter\n")


def test_privileges_of_root_and_of_nobody(tree):
    held = privileges.read_privileges(HERE)
    assert (held.euid, held.may_trace, held.may_read_pfns) == (0, True, True)
    # This kernel's host withholds one.
    assert "CAP_SYS_RESOURCE" not in held.capabilities
    assert (held.unprivileged_bpf_disabled, held.kptr_restrict) == (2, 0)
    assert held.lockdown is None

    path = tree / "proc/self/status"
    path.write_text(
        re.sub(r"CapEff:.*", "CapEff:\t0000000000000000", path.read_text()).replace(
            "Uid:\t0\t0", "Uid:\t0\t65534"
        )
    )
    held = privileges.read_privileges(tree)
    assert (held.euid, held.capabilities) == (65534, ())
    assert not held.may_trace
    assert not held.may_read_pfns


@pytest.mark.parametrize(
    ("mask", "may_trace"),
    [(1 << 21, True), (1 << 38 | 1 << 39, True), (1 << 39, False), (1 << 38, False), (0, False)],
)
def test_which_capabilities_allow_tracing(tree, mask, may_trace):
    path = tree / "proc/self/status"
    path.write_text(re.sub(r"CapEff:.*", f"CapEff:\t{mask:016x}", path.read_text()))

    assert privileges.read_privileges(tree).may_trace is may_trace


def test_lockdown_is_the_selected_word(tree):
    assert privileges.read_privileges(TREES / "6.1").lockdown == "none"
    path = tree / "sys/kernel/security/lockdown"
    path.parent.mkdir()
    path.write_text("none integrity [confidentiality]\n")
    assert privileges.read_privileges(tree).lockdown == "confidentiality"


def test_without_a_status_privileges_are_an_error(tree):
    (tree / "proc/self/status").write_text("Name:\tx\n")

    with pytest.raises(KernelInterfaceError, match="Uid"):
        privileges.read_privileges(tree)


def test_a_file_closed_to_the_user_is_a_missing_privilege(tree):
    path = tree / "proc/kallsyms"
    path.chmod(0)
    code = (
        "from ksmtrace.errors import PrivilegeMissing\n"
        "from ksmtrace.kernel.files import read_file\n"
        "try:\n"
        f"    read_file({str(path)!r})\n"
        "except PrivilegeMissing as error:\n"
        "    print(error, error.hint, sep='; ')\n"
    )
    # Root may read everything, so as root this needs another user.
    other = {"user": 65534, "group": 65534, "extra_groups": []} if os.geteuid() == 0 else {}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **other)

    assert run.stdout == f"{path} cannot be read: EACCES; run as root\n", run.stderr


def test_numbers_and_choices_are_strict(tree):
    assert read_int(f"{tree}/no/such/file") is None
    assert parse_selected("[a] b", "x") == "a"
    for content in ("a b", "[a] [b]", ""):
        with pytest.raises(KernelInterfaceError):
            parse_selected(content, "x")


def test_an_unknown_machine_cannot_be_tried():
    probes = loading.probe_loading(None, "pdp11")

    assert set(probes) == set(loading.KINDS)
    assert {probe.works for probe in probes.values()} == {None}
    assert "pdp11" in probes["fentry"].reason


def test_pagemap_of_a_page_of_our_own():
    size = mmap.PAGESIZE
    with mmap.mmap(-1, 3 * size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area:
        area.madvise(mmap.MADV_NOHUGEPAGE)
        area[size] = 1
        cell = ctypes.c_char.from_buffer(area)
        start = ctypes.addressof(cell)
        del cell
        entries = pages.read_pagemap("self", start, start + 3 * size)

    present = [bool(int(entry) & pages.PM_PRESENT) for entry in entries]
    assert present == [False, True, False]


def test_pagemap_of_the_gone_is_none_and_of_no_pages_a_mistake():
    assert pages.read_pagemap(1 << 30, 0, mmap.PAGESIZE) is None
    with pytest.raises(ValueError, match="no range of pages"):
        pages.read_pagemap("self", 1, mmap.PAGESIZE)


def test_frame_numbers_that_the_kernel_hides_are_not_zero():
    present = np.array([pages.PM_PRESENT, 0], np.uint64)
    with pytest.raises(PrivilegeMissing, match="hides"):
        pages.frame_numbers(present)

    shown = np.array([pages.PM_PRESENT | 77, pages.PM_SWAP | 5], np.uint64)
    assert pages.frame_numbers(shown).tolist() == [77, 0]


def test_frames_are_read_in_any_order_and_with_gaps(tmp_path):
    (tmp_path / "proc").mkdir()
    # A file in the form of /proc/kpageflags that says of frame N: N times 3.
    (tmp_path / "proc/kpageflags").write_bytes((np.arange(5000, dtype=np.uint64) * 3).tobytes())
    pfns = np.array([4999, 1, 0, 70, 1, 1200, 69], np.uint64)

    assert pages.read_kpageflags(pfns, tmp_path).tolist() == [14997, 3, 0, 210, 3, 3600, 207]
    assert pages.read_kpageflags(pfns[:0], tmp_path).tolist() == []
    with pytest.raises(KernelInterfaceError, match="ends before frame 5000"):
        pages.read_kpageflags(np.array([5000], np.uint64), tmp_path)
    with pytest.raises(KernelFeatureMissing, match="kpagecount"):
        pages.read_kpagecount(pfns, tmp_path)


def test_flags_by_name():
    flags = np.array([1 << 21, 1 << 12, 1 << 21 | 1 << 12], np.uint64)

    assert pages.has_flag(flags, "KSM").tolist() == [True, False, True]
    assert pages.has_flag(flags, "ANON").tolist() == [False, True, True]
