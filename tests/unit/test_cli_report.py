import contextlib
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from ksmtrace.analysis.report import TOPICS
from ksmtrace.cli.sections import SECTIONS
from ksmtrace.units import text_share

GOLDENS = Path(__file__).parents[1] / "golden" / "recordings"
NAMES = sorted(path.stem for path in GOLDENS.glob("*.ksmt"))
KSMTRACE = [sys.executable, "-c", "from ksmtrace.cli import main; main()"]


def run(*arguments, **options):
    return subprocess.run(
        [*KSMTRACE, *map(str, arguments)], capture_output=True, text=True, timeout=300, **options
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_recording_has_a_report_in_text(name):
    done = run("report", "--all", GOLDENS / f"{name}.ksmt")
    assert (done.returncode, done.stderr) == (0, "")
    first, _, third, *_ = done.stdout.splitlines()
    assert first.startswith(f"{GOLDENS / name}.ksmt: Linux ")
    assert third.startswith("INCOMPLETE" if name in ("losses", "killed") else "COMPLETE")


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("guest-")])
def test_a_guests_recording_has_every_section(name):
    text = run("report", GOLDENS / f"{name}.ksmt").stdout
    sections = (
        "WHAT ASKS FOR ACTION", "IS KSM PAYING?", "SCAN PASSES:", "PAGE BY PAGE:", "MERGES:",
        "OUTCOMES:", "REMOVALS:", "UNMERGING:", "MIGRATIONS:", "LOCKS:", "RACES AND", "COSTS,",
        "PROCESSES:", "WHO SHARES WITH WHOM", "COUNTERS, AND WHAT", "FUNCTIONS WITH PROGRAMS",
        "EVENTS, BY HOW", "NOT VISIBLE",
    )  # fmt: skip
    heads = [line for line in text.splitlines()[3:] if line and not line.startswith(" ")]
    assert len(heads) == len(sections)
    assert all(head.startswith(section) for head, section in zip(heads, sections, strict=True))
    assert "nothing found" in text
    assert "contradiction" not in text


def test_a_section_alone_is_what_it_is_in_the_whole():
    file = GOLDENS / "guest-7.x-moves.ksmt"
    head, *whole = run("report", file).stdout.rstrip().split("\n\n")
    assert len(whole) == len(SECTIONS)
    done = run("report", file, *(f"--section={section.name}" for section in reversed(SECTIONS)))
    assert done.stdout.rstrip().split("\n\n") == [head, *whole]
    done = run("report", file, "--section", "migrations")
    assert done.stdout.rstrip().split("\n\n") == [head, whole[8]]
    assert whole[8].startswith("MIGRATIONS: 7 moves")


def test_a_section_of_json_is_the_head_and_its_keys():
    file = GOLDENS / "guest-7.x-moves.ksmt"
    whole = json.loads(run("report", "--json", file).stdout)
    done = run("report", "--json", file, "--section", "merges", "--section", "migrations")
    part = json.loads(done.stdout)
    assert {"complete", "lost", "incomplete_because"} <= part.keys()
    asked = {"merges", "zero_pages", "rates", "migrations"}
    assert part.keys() - (whole.keys() - TOPICS.keys()) == asked
    assert all(part[key] == whole[key] for key in part)


def test_every_topic_is_in_a_section():
    assert {key for section in SECTIONS for key in section.keys} == TOPICS.keys()
    assert len({section.name for section in SECTIONS}) == len(SECTIONS)


