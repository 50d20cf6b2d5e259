"""Kernel truth and page truth in real guests: each other's witness, and sysfs the third.

What happens in the guest is in ksm_witnesses.py; the numbers here follow from it by hand.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from ksmtrace.kernel.ksm_layout import NEEDED_SYMBOLS
from ksmtrace.vm import Kernel, VmOptions, run_in_vm

pytestmark = pytest.mark.vm

PROGRAM = Path(__file__).with_name("ksm_witnesses.py")
CONTENTS, COPIES, UNIQUE, LIMIT = 13, 101, 17, 7
MERGED = CONTENTS * COPIES


@pytest.fixture
def run(well_ended):
    def run(kernel: Kernel, options: VmOptions, *arguments: str) -> dict[str, Any]:
        command = [sys.executable, str(PROGRAM), *arguments]
        result = run_in_vm(command, kernel, options, capture=True, timeout_s=1100)
        well_ended(result)
        phases: dict[str, Any] = json.loads(result.stdout or b"")
        return phases

    return run


def assert_true_to_itself(phase: dict[str, Any], nr_files: int) -> None:
    assert phase["torn"] == []
    assert phase["changed"] == []
    assert phase["consistent"]
    assert phase["violations"] == []
    assert phase["sysfs"] == {}
    assert phase["sysfs_compared"] == nr_files


# What a kernel without /proc/kcore and a list of its data has to go by, beside one that has both.
def assert_the_same_without_them(phase: dict[str, Any], nr_sharers: int) -> None:
    assert set(NEEDED_SYMBOLS) < set(phase["found"])
    for name in ("differ", "not_listed", "not_found", "arrays_differ"):
        assert phase[name] == [], name
    assert phase["nr_sharers"] == nr_sharers
    assert phase["cursors_agree"]


@pytest.mark.parametrize(
    ("series", "nr_files", "trusted"),
    [("5.10", 10, True), ("6.1", 10, True), ("6.12", 14, False), ("7.x", 14, True)],
)
def test_both_witnesses_agree_on_every_page(
    run, kernel_of, series: str, nr_files: int, trusted: bool
) -> None:
    # Memory that can be taken out, for one of them: ranges of /proc/kcore come and go.
    hotplug_bytes = (256 << 20) if series == "6.12" else 0
    phases = run(kernel_of(series), VmOptions(hotplug_bytes=hotplug_bytes), "plain")

    for name in ("merged", "offline", "changed", "scanned", "stopped", "unmerged"):
        assert_true_to_itself(phases[name], nr_files)
        assert phases[name]["kpf_ksm"] is trusted
        assert phases[name]["mapcounts"]

    # 303 equal pages need 43 nodes of 7 sharers and one of 2: 44 dups below one chain.
    merged = phases["merged"]
    assert merged["differences"] == {}
    assert merged["states"] == {"STABLE": 3 * MERGED, "UNSTABLE": 3 * UNIQUE}
    assert merged["kinds"] == {"CHAIN": CONTENTS, "DUP": CONTENTS * 44}
    assert merged["longest"] == LIMIT
    assert merged["frames"]
    # Where KPF_KSM cannot be trusted, the two pages of a dup may be no more than possible ones.
    assert merged["nr_told_wrongly"] == 0
    assert merged["nr_ksm_pages"] + merged["nr_not_told"] == 3 * MERGED
    assert merged["nr_not_told"] <= (0 if trusted else 2 * CONTENTS)

    assert_the_same_without_them(phases["code"], 3 * MERGED)

    # The pages that were in memory taken out have moved, and their nodes with them.
    assert phases["nr_offline"] == hotplug_bytes >> 27
    assert (phases["offline"]["nr_ranges"] < merged["nr_ranges"]) == (hotplug_bytes > 0)
    for name in ("differences", "states", "kinds", "frames"):
        assert phases["offline"][name] == merged[name]

    # One forked, one was killed, and one unmapped, dropped, wrote to and unmerged some: ksmd knows
    # nothing of it, and each page's difference has its cause.
    changed = phases["changed"]
    assert changed["differences"] == {
        "EXITED": MERGED,
        "UNMERGED": 211 + 97,
        "DROPPED": 107,
        "WRITTEN": 103,
        "NOT_SCANNED": MERGED,
    }
    assert changed["states"] == merged["states"]
    assert changed["exited"] == 1
    assert changed["owners"][0] == -1
    assert changed["stale"] > 0

    # In the midst of a pass some of that is done, and nothing is without explanation.
    for step in phases["steps"]:
        assert_true_to_itself(step, nr_files)
        assert step["differences"].keys() <= {*changed["differences"], "DETACHED"}
    assert not all(step["at_head"] for step in phases["steps"])

    for name in ("scanned", "stopped"):
        scanned = phases[name]
        assert scanned["differences"] == {}
        assert scanned["states"]["STABLE"] == 3 * MERGED - 211 - 97 - 107 - 103
        assert scanned["longest"] > LIMIT, "the pages of a fork bypass max_page_sharing"
        assert scanned["stale"] == 0
        assert scanned["exited"] == 0
        # Where KPF_KSM cannot be trusted, pages that fork shares may be candidates too.
        assert scanned["frames"] or not trusted
        assert scanned["nr_told_wrongly"] == 0

    assert set(phases["scanning"]["attempts"]) <= {1, 2, 3}

    assert phases["unmerged"]["differences"] == {}
    assert phases["unmerged"]["states"] == phases["unmerged"]["kinds"] == {}
    assert phases["unmerged"]["nr_ksm_pages"] == 0


# On 6.1 ksmd looks for an ordinary page's content in the stable tree when it first sees it.
def test_nodes_of_two_numa_nodes_and_those_between(run, kernel_of) -> None:
    phases = run(kernel_of("6.1"), VmOptions(numa_nodes=2), "numa")

    steps = phases["steps"]
    for phase in (phases["merged"], phases["moved"], *steps, phases["scanned"]):
        assert_true_to_itself(phase, 10)

    # In each tree 101 equal pages have 15 dups below a chain.
    merged = phases["merged"]
    assert merged["differences"] == {}
    assert merged["kinds"] == {"CHAIN": 2 * CONTENTS, "DUP": 2 * CONTENTS * 15}
    assert merged["roots"] == {"0": CONTENTS * 16, "1": CONTENTS * 16}

    assert_the_same_without_them(phases["code"], 2 * MERGED)

    # Migration moves kpfn with the page, and nothing else.
    assert min(phases["nr_moved"]) > 0
    assert phases["moved"]["differences"] == {}
    assert phases["moved"]["kinds"] == merged["kinds"]
    assert phases["moved"]["roots"] == merged["roots"]

    # One dup of each content has room and is found, and displaced.
    assert max(step["kinds"].get("MIGRATING", 0) for step in steps) == CONTENTS
    for step in steps:
        assert step["differences"].keys() <= {"DETACHED"}
        assert step["nr_ksm_pages"] == 2 * MERGED

    assert phases["scanned"]["differences"] == {}
    assert phases["scanned"]["kinds"] == merged["kinds"]
    assert phases["scanned"]["states"]["STABLE"] == 2 * MERGED + CONTENTS
