"""What is asked of the commands wrongly: one line, a hint, and the right status."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

GOLDENS = Path(__file__).parents[1] / "golden" / "recordings"
VISITS = GOLDENS / "guest-6.12-visits.ksmt"
NAMES = sorted(path.stem for path in GOLDENS.glob("*.ksmt"))


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-c", "from ksmtrace.cli import main; main()", *map(str, arguments)],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        ("--pfn", 10**26), ("--pfn", -1), ("--address", "1:" + "f" * 17), ("--address", "1:-1"),
        ("--address", "-5:7f000"), ("--verify", "--at", 1), ("--verify", "--by", "node"),
        ("--verify", "--pfn", 0),
    ],
)  # fmt: skip
def test_a_page_that_cannot_be_and_options_that_would_be_ignored_are_status_2(options):
    done = run("tree", VISITS, *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr and done.stderr


@pytest.mark.parametrize("options", [("--json",), ("--ktap",), (VISITS,)])
def test_a_list_of_claims_ignores_nothing(options):
    done = run("check", "--list", *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert "HINT: " in done.stderr


@pytest.mark.parametrize("command", ["report", "check", "tree"])
def test_a_file_that_cannot_be_read_comes_with_a_hint(tmp_path, command):
    (tmp_path / "empty").touch()
    for name in ("absent", "empty"):
        done = run(command, tmp_path / name)
        assert (done.returncode, done.stdout) == (5, "")
        error, hint = done.stderr.splitlines()
        assert name in error and hint.startswith("HINT: ")


def test_a_page_of_no_recording_is_no_traceback(tmp_path):
    (tmp_path / "page.html").touch()
    done = run("report", tmp_path / "absent", "--html", tmp_path / "page.html")
    assert done.returncode == 5 and "Traceback" not in done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_the_times_that_a_hint_names_can_be_given(name):
    from ksmtrace.cli.times import moment_ns
    from ksmtrace.errors import UsageError
    from ksmtrace.recording.reader import RecordingReader
    from ksmtrace.stream import time_of

    reader = RecordingReader(GOLDENS / f"{name}.ksmt")
    edges = reader.header.started_ns, max(map(time_of, reader))
    with pytest.raises(UsageError) as caught:
        moment_ns(VISITS, 1e9, *edges)
    first, last, earliest, latest = re.findall(r"-?[\d.]+\d|-?0", caught.value.hint)[-4:]
    assert moment_ns(VISITS, float(first), *edges) == edges[0]
    assert edges[1] - 1_000_000 <= moment_ns(VISITS, float(last), *edges) <= edges[1]
    assert edges[0] <= moment_ns(VISITS, float(earliest), *edges) <= edges[0] + 1_000_000
    assert moment_ns(VISITS, float(latest), *edges) == edges[1]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize("command", ["report", "check", "tree", "top"])
def test_a_recording_of_somebody_else_is_status_5(tmp_path, command):
    # The interpreter itself may be out of reach of anybody else: only the check is made as nobody.
    path = tmp_path / "theirs.ksmt"
    path.write_bytes(VISITS.read_bytes())
    path.chmod(0o600)
    tmp_path.chmod(0o755)
    program = (
        "import os, sys\n"
        "from ksmtrace.cli import main\n"
        "import ksmtrace.recording.reader, ksmtrace.analysis.report, ksmtrace.claims.table\n"
        "import ksmtrace.claims.judgement, ksmtrace.claims.ktap, ksmtrace.tui.replay\n"
        "os.seteuid(65534)\n"
        "main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, command, path], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 5, done.stderr
    assert "Permission denied" in done.stderr and "HINT: " in done.stderr