def test_an_unknown_section_is_status_2_and_lists_the_names():
    done = run("report", GOLDENS / "cow.ksmt", "--section", "cows")
    assert (done.returncode, done.stdout) == (2, "")
    assert all(f"'{section.name}'" in done.stderr for section in SECTIONS)


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        (
            "guest-5.10-cow",
            [
                "copied again on write during the recording (cow_ksm): absent",
                "ksmd looked at 424 pages (inlined site)",
                "(COW, unmap, unmerge, exit): 11, of which 0 were their node's last",
                "UNMERGING: none (no call of break_ksm)",
                "MIGRATIONS: none (no KSM page moved)",
                "  absent: ksm_advisor",
                "cmp_and_merge_page only counted",
            ],
        ),
        (
            "guest-6.12-pinned-derived",
            [
                "ksmd looked at 160 pages (derived)",
                "searches of the stable tree (derived, without those of an empty tree)",
                "0 more were skipped by smart_scan",
                "8 failed with EFAULT",
                "5 were undone",
                "UNMERGING: 5 calls of break_ksm for 5 pages",
                "this kernel calls it for every address of an area",
                "  by ksmd (",
                "0: 69, EFAULT: 8",
            ],
        ),
        (
            "guest-7.x-fork-every-page",
            [
                "ksmd looked at 505 pages (inlined site)",
                "found: nothing 14, an equal KSM page 87, the page itself, by a fork 201",
                "inlined site: cmp_and_merge_page 504, stable_tree_search 302",
            ],
        ),
        (
            "guest-7.x-moves",
            [
                "UNMERGING: 2 calls of break_ksm for 217 pages",
                "MIGRATIONS: 7 moves of KSM pages, of 5 stable nodes",
                "  node 0 to node 1: 6, node 1 to node 0: 1",
            ],
        ),
    ],
)
def test_a_guests_numbers_are_in_the_text(name, lines):
    text = run("report", GOLDENS / f"{name}.ksmt").stdout
    for line in lines:
        assert line in text, line


def test_what_an_old_recording_lacks_is_not_shown_as_zero():
    text = run("report", GOLDENS / "duplicates.ksmt").stdout
    for line in (
        "PAGE BY PAGE: not visible on this kernel",
        "UNMERGING: not visible on this kernel",
        "MIGRATIONS: not visible on this kernel",
        "FUNCTIONS: no programs on any",
    ):
        assert line in text, line
    absent = text[text.index("  absent: ") : text.index("NOT VISIBLE")]
    assert "break_ksm" in absent and "stable_tree_append" in absent


def test_what_is_not_visible_is_listed_and_never_shown_as_zero():
    text = run("report", GOLDENS / "duplicates.ksmt").stdout
    listed = text[text.index("NOT VISIBLE ON THIS KERNEL") :]
    for gap in (
        "single sharer leaving", "last sharer of a stable node", "unstable tree", "checksum",
        "smart scan", "why a merge failed", "COW break", "unmerging", "migration", "chains",
        "zero pages placed by KSM being unmapped", "swap-in", "dropping an mm", "locks",
    ):  # fmt: skip
        assert gap in listed, gap
    assert "not visible on this kernel" in text[: text.index("NOT VISIBLE")]
    assert "(sampled)" in text


def test_the_end_of_a_crashed_command_is_named():
    assert "SIGSEGV" in run("report", GOLDENS / "crash.ksmt").stdout


def test_losses_are_told_first():
    lines = run("report", GOLDENS / "losses.ksmt").stdout.splitlines()
    assert lines[2] == "INCOMPLETE: 63 events, 247 lost"
    assert "246 ksm_merge_with_ksm_page" in lines[3]


def test_json_is_all_that_is_on_stdout():
    done = run("report", "--json", GOLDENS / "cow.ksmt")
    assert json.loads(done.stdout)["complete"] is True
    assert done.stderr == ""


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", bytes(4096)])
def test_a_foreign_file_is_one_line_with_a_hint_and_status_5(tmp_path, content):
    (tmp_path / "f").write_bytes(content)
    done = run("report", tmp_path / "f")
    assert (done.returncode, done.stdout) == (5, "")
    error, hint = done.stderr.splitlines()
    assert error.startswith("ksmtrace: ") and hint.startswith("HINT: ")


