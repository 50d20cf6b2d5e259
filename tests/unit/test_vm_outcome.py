"""How a guest's end is told, judged by recorded consoles of real guests."""

from pathlib import Path

import pytest

from ksmtrace.errors import KsmtraceError, LostVM
from ksmtrace.vm.console import TAIL_LINES, clean_console, find_death, tail
from ksmtrace.vm.run import _Output

RECORDED = Path(__file__).parents[1] / "golden" / "consoles"
MARKER = b"<end-of-output>"


def console(name: str) -> str:
    return clean_console((RECORDED / name).read_bytes())


@pytest.mark.parametrize(
    ("name", "death"),
    [
        ("normal-6.12", None),
        ("reboot-6.1", None),
        ("panic-sysrq-5.10", "kernel panic: sysrq triggered crash"),
        ("panic-sysrq-7.3", "kernel panic: sysrq triggered crash"),
        ("no-root-6.12", "kernel panic: Attempted to kill init! exitcode=0x00000100"),
    ],
)
def test_death_of_recorded_guests(name: str, death: str | None) -> None:
    assert find_death(console(name)) == death


def test_an_oops_and_a_bug_without_a_panic() -> None:
    page_fault = "BUG: kernel NULL pointer dereference, address: 0000000000000008\n"
    assert find_death(page_fault) == (
        "kernel bug: kernel NULL pointer dereference, address: 0000000000000008"
    )
    assert find_death(page_fault + "Oops: Oops: 0002 [#1] SMP\n") == "oops: Oops: 0002 [#1] SMP"


def test_a_panic_that_a_bug_ends_in_does_not_hide_it() -> None:
    report = "kernel BUG at mm/ksm.c:1005!\nOops: invalid opcode: 0000 [#1] SMP\n"
    panic = "Kernel panic - not syncing: Fatal exception\n"
    assert find_death(report + panic) == "kernel bug: mm/ksm.c:1005!"
    assert find_death(panic) == "kernel panic: Fatal exception"


def test_the_tail_has_no_escape_sequences_and_no_blank_lines() -> None:
    assert tail(clean_console(b"\x1bc\x1b[2J\x1b[1;31mone\x1b[0m\r\n\r\ntwo\r\n")) == ("one", "two")
    assert tail("") == ()


def test_the_tail_begins_where_the_kernel_died() -> None:
    lines = tail(console("panic-sysrq-7.3"))
    assert "Kernel panic - not syncing: sysrq triggered crash" in lines[0]
    assert any("sysrq_handle_crash" in line for line in lines)


def test_the_tail_of_a_kernel_that_did_not_die() -> None:
    numbers = [str(number) for number in range(99)]
    assert tail("\n".join(numbers)) == tuple(numbers[-TAIL_LINES:])


def test_a_lost_guest_has_a_status_of_its_own() -> None:
    others = {kind.exit_status for kind in KsmtraceError.__subclasses__() if kind is not LostVM}
    assert LostVM.exit_status == 255
    assert LostVM.exit_status not in others


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_output_ends_at_the_marker_however_it_is_cut(size: int) -> None:
    sent = b"a<end-of\nb<<end-of-output>later"
    output = _Output(MARKER, None)
    for start in range(0, len(sent), size):
        output.feed(sent[start : start + size])
    assert output.ended
    assert output.kept == b"a<end-of\nb<"


def test_output_of_a_lost_guest_keeps_what_looked_like_the_marker() -> None:
    output = _Output(MARKER, None)
    output.feed(b"text<end")
    assert output.kept == b"text"
    output.close()
    assert output.kept == b"text<end"
    assert not output.ended
