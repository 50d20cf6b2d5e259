import re
import shutil
from pathlib import Path

import pytest

from ksmtrace.errors import KernelFeatureMissing, KernelInterfaceError
from ksmtrace.kernel import sysfs, vmstat

TREES = Path(__file__).parents[1] / "golden/trees"
ADDED_BY_6_12 = {
    *("pages_scanned", "pages_skipped", "ksm_zero_pages", "general_profit", "smart_scan"),
    *("advisor_mode", "advisor_max_cpu", "advisor_min_pages_to_scan"),
    *("advisor_max_pages_to_scan", "advisor_target_scan_time"),
}


@pytest.fixture
def tree(tmp_path):
    shutil.copytree(TREES / "6.18h", tmp_path / "tree")
    return tmp_path / "tree"


def test_the_table_has_every_file_of_the_newest_kernel():
    recorded = {path.name for path in (TREES / "6.18h" / sysfs.DIRECTORY).iterdir()}

    assert recorded == {file.name for file in sysfs.FILES}
    assert len(sysfs.FILES) == 24


def test_every_file_says_what_it_means_and_where_that_was_read():
    for file in sysfs.FILES:
        assert file.meaning
        assert re.fullmatch(r"mm/ksm\.c:\w+", file.source)


def test_only_what_grows_by_events_is_a_counter():
    assert {"full_scans", "pages_scanned", "pages_skipped"} == {
        file.name for file in sysfs.FILES if file.type is sysfs.FileType.COUNTER
    }


def test_values_are_those_of_the_files():
    values = sysfs.read_ksm(TREES / "6.18h")

    # One process with 97 equal pages: one node, 96 additional sharers.
    assert (values["pages_shared"], values["pages_sharing"]) == (1, 96)
    assert values["general_profit"] == 96 * 4096 - 97 * 64
    assert values["advisor_mode"] == "none"
    assert sum(value is not None for value in values.values()) == 24


@pytest.mark.parametrize("kernel", ["5.10", "6.1"])
def test_files_that_a_kernel_lacks_are_none_and_not_zero(kernel):
    values = sysfs.read_ksm(TREES / kernel)

    assert {name for name, value in values.items() if value is None} == ADDED_BY_6_12
    assert values["pages_shared"] == 0


def test_profit_is_signed(tree):
    (tree / sysfs.DIRECTORY / "general_profit").write_text("-12800\n")

    assert sysfs.read_ksm(tree)["general_profit"] == -12800


def test_the_selected_word_is_read_from_a_choice(tree):
    (tree / sysfs.DIRECTORY / "advisor_mode").write_text("none [scan-time]\n")

    assert sysfs.read_ksm(tree)["advisor_mode"] == "scan-time"


@pytest.mark.parametrize("content", ["", "many\n", "1 2\n"])
def test_a_file_without_a_number_is_an_error_that_names_it(tree, content):
    (tree / sysfs.DIRECTORY / "pages_shared").write_text(content)

    with pytest.raises(KernelInterfaceError, match="pages_shared holds"):
        sysfs.read_ksm(tree)


def test_a_choice_without_a_selection_is_an_error(tree):
    (tree / sysfs.DIRECTORY / "advisor_mode").write_text("none scan-time\n")

    with pytest.raises(KernelInterfaceError, match="advisor_mode"):
        sysfs.read_ksm(tree)


def test_an_unreadable_file_is_an_error_with_the_errno(tree):
    path = tree / sysfs.DIRECTORY / "pages_shared"
    path.unlink()
    path.mkdir()

    with pytest.raises(KernelInterfaceError, match="pages_shared cannot be read: EISDIR"):
        sysfs.read_ksm(tree)


def test_a_kernel_without_ksm_says_what_to_do(tree):
    shutil.rmtree(tree / sysfs.DIRECTORY)

    with pytest.raises(KernelFeatureMissing, match="built without KSM") as raised:
        sysfs.read_ksm(tree)
    assert "CONFIG_KSM" in str(raised.value.hint)


def test_files_of_a_future_kernel_are_listed(tree):
    (tree / sysfs.DIRECTORY / "pages_dreamt_of").write_text("1\n")

    assert sysfs.undocumented(tree) == ("pages_dreamt_of",)
    assert sysfs.undocumented(TREES / "6.18h") == ()


def test_vmstat_is_read_by_whole_names():
    text = (TREES / "6.18h/proc/vmstat").read_text()
    values = vmstat.read_vmstat(TREES / "6.18h")

    assert values == {
        name: int(re.search(rf"^{name} (\d+)$", text, re.MULTILINE)[1]) for name in vmstat.NAMES
    }


def test_vmstat_names_that_a_kernel_lacks_are_none():
    values = vmstat.read_vmstat(TREES / "5.10")

    assert (values["cow_ksm"], values["ksm_swpin_copy"]) == (None, None)
    assert values["pgmigrate_success"] is not None


def test_vmstat_may_end_without_a_newline_and_must_hold_numbers(tree):
    (tree / "proc/vmstat").write_text("nr_free_pages 1\ncow_ksm 23")
    assert vmstat.read_vmstat(tree)["cow_ksm"] == 23

    (tree / "proc/vmstat").write_text("cow_ksm \n")
    with pytest.raises(KernelInterfaceError, match="cow_ksm"):
        vmstat.read_vmstat(tree)

    (tree / "proc/vmstat").unlink()
    with pytest.raises(KernelInterfaceError, match="vmstat"):
        vmstat.read_vmstat(tree)
