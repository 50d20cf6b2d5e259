import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ksmtrace.errors import KernelInterfaceError
from ksmtrace.kernel.facts import FUNCTIONS, OFFSETS, Tracepoint, read_facts

TREES = Path(__file__).parents[1] / "golden/trees"


@pytest.fixture
def tree(tmp_path):
    shutil.copytree(TREES / "6.18h", tmp_path / "tree")
    return tmp_path / "tree"


def test_facts_of_this_kernel_as_recorded():
    facts = read_facts(TREES / "6.18h")

    assert facts.kernel.release == "6.18.44-fc-v595"
    assert facts.kernel.machine == "x86_64"
    assert facts.kernel.build_id == "e4f18d9dc1d0e6fc2b17e93e885a647b3c0a6fc1"
    assert facts.page_size_bytes == 4096
    assert facts.online_cpus == (0, 1)
    assert facts.numa_nodes == (0,)
    assert facts.ksm is not None and facts.ksm["pages_sharing"] == 96
    assert facts.ksm_stat is not None and all(facts.ksm_stat.values())
    assert facts.offsets is not None and set(facts.offsets) == set(OFFSETS)
    assert facts.rmap_item_bytes == 64
    assert facts.functions is not None and set(facts.functions) == set(FUNCTIONS)
    assert facts.page_struct_bytes == 64
    assert facts.node_pages == {0: ((0, 98304), (1048576, 1114112), (6520832, 6553600))}
    assert facts.functions["break_ksm"] == 3
    assert facts.functions["wait_while_offlining"] == 0
    assert facts.functions["cmp_and_merge_page"] is None
    assert facts.tracepoints is not None
    assert facts.tracepoints["ksm_merge_with_ksm_page"] == Tracepoint(5, "btf")
    assert facts.tracepoints["contention_begin"] == Tracepoint(2, "btf")
    assert facts.tracefs_mounted is False
    assert facts.ksmd_pid == 37


def test_a_copy_of_a_tree_is_never_probed():
    facts = read_facts(TREES / "6.18h", probe=True)

    assert (facts.loading, facts.kpf_ksm) == (None, None)
    assert facts.unknown["loading"] == "not tried"
    assert facts.unknown["kpf_ksm"] == "not tried"


@pytest.mark.parametrize("kernel", ["5.10", "6.1"])
def test_a_kernel_without_ksm_tracepoints_is_known_to_have_none(kernel):
    facts = read_facts(TREES / kernel)

    assert facts.tracepoints is not None
    assert not [name for name in facts.tracepoints if name.startswith("ksm_")]
    assert facts.offsets is not None and facts.offsets["mm_struct.ksm_zero_pages"] is None
    assert facts.symbols is not None and facts.symbols.objects_listed
    assert facts.symbols.address("vmemmap_base")
    assert facts.symbols.address("ksm_scan_thread")
    assert facts.rmap_item_bytes == 64
    assert facts.page_struct_bytes == 64


def test_struct_names_of_5_10_are_understood():
    facts = read_facts(TREES / "5.10")

    assert facts.offsets is not None
    assert facts.offsets["ksm_rmap_item.address"] == 24
    assert facts.offsets["mm_struct.ksm_merging_pages"] is None
    assert facts.ksm_stat is not None and not any(facts.ksm_stat.values())


def test_tracefs_stands_in_for_btf(tree):
    shutil.rmtree(tree / "sys/kernel/btf")
    shutil.copytree(TREES / "6.18h-tracefs/sys/kernel/tracing", tree / "sys/kernel/tracing")
    facts = read_facts(tree)

    assert facts.tracefs_mounted is True
    assert facts.tracepoints is not None
    assert facts.tracepoints["ksm_merge_with_ksm_page"] == Tracepoint(5, "tracefs")
    assert facts.offsets is None
    assert facts.page_struct_bytes is None
    assert "btf/vmlinux" in facts.unknown["offsets"]
    assert "btf/vmlinux" in facts.unknown["page_struct_bytes"]