def test_a_file_that_is_not_there_or_a_directory_is_status_5(tmp_path):
    for path in (tmp_path / "absent", tmp_path):
        done = run("report", path)
        assert done.returncode == 5
        assert [line[:6] for line in done.stderr.splitlines()] == ["ksmtra", "HINT: "]


@pytest.fixture
def damaged(tmp_path) -> Path:
    content = bytearray((GOLDENS / "guest-6.12-witnessed.ksmt").read_bytes())
    content[len(content) * 3 // 4] ^= 255
    path = tmp_path / "damaged.ksmt"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "command",
    [
        ("report",), ("report", "--until", "1"), ("check",), ("tree",), ("tree", "--at", "1"),
        ("tree", "--pfn", "1"), ("tree", "--verify"),
    ],
)  # fmt: skip
def test_damage_is_said_first_and_what_came_before_is_told(damaged, command):
    name, *options = command
    for as_json in ((), ("--json",)):
        done = run(name, damaged, *options, *as_json)
        assert (done.returncode, done.stderr) == (0, "")
        head = " ".join(done.stdout[:3000].split())
        assert "is damaged before or at byte" in (done.stdout if as_json else head)
        if as_json:
            json.loads(done.stdout)
        else:
            assert "INCOMPLETE" in head or "the recording is incomplete" in head


def test_a_damaged_header_is_status_5_and_prints_no_report(tmp_path):
    content = (GOLDENS / "lifetime.ksmt").read_bytes()
    (tmp_path / "f").write_bytes(content.replace(b'"started_ns"', b'"sta\x00ted_ns"', 1))
    done = run("report", tmp_path / "f")
    assert (done.returncode, done.stdout) == (5, "")
    assert "its header does not decode" in done.stderr and "HINT: " in done.stderr


