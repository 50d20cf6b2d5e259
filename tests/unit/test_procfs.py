import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ksmtrace.errors import KernelInterfaceError
from ksmtrace.kernel import procfs

TREES = Path(__file__).parents[1] / "golden/trees"
HERE = TREES / "6.18h"


@pytest.fixture
def tree(tmp_path):
    shutil.copytree(HERE, tmp_path / "tree")
    return tmp_path / "tree"


def test_ksm_stat_in_both_styles_of_line():
    assert procfs.read_ksm_stat(4001, HERE) == {
        "ksm_rmap_items": 97,
        "ksm_zero_pages": 0,
        "ksm_merging_pages": 97,
        "ksm_process_profit": 97 * 4096 - 97 * 64,
        "ksm_merge_any": "no",
        "ksm_mergeable": "yes",
    }


def test_keys_that_older_kernels_do_not_print_are_none():
    without = {
        kernel: {k for k, v in procfs.read_ksm_stat("self", TREES / kernel).items() if v is None}
        for kernel in ("5.10", "6.1", "6.12")
    }

    assert set(procfs.KSM_STAT_KEYS) == without["5.10"]
    assert {"ksm_merge_any", "ksm_mergeable"} == without["6.12"]
    assert without["6.12"] | {"ksm_zero_pages", "ksm_process_profit"} == without["6.1"]


def test_merging_pages_come_from_their_own_file_where_ksm_stat_lacks_them(tree):
    (tree / "proc/4001/ksm_stat").write_text("ksm_rmap_items 5\n")
    (tree / "proc/4001/ksm_merging_pages").write_text("3\n")

    values = procfs.read_ksm_stat(4001, tree)
    assert (values["ksm_rmap_items"], values["ksm_merging_pages"]) == (5, 3)


def test_a_negative_profit_is_read(tree):
    (tree / "proc/4001/ksm_stat").write_text("ksm_process_profit -6208\n")

    assert procfs.read_ksm_stat(4001, tree)["ksm_process_profit"] == -6208


def test_keys_of_a_future_kernel_are_passed_over(tree):
    (tree / "proc/4001/ksm_stat").write_text("ksm_dreams 5\nksm_rmap_items 7\n")

    assert procfs.read_ksm_stat(4001, tree)["ksm_rmap_items"] == 7


def test_kernel_threads_and_the_gone_have_no_ksm_stat():
    assert (HERE / "proc/37/ksm_stat").read_bytes() == b""
    assert procfs.read_ksm_stat(37, HERE) is None
    assert procfs.read_ksm_stat(4999, HERE) is None


@pytest.mark.parametrize("content", ["ksm_rmap_items many\n", "nonsense\n"])
def test_a_malformed_ksm_stat_is_an_error(tree, content):
    (tree / "proc/4001/ksm_stat").write_text(content)

    with pytest.raises(KernelInterfaceError, match="4001/ksm_stat"):
        procfs.read_ksm_stat(4001, tree)


def test_smaps_say_which_mappings_are_mergeable_and_merged():
    mappings = procfs.read_smaps_ksm(4001, HERE)

    assert len(mappings) == 4
    (merged,) = [mapping for mapping in mappings if mapping.mergeable]
    assert 97 * 4096 == merged.end - merged.start == merged.ksm_bytes
    assert {0} == {mapping.ksm_bytes for mapping in mappings if mapping is not merged}
    assert mappings == sorted(mappings, key=lambda mapping: mapping.start)


def test_smaps_of_older_kernels_have_no_ksm_line(tree):
    path = tree / "proc/4001/smaps"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if not line.startswith("KSM:")))

    mappings = procfs.read_smaps_ksm(4001, tree)
    assert [mapping.ksm_bytes for mapping in mappings] == [None] * 4
    assert sum(mapping.mergeable for mapping in mappings) == 1


def test_malformed_smaps_are_an_error(tree):
    (tree / "proc/4001/smaps").write_text("nonsense\n")

    with pytest.raises(KernelInterfaceError, match="4001/smaps"):
        procfs.read_smaps_ksm(4001, tree)
    assert procfs.read_smaps_ksm(4999, tree) is None


def test_identity_of_a_process_whose_name_has_parentheses():
    identity = procfs.read_identity(4001, HERE)

    assert identity.comm == "a) b (c"
    assert identity.ppid == 19205
    assert 251327 * 1_000_000_000 // os.sysconf("SC_CLK_TCK") == identity.start_ns
    assert identity.guest is None