def test_btf_without_a_struct_page_leaves_its_size_unknown(tree):
    path = tree / "sys/kernel/btf/vmlinux"
    path.write_bytes(path.read_bytes().replace(b"\0page\0", b"\0pags\0"))
    facts = read_facts(tree)

    assert facts.page_struct_bytes is None
    assert facts.unknown["page_struct_bytes"] == "BTF has no struct page"
    assert facts.rmap_item_bytes == 64


def test_btf_and_tracefs_agree():
    from_btf = read_facts(TREES / "6.12").tracepoints
    assert from_btf is not None
    arguments = {n: t.arguments for n, t in from_btf.items() if n.startswith("ksm_")}

    from ksmtrace.kernel import tracefs

    formats = tracefs.read_formats("ksm", TREES / "6.12")
    assert formats is not None
    assert arguments == {name: len(f.fields) for name, f in formats.items()}


def test_with_neither_tracepoints_are_unknown_and_not_absent(tree):
    shutil.rmtree(tree / "sys/kernel/btf")
    facts = read_facts(tree)

    assert facts.tracepoints is None
    assert "tracefs is not mounted" in facts.unknown["tracepoints"]


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("proc/kallsyms", "symbols"),
        ("proc/vmstat", "vmstat"),
        ("proc/self/status", "privileges"),
        ("sys/kernel/mm/ksm/run", "ksm"),
        ("sys/kernel/btf/vmlinux", "btf"),
        ("sys/kernel/notes", "kernel.build_id"),
        ("sys/devices/system/cpu/online", "online_cpus"),
        ("sys/devices/system/memory/block_size_bytes", "node_pages"),
    ],
)
def test_one_broken_file_costs_one_fact_and_says_why(tree, path, field):
    (tree / path).write_bytes(b"\4\0\0\0\xff\xff\0\0\3\0\0\0nonsense" if "notes" in path else b"?")
    facts = read_facts(tree)

    assert facts.unknown[field]
    holder = facts.kernel if "." in field else facts
    assert not getattr(holder, field.rpartition(".")[2])
    assert facts.ksmd_pid == 37


def test_a_kernel_without_ksm_has_none(tree):
    shutil.rmtree(tree / "sys/kernel/mm/ksm")
    facts = read_facts(tree)

    assert facts.ksm is None
    assert "without KSM" in facts.unknown["ksm"]


def test_without_memory_blocks_the_nodes_pages_are_unknown_and_not_none(tree):
    shutil.rmtree(tree / "sys/devices/system/memory")
    facts = read_facts(tree)

    assert facts.node_pages is None
    assert "block_size_bytes" in facts.unknown["node_pages"]
    assert facts.numa_nodes == (0,)


def test_what_is_no_kernel_tree_is_refused(tmp_path):
    with pytest.raises(KernelInterfaceError, match="osrelease"):
        read_facts(tmp_path)


def test_cpu_lists_are_expanded(tree):
    (tree / "sys/devices/system/cpu/online").write_text("0-2,5,8-9\n")

    assert read_facts(tree).online_cpus == (0, 1, 2, 5, 8, 9)


@pytest.mark.parametrize("kernel", ["5.10", "6.1", "6.12", "6.18h"])
def test_facts_are_plain_json(kernel):
    plain = read_facts(TREES / kernel).as_json()

    assert json.loads(json.dumps(plain)) == plain
    assert set(plain["kernel"]) == {"release", "version", "machine", "build_id"}
    assert plain["privileges"]["euid"] == 0
    # A node's number is a string there.
    assert plain["node_pages"]["0"][0][0] == 0


def test_facts_need_neither_numpy_nor_pyroute2_nor_bcc():
    code = (
        "import sys; from pathlib import Path; from ksmtrace.kernel.facts import read_facts;"
        f"read_facts(Path({str(TREES / '6.12')!r}));"
        "print([m for m in ('numpy', 'pyroute2', 'bcc') if m in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)

    assert output.stdout == b"[]\n"