def test_a_closed_pipe_is_no_error():
    command = " ".join(f"'{word}'" for word in [*KSMTRACE, "report"])
    for options in ("", "--json"):
        done = subprocess.run(
            ["bash", "-c", f"{command} {options} '{GOLDENS}/lifetime.ksmt' | head -c 1"],
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.stderr == ""


def test_a_closed_pipe_is_no_violated_claim():
    # Larger than a pipe holds, so that the writer meets the closed end.
    program = f"{sys.executable} -c 'import ksmtrace.cli as c; c.main()'"
    file = GOLDENS / "guest-6.12-witnessed.ksmt"
    done = subprocess.run(
        ["bash", "-c", f"{program} report --json '{file}' | true; exit ${{PIPESTATUS[0]}}"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--interval", "nan"), ("--interval", "inf"), ("--interval", "0"), ("-d", "nan"),
        ("-d", "-1"), ("-d", "x"), ("--ring", "x"), ("--ring", ""), ("--ring", "-4K"),
        ("--ring", "1.5M"), ("--", "no-such-command"), ("--no-such-option",),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_status_2(tmp_path, arguments):
    done = run("record", *arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_help_and_report_import_no_capture():
    program = (
        "import sys; sys.argv = {argv!r}\n"
        "from ksmtrace.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print([m for m in {unwanted!r} if m in sys.modules], file=sys.stderr)"
    )
    cases = (
        (["ksmtrace", "--help"], ["bcc", "pandas", "textual", "numpy", "pyarrow"]),
        (["ksmtrace", "record", "--help"], ["bcc", "pandas", "textual"]),
        (
            ["ksmtrace", "report", str(GOLDENS / "cow.ksmt")],
            ["bcc", "textual", "pyroute2", "matplotlib"],
        ),
    )
    for argv, unwanted in cases:
        done = subprocess.run(
            [sys.executable, "-c", program.format(argv=argv, unwanted=unwanted)],
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.stderr == "[]\n"


@pytest.mark.parametrize(
    ("share", "text"),
    [(0, "0.0%"), (1 / 32979, "<0.1%"), (0.5, "50.0%"), (32966 / 32979, ">99.9%"), (1, "100.0%")],
)
def test_all_and_none_are_said_of_all_and_none_only(share, text):
    assert text_share(share) == text


@pytest.mark.parametrize("command", ["report", "tree", "check"])
def test_where_numpy_does_not_sort_nothing_is_said(command):
    # As under QEMU 7.2 with AVX2.
    broken = (
        "import numpy\nnumpy.argsort = lambda keys, **_: numpy.arange(len(keys))\n"
        "from ksmtrace.cli import main\nmain()"
    )
    program = [sys.executable, "-c", broken, command, GOLDENS / "guest-7.x-churn.ksmt"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith("ksmtrace: numpy sorts wrongly on this CPU")
    assert "-cpu max,-avx2" in done.stderr


@pytest.mark.parametrize("command", ["report", "tree", "check"])
def test_what_takes_long_is_said_on_a_terminal(command):
    at_once = (
        "from ksmtrace.cli import main, waiting\nwaiting._FIRST_S = waiting._STEP_S = 0.0\nmain()"
    )
    file = GOLDENS / "guest-7.x-churn.ksmt"
    ours, theirs = pty.openpty()
    program = [sys.executable, "-c", at_once, command, str(file)]
    with subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=theirs) as process:
        os.close(theirs)
        told = b""
        with contextlib.suppress(OSError):  # a terminal's end
            while part := os.read(ours, 1 << 16):
                told += part
    os.close(ours)
    assert process.returncode == 0
    assert f"\r\x1b[Kreading {file}: 0 s".encode() in told and told.endswith(b"\r\x1b[K")


def text_of(name, *options):
    done = run("report", GOLDENS / f"{name}.ksmt", *options)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def content_of(name, *options):
    return json.loads(text_of(name, "--json", *options))


def test_what_is_left_of_lost_events_is_not_said_to_be_all():
    text = text_of("losses")
    assert "MERGES: at least 57 attempts" in text
    assert "no two processes" not in text.replace("tell of no two processes", "")
    assert "merged, failed, removed, zero and shared may be more" in text
    assert "per merged page" not in text
    assert content_of("losses")["profit"]["yield"]["merged_pages"] is None


def test_a_span_without_a_sample_is_not_taken_for_a_kernel_without_counters():
    text = text_of("contended-knobs", "--since", 0.523, "--until", 1.221)
    assert "no sample of the kernel's counters is in the span" in text
    assert "absent" not in text.split("EVENTS, BY HOW")[0]
    assert "the recording has no tallies" not in text


def test_no_speed_is_told_of_passes_as_short_as_a_tick():
    # Of 404 pages in 783 us of CPU time, the lagging clock of the passes would make 32 million/s.
    assert content_of("zero")["scans"]["pages_per_cpu_second"] is None
    scans = content_of("contended-storm")["scans"]
    counted = 35_005 / 0.28107
    assert scans["pages_per_cpu_second"] == pytest.approx(counted, rel=0.1)


@pytest.mark.parametrize("name", ["zero", "guest-7.x-churn"])
def test_what_a_merged_page_costs_is_the_same_everywhere(name):
    found = [
        part
        for line in text_of(name).splitlines()
        for part in line.replace(";", ",").split(", ")
        if part.endswith("per merged page")
    ]
    assert len(found) == 2 and len({part.strip() for part in found}) == 1


def test_a_little_cpu_time_is_not_none():
    assert "(<0.1% of one CPU)" in text_of("guest-5.10-cow")


def test_each_mm_is_counted_once():
    races = {race["id"]: race for race in content_of("guest-7.x-churn")["races"]}
    assert races["R12"]["evidence"] == ["661 merges; mms that came: 2, that left: 2"]


def test_a_part_of_the_calls_is_not_taken_for_all_of_them(golden):
    from ksmtrace.analysis.calls import find_calls

    for name in NAMES:
        for function, call in (find_calls(golden(name)) or {}).items():
            if call.results is not None and call.returned is not None:
                assert abs(sum(call.results.values()) - call.returned) <= 3, (name, function)
