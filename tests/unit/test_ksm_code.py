"""Variables of mm/ksm.c found in its code, of a kernel that does not list them (6.18h)."""

import lzma
import shutil
from pathlib import Path

import pytest

from ksmtrace.errors import KernelFeatureMissing
from ksmtrace.kernel.btf import Btf
from ksmtrace.kernel.kallsyms import read_symbols
from ksmtrace.kernel.kcore import Kcore
from ksmtrace.kernel.ksm_code import Reference, find_variables, iter_references
from ksmtrace.kernel.ksm_layout import COUNTERS, NEEDED_SYMBOLS, read_layout

GOLDEN = Path(__file__).parents[1] / "golden/kcore/6.18h"


@pytest.fixture
def tree(tmp_path):
    tree = tmp_path / "kernel"
    shutil.copytree(GOLDEN, tree)
    (tree / "proc/kcore").write_bytes(lzma.decompress((tree / "proc/kcore.xz").read_bytes()))
    return tree


def found_in(tree):
    with Kcore.open(tree) as kcore:
        return find_variables(kcore, read_layout(Btf.read(tree)), tree)


def rename(tree, old, new):
    path = tree / "proc/kallsyms"
    text = path.read_text()
    assert f" {old}\n" in text
    path.write_text(text.replace(f" {old}\n", f" {new}\n"))


def test_every_variable_that_a_walk_needs_is_found_though_none_is_listed(tree):
    assert not read_symbols(NEEDED_SYMBOLS, tree).objects_listed
    found = found_in(tree)

    shown = {counter.symbol for counter in COUNTERS if counter.file is not None}
    unshown = {"ksm_rmap_items", "ksm_nr_node_ids", "vmemmap_base"}
    assert found.keys() == {*NEEDED_SYMBOLS, *shown, *unshown}
    assert len(set(found.values())) == len(found)


def test_values_are_what_the_files_showed_then(tree):
    found = found_in(tree)
    with Kcore.open(tree) as kcore:
        for counter in COUNTERS:
            if counter.file is not None:
                value = kcore.integer(found[counter.symbol], counter.nr_bytes, counter.signed)
                assert (tree / "sys/kernel/mm/ksm" / counter.file).read_text() == f"{value}\n"
        seqnr = read_layout(Btf.read(tree))["ksm_scan.seqnr"]
        assert kcore.integer(found["ksm_scan"] + seqnr, 8) == int(
            (tree / "sys/kernel/mm/ksm/full_scans").read_text()
        )


def test_an_address_whose_value_the_file_does_not_show_is_not_taken(tree):
    (tree / "sys/kernel/mm/ksm/pages_sharing").write_text("31\n")

    with pytest.raises(KernelFeatureMissing, match="pages_sharing shows 31, 30 is there"):
        found_in(tree)


# Of another function with that name, further from mm/ksm.c's, nothing is read.
def test_a_namesake_in_another_file_is_not_meant(tree):
    expected = found_in(tree)
    lines = (tree / "proc/kallsyms").read_text()
    (tree / "proc/kallsyms").write_text(f"{lines}ffffffff81000000 t full_scans_show\n")

    assert found_in(tree) == expected


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("merge_across_nodes_store", "root_stable_tree: 0 addresses could be it"),
        ("full_scans_show", "ksm_scan: 0 addresses"),
        ("ksm_scan_thread", "0 functions ksm_scan_thread"),
    ],
)
def test_code_that_is_not_there_is_said(tree, name, says):
    rename(tree, name, "another_function")

    with pytest.raises(KernelFeatureMissing, match=says) as raised:
        found_in(tree)
    assert "CONFIG_KALLSYMS_ALL=y" in raised.value.hint


def test_migrate_nodes_is_found_in_any_function_that_goes_over_it(tree):
    expected = found_in(tree)
    rename(tree, "remove_all_stable_nodes", "inlined")

    assert found_in(tree) == expected


def test_references_in_code():
    code = bytes.fromhex(
        "488b1571da5802"  # mov rdx, [rip + 0x258da71]
        "65488b1dce984a02"  # mov rbx, gs:[rip + ...]: a per-CPU variable
        "48c7c7c0651383"  # mov rdi, 0xffffffff831365c0
        "48c7c0f0ffffff"  # mov rax, -16
        "8905251ead01"  # mov [rip + 0x1ad1e25], eax
        "4883051000000001"  # add qword ptr [rip + 0x10], 1
        "488d0510000000"  # lea rax, [rip + 0x10]
        "e805000000"  # call
    )
    start = 0xFFFF_FFFF_8166_3000

    assert list(iter_references(code, start)) == [
        Reference(start + 7 + 0x258DA71, 8, True, False),
        Reference(0xFFFF_FFFF_8313_65C0, 0, False, False),
        Reference(start + 35 + 0x1AD1E25, 4, False, True),
        Reference(start + 43 + 0x10, 8, True, True),
        Reference(start + 50 + 0x10, 0, False, False),
    ]
