"""Every way out of a recording: the message, the exit status, the file, the knobs, the programs."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ksmtrace.capture.bcc_backend import Programs
from ksmtrace.capture.hooks import Attachment
from ksmtrace.errors import BackendUnavailable
from ksmtrace.workload.knobs import read_knobs

pytestmark = pytest.mark.live
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def nothing_stays_loaded(live):
    before = live.nr_programs()
    yield
    live.wait_until(lambda: live.nr_programs() <= before)


def one_error(stderr: str) -> str:
    """Return the one line of the error; the hint is the only other."""
    errors = [line for line in stderr.splitlines() if line.startswith("ksmtrace: ")]
    assert len(errors) == 1, stderr
    assert "Traceback" not in stderr
    return errors[0]


def hint(stderr: str) -> str:
    (line,) = [line for line in stderr.splitlines() if line.startswith("HINT: ")]
    return line


# --- signals


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (signal.SIGINT, "interrupted"),
        (signal.SIGTERM, "stopped by SIGTERM"),
        (signal.SIGHUP, "stopped by SIGHUP"),
    ],
)
def test_a_signal_ends_the_recording_in_order(live, tmp_path, number, reason):
    with live.recording(tmp_path / "f") as recorder:
        assert live.nr_programs() > 0
        ended = recorder.end(number)
    assert ended.status == 0
    assert ended.summary["reason"] == reason
    content = live.report(tmp_path / "f")
    assert (content["complete"], content["ended_because"]) == (True, reason)


def test_after_sigkill_the_file_reads_as_incomplete(live, tmp_path):
    with live.recording(tmp_path / "f") as recorder:
        assert recorder.end(signal.SIGKILL).status == -signal.SIGKILL
    content = live.report(tmp_path / "f")
    assert content["complete"] is False
    assert content["incomplete_because"] == ["it was cut off: the file ends before its trailer"]
    text = live.run("report", str(tmp_path / "f")).stdout
    assert "INCOMPLETE" in text and "the file ends before its trailer" in text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_a_workload_is_recorded_restores_the_knobs(live, tmp_path, number):
    knobs = read_knobs()
    command = (*live.ksmtrace, "workload", "duplicates", "--pages", "50", "--hold", "500")
    with live.recording(tmp_path / "f", command=command) as recorder:
        live.wait_until(lambda: read_knobs() != knobs)
        if number == signal.SIGINT:  # as a terminal does: to the whole process group
            for child in children(recorder.process.pid):
                os.kill(child, number)
        ended = recorder.end(number)
    assert ended.status == 0
    assert ended.summary["command_exit_status"] == 128 + number
    assert live.report(tmp_path / "f")["complete"] is True
    assert read_knobs() == knobs


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_killed_recorder_leaves_the_recorded_command_alone(live, tmp_path):
    with live.recording(tmp_path / "f", command=("sleep", "1000")) as recorder:
        (child,) = live.wait_until(lambda: children(recorder.process.pid))
        # It is a copy of the recorder until it has become the command.
        live.wait_until(lambda: Path(f"/proc/{child}/comm").read_text() == "sleep\n")
        recorder.process.kill()
        recorder.process.wait()
        assert Path(f"/proc/{child}/comm").read_text() == "sleep\n"
        os.kill(child, signal.SIGKILL)


def test_a_command_that_ignores_signals_is_killed_by_the_second(live, tmp_path):
    command = ("sh", "-c", "trap '' TERM; while :; do sleep 1; done")
    with live.recording(tmp_path / "f", command=command) as recorder:
        live.wait_until(lambda: children(recorder.process.pid))
        recorder.process.send_signal(signal.SIGTERM)
        ended = recorder.end(signal.SIGTERM)
    assert ended.status == 0
    assert ended.summary["command_exit_status"] in (-signal.SIGKILL, -signal.SIGTERM)


# --- files


def test_a_full_disk_ends_the_recording_with_what_fits(live, tmp_path):
    mount = tmp_path / "small"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(mount)], check=True)
    try:
        path = mount / "f"
        done = live.run("record", "--json", "--interval", "0.01", "-d", "250", "-o", str(path))
        assert done.returncode == 3
        assert "No space left on device" in one_error(done.stderr)
        assert "incomplete but readable" in hint(done.stderr)
        assert json.loads(done.stdout)["file_bytes"] == path.stat().st_size > 0
        content = live.report(path)
        assert content["complete"] is False
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_a_disk_that_is_full_from_the_start_is_told_of(live, tmp_path):
    mount = tmp_path / "small"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "none", str(mount)], check=True)
    try:
        done = live.run("record", "-d", "0", "-o", str(mount / "f"))
        assert done.returncode == 3
        assert "No space left on device" in one_error(done.stderr)
        assert "readable" not in done.stderr  # nothing of it is
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_an_existing_file_is_kept(live, tmp_path):
    (tmp_path / "f").write_text("precious")
    done = live.run("record", "-d", "0", "-o", str(tmp_path / "f"))
    assert done.returncode == 2
    assert "exists" in one_error(done.stderr)
    assert "--force" in hint(done.stderr)
    assert (tmp_path / "f").read_text() == "precious"


def test_an_unwritable_directory_is_told_of(live):
    done = live.run("record", "-d", "0", "-o", "/proc/1/f")
    assert done.returncode in (2, 3)
    one_error(done.stderr)


def test_a_command_that_the_kernel_cannot_run_is_wrong_usage(live, tmp_path):
    program = tmp_path / "program"
    program.write_bytes(b"\x00garbage")
    program.chmod(0o755)
    done = live.run("record", "-o", str(tmp_path / "f"), "--", str(program))
    assert done.returncode == 2
    assert "Exec format error" in one_error(done.stderr)


# --- what this machine lacks


def as_nobody(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *command],
        capture_output=True, text=True, timeout=300, cwd=cwd,
    )  # fmt: skip


def test_without_root_recording_is_refused_and_the_rest_works(live, tmp_path):
    cwd = Path("/")
    done = as_nobody(*live.ksmtrace, "record", "-d", "0", "-o", "/tmp/never", cwd=cwd)
    assert done.returncode == 3
    assert "may not load tracing programs" in one_error(done.stderr)
    assert "root" in hint(done.stderr)
    assert not Path("/tmp/never").exists()

    golden = ROOT / "tests/golden/recordings/duplicates.ksmt"
    done = as_nobody(*live.ksmtrace, "report", "--json", str(golden), cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["merges"]["succeeded"] == 303

    private = tmp_path / "f"
    assert live.run("record", "-d", "0", "-o", str(private)).returncode == 0
    done = as_nobody(*live.ksmtrace, "report", str(private), cwd=cwd)
    assert done.returncode == 5
    assert "Permission denied" in one_error(done.stderr)

    done = as_nobody(*live.ksmtrace, "doctor", "--json", cwd=cwd)
    assert done.returncode in (0, 3), done.stderr
    assert json.loads(done.stdout)["can_record"] is False


def in_mount_namespace(setup: str, *command: str) -> subprocess.CompletedProcess[str]:
    script = f"{setup} && exec {shlex.join(command)}"
    return subprocess.run(
        ["unshare", "-m", "--propagation", "private", "sh", "-c", script],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_without_ksm_in_the_kernel_recording_is_refused(live, tmp_path):
    without = in_mount_namespace(
        "mount -t tmpfs none /sys/kernel/mm",
        *(*live.ksmtrace, "record", "-d", "0", "-o", str(tmp_path / "f")),
    )
    assert without.returncode == 3, without.stderr
    assert "KSM" in one_error(without.stderr)
    assert "CONFIG_KSM" in hint(without.stderr)
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize("mounted", [False, True])
def test_tracefs_makes_no_difference(live, tmp_path, mounted):
    setup = "true"
    if mounted:
        setup = "mountpoint -q /sys/kernel/tracing || mount -t tracefs none /sys/kernel/tracing"
    elif os.path.ismount("/sys/kernel/tracing"):
        setup = "umount -l /sys/kernel/tracing"
    done = in_mount_namespace(
        setup, *live.ksmtrace, "record", "--json", "-d", "0", "-o", str(tmp_path / "f")
    )
    assert done.returncode == 0, done.stderr
    assert live.report(tmp_path / "f")["complete"] is True


def test_a_ring_larger_than_the_memory_allows_is_refused(live, tmp_path):
    done = live.run("record", "-d", "0", "--ring", "1024G", "-o", str(tmp_path / "f"))
    assert done.returncode == 3
    assert "memory available" in one_error(done.stderr)
    assert "--ring" in hint(done.stderr)
    assert not (tmp_path / "f").exists()


def test_a_missing_bcc_is_told_of(live, tmp_path):
    (tmp_path / "bcc.py").write_text("raise ImportError('no bcc here')\n")
    done = live.run(
        "record", "-d", "0", "-o", str(tmp_path / "f"),
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 3
    assert "bcc" in one_error(done.stderr)
    assert "python3-bpfcc" in hint(done.stderr)


# --- programs that cannot be loaded


def on_tracepoint(name: str) -> Attachment:
    return Attachment("raw_tracepoint", name, 0, f"on_{name}")


@pytest.mark.parametrize(
    ("source", "tracepoint"),
    [
        ("this is no C\n", "ksm_enter"),
        ("int on_ksm_enter(void *ctx) { return *(int *)ctx + undefined; }\n", "ksm_enter"),
        ("int on_ksm_enter(u64 *ctx) { return *(int *)ctx[100]; }\n", "ksm_enter"),
        ("int on_ksm_nonsense(void *ctx) { return 0; }\n", "ksm_nonsense"),
        ("int on_other(void *ctx) { return 0; }\n", "ksm_enter"),
    ],
)
def test_programs_that_do_not_load_leave_nothing_attached(live, tmp_path, source, tracepoint):
    path = tmp_path / "bad.c"
    path.write_text(f'#include "events.h"\nBPF_RINGBUF_OUTPUT(ring, RING_PAGES);\n{source}')
    before = live.nr_programs()
    with pytest.raises(BackendUnavailable) as caught:
        Programs([on_tracepoint(tracepoint)], {}, 4096, path)
    assert "\n" not in str(caught.value)
    assert caught.value.hint
    live.wait_until(lambda: live.nr_programs() <= before)


def test_a_define_that_makes_no_sense_is_refused(live):
    before = live.nr_programs()
    with pytest.raises(BackendUnavailable) as caught:
        Programs([on_tracepoint("ksm_enter")], {"ksm_event": 5}, 4096)
    assert "\n" not in str(caught.value)
    live.wait_until(lambda: live.nr_programs() <= before)


def test_a_tracepoint_attached_before_one_that_fails_is_detached_again(live):
    before = live.nr_programs()
    with pytest.raises(BackendUnavailable):
        Programs([on_tracepoint("ksm_enter"), on_tracepoint("ksm_nonsense")], {}, 4096)
    live.wait_until(lambda: live.nr_programs() <= before)


def test_the_console_script_is_installed(live):
    assert shutil.which("ksmtrace") or (Path(sys.executable).parent / "ksmtrace").exists()