def test_the_memory_cgroup_counts_where_the_unified_hierarchy_is_unused(tree):
    assert procfs.read_identity(4001, HERE).cgroup == "/machine/alpha"
    path = tree / "proc/4001/cgroup"

    path.write_text("4:memory:/old\n0::/new\n")
    assert procfs.read_identity(4001, tree).cgroup == "/new"
    path.write_text("0::/\n")
    assert procfs.read_identity(4001, tree).cgroup == "/"
    path.write_text("4:cpu,memory:/old:with:colons\n")
    assert procfs.read_identity(4001, tree).cgroup == "/old:with:colons"
    path.unlink()
    assert procfs.read_identity(4001, tree).cgroup is None


def test_a_qemu_process_tells_its_guest():
    assert procfs.read_identity(4002, HERE).guest == "alpha,1"


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ("web1", "web1"),
        ("web1,debug-threads=on", "web1"),
        ("guest=web1", "web1"),
        ("guest=web1,debug-threads=on", "web1"),
        ("debug-threads=on,guest=web1", "web1"),
        ("guest=a,,b,process=q", "a,b"),
        ("debug-threads=on", None),
        ("guest=", None),
        ("", None),
    ],
)
def test_names_that_qemu_accepts(value, name):
    assert name == procfs.parse_guest_name(value)


@pytest.mark.parametrize(
    ("arguments", "guest"),
    [
        (["kvm", "-name", "web1"], "web1"),
        (["/usr/bin/qemu-system-aarch64", "--name", "web1"], "web1"),
        (["qemu-system-x86_64", "-m", "64"], None),
        (["qemu-system-x86_64", "-name"], None),
        (["find", "-name", "web1"], None),
        ([""], None),
    ],
)
def test_guests_are_looked_for_only_in_qemu(tree, arguments, guest):
    (tree / "proc/4001/cmdline").write_bytes("\0".join([*arguments, ""]).encode())

    assert guest == procfs.read_identity(4001, tree).guest


@pytest.mark.parametrize("content", ["", "4001 (", "4001 (x) S 1", "4001 (x) S one 2 3", "x"])
def test_a_malformed_stat_is_an_error_and_an_empty_one_a_process_gone(tree, content):
    (tree / "proc/4001/stat").write_text(content)

    if content == "":
        assert procfs.read_identity(4001, tree) is None
    else:
        with pytest.raises(KernelInterfaceError, match="4001/stat"):
            procfs.read_identity(4001, tree)


def test_pids_are_the_numbers_in_proc():
    assert list(procfs.iter_pids(HERE)) == [37, 4001, 4002]


def test_ksmd_is_a_kernel_thread_and_not_whoever_has_its_name(tree):
    assert procfs.find_ksmd(HERE) == 37

    impostor = (tree / "proc/4001/stat").read_text().replace("a) b (c", "ksmd")
    shutil.rmtree(tree / "proc/37")
    (tree / "proc/4001/stat").write_text(impostor)
    assert procfs.find_ksmd(tree) is None


@pytest.mark.parametrize("kernel", ["5.10", "6.1", "6.12"])
def test_ksmd_is_found_on_older_kernels(kernel):
    (pid,) = [int(path.name) for path in (TREES / kernel / "proc").iterdir() if path.name.isdigit()]

    assert pid == procfs.find_ksmd(TREES / kernel)


def test_schedstat_has_three_figures(tree):
    cpu, delay, slices = map(int, (HERE / "proc/37/schedstat").read_text().split())
    assert {"cpu_ns": cpu, "run_delay_ns": delay, "timeslices": slices} == (
        procfs.read_ksmd_schedstat(37, HERE)
    )

    assert procfs.read_ksmd_schedstat(4999, tree) is None
    (tree / "proc/37/schedstat").write_text("1 2\n")
    with pytest.raises(KernelInterfaceError, match="schedstat"):
        procfs.read_ksmd_schedstat(37, tree)


def test_a_zombie_is_read_as_having_no_memory():
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        # WNOWAIT leaves the zombie in place.
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        identity = procfs.read_identity(process.pid)
        stat = procfs.read_ksm_stat(process.pid)
    assert identity is not None and identity.ppid == os.getpid()
    assert stat is None or set(stat.values()) == {None}
    assert procfs.read_identity(process.pid) is None
    assert procfs.read_ksm_stat(process.pid) is None
    assert procfs.read_smaps_ksm(process.pid) is None
    assert procfs.read_ksmd_schedstat(process.pid) is None
