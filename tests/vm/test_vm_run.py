"""Real guests: a boot takes 10 s or more under emulation, so each is asked much at once.

Kernels that were not fetched before are fetched, which takes the network and a minute each.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ksmtrace.errors import CannotRun, LostVM
from ksmtrace.vm import Outcome, VmOptions, run_in_vm

pytestmark = pytest.mark.vm


@pytest.mark.parametrize("series", ["5.10", "6.1", "7.x"])
def test_a_command_in_a_guest(kernel_of, series: str, tmp_path: Path) -> None:
    kernel = kernel_of(series)
    script = (
        "uname -r; pwd; printf '<%s>' \"$@\"; echo to stderr >&2; echo again >/dev/stderr; "
        "printf written >written; echo lost >/etc/ksmtrace-vm-test && cat /etc/ksmtrace-vm-test; "
        "od -An -tx1 -j16 /sys/kernel/notes | tr -d ' \\n'; ls /sys/kernel/tracing/events | wc -l; "
        "modprobe zram && wc -l </proc/swaps; exit 42"
    )
    result = run_in_vm(
        ["sh", "-c", script, "sh", "a b", "$HOME"],
        kernel,
        VmOptions(writable=[tmp_path], swap_bytes=64 << 20),
        capture=True,
        working_directory=tmp_path,
    )
    assert result.stdout is not None
    assert result.outcome is Outcome.EXITED
    assert result.exit_status == 42
    assert result.stderr == b"to stderr\nagain\n"
    lines = result.stdout.decode().splitlines()
    assert lines[:2] == [kernel.release, str(tmp_path)]
    assert lines[2] == "<a b><$HOME>lost"
    assert kernel.build_id is not None
    assert kernel.build_id in lines[3]
    assert lines[4] == "2"
    assert (tmp_path / "written").read_text() == "written"
    assert not Path("/etc/ksmtrace-vm-test").exists()


# Wrong under QEMU 7.2's emulation of AVX2, and every verdict that follows an address with it.
SORTS = """
import numpy as np
for n in (10, 64, 1009):
    keys = np.arange(n) * 7919 % 1013
    assert (keys[np.argsort(keys)] == np.sort(keys)).all(), n
"""


def test_ksmtrace_records_in_a_guest_and_numpy_sorts_there(
    kernel_of, well_ended, tmp_path: Path
) -> None:
    kernel = kernel_of("6.12")
    recording = tmp_path / "x.ksmt"
    program = str(Path(sys.executable).with_name("ksmtrace"))
    script = '"$1" -c "$2" && exec "$3" record -d 2 -o "$4" --json'
    result = run_in_vm(
        ["sh", "-c", script, "sh", sys.executable, SORTS, program, str(recording)],
        kernel,
        VmOptions(writable=[tmp_path]),
        capture=True,
        timeout_s=1100,
    )
    well_ended(result)
    assert b'"lost": 0' in (result.stdout or b"")
    assert recording.stat().st_size > 0


def test_a_panic_is_a_lost_guest_and_no_failing_command(kernel_of) -> None:
    with pytest.raises(LostVM, match="kernel panic: sysrq triggered crash") as lost:
        run_in_vm(
            ["sh", "-c", "echo c >/proc/sysrq-trigger; exit 1"], kernel_of("6.12"), capture=True
        )
    assert lost.value.console_tail[0].endswith("Kernel panic - not syncing: sysrq triggered crash")
    assert any("sysrq_handle_crash" in line for line in lost.value.console_tail)


def test_a_guest_that_cannot_have_what_was_asked_for_runs_nothing(kernel_of, tmp_path) -> None:
    options = VmOptions(writable=[tmp_path], swap_bytes=1 << 62)
    with pytest.raises(CannotRun, match=f"given {1 << 62} bytes of swap"):
        run_in_vm(["touch", str(tmp_path / "ran")], kernel_of("6.12"), options, capture=True)
    assert not (tmp_path / "ran").exists()


def test_a_guest_that_does_not_need_its_swap_does_without(kernel_of) -> None:
    result = run_in_vm(
        ["cat", "/proc/swaps"],
        kernel_of("6.12"),
        VmOptions(swap_bytes=64 << 20, needs_swap=False, append=["module_blacklist=zram"]),
        capture=True,
    )
    assert result.exit_status == 0
    assert len((result.stdout or b"").splitlines()) == 1  # its heading


def guests_of(parent: int) -> list[str]:
    listed = subprocess.run(
        ["ps", "--no-headers", "-o", "args", "--ppid", str(parent)], capture_output=True, text=True
    )
    return [line for line in listed.stdout.splitlines() if "qemu-system" in line]


def test_ctrl_c_and_time_out_reach_the_command(kernel_of, tmp_path: Path) -> None:
    kernel_of("6.12")
    program = str(Path(sys.executable).with_name("ksmtrace"))
    script = "trap 'echo interrupted; exit 7' INT; echo ready; sleep 6000 & wait"
    with subprocess.Popen(
        [program, "vm", "run", "-k", "6.12", "--", "sh", "-c", script],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "ready\n"
        assert guests_of(running.pid)
        os.killpg(running.pid, signal.SIGINT)
        assert running.stdout.read() == "interrupted\n"
    assert running.returncode == 130

    # Longer than pytest allows: it ends because it is ended.
    done = subprocess.run([program, "vm", "run", "-k", "6.12", "-t", "1", "--", "sleep", "6000"])
    assert done.returncode == 124
