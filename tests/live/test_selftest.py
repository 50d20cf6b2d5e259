"""ksmtrace selftest on the running kernel."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ksmtrace.claims.table import CLAIMS
from ksmtrace.kernel.sysfs import read_ksm
from ksmtrace.workload.registered import nr_rmap_items

pytestmark = pytest.mark.live

MERGEABLE = """
import mmap, sys
area = mmap.mmap(-1, 7 * mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
area.madvise(mmap.MADV_MERGEABLE)
area[0] = 1
print("{}", flush=True)
sys.stdin.read()
"""


def test_the_running_kernel_passes_and_is_left_as_it_was(live, clean):
    programs = live.nr_programs()
    done = subprocess.run(
        [*live.ksmtrace, "selftest", "--ktap"], capture_output=True, text=True, timeout=1000
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[:4] == ["KTAP version 1", "1..1", "    KTAP version 1", f"    1..{len(CLAIMS)}"]
    tests = [line for line in lines if re.match(r" *(not )?ok ", line)]
    assert len(tests) == len(CLAIMS) + 1
    assert not [line for line in tests if line.lstrip().startswith("not ok")]
    skipped = {line.split()[2] for line in tests if "# SKIP" in line}
    # What the workloads and the tracepoints show on every kernel that has them.
    held = {"C02", "C19", "C22", "C26", "C44", "C39", "C52", "D3", "D6", "I10"}
    assert not held & skipped
    assert nr_rmap_items(read_ksm()) == 0
    live.wait_until(lambda: live.nr_programs() <= programs)


def test_it_is_skipped_where_others_use_ksm(live, clean):
    with live.holding(sys.executable, "-c", MERGEABLE):
        done = subprocess.run(
            [*live.ksmtrace, "selftest", "--claim", "C22", "--ktap"],
            capture_output=True,
            text=True,
            timeout=1000,
        )
    assert done.returncode == 4, done.stderr
    assert re.fullmatch(
        r"KTAP version 1\n1\.\.0 # SKIP KSM is in use by .*: what they do cannot be told .*\n",
        done.stdout,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_can_be_stopped_at_any_time(live, clean, number):
    with subprocess.Popen(
        [*live.ksmtrace, "selftest", "--claim", "D1"], stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("static: begins"):
                break
        live.wait_until(lambda: read_ksm()["pages_unshared"])
        process.send_signal(number)
        process.stderr.read()
        assert process.wait(300) == 128 + number
    left = [path for path in Path("/proc").glob("[0-9]*/comm") if is_ours(path)]
    assert left == []


def is_ours(path: Path) -> bool:
    try:
        return path.read_text().startswith(("ksm-static", "ksm-guardian"))
    except OSError:
        return False


def test_one_claim_is_judged_with_its_workload_alone(live, clean):
    done = live.run("selftest", "--claim", "C22", "--json")
    assert done.returncode == 0, done.stderr
    (outcome,) = json.loads(done.stdout)["kernels"]
    assert {claim["id"]: claim["verdict"] for claim in outcome["claims"]} == {"C22": "holds"}
    begun = [line for line in done.stderr.splitlines() if line.endswith(": begins")]
    assert begun == ["unmerge: begins"]
